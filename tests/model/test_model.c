/*
 * The store against a model of it: random operations with every width, tiny
 * limits, snapshots and cursors held across writes, and restarts; after each
 * operation the answer, and every now and then everything, is compared.
 *
 * A run draws its keys from a sorted universe made once, so that the model is
 * one number for each key: the stamp from which its value is made, or 0 for
 * no record. That makes the model exact, and copies of it for snapshots cheap.
 * Nothing here is about crashes, so the system calls are real but for the
 * syncs, which do nothing.
 *
 * SPDX-License-Identifier: MIT
 */
#include "model.h"

#include <setjmp.h>
#include <cmocka.h>

#define SEEDS_PER_SCALE 1000
#define OPS_PER_SEED 10000

/* --------------------------------------------------------------------------
 * Reads
 * -------------------------------------------------------------------------- */

static void op_get(struct model *m)
{
    size_t i = model_pick(m);
    int rc;

    memset(m->got, 0xdd, m->value_bytes);
    if (test_rng_below(&m->rng, 4) == 0) {
        rc = kvmeta_has(m->db, model_key(m, i));
        CHECK(m, rc == (m->stamps[i] ? KVMETA_OK : KVMETA_NOT_FOUND));
        return;
    }
    rc = kvmeta_get(m->db, model_key(m, i), m->got);
    CHECK(m, rc == (m->stamps[i] ? KVMETA_OK : KVMETA_NOT_FOUND));
    CHECK(m, rc != KVMETA_OK || model_value_is(m, m->got, m->stamps[i]));
}

/* A key that is in the universe only by chance. */
static void op_get_stranger(struct model *m)
{
    size_t i;
    int rc, there;

    model_stranger(m, m->key);
    i = model_find(m, m->key);
    there = i < m->universe && m->stamps[i] &&
            memcmp(model_key(m, i), m->key, m->key_bytes) == 0;
    rc = kvmeta_get(m->db, m->key, m->got);
    CHECK(m, rc == (there ? KVMETA_OK : KVMETA_NOT_FOUND));
}

static void check_many(struct model *m, const uint64_t *stamps,
                       const size_t *picks, size_t n)
{
    size_t i;

    for (i = 0; i < n; i++) {
        CHECK(m, m->found[i] == (stamps[picks[i]] != 0));
        CHECK(m, !m->found[i] ||
                     model_value_is(m, m->many_values + i * m->value_bytes,
                                    stamps[picks[i]]));
    }
}

static void op_get_many(struct model *m)
{
    size_t n = test_rng_below(&m->rng, MODEL_MANY + 1), i;
    size_t picks[MODEL_MANY];
    struct held *held = model_held(m);

    for (i = 0; i < n; i++) {
        picks[i] = model_pick(m);
        memcpy(m->many_keys + i * m->key_bytes, model_key(m, picks[i]),
               m->key_bytes);
    }
    if (held != NULL && test_rng_below(&m->rng, 2)) {
        CHECK(m, kvmeta_snapshot_get_many(held->snapshot, m->many_keys, n,
                                          m->many_values, m->found) == 0);
        check_many(m, held->stamps, picks, n);
        return;
    }
    CHECK(m, kvmeta_get_many(m->db, m->many_keys, n, m->many_values,
                             m->found) == 0);
    check_many(m, m->stamps, picks, n);
}

struct range {
    struct model *m;
    size_t at, to;                   /* in the universe */
    uint64_t left;                   /* records until it ends the scan */
};

static int range_step(void *user, const void *key, const void *value)
{
    struct range *range = user;
    struct model *m = range->m;

    range->at = model_next(m, m->stamps, range->at);
    if (range->at >= range->to ||
        memcmp(model_key(m, range->at), key, m->key_bytes) != 0 ||
        !model_value_is(m, value, m->stamps[range->at])) {
        return -99;
    }
    range->at++;
    return --range->left == 0 ? 7 : 0;
}

static void op_scan(struct model *m)
{
    struct range range = {m, 0, m->universe, 0};
    const void *from = NULL, *to = NULL;
    int rc;

    range.left = 1 + test_rng_below(&m->rng, 100);
    if (test_rng_below(&m->rng, 4)) {
        model_stranger(m, m->key);
        range.at = model_find(m, m->key);
        from = m->key;
    }
    if (test_rng_below(&m->rng, 4)) {
        model_stranger(m, m->key2);
        range.to = model_find(m, m->key2);
        to = m->key2;
    }
    rc = kvmeta_scan(m->db, from, to, range_step, &range);
    CHECK(m, rc == (range.left == 0 ? 7 : 0));
    CHECK(m, rc != 0 || model_next(m, m->stamps, range.at) >= range.to);
}

/* --------------------------------------------------------------------------
 * Single writes
 * -------------------------------------------------------------------------- */

static void op_put(struct model *m)
{
    size_t i = model_pick(m);
    uint64_t stamp = ++m->next_stamp;

    model_value(m, stamp, m->value);
    CHECK(m, kvmeta_put(m->db, model_key(m, i), m->value,
                        model_durability(m)) == KVMETA_OK);
    model_set(m, i, stamp);
}

static void op_remove(struct model *m)
{
    size_t i = model_pick(m);
    int rc = kvmeta_remove(m->db, model_key(m, i), model_durability(m));

    CHECK(m, rc == (m->stamps[i] ? KVMETA_OK : KVMETA_NOT_FOUND));
    model_set(m, i, 0);
}

static void op_swap(struct model *m)
{
    size_t i = model_pick(m);
    uint64_t stamp = ++m->next_stamp;
    int rc;

    model_value(m, stamp, m->value);
    memset(m->got, 0xdd, m->value_bytes);
    rc = kvmeta_swap(m->db, model_key(m, i), m->value, m->got,
                     model_durability(m));
    CHECK(m, rc == (m->stamps[i] ? KVMETA_OK : KVMETA_NOT_FOUND));
    CHECK(m, rc != KVMETA_OK || model_value_is(m, m->got, m->stamps[i]));
    model_set(m, i, stamp);
}

/* --------------------------------------------------------------------------
 * Batches
 * -------------------------------------------------------------------------- */

/* Fills one operation; an expectation mostly tells the truth. */
static void fill_op(struct model *m, struct model_op *op)
{
    uint64_t dice = test_rng_below(&m->rng, 100);

    op->key = model_pick(m);
    op->stamp = 0;
    if (dice < (m->shrinking ? 30u : 60u)) {
        op->type = KVMETA_OP_PUT;
        op->stamp = ++m->next_stamp;
    } else if (dice < 93) {
        op->type = KVMETA_OP_REMOVE;
    } else {
        op->type = KVMETA_OP_EXPECT;
        op->stamp = m->stamps[op->key];
        if (test_rng_below(&m->rng, 12) == 0) {
            op->stamp = op->stamp ? 0 : m->next_stamp + 1;
        }
    }
}

static int expectation_holds(struct model *m, const struct model_op *op)
{
    uint64_t stamp = m->stamps[op->key];

    if (op->type != KVMETA_OP_EXPECT) {
        return 1;
    }
    if (stamp == 0 || op->stamp == 0) {
        return stamp == op->stamp;
    }
    model_value(m, op->stamp, m->value);
    return model_value_is(m, m->value, stamp);
}

/* Applies the batch to the model; returns whether it surely changes
 * something (2), surely nothing (0), or may have no net effect (1). */
static int apply_ops(struct model *m, size_t n)
{
    const struct model_op *op;
    int effect = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        op = &m->ops[i];
        if (op->type == KVMETA_OP_EXPECT) {
            continue;
        }
        if (op->type == KVMETA_OP_PUT || m->stamps[op->key] != 0) {
            effect = n == 1 && (op->stamp == 0) != (m->stamps[op->key] == 0)
                         ? 2 : 1;
        }
        model_set(m, op->key, op->stamp);
    }
    return effect;
}

static int write_array(struct model *m, size_t n, uint64_t *seq)
{
    unsigned char *value;
    size_t i;

    for (i = 0; i < n; i++) {
        value = m->batch_values + i * m->value_bytes;
        model_value(m, m->ops[i].stamp, value);
        m->array[i].type = m->ops[i].type;
        m->array[i].key = model_key(m, m->ops[i].key);
        m->array[i].value = m->ops[i].stamp ? value : NULL;
    }
    return kvmeta_write(m->db, m->array, n, model_durability(m), seq);
}

static int add_to_batch(struct model *m, const struct model_op *op)
{
    const unsigned char *key = model_key(m, op->key);

    model_value(m, op->stamp, m->value);
    if (op->type == KVMETA_OP_PUT) {
        return kvmeta_batch_put(m->batch, key, m->value);
    }
    if (op->type == KVMETA_OP_REMOVE) {
        return kvmeta_batch_remove(m->batch, key);
    }
    return kvmeta_batch_expect(m->batch, key, op->stamp ? m->value : NULL);
}

static int write_batch(struct model *m, size_t n, uint64_t *seq)
{
    size_t i;

    if (m->batch == NULL) {
        CHECK(m, kvmeta_batch_new(m->db, &m->batch) == KVMETA_OK);
    }
    kvmeta_batch_clear(m->batch);
    for (i = 0; i < n; i++) {
        CHECK(m, add_to_batch(m, &m->ops[i]) == KVMETA_OK);
    }
    CHECK(m, kvmeta_batch_count(m->batch) == n);
    return kvmeta_commit(m->db, m->batch, model_durability(m), seq);
}

static void op_batch(struct model *m)
{
    size_t n = test_rng_below(&m->rng, 24), i;
    uint64_t before = model_stats(m).seq, seq = UINT64_MAX;
    int holds = 1, rc, effect;

    if (test_rng_below(&m->rng, 24) == 0) {
        n = test_rng_below(&m->rng, MODEL_BATCH + 1);
    }
    for (i = 0; i < n; i++) {
        fill_op(m, &m->ops[i]);
        if (n > 24 && m->ops[i].type == KVMETA_OP_EXPECT) {
            m->ops[i].type = KVMETA_OP_REMOVE;
            m->ops[i].stamp = 0;
        }
        holds &= expectation_holds(m, &m->ops[i]);
    }
    rc = test_rng_below(&m->rng, 2) ? write_array(m, n, &seq)
                                    : write_batch(m, n, &seq);
    CHECK(m, rc == (holds ? KVMETA_OK : KVMETA_CONFLICT));
    if (!holds) {
        CHECK(m, seq == UINT64_MAX && model_stats(m).seq == before);
        return;
    }
    effect = apply_ops(m, n);
    CHECK(m, seq >= before && seq == model_stats(m).seq);
    CHECK(m, effect != 0 || seq == before);
    CHECK(m, effect != 2 || seq > before);
}

/* --------------------------------------------------------------------------
 * Snapshots and cursors
 * -------------------------------------------------------------------------- */

/* Everything about a snapshot: sums, and all its records by a cursor that
 * walks up or down. */
static void check_held(struct model *m, struct held *held)
{
    int up = (int)test_rng_below(&m->rng, 2), rc;
    kvmeta_cursor *cursor;
    uint64_t seen = 0;
    size_t i;

    CHECK(m, kvmeta_snapshot_count(held->snapshot) == held->count);
    CHECK(m, kvmeta_snapshot_seq(held->snapshot) == held->seq);
    CHECK(m, model_same(kvmeta_snapshot_digest(held->snapshot),
                        held->digest));
    CHECK(m, kvmeta_cursor_open(held->snapshot, &cursor) == KVMETA_OK);
    i = up ? model_next(m, held->stamps, 0)
           : model_prev(held->stamps, m->universe);
    rc = up ? kvmeta_cursor_first(cursor) : kvmeta_cursor_last(cursor);
    while (rc == KVMETA_OK) {
        CHECK(m, i < m->universe);
        CHECK(m, model_at(m, cursor, held->stamps, i));
        seen++;
        i = up ? model_next(m, held->stamps, i + 1)
               : model_prev(held->stamps, i);
        rc = up ? kvmeta_cursor_next(cursor) : kvmeta_cursor_prev(cursor);
    }
    CHECK(m, rc == KVMETA_NOT_FOUND && seen == held->count);
    kvmeta_cursor_close(cursor);
}

static void op_take(struct model *m)
{
    struct held *held = &m->held[test_rng_below(&m->rng, MODEL_HELD)];

    if (held->snapshot != NULL) {
        return;
    }
    CHECK(m, kvmeta_snapshot_take(m->db, &held->snapshot) == KVMETA_OK);
    CHECK(m, kvmeta_cursor_open(held->snapshot, &held->cursor) == KVMETA_OK);
    memcpy(held->stamps, m->stamps, m->universe * sizeof *m->stamps);
    held->count = m->count;
    held->seq = model_stats(m).seq;
    held->digest = kvmeta_digest(m->db);
    held->at = MODEL_NOWHERE;
    held->kept = NULL;
}

/* A value whose address was kept while the cursor moved on. */
static void check_kept(struct model *m, const struct held *held)
{
    CHECK(m, held->kept == NULL ||
                 model_value_is(m, held->kept, held->kept_stamp));
}

static void release(struct model *m, struct held *held)
{
    check_kept(m, held);
    kvmeta_cursor_close(held->cursor);
    kvmeta_snapshot_release(held->snapshot);
    held->snapshot = NULL;
    held->cursor = NULL;
}

static void op_release(struct model *m)
{
    struct held *held = model_held(m);

    if (held != NULL) {
        release(m, held);
    }
}

static void op_check_held(struct model *m)
{
    struct held *held = model_held(m);

    if (held != NULL && model_can_afford(m)) {
        check_held(m, held);
    }
}

static int cursor_seek(struct model *m, struct held *held)
{
    model_stranger(m, m->key);
    held->at = model_next(m, held->stamps, model_find(m, m->key));
    return kvmeta_cursor_seek(held->cursor, m->key);
}

static int cursor_seek_le(struct model *m, struct held *held)
{
    size_t i;

    model_stranger(m, m->key);
    i = model_find(m, m->key);
    if (i < m->universe && held->stamps[i] &&
        memcmp(model_key(m, i), m->key, m->key_bytes) == 0) {
        held->at = i;
    } else {
        held->at = model_prev(held->stamps, i);
    }
    return kvmeta_cursor_seek_le(held->cursor, m->key);
}

static int cursor_move(struct model *m, struct held *held)
{
    int placed = held->at < m->universe;

    switch (test_rng_below(&m->rng, 10)) {
    case 0:
        held->at = model_next(m, held->stamps, 0);
        return kvmeta_cursor_first(held->cursor);
    case 1:
        held->at = model_prev(held->stamps, m->universe);
        return kvmeta_cursor_last(held->cursor);
    case 2:
        return cursor_seek(m, held);
    case 3:
        return cursor_seek_le(m, held);
    case 4:
    case 5:
    case 6:
        if (placed) held->at = model_next(m, held->stamps, held->at + 1);
        return kvmeta_cursor_next(held->cursor);
    default:
        if (placed) held->at = model_prev(held->stamps, held->at);
        return kvmeta_cursor_prev(held->cursor);
    }
}

static void op_cursor(struct model *m)
{
    struct held *held = model_held(m);
    int steps = 4, rc;

    while (held != NULL && steps-- > 0) {
        rc = cursor_move(m, held);
        if (held->at >= m->universe) {
            held->at = MODEL_NOWHERE;
            CHECK(m, rc == KVMETA_NOT_FOUND);
            CHECK(m, kvmeta_cursor_key(held->cursor) == NULL);
            CHECK(m, kvmeta_cursor_value(held->cursor) == NULL);
            continue;
        }
        CHECK(m, rc == KVMETA_OK);
        CHECK(m, model_at(m, held->cursor, held->stamps, held->at));
        check_kept(m, held);
        held->kept = kvmeta_cursor_value(held->cursor);
        held->kept_stamp = held->stamps[held->at];
    }
}

/* --------------------------------------------------------------------------
 * The whole store
 * -------------------------------------------------------------------------- */

static void check_all(struct model *m)
{
    struct range range = {m, 0, m->universe, 0};
    struct kvmeta_stats s = model_stats(m);

    range.left = UINT64_MAX;
    CHECK(m, kvmeta_count(m->db) == m->count);
    CHECK(m, kvmeta_scan(m->db, NULL, NULL, range_step, &range) == 0);
    CHECK(m, model_next(m, m->stamps, range.at) >= m->universe);
    CHECK(m, s.records == m->count && s.durable_seq <= s.seq);
    CHECK(m, s.logical_bytes ==
                 m->count * ((uint64_t)m->key_bytes + m->value_bytes));
}

static void op_check(struct model *m)
{
    if (model_can_afford(m)) {
        check_all(m);
    }
}

static void op_verify(struct model *m)
{
    struct kvmeta_error err;

    if (model_can_afford(m)) {
        CHECK_ERR(m, kvmeta_verify(m->db, &err), &err);
    }
}

static void op_flush(struct model *m)
{
    CHECK(m, kvmeta_flush(m->db) == KVMETA_OK);
    CHECK(m, model_stats(m).logs_waiting == 0);
}

static void op_compact(struct model *m)
{
    struct kvmeta_stats s;

    if (!model_can_afford(m)) {
        return;
    }
    CHECK(m, kvmeta_compact(m->db) == KVMETA_OK);
    s = model_stats(m);
    CHECK(m, s.tables <= 1 && s.table_records == m->count);
}

static void op_background(struct model *m)
{
    int did;

    switch (test_rng_below(&m->rng, 4)) {
    case 0:
        CHECK(m, kvmeta_sync(m->db) == KVMETA_OK);
        CHECK(m, model_stats(m).durable_seq == model_stats(m).seq);
        return;
    case 1:
        CHECK(m, kvmeta_last_error(m->db, NULL) == KVMETA_OK);
        return;
    default:
        CHECK(m, kvmeta_step(m->db, &did) ==
                     (m->options.flags & KVMETA_NO_THREAD
                          ? KVMETA_OK : KVMETA_E_INVALID));
    }
}

static void restart(struct model *m)
{
    struct kvmeta_digest digest = kvmeta_digest(m->db);
    uint64_t seq = model_stats(m).seq;
    int i;

    for (i = 0; i < MODEL_HELD; i++) {
        if (m->held[i].snapshot != NULL) {
            CHECK(m, kvmeta_close(m->db) == KVMETA_E_INVALID);
            release(m, &m->held[i]);
        }
    }
    kvmeta_batch_free(m->batch);
    m->batch = NULL;
    CHECK(m, kvmeta_close(m->db) == KVMETA_OK);
    model_limits(m);
    model_open(m);
    CHECK(m, model_same(kvmeta_digest(m->db), digest));
    CHECK(m, model_stats(m).seq == seq);
    check_all(m);
}

static void op_restart(struct model *m)
{
    if (model_can_afford(m)) {
        restart(m);
    }
}

/* --------------------------------------------------------------------------
 * A run
 * -------------------------------------------------------------------------- */

static const struct {
    void (*fn)(struct model *m);
    unsigned weight;                 /* of 10,000 */
} operations[] = {
    {op_put, 2400},       {op_remove, 1200},     {op_swap, 600},
    {op_batch, 800},      {op_get, 1600},        {op_get_stranger, 550},
    {op_get_many, 500},   {op_scan, 600},        {op_take, 170},
    {op_check_held, 100}, {op_release, 150},     {op_cursor, 1000},
    {op_check, 40},       {op_verify, 20},       {op_flush, 15},
    {op_compact, 5},      {op_background, 230},  {op_restart, 20},
};

static void one_operation(struct model *m)
{
    uint64_t dice = test_rng_below(&m->rng, 10000);
    size_t i = 0;

    model_drift(m);
    while (dice >= operations[i].weight) {
        dice -= operations[i].weight;
        i++;
    }
    operations[i].fn(m);
}

static void one_run(uint64_t seed, uint64_t ops)
{
    struct model *m = model_new(seed);
    int i;

    for (m->op = 0; m->op < ops; m->op++) {
        one_operation(m);
    }
    for (i = 0; i < MODEL_HELD; i++) {
        if (m->held[i].snapshot != NULL) {
            check_held(m, &m->held[i]);
        }
    }
    restart(m);
    CHECK(m, kvmeta_verify(m->db, NULL) == KVMETA_OK);
    model_check_digest(m);
    model_free(m);
}

/* Goal: whatever is done, answers and records are those of the model; every
 * pair of widths, sizes from 16 to 8,192 keys. Method: see above. Scale 0,
 * for slow sanitizers, is a twentieth. */
static void random_operations_agree_with_the_model(void **state)
{
    uint64_t seeds = test_args.scale == 0 ? SEEDS_PER_SCALE / 20
                                          : SEEDS_PER_SCALE * test_args.scale;
    uint64_t ops = test_option_u64("ops", OPS_PER_SEED), i;
    uint64_t first = test_args.seed;

    (void)state;
    seeds = test_option_u64("seeds", seeds);
    for (i = 0; i < seeds; i++) {
        one_run(first + i, ops);
    }
    test_args.seed = first;
}

/* --------------------------------------------------------------------------
 * Growth and shrinking in orders that trees dislike
 * -------------------------------------------------------------------------- */

static size_t ordered(const struct model *m, int order, size_t i)
{
    switch (order) {
    case 0: return i;
    case 1: return m->universe - 1 - i;
    case 2: return i % 2 ? m->universe - 1 - i / 2 : i / 2;
    default: return (i * 7919) % m->universe;
    }
}

static void grow_and_shrink(struct model *m, int grow, int shrink)
{
    size_t i, k, step = m->universe / 3 + 1;

    for (i = 0; i < m->universe; i++) {
        k = ordered(m, grow, i);
        model_value(m, ++m->next_stamp, m->value);
        CHECK(m, kvmeta_put(m->db, model_key(m, k), m->value,
                            KVMETA_BUFFERED) == KVMETA_OK);
        model_set(m, k, m->next_stamp);
        if (i % step == 0) {
            CHECK(m, kvmeta_verify(m->db, NULL) == KVMETA_OK);
        }
    }
    check_all(m);
    for (i = 0; i < m->universe; i++) {
        k = ordered(m, shrink, i);
        CHECK(m, kvmeta_remove(m->db, model_key(m, k), KVMETA_BUFFERED) ==
                     (m->stamps[k] ? KVMETA_OK : KVMETA_NOT_FOUND));
        model_set(m, k, 0);
        if (i % step == 0) {
            CHECK(m, kvmeta_verify(m->db, NULL) == KVMETA_OK);
            check_all(m);
        }
    }
    CHECK(m, kvmeta_count(m->db) == 0);
}

/* Goal: ascending, descending, from both ends and scattered, every order of
 * filling with every order of emptying. Method: one seed for each pair of
 * widths; verify and a full comparison on the way. */
static void growth_and_shrinking_in_any_order(void **state)
{
    uint64_t seed, first = test_args.seed;
    struct model *m;

    (void)state;
    for (seed = 0; seed < 42; seed++) {
        m = model_new(first + seed);
        m->growing_test = 1;
        grow_and_shrink(m, (int)(seed % 4), (int)(seed / 4 % 4));
        grow_and_shrink(m, (int)(seed / 2 % 4), (int)(seed / 8 % 4));
        model_free(m);
    }
    test_args.seed = first;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_operations_agree_with_the_model),
        cmocka_unit_test(growth_and_shrinking_in_any_order),
    };

    test_parse_args(argc, argv);
    if (test_option("test") != NULL) {
        cmocka_set_test_filter(test_option("test"));
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
