/*
 * What the processor, the thread library and the system calls under kvmeta.c
 * may refuse, one after another; and what memory looks like when it is
 * broken. Looks inside: kvmeta.c is part of this program, and the names of
 * the calls stand for functions here that fail on demand.
 *
 * SPDX-License-Identifier: MIT
 */
#define KVMETA_STATIC
#include "unit.h"
#include "unit_files.h"

#include <dirent.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/file.h>
#include <sys/mman.h>

/* --------------------------------------------------------------------------
 * Calls that fail on demand
 * -------------------------------------------------------------------------- */

enum os_call {
    OS_NONE,
    OS_OPEN,
    OS_READ,
    OS_FSYNC,
    OS_FDATASYNC,
    OS_CLOSE,
    OS_FDOPENDIR,
    OS_FSTAT,
    OS_PREAD,
    OS_PWRITE,
    OS_FTRUNCATE,
    OS_RENAME,
    OS_MALLOC,
    OS_MMAP,
    OS_MADVISE,
    OS_MUTEX,
    OS_COND,
    OS_CONDATTR,
    OS_THREAD,
    OS_SYSCONF,
    OS_SYSCALL,
    OS_CALLS
};

/* The call `at` of a kind fails, and of mmap all that follow: one failure is
 * made up for. Error 0: the call does nothing, and says so. */
static struct {
    enum os_call kind;
    unsigned at;
    int error;
    atomic_uint seen;
} os_fault;

static void os_fail(enum os_call kind, unsigned at, int error)
{
    os_fault.kind = kind;
    os_fault.at = at;
    os_fault.error = error;
    atomic_store(&os_fault.seen, 0);
}

static int os_hit(enum os_call kind)
{
    unsigned n;

    if (os_fault.kind != kind) return 0;
    n = atomic_fetch_add(&os_fault.seen, 1) + 1;
    if (kind == OS_MMAP ? n < os_fault.at : n != os_fault.at) return 0;
    errno = os_fault.error;
    return 1;
}

static ssize_t os_failed_bytes(void)
{
    return os_fault.error ? -1 : 0;
}

static int os_close(int fd)
{
    int hit = os_hit(OS_CLOSE);
    int rc = close(fd);

    if (hit) errno = os_fault.error;
    return hit ? -1 : rc;
}

/* What the processor is said to have: 2 all that it has, 1 no AVX2, 0 plain. */
static int os_cpu = 2;

#if defined(__x86_64__) && defined(__GNUC__)
static int os_cpu_supports(const char *what)
{
    if (strcmp(what, "avx2") == 0)
        return os_cpu >= 2 && __builtin_cpu_supports("avx2");
    return os_cpu >= 1 && __builtin_cpu_supports("sse4.2");
}
#endif

/* The only one is membarrier. */
static long os_syscall(long number, long a, long b, long c)
{
    return os_hit(OS_SYSCALL) ? -1 : syscall(number, a, b, c);
}

/* Frees the slot of a reader when the others have waited for it. */
static _Atomic uint64_t *os_slot_held;

static int os_yield(void)
{
    if (os_slot_held) atomic_store(os_slot_held, 0);
    return sched_yield();
}

static size_t os_read_asked;             /* by the last pread or pwrite */

static ssize_t os_pread(int fd, void *buf, size_t bytes, off_t off)
{
    os_read_asked = bytes;
    return os_hit(OS_PREAD) ? os_failed_bytes() : pread(fd, buf, bytes, off);
}

static ssize_t os_pwrite(int fd, const void *buf, size_t bytes, off_t off)
{
    os_read_asked = bytes;
    return os_hit(OS_PWRITE) ? os_failed_bytes()
                             : pwrite(fd, buf, bytes, off);
}

static int os_open(const char *path, int how)
{
    return os_hit(OS_OPEN) ? -1 : open(path, how);
}

static ssize_t os_read(int fd, void *p, size_t n)
{
    return os_hit(OS_READ) ? os_failed_bytes() : read(fd, p, n);
}

static int os_fsync(int fd)
{
    return os_hit(OS_FSYNC) ? -1 : fsync(fd);
}

static int os_fdatasync(int fd)
{
    return os_hit(OS_FDATASYNC) ? -1 : fdatasync(fd);
}

static DIR *os_fdopendir(int fd)
{
    return os_hit(OS_FDOPENDIR) ? NULL : fdopendir(fd);
}

static int os_fstat(int fd, struct stat *st)
{
    return os_hit(OS_FSTAT) ? -1 : fstat(fd, st);
}

static int os_ftruncate(int fd, off_t n)
{
    return os_hit(OS_FTRUNCATE) ? -1 : ftruncate(fd, n);
}

static int os_renameat(int from_dir, const char *from, int to_dir,
                       const char *to)
{
    return os_hit(OS_RENAME) ? -1 : renameat(from_dir, from, to_dir, to);
}

static void *os_malloc(size_t n)
{
    return os_hit(OS_MALLOC) ? NULL : malloc(n);
}

static int os_madvise(void *p, size_t n, int how)
{
    return os_hit(OS_MADVISE) ? -1 : madvise(p, n, how);
}

static long os_sysconf(int what)
{
    return os_hit(OS_SYSCONF) ? -1 : sysconf(what);
}

/* So many bytes behind a multiple of `os_pages_align` the system puts pages,
 * or anywhere. */
static size_t os_pages_align, os_pages_skew;

static void *os_mmap(void *at, size_t n, int prot, int how, int fd, off_t off)
{
    size_t room = n + 2 * os_pages_align;
    size_t before;
    char *p;

    if (os_hit(OS_MMAP)) return MAP_FAILED;
    if (os_pages_align == 0) return mmap(at, n, prot, how, fd, off);
    p = mmap(at, room, prot, how, fd, off);
    if (p == MAP_FAILED) return MAP_FAILED;
    before = os_pages_align - (uintptr_t)p % os_pages_align + os_pages_skew;
    munmap(p, before);
    munmap(p + before + n, room - before - n);
    return p + before;
}

static int os_mutex_init(pthread_mutex_t *m, const pthread_mutexattr_t *a)
{
    return os_hit(OS_MUTEX) ? os_fault.error : pthread_mutex_init(m, a);
}

static int os_cond_init(pthread_cond_t *c, const pthread_condattr_t *a)
{
    return os_hit(OS_COND) ? os_fault.error : pthread_cond_init(c, a);
}

static int os_condattr_init(pthread_condattr_t *a)
{
    return os_hit(OS_CONDATTR) ? os_fault.error : pthread_condattr_init(a);
}

static int os_condattr_setclock(pthread_condattr_t *a, clockid_t clock)
{
    return os_hit(OS_CONDATTR) ? os_fault.error
                               : pthread_condattr_setclock(a, clock);
}

static int os_thread(pthread_t *t, const pthread_attr_t *a,
                     void *(*fn)(void *arg), void *arg)
{
    return os_hit(OS_THREAD) ? os_fault.error : pthread_create(t, a, fn, arg);
}

/* Calls alone, so that a condition in kvmeta.c stays one. */
#define open(path, how) os_open(path, how)
#define read(fd, p, n) os_read(fd, p, n)
#define fsync(fd) os_fsync(fd)
#define fdatasync(fd) os_fdatasync(fd)
#define close(fd) os_close(fd)
#define fdopendir(fd) os_fdopendir(fd)
#define fstat(fd, st) os_fstat(fd, st)
#define pread(fd, p, n, off) os_pread(fd, p, n, off)
#define pwrite(fd, p, n, off) os_pwrite(fd, p, n, off)
#define ftruncate(fd, n) os_ftruncate(fd, n)
#define renameat(from_dir, from, to_dir, to) \
    os_renameat(from_dir, from, to_dir, to)
#define malloc(n) os_malloc(n)
#define mmap(at, n, prot, how, fd, off) os_mmap(at, n, prot, how, fd, off)
#define madvise(p, n, how) os_madvise(p, n, how)
#define pthread_mutex_init(m, a) os_mutex_init(m, a)
#define pthread_cond_init(c, a) os_cond_init(c, a)
#define pthread_condattr_init(a) os_condattr_init(a)
#define pthread_condattr_setclock(a, clock) os_condattr_setclock(a, clock)
#define pthread_create(t, a, fn, arg) os_thread(t, a, fn, arg)
#define sysconf(what) os_sysconf(what)
#define sched_yield() os_yield()
#define syscall(number, a, b, c) os_syscall(number, a, b, c)
#define __builtin_cpu_supports(what) os_cpu_supports(what)

#include "../../kvmeta.c"

#undef open
#undef read
#undef fsync
#undef fdatasync
#undef close
#undef fstat
#undef pread
#undef pwrite
#undef malloc
#undef mmap
#undef renameat
#undef pthread_mutex_init
#undef pthread_create

/* --------------------------------------------------------------------------
 * System calls
 * -------------------------------------------------------------------------- */

enum { PUTS = 8 };

/* Opens, writes and closes; acked[i] when put i was acknowledged. Returns the
 * first error, of whichever call. */
static int one_life(struct unit *u, const struct kvmeta_options *options,
                    unsigned char acked[PUTS])
{
    unsigned char key[8];
    kvmeta *db = NULL;
    int rc = kvmeta_open(u->dir, options, &db, &u->err);
    int first = rc;

    for (unsigned i = 0; db && i < PUTS; i++) {
        unit_key(8, i, key);
        rc = kvmeta_put(db, key, key, i % 4 ? KVMETA_WRITTEN : KVMETA_DURABLE);
        acked[i] |= rc == KVMETA_OK;
        if (!first) first = rc;
        if (i % 4 != 3) continue;
        rc = i == 7 ? kvmeta_compact(db) : kvmeta_flush(db);
        if (!first) first = rc;
    }
    rc = db ? kvmeta_close(db) : KVMETA_OK;
    return first ? first : rc;
}

static void check_after(struct unit *u, const struct kvmeta_options *options,
                        const unsigned char acked[PUTS])
{
    unsigned char key[8], got[8];
    kvmeta *db = unit_open(u, options);

    for (unsigned i = 0; i < PUTS; i++) {
        unit_key(8, i, key);
        if (!acked[i]) continue;
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, key, 8);
    }
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

static int is_honest(int rc)
{
    return rc == KVMETA_OK || rc == KVMETA_E_IO || rc == KVMETA_E_NOMEM
        || rc == KVMETA_E_NOSPACE || rc == KVMETA_E_LIMIT
        || rc == KVMETA_E_FAILED
        || rc == KVMETA_E_CORRUPT || rc == KVMETA_E_BUSY;
}

/* Two lives of a store for each call of the kind that they make, or each
 * fifth: every life syncs a real disk. Returns how many had an error. */
static unsigned fail_each(struct unit *u, const struct kvmeta_options *options,
                          enum os_call kind, int error)
{
    unsigned errors = 0;
    unsigned stride = test_args.scale > 1 ? 1 : 5;

    for (unsigned at = 1;; at += stride) {
        unsigned char acked[PUTS] = {0};
        int first, second, hit;

        os_fail(kind, at, error);
        first = one_life(u, options, acked);
        second = one_life(u, options, acked);
        hit = atomic_load(&os_fault.seen) >= at;
        os_fail(OS_NONE, 0, 0);
        if (!is_honest(first) || !is_honest(second))
            fail_msg("call %u of kind %d, error %d: %d, %d", at, (int)kind,
                     error, first, second);
        errors += first || second;
        check_after(u, options, acked);
        unit_remove_tree(u->dir);
        if (!hit) return errors;
    }
}

/* Goal: a system call that fails is an error of the call that needed it, or
 * harmless; the next life holds all that was acknowledged. Method: each call
 * of two lives in turn, with errors that a disk, a quota and the kernel give,
 * and with none at all but no progress either. */
static void a_system_call_that_fails_loses_nothing(struct unit *u)
{
    static const int of_writes[] = {EDQUOT, EFBIG, ENOMEM, 0};
    static const enum os_call never_harmless[] = {
        OS_FSYNC, OS_FDATASYNC, OS_FDOPENDIR, OS_FSTAT, OS_PREAD, OS_PWRITE,
        OS_READ, OS_RENAME
    };
    struct kvmeta_options options = unit_quiet(u);

    options.open_threads = 1;
    for (size_t i = 0; i < sizeof never_harmless / sizeof *never_harmless; i++)
        assert_true(fail_each(u, &options, never_harmless[i], EIO) > 0);
    for (size_t i = 0; i < sizeof of_writes / sizeof *of_writes; i++)
        assert_true(fail_each(u, &options, OS_PWRITE, of_writes[i]) > 0);
    assert_true(fail_each(u, &options, OS_OPEN, EMFILE) > 0);
    assert_true(fail_each(u, &options, OS_PREAD, 0) > 0);
    assert_true(fail_each(u, &options, OS_READ, 0) > 0);
    assert_true(fail_each(u, &options, OS_READ, EINTR) == 0);
    (void)fail_each(u, &options, OS_CLOSE, EIO);
    (void)fail_each(u, &options, OS_FTRUNCATE, EIO);
}

/* Goal: no lock, no thread, no memory: the open says so, and leaves nothing
 * behind; what is only for speed is done without. */
static void a_lock_or_thread_that_is_refused_fails_the_open(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    kvmeta *db = NULL;

    for (unsigned at = 1; at <= 8; at++) {
        os_fail(OS_MUTEX, at, ENOMEM);
        unit_is(kvmeta_open(u->dir, &options, &db, &u->err), KVMETA_E_NOMEM);
    }
    for (unsigned at = 1; at <= 4; at++) {
        os_fail(OS_COND, at, EAGAIN);
        unit_is(kvmeta_open(u->dir, &options, &db, &u->err), KVMETA_E_NOMEM);
        os_fail(OS_CONDATTR, at, ENOMEM);
        unit_is(kvmeta_open(u->dir, &options, &db, &u->err), KVMETA_E_NOMEM);
    }
    os_fail(OS_THREAD, 1, EAGAIN);
    options.open_threads = 1;
    unit_is(kvmeta_open(u->dir, &options, &db, &u->err), KVMETA_E_NOMEM);
    assert_int_equal(u->err.sys_errno, EAGAIN);
    os_fail(OS_MALLOC, 1, ENOMEM);       /* the path of the parent */
    unit_remove_tree(u->dir);
    assert_int_not_equal(kvmeta_open(u->dir, &options, &db, &u->err),
                         KVMETA_OK);
    assert_null(db);
    os_fail(OS_SYSCONF, 1, EINVAL);      /* the number of cores */
    options.open_threads = 0;
    db = unit_open(u, &options);
    assert_int_equal(atomic_load(&os_fault.seen), 1);
    os_fail(OS_NONE, 0, 0);
    unit_close(db);
}

static uint64_t os_process_id(void *user)
{
    (void)user;
    return 42;
}

/* Goal: where the system has no pages that a fork empties, or the host has
 * its own idea of a process, a store works. */
static void a_store_works_without_the_page_that_tells_of_a_fork(struct unit *u)
{
    static const enum os_call calls[] = {OS_MMAP, OS_MADVISE, OS_NONE};
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();
    struct kvmeta_options options;
    unsigned char key[8] = {1};

    vfs.process_id = os_process_id;
    kvmeta_options_init(&options, 8, 8);
    for (unsigned i = 0; i < 3; i++) {
        kvmeta *db;

        if (calls[i] == OS_NONE) options.vfs = &vfs;
        os_fail(calls[i], 1, EINVAL);
        db = unit_open(u, &options);
        if (calls[i]) assert_int_equal(atomic_load(&os_fault.seen), 1);
        os_fail(OS_NONE, 0, 0);
        assert_null(db->alive);
        unit_ok(kvmeta_put(db, key, key, 0));
        unit_ok(kvmeta_has(db, key));
        unit_close(db);
    }
}

/* Goal: a store is made in whatever form its path has, and the directory
 * above it is synced; an error of that is one of the open. */
static void the_directory_above_is_found_from_any_path(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    static const char *const paths[] = {"here", "there/", "./dot//"};
    int back = open(".", O_RDONLY | O_DIRECTORY);
    kvmeta *db;

    assert_true(back >= 0);
    assert_int_equal(chdir(u->top), 0);
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        unit_ok(kvmeta_open(paths[i], &options, &db, &u->err));
        unit_close(db);
        assert_int_equal(access(paths[i], F_OK), 0);
    }
    assert_int_equal(kv_posix_dir_sync_parent(NULL, "/"), 0);
    assert_int_equal(kv_posix_dir_sync_parent(NULL, "none/store"), ENOENT);
    assert_int_equal(fchdir(back), 0);
    close(back);
}

/* Goal: no read or write asks for more at once than every system takes. */
static void no_call_asks_for_more_than_a_gibibyte(struct unit *u)
{
    static volatile size_t huge = (size_t)3 << 30;  /* nothing is read */
    char byte = 0;

    (void)u;
    os_fail(OS_PREAD, 1, EIO);
    assert_int_equal(kv_posix_file_read(NULL, -1, &byte, huge, 0), -EIO);
    assert_int_equal(os_read_asked, 1 << 30);
    os_fail(OS_PWRITE, 1, EIO);
    assert_int_equal(kv_posix_file_write(NULL, -1, &byte, huge, 0), -EIO);
    assert_int_equal(os_read_asked, 1 << 30);
    os_fail(OS_NONE, 0, 0);
}

/* Goal: of a store that was begun, with nothing but LOCK, an open that fails
 * makes nothing, and the next makes the store. */
static void a_store_that_was_begun_is_made_once_calls_work(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned errors = 0;

    for (unsigned at = 1;; at++) {
        kvmeta *db = NULL;
        int rc, hit;

        assert_int_equal(mkdir(u->dir, 0700), 0);
        unit_write_path(unit_path(u, "LOCK"), "", 0);
        os_fail(OS_FSTAT, at, EIO);
        rc = kvmeta_open(u->dir, &options, &db, &u->err);
        hit = atomic_load(&os_fault.seen) >= at;
        os_fail(OS_NONE, 0, 0);
        assert_true(rc == KVMETA_OK || rc == KVMETA_E_IO);
        errors += rc != KVMETA_OK;
        if (rc) db = unit_open(u, &options);
        unit_fill(db, 0, 5, 0, 0);
        unit_close(db);
        unit_remove_tree(u->dir);
        if (!hit) break;
    }
    assert_true(errors > 2);
}

static int stop_at_a_name(void *arg, const char *name)
{
    (void)name;
    return *(int *)arg;
}

/* Goal: who lists a directory may stop, and the list says with what. */
static void a_listing_ends_with_what_its_caller_says(struct unit *u)
{
    int code = EXDEV, dir = -1;

    assert_int_equal(kv_posix_dir_open(NULL, u->top, &dir), 0);
    assert_int_equal(kv_posix_dir_list(NULL, dir, stop_at_a_name, &code),
                     EXDEV);
    assert_int_equal(kv_posix_dir_close(NULL, dir), 0);
}

/* --------------------------------------------------------------------------
 * The processor
 * -------------------------------------------------------------------------- */

/* Keys of 12 bytes of which many share the first eight. */
static struct kvmeta_digest fill_and_read(kvmeta *db)
{
    unsigned char key[12], value[8];

    for (unsigned i = 0; i < 4000; i++) {
        unsigned n = i * 2654435761u;

        unit_key(12, ((uint64_t)(n % 50) << 32) | n, key);
        unit_value(8, i, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    for (unsigned i = 0; i < 4000; i++) {
        unsigned n = i * 2654435761u;

        unit_key(12, ((uint64_t)(n % 50) << 32) | n, key);
        unit_ok(kvmeta_has(db, key));
    }
    unit_ok(kvmeta_verify(db, NULL));
    return kvmeta_digest(db);
}

/* Goal: each set of instructions gives the same store, byte for byte on disk
 * where sums are concerned: what one wrote, the others read. */
static void every_processor_reads_what_another_wrote(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 12, 8);
    struct kvmeta_digest first = {0, 0};

    options.flags = KVMETA_NO_THREAD;
    for (int writer = 0; writer <= 2; writer++) {
        os_cpu = writer;
        kvmeta *db = unit_open(u, &options);
        struct kvmeta_digest digest = fill_and_read(db);

        if (writer == 0) first = digest;
        unit_same_digest(digest, first);
        unit_ok(kvmeta_flush(db));
        unit_close(db);
        for (os_cpu = 0; os_cpu <= 2; os_cpu++) {
            db = unit_open(u, &options);
            unit_same_digest(kvmeta_digest(db), first);
            unit_ok(kvmeta_verify(db, NULL));
            unit_close(db);
        }
        unit_remove_tree(u->dir);
    }
    os_cpu = 2;
}

/* --------------------------------------------------------------------------
 * Memory
 * -------------------------------------------------------------------------- */

static int put_large(kvmeta *db, uint64_t *count, uint64_t to)
{
    static unsigned char value[1000];
    unsigned char key[8];
    int rc = KVMETA_OK;

    for (; *count < to && !rc; *count += !rc) {
        unit_key(8, *count, key);
        unit_value(sizeof value, *count, value);
        rc = kvmeta_put(db, key, value, KVMETA_BUFFERED);
    }
    return rc;
}

/* Goal: a large store gets its memory by pages, one slab ahead of need; when
 * the system has none, the write fails, nothing has changed, and the next
 * write works. Method: 80 MB of records without an allocator of ours. */
static void a_large_store_survives_that_pages_are_refused(struct unit *u)
{
    struct kvmeta_options options;
    uint64_t count = 0;
    kvmeta *db;
    int did = 1;

    kvmeta_options_init(&options, 8, 1000);
    options.flags = KVMETA_NO_THREAD;
    options.log_bytes_max = 1 << 30;
    db = unit_open(u, &options);
    unit_ok(put_large(db, &count, 20000));
    os_fail(OS_MMAP, 1, ENOMEM);
    unit_is(put_large(db, &count, 40000), KVMETA_E_NOMEM);
    os_fail(OS_NONE, 0, 0);
    assert_true(kvmeta_count(db) == count);
    unit_ok(put_large(db, &count, 75000));
    os_fail(OS_MMAP, 1, ENOMEM);
    kv_pool_prepare(&db->tree.leaves);
    os_fail(OS_NONE, 0, 0);
    assert_null(db->tree.leaves.ahead);
    db->tree.leaves.ahead_wanted = true;
    unit_ok(kvmeta_step(db, &did));
    assert_int_equal(did, 1);
    assert_non_null(db->tree.leaves.ahead);
    kv_pool_prepare(&db->tree.leaves);   /* a second one goes back */
    unit_ok(put_large(db, &count, 80000));
    kv_pool_prepare(&db->tree.leaves);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: a slab of pages can be a huge page, wherever the system puts it. */
static void a_slab_is_aligned_wherever_its_pages_are(struct unit *u)
{
    static const size_t skews[] = {0, 4096, KV_SLAB_BYTES - 4096};

    (void)u;
    for (size_t i = 0; i < sizeof skews / sizeof *skews; i++) {
        unsigned char *slab;

        os_pages_align = KV_SLAB_BYTES;
        os_pages_skew = skews[i];
        slab = kv_slab_map(KV_SLAB_BYTES);
        os_pages_align = 0;
        assert_non_null(slab);
        assert_int_equal((uintptr_t)slab % KV_SLAB_BYTES, 0);
        slab[0] = slab[KV_SLAB_BYTES - 1] = 1;
        assert_int_equal(munmap(slab, KV_SLAB_BYTES), 0);
    }
}

/* Goal: a log so large that its buffers are pages of their own is flushed
 * once the system has them, and read back by the next open; without, that
 * step fails alone. Method: 1.6 MB without an allocator of ours; the flush
 * asks for the log, its items, and room to sort them. */
static void a_large_log_survives_that_pages_are_refused(struct unit *u)
{
    struct kvmeta_options options;
    kvmeta *db;

    kvmeta_options_init(&options, 8, 8);
    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    unit_fill(db, 0, 70000, 0, KVMETA_BUFFERED);
    for (unsigned at = 1; at <= 3; at++) {
        os_fail(OS_MMAP, at, ENOMEM);
        unit_is(kvmeta_flush(db), KVMETA_E_NOMEM);
        os_fail(OS_NONE, 0, 0);
        assert_int_equal(unit_stats(db).tables, 0);
    }
    unit_close(db);
    os_fail(OS_MMAP, 1, ENOMEM);
    unit_open_fails(u, &options, KVMETA_E_NOMEM);
    os_fail(OS_NONE, 0, 0);
    db = unit_open(u, &options);
    unit_ok(kvmeta_flush(db));
    assert_int_equal(unit_stats(db).table_records, 70000);
    unit_holds(db, 0, 70000, 0);
    unit_close(db);
}

static void finds_with_slots_taken(kvmeta *db, const unsigned char *key,
                                   size_t freed)
{
    struct kv_tree *t = &db->tree;

    for (unsigned i = 0; i < KV_SLOTS; i++) atomic_store(&t->slots[i].gen, 1);
    os_slot_held = &t->slots[freed].gen;
    unit_ok(kvmeta_has(db, key));
    os_slot_held = NULL;
    for (unsigned i = 0; i < KV_SLOTS; i++) atomic_store(&t->slots[i].gen, 0);
}

/* Goal: a reader that finds each slot taken waits until one is given back,
 * whether it has one of its own or not. */
static void a_reader_waits_while_all_slots_are_taken(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kv_tree *t = &db->tree;
    unsigned char key[8] = {0};
    size_t own;

    unit_ok(kvmeta_put(db, key, key, 0));
    unit_ok(kvmeta_has(db, key));
    own = kv_slot_own(t, kv_thread_name(), false);
    assert_true((own < KV_SLOTS) == t->barriers);
    finds_with_slots_taken(db, key, own < KV_SLOTS ? own : KV_SLOTS_OWN);
    /* Those of its own are other threads' now. */
    t->barriers = true;
    for (unsigned i = 0; i < KV_SLOTS_OWN; i++) atomic_store(&t->owners[i], 1);
    assert_int_equal(kv_slot_own(t, kv_thread_name(), false), KV_SLOTS);
    finds_with_slots_taken(db, key, KV_SLOTS_OWN);
    unit_close(db);
}

/* Reads until readers need no barriers, if that can be. */
static void reads_until_biased(kvmeta *db, const unsigned char *key)
{
    for (unsigned i = 0; i < 3 * KV_PINS_CALM; i++)
        unit_ok(kvmeta_has(db, key));
    assert_true(kv_bias_is_on(&db->tree) == db->tree.barriers);
}

/* Goal: reads and writes go on where the system has no barrier for all
 * threads, or from some time on refuses it. */
static void readers_do_without_the_barrier(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8] = {0}, other[8] = {1}, value[8];
    kvmeta *db;

    os_fail(OS_SYSCALL, 1, ENOSYS);
    db = unit_open(u, &options);
    os_fail(OS_NONE, 0, 0);
    assert_false(db->tree.barriers);
    unit_ok(kvmeta_put(db, key, key, 0));
    reads_until_biased(db, key);
    unit_close(db);

    db = unit_open(u, &options);
    if (!db->tree.barriers) skip();      /* under a tool that has none */
    reads_until_biased(db, key);
    os_fail(OS_SYSCALL, 1, EPERM);
    unit_ok(kvmeta_put(db, other, key, 0));
    unit_ok(kvmeta_sync(db));
    unit_ok(kvmeta_flush(db));           /* it looks at the slots */
    os_fail(OS_NONE, 0, 0);
    assert_false(db->tree.barriers);
    reads_until_biased(db, other);
    unit_ok(kvmeta_get(db, other, value));
    assert_memory_equal(value, key, 8);
    unit_close(db);
}

/* Goal: a batch that no frame of a log could hold is refused while it is
 * made. Method: its count is set to just below. */
static void a_batch_beyond_what_a_frame_holds_is_refused(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[8] = {0};
    kvmeta_batch *batch = NULL;

    unit_ok(kvmeta_batch_new(db, &batch));
    batch->count = KV_LOG_FRAME_BYTES_MAX / kv_log_slot_bytes(&db->env.shape);
    unit_is(kvmeta_batch_put(batch, key, key), KVMETA_E_LIMIT);
    unit_is(kvmeta_batch_remove(batch, key), KVMETA_E_LIMIT);
    kvmeta_batch_clear(batch);
    unit_ok(kvmeta_batch_put(batch, key, key));
    unit_ok(kvmeta_commit(db, batch, 0, NULL));
    kvmeta_batch_free(batch);
    assert_int_equal(kvmeta_count(db), 1);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Broken memory
 * -------------------------------------------------------------------------- */

static void breaks(kvmeta *db, const char *rule)
{
    struct kvmeta_error err;

    unit_is(kvmeta_verify(db, &err), KVMETA_E_CORRUPT);
    if (!strstr(err.message, rule))
        fail_msg("said \"%s\", want \"%s\"", err.message, rule);
}

/* Sets a field to something that breaks a rule, and back. */
#define BREAK(db, field, wrong, rule)                                         \
    do {                                                                      \
        __typeof__(field) was = (field);                                      \
        (field) = (wrong);                                                    \
        breaks(db, rule);                                                     \
        (field) = was;                                                        \
    } while (0)

/* The same of one node alone, where no cursor could stand in it. */
#define BREAK_NODE(tree, node, field, wrong, rule)                            \
    do {                                                                      \
        __typeof__(field) was = (field);                                      \
        (field) = (wrong);                                                    \
        assert_string_equal(kv_node_check(tree, node), rule);                 \
        (field) = was;                                                        \
    } while (0)

static void break_version(kvmeta *db, struct kv_version *v)
{
    struct kv_node *root = v->root;

    BREAK(db, v->root, NULL, "T2: height");
    BREAK(db, v->height, v->height + 1, "T2: height");
    BREAK(db, v->count, v->count + 1, "T6: count");
    BREAK(db, v->digest.lo, v->digest.lo ^ 1, "T6: digest");
    BREAK(db, v->digest.hi, v->digest.hi ^ 1, "T6: digest");
    BREAK(db, root->gen, 0, "T5: child younger");
}

static void break_leaf(kvmeta *db, struct kv_node *inner,
                       struct kv_node *leaf)
{
    const struct kv_tree *t = &db->tree;
    unsigned char *tail = kv_row(t, leaf, 1);
    size_t free_place = kv_leaf_last(t, leaf) + 1;

    BREAK_NODE(t, leaf, leaf->count, 0, "T3: node count");
    BREAK_NODE(t, leaf, leaf->count, (uint16_t)(t->leaf.cap + 1),
               "T3: node count");
    BREAK_NODE(t, leaf, leaf->fill[0], 9, "T3: fill of blocks");
    BREAK_NODE(t, leaf, leaf->fill[0], 0, "T3: fill of blocks");
    BREAK_NODE(t, leaf, leaf->count, (uint16_t)(leaf->count - 1),
               "T3: fill of blocks");
    BREAK_NODE(t, inner, leaf->level, 1, "T2: level");
    BREAK_NODE(t, inner, leaf->gen, UINT64_MAX,
               "T5: child younger than parent");
    BREAK(db, kv_heads(leaf)[0], KV_HEAD_PAD, "T1: order within a node");
    BREAK(db, tail[t->env->shape.tail_bytes - 1], 0,
          "T1: order within a node");
    assert_true(free_place < 8 * t->leaf.lines);
    BREAK_NODE(t, leaf, kv_heads(leaf)[free_place], 0, "T4: head pad");
    BREAK_NODE(t, leaf, kv_index(leaf)[0], 0, "T7: index");
    BREAK_NODE(t, inner, kv_index(inner)[0], 0, "T7: index");
    assert_true(inner->count <= 8 * t->inner.lines);
    BREAK_NODE(t, inner, kv_heads(inner)[inner->count - 1], 0, "T4: head pad");
}

/* Goal: verify names the rule that memory breaks. Method: a store of three
 * levels, its nodes changed one field at a time and put right again. */
static void verify_names_the_rule_that_memory_breaks(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 16, 8);
    kvmeta *db = NULL;
    unsigned char key[16], value[8];
    struct kv_version *v;
    struct kv_node *inner, *leaf;
    unsigned char *tail;

    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    for (uint64_t i = 0; i < 9000; i++) {
        unit_key(16, i + 1, key);
        unit_value(8, i, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_sync(db));
    v = kv_tree_hold(&db->tree);
    assert_true(v->height >= 3);
    break_version(db, v);
    inner = kv_children(&db->tree, v->root)[0];
    leaf = kv_children(&db->tree, inner)[0];
    break_leaf(db, inner, leaf);
    /* A separator above the leaf to its right, by its head and its tail. */
    BREAK(db, kv_heads(inner)[inner->count - 2], KV_HEAD_PAD - 1,
          "T1: separator");
    tail = kv_row(&db->tree, inner, inner->count - 2);
    BREAK(db, tail[0], 0xff, "T1: separator");
    /* One that is the last key of the leaf to its left, or below that. */
    tail = kv_row(&db->tree, inner, 0);
    assert_int_equal(tail[6], 0);
    BREAK(db, tail[7], (unsigned char)(tail[7] - 1), "T1: separator");
    BREAK(db, tail[7], 1, "T1: separator");
    /* The last key of a leaf above the first of the next one. */
    tail = kv_row(&db->tree, leaf, kv_leaf_last(&db->tree, leaf));
    BREAK(db, tail[0], 0xff, "T1: order across leaves");
    kv_tree_drop(&db->tree, v);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: what the background keeps in memory of its tables is checked against
 * the log that it flushes; the log is healed from memory, and nothing is
 * lost. */
static void a_log_that_does_not_follow_the_tables_is_healed(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);

    for (unsigned broken = 0; broken < 2; broken++) {
        kvmeta *db = unit_open(u, &options);

        unit_fill(db, 0, 100, 0, 0);
        if (broken)
            db->tables_digest.lo ^= 1;
        else
            db->tables_seq++;
        unit_ok(kvmeta_flush(db));
        assert_int_equal(unit_stats(db).heals, 1);
        assert_non_null(strstr(u->log, "log does not follow the tables"));
        unit_ok(kvmeta_verify(db, NULL));
        unit_close(db);
        db = unit_open(u, &options);
        assert_int_equal(kvmeta_count(db), 100);
        unit_holds(db, 0, 100, 0);
        unit_close(db);
        unit_remove_tree(u->dir);
        u->log_bytes = 0;
        u->log[0] = 0;
    }
}

/* Goal: a merge that does not balance is thrown away, its inputs stay, and
 * compaction stops with an error that can be asked for. */
static void check_balance(struct unit *u, bool whole)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_error err;
    uint64_t *broken;

    unit_fill(db, 0, 100, 0, 0);
    unit_ok(kvmeta_flush(db));
    unit_fill(db, 50, 150, 7, 0);
    unit_ok(kvmeta_flush(db));
    broken = whole ? &db->tables_digest.hi : &db->tables[0].sum.hi;
    *broken ^= 1;
    unit_is(kvmeta_compact(db), KVMETA_E_CORRUPT);
    *broken ^= 1;
    unit_is(kvmeta_last_error(db, &err), KVMETA_E_CORRUPT);
    assert_non_null(strstr(err.message, "does not balance"));
    assert_int_equal(unit_stats(db).heals, 0);
    unit_fill(db, 150, 200, 7, 0);
    unit_ok(kvmeta_flush(db));
    unit_is(kvmeta_last_error(db, NULL), KVMETA_E_CORRUPT);
    unit_is(kvmeta_compact(db), KVMETA_E_FAILED);
    assert_int_equal(unit_stats(db).tables, 3);
    unit_close(db);
    db = unit_open(u, &options);
    unit_holds(db, 0, 50, 0);
    unit_holds(db, 50, 200, 7);
    unit_ok(kvmeta_compact(db));
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void a_merge_that_does_not_balance_is_discarded(struct unit *u)
{
    check_balance(u, false);
    check_balance(u, true);
}

/* Goal: a digest that was damaged in memory reaches the log, but no table:
 * writing stops. */
static void a_digest_damaged_in_memory_stops_the_flush(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    unit_fill(db, 0, 10, 0, 0);
    kv_tree_now(&db->tree)->digest.lo ^= 1;
    unit_fill(db, 10, 20, 0, 0);
    assert_int_not_equal(kvmeta_flush(db), KVMETA_OK);
    assert_non_null(strstr(u->log, "do not sum up"));
    unit_is(kvmeta_put(db, "12345678", "12345678", 0), KVMETA_E_FAILED);
    unit_holds(db, 0, 20, 0);
    assert_int_equal(unit_stats(db).tables, 0);
    kvmeta_close(db);
}

/* A tree whose leaves hold enough memory to get slabs ahead; nothing of it is
 * touched. */
static void large_tree(struct kv_tree *t, struct kv_env *env,
                       uint64_t memory_bytes_max)
{
    memset(env, 0, sizeof *env);
    kv_shape_init(&env->shape, 8, 8);
    assert_int_equal(kv_tree_init(t, env, memory_bytes_max, NULL), 0);
    while (t->leaves.bytes < KV_AHEAD_MIN + KV_SLAB_BYTES) {
        assert_int_equal(kv_pool_grow(&t->leaves, UINT64_MAX, NULL), 0);
    }
}

/* Goal: a large tree gets its next slab from the background, one at a time;
 * it is used first and counted as resident; without memory nothing happens. */
static void a_large_tree_gets_its_next_slab_ahead(struct unit *u)
{
    struct kv_tree_usage before, after;
    struct kv_env env;
    struct kv_tree t;
    void *ahead;

    (void)u;
    large_tree(&t, &env, 0);
    assert_true(kv_tree_wants_slab(&t));
    os_fail(OS_MMAP, 1, ENOMEM);
    kv_pool_prepare(&t.leaves);
    os_fail(OS_NONE, 0, 0);
    assert_null(t.leaves.ahead);
    assert_false(kv_tree_wants_slab(&t));
    kv_tree_usage(&t, &before);
    kv_pool_prepare(&t.leaves);
    ahead = t.leaves.ahead;
    assert_non_null(ahead);
    memset(ahead, 1, KV_SLAB_BYTES);     /* it is there */
    kv_pool_prepare(&t.leaves);
    assert_ptr_equal(t.leaves.ahead, ahead);
    kv_tree_usage(&t, &after);
    assert_true(after.resident_bytes == before.resident_bytes
                                        + KV_SLAB_BYTES);
    assert_int_equal(kv_pool_grow(&t.leaves, UINT64_MAX, NULL), 0);
    assert_null(t.leaves.ahead);
    assert_ptr_equal(t.leaves.open_last->memory, ahead);
    assert_true(kv_tree_wants_slab(&t));
    kv_tree_free(&t);
}

/* Goal: a tree with a bound of its memory has nothing beside it. */
static void a_bounded_tree_gets_no_slab_ahead(struct unit *u)
{
    struct kv_env env;
    struct kv_tree t;

    (void)u;
    large_tree(&t, &env, UINT64_C(1) << 30);
    assert_true(t.leaves.ahead_wanted);
    assert_false(kv_tree_wants_slab(&t));
    kv_tree_free(&t);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_system_call_that_fails_loses_nothing),
    UNIT_CASE(a_lock_or_thread_that_is_refused_fails_the_open),
    UNIT_CASE(a_store_works_without_the_page_that_tells_of_a_fork),
    UNIT_CASE(the_directory_above_is_found_from_any_path),
    UNIT_CASE(a_store_that_was_begun_is_made_once_calls_work),
    UNIT_CASE(no_call_asks_for_more_than_a_gibibyte),
    UNIT_CASE(a_listing_ends_with_what_its_caller_says),
    UNIT_CASE(every_processor_reads_what_another_wrote),
    UNIT_CASE(a_large_store_survives_that_pages_are_refused),
    UNIT_CASE(a_slab_is_aligned_wherever_its_pages_are),
    UNIT_CASE(a_large_log_survives_that_pages_are_refused),
    UNIT_CASE(a_reader_waits_while_all_slots_are_taken),
    UNIT_CASE(readers_do_without_the_barrier),
    UNIT_CASE(a_batch_beyond_what_a_frame_holds_is_refused),
    UNIT_CASE(verify_names_the_rule_that_memory_breaks),
    UNIT_CASE(a_log_that_does_not_follow_the_tables_is_healed),
    UNIT_CASE(a_merge_that_does_not_balance_is_discarded),
    UNIT_CASE(a_digest_damaged_in_memory_stops_the_flush),
    UNIT_CASE(a_large_tree_gets_its_next_slab_ahead),
    UNIT_CASE(a_bounded_tree_gets_no_slab_ahead),
};

UNIT_MAIN(cases)
