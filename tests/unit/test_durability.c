/*
 * Durability: what each kind of write promises, the barriers, and what a
 * failed write or sync leaves behind.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

/* --------------------------------------------------------------------------
 * What survives a kill
 * -------------------------------------------------------------------------- */

static uint64_t count_after_a_kill(struct unit *u, unsigned durability,
                                   uint64_t count, int sync)
{
    struct unit_life life = {u, 0, count, durability, sync};
    struct kvmeta_options options = unit_quiet(u);
    uint64_t found;
    kvmeta *db;

    assert_int_equal(unit_in_child(unit_live_and_die, &life), 0);
    db = unit_open(u, &options);
    found = kvmeta_count(db);
    unit_holds(db, 0, found, 0);
    assert_true(found == 0 || unit_stats(db).open_log_batches == found);
    unit_close(db);
    unit_remove_tree(u->dir);
    return found;
}

/* Goal: durable and written puts are all there after a kill; of buffered
 * ones a prefix is, of which log_buffer_bytes at most are missing, and all
 * of them after a sync. */
static void a_kill_costs_only_what_was_buffered(struct unit *u)
{
    uint64_t found;

    assert_true(count_after_a_kill(u, KVMETA_DURABLE, 100, 0) == 100);
    assert_true(count_after_a_kill(u, KVMETA_WRITTEN, 5000, 0) == 5000);
    found = count_after_a_kill(u, KVMETA_BUFFERED, 10, 0);
    assert_true(found <= 10);
    found = count_after_a_kill(u, KVMETA_BUFFERED, 20000, 0);
    assert_true(found <= 20000 && found + 32768 / 24 + 1 >= 20000);
    assert_true(count_after_a_kill(u, KVMETA_BUFFERED, 777, 1) == 777);
}

/* --------------------------------------------------------------------------
 * Barriers
 * -------------------------------------------------------------------------- */

/* Goal: sync makes everything before it durable; without anything to do it
 * does nothing. */
static void sync_is_a_barrier(struct unit *u)
{
    static const unsigned weak[] = {KVMETA_WRITTEN, KVMETA_BUFFERED};
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_stats s;
    uint64_t syncs;
    size_t i;

    unit_ok(kvmeta_sync(db));
    for (i = 0; i < 2; i++) {
        unit_fill(db, 0, 50, i, weak[i]);
        s = unit_stats(db);
        assert_true(s.durable_seq < s.seq);
        unit_ok(kvmeta_sync(db));
        s = unit_stats(db);
        assert_true(s.durable_seq == s.seq);
        syncs = s.syncs;
        unit_ok(kvmeta_sync(db));
        assert_true(unit_stats(db).syncs == syncs);
    }
    unit_close(db);
}

/* Goal: a durable write makes those before it durable, too: a log has one
 * order. So do a flush and a close. */
static void a_durable_write_carries_those_before_it(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_stats s;

    unit_fill(db, 0, 50, 0, KVMETA_BUFFERED);
    unit_fill(db, 50, 100, 0, KVMETA_WRITTEN);
    s = unit_stats(db);
    assert_true(s.durable_seq < s.seq);
    unit_fill(db, 100, 101, 0, KVMETA_DURABLE);
    s = unit_stats(db);
    assert_true(s.durable_seq == s.seq);
    unit_fill(db, 101, 150, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    s = unit_stats(db);
    assert_true(s.durable_seq == s.seq);
    unit_fill(db, 150, 200, 0, KVMETA_BUFFERED);
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 200);
    unit_holds(db, 0, 200, 0);
    unit_close(db);
}

/* Goal: with sync_interval_ms the thread is the barrier. */
static void the_thread_syncs_at_the_interval(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_stats s;
    uint64_t deadline = unit_now_ms() + 20000;
    kvmeta *db;

    options.sync_interval_ms = 20;
    options.durability = KVMETA_BUFFERED;
    db = unit_open(u, &options);
    unit_fill(db, 0, 100, 0, 0);
    do {
        unit_sleep_ms(5);
        s = unit_stats(db);
        assert_true(unit_now_ms() < deadline);
    } while (s.durable_seq < s.seq);
    unit_fill(db, 100, 200, 0, KVMETA_WRITTEN);
    do {
        unit_sleep_ms(5);
        s = unit_stats(db);
        assert_true(unit_now_ms() < deadline);
    } while (s.durable_seq < s.seq);
    unit_close(db);
}

/* Goal: without a thread kvmeta_step is the barrier, once the interval is
 * over; without an interval only kvmeta_sync is. */
static void step_syncs_at_the_interval(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    uint64_t deadline = unit_now_ms() + 20000;
    struct kvmeta_stats s;
    int did, i;
    kvmeta *db;

    options.sync_interval_ms = 10;
    db = unit_open(u, &options);
    unit_fill(db, 0, 100, 0, KVMETA_BUFFERED);
    do {
        unit_sleep_ms(2);
        unit_ok(kvmeta_step(db, &did));
        s = unit_stats(db);
        assert_true(unit_now_ms() < deadline);
    } while (s.durable_seq < s.seq);
    unit_close(db);
    options.sync_interval_ms = 0;
    db = unit_open(u, &options);
    unit_fill(db, 100, 200, 0, KVMETA_BUFFERED);
    for (i = 0; i < 10; i++) {
        unit_ok(kvmeta_step(db, &did));
        unit_sleep_ms(5);
    }
    s = unit_stats(db);
    assert_true(s.durable_seq < s.seq);
    unit_close(db);
}

/* Goal: log_buffer_bytes bounds what is only in memory. Method: the log on
 * disk grows while buffered writes pass the limit. */
static void the_log_buffer_is_bounded(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_stats s;
    kvmeta *db;
    uint64_t i;

    options.log_buffer_bytes = 4096;
    db = unit_open(u, &options);
    for (i = 0; i < 2000; i++) {
        unit_fill(db, i, i + 1, 0, KVMETA_BUFFERED);
        s = unit_stats(db);
        assert_true(s.bytes_logged + 4096 + 64 >= (i + 1) * 24);
    }
    assert_true(s.groups > 5 && s.groups < 500);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Failures of writes
 * -------------------------------------------------------------------------- */

static void want_refused(kvmeta *db)
{
    unsigned char key[8] = {0};
    struct kvmeta_op op = {KVMETA_OP_PUT, key, key};
    struct kvmeta_digest digest = kvmeta_digest(db);
    uint64_t count = kvmeta_count(db);

    unit_is(kvmeta_put(db, key, key, 0), KVMETA_E_FAILED);
    unit_is(kvmeta_put(db, key, key, KVMETA_BUFFERED), KVMETA_E_FAILED);
    unit_is(kvmeta_remove(db, key, KVMETA_WRITTEN), KVMETA_E_FAILED);
    unit_is(kvmeta_swap(db, key, key, NULL, 0), KVMETA_E_FAILED);
    unit_is(kvmeta_write(db, &op, 1, 0, NULL), KVMETA_E_FAILED);
    assert_true(kvmeta_count(db) == count);
    unit_same_digest(kvmeta_digest(db), digest);
}

/* Goal: a failed sync is final: the write that met it fails, nothing of it is
 * visible, no later write is taken although the disk works again, reads go
 * on, and the error is kept with its errno. A reopen has all that was
 * acknowledged. */
static void check_final_failure(struct unit *u, int syncs, unsigned durability)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    struct kvmeta_error err;
    struct kvmeta_digest digest;
    unsigned char key[8];
    kvmeta *db;

    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 100, 0, KVMETA_DURABLE);
    digest = kvmeta_digest(db);
    atomic_store(syncs ? &faults->sync_errno : &faults->write_errno, EIO);
    unit_key(8, 100, key);
    unit_is(kvmeta_put(db, key, key, durability), KVMETA_E_IO);
    atomic_store(syncs ? &faults->sync_errno : &faults->write_errno, 0);
    unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
    unit_same_digest(kvmeta_digest(db), digest);
    want_refused(db);
    unit_is(kvmeta_last_error(db, &err), KVMETA_E_IO);
    assert_int_equal(err.code, KVMETA_E_IO);
    assert_int_equal(err.sys_errno, EIO);
    assert_non_null(strstr(err.message, ".wal"));
    unit_holds(db, 0, 100, 0);
    kvmeta_close(db);
    db = unit_open(u, &options);
    unit_holds(db, 0, 100, 0);
    assert_true(kvmeta_count(db) <= 101);
    unit_ok(kvmeta_last_error(db, NULL));
    unit_fill(db, 100, 110, 0, 0);
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void a_failed_write_or_sync_is_final(struct unit *u)
{
    check_final_failure(u, 1, KVMETA_DURABLE);
    check_final_failure(u, 0, KVMETA_DURABLE);
    check_final_failure(u, 0, KVMETA_WRITTEN);
}

/* Goal: a failed sync that kvmeta_sync meets is as final. */
static void a_failed_sync_call_is_final(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    kvmeta *db;

    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 100, 0, KVMETA_WRITTEN);
    atomic_store(&faults->sync_errno, EIO);
    unit_is(kvmeta_sync(db), KVMETA_E_IO);
    atomic_store(&faults->sync_errno, 0);
    want_refused(db);
    unit_is(kvmeta_sync(db), KVMETA_E_FAILED);
    unit_holds(db, 0, 100, 0);
    kvmeta_close(db);
}

/* Goal: so is a failed write of a full buffer: the buffered put that met it
 * fails, and those before it stay visible. */
static void a_failed_write_of_the_buffer_is_final(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    uint64_t count = 0;
    unsigned char key[8];
    int rc = KVMETA_OK;
    kvmeta *db;

    options.vfs = &faults->vfs;
    options.log_buffer_bytes = 4096;
    db = unit_open(u, &options);
    unit_fill(db, 0, 1, 0, KVMETA_DURABLE);
    atomic_store(&faults->write_errno, EIO);
    while (rc == KVMETA_OK && count < 1000) {
        unit_key(8, ++count, key);
        rc = kvmeta_put(db, key, key, KVMETA_BUFFERED);
    }
    unit_is(rc, KVMETA_E_IO);
    atomic_store(&faults->write_errno, 0);
    assert_true(count > 100 && kvmeta_count(db) == count);
    unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
    want_refused(db);
    unit_is(kvmeta_close(db), KVMETA_E_FAILED);
}

/* Goal: a batch that changes nothing, for what it expects is not so, says
 * that, also where the sync for those before it fails. */
static void a_conflict_is_one_though_the_sync_fails(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    unsigned char key[8] = {0xff};
    struct kvmeta_op op = {KVMETA_OP_EXPECT, key, key};
    kvmeta *db;

    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 0, KVMETA_WRITTEN);
    atomic_store(&faults->sync_errno, EIO);
    unit_is(kvmeta_write(db, &op, 1, KVMETA_DURABLE, NULL), KVMETA_CONFLICT);
    atomic_store(&faults->sync_errno, 0);
    unit_is(kvmeta_last_error(db, NULL), KVMETA_E_IO);
    want_refused(db);
    kvmeta_close(db);
}

/* Goal: so is one at the interval, and the step that met it says so. */
static void a_failed_sync_at_the_interval_is_final(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    int did, rc = KVMETA_OK;
    kvmeta *db;

    options.vfs = &faults->vfs;
    options.sync_interval_ms = 1;
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 0, KVMETA_WRITTEN);
    unit_sleep_ms(2);
    atomic_store(&faults->sync_errno, EIO);
    rc = kvmeta_step(db, &did);
    atomic_store(&faults->sync_errno, 0);
    unit_is(rc, KVMETA_E_IO);
    unit_is(kvmeta_last_error(db, NULL), KVMETA_E_IO);
    want_refused(db);
    unit_holds(db, 0, 10, 0);
    unit_is(kvmeta_close(db), KVMETA_E_FAILED);
}

/* Goal: no space is not final: the write fails, nothing changed, and the
 * next one works. */
static void no_space_is_not_final(struct unit *u)
{
    static const unsigned durabilities[] = {KVMETA_DURABLE, KVMETA_WRITTEN};
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    struct kvmeta_digest digest;
    unsigned char key[8];
    kvmeta *db;
    size_t i;

    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 0, 0);
    for (i = 0; i < 6; i++) {
        digest = kvmeta_digest(db);
        atomic_store(&faults->write_errno, ENOSPC);
        unit_key(8, 99, key);
        unit_is(kvmeta_put(db, key, key, durabilities[i % 2]),
                KVMETA_E_NOSPACE);
        atomic_store(&faults->write_errno, 0);
        unit_same_digest(kvmeta_digest(db), digest);
        unit_fill(db, 10 + i, 11 + i, 0, durabilities[i / 2 % 2]);
    }
    unit_ok(kvmeta_last_error(db, NULL));
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 16);
    unit_holds(db, 0, 16, 0);
    unit_close(db);
}

/* Goal: nor is the want of a descriptor for the next log: writes go on in the
 * old one until it is full, and in a new one as soon as there can be one. */
static void no_descriptor_is_not_final(struct unit *u)
{
    static const unsigned durabilities[] = {KVMETA_DURABLE, KVMETA_WRITTEN,
                                            KVMETA_BUFFERED};
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    uint64_t count = 1;
    unsigned char key[8], value[8];
    kvmeta *db;
    int rc;

    options.vfs = &faults->vfs;
    options.log_bytes_max = 65536;
    faults->create_suffix = ".wal";
    db = unit_open(u, &options);
    unit_fill(db, 0, 1, 0, 0);
    for (size_t i = 0; i < 3; i++) {
        atomic_store(&faults->create_errno, i == 1 ? ENFILE : EMFILE);
        for (rc = KVMETA_OK; rc == KVMETA_OK; count += rc == KVMETA_OK) {
            unit_key(8, count, key);
            unit_value(8, count, value);
            rc = kvmeta_put(db, key, value, durabilities[i]);
        }
        unit_is(rc, KVMETA_E_LIMIT);
        assert_true(kvmeta_count(db) == count);
        unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
        atomic_store(&faults->create_errno, 0);
        unit_fill(db, count, count + 1, 0, durabilities[i]);
        count++;
    }
    unit_ok(kvmeta_last_error(db, NULL));
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == count);
    unit_holds(db, 0, count, 0);
    unit_close(db);
}

/* Goal: a close that cannot make things durable says so, and the handle is
 * gone all the same; what was durable is there at the next open. */
static void a_failed_close_is_as_a_kill(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    kvmeta *db;

    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 50, 0, KVMETA_DURABLE);
    unit_fill(db, 50, 100, 0, KVMETA_BUFFERED);
    atomic_store(&faults->sync_errno, EIO);
    assert_true(kvmeta_close(db) < 0);
    atomic_store(&faults->sync_errno, 0);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) >= 50 && kvmeta_count(db) <= 100);
    unit_holds(db, 0, kvmeta_count(db), 0);
    unit_close(db);
}

/* Fails the sync `fail_sync_at` from now; 0: none. */
static int fail_sync_at;

static int sync_or_fail(void *user, int file)
{
    return fail_sync_at > 0 && --fail_sync_at == 0
        ? EIO : unit_fault_sync(user, file);
}

/* Goal: each sync of a close that fails makes the close fail, and nothing
 * that was acknowledged is lost. */
static void each_sync_of_a_close_counts(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    int at, rc, hit = 1;

    faults->vfs.file_sync = sync_or_fail;
    options.vfs = &faults->vfs;
    for (at = 1; hit; at++) {
        kvmeta *db = unit_open(u, &options);

        unit_fill(db, 0, 50, 0, KVMETA_DURABLE);
        unit_fill(db, 50, 100, 0, KVMETA_WRITTEN);
        fail_sync_at = at;
        rc = kvmeta_close(db);
        hit = fail_sync_at == 0;
        fail_sync_at = 0;
        unit_is(rc, hit ? KVMETA_E_IO : KVMETA_OK);
        db = unit_open(u, &options);
        unit_holds(db, 0, 50, 0);
        unit_close(db);
        unit_remove_tree(u->dir);
    }
    assert_true(at > 3);
}

/* Goal: a write that cannot begin its log since the directory is gone is an
 * error, whatever it would say of the record otherwise, and nothing has
 * changed. Method: the log is sealed, so that the next write makes one. */
static void a_write_without_a_directory_is_an_error(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8], value[8] = {0}, previous[8] = {9};
    int call;

    for (call = 0; call < 3; call++) {
        kvmeta *db = unit_open(u, &options);
        int rc;

        unit_fill(db, 0, 10, 0, KVMETA_DURABLE);
        unit_ok(kvmeta_flush(db));
        unit_remove_tree(u->dir);
        unit_key(8, 3, key);
        rc = call == 0   ? kvmeta_put(db, key, value, 0)
             : call == 1 ? kvmeta_remove(db, key, 0)
                         : kvmeta_swap(db, key, value, previous, 0);
        unit_is(rc, KVMETA_E_IO);
        assert_int_equal(previous[0], 9);
        unit_holds(db, 0, 10, 0);
        unit_is(kvmeta_remove(db, key, 0), KVMETA_E_FAILED);
        (void)kvmeta_close(db);
    }
}

static struct unit_case cases[] = {
    UNIT_CASE(a_write_without_a_directory_is_an_error),
    UNIT_CASE(a_kill_costs_only_what_was_buffered),
    UNIT_CASE(sync_is_a_barrier),
    UNIT_CASE(a_durable_write_carries_those_before_it),
    UNIT_CASE(the_thread_syncs_at_the_interval),
    UNIT_CASE(step_syncs_at_the_interval),
    UNIT_CASE(the_log_buffer_is_bounded),
    UNIT_CASE(a_failed_write_or_sync_is_final),
    UNIT_CASE(a_failed_sync_call_is_final),
    UNIT_CASE(a_failed_write_of_the_buffer_is_final),
    UNIT_CASE(a_conflict_is_one_though_the_sync_fails),
    UNIT_CASE(a_failed_sync_at_the_interval_is_final),
    UNIT_CASE(no_space_is_not_final),
    UNIT_CASE(no_descriptor_is_not_final),
    UNIT_CASE(a_failed_close_is_as_a_kill),
    UNIT_CASE(each_sync_of_a_close_counts),
};

UNIT_MAIN(cases)
