/*
 * Byte-exact images of a store's directory, and damage to its files. Part of
 * unit.h.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_UNIT_FILES_H
#define KVMETA_TEST_UNIT_FILES_H

#include "unit.h"

/* --------------------------------------------------------------------------
 * Images of the directory: what "as it was" means
 * -------------------------------------------------------------------------- */

/* More than a manifest lists, with the files beside it. */
#define UNIT_FILES_MAX 1200

struct unit_file {
    char name[64];
    mode_t mode;
    size_t bytes;
    unsigned char *data;             /* NULL where it is no regular file */
};

struct unit_image {
    int there;                       /* the directory exists */
    size_t count;
    struct unit_file files[UNIT_FILES_MAX];
};

UNIT_INLINE unsigned char *unit_read_path(const char *path, size_t *bytes)
{
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    unsigned char *data;
    struct stat st;

    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    *bytes = (size_t)st.st_size;
    data = malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(pread(fd, data, *bytes, 0), (ssize_t)*bytes);
    close(fd);
    return data;
}

UNIT_INLINE int unit_file_order(const void *a, const void *b)
{
    return strcmp(((const struct unit_file *)a)->name,
                  ((const struct unit_file *)b)->name);
}

UNIT_INLINE void unit_image_take(const char *path, struct unit_image *image)
{
    char child[2 * UNIT_PATH];
    struct dirent *entry;
    struct unit_file *file;
    struct stat st;
    DIR *dir = opendir(path);

    memset(image, 0, sizeof *image);
    image->there = dir != NULL;
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 ||
            strcmp(entry->d_name, "..") == 0) {
            continue;
        }
        assert_true(image->count < UNIT_FILES_MAX);
        file = &image->files[image->count++];
        assert_true(strlen(entry->d_name) < sizeof file->name);
        strcpy(file->name, entry->d_name);
        snprintf(child, sizeof child, "%s/%s", path, entry->d_name);
        assert_int_equal(lstat(child, &st), 0);
        file->mode = st.st_mode;
        if (S_ISREG(st.st_mode)) {
            file->data = unit_read_path(child, &file->bytes);
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    qsort(image->files, image->count, sizeof *file, unit_file_order);
}

UNIT_INLINE void unit_image_free(struct unit_image *image)
{
    size_t i;

    for (i = 0; i < image->count; i++) {
        free(image->files[i].data);
    }
    image->count = 0;
}

UNIT_INLINE void unit_image_same(const struct unit_image *a,
                                 const struct unit_image *b)
{
    size_t i;

    assert_int_equal(a->there, b->there);
    for (i = 0; i < a->count && i < b->count; i++) {
        assert_string_equal(a->files[i].name, b->files[i].name);
        assert_int_equal(a->files[i].mode, b->files[i].mode);
        assert_int_equal(a->files[i].bytes, b->files[i].bytes);
        if (a->files[i].bytes > 0) {
            assert_memory_equal(a->files[i].data, b->files[i].data,
                                a->files[i].bytes);
        }
    }
    assert_int_equal(a->count, b->count);
}

/* Writes the regular files of the image back; other entries are removed. */
UNIT_INLINE void unit_image_restore(const char *path,
                                    const struct unit_image *image)
{
    char child[2 * UNIT_PATH];
    size_t i;
    int fd;

    unit_remove_tree(path);
    assert_int_equal(mkdir(path, 0700), 0);
    for (i = 0; i < image->count; i++) {
        snprintf(child, sizeof child, "%s/%s", path, image->files[i].name);
        fd = open(child, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        assert_true(fd >= 0);
        assert_int_equal(write(fd, image->files[i].data,
                               image->files[i].bytes),
                         (ssize_t)image->files[i].bytes);
        close(fd);
    }
}

/* Opens, wants the code, and that everything stays as it is: the directory,
 * the out-parameter. The message is left in u->err. */
UNIT_INLINE void unit_open_fails(struct unit *u,
                                 const struct kvmeta_options *options,
                                 int code)
{
    struct unit_image before, after;
    char mark;
    kvmeta *db = (kvmeta *)&mark;
    int rc;

    unit_image_take(u->dir, &before);
    memset(&u->err, 0x5a, sizeof u->err);
    rc = kvmeta_open(u->dir, options, &db, &u->err);
    if (rc != code) {
        fail_msg("open: %d (%s), want %d", rc,
                 rc < 0 ? u->err.message : kvmeta_strerror(rc), code);
    }
    assert_ptr_equal(db, &mark);
    assert_int_equal(u->err.code, code);
    assert_non_null(memchr(u->err.message, 0, sizeof u->err.message));
    assert_true(u->err.message[0] != 0);
    assert_null(strchr(u->err.message, '\n'));
    unit_image_take(u->dir, &after);
    unit_image_same(&before, &after);
    unit_image_free(&before);
    unit_image_free(&after);
}

/* --------------------------------------------------------------------------
 * Files of the store
 * -------------------------------------------------------------------------- */

UNIT_INLINE const char *unit_path(struct unit *u, const char *name)
{
    static char path[2 * UNIT_PATH];

    snprintf(path, sizeof path, "%s/%s", u->dir, name);
    return path;
}

/* Copies the name of the nth file that ends so; 0 when there is none. */
UNIT_INLINE int unit_find(struct unit *u, const char *suffix, size_t nth,
                          char *name)
{
    struct unit_image image;
    size_t i, length, want = strlen(suffix);
    int found = 0;

    unit_image_take(u->dir, &image);
    for (i = 0; i < image.count && !found; i++) {
        length = strlen(image.files[i].name);
        if (length >= want &&
            strcmp(image.files[i].name + length - want, suffix) == 0 &&
            nth-- == 0) {
            strcpy(name, image.files[i].name);
            found = 1;
        }
    }
    unit_image_free(&image);
    return found;
}

UNIT_INLINE size_t unit_files(struct unit *u, const char *suffix)
{
    char name[64];
    size_t n = 0;

    while (unit_find(u, suffix, n, name)) {
        n++;
    }
    return n;
}

UNIT_INLINE uint64_t unit_size(struct unit *u, const char *name)
{
    struct stat st;

    assert_int_equal(lstat(unit_path(u, name), &st), 0);
    return (uint64_t)st.st_size;
}

UNIT_INLINE void unit_flip(struct unit *u, const char *name, uint64_t off)
{
    int fd = open(unit_path(u, name), O_RDWR | O_CLOEXEC);
    unsigned char byte;

    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &byte, 1, (off_t)off), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)off), 1);
    close(fd);
}

UNIT_INLINE void unit_write_path(const char *path, const void *data,
                                 size_t bytes)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, data, bytes), (ssize_t)bytes);
    close(fd);
}

#endif /* KVMETA_TEST_UNIT_FILES_H */
