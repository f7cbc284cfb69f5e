/*
 * Stores that were written once and are kept beside this file: each must
 * open with every record, for ever, and be written again with the same bytes,
 * so that the format cannot change unnoticed.
 *
 *   --write 1      writes the stores anew. A change of the format needs a new
 *                  version number in its files, and new stores beside these.
 *   --golden DIR   where the stores are; default: beside this file
 *
 * STORE/ holds the files of a store; STORE.txt says what an open finds.
 *
 * SPDX-License-Identifier: MIT
 */
#if !defined(_GNU_SOURCE)
#  define _GNU_SOURCE 1                  /* mkdtemp, opendir */
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include "lives.h"

#define PATH_BYTES 512

/* --------------------------------------------------------------------------
 * Files
 * -------------------------------------------------------------------------- */

static void golden_path(char path[PATH_BYTES], const char *name)
{
    const char *given = test_option("golden");
    const char *slash = strrchr(__FILE__, '/');

    if (given != NULL) {
        snprintf(path, PATH_BYTES, "%s/%s", given, name);
    } else {
        snprintf(path, PATH_BYTES, "%.*s/%s",
                 slash != NULL ? (int)(slash - __FILE__) : 1,
                 slash != NULL ? __FILE__ : ".", name);
    }
}

static void join(char path[PATH_BYTES], const char *dir, const char *name)
{
    int n = snprintf(path, PATH_BYTES, "%s/%s", dir, name);

    assert_in_range(n, 1, PATH_BYTES - 1);
}

static void write_path(const char *path, const void *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

/* To be freed by free(). */
static unsigned char *read_path(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    unsigned char *data;
    long end;

    if (file == NULL) {
        fail_msg("%s: cannot be read", path);
    }
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    end = ftell(file);
    assert_true(end >= 0);
    rewind(file);
    *bytes = (size_t)end;
    data = malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, file), *bytes);
    fclose(file);
    return data;
}

/* Calls fn for each file of a directory; returns how many there are. */
static unsigned each_path(const char *dir,
                          void (*fn)(void *user, const char *dir,
                                     const char *name), void *user)
{
    DIR *list = opendir(dir);
    struct dirent *entry;
    unsigned count = 0;

    if (list == NULL) {
        fail_msg("%s: cannot be listed", dir);
    }
    while ((entry = readdir(list)) != NULL) {
        if (entry->d_name[0] != '.') {
            fn(user, dir, entry->d_name);
            count++;
        }
    }
    closedir(list);
    return count;
}

static void load_file(void *user, const char *dir, const char *name)
{
    char path[PATH_BYTES];
    unsigned char *data;
    size_t bytes;

    join(path, dir, name);
    data = read_path(path, &bytes);
    sim_file_put(user, name, data, bytes);
    free(data);
}

/* The checked-in files of a store, on a simulated file system. */
static void load_store(const struct golden *golden, struct sim_fs *fs)
{
    char dir[PATH_BYTES];

    golden_path(dir, golden->name);
    sim_init(fs, 512, 1);
    each_path(dir, load_file, fs);
}

/* --------------------------------------------------------------------------
 * What an open finds, as text
 * -------------------------------------------------------------------------- */

static void put_hex(FILE *out, const unsigned char *bytes, size_t n)
{
    size_t i;

    for (i = 0; i < n; i++) {
        fprintf(out, "%02x", bytes[i]);
    }
}

/* Long values end in one byte again and again; that is not written out. */
static int put_record(void *user, const void *key, const void *value)
{
    FILE *out = ((void **)user)[0];
    const struct golden *golden = ((void **)user)[1];
    const unsigned char *v = value;
    size_t n = golden->value_bytes, shown = n;

    while (shown > 9 && v[shown - 1] == v[shown - 2]) {
        shown--;
    }
    put_hex(out, key, golden->key_bytes);
    fprintf(out, " ");
    put_hex(out, value, shown);
    fprintf(out, "%s\n", shown < n ? ".." : "");
    return 0;
}

/* The text of what is found; to be freed by free(). */
static char *describe(const struct golden *golden, kvmeta *db)
{
    struct kvmeta_digest digest = kvmeta_digest(db);
    struct kvmeta_stats stats;
    struct golden copy = *golden;
    void *user[2];
    size_t bytes;
    char *text = NULL;

    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    assert_int_equal(kvmeta_stats(db, &stats), 0);
    user[0] = open_memstream(&text, &bytes);
    user[1] = &copy;
    assert_non_null(user[0]);
#define PUT(name) \
    fprintf(user[0], #name " %llu\n", (unsigned long long)stats.name)
    PUT(records);
    PUT(seq);
    PUT(open_tables);
    PUT(open_table_records);
    PUT(open_logs);
    PUT(open_log_frames);
    PUT(open_log_batches);
    PUT(open_torn_bytes);
    PUT(open_torn_reason);
    PUT(open_healed);
    PUT(open_garbage_files);
#undef PUT
    fprintf(user[0], "digest %016llx %016llx\n", (unsigned long long)digest.hi,
            (unsigned long long)digest.lo);
    assert_int_equal(kvmeta_scan(db, NULL, NULL, put_record, user), 0);
    assert_int_equal(fclose(user[0]), 0);
    return text;
}

static char *describe_open(const struct golden *golden, const char *dir,
                           const struct kvmeta_vfs *vfs, uint32_t flags)
{
    struct kvmeta_options options;
    struct kvmeta_error err;
    struct test_alloc alloc;
    kvmeta *db = NULL;
    char *text;

    memset(&alloc, 0, sizeof alloc);
    set_options(&options, golden, &alloc);
    options.vfs = vfs;
    options.flags |= flags;
    if (kvmeta_open(dir, &options, &db, &err) != 0) {
        fail_msg("%s: %s", golden->name, err.message);
    }
    text = describe(golden, db);
    assert_int_equal(kvmeta_verify(db, &err), 0);
    assert_int_equal(kvmeta_close(db), 0);
    assert_int_equal(atomic_load(&alloc.live_blocks), 0);
    return text;
}

static void text_path(char path[PATH_BYTES], const struct golden *golden)
{
    char name[64];

    snprintf(name, sizeof name, "%s.txt", golden->name);
    golden_path(path, name);
}

static void check_text(const struct golden *golden, char *text)
{
    char path[PATH_BYTES];
    unsigned char *want;
    size_t bytes;

    text_path(path, golden);
    want = read_path(path, &bytes);
    want[bytes] = '\0';
    if (strcmp(text, (char *)want) != 0) {
        test_replay("# the store %s is not what %s says", golden->name, path);
        printf("found:\n%s", text);
        fail();
    }
    free(want);
    free(text);
}

/* --------------------------------------------------------------------------
 * Reading
 * -------------------------------------------------------------------------- */

/* Goal: the stores open with every record and the report that they had when
 * they were written; a read-only open changes nothing, and what a writing one
 * leaves opens again with the same records. */
static void golden_stores_open_with_every_record(void **state)
{
    struct sim_fs fs;
    uint64_t hash;
    char *text;
    size_t i;

    (void)state;
    for (i = 0; i < GOLDENS; i++) {
        load_store(&goldens[i], &fs);
        hash = sim_hash(&fs);
        check_text(&goldens[i], describe_open(&goldens[i], SIM_DIR, &fs.vfs,
                                              KVMETA_READ_ONLY));
        assert_true(sim_hash(&fs) == hash);
        text = describe_open(&goldens[i], SIM_DIR, &fs.vfs, 0);
        check_text(&goldens[i], text);
        text = describe_open(&goldens[i], SIM_DIR, &fs.vfs, 0);
        assert_non_null(strstr(text, "\ndigest "));
        free(text);
        assert_int_equal(sim_open_handles(&fs), 0);
        sim_free(&fs);
    }
}

static void copy_file(void *user, const char *dir, const char *name)
{
    char path[PATH_BYTES];
    unsigned char *data;
    size_t bytes;

    join(path, dir, name);
    data = read_path(path, &bytes);
    join(path, user, name);
    write_path(path, data, bytes);
    free(data);
}

static void remove_file(void *user, const char *dir, const char *name)
{
    char path[PATH_BYTES];

    (void)user;
    join(path, dir, name);
    assert_int_equal(unlink(path), 0);
}

/* Goal: the same on the real file system. Method: copies in TMPDIR. */
static void golden_stores_open_on_the_real_file_system(void **state)
{
    const char *top = getenv("TMPDIR");
    char from[PATH_BYTES], dir[PATH_BYTES];
    size_t i;

    (void)state;
    for (i = 0; i < GOLDENS; i++) {
        join(dir, top != NULL ? top : "/tmp", "golden.XXXXXX");
        assert_non_null(mkdtemp(dir));
        golden_path(from, goldens[i].name);
        each_path(from, copy_file, dir);
        check_text(&goldens[i], describe_open(&goldens[i], dir, NULL, 0));
        each_path(dir, remove_file, NULL);
        assert_int_equal(rmdir(dir), 0);
    }
}

/* --------------------------------------------------------------------------
 * Writing
 * -------------------------------------------------------------------------- */

/* Was everything written by the zstd that is used now? */
static int same_zstd(void)
{
    char path[PATH_BYTES];
    unsigned char *text;
    size_t bytes;
    int same;

    golden_path(path, "zstd-version.txt");
    text = read_path(path, &bytes);
    text[bytes] = '\0';
    same = strtoul((char *)text, NULL, 10) == ZSTD_versionNumber();
    free(text);
    return same;
}

struct comparing {
    const struct golden *golden;
    struct sim_fs *fs;
    int all;                             /* tables and manifests, too */
};

static void compare_file(void *user, const char *dir, const char *name)
{
    const struct comparing *comparing = user;
    unsigned char *want, *data;
    char path[PATH_BYTES];
    uint64_t bytes = 0;
    size_t want_bytes, i;

    join(path, dir, name);
    data = sim_file_get(comparing->fs, name, &bytes);
    if (data == NULL) {
        fail_msg("%s is not written any more", path);
        return;
    }
    want = read_path(path, &want_bytes);
    if (comparing->all || name[0] == 'w' || name[0] == 'L') {
        assert_int_equal(bytes, want_bytes);
        for (i = 0; i < want_bytes; i++) {
            if (data[i] != want[i]) {
                fail_msg("%s: written with another byte at %zu", path, i);
            }
        }
    }
    free(want);
    free(data);
}

static void count_file(void *user, const char *name, uint64_t bytes)
{
    (void)name;
    (void)bytes;
    ++*(unsigned *)user;
}

/* Goal: the format does not drift. Method: the same lives with the same
 * random bytes must make the same files; where zstd is of another version,
 * tables may differ in their bytes, but not in their records. */
static void golden_stores_are_written_again_byte_for_byte(void **state)
{
    struct comparing comparing;
    struct test_oracle now;
    char dir[PATH_BYTES];
    struct sim_fs fs;
    unsigned count;
    size_t i;

    (void)state;
    comparing.all = same_zstd();
    if (!comparing.all) {
        printf("# another zstd (%s): tables are compared by their records\n",
               ZSTD_versionString());
    }
    for (i = 0; i < GOLDENS; i++) {
        make_store(&goldens[i], &fs, &now);
        comparing.golden = &goldens[i];
        comparing.fs = &fs;
        count = 0;
        golden_path(dir, goldens[i].name);
        sim_each_file(&fs, count_file, &count);
        assert_int_equal(each_path(dir, compare_file, &comparing), count);
        check_text(&goldens[i], describe_open(&goldens[i], SIM_DIR, &fs.vfs,
                                              KVMETA_READ_ONLY));
        test_oracle_free(&now);
        sim_free(&fs);
    }
}

/* Goal: what is checked in is what was meant. Method: the oracle of each life
 * against an open of the checked-in store. */
static void golden_stores_hold_what_their_lives_wrote(void **state)
{
    struct kvmeta_options options;
    struct test_alloc alloc;
    struct test_oracle now;
    struct sim_fs fs;
    kvmeta *db;
    size_t i;

    (void)state;
    for (i = 0; i < GOLDENS; i++) {
        make_store(&goldens[i], &fs, &now);
        sim_free(&fs);
        load_store(&goldens[i], &fs);
        memset(&alloc, 0, sizeof alloc);
        set_options(&options, &goldens[i], &alloc);
        options.vfs = &fs.vfs;
        assert_int_equal(kvmeta_open(SIM_DIR, &options, &db, NULL), 0);
        assert_null(test_oracle_check(&now, db));
        assert_int_equal(kvmeta_close(db), 0);
        test_oracle_free(&now);
        sim_free(&fs);
    }
}

/* --------------------------------------------------------------------------
 * Making
 * -------------------------------------------------------------------------- */

struct saving {
    struct sim_fs *fs;
    const char *dir;
};

static void save_file(void *user, const char *name, uint64_t bytes)
{
    const struct saving *saving = user;
    char path[PATH_BYTES];
    unsigned char *data = sim_file_get(saving->fs, name, &bytes);

    join(path, saving->dir, name);
    write_path(path, data, (size_t)bytes);
    free(data);
}

static void save_store(const struct golden *golden)
{
    char dir[PATH_BYTES], path[PATH_BYTES];
    struct saving saving;
    struct test_oracle now;
    struct sim_fs fs;
    char *text;

    make_store(golden, &fs, &now);
    test_oracle_free(&now);
    golden_path(dir, golden->name);
    mkdir(dir, 0777);
    each_path(dir, remove_file, NULL);
    saving.fs = &fs;
    saving.dir = dir;
    sim_each_file(&fs, save_file, &saving);
    text = describe_open(golden, SIM_DIR, &fs.vfs, KVMETA_READ_ONLY);
    text_path(path, golden);
    write_path(path, text, strlen(text));
    free(text);
    sim_free(&fs);
}

/* Not a test: writes the files that the others look at. */
static void golden_stores_are_made(void **state)
{
    char path[PATH_BYTES], text[32];
    size_t i;

    (void)state;
    for (i = 0; i < GOLDENS; i++) {
        save_store(&goldens[i]);
    }
    golden_path(path, "zstd-version.txt");
    snprintf(text, sizeof text, "%u\n", ZSTD_versionNumber());
    write_path(path, text, strlen(text));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest make[] = {
        cmocka_unit_test(golden_stores_are_made),
    };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_stores_open_with_every_record),
        cmocka_unit_test(golden_stores_open_on_the_real_file_system),
        cmocka_unit_test(golden_stores_are_written_again_byte_for_byte),
        cmocka_unit_test(golden_stores_hold_what_their_lives_wrote),
    };

    test_parse_args(argc, argv);
    if (test_option("write") != NULL) {
        return cmocka_run_group_tests(make, NULL, NULL);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
