/*
 * Cursors: where each mover stands, at and beyond both ends.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

#include <stdbool.h>

struct view {
    kvmeta *db;
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;
};

static void view_open(struct view *view, kvmeta *db)
{
    view->db = db;
    unit_ok(kvmeta_snapshot_take(db, &view->snapshot));
    unit_ok(kvmeta_cursor_open(view->snapshot, &view->cursor));
}

static void view_close(struct view *view)
{
    kvmeta_cursor_close(view->cursor);
    kvmeta_snapshot_release(view->snapshot);
    unit_close(view->db);
}

/* A store of the keys 10, 20, ... 10 * count. */
static struct view open_tens(struct unit *u, uint64_t count)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct view view;
    uint64_t i;

    for (i = 1; i <= count; i++) {
        unit_fill(db, 10 * i, 10 * i + 1, 0, KVMETA_BUFFERED);
    }
    view_open(&view, db);
    return view;
}

static void want_none(kvmeta_cursor *cursor, int rc)
{
    unit_is(rc, KVMETA_NOT_FOUND);
    assert_null(kvmeta_cursor_key(cursor));
    assert_null(kvmeta_cursor_value(cursor));
    unit_is(kvmeta_cursor_next(cursor), KVMETA_NOT_FOUND);
    unit_is(kvmeta_cursor_prev(cursor), KVMETA_NOT_FOUND);
    unit_is(kvmeta_cursor_next(cursor), KVMETA_NOT_FOUND);
    assert_null(kvmeta_cursor_key(cursor));
}

static void want_at(kvmeta_cursor *cursor, int rc, uint64_t number)
{
    unsigned char key[8], value[8];

    unit_ok(rc);
    unit_key(8, number, key);
    unit_value(8, number, value);
    assert_non_null(kvmeta_cursor_key(cursor));
    assert_memory_equal(kvmeta_cursor_key(cursor), key, 8);
    assert_memory_equal(kvmeta_cursor_value(cursor), value, 8);
}

static int seek(kvmeta_cursor *cursor, uint64_t number)
{
    unsigned char key[8];

    unit_key(8, number, key);
    return kvmeta_cursor_seek(cursor, key);
}

static int seek_le(kvmeta_cursor *cursor, uint64_t number)
{
    unsigned char key[8];

    unit_key(8, number, key);
    return kvmeta_cursor_seek_le(cursor, key);
}

/* Goal: a new cursor stands on no record, nor does any mover find one in an
 * empty store. */
static void a_cursor_over_nothing_finds_nothing(struct unit *u)
{
    struct view view = open_tens(u, 0);

    assert_null(kvmeta_cursor_key(view.cursor));
    want_none(view.cursor, kvmeta_cursor_next(view.cursor));
    want_none(view.cursor, kvmeta_cursor_prev(view.cursor));
    want_none(view.cursor, kvmeta_cursor_first(view.cursor));
    want_none(view.cursor, kvmeta_cursor_last(view.cursor));
    want_none(view.cursor, seek(view.cursor, 5));
    want_none(view.cursor, seek_le(view.cursor, 5));
    view_close(&view);
}

/* Goal: a new cursor must be placed before it moves. */
static void a_new_cursor_has_no_record(struct unit *u)
{
    struct view view = open_tens(u, 3);

    assert_null(kvmeta_cursor_key(view.cursor));
    assert_null(kvmeta_cursor_value(view.cursor));
    want_none(view.cursor, kvmeta_cursor_next(view.cursor));
    want_at(view.cursor, kvmeta_cursor_first(view.cursor), 10);
    view_close(&view);
}

/* Goal: a full walk in both directions sees every record once, in order, and
 * past either end there is none until the cursor is placed anew. */
static void walks_end_on_no_record(struct unit *u)
{
    uint64_t n = 5000, i;
    struct view view = open_tens(u, n);

    want_at(view.cursor, kvmeta_cursor_first(view.cursor), 10);
    for (i = 2; i <= n; i++) {
        want_at(view.cursor, kvmeta_cursor_next(view.cursor), 10 * i);
    }
    want_none(view.cursor, kvmeta_cursor_next(view.cursor));
    want_at(view.cursor, kvmeta_cursor_last(view.cursor), 10 * n);
    for (i = n - 1; i >= 1; i--) {
        want_at(view.cursor, kvmeta_cursor_prev(view.cursor), 10 * i);
    }
    want_none(view.cursor, kvmeta_cursor_prev(view.cursor));
    want_at(view.cursor, seek(view.cursor, 10), 10);
    view_close(&view);
}

enum { WIDE = KVMETA_KEY_BYTES_MAX, WIDE_COUNT = 3000 };

static void want_wide(kvmeta_cursor *cursor, int rc, uint64_t number)
{
    unsigned char key[WIDE];

    unit_ok(rc);
    unit_key(WIDE, number, key);
    assert_memory_equal(kvmeta_cursor_key(cursor), key, WIDE);
}

/* The store has those keys below WIDE_COUNT that `left` says. */
static void walk_wide(kvmeta *db, bool left(uint64_t))
{
    uint64_t last = WIDE_COUNT - 1, i;
    struct view view;

    view_open(&view, db);
    want_wide(view.cursor, kvmeta_cursor_first(view.cursor), 0);
    for (i = 1; i < WIDE_COUNT; i++)
        if (left(i)) want_wide(view.cursor, kvmeta_cursor_next(view.cursor), i);
    unit_is(kvmeta_cursor_next(view.cursor), KVMETA_NOT_FOUND);
    while (!left(last)) last--;
    want_wide(view.cursor, kvmeta_cursor_last(view.cursor), last);
    for (i = last; i-- > 0;)
        if (left(i)) want_wide(view.cursor, kvmeta_cursor_prev(view.cursor), i);
    unit_is(kvmeta_cursor_prev(view.cursor), KVMETA_NOT_FOUND);
    kvmeta_cursor_close(view.cursor);
    kvmeta_snapshot_release(view.snapshot);
}

static bool left_all(uint64_t i)
{
    return i < WIDE_COUNT;
}

/* Of two parents of 16 leaves of 7 records, one loses what is in its middle;
 * the other is too full for what is left of it. */
static bool left_of_some_parents(uint64_t i)
{
    return i % 224 < 114 || i % 224 >= 222;
}

static bool left_few(uint64_t i)
{
    return i % 29 == 0;
}

static void remove_wide(kvmeta *db, bool left(uint64_t))
{
    unsigned char key[WIDE];

    for (uint64_t i = 0; i < WIDE_COUNT; i++) {
        unit_key(WIDE, i, key);
        if (!left(i) && kvmeta_has(db, key) == KVMETA_OK)
            unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    }
}

/* Goal: walks cross many levels, and parents that are left with a leaf or two,
 * in both directions. Method: the widest keys, of which a node holds few. */
static void walks_cross_parents_of_few_leaves(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, WIDE, 0);
    unsigned char key[WIDE];
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    for (unsigned way = 0; way < 2; way++) {
        bool (*left)(uint64_t) = way ? left_few : left_of_some_parents;

        unit_remove_tree(u->dir);
        db = unit_open(u, &options);
        for (uint64_t i = 0; i < WIDE_COUNT; i++) {
            unit_key(WIDE, i, key);
            unit_ok(kvmeta_put(db, key, NULL, KVMETA_BUFFERED));
        }
        walk_wide(db, left_all);
        remove_wide(db, left);
        walk_wide(db, left);
        unit_close(db);
    }
}

/* Goal: seek and seek_le stand right on, between, below and above all keys,
 * and next and prev go on from there, turning as often as asked. */
static void seeks_find_the_neighbours(struct unit *u)
{
    uint64_t n = 1500, i;
    struct view view = open_tens(u, n);
    kvmeta_cursor *cursor = view.cursor;

    for (i = 1; i <= n; i++) {
        want_at(cursor, seek(cursor, 10 * i), 10 * i);
        want_at(cursor, seek_le(cursor, 10 * i), 10 * i);
        want_at(cursor, seek(cursor, 10 * i - 1), 10 * i);
        want_at(cursor, seek(cursor, 10 * i - 9), 10 * i);
        want_at(cursor, seek_le(cursor, 10 * i + 1), 10 * i);
        want_at(cursor, seek_le(cursor, 10 * i + 9), 10 * i);
        if (i > 1 && i < n) {
            want_at(cursor, kvmeta_cursor_next(cursor), 10 * i + 10);
            want_at(cursor, kvmeta_cursor_prev(cursor), 10 * i);
            want_at(cursor, kvmeta_cursor_prev(cursor), 10 * i - 10);
            want_at(cursor, kvmeta_cursor_next(cursor), 10 * i);
        }
    }
    want_none(cursor, seek_le(cursor, 9));
    want_none(cursor, seek_le(cursor, 0));
    want_none(cursor, seek(cursor, 10 * n + 1));
    want_none(cursor, seek(cursor, UINT64_MAX));
    want_at(cursor, seek_le(cursor, UINT64_MAX), 10 * n);
    want_at(cursor, seek(cursor, 0), 10);
    view_close(&view);
}

/* Goal: keys that agree in their first eight bytes, or for most of their
 * length, are told apart in every way there is. Method: 20-byte keys, six
 * heads, under each of them 300 that differ only in byte 19 or before. */
static void keys_with_equal_heads_are_told_apart(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 20, 4);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[20], value[4], got[4];
    struct view view;
    uint64_t i, n = 1800;

    for (i = 0; i < n; i++) {
        unit_key(20, i * 7 % n % 300, key);
        key[3] = (unsigned char)(i * 7 % n / 300);
        unit_value(4, i * 7 % n, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    view_open(&view, db);
    for (i = 0; i < n; i++) {
        unit_key(20, i % 300, key);
        key[3] = (unsigned char)(i / 300);
        unit_value(4, i, value);
        unit_ok(i == 0 ? kvmeta_cursor_first(view.cursor)
                       : kvmeta_cursor_next(view.cursor));
        assert_memory_equal(kvmeta_cursor_key(view.cursor), key, 20);
        assert_memory_equal(kvmeta_cursor_value(view.cursor), value, 4);
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, value, 4);
        key[10] = 1;
        unit_is(kvmeta_get(db, key, got), KVMETA_NOT_FOUND);
    }
    unit_is(kvmeta_cursor_next(view.cursor), KVMETA_NOT_FOUND);
    view_close(&view);
}

/* Goal: so are keys that begin with the largest number there is, which also
 * stands where a node has no key. Method: the last bytes alone differ; one
 * key in two is not there. */
static void keys_with_the_largest_head_are_told_apart(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 12, 4);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[12], value[4], got[4];
    uint64_t i;

    memset(key, 0xff, sizeof key);
    for (i = 0; i < 600; i++) {
        unit_key(4, i * 7 % 600 * 2, key + 8);
        unit_value(4, i * 7 % 600, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_sync(db));
    for (i = 0; i < 600; i++) {
        unit_key(4, 2 * i, key + 8);
        unit_value(4, i, value);
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, value, 4);
        unit_key(4, 2 * i + 1, key + 8);
        unit_is(kvmeta_get(db, key, got), KVMETA_NOT_FOUND);
    }
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: what the header has inline is in the library, too, and does the same.
 * Method: scan by the address of each; crossing is asked for at every record,
 * not only at the end of a leaf, as a caller without the header may. */
static void inline_functions_are_in_the_library(struct unit *u)
{
    int (*volatile next)(kvmeta_cursor *) = kvmeta_cursor_next;
    const void *(*volatile key)(const kvmeta_cursor *) = kvmeta_cursor_key;
    const void *(*volatile value)(const kvmeta_cursor *) = kvmeta_cursor_value;
    void (*volatile to_key)(uint64_t, void *) = kvmeta_u64_to_key;
    struct view view = open_tens(u, 500);
    kvmeta_cursor *other;
    unsigned char number[8];
    uint64_t i;

    unit_ok(kvmeta_cursor_open(view.snapshot, &other));
    unit_ok(kvmeta_cursor_first(view.cursor));
    unit_ok(kvmeta_cursor_first(other));
    for (i = 1; i <= 500; i++) {
        want_at(view.cursor, KVMETA_OK, 10 * i);
        want_at(other, KVMETA_OK, 10 * i);
        assert_ptr_equal(key(view.cursor), kvmeta_cursor_key(view.cursor));
        assert_ptr_equal(value(view.cursor),
                         kvmeta_cursor_value(view.cursor));
        unit_is(next(view.cursor), i < 500 ? KVMETA_OK : KVMETA_NOT_FOUND);
        unit_is(kvmeta_cursor_cross(other),
                i < 500 ? KVMETA_OK : KVMETA_NOT_FOUND);
    }
    want_none(other, kvmeta_cursor_cross(other));
    to_key(0x0102030405060708, number);
    assert_memory_equal(number, "\1\2\3\4\5\6\7\10", 8);
    kvmeta_cursor_close(other);
    view_close(&view);
}

/* Goal: a value's address is good until the snapshot is released, though the
 * cursor moves on and is closed, and the record is replaced and compacted. */
static void values_are_valid_until_the_snapshot_is_released(struct unit *u)
{
    struct view view = open_tens(u, 500);
    const unsigned char *values[500];
    unsigned char want[8];
    uint64_t i;

    for (i = 0; i < 500; i++) {
        unit_ok(seek(view.cursor, 10 * i + 10));
        values[i] = kvmeta_cursor_value(view.cursor);
    }
    kvmeta_cursor_close(view.cursor);
    view.cursor = NULL;
    for (i = 0; i < 500; i++) {
        unit_fill(view.db, 10 * i + 10, 10 * i + 11, 3, KVMETA_BUFFERED);
    }
    unit_ok(kvmeta_compact(view.db));
    for (i = 0; i < 500; i++) {
        unit_value(8, 10 * i + 10, want);
        assert_memory_equal(values[i], want, 8);
    }
    view_close(&view);
}

/* Goal: several cursors on one snapshot do not disturb each other. */
static void cursors_of_one_snapshot_are_independent(struct unit *u)
{
    struct view view = open_tens(u, 300);
    kvmeta_cursor *other;
    uint64_t i;

    unit_ok(kvmeta_cursor_open(view.snapshot, &other));
    unit_ok(kvmeta_cursor_first(view.cursor));
    unit_ok(kvmeta_cursor_last(other));
    for (i = 2; i <= 300; i++) {
        want_at(view.cursor, kvmeta_cursor_next(view.cursor), 10 * i);
        want_at(other, kvmeta_cursor_prev(other), 10 * (301 - i));
    }
    kvmeta_cursor_close(other);
    want_none(view.cursor, kvmeta_cursor_next(view.cursor));
    view_close(&view);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_cursor_over_nothing_finds_nothing),
    UNIT_CASE(a_new_cursor_has_no_record),
    UNIT_CASE(walks_end_on_no_record),
    UNIT_CASE(walks_cross_parents_of_few_leaves),
    UNIT_CASE(seeks_find_the_neighbours),
    UNIT_CASE(keys_with_equal_heads_are_told_apart),
    UNIT_CASE(keys_with_the_largest_head_are_told_apart),
    UNIT_CASE(inline_functions_are_in_the_library),
    UNIT_CASE(values_are_valid_until_the_snapshot_is_released),
    UNIT_CASE(cursors_of_one_snapshot_are_independent),
};

UNIT_MAIN(cases)
