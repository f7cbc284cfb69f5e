/*
 * What the adapters of LevelDB and RocksDB have in common: their C interfaces
 * have the same shape, and names that differ in the prefix. An adapter
 * includes this once, after it has defined LSM(name) as the name in its
 * store's interface, and LSM_NAME; store_options is its own.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BENCH_ENGINE_LSM_H
#define BENCH_ENGINE_LSM_H

#include "bench.h"

#include <stdlib.h>

#define CACHE_BYTES ((size_t)1 << 30)
#define MEMTABLE_BYTES ((size_t)64 << 20)

struct store {
    LSM(t) *db;
    LSM(options_t) *options;
    LSM(cache_t) *cache;
    LSM(filterpolicy_t) *filter;         /* NULL: the options own it */
    LSM(writeoptions_t) *write_options;
    struct engine_setup setup;
};

struct reader {
    struct store *store;
    LSM(readoptions_t) *options;
    const LSM(snapshot_t) *snapshot;     /* NULL: each get sees the latest */
};

static void must(const char *error, const char *what)
{
    if (error != NULL) bench_die(LSM_NAME ": %s: %s", what, error);
}

/* Fills in store->options and what hangs on them. */
static void store_options(struct store *store);

static void *store_open(const struct engine_setup *setup)
{
    struct store *store = bench_alloc(sizeof *store);
    char *error = NULL;

    store->setup = *setup;
    store->filter = NULL;
    store_options(store);
    store->write_options = LSM(writeoptions_create)();
    LSM(writeoptions_set_sync)(store->write_options, setup->durable);
    store->db = LSM(open)(store->options, setup->dir, &error);
    must(error, "open");
    return store;
}

static void store_close(void *at)
{
    struct store *store = at;

    LSM(close)(store->db);
    LSM(writeoptions_destroy)(store->write_options);
    if (store->filter != NULL) LSM(filterpolicy_destroy)(store->filter);
    LSM(options_destroy)(store->options);
    LSM(cache_destroy)(store->cache);
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

    LSM(put)(store->db, store->write_options, key, store->setup.key_bytes,
             value, store->setup.value_bytes, &error);
    must(error, "put");
}

static void put_batch(void *at, const void *keys, const void *values,
                      size_t n)
{
    struct store *store = at;
    size_t key_bytes = store->setup.key_bytes;
    size_t value_bytes = store->setup.value_bytes;
    LSM(writebatch_t) *batch = LSM(writebatch_create)();
    char *error = NULL;
    size_t i;

    for (i = 0; i < n; i++) {
        LSM(writebatch_put)(batch, (const char *)keys + i * key_bytes,
                            key_bytes,
                            (const char *)values + i * value_bytes,
                            value_bytes);
    }
    LSM(write)(store->db, store->write_options, batch, &error);
    must(error, "write");
    LSM(writebatch_destroy)(batch);
}

static void *reader_open(void *at, bool held)
{
    struct reader *reader = bench_alloc(sizeof *reader);

    reader->store = at;
    reader->options = LSM(readoptions_create)();
    reader->snapshot = NULL;
    if (held) {
        reader->snapshot = LSM(create_snapshot)(reader->store->db);
        LSM(readoptions_set_snapshot)(reader->options, reader->snapshot);
    }
    return reader;
}

static void reader_close(void *at)
{
    struct reader *reader = at;

    if (reader->snapshot != NULL) {
        LSM(release_snapshot)(reader->store->db, reader->snapshot);
    }
    LSM(readoptions_destroy)(reader->options);
    free(reader);
}

static void scan(void *at, struct scan_sum *sum)
{
    struct reader *reader = at;
    LSM(iterator_t) *iterator;
    char *error = NULL;
    size_t bytes;

    iterator = LSM(create_iterator)(reader->store->db, reader->options);
    LSM(iter_seek_to_first)(iterator);
    while (LSM(iter_valid)(iterator)) {
        scan_add(sum, LSM(iter_key)(iterator, &bytes),
                 LSM(iter_value)(iterator, &bytes));
        LSM(iter_next)(iterator);
    }
    LSM(iter_get_error)(iterator, &error);
    must(error, "scan");
    LSM(iter_destroy)(iterator);
}

static void compact(void *at)
{
    struct store *store = at;

    LSM(compact_range)(store->db, NULL, 0, NULL, 0);
}

#endif /* BENCH_ENGINE_LSM_H */
