/*
 * What the interface tests share: a directory of its own for each test, a
 * byte-exact image of it, files damaged on purpose, children, and a system
 * call table that fails on demand.
 *
 * A test is a function of one `struct unit *`. After it, whether it failed or
 * not, memory and descriptors are counted and the directory is removed; a
 * test that hangs is ended by an alarm. Include this first: it sets
 * _GNU_SOURCE for mkdtemp, fork and mount.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_UNIT_H
#define KVMETA_TEST_UNIT_H

#ifndef _GNU_SOURCE
#  define _GNU_SOURCE
#endif
#ifndef _FILE_OFFSET_BITS
#  define _FILE_OFFSET_BITS 64       /* where off_t has 32 bits otherwise */
#endif

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#undef test_realloc                  /* cmocka's; support.h has its own */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kvmeta.h"
#include "../support/support.h"

#define UNIT_SECONDS_MAX 300
#define UNIT_PATH 512
#define UNIT_LOG 65536

#define UNIT_INLINE __attribute__((unused)) static inline

/* Each hook: errno to fail with while it is not 0. `suffix` limits file
 * opens with CREATE and renames to names that end so. */
struct unit_faults {
    struct kvmeta_vfs vfs;
    atomic_int sync_errno;
    atomic_int write_errno;
    atomic_int create_errno;
    const char *create_suffix;
    atomic_uint_fast64_t syncs;
};

struct unit {
    struct test_alloc alloc;         /* first: options.user is both */
    char top[UNIT_PATH - 64];        /* the directory of this test */
    char dir[UNIT_PATH];             /* the store, not yet created, in it */
    struct kvmeta_error err;         /* of the last open */
    struct unit_faults faults;
    int descriptors;
    int passed;
    const struct unit_case *its_case;
    pthread_mutex_t log_lock;
    size_t log_bytes;
    char log[UNIT_LOG];              /* what log_fn was told, by lines */
};

struct unit_case {
    const char *name;
    void (*fn)(struct unit *u);
};

#define UNIT_CASE(fn) {#fn, fn}
#define UNIT_MAIN(cases)                                                      \
    int main(int argc, char **argv)                                           \
    {                                                                         \
        return unit_main(argc, argv, cases, sizeof cases / sizeof cases[0]);  \
    }

/* --------------------------------------------------------------------------
 * Before and after each test
 * -------------------------------------------------------------------------- */

static const struct unit_case *unit_running;

UNIT_INLINE void unit_hang(int signal_number)
{
    static const char text[] = "replay: this test hangs: --test ";
    ssize_t rc;

    (void)signal_number;
    rc = write(STDOUT_FILENO, text, sizeof text - 1);
    rc = write(STDOUT_FILENO, unit_running->name, strlen(unit_running->name));
    rc = write(STDOUT_FILENO, "\n", 1);
    (void)rc;
    _exit(3);
}

UNIT_INLINE int unit_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    if (dir == NULL) {
        return 0;
    }
    while (readdir(dir) != NULL) {
        count++;
    }
    closedir(dir);
    return count;
}

UNIT_INLINE int unit_remove_entry(const char *path, const struct stat *st,
                                  int type, struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}

/* Removes a directory and all in it, links not followed. */
UNIT_INLINE void unit_remove_tree(const char *path)
{
    nftw(path, unit_remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

UNIT_INLINE int unit_setup(void **state)
{
    struct unit *u = calloc(1, sizeof *u);
    const char *tmp = getenv("TMPDIR");

    if (u == NULL) {
        return -1;
    }
    u->its_case = *state;
    unit_running = u->its_case;
    pthread_mutex_init(&u->log_lock, NULL);
    snprintf(u->top, sizeof u->top, "%s/kvmeta-unit-XXXXXX",
             tmp != NULL && strlen(tmp) < 256 ? tmp : "/tmp");
    if (mkdtemp(u->top) == NULL) {
        free(u);
        return -1;
    }
    snprintf(u->dir, sizeof u->dir, "%s/store", u->top);
    u->descriptors = unit_descriptors();
    signal(SIGALRM, unit_hang);
    alarm(UNIT_SECONDS_MAX);
    *state = u;
    return 0;
}

UNIT_INLINE int unit_teardown(void **state)
{
    struct unit *u = *state;
    int rc = 0;

    alarm(0);
    if (!u->passed) {
        test_replay("--test %s", u->its_case->name);
    } else if (atomic_load(&u->alloc.live_blocks) != 0) {
        print_error("%s: %lld blocks of memory are still live\n",
                    u->its_case->name,
                    (long long)atomic_load(&u->alloc.live_blocks));
        test_replay("--test %s", u->its_case->name);
        rc = -1;
    } else if (unit_descriptors() != u->descriptors) {
        print_error("%s: file descriptors are still open\n",
                    u->its_case->name);
        test_replay("--test %s", u->its_case->name);
        rc = -1;
    }
    snprintf(u->dir, sizeof u->dir, "%s/full", u->top);
    umount2(u->dir, MNT_DETACH);     /* left by a test that failed in it */
    unit_remove_tree(u->top);
    if (u->passed) {                 /* else a handle may still use it */
        pthread_mutex_destroy(&u->log_lock);
        free(u);
    }
    return rc;
}

UNIT_INLINE void unit_run(void **state)
{
    struct unit *u = *state;

    u->its_case->fn(u);
    u->passed = 1;
}

UNIT_INLINE int unit_main(int argc, char **argv, struct unit_case *cases,
                          size_t count)
{
    struct CMUnitTest *tests = calloc(count, sizeof *tests);
    size_t i;
    int failed;

    test_parse_args(argc, argv);
    if (tests == NULL) {
        return 2;
    }
    for (i = 0; i < count; i++) {
        tests[i].name = cases[i].name;
        tests[i].test_func = unit_run;
        tests[i].setup_func = unit_setup;
        tests[i].teardown_func = unit_teardown;
        tests[i].initial_state = &cases[i];
    }
    if (test_option("test") != NULL) {
        cmocka_set_test_filter(test_option("test"));
    }
    failed = _cmocka_run_group_tests(argv[0], tests, count, NULL, NULL);
    free(tests);
    return failed != 0;
}

/* --------------------------------------------------------------------------
 * Keys and values by number
 * -------------------------------------------------------------------------- */

/* A key whose last bytes are the number, big-endian, after zeros. */
UNIT_INLINE void unit_key(uint32_t key_bytes, uint64_t number,
                          unsigned char *key)
{
    uint32_t i;

    for (i = 0; i < key_bytes; i++) {
        uint32_t from_end = key_bytes - 1 - i;

        key[i] = from_end < 8 ? (unsigned char)(number >> (8 * from_end)) : 0;
    }
}

/* A value that the number determines, different in every byte it can be. */
UNIT_INLINE void unit_value(uint32_t value_bytes, uint64_t number,
                            unsigned char *value)
{
    uint32_t i;

    for (i = 0; i < value_bytes; i++) {
        value[i] = (unsigned char)((number >> (8 * (i % 8))) + 37u * (i / 8));
    }
}

/* --------------------------------------------------------------------------
 * Stores
 * -------------------------------------------------------------------------- */

UNIT_INLINE void unit_log(void *user, int level, const char *message)
{
    struct unit *u = user;
    int bytes;

    test_log(&u->alloc, level, message);
    pthread_mutex_lock(&u->log_lock);
    if (u->log_bytes < sizeof u->log) {
        bytes = snprintf(u->log + u->log_bytes, sizeof u->log - u->log_bytes,
                         "%s\n", message);
        u->log_bytes += (size_t)bytes;
    }
    pthread_mutex_unlock(&u->log_lock);
}

UNIT_INLINE struct kvmeta_options unit_options(struct unit *u,
                                               uint32_t key_bytes,
                                               uint32_t value_bytes)
{
    struct kvmeta_options options;

    kvmeta_options_init(&options, key_bytes, value_bytes);
    options.realloc_fn = test_realloc;
    options.log_fn = unit_log;
    options.user = u;
    return options;
}

/* Options for a store of 8-byte keys and values without a thread, in which
 * all that happens happens in the caller. */
UNIT_INLINE struct kvmeta_options unit_quiet(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);

    options.flags = KVMETA_NO_THREAD;
    return options;
}

UNIT_INLINE kvmeta *unit_open(struct unit *u,
                              const struct kvmeta_options *options)
{
    kvmeta *db = NULL;
    int rc = kvmeta_open(u->dir, options, &db, &u->err);

    if (rc != KVMETA_OK) {
        fail_msg("open: %d: %s", rc, u->err.message);
    }
    assert_non_null(db);
    return db;
}

#define unit_ok(call) unit_code(#call, (call), KVMETA_OK)
#define unit_is(call, code) unit_code(#call, (call), (code))

UNIT_INLINE void unit_code(const char *text, int rc, int want)
{
    if (rc != want) {
        fail_msg("%s: %d (%s), want %d", text, rc, kvmeta_strerror(rc), want);
    }
}

UNIT_INLINE void unit_close(kvmeta *db)
{
    unit_ok(kvmeta_close(db));
}

/* Puts numbers from <= i < to of an 8/8 store, with values of i + salt. */
UNIT_INLINE void unit_fill(kvmeta *db, uint64_t from, uint64_t to,
                           uint64_t salt, unsigned flags)
{
    unsigned char key[8], value[8];
    uint64_t i;

    for (i = from; i < to; i++) {
        unit_key(8, i, key);
        unit_value(8, i + salt, value);
        unit_ok(kvmeta_put(db, key, value, flags));
    }
}

/* The same with values without order, which no table makes smaller. */
UNIT_INLINE void unit_fill_random(kvmeta *db, uint64_t from, uint64_t to,
                                  uint64_t salt)
{
    struct test_rng rng = {salt};
    unsigned char key[8], value[8];
    uint64_t i;

    for (i = from; i < to; i++) {
        unit_key(8, i, key);
        test_rng_bytes(&rng, value, sizeof value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
}

UNIT_INLINE void unit_holds(kvmeta *db, uint64_t from, uint64_t to,
                            uint64_t salt)
{
    unsigned char key[8], value[8], got[8];
    uint64_t i;

    for (i = from; i < to; i++) {
        unit_key(8, i, key);
        unit_value(8, i + salt, value);
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, value, 8);
    }
}

/* A closed 8/8 store of `count` records: of `table` records each in the first
 * tables, and the rest in a sealed log. */
UNIT_INLINE void unit_make_store(struct unit *u, uint64_t tables,
                                 uint64_t table, uint64_t count)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    uint64_t i;

    for (i = 0; i < tables; i++) {
        unit_fill(db, i * table, (i + 1) * table, 0, KVMETA_WRITTEN);
        unit_ok(kvmeta_flush(db));
    }
    unit_fill(db, tables * table, count, 0, KVMETA_DURABLE);
    unit_close(db);
}

UNIT_INLINE struct kvmeta_stats unit_stats(kvmeta *db)
{
    struct kvmeta_stats stats;

    memset(&stats, 0xa5, sizeof stats);
    stats.struct_size = sizeof stats;
    unit_ok(kvmeta_stats(db, &stats));
    return stats;
}

UNIT_INLINE void unit_same_digest(struct kvmeta_digest a,
                                  struct kvmeta_digest b)
{
    assert_true(a.lo == b.lo && a.hi == b.hi);
}

/* --------------------------------------------------------------------------
 * Children and time
 * -------------------------------------------------------------------------- */

/* Runs fn in a child that ends by _exit: as a kill does, without a close.
 * Returns what fn returned, or -1 when the child died. */
UNIT_INLINE int unit_in_child(int (*fn)(void *arg), void *arg)
{
    int status;
    pid_t pid;

    fflush(stdout);
    pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        alarm(UNIT_SECONDS_MAX);
        _exit(fn(arg) & 0x7f);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

struct unit_life {
    struct unit *u;
    uint64_t from, to;
    unsigned durability;
    int sync;
};

/* For a child: puts the numbers of an 8/8 store, and ends without a close. */
UNIT_INLINE int unit_live_and_die(void *arg)
{
    struct unit_life *life = arg;
    struct kvmeta_options options = unit_quiet(life->u);
    unsigned char key[8], value[8];
    kvmeta *db = NULL;
    uint64_t i;
    int rc = kvmeta_open(life->u->dir, &options, &db, NULL);

    for (i = life->from; i < life->to && rc == 0; i++) {
        unit_key(8, i, key);
        unit_value(8, i, value);
        rc = kvmeta_put(db, key, value, life->durability);
    }
    if (rc == 0 && life->sync) {
        rc = kvmeta_sync(db);
    }
    return rc != 0;
}

UNIT_INLINE uint64_t unit_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

UNIT_INLINE void unit_sleep_ms(unsigned ms)
{
    struct timespec time = {ms / 1000, (long)(ms % 1000) * 1000000};

    nanosleep(&time, NULL);
}

/* Raises a limit of this process as far as it may be; returns what it was. */
UNIT_INLINE rlim_t unit_raise_limit(int which)
{
    struct rlimit limit;
    rlim_t was;

    assert_int_equal(getrlimit(which, &limit), 0);
    was = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    assert_int_equal(setrlimit(which, &limit), 0);
    return was;
}

UNIT_INLINE void unit_restore_limit(int which, rlim_t was)
{
    struct rlimit limit;

    assert_int_equal(getrlimit(which, &limit), 0);
    limit.rlim_cur = was;
    assert_int_equal(setrlimit(which, &limit), 0);
}

/* --------------------------------------------------------------------------
 * A system call table that fails on demand
 * -------------------------------------------------------------------------- */

UNIT_INLINE int unit_fault_sync(void *user, int file)
{
    struct unit_faults *faults = user;
    const struct kvmeta_vfs *posix = kvmeta_vfs_posix();
    int code = atomic_load(&faults->sync_errno);

    atomic_fetch_add(&faults->syncs, 1);
    return code != 0 ? code : posix->file_sync(posix->user, file);
}

UNIT_INLINE int64_t unit_fault_write(void *user, int file, const void *buf,
                                     size_t bytes, uint64_t off)
{
    struct unit_faults *faults = user;
    const struct kvmeta_vfs *posix = kvmeta_vfs_posix();
    int code = atomic_load(&faults->write_errno);

    return code != 0 ? -(int64_t)code
                     : posix->file_write(posix->user, file, buf, bytes, off);
}

UNIT_INLINE int unit_fault_open(void *user, int dir, const char *name,
                                int flags, int *file)
{
    struct unit_faults *faults = user;
    const struct kvmeta_vfs *posix = kvmeta_vfs_posix();
    int code = atomic_load(&faults->create_errno);
    size_t length = strlen(name), want = strlen(faults->create_suffix);

    if (code != 0 && (flags & KVMETA_VFS_CREATE) && length >= want &&
        strcmp(name + length - want, faults->create_suffix) == 0) {
        return code;
    }
    return posix->file_open(posix->user, dir, name, flags, file);
}

/* The faults of a test live in its unit: a handle that a failed test leaves
 * open goes on using them. */
UNIT_INLINE struct unit_faults *unit_faults_init(struct unit *u)
{
    struct unit_faults *faults = &u->faults;

    memset(faults, 0, sizeof *faults);
    faults->vfs = *kvmeta_vfs_posix();
    faults->vfs.user = faults;
    faults->vfs.file_sync = unit_fault_sync;
    faults->vfs.file_write = unit_fault_write;
    faults->vfs.file_open = unit_fault_open;
    faults->create_suffix = "";
    return faults;
}

/* The same with nothing that fails, and nothing synced: for tests that no
 * power cut concerns, and that would wait for the disk a thousand times. */
UNIT_INLINE int unit_sync_nothing(void *user, int file)
{
    (void)user, (void)file;
    return 0;
}

UNIT_INLINE const struct kvmeta_vfs *unit_unsynced(struct unit *u)
{
    struct unit_faults *faults = unit_faults_init(u);

    faults->vfs.file_sync = unit_sync_nothing;
    faults->vfs.dir_sync = unit_sync_nothing;
    return &faults->vfs;
}

#include "unit_files.h"

#endif /* KVMETA_TEST_UNIT_H */
