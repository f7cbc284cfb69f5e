/*
 * Reads of many records: get_many, scans, digests, at every width.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

/* --------------------------------------------------------------------------
 * get_many and scans
 * -------------------------------------------------------------------------- */

/* Goal: get_many takes keys in any order, repeats allowed, says for each
 * whether it was there, and leaves the places of the others. Method: even
 * numbers are there; 1,000 random numbers below 400, over several chunks. */
static void get_many_keeps_the_places_of_missing_keys(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 3);
    kvmeta *db = unit_open(u, &options);
    struct test_rng rng = {test_args.seed};
    static unsigned char keys[8000], values[3000], found[1001];
    unsigned char key[8], value[8];
    uint64_t i, n;

    for (i = 0; i < 400; i += 2) {
        unit_key(8, i, key);
        unit_value(3, i, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    for (i = 0; i < 1000; i++) {
        unit_key(8, test_rng_below(&rng, 400), keys + 8 * i);
    }
    memset(values, 0xee, sizeof values);
    memset(found, 0xee, sizeof found);
    unit_ok(kvmeta_get_many(db, keys, 1000, values, found));
    assert_int_equal(found[1000], 0xee);
    for (i = 0; i < 1000; i++) {
        n = kvmeta_key_to_u64(keys + 8 * i);
        assert_int_equal(found[i], n % 2 == 0);
        memset(value, 0xee, sizeof value);
        if (n % 2 == 0) {
            unit_value(3, n, value);
        }
        assert_memory_equal(values + 3 * i, value, 3);
    }
    found[0] = 0xee;
    unit_ok(kvmeta_get_many(db, keys, 0, values, found));
    assert_int_equal(found[0], 0xee);
    unit_close(db);
}

/* Goal: what is only buffered is found, from the first record on. Method: one
 * put after the other, and after each all keys at once. */
static void get_many_sees_every_number_of_buffered_puts(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    kvmeta *db = unit_open(u, &options);
    unsigned char keys[80], values[80], found[10];
    uint64_t i, n;

    for (i = 0; i < 10; i++) {
        unit_key(8, i, keys + 8 * i);
    }
    for (n = 0; n < 10; n++) {
        unit_ok(kvmeta_put(db, keys + 8 * n, keys + 8 * n, KVMETA_BUFFERED));
        unit_ok(kvmeta_get_many(db, keys, 10, values, found));
        for (i = 0; i < 10; i++) {
            assert_int_equal(found[i], i <= n);
        }
        assert_memory_equal(values, keys, 8 * (n + 1));
    }
    unit_close(db);
}

static void ones_expect(kvmeta *db, const unsigned char *key, int there)
{
    int want = there ? KVMETA_OK : KVMETA_NOT_FOUND;
    unsigned char value[8], found;
    kvmeta_snapshot *snapshot;

    assert_int_equal(kvmeta_get(db, key, value), want);
    unit_ok(kvmeta_get_many(db, key, 1, value, &found));
    assert_int_equal(found, there);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    assert_int_equal(kvmeta_snapshot_get(snapshot, key, value), want);
    kvmeta_snapshot_release(snapshot);
}

/* Goal: a key whose head looks like the padding behind a leaf's last key is
 * found while it is there, and only then: what it has left behind the last
 * record is none. Method: the key of all ones, alone, behind others and behind
 * one with the same head, before and after its removal. */
static void a_removed_key_of_all_ones_is_not_found(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 16, 8);
    kvmeta *db = unit_open(u, &options);
    unsigned char ones[16], key[16] = {0}, value[8] = {0};
    int round;

    memset(ones, 0xff, sizeof ones);
    for (round = 0; round < 3; round++) {
        ones_expect(db, ones, 0);
        unit_ok(kvmeta_put(db, ones, value, 0));
        ones_expect(db, ones, 1);
        unit_ok(kvmeta_remove(db, ones, 0));
        ones_expect(db, ones, 0);
        if (round == 1) memset(key, 0xff, 8);
        unit_ok(kvmeta_put(db, key, value, 0));
        ones_expect(db, key, 1);
    }
    unit_close(db);
}

static int scan_never(void *user, const void *key, const void *value)
{
    (void)user, (void)key, (void)value;
    return 99;
}

struct scan {
    uint64_t from, to, seen;
    int stop_after;
    kvmeta *db;                      /* written to by the scan's function */
};

static int scan_see(void *user, const void *key, const void *value)
{
    struct scan *scan = user;
    unsigned char want[8];
    uint64_t number = kvmeta_key_to_u64(key);

    unit_value(8, number, want);
    if (number != scan->from + scan->seen || memcmp(value, want, 8) != 0) {
        return -77;
    }
    scan->seen++;
    return scan->stop_after > 0 && --scan->stop_after == 0 ? 42 : 0;
}

static int scan_range(kvmeta *db, uint64_t from, uint64_t to, uint64_t *seen,
                      int stop_after)
{
    struct scan scan = {from, to, 0, stop_after, db};
    unsigned char low[8], high[8];
    int rc;

    unit_key(8, from, low);
    unit_key(8, to, high);
    rc = kvmeta_scan(db, low, high, scan_see, &scan);
    *seen = scan.seen;
    return rc;
}

/* Goal: a scan sees from <= key < to, once, ascending; NULL is the end; an
 * empty or reversed range calls nothing; a function's result ends it. */
static void scan_sees_its_range_in_order(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct scan all = {0, 1000, 0, 0, db};
    uint64_t seen, i;

    unit_ok(kvmeta_scan(db, NULL, NULL, scan_never, NULL));
    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_scan(db, NULL, NULL, scan_see, &all));
    assert_true(all.seen == 1000);
    for (i = 0; i <= 1000; i += 37) {
        unit_ok(scan_range(db, i, 1000, &seen, 0));
        assert_true(seen == 1000 - i);
        unit_ok(scan_range(db, 0, i, &seen, 0));
        assert_true(seen == i);
        unit_ok(scan_range(db, i, i, &seen, 0));
        assert_true(seen == 0);
        unit_ok(scan_range(db, i, i / 2, &seen, 0));
        assert_true(seen == 0);
    }
    unit_ok(scan_range(db, 900, 5000, &seen, 0));
    assert_true(seen == 100);
    unit_is(scan_range(db, 10, 900, &seen, 7), 42);
    assert_true(seen == 7);
    unit_close(db);
}

static int scan_and_write(void *user, const void *key, const void *value)
{
    struct scan *scan = user;
    unsigned char next[8], old[8];
    int rc = scan_see(user, key, value);

    memcpy(old, key, 8);
    unit_key(8, 1000 + scan->seen, next);
    if (rc == 0) rc = kvmeta_remove(scan->db, old, KVMETA_DURABLE);
    if (rc == 0) rc = kvmeta_put(scan->db, next, next, KVMETA_BUFFERED);
    return rc;
}

/* Goal: a scan is of the state at its call, though its own function writes:
 * a reader holds no lock that a writer needs. */
static void scan_keeps_its_state_while_its_function_writes(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    kvmeta *db = unit_open(u, &options);
    struct scan scan = {0, 300, 0, 0, db};

    unit_fill(db, 0, 300, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_scan(db, NULL, NULL, scan_and_write, &scan));
    assert_true(scan.seen == 300);
    assert_true(kvmeta_count(db) == 300);
    assert_int_equal(scan_range(db, 0, 300, &scan.seen, 0), 0);
    assert_true(scan.seen == 0);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Digest
 * -------------------------------------------------------------------------- */

/* Goal: the digest depends on the records alone. Method: one store gets them
 * ascending, the other descending with detours, flushes and a reopen. */
static void digest_does_not_depend_on_history(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *a = unit_open(u, &options), *b;
    struct kvmeta_digest digest, empty = kvmeta_digest(a);
    unsigned char key[8], value[8];
    uint64_t i;

    unit_fill(a, 0, 500, 0, KVMETA_WRITTEN);
    digest = kvmeta_digest(a);
    unit_close(a);
    strcat(u->dir, ".b");
    b = unit_open(u, &options);
    unit_same_digest(kvmeta_digest(b), empty);
    for (i = 600; i-- > 0;) {
        unit_fill(b, i, i + 1, 5, KVMETA_BUFFERED);
    }
    unit_ok(kvmeta_flush(b));
    for (i = 0; i < 600; i++) {
        unit_key(8, i, key);
        unit_value(8, i, value);
        unit_ok(i < 500 ? kvmeta_put(b, key, value, KVMETA_WRITTEN)
                        : kvmeta_remove(b, key, KVMETA_WRITTEN));
    }
    unit_same_digest(kvmeta_digest(b), digest);
    unit_ok(kvmeta_compact(b));
    unit_close(b);
    b = unit_open(u, &options);
    unit_same_digest(kvmeta_digest(b), digest);
    unit_close(b);
}

/* Goal: any change of one record changes the digest, undoing restores it. */
static void digest_changes_with_every_record(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[8], value[8];
    struct kvmeta_digest before, now;
    unsigned bit;

    unit_fill(db, 0, 10, 0, KVMETA_BUFFERED);
    before = kvmeta_digest(db);
    for (bit = 0; bit < 64; bit++) {
        unit_key(8, 5, key);
        unit_value(8, 5, value);
        value[bit / 8] ^= (unsigned char)(1 << bit % 8);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
        now = kvmeta_digest(db);
        assert_true(now.lo != before.lo);
        assert_true(now.hi != before.hi);
    }
    unit_fill(db, 5, 6, 0, KVMETA_BUFFERED);
    unit_same_digest(kvmeta_digest(db), before);
    unit_fill(db, 10, 11, 0, KVMETA_BUFFERED);
    assert_true(kvmeta_digest(db).lo != before.lo);
    unit_key(8, 10, key);
    unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    unit_same_digest(kvmeta_digest(db), before);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Widths
 * -------------------------------------------------------------------------- */

/* Goal: the edges of both widths work through log, table, reopen, scan and
 * get_many. Method: n records, half of them flushed, half only logged. */
static void check_width(struct unit *u, uint32_t key_bytes,
                        uint32_t value_bytes, uint64_t n)
{
    struct kvmeta_options options = unit_options(u, key_bytes, value_bytes);
    unsigned char *key = malloc(key_bytes), *value = malloc(value_bytes + 1);
    unsigned char *got = malloc(value_bytes + 1);
    struct test_oracle oracle;
    uint64_t i;
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    test_oracle_init(&oracle, key_bytes, value_bytes);
    db = unit_open(u, &options);
    for (i = 0; i < n; i++) {
        unit_key(key_bytes, i * 7 % n, key);
        unit_value(value_bytes, i + 1, value);
        test_oracle_put(&oracle, key, value);
        unit_ok(kvmeta_put(db, key, value_bytes > 0 ? value : NULL,
                           KVMETA_WRITTEN));
        if (i == n / 2) {
            unit_ok(kvmeta_flush(db));
        }
    }
    assert_null(test_oracle_check(&oracle, db));
    unit_close(db);
    db = unit_open(u, &options);
    assert_null(test_oracle_check(&oracle, db));
    unit_ok(kvmeta_compact(db));
    unit_ok(kvmeta_verify(db, NULL));
    got[value_bytes] = 0xcc;
    unit_key(key_bytes, n - 1, key);
    unit_ok(kvmeta_get(db, key, value_bytes > 0 ? got : NULL));
    assert_int_equal(got[value_bytes], 0xcc);
    assert_memory_equal(got, test_oracle_get(&oracle, key), value_bytes);
    unit_close(db);
    test_oracle_free(&oracle);
    unit_remove_tree(u->dir);
    free(key);
    free(value);
    free(got);
}

static void widths_at_their_edges_work(struct unit *u)
{
    check_width(u, 1, 0, 256);
    check_width(u, 1, 1, 256);
    check_width(u, 7, 9, 500);
    check_width(u, 8, 0, 2000);
    check_width(u, 255, 0, 300);
    check_width(u, 255, 255, 300);
    check_width(u, 9, 65535, 50);
    check_width(u, 1, 65535, 20);
    check_width(u, 255, 65535, 20);
}

/* Goal: with value_bytes 0 value pointers are not looked at. */
static void keys_without_values_take_null(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 3, 0);
    kvmeta *db = unit_open(u, &options);
    unsigned char found[2] = {9, 9};
    kvmeta_snapshot *snapshot;

    unit_ok(kvmeta_put(db, "abc", NULL, 0));
    unit_ok(kvmeta_get(db, "abc", NULL));
    unit_is(kvmeta_get(db, "abd", NULL), KVMETA_NOT_FOUND);
    unit_ok(kvmeta_swap(db, "abc", NULL, NULL, 0));
    unit_ok(kvmeta_get_many(db, "abcabd", 2, NULL, found));
    assert_memory_equal(found, "\1\0", 2);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_ok(kvmeta_snapshot_get(snapshot, "abc", NULL));
    kvmeta_snapshot_release(snapshot);
    unit_ok(kvmeta_remove(db, "abc", 0));
    assert_int_equal(kvmeta_count(db), 0);
    unit_ok(kvmeta_put(db, "abd", NULL, KVMETA_BUFFERED));
    unit_ok(kvmeta_get(db, "abd", NULL));
    unit_ok(kvmeta_get_many(db, "abcabd", 2, NULL, found));
    assert_memory_equal(found, "\0\1", 2);
    unit_close(db);
    db = unit_open(u, &options);
    unit_ok(kvmeta_get(db, "abd", NULL));
    assert_int_equal(kvmeta_count(db), 1);
    unit_close(db);
}

/* Goal: a buffered put of a record that is too wide to wait for others is
 * seen at once, like any other. */
static void wide_buffered_puts_are_seen_at_once(struct unit *u)
{
    static unsigned char value[20000], got[20000];
    struct kvmeta_options options = unit_options(u, 8, sizeof value);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[8];
    uint64_t i;

    for (i = 0; i < 20; i++) {
        unit_key(8, i % 15, key);
        unit_value(sizeof value, i, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, value, sizeof value);
    }
    assert_int_equal(kvmeta_count(db), 15);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Puts that wait for company
 * -------------------------------------------------------------------------- */

static void want_everywhere(kvmeta *db, uint64_t number, uint64_t content)
{
    unsigned char keys[16], value[8], values[16], found[2];
    kvmeta_snapshot *snapshot = NULL;

    unit_key(8, number, keys);
    unit_key(8, UINT64_MAX, keys + 8);
    unit_value(8, content, value);
    unit_ok(kvmeta_get(db, keys, values));
    assert_memory_equal(values, value, 8);
    unit_ok(kvmeta_get_many(db, keys, 2, values, found));
    assert_true(found[0] == 1 && found[1] == 0);
    assert_memory_equal(values, value, 8);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_ok(kvmeta_snapshot_get(snapshot, keys, values));
    assert_memory_equal(values, value, 8);
    kvmeta_snapshot_release(snapshot);
}

/* Goal: a buffered put is seen by every kind of read as soon as it returns,
 * however many wait beside it, and the last of several on one key counts.
 * Method: every number of puts up to more than are kept back, each followed by
 * the reads that do not disturb them, and at the end by those that do. */
static void buffered_puts_are_seen_at_once(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[8], value[8], got[8];
    uint64_t puts, i, salt = 0;

    for (puts = 1; puts <= 70; puts++) {
        salt += 1000;
        unit_fill(db, 0, puts, salt, KVMETA_BUFFERED);
        unit_holds(db, 0, puts, salt);
        unit_key(8, puts / 2, key);
        unit_value(8, 7 * salt, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
        unit_ok(kvmeta_get(db, key, got));
        assert_memory_equal(got, value, 8);
        want_everywhere(db, puts / 2, 7 * salt);
        assert_int_equal(kvmeta_count(db), puts);
    }
    for (i = 0; i < 5; i++) {                   /* some wait again */
        unit_fill(db, 1000 + i, 1001 + i, 0, KVMETA_BUFFERED);
        unit_key(8, 1000 + i, key);
        unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
        unit_is(kvmeta_get(db, key, got), KVMETA_NOT_FOUND);
    }
    unit_close(db);
}

/* Goal: a snapshot does not see later puts, also when nothing but such puts
 * has happened since it was taken. */
static void a_snapshot_does_not_see_puts_that_wait(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    kvmeta_snapshot *snapshots[40];
    unsigned char key[8], got[8], value[8];
    uint64_t i;

    unit_key(8, 1, key);
    for (i = 0; i < 40; i++) {
        unit_fill(db, 1, 2, i, KVMETA_BUFFERED);
        unit_ok(kvmeta_snapshot_take(db, &snapshots[i]));
    }
    unit_fill(db, 1, 2, 40, KVMETA_BUFFERED);
    for (i = 0; i < 40; i++) {
        unit_ok(kvmeta_snapshot_get(snapshots[i], key, got));
        unit_value(8, 1 + i, value);
        assert_memory_equal(got, value, 8);
        assert_true(kvmeta_snapshot_seq(snapshots[i]) == i + 1);
        kvmeta_snapshot_release(snapshots[i]);
    }
    unit_close(db);
}

/* Goal: a search through a snapshot goes down any number of levels. Method:
 * wide keys, of which a node holds few; even numbers are there. */
static void a_snapshot_finds_the_keys_of_a_tall_tree(struct unit *u)
{
    enum { WIDE = 200, NUMBERS = 4000 };
    struct kvmeta_options options = unit_options(u, WIDE, 8);
    kvmeta *db = unit_open(u, &options);
    unsigned char key[WIDE], value[8], got[8];
    kvmeta_snapshot *snapshot;
    uint64_t i;

    for (i = 0; i < NUMBERS; i += 2) {
        unit_key(WIDE, i, key);
        unit_value(8, i, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    for (i = 0; i < NUMBERS; i++) {
        unit_key(WIDE, i, key);
        unit_value(8, i, value);
        assert_int_equal(kvmeta_snapshot_get(snapshot, key, got),
                         i % 2 == 0 ? KVMETA_OK : KVMETA_NOT_FOUND);
        if (i % 2 == 0) assert_memory_equal(got, value, 8);
    }
    kvmeta_snapshot_release(snapshot);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(get_many_keeps_the_places_of_missing_keys),
    UNIT_CASE(get_many_sees_every_number_of_buffered_puts),
    UNIT_CASE(a_removed_key_of_all_ones_is_not_found),
    UNIT_CASE(scan_sees_its_range_in_order),
    UNIT_CASE(scan_keeps_its_state_while_its_function_writes),
    UNIT_CASE(digest_does_not_depend_on_history),
    UNIT_CASE(digest_changes_with_every_record),
    UNIT_CASE(widths_at_their_edges_work),
    UNIT_CASE(keys_without_values_take_null),
    UNIT_CASE(wide_buffered_puts_are_seen_at_once),
    UNIT_CASE(buffered_puts_are_seen_at_once),
    UNIT_CASE(a_snapshot_does_not_see_puts_that_wait),
    UNIT_CASE(a_snapshot_finds_the_keys_of_a_tall_tree),
};

UNIT_MAIN(cases)
