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

/* Takes all the room that is left, up to the last page. */
static void fill_disk(const char *path)
{
    static const char page[4096];
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    assert_true(fd >= 0);
    while (write(fd, page, sizeof page) > 0) {
        /* Until there is no more. */
    }
    assert_int_equal(errno, ENOSPC);
    close(fd);
}

/* Puts numbers from <= i < to, with values that cannot be compressed. */
static void put_noise(kvmeta *db, uint64_t from, uint64_t to)
{
    static unsigned char value[1000];
    unsigned char key[8];

    for (; from < to; from++) {
        struct test_rng rng = {from};

        unit_key(8, from, key);
        test_rng_bytes(&rng, value, sizeof value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_WRITTEN));
    }
}

static void holds_noise(kvmeta *db, uint64_t count)
{
    static unsigned char value[1000], got[1000];
    unsigned char key[8];
    uint64_t i;

    assert_true(kvmeta_count(db) == count);
    for (i = 0; i < count; i++) {
        struct test_rng rng = {i};

        unit_key(8, i, key);
        test_rng_bytes(&rng, value, sizeof value);
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, value, sizeof value);
    }
}

/* Opens a store with `count` records on a disk that is full for its flush. */
static kvmeta *open_on_full_disk(struct unit *u, uint64_t count,
                                 const struct kvmeta_options *options,
                                 const char *filler)
{
    kvmeta *db = unit_open(u, options);

    put_noise(db, 0, count);
    fill_disk(filler);
    unit_is(kvmeta_flush(db), KVMETA_E_NOSPACE);
    holds_noise(db, count);
    assert_int_equal(unlink(filler), 0);
    return db;
}

/* Goal: a flush and a compaction for which the disk has no room say so and
 * lose nothing, and work once there is room; the store goes on meanwhile.
 * Method: the disk is filled to the last page before each of them. */
static void a_full_disk_fails_the_flush_and_the_compaction(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 1000);
    char mount_at[UNIT_PATH], filler[UNIT_PATH];
    struct kvmeta_error err;
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    mount_small(u, mount_at);
    snprintf(filler, sizeof filler, "%s/full/filler", u->top);
    db = open_on_full_disk(u, 300, &options, filler);
    unit_ok(kvmeta_flush(db));
    put_noise(db, 300, 500);
    unit_ok(kvmeta_flush(db));
    fill_disk(filler);
    unit_is(kvmeta_compact(db), KVMETA_E_NOSPACE);
    unit_is(kvmeta_last_error(db, &err), KVMETA_E_NOSPACE);
    assert_int_equal(err.sys_errno, ENOSPC);
    holds_noise(db, 500);
    assert_true(unit_stats(db).tables == 2);
    assert_int_equal(unlink(filler), 0);
    unit_ok(kvmeta_compact(db));
    unit_ok(kvmeta_last_error(db, &err));
    assert_true(unit_stats(db).tables == 1);
    unit_close(db);
    db = unit_open(u, &options);
    holds_noise(db, 500);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    assert_int_equal(umount(mount_at), 0);
}

/* Goal: the background thread that had no room for tables makes up for it by
 * itself once there is some. */
static void the_thread_goes_on_when_a_full_disk_has_room(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 1000);
    char mount_at[UNIT_PATH], filler[UNIT_PATH];
    unsigned char key[8], value[1000] = {0};
    struct kvmeta_error err;
    uint64_t deadline;
    kvmeta *db;

    options.log_bytes_max = 256 << 10;
    mount_small(u, mount_at);
    snprintf(filler, sizeof filler, "%s/full/filler", u->top);
    db = open_on_full_disk(u, 200, &options, filler);
    deadline = unit_now_ms() + 20000;
    put_noise(db, 200, 400);
    while (kvmeta_wait_idle(db) != KVMETA_OK ||
           kvmeta_last_error(db, &err) != KVMETA_OK) {
        assert_true(unit_now_ms() < deadline);
        unit_sleep_ms(20);
    }
    assert_true(unit_stats(db).logs_waiting == 0);
    assert_true(unit_stats(db).flushes > 0);
    unit_key(8, 400, key);
    unit_ok(kvmeta_put(db, key, value, KVMETA_DURABLE));
    unit_ok(kvmeta_remove(db, key, KVMETA_DURABLE));
    holds_noise(db, 400);
    unit_close(db);
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
        if (rc != KVMETA_E_LIMIT || u->err.sys_errno != EMFILE) {
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
    int failures;

    unit_make_store(u, 1, 300, 400);
    failures = unit_in_child(open_with_few_descriptors, u);
    assert_in_range(failures, 2, 99);
}

/* Lowers the limit to what is open now; returns what it was. */
static struct rlimit allow_no_descriptor(void)
{
    struct rlimit old, none;
    int next = dup(0);

    close(next);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    none = old;
    none.rlim_cur = (rlim_t)next;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    return old;
}

/* Goal: a flush that gets no descriptor for its new log fails alone: writes
 * go on in the old one, and the next flush is well. */
static void too_few_descriptors_fail_the_flush_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct rlimit old;
    int flush, put;

    unit_fill(db, 0, 100, 0, KVMETA_WRITTEN);
    old = allow_no_descriptor();
    flush = kvmeta_flush(db);
    put = kvmeta_put(db, "12345678", "12345678", KVMETA_DURABLE);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
    unit_is(flush, KVMETA_E_LIMIT);
    unit_ok(put);
    unit_ok(kvmeta_last_error(db, NULL));
    unit_ok(kvmeta_flush(db));
    assert_true(unit_stats(db).tables == 1);
    unit_fill(db, 100, 200, 0, KVMETA_DURABLE);
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 201);
    unit_holds(db, 0, 200, 0);
    unit_close(db);
}

/* Goal: the first write of a handle, which makes a log, fails without a
 * descriptor; nothing has changed, and the next write is well. */
static void too_few_descriptors_fail_the_first_write_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct rlimit old;
    int put;

    unit_fill(db, 0, 100, 0, KVMETA_WRITTEN);
    unit_close(db);
    db = unit_open(u, &options);
    old = allow_no_descriptor();
    put = kvmeta_put(db, "12345678", "12345678", KVMETA_DURABLE);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
    unit_is(put, KVMETA_E_LIMIT);
    unit_holds(db, 0, 100, 0);
    assert_true(kvmeta_count(db) == 100);
    unit_fill(db, 100, 200, 0, KVMETA_DURABLE);
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 200);
    unit_holds(db, 0, 200, 0);
    unit_close(db);
}

/* In a child: writes until the log hits the limit on file size. */
static int write_past_file_limit(struct unit *u, unsigned durability)
{
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
        rc = kvmeta_put(db, key, key, durability);
        count += rc == KVMETA_OK;
    }
    if (rc != KVMETA_E_IO && rc != KVMETA_E_NOSPACE) {
        return 1;
    }
    return count < 100 || kvmeta_count(db) != count;
}

static int write_past_it(void *u)
{
    return write_past_file_limit(u, KVMETA_WRITTEN);
}

static int write_past_it_durably(void *u)
{
    return write_past_file_limit(u, KVMETA_DURABLE);
}

/* Goal: a log that may not grow fails the write, changes nothing, and the
 * next life finds every write that was acknowledged. */
static void hit_file_limit(struct unit *u, int (*write_past)(void *u))
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8], got[8];
    uint64_t i;
    kvmeta *db;

    assert_int_equal(unit_in_child(write_past, u), 0);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) >= 100);
    for (i = 0; i < kvmeta_count(db); i++) {
        unit_key(8, i, key);
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, key, 8);
    }
    unit_close(db);
}

static void a_limit_on_file_size_fails_the_write(struct unit *u)
{
    hit_file_limit(u, write_past_it);
}

static void a_limit_on_file_size_fails_the_durable_write(struct unit *u)
{
    hit_file_limit(u, write_past_it_durably);
}

/* In a child, so that nothing else meets the limit. */
static int flush_past_file_limit(void *arg)
{
    struct unit *u = arg;
    struct kvmeta_options options = unit_options(u, 8, 1000);
    struct rlimit old, small;
    kvmeta *db;
    int rc;

    options.flags = KVMETA_NO_THREAD;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    small = old;
    small.rlim_cur = 200000;
    db = unit_open(u, &options);
    put_noise(db, 0, 400);
    setrlimit(RLIMIT_FSIZE, &small);
    rc = kvmeta_flush(db);
    setrlimit(RLIMIT_FSIZE, &old);
    if (rc != KVMETA_E_IO && rc != KVMETA_E_NOSPACE) return 1;
    holds_noise(db, 400);
    if (kvmeta_flush(db) != KVMETA_OK) return 2;
    if (unit_stats(db).tables != 1) return 3;
    return kvmeta_close(db) == KVMETA_OK ? 0 : 4;
}

/* Goal: a table that may not grow fails the flush alone; the next one works.
 */
static void a_limit_on_file_size_fails_the_flush(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 1000);
    kvmeta *db;

    assert_int_equal(unit_in_child(flush_past_file_limit, u), 0);
    db = unit_open(u, &options);
    holds_noise(db, 400);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * The clock
 * -------------------------------------------------------------------------- */

static uint64_t monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Goal: what is due by the clock is due in real time. Method: the clock of
 * the built-in calls, between two looks at the system's. */
static void the_clock_is_the_monotonic_one(struct unit *u)
{
    const struct kvmeta_vfs *vfs = kvmeta_vfs_posix();
    uint64_t before, now, after;
    int i;

    (void)u;
    for (i = 0; i < 100; i++) {
        before = monotonic_ns();
        now = vfs->clock_ns(vfs->user);
        after = monotonic_ns();
        assert_true(before <= now);
        assert_true(now <= after);
    }
}

/* Goal: a process without standard input, whose directory or file gets the
 * descriptor 0, is like any other, and has it back after the close. */
static void descriptor_0_is_one_like_any_other(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    int away = dup(STDIN_FILENO);
    kvmeta *db;

    assert_true(away > 0);
    for (int i = 0; i < 2; i++) {
        close(STDIN_FILENO);
        db = unit_open(u, &options);
        assert_int_not_equal(fcntl(STDIN_FILENO, F_GETFD), -1);
        unit_fill(db, 0, 100, 0, 0);
        unit_ok(kvmeta_flush(db));
        unit_close(db);
        assert_int_equal(fcntl(STDIN_FILENO, F_GETFD), -1);
        assert_int_equal(dup2(away, STDIN_FILENO), STDIN_FILENO);
    }
    close(away);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_full_disk_fails_the_write_and_loses_nothing),
    UNIT_CASE(a_full_disk_fails_the_flush_and_the_compaction),
    UNIT_CASE(the_thread_goes_on_when_a_full_disk_has_room),
    UNIT_CASE(a_read_only_disk_is_an_error_of_writes_alone),
    UNIT_CASE(too_few_descriptors_fail_the_open_alone),
    UNIT_CASE(too_few_descriptors_fail_the_flush_alone),
    UNIT_CASE(too_few_descriptors_fail_the_first_write_alone),
    UNIT_CASE(a_limit_on_file_size_fails_the_write),
    UNIT_CASE(a_limit_on_file_size_fails_the_durable_write),
    UNIT_CASE(a_limit_on_file_size_fails_the_flush),
    UNIT_CASE(descriptor_0_is_one_like_any_other),
    UNIT_CASE(the_clock_is_the_monotonic_one),
};

UNIT_MAIN(cases)
