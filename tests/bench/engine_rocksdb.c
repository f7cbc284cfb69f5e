/*
 * Adapter: RocksDB, by its C interface. Its defaults for compaction, zstd,
 * a cache that holds everything, and Bloom filters.
 *
 * SPDX-License-Identifier: MIT
 */
#define _POSIX_C_SOURCE 200809L

#include <rocksdb/c.h>
#include <time.h>

#define LSM(name) rocksdb_##name
#define LSM_NAME "rocksdb"
#include "engine_lsm.h"

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

const struct engine engine_rocksdb = {
    "rocksdb", "RocksDB", 0,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, get_many, scan, settle, compact,
    NULL
};
