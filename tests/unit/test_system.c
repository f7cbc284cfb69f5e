/*
 * The operating system says no, for real: a full disk, a disk that is
 * read-only, too few descriptors, a limit on file size.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

#include <sys/resource.h>

/* --------------------------------------------------------------------------
 * A full disk, for real
 * -------------------------------------------------------------------------- */

/* Mounts 2 MiB at top/full, where the store of this test will be; skips the
 * test, loudly, where that is not allowed. */
static void mount_small(struct unit *u, char *mount_at)
{
    snprintf(mount_at, UNIT_PATH, "%s/full", u->top);
    assert_int_equal(mkdir(mount_at, 0700), 0);
    if (mount("none", mount_at, "tmpfs", 0, "size=2m") != 0) {
        print_message("SKIPPED: this test needs a tmpfs, mount says: %s\n",
                      strerror(errno));
        u->passed = 1;
        skip();
    }
    snprintf(u->dir, sizeof u->dir, "%s/full/store", u->top);
}

static void fill_until_full(kvmeta *db, uint64_t *count)
{
    static unsigned char value[1000];
    struct kvmeta_digest digest;
    unsigned char key[8];
    int rc = KVMETA_OK;

    while (rc == KVMETA_OK) {
        digest = kvmeta_digest(db);
        unit_key(8, *count, key);
        unit_value(sizeof value, *count, value);
        rc = kvmeta_put(db, key, value, KVMETA_DURABLE);
        *count += rc == KVMETA_OK;
        assert_true(*count < 100000);
    }
    unit_is(rc, KVMETA_E_NOSPACE);
    assert_true(kvmeta_count(db) == *count);
    unit_same_digest(kvmeta_digest(db), digest);
    unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
}

static void use_full_disk(struct unit *u, const char *mount_at)
{
    struct kvmeta_options options = unit_options(u, 8, 1000);
    static char filler[512 << 10];
    char path[UNIT_PATH + 16];
    uint64_t count = 0;
    kvmeta *db;
    int rc;

    options.flags = KVMETA_NO_THREAD;
    snprintf(path, sizeof path, "%s/full/filler", u->top);
    unit_write_path(path, filler, sizeof filler);
    db = unit_open(u, &options);
    fill_until_full(db, &count);
    assert_true(count > 10);
    assert_int_equal(unlink(path), 0);
    fill_until_full(db, &count);
    kvmeta_close(db);
    rc = kvmeta_open(u->dir, &options, &db, &u->err);
    if (rc != KVMETA_OK) {
        unit_is(rc, KVMETA_E_NOSPACE);
        assert_int_equal(u->err.sys_errno, ENOSPC);
        assert_int_equal(mount("none", mount_at, "tmpfs", MS_REMOUNT,
                               "size=8m"), 0);
        db = unit_open(u, &options);
    }
    assert_true(kvmeta_count(db) == count);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: on a full disk a write fails with nothing changed, and works again
 * once there is space; nothing acknowledged is lost. Method: a 2 MiB tmpfs,
 * a filler that is deleted half-way, the store filled up twice. The open may
 * need space, too; it says so, and works once there is more. */
static void a_full_disk_fails_the_write_and_loses_nothing(struct unit *u)
{
    char mount_at[UNIT_PATH];

    mount_small(u, mount_at);
    use_full_disk(u, mount_at);
    assert_int_equal(umount(mount_at), 0);
}

/* --------------------------------------------------------------------------
 * A disk that became read-only
 * -------------------------------------------------------------------------- */

/* Goal: on a read-only disk a store opens for reading, an open for writing
 * says what is wrong at the latest with the first write, and afterwards the
 * store is as it was. */
static void a_read_only_disk_is_an_error_of_writes_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    char mount_at[UNIT_PATH];
    kvmeta *db;
    int rc;

    mount_small(u, mount_at);
    db = unit_open(u, &options);
    unit_fill(db, 0, 100, 0, KVMETA_WRITTEN);
    unit_close(db);
    assert_int_equal(mount("none", mount_at, "tmpfs", MS_REMOUNT | MS_RDONLY,
                           "size=2m"), 0);
    rc = kvmeta_open(u->dir, &options, &db, &u->err);
    if (rc == KVMETA_OK) {
        rc = kvmeta_put(db, "12345678", "12345678", 0);
        unit_holds(db, 0, 100, 0);
        assert_true(kvmeta_count(db) == 100);
        kvmeta_close(db);
    } else {
        assert_int_equal(u->err.sys_errno, EROFS);
    }
    unit_is(rc, KVMETA_E_IO);
    options.flags = KVMETA_READ_ONLY;
    db = unit_open(u, &options);
    unit_holds(db, 0, 100, 0);
    unit_close(db);
    assert_int_equal(mount("none", mount_at, "tmpfs", MS_REMOUNT, "size=2m"),
                     0);
    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    unit_fill(db, 100, 200, 0, 0);
    unit_holds(db, 0, 200, 0);
    unit_close(db);
    assert_int_equal(umount(mount_at), 0);
}

/* --------------------------------------------------------------------------
 * Limits of the process
 * -------------------------------------------------------------------------- */

/* In a child: opens with ever more descriptors allowed until it works. */
static int open_with_few_descriptors(void *arg)
{
    struct unit *u = arg;
    struct kvmeta_options options = unit_quiet(u);
    int next = dup(0), failures = 0, rc;
    struct rlimit limit;
    kvmeta *db = NULL;
    rlim_t most;

    close(next);
    getrlimit(RLIMIT_NOFILE, &limit);
    for (most = (rlim_t)next; most < (rlim_t)next + 100; most++) {
        limit.rlim_cur = most;
        setrlimit(RLIMIT_NOFILE, &limit);
        rc = kvmeta_open(u->dir, &options, &db, &u->err);
        if (rc == KVMETA_OK) {
            rc = kvmeta_count(db) == 400 ? 0 : 100;
            kvmeta_close(db);
            return rc != 0 ? rc : failures;
        }
        if (rc != KVMETA_E_IO || u->err.sys_errno != EMFILE) {
            return 101;
        }
        failures++;
    }
    return 102;
}

/* Goal: an open that runs out of descriptors says so, and the next, with
 * enough of them, finds everything. */
static void too_few_descriptors_fail_the_open_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    int failures;

    unit_fill(db, 0, 300, 0, KVMETA_WRITTEN);
    unit_ok(kvmeta_flush(db));
    unit_fill(db, 300, 400, 0, KVMETA_WRITTEN);
    unit_close(db);
    failures = unit_in_child(open_with_few_descriptors, u);
    assert_in_range(failures, 2, 99);
}

/* In a child: writes until the log hits the limit on file size. */
static int write_past_file_limit(void *arg)
{
    struct unit *u = arg;
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8];
    struct rlimit limit;
    uint64_t count = 0;
    kvmeta *db = NULL;
    int rc;

    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = 200000;
    setrlimit(RLIMIT_FSIZE, &limit);
    rc = kvmeta_open(u->dir, &options, &db, NULL);
    while (rc == KVMETA_OK && count < 100000) {
        unit_key(8, count, key);
        rc = kvmeta_put(db, key, key, KVMETA_WRITTEN);
        count += rc == KVMETA_OK;
    }
    if (rc != KVMETA_E_IO && rc != KVMETA_E_NOSPACE) {
        return 1;
    }
    return count < 100 || kvmeta_count(db) != count;
}

/* Goal: a log that may not grow fails the write, changes nothing, and the
 * next life finds every write that was acknowledged. */
static void a_limit_on_file_size_fails_the_write(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8], got[8];
    uint64_t i;
    kvmeta *db;

    assert_int_equal(unit_in_child(write_past_file_limit, u), 0);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) >= 100);
    for (i = 0; i < kvmeta_count(db); i++) {
        unit_key(8, i, key);
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, key, 8);
    }
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_full_disk_fails_the_write_and_loses_nothing),
    UNIT_CASE(a_read_only_disk_is_an_error_of_writes_alone),
    UNIT_CASE(too_few_descriptors_fail_the_open_alone),
    UNIT_CASE(a_limit_on_file_size_fails_the_write),
};

UNIT_MAIN(cases)
