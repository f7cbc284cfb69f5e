/*
 * What the threads of a schedule do: writers, readers, and a host that asks
 * for background work.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_SCHED_ACTORS_H
#define KVMETA_TEST_SCHED_ACTORS_H

#include "world.h"

/* --------------------------------------------------------------------------
 * Reading
 * -------------------------------------------------------------------------- */

static struct history_event *read_begin(struct actor *a)
{
    struct history_event *e = history_read(&a->reader, &a->world->history);

    if (e == NULL) turn_fail("more reads than there is room for");
    memset(&a->extras[a->reader.count - 1], 0, sizeof a->extras[0]);
    return e;
}

static struct extra *read_extra(struct actor *a)
{
    return &a->extras[a->reader.count - 1];
}

static void read_end(struct actor *a)
{
    struct world *w = a->world;

    read_extra(a)->begun = (uint32_t)atomic_load(&w->history.tickets);
    world_saw(w, a->events[a->reader.count - 1].tickets);
}

/* The ticket of a group, by a key that is always there. */
static uint32_t read_one(struct actor *a, unsigned group)
{
    const struct records *r = a->world->records;
    struct history_event *e = read_begin(a);
    unsigned members = group < SINGLES ? 1 : r->always;
    size_t i = r->index[group][test_rng_below(&a->rng, members)];

    OK(kvmeta_get(a->world->db, records_key_at(r, i), a->values));
    e->tickets[group] = records_ticket(r, i, a->values);
    read_end(a);
    return e->tickets[group];
}

/* What get_many found of the keys first .. first + n - 1. */
static void read_found(struct actor *a, struct view *view, size_t first,
                       size_t n)
{
    const struct records *r = a->world->records;
    size_t i;

    view_init(view);
    for (i = 0; i < n; i++) {
        if (a->found[i]) {
            view_enter(r, view, first + i, a->values + i * r->value_bytes);
        }
    }
    if (n == r->count) view_check(r, view);
}

/* All keys, or some neighbours of which a part may be absent, or those that
 * are put alone (the first ones), with few others: up to 32 keys are looked up
 * while puts may arrive, more are read as a snapshot is. */
static void read_many(struct actor *a)
{
    const struct records *r = a->world->records;
    struct history_event *e = read_begin(a);
    size_t first = 0, n = r->count;
    struct view view;

    switch (a->world->puts_only ? 1 : test_rng_below(&a->rng, 4)) {
    case 0:
        first = test_rng_below(&a->rng, r->count);
        n = 1 + test_rng_below(&a->rng, r->count - first);
        break;
    case 1:
    case 2: n = SINGLES + test_rng_below(&a->rng, 32 - SINGLES + 1); break;
    default: break;
    }
    OK(kvmeta_get_many(a->world->db, records_key_at(r, first), n, a->values,
                       a->found));
    read_found(a, &view, first, n);
    memcpy(e->tickets, view.tickets, sizeof e->tickets);
    read_end(a);
}

static void read_scan(struct actor *a)
{
    struct world *w = a->world;
    struct history_event *e = read_begin(a);
    struct crash_scan scan = {.records = w->records};

    view_init(&scan.view);
    OK(kvmeta_scan(w->db, NULL, NULL, crash_see, &scan));
    view_check(w->records, &scan.view);
    memcpy(e->tickets, scan.view.tickets, sizeof e->tickets);
    read_end(a);
}

static void read_count(struct actor *a)
{
    read_begin(a);
    read_extra(a)->has_count = 1;
    read_extra(a)->count = kvmeta_count(a->world->db);
    read_end(a);
}

static void read_digest(struct actor *a)
{
    read_begin(a);
    read_extra(a)->has_digest = 1;
    read_extra(a)->digest = kvmeta_digest(a->world->db);
    read_end(a);
}

/* --------------------------------------------------------------------------
 * Snapshots
 * -------------------------------------------------------------------------- */

static void snapshot_by_cursor(struct actor *a, kvmeta_snapshot *snapshot,
                               struct view *view)
{
    const struct records *r = a->world->records;
    int back = (int)test_rng_below(&a->rng, 2), rc;
    struct crash_scan scan = {.records = r};
    kvmeta_cursor *cursor;

    view_init(&scan.view);
    OK(kvmeta_cursor_open(snapshot, &cursor));
    rc = back ? kvmeta_cursor_last(cursor) : kvmeta_cursor_first(cursor);
    while (rc == KVMETA_OK) {
        if (back) scan.at = 0;
        crash_see(&scan, kvmeta_cursor_key(cursor),
                  kvmeta_cursor_value(cursor));
        turn_point(TURN_ATOMIC, "cursor");
        rc = back ? kvmeta_cursor_prev(cursor) : kvmeta_cursor_next(cursor);
    }
    WANT(rc == KVMETA_NOT_FOUND);
    kvmeta_cursor_close(cursor);
    *view = scan.view;
}

static void snapshot_by_keys(struct actor *a, kvmeta_snapshot *snapshot,
                             struct view *view)
{
    const struct records *r = a->world->records;

    OK(kvmeta_snapshot_get_many(snapshot, r->keys, r->count, a->values,
                                a->found));
    read_found(a, view, 0, r->count);
}

/* Count and digest of a snapshot are those of its records. */
static void snapshot_check(struct actor *a, kvmeta_snapshot *snapshot,
                           const struct view *view)
{
    const struct records *r = a->world->records;
    unsigned g;

    view_check(r, view);
    for (g = 0; g < GROUPS; g++) WANT(view->tickets[g] != NO_TICKET);
    WANT(kvmeta_snapshot_count(snapshot) == view->count);
    WANT(view_count(r, view->tickets) == view->count);
    WANT(digest_same(kvmeta_snapshot_digest(snapshot),
                     view_digest(r, view->tickets)));
}

/* Takes one, reads it, lets time go by, and reads it again. */
static void read_snapshot(struct actor *a)
{
    struct world *w = a->world;
    struct history_event *e = read_begin(a);
    uint64_t pause = test_rng_below(&a->rng, 4);
    kvmeta_snapshot *snapshot;
    struct view first, second;

    OK(kvmeta_snapshot_take(w->db, &snapshot));
    read_extra(a)->begun = (uint32_t)atomic_load(&w->history.tickets);
    e->exact_seq = kvmeta_snapshot_seq(snapshot);
    snapshot_by_cursor(a, snapshot, &first);
    snapshot_check(a, snapshot, &first);
    memcpy(e->tickets, first.tickets, sizeof e->tickets);
    world_saw(w, e->tickets);
    for (; pause > 0; pause--) turn_yield("holds a snapshot");
    snapshot_by_keys(a, snapshot, &second);
    snapshot_check(a, snapshot, &second);
    WANT(memcmp(first.tickets, second.tickets, sizeof first.tickets) == 0);
    kvmeta_snapshot_release(snapshot);
}

static void *run_reader(void *arg)
{
    struct actor *a = arg;
    unsigned i;

    for (i = 0; i < a->ops; i++) {
        if (a->world->puts_only && test_rng_below(&a->rng, 4) > 0) {
            read_many(a);
            continue;
        }
        switch (test_rng_below(&a->rng, 10)) {
        case 0: read_scan(a); break;
        case 1:
        case 2: read_snapshot(a); break;
        case 3:
        case 4: read_many(a); break;
        case 5: read_count(a); break;
        case 6: read_digest(a); break;
        default:
            read_one(a, (unsigned)test_rng_below(&a->rng, GROUPS));
        }
    }
    return NULL;
}

/* --------------------------------------------------------------------------
 * Writing
 * -------------------------------------------------------------------------- */

#define OPS_MAX (4 * MEMBERS_MAX + 1)

/* The operations of a batch, and the values that they point to. */
struct operations {
    struct kvmeta_op ops[OPS_MAX];
    size_t count;
    unsigned char *values;
    size_t value_count;
};

static void operations_add(const struct records *r, struct operations *o,
                           int type, size_t i, uint32_t ticket)
{
    struct kvmeta_op *op = &o->ops[o->count++];

    assert(o->count <= OPS_MAX);
    op->type = type;
    op->key = records_key_at(r, i);
    op->value = NULL;
    if (ticket != NO_TICKET) {
        op->value = o->values + o->value_count * r->value_bytes;
        records_value(r, i, ticket,
                      o->values + o->value_count++ * r->value_bytes);
    }
}

static void operations_fill(const struct records *r, struct operations *o,
                            uint32_t groups, uint32_t ticket)
{
    unsigned g, j;

    for (g = 0; g < GROUPS; g++) {
        for (j = 0; (groups >> g & 1) && j < records_members(r, g); j++) {
            int has = records_has(r, g, j, ticket);

            operations_add(r, o, has ? KVMETA_OP_PUT : KVMETA_OP_REMOVE,
                           r->index[g][j], has ? ticket : NO_TICKET);
        }
    }
}

/* Expects that the group is as `ticket` left it: one of the keys that are
 * always there, and one that may not be. */
static void operations_expect(const struct records *r, struct operations *o,
                              unsigned group, uint32_t ticket)
{
    unsigned last = records_members(r, group) - 1;

    operations_add(r, o, KVMETA_OP_EXPECT, r->index[group][0], ticket);
    if (last > 0) {
        operations_add(r, o, KVMETA_OP_EXPECT, r->index[group][last],
                       records_has(r, group, last, ticket) ? ticket
                                                           : NO_TICKET);
    }
}

static unsigned write_durability(struct actor *a)
{
    uint64_t dice = test_rng_below(&a->rng, 5);

    if (a->world->durable_only) return 0;
    if (a->world->buffered_only) return KVMETA_BUFFERED;
    return dice < 2 ? KVMETA_DURABLE : dice < 3 ? KVMETA_WRITTEN
                                                : KVMETA_BUFFERED;
}

/* Takes a ticket for these groups. */
static uint32_t write_begin_ticket(struct actor *a, uint32_t groups)
{
    struct world *w = a->world;
    uint32_t ticket = history_begin(&w->history, groups);
    struct attempt *attempt;

    if (ticket == NO_TICKET) turn_fail("more batches than there is room for");
    attempt = &w->attempts[ticket];
    memset(attempt, 0, sizeof *attempt);
    attempt->groups = groups;
    attempt->writer = a->number;
    attempt->puts = records_puts(w->records, groups, ticket);
    attempt->acked_before = atomic_load(&w->history.acked_seq);
    attempt->expect = NO_TICKET;
    return ticket;
}

/* What the call that has returned says of the ticket. */
static void write_end_ticket(struct actor *a, uint32_t ticket,
                             unsigned durability, int rc, uint64_t seq)
{
    struct world *w = a->world;
    struct attempt *attempt = &w->attempts[ticket];

    attempt->begun = (uint32_t)atomic_load(&w->history.tickets);
    if (rc == KVMETA_CONFLICT && attempt->expect != NO_TICKET) {
        attempt->conflict = 1;
        history_cancel(&w->history, ticket);
        return;
    }
    if (rc != KVMETA_OK) turn_fail("a write fails");
    if (durability != KVMETA_BUFFERED && !world_logged(w, ticket)) {
        turn_fail("acknowledged as written, and not in the log");
    }
    if (durability == 0 || durability == KVMETA_DURABLE) {
        WANT(world_durable(w, ticket));
        world_want_durable(w, w->disk.tickets[ticket].place);
    }
    if (seq == 0) seq = w->records->base_seq + w->disk.tickets[ticket].place;
    attempt->acked = 1;
    history_end(&w->history, ticket, seq);
}

static uint32_t write_draw_groups(struct actor *a)
{
    unsigned range = test_rng_below(&a->rng, 2) ? GROUPS : 3;
    uint32_t groups = 1u << test_rng_below(&a->rng, range);

    if (test_rng_below(&a->rng, 3) == 0) {
        groups |= 1u << test_rng_below(&a->rng, GROUPS);
        groups |= 1u << test_rng_below(&a->rng, GROUPS);
    }
    return groups;
}

/* A batch; with an expectation of its first
 * group when `expecting`. */
static void write_batch(struct actor *a, int expecting)
{
    struct world *w = a->world;
    uint32_t groups = write_draw_groups(a), held = NO_TICKET, ticket;
    unsigned durability = write_durability(a), g = 0;
    struct operations o = {.values = a->values};
    uint64_t seq = 0;
    int rc;

    while (!(groups >> g & 1)) g++;
    if (expecting) held = read_one(a, g);
    ticket = write_begin_ticket(a, groups);
    w->attempts[ticket].expect = held;
    if (expecting) operations_expect(w->records, &o, g, held);
    operations_fill(w->records, &o, groups, ticket);
    rc = kvmeta_write(w->db, o.ops, o.count, durability, &seq);
    write_end_ticket(a, ticket, durability, rc, seq);
}

/* A batch that is copied first. */
static void write_copied(struct actor *a)
{
    struct world *w = a->world;
    uint32_t groups = write_draw_groups(a), ticket;
    unsigned durability = write_durability(a);
    struct operations o = {.values = a->values};
    kvmeta_batch *batch;
    uint64_t seq = 0;
    size_t i;
    int rc;

    ticket = write_begin_ticket(a, groups);
    operations_fill(w->records, &o, groups, ticket);
    OK(kvmeta_batch_new(w->db, &batch));
    for (i = 0; i < o.count; i++) {
        rc = o.ops[i].type == KVMETA_OP_PUT
                 ? kvmeta_batch_put(batch, o.ops[i].key, o.ops[i].value)
                 : kvmeta_batch_remove(batch, o.ops[i].key);
        if (rc != KVMETA_OK) turn_fail("a batch does not take an operation");
    }
    rc = kvmeta_commit(w->db, batch, durability, &seq);
    kvmeta_batch_free(batch);
    write_end_ticket(a, ticket, durability, rc, seq);
}

/* Put or swap: they tell no commit number, but where the log has it at once
 * the log does. What a swap replaced is checked as if it had been expected. */
static void write_single(struct actor *a)
{
    struct world *w = a->world;
    const struct records *r = w->records;
    unsigned group = (unsigned)test_rng_below(&a->rng, SINGLES);
    unsigned durability = w->durable_only ? 0
                          : test_rng_below(&a->rng, 2) ? KVMETA_DURABLE
                                                       : KVMETA_WRITTEN;
    uint32_t ticket = write_begin_ticket(a, 1u << group);
    size_t i = r->index[group][0];
    unsigned char *previous = a->values + r->value_bytes;
    int rc;

    records_value(r, i, ticket, a->values);
    if (test_rng_below(&a->rng, 2)) {
        rc = kvmeta_put(w->db, records_key_at(r, i), a->values, durability);
    } else {
        rc = kvmeta_swap(w->db, records_key_at(r, i), a->values, previous,
                         durability);
        if (rc == KVMETA_OK) {
            w->attempts[ticket].expect = records_ticket(r, i, previous);
        }
    }
    write_end_ticket(a, ticket, durability, rc, 0);
}

/* One put, as a batch of one operation: that tells its number, though it may
 * be buffered and in no log yet. */
static void write_one_put(struct actor *a)
{
    struct world *w = a->world;
    const struct records *r = w->records;
    unsigned group = (unsigned)test_rng_below(&a->rng, SINGLES);
    unsigned durability = write_durability(a);
    uint32_t ticket = write_begin_ticket(a, 1u << group);
    struct operations o = {.values = a->values};
    uint64_t seq = 0;
    int rc;

    operations_fill(r, &o, 1u << group, ticket);
    rc = kvmeta_write(w->db, o.ops, o.count, durability, &seq);
    write_end_ticket(a, ticket, durability, rc, seq);
}

static void *run_writer(void *arg)
{
    struct actor *a = arg;
    unsigned i;

    for (i = 0; i < a->ops; i++) {
        switch (a->world->puts_only ? 0 : test_rng_below(&a->rng, 6)) {
        case 0:
        case 1:
            if (a->world->buffered_only || test_rng_below(&a->rng, 2)) {
                write_one_put(a);
            } else {
                write_single(a);
            }
            break;
        case 2: write_copied(a); break;
        case 3: write_batch(a, 1); break;
        default: write_batch(a, 0);
        }
        /* What this thread wrote, it sees. */
        if (test_rng_below(&a->rng, 3) == 0) {
            read_one(a, (unsigned)test_rng_below(&a->rng, GROUPS));
        }
    }
    return NULL;
}

/* --------------------------------------------------------------------------
 * The host
 * -------------------------------------------------------------------------- */

/* All that was acknowledged before a sync is durable after it. */
static void host_sync(struct world *w)
{
    uint32_t t, count = (uint32_t)atomic_load(&w->history.tickets);
    unsigned char acked[TICKETS_MAX];

    for (t = 1; t < count; t++) {
        acked[t] = (unsigned char)w->attempts[t].acked;
    }
    OK(kvmeta_sync(w->db));
    for (t = 1; t < count; t++) {
        if (acked[t] && !world_durable(w, t)) {
            turn_fail("acknowledged, then synced, and not on disk");
        }
    }
}

static void host_stats(struct world *w)
{
    struct kvmeta_stats s;

    s.struct_size = sizeof s;
    OK(kvmeta_stats(w->db, &s));
    WANT(s.durable_seq <= s.seq);
    WANT(s.background_errors == 0);
    world_want_durable(w, world_place(w, s.durable_seq));
    OK(kvmeta_last_error(w->db, NULL));
}

static void *run_host(void *arg)
{
    struct actor *a = arg;
    struct world *w = a->world;
    unsigned i, dice;
    int did;

    for (i = 0; i < a->ops; i++) {
        dice = (unsigned)test_rng_below(&a->rng, 10);
        switch (w->plan->host < 10 ? w->plan->host : dice) {
        case 0:
        case 1: OK(kvmeta_flush(w->db)); break;
        case 2: OK(kvmeta_compact(w->db)); break;
        case 3: OK(kvmeta_wait_idle(w->db)); break;
        case 4: OK(kvmeta_verify(w->db, NULL)); break;
        case 5: host_stats(w); break;
        case 6: crash_now(w); break;
        default:
            if (w->options.flags & KVMETA_NO_THREAD) {
                OK(kvmeta_step(w->db, &did));
            } else {
                host_sync(w);
            }
        }
    }
    return NULL;
}

#endif /* KVMETA_TEST_SCHED_ACTORS_H */
