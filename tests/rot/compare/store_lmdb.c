/*
 * LMDB, with its defaults: each commit is synced. It has no log.
 *
 * SPDX-License-Identifier: MIT
 */
#include "compare.h"

#include <lmdb.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct lmdb_store {
    MDB_env *env;
    MDB_dbi dbi;
};

static void *lmdb_store_open(const char *dir, int strict)
{
    struct lmdb_store *store = malloc(sizeof *store);
    MDB_txn *txn;

    (void)strict;
    if (store == NULL) abort();
    if (mdb_env_create(&store->env) != 0 ||
        mdb_env_open(store->env, dir, 0, 0600) != 0 ||
        mdb_txn_begin(store->env, NULL, 0, &txn) != 0 ||
        mdb_dbi_open(txn, NULL, 0, &store->dbi) != 0 ||
        mdb_txn_commit(txn) != 0) {
        return NULL;
    }
    return store;
}

static MDB_val lmdb_val(const void *data, size_t bytes)
{
    MDB_val val = {bytes, (void *)(uintptr_t)data};

    return val;
}

static int lmdb_store_put(void *at, const void *key, const void *value)
{
    struct lmdb_store *store = at;
    MDB_val k = lmdb_val(key, KEY_BYTES), v = lmdb_val(value, VALUE_BYTES);
    MDB_txn *txn;
    int rc;

    if (mdb_txn_begin(store->env, NULL, 0, &txn) != 0) return STORE_ERROR;
    rc = value != NULL ? mdb_put(txn, store->dbi, &k, &v, 0)
                       : mdb_del(txn, store->dbi, &k, NULL);
    if (rc != 0 && rc != MDB_NOTFOUND) {
        mdb_txn_abort(txn);
        return STORE_ERROR;
    }
    return mdb_txn_commit(txn) == 0 ? 0 : STORE_ERROR;
}

static int lmdb_store_get(void *at, const void *key, void *value,
                          size_t *bytes)
{
    struct lmdb_store *store = at;
    MDB_val k = lmdb_val(key, KEY_BYTES), v;
    MDB_txn *txn;
    int rc;

    if (mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn) != 0) {
        return STORE_ERROR;
    }
    rc = mdb_get(txn, store->dbi, &k, &v);
    if (rc == 0) {
        *bytes = v.mv_size;
        memcpy(value, v.mv_data, *bytes < VALUE_BYTES ? *bytes : VALUE_BYTES);
    }
    mdb_txn_abort(txn);
    if (rc == 0) return STORE_FOUND;
    return rc == MDB_NOTFOUND ? STORE_ABSENT : STORE_ERROR;
}

static int lmdb_store_scan(void *at, store_seen *seen, void *user)
{
    struct lmdb_store *store = at;
    MDB_cursor *cursor = NULL;
    MDB_txn *txn;
    MDB_val k, v;
    int rc, end = 0;

    if (mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn) != 0) {
        return STORE_ERROR;
    }
    rc = mdb_cursor_open(txn, store->dbi, &cursor);
    while (rc == 0 && !end) {
        rc = mdb_cursor_get(cursor, &k, &v, MDB_NEXT);
        if (rc == 0) end = seen(user, k.mv_data, k.mv_size, v.mv_data,
                                v.mv_size);
    }
    mdb_cursor_close(cursor);
    mdb_txn_abort(txn);
    return end || rc == MDB_NOTFOUND ? 0 : STORE_ERROR;
}

static enum file_kind lmdb_store_kind(const char *name)
{
    return strcmp(name, "data.mdb") == 0 ? FILE_DATA : FILE_META;
}

const struct store store_lmdb = {
    "lmdb", "LMDB", 0, lmdb_store_open, lmdb_store_put, NULL, lmdb_store_get,
    lmdb_store_scan, lmdb_store_kind
};
