/*
 * RocksDB, with its defaults and synced writes. Strict: wal_recovery_mode =
 * kAbsoluteConsistency; its other checks are on by default.
 *
 * SPDX-License-Identifier: MIT
 */
#include "compare.h"

#include <rocksdb/c.h>
#include <stdlib.h>
#include <string.h>

#define ABSOLUTE_CONSISTENCY 1           /* WALRecoveryMode of options.h */

struct rocksdb_store {
    rocksdb_t *db;
    rocksdb_readoptions_t *read;
    rocksdb_writeoptions_t *write;
};

static int rocksdb_failed(char *error)
{
    if (error == NULL) return 0;
    rocksdb_free(error);
    return STORE_ERROR;
}

static void *rocksdb_store_open(const char *dir, int strict)
{
    struct rocksdb_store *store = malloc(sizeof *store);
    rocksdb_options_t *options = rocksdb_options_create();
    char *error = NULL;

    if (store == NULL) abort();
    rocksdb_options_set_create_if_missing(options, 1);
    if (strict) {
        rocksdb_options_set_wal_recovery_mode(options, ABSOLUTE_CONSISTENCY);
    }
    store->read = rocksdb_readoptions_create();
    store->write = rocksdb_writeoptions_create();
    rocksdb_writeoptions_set_sync(store->write, 1);
    store->db = rocksdb_open(options, dir, &error);
    rocksdb_options_destroy(options);
    return rocksdb_failed(error) ? NULL : store;
}

static int rocksdb_store_put(void *at, const void *key, const void *value)
{
    struct rocksdb_store *store = at;
    char *error = NULL;

    if (value != NULL) {
        rocksdb_put(store->db, store->write, key, KEY_BYTES, value,
                    VALUE_BYTES, &error);
    } else {
        rocksdb_delete(store->db, store->write, key, KEY_BYTES, &error);
    }
    return rocksdb_failed(error);
}

static int rocksdb_store_settle(void *at)
{
    struct rocksdb_store *store = at;
    rocksdb_flushoptions_t *options = rocksdb_flushoptions_create();
    char *error = NULL;

    rocksdb_flush(store->db, options, &error);
    rocksdb_flushoptions_destroy(options);
    return rocksdb_failed(error);
}

static int rocksdb_store_get(void *at, const void *key, void *value,
                             size_t *bytes)
{
    struct rocksdb_store *store = at;
    char *error = NULL;
    char *found = rocksdb_get(store->db, store->read, key, KEY_BYTES, bytes,
                              &error);

    if (rocksdb_failed(error)) return STORE_ERROR;
    if (found == NULL) return STORE_ABSENT;
    memcpy(value, found, *bytes < VALUE_BYTES ? *bytes : VALUE_BYTES);
    rocksdb_free(found);
    return STORE_FOUND;
}

static int rocksdb_store_scan(void *at, store_seen *seen, void *user)
{
    struct rocksdb_store *store = at;
    rocksdb_iterator_t *i = rocksdb_create_iterator(store->db, store->read);
    size_t key_bytes, value_bytes;
    const char *key, *value;
    char *error = NULL;
    int end = 0;

    rocksdb_iter_seek_to_first(i);
    while (!end && rocksdb_iter_valid(i)) {
        key = rocksdb_iter_key(i, &key_bytes);
        value = rocksdb_iter_value(i, &value_bytes);
        end = seen(user, key, key_bytes, value, value_bytes);
        rocksdb_iter_next(i);
    }
    rocksdb_iter_get_error(i, &error);
    rocksdb_iter_destroy(i);
    return rocksdb_failed(error);
}

static enum file_kind rocksdb_store_kind(const char *name)
{
    if (strncmp(name, "LOG", 3) == 0) return FILE_NONE;
    if (name_ends(name, ".log")) return FILE_LOG;
    if (name_ends(name, ".sst")) return FILE_DATA;
    return FILE_META;                    /* MANIFEST, CURRENT, OPTIONS, ... */
}

const struct store store_rocksdb = {
    "rocksdb", "RocksDB", 0, rocksdb_store_open, rocksdb_store_put,
    rocksdb_store_settle, rocksdb_store_get, rocksdb_store_scan,
    rocksdb_store_kind
};

const struct store store_rocksdb_strict = {
    "rocksdb-strict", "RocksDB, kAbsoluteConsistency", 1, rocksdb_store_open,
    rocksdb_store_put, rocksdb_store_settle, rocksdb_store_get,
    rocksdb_store_scan, rocksdb_store_kind
};
