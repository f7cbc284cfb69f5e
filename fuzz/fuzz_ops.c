/*
 * The crash-tear fuzzer: an input says what happens to a store, step by step:
 * writes of each durability, batches with expectations, snapshots, background
 * work, changed options, failing calls and allocations, a power cut or a kill
 * anywhere within a call, also within recovery, and damage. ops.h has the
 * format. An array of sorted records and a list of states say what must be:
 *
 *   prefix   what an open recovers is one of the states that the store has
 *            been asked to take, whole;
 *   acked    it is not older than the last one acknowledged as durable; after
 *            a kill not older than the last one written, and no more bytes of
 *            buffered changes are missing than the buffer holds;
 *   damage   a damaged file shows, and changes nothing, or costs nothing;
 *   faults   a call that fails leaves the records as they were, and its error
 *            is a documented one;
 *   leaks    every close leaves neither memory nor handles behind.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fuzz.h"
#include "ops.h"

enum {
    STATES_MAX = 512,
    BATCH_MAX = 48,
    SNAPSHOTS_MAX = 3,
    BULK_UNIT = 8,
    BULK_BYTES_MAX = 96 << 10,    /* more than the smallest log */
    CUT_STATES = 16
};

/* The records after one commit: a sum over them, made here. */
struct state {
    uint64_t sum[2];
    uint64_t count;
    uint64_t seq;
    uint64_t log_bytes;           /* of all changes up to here */
    struct kvmeta_digest digest;
    bool digest_known;
};

struct held {
    kvmeta_snapshot *snapshot;
    struct test_oracle oracle;
    struct state state;
};

/* A batch that is being gathered. Keys and values lie in `bytes`. */
struct gathered {
    struct kvmeta_op op[BATCH_MAX];
    size_t count;
    unsigned char *bytes;
    size_t used;
};

struct story {
    struct sim_fs disks[2];       /* one is in use; a crash changes over */
    unsigned disk;
    struct test_alloc alloc;
    struct kvmeta_options options;
    uint32_t log_align_min;       /* ever used: decides what may be garbage */
    kvmeta *db;                   /* NULL: closed */
    uint64_t buffer_bytes;        /* of the open store */
    struct test_oracle now;
    struct held held[SNAPSHOTS_MAX];
    struct gathered batch;
    struct state states[STATES_MAX];
    unsigned durable;             /* indexes of states, in this order but */
    unsigned written;             /* for written, which a kill may leave */
    unsigned visible;             /* below durable */
    unsigned issued;
    uint64_t next_value;
    bool created;                 /* there has been a store */
    bool faulty;                  /* calls may fail */
    bool broken;                  /* writes must fail */
    bool maybe_broken;
    bool evidence;                /* no mark can have been lost */
    bool killed;                  /* the next open is the first after a kill */
    bool cut_pending;             /* the crash that is armed: a power cut */
    unsigned cut_state;
    bool cut_garbage;
    unsigned step;                /* for messages */
    const uint8_t *slot;
};

static struct story story;
static bool verbose;

static struct sim_fs *disk(void)
{
    return &story.disks[story.disk];
}

/* Like FUZZ_CHECK, with the operation. */
#define OPS_CHECK(holds, ...) \
    do { \
        if (!(holds)) { \
            fprintf(stderr, "operation %u: ", story.step); \
            if (story.slot) \
                ops_print(stderr, &ops_lines[ops_code(story.slot)], \
                          story.slot + 1); \
            FUZZ_CHECK(holds, __VA_ARGS__); \
        } \
    } while (0)

/* --------------------------------------------------------------------------
 * Keys, values, states
 * -------------------------------------------------------------------------- */

/* Numbers to keys, one to one up to 256^key_bytes; many share their first 8
 * bytes where keys are longer, and few do where they are not. */
static void make_key(uint32_t number, unsigned char *key)
{
    uint32_t n = story.options.key_bytes;

    memset(key, 0x55, n);
    key[0] = (unsigned char)(number >> 6 & 3);
    if (n >= 2) key[n - 2] = (unsigned char)(number >> 8);
    key[n - 1] = (unsigned char)number;
}

/* choice 0: a value that was never there; else one of a few. */
static void make_value(unsigned choice, unsigned char *value)
{
    uint32_t n = story.options.value_bytes;
    struct test_rng rng = {choice ? choice : 1000 + story.next_value++};

    memset(value, (int)(rng.state & 3), n);
    test_rng_bytes(&rng, value, n < 16 ? n : 16);
}

static uint64_t hash_part(uint64_t hash, const unsigned char *p, size_t n)
{
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = 0;

        memcpy(&word, p + i, n - i < 8 ? n - i : 8);
        hash = (hash ^ word) * 0x9fb21c651e98df25u;
        hash ^= hash >> 31;
    }
    return hash;
}

/* sign 1 adds a record to the sum, -1 takes it away. */
static void state_add(struct state *s, const void *key, const void *value,
                      int sign)
{
    uint64_t hash = hash_part(0x51ed270b7a3f0d1bu, key,
                              story.options.key_bytes);

    hash = hash_part(hash, value, story.options.value_bytes);
    s->sum[0] += (uint64_t)sign * hash;
    s->sum[1] += (uint64_t)sign * ((hash ^ hash >> 27) * 0xd6e8feb86659fd93u);
    s->count += (uint64_t)sign;
}

static bool state_same(const struct state *a, const struct state *b)
{
    return a->sum[0] == b->sum[0] && a->sum[1] == b->sum[1]
        && a->count == b->count && a->seq == b->seq;
}

/* The library's digest of a state must be the same whenever it comes up. */
static void state_check_digest(struct state *s, struct kvmeta_digest digest)
{
    OPS_CHECK(!s->digest_known || kv_digest_equal(s->digest, digest),
              "the digest is not what it was with the same records");
    s->digest = digest;
    s->digest_known = true;
}

/* --------------------------------------------------------------------------
 * Checks of the open store
 * -------------------------------------------------------------------------- */

static void check_left(void)
{
    OPS_CHECK(atomic_load(&story.alloc.live_blocks) == 0,
              "%lld blocks of memory are left",
              (long long)atomic_load(&story.alloc.live_blocks));
    OPS_CHECK(disk()->crashed || sim_open_handles(disk()) == 0,
              "%u handles are left open", sim_open_handles(disk()));
    OPS_CHECK(disk()->misuses == 0, "a handle was used that is not open");
}

static void check_now(bool full)
{
    struct kvmeta_stats stats = {.struct_size = sizeof stats};
    struct state *visible = &story.states[story.visible];
    const char *differs;

    if (!story.db) return;
    OPS_CHECK(kvmeta_count(story.db) == story.now.count,
              "%llu records, not %llu",
              (unsigned long long)kvmeta_count(story.db),
              (unsigned long long)story.now.count);
    state_check_digest(visible, kvmeta_digest(story.db));
    OPS_CHECK(kvmeta_stats(story.db, &stats) == KVMETA_OK, "no statistics");
    OPS_CHECK(stats.seq == visible->seq, "seq is %llu, not %llu",
              (unsigned long long)stats.seq,
              (unsigned long long)visible->seq);
    OPS_CHECK(stats.durable_seq >= story.states[story.durable].seq,
              "durable_seq %llu is behind what was acknowledged",
              (unsigned long long)stats.durable_seq);
    /* What the statistics say is on disk counts as acknowledged. */
    for (unsigned i = story.visible; i > story.durable; i--)
        if (story.states[i].seq <= stats.durable_seq) story.durable = i;
    if (!full) return;
    differs = test_oracle_check(&story.now, story.db);
    OPS_CHECK(!differs, "%s", differs);
}

static void check_last_error(void)
{
    struct kvmeta_error err = {0};
    int rc = kvmeta_last_error(story.db, &err);

    OPS_CHECK(rc == err.code, "last_error says %d, and fills in %d", rc,
              err.code);
    OPS_CHECK(rc <= 0 && (rc == 0 || err.message[0]), "last_error %d: '%s'",
              rc, err.message);
    OPS_CHECK(!story.broken || rc < 0, "no last_error after a failed write");
}

static bool armed(void)
{
    return story.faulty || disk()->crashed;
}

/* A result that is an error only where calls are made to fail. */
static bool check_failure(int rc, const char *what)
{
    if (rc >= 0) return false;
    OPS_CHECK(armed() || rc == KVMETA_E_LIMIT || rc == KVMETA_E_FAILED,
              "%s says %d (%s)", what, rc, kvmeta_strerror(rc));
    OPS_CHECK(rc == KVMETA_E_IO || rc == KVMETA_E_NOSPACE
              || rc == KVMETA_E_NOMEM || rc == KVMETA_E_FAILED
              || (rc == KVMETA_E_READONLY && story.faulty)
              || (rc == KVMETA_E_LIMIT
                  && (story.options.memory_bytes_max || armed())),
              "%s says %d (%s)", what, rc, kvmeta_strerror(rc));
    OPS_CHECK(rc != KVMETA_E_FAILED || story.broken || story.maybe_broken
              || armed(), "%s says E_FAILED, but nothing has failed", what);
    return true;
}

/* --------------------------------------------------------------------------
 * Snapshots
 * -------------------------------------------------------------------------- */

static struct held *held_at(unsigned number)
{
    return &story.held[number % SNAPSHOTS_MAX];
}

static void release(struct held *h)
{
    if (!h->snapshot) return;
    kvmeta_snapshot_release(h->snapshot);
    h->snapshot = NULL;
    test_oracle_free(&h->oracle);
}

static void release_all(void)
{
    for (unsigned i = 0; i < SNAPSHOTS_MAX; i++) release(&story.held[i]);
}

static void op_snapshot(unsigned number)
{
    struct held *h = held_at(number);
    int rc;

    if (h->snapshot) return;
    rc = kvmeta_snapshot_take(story.db, &h->snapshot);
    if (check_failure(rc, "snapshot_take")) {
        h->snapshot = NULL;
        return;
    }
    h->state = story.states[story.visible];
    test_oracle_init(&h->oracle, story.options.key_bytes,
                     story.options.value_bytes);
    test_oracle_copy(&h->oracle, &story.now);
}

/* Compares a cursor's record with record i of the array. */
static void check_cursor(const struct held *h, const kvmeta_cursor *cursor,
                         int rc, size_t i)
{
    size_t key_bytes = story.options.key_bytes;
    const unsigned char *want;

    if (i >= h->oracle.count) {
        OPS_CHECK(rc == KVMETA_NOT_FOUND && !kvmeta_cursor_key(cursor)
                  && !kvmeta_cursor_value(cursor),
                  "a cursor stands on a record that is not there");
        return;
    }
    want = test_oracle_at(&h->oracle, i);
    OPS_CHECK(rc == KVMETA_OK, "a cursor finds no record");
    OPS_CHECK(memcmp(kvmeta_cursor_key(cursor), want, key_bytes) == 0,
              "a cursor stands on another record");
    OPS_CHECK(memcmp(kvmeta_cursor_value(cursor), want + key_bytes,
                     story.options.value_bytes) == 0,
              "a cursor shows another value");
}

static void op_check(unsigned number)
{
    struct held *h = held_at(number);
    kvmeta_cursor *cursor = NULL;
    size_t i = 0;
    int rc;

    if (!h->snapshot) return;
    OPS_CHECK(kvmeta_snapshot_count(h->snapshot) == h->state.count
              && kvmeta_snapshot_seq(h->snapshot) == h->state.seq,
              "a snapshot has changed its count or number");
    state_check_digest(&h->state, kvmeta_snapshot_digest(h->snapshot));
    rc = kvmeta_cursor_open(h->snapshot, &cursor);
    if (check_failure(rc, "cursor_open")) return;
    rc = kvmeta_cursor_first(cursor);
    for (; i < h->oracle.count; i++) {
        check_cursor(h, cursor, rc, i);
        rc = kvmeta_cursor_next(cursor);
    }
    check_cursor(h, cursor, rc, i);
    kvmeta_cursor_close(cursor);
}

/* moves: bit 0 at-or-below instead of at-or-above, then one move a bit. */
static void op_walk(unsigned number, unsigned key_number, unsigned moves)
{
    const size_t none = SIZE_MAX;
    unsigned char key[KVMETA_KEY_BYTES_MAX];
    struct held *h = held_at(number);
    kvmeta_cursor *cursor = NULL;
    size_t i;
    int rc;

    if (!h->snapshot) return;
    make_key(key_number, key);
    rc = kvmeta_cursor_open(h->snapshot, &cursor);
    if (check_failure(rc, "cursor_open")) return;
    check_cursor(h, cursor, KVMETA_NOT_FOUND, none);
    i = test_oracle_find(&h->oracle, key);
    if (moves & 1) {
        if (!test_oracle_get(&h->oracle, key)) i = i > 0 ? i - 1 : none;
        rc = kvmeta_cursor_seek_le(cursor, key);
    } else {
        rc = kvmeta_cursor_seek(cursor, key);
    }
    check_cursor(h, cursor, rc, i);
    for (moves >>= 1; moves > 0; moves >>= 1) {
        if (moves & 1) {
            i = i < h->oracle.count ? i + 1 : none;
            rc = kvmeta_cursor_next(cursor);
        } else {
            i = i < h->oracle.count && i > 0 ? i - 1 : none;
            rc = kvmeta_cursor_prev(cursor);
        }
        check_cursor(h, cursor, rc, i);
    }
    rc = kvmeta_cursor_last(cursor);
    check_cursor(h, cursor, rc, h->oracle.count ? h->oracle.count - 1 : none);
    kvmeta_cursor_close(cursor);
}

/* --------------------------------------------------------------------------
 * Open and close
 * -------------------------------------------------------------------------- */

struct reading {
    struct test_oracle *oracle;
    struct state state;
};

static int read_record(void *user, const void *key, const void *value)
{
    struct reading *r = user;

    test_oracle_put(r->oracle, key, value);
    state_add(&r->state, key, value, 1);
    return 0;
}

/* Reads all records to *oracle; returns their state. */
static struct state read_all(kvmeta *db, struct test_oracle *oracle)
{
    struct kvmeta_stats stats = {.struct_size = sizeof stats};
    struct reading r = {.oracle = oracle};
    int rc = kvmeta_stats(db, &stats);

    oracle->count = 0;
    if (!rc) rc = kvmeta_scan(db, NULL, NULL, read_record, &r);
    OPS_CHECK(rc == KVMETA_OK, "a scan says %d", rc);
    OPS_CHECK(oracle->count == kvmeta_count(db),
              "%llu records, but a scan finds %llu",
              (unsigned long long)kvmeta_count(db),
              (unsigned long long)oracle->count);
    r.state.seq = stats.seq;
    return r.state;
}

/* The state that was recovered: not older than `oldest`. */
static unsigned find_state(const struct state *found, unsigned oldest)
{
    for (unsigned i = story.issued + 1; i > oldest; i--)
        if (state_same(&story.states[i - 1], found)) return i - 1;
    for (unsigned i = 0; i < oldest; i++)
        OPS_CHECK(!state_same(&story.states[i], found),
                  "LOST: recovered commit %llu, acknowledged was %llu",
                  (unsigned long long)found->seq,
                  (unsigned long long)story.states[oldest].seq);
    OPS_CHECK(false, "NO PREFIX: recovered %llu records, commit %llu; may be "
              "%llu..%llu", (unsigned long long)found->count,
              (unsigned long long)found->seq,
              (unsigned long long)story.states[oldest].seq,
              (unsigned long long)story.states[story.issued].seq);
    return 0;
}

static unsigned oldest_allowed(void)
{
    return story.written > story.durable ? story.written : story.durable;
}

/* After a kill no more than a buffer of the visible changes may be gone. */
static void check_kill_loss(unsigned found)
{
    if (!story.killed || story.faulty || found >= story.visible) return;
    OPS_CHECK(story.states[story.visible].log_bytes
                  - story.states[found].log_bytes <= story.buffer_bytes,
              "a kill has cost more than the buffer holds");
}

/* From now on the state found is the only one, and it is on disk. */
static void adopt(unsigned found)
{
    story.states[0] = story.states[found];
    story.durable = story.written = story.visible = story.issued = 0;
    story.created = true;
    story.broken = story.maybe_broken = false;
    story.killed = false;
    story.evidence = !story.faulty;
    story.buffer_bytes = story.options.log_buffer_bytes
        ? story.options.log_buffer_bytes : 32768;
}

static void note_align(void)
{
    uint32_t align = story.options.log_align ? story.options.log_align : 512;
    struct sim_fs *fs = disk();

    if (align < story.log_align_min) story.log_align_min = align;
    fs->garbage_whole = story.log_align_min >= fs->cell_bytes;
}

static void open_failed(int rc, const struct kvmeta_error *err)
{
    OPS_CHECK(armed() || rc == KVMETA_E_LIMIT, "FALSE ALARM: open says %d: %s",
              rc, err->message);
    check_failure(rc, "open");
    OPS_CHECK(err->code == rc && err->message[0], "open says %d, its error %d",
              rc, err->code);
    if (rc == KVMETA_E_LIMIT) story.options.memory_bytes_max = 0;
    check_left();
}

static void open_store(void)
{
    struct kvmeta_error err = {0};
    struct state state;
    kvmeta *db = NULL;
    unsigned found;
    int rc;

    story.options.vfs = &disk()->vfs;
    note_align();
    rc = kvmeta_open(SIM_DIR, &story.options, &db, &err);
    if (verbose && rc) printf("    open: %d, %s\n", rc, err.message);
    if (rc != KVMETA_OK) {
        OPS_CHECK(!db, "a failed open has set the handle");
        open_failed(rc, &err);
        return;
    }
    story.db = db;
    state = read_all(db, &story.now);
    found = find_state(&state, oldest_allowed());
    check_kill_loss(found);
    state_check_digest(&story.states[found], kvmeta_digest(db));
    if (verbose)
        printf("    open: commit %llu, %llu records\n",
               (unsigned long long)state.seq, (unsigned long long)state.count);
    adopt(found);
}

static void close_store(void)
{
    bool busy = false;
    int rc;

    if (!story.db) return;
    for (unsigned i = 0; i < SNAPSHOTS_MAX; i++)
        busy = busy || story.held[i].snapshot;
    if (busy)
        OPS_CHECK(kvmeta_close(story.db) == KVMETA_E_INVALID,
                  "closed beside a snapshot");
    check_now(true);
    release_all();
    rc = kvmeta_close(story.db);
    story.db = NULL;
    if (!check_failure(rc, "close")) {
        OPS_CHECK(rc == KVMETA_OK, "close says %d", rc);
        OPS_CHECK(!story.broken, "close is well after a failed write");
        story.durable = story.written = story.visible;
        story.issued = story.visible;
    }
    check_left();
}

/* --------------------------------------------------------------------------
 * Crashes
 * -------------------------------------------------------------------------- */

/* The handle of a process that is no more: it must be freed, but nothing may
 * reach the disk. */
static void drop_handle(void)
{
    disk()->crashed = 1;
    release_all();
    if (story.db) (void)kvmeta_close(story.db);
    story.db = NULL;
    check_left();
}

static void cut_disk(struct sim_fs *from, struct sim_fs *to)
{
    struct sim_cut cut;
    unsigned skip = story.cut_state % CUT_STATES;
    bool garbage = story.cut_garbage && story.log_align_min >= 512;
    int made;

    sim_cut_begin(&cut, from, CUT_STATES, garbage, story.cut_state);
    if (!cut.exhaustive) {
        cut.done = skip;
        skip = 0;
    }
    made = sim_cut_next(&cut, to);
    for (; skip > 0 && made; skip--) {
        struct sim_fs *other = malloc(sizeof *other);

        if (!other) abort();
        if (sim_cut_next(&cut, other)) {
            sim_free(to);
            sim_clone(to, other);
            sim_free(other);
        } else {
            skip = 1;
        }
        free(other);
    }
    OPS_CHECK(made, "the cut has no state");
    sim_cut_end(&cut);
}

/* Power cut or kill. What was visible only, or written only, may be gone. */
static void crash(bool cut)
{
    struct sim_fs *from = disk();
    struct sim_fs *to = &story.disks[1 - story.disk];

    if (verbose) printf("    %s\n", cut ? "CUT" : "KILL");
    if (story.db || cut) story.killed = !cut;
    drop_handle();
    if (cut) {
        cut_disk(from, to);
        story.written = story.durable;
        story.evidence = false;
    } else {
        sim_clone(to, from);
    }
    sim_free(from);
    story.disk = 1 - story.disk;
    story.faulty = story.options.memory_bytes_max != 0;
    story.alloc.fail_at = 0;
    story.cut_pending = false;
    story.batch.count = story.batch.used = 0;
}

/* --------------------------------------------------------------------------
 * Writing
 * -------------------------------------------------------------------------- */

struct write_call {
    const struct kvmeta_op *ops;
    size_t n;
    unsigned how;
    enum ops_code code;           /* which function */
    bool array;                   /* commit by kvmeta_write */
};

/* What must come of it: the array and the state after it. Returns the result
 * that a call without a failure gives; *changes: it is a new state. */
static int predict(const struct write_call *call, struct test_oracle *after,
                   struct state *state, bool *changes)
{
    size_t slot = kv_align_up(8 + story.options.key_bytes
                              + story.options.value_bytes, 8);
    bool found = false;

    *changes = false;
    *state = story.states[story.visible];
    state->digest_known = false;
    for (size_t i = 0; i < call->n; i++) {
        const struct kvmeta_op *op = &call->ops[i];
        const void *old = test_oracle_get(&story.now, op->key);

        if (op->type != KVMETA_OP_EXPECT) continue;
        if (!old != !op->value) return KVMETA_CONFLICT;
        if (old && memcmp(old, op->value, story.options.value_bytes) != 0)
            return KVMETA_CONFLICT;
    }
    for (size_t i = 0; i < call->n; i++) {
        const struct kvmeta_op *op = &call->ops[i];
        const void *old = test_oracle_get(after, op->key);

        if (op->type == KVMETA_OP_EXPECT) continue;
        found = old != NULL;
        if (old) state_add(state, op->key, old, -1);
        if (op->type == KVMETA_OP_PUT) {
            state_add(state, op->key, op->value, 1);
            test_oracle_put(after, op->key, op->value);
        } else {
            test_oracle_remove(after, op->key);
            if (!old) continue;
        }
        *changes = true;
        state->log_bytes += slot;
    }
    state->seq += *changes;
    if (call->code == OP_REMOVE || call->code == OP_SWAP)
        return found ? KVMETA_OK : KVMETA_NOT_FOUND;
    return KVMETA_OK;
}

static int commit_batch(const struct write_call *call, uint64_t *seq)
{
    kvmeta_batch *batch = NULL;
    int rc = kvmeta_batch_new(story.db, &batch);

    for (size_t i = 0; i < call->n && !rc; i++) {
        const struct kvmeta_op *op = &call->ops[i];

        if (op->type == KVMETA_OP_PUT)
            rc = kvmeta_batch_put(batch, op->key, op->value);
        else if (op->type == KVMETA_OP_REMOVE)
            rc = kvmeta_batch_remove(batch, op->key);
        else
            rc = kvmeta_batch_expect(batch, op->key, op->value);
    }
    if (!rc) {
        OPS_CHECK(kvmeta_batch_count(batch) == call->n, "batch_count");
        rc = kvmeta_commit(story.db, batch, call->how, seq);
    }
    kvmeta_batch_free(batch);
    return rc;
}

static int call_store(const struct write_call *call, unsigned char *previous,
                      uint64_t *seq)
{
    const struct kvmeta_op *op = call->ops;

    switch (call->code) {
    case OP_PUT:
        return kvmeta_put(story.db, op->key, op->value, call->how);
    case OP_REMOVE:
        return kvmeta_remove(story.db, op->key, call->how);
    case OP_SWAP:
        return kvmeta_swap(story.db, op->key, op->value, previous, call->how);
    default:
        if (!call->array) return commit_batch(call, seq);
        return kvmeta_write(story.db, call->ops, call->n, call->how, seq);
    }
}

/* The state after this one is open, never will be, or was not tried. */
static void write_failed(int rc, bool changes)
{
    check_failure(rc, "a write");
    if (rc == KVMETA_E_IO) {
        story.broken = true;
    } else {
        OPS_CHECK(!story.broken || rc == KVMETA_E_FAILED
                  || rc == KVMETA_E_NOMEM, "a write says %d, not E_FAILED",
                  rc);
        if (changes) story.issued--;
        if (rc == KVMETA_E_FAILED) story.broken = true;
    }
    check_last_error();
}

static void write_done(const struct write_call *call, bool changes,
                       struct test_oracle *after)
{
    unsigned how = call->how ? call->how
        : story.options.durability ? story.options.durability
        : KVMETA_DURABLE;

    OPS_CHECK(!story.broken, "a write succeeds after a failed one");
    story.maybe_broken = false;
    if (changes) {
        story.visible = story.issued;
        test_oracle_copy(&story.now, after);
    }
    if (how == KVMETA_DURABLE && changes) story.durable = story.visible;
    if (how != KVMETA_BUFFERED && changes) story.written = story.visible;
}

static void write_store(const struct write_call *call)
{
    unsigned char *previous = malloc(story.options.value_bytes + 1);
    struct test_oracle after;
    struct state state;
    uint64_t seq = UINT64_MAX;
    const void *old;
    bool changes;
    int want, rc;

    if (!previous) abort();
    if (story.issued + 1 >= STATES_MAX) {
        free(previous);
        return;
    }
    test_oracle_init(&after, story.options.key_bytes,
                     story.options.value_bytes);
    test_oracle_copy(&after, &story.now);
    want = predict(call, &after, &state, &changes);
    if (changes) story.states[++story.issued] = state;
    rc = call_store(call, previous, &seq);
    if (rc < 0) {
        write_failed(rc, changes);
    } else {
        OPS_CHECK(rc == want, "a write says %d, not %d", rc, want);
        if (call->code == OP_SWAP && rc == KVMETA_OK) {
            old = test_oracle_get(&story.now, call->ops->key);
            OPS_CHECK(memcmp(previous, old, story.options.value_bytes) == 0,
                      "swap gives another value");
        }
        OPS_CHECK(seq == UINT64_MAX || rc != KVMETA_OK || seq == state.seq,
                  "commit number %llu, not %llu", (unsigned long long)seq,
                  (unsigned long long)state.seq);
        if (rc != KVMETA_CONFLICT) write_done(call, changes, &after);
    }
    test_oracle_free(&after);
    free(previous);
}

/* Adds an operation to the batch; its key and value are copied into it. */
static struct kvmeta_op *gather(struct gathered *batch, int type,
                                uint32_t number)
{
    size_t record = (size_t)story.options.key_bytes
        + story.options.value_bytes;
    struct kvmeta_op *op = &batch->op[batch->count++];
    unsigned char *key = batch->bytes + batch->used;

    make_key(number, key);
    op->type = type;
    op->key = key;
    op->value = key + story.options.key_bytes;
    batch->used += record;
    return op;
}

static void op_single(enum ops_code code, const uint8_t *operand)
{
    unsigned char key[KVMETA_KEY_BYTES_MAX];
    unsigned char *value = malloc(story.options.value_bytes + 1);
    struct kvmeta_op op = {KVMETA_OP_PUT, key, value};
    struct write_call call = {.ops = &op, .n = 1, .how = operand[1] % 4,
                              .code = code};

    if (!value) abort();
    make_key(operand[0], key);
    make_value(operand[2], value);
    if (code == OP_REMOVE) op.type = KVMETA_OP_REMOVE;
    write_store(&call);
    free(value);
}

static void op_add(enum ops_code code, const uint8_t *operand)
{
    struct gathered *batch = &story.batch;
    struct kvmeta_op *op;
    const void *old;

    if (batch->count == BATCH_MAX) return;
    if (code != OP_ADD_EXPECT) {
        op = gather(batch, code == OP_ADD_PUT ? KVMETA_OP_PUT
                                              : KVMETA_OP_REMOVE, operand[0]);
        make_value(operand[1], batch->bytes + batch->used
                   - story.options.value_bytes);
        return;
    }
    op = gather(batch, KVMETA_OP_EXPECT, operand[0]);
    make_value(1, batch->bytes + batch->used - story.options.value_bytes);
    old = test_oracle_get(&story.now, op->key);
    if (operand[1] % 3 == 0 && old)
        memcpy(batch->bytes + batch->used - story.options.value_bytes, old,
               story.options.value_bytes);
    if (operand[1] % 3 == 1 || (operand[1] % 3 == 0 && !old))
        op->value = NULL;
}

static void op_commit(const uint8_t *operand)
{
    struct write_call call = {.ops = story.batch.op, .n = story.batch.count,
                              .how = operand[1] % 4, .code = OP_COMMIT,
                              .array = operand[0] & 1};

    write_store(&call);
    story.batch.count = story.batch.used = 0;
}

static void op_bulk(const uint8_t *operand)
{
    size_t record = (size_t)story.options.key_bytes
        + story.options.value_bytes;
    size_t n = (size_t)kv_min((uint64_t)operand[2] * BULK_UNIT,
                              BULK_BYTES_MAX / (record + 8));
    struct kvmeta_op *ops = calloc(n + 1, sizeof *ops);
    unsigned char *bytes = malloc((n + 1) * record);
    struct write_call call = {.ops = ops, .how = operand[1] % 4,
                              .code = OP_COMMIT, .array = true};

    if (!ops || !bytes) abort();
    for (; call.n < n; call.n++) {
        unsigned char *key = bytes + call.n * record;

        make_key(operand[0] * 16u + (uint32_t)call.n, key);
        make_value(0, key + story.options.key_bytes);
        ops[call.n].type = KVMETA_OP_PUT;
        ops[call.n].key = key;
        ops[call.n].value = key + story.options.key_bytes;
    }
    write_store(&call);
    free(bytes);
    free(ops);
}

/* --------------------------------------------------------------------------
 * Everything else
 * -------------------------------------------------------------------------- */

static int step_store(unsigned count)
{
    int did = 1;
    int rc = KVMETA_OK;

    for (unsigned i = 0; i < count && did && !rc; i++)
        rc = kvmeta_step(story.db, &did);
    return rc;
}

static void check_compacted(void)
{
    struct kvmeta_stats stats = {.struct_size = sizeof stats};

    OPS_CHECK(kvmeta_stats(story.db, &stats) == KVMETA_OK, "no statistics");
    OPS_CHECK(stats.tables <= 1 && stats.logs_waiting == 0,
              "compacted, but there are %llu tables and %llu sealed logs",
              (unsigned long long)stats.tables,
              (unsigned long long)stats.logs_waiting);
}

static void op_work(enum ops_code code, const uint8_t *operand)
{
    struct kvmeta_error err = {0};
    int rc;

    switch (code) {
    case OP_SYNC: rc = kvmeta_sync(story.db); break;
    case OP_FLUSH: rc = kvmeta_flush(story.db); break;
    case OP_STEP: rc = step_store(operand[0] % 16 + 1u); break;
    case OP_IDLE: rc = kvmeta_wait_idle(story.db); break;
    case OP_COMPACT: rc = kvmeta_compact(story.db); break;
    default: rc = kvmeta_verify(story.db, &err); break;
    }
    if (verbose && rc) printf("    says %d\n", rc);
    if (check_failure(rc, ops_lines[code].name)) {
        story.maybe_broken = true;
        if (code == OP_SYNC && rc == KVMETA_E_IO) story.broken = true;
        check_last_error();
        return;
    }
    OPS_CHECK(rc == KVMETA_OK, "%s says %d", ops_lines[code].name, rc);
    if (code == OP_SYNC || code == OP_FLUSH) {
        OPS_CHECK(!story.broken, "%s is well after a failed write",
                  ops_lines[code].name);
        story.durable = story.written = story.visible;
    }
    if (code == OP_COMPACT) check_compacted();
}

static int scan_step(void *walk, const void *key, const void *value)
{
    return test_oracle_walk_step(walk, key, value);
}

static void read_many(unsigned first, unsigned n)
{
    size_t key_bytes = story.options.key_bytes;
    size_t value_bytes = story.options.value_bytes;
    unsigned char *keys = malloc((n + 1) * key_bytes);
    unsigned char *values = calloc(n + 1, value_bytes + 1);
    unsigned char *found = calloc(n + 1, 1);
    int rc;

    if (!keys || !values || !found) abort();
    for (unsigned i = 0; i < n; i++)
        make_key(first + i * 7 % 256, keys + i * key_bytes);
    rc = kvmeta_get_many(story.db, keys, n, values, found);
    OPS_CHECK(rc == KVMETA_OK, "get_many says %d", rc);
    for (unsigned i = 0; i < n; i++) {
        const void *want = test_oracle_get(&story.now, keys + i * key_bytes);

        OPS_CHECK(found[i] == (want != NULL), "get_many: record %u", i);
        OPS_CHECK(!want || memcmp(want, values + i * value_bytes,
                                  value_bytes) == 0,
                  "get_many: value %u", i);
    }
    free(found);
    free(values);
    free(keys);
}

static void op_read(const uint8_t *operand)
{
    unsigned char key[KVMETA_KEY_BYTES_MAX];
    unsigned char *value = malloc(story.options.value_bytes + 1);
    struct test_oracle_walk walk = {&story.now, 0};
    const void *want;
    int rc;

    if (!value) abort();
    make_key(operand[0], key);
    want = test_oracle_get(&story.now, key);
    rc = kvmeta_get(story.db, key, value);
    OPS_CHECK(rc == (want ? KVMETA_OK : KVMETA_NOT_FOUND), "get says %d", rc);
    OPS_CHECK(!want || memcmp(value, want, story.options.value_bytes) == 0,
              "get gives another value");
    OPS_CHECK(kvmeta_has(story.db, key) == rc, "has differs from get");
    walk.at = test_oracle_find(&story.now, key);
    OPS_CHECK(kvmeta_scan(story.db, key, NULL, scan_step, &walk) == KVMETA_OK
              && walk.at == story.now.count, "a scan differs");
    read_many(operand[0], operand[1] % 80);
    free(value);
}

static void op_option(unsigned which, unsigned choice)
{
    static const uint32_t aligns[] = {512, 8, 64, 4096, 65536, 256};
    static const uint32_t buffers[] = {4096, 16384, 65536};
    static const uint32_t windows[] = {2, 3, 4, 6};
    static const uint32_t ratios[] = {100, 1, 3};
    static const int32_t levels[] = {-7, -1, 1, 3};
    static const double amps[] = {2, 1.05, 10};
    static const uint32_t intervals[] = {0, 1, 10, 1000};
    static const uint64_t logs[] = {65536, 131072, 1048576};
    static const uint64_t memories[] = {0, 1 << 17, 1 << 20, 4 << 20};
    struct kvmeta_options *o = &story.options;

    switch (which % (sizeof ops_options / sizeof ops_options[0])) {
    case 0: o->log_align = aligns[choice % 6]; break;
    case 1: o->log_bytes_max = logs[choice % 3]; break;
    case 2: o->log_buffer_bytes = buffers[choice % 3]; break;
    case 3: o->merge_window = windows[choice % 4]; break;
    case 4: o->merge_ratio = ratios[choice % 3]; break;
    case 5: o->zstd_level = levels[choice % 4]; break;
    case 6: o->space_amp_max = amps[choice % 3]; break;
    case 7: o->durability = choice % 4; break;
    case 8: o->sync_interval_ms = intervals[choice % 4]; break;
    default:
        o->memory_bytes_max = memories[choice % 4];
        break;
    }
}

static void op_fault(const uint8_t *operand)
{
    static const int errors[] = {EIO, ENOSPC, EINTR, EMFILE, 0};
    struct sim_fault fault = {
        .kind = operand[0] % (SIM_CALLS + 1),
        .error = errors[operand[1] % 5],
        .at = 1 + (operand[2] & 31u),
        .ever = operand[2] >> 5 & 1,
        .partial = operand[2] >> 6 & 1
    };

    sim_set_fault(disk(), fault);
    story.faulty = true;
    story.evidence = false;
}

static void op_nomem(const uint8_t *operand)
{
    story.alloc.fail_at = atomic_load(&story.alloc.calls) + 1 + operand[0];
    story.alloc.fail_ever = operand[1] & 1;
    story.faulty = true;
}

static void op_heal(void)
{
    if (story.faulty) story.maybe_broken = true;
    sim_clear_fault(disk());
    story.alloc.fail_at = 0;
    story.faulty = false;
}

static void arm_crash(unsigned calls, bool cut)
{
    disk()->crash_at = disk()->ops + calls % 96;
    story.cut_pending = cut;
}

/* --------------------------------------------------------------------------
 * Looking at a closed store
 * -------------------------------------------------------------------------- */

/* Opens a copy or the disk itself; 0, or the error. It must hold a state that
 * is not older than `oldest`. */
static int look(struct sim_fs *fs, uint32_t flags, unsigned oldest)
{
    struct kvmeta_options options = story.options;
    uint64_t before = sim_hash(fs);
    struct kvmeta_error err = {0};
    struct test_oracle oracle;
    struct state state;
    kvmeta *db = NULL;
    unsigned char key[KVMETA_KEY_BYTES_MAX] = {0};
    int rc;

    options.vfs = &fs->vfs;
    options.memory_bytes_max = 0;
    options.flags |= flags;
    rc = kvmeta_open(SIM_DIR, &options, &db, &err);
    if (verbose && rc) printf("    %d: %s\n", rc, err.message);
    if (rc == KVMETA_OK) {
        test_oracle_init(&oracle, options.key_bytes, options.value_bytes);
        state = read_all(db, &oracle);
        (void)find_state(&state, oldest);
        test_oracle_free(&oracle);
        if (flags & KVMETA_READ_ONLY)
            OPS_CHECK(kvmeta_remove(db, key, 0) == KVMETA_E_READONLY,
                      "a read-only store can be written to");
        OPS_CHECK(kvmeta_close(db) == KVMETA_OK, "close of a copy");
    } else {
        OPS_CHECK(!db && err.code == rc && err.message[0],
                  "open says %d, its error %d", rc, err.code);
    }
    if (rc != KVMETA_OK || (flags & KVMETA_READ_ONLY))
        OPS_CHECK(sim_hash(fs) == before, "looking has changed files");
    OPS_CHECK(atomic_load(&story.alloc.live_blocks) == 0,
              "memory is left after looking");
    OPS_CHECK(sim_open_handles(fs) == 0, "handles are left after looking");
    return rc;
}

/* Asks for other widths; nothing may come of it. */
static void look_mismatched(void)
{
    struct kvmeta_options options = story.options;
    uint64_t before = sim_hash(disk());
    struct kvmeta_error err = {0};
    kvmeta *db = NULL;
    int rc;

    if (!story.created) return;
    options.vfs = &disk()->vfs;
    options.value_bytes++;
    rc = kvmeta_open(SIM_DIR, &options, &db, &err);
    OPS_CHECK(rc == KVMETA_E_MISMATCH, "other widths: open says %d: %s", rc,
              err.message);
    OPS_CHECK(sim_hash(disk()) == before, "other widths: files have changed");
    check_left();
}

static void op_peek(const uint8_t *operand)
{
    int rc;

    if (story.db || story.faulty || disk()->crash_at != UINT64_MAX) return;
    if (operand[0] & 1) look_mismatched();
    rc = look(disk(), KVMETA_READ_ONLY, oldest_allowed());
    OPS_CHECK(rc == KVMETA_OK || (rc == KVMETA_NOT_FOUND && !story.created),
              "FALSE ALARM: a look says %d", rc);
}

struct pick {
    unsigned left;
    char name[SIM_NAME_BYTES];
    uint64_t bytes;
};

static void pick_file(void *user, const char *name, uint64_t bytes)
{
    struct pick *pick = user;

    if (pick->left-- != 0) return;
    snprintf(pick->name, sizeof pick->name, "%s", name);
    pick->bytes = bytes;
}

static void count_file(void *user, const char *name, uint64_t bytes)
{
    (void)name;
    (void)bytes;
    ++*(unsigned *)user;
}

/* Damages `data` at a place drawn from the random numbers; returns its size,
 * or UINT64_MAX: the file is to go. */
static uint64_t damage(uint8_t *data, uint64_t bytes, unsigned how,
                       struct test_rng *rng)
{
    uint64_t at = bytes ? test_rng_below(rng, bytes) : 0;
    uint64_t cell = at & ~(uint64_t)511;
    uint64_t n = kv_min(512, bytes - cell);
    uint64_t other = bytes ? test_rng_below(rng, bytes) & ~(uint64_t)511 : 0;

    switch (how % (sizeof ops_damage / sizeof ops_damage[0])) {
    case 0:
        if (bytes) data[at] ^= (uint8_t)(1u << test_rng_below(rng, 8));
        return bytes;
    case 1:
        memset(data + cell, 0, (size_t)n);
        return bytes;
    case 2:
        test_rng_bytes(rng, data + cell, (size_t)n);
        return bytes;
    case 3:
        return at;
    case 4:
        return UINT64_MAX;
    default:
        n = kv_min(n, bytes - other);
        memmove(data + cell, data + other, (size_t)n);
        return bytes;
    }
}

/* A copy of the disk with one file damaged: it opens with nothing lost that
 * was acknowledged, or says that it is corrupt. After a power cut a mark may
 * have been lost, and then damage to the end of the log cannot be told. */
static void op_damage(const uint8_t *operand)
{
    struct test_rng rng = {operand[1] * 256u + operand[2]};
    struct pick pick = {0};
    struct sim_fs *copy;
    unsigned count = 0;
    uint64_t bytes;
    uint8_t *data;
    int rc;

    if (story.db || story.faulty || !story.evidence) return;
    copy = malloc(sizeof *copy);
    if (!copy) abort();
    sim_clone(copy, disk());
    sim_each_file(copy, count_file, &count);
    pick.left = operand[1] % (count ? count : 1);
    sim_each_file(copy, pick_file, &pick);
    data = count ? sim_file_get(copy, pick.name, &bytes) : NULL;
    if (data) {
        bytes = damage(data, bytes, operand[0], &rng);
        if (verbose)
            printf("    damaged: %s, now %lld bytes\n", pick.name,
                   (long long)bytes);
        sim_file_put(copy, pick.name, bytes == UINT64_MAX ? NULL : data,
                     bytes == UINT64_MAX ? 0 : bytes);
        rc = look(copy, 0, story.durable);
        OPS_CHECK(rc == KVMETA_OK || rc == KVMETA_E_CORRUPT,
                  "open of a damaged store says %d", rc);
        free(data);
    }
    sim_free(copy);
    free(copy);
}

/* --------------------------------------------------------------------------
 * Damage while the store is open
 * -------------------------------------------------------------------------- */

static void pick_table(void *user, const char *name, uint64_t bytes)
{
    if (name[0] == 't') pick_file(user, name, bytes);
}

static void count_table(void *user, const char *name, uint64_t bytes)
{
    if (name[0] == 't') count_file(user, name, bytes);
}

/* Flips a bit of a file in place, as a disk would: open handles see it. */
static void rot_file(const struct pick *pick, uint64_t off, unsigned bit)
{
    const struct kvmeta_vfs *vfs = &disk()->vfs;
    unsigned char byte = 0;
    int dir, file;
    bool done = vfs->dir_open(vfs->user, SIM_DIR, &dir) == 0
        && vfs->file_open(vfs->user, dir, pick->name, KVMETA_VFS_WRITE,
                          &file) == 0
        && vfs->file_read(vfs->user, file, &byte, 1, off) == 1;

    byte ^= (unsigned char)(1u << bit % 8);
    done = done && vfs->file_write(vfs->user, file, &byte, 1, off) == 1
        && vfs->file_sync(vfs->user, file) == 0
        && vfs->file_close(vfs->user, file) == 0
        && vfs->dir_close(vfs->user, dir) == 0;
    OPS_CHECK(done, "the simulated disk fails");
}

/* A table is damaged: verification says so, and then the background writes
 * the data anew from memory. All of it in one go, because a crash before that
 * would leave a store that must not open. */
static void op_rot(const uint8_t *operand)
{
    struct test_rng rng = {operand[1] * 8u + operand[2]};
    struct pick pick = {0};
    struct kvmeta_error err = {0};
    unsigned count = 0;
    int rc;

    if (story.faulty || story.broken || story.maybe_broken) return;
    if (disk()->crash_at != UINT64_MAX) return;
    rc = kvmeta_wait_idle(story.db);
    OPS_CHECK(rc == KVMETA_OK, "idle says %d", rc);
    rc = kvmeta_verify(story.db, &err);
    OPS_CHECK(rc == KVMETA_OK, "verify says %d: %s", rc, err.message);
    sim_each_file(disk(), count_table, &count);
    if (count == 0) return;
    pick.left = operand[0] % count;
    sim_each_file(disk(), pick_table, &pick);
    rot_file(&pick, test_rng_below(&rng, pick.bytes), operand[2]);
    rc = kvmeta_verify(story.db, &err);
    OPS_CHECK(rc == KVMETA_E_CORRUPT, "%s is damaged, but verify says %d",
              pick.name, rc);
    OPS_CHECK(strstr(err.message, pick.name), "%s is damaged, not '%s'",
              pick.name, err.message);
    rc = kvmeta_wait_idle(story.db);
    OPS_CHECK(rc == KVMETA_OK, "healing says %d", rc);
    rc = kvmeta_verify(story.db, &err);
    OPS_CHECK(rc == KVMETA_OK, "after healing, verify says %d: %s", rc,
              err.message);
}

/* --------------------------------------------------------------------------
 * The story
 * -------------------------------------------------------------------------- */

static void run_open(enum ops_code code, const uint8_t *operand)
{
    switch (code) {
    case OP_PUT: case OP_REMOVE: case OP_SWAP:
        op_single(code, operand);
        break;
    case OP_ADD_PUT: case OP_ADD_REMOVE: case OP_ADD_EXPECT:
        op_add(code, operand);
        break;
    case OP_COMMIT: op_commit(operand); break;
    case OP_BULK: op_bulk(operand); break;
    case OP_SYNC: case OP_FLUSH: case OP_STEP: case OP_IDLE: case OP_COMPACT:
    case OP_VERIFY:
        op_work(code, operand);
        break;
    case OP_SNAPSHOT: op_snapshot(operand[0]); break;
    case OP_CHECK: op_check(operand[0]); break;
    case OP_RELEASE: release(held_at(operand[0])); break;
    case OP_WALK: op_walk(operand[0], operand[1], operand[2]); break;
    case OP_READ: op_read(operand); break;
    case OP_ROT: op_rot(operand); break;
    default: break;
    }
}

static void run_slot(const uint8_t *slot)
{
    enum ops_code code = (enum ops_code)ops_code(slot);
    const uint8_t *operand = slot + 1;

    switch (code) {
    case OP_CLOSE: close_store(); break;
    case OP_OPEN:
        close_store();
        if (!disk()->crashed) open_store();
        break;
    case OP_OPTION:
        if (story.db) close_store();
        op_option(operand[0], operand[1]);
        break;
    case OP_PASS:
        disk()->clock_now_ns += operand[0] * (uint64_t)10000000;
        break;
    case OP_FAULT: op_fault(operand); break;
    case OP_NOMEM: op_nomem(operand); break;
    case OP_HEAL: op_heal(); break;
    case OP_CUT: case OP_KILL:
        story.cut_state = operand[0];
        story.cut_garbage = operand[1] & 1;
        crash(code == OP_CUT);
        break;
    case OP_CUT_IN: case OP_KILL_IN:
        story.cut_state = operand[1];
        story.cut_garbage = operand[2] & 1;
        arm_crash(operand[0], code == OP_CUT_IN);
        break;
    case OP_PEEK: op_peek(operand); break;
    case OP_DAMAGE: op_damage(operand); break;
    default:
        if (story.db) run_open(code, operand);
        break;
    }
    if (disk()->crashed) crash(story.cut_pending);
}

static void begin(const uint8_t *head)
{
    size_t n = sizeof ops_widths / sizeof ops_widths[0];
    const unsigned *widths = ops_width_values[head[0] % n];
    struct kvmeta_options *o = &story.options;

    memset(&story, 0, offsetof(struct story, states));
    memset(&story.states[0], 0, sizeof story.states[0]);
    memset(&story.durable, 0,
           sizeof story - offsetof(struct story, durable));
    kvmeta_options_init(o, widths[0], widths[1]);
    o->flags = KVMETA_NO_THREAD;
    o->log_buffer_bytes = 4096;
    o->log_bytes_max = 65536;
    o->merge_window = 2;
    o->merge_ratio = 100;
    o->zstd_level = -1;
    o->open_threads = 1;
    o->realloc_fn = test_realloc;
    o->log_fn = test_log;
    o->user = &story.alloc;
    story.alloc.limit_bytes = FUZZ_MEMORY_BYTES_MAX;
    story.log_align_min = UINT32_MAX;
    sim_init(&story.disks[0], head[1] % 2 ? 4096 : 512, head[2] + 1u);
    test_oracle_init(&story.now, widths[0], widths[1]);
    story.batch.bytes = malloc(BATCH_MAX * ((size_t)widths[0] + widths[1]));
    if (!story.batch.bytes) abort();
}

/* Nothing fails any more: everything must be well. */
static void finish(void)
{
    op_heal();
    disk()->crash_at = UINT64_MAX;
    story.slot = NULL;
    story.options.memory_bytes_max = 0;
    if (story.db && story.broken) {
        release_all();
        (void)kvmeta_close(story.db);
        story.db = NULL;
    }
    close_store();
    open_store();
    OPS_CHECK(story.db, "the store does not open in the end");
    op_work(OP_VERIFY, NULL);
    op_work(OP_COMPACT, NULL);
    check_now(true);
    close_store();
    open_store();
    OPS_CHECK(story.db, "the store does not open at last");
    close_store();
    test_oracle_free(&story.now);
    free(story.batch.bytes);
    sim_free(disk());
}

static void run_story(const uint8_t *data, size_t bytes)
{
    begin(data);
    story.step = 0;
    open_store();
    for (size_t at = OPS_SLOT_BYTES; at + OPS_SLOT_BYTES <= bytes;
         at += OPS_SLOT_BYTES) {
        story.step++;
        story.slot = data + at;
        if (verbose) {
            printf("%3u ", story.step);
            ops_print(stdout, &ops_lines[ops_code(story.slot)],
                      story.slot + 1);
            fflush(stdout);
        }
        run_slot(story.slot);
        check_now(story.now.count <= 64);
    }
    finish();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static uint8_t slots[OPS_SLOTS_MAX * OPS_SLOT_BYTES];

    if (ops_is_text(data, bytes)) {
        bytes = ops_from_text(data, bytes, slots, sizeof slots);
    } else {
        bytes = kv_min(bytes, sizeof slots);
        if (bytes) memcpy(slots, data, bytes);
    }
    if (bytes < OPS_SLOT_BYTES) return 0;
    run_story(slots, bytes);
    fuzz_accepted++;
    return 0;
}

/* --------------------------------------------------------------------------
 * --text, --bytes, --run
 * -------------------------------------------------------------------------- */

static size_t read_input(const char *path, uint8_t *data, size_t max)
{
    FILE *file = fopen(path, "rb");
    size_t n;

    if (!file) {
        perror(path);
        exit(1);
    }
    n = fread(data, 1, max, file);
    fclose(file);
    return n;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static uint8_t data[1 << 16];
    static uint8_t slots[OPS_SLOTS_MAX * OPS_SLOT_BYTES];
    const char *mode = *argc == 3 ? (*argv)[1] : "";
    size_t n;

    if (strcmp(mode, "--text") != 0 && strcmp(mode, "--bytes") != 0
        && strcmp(mode, "--run") != 0)
        return 0;
    n = read_input((*argv)[2], data, sizeof data);
    if (ops_is_text(data, n)) {
        n = ops_from_text(data, n, slots, sizeof slots);
        if (n == 0) exit(1);
    } else {
        n = kv_min(n, sizeof slots);
        memcpy(slots, data, n);
    }
    verbose = strcmp(mode, "--run") == 0;
    if (verbose) {
        LLVMFuzzerTestOneInput(slots, n);
        printf("all is well\n");
    } else if (strcmp(mode, "--text") == 0) {
        ops_to_text(stdout, slots, n);
    } else {
        fwrite(slots, 1, n, stdout);
    }
    exit(0);
}

/* --------------------------------------------------------------------------
 * Mutations: whole operations, or one operand
 * -------------------------------------------------------------------------- */

#ifdef FUZZ_MUTATOR
/* An operation as likely as it is fruitful. */
static void draw_slot(struct test_rng *rng, uint8_t *slot)
{
    static const uint8_t often[] = {
        OP_PUT, OP_PUT, OP_PUT, OP_REMOVE, OP_BULK, OP_BULK, OP_COMMIT,
        OP_ADD_PUT, OP_SYNC, OP_FLUSH, OP_STEP, OP_OPEN, OP_OPEN, OP_CUT,
        OP_CUT_IN, OP_CUT_IN, OP_CUT_IN, OP_KILL_IN, OP_FAULT
    };
    uint64_t r = test_rng_u64(rng);

    slot[0] = r & 1 ? often[(r >> 8) % sizeof often]
                    : (uint8_t)((r >> 8) % OPS_CODES);
    slot[1] = (uint8_t)(r >> 24 & (r & 2 ? 7 : 255));
    slot[2] = (uint8_t)(r >> 32 & (r & 4 ? 3 : 255));
    slot[3] = (uint8_t)(r >> 40 & (r & 8 ? 3 : 255));
}

/* One change; returns the size. `at`: the offset of a slot behind the head. */
static size_t change_slot(struct test_rng *rng, uint8_t *data, size_t bytes,
                          size_t max, size_t at)
{
    size_t n = OPS_SLOT_BYTES;
    size_t count = (size_t)(1 + test_rng_below(rng, 4)) * n;
    size_t from = n + test_rng_below(rng, bytes / n) * n;

    switch (test_rng_below(rng, 8)) {
    case 0: case 1: case 2:              /* a new one */
        if (bytes + n > max) return bytes;
        memmove(data + at + n, data + at, bytes - at);
        draw_slot(rng, data + at);
        return bytes + n;
    case 3:                              /* some go */
        count = (size_t)kv_min(count, bytes - at);
        memmove(data + at, data + at + count, bytes - at - count);
        return bytes - count;
    case 4:                              /* some come again */
        if (from >= bytes) return bytes;
        count = (size_t)kv_min(count, bytes - from);
        if (bytes + count > max) return bytes;
        memmove(data + bytes, data + from, count);
        return bytes + count;
    case 5:                              /* another one */
        if (at < bytes) draw_slot(rng, data + at);
        return bytes;
    case 6:                              /* the head */
        data[test_rng_below(rng, n)] = (uint8_t)test_rng_u64(rng);
        return bytes;
    default:                             /* an operand */
        if (at < bytes)
            data[at + 1 + test_rng_below(rng, 3)] =
                (uint8_t)(test_rng_u64(rng) >> (test_rng_u64(rng) & 7));
        return bytes;
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, size_t bytes_max,
                               unsigned seed)
{
    static uint8_t slots[OPS_SLOTS_MAX * OPS_SLOT_BYTES];
    struct test_rng rng = {seed};
    size_t n = OPS_SLOT_BYTES;

    if (ops_is_text(data, bytes)) {
        bytes = ops_from_text(data, bytes, slots, sizeof slots);
        bytes = kv_min(bytes, bytes_max);
        memcpy(data, slots, bytes);
    }
    bytes_max = kv_min(bytes_max, sizeof slots) / n * n;
    bytes = kv_min(bytes, bytes_max) / n * n;
    if (bytes == 0) {
        if (bytes_max < n) return 0;
        memset(data, 0, n);
        bytes = n;
    }
    for (uint64_t i = 1 + test_rng_below(&rng, 3); i > 0; i--) {
        size_t at = n + test_rng_below(&rng, bytes / n) * n;

        bytes = change_slot(&rng, data, bytes, bytes_max, at);
    }
    return bytes;
}

/* The beginning of a, the end of b. */
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t a_bytes,
                                 const uint8_t *b, size_t b_bytes,
                                 uint8_t *out, size_t out_max, unsigned seed)
{
    struct test_rng rng = {seed};
    size_t n = OPS_SLOT_BYTES;
    size_t head, from, tail;

    if (ops_is_text(a, a_bytes) || ops_is_text(b, b_bytes)) return 0;
    if (a_bytes < n || b_bytes < n || out_max < n) return 0;
    head = n + test_rng_below(&rng, a_bytes / n) * n;
    from = n + test_rng_below(&rng, b_bytes / n) * n;
    head = kv_min(kv_min(head, a_bytes / n * n), out_max / n * n);
    from = kv_min(from, b_bytes / n * n);
    tail = kv_min(b_bytes / n * n - from, (out_max - head) / n * n);
    memcpy(out, a, head);
    memcpy(out + head, b + from, tail);
    return head + tail;
}
#endif
