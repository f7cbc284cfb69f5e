/*
 * Background work: flush, merge, compaction, back-pressure, healing, and the
 * errors that it meets.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

static void step_until_idle(kvmeta *db)
{
    int did = 1, steps = 0;

    while (did) {
        unit_ok(kvmeta_step(db, &did));
        assert_true(steps++ < 10000);
    }
}

/* --------------------------------------------------------------------------
 * Flush and compaction
 * -------------------------------------------------------------------------- */

/* Goal: after a flush what was in logs is in tables, on disk, too; a second
 * flush has nothing to do. */
static void check_flush(struct unit *u, uint32_t flags)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_stats s;
    kvmeta *db;

    options.flags = flags;
    db = unit_open(u, &options);
    unit_ok(kvmeta_flush(db));
    assert_true(unit_stats(db).tables == 0);
    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    s = unit_stats(db);
    assert_true(s.tables == 1 && s.table_records == 1000);
    assert_true(s.logs_waiting == 0 && s.durable_seq == s.seq);
    assert_int_equal(unit_files(u, ".tab"), 1);
    unit_ok(kvmeta_flush(db));
    unit_ok(kvmeta_wait_idle(db));
    s = unit_stats(db);
    assert_true(s.flushes == 1 && s.rotations >= 1);
    unit_holds(db, 0, 1000, 0);
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(unit_stats(db).open_table_records == 1000);
    unit_holds(db, 0, 1000, 0);
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void flush_moves_the_log_into_a_table(struct unit *u)
{
    check_flush(u, 0);
    check_flush(u, KVMETA_NO_THREAD);
}

/* Goal: compaction leaves one table that holds each record once and nothing
 * else: no tombstone, no shadowed record; none when there is no record. */
static void check_compact(struct unit *u, uint32_t flags)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_digest digest;
    struct kvmeta_stats s;
    unsigned char key[8];
    kvmeta *db;
    uint64_t i;

    options.flags = flags;
    db = unit_open(u, &options);
    for (i = 0; i < 5; i++) {
        unit_fill(db, 100 * i, 100 * i + 500, i, KVMETA_BUFFERED);
        unit_ok(kvmeta_flush(db));
    }
    for (i = 0; i < 100; i++) {
        unit_key(8, i, key);
        unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    }
    digest = kvmeta_digest(db);
    unit_ok(kvmeta_compact(db));
    s = unit_stats(db);
    assert_true(s.tables == 1 && s.records == 800);
    assert_true(s.table_records == 800 && s.logs_waiting == 0);
    unit_same_digest(kvmeta_digest(db), digest);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    assert_int_equal(unit_files(u, ".tab"), 1);
    db = unit_open(u, &options);
    unit_same_digest(kvmeta_digest(db), digest);
    for (i = 100; i < 900; i++) {
        unit_key(8, i, key);
        unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_compact(db));
    assert_true(unit_stats(db).table_records == 0);
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 0);
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void compact_leaves_one_table_without_tombstones(struct unit *u)
{
    check_compact(u, 0);
    check_compact(u, KVMETA_NO_THREAD);
}

/* Goal: tables take records of every width. Found by the fuzzer: with 2,041 to
 * 2,047 bytes a block got 64 records, the fewest that are stored by column,
 * which needs more room than there was. */
static void tables_take_records_whose_blocks_are_just_columns(struct unit *u)
{
    static unsigned char key[8], value[2040];
    struct test_rng rng = {test_args.seed};
    struct kvmeta_digest digest;
    uint32_t bytes;

    for (bytes = 2032; bytes <= 2040; bytes++) {
        struct kvmeta_options options = unit_options(u, 8, bytes);
        kvmeta *db = unit_open(u, &options);
        uint64_t i;

        for (i = 0; i < 130; i++) {
            unit_key(8, i, key);
            test_rng_bytes(&rng, value, bytes);
            unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
        }
        digest = kvmeta_digest(db);
        unit_ok(kvmeta_compact(db));
        unit_close(db);
        db = unit_open(u, &options);
        unit_same_digest(kvmeta_digest(db), digest);
        unit_close(db);
        unit_remove_tree(u->dir);
    }
}

/* Goal: a large table is synced while it is written, every two megabytes; a
 * sync that fails is an error of the flush alone. Method: three megabytes that
 * nothing makes smaller; a flush that could not begin its table has sealed the
 * log before. */
static void a_large_table_is_synced_in_parts(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 1000);
    struct unit_faults *faults = unit_faults_init(u);
    struct test_rng rng = {test_args.seed};
    static const uint64_t counts[] = {100, 3000};
    unsigned char key[8], value[1000];
    uint_fast64_t syncs[2];
    kvmeta *db;
    uint64_t i;

    faults->create_suffix = ".tab";
    options.vfs = &faults->vfs;
    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    for (size_t k = 0; k < 2; k++) {
        for (i = 0; i < counts[k]; i++) {
            unit_key(8, i, key);
            test_rng_bytes(&rng, value, sizeof value);
            unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
        }
        atomic_store(&faults->create_errno, EMFILE);
        unit_is(kvmeta_flush(db), KVMETA_E_LIMIT);
        atomic_store(&faults->create_errno, 0);
        atomic_store(&faults->sync_errno, EIO);
        unit_is(kvmeta_flush(db), KVMETA_E_IO);
        atomic_store(&faults->sync_errno, 0);
        assert_int_equal(unit_stats(db).tables, k);
        syncs[k] = atomic_load(&faults->syncs);
        unit_ok(kvmeta_flush(db));
        syncs[k] = atomic_load(&faults->syncs) - syncs[k];
    }
    assert_true(syncs[1] == syncs[0] + 1);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: adjacent tables of like size are merged: their number stays small,
 * the records what they were. */
static void tables_of_like_size_are_merged(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_stats s;
    kvmeta *db;
    uint64_t i;

    options.merge_window = 2;
    options.space_amp_max = 100;
    db = unit_open(u, &options);
    for (i = 0; i < 20; i++) {
        unit_fill(db, 100 * i, 100 * i + 100, 0, KVMETA_BUFFERED);
        unit_ok(kvmeta_flush(db));
        step_until_idle(db);
    }
    s = unit_stats(db);
    assert_true(s.merges > 0 && s.tables < 10);
    assert_true(s.table_records == 2000);
    unit_holds(db, 0, 2000, 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: a merge takes the young tables of like size and leaves an old one
 * that is much larger alone; one fewer than the window is left alone, too. */
static void a_merge_takes_the_tables_of_like_size_only(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_stats s;
    char large[64], name[64];
    kvmeta *db;
    uint64_t i;

    options.merge_window = 3;
    options.space_amp_max = 100;
    db = unit_open(u, &options);
    unit_fill_random(db, 0, 5000, 1);
    unit_ok(kvmeta_flush(db));
    assert_true(unit_find(u, ".tab", 0, large));
    for (i = 0; i < 3; i++) {
        step_until_idle(db);
        assert_true(unit_stats(db).merges == 0);
        unit_fill_random(db, 100 * i, 100 * i + 100, 2 + i);
        unit_ok(kvmeta_flush(db));
    }
    assert_int_equal(unit_files(u, ".tab"), 4);
    step_until_idle(db);
    s = unit_stats(db);
    assert_true(s.merges == 1 && s.tables == 2);
    assert_true(s.table_records == 5300);
    assert_int_equal(unit_files(u, ".tab"), 2);
    assert_true(unit_find(u, ".tab", 0, name));
    assert_string_equal(name, large);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: so does one at the other end: the old tables are merged below a young
 * one that is much larger. Here they cancel out, and what is left, one table,
 * has a tombstone, which compaction takes away. */
static void a_merge_may_leave_nothing_below_a_larger_table(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_stats s;
    unsigned char key[8];
    kvmeta *db;

    options.merge_window = 2;
    options.space_amp_max = 100;
    db = unit_open(u, &options);
    unit_key(8, 0, key);
    unit_fill(db, 0, 1, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    unit_ok(kvmeta_flush(db));
    unit_fill_random(db, 0, 3000, 1);
    unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    unit_ok(kvmeta_flush(db));
    step_until_idle(db);
    s = unit_stats(db);
    assert_true(s.merges == 1 && s.tables == 1);
    assert_true(s.records == 2999 && s.table_records == 3000);
    unit_ok(kvmeta_compact(db));
    s = unit_stats(db);
    assert_true(s.tables == 1 && s.table_records == 2999);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: a host that only flushes, and never lets the background come to its
 * end, does not pile up tables. */
static void flushes_alone_do_not_pile_up_tables(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_stats s;
    kvmeta *db;
    uint64_t i;

    options.vfs = unit_unsynced(u);
    options.merge_window = 5;
    db = unit_open(u, &options);
    for (i = 0; i < 300; i++) {
        unit_fill(db, i, i + 1, 0, KVMETA_BUFFERED);
        unit_ok(kvmeta_flush(db));
        s = unit_stats(db);
        assert_true(s.logs_waiting == 0);
        assert_true(s.tables <= 2 * options.merge_window);
    }
    assert_true(s.merges > 0);
    unit_holds(db, 0, 300, 0);
    unit_close(db);
}

/* Goal: the tables do not grow without a bound where the background is never
 * done, because there is always another log to flush. Method: a writer that
 * waits for nothing but the flush of one log at a time. */
static void space_is_bounded_under_steady_writes(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_stats s;
    kvmeta *db;
    uint64_t i;

    options.vfs = unit_unsynced(u);
    options.log_bytes_max = 65536;
    options.merge_window = 5;
    db = unit_open(u, &options);
    for (i = 0; i < 100; i++) {
        unit_fill(db, 0, 1000, i, KVMETA_WRITTEN);
        s = unit_stats(db);
        assert_true(s.tables <= 2 * options.merge_window);
        assert_true(s.table_records <= (2 * options.merge_window + 1) * 1000);
    }
    assert_true(s.stalls > 0 && s.rotations > 100);
    unit_holds(db, 0, 1000, 99);
    unit_close(db);
}

/* Goal: the tables never stay above space_amp_max times the records. */
static void space_amp_max_is_kept(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_stats s;
    kvmeta *db;
    uint64_t i;

    options.space_amp_max = 1.5;
    db = unit_open(u, &options);
    for (i = 0; i < 12; i++) {
        unit_fill(db, 0, 1000, i, KVMETA_BUFFERED);
        unit_ok(kvmeta_flush(db));
        step_until_idle(db);
        s = unit_stats(db);
        assert_true(s.table_records <= 1500);
        assert_true(s.space_amplification <= 1.5);
    }
    assert_true(s.full_compactions >= 3);
    unit_holds(db, 0, 1000, 11);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * With and without a thread
 * -------------------------------------------------------------------------- */

/* Goal: step is for stores without a thread; there it does all the work. */
static void step_does_the_work_of_the_thread(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_stats s;
    kvmeta *db = unit_open(u, &options);
    int did = 77;

    unit_is(kvmeta_step(db, &did), KVMETA_E_INVALID);
    assert_int_equal(did, 77);
    unit_close(db);
    options.flags = KVMETA_NO_THREAD;
    options.log_bytes_max = 65536;
    db = unit_open(u, &options);
    unit_fill(db, 0, 3000, 0, KVMETA_WRITTEN);
    s = unit_stats(db);
    assert_true(s.rotations >= 2 && s.flushes == 0 && s.logs_waiting >= 2);
    unit_ok(kvmeta_step(db, &did));
    assert_int_equal(did, 1);
    step_until_idle(db);
    s = unit_stats(db);
    assert_true(s.logs_waiting == 0 && s.flushes >= 1 && s.tables >= 1);
    unit_ok(kvmeta_step(db, &did));
    assert_int_equal(did, 0);
    unit_holds(db, 0, 3000, 0);
    unit_close(db);
}

/* Goal: wait_idle returns when nothing is left; the thread got there alone. */
static void wait_idle_waits_for_all_of_it(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_stats s;
    kvmeta *db;

    options.log_bytes_max = 65536;
    options.merge_window = 2;
    db = unit_open(u, &options);
    unit_fill(db, 0, 30000, 0, KVMETA_WRITTEN);
    unit_ok(kvmeta_wait_idle(db));
    s = unit_stats(db);
    assert_true(s.logs_waiting == 0 && s.flushes >= 1 && s.tables >= 1);
    unit_holds(db, 0, 30000, 0);
    unit_close(db);
    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    unit_fill(db, 0, 3000, 1, KVMETA_WRITTEN);
    assert_true(unit_stats(db).logs_waiting > 0);
    unit_ok(kvmeta_wait_idle(db));
    assert_true(unit_stats(db).logs_waiting == 0);
    unit_close(db);
}

/* A clock that writers make use of: what it does when it is asked, from the
 * first time on; then only the time goes by. */
struct busy_clock {
    struct kvmeta_vfs vfs;
    kvmeta *db;
    const char *script;              /* '.' nothing, 's' sync, 'p' put */
    uint64_t now_ns;
    uint64_t puts;
};

static struct busy_clock busy_clock;

static uint64_t busy_clock_ns(void *user)
{
    char what = busy_clock.script[0];
    uint64_t key = busy_clock.puts;

    (void)user;
    if (what == '\0') return busy_clock.now_ns;
    if (what == 'p') {
        busy_clock.script = "";      /* the put asks for the time, too */
        busy_clock.puts++;
        unit_fill(busy_clock.db, key, key + 1, 0, KVMETA_BUFFERED);
    } else if (what == 's') {
        const char *rest = busy_clock.script + 1;

        busy_clock.script = "";
        unit_ok(kvmeta_sync(busy_clock.db));
        busy_clock.script = rest;
    } else {
        busy_clock.script++;
    }
    return busy_clock.now_ns += 10000000;
}

/* Goal: without a thread wait_idle does not fail because a writer has done
 * the work that was due, and has brought up some more, meanwhile. Method: the
 * clock is asked before each look at what is due; then a sync takes that
 * work away, and a put makes it due again. Found by tests/sched. */
static void wait_idle_does_not_fail_beside_a_writer(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);

    busy_clock.vfs = *kvmeta_vfs_posix();
    busy_clock.vfs.clock_ns = busy_clock_ns;
    busy_clock.now_ns = 1000000000;
    busy_clock.script = "";
    busy_clock.puts = 1;
    options.flags = KVMETA_NO_THREAD;
    options.sync_interval_ms = 1;
    options.vfs = &busy_clock.vfs;
    busy_clock.db = unit_open(u, &options);
    unit_fill(busy_clock.db, 0, 1, 0, KVMETA_BUFFERED);
    busy_clock.script = ".sp";
    unit_ok(kvmeta_wait_idle(busy_clock.db));
    busy_clock.script = "";
    unit_holds(busy_clock.db, 0, busy_clock.puts, 0);
    unit_close(busy_clock.db);
}

/* --------------------------------------------------------------------------
 * Back-pressure and the brake
 * -------------------------------------------------------------------------- */

static int slow_table(void *user, int dir, const char *name, int flags,
                      int *file)
{
    if ((flags & KVMETA_VFS_CREATE) && strstr(name, ".tab") != NULL) {
        unit_sleep_ms(150);
    }
    return unit_fault_open(user, dir, name, flags, file);
}

/* Goal: when the background is too slow writers wait instead of letting the
 * logs pile up; the statistics say how often and how long. Method: every
 * table takes 150 ms to begin. */
static void writers_wait_for_a_slow_background(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct unit_faults *faults = unit_faults_init(u);
    struct kvmeta_stats s;
    kvmeta *db;
    uint64_t i;

    faults->vfs.file_open = slow_table;
    options.vfs = &faults->vfs;
    options.log_bytes_max = 65536;
    db = unit_open(u, &options);
    for (i = 0; i < 12; i++) {
        unit_fill(db, 0, 2000, i, KVMETA_WRITTEN);
        s = unit_stats(db);
        assert_true(s.logs_waiting <= 9);
    }
    assert_true(s.stalls > 0 && s.stall_us > 0);
    unit_holds(db, 0, 2000, 11);
    unit_close(db);
}

/* Goal: compaction_bytes_per_s brakes. Method: the same compaction with and
 * without; incompressible values, so that bytes are bytes. */
static uint64_t compaction_ms(struct unit *u, uint64_t bytes_per_s)
{
    struct kvmeta_options options = unit_options(u, 8, 1000);
    struct test_rng rng = {test_args.seed};
    unsigned char key[8], value[1000];
    uint64_t i, begin;
    kvmeta *db;

    options.compaction_bytes_per_s = bytes_per_s;
    db = unit_open(u, &options);
    for (i = 0; i < 1000; i++) {
        unit_key(8, i, key);
        test_rng_bytes(&rng, value, sizeof value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    begin = unit_now_ms();
    unit_ok(kvmeta_compact(db));
    begin = unit_now_ms() - begin;
    unit_close(db);
    unit_remove_tree(u->dir);
    return begin;
}

static void compaction_bytes_per_s_is_a_brake(struct unit *u)
{
    uint64_t free_ms = compaction_ms(u, 0);
    uint64_t slow_ms = compaction_ms(u, 1 << 20);

    assert_true(slow_ms >= 500);
    assert_true(slow_ms > free_ms);
}

/* --------------------------------------------------------------------------
 * Verify and heal
 * -------------------------------------------------------------------------- */

/* Flips a byte in the middle of a file while the store is open: verify must
 * name the file, the background must write the data anew, and then all is
 * well, in memory and at the next open. */
static void check_heal(struct unit *u, const char *suffix, uint32_t flags)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_digest digest;
    struct kvmeta_error err;
    struct kvmeta_stats s;
    char name[64];
    kvmeta *db;

    options.flags = flags;
    options.log_bytes_max = 65536;
    db = unit_open(u, &options);
    unit_fill(db, 0, 3000, 0, KVMETA_BUFFERED);
    if (strcmp(suffix, ".tab") == 0) {
        unit_ok(kvmeta_flush(db));
    }
    unit_fill(db, 2000, 6000, 1, KVMETA_BUFFERED);
    unit_ok(kvmeta_sync(db));
    if (!(flags & KVMETA_NO_THREAD)) {
        unit_ok(kvmeta_wait_idle(db));      /* no table is half written now */
    }
    unit_ok(kvmeta_verify(db, &err));
    digest = kvmeta_digest(db);
    assert_true(unit_find(u, suffix, 0, name));
    unit_flip(u, name, unit_size(u, name) / 2);
    memset(&err, 0, sizeof err);
    unit_is(kvmeta_verify(db, &err), KVMETA_E_CORRUPT);
    assert_int_equal(err.code, KVMETA_E_CORRUPT);
    assert_non_null(strstr(err.message, name));
    unit_ok(kvmeta_wait_idle(db));
    s = unit_stats(db);
    assert_true(s.heals == 1);
    assert_true(atomic_load(&u->alloc.logs[KVMETA_LOG_WARNING]) +
                atomic_load(&u->alloc.logs[KVMETA_LOG_ERROR]) > 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_ok(kvmeta_last_error(db, NULL));
    unit_same_digest(kvmeta_digest(db), digest);
    unit_close(db);
    db = unit_open(u, &options);
    unit_same_digest(kvmeta_digest(db), digest);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void a_damaged_table_is_healed_from_memory(struct unit *u)
{
    check_heal(u, ".tab", KVMETA_NO_THREAD);
    check_heal(u, ".tab", 0);
}

/* A sealed log waits only where no thread takes it away. */
static void a_damaged_sealed_log_is_healed_from_memory(struct unit *u)
{
    check_heal(u, ".wal", KVMETA_NO_THREAD);
}

/* Goal: a merge that meets damage heals it, too: nobody asked for a verify. */
static void check_merge_heals(struct unit *u, uint32_t flags)
{
    struct kvmeta_options options = unit_quiet(u);
    char name[64];
    kvmeta *db;

    options.flags = flags;
    db = unit_open(u, &options);
    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    unit_fill(db, 1000, 2000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    assert_true(unit_find(u, ".tab", 0, name));
    unit_flip(u, name, unit_size(u, name) / 2);
    unit_ok(kvmeta_compact(db));
    assert_true(unit_stats(db).heals == 1);
    assert_true(unit_stats(db).table_records == 2000);
    unit_holds(db, 0, 2000, 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    db = unit_open(u, &options);
    unit_holds(db, 0, 2000, 0);
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void a_merge_over_a_damaged_table_heals_it(struct unit *u)
{
    check_merge_heals(u, KVMETA_NO_THREAD);
    check_merge_heals(u, 0);
}

/* Goal: a heal that fails is tried again, and until then the damage is known
 * and nothing lost. */
static void a_heal_that_fails_is_tried_again(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    char name[64];
    kvmeta *db;

    faults->create_suffix = ".tab";
    options.vfs = &faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    assert_true(unit_find(u, ".tab", 0, name));
    unit_flip(u, name, unit_size(u, name) / 2);
    unit_is(kvmeta_verify(db, NULL), KVMETA_E_CORRUPT);
    atomic_store(&faults->create_errno, EMFILE);
    unit_is(kvmeta_wait_idle(db), KVMETA_E_LIMIT);
    unit_is(kvmeta_last_error(db, NULL), KVMETA_E_LIMIT);
    atomic_store(&faults->create_errno, 0);
    unit_is(kvmeta_verify(db, NULL), KVMETA_E_CORRUPT);
    unit_ok(kvmeta_wait_idle(db));
    assert_true(unit_stats(db).heals == 1);
    unit_ok(kvmeta_last_error(db, NULL));
    unit_ok(kvmeta_verify(db, NULL));
    unit_holds(db, 0, 1000, 0);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Errors of the background work
 * -------------------------------------------------------------------------- */

/* Goal: a table that cannot be written is an error of flush and of
 * last_error with file and errno, not of the writers; it is overcome as soon
 * as it can be, and then forgotten. */
static void check_background_error(struct unit *u, uint32_t flags)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct unit_faults *faults = unit_faults_init(u);
    struct kvmeta_error err;
    kvmeta *db;

    faults->create_suffix = ".tab";
    options.vfs = &faults->vfs;
    options.flags = flags;
    db = unit_open(u, &options);
    unit_fill(db, 0, 100, 0, KVMETA_WRITTEN);
    atomic_store(&faults->create_errno, EMFILE);
    unit_is(kvmeta_flush(db), KVMETA_E_LIMIT);
    unit_is(kvmeta_last_error(db, &err), KVMETA_E_LIMIT);
    assert_int_equal(err.code, KVMETA_E_LIMIT);
    assert_int_equal(err.sys_errno, EMFILE);
    assert_non_null(strstr(err.message, ".tab"));
    assert_true(unit_stats(db).background_errors > 0);
    unit_fill(db, 100, 200, 0, KVMETA_DURABLE);
    atomic_store(&faults->create_errno, 0);
    unit_ok(kvmeta_flush(db));
    memset(&err, 0x5a, sizeof err);
    unit_ok(kvmeta_last_error(db, &err));
    assert_int_equal(err.code, 0);
    unit_holds(db, 0, 200, 0);
    unit_close(db);
    db = unit_open(u, &options);
    unit_holds(db, 0, 200, 0);
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void a_background_error_is_kept_until_overcome(struct unit *u)
{
    check_background_error(u, KVMETA_NO_THREAD);
    check_background_error(u, 0);
}

/* Goal: writers wait for the background only while it can succeed: when it
 * keeps failing they get an error that passes, with nothing changed, and go on
 * when it has recovered. Method: no table can be created; write until
 * refused. */
static void check_backlog_error(struct unit *u, uint32_t flags, int sys_errno,
                                int reason)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct unit_faults *faults = unit_faults_init(u);
    unsigned char key[8];
    uint64_t count = 0;
    int rc = KVMETA_OK;
    kvmeta *db;

    faults->create_suffix = ".tab";
    options.vfs = &faults->vfs;
    options.flags = flags;
    options.log_bytes_max = 65536;
    db = unit_open(u, &options);
    atomic_store(&faults->create_errno, sys_errno);
    while (rc == KVMETA_OK && count < 100000) {
        unit_key(8, count, key);
        rc = kvmeta_put(db, key, key, KVMETA_WRITTEN);
        count += rc == KVMETA_OK;
    }
    unit_is(rc, KVMETA_E_LIMIT);
    assert_true(count > 1000);
    assert_true(kvmeta_count(db) == count);
    unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
    assert_true(unit_stats(db).logs_waiting <= 9);
    unit_is(kvmeta_last_error(db, NULL), reason);
    atomic_store(&faults->create_errno, 0);
    unit_ok(kvmeta_flush(db));
    unit_ok(kvmeta_put(db, key, key, KVMETA_DURABLE));
    unit_ok(kvmeta_last_error(db, NULL));
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == count + 1);
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void writers_do_not_wait_for_a_background_that_keeps_failing(
    struct unit *u)
{
    check_backlog_error(u, KVMETA_NO_THREAD, EMFILE, KVMETA_E_LIMIT);
    check_backlog_error(u, KVMETA_NO_THREAD, EIO, KVMETA_E_IO);
    check_backlog_error(u, 0, EMFILE, KVMETA_E_LIMIT);
    check_backlog_error(u, 0, EIO, KVMETA_E_IO);
}

/* Goal: a log that cannot be made ahead is an error of that step alone. */
static void a_log_ahead_that_cannot_be_made_is_made_later(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_faults *faults = unit_faults_init(u);
    size_t logs;
    kvmeta *db;
    int did;

    options.vfs = &faults->vfs;
    options.log_bytes_max = 65536;
    db = unit_open(u, &options);
    unit_fill(db, 0, 500, 0, KVMETA_WRITTEN);
    logs = unit_files(u, ".wal");
    assert_int_equal(logs, 1);
    atomic_store(&faults->write_errno, EIO);
    unit_is(kvmeta_step(db, &did), KVMETA_E_IO);
    atomic_store(&faults->write_errno, 0);
    assert_int_equal(unit_files(u, ".wal"), logs);
    step_until_idle(db);
    assert_int_equal(unit_files(u, ".wal"), logs + 1);
    unit_fill(db, 500, 1000, 0, KVMETA_WRITTEN);
    assert_true(unit_stats(db).rotations >= 1);
    unit_close(db);
    db = unit_open(u, &options);
    unit_holds(db, 0, 1000, 0);
    unit_close(db);
}

/* A host that writes while a table is made, and whose write fails. */
static struct {
    struct unit_faults *faults;
    kvmeta *db;
    int rc;
} beside;

static int write_beside_table(void *user, int dir, const char *name, int flags,
                              int *file)
{
    unsigned char key[8] = {0};

    if (beside.db && (flags & KVMETA_VFS_CREATE) && strstr(name, ".tab")) {
        atomic_store(&beside.faults->sync_errno, EIO);
        beside.rc = kvmeta_put(beside.db, key, key, KVMETA_DURABLE);
        atomic_store(&beside.faults->sync_errno, 0);
        beside.db = NULL;
    }
    return unit_fault_open(user, dir, name, flags, file);
}

/* Goal: a step that runs when a write fails for good does no more of what is
 * due beside it, and loses nothing. */
static void a_store_may_fail_during_a_step(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db;

    beside.faults = unit_faults_init(u);
    beside.faults->vfs.file_open = write_beside_table;
    options.vfs = &beside.faults->vfs;
    db = unit_open(u, &options);
    unit_fill(db, 0, 1000, 0, KVMETA_DURABLE);
    beside.db = db;
    (void)kvmeta_flush(db);
    assert_null(beside.db);
    unit_is(beside.rc, KVMETA_E_IO);
    unit_is(kvmeta_flush(db), KVMETA_E_FAILED);
    unit_is(kvmeta_close(db), KVMETA_E_FAILED);
    db = unit_open(u, &options);
    unit_holds(db, 1, 1000, 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: a store in which nothing went wrong says so. */
static void a_healthy_store_has_no_last_error(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_error err;

    unit_fill(db, 0, 10, 0, 0);
    memset(&err, 0x5a, sizeof err);
    unit_ok(kvmeta_last_error(db, &err));
    assert_int_equal(err.code, 0);
    assert_int_equal(err.sys_errno, 0);
    assert_non_null(memchr(err.message, 0, sizeof err.message));
    unit_close(db);
}

/* Goal: closing with work left to do leaves it to the next life, which does
 * it as soon as it writes: one that only reads changes nothing. */
static void close_does_not_wait_for_the_backlog(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db;

    options.log_bytes_max = 65536;
    db = unit_open(u, &options);
    unit_fill(db, 0, 3000, 0, KVMETA_WRITTEN);
    assert_true(unit_stats(db).logs_waiting >= 2);
    unit_close(db);
    assert_int_equal(unit_files(u, ".tab"), 0);
    options.flags = 0;
    db = unit_open(u, &options);
    assert_true(unit_stats(db).open_logs >= 3);
    unit_holds(db, 0, 3000, 0);
    unit_fill(db, 3000, 3001, 0, KVMETA_WRITTEN);
    unit_ok(kvmeta_wait_idle(db));
    assert_true(unit_stats(db).logs_waiting == 0);
    unit_close(db);
    assert_true(unit_files(u, ".tab") >= 1);
}

/* Goal: nor does it wait for a step that is braked. Method: 64 KiB a second,
 * for half a megabyte. */
static void close_does_not_wait_for_the_brake(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    uint64_t begin;
    kvmeta *db;

    options.log_bytes_max = 512 << 10;
    options.compaction_bytes_per_s = 64 << 10;
    db = unit_open(u, &options);
    unit_fill_random(db, 0, 30000, 1);
    assert_true(unit_stats(db).rotations > 0);
    unit_sleep_ms(200);                  /* the flush has begun */
    begin = unit_now_ms();
    unit_close(db);
    assert_true(unit_now_ms() - begin < 5000);
    assert_int_equal(unit_files(u, ".tab"), 0);
    options.compaction_bytes_per_s = 0;
    db = unit_open(u, &options);
    assert_int_equal(kvmeta_count(db), 30000);
    unit_close(db);
}

/* Goal: a store of short lives, each too short for the background, does not
 * end with more logs than a manifest holds. */
static void check_short_lives(struct unit *u, uint32_t flags)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db;
    uint64_t i;

    options.flags = flags;
    for (i = 0; i < 40; i++) {
        db = unit_open(u, &options);
        unit_holds(db, 0, i, 0);
        unit_fill(db, i, i + 1, 0, KVMETA_WRITTEN);
        assert_true(unit_stats(db).logs_waiting <= 8);
        unit_close(db);
    }
    assert_true(unit_files(u, ".tab") > 0);
    unit_remove_tree(u->dir);
}

static void short_lives_do_not_pile_up_logs(struct unit *u)
{
    check_short_lives(u, KVMETA_NO_THREAD);
    check_short_lives(u, 0);
}

static struct unit_case cases[] = {
    UNIT_CASE(flush_moves_the_log_into_a_table),
    UNIT_CASE(compact_leaves_one_table_without_tombstones),
    UNIT_CASE(tables_take_records_whose_blocks_are_just_columns),
    UNIT_CASE(a_large_table_is_synced_in_parts),
    UNIT_CASE(tables_of_like_size_are_merged),
    UNIT_CASE(a_merge_takes_the_tables_of_like_size_only),
    UNIT_CASE(a_merge_may_leave_nothing_below_a_larger_table),
    UNIT_CASE(flushes_alone_do_not_pile_up_tables),
    UNIT_CASE(space_amp_max_is_kept),
    UNIT_CASE(space_is_bounded_under_steady_writes),
    UNIT_CASE(step_does_the_work_of_the_thread),
    UNIT_CASE(wait_idle_waits_for_all_of_it),
    UNIT_CASE(wait_idle_does_not_fail_beside_a_writer),
    UNIT_CASE(writers_wait_for_a_slow_background),
    UNIT_CASE(compaction_bytes_per_s_is_a_brake),
    UNIT_CASE(a_damaged_table_is_healed_from_memory),
    UNIT_CASE(a_damaged_sealed_log_is_healed_from_memory),
    UNIT_CASE(a_merge_over_a_damaged_table_heals_it),
    UNIT_CASE(a_heal_that_fails_is_tried_again),
    UNIT_CASE(a_background_error_is_kept_until_overcome),
    UNIT_CASE(writers_do_not_wait_for_a_background_that_keeps_failing),
    UNIT_CASE(a_log_ahead_that_cannot_be_made_is_made_later),
    UNIT_CASE(a_store_may_fail_during_a_step),
    UNIT_CASE(a_healthy_store_has_no_last_error),
    UNIT_CASE(close_does_not_wait_for_the_backlog),
    UNIT_CASE(close_does_not_wait_for_the_brake),
    UNIT_CASE(short_lives_do_not_pile_up_logs),
};

UNIT_MAIN(cases)
