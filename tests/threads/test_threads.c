/*
 * Threads against each other: writers of shared groups of keys and of keys of
 * their own, readers of all kinds, background work and verify, and a close
 * while that works. What readers saw is checked as a history; see history.h.
 * Under ThreadSanitizer the same program shows that nothing races.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#undef test_realloc                  /* cmocka's; support.h has its own */

#include <ftw.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kvmeta.h"
#include "../support/support.h"
#include "history.h"

#define ROUNDS_PER_SCALE 16
#define ROUND_MS 1000
#define WRITERS 3
#define READERS 3
#define GROUP_KEYS 8
#define SHARED (GROUPS * GROUP_KEYS)
#define OWN 1152                     /* keys of each writer */
#define COUNTER ((uint64_t)SHARED * 64)
#define KEY 16
#define VALUE 16
#define SECONDS_MAX 200

struct round {
    struct test_rng rng;
    uint64_t number;
    char dir[320];
    struct test_alloc alloc;
    struct kvmeta_options options;
    kvmeta *db;
    struct history history;
    int equal_heads;                 /* the first 8 key bytes are constant */
    int weak;                        /* writers also use WRITTEN, BUFFERED */
    atomic_int stop;
    atomic_uint_fast64_t increments;
    struct history_reader readers[READERS];
    /* One that all readers look at, for a while; the lock is for its end. */
    pthread_rwlock_t old_lock;
    kvmeta_snapshot *old;
    struct kvmeta_digest old_digest;
    uint64_t own[WRITERS][OWN];      /* stamp of each key, 0: none */
};

struct worker {
    struct round *round;
    int number;
    struct test_rng rng;
};

/* --------------------------------------------------------------------------
 * Failure
 * -------------------------------------------------------------------------- */

static struct round *round_running;

static void round_fail(const struct round *r, int line, const char *what,
                       const char *more)
{
    printf("%s:%d: round %llu: %s %s\n", __FILE__, line,
           (unsigned long long)r->number, what, more);
    test_args.seed = r->number;
    test_replay("--rounds 1");
    _exit(1);
}

#define WANT(r, condition)                                                    \
    ((condition) ? (void)0 : round_fail(r, __LINE__, #condition, ""))

static void hang(int signal_number)
{
    (void)signal_number;
    round_fail(round_running, __LINE__, "hangs", "");
}

/* --------------------------------------------------------------------------
 * Keys and values
 *
 * Numbers that are multiples of 64 are shared: the j-th key of group g is
 * (j * GROUPS + g) * 64, so that a group is spread over the tree. Those
 * between them belong to one writer each.
 * -------------------------------------------------------------------------- */

static void make_key(const struct round *r, uint64_t number,
                     unsigned char *key)
{
    memset(key, 0xab, KEY);
    kvmeta_u64_to_key(number, key + (r->equal_heads ? 8 : 0));
}

static uint64_t key_number(const struct round *r, const void *key)
{
    return kvmeta_key_to_u64((const unsigned char *)key +
                             (r->equal_heads ? 8 : 0));
}

static uint64_t shared_number(uint64_t group, uint64_t j)
{
    return (j * GROUPS + group) * 64;
}

static uint64_t own_number(int writer, uint64_t i)
{
    return i % SHARED * 64 + 1 + (uint64_t)writer * 12 + i / SHARED;
}

/* A stamp, and a check of it against its key: no torn or foreign value. */
static void make_value(uint64_t number, uint64_t stamp, unsigned char *value)
{
    struct test_rng rng = {number << 32 ^ stamp};

    kvmeta_u64_to_key(stamp, value);
    kvmeta_u64_to_key(test_rng_u64(&rng), value + 8);
}

static uint64_t value_stamp(const struct round *r, uint64_t number,
                            const unsigned char *value)
{
    unsigned char want[VALUE];
    uint64_t stamp = kvmeta_key_to_u64(value);

    make_value(number, stamp, want);
    WANT(r, memcmp(want, value, VALUE) == 0);
    return stamp;
}

/* --------------------------------------------------------------------------
 * Writers
 * -------------------------------------------------------------------------- */

static unsigned durability(struct worker *w)
{
    uint64_t dice = test_rng_below(&w->rng, 10);

    if (!w->round->weak || dice == 0) {
        return KVMETA_DURABLE;
    }
    return dice < 3 ? KVMETA_WRITTEN : KVMETA_BUFFERED;
}

/* The same operations by way of a batch that copies them. */
static uint64_t commit_copy(struct worker *w, const struct kvmeta_op *ops,
                            size_t n)
{
    struct round *r = w->round;
    kvmeta_batch *batch;
    uint64_t seq = 0;
    size_t i;

    WANT(r, kvmeta_batch_new(r->db, &batch) == KVMETA_OK);
    for (i = 0; i < n; i++) {
        WANT(r, kvmeta_batch_put(batch, ops[i].key, ops[i].value) ==
                    KVMETA_OK);
    }
    WANT(r, kvmeta_commit(r->db, batch, durability(w), &seq) == KVMETA_OK);
    kvmeta_batch_free(batch);
    return seq;
}

/* One ticket in every key of one to three groups. */
static void write_groups(struct worker *w)
{
    struct round *r = w->round;
    unsigned char keys[SHARED][KEY], values[SHARED][VALUE];
    struct kvmeta_op ops[SHARED];
    uint32_t groups = 0, ticket, g;
    uint64_t number, seq = 0;
    size_t n = 0, j;

    for (j = 1 + test_rng_below(&w->rng, 3); j > 0; j--) {
        groups |= 1u << test_rng_below(&w->rng, GROUPS);
    }
    ticket = history_begin(&r->history, groups);
    if (ticket == NO_TICKET) {
        return;
    }
    for (g = 0; g < GROUPS; g++) {
        for (j = 0; j < GROUP_KEYS && (groups >> g & 1); j++, n++) {
            number = shared_number(g, j);
            make_key(r, number, keys[n]);
            make_value(number, ticket, values[n]);
            ops[n].type = KVMETA_OP_PUT;
            ops[n].key = keys[n];
            ops[n].value = values[n];
        }
    }
    if (test_rng_below(&w->rng, 2)) {
        WANT(r, kvmeta_write(r->db, ops, n, durability(w), &seq) == KVMETA_OK);
    } else {
        seq = commit_copy(w, ops, n);
    }
    history_end(&r->history, ticket, seq);
}

/* A key that nobody else writes: every answer is known. */
static void write_own(struct worker *w, uint64_t stamp)
{
    struct round *r = w->round;
    uint64_t i = test_rng_below(&w->rng, OWN);
    uint64_t number = own_number(w->number, i);
    uint64_t *own = &r->own[w->number][i];
    unsigned char key[KEY], value[VALUE], old[VALUE];
    int rc, there = *own ? KVMETA_OK : KVMETA_NOT_FOUND;

    make_key(r, number, key);
    make_value(number, stamp, value);
    switch (test_rng_below(&w->rng, 4)) {
    case 0:
        rc = kvmeta_remove(r->db, key, durability(w));
        WANT(r, rc == there);
        *own = 0;
        break;
    case 1:
        rc = kvmeta_swap(r->db, key, value, old, durability(w));
        WANT(r, rc == there);
        WANT(r, rc != KVMETA_OK || value_stamp(r, number, old) == *own);
        *own = stamp;
        break;
    default:
        rc = kvmeta_put(r->db, key, value, durability(w));
        WANT(r, rc == KVMETA_OK);
        *own = stamp;
    }
    rc = kvmeta_get(r->db, key, old);
    WANT(r, rc == (*own ? KVMETA_OK : KVMETA_NOT_FOUND));
    WANT(r, rc != KVMETA_OK || value_stamp(r, number, old) == *own);
}

/* Compare and swap on one key that all writers want. */
static void increment(struct worker *w)
{
    struct round *r = w->round;
    unsigned char key[KEY], old[VALUE], new[VALUE];
    struct kvmeta_op ops[2] = {{KVMETA_OP_EXPECT, key, old},
                               {KVMETA_OP_PUT, key, new}};
    int rc;

    make_key(r, COUNTER, key);
    WANT(r, kvmeta_get(r->db, key, old) == KVMETA_OK);
    make_value(COUNTER, value_stamp(r, COUNTER, old) + 1, new);
    rc = kvmeta_write(r->db, ops, 2, durability(w), NULL);
    WANT(r, rc == KVMETA_OK || rc == KVMETA_CONFLICT);
    if (rc == KVMETA_OK) {
        atomic_fetch_add(&r->increments, 1);
    }
}

static void *run_writer(void *arg)
{
    struct worker *w = arg;
    uint64_t stamp, dice;

    for (stamp = 1; !atomic_load(&w->round->stop); stamp++) {
        dice = test_rng_below(&w->rng, 10);
        if (dice < 4) {
            write_groups(w);
        } else if (dice < 9) {
            write_own(w, stamp);
        } else {
            increment(w);
        }
    }
    return NULL;
}

/* --------------------------------------------------------------------------
 * Readers
 * -------------------------------------------------------------------------- */

/* Enters what one key of a group holds; all keys of a group must agree. */
static void enter(const struct round *r, struct history_event *event,
                  uint64_t number, const unsigned char *value)
{
    uint64_t stamp = value_stamp(r, number, value);
    uint32_t *ticket = &event->tickets[number / 64 % GROUPS];

    WANT(r, *ticket == NO_TICKET || *ticket == stamp);
    *ticket = (uint32_t)stamp;
}

static void read_one(struct worker *w, struct history_event *event)
{
    struct round *r = w->round;
    uint64_t number = test_rng_below(&w->rng, SHARED) * 64;
    unsigned char key[KEY], value[VALUE];

    make_key(r, number, key);
    WANT(r, kvmeta_has(r->db, key) == KVMETA_OK);
    WANT(r, kvmeta_get(r->db, key, value) == KVMETA_OK);
    enter(r, event, number, value);
}

/* What stands beside the records: changed in place, too. */
static void read_sums(struct worker *w)
{
    struct round *r = w->round;
    uint64_t count = kvmeta_count(r->db);
    struct kvmeta_digest digest = kvmeta_digest(r->db);

    WANT(r, count >= SHARED && count <= SHARED + 1 + WRITERS * OWN);
    WANT(r, digest.lo != 0 || digest.hi != 0);
}

static void read_many(struct worker *w, struct history_event *event,
                      const kvmeta_snapshot *snapshot)
{
    struct round *r = w->round;
    unsigned char keys[SHARED * KEY], values[SHARED * VALUE], found[SHARED];
    uint64_t i;
    int rc;

    for (i = 0; i < SHARED; i++) {
        make_key(r, i * 64, keys + i * KEY);
    }
    rc = snapshot != NULL
             ? kvmeta_snapshot_get_many(snapshot, keys, SHARED, values, found)
             : kvmeta_get_many(r->db, keys, SHARED, values, found);
    WANT(r, rc == KVMETA_OK);
    for (i = 0; i < SHARED; i++) {
        WANT(r, found[i] == 1);
        enter(r, event, i * 64, values + i * VALUE);
    }
}

struct seen {
    struct round *r;
    struct history_event *event;
    uint64_t count, last;
};

static int see(void *user, const void *key, const void *value)
{
    struct seen *seen = user;
    uint64_t number = key_number(seen->r, key);

    WANT(seen->r, seen->count == 0 || number > seen->last);
    seen->last = number;
    if (number % 64 == 0 && number < COUNTER) {
        enter(seen->r, seen->event, number, value);
        seen->count++;
    } else {
        value_stamp(seen->r, number, value);
        seen->count += seen->count == 0;
    }
    return 0;
}

static void read_scan(struct worker *w, struct history_event *event)
{
    struct seen seen = {w->round, event, 0, 0};

    WANT(w->round, kvmeta_scan(w->round->db, NULL, NULL, see, &seen) == 0);
    WANT(w->round, seen.count == SHARED);
}

/* A snapshot is read twice, by cursor and by keys, with time in between. */
static void read_snapshot(struct worker *w, struct history_event *event)
{
    struct round *r = w->round;
    struct seen seen = {r, event, 0, 0};
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;
    uint64_t records = 0;
    int rc;

    WANT(r, kvmeta_snapshot_take(r->db, &snapshot) == KVMETA_OK);
    event->exact_seq = kvmeta_snapshot_seq(snapshot);
    WANT(r, kvmeta_cursor_open(snapshot, &cursor) == KVMETA_OK);
    for (rc = kvmeta_cursor_first(cursor); rc == KVMETA_OK;
         rc = kvmeta_cursor_next(cursor)) {
        see(&seen, kvmeta_cursor_key(cursor), kvmeta_cursor_value(cursor));
        records++;
    }
    WANT(r, rc == KVMETA_NOT_FOUND && seen.count == SHARED);
    WANT(r, records == kvmeta_snapshot_count(snapshot));
    kvmeta_cursor_close(cursor);
    read_many(w, event, snapshot);
    kvmeta_snapshot_release(snapshot);
}

/* Another snapshot for all to look at. */
static void renew_old(struct worker *w)
{
    struct round *r = w->round;

    pthread_rwlock_wrlock(&r->old_lock);
    kvmeta_snapshot_release(r->old);
    WANT(r, kvmeta_snapshot_take(r->db, &r->old) == KVMETA_OK);
    r->old_digest = kvmeta_snapshot_digest(r->old);
    pthread_rwlock_unlock(&r->old_lock);
}

/* Backwards through a snapshot that others look at, too, and that has seen
 * flushes and compactions: all groups are whole, and the sums are the same. */
static void read_old(struct worker *w)
{
    struct round *r = w->round;
    struct history_event groups;
    struct kvmeta_digest digest;
    unsigned char key[KEY];
    kvmeta_cursor *cursor;
    uint64_t number, count = 0;
    int rc;

    memset(&groups, 0xff, sizeof groups);       /* NO_TICKET in each */
    pthread_rwlock_rdlock(&r->old_lock);
    WANT(r, kvmeta_cursor_open(r->old, &cursor) == KVMETA_OK);
    make_key(r, COUNTER, key);
    for (rc = kvmeta_cursor_seek_le(cursor, key); rc == KVMETA_OK;
         rc = kvmeta_cursor_prev(cursor), count++) {
        number = key_number(r, kvmeta_cursor_key(cursor));
        if (number % 64 == 0 && number < COUNTER) {
            enter(r, &groups, number, kvmeta_cursor_value(cursor));
        }
    }
    /* The counter is the last key of all. */
    WANT(r, rc == KVMETA_NOT_FOUND && count == kvmeta_snapshot_count(r->old));
    WANT(r, kvmeta_cursor_seek(cursor, key) == KVMETA_OK);
    WANT(r, kvmeta_cursor_next(cursor) == KVMETA_NOT_FOUND);
    digest = kvmeta_snapshot_digest(r->old);
    WANT(r, digest.lo == r->old_digest.lo && digest.hi == r->old_digest.hi);
    kvmeta_cursor_close(cursor);
    pthread_rwlock_unlock(&r->old_lock);
}

static void *run_reader(void *arg)
{
    struct worker *w = arg;
    struct round *r = w->round;
    struct history_event *event;

    while (!atomic_load(&r->stop)) {
        if (test_rng_below(&w->rng, 16) == 0) {
            read_sums(w);
            read_old(w);
        }
        if (test_rng_below(&w->rng, 256) == 0) {
            renew_old(w);
        }
        event = history_read(&r->readers[w->number], &r->history);
        if (event == NULL) {
            break;
        }
        switch (test_rng_below(&w->rng, 8)) {
        case 0:
            read_scan(w, event);
            break;
        case 1:
            read_snapshot(w, event);
            break;
        case 2:
        case 3:
            read_many(w, event, NULL);
            break;
        default:
            read_one(w, event);
        }
    }
    return NULL;
}

/* --------------------------------------------------------------------------
 * Background work by hand
 * -------------------------------------------------------------------------- */

static void check_stats(struct round *r)
{
    struct kvmeta_stats s;

    s.struct_size = sizeof s;
    WANT(r, kvmeta_stats(r->db, &s) == KVMETA_OK);
    WANT(r, s.durable_seq <= s.seq && s.background_errors == 0);
    WANT(r, s.records >= SHARED && s.records <= SHARED + 1 + WRITERS * OWN);
}

static void *run_host(void *arg)
{
    struct worker *w = arg;
    struct round *r = w->round;
    struct timespec pause = {0, 2000000};
    struct kvmeta_error err;
    int did, rc = KVMETA_OK;

    while (!atomic_load(&r->stop)) {
        switch (test_rng_below(&w->rng, 12)) {
        case 0: rc = kvmeta_flush(r->db); break;
        case 1: rc = kvmeta_compact(r->db); break;
        case 2: rc = kvmeta_sync(r->db); break;
        case 3: rc = kvmeta_wait_idle(r->db); break;
        case 4: rc = kvmeta_last_error(r->db, &err); break;
        case 5:
            rc = kvmeta_verify(r->db, &err);
            if (rc) round_fail(r, __LINE__, "verify", err.message);
            break;
        default:
            check_stats(r);
            if (r->options.flags & KVMETA_NO_THREAD) {
                rc = kvmeta_step(r->db, &did);
            } else {
                nanosleep(&pause, NULL);
            }
        }
        WANT(r, rc == KVMETA_OK);
    }
    return NULL;
}

/* --------------------------------------------------------------------------
 * A round
 * -------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *st, int type,
                        struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}

static void make_dir(struct round *r)
{
    const char *tmp = getenv("TMPDIR");

    snprintf(r->dir, sizeof r->dir, "%s/kvmeta-threads-XXXXXX",
             tmp != NULL && strlen(tmp) < 256 ? tmp : "/tmp");
    WANT(r, mkdtemp(r->dir) != NULL);
}

static void remove_dir(struct round *r)
{
    nftw(r->dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static void round_options(struct round *r)
{
    struct kvmeta_options *o = &r->options;

    kvmeta_options_init(o, KEY, VALUE);
    o->flags = test_rng_below(&r->rng, 3) == 0 ? KVMETA_NO_THREAD : 0;
    o->log_bytes_max = 65536u << test_rng_below(&r->rng, 3);
    o->log_buffer_bytes = 4096;
    o->log_align = test_rng_below(&r->rng, 2) ? 512 : 64;
    o->merge_window = 2;
    o->space_amp_max = test_rng_below(&r->rng, 2) ? 1.1 : 2;
    o->sync_interval_ms = (uint32_t)test_rng_below(&r->rng, 3);
    if (test_rng_below(&r->rng, 2)) {
        o->realloc_fn = test_realloc;
    }
    o->user = &r->alloc;
    r->equal_heads = (int)test_rng_below(&r->rng, 2);
    r->weak = test_rng_below(&r->rng, 4) != 0;
}

static void round_open(struct round *r)
{
    struct kvmeta_error err;

    if (kvmeta_open(r->dir, &r->options, &r->db, &err) != KVMETA_OK) {
        round_fail(r, __LINE__, "open:", err.message);
    }
}

/* Ticket 0 in all groups, and the counter at 0. */
static void round_first_batch(struct round *r)
{
    unsigned char keys[SHARED + 1][KEY], values[SHARED + 1][VALUE];
    struct kvmeta_op ops[SHARED + 1];
    uint32_t ticket = history_begin(&r->history, (1u << GROUPS) - 1);
    uint64_t i, seq;

    for (i = 0; i <= SHARED; i++) {
        make_key(r, i * 64, keys[i]);
        make_value(i * 64, ticket, values[i]);
        ops[i].type = KVMETA_OP_PUT;
        ops[i].key = keys[i];
        ops[i].value = values[i];
    }
    WANT(r, kvmeta_write(r->db, ops, SHARED + 1, 0, &seq) == KVMETA_OK);
    history_end(&r->history, ticket, seq);
}

static void round_threads(struct round *r, long ms)
{
    pthread_t threads[WRITERS + READERS + 1];
    struct worker workers[WRITERS + READERS + 1];
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    void *(*fn)(void *);
    int i;

    WANT(r, pthread_rwlock_init(&r->old_lock, NULL) == 0);
    WANT(r, kvmeta_snapshot_take(r->db, &r->old) == KVMETA_OK);
    r->old_digest = kvmeta_snapshot_digest(r->old);
    for (i = 0; i < WRITERS + READERS + 1; i++) {
        workers[i].round = r;
        workers[i].rng.state = test_rng_u64(&r->rng);
        workers[i].number = i < WRITERS ? i : i - WRITERS;
        fn = i < WRITERS ? run_writer
                         : i < WRITERS + READERS ? run_reader : run_host;
        WANT(r, pthread_create(&threads[i], NULL, fn, &workers[i]) == 0);
    }
    nanosleep(&time, NULL);
    atomic_store(&r->stop, 1);
    for (i = 0; i < WRITERS + READERS + 1; i++) {
        pthread_join(threads[i], NULL);
    }
    kvmeta_snapshot_release(r->old);
    pthread_rwlock_destroy(&r->old_lock);
}

/* What the store must hold in the end, also after a restart. */
static void check_final(struct round *r, const uint32_t *last)
{
    unsigned char key[KEY], value[VALUE];
    uint64_t number, i, records = SHARED + 1;
    int w, rc;

    for (i = 0; i < SHARED; i++) {
        make_key(r, i * 64, key);
        WANT(r, kvmeta_get(r->db, key, value) == KVMETA_OK);
        WANT(r, value_stamp(r, i * 64, value) == last[i % GROUPS]);
    }
    make_key(r, COUNTER, key);
    WANT(r, kvmeta_get(r->db, key, value) == KVMETA_OK);
    WANT(r, value_stamp(r, COUNTER, value) == atomic_load(&r->increments));
    for (w = 0; w < WRITERS; w++) {
        for (i = 0; i < OWN; i++) {
            number = own_number(w, i);
            make_key(r, number, key);
            rc = kvmeta_get(r->db, key, value);
            WANT(r, (rc == KVMETA_OK) == (r->own[w][i] != 0));
            WANT(r, rc != KVMETA_OK ||
                        value_stamp(r, number, value) == r->own[w][i]);
            records += r->own[w][i] != 0;
        }
    }
    WANT(r, kvmeta_count(r->db) == records);
    WANT(r, kvmeta_verify(r->db, NULL) == KVMETA_OK);
}

static void check_history(struct round *r, uint32_t *last)
{
    const char *wrong = history_close(&r->history, last);
    int i;

    if (wrong != NULL) {
        round_fail(r, __LINE__, wrong, "");
    }
    for (i = 0; i < READERS; i++) {
        wrong = history_check(&r->history, &r->readers[i]);
        if (wrong != NULL) {
            round_fail(r, __LINE__, wrong, "");
        }
        WANT(r, r->readers[i].count > 10);
    }
}

static struct round *round_new(uint64_t number)
{
    struct round *r = calloc(1, sizeof *r);
    int i;

    if (r == NULL) {
        abort();
    }
    r->number = number;
    r->rng.state = number * 0x9e3779b97f4a7c15u;
    round_running = r;
    signal(SIGALRM, hang);
    alarm(SECONDS_MAX);
    history_init(&r->history);
    for (i = 0; i < READERS; i++) {
        r->readers[i].events = calloc(EVENTS_MAX, sizeof(struct history_event));
        WANT(r, r->readers[i].events != NULL);
    }
    make_dir(r);
    round_options(r);
    return r;
}

static void round_free(struct round *r)
{
    int i;

    WANT(r, atomic_load(&r->alloc.live_blocks) == 0);
    alarm(0);
    remove_dir(r);
    history_free(&r->history);
    for (i = 0; i < READERS; i++) {
        free(r->readers[i].events);
    }
    free(r);
}

static void one_round(uint64_t number, long ms)
{
    struct round *r = round_new(number);
    uint32_t last[GROUPS];

    round_open(r);
    round_first_batch(r);
    round_threads(r, ms);
    check_history(r, last);
    WANT(r, kvmeta_close(r->db) == KVMETA_OK);
    round_open(r);
    check_final(r, last);
    WANT(r, kvmeta_close(r->db) == KVMETA_OK);
    round_free(r);
}

/* Goal: whatever runs beside whatever, reads see one state each, batches
 * whole, nothing older than acknowledged, and all of it is there after a
 * restart. Method: see the top of this file. Scale 0 is for sanitizers. */
static void readers_see_whole_batches_in_commit_order(void **state)
{
    uint64_t rounds = test_args.scale == 0 ? 3
                                           : ROUNDS_PER_SCALE * test_args.scale;
    uint64_t i, first = test_args.seed;

    (void)state;
    rounds = test_option_u64("rounds", rounds);
    for (i = 0; i < rounds; i++) {
        one_round(first + i, (long)test_option_u64("ms", ROUND_MS));
    }
    test_args.seed = first;
}

/* --------------------------------------------------------------------------
 * Close while the background works
 * -------------------------------------------------------------------------- */

/* Goal: a close right after a burst of writes neither waits for the backlog
 * nor loses any of it, and the thread ends. Method: 3,000 buffered puts in
 * 64 KiB logs, close at once, open again and compare; several times over. */
static void close_beside_the_background_loses_nothing(void **state)
{
    struct round *r = round_new(test_args.seed);
    unsigned char key[KEY], value[VALUE];
    uint64_t life, i, lives = test_args.scale == 0 ? 4 : 20;

    (void)state;
    r->options.flags = 0;
    r->options.log_bytes_max = 65536;
    for (life = 1; life <= lives; life++) {
        round_open(r);
        for (i = 0; i < 3000; i++) {
            make_key(r, i * life % 4000, key);
            make_value(i * life % 4000, life, value);
            WANT(r, kvmeta_put(r->db, key, value, KVMETA_BUFFERED) == 0);
        }
        WANT(r, kvmeta_close(r->db) == KVMETA_OK);
        round_open(r);
        for (i = 0; i < 3000; i++) {
            make_key(r, i * life % 4000, key);
            WANT(r, kvmeta_get(r->db, key, value) == KVMETA_OK);
            WANT(r, value_stamp(r, i * life % 4000, value) == life);
        }
        WANT(r, kvmeta_close(r->db) == KVMETA_OK);
    }
    round_free(r);
}

/* --------------------------------------------------------------------------
 * Group commit
 * -------------------------------------------------------------------------- */

#define GROUP_THREADS 16
#define GROUP_PUTS 150

/* Takes long enough, on any file system, for the other threads to arrive. */
static int slow_sync(void *user, int file)
{
    const struct timespec pause = {.tv_nsec = 1000000};

    nanosleep(&pause, NULL);
    return kvmeta_vfs_posix()->file_sync(user, file);
}

static void *run_durable(void *arg)
{
    struct worker *w = arg;
    unsigned char key[KEY], value[VALUE];
    uint64_t i, number;

    for (i = 0; i < GROUP_PUTS; i++) {
        number = (uint64_t)w->number * GROUP_PUTS + i;
        make_key(w->round, number, key);
        make_value(number, number + 1, value);
        WANT(w->round, kvmeta_put(w->round->db, key, value,
                                  KVMETA_DURABLE) == KVMETA_OK);
    }
    return NULL;
}

/* In the child: 16 threads put, then it ends without a close. */
static void put_and_die(struct round *r)
{
    pthread_t threads[GROUP_THREADS];
    struct worker workers[GROUP_THREADS];
    struct kvmeta_stats s;
    int i;

    round_open(r);
    for (i = 0; i < GROUP_THREADS; i++) {
        workers[i].round = r;
        workers[i].number = i;
        WANT(r, pthread_create(&threads[i], NULL, run_durable,
                               &workers[i]) == 0);
    }
    for (i = 0; i < GROUP_THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    s.struct_size = sizeof s;
    WANT(r, kvmeta_stats(r->db, &s) == KVMETA_OK);
    WANT(r, s.commits == GROUP_THREADS * GROUP_PUTS);
    WANT(r, s.syncs < s.commits && s.groups < s.commits);
    WANT(r, s.group_commits_max > 1 &&
                s.group_commits_max <= GROUP_THREADS);
    WANT(r, s.durable_seq == s.seq);
    _exit(0);
}

/* Goal: concurrent durable puts share syncs, and every one that returned is
 * there after a kill. Method: syncs are slow, since on some file systems they
 * cost nothing, and then nobody waits for one. */
static void concurrent_durable_puts_share_syncs(void **state)
{
    struct round *r = round_new(test_args.seed);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();
    unsigned char key[KEY], value[VALUE];
    uint64_t i;
    int status;
    pid_t pid;

    (void)state;
    vfs.file_sync = slow_sync;
    r->options.vfs = &vfs;
    r->options.flags = 0;
    fflush(stdout);
    pid = fork();
    WANT(r, pid >= 0);
    if (pid == 0) {
        put_and_die(r);
    }
    WANT(r, waitpid(pid, &status, 0) == pid);
    WANT(r, WIFEXITED(status) && WEXITSTATUS(status) == 0);
    round_open(r);
    WANT(r, kvmeta_count(r->db) == GROUP_THREADS * GROUP_PUTS);
    for (i = 0; i < GROUP_THREADS * GROUP_PUTS; i++) {
        make_key(r, i, key);
        WANT(r, kvmeta_get(r->db, key, value) == KVMETA_OK);
        WANT(r, value_stamp(r, i, value) == i + 1);
    }
    WANT(r, kvmeta_close(r->db) == KVMETA_OK);
    round_free(r);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(readers_see_whole_batches_in_commit_order),
        cmocka_unit_test(close_beside_the_background_loses_nothing),
        cmocka_unit_test(concurrent_durable_puts_share_syncs),
    };

    test_parse_args(argc, argv);
    if (test_option("test") != NULL) {
        cmocka_set_test_filter(test_option("test"));
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
