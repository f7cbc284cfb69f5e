/*
 * kvmeta, with its defaults.
 *
 * SPDX-License-Identifier: MIT
 */
#include "../../../kvmeta.h"
#include "compare.h"

#include <string.h>

static void *kvmeta_store_open(const char *dir, int strict)
{
    struct kvmeta_options options;
    kvmeta *db = NULL;

    (void)strict;
    kvmeta_options_init(&options, KEY_BYTES, VALUE_BYTES);
    return kvmeta_open(dir, &options, &db, NULL) == KVMETA_OK ? db : NULL;
}

static int kvmeta_store_put(void *db, const void *key, const void *value)
{
    int rc = value != NULL ? kvmeta_put(db, key, value, KVMETA_DURABLE)
                           : kvmeta_remove(db, key, KVMETA_DURABLE);

    return rc < 0 ? STORE_ERROR : 0;
}

static int kvmeta_store_settle(void *db)
{
    return kvmeta_flush(db) == KVMETA_OK ? 0 : STORE_ERROR;
}

static int kvmeta_store_get(void *db, const void *key, void *value,
                            size_t *bytes)
{
    int rc = kvmeta_get(db, key, value);

    *bytes = VALUE_BYTES;
    if (rc == KVMETA_NOT_FOUND) return STORE_ABSENT;
    return rc == KVMETA_OK ? STORE_FOUND : STORE_ERROR;
}

struct scan {
    store_seen *seen;
    void *user;
};

static int kvmeta_store_see(void *user, const void *key, const void *value)
{
    const struct scan *scan = user;

    return scan->seen(scan->user, key, KEY_BYTES, value, VALUE_BYTES);
}

static int kvmeta_store_scan(void *db, store_seen *seen, void *user)
{
    struct scan scan = {seen, user};

    return kvmeta_scan(db, NULL, NULL, kvmeta_store_see, &scan) < 0
        ? STORE_ERROR : 0;
}

static enum file_kind kvmeta_store_kind(const char *name)
{
    if (name_ends(name, ".wal")) return FILE_LOG;
    if (name_ends(name, ".tab")) return FILE_DATA;
    return FILE_META;                    /* MANIFEST, LOCK */
}

const struct store store_kvmeta = {
    "kvmeta", "kvmeta", 0, kvmeta_store_open, kvmeta_store_put,
    kvmeta_store_settle, kvmeta_store_get, kvmeta_store_scan,
    kvmeta_store_kind
};
