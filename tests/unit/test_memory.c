/*
 * Memory that runs out: each request for memory of an operation is refused in
 * turn. The operation fails with KVMETA_E_NOMEM, or does without; nothing is
 * lost, and once there is memory it works.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

/* Refuses the request `at`, counted from now; 0: none. */
static void refuse(struct unit *u, uint64_t at)
{
    u->alloc.fail_at = at ? atomic_load(&u->alloc.calls) + at : 0;
}

/* Was the request asked for, and refused? */
static int refused(struct unit *u)
{
    return atomic_load(&u->alloc.calls) >= u->alloc.fail_at;
}

/* Flushes or compacts with the at-th request refused: that one call fails, and
 * the next one makes up for it. Returns whether there was such a request. */
static int fails_alone(struct unit *u, kvmeta *db, int (*call)(kvmeta *),
                       uint64_t at)
{
    int hit, rc;

    refuse(u, at);
    rc = call(db);
    hit = refused(u);
    refuse(u, 0);
    unit_is(rc, hit ? KVMETA_E_NOMEM : KVMETA_OK);
    unit_ok(kvmeta_compact(db));
    return hit;
}

/* --------------------------------------------------------------------------
 * The background
 * -------------------------------------------------------------------------- */

/* Goal: a flush without memory is an error of the flush alone. */
static void a_flush_without_memory_fails_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_digest digest;
    kvmeta *db;
    uint64_t at;
    int hit = 1;

    options.vfs = unit_unsynced(u);
    db = unit_open(u, &options);
    for (at = 1; hit; at++) {
        unit_fill_random(db, 0, 2000, at);
        digest = kvmeta_digest(db);
        hit = fails_alone(u, db, kvmeta_flush, at);
        unit_ok(kvmeta_last_error(db, NULL));
        unit_same_digest(kvmeta_digest(db), digest);
        assert_int_equal(unit_stats(db).table_records, 2000);
    }
    assert_true(at > 10);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: the same of a small table, which is put together in a buffer that
 * grows with it, up to the footer. Method: so many bytes that no size of the
 * buffer has room for the block, the index, and the footer, but one has for
 * the first two. */
static void a_flush_without_memory_for_the_footer_fails_alone(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 212);
    struct test_rng rng = {test_args.seed};
    unsigned char key[8], value[212];
    kvmeta *db;
    uint64_t at, i;
    int hit = 1;

    options.flags = KVMETA_NO_THREAD;
    options.vfs = unit_unsynced(u);
    db = unit_open(u, &options);
    for (at = 1; hit; at++) {
        for (i = 0; i < 4; i++) {
            unit_key(8, i, key);
            test_rng_bytes(&rng, value, sizeof value);
            unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
        }
        hit = fails_alone(u, db, kvmeta_flush, at);
        assert_int_equal(unit_stats(db).table_records, 4);
    }
    assert_true(at > 10);
    unit_close(db);
}

/* Goal: so is a merge. */
static void a_merge_without_memory_fails_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_digest digest;
    kvmeta *db;
    uint64_t at;
    int hit = 1;

    options.vfs = unit_unsynced(u);
    db = unit_open(u, &options);
    for (at = 1; hit; at++) {
        unit_fill_random(db, 0, 1000, at);
        unit_ok(kvmeta_flush(db));
        unit_fill_random(db, 500, 1500, at);
        unit_ok(kvmeta_flush(db));
        digest = kvmeta_digest(db);
        hit = fails_alone(u, db, kvmeta_compact, at);
        unit_same_digest(kvmeta_digest(db), digest);
        assert_int_equal(unit_stats(db).table_records, 1500);
    }
    assert_true(at > 10);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Writes beside a snapshot, which need a version of their own
 * -------------------------------------------------------------------------- */

/* Goal: beside a snapshot a buffered put, or batch, without memory changes
 * nothing; a put that is refused only what waiting for others needs does
 * without. Method: each of some requests alone, then it and all that follow. */
static void check_beside_a_snapshot(struct unit *u, size_t n, int ever)
{
    unsigned char keys[2][8];
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_op ops[2];
    kvmeta_snapshot *snapshot;
    kvmeta *db = unit_open(u, &options);
    uint64_t count = 100;
    int round, failed = 0, hits = 0;

    unit_fill(db, 0, count, 0, KVMETA_BUFFERED);
    for (round = 0; round < 12; round++) {
        size_t i;
        int rc, hit;

        unit_ok(kvmeta_snapshot_take(db, &snapshot));
        for (i = 0; i < n; i++) {
            unit_key(8, count + i, keys[i]);
            ops[i] = (struct kvmeta_op){KVMETA_OP_PUT, keys[i], keys[i]};
        }
        u->alloc.fail_ever = ever;
        refuse(u, 1 + (uint64_t)round % 2);
        rc = kvmeta_write(db, ops, n, KVMETA_BUFFERED, NULL);
        hit = refused(u);
        refuse(u, 0);
        u->alloc.fail_ever = 0;
        assert_true(rc == KVMETA_OK || (hit && rc == KVMETA_E_NOMEM));
        if (!rc) count += n;
        failed += rc != KVMETA_OK;
        hits += hit;
        assert_true(kvmeta_count(db) == count);
        unit_ok(kvmeta_verify(db, NULL));
        kvmeta_snapshot_release(snapshot);
    }
    assert_true(hits > 0);
    if (n > 1 || ever) assert_true(failed > 0);
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == count);
    unit_close(db);
    unit_remove_tree(u->dir);
}

static void writes_beside_a_snapshot_without_memory_fail_alone(struct unit *u)
{
    check_beside_a_snapshot(u, 1, 0);
    check_beside_a_snapshot(u, 1, 1);
    check_beside_a_snapshot(u, 2, 0);
}

/* --------------------------------------------------------------------------
 * Open
 * -------------------------------------------------------------------------- */

/* Logs and tables, three levels of nodes, and files that nobody knows. */
static void make_store(struct unit *u, const struct kvmeta_options *options)
{
    static unsigned char key[255], junk[600];
    kvmeta *db = unit_open(u, options);
    uint64_t i;

    for (i = 0; i < 1600; i++) {
        unit_key(sizeof key, i * 7 % 1600, key);
        unit_ok(kvmeta_put(db, key, NULL, KVMETA_BUFFERED));
        if (i % 500 == 499) unit_ok(kvmeta_flush(db));
    }
    unit_close(db);
    unit_write_path(unit_path(u, "w00000000000000ff.wal"), junk, sizeof junk);
    unit_write_path(unit_path(u, "t00000000000000fe.tab"), junk, sizeof junk);
}

/* Goal: an open without memory fails and leaves nothing. */
static void an_open_without_memory_leaves_nothing(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 255, 0);
    uint64_t at;
    int hit = 1;

    options.open_threads = 1;
    options.flags = KVMETA_NO_THREAD;
    make_store(u, &options);
    options.flags = KVMETA_READ_ONLY;
    for (at = 1; hit; at++) {
        kvmeta *db = NULL;
        int rc;

        refuse(u, at);
        rc = kvmeta_open(u->dir, &options, &db, &u->err);
        hit = refused(u);
        refuse(u, 0);
        unit_is(rc, hit ? KVMETA_E_NOMEM : KVMETA_OK);
        assert_true((db == NULL) == hit);
        if (db) assert_int_equal(kvmeta_count(db), 1600);
        if (db) unit_close(db);
        else assert_int_equal(atomic_load(&u->alloc.live_blocks), 0);
    }
    assert_true(at > 30);
}

/* Goal: writes that need no memory of their own ask for none: what each of
 * them reserves is there since the last. Method: replace values in a store
 * that is small enough for its nodes to come in small pieces. */
static void overwrites_ask_for_no_memory(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    uint64_t calls;
    kvmeta *db;

    options.vfs = unit_unsynced(u);
    db = unit_open(u, &options);
    unit_fill_random(db, 0, 20000, 1);
    calls = atomic_load(&u->alloc.calls);
    unit_fill_random(db, 0, 20000, 2);
    assert_int_equal(atomic_load(&u->alloc.calls), calls);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_flush_without_memory_fails_alone),
    UNIT_CASE(a_flush_without_memory_for_the_footer_fails_alone),
    UNIT_CASE(a_merge_without_memory_fails_alone),
    UNIT_CASE(writes_beside_a_snapshot_without_memory_fail_alone),
    UNIT_CASE(overwrites_ask_for_no_memory),
    UNIT_CASE(an_open_without_memory_leaves_nothing),
};

UNIT_MAIN(cases)
