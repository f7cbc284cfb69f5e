/*
 * Adapter: kvmeta.
 *
 * SPDX-License-Identifier: MIT
 */
#include "bench.h"

#include "../../kvmeta.h"

#include <stdlib.h>

struct store {
    kvmeta *db;
    size_t key_bytes;
    size_t value_bytes;
};

struct reader {
    struct store *store;
    kvmeta_snapshot *snapshot;      /* NULL: plain gets */
};

static void must(int rc, const char *what)
{
    if (rc != KVMETA_OK) {
        bench_die("kvmeta: %s: %s", what, kvmeta_strerror(rc));
    }
}

static void *store_open(const struct engine_setup *setup)
{
    struct store *store = bench_alloc(sizeof *store);
    struct kvmeta_options options;
    struct kvmeta_error error;

    kvmeta_options_init(&options, (uint32_t)setup->key_bytes,
                        (uint32_t)setup->value_bytes);
    options.durability = setup->durable ? KVMETA_DURABLE : KVMETA_BUFFERED;
    store->key_bytes = setup->key_bytes;
    store->value_bytes = setup->value_bytes;
    if (kvmeta_open(setup->dir, &options, &store->db, &error) != KVMETA_OK) {
        bench_die("kvmeta: open: %s", error.message);
    }
    return store;
}

static void store_close(void *at)
{
    struct store *store = at;

    must(kvmeta_close(store->db), "close");
    free(store);
}

static void *writer_open(void *store)
{
    return store;
}

static void writer_close(void *writer)
{
    (void)writer;
}

static void put(void *writer, const void *key, const void *value)
{
    const struct store *store = writer;

    must(kvmeta_put(store->db, key, value, 0), "put");
}

static void put_batch(void *writer, const void *keys, const void *values,
                      size_t n)
{
    const struct store *store = writer;
    struct kvmeta_op ops[BENCH_BATCH];
    size_t i;

    for (i = 0; i < n; i++) {
        ops[i].type = KVMETA_OP_PUT;
        ops[i].key = (const char *)keys + i * store->key_bytes;
        ops[i].value = (const char *)values + i * store->value_bytes;
    }
    must(kvmeta_write(store->db, ops, n, 0, NULL), "write");
}

static void *reader_open(void *at, bool held)
{
    struct reader *reader = bench_alloc(sizeof *reader);

    reader->store = at;
    reader->snapshot = NULL;
    if (held) {
        must(kvmeta_snapshot_take(reader->store->db, &reader->snapshot),
             "snapshot");
    }
    return reader;
}

static void reader_close(void *at)
{
    struct reader *reader = at;

    kvmeta_snapshot_release(reader->snapshot);
    free(reader);
}

static bool get(void *at, const void *key, void *value)
{
    const struct reader *reader = at;

    if (reader->snapshot == NULL) {
        return kvmeta_get(reader->store->db, key, value) == KVMETA_OK;
    }
    return kvmeta_snapshot_get(reader->snapshot, key, value) == KVMETA_OK;
}

static void get_many(void *at, const void *keys, size_t n, void *values,
                     unsigned char *found)
{
    const struct reader *reader = at;

    if (reader->snapshot == NULL) {
        must(kvmeta_get_many(reader->store->db, keys, n, values, found),
             "get_many");
    } else {
        must(kvmeta_snapshot_get_many(reader->snapshot, keys, n, values,
                                      found), "get_many");
    }
}

static void scan(void *at, struct scan_sum *sum)
{
    const struct reader *reader = at;
    kvmeta_cursor *cursor;
    int rc;

    must(kvmeta_cursor_open(reader->snapshot, &cursor), "cursor");
    rc = kvmeta_cursor_first(cursor);
    while (rc == KVMETA_OK) {
        scan_add(sum, kvmeta_cursor_key(cursor), kvmeta_cursor_value(cursor));
        rc = kvmeta_cursor_next(cursor);
    }
    kvmeta_cursor_close(cursor);
}

static void settle(void *at)
{
    const struct store *store = at;

    must(kvmeta_flush(store->db), "flush");
    must(kvmeta_wait_idle(store->db), "wait_idle");
}

static void compact(void *at)
{
    const struct store *store = at;

    must(kvmeta_compact(store->db), "compact");
}

static uint64_t syncs(void *at)
{
    const struct store *store = at;
    struct kvmeta_stats stats;

    stats.struct_size = sizeof stats;
    must(kvmeta_stats(store->db, &stats), "stats");
    return stats.syncs;
}

const struct engine engine_kvmeta = {
    "kvmeta", "kvmeta", ENGINE_LOADS_AT_OPEN,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, get_many, scan, settle, compact, syncs
};
