/*
 * The life of one store on the simulated file system; see life.h.
 *
 * SPDX-License-Identifier: MIT
 */
#include "life.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct life_totals life_totals;
int life_trace;

const struct life_config life_configs[] = {
    {"512", 512, 1, 512, 8, 16, 1500, 100},
    {"4096-sectors", 4096, 0, 512, 8, 16, 1500, 100},
    {"4096-aligned", 4096, 1, 4096, 8, 16, 1500, 100},
    {"wide", 512, 1, 512, 20, 2000, 36, 3},
    {"odd", 512, 1, 512, 9, 0, 3000, 3},
    {"tiny-align", 512, 1, 512, 1, 1, 250, 3},
    {NULL, 0, 0, 0, 0, 0, 0, 0},
};

#define KEYS 9
#define BATCH_MAX 3000

int life_problem(struct life *life, const char *format, ...)
{
    va_list args;

    if (life->problem[0] == '\0') {
        va_start(args, format);
        vsnprintf(life->problem, sizeof life->problem, format, args);
        va_end(args);
    }
    return 1;
}

/* --------------------------------------------------------------------------
 * Sums over records
 * -------------------------------------------------------------------------- */

static uint64_t hash_part(uint64_t hash, const unsigned char *data,
                          size_t bytes)
{
    uint64_t word;
    size_t n;

    while (bytes > 0) {
        n = bytes < sizeof word ? bytes : sizeof word;
        word = 0;
        memcpy(&word, data, n);
        hash = (hash ^ word) * 0x9fb21c651e98df25u;
        hash ^= hash >> 35;
        data += n;
        bytes -= n;
    }
    return hash;
}

/* Adds (sign 1) or takes away (-1) one record. */
static void state_add(struct life_state *state,
                      const struct life_config *config, const void *key,
                      const void *value, int sign)
{
    uint64_t hash = hash_part(0x243f6a8885a308d3u, key, config->key_bytes);

    hash = hash_part(hash, value, config->value_bytes);
    state->sum[0] += (uint64_t)sign * hash;
    state->sum[1] += (uint64_t)sign * ((hash ^ hash >> 29) *
                                       0xd6e8feb86659fd93u);
    state->count += (uint64_t)sign;
}

static int state_same(const struct life_state *a, const struct life_state *b)
{
    return a->sum[0] == b->sum[0] && a->sum[1] == b->sum[1] &&
           a->count == b->count;
}

/*
 * The library's digest of a state is taken on trust the first time that the
 * state comes up, and must be the same ever after, however the store came to
 * hold these records. A fixed table, in which newer states replace older.
 */
#define DIGESTS 65536u

struct known_digest {
    struct life_state state;
    struct kvmeta_digest digest;
    int used;
    uint32_t widths;
};

static int digest_is_new(const struct life *life,
                         const struct life_state *state,
                         struct kvmeta_digest digest)
{
    static struct known_digest known[DIGESTS];
    struct known_digest *slot = &known[state->sum[0] % DIGESTS];
    uint32_t widths = life->config->key_bytes << 16 |
                      life->config->value_bytes;

    if (slot->used && slot->widths == widths &&
        state_same(&slot->state, state)) {
        return slot->digest.lo != digest.lo || slot->digest.hi != digest.hi;
    }
    slot->state = *state;
    slot->digest = digest;
    slot->widths = widths;
    slot->used = 1;
    return 0;
}

/* --------------------------------------------------------------------------
 * Opening
 * -------------------------------------------------------------------------- */

void life_begin(struct life *life, struct sim_fs *fs,
                struct test_alloc *alloc, const struct life_config *config)
{
    memset(life, 0, offsetof(struct life, states));
    memset(&life->durable, 0,
           sizeof *life - offsetof(struct life, durable));
    life->fs = fs;
    life->alloc = alloc;
    life->config = config;
    memset(&life->states[0], 0, sizeof life->states[0]);
    life->next_number = 1;
    test_oracle_init(&life->now, config->key_bytes, config->value_bytes);
}

void life_begin_after(struct life *life, const struct life *from, int kill,
                      struct sim_fs *fs, struct test_alloc *alloc)
{
    unsigned count = from->issued - from->durable + 1;

    life_begin(life, fs, alloc, from->config);
    life->before = from;
    memcpy(life->states, &from->states[from->durable],
           count * sizeof life->states[0]);
    life->issued = count - 1;
    life->visible = count - 1;
    life->next_number = from->next_number + 1000;

    /* What a kill leaves need not be durable: it must be there at the next
     * open, but not after a power cut before that. */
    if (kill && from->written > from->durable) {
        life->written = from->written - from->durable;
    }
}

void life_end(struct life *life)
{
    if (life->db != NULL) {
        kvmeta_close(life->db);
        life->db = NULL;
    }
    test_oracle_free(&life->now);
}

static void trace(const struct life *life, char op, const char *message)
{
    if (life_trace) {
        printf("process %llu: %c = %d, states %u durable, %u written, "
               "%u visible, %u issued; calls %llu failed %s\n",
               (unsigned long long)life->fs->pid, op, life->last_result,
               life->durable, life->written, life->visible, life->issued,
               (unsigned long long)life->fs->fault.hits, message);
    }
}

static void fill_options(struct life *life, struct kvmeta_options *options)
{
    const struct life_config *config = life->config;

    kvmeta_options_init(options, config->key_bytes, config->value_bytes);
    options->flags = KVMETA_NO_THREAD;
    options->log_buffer_bytes = 4096;
    options->log_align = config->log_align;
    options->log_bytes_max = 65536;
    options->merge_window = 2;
    options->merge_ratio = life->config->merge_ratio;
    options->zstd_level = -1;
    options->open_threads = 1;
    options->realloc_fn = test_realloc;
    options->log_fn = test_log;
    options->user = life->alloc;
    options->vfs = &life->fs->vfs;
}

/* Reads all records into `now` and sums them up. */
struct reading {
    struct life *life;
    struct life_state state;
    const unsigned char *last;
};

static int read_record(void *user, const void *key, const void *value)
{
    struct reading *reading = user;
    struct test_oracle *now = &reading->life->now;

    if (now->count > 0 &&
        memcmp(test_oracle_at(now, now->count - 1), key,
               now->key_bytes) >= 0) {
        return 1;
    }
    test_oracle_put(now, key, value);
    state_add(&reading->state, reading->life->config, key, value, 1);
    return 0;
}

static int read_all(struct life *life, struct life_state *state)
{
    struct reading reading;

    memset(&reading, 0, sizeof reading);
    reading.life = life;
    life->now.count = 0;
    if (kvmeta_scan(life->db, NULL, NULL, read_record, &reading) != 0) {
        return life_problem(life, "the scan is not in order");
    }
    *state = reading.state;
    if (kvmeta_count(life->db) != state->count) {
        return life_problem(life, "kvmeta_count is %llu, a scan finds %llu",
                            (unsigned long long)kvmeta_count(life->db),
                            (unsigned long long)state->count);
    }
    if (digest_is_new(life, state, kvmeta_digest(life->db))) {
        return life_problem(life, "the digest does not fit the records");
    }
    return 0;
}

static void count_open(const struct kvmeta_stats *stats)
{
    life_totals.opens++;
    life_totals.torn[stats->open_torn_reason]++;
    life_totals.healed += stats->open_healed;
    life_totals.garbage_files += stats->open_garbage_files;
    life_totals.log_frames += stats->open_log_frames;
}

/* Which of the states that may be there this is; -1: none. */
static int find_state(const struct life *life, const struct life_state *state,
                      unsigned oldest)
{
    unsigned i;

    for (i = life->issued + 1; i > oldest; i--) {
        if (state_same(&life->states[i - 1], state) &&
            life->states[i - 1].seq == state->seq) {
            return (int)(i - 1);
        }
    }
    return -1;
}

static int wrong_state(struct life *life, const struct life_state *state,
                       unsigned oldest)
{
    const struct life *whose = life;
    int older = -1;

    for (; whose != NULL && older < 0; whose = whose->before) {
        older = find_state(whose, state, 0);
    }
    return life_problem(life, "%s: recovered %llu records, commit number "
                        "%llu; may be %llu..%llu",
                        older >= 0 ? "LOST" : "NOT A PREFIX",
                        (unsigned long long)state->count,
                        (unsigned long long)state->seq,
                        (unsigned long long)life->states[oldest].seq,
                        (unsigned long long)life->states[life->issued].seq);
}

/* The state found is the only one from now on, and on disk. */
static int adopt(struct life *life, unsigned found,
                 const struct kvmeta_stats *stats)
{
    if (stats->durable_seq != stats->seq) {
        return life_problem(life, "durable_seq %llu, seq %llu after an open",
                            (unsigned long long)stats->durable_seq,
                            (unsigned long long)stats->seq);
    }
    life->durable = life->written = life->visible = life->issued = found;
    life->broken = 0;
    life->maybe_broken = 0;
    life->before = NULL;
    return 0;
}

static int check_opened(struct life *life, unsigned oldest)
{
    struct kvmeta_stats stats;
    struct life_state state;
    int found;

    stats.struct_size = sizeof stats;
    if (kvmeta_stats(life->db, &stats) != 0) {
        return life_problem(life, "kvmeta_stats fails");
    }
    count_open(&stats);
    if (read_all(life, &state)) {
        return 1;
    }
    state.seq = stats.seq;
    found = find_state(life, &state, oldest);
    if (found < 0) {
        return wrong_state(life, &state, oldest);
    }
    return adopt(life, (unsigned)found, &stats);
}

/* What any call may answer when system calls or allocations fail. */
static int error_is_documented(int rc)
{
    return rc == KVMETA_E_IO || rc == KVMETA_E_NOSPACE ||
           rc == KVMETA_E_NOMEM || rc == KVMETA_E_LIMIT;
}

/* An open may also find the file system read-only. */
static int open_error_is_documented(int rc)
{
    return error_is_documented(rc) || rc == KVMETA_E_READONLY;
}

int life_open(struct life *life)
{
    struct kvmeta_options options;
    struct kvmeta_error error;
    unsigned oldest = life->written > life->durable ? life->written
                                                    : life->durable;
    kvmeta *db = NULL;

    fill_options(life, &options);
    memset(&error, 0, sizeof error);
    life->last_result = kvmeta_open(SIM_DIR, &options, &db, &error);
    trace(life, 'O', error.message);
    if (life->last_result == 0) {
        life->db = db;
        return check_opened(life, oldest);
    }
    if (db != NULL) {
        life_problem(life, "a failed open has set the handle");
    }
    if (!(life->faulty && open_error_is_documented(life->last_result)) &&
        !(life->damaged && life->last_result == KVMETA_E_CORRUPT)) {
        life_problem(life, "FALSE ALARM: open says %d (%s): %s",
                     life->last_result, kvmeta_strerror(life->last_result),
                     error.message);
    }
    if (error.code != life->last_result || error.message[0] == '\0') {
        life_problem(life, "open says %d, its error %d '%s'",
                     life->last_result, error.code, error.message);
    }
    return 1;
}

static int close_store(struct life *life)
{
    struct kvmeta_stats stats;
    int rc;

    stats.struct_size = sizeof stats;
    if (kvmeta_stats(life->db, &stats) == 0) {
        life_totals.merges += stats.merges;
        life_totals.flushes += stats.flushes;
        life_totals.rotations += stats.rotations;
        life_totals.full_compactions += stats.full_compactions;
    }
    rc = kvmeta_close(life->db);
    life->db = NULL;
    life->last_result = rc;
    if (rc == 0) {
        life->durable = life->written = life->visible;
        if (!life->broken && !life->maybe_broken) {
            life->issued = life->visible;
        }
        return 0;
    }
    if (!life->faulty ||
        (!error_is_documented(rc) && rc != KVMETA_E_FAILED)) {
        return life_problem(life, "close says %d (%s)", rc,
                            kvmeta_strerror(rc));
    }
    return 0;
}

/* --------------------------------------------------------------------------
 * Checks
 * -------------------------------------------------------------------------- */

int life_check_now(struct life *life)
{
    const char *differs;

    if (life->db == NULL) {
        return 0;
    }
    differs = test_oracle_check(&life->now, life->db);
    return differs != NULL ? life_problem(life, "%s", differs) : 0;
}

struct listing {
    unsigned tables;
    unsigned logs;
    unsigned fixed;
    char stranger[SIM_NAME_BYTES];
};

static void list_file(void *user, const char *name, uint64_t bytes)
{
    struct listing *listing = user;
    size_t length = strlen(name);

    (void)bytes;
    if (strcmp(name, "LOCK") == 0 || strcmp(name, "MANIFEST") == 0) {
        listing->fixed++;
    } else if (length == 21 && name[0] == 't' &&
               strcmp(name + 17, ".tab") == 0) {
        listing->tables++;
    } else if (length == 21 && name[0] == 'w' &&
               strcmp(name + 17, ".wal") == 0) {
        listing->logs++;
    } else {
        strcpy(listing->stranger, name);
    }
}

int life_check_directory(struct life *life)
{
    struct listing listing;
    struct kvmeta_stats stats;

    memset(&listing, 0, sizeof listing);
    stats.struct_size = sizeof stats;
    kvmeta_stats(life->db, &stats);
    sim_each_file(life->fs, list_file, &listing);
    if (listing.stranger[0] != '\0') {
        return life_problem(life, "%s is left over", listing.stranger);
    }
    if (listing.fixed != 2) {
        return life_problem(life, "LOCK or MANIFEST is not there");
    }
    if (listing.tables != stats.tables || listing.logs > stats.logs_waiting) {
        return life_problem(life, "%u tables and %u logs on disk, %llu and "
                            "%llu in the statistics", listing.tables,
                            listing.logs, (unsigned long long)stats.tables,
                            (unsigned long long)stats.logs_waiting);
    }
    return 0;
}

int life_check_leaks(struct life *life)
{
    if (atomic_load(&life->alloc->live_blocks) != 0) {
        return life_problem(life, "%lld blocks of memory are left",
                            (long long)atomic_load(
                                &life->alloc->live_blocks));
    }
    if (sim_open_handles(life->fs) != 0) {
        return life_problem(life, "%u handles are left open",
                            sim_open_handles(life->fs));
    }
    if (life->fs->misuses != 0) {
        return life_problem(life, "a handle was used that is not open");
    }
    return 0;
}

/* --------------------------------------------------------------------------
 * Writing
 * -------------------------------------------------------------------------- */

struct change {
    struct kvmeta_op ops[BATCH_MAX];
    size_t count;
    unsigned char *bytes;                /* keys and values */
    size_t used;
    int single;                          /* by kvmeta_put or kvmeta_remove */
    unsigned durability;
};

static void make_key(const struct life *life, uint64_t number,
                     unsigned char *key)
{
    uint32_t i;

    for (i = 0; i < life->config->key_bytes; i++) {
        key[i] = (unsigned char)(number * 37 + i * 11);
    }
    if (life->config->key_bytes > 2) {
        key[1] = (unsigned char)(number >> 8);
        key[2] = (unsigned char)number;
    }
}

static void change_add(struct life *life, struct change *change, int type,
                       uint64_t key_number)
{
    const struct life_config *config = life->config;
    struct kvmeta_op *op = &change->ops[change->count++];
    struct test_rng rng = {life->next_number * 64 + change->count};
    unsigned char *key = change->bytes + change->used;
    unsigned char *value = key + config->key_bytes;

    make_key(life, key_number, key);
    test_rng_bytes(&rng, value, config->value_bytes < 24
                                    ? config->value_bytes : 24);
    op->type = type;
    op->key = key;
    op->value = value;
    change->used += (size_t)config->key_bytes + config->value_bytes;
}

/* What an operation changes follows from the number of the operation. */
static void change_make(struct life *life, struct change *change, char op)
{
    uint64_t n = life->next_number++;
    uint32_t i;

    change->single = strchr("pwux", op) != NULL;
    change->durability = strchr("uBg", op) != NULL ? KVMETA_BUFFERED :
                         op == 'w' ? KVMETA_WRITTEN : KVMETA_DURABLE;
    switch (op) {
    case 'x':
        change_add(life, change, KVMETA_OP_REMOVE, n % 5);
        break;
    case 'b':
    case 'B':
        change_add(life, change, KVMETA_OP_PUT, (n + 1) % 5);
        change_add(life, change, KVMETA_OP_REMOVE, (n + 3) % 5);
        change_add(life, change, KVMETA_OP_PUT, 5 + n % (KEYS - 5));
        break;
    case 'g':
        for (i = 0; i < life->config->big_batch; i++) {
            change_add(life, change, KVMETA_OP_PUT, (n + i) % 4000);
        }
        break;
    default:
        change_add(life, change, KVMETA_OP_PUT, n % 5);
        break;
    }
}

/* The state after the change, and the oracle with it; 0: nothing changes. */
static int change_apply(struct life *life, const struct change *change,
                        struct test_oracle *after, struct life_state *state)
{
    const struct life_config *config = life->config;
    const struct kvmeta_op *op;
    const void *old;
    size_t i;
    int changes = 0;

    *state = life->states[life->visible];
    for (i = 0; i < change->count; i++) {
        op = &change->ops[i];
        old = test_oracle_get(after, op->key);
        if (old != NULL) {
            state_add(state, config, op->key, old, -1);
        }
        if (op->type == KVMETA_OP_PUT) {
            test_oracle_put(after, op->key, op->value);
            state_add(state, config, op->key, op->value, 1);
            changes = 1;
        } else {
            changes |= test_oracle_remove(after, op->key);
        }
    }
    state->seq += (uint64_t)changes;
    return changes;
}

static int change_call(struct life *life, const struct change *change)
{
    const struct kvmeta_op *op = &change->ops[0];

    if (!change->single) {
        return kvmeta_write(life->db, change->ops, change->count,
                            change->durability, NULL);
    }
    if (op->type == KVMETA_OP_REMOVE) {
        return kvmeta_remove(life->db, op->key, change->durability);
    }
    return kvmeta_put(life->db, op->key, op->value, change->durability);
}

/* The error that made the store refuse writes stays to be asked for. */
static int check_last_error(struct life *life)
{
    struct kvmeta_error error;
    int rc;

    memset(&error, 0, sizeof error);
    rc = kvmeta_last_error(life->db, &error);
    if (rc != error.code) {
        return life_problem(life, "last_error returns %d, fills in %d", rc,
                            error.code);
    }
    if (life->broken && (rc >= 0 || rc == KVMETA_E_FAILED)) {
        return life_problem(life, "last_error is %d after a failed write",
                            rc);
    }
    if (rc != 0 && error.message[0] == '\0') {
        return life_problem(life, "last_error %d has no message", rc);
    }
    return 0;
}

/* A write has failed: the state is as before; whether later ones may succeed
 * depends on the error. changes: 1, unless it would have changed nothing. */
static int write_failed(struct life *life, int rc, unsigned changes)
{
    if (!life->faulty) {
        return life_problem(life, "a write says %d (%s)", rc,
                            kvmeta_strerror(rc));
    }
    switch (rc) {
    case KVMETA_E_NOSPACE:
    case KVMETA_E_NOMEM:
    case KVMETA_E_LIMIT:
        life->issued = life->visible;    /* it will never be */
        break;
    case KVMETA_E_IO:
        life->broken = 1;                /* its outcome is open */
        break;
    case KVMETA_E_FAILED:
        life->issued -= changes;         /* this one was not even tried */
        life->broken = 1;
        break;
    default:
        return life_problem(life, "a write says %d (%s)", rc,
                            kvmeta_strerror(rc));
    }
    return check_last_error(life) || life_check_now(life);
}

static int write_succeeded(struct life *life, const struct change *change,
                           struct test_oracle *after)
{
    if (life->broken) {
        return life_problem(life, "a write succeeds after a failed one");
    }
    life->maybe_broken = 0;
    life->visible = life->issued;
    test_oracle_copy(&life->now, after);
    if (change->durability == KVMETA_DURABLE) {
        life->durable = life->visible;
    }
    if (change->durability != KVMETA_BUFFERED) {
        life->written = life->visible;
    }
    return 0;
}

static int run_change(struct life *life, struct change *change)
{
    struct test_oracle after;
    struct life_state state;
    int changes, rc, expected, failed;

    test_oracle_init(&after, life->config->key_bytes,
                     life->config->value_bytes);
    test_oracle_copy(&after, &life->now);
    changes = change_apply(life, change, &after, &state);
    expected = changes ? 0 : change->single ? KVMETA_NOT_FOUND : 0;
    if (changes) {
        life->states[++life->issued] = state;
    }
    rc = change_call(life, change);
    life->last_result = rc;
    if (rc < 0) {
        failed = write_failed(life, rc, (unsigned)changes);
    } else if (rc != expected && rc != 0) {
        failed = life_problem(life, "a write says %d, not %d", rc, expected);
    } else {
        failed = changes ? write_succeeded(life, change, &after) : 0;
    }
    test_oracle_free(&after);
    return failed;
}

static int op_change(struct life *life, char op)
{
    size_t record = (size_t)life->config->key_bytes +
                    life->config->value_bytes;
    size_t count = op == 'g' ? life->config->big_batch : 3;
    struct change *change;
    int failed;

    if (life->issued + 1 >= LIFE_STATES_MAX) {
        return 0;
    }
    change = malloc(sizeof *change);
    if (change == NULL) {
        abort();
    }
    change->count = 0;
    change->used = 0;
    change->bytes = calloc(count, record);
    if (change->bytes == NULL) {
        abort();
    }
    change_make(life, change, op);
    failed = run_change(life, change);
    free(change->bytes);
    free(change);
    return failed;
}

/* --------------------------------------------------------------------------
 * The other operations
 * -------------------------------------------------------------------------- */

/* Sync and background work. A failed sync of the log breaks the store; a
 * failure beside it need not. */
static int maintenance_done(struct life *life, char op, int rc)
{
    life->last_result = rc;
    if (rc == 0) {
        if (op == 's' || op == 'r') {
            if (life->broken) {
                return life_problem(life, "'%c' succeeds after a failed "
                                    "write", op);
            }
            life->durable = life->written = life->visible;
        }
        return 0;
    }
    if (!life->faulty ||
        (!error_is_documented(rc) && rc != KVMETA_E_FAILED)) {
        return life_problem(life, "'%c' says %d (%s)", op, rc,
                            kvmeta_strerror(rc));
    }
    if (rc == KVMETA_E_FAILED || (op == 's' && rc == KVMETA_E_IO)) {
        life->broken = 1;                /* so last_error tells why */
    } else if (rc == KVMETA_E_IO || rc == KVMETA_E_NOSPACE) {
        life->maybe_broken = 1;
    }
    return check_last_error(life) || life_check_now(life);
}

/* Steps until there is nothing to do; a store that never ends is a bug. */
static int step_until_idle(struct life *life, int *rc)
{
    int did = 1, i;

    for (i = 0; did != 0; i++) {
        *rc = kvmeta_step(life->db, &did);
        if (*rc != 0) {
            return 0;
        }
        if (i == 1000) {
            return life_problem(life, "the background work never ends");
        }
    }
    return 0;
}

static int op_maintenance(struct life *life, char op)
{
    struct kvmeta_error error;
    int rc = 0, did = 0;

    switch (op) {
    case 's':
        rc = kvmeta_sync(life->db);
        break;
    case 'r':
        rc = kvmeta_flush(life->db);
        break;
    case 'c':
        rc = kvmeta_compact(life->db);
        break;
    case 't':
        rc = kvmeta_step(life->db, &did);
        break;
    case 'T':
        if (step_until_idle(life, &rc)) {
            return 1;
        }
        break;
    default:
        rc = kvmeta_verify(life->db, &error);
        break;
    }
    return maintenance_done(life, op, rc);
}

/* What the store says is on disk must survive a cut: durable_seq counts as an
 * acknowledgement. */
static int adopt_durable_seq(struct life *life)
{
    struct kvmeta_stats stats;
    unsigned i;

    stats.struct_size = sizeof stats;
    if (kvmeta_stats(life->db, &stats) != 0) {
        return life_problem(life, "kvmeta_stats fails");
    }
    if (stats.seq != life->states[life->visible].seq) {
        return life_problem(life, "seq is %llu, should be %llu",
                            (unsigned long long)stats.seq,
                            (unsigned long long)
                                life->states[life->visible].seq);
    }
    for (i = life->visible; i > life->durable; i--) {
        if (life->states[i].seq <= stats.durable_seq) {
            life->durable = i;
            break;
        }
    }
    if (life->written < life->durable) {
        life->written = life->durable;
    }
    if (stats.durable_seq < life->states[life->durable].seq) {
        return life_problem(life, "durable_seq %llu is behind what was "
                            "acknowledged, %llu",
                            (unsigned long long)stats.durable_seq,
                            (unsigned long long)
                                life->states[life->durable].seq);
    }
    return 0;
}

static int run_op(struct life *life, char op)
{
    int failed;

    if (op == 'O') {
        failed = life->db != NULL ? close_store(life) : 0;
        return failed ? 1 : life_open(life);
    }
    if (life->db == NULL) {
        return 0;
    }
    if (op == 'C') {
        return close_store(life);
    }
    if (op == 'k') {
        life->fs->clock_now_ns += 200000000u;
        return 0;
    }
    failed = strchr("pwuxbBg", op) != NULL ? op_change(life, op)
                                           : op_maintenance(life, op);
    return failed ? 1 : adopt_durable_seq(life);
}

int life_op(struct life *life, char op)
{
    struct kvmeta_error error;
    int failed = run_op(life, op);

    memset(&error, 0, sizeof error);
    if (life_trace && life->db != NULL) {
        kvmeta_last_error(life->db, &error);
    }
    trace(life, op, error.message);
    return failed;
}
