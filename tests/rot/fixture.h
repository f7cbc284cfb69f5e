/*
 * Stores to be damaged: tiny ones, made by a short life on the simulated
 * file system, each with all that its files have ever been, with a twin from
 * which foreign bytes can come, and with the states that it has gone through.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_ROT_FIXTURE_H
#define KVMETA_TEST_ROT_FIXTURE_H

#include "files.h"

#define ROT_STATES_MAX 64
#define ROT_LOG_HEADER_BYTES 128u

struct rot_fixture;
struct rot_life;

/* A kind of fixture: what happens to the store before it is damaged. */
struct rot_kind {
    const char *name;
    void (*live)(struct rot_life *life);
    unsigned weight;                     /* seeds of it at scale 1 */
    int has_live_log;                    /* when it is left */
    int sampled;                         /* too large for every fault */
    uint32_t key_bytes;                  /* 0: varies with the seed */
    uint32_t value_bytes;
    uint32_t log_align;
};

struct rot_fixture {
    const struct rot_kind *kind;
    uint64_t seed;
    uint32_t key_bytes;
    uint32_t value_bytes;
    uint32_t log_align;
    struct sim_fs fs;                    /* as the life has left it */
    struct rot_files files;              /* what is in it */
    struct rot_files past;               /* all that was, oldest first */
    struct rot_files twin;               /* another store, the same life */

    /* The states after each commit, and where its frame ends in the live log
     * (0: it is in an older file). `acked` is the newest that was
     * acknowledged, `base` the one that an open without damage finds. */
    struct test_oracle states[ROT_STATES_MAX];
    uint64_t ends[ROT_STATES_MAX];
    unsigned issued;
    unsigned acked;
    unsigned base;
    int residual;                        /* the marks are not on disk */
    char live[SIM_NAME_BYTES];           /* name of the live log, or "" */
};

/* The store while it lives. */
struct rot_life {
    struct rot_fixture *f;
    struct sim_fs fs;
    struct test_alloc alloc;
    struct test_rng rng;
    kvmeta *db;
    struct test_oracle now;
    uint64_t live_first;                 /* 0: the next commit begins a log */
    uint64_t logged;                     /* bytes_logged at that point */
    uint64_t next_number;
    int recording;
    int left;                            /* f->fs has been taken */
};

/* --------------------------------------------------------------------------
 * Living
 * -------------------------------------------------------------------------- */

static void rot_options(struct kvmeta_options *options,
                        const struct rot_fixture *f, struct sim_fs *fs,
                        struct test_alloc *alloc)
{
    kvmeta_options_init(options, f->key_bytes, f->value_bytes);
    options->flags = KVMETA_NO_THREAD;
    options->log_buffer_bytes = 4096;
    options->log_align = f->log_align;
    options->log_bytes_max = 65536;
    options->merge_window = 64;
    options->space_amp_max = 100;
    options->zstd_level = 1;
    options->open_threads = 1;
    options->realloc_fn = test_realloc;
    options->log_fn = test_log;
    options->user = alloc;
    options->vfs = &fs->vfs;
}

static void rot_open(struct rot_life *life)
{
    struct kvmeta_options options;
    struct kvmeta_error err;

    rot_options(&options, life->f, &life->fs, &life->alloc);
    rot_must(kvmeta_open(SIM_DIR, &options, &life->db, &err) == 0,
             err.message);
    life->live_first = 0;
}

static void rot_close(struct rot_life *life)
{
    rot_must(kvmeta_close(life->db) == 0, "kvmeta_close");
    life->db = NULL;
    life->live_first = 0;
    life->f->acked = life->f->issued;
}

/* What is not in the live log any more has no place in it. */
static void rot_forget_ends(struct rot_life *life)
{
    memset(life->f->ends, 0, sizeof life->f->ends);
    life->live_first = 0;
}

static void rot_flush(struct rot_life *life)
{
    rot_must(kvmeta_flush(life->db) == 0, "kvmeta_flush");
    rot_forget_ends(life);
    life->f->acked = life->f->issued;
}

static uint64_t rot_bytes_logged(struct rot_life *life)
{
    struct kvmeta_stats stats;

    stats.struct_size = sizeof stats;
    rot_must(kvmeta_stats(life->db, &stats) == 0, "kvmeta_stats");
    return stats.bytes_logged;
}

static void rot_key(const struct rot_life *life, uint64_t number, void *key)
{
    struct test_rng rng = {life->f->seed * 0x10001u + number};

    test_rng_bytes(&rng, key, life->f->key_bytes);
}

/* Half of the values compress well, the others not at all. */
static void rot_value(struct rot_life *life, void *value)
{
    size_t bytes = life->f->value_bytes;

    if (life->next_number++ % 2 != 0 || bytes > 1024) {
        memset(value, (int)(life->next_number % 251), bytes);
    } else {
        test_rng_bytes(&life->rng, value, bytes);
    }
}

/* A new state; before it begins, the store had `before` bytes of log. */
static void rot_push_state(struct rot_life *life, uint64_t before)
{
    struct rot_fixture *f = life->f;

    if (life->live_first == 0) {
        rot_forget_ends(life);
        life->live_first = f->log_align > ROT_LOG_HEADER_BYTES
            ? f->log_align : ROT_LOG_HEADER_BYTES;
        life->logged = before;
    }
    rot_must(++f->issued < ROT_STATES_MAX, "too many states");
    f->ends[f->issued] = life->live_first + rot_bytes_logged(life) -
                         life->logged;
    test_oracle_init(&f->states[f->issued], f->key_bytes, f->value_bytes);
    test_oracle_copy(&f->states[f->issued], &life->now);
}

#define ROT_BATCH_MAX 128
#define ROT_KEYS 40

/* Commits n changes of random keys, of which about one in `removes` (0: none)
 * removes a record; the first one never, so that there is always a frame. */
static void rot_commit(struct rot_life *life, unsigned n, unsigned removes,
                       unsigned durability)
{
    static unsigned char keys[ROT_BATCH_MAX][256];
    static unsigned char values[ROT_BATCH_MAX][4096];
    struct kvmeta_op ops[ROT_BATCH_MAX];
    uint64_t before = rot_bytes_logged(life);
    uint64_t number;
    unsigned i;

    assert(n <= ROT_BATCH_MAX);
    for (i = 0; i < n; i++) {
        number = n > 64 ? i : test_rng_below(&life->rng, ROT_KEYS);
        rot_key(life, number, keys[i]);
        rot_value(life, values[i]);
        ops[i].key = keys[i];
        ops[i].value = values[i];
        ops[i].type = KVMETA_OP_PUT;
        if (i > 0 && removes != 0 && test_rng_below(&life->rng, removes) == 0) {
            ops[i].type = KVMETA_OP_REMOVE;
            test_oracle_remove(&life->now, keys[i]);
        } else {
            test_oracle_put(&life->now, keys[i], values[i]);
        }
    }
    rot_must(kvmeta_write(life->db, ops, n, durability, NULL) == 0,
             "kvmeta_write");
    rot_push_state(life, before);
    if (durability == KVMETA_DURABLE) {
        life->f->acked = life->f->issued;
    }
}

/* A few commits of a few changes each. */
static void rot_commits(struct rot_life *life, unsigned n, unsigned removes,
                        unsigned durability)
{
    while (n-- > 0) {
        rot_commit(life, 1 + (unsigned)test_rng_below(&life->rng, 3), removes,
                   durability);
    }
}

static void rot_record(void *user, struct sim_fs *fs, enum sim_call kind)
{
    struct rot_life *life = user;

    (void)kind;
    if (life->recording) {
        rot_take_files(fs, &life->f->past, 1);
    }
}

/* The background work gets its time to put the marks on disk. */
static void rot_idle(struct rot_life *life)
{
    int did = 1;

    life->fs.clock_now_ns += 200000000u;
    while (did) {
        rot_must(kvmeta_step(life->db, &did) == 0, "kvmeta_step");
    }
}

/* The store is left as a kill leaves it. */
static void rot_leave_killed(struct rot_life *life)
{
    sim_clone(&life->f->fs, &life->fs);
    life->left = 1;
}

/* The process is killed and another one goes on. */
static void rot_kill(struct rot_life *life)
{
    static struct sim_fs left;

    sim_clone(&left, &life->fs);
    life->recording = 0;
    rot_must(kvmeta_close(life->db) == 0, "kvmeta_close");
    sim_free(&life->fs);
    sim_clone(&life->fs, &left);
    sim_free(&left);
    rot_limit_disk(&life->fs, rot_ahead_bytes);
    life->fs.on_op = rot_record;
    life->fs.on_op_user = life;
    life->recording = 1;
}

/* As a power cut leaves it; which: 0 keeps nothing that was not synced, the
 * higher ones keep one thing and another. */
static void rot_leave_cut(struct rot_life *life, unsigned which)
{
    struct sim_cut cut;

    sim_cut_begin(&cut, &life->fs, which + 2, 0, life->f->seed);
    rot_must(sim_cut_next(&cut, &life->f->fs), "no state after a cut");
    while (which-- > 0) {
        sim_free(&life->f->fs);
        if (!sim_cut_next(&cut, &life->f->fs)) {
            sim_clone(&life->f->fs, &life->fs);
            break;
        }
    }
    sim_cut_end(&cut);
    life->left = 1;
}

/* --------------------------------------------------------------------------
 * The lives
 * -------------------------------------------------------------------------- */

/* Created, and nothing else. */
static void rot_live_empty(struct rot_life *life)
{
    rot_open(life);
    rot_close(life);
}

static void rot_live_one_table(struct rot_life *life)
{
    rot_open(life);
    rot_commits(life, 6, 0, KVMETA_WRITTEN);
    rot_flush(life);
    rot_close(life);
}

/* Tables with tombstones, two sealed logs, and an open store. */
static void rot_live_many(struct rot_life *life)
{
    unsigned i;

    rot_open(life);
    for (i = 0; i < 3; i++) {
        rot_commits(life, 3, i == 0 ? 0 : 3, KVMETA_WRITTEN);
        rot_flush(life);
    }
    for (i = 0; i < 2; i++) {
        rot_commits(life, 2, 4, KVMETA_DURABLE);
        rot_close(life);
        rot_open(life);
    }
}

static void rot_live_closed(struct rot_life *life)
{
    rot_live_many(life);
    rot_commits(life, 3, 4, KVMETA_DURABLE);
    rot_close(life);
}

static void rot_live_many_killed(struct rot_life *life)
{
    rot_live_many(life);
    rot_commits(life, 4, 4, KVMETA_DURABLE);
    rot_leave_killed(life);
}

/* All there is stands in one live log. */
static void rot_live_killed(struct rot_life *life)
{
    rot_open(life);
    rot_commits(life, 3, 0, KVMETA_DURABLE);
    rot_commits(life, 2, 3, KVMETA_WRITTEN);
    rot_must(kvmeta_sync(life->db) == 0, "kvmeta_sync");
    life->f->acked = life->f->issued;
    rot_commits(life, 2, 3, KVMETA_DURABLE);
    rot_leave_killed(life);
}

/* Behind what was acknowledged stand whole frames that were not, and one
 * that a power cut has torn in half of the cases. */
static void rot_live_torn(struct rot_life *life)
{
    struct rot_fixture *f = life->f;

    rot_open(life);
    if (f->seed % 2 == 0) {
        rot_commits(life, 3, 0, KVMETA_WRITTEN);
        rot_flush(life);
    }
    rot_commits(life, 3, 4, KVMETA_DURABLE);
    if (f->seed % 3 != 0) {
        rot_idle(life);
    }
    rot_commits(life, 2, 4, KVMETA_WRITTEN);
    rot_commit(life, 4, 4, KVMETA_WRITTEN);
    if (f->seed % 3 == 0) {
        rot_leave_killed(life);
    } else {
        rot_leave_cut(life, 1 + (unsigned)(f->seed % 5));
    }
}

static void rot_live_cut_marked(struct rot_life *life)
{
    rot_open(life);
    rot_commits(life, 3, 0, KVMETA_WRITTEN);
    rot_flush(life);
    rot_commits(life, 4, 4, KVMETA_DURABLE);
    rot_idle(life);
    rot_leave_cut(life, 0);
}

/* The power has failed before the marks of the last commits were on disk:
 * the window that is left open. */
static void rot_live_cut_unmarked(struct rot_life *life)
{
    rot_open(life);
    rot_commits(life, 3, 0, KVMETA_WRITTEN);
    rot_flush(life);
    rot_commits(life, 5, 4, KVMETA_DURABLE);
    life->f->residual = 1;
    rot_leave_cut(life, 0);
}

/* Killed, recovered, compacted, and killed again. */
static void rot_live_second(struct rot_life *life)
{
    rot_live_many(life);
    rot_commits(life, 2, 4, KVMETA_DURABLE);
    rot_kill(life);
    rot_open(life);
    rot_commits(life, 2, 2, KVMETA_DURABLE);
    rot_flush(life);
    rot_must(kvmeta_compact(life->db) == 0, "kvmeta_compact");
    rot_commits(life, 3, 2, KVMETA_DURABLE);
    rot_leave_killed(life);
}

/* A commit for which the disk has no room; a part of its frame is written. */
static void rot_fail_commit(struct rot_life *life)
{
    unsigned char key[256] = {1}, value[4096] = {1};

    rot_room = 1 + (size_t)test_rng_below(
        &life->rng, 64 + life->f->key_bytes + life->f->value_bytes);
    rot_must(kvmeta_put(life->db, key, value, KVMETA_WRITTEN) ==
             KVMETA_E_NOSPACE, "a put on a full disk");
}

/* The disk was full now and then, the last time just before the close. */
static void rot_live_full_closed(struct rot_life *life)
{
    rot_open(life);
    rot_commits(life, 3, 0, KVMETA_DURABLE);
    rot_fail_commit(life);
    rot_commits(life, 2, 3, KVMETA_DURABLE);
    rot_fail_commit(life);
    rot_close(life);
}

/* The last commit, which failed, is a state of its own: a sector from before
 * its frame was wiped may bring it back, and cannot be told from the frame of
 * a commit that was not acknowledged. */
static void rot_live_full_killed(struct rot_life *life)
{
    unsigned char key[256] = {1}, value[4096] = {1};

    rot_open(life);
    rot_commits(life, 2, 0, KVMETA_DURABLE);
    rot_fail_commit(life);
    rot_commits(life, 2, 3, KVMETA_DURABLE);
    rot_fail_commit(life);
    test_oracle_put(&life->now, key, value);
    rot_push_state(life, 0);
    rot_leave_killed(life);
}

/* A table of several blocks. */
static void rot_live_blocks(struct rot_life *life)
{
    rot_open(life);
    rot_commit(life, 100, 0, KVMETA_WRITTEN);
    rot_flush(life);
    rot_close(life);
}

/* A live log with all the zeros that are written ahead. */
static void rot_live_ahead(struct rot_life *life)
{
    life->fs.vfs.file_write = rot_sim_write;
    rot_open(life);
    rot_commits(life, 3, 0, KVMETA_DURABLE);
    rot_leave_killed(life);
}

/* The weights make up the totals that test_rot.c asks for. */
static const struct rot_kind rot_kinds[] = {
    {"empty", rot_live_empty, 2, 0, 0, 0, 0, 0},
    {"one table", rot_live_one_table, 6, 0, 0, 0, 0, 0},
    {"closed", rot_live_closed, 27, 0, 0, 0, 0, 0},
    {"many, killed", rot_live_many_killed, 27, 1, 0, 0, 0, 0},
    {"killed", rot_live_killed, 14, 1, 0, 0, 0, 0},
    {"killed or cut, torn", rot_live_torn, 22, 1, 0, 0, 0, 0},
    {"cut, marks kept", rot_live_cut_marked, 12, 1, 0, 0, 0, 0},
    {"cut, marks lost", rot_live_cut_unmarked, 12, 1, 0, 0, 0, 0},
    {"second life, killed", rot_live_second, 14, 1, 0, 0, 0, 0},
    {"full disk, closed", rot_live_full_closed, 6, 0, 0, 0, 0, 0},
    {"full disk, killed", rot_live_full_killed, 6, 1, 0, 0, 0, 0},
    {"blocks", rot_live_blocks, 1, 0, 1, 8, 4096, 512},
    {"zeros ahead, killed", rot_live_ahead, 1, 1, 1, 8, 16, 512},
};

#define ROT_KINDS (sizeof rot_kinds / sizeof rot_kinds[0])

/* --------------------------------------------------------------------------
 * Making
 * -------------------------------------------------------------------------- */

static void rot_choose_shape(struct rot_fixture *f)
{
    static const uint32_t keys[] = {8, 16, 1, 7, 9, 20, 8, 255};
    static const uint32_t values[] = {8, 16, 0, 1, 40, 8, 255};
    static const uint32_t aligns[] = {8, 64, 512};
    const struct rot_kind *kind = f->kind;

    f->key_bytes = keys[f->seed % 8];
    f->value_bytes = values[f->seed % 7];
    f->log_align = aligns[f->seed % 3];
    if (kind->key_bytes != 0) {
        f->key_bytes = kind->key_bytes;
        f->value_bytes = kind->value_bytes;
        f->log_align = kind->log_align;
    }
}

/* Lives the life; afterwards f->fs is the directory that it leaves. */
static void rot_live(struct rot_fixture *f, uint64_t fs_seed, int recording)
{
    static struct rot_life life;

    memset(&life, 0, sizeof life);
    life.f = f;
    life.rng.state = f->seed;
    life.recording = recording;
    sim_init(&life.fs, 512, fs_seed);
    rot_limit_disk(&life.fs, f->seed % 4 < 2 ? 0 : 512);
    life.fs.on_op = rot_record;
    life.fs.on_op_user = &life;
    test_oracle_init(&life.now, f->key_bytes, f->value_bytes);
    test_oracle_init(&f->states[0], f->key_bytes, f->value_bytes);
    f->kind->live(&life);
    if (!life.left) {
        rot_leave_killed(&life);
    }
    life.recording = 0;
    if (life.db != NULL) {
        rot_must(kvmeta_close(life.db) == 0, "kvmeta_close");
    }
    rot_must(atomic_load(&life.alloc.live_blocks) == 0, "memory is lost");
    sim_free(&life.fs);
    test_oracle_free(&life.now);
}

/* The live log is the newest; a store that was closed has none. */
static void rot_find_live(struct rot_fixture *f)
{
    unsigned i;

    for (i = 0; i < f->files.count && f->kind->has_live_log; i++) {
        if (f->files.list[i].name[0] == 'w' &&
            strcmp(f->files.list[i].name, f->live) > 0) {
            strcpy(f->live, f->files.list[i].name);
        }
    }
    if (f->live[0] == '\0') {
        memset(f->ends, 0, sizeof f->ends);
    }
}

static void rot_fixture_free(struct rot_fixture *f)
{
    unsigned i;

    for (i = 0; i <= f->issued; i++) {
        test_oracle_free(&f->states[i]);
    }
    rot_files_free(&f->files);
    rot_files_free(&f->past);
    rot_files_free(&f->twin);
    sim_free(&f->fs);
}

/* Files of a store with the same life but another uuid and other salts. */
static void rot_make_twin(struct rot_fixture *f)
{
    static struct rot_fixture twin;

    memset(&twin, 0, sizeof twin);
    twin.kind = f->kind;
    twin.seed = f->seed;
    rot_choose_shape(&twin);
    rot_live(&twin, f->seed * 2 + 1, 0);
    rot_take_files(&twin.fs, &f->twin, 0);
    rot_fixture_free(&twin);
}

/* What an open without damage finds, which must be a state that may be. */
static unsigned rot_find_base(struct rot_fixture *f)
{
    static struct sim_fs fs;
    struct test_alloc alloc;
    struct kvmeta_options options;
    struct kvmeta_error err;
    kvmeta *db = NULL;
    unsigned i;

    memset(&alloc, 0, sizeof alloc);
    sim_clone(&fs, &f->fs);
    rot_options(&options, f, &fs, &alloc);
    rot_must(kvmeta_open(SIM_DIR, &options, &db, &err) == 0, err.message);
    for (i = f->issued + 1; i > f->acked; i--) {
        if (test_oracle_check(&f->states[i - 1], db) == NULL) {
            break;
        }
    }
    rot_must(i > f->acked, "acknowledged commits are lost");
    rot_must(kvmeta_close(db) == 0, "kvmeta_close");
    sim_free(&fs);
    return i - 1;
}

static void rot_fixture_make(struct rot_fixture *f,
                             const struct rot_kind *kind, uint64_t seed)
{
    memset(f, 0, sizeof *f);
    f->kind = kind;
    f->seed = seed;
    rot_choose_shape(f);
    rot_live(f, seed * 2, 1);
    rot_take_files(&f->fs, &f->files, 0);
    rot_find_live(f);
    rot_make_twin(f);
    f->base = rot_find_base(f);
}

#endif /* KVMETA_TEST_ROT_FIXTURE_H */
