/*
 * Snapshots: the state of one moment, whatever is written afterwards.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

/* Compares a snapshot of an 8/8 store with from <= key < to, values of
 * key + salt, by get, get_many and a full walk. */
static void want_snapshot(kvmeta_snapshot *snapshot, uint64_t from,
                          uint64_t to, uint64_t salt)
{
    unsigned char key[8], value[8], got[8], found;
    kvmeta_cursor *cursor;
    uint64_t i;

    assert_true(kvmeta_snapshot_count(snapshot) == to - from);
    unit_ok(kvmeta_cursor_open(snapshot, &cursor));
    for (i = from; i < to; i++) {
        unit_key(8, i, key);
        unit_value(8, i + salt, value);
        unit_ok(kvmeta_snapshot_get(snapshot, key, got));
        assert_memory_equal(got, value, 8);
        memset(got, 0, 8);
        unit_ok(kvmeta_snapshot_get_many(snapshot, key, 1, got, &found));
        assert_true(found == 1);
        assert_memory_equal(got, value, 8);
        unit_ok(i == from ? kvmeta_cursor_first(cursor)
                          : kvmeta_cursor_next(cursor));
        assert_memory_equal(kvmeta_cursor_key(cursor), key, 8);
        assert_memory_equal(kvmeta_cursor_value(cursor), value, 8);
    }
    unit_is(from == to ? kvmeta_cursor_first(cursor)
                       : kvmeta_cursor_next(cursor), KVMETA_NOT_FOUND);
    kvmeta_cursor_close(cursor);
    unit_key(8, to, key);
    unit_is(kvmeta_snapshot_get(snapshot, key, got), KVMETA_NOT_FOUND);
}

/* Goal: a snapshot stays as it is over replacements, removals, inserts,
 * flush and compaction; its number and digest are those of its moment. */
static void a_snapshot_stays_as_it_was(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_digest digest;
    kvmeta_snapshot *snapshot;
    unsigned char key[8];
    uint64_t i, seq;

    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    digest = kvmeta_digest(db);
    seq = unit_stats(db).seq;
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_fill(db, 0, 500, 7, KVMETA_BUFFERED);
    for (i = 500; i < 900; i++) {
        unit_key(8, i, key);
        unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    }
    want_snapshot(snapshot, 0, 1000, 0);
    unit_ok(kvmeta_flush(db));
    unit_fill(db, 2000, 6000, 0, KVMETA_WRITTEN);
    unit_ok(kvmeta_compact(db));
    want_snapshot(snapshot, 0, 1000, 0);
    assert_true(kvmeta_snapshot_seq(snapshot) == seq);
    unit_same_digest(kvmeta_snapshot_digest(snapshot), digest);
    assert_true(kvmeta_count(db) == 1000 - 400 + 4000);
    kvmeta_snapshot_release(snapshot);
    unit_holds(db, 0, 500, 7);
    unit_holds(db, 2000, 6000, 0);
    unit_close(db);
}

/* Goal: many snapshots of different moments at once, released in any order,
 * each of them exact. Method: one per generation of values; after each
 * release all that are left are compared. */
static void many_snapshots_are_independent(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct test_rng rng = {test_args.seed};
    kvmeta_snapshot *snapshots[20];
    uint64_t order[20], i, j, other;

    for (i = 0; i < 20; i++) {
        unit_fill(db, 0, 200, 1000 * i, KVMETA_BUFFERED);
        unit_ok(kvmeta_snapshot_take(db, &snapshots[i]));
        order[i] = i;
    }
    assert_true(unit_stats(db).snapshots == 20);
    for (i = 0; i < 20; i++) {
        other = i + test_rng_below(&rng, 20 - i);
        j = order[other];
        order[other] = order[i];
        order[i] = j;
        kvmeta_snapshot_release(snapshots[j]);
        for (other = i + 1; other < 20; other++) {
            want_snapshot(snapshots[order[other]], 0, 200,
                          1000 * order[other]);
        }
        unit_fill(db, 0, 200, i, KVMETA_BUFFERED);
    }
    assert_true(unit_stats(db).snapshots == 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: statistics know the snapshots, the oldest, and what they pin; after
 * the release the memory is no longer pinned. */
static void snapshots_are_counted_and_their_memory_let_go(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    kvmeta_snapshot *a, *b;
    struct kvmeta_stats s;
    uint64_t first;

    unit_fill(db, 0, 5000, 0, KVMETA_BUFFERED);
    s = unit_stats(db);
    assert_true(s.snapshots == 0 && s.oldest_snapshot_seq == 0);
    first = s.seq;
    unit_ok(kvmeta_snapshot_take(db, &a));
    unit_fill(db, 0, 5000, 1, KVMETA_BUFFERED);
    unit_ok(kvmeta_snapshot_take(db, &b));
    unit_fill(db, 0, 5000, 2, KVMETA_BUFFERED);
    s = unit_stats(db);
    assert_true(s.snapshots == 2 && s.oldest_snapshot_seq == first);
    assert_true(s.pinned_bytes >= 5000 * 16);
    assert_true(s.versions_copied > 0);
    kvmeta_snapshot_release(a);
    s = unit_stats(db);
    assert_true(s.snapshots == 1 && s.oldest_snapshot_seq > first);
    kvmeta_snapshot_release(b);
    unit_fill(db, 0, 10, 3, KVMETA_BUFFERED);
    s = unit_stats(db);
    assert_true(s.snapshots == 0 && s.oldest_snapshot_seq == 0);
    assert_true(s.pinned_bytes < 5000 * 16);
    unit_close(db);
}

/* Goal: close is refused while a snapshot lives, and the handle goes on. */
static void close_with_a_snapshot_is_refused(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    kvmeta *db = unit_open(u, &options);
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;

    unit_fill(db, 0, 10, 0, 0);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_ok(kvmeta_cursor_open(snapshot, &cursor));
    unit_is(kvmeta_close(db), KVMETA_E_INVALID);
    kvmeta_cursor_close(cursor);
    unit_is(kvmeta_close(db), KVMETA_E_INVALID);
    unit_fill(db, 10, 20, 0, 0);
    unit_holds(db, 0, 20, 0);
    unit_ok(kvmeta_flush(db));
    want_snapshot(snapshot, 0, 10, 0);
    kvmeta_snapshot_release(snapshot);
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 20);
    unit_close(db);
}

/* Goal: a snapshot of nothing is empty and stays so. */
static void a_snapshot_of_an_empty_store_is_empty(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_digest empty = kvmeta_digest(db);
    kvmeta_snapshot *snapshot;

    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_fill(db, 0, 100, 0, 0);
    want_snapshot(snapshot, 0, 0, 0);
    unit_same_digest(kvmeta_snapshot_digest(snapshot), empty);
    kvmeta_snapshot_release(snapshot);
    unit_close(db);
}

/* Goal: no memory for a snapshot or a cursor is an answer, nothing else. */
static void a_snapshot_without_memory_fails_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    kvmeta_snapshot *snapshot = NULL, *taken;
    kvmeta_cursor *cursor = NULL;

    unit_fill(db, 0, 100, 0, 0);
    u->alloc.fail_at = atomic_load(&u->alloc.calls) + 1;
    u->alloc.fail_ever = 1;
    unit_is(kvmeta_snapshot_take(db, &snapshot), KVMETA_E_NOMEM);
    u->alloc.fail_at = 0;
    assert_null(snapshot);
    unit_ok(kvmeta_snapshot_take(db, &taken));
    u->alloc.fail_at = atomic_load(&u->alloc.calls) + 1;
    unit_is(kvmeta_cursor_open(taken, &cursor), KVMETA_E_NOMEM);
    u->alloc.fail_at = 0;
    assert_null(cursor);
    want_snapshot(taken, 0, 100, 0);
    kvmeta_snapshot_release(taken);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_snapshot_stays_as_it_was),
    UNIT_CASE(many_snapshots_are_independent),
    UNIT_CASE(snapshots_are_counted_and_their_memory_let_go),
    UNIT_CASE(close_with_a_snapshot_is_refused),
    UNIT_CASE(a_snapshot_of_an_empty_store_is_empty),
    UNIT_CASE(a_snapshot_without_memory_fails_alone),
};

UNIT_MAIN(cases)
