/*
 * LevelDB, with its defaults and synced writes. Strict: paranoid_checks for
 * the store and verify_checksums for each read.
 *
 * SPDX-License-Identifier: MIT
 */
#include <leveldb/c.h>

#define LSM(name) leveldb_##name
#include "store_lsm.h"

static void *leveldb_store_open(const char *dir, int strict)
{
    struct lsm *store = malloc(sizeof *store);
    leveldb_options_t *options = leveldb_options_create();
    char *error = NULL;

    if (store == NULL) abort();
    leveldb_options_set_create_if_missing(options, 1);
    leveldb_options_set_paranoid_checks(options, (unsigned char)strict);
    store->read = leveldb_readoptions_create();
    leveldb_readoptions_set_verify_checksums(store->read,
                                             (unsigned char)strict);
    store->write = leveldb_writeoptions_create();
    leveldb_writeoptions_set_sync(store->write, 1);
    store->db = leveldb_open(options, dir, &error);
    leveldb_options_destroy(options);
    return lsm_failed(error) ? NULL : store;
}

static int leveldb_store_settle(void *at)
{
    struct lsm *store = at;

    leveldb_compact_range(store->db, NULL, 0, NULL, 0);
    return 0;
}

static enum file_kind leveldb_store_kind(const char *name)
{
    if (strcmp(name, "LOG") == 0 || strcmp(name, "LOG.old") == 0) {
        return FILE_NONE;
    }
    if (name_ends(name, ".log")) return FILE_LOG;
    if (name_ends(name, ".ldb")) return FILE_DATA;
    return FILE_META;                    /* MANIFEST, CURRENT */
}

const struct store store_leveldb = {
    "leveldb", "LevelDB", 0, leveldb_store_open, lsm_put,
    leveldb_store_settle, lsm_get, lsm_scan, leveldb_store_kind
};

const struct store store_leveldb_strict = {
    "leveldb-strict", "LevelDB, paranoid_checks and verify_checksums", 1,
    leveldb_store_open, lsm_put, leveldb_store_settle, lsm_get, lsm_scan,
    leveldb_store_kind
};
