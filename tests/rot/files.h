/*
 * Lists of files and of what they once were, and a disk that is nearly full.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_ROT_FILES_H
#define KVMETA_TEST_ROT_FILES_H

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../sim/sim.h"

#define ROT_VERSION_BYTES_MAX 65536u

/* One file as it is, or as it once was. */
struct rot_file {
    char name[SIM_NAME_BYTES];
    unsigned char *data;
    uint64_t bytes;
};

struct rot_files {
    struct rot_file *list;
    unsigned count;
    unsigned capacity;
};

/* A fixture cannot be made: a fault of the test, or of the library in the
 * absence of any damage. Ends the process, which counts as a crash. */
static void rot_must(int ok, const char *what)
{
    if (!ok) {
        printf("a store without damage: %s\n", what);
        fflush(stdout);
        abort();
    }
}

/* --------------------------------------------------------------------------
 * Lists of files
 * -------------------------------------------------------------------------- */

/* Takes `data` over. */
static void rot_files_add(struct rot_files *files, const char *name,
                          unsigned char *data, uint64_t bytes)
{
    struct rot_file *file;

    if (files->count == files->capacity) {
        files->capacity = files->capacity == 0 ? 32 : files->capacity * 2;
        files->list = realloc(files->list,
                              files->capacity * sizeof *files->list);
        rot_must(files->list != NULL, "no memory");
    }
    file = &files->list[files->count++];
    snprintf(file->name, sizeof file->name, "%s", name);
    file->data = data;
    file->bytes = bytes;
}

static void rot_files_free(struct rot_files *files)
{
    unsigned i;

    for (i = 0; i < files->count; i++) {
        free(files->list[i].data);
    }
    free(files->list);
    memset(files, 0, sizeof *files);
}

/* The last one of that name, or NULL. */
static const struct rot_file *rot_files_find(const struct rot_files *files,
                                             const char *name)
{
    unsigned i;

    for (i = files->count; i > 0; i--) {
        if (strcmp(files->list[i - 1].name, name) == 0) {
            return &files->list[i - 1];
        }
    }
    return NULL;
}

static int rot_file_same(const struct rot_file *a, const struct rot_file *b)
{
    return strcmp(a->name, b->name) == 0 && a->bytes == b->bytes &&
           memcmp(a->data, b->data, (size_t)a->bytes) == 0;
}

static int rot_files_have(const struct rot_files *files,
                          const struct rot_file *file)
{
    unsigned i;

    for (i = 0; i < files->count; i++) {
        if (rot_file_same(&files->list[i], file)) {
            return 1;
        }
    }
    return 0;
}

struct rot_taking {
    const struct sim_fs *fs;
    struct rot_files *files;
    int once;                            /* only what is not there yet */
};

static void rot_take_file(void *user, const char *name, uint64_t bytes)
{
    struct rot_taking *taking = user;
    struct rot_file file;

    if (taking->once && bytes > ROT_VERSION_BYTES_MAX) {
        return;
    }
    memset(&file, 0, sizeof file);
    snprintf(file.name, sizeof file.name, "%s", name);
    file.data = sim_file_get(taking->fs, name, &file.bytes);
    if (taking->once && rot_files_have(taking->files, &file)) {
        free(file.data);
    } else {
        rot_files_add(taking->files, name, file.data, file.bytes);
    }
}

static void rot_take_files(const struct sim_fs *fs, struct rot_files *files,
                           int once)
{
    struct rot_taking taking = {fs, files, once};

    sim_each_file(fs, rot_take_file, &taking);
}

/* --------------------------------------------------------------------------
 * A disk that is nearly full
 *
 * Zeros that are written ahead would make a log of 1 MiB, and every open of
 * it slow. They are the only writes of this kind; a full disk ends them early
 * and is no error for the store.
 * -------------------------------------------------------------------------- */

static int64_t (*rot_sim_write)(void *user, int file, const void *buf,
                                size_t bytes, uint64_t off);
static size_t rot_ahead_bytes;           /* zeros that do fit */
static size_t rot_room = SIZE_MAX;       /* for everything else, until there
                                            was an error */

static int64_t rot_write(void *user, int file, const void *buf, size_t bytes,
                         uint64_t off)
{
    const unsigned char *p = buf;

    if (rot_room == 0) {
        rot_room = SIZE_MAX;
        return -ENOSPC;
    }
    if (rot_room != SIZE_MAX) {
        bytes = bytes < rot_room ? bytes : rot_room;
        rot_room -= bytes;
        return rot_sim_write(user, file, buf, bytes, off);
    }
    if (bytes < 16384 || p[0] != 0 || memcmp(p, p + 1, bytes - 1) != 0) {
        return rot_sim_write(user, file, buf, bytes, off);
    }
    if (bytes < 65536 || rot_ahead_bytes == 0) {
        return -ENOSPC;
    }
    return rot_sim_write(user, file, buf, rot_ahead_bytes, off);
}

static void rot_limit_disk(struct sim_fs *fs, size_t ahead_bytes)
{
    if (fs->vfs.file_write != rot_write) {
        rot_sim_write = fs->vfs.file_write;
        fs->vfs.file_write = rot_write;
    }
    rot_ahead_bytes = ahead_bytes;
}

#endif /* KVMETA_TEST_ROT_FILES_H */
