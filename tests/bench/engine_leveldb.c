/*
 * Adapter: LevelDB, by its C interface. Its defaults, with a cache that
 * holds everything and Bloom filters.
 *
 * SPDX-License-Identifier: MIT
 */
#include <leveldb/c.h>

#define LSM(name) leveldb_##name
#define LSM_NAME "leveldb"
#include "engine_lsm.h"

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

const struct engine engine_leveldb = {
    "leveldb", "LevelDB", 0,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, NULL, scan, NULL, compact,
    NULL
};
