/*
 * LevelDB, with its defaults and synced writes. Strict: paranoid_checks for
 * the store and verify_checksums for each read.
 *
 * SPDX-License-Identifier: MIT
 */
#include "compare.h"

#include <leveldb/c.h>
#include <stdlib.h>
#include <string.h>

struct leveldb_store {
    leveldb_t *db;
    leveldb_readoptions_t *read;
    leveldb_writeoptions_t *write;
};

static int leveldb_failed(char *error)
{
    if (error == NULL) return 0;
    leveldb_free(error);
    return STORE_ERROR;
}

static void *leveldb_store_open(const char *dir, int strict)
{
    struct leveldb_store *store = malloc(sizeof *store);
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
    return leveldb_failed(error) ? NULL : store;
}

static int leveldb_store_put(void *at, const void *key, const void *value)
{
    struct leveldb_store *store = at;
    char *error = NULL;

    if (value != NULL) {
        leveldb_put(store->db, store->write, key, KEY_BYTES, value,
                    VALUE_BYTES, &error);
    } else {
        leveldb_delete(store->db, store->write, key, KEY_BYTES, &error);
    }
    return leveldb_failed(error);
}

static int leveldb_store_settle(void *at)
{
    struct leveldb_store *store = at;

    leveldb_compact_range(store->db, NULL, 0, NULL, 0);
    return 0;
}

static int leveldb_store_get(void *at, const void *key, void *value,
                             size_t *bytes)
{
    struct leveldb_store *store = at;
    char *error = NULL;
    char *found = leveldb_get(store->db, store->read, key, KEY_BYTES, bytes,
                              &error);

    if (leveldb_failed(error)) return STORE_ERROR;
    if (found == NULL) return STORE_ABSENT;
    memcpy(value, found, *bytes < VALUE_BYTES ? *bytes : VALUE_BYTES);
    leveldb_free(found);
    return STORE_FOUND;
}

static int leveldb_store_scan(void *at, store_seen *seen, void *user)
{
    struct leveldb_store *store = at;
    leveldb_iterator_t *i = leveldb_create_iterator(store->db, store->read);
    size_t key_bytes, value_bytes;
    const char *key, *value;
    char *error = NULL;
    int end = 0;

    leveldb_iter_seek_to_first(i);
    while (!end && leveldb_iter_valid(i)) {
        key = leveldb_iter_key(i, &key_bytes);
        value = leveldb_iter_value(i, &value_bytes);
        end = seen(user, key, key_bytes, value, value_bytes);
        leveldb_iter_next(i);
    }
    leveldb_iter_get_error(i, &error);
    leveldb_iter_destroy(i);
    return leveldb_failed(error);
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
    "leveldb", "LevelDB", 0, leveldb_store_open, leveldb_store_put,
    leveldb_store_settle, leveldb_store_get, leveldb_store_scan,
    leveldb_store_kind
};

const struct store store_leveldb_strict = {
    "leveldb-strict", "LevelDB, paranoid_checks and verify_checksums", 1,
    leveldb_store_open, leveldb_store_put, leveldb_store_settle,
    leveldb_store_get, leveldb_store_scan, leveldb_store_kind
};
