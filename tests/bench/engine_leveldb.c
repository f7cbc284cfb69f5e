/*
 * Adapter: LevelDB, by its C interface. Its defaults, with a cache that
 * holds everything and Bloom filters.
 *
 * SPDX-License-Identifier: MIT
 */
#include "bench.h"

#include <leveldb/c.h>
#include <stdlib.h>

#define CACHE_BYTES ((size_t)1 << 30)
#define MEMTABLE_BYTES ((size_t)64 << 20)

struct store {
    leveldb_t *db;
    leveldb_options_t *options;
    leveldb_cache_t *cache;
    leveldb_filterpolicy_t *filter;
    leveldb_writeoptions_t *write_options;
    struct engine_setup setup;
};

struct reader {
    struct store *store;
    leveldb_readoptions_t *options;
    const leveldb_snapshot_t *snapshot;  /* NULL: each get sees the latest */
};

static void must(const char *error, const char *what)
{
    if (error != NULL) bench_die("leveldb: %s: %s", what, error);
}

static void store_options(struct store *store)
{
    store->options = leveldb_options_create();
    store->cache = leveldb_cache_create_lru(CACHE_BYTES);
    store->filter = leveldb_filterpolicy_create_bloom(10);
    leveldb_options_set_create_if_missing(store->options, 1);
    leveldb_options_set_write_buffer_size(store->options, MEMTABLE_BYTES);
    leveldb_options_set_cache(store->options, store->cache);
    leveldb_options_set_filter_policy(store->options, store->filter);
}

static void *store_open(const struct engine_setup *setup)
{
    struct store *store = bench_alloc(sizeof *store);
    char *error = NULL;

    store->setup = *setup;
    store_options(store);
    store->write_options = leveldb_writeoptions_create();
    leveldb_writeoptions_set_sync(store->write_options, setup->durable);
    store->db = leveldb_open(store->options, setup->dir, &error);
    must(error, "open");
    return store;
}

static void store_close(void *at)
{
    struct store *store = at;

    leveldb_close(store->db);
    leveldb_writeoptions_destroy(store->write_options);
    leveldb_filterpolicy_destroy(store->filter);
    leveldb_options_destroy(store->options);
    leveldb_cache_destroy(store->cache);
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

    leveldb_put(store->db, store->write_options, key, store->setup.key_bytes,
                value, store->setup.value_bytes, &error);
    must(error, "put");
}

static void put_batch(void *at, const void *keys, const void *values,
                      size_t n)
{
    struct store *store = at;
    size_t key_bytes = store->setup.key_bytes;
    size_t value_bytes = store->setup.value_bytes;
    leveldb_writebatch_t *batch = leveldb_writebatch_create();
    char *error = NULL;
    size_t i;

    for (i = 0; i < n; i++) {
        leveldb_writebatch_put(batch, (const char *)keys + i * key_bytes,
                               key_bytes,
                               (const char *)values + i * value_bytes,
                               value_bytes);
    }
    leveldb_write(store->db, store->write_options, batch, &error);
    must(error, "write");
    leveldb_writebatch_destroy(batch);
}

static void *reader_open(void *at, bool held)
{
    struct reader *reader = bench_alloc(sizeof *reader);

    reader->store = at;
    reader->options = leveldb_readoptions_create();
    reader->snapshot = NULL;
    if (held) {
        reader->snapshot = leveldb_create_snapshot(reader->store->db);
        leveldb_readoptions_set_snapshot(reader->options, reader->snapshot);
    }
    return reader;
}

static void reader_close(void *at)
{
    struct reader *reader = at;

    if (reader->snapshot != NULL) {
        leveldb_release_snapshot(reader->store->db, reader->snapshot);
    }
    leveldb_readoptions_destroy(reader->options);
    free(reader);
}

static bool get(void *at, const void *key, void *value)
{
    struct reader *reader = at;
    char *error = NULL;
    size_t bytes;
    char *found;

    found = leveldb_get(reader->store->db, reader->options, key,
                        reader->store->setup.key_bytes, &bytes, &error);
    must(error, "get");
    if (found == NULL) return false;
    memcpy(value, found, reader->store->setup.value_bytes);
    leveldb_free(found);
    return true;
}

static void scan(void *at, struct scan_sum *sum)
{
    struct reader *reader = at;
    leveldb_iterator_t *iterator;
    char *error = NULL;
    size_t bytes;

    iterator = leveldb_create_iterator(reader->store->db, reader->options);
    leveldb_iter_seek_to_first(iterator);
    while (leveldb_iter_valid(iterator)) {
        scan_add(sum, leveldb_iter_key(iterator, &bytes),
                 leveldb_iter_value(iterator, &bytes));
        leveldb_iter_next(iterator);
    }
    leveldb_iter_get_error(iterator, &error);
    must(error, "scan");
    leveldb_iter_destroy(iterator);
}

static void compact(void *at)
{
    struct store *store = at;

    leveldb_compact_range(store->db, NULL, 0, NULL, 0);
}

const struct engine engine_leveldb = {
    "leveldb", "LevelDB", 0,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, NULL, scan, NULL, compact,
    NULL
};
