/*
 * Batches: atomic writes from an array and from a growable batch, with
 * expectations, commit numbers and limits.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

static kvmeta *open_words(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 1, 3);

    options.flags = KVMETA_NO_THREAD;
    return unit_open(u, &options);
}

static struct kvmeta_op put(const char *key, const char *value)
{
    struct kvmeta_op op = {KVMETA_OP_PUT, key, value};

    return op;
}

static struct kvmeta_op removal(const char *key)
{
    struct kvmeta_op op = {KVMETA_OP_REMOVE, key, NULL};

    return op;
}

static struct kvmeta_op expect(const char *key, const char *value)
{
    struct kvmeta_op op = {KVMETA_OP_EXPECT, key, value};

    return op;
}

/* Wants the value, or no record for NULL. */
static void want(kvmeta *db, const char *key, const char *value)
{
    char got[4] = "";

    if (value == NULL) {
        unit_is(kvmeta_get(db, key, got), KVMETA_NOT_FOUND);
        return;
    }
    unit_ok(kvmeta_get(db, key, got));
    assert_string_equal(got, value);
}

/* --------------------------------------------------------------------------
 * Order within a batch
 * -------------------------------------------------------------------------- */

/* Goal: later operations on a key win, whatever they are. */
static void later_operations_on_a_key_win(struct unit *u)
{
    kvmeta *db = open_words(u);
    struct kvmeta_op ops[] = {
        put("a", "one"), put("b", "one"), removal("b"), removal("c"),
        put("c", "two"), put("a", "two"), put("d", "one"), removal("d"),
        put("d", "three"), put("a", "six"),
    };

    unit_ok(kvmeta_put(db, "b", "old", 0));
    unit_ok(kvmeta_write(db, ops, sizeof ops / sizeof ops[0], 0, NULL));
    want(db, "a", "six");
    want(db, "b", NULL);
    want(db, "c", "two");
    want(db, "d", "thr");
    assert_int_equal(kvmeta_count(db), 3);
    unit_close(db);
    db = open_words(u);
    want(db, "a", "six");
    want(db, "b", NULL);
    want(db, "c", "two");
    want(db, "d", "thr");
    unit_close(db);
}

enum { STEPS = 2000 };

static void put_number(kvmeta *db, uint64_t number, uint64_t salt)
{
    unsigned char key[16], value[8];

    unit_key(16, number, key);
    unit_value(8, number + salt, value);
    unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
}

static void want_number(kvmeta *db, uint64_t number, uint64_t salt)
{
    unsigned char key[16], value[8], got[8];

    unit_key(16, number, key);
    unit_value(8, number + salt, value);
    unit_ok(kvmeta_get(db, key, got));
    assert_memory_equal(got, value, 8);
}

/* Goal: keys that agree in their first 8 bytes go to their places, too: behind
 * the last one, onto it, and below it. */
static void ascending_keys_of_one_head_find_their_places(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 16, 8);
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    for (uint64_t i = 1; i <= STEPS; i++) {
        put_number(db, 10 * i, 0);
        if (i % 3 == 0) put_number(db, 10 * i, 1);
        if (i % 5 == 0) put_number(db, 10 * i - 5, 2);
    }
    assert_int_equal(kvmeta_count(db), STEPS + STEPS / 5);
    for (uint64_t i = 1; i <= STEPS; i++) {
        want_number(db, 10 * i, i % 3 == 0 ? 1 : 0);
        if (i % 5 == 0) want_number(db, 10 * i - 5, 2);
    }
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: an operation that is no operation fails the whole batch. */
static void an_unknown_operation_does_nothing_at_all(struct unit *u)
{
    static const int bad[] = {0, 4, -1, 255};
    kvmeta *db = open_words(u);
    struct kvmeta_op ops[] = {put("a", "one"), put("b", "two"),
                              put("c", "thr")};
    uint64_t seq = 77;
    size_t i;

    for (i = 0; i < 4; i++) {
        ops[2].type = bad[i];
        unit_is(kvmeta_write(db, ops, 3, 0, &seq), KVMETA_E_INVALID);
    }
    assert_true(seq == 77);
    assert_int_equal(kvmeta_count(db), 0);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Expectations
 * -------------------------------------------------------------------------- */

/* Goal: a value, or the absence of a record, can be required; where it does
 * not hold nothing happens and the commit number stays. */
static void a_batch_commits_only_if_its_expectations_hold(struct unit *u)
{
    kvmeta *db = open_words(u);
    struct kvmeta_op create[] = {expect("a", NULL), put("a", "one")};
    struct kvmeta_op swap[] = {put("a", "two"), expect("a", "one"),
                               put("b", "bee")};
    struct kvmeta_op gone[] = {expect("a", "two"), removal("a"),
                               expect("b", "bee"), expect("c", NULL)};
    uint64_t seq = 77, first;

    unit_ok(kvmeta_write(db, create, 2, 0, &first));
    unit_is(kvmeta_write(db, create, 2, 0, &seq), KVMETA_CONFLICT);
    assert_true(seq == 77 && unit_stats(db).seq == first);
    unit_ok(kvmeta_write(db, swap, 3, 0, &seq));
    want(db, "a", "two");
    want(db, "b", "bee");
    unit_is(kvmeta_write(db, swap, 3, 0, &seq), KVMETA_CONFLICT);
    unit_ok(kvmeta_write(db, gone, 4, 0, &seq));
    want(db, "a", NULL);
    unit_is(kvmeta_write(db, gone, 4, 0, &seq), KVMETA_CONFLICT);
    want(db, "b", "bee");
    unit_close(db);
}

/* Goal: expectations are of the state before the batch, wherever they stand
 * in it, also after a change of the same key. */
static void expectations_are_of_the_state_before_the_batch(struct unit *u)
{
    kvmeta *db = open_words(u);
    struct kvmeta_op good[] = {put("a", "new"), expect("a", "old"),
                               removal("a"), expect("a", "old"),
                               put("a", "las"), expect("b", NULL),
                               put("b", "bee"), expect("b", NULL)};
    struct kvmeta_op bad[] = {put("a", "ccc"), expect("a", "ccc")};
    struct kvmeta_op both[] = {expect("a", "las"), expect("a", NULL)};

    unit_ok(kvmeta_put(db, "a", "old", 0));
    unit_ok(kvmeta_write(db, good, 8, 0, NULL));
    want(db, "a", "las");
    want(db, "b", "bee");
    unit_is(kvmeta_write(db, bad, 2, 0, NULL), KVMETA_CONFLICT);
    unit_is(kvmeta_write(db, both, 2, 0, NULL), KVMETA_CONFLICT);
    want(db, "a", "las");
    unit_close(db);
}

/* Goal: without values a pointer means "is there", NULL "is not". */
static void expectations_work_without_values(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 1, 0);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_op absent[] = {expect("a", NULL), put("a", NULL)};
    struct kvmeta_op there[] = {expect("a", ""), removal("a")};

    unit_is(kvmeta_write(db, there, 2, 0, NULL), KVMETA_CONFLICT);
    unit_ok(kvmeta_write(db, absent, 2, 0, NULL));
    unit_is(kvmeta_write(db, absent, 2, 0, NULL), KVMETA_CONFLICT);
    unit_ok(kvmeta_write(db, there, 2, 0, NULL));
    assert_int_equal(kvmeta_count(db), 0);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Commit numbers
 * -------------------------------------------------------------------------- */

/* Goal: numbers ascend; a batch that changes nothing (empty, expectations
 * only, removals of what is not there) gets the number of the last that did,
 * and a failed one none. */
static void commit_numbers_ascend(struct unit *u)
{
    static const unsigned durabilities[] = {0, KVMETA_DURABLE, KVMETA_WRITTEN,
                                            KVMETA_BUFFERED};
    kvmeta *db = open_words(u);
    struct kvmeta_op change = put("a", "one"), nothing[2];
    uint64_t last, seq;
    unsigned i;

    nothing[0] = removal("z");
    nothing[1] = expect("y", NULL);
    unit_ok(kvmeta_write(db, NULL, 0, 0, &last));
    assert_true(last == unit_stats(db).seq);
    for (i = 0; i < 40; i++) {
        unit_ok(kvmeta_write(db, &change, 1, durabilities[i % 4], &seq));
        assert_true(seq > last);
        last = seq;
        assert_true(unit_stats(db).seq == last);
        unit_ok(kvmeta_write(db, nothing, 2, durabilities[i / 4 % 4], &seq));
        assert_true(seq == last);
        unit_ok(kvmeta_write(db, NULL, 0, 0, &seq));
        assert_true(seq == last);
        change = i % 2 ? put("a", "one") : put("a", "two");
    }
    unit_close(db);
    db = open_words(u);
    assert_true(unit_stats(db).seq == last);
    unit_ok(kvmeta_write(db, &change, 1, 0, &seq));
    assert_true(seq > last);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Growable batches
 * -------------------------------------------------------------------------- */

/* Goal: a batch copies what it is given, keeps its content over a commit,
 * and starts anew when cleared. */
static void a_batch_copies_and_keeps_its_content(struct unit *u)
{
    kvmeta *db = open_words(u);
    kvmeta_batch *batch;
    char key[2] = "a", value[4] = "one";
    uint64_t first, second;

    unit_ok(kvmeta_batch_new(db, &batch));
    assert_int_equal(kvmeta_batch_count(batch), 0);
    unit_ok(kvmeta_batch_put(batch, key, value));
    key[0] = 'b';
    unit_ok(kvmeta_batch_remove(batch, key));
    memcpy(value, "xxx", 3);
    key[0] = 'x';
    assert_int_equal(kvmeta_batch_count(batch), 2);
    assert_int_equal(kvmeta_count(db), 0);
    unit_ok(kvmeta_commit(db, batch, 0, &first));
    want(db, "a", "one");
    want(db, "x", NULL);
    unit_ok(kvmeta_put(db, "a", "two", 0));
    unit_ok(kvmeta_put(db, "b", "bee", 0));
    assert_int_equal(kvmeta_batch_count(batch), 2);
    unit_ok(kvmeta_commit(db, batch, KVMETA_BUFFERED, &second));
    assert_true(second > first);
    want(db, "a", "one");
    want(db, "b", NULL);
    kvmeta_batch_clear(batch);
    assert_int_equal(kvmeta_batch_count(batch), 0);
    unit_ok(kvmeta_commit(db, batch, 0, &first));
    assert_true(first == second);
    kvmeta_batch_free(batch);
    unit_close(db);
}

/* Goal: expectations in a batch; a conflict keeps the batch as it is. */
static void a_batch_survives_its_conflict(struct unit *u)
{
    kvmeta *db = open_words(u);
    kvmeta_batch *batch;

    unit_ok(kvmeta_batch_new(db, &batch));
    unit_ok(kvmeta_batch_expect(batch, "a", NULL));
    unit_ok(kvmeta_batch_put(batch, "a", "one"));
    unit_ok(kvmeta_commit(db, batch, 0, NULL));
    unit_is(kvmeta_commit(db, batch, 0, NULL), KVMETA_CONFLICT);
    assert_int_equal(kvmeta_batch_count(batch), 2);
    unit_ok(kvmeta_remove(db, "a", 0));
    unit_ok(kvmeta_commit(db, batch, 0, NULL));
    kvmeta_batch_clear(batch);
    unit_ok(kvmeta_batch_expect(batch, "a", "two"));
    unit_ok(kvmeta_batch_put(batch, "a", "thr"));
    unit_is(kvmeta_commit(db, batch, 0, NULL), KVMETA_CONFLICT);
    want(db, "a", "one");
    kvmeta_batch_free(batch);
    unit_close(db);
}

/* Goal: a batch belongs to its handle. */
static void a_batch_of_another_handle_is_refused(struct unit *u)
{
    kvmeta *a = open_words(u), *b;
    kvmeta_batch *batch;

    strcat(u->dir, ".b");
    b = open_words(u);
    unit_ok(kvmeta_batch_new(a, &batch));
    unit_ok(kvmeta_batch_put(batch, "a", "one"));
    unit_is(kvmeta_commit(b, batch, 0, NULL), KVMETA_E_INVALID);
    assert_int_equal(kvmeta_count(b), 0);
    kvmeta_batch_free(batch);
    unit_close(a);
    unit_close(b);
}

/* Goal: batches far larger than the log's limit and buffer, by array order
 * random, are whole before and after a reopen. */
static void a_large_batch_is_whole(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char key[8], value[8];
    kvmeta_batch *batch;
    uint64_t i, n = 50000;
    kvmeta *db;

    options.log_bytes_max = 65536;
    options.log_buffer_bytes = 4096;
    db = unit_open(u, &options);
    unit_ok(kvmeta_batch_new(db, &batch));
    for (i = 0; i < n; i++) {
        unit_key(8, i * 7919 % n, key);
        unit_value(8, i * 7919 % n, value);
        unit_ok(kvmeta_batch_put(batch, key, value));
    }
    unit_ok(kvmeta_commit(db, batch, KVMETA_BUFFERED, NULL));
    unit_ok(kvmeta_commit(db, batch, KVMETA_DURABLE, NULL));
    kvmeta_batch_free(batch);
    assert_true(kvmeta_count(db) == n);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == n);
    unit_holds(db, 0, n, 0);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Limits
 * -------------------------------------------------------------------------- */

/* Goal: a batch of over 2^31 log bytes is refused with nothing done, by both
 * ways of writing. Method: one value, pointed to again and again. */
static void a_batch_over_the_format_s_limit_is_refused(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 1, 65535);
    size_t n = ((size_t)1 << 31) / 65536 + 1, i;
    struct kvmeta_op *ops = malloc(n * sizeof *ops);
    static unsigned char value[65535];
    uint64_t seq = 77;
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    for (i = 0; i < n; i++) {
        ops[i].type = KVMETA_OP_PUT;
        ops[i].key = "a";
        ops[i].value = value;
    }
    unit_is(kvmeta_write(db, ops, n, 0, &seq), KVMETA_E_LIMIT);
    assert_true(seq == 77);
    assert_int_equal(kvmeta_count(db), 0);
    unit_ok(kvmeta_write(db, ops, 3, 0, &seq));
    assert_int_equal(kvmeta_count(db), 1);
    unit_close(db);
    free(ops);
}

/* Goal: memory_bytes_max refuses the write that would pass it, single or in
 * a batch; reads and removals go on; what was refused left no trace. */
static void memory_bytes_max_is_kept(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_digest digest;
    unsigned char key[8] = {0};
    uint64_t count = 0, i;
    int rc = KVMETA_OK;
    kvmeta *db;

    options.memory_bytes_max = 8 << 20;
    db = unit_open(u, &options);
    while (rc == KVMETA_OK && count < 2000000) {
        digest = kvmeta_digest(db);
        unit_key(8, count * 2654435761u % (1u << 31), key);
        rc = kvmeta_put(db, key, key, KVMETA_BUFFERED);
        count += rc == KVMETA_OK;
    }
    unit_is(rc, KVMETA_E_LIMIT);
    unit_is(kvmeta_put(db, key, key, KVMETA_WRITTEN), KVMETA_E_LIMIT);
    assert_true(count > 1000);
    unit_same_digest(kvmeta_digest(db), digest);
    assert_true(kvmeta_count(db) == count);
    unit_is(kvmeta_has(db, key), KVMETA_NOT_FOUND);
    assert_true(unit_stats(db).resident_bytes <= options.memory_bytes_max);
    for (i = 0; i < count / 2; i++) {
        unit_key(8, i * 2654435761u % (1u << 31), key);
        unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    }
    for (i = 0; i < 100; i++) {
        unit_key(8, i * 2654435761u % (1u << 31), key);
        unit_ok(kvmeta_put(db, key, key, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_verify(db, NULL));
    unit_ok(kvmeta_last_error(db, NULL));
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Out of memory
 * -------------------------------------------------------------------------- */

/* Goal: wherever an allocation of a write fails, the records stay, and the
 * same write works afterwards. Method: fail the 1st, 2nd, ... allocation of
 * a batch until none is left to fail. */
static void a_write_without_memory_changes_nothing(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    static unsigned char keys[4000][8];
    static struct kvmeta_op ops[4000];
    struct kvmeta_digest digest;
    kvmeta *db = unit_open(u, &options);
    uint64_t n, i;
    int rc = KVMETA_E_NOMEM;

    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    digest = kvmeta_digest(db);
    for (i = 0; i < 4000; i++) {
        unit_key(8, i * 3, keys[i]);
        ops[i].type = i % 5 == 0 ? KVMETA_OP_REMOVE : KVMETA_OP_PUT;
        ops[i].key = ops[i].value = keys[i];
    }
    for (n = 1; rc == KVMETA_E_NOMEM; n++) {
        assert_true(n < 10000);
        u->alloc.fail_at = atomic_load(&u->alloc.calls) + n;
        rc = kvmeta_write(db, ops, 4000, KVMETA_BUFFERED, NULL);
        u->alloc.fail_at = 0;
        if (rc == KVMETA_E_NOMEM) {
            unit_same_digest(kvmeta_digest(db), digest);
            assert_true(kvmeta_count(db) == 1000);
        }
    }
    unit_ok(rc);
    assert_true(kvmeta_digest(db).lo != digest.lo);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* Goal: growing a batch without memory leaves it as it was. */
static void a_batch_without_memory_is_as_before(struct unit *u)
{
    kvmeta *db = open_words(u);
    kvmeta_batch *batch;
    uint64_t added = 0, failed = 0;
    int rc;

    unit_ok(kvmeta_batch_new(db, &batch));
    while (failed < 5 && added < 1000000) {
        u->alloc.fail_at = atomic_load(&u->alloc.calls) + 1;
        rc = kvmeta_batch_put(batch, "a", "one");
        u->alloc.fail_at = 0;
        if (rc == KVMETA_E_NOMEM) {
            assert_true(kvmeta_batch_count(batch) == added);
            failed++;
            rc = kvmeta_batch_put(batch, "a", "one");
        }
        unit_ok(rc);
        added++;
    }
    assert_true(failed == 5);
    assert_true(kvmeta_batch_count(batch) == added);
    unit_ok(kvmeta_commit(db, batch, KVMETA_BUFFERED, NULL));
    want(db, "a", "one");
    kvmeta_batch_free(batch);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(later_operations_on_a_key_win),
    UNIT_CASE(ascending_keys_of_one_head_find_their_places),
    UNIT_CASE(an_unknown_operation_does_nothing_at_all),
    UNIT_CASE(a_batch_commits_only_if_its_expectations_hold),
    UNIT_CASE(expectations_are_of_the_state_before_the_batch),
    UNIT_CASE(expectations_work_without_values),
    UNIT_CASE(commit_numbers_ascend),
    UNIT_CASE(a_batch_copies_and_keeps_its_content),
    UNIT_CASE(a_batch_survives_its_conflict),
    UNIT_CASE(a_batch_of_another_handle_is_refused),
    UNIT_CASE(a_large_batch_is_whole),
    UNIT_CASE(a_batch_over_the_format_s_limit_is_refused),
    UNIT_CASE(memory_bytes_max_is_kept),
    UNIT_CASE(a_write_without_memory_changes_nothing),
    UNIT_CASE(a_batch_without_memory_is_as_before),
};

UNIT_MAIN(cases)
