/*
 * RocksDB, with its defaults and synced writes. Strict: wal_recovery_mode =
 * kAbsoluteConsistency; its other checks are on by default.
 *
 * SPDX-License-Identifier: MIT
 */
#include <rocksdb/c.h>

#define LSM(name) rocksdb_##name
#include "store_lsm.h"

#define ABSOLUTE_CONSISTENCY 1           /* WALRecoveryMode of options.h */

static void *rocksdb_store_open(const char *dir, int strict)
{
    struct lsm *store = malloc(sizeof *store);
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
    return lsm_failed(error) ? NULL : store;
}

static int rocksdb_store_settle(void *at)
{
    struct lsm *store = at;
    rocksdb_flushoptions_t *options = rocksdb_flushoptions_create();
    char *error = NULL;

    rocksdb_flush(store->db, options, &error);
    rocksdb_flushoptions_destroy(options);
    return lsm_failed(error);
}

static enum file_kind rocksdb_store_kind(const char *name)
{
    if (strncmp(name, "LOG", 3) == 0) return FILE_NONE;
    if (name_ends(name, ".log")) return FILE_LOG;
    if (name_ends(name, ".sst")) return FILE_DATA;
    return FILE_META;                    /* MANIFEST, CURRENT, OPTIONS, ... */
}

const struct store store_rocksdb = {
    "rocksdb", "RocksDB", 0, rocksdb_store_open, lsm_put,
    rocksdb_store_settle, lsm_get, lsm_scan, rocksdb_store_kind
};

const struct store store_rocksdb_strict = {
    "rocksdb-strict", "RocksDB, kAbsoluteConsistency", 1, rocksdb_store_open,
    lsm_put, rocksdb_store_settle, lsm_get, lsm_scan, rocksdb_store_kind
};
