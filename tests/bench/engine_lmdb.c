/*
 * Adapter: LMDB. Durable: every write is a transaction with its defaults.
 * Buffered: MDB_WRITEMAP | MDB_NOSYNC, its fastest mode, and BENCH_TXN puts to
 * a transaction, as its users group writes whose loss they can bear.
 *
 * SPDX-License-Identifier: MIT
 */
#include "bench.h"

#include <lmdb.h>
#include <stdlib.h>

struct store {
    MDB_env *env;
    MDB_dbi dbi;
    struct engine_setup setup;
};

struct writer {
    struct store *store;
    MDB_txn *txn;               /* NULL: none is open */
    unsigned puts;              /* of this transaction */
};

struct reader {
    struct store *store;
    MDB_txn *txn;
    bool held;
};

static void must(int rc, const char *what)
{
    if (rc != 0) bench_die("lmdb: %s: %s", what, mdb_strerror(rc));
}

static void *store_open(const struct engine_setup *setup)
{
    struct store *store = bench_alloc(sizeof *store);
    unsigned flags = MDB_NOTLS | MDB_NORDAHEAD;
    MDB_txn *txn;

    store->setup = *setup;
    if (!setup->durable) flags |= MDB_WRITEMAP | MDB_NOSYNC;
    must(mdb_env_create(&store->env), "create");
    must(mdb_env_set_mapsize(store->env, ((size_t)setup->records * 4 + 4000000)
                             * (setup->key_bytes + setup->value_bytes + 16)),
         "mapsize");
    must(mdb_env_open(store->env, setup->dir, flags, 0600), "open");
    must(mdb_txn_begin(store->env, NULL, 0, &txn), "begin");
    must(mdb_dbi_open(txn, NULL, 0, &store->dbi), "dbi");
    must(mdb_txn_commit(txn), "commit");
    return store;
}

static void store_close(void *at)
{
    struct store *store = at;

    mdb_env_close(store->env);
    free(store);
}

static void *writer_open(void *at)
{
    struct writer *writer = bench_alloc(sizeof *writer);

    writer->store = at;
    writer->txn = NULL;
    writer->puts = 0;
    return writer;
}

static void writer_begin(struct writer *writer)
{
    if (writer->txn != NULL) return;
    must(mdb_txn_begin(writer->store->env, NULL, 0, &writer->txn), "begin");
}

static void writer_commit(struct writer *writer)
{
    if (writer->txn != NULL) must(mdb_txn_commit(writer->txn), "commit");
    writer->txn = NULL;
    writer->puts = 0;
}

static void writer_close(void *at)
{
    writer_commit(at);
    free(at);
}

static void writer_put(struct writer *writer, const void *key,
                       const void *value)
{
    MDB_val k, v;

    k.mv_size = writer->store->setup.key_bytes;
    k.mv_data = (void *)(uintptr_t)key;
    v.mv_size = writer->store->setup.value_bytes;
    v.mv_data = (void *)(uintptr_t)value;
    writer_begin(writer);
    must(mdb_put(writer->txn, writer->store->dbi, &k, &v, 0), "put");
    writer->puts++;
}

static void put(void *at, const void *key, const void *value)
{
    struct writer *writer = at;

    writer_put(writer, key, value);
    if (writer->store->setup.durable || writer->puts == BENCH_TXN) {
        writer_commit(writer);
    }
}

static void put_batch(void *at, const void *keys, const void *values,
                      size_t n)
{
    struct writer *writer = at;
    const struct engine_setup *setup = &writer->store->setup;
    size_t i;

    for (i = 0; i < n; i++) {
        writer_put(writer, (const char *)keys + i * setup->key_bytes,
                   (const char *)values + i * setup->value_bytes);
    }
    writer_commit(writer);
}

static void *reader_open(void *at, bool held)
{
    struct reader *reader = bench_alloc(sizeof *reader);

    reader->store = at;
    reader->held = held;
    must(mdb_txn_begin(reader->store->env, NULL, MDB_RDONLY, &reader->txn),
         "begin");
    if (!held) mdb_txn_reset(reader->txn);
    return reader;
}

static void reader_close(void *at)
{
    struct reader *reader = at;

    mdb_txn_abort(reader->txn);
    free(reader);
}

static bool get(void *at, const void *key, void *value)
{
    struct reader *reader = at;
    MDB_val k, v;
    int rc;

    k.mv_size = reader->store->setup.key_bytes;
    k.mv_data = (void *)(uintptr_t)key;
    if (!reader->held) must(mdb_txn_renew(reader->txn), "renew");
    rc = mdb_get(reader->txn, reader->store->dbi, &k, &v);
    if (rc == 0) memcpy(value, v.mv_data, v.mv_size);
    else if (rc != MDB_NOTFOUND) must(rc, "get");
    if (!reader->held) mdb_txn_reset(reader->txn);
    return rc == 0;
}

static void scan(void *at, struct scan_sum *sum)
{
    struct reader *reader = at;
    MDB_cursor *cursor;
    MDB_val k, v;
    int rc;

    must(mdb_cursor_open(reader->txn, reader->store->dbi, &cursor), "cursor");
    rc = mdb_cursor_get(cursor, &k, &v, MDB_FIRST);
    while (rc == 0) {
        scan_add(sum, k.mv_data, v.mv_data);
        rc = mdb_cursor_get(cursor, &k, &v, MDB_NEXT);
    }
    if (rc != MDB_NOTFOUND) must(rc, "next");
    mdb_cursor_close(cursor);
}

static void settle(void *at)
{
    struct store *store = at;

    must(mdb_env_sync(store->env, 1), "sync");
}

const struct engine engine_lmdb = {
    "lmdb", "LMDB", 0,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, NULL, scan, settle, NULL, NULL
};
