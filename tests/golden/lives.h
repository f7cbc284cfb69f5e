/*
 * The golden stores as they are written: short lives on the simulated file
 * system, in which nothing depends on the machine.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_GOLDEN_LIVES_H
#define KVMETA_TEST_GOLDEN_LIVES_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../sim/sim.h"

#define BATCH_MAX 80

struct golden;

/* A store while it is written. */
struct making {
    const struct golden *golden;
    struct sim_fs fs;
    struct test_alloc alloc;
    struct test_rng rng;
    struct test_oracle now;
    kvmeta *db;
    uint64_t cut_bytes;                  /* of the live log, when it is left */
};

struct golden {
    const char *name;
    uint32_t key_bytes;
    uint32_t value_bytes;
    uint32_t log_align;
    void (*live)(struct making *making);
    int killed;
};

/* --------------------------------------------------------------------------
 * Bytes that are the same on every machine
 * -------------------------------------------------------------------------- */

static void fill(struct test_rng *rng, unsigned char *bytes, size_t n)
{
    size_t i;

    for (i = 0; i < n; i++) {
        bytes[i] = (unsigned char)(test_rng_u64(rng) >> 56);
    }
}

static struct test_rng golden_random;    /* of uuids and salts */

static int fixed_random(void *user, void *buf, size_t bytes)
{
    (void)user;
    fill(&golden_random, buf, bytes);
    return 0;
}

/* No zeros are written ahead of a log, as on a full disk: they would make
 * files of 1 MiB. */
static int64_t (*sim_write)(void *user, int file, const void *buf,
                            size_t bytes, uint64_t off);

static int64_t write_no_zeros(void *user, int file, const void *buf,
                              size_t bytes, uint64_t off)
{
    const unsigned char *p = buf;

    if (bytes >= 16384 && p[0] == 0 && memcmp(p, p + 1, bytes - 1) == 0) {
        return -ENOSPC;
    }
    return sim_write(user, file, buf, bytes, off);
}

/* --------------------------------------------------------------------------
 * Lives
 * -------------------------------------------------------------------------- */

static void set_options(struct kvmeta_options *options,
                        const struct golden *golden, struct test_alloc *alloc)
{
    kvmeta_options_init(options, golden->key_bytes, golden->value_bytes);
    options->flags = KVMETA_NO_THREAD;
    options->log_align = golden->log_align;
    options->merge_window = 64;
    options->space_amp_max = 100;
    options->open_threads = 1;
    options->realloc_fn = test_realloc;
    options->user = alloc;
}

static void open_store(struct making *making)
{
    struct kvmeta_options options;
    struct kvmeta_error err;

    set_options(&options, making->golden, &making->alloc);
    options.vfs = &making->fs.vfs;
    if (kvmeta_open(SIM_DIR, &options, &making->db, &err) != 0) {
        fail_msg("open: %s", err.message);
    }
}

static void close_store(struct making *making)
{
    assert_int_equal(kvmeta_close(making->db), 0);
    making->db = NULL;
}

/* One batch of n records with the numbers from `first` on; of the even ones,
 * every `removes`-th (0: none) is removed. */
static void commit(struct making *making, uint64_t first, unsigned n,
                   unsigned removes, unsigned durability)
{
    static unsigned char keys[BATCH_MAX][256];
    static unsigned char values[BATCH_MAX][4096];
    struct kvmeta_op ops[BATCH_MAX];
    struct test_rng rng;
    unsigned i;

    assert_true(n <= BATCH_MAX);
    for (i = 0; i < n; i++) {
        rng.state = (first + i) * 77 + making->golden->key_bytes;
        fill(&rng, keys[i], making->golden->key_bytes);
        fill(&making->rng, values[i], making->golden->value_bytes);
        if (making->golden->value_bytes > 8) {
            memset(values[i] + 8, (int)(first + i) & 0xff,
                   making->golden->value_bytes - 8);
        }
        ops[i].key = keys[i];
        ops[i].value = values[i];
        ops[i].type = KVMETA_OP_PUT;
        if (removes != 0 && i % (2 * removes) == 0) {
            ops[i].type = KVMETA_OP_REMOVE;
            test_oracle_remove(&making->now, keys[i]);
        } else {
            test_oracle_put(&making->now, keys[i], values[i]);
        }
    }
    assert_int_equal(kvmeta_write(making->db, ops, n, durability, NULL), 0);
}

/* Three tables, the newer ones with tombstones; closed. */
static void live_tables(struct making *making)
{
    unsigned i;

    open_store(making);
    for (i = 0; i < 3; i++) {
        commit(making, i * 40, 80, i == 0 ? 0 : 3, KVMETA_WRITTEN);
        commit(making, i * 20, 30, i, KVMETA_WRITTEN);
        assert_int_equal(kvmeta_flush(making->db), 0);
    }
    close_store(making);
}

/* A table and two sealed logs, closed. */
static void live_logs(struct making *making)
{
    open_store(making);
    commit(making, 0, 60, 0, KVMETA_WRITTEN);
    assert_int_equal(kvmeta_flush(making->db), 0);
    commit(making, 30, 20, 2, KVMETA_DURABLE);
    close_store(making);
    open_store(making);
    commit(making, 50, 20, 2, KVMETA_WRITTEN);
    commit(making, 10, 1, 0, KVMETA_DURABLE);
    close_store(making);
}

/* A table, a sealed log, and a live log with all kinds of frames. */
static void live_killed(struct making *making)
{
    live_logs(making);
    open_store(making);
    commit(making, 80, 3, 0, KVMETA_DURABLE);
    commit(making, 20, 3, 1, KVMETA_WRITTEN);
    commit(making, 70, 3, 1, KVMETA_WRITTEN);
    assert_int_equal(kvmeta_sync(making->db), 0);
    commit(making, 5, 1, 0, KVMETA_DURABLE);
    commit(making, 6, 2, 0, KVMETA_WRITTEN);
}

/* The last frame of the live log, not acknowledged, is there in part. */
static void live_torn(struct making *making)
{
    struct test_oracle before;

    open_store(making);
    commit(making, 0, 5, 0, KVMETA_DURABLE);
    commit(making, 3, 5, 1, KVMETA_WRITTEN);
    test_oracle_init(&before, making->now.key_bytes, making->now.value_bytes);
    test_oracle_copy(&before, &making->now);
    commit(making, 9, 9, 0, KVMETA_WRITTEN);
    test_oracle_free(&making->now);
    making->now = before;
    making->cut_bytes = 100;
}

/* A table of several blocks. */
static void live_blocks(struct making *making)
{
    open_store(making);
    commit(making, 0, 80, 0, KVMETA_WRITTEN);
    assert_int_equal(kvmeta_flush(making->db), 0);
    close_store(making);
}

static void live_empty(struct making *making)
{
    open_store(making);
    close_store(making);
}

static const struct golden goldens[] = {
    {"empty", 8, 8, 512, live_empty, 0},
    {"tables", 8, 16, 512, live_tables, 0},
    {"logs", 20, 8, 64, live_logs, 0},
    {"killed", 9, 40, 512, live_killed, 1},
    {"torn", 16, 7, 8, live_torn, 1},
    {"set", 255, 0, 1024, live_killed, 1},
    {"narrow", 1, 1, 512, live_logs, 0},
    {"blocks", 16, 4000, 512, live_blocks, 0},
};

#define GOLDENS (sizeof goldens / sizeof goldens[0])

struct find_log {
    char name[SIM_NAME_BYTES];
};

static void find_newest_log(void *user, const char *name, uint64_t bytes)
{
    struct find_log *find = user;

    (void)bytes;
    if (name[0] == 'w' && strcmp(name, find->name) > 0) {
        strcpy(find->name, name);
    }
}

/* Takes bytes off the end of the live log. */
static void cut_live_log(struct sim_fs *fs, uint64_t cut_bytes)
{
    struct find_log find = {""};
    unsigned char *data;
    uint64_t bytes = 0;

    sim_each_file(fs, find_newest_log, &find);
    data = sim_file_get(fs, find.name, &bytes);
    assert_non_null(data);
    assert_true(bytes > cut_bytes);
    sim_file_put(fs, find.name, data, bytes - cut_bytes);
    free(data);
}

/* *out: the store as it is left; *now: what it holds then. */
static void make_store(const struct golden *golden, struct sim_fs *out,
                       struct test_oracle *now)
{
    static struct making making;

    memset(&making, 0, sizeof making);
    making.golden = golden;
    making.rng.state = golden->key_bytes;
    golden_random.state = 20250101u + golden->key_bytes;
    test_oracle_init(&making.now, golden->key_bytes, golden->value_bytes);
    sim_init(&making.fs, 512, 1);
    sim_write = making.fs.vfs.file_write;
    making.fs.vfs.file_write = write_no_zeros;
    making.fs.vfs.random = fixed_random;
    golden->live(&making);
    sim_clone(out, &making.fs);
    if (making.cut_bytes != 0) {
        cut_live_log(out, making.cut_bytes);
    }
    if (making.db != NULL) {
        close_store(&making);
    }
    assert_int_equal(atomic_load(&making.alloc.live_blocks), 0);
    sim_free(&making.fs);
    *now = making.now;
}

#endif /* KVMETA_TEST_GOLDEN_LIVES_H */
