/*
 * The steps of a commit and of the background, one at a time, as they meet
 * when several threads are at work; what does not fit into memory or into a
 * manifest; and how full nodes are. Looks inside, where the public functions
 * would need luck.
 *
 * SPDX-License-Identifier: MIT
 */
#define KVMETA_STATIC
#include "unit.h"
#include "unit_files.h"

/* What others do while a call is at a point of this name. */
static const char *meanwhile_at;
static void (*meanwhile)(void);

static void sched_point(const char *name)
{
    void (*fn)(void) = meanwhile;

    if (!fn || strcmp(name, meanwhile_at) != 0) return;
    meanwhile = NULL;
    fn();
}

#define KV_SCHED_POINT(name) sched_point(name)

/* memset, which must not be given NULL, though most let it pass for no
 * bytes. */
static unsigned cleared_null;

static void *checked_memset(void *to, int byte, size_t bytes)
{
    if (!to) cleared_null++;
    return to ? (memset)(to, byte, bytes) : NULL;
}

#undef memset
#define memset(to, byte, bytes) checked_memset(to, byte, bytes)

/* The system's clock as if it was set back by an hour each time that somebody
 * looks at it: a wait that goes by it ends before it has begun. */
static int clock_set_back(clockid_t id, struct timespec *time)
{
    int rc = clock_gettime(id, time);

    if (id == CLOCK_REALTIME) time->tv_sec -= 3600;
    return rc;
}

#define clock_gettime(id, time) clock_set_back(id, time)

#include "../../kvmeta.c"
#undef memset

/* --------------------------------------------------------------------------
 * The background
 * -------------------------------------------------------------------------- */

/* Goal: the worker sleeps until the first thing is due, and for ever where
 * nothing is, or nothing may be done any more. */
static void the_worker_sleeps_until_the_first_thing_is_due(struct unit *u)
{
    const uint64_t ms = 1000000, at = 5000 * ms;
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db;

    options.sync_interval_ms = 250;
    db = unit_open(u, &options);
    assert_true(kv_worker_due_locked(db) == 0);
    db->unsynced = true;
    db->unsynced_since_ns = at;
    assert_true(kv_worker_due_locked(db) == at + 250 * ms);
    db->mark_dirty = true;
    db->dirty_since_ns = at;
    assert_true(kv_worker_due_locked(db) == at + 100 * ms);
    db->dirty_since_ns = at + 200 * ms;
    assert_true(kv_worker_due_locked(db) == at + 250 * ms);
    db->retry_ns = at + 30 * ms;
    assert_true(kv_worker_due_locked(db) == at + 30 * ms);
    db->retry_ns = at + 260 * ms;
    assert_true(kv_worker_due_locked(db) == at + 250 * ms);
    db->options.sync_interval_ms = 0;
    assert_true(kv_worker_due_locked(db) == at + 260 * ms);
    db->retry_ns = 1;                    /* it is time already */
    pthread_mutex_lock(&db->state_lock);
    kv_worker_sleep_locked(db);
    pthread_mutex_unlock(&db->state_lock);
    db->failed = KVMETA_E_IO;
    assert_true(kv_worker_due_locked(db) == 0);
    db->failed = KVMETA_OK;
    db->mark_dirty = db->unsynced = false;
    db->retry_ns = 0;
    unit_close(db);
}

static unsigned asked;

static bool over_when_asked_again(struct kvmeta *db, uint64_t unused)
{
    (void)db, (void)unused;
    return asked++ > 0;
}

/* Goal: how long the worker sleeps, and how long others wait for it, does not
 * depend on what the system's clock is set to. Method: nobody signals. */
static void a_clock_that_is_set_back_changes_no_wait(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    uint64_t begin = kv_now(db);

    asked = 0;
    db->has_thread = true;
    unit_ok(kv_wait(db, over_when_asked_again, 0));
    db->has_thread = false;
    assert_true(kv_now(db) - begin >= KV_WAIT_NS);
    begin = kv_now(db);
    db->retry_ns = begin + KV_WAIT_NS;
    pthread_mutex_lock(&db->state_lock);
    kv_worker_sleep_locked(db);
    pthread_mutex_unlock(&db->state_lock);
    assert_true(kv_now(db) - begin >= KV_WAIT_NS);
    unit_close(db);
}

/* A clock at which the worker is asked for a heal while it makes a plan that
 * has none, and told to stop when that is done, or when it goes to sleep
 * before: it asks for the time under the state lock then. */
static struct {
    kvmeta *db;                          /* NULL: just a clock */
    unsigned asked;
    bool slept;
} signal_early;

static uint64_t clock_with_signal(void *user)
{
    const struct kvmeta_vfs *posix = kvmeta_vfs_posix();
    kvmeta *db = signal_early.db;
    bool free = db && pthread_mutex_trylock(&db->state_lock) == 0;

    (void)user;
    if (free) pthread_mutex_unlock(&db->state_lock);
    if (db && !free) signal_early.slept = true;
    if (free && signal_early.asked++ == 0) {
        db->heal_wanted = true;
        kv_store_wake(db);
    }
    if (db && (signal_early.slept || db->counters.heals > 0))
        db->stopping = true;
    return posix->clock_ns(posix->user);
}

/* Goal: a signal that reaches the worker after it has looked for work, and
 * before it sleeps, is not lost. Method: the worker's function in this thread;
 * a time to try again that is over, so that it would not sleep for ever. And
 * kvmeta_verify, which asks for heals, leaves such a signal. */
static void a_signal_before_the_worker_sleeps_is_not_lost(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    char name[64];
    kvmeta *db;

    faults->vfs.clock_ns = clock_with_signal;
    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 0, KVMETA_DURABLE);
    unit_ok(kvmeta_flush(db));
    db->mark_dirty = false;
    db->woken = false;
    db->retry_ns = 1;
    memset(&signal_early, 0, sizeof signal_early);
    signal_early.db = db;
    kv_worker_main(db);
    signal_early.db = NULL;
    assert_false(signal_early.slept);
    assert_int_equal(unit_stats(db).heals, 1);
    assert_false(db->woken);

    assert_true(unit_find(u, ".tab", 0, name));
    unit_flip(u, name, unit_size(u, name) / 2);
    unit_is(kvmeta_verify(db, NULL), KVMETA_E_CORRUPT);
    assert_true(db->woken);
    unit_flip(u, name, unit_size(u, name) / 2);
    unit_close(db);
}

/* Over when asked for the third time; until then there was an error that has
 * been overcome, then one that a heal will overcome. */
static bool over_after_errors(struct kvmeta *db, uint64_t unused)
{
    (void)unused;
    db->counters.background_errors++;
    db->heal_wanted = ++asked == 2;
    db->background_error.code = asked == 2 ? KVMETA_E_CORRUPT : KVMETA_OK;
    return asked == 3;
}

/* Goal: who waits for the thread hears of errors that stay, not of those that
 * have been, or will be, overcome. Method: no thread; the wait wakes up by
 * itself. */
static void an_error_that_is_overcome_ends_no_wait(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    db->has_thread = true;
    asked = 0;
    unit_ok(kv_wait(db, over_after_errors, 0));
    assert_int_equal(asked, 3);
    db->has_thread = false;
    unit_close(db);
}

/* Goal: a wait without a thread that finds nothing to do is over if another
 * thread of the host has done it meanwhile. */
static void what_another_thread_has_done_ends_a_wait(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    asked = 0;
    unit_ok(kv_wait(db, over_when_asked_again, 0));
    assert_int_equal(asked, 2);
    unit_close(db);
}

static bool never_over(struct kvmeta *db, uint64_t unused)
{
    (void)db, (void)unused;
    return false;
}

/* Goal: without a thread a wait for what no step brings about ends, when there
 * are no more steps to do. */
static void what_no_step_brings_about_is_not_waited_for(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    unit_fill(db, 0, 10, 0, KVMETA_WRITTEN);
    unit_ok(kv_rotate(db, true, &u->err));
    unit_is(kv_wait(db, never_over, 0), KVMETA_E_FAILED);
    assert_int_equal(unit_stats(db).flushes, 1);
    unit_close(db);
}

/* Goal: what was wanted is over once it is done, though writers have left
 * more of the same meanwhile: a log, or a table. */
static void a_wait_is_over_though_there_is_more_to_do(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    for (uint64_t i = 0; i < 2; i++) {
        uint64_t id;

        unit_fill(db, i, i + 1, 0, KVMETA_WRITTEN);
        id = db->manifest.logs[0].id;
        assert_false(kv_flushed(db, id));
        assert_true(kv_flushed(db, id - 1));
        unit_ok(kvmeta_flush(db));
        assert_true(kv_flushed(db, id));
    }
    db->full_wanted = true;
    assert_false(kv_compacted(db, 0));
    db->full_wanted = false;
    assert_true(kv_compacted(db, 0));
    unit_close(db);
}

/* Goal: a sync of the log is nothing where the log was sealed since it was
 * planned. */
static void a_log_sync_without_a_log_does_nothing(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    struct kvmeta_error err = {0};
    uint_fast64_t syncs;
    kvmeta *db;

    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 0, KVMETA_WRITTEN);
    syncs = atomic_load(&faults->syncs);
    unit_ok(kv_job_log_sync(db, &err));
    assert_true(atomic_load(&faults->syncs) == syncs + 1);
    unit_ok(kvmeta_flush(db));
    syncs = atomic_load(&faults->syncs);
    unit_ok(kv_job_log_sync(db, &err));
    assert_true(atomic_load(&faults->syncs) == syncs);
    unit_close(db);
}

/* Calls that let writers rotate the log before they are done. */
static struct {
    struct unit_faults *faults;
    kvmeta *db;                          /* NULL: let nobody write */
    uint64_t count;
} slow;

static void write_meanwhile(void)
{
    kvmeta *db = slow.db;

    slow.db = NULL;
    if (!db) return;
    unit_fill(db, slow.count, slow.count + 1000, 0, KVMETA_WRITTEN);
    slow.count += 1000;
}

static int slow_sync(void *user, int file)
{
    write_meanwhile();
    return unit_fault_sync(user, file);
}

static int slow_create(void *user, int dir, const char *name, int flags,
                       int *file)
{
    if (flags & KVMETA_VFS_CREATE) write_meanwhile();
    return unit_fault_open(user, dir, name, flags, file);
}

static kvmeta *open_slow(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);

    slow.faults = unit_faults_init(u);
    slow.faults->vfs.file_sync = slow_sync;
    slow.faults->vfs.file_open = slow_create;
    slow.db = NULL;
    slow.count = 0;
    options.vfs = &slow.faults->vfs;
    options.log_bytes_max = 65536;
    options.durability = KVMETA_WRITTEN;
    return unit_open(u, &options);
}

static void check_slow(struct unit *u, kvmeta *db)
{
    assert_null(slow.db);
    assert_true(unit_stats(db).rotations > 0);
    unit_holds(db, 0, slow.count, 0);
    unit_close(db);
    db = open_slow(u);
    assert_int_equal(kvmeta_count(db), 1000);
    unit_close(db);
}

/* Goal: a log may be sealed while it is synced ahead: its file stays open for
 * as long, and no longer. */
static void a_log_may_be_sealed_while_it_is_synced(struct unit *u)
{
    struct kvmeta_error err = {0};
    kvmeta *db = open_slow(u);

    unit_fill(db, 0, 1, 0, KVMETA_WRITTEN);
    slow.db = db;
    unit_ok(kv_job_log_sync(db, &err));
    assert_false(db->log_retired.open);
    check_slow(u, db);
}

/* Goal: a log that is made ahead while writers begin one themselves is not
 * used any more, because it is older by its id. */
static void a_log_that_is_made_too_late_is_removed(struct unit *u)
{
    struct kvmeta_error err = {0};
    kvmeta *db = open_slow(u);
    size_t logs;

    unit_fill(db, 0, 1, 0, KVMETA_WRITTEN);
    slow.db = db;
    unit_ok(kv_job_prepare(db, &err));
    assert_false(db->prepared.file.open);
    logs = db->manifest.logs_count;
    assert_int_equal(unit_files(u, ".wal"), logs);
    check_slow(u, db);
}

static uint64_t set_clock_ns;

static uint64_t set_clock(void *user)
{
    (void)user;
    return set_clock_ns;
}

/* Goal: what fails between the blocks of a long step is tried again after a
 * while, not with each block; what else is due is done meanwhile. Method: the
 * next log cannot be made; the clock is set by hand. */
static void what_fails_between_blocks_is_tried_after_a_while(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    uint_fast64_t syncs;
    kvmeta *db;

    set_clock_ns = UINT64_C(5000000000);
    faults->vfs.clock_ns = set_clock;
    faults->create_suffix = ".wal";
    options.vfs = &faults->vfs;
    options.log_bytes_max = 65536;
    db = unit_open(u, &options);
    unit_fill(db, 0, 500, 0, KVMETA_WRITTEN);
    db->mark_dirty = false;
    atomic_store(&faults->create_errno, EMFILE);
    u->log_bytes = 0;
    for (unsigned i = 0; i < 100; i++) kv_step_between(db);
    assert_int_equal(unit_stats(db).background_errors, 1);
    assert_null(strchr(strchr(u->log, '\n') + 1, '\n'));

    db->mark_dirty = true;
    db->dirty_since_ns = set_clock_ns - KV_MARK_SYNC_NS;
    syncs = atomic_load(&faults->syncs);
    for (unsigned i = 0; i < 100; i++) kv_step_between(db);
    assert_true(atomic_load(&faults->syncs) == syncs + 1);
    assert_false(db->mark_dirty);
    assert_int_equal(unit_stats(db).background_errors, 1);

    for (unsigned more = 2; more < 4; more++) {
        set_clock_ns += KV_RETRY_NS - 1;
        kv_step_between(db);
        assert_int_equal(unit_stats(db).background_errors, more - 1);
        set_clock_ns++;
        for (unsigned i = 0; i < 100; i++) kv_step_between(db);
        assert_int_equal(unit_stats(db).background_errors, more);
    }
    atomic_store(&faults->create_errno, 0);
    set_clock_ns += KV_RETRY_NS;
    kv_step_between(db);
    assert_true(db->prepared.file.open);
    unit_close(db);
}

/* Goal: what is due by the clock is done then, not before, a sync before a
 * mark; and at once when the clock has gone backwards. */
static void timed_work_waits_for_its_time(struct unit *u)
{
    const uint64_t ms = 1000000, at = 5000 * ms;
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    kvmeta *db;

    faults->vfs.clock_ns = set_clock;
    options.vfs = &faults->vfs;
    options.sync_interval_ms = 250;
    set_clock_ns = at;
    db = unit_open(u, &options);
    db->mark_dirty = false;
    db->unsynced = true;
    db->unsynced_since_ns = at;
    set_clock_ns = at + 250 * ms - 1;
    assert_int_equal(kv_plan_timed(db), KV_STEP_NONE);
    set_clock_ns++;
    assert_int_equal(kv_plan_timed(db), KV_STEP_SYNC);
    db->mark_dirty = true;
    db->dirty_since_ns = at;
    assert_int_equal(kv_plan_timed(db), KV_STEP_SYNC);
    db->options.sync_interval_ms = 0;
    set_clock_ns = at + 100 * ms - 1;
    assert_int_equal(kv_plan_timed(db), KV_STEP_NONE);
    set_clock_ns++;
    assert_int_equal(kv_plan_timed(db), KV_STEP_MARK);
    set_clock_ns = at - 1;
    assert_int_equal(kv_plan_timed(db), KV_STEP_MARK);
    db->mark_dirty = db->unsynced = false;
    unit_close(db);
}

/* Goal: a step that is braked stops soon when it is told to. */
static void a_braked_step_stops_when_it_is_told_to(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    uint64_t begin = unit_now_ms();
    struct kv_job job;

    kv_job_init(db, &job);
    assert_int_equal(kv_job_sleep(&job, 3 * KV_PACE_SLICE_NS), KVMETA_OK);
    assert_true(unit_now_ms() - begin >= 150);
    db->stopping = true;
    begin = unit_now_ms();
    assert_int_equal(kv_job_sleep(&job, UINT64_C(3600) * 1000000000),
                     KV_STOPPED);
    assert_true(unit_now_ms() - begin < 60000);
    assert_int_equal(kv_job_pace(&job, 1), KV_STOPPED);
    unit_close(db);
}

/* Goal: a heal does nothing where writing has stopped since it was planned. */
static void a_heal_of_a_store_that_has_failed_does_nothing(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    struct kvmeta_error err = {0};
    unsigned char key[8] = {1};
    kvmeta *db;

    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 0, KVMETA_WRITTEN);
    unit_ok(kvmeta_flush(db));
    unit_fill(db, 10, 20, 0, KVMETA_WRITTEN);
    atomic_store(&faults->sync_errno, EIO);
    unit_is(kvmeta_put(db, key, key, KVMETA_DURABLE), KVMETA_E_IO);
    atomic_store(&faults->sync_errno, 0);
    unit_is(kv_job_heal(db, &err), KVMETA_E_FAILED);
    assert_int_equal(unit_files(u, ".tab"), 1);
    assert_int_equal(unit_stats(db).heals, 0);
    unit_is(kvmeta_close(db), KVMETA_E_FAILED);
}

/* --------------------------------------------------------------------------
 * What the host is told, and under which locks
 * -------------------------------------------------------------------------- */

static struct {
    kvmeta *db;                          /* NULL: do not look */
    unsigned messages;
    unsigned held;
} locks;

static void look_at_locks(void *user, int level, const char *message)
{
    kvmeta *db = locks.db;

    unit_log(user, level, message);
    if (!db) return;
    pthread_mutex_t *short_ones[] = {
        &db->mark_lock, &db->state_lock, &db->queue_lock,
        &db->tree.delta_lock, &db->tree.lock
    };
    locks.messages++;
    for (size_t i = 0; i < sizeof short_ones / sizeof *short_ones; i++) {
        if (pthread_mutex_trylock(short_ones[i]) == 0)
            pthread_mutex_unlock(short_ones[i]);
        else
            locks.held++;
    }
}

static int refuse_rename(void *user, int dir, const char *from, const char *to)
{
    (void)user, (void)dir, (void)from, (void)to;
    return EIO;
}

static int refuse_unlink(void *user, int dir, const char *name)
{
    (void)user, (void)dir;
    return strstr(name, ".wal") ? EIO : 0;
}

/* Makes the store say something, by the call of the vfs that fails. */
static void provoke(struct unit *u, kvmeta *db, unsigned how)
{
    struct unit_faults *faults = &u->faults;
    unsigned char key[8] = {1};
    char name[64];

    faults->vfs.unlink = how == 5 ? refuse_unlink : faults->vfs.unlink;
    switch (how) {
    case 0:
        atomic_store(&faults->sync_errno, EIO);
        unit_is(kvmeta_put(db, key, key, KVMETA_DURABLE), KVMETA_E_IO);
        break;
    case 1:
        atomic_store(&faults->write_errno, EIO);
        while (kvmeta_put(db, key, key, KVMETA_BUFFERED) == KVMETA_OK) key[0]++;
        break;
    case 2:
        faults->vfs.rename = refuse_rename;
        unit_is(kvmeta_flush(db), KVMETA_E_IO);
        break;
    case 3:
        atomic_store(&faults->create_errno, EMFILE);
        unit_is(kvmeta_flush(db), KVMETA_E_LIMIT);
        break;
    case 4:
        assert_true(unit_find(u, ".tab", 0, name));
        unit_flip(u, name, unit_size(u, name) / 2);
        unit_is(kvmeta_verify(db, NULL), KVMETA_E_CORRUPT);
        unit_ok(kvmeta_wait_idle(db));
        assert_int_equal(unit_stats(db).heals, 1);
        break;
    default:
        unit_ok(kvmeta_flush(db));
    }
}

/* Goal: the host is told of what happens while none of the locks is held that
 * readers may want, whatever fails. */
static void nothing_is_told_under_a_short_lock(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);

    options.log_fn = look_at_locks;
    for (unsigned how = 0; how <= 5; how++) {
        kvmeta *db;

        options.vfs = &unit_faults_init(u)->vfs;
        u->faults.create_suffix = ".tab";
        db = unit_open(u, &options);
        unit_fill(db, 0, 100, 0, KVMETA_DURABLE);
        unit_ok(kvmeta_flush(db));
        unit_fill(db, 0, 200, 7, KVMETA_DURABLE);
        memset(&locks, 0, sizeof locks);
        locks.db = db;
        provoke(u, db, how);
        locks.db = NULL;
        assert_true(locks.messages > 0);
        assert_int_equal(locks.held, 0);
        (void)kvmeta_close(db);
        unit_remove_tree(u->dir);
    }
}

/* --------------------------------------------------------------------------
 * Logs that wait
 * -------------------------------------------------------------------------- */

/* Goal: a writer that is past the check for a backlog lets the log grow and
 * begins no other; a manifest that is full of logs refuses one more, and
 * nothing has changed: the log goes on, and once the others are flushed there
 * is room. */
static void logs_that_wait_have_a_limit(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_error err = {0};
    kvmeta *db;
    uint64_t i;
    int rc = KVMETA_OK;

    options.vfs = unit_unsynced(u);
    db = unit_open(u, &options);
    for (i = 0; rc == KVMETA_OK; i++) {
        size_t logs = db->manifest.logs_count;

        unit_fill(db, i, i + 1, 0, KVMETA_WRITTEN);
        if (logs > KV_LOGS_WAITING_MAX) {
            unit_ok(kv_commit_open_log(db, 1 << 30, &err));
            assert_int_equal(db->manifest.logs_count, logs);
            assert_true(db->backlogged);
            db->backlogged = false;
        }
        rc = kv_rotate(db, true, &err);
    }
    unit_is(rc, KVMETA_E_LIMIT);
    assert_int_equal(db->manifest.logs_count, KV_MANIFEST_LOGS_MAX);
    assert_int_equal(db->failed, KVMETA_OK);
    assert_int_equal(unit_files(u, ".wal"), KV_MANIFEST_LOGS_MAX);
    unit_fill(db, i, i + 1, 0, KVMETA_WRITTEN);
    unit_ok(kvmeta_compact(db));
    unit_fill(db, i + 1, i + 2, 0, KVMETA_WRITTEN);
    unit_holds(db, 0, i + 2, 0);
    unit_close(db);
    db = unit_open(u, &options);
    unit_holds(db, 0, i + 2, 0);
    unit_close(db);
}

/* A store with as many tables as a manifest can list, of a record each, which
 * merges none. */
static kvmeta *open_with_all_tables(struct unit *u,
                                    const struct kvmeta_options *options)
{
    kvmeta *db = unit_open(u, options);

    db->compaction_stopped = true;
    for (uint64_t i = 0; i < KV_TABLES_MAX; i++) {
        unit_fill(db, i, i + 1, 0, KVMETA_BUFFERED);
        unit_ok(kvmeta_flush(db));
    }
    return db;
}

/* Goal: where compaction has stopped, flushes go on until a manifest can hold
 * no more tables; then they fail, and the logs stay. Writers are refused when
 * as many logs wait as may, instead of waiting for ever; and nobody else waits
 * for a thread that has nothing to do. */
static void tables_have_a_limit(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    rlim_t files = unit_raise_limit(RLIMIT_NOFILE);    /* each is open */
    unsigned char key[8];
    kvmeta *db;
    uint64_t i;

    options.vfs = unit_unsynced(u);
    db = open_with_all_tables(u, &options);
    i = KV_TABLES_MAX;
    assert_int_equal(unit_stats(db).tables, KV_TABLES_MAX);
    unit_fill(db, i, i + 1, 0, KVMETA_BUFFERED);
    unit_is(kvmeta_flush(db), KVMETA_E_FAILED);
    assert_int_equal(unit_stats(db).logs_waiting, 1);
    while (!db->backlogged) {
        unit_fill(db, i + 1, i + 2, 0, KVMETA_WRITTEN);
        unit_is(kvmeta_flush(db), KVMETA_E_FAILED);
        i++;
    }
    unit_key(8, i + 1, key);
    unit_is(kvmeta_put(db, key, key, KVMETA_WRITTEN), KVMETA_E_LIMIT);
    assert_true(db->backlogged);
    db->has_thread = true;               /* one that finds nothing to do */
    unit_is(kvmeta_flush(db), KVMETA_E_FAILED);
    unit_is(kvmeta_compact(db), KVMETA_E_FAILED);
    unit_ok(kvmeta_wait_idle(db));
    assert_false(kv_wait_in_vain(db, kv_idle));
    db->has_thread = false;
    db->compaction_stopped = false;
    unit_ok(kvmeta_compact(db));
    assert_int_equal(unit_stats(db).tables, 1);
    unit_holds(db, 0, i + 1, 0);
    unit_close(db);
    unit_restore_limit(RLIMIT_NOFILE, files);
}

/* Goal: a writer that waits for the background when writing stops gets the
 * error of a store that has failed, not one that passes. */
static void who_waits_when_writing_stops_hears_of_it(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8] = {1};
    kvmeta *db;

    options.vfs = &unit_faults_init(u)->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 0, KVMETA_WRITTEN);
    atomic_store(&u->faults.sync_errno, EIO);
    unit_is(kvmeta_put(db, key, key, KVMETA_DURABLE), KVMETA_E_IO);
    atomic_store(&u->faults.sync_errno, 0);
    db->backlogged = true;
    unit_is(kvmeta_put(db, key, key, KVMETA_WRITTEN), KVMETA_E_FAILED);
    assert_int_equal(unit_stats(db).stalls, 1);
    unit_is(kvmeta_close(db), KVMETA_E_FAILED);
}

/* Goal: where compaction has stopped a call for it fails at once, with a
 * thread, too, that would never do it or fail to; unless damage is to be
 * healed, which does it. */
static void a_compaction_that_has_stopped_is_not_waited_for(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);

    for (unsigned thread = 0; thread < 2; thread++) {
        kvmeta *db;

        options.flags = thread ? 0 : KVMETA_NO_THREAD;
        db = unit_open(u, &options);
        for (uint64_t i = 0; i < 2; i++) {
            unit_fill(db, i, i + 1, 0, KVMETA_WRITTEN);
            unit_ok(kvmeta_flush(db));
        }
        db->compaction_stopped = true;
        unit_is(kvmeta_compact(db), KVMETA_E_FAILED);
        assert_int_equal(unit_stats(db).tables, 2);
        unit_ok(kvmeta_wait_idle(db));
        pthread_mutex_lock(&db->state_lock);
        db->heal_wanted = true;
        pthread_mutex_unlock(&db->state_lock);
        unit_ok(kvmeta_compact(db));
        assert_int_equal(unit_stats(db).tables, 1);
        assert_int_equal(unit_stats(db).heals, 1);
        unit_holds(db, 0, 2, 0);
        unit_close(db);
        unit_remove_tree(u->dir);
    }
}

/* Ends as a kill does: what was written is there, and nothing is sealed. */
static void die(kvmeta *db)
{
    kv_store_free(db);
}

/* Goal: lives that end in a kill leave a table each, and after as many as a
 * manifest can list the next open merges all of them with its logs. Where that
 * fails the directory is as it was, and a later open does it. Method: the
 * tables of one life that merges none; faults at each kind of call that the
 * new table needs. */
static void an_open_with_as_many_tables_as_there_may_be_merges(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    rlim_t files = unit_raise_limit(RLIMIT_NOFILE);
    kvmeta *db;
    uint64_t i;

    options.vfs = unit_unsynced(u);
    db = open_with_all_tables(u, &options);
    i = KV_TABLES_MAX;
    unit_ok(kv_rotate(db, true, &u->err));
    unit_fill(db, i, i + 1, 0, KVMETA_WRITTEN);
    unit_ok(kv_rotate(db, true, &u->err));
    unit_fill(db, 0, 1, 7, KVMETA_WRITTEN);
    die(db);

    u->faults.vfs.file_sync = unit_fault_sync;
    u->faults.create_suffix = ".tab";
    atomic_store(&u->faults.create_errno, EMFILE);
    unit_open_fails(u, &options, KVMETA_E_LIMIT);
    atomic_store(&u->faults.create_errno, 0);
    atomic_store(&u->faults.write_errno, ENOSPC);
    unit_open_fails(u, &options, KVMETA_E_NOSPACE);
    atomic_store(&u->faults.write_errno, 0);
    atomic_store(&u->faults.sync_errno, EIO);
    unit_open_fails(u, &options, KVMETA_E_IO);
    atomic_store(&u->faults.sync_errno, 0);

    for (unsigned life = 0; life < 2; life++) {
        db = unit_open(u, &options);
        assert_int_equal(db->found.open_tables, life ? 1 : KV_TABLES_MAX);
        assert_int_equal(unit_stats(db).tables, 1);
        assert_int_equal(kvmeta_count(db), KV_TABLES_MAX + 1);
        unit_holds(db, 0, 1, 7);
        unit_holds(db, 1, KV_TABLES_MAX + 1, 0);
        unit_ok(kvmeta_verify(db, NULL));
        unit_close(db);
    }
    assert_int_equal(unit_files(u, ".tab"), 1);
    unit_restore_limit(RLIMIT_NOFILE, files);
}

/* --------------------------------------------------------------------------
 * Groups
 * -------------------------------------------------------------------------- */

enum { WRITERS = 2, WRITER_OPS = 100000, SHARERS = 4 };

static struct group {
    kvmeta *db;
    atomic_size_t armed;
    int hold_ms;
    unsigned char keys[WRITERS][WRITER_OPS][8];
    struct kvmeta_op ops[WRITERS][WRITER_OPS];
} group;

static void wait_for_queue(size_t count)
{
    for (int ms = 0; ms < 20000
         && atomic_load(&group.db->queue_count) < count; ms++)
        unit_sleep_ms(1);
}

/* Once armed, the next sync takes until so many are in the queue, and
 * `hold_ms` longer. */
static int sync_until_all_wait(void *user, int file)
{
    size_t count = atomic_exchange(&group.armed, 0);

    if (count) {
        wait_for_queue(count);
        unit_sleep_ms(group.hold_ms);
    }
    return unit_fault_sync(user, file);
}

static void *write_large(void *arg)
{
    struct kvmeta_op *ops = arg;
    int rc;

    while (atomic_load(&group.armed)) unit_sleep_ms(1);
    rc = kvmeta_write(group.db, ops, WRITER_OPS, KVMETA_DURABLE, NULL);
    return (void *)(intptr_t)rc;
}

/* Goal: batches that wait for one sync share the next, but not beyond what a
 * frame may hold. Method: two of 2.4 MB wait for the sync of a small one. */
static void a_group_ends_before_it_is_too_large(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    pthread_t threads[WRITERS];

    assert_true(WRITERS * WRITER_OPS * 24 > KV_GROUP_BYTES_MAX);
    faults->vfs.file_sync = sync_until_all_wait;
    options.vfs = &faults->vfs;
    group.db = unit_open(u, &options);
    unit_fill(group.db, 0, 1, 0, 0);
    atomic_store(&group.armed, WRITERS);
    for (uint64_t i = 0; i < WRITERS; i++) {
        for (uint64_t k = 0; k < WRITER_OPS; k++) {
            unit_key(8, 10 + i * WRITER_OPS + k, group.keys[i][k]);
            group.ops[i][k] = (struct kvmeta_op){
                KVMETA_OP_PUT, group.keys[i][k], group.keys[i][k]};
        }
        assert_int_equal(pthread_create(&threads[i], NULL, write_large,
                                        group.ops[i]), 0);
    }
    unit_fill(group.db, 1, 2, 0, 0);
    for (size_t i = 0; i < WRITERS; i++) {
        void *rc;

        pthread_join(threads[i], &rc);
        assert_null(rc);
    }
    assert_int_equal(kvmeta_count(group.db), 2 + WRITERS * WRITER_OPS);
    assert_int_equal(unit_stats(group.db).group_commits_max, 1);
    assert_true(unit_stats(group.db).leader_handovers >= WRITERS);
    unit_close(group.db);
}

static void *write_small(void *arg)
{
    while (atomic_load(&group.armed)) unit_sleep_ms(1);
    return (void *)(intptr_t)kvmeta_put(group.db, arg, arg, KVMETA_DURABLE);
}

static void *flush_behind_them(void *arg)
{
    (void)arg;
    wait_for_queue(SHARERS);
    return (void *)(intptr_t)kvmeta_flush(group.db);
}

/* Goal: batches that wait for one sync share the next, but none that comes
 * after one who wants the log for itself; whoever writes after them waits for
 * the others only a moment. Twice, for groups take turns in where they wait. */
static void batches_that_wait_share_a_sync(struct unit *u)
{
    static unsigned char keys[SHARERS][8];
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    pthread_t threads[SHARERS + 1];

    faults->vfs.file_sync = sync_until_all_wait;
    options.vfs = &faults->vfs;
    group.db = unit_open(u, &options);
    for (uint64_t round = 1; round <= 2; round++) {
        struct kvmeta_stats before, after;

        unit_fill(group.db, 0, 1, round, 0);
        before = unit_stats(group.db);
        atomic_store(&group.armed, SHARERS + 1);
        for (uint64_t i = 0; i < SHARERS; i++) {
            unit_key(8, 100 * round + i, keys[i]);
            assert_int_equal(pthread_create(&threads[i], NULL, write_small,
                                            keys[i]), 0);
        }
        assert_int_equal(pthread_create(&threads[SHARERS], NULL,
                                        flush_behind_them, NULL), 0);
        unit_fill(group.db, 1, 2, round, 0);
        for (size_t i = 0; i <= SHARERS; i++) {
            void *rc;

            pthread_join(threads[i], &rc);
            assert_null(rc);
        }
        after = unit_stats(group.db);
        assert_true(after.groups == before.groups + 2);
        assert_true(after.syncs == before.syncs + 2);
        assert_int_equal(after.group_commits_max, SHARERS);
        assert_int_equal(after.flushes, round);
        unit_fill(group.db, 2, 4, round, 0);
    }
    assert_int_equal(kvmeta_count(group.db), 4 + 2 * SHARERS);
    unit_close(group.db);
}

static double processor_seconds(void)
{
    struct timespec used;

    assert_int_equal(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used), 0);
    return (double)used.tv_sec + (double)used.tv_nsec / 1e9;
}

/* Goal: who waits for a fast sync may stay awake, but nobody works through a
 * slow one. Method: four writers wait for half a second; awake they would use
 * as much of each processor. */
static void writers_sleep_through_a_slow_sync(struct unit *u)
{
    static unsigned char keys[SHARERS][8];
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    pthread_t threads[SHARERS];
    double before;

    faults->vfs.file_sync = sync_until_all_wait;
    options.vfs = &faults->vfs;
    group.db = unit_open(u, &options);
    unit_fill(group.db, 0, 1, 0, 0);
    group.hold_ms = 500;
    atomic_store(&group.armed, SHARERS);
    for (uint64_t i = 0; i < SHARERS; i++) {
        unit_key(8, 100 + i, keys[i]);
        assert_int_equal(pthread_create(&threads[i], NULL, write_small,
                                        keys[i]), 0);
    }
    before = processor_seconds();
    unit_fill(group.db, 1, 2, 0, 0);
    for (size_t i = 0; i < SHARERS; i++) {
        void *rc;

        pthread_join(threads[i], &rc);
        assert_null(rc);
    }
    assert_true(processor_seconds() - before < 0.25);
    group.hold_ms = 0;
    unit_close(group.db);
}

/* Goal: a watch in vain is followed by naps, and the naps by a watch, even if
 * several that counted them down have passed 0. */
static void naps_end(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kv_request r = {.durability = KVMETA_DURABLE};

    for (int naps = 0; naps >= -2; naps--) {
        db->naps = naps;
        kv_right_watch(db, &r);
        assert_int_equal(db->naps, KV_NAPS);
        kv_right_watch(db, &r);
        assert_int_equal(db->naps, KV_NAPS - 1);
    }
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Memory
 * -------------------------------------------------------------------------- */

/* Goal: what no memory could hold is refused before it is multiplied. */
static void sizes_beyond_all_memory_are_refused(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_error err = {0};
    struct kv_table table = {.meta.bytes = UINT64_MAX};
    kvmeta *db = unit_open(u, &options);
    void *array = NULL;
    size_t cap = 0;

    unit_is(kv_grow(&db->env, &array, &cap, SIZE_MAX, 1, &err),
            KVMETA_E_NOMEM);
    unit_is(kv_grow(&db->env, &array, &cap, SIZE_MAX / 16, 64, &err),
            KVMETA_E_NOMEM);
    assert_null(array);
    assert_int_equal(cap, 0);
    unit_is(kv_pool_reserve_locked(&db->tree, &db->tree.leaves, UINT64_MAX,
                                   false, &err), KVMETA_E_NOMEM);
    unit_is(kv_table_read_index(&db->env, &table, &err), KVMETA_E_NOMEM);
    unit_fill(db, 0, 10, 0, 0);
    unit_close(db);
}

enum { MANY = 200000 };

/* A store without a thread, of MANY records. */
static kvmeta *open_many(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    unit_fill(db, 0, MANY, 0, KVMETA_BUFFERED);
    return db;
}

/* Replaces all nodes beside somebody who still sees them. */
static void replace_many(kvmeta *db)
{
    static unsigned char keys[MANY][8];
    static struct kvmeta_op ops[MANY];

    for (uint64_t i = 0; i < MANY; i++) {
        unit_key(8, i, keys[i]);
        ops[i] = (struct kvmeta_op){KVMETA_OP_PUT, keys[i], keys[i]};
    }
    unit_ok(kvmeta_write(db, ops, MANY, KVMETA_WRITTEN, NULL));
    assert_true(db->tree.dead_bytes
                > 2 * KV_RECLAIM_MAX * (size_t)db->tree.leaf.bytes);
}

/* Goal: the nodes that a slow reader has held up are freed by the writes that
 * follow, some by each, so that none of them takes long. */
static void what_a_reader_has_held_up_is_freed_in_parts(struct unit *u)
{
    kvmeta *db = open_many(u);
    struct kv_tree *t = &db->tree;
    size_t dead, part = 3 * KV_RECLAIM_MAX * (size_t)t->inner.bytes;
    unsigned slot, writes = 0;

    (void)kv_tree_pin(t, &slot);
    replace_many(db);
    kv_tree_unpin(t, slot);
    dead = t->dead_bytes;
    while (dead > 0) {
        unit_fill(db, writes, writes + 1, 0, KVMETA_WRITTEN);
        assert_true(dead - t->dead_bytes <= part);
        assert_true(t->dead_bytes < dead);
        dead = t->dead_bytes;
        writes++;
    }
    assert_true(writes > 1);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: what a snapshot has held goes with it; what a reader has held up, with
 * the store at the latest. */
static void what_was_held_goes_with_the_snapshot_or_the_store(struct unit *u)
{
    kvmeta *db = open_many(u);
    kvmeta_snapshot *snapshot = NULL;
    unsigned slot;

    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    replace_many(db);
    kvmeta_snapshot_release(snapshot);
    assert_int_equal(db->tree.dead_bytes, 0);
    (void)kv_tree_pin(&db->tree, &slot);
    replace_many(db);
    kv_tree_unpin(&db->tree, slot);
    unit_close(db);
}

/* Goal: ascending keys leave full nodes behind, on each level. Method: the
 * widest keys, whose nodes are small, in a tree of five levels; a node that
 * is split at its end keeps all children but one. */
static void ascending_keys_leave_full_nodes(struct unit *u)
{
    static unsigned char key[KVMETA_KEY_BYTES_MAX];
    struct kvmeta_options options = unit_options(u, sizeof key, 0);
    const struct kv_tree *t;
    size_t leaves, inners;
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    t = &db->tree;
    for (uint64_t i = 0; i < 40000; i++) {
        unit_key(sizeof key, i, key);
        unit_ok(kvmeta_put(db, key, NULL, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_sync(db));
    assert_int_equal(kv_tree_current(t)->height, 5);
    leaves = t->leaves.used_nodes;
    inners = t->inners.used_nodes;
    assert_true(leaves <= 40000 / (t->leaf.cap - 1) + 2);
    assert_true(inners <= leaves / (t->inner.cap - 2) + 5);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Memory for large groups
 * -------------------------------------------------------------------------- */

enum { TALL_KEY_BYTES = 255, TALL_PUTS = 2500 };

static struct {
    kvmeta *db;
    unsigned char keys[TALL_PUTS][TALL_KEY_BYTES];
    struct kvmeta_op ops[TALL_PUTS];
    struct kv_request requests[TALL_PUTS];
    uint32_t heights[TALL_PUTS];         /* of the tree before each put */
    unsigned applied;
    unsigned short_of;                   /* puts without enough nodes */
} tall;

/* A put of the group is about to be made. */
static void count_free_nodes(void)
{
    const struct kv_tree *t = &tall.db->tree;
    uint64_t leaves, inners;

    kv_tree_need(t, tall.heights[tall.applied], 1, &leaves, &inners);
    if (t->leaves.free_nodes < leaves || t->inners.free_nodes < inners)
        tall.short_of++;
    tall.applied++;
    meanwhile = count_free_nodes;
}

/* Goal: a group that makes a tree out of nothing has the nodes that each of
 * its puts may need, reckoned from what has been built so far. Method: the
 * widest keys, of which few make a high tree; the same puts, one by one, tell
 * how high. The last key comes first, for puts behind it would not look at all
 * levels, and might leave them to the next put. */
static void a_group_reserves_for_the_tree_that_it_builds(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, TALL_KEY_BYTES, 0);
    struct kv_request right = {.exclusive = true};

    options.flags = KVMETA_NO_THREAD;
    options.vfs = unit_unsynced(u);
    tall.db = unit_open(u, &options);
    for (size_t i = 0; i < TALL_PUTS; i++) {
        unit_key(TALL_KEY_BYTES, i > 0 ? i : TALL_PUTS, tall.keys[i]);
        tall.heights[i] = kv_tree_current(&tall.db->tree)->height;
        unit_ok(kvmeta_put(tall.db, tall.keys[i], NULL, KVMETA_WRITTEN));
        tall.ops[i] = (struct kvmeta_op){KVMETA_OP_PUT, tall.keys[i], NULL};
        tall.requests[i] = (struct kv_request){
            .ops = &tall.ops[i], .n = 1, .changes = 1, .puts = 1,
            .durability = KVMETA_WRITTEN,
            .next = i + 1 < TALL_PUTS ? &tall.requests[i + 1] : NULL};
    }
    assert_true(tall.heights[TALL_PUTS - 1] >= 4);
    unit_close(tall.db);
    unit_remove_tree(u->dir);
    tall.db = unit_open(u, &options);
    tall.applied = tall.short_of = 0;
    meanwhile_at = "apply";
    meanwhile = count_free_nodes;
    assert_true(kv_right_take(tall.db, &right));
    kv_commit_group(tall.db, tall.requests);
    kv_right_give(tall.db, NULL);
    meanwhile = NULL;
    for (size_t i = 0; i < TALL_PUTS; i++) unit_ok(tall.requests[i].rc);
    assert_int_equal(tall.applied, TALL_PUTS);
    assert_int_equal(tall.short_of, 0);
    unit_ok(kvmeta_verify(tall.db, NULL));
    unit_close(tall.db);
}

/* --------------------------------------------------------------------------
 * Reads beside puts
 * -------------------------------------------------------------------------- */

static kvmeta *many_db;

static void end_bias(void)
{
    kv_bias_end(&many_db->tree);
}

static void open_gate(void)
{
    atomic_store(&many_db->tree.gate, false);
}

/* The reader is in its slot: it gives it back, and tries again. */
static void close_gate(void)
{
    atomic_store(&many_db->tree.gate, true);
    meanwhile = open_gate;
}

static void read_one(kvmeta *db)
{
    unsigned char key[8], value[8], want[8];

    unit_key(8, 1, key);
    unit_value(8, 1, want);
    unit_ok(kvmeta_get(db, key, value));
    assert_memory_equal(value, want, 8);
}

static void read_alone(kvmeta *db)
{
    for (unsigned i = 0; i < 3 * KV_PINS_CALM; i++) read_one(db);
    assert_true(kv_bias_is_on(&db->tree));
}

/* Goal: the bias begins when a thread reads and nobody writes; it ends with
 * the next change of the tree. A reader whom the end of it, or a change,
 * overtakes between its slot and the version, tries again and finds what is
 * there. */
static void readers_alone_are_biased(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kv_tree *t = &db->tree;
    uint64_t in_place;

    many_db = db;
    meanwhile_at = "pin";
    unit_fill(db, 0, 3, 0, KVMETA_DURABLE);
    if (!t->barriers) skip();            /* under a tool that has none */
    for (unsigned way = 0; way < 2; way++) {
        read_alone(db);
        meanwhile = way ? close_gate : end_bias;
        read_one(db);
        assert_null(meanwhile);
        assert_true(kv_slots_oldest(t) == UINT64_MAX);
        assert_false(kv_bias_is_on(t));
    }
    read_alone(db);
    in_place = t->in_place;
    unit_fill(db, 3, 4 + KV_BATCH, 0, KVMETA_BUFFERED);
    assert_false(kv_bias_is_on(t));
    assert_true(t->in_place > in_place);
    unit_holds(db, 0, 4 + KV_BATCH, 0);
    unit_close(db);
}

/* One durable batch of puts of the keys from..from+99 in a store that nobody
 * reads, with the values of `salt`; or of removes. */
static void write_hundred(kvmeta *db, uint64_t from, uint64_t salt,
                          int type)
{
    unsigned char keys[100][8], values[100][8];
    struct kvmeta_op ops[100];
    uint64_t i;

    for (i = 0; i < 100; i++) {
        unit_key(8, from + i, keys[i]);
        unit_value(8, from + i + salt, values[i]);
        ops[i].type = type;
        ops[i].key = keys[i];
        ops[i].value = values[i];
    }
    unit_ok(kvmeta_write(db, ops, 100, KVMETA_DURABLE, NULL));
}

/* Goal: a small durable batch alone needs no private version if nobody reads,
 * and leaves nothing reserved, whether it changes something or not. With a key
 * that comes twice it needs one, and the last value wins. */
static void a_small_durable_batch_is_made_in_place(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kv_tree *t = &db->tree;
    unsigned char keys[2][8], value[8];
    struct kvmeta_op twice[3];
    uint64_t copied, in_place, seq = 0;

    unit_fill(db, 0, 300, 0, KVMETA_DURABLE);
    copied = t->copied;
    in_place = t->in_place;
    write_hundred(db, 100, 1000, KVMETA_OP_PUT);
    write_hundred(db, 1000, 0, KVMETA_OP_REMOVE);
    write_hundred(db, 200, 0, KVMETA_OP_REMOVE);
    assert_true(t->copied == copied);
    assert_true(t->in_place == in_place + 2);
    assert_true(t->leaves.reserved == 0);
    assert_true(t->inners.reserved == 0);
    unit_holds(db, 0, 100, 0);
    unit_holds(db, 100, 200, 1000);
    assert_int_equal(kvmeta_count(db), 200);

    unit_key(8, 5, keys[0]);
    unit_key(8, 6, keys[1]);
    for (int i = 0; i < 3; i++) {
        twice[i].type = KVMETA_OP_PUT;
        twice[i].key = keys[i % 2];
        twice[i].value = keys[i % 2];
    }
    twice[2].value = keys[1];            /* of the first key, again */
    unit_ok(kvmeta_write(db, twice, 3, KVMETA_DURABLE, &seq));
    assert_true(t->copied == copied + 1);
    unit_ok(kvmeta_get(db, keys[0], value));
    assert_memory_equal(value, keys[1], 8);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* After the first key has been looked up, and before the second. */
static void put_two_more(void)
{
    unit_fill(many_db, 1, 3, 1000, KVMETA_BUFFERED);
}

static void arm_put_two_more(void)
{
    meanwhile = put_two_more;
}

/* Goal: all keys of a get_many are looked up in one state, though buffered
 * puts arrive meanwhile: of two of them the later is not seen without the
 * earlier. Method: one put waits in the delta, so that there is one to look
 * in; the two come when the first key has been looked up, and is about to be
 * followed by the others. */
static void a_get_many_sees_one_state_beside_buffered_puts(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char keys[3][8], values[3][8], want[8], found[3];
    kvmeta *db = unit_open(u, &options);

    unit_fill(db, 0, 3, 0, KVMETA_DURABLE);
    unit_fill(db, 0, 1, 1000, KVMETA_BUFFERED);
    assert_int_equal(kv_delta_count(kv_tree_current(&db->tree)), 1);
    for (uint64_t i = 0; i < 3; i++) unit_key(8, 1 + i % 2, keys[i]);
    many_db = db;
    meanwhile_at = "delta";
    meanwhile = arm_put_two_more;        /* not at the first, at the second */
    unit_ok(kvmeta_get_many(db, keys, 3, values, found));
    assert_null(meanwhile);
    for (uint64_t i = 0; i < 3; i++) {
        unit_value(8, 1 + i % 2, want);
        assert_int_equal(found[i], 1);
        assert_memory_equal(values[i], want, 8);
    }
    unit_ok(kvmeta_get_many(db, keys, 3, values, found));
    for (uint64_t i = 0; i < 3; i++) {
        unit_value(8, 1 + i % 2 + 1000, want);
        assert_memory_equal(values[i], want, 8);
    }
    unit_close(db);
}

/* Goal: no keys are asked for with NULL, also where there are no records. */
static void a_get_many_of_nothing_in_nothing_touches_nothing(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    kvmeta_snapshot *snapshot = NULL;

    cleared_null = 0;
    unit_ok(kvmeta_get_many(db, NULL, 0, NULL, NULL));
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_ok(kvmeta_snapshot_get_many(snapshot, NULL, 0, NULL, NULL));
    kvmeta_snapshot_release(snapshot);
    assert_int_equal(cleared_null, 0);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Forks beside other threads
 * -------------------------------------------------------------------------- */

/* What another thread of the parent is at when the fork comes. */
enum busy { BUSY_RIGHT, BUSY_JOB, BUSY_STATE, BUSY_DELTA, BUSY_TREE, BUSY_BIAS,
            BUSY_SNAPSHOT, BUSY_NOT };

struct parent {
    struct unit *u;
    kvmeta *db;
    enum busy busy;
    struct kv_request right;
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;
    kvmeta_batch *batch;
};

static pthread_mutex_t *busy_lock(struct parent *p)
{
    return p->busy == BUSY_JOB     ? &p->db->job_lock
           : p->busy == BUSY_STATE ? &p->db->state_lock
           : p->busy == BUSY_DELTA ? &p->db->tree.delta_lock
           : p->busy == BUSY_TREE  ? &p->db->tree.lock
           : p->busy == BUSY_BIAS  ? &p->db->tree.bias_lock : NULL;
}

static void busy_begin(struct parent *p)
{
    if (busy_lock(p)) pthread_mutex_lock(busy_lock(p));
    p->right.exclusive = true;
    if (p->busy == BUSY_RIGHT) assert_true(kv_right_take(p->db, &p->right));
    if (p->busy == BUSY_SNAPSHOT)
        unit_ok(kvmeta_snapshot_take(p->db, &p->snapshot));
}

static void busy_end(struct parent *p)
{
    if (busy_lock(p)) pthread_mutex_unlock(busy_lock(p));
    if (p->busy == BUSY_RIGHT) kv_right_give(p->db, NULL);
    if (p->busy == BUSY_SNAPSHOT) kvmeta_snapshot_release(p->snapshot);
}

/* In the child: a tree that was changed at the fork leads to nowhere. Where
 * all was quiet everything is given back. */
static int close_in_child(void *arg)
{
    struct parent *p = arg;
    long long before = (long long)atomic_load(&p->u->alloc.live_blocks);
    int lock = p->db->lock.handle, dir = p->db->env.dir;
    long long left;

    alarm(20);
    if (p->busy != BUSY_NOT)
        kv_tree_current(&p->db->tree)->root = (struct kv_node *)(uintptr_t)64;
    if (kvmeta_close(p->db) != KVMETA_E_FORKED) return 1;
    left = (long long)atomic_load(&p->u->alloc.live_blocks);
    if (left != (p->busy == BUSY_NOT ? 0 : before)) return 2;
    return fcntl(lock, F_GETFD) != -1 || fcntl(dir, F_GETFD) != -1 ? 3 : 0;
}

/* Goal: a close in a forked child follows nothing that another thread of the
 * parent may have been changing at the fork; LOCK and the directory are closed
 * in any case, and where all was quiet everything is given back. Method: each
 * lock that says that somebody is at work is taken before the fork. */
static void a_forked_child_frees_only_what_nobody_was_changing(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct parent p = {.u = u};

    p.db = unit_open(u, &options);
    unit_fill(p.db, 0, 2000, 0, KVMETA_DURABLE);
    unit_ok(kvmeta_flush(p.db));
    unit_fill(p.db, 2000, 2010, 0, KVMETA_BUFFERED);
    for (p.busy = BUSY_RIGHT; p.busy <= BUSY_NOT; p.busy++) {
        busy_begin(&p);
        assert_int_equal(unit_in_child(close_in_child, &p), 0);
        busy_end(&p);
    }
    unit_ok(kvmeta_verify(p.db, NULL));
    unit_holds(p.db, 0, 2010, 0);
    unit_close(p.db);
}

static int see_nothing(void *user, const void *key, const void *value)
{
    (void)user, (void)key, (void)value;
    return 0;
}

/* In the child: what a snapshot from before the fork holds, read and let go;
 * all else that could wait is refused. */
static int read_in_child(void *arg)
{
    struct parent *p = arg;
    struct kvmeta_stats stats = {.struct_size = sizeof stats};
    unsigned char key[8], value[8], found;
    struct kvmeta_error err;
    kvmeta_snapshot *other;
    uint64_t n = 0;

    alarm(20);
    if (kvmeta_scan(p->db, NULL, NULL, see_nothing, NULL) != KVMETA_E_FORKED
        || kvmeta_snapshot_take(p->db, &other) != KVMETA_E_FORKED
        || kvmeta_stats(p->db, &stats) != KVMETA_E_FORKED
        || kvmeta_last_error(p->db, &err) != KVMETA_E_FORKED
        || err.code != KVMETA_E_FORKED
        || kvmeta_last_error(p->db, NULL) != KVMETA_E_FORKED
        || kvmeta_commit(p->db, p->batch, 0, NULL) != KVMETA_E_FORKED)
        return 1;
    while (kvmeta_cursor_next(p->cursor) == KVMETA_OK) n++;
    unit_key(8, 7, key);
    if (n != 99 || kvmeta_snapshot_count(p->snapshot) != 100
        || kvmeta_snapshot_get(p->snapshot, key, value) != KVMETA_OK
        || kvmeta_snapshot_get_many(p->snapshot, key, 1, value, &found)
        || !found)
        return 2;
    kvmeta_cursor_close(p->cursor);
    kvmeta_snapshot_release(p->snapshot);
    kvmeta_batch_free(p->batch);
    return kvmeta_close(p->db) == KVMETA_E_FORKED ? 0 : 3;
}

/* Goal: what a forked child may call does not wait for a thread that is not
 * there, and a snapshot from before the fork can be read. Method: all locks
 * are taken at the fork, and the gate is closed. */
static void a_forked_child_waits_for_nobody(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct parent p = {.u = u};
    unsigned char key[8] = {0};

    p.db = unit_open(u, &options);
    unit_fill(p.db, 0, 100, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_snapshot_take(p.db, &p.snapshot));
    unit_ok(kvmeta_cursor_open(p.snapshot, &p.cursor));
    unit_ok(kvmeta_cursor_first(p.cursor));
    unit_ok(kvmeta_batch_new(p.db, &p.batch));
    unit_ok(kvmeta_batch_put(p.batch, key, key));
    unit_fill(p.db, 50, 150, 1, KVMETA_BUFFERED);
    for (p.busy = BUSY_RIGHT; p.busy <= BUSY_BIAS; p.busy++) busy_begin(&p);
    p.db->tree.gate = true;
    assert_int_equal(unit_in_child(read_in_child, &p), 0);
    p.db->tree.gate = false;
    for (p.busy = BUSY_RIGHT; p.busy <= BUSY_BIAS; p.busy++) busy_end(&p);
    kvmeta_cursor_close(p.cursor);
    kvmeta_snapshot_release(p.snapshot);
    kvmeta_batch_free(p.batch);
    unit_close(p.db);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_forked_child_frees_only_what_nobody_was_changing),
    UNIT_CASE(a_forked_child_waits_for_nobody),
    UNIT_CASE(a_group_reserves_for_the_tree_that_it_builds),
    UNIT_CASE(readers_alone_are_biased),
    UNIT_CASE(a_small_durable_batch_is_made_in_place),
    UNIT_CASE(a_get_many_of_nothing_in_nothing_touches_nothing),
    UNIT_CASE(a_get_many_sees_one_state_beside_buffered_puts),
    UNIT_CASE(the_worker_sleeps_until_the_first_thing_is_due),
    UNIT_CASE(a_clock_that_is_set_back_changes_no_wait),
    UNIT_CASE(a_signal_before_the_worker_sleeps_is_not_lost),
    UNIT_CASE(an_error_that_is_overcome_ends_no_wait),
    UNIT_CASE(what_another_thread_has_done_ends_a_wait),
    UNIT_CASE(what_no_step_brings_about_is_not_waited_for),
    UNIT_CASE(a_wait_is_over_though_there_is_more_to_do),
    UNIT_CASE(a_log_sync_without_a_log_does_nothing),
    UNIT_CASE(a_log_may_be_sealed_while_it_is_synced),
    UNIT_CASE(a_log_that_is_made_too_late_is_removed),
    UNIT_CASE(what_fails_between_blocks_is_tried_after_a_while),
    UNIT_CASE(timed_work_waits_for_its_time),
    UNIT_CASE(a_braked_step_stops_when_it_is_told_to),
    UNIT_CASE(a_heal_of_a_store_that_has_failed_does_nothing),
    UNIT_CASE(nothing_is_told_under_a_short_lock),
    UNIT_CASE(logs_that_wait_have_a_limit),
    UNIT_CASE(tables_have_a_limit),
    UNIT_CASE(who_waits_when_writing_stops_hears_of_it),
    UNIT_CASE(a_compaction_that_has_stopped_is_not_waited_for),
    UNIT_CASE(an_open_with_as_many_tables_as_there_may_be_merges),
    UNIT_CASE(a_group_ends_before_it_is_too_large),
    UNIT_CASE(batches_that_wait_share_a_sync),
    UNIT_CASE(writers_sleep_through_a_slow_sync),
    UNIT_CASE(naps_end),
    UNIT_CASE(sizes_beyond_all_memory_are_refused),
    UNIT_CASE(what_a_reader_has_held_up_is_freed_in_parts),
    UNIT_CASE(what_was_held_goes_with_the_snapshot_or_the_store),
    UNIT_CASE(ascending_keys_leave_full_nodes),
};

UNIT_MAIN(cases)
