/*
 * Adapter: RocksDB, by its C interface. Its defaults for compaction, zstd,
 * a cache that holds everything, and Bloom filters.
 *
 * SPDX-License-Identifier: MIT
 */
#define _POSIX_C_SOURCE 200809L

#include "bench.h"

#include <rocksdb/c.h>
#include <stdlib.h>
#include <time.h>

#define CACHE_BYTES ((size_t)1 << 30)
#define MEMTABLE_BYTES ((size_t)64 << 20)

struct store {
    rocksdb_t *db;
    rocksdb_options_t *options;
    rocksdb_cache_t *cache;
    rocksdb_writeoptions_t *write_options;
    struct engine_setup setup;
};

struct reader {
    struct store *store;
    rocksdb_readoptions_t *options;
    const rocksdb_snapshot_t *snapshot;  /* NULL: each get sees the latest */
};

static void must(const char *error, const char *what)
{
    if (error != NULL) bench_die("rocksdb: %s: %s", what, error);
}

static void store_options(struct store *store)
{
    rocksdb_block_based_table_options_t *table;

    table = rocksdb_block_based_options_create();
    store->cache = rocksdb_cache_create_lru(CACHE_BYTES);
    rocksdb_block_based_options_set_block_cache(table, store->cache);
    rocksdb_block_based_options_set_filter_policy(
        table, rocksdb_filterpolicy_create_bloom_full(10));
    store->options = rocksdb_options_create();
    rocksdb_options_set_create_if_missing(store->options, 1);
    rocksdb_options_set_write_buffer_size(store->options, MEMTABLE_BYTES);
    rocksdb_options_increase_parallelism(store->options, 2);
    rocksdb_options_set_compression(store->options, rocksdb_zstd_compression);
    rocksdb_options_set_block_based_table_factory(store->options, table);
    rocksdb_block_based_options_destroy(table);
}

static void *store_open(const struct engine_setup *setup)
{
    struct store *store = bench_alloc(sizeof *store);
    char *error = NULL;

    store->setup = *setup;
    store_options(store);
    store->write_options = rocksdb_writeoptions_create();
    rocksdb_writeoptions_set_sync(store->write_options, setup->durable);
    store->db = rocksdb_open(store->options, setup->dir, &error);
    must(error, "open");
    return store;
}

static void store_close(void *at)
{
    struct store *store = at;

    rocksdb_close(store->db);
    rocksdb_writeoptions_destroy(store->write_options);
    rocksdb_options_destroy(store->options);
    rocksdb_cache_destroy(store->cache);
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

static void put(void *at, const void *key, const void *value)
{
    struct store *store = at;
    char *error = NULL;

    rocksdb_put(store->db, store->write_options, key, store->setup.key_bytes,
                value, store->setup.value_bytes, &error);
    must(error, "put");
}

static void put_batch(void *at, const void *keys, const void *values,
                      size_t n)
{
    struct store *store = at;
    size_t key_bytes = store->setup.key_bytes;
    size_t value_bytes = store->setup.value_bytes;
    rocksdb_writebatch_t *batch = rocksdb_writebatch_create();
    char *error = NULL;
    size_t i;

    for (i = 0; i < n; i++) {
        rocksdb_writebatch_put(batch, (const char *)keys + i * key_bytes,
                               key_bytes,
                               (const char *)values + i * value_bytes,
                               value_bytes);
    }
    rocksdb_write(store->db, store->write_options, batch, &error);
    must(error, "write");
    rocksdb_writebatch_destroy(batch);
}

static void *reader_open(void *at, bool held)
{
    struct reader *reader = bench_alloc(sizeof *reader);

    reader->store = at;
    reader->options = rocksdb_readoptions_create();
    reader->snapshot = NULL;
    if (held) {
        reader->snapshot = rocksdb_create_snapshot(reader->store->db);
        rocksdb_readoptions_set_snapshot(reader->options, reader->snapshot);
    }
    return reader;
}

static void reader_close(void *at)
{
    struct reader *reader = at;

    if (reader->snapshot != NULL) {
        rocksdb_release_snapshot(reader->store->db, reader->snapshot);
    }
    rocksdb_readoptions_destroy(reader->options);
    free(reader);
}

static bool get(void *at, const void *key, void *value)
{
    struct reader *reader = at;
    rocksdb_pinnableslice_t *found;
    char *error = NULL;
    size_t bytes;

    found = rocksdb_get_pinned(reader->store->db, reader->options, key,
                               reader->store->setup.key_bytes, &error);
    must(error, "get");
    if (found == NULL) return false;
    memcpy(value, rocksdb_pinnableslice_value(found, &bytes),
           reader->store->setup.value_bytes);
    rocksdb_pinnableslice_destroy(found);
    return true;
}

static void get_many(void *at, const void *keys, size_t n, void *values,
                     unsigned char *found)
{
    struct reader *reader = at;
    size_t key_bytes = reader->store->setup.key_bytes;
    size_t value_bytes = reader->store->setup.value_bytes;
    const char *key[BENCH_MANY] = {NULL};
    size_t bytes[BENCH_MANY] = {0};
    size_t value_size[BENCH_MANY];
    char *value[BENCH_MANY];
    char *error[BENCH_MANY];
    size_t i;

    for (i = 0; i < n; i++) {
        key[i] = (const char *)keys + i * key_bytes;
        bytes[i] = key_bytes;
    }
    rocksdb_multi_get(reader->store->db, reader->options, n, key, bytes,
                      value, value_size, error);
    for (i = 0; i < n; i++) {
        must(error[i], "get_many");
        found[i] = value[i] != NULL;
        if (value[i] == NULL) continue;
        memcpy((char *)values + i * value_bytes, value[i], value_bytes);
        rocksdb_free(value[i]);
    }
}

static void scan(void *at, struct scan_sum *sum)
{
    struct reader *reader = at;
    rocksdb_iterator_t *iterator;
    char *error = NULL;
    size_t bytes;

    iterator = rocksdb_create_iterator(reader->store->db, reader->options);
    rocksdb_iter_seek_to_first(iterator);
    while (rocksdb_iter_valid(iterator)) {
        scan_add(sum, rocksdb_iter_key(iterator, &bytes),
                 rocksdb_iter_value(iterator, &bytes));
        rocksdb_iter_next(iterator);
    }
    rocksdb_iter_get_error(iterator, &error);
    must(error, "scan");
    rocksdb_iter_destroy(iterator);
}

static uint64_t property(struct store *store, const char *name)
{
    uint64_t value = 0;

    if (rocksdb_property_int(store->db, name, &value) != 0) {
        bench_die("rocksdb: no property %s", name);
    }
    return value;
}

static void settle(void *at)
{
    static const struct timespec pause = {0, 20000000};
    rocksdb_flushoptions_t *options = rocksdb_flushoptions_create();
    struct store *store = at;
    char *error = NULL;

    rocksdb_flush(store->db, options, &error);
    must(error, "flush");
    rocksdb_flushoptions_destroy(options);
    while (property(store, "rocksdb.num-running-compactions") > 0
           || property(store, "rocksdb.compaction-pending") > 0
           || property(store, "rocksdb.num-running-flushes") > 0) {
        nanosleep(&pause, NULL);
    }
}

static void compact(void *at)
{
    struct store *store = at;

    rocksdb_compact_range(store->db, NULL, 0, NULL, 0);
}

const struct engine engine_rocksdb = {
    "rocksdb", "RocksDB", 0,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, get_many, scan, settle, compact,
    NULL
};
