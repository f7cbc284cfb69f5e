/*
 * One schedule: a store, what its threads are to do, and what they saw.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_SCHED_WORLD_H
#define KVMETA_TEST_SCHED_WORLD_H

#include "records.h"

#define WRITERS 2
#define READERS 2
#define ACTORS (WRITERS + READERS + 1)
#define HOST (ACTORS - 1)

/* What the seed says, but for the number of operations: fewer of them may
 * show the same failure. */
struct plan {
    uint64_t seed;
    uint64_t order;                  /* of the turns: another one for each */
    unsigned ops[ACTORS];
    unsigned host;                   /* the host's only kind of operation, of
                                        0..9; 10: any */
};

/* A batch that was asked for. */
struct attempt {
    uint32_t groups;
    unsigned puts;
    unsigned writer;
    uint64_t acked_before;           /* highest commit number, at its begin */
    uint32_t begun;                  /* tickets given out until its end */
    uint32_t expect;                 /* ticket of its first group before it,
                                        or NO_TICKET */
    int conflict;                    /* it was another one */
    int acked;
};

/* What a read saw beside tickets. */
struct extra {
    uint32_t begun;                  /* tickets given out until its end */
    int has_count, has_digest;
    uint64_t count;
    struct kvmeta_digest digest;
};

struct actor {
    struct world *world;
    unsigned number;
    unsigned ops;
    struct test_rng rng;
    struct history_reader reader;
    struct history_event events[EVENTS_MAX];
    struct extra extras[EVENTS_MAX];
    unsigned char *values;           /* of all keys */
    unsigned char found[KEYS_MAX];
};

struct world {
    const struct plan *plan;
    struct records *records;
    struct disk disk;
    struct test_alloc alloc;
    struct test_rng rng;
    struct kvmeta_options options;
    kvmeta *db;
    int durable_only;                /* every write is durable */
    int buffered_only;               /* ... or buffered */
    int puts_only;                   /* ... and of one record */
    uint64_t crash_at;               /* operation on files, 0: none */
    uint64_t crashes;
    struct history history;
    struct attempt attempts[TICKETS_MAX];
    struct actor actors[ACTORS];
    /* After the end: the ticket of each place in the order of commits, and
     * the state after it; 0 is the state before. */
    unsigned states;
    uint32_t order[TICKETS_MAX];
    uint32_t state[TICKETS_MAX][GROUPS];
};

#define OK(call)                                                              \
    ((call) == KVMETA_OK ? (void)0 : turn_fail("failed: " #call))
#define WANT(condition)                                                       \
    ((condition) ? (void)0 : turn_fail("not so: " #condition))

/* --------------------------------------------------------------------------
 * Durability, as the watch on the logs sees it
 * -------------------------------------------------------------------------- */

static int world_durable(const struct world *w, uint32_t ticket)
{
    return disk_is_durable(&w->disk, ticket, w->attempts[ticket].puts);
}

static int world_logged(const struct world *w, uint32_t ticket)
{
    return ticket == 0 ||
           w->disk.tickets[ticket].seen == w->attempts[ticket].puts;
}

/* In durable mode nothing is seen that is not on disk. */
static void world_saw(const struct world *w, const uint32_t *tickets)
{
    unsigned g;

    for (g = 0; w->durable_only && g < GROUPS; g++) {
        if (tickets[g] != NO_TICKET && !world_durable(w, tickets[g])) {
            turn_fail("a read saw what is not on disk");
        }
    }
}

/* Every batch that is in the logs no later than this one. */
static void world_want_durable(const struct world *w, unsigned place)
{
    uint32_t t, count = (uint32_t)atomic_load(&w->history.tickets);

    for (t = 1; t < count; t++) {
        unsigned p = w->disk.tickets[t].place;

        if (p != 0 && p <= place && !world_durable(w, t)) {
            turn_fail("acknowledged as durable, and not on disk");
        }
    }
}

/* --------------------------------------------------------------------------
 * The order of commits, once it is over
 * -------------------------------------------------------------------------- */

/* The logs give the order; commit numbers that were returned must agree. */
static void world_order(struct world *w)
{
    uint32_t t, count = (uint32_t)atomic_load(&w->history.tickets);

    w->states = w->disk.places + 1;
    w->order[0] = 0;
    for (t = 1; t < count; t++) {
        unsigned place = w->disk.tickets[t].place;
        struct history_batch *batch = &w->history.batches[t];

        if (batch->groups == 0) {
            if (place != 0) turn_fail("a conflict was logged");
            continue;
        }
        if (place == 0) turn_fail("a batch is not in the logs");
        if (!world_logged(w, t)) {
            turn_fail("a batch is in the logs twice, or in part");
        }
        if (batch->seq != w->records->base_seq + place) {
            turn_fail("commit numbers do not follow the order of the logs");
        }
        if (w->attempts[t].acked_before >= batch->seq) {
            turn_fail("a batch came before one acknowledged before it");
        }
        w->order[place] = t;
    }
}

static void world_states(struct world *w)
{
    unsigned s, g;

    memset(w->state[0], 0, sizeof w->state[0]);
    for (s = 1; s < w->states; s++) {
        memcpy(w->state[s], w->state[s - 1], sizeof w->state[s]);
        for (g = 0; g < GROUPS; g++) {
            if (w->attempts[w->order[s]].groups >> g & 1) {
                w->state[s][g] = w->order[s];
            }
        }
    }
}

/* The place of a commit number. */
static unsigned world_place(const struct world *w, uint64_t seq)
{
    return seq <= w->records->base_seq
               ? 0 : (unsigned)(seq - w->records->base_seq);
}

/* --------------------------------------------------------------------------
 * The check
 * -------------------------------------------------------------------------- */

/* A batch with an expectation, or a swap, against the state right before it;
 * a conflict needs one state, while it ran, that did not meet it. */
static void world_check_attempt(const struct world *w, uint32_t ticket)
{
    const struct attempt *a = &w->attempts[ticket];
    unsigned s = w->disk.tickets[ticket].place, g = 0;

    if (a->expect == NO_TICKET) return;
    while (!(a->groups >> g & 1)) g++;
    if (!a->conflict) {
        if (w->state[s - 1][g] != a->expect) {
            turn_fail("a batch was done though its expectation did not hold");
        }
        return;
    }
    for (s = world_place(w, a->acked_before); s < w->states; s++) {
        if (w->order[s] >= a->begun) break;
        if (w->state[s][g] != a->expect) return;
    }
    turn_fail("a conflict though the expectation held all the time");
}

static int world_event_matches(const struct world *w,
                               const struct history_event *e,
                               const struct extra *x, unsigned s)
{
    unsigned g;

    for (g = 0; g < GROUPS; g++) {
        if (e->tickets[g] != NO_TICKET && e->tickets[g] != w->state[s][g]) {
            return 0;
        }
    }
    if (x->has_count &&
        x->count != view_count(w->records, w->state[s])) {
        return 0;
    }
    return !x->has_digest ||
           digest_same(x->digest, view_digest(w->records, w->state[s]));
}

/* Some state that was there at the time, not before *floor, must be as seen:
 * tickets, count and digest together. */
static void world_check_event(const struct world *w,
                              const struct history_event *e,
                              const struct extra *x, unsigned *floor)
{
    unsigned s = world_place(w, e->acked_seq);
    unsigned exact = world_place(w, e->exact_seq);

    s = s > *floor ? s : *floor;
    for (; s < w->states && w->order[s] < x->begun; s++) {
        if (e->exact_seq != 0 && s != exact) continue;
        if (world_event_matches(w, e, x, s)) {
            *floor = s;
            return;
        }
    }
    turn_fail("a read saw no state that was there at its time");
}

/* The first pass is the check that tests/threads makes, for its messages; the
 * second one is exact. */
static void world_check_reader(struct world *w, struct actor *a)
{
    const char *wrong = history_check(&w->history, &a->reader);
    unsigned floor = 0;
    size_t i;

    if (wrong != NULL) turn_fail(wrong);
    for (i = 0; i < a->reader.count; i++) {
        world_check_event(w, &a->events[i], &a->extras[i], &floor);
    }
}

/* After the close: everything that was done and seen. */
static void world_check(struct world *w)
{
    uint32_t last[GROUPS], t;
    const char *wrong;
    unsigned i;

    world_order(w);
    world_states(w);
    wrong = history_close(&w->history, last);
    if (wrong != NULL) turn_fail(wrong);
    WANT(memcmp(last, w->state[w->states - 1], sizeof last) == 0);
    for (i = 0; i < ACTORS; i++) world_check_reader(w, &w->actors[i]);
    for (t = 1; t < (uint32_t)atomic_load(&w->history.tickets); t++) {
        world_check_attempt(w, t);
    }
}

/* --------------------------------------------------------------------------
 * A crash, and what is found after it
 * -------------------------------------------------------------------------- */

struct crash_scan {
    const struct records *records;
    struct view view;
    size_t at;
};

static int crash_see(void *user, const void *key, const void *value)
{
    struct crash_scan *scan = user;
    const struct records *r = scan->records;

    while (scan->at < r->count &&
           memcmp(records_key_at(r, scan->at), key, r->key_bytes) != 0) {
        scan->at++;
    }
    if (scan->at == r->count) turn_fail("a scan saw a foreign key");
    view_enter(r, &scan->view, scan->at, value);
    return 0;
}

/* All of a store; *tickets gets its state. */
static void crash_read(const struct records *r, kvmeta *db, uint32_t *tickets)
{
    struct crash_scan scan = {.records = r};
    unsigned g;

    view_init(&scan.view);
    OK(kvmeta_scan(db, NULL, NULL, crash_see, &scan));
    for (g = 0; g < GROUPS; g++) WANT(scan.view.tickets[g] != NO_TICKET);
    view_check(r, &scan.view);
    memcpy(tickets, scan.view.tickets, sizeof scan.view.tickets);
    WANT(kvmeta_count(db) == scan.view.count);
    WANT(digest_same(kvmeta_digest(db), view_digest(r, tickets)));
}

/* The state after the first n batches in the order of the logs. */
static void crash_state(const struct world *w, unsigned n, uint32_t *tickets)
{
    unsigned place, g;
    uint32_t t;

    memset(tickets, 0, GROUPS * sizeof *tickets);
    for (place = 1; place <= n; place++) {
        for (t = 1; w->disk.tickets[t].place != place; t++) {
        }
        for (g = 0; g < GROUPS; g++) {
            if (w->attempts[t].groups >> g & 1) tickets[g] = t;
        }
    }
}

/* Is it the state after n batches, for some n that is not less than those
 * known to be durable? */
static void crash_judge(const struct world *w, const uint32_t *tickets)
{
    uint32_t want[GROUPS], t;
    unsigned n = 0;

    for (t = 1; t < TICKETS_MAX; t++) {
        if (w->disk.tickets[t].durable != 0 && world_durable(w, t) &&
            w->disk.tickets[t].place > n) {
            n = w->disk.tickets[t].place;
        }
    }
    for (; n <= w->disk.places; n++) {
        crash_state(w, n, want);
        if (memcmp(want, tickets, sizeof want) == 0) return;
    }
    turn_fail("after a crash: not a state that may be there");
}

/* Cuts the power at this moment, and opens what one of the possible states
 * of the disk holds. */
static void crash_now(struct world *w)
{
    static struct sim_fs fs;
    struct kvmeta_options options = w->options;
    uint32_t tickets[GROUPS];
    struct sim_cut cut;
    uint64_t skip = test_rng_below(&w->rng, 3);
    int there;
    kvmeta *db;

    turns.off++;
    sim_cut_begin(&cut, &w->disk.fs, 4, 0, test_rng_u64(&w->rng));
    for (there = sim_cut_next(&cut, &fs); there && skip > 0; skip--) {
        sim_free(&fs);
        there = sim_cut_next(&cut, &fs);
    }
    if (!there) {
        sim_cut_end(&cut);
        turns.off--;
        return;
    }
    options.vfs = &fs.vfs;
    options.flags = KVMETA_NO_THREAD;
    options.open_threads = 1;
    db = records_open(&options);
    crash_read(w->records, db, tickets);
    OK(kvmeta_close(db));
    crash_judge(w, tickets);
    w->crashes++;
    sim_free(&fs);
    sim_cut_end(&cut);
    turns.off--;
}

/* Every call that changes the disk is a point, and may be the last one. */
static void world_on_op(void *user, struct sim_fs *fs, enum sim_call kind)
{
    struct world *w = user;

    turn_point(TURN_COARSE, sim_call_name((int)kind));
    if (w->crash_at != 0 && fs->ops >= w->crash_at) {
        w->crash_at = 0;
        crash_now(w);
    }
}

#endif /* KVMETA_TEST_SCHED_WORLD_H */
