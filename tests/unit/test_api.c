/*
 * The interface, function by function: results, NULL, single reads and writes,
 * statistics, integer keys.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

#include <limits.h>

/* --------------------------------------------------------------------------
 * What needs no store
 * -------------------------------------------------------------------------- */

/* Goal: the library says which version it is, and it is the header's. */
static void version_is_that_of_the_header(struct unit *u)
{
    char text[32];

    (void)u;
    snprintf(text, sizeof text, "%d.%d.%d", KVMETA_VERSION_MAJOR,
             KVMETA_VERSION_MINOR, KVMETA_VERSION_PATCH);
    assert_string_equal(kvmeta_version(), text);
    assert_string_equal(kvmeta_version(), KVMETA_VERSION_STRING);
}

/* Goal: each result has a name of its own, and no number crashes it.
 * Method: all pairs of known codes differ; unknown ones share one text. */
static void strerror_names_each_code_differently(struct unit *u)
{
    static const int unknown[] = {3, 4, -13, -14, 1000, INT_MAX, INT_MIN};
    int a, b;
    size_t i;

    (void)u;
    for (a = KVMETA_E_FORKED; a <= KVMETA_CONFLICT; a++) {
        assert_non_null(kvmeta_strerror(a));
        assert_true(strlen(kvmeta_strerror(a)) > 0);
        for (b = KVMETA_E_FORKED; b < a; b++) {
            assert_string_not_equal(kvmeta_strerror(a), kvmeta_strerror(b));
        }
    }
    for (i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        assert_non_null(kvmeta_strerror(unknown[i]));
        assert_string_equal(kvmeta_strerror(unknown[i]), kvmeta_strerror(99));
        assert_string_not_equal(kvmeta_strerror(unknown[i]),
                                kvmeta_strerror(KVMETA_OK));
    }
}

/* Goal: integer keys are big-endian, so memcmp orders them as numbers, from
 * any address. Method: powers of two and their neighbours, all pairs. */
static void integer_keys_order_as_their_numbers(struct unit *u)
{
    static const unsigned char want[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    unsigned char a[9], b[9];
    uint64_t numbers[192];
    size_t i, j;

    (void)u;
    kvmeta_u64_to_key(0x0102030405060708u, a + 1);
    assert_memory_equal(a + 1, want, 8);
    for (i = 0; i < 64; i++) {
        numbers[3 * i] = ((uint64_t)1 << i) - 1;
        numbers[3 * i + 1] = (uint64_t)1 << i;
        numbers[3 * i + 2] = UINT64_MAX - ((uint64_t)1 << i);
    }
    for (i = 0; i < 192; i++) {
        kvmeta_u64_to_key(numbers[i], a + 1);
        assert_true(kvmeta_key_to_u64(a + 1) == numbers[i]);
        for (j = 0; j < 192; j++) {
            kvmeta_u64_to_key(numbers[j], b + 1);
            assert_int_equal(memcmp(a + 1, b + 1, 8) < 0,
                             numbers[i] < numbers[j]);
        }
    }
}

/* Goal: options_init sets the widths and the size, and zero elsewhere. */
static void options_init_sets_widths_and_zeros(struct unit *u)
{
    struct kvmeta_options options;
    struct kvmeta_options want;

    (void)u;
    memset(&options, 0xff, sizeof options);
    kvmeta_options_init(&options, 12, 34);
    assert_int_equal(options.struct_size, sizeof options);
    assert_int_equal(options.key_bytes, 12);
    assert_int_equal(options.value_bytes, 34);
    memset(&want, 0, sizeof want);
    want.struct_size = sizeof want;
    want.key_bytes = 12;
    want.value_bytes = 34;
    assert_memory_equal(&options, &want,
                        offsetof(struct kvmeta_options, space_amp_max));
    assert_true(options.realloc_fn == NULL && options.log_fn == NULL);
    assert_true(options.user == NULL && options.vfs == NULL);
    assert_true(options.space_amp_max >= 0 && options.space_amp_max <= 0);
}

/* --------------------------------------------------------------------------
 * NULL where it is not allowed, and where it is
 * -------------------------------------------------------------------------- */

static int scan_never(void *user, const void *key, const void *value)
{
    (void)user, (void)key, (void)value;
    return 99;
}

static void null_handles_are_refused(struct unit *u)
{
    unsigned char b[8] = {0}, found;
    struct kvmeta_op op = {KVMETA_OP_PUT, b, b};
    struct kvmeta_stats stats = {0};
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;
    kvmeta_batch *batch;
    int did;

    (void)u;
    stats.struct_size = sizeof stats;
    unit_is(kvmeta_get(NULL, b, b), KVMETA_E_INVALID);
    unit_is(kvmeta_has(NULL, b), KVMETA_E_INVALID);
    unit_is(kvmeta_get_many(NULL, b, 1, b, &found), KVMETA_E_INVALID);
    unit_is(kvmeta_scan(NULL, b, b, scan_never, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_put(NULL, b, b, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_remove(NULL, b, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_swap(NULL, b, b, b, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_write(NULL, &op, 1, 0, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_new(NULL, &batch), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_put(NULL, b, b), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_remove(NULL, b), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_expect(NULL, b, b), KVMETA_E_INVALID);
    unit_is(kvmeta_commit(NULL, NULL, 0, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_snapshot_take(NULL, &snapshot), KVMETA_E_INVALID);
    unit_is(kvmeta_snapshot_get(NULL, b, b), KVMETA_E_INVALID);
    unit_is(kvmeta_snapshot_get_many(NULL, b, 1, b, &found),
            KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_open(NULL, &cursor), KVMETA_E_INVALID);
    unit_is(kvmeta_sync(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_flush(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_compact(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_wait_idle(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_step(NULL, &did), KVMETA_E_INVALID);
    unit_is(kvmeta_verify(NULL, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_last_error(NULL, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_stats(NULL, &stats), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_first(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_last(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_seek(NULL, b), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_seek_le(NULL, b), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_next(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_prev(NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_cross(NULL), KVMETA_E_INVALID);
}

/* Goal: what cannot fail answers of no handle as of an empty one. */
static void null_handles_are_empty(struct unit *u)
{
    const struct kvmeta_digest none = {0, 0};

    (void)u;
    assert_int_equal(kvmeta_count(NULL), 0);
    unit_same_digest(kvmeta_digest(NULL), none);
    assert_int_equal(kvmeta_snapshot_count(NULL), 0);
    assert_int_equal(kvmeta_snapshot_seq(NULL), 0);
    unit_same_digest(kvmeta_snapshot_digest(NULL), none);
    assert_null(kvmeta_cursor_key(NULL));
    assert_null(kvmeta_cursor_value(NULL));
    assert_int_equal(kvmeta_batch_count(NULL), 0);
    kvmeta_batch_clear(NULL);
    kvmeta_options_init(NULL, 8, 8);
}

/* Goal: what may be NULL may be. */
static void null_is_allowed_where_the_header_says_so(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8] = {0};
    kvmeta *db = unit_open(u, &options);

    unit_ok(kvmeta_close(NULL));
    kvmeta_batch_free(NULL);
    kvmeta_snapshot_release(NULL);
    kvmeta_cursor_close(NULL);
    unit_is(kvmeta_swap(db, key, key, NULL, 0), KVMETA_NOT_FOUND);
    unit_ok(kvmeta_swap(db, key, key, NULL, 0));
    unit_ok(kvmeta_write(db, NULL, 0, 0, NULL));
    unit_ok(kvmeta_verify(db, NULL));
    unit_ok(kvmeta_last_error(db, NULL));
    unit_close(db);
    unit_is(kvmeta_open(NULL, &options, &db, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_open(u->dir, NULL, &db, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_open(u->dir, &options, NULL, NULL), KVMETA_E_INVALID);
}

static void null_arguments_are_refused(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    unsigned char b[8] = {0}, found;
    struct kvmeta_op no_key = {KVMETA_OP_REMOVE, NULL, NULL};
    struct kvmeta_op no_value = {KVMETA_OP_PUT, b, NULL};
    struct kvmeta_stats no_size = {0};
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;
    kvmeta_batch *batch;

    unit_is(kvmeta_get(db, NULL, b), KVMETA_E_INVALID);
    unit_is(kvmeta_get(db, b, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_has(db, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_get_many(db, NULL, 1, b, &found), KVMETA_E_INVALID);
    unit_is(kvmeta_get_many(db, b, 1, NULL, &found), KVMETA_E_INVALID);
    unit_is(kvmeta_get_many(db, b, 1, b, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_scan(db, NULL, NULL, NULL, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_put(db, NULL, b, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_put(db, b, NULL, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_remove(db, NULL, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_swap(db, NULL, b, b, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_swap(db, b, NULL, b, 0), KVMETA_E_INVALID);
    unit_is(kvmeta_write(db, NULL, 1, 0, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_write(db, &no_key, 1, 0, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_write(db, &no_value, 1, 0, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_new(db, NULL), KVMETA_E_INVALID);
    unit_ok(kvmeta_batch_new(db, &batch));
    unit_is(kvmeta_batch_put(batch, NULL, b), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_put(batch, b, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_remove(batch, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_batch_expect(batch, NULL, b), KVMETA_E_INVALID);
    assert_int_equal(kvmeta_batch_count(batch), 0);
    unit_is(kvmeta_commit(db, NULL, 0, NULL), KVMETA_E_INVALID);
    kvmeta_batch_free(batch);
    unit_is(kvmeta_snapshot_take(db, NULL), KVMETA_E_INVALID);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_is(kvmeta_snapshot_get(snapshot, NULL, b), KVMETA_E_INVALID);
    unit_is(kvmeta_snapshot_get(snapshot, b, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_open(snapshot, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_snapshot_get_many(snapshot, NULL, 1, b, &found),
            KVMETA_E_INVALID);
    unit_is(kvmeta_snapshot_get_many(snapshot, b, 1, NULL, &found),
            KVMETA_E_INVALID);
    unit_is(kvmeta_snapshot_get_many(snapshot, b, 1, b, NULL),
            KVMETA_E_INVALID);
    unit_ok(kvmeta_cursor_open(snapshot, &cursor));
    unit_is(kvmeta_cursor_seek(cursor, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_cursor_seek_le(cursor, NULL), KVMETA_E_INVALID);
    kvmeta_cursor_close(cursor);
    kvmeta_snapshot_release(snapshot);
    unit_is(kvmeta_step(db, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_stats(db, NULL), KVMETA_E_INVALID);
    unit_is(kvmeta_stats(db, &no_size), KVMETA_E_INVALID);
    assert_int_equal(kvmeta_count(db), 0);
    unit_close(db);
}

/* Goal: without values, nothing asks for one. */
static void a_set_of_keys_takes_null_for_values(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 3, 0);
    kvmeta *db = unit_open(u, &options);
    kvmeta_snapshot *snapshot;
    unsigned char found[2];
    kvmeta_batch *batch;

    unit_ok(kvmeta_batch_new(db, &batch));
    unit_ok(kvmeta_batch_put(batch, "one", NULL));
    unit_ok(kvmeta_batch_expect(batch, "two", NULL));
    unit_ok(kvmeta_batch_put(batch, "two", "?"));
    unit_ok(kvmeta_commit(db, batch, 0, NULL));
    kvmeta_batch_free(batch);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_ok(kvmeta_snapshot_get_many(snapshot, "onetwo", 2, NULL, found));
    assert_memory_equal(found, "\1\1", 2);
    unit_ok(kvmeta_snapshot_get_many(snapshot, NULL, 0, NULL, NULL));
    kvmeta_snapshot_release(snapshot);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Single writes and reads
 * -------------------------------------------------------------------------- */

/* Goal: put stores and replaces, get copies exactly value_bytes, and leaves
 * the buffer alone when there is nothing. */
static void put_replaces_and_get_copies_exactly_the_value(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 5, 3);
    kvmeta *db = unit_open(u, &options);
    unsigned char got[5] = {9, 9, 9, 9, 9};

    unit_is(kvmeta_get(db, "alpha", got + 1), KVMETA_NOT_FOUND);
    assert_memory_equal(got, "\11\11\11\11\11", 5);
    unit_is(kvmeta_has(db, "alpha"), KVMETA_NOT_FOUND);
    unit_ok(kvmeta_put(db, "alpha", "one", 0));
    unit_ok(kvmeta_has(db, "alpha"));
    unit_ok(kvmeta_get(db, "alpha", got + 1));
    assert_memory_equal(got, "\11one\11", 5);
    unit_ok(kvmeta_put(db, "alpha", "two", 0));
    unit_ok(kvmeta_get(db, "alpha", got + 1));
    assert_memory_equal(got, "\11two\11", 5);
    unit_is(kvmeta_get(db, "alphb", got + 1), KVMETA_NOT_FOUND);
    assert_int_equal(kvmeta_count(db), 1);
    unit_close(db);
}

/* Goal: remove answers whether there was a record, and takes it away. */
static void remove_of_a_missing_key_is_not_found(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[8];
    uint64_t seq;

    unit_fill(db, 0, 3, 0, 0);
    unit_key(8, 1, key);
    unit_ok(kvmeta_remove(db, key, 0));
    unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
    seq = unit_stats(db).seq;
    unit_is(kvmeta_remove(db, key, 0), KVMETA_NOT_FOUND);
    assert_true(unit_stats(db).seq == seq);
    assert_int_equal(kvmeta_count(db), 2);
    unit_close(db);
    db = unit_open(u, &options);
    unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
    unit_holds(db, 0, 1, 0);
    unit_holds(db, 2, 3, 0);
    unit_close(db);
}

/* Goal: swap gives the old value, or NOT_FOUND with the record stored and
 * `previous` as it was; `previous` may be the buffer of the new value. */
static void swap_returns_the_value_it_replaced(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 1, 4);
    kvmeta *db = unit_open(u, &options);
    char old[5] = "keep", both[5] = "thre";

    unit_is(kvmeta_swap(db, "k", "one.", old, 0), KVMETA_NOT_FOUND);
    assert_string_equal(old, "keep");
    unit_ok(kvmeta_swap(db, "k", "two.", old, 0));
    assert_string_equal(old, "one.");
    unit_ok(kvmeta_swap(db, "k", both, both, 0));
    assert_string_equal(both, "two.");
    unit_ok(kvmeta_get(db, "k", old));
    assert_string_equal(old, "thre");
    unit_ok(kvmeta_swap(db, "k", "four", NULL, KVMETA_BUFFERED));
    unit_ok(kvmeta_get(db, "k", old));
    assert_string_equal(old, "four");
    unit_close(db);
}

/* Goal: unknown flags of a write are the caller's mistake; nothing is done. */
static void unknown_write_flags_are_refused(struct unit *u)
{
    static const unsigned bad[] = {4, 5, 8, 0x100, 0x80000001u, UINT_MAX};
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[8] = {0}, value[8] = {7};
    struct kvmeta_op op = {KVMETA_OP_PUT, key, value};
    kvmeta_batch *batch;
    size_t i;

    unit_ok(kvmeta_put(db, key, key, 0));
    unit_ok(kvmeta_batch_new(db, &batch));
    unit_ok(kvmeta_batch_put(batch, key, value));
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        unit_is(kvmeta_put(db, key, value, bad[i]), KVMETA_E_INVALID);
        unit_is(kvmeta_remove(db, key, bad[i]), KVMETA_E_INVALID);
        unit_is(kvmeta_swap(db, key, value, value, bad[i]), KVMETA_E_INVALID);
        unit_is(kvmeta_write(db, &op, 1, bad[i], NULL), KVMETA_E_INVALID);
        unit_is(kvmeta_commit(db, batch, bad[i], NULL), KVMETA_E_INVALID);
    }
    kvmeta_batch_free(batch);
    unit_ok(kvmeta_get(db, key, value));
    assert_memory_equal(value, key, 8);
    assert_true(unit_stats(db).commits == 1);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Statistics
 * -------------------------------------------------------------------------- */

/* Goal: what can be known exactly is exact, the rest is plausible. */
static void stats_count_what_was_done(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_stats s;

    s = unit_stats(db);
    assert_true(s.struct_size == sizeof s);
    assert_true(s.records == 0 && s.commits == 0 && s.logical_bytes == 0);
    assert_true(s.open_tables == 0 && s.open_logs == 0);
    assert_true(s.open_torn_reason == KVMETA_TORN_NONE);
    unit_fill(db, 0, 100, 0, KVMETA_DURABLE);
    s = unit_stats(db);
    assert_true(s.records == 100 && s.logical_bytes == 1600);
    assert_true(s.commits == 100 && s.groups == 100);
    assert_true(s.group_commits_max == 1 && s.syncs >= 100);
    assert_true(s.user_bytes == 1600);
    assert_true(s.durable_seq == s.seq && s.seq >= 100);
    assert_true(s.bytes_logged >= 1600 && s.bytes_written >= s.bytes_logged);
    assert_true(s.log_bytes > 0 && s.resident_bytes >= 1600);
    assert_true(s.write_amplification >
                0.999 * (double)s.bytes_written / 1600);
    assert_true(s.stalls == 0 && s.background_errors == 0 && s.heals == 0);
    unit_ok(kvmeta_flush(db));
    s = unit_stats(db);
    assert_true(s.tables == 1 && s.table_records == 100);
    assert_true(s.logs_waiting == 0 && s.flushes == 1 && s.table_bytes > 0);
    assert_true(s.space_amplification > 0.99 && s.space_amplification < 1.01);
    unit_close(db);
    db = unit_open(u, &options);
    s = unit_stats(db);
    assert_true(s.records == 100 && s.commits == 0 && s.flushes == 0);
    assert_true(s.open_tables == 1 && s.open_table_records == 100);
    assert_true(s.open_torn_bytes == 0 && s.open_healed == 0);
    assert_true(s.open_garbage_files == 0 && s.bytes_read > 0);
    unit_close(db);
}

/* Goal: an older caller's shorter struct is filled so far and no further. */
static void stats_fill_no_more_than_the_caller_has(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_stats s;
    unsigned char *p = (unsigned char *)&s;
    size_t end = offsetof(struct kvmeta_stats, seq), i;

    unit_fill(db, 0, 3, 0, 0);
    memset(&s, 0xa5, sizeof s);
    s.struct_size = end;
    unit_ok(kvmeta_stats(db, &s));
    assert_true(s.records == 3);
    assert_true(s.struct_size == end);
    for (i = end; i < sizeof s; i++) {
        assert_int_equal(p[i], 0xa5);
    }
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(version_is_that_of_the_header),
    UNIT_CASE(strerror_names_each_code_differently),
    UNIT_CASE(integer_keys_order_as_their_numbers),
    UNIT_CASE(options_init_sets_widths_and_zeros),
    UNIT_CASE(null_handles_are_refused),
    UNIT_CASE(null_handles_are_empty),
    UNIT_CASE(a_set_of_keys_takes_null_for_values),
    UNIT_CASE(null_is_allowed_where_the_header_says_so),
    UNIT_CASE(null_arguments_are_refused),
    UNIT_CASE(put_replaces_and_get_copies_exactly_the_value),
    UNIT_CASE(remove_of_a_missing_key_is_not_found),
    UNIT_CASE(swap_returns_the_value_it_replaced),
    UNIT_CASE(unknown_write_flags_are_refused),
    UNIT_CASE(stats_count_what_was_done),
    UNIT_CASE(stats_fill_no_more_than_the_caller_has),
};

UNIT_MAIN(cases)
