/*
 * The model of a run: its widths and limits, the universe of its keys, what
 * each of them holds, and the snapshots held beside frozen copies of that.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_MODEL_H
#define KVMETA_TEST_MODEL_H

#ifndef _GNU_SOURCE
#  define _GNU_SOURCE
#endif

#include <stdarg.h>
#include <dirent.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../kvmeta.h"
#include "../support/support.h"

#define MODEL_HELD 4
#define MODEL_MANY 80
#define MODEL_BATCH 600
#define MODEL_UNIVERSE 8192
#define MODEL_NOWHERE SIZE_MAX
#define MODEL_SECONDS_MAX 300
#define MODEL_INLINE __attribute__((unused)) static inline

struct held {
    kvmeta_snapshot *snapshot;       /* NULL: this place is free */
    kvmeta_cursor *cursor;
    uint64_t *stamps;
    uint64_t count;
    uint64_t seq;
    struct kvmeta_digest digest;
    size_t at;                       /* where the cursor stands */
    const void *kept;                /* a value's address from earlier on */
    uint64_t kept_stamp;
};

struct model_op {
    int type;
    size_t key;
    uint64_t stamp;                  /* 0: removed, or expected absent */
};

struct model {
    struct test_alloc alloc;         /* first: also options.user */
    struct test_rng rng;
    uint64_t seed, op;
    int growing_test;
    char dir[300];
    int descriptors;
    struct kvmeta_options options;
    struct kvmeta_vfs vfs;
    kvmeta *db;
    kvmeta_batch *batch;

    uint32_t key_bytes, value_bytes;
    size_t universe;
    unsigned char *keys;             /* sorted, different */
    uint64_t *stamps;
    uint64_t count, next_stamp;
    struct held held[MODEL_HELD];

    int shape;                       /* of the keys */
    int pattern;                     /* of the picks; changes on the way */
    size_t around;                   /* where picks are now */
    int shrinking;

    unsigned char key[256], key2[256], value[256], got[256];
    unsigned char found[MODEL_MANY];
    unsigned char many_keys[MODEL_MANY * 256];
    unsigned char many_values[MODEL_MANY * 256];
    unsigned char batch_values[MODEL_BATCH * 256];
    struct model_op ops[MODEL_BATCH];
    struct kvmeta_op array[MODEL_BATCH];
};

/* --------------------------------------------------------------------------
 * Failure
 * -------------------------------------------------------------------------- */

static struct model *model_running;

MODEL_INLINE void model_say(const struct model *m)
{
    test_args.seed = m->seed;
    test_replay("--test %s --seeds 1 # %ux%u, %zu keys of shape %d, "
                "flags %u, durability %u, align %u, operation %llu",
                m->growing_test ? "growth_and_shrinking_in_any_order"
                                : "random_operations_agree_with_the_model",
                m->key_bytes, m->value_bytes, m->universe, m->shape,
                m->options.flags, m->options.durability,
                m->options.log_align, (unsigned long long)m->op);
}

MODEL_INLINE int model_remove_entry(const char *path, const struct stat *st,
                                    int type, struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}

MODEL_INLINE void model_fail(const struct model *m, const char *file, int line,
                             const char *what, const char *more)
{
    printf("%s:%d: %s%s%s\n", file, line, what, more[0] ? ": " : "", more);
    model_say(m);
    nftw(m->dir, model_remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    exit(1);
}

/* A failure ends the program: the state of a run cannot be trusted after. */
#define CHECK(m, condition)                                                   \
    ((condition) ? (void)0                                                    \
                 : model_fail(m, __FILE__, __LINE__, #condition, ""))
#define CHECK_ERR(m, call, err)                                               \
    ((call) == KVMETA_OK                                                      \
         ? (void)0                                                            \
         : model_fail(m, __FILE__, __LINE__, #call, (err)->message))

MODEL_INLINE void model_hang(int signal_number)
{
    (void)signal_number;
    printf("this run hangs\n");
    model_say(model_running);
    _exit(3);
}

/* --------------------------------------------------------------------------
 * Keys and values
 * -------------------------------------------------------------------------- */

MODEL_INLINE unsigned char *model_key(const struct model *m, size_t i)
{
    return m->keys + i * m->key_bytes;
}

/* Index of the first key of the universe that is >= key. */
MODEL_INLINE size_t model_find(const struct model *m, const void *key)
{
    size_t low = 0, high = m->universe, middle;

    while (low < high) {
        middle = low + (high - low) / 2;
        if (memcmp(model_key(m, middle), key, m->key_bytes) < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

MODEL_INLINE void model_value(const struct model *m, uint64_t stamp,
                              unsigned char *value)
{
    struct test_rng rng = {stamp};

    test_rng_bytes(&rng, value, m->value_bytes);
}

MODEL_INLINE int model_value_is(const struct model *m, const void *value,
                                uint64_t stamp)
{
    unsigned char want[256];

    model_value(m, stamp, want);
    return m->value_bytes == 0 || memcmp(value, want, m->value_bytes) == 0;
}

MODEL_INLINE size_t model_next(const struct model *m, const uint64_t *stamps,
                               size_t i)
{
    while (i < m->universe && stamps[i] == 0) {
        i++;
    }
    return i;
}

/* The last key before i that holds a record, or MODEL_NOWHERE. */
MODEL_INLINE size_t model_prev(const uint64_t *stamps, size_t i)
{
    while (i > 0 && stamps[i - 1] == 0) {
        i--;
    }
    return i > 0 ? i - 1 : MODEL_NOWHERE;
}

/* A key of one of five shapes: scattered, dense, of one head (the first 8
 * bytes are equal), of one long prefix, of few symbols. */
MODEL_INLINE void model_make_key(struct model *m, uint64_t i,
                                 unsigned char *key)
{
    uint32_t k, width = m->key_bytes;
    uint32_t prefix = m->shape == 2 ? 8 : m->shape == 3 ? width - 2 : 0;

    test_rng_bytes(&m->rng, key, width);
    for (k = 0; k < width; k++) {
        if (m->shape == 1) {
            key[k] = width - k <= 8 ? (unsigned char)(i >> 8 * (width - 1 - k))
                                    : 0x7f;
        } else if (m->shape == 4) {
            key[k] = (unsigned char)(key[k] % 3 * 127);
        } else if (k < prefix && width > prefix) {
            key[k] = (unsigned char)(0xf0 + k);
        }
    }
}

/* A key for seeks: of the universe, beside one of it, or of its shape. */
MODEL_INLINE void model_stranger(struct model *m, unsigned char *key)
{
    uint64_t dice = test_rng_below(&m->rng, 10);

    memcpy(key, model_key(m, test_rng_below(&m->rng, m->universe)),
           m->key_bytes);
    if (dice < 3) {
        key[m->key_bytes - 1] ^= (unsigned char)test_rng_u64(&m->rng);
    } else if (dice < 5) {
        key[test_rng_below(&m->rng, m->key_bytes)] += dice == 3 ? 1 : 0xff;
    } else if (dice == 5) {
        model_make_key(m, test_rng_below(&m->rng, 2 * m->universe), key);
    } else if (dice == 6) {
        memset(key, test_rng_below(&m->rng, 2) ? 0 : 0xff, m->key_bytes);
    }
}

/* --------------------------------------------------------------------------
 * Picks, and how they drift
 * -------------------------------------------------------------------------- */

MODEL_INLINE void model_drift(struct model *m)
{
    if (test_rng_below(&m->rng, 700) == 0) {
        m->pattern = (int)test_rng_below(&m->rng, 4);
        m->around = test_rng_below(&m->rng, m->universe);
        m->shrinking = test_rng_below(&m->rng, 3) == 0;
    }
}

/* An index: anywhere, near one place, or going up or down from it. */
MODEL_INLINE size_t model_pick(struct model *m)
{
    size_t far = m->universe / 16 + 1;

    switch (m->pattern) {
    case 0:
        return test_rng_below(&m->rng, m->universe);
    case 1:
        return (m->around + test_rng_below(&m->rng, far)) % m->universe;
    case 2:
        m->around = (m->around + 1) % m->universe;
        return m->around;
    default:
        m->around = (m->around + m->universe - 1) % m->universe;
        return m->around;
    }
}

MODEL_INLINE unsigned model_durability(struct model *m)
{
    static const unsigned all[8] = {
        0, KVMETA_DURABLE, KVMETA_WRITTEN, KVMETA_BUFFERED, KVMETA_BUFFERED,
        KVMETA_BUFFERED, KVMETA_BUFFERED, KVMETA_BUFFERED
    };

    return all[test_rng_below(&m->rng, 8)];
}

MODEL_INLINE void model_set(struct model *m, size_t i, uint64_t stamp)
{
    m->count += (stamp != 0);
    m->count -= (m->stamps[i] != 0);
    m->stamps[i] = stamp;
}

/* One of the snapshots held, or NULL. */
MODEL_INLINE struct held *model_held(struct model *m)
{
    struct held *held = &m->held[test_rng_below(&m->rng, MODEL_HELD)];

    return held->snapshot != NULL ? held : NULL;
}

/* What costs a pass over all keys is done less often with many of them. */
MODEL_INLINE int model_can_afford(struct model *m)
{
    size_t bytes = m->universe * (m->key_bytes + m->value_bytes + 16);

    return test_rng_below(&m->rng, 1 + bytes / 20000) == 0;
}

MODEL_INLINE struct kvmeta_stats model_stats(const struct model *m)
{
    struct kvmeta_stats stats;

    stats.struct_size = sizeof stats;
    CHECK(m, kvmeta_stats(m->db, &stats) == KVMETA_OK);
    return stats;
}

MODEL_INLINE int model_same(struct kvmeta_digest a, struct kvmeta_digest b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

/* Whether the cursor stands on the i-th key with the value of its stamp. */
MODEL_INLINE int model_at(const struct model *m, const kvmeta_cursor *cursor,
                          const uint64_t *stamps, size_t i)
{
    const void *key = kvmeta_cursor_key(cursor);
    const void *value = kvmeta_cursor_value(cursor);

    return key != NULL && value != NULL &&
           memcmp(key, model_key(m, i), m->key_bytes) == 0 &&
           model_value_is(m, value, stamps[i]);
}

/* --------------------------------------------------------------------------
 * Begin and end
 * -------------------------------------------------------------------------- */

MODEL_INLINE int model_no_sync(void *user, int file)
{
    (void)user, (void)file;
    return 0;
}

MODEL_INLINE int model_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    while (dir != NULL && readdir(dir) != NULL) {
        count++;
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return count;
}

MODEL_INLINE void *model_alloc(size_t bytes)
{
    void *p = calloc(1, bytes);

    if (p == NULL) {
        abort();
    }
    return p;
}

/* Limits so tiny that everything happens within a run; drawn anew at each
 * restart, as they are not fixed at creation. */
MODEL_INLINE void model_limits(struct model *m)
{
    static const uint32_t aligns[8] = {8, 8, 64, 64, 128, 512, 512, 4096};
    static const double amps[3] = {1.05, 1.4, 2};
    struct kvmeta_options *o = &m->options;

    kvmeta_options_init(o, m->key_bytes, m->value_bytes);
    o->flags = test_rng_below(&m->rng, 2) ? KVMETA_NO_THREAD : 0;
    o->durability = (uint32_t)test_rng_below(&m->rng, 4);
    o->sync_interval_ms = (uint32_t)test_rng_below(&m->rng, 3);
    o->log_buffer_bytes = 4096u << test_rng_below(&m->rng, 4);
    o->log_align = aligns[test_rng_below(&m->rng, 8)];
    o->merge_window = 2 + (uint32_t)test_rng_below(&m->rng, 3);
    o->merge_ratio = 1 + (uint32_t)test_rng_below(&m->rng, 4);
    o->zstd_level = (int32_t)test_rng_below(&m->rng, 5) - 3;
    o->open_threads = 1 + (uint32_t)test_rng_below(&m->rng, 3);
    o->log_bytes_max = 65536u << test_rng_below(&m->rng, 2);
    o->space_amp_max = amps[test_rng_below(&m->rng, 3)];
    if (test_rng_below(&m->rng, 2)) {
        o->realloc_fn = test_realloc;
    }
    o->user = &m->alloc;
    o->vfs = &m->vfs;
}

MODEL_INLINE void model_open(struct model *m)
{
    struct kvmeta_error err;

    CHECK_ERR(m, kvmeta_open(m->dir, &m->options, &m->db, &err), &err);
}

static uint32_t model_compare_bytes;

MODEL_INLINE int model_compare(const void *a, const void *b)
{
    return memcmp(a, b, model_compare_bytes);
}

/* Draws the keys, sorts them, and drops those drawn twice. */
MODEL_INLINE void model_make_universe(struct model *m)
{
    size_t want = (size_t)16 << test_rng_below(&m->rng, 10), i, n = 0;
    size_t fit = 400000 / (m->key_bytes + m->value_bytes);

    want = want < fit ? want : fit;
    m->shape = (int)test_rng_below(&m->rng, 5);
    m->keys = model_alloc(want * m->key_bytes);
    for (i = 0; i < want; i++) {
        model_make_key(m, i, model_key(m, i));
    }
    model_compare_bytes = m->key_bytes;
    qsort(m->keys, want, m->key_bytes, model_compare);
    for (i = 0; i < want; i++) {
        if (n == 0 || memcmp(model_key(m, n - 1), model_key(m, i),
                             m->key_bytes) != 0) {
            memmove(model_key(m, n++), model_key(m, i), m->key_bytes);
        }
    }
    m->universe = n;
}

MODEL_INLINE void model_make_dir(struct model *m)
{
    const char *tmp = getenv("TMPDIR");

    if (tmp == NULL || strlen(tmp) > 200) {
        tmp = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    }
    snprintf(m->dir, sizeof m->dir, "%s/kvmeta-model-XXXXXX", tmp);
    CHECK(m, mkdtemp(m->dir) != NULL);
}

MODEL_INLINE struct model *model_new(uint64_t seed)
{
    static const uint32_t key_widths[7] = {1, 7, 8, 9, 16, 20, 255};
    static const uint32_t value_widths[6] = {0, 1, 8, 16, 40, 255};
    struct model *m = model_alloc(sizeof *m);
    int i;

    m->seed = seed;
    m->rng.state = seed * 0x9e3779b97f4a7c15u;
    m->key_bytes = key_widths[seed % 7];
    m->value_bytes = value_widths[seed / 7 % 6];
    m->vfs = *kvmeta_vfs_posix();
    m->vfs.file_sync = model_no_sync;
    m->vfs.dir_sync = model_no_sync;
    model_running = m;
    signal(SIGALRM, model_hang);
    alarm(MODEL_SECONDS_MAX);
    model_make_universe(m);
    m->stamps = model_alloc(m->universe * sizeof *m->stamps);
    for (i = 0; i < MODEL_HELD; i++) {
        m->held[i].stamps = model_alloc(m->universe * sizeof *m->stamps);
    }
    model_make_dir(m);
    m->descriptors = model_descriptors();
    model_limits(m);
    model_open(m);
    return m;
}

/* Goal: the digest is of the records alone. Method: the same records in a
 * new store, in another order. */
MODEL_INLINE void model_check_digest(struct model *m)
{
    struct kvmeta_options options = m->options;
    char dir[sizeof m->dir + 8];
    kvmeta *other;
    size_t i, k;

    snprintf(dir, sizeof dir, "%s/other", m->dir);
    options.flags = KVMETA_NO_THREAD;
    CHECK(m, kvmeta_open(dir, &options, &other, NULL) == KVMETA_OK);
    for (i = 0; i < m->universe; i++) {
        k = m->universe - 1 - i;
        if (m->stamps[k]) {
            model_value(m, m->stamps[k], m->value);
            CHECK(m, kvmeta_put(other, model_key(m, k), m->value,
                                KVMETA_BUFFERED) == KVMETA_OK);
        }
    }
    CHECK(m, model_same(kvmeta_digest(other), kvmeta_digest(m->db)));
    CHECK(m, kvmeta_close(other) == KVMETA_OK);
}

/* Closes; then no memory may be live and no file open. */
MODEL_INLINE void model_free(struct model *m)
{
    int i;

    CHECK(m, kvmeta_close(m->db) == KVMETA_OK);
    CHECK(m, atomic_load(&m->alloc.live_blocks) == 0);
    CHECK(m, model_descriptors() == m->descriptors);
    alarm(0);
    nftw(m->dir, model_remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    for (i = 0; i < MODEL_HELD; i++) {
        free(m->held[i].stamps);
    }
    free(m->stamps);
    free(m->keys);
    free(m);
}

#endif /* KVMETA_TEST_MODEL_H */
