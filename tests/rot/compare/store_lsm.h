/*
 * What LevelDB and RocksDB have in common: their C interfaces have the same
 * shape, and names that differ in the prefix. Included once, after LSM(name)
 * is defined as the name in the store's interface.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_ROT_STORE_LSM_H
#define KVMETA_ROT_STORE_LSM_H

#include "compare.h"

#include <stdlib.h>
#include <string.h>

struct lsm {
    LSM(t) *db;
    LSM(readoptions_t) *read;
    LSM(writeoptions_t) *write;
};

static int lsm_failed(char *error)
{
    if (error == NULL) return 0;
    LSM(free)(error);
    return STORE_ERROR;
}

static int lsm_put(void *at, const void *key, const void *value)
{
    struct lsm *store = at;
    char *error = NULL;

    if (value != NULL) {
        LSM(put)(store->db, store->write, key, KEY_BYTES, value,
                 VALUE_BYTES, &error);
    } else {
        LSM(delete)(store->db, store->write, key, KEY_BYTES, &error);
    }
    return lsm_failed(error);
}

static int lsm_get(void *at, const void *key, void *value, size_t *bytes)
{
    struct lsm *store = at;
    char *error = NULL;
    char *found = LSM(get)(store->db, store->read, key, KEY_BYTES, bytes,
                           &error);

    if (lsm_failed(error)) return STORE_ERROR;
    if (found == NULL) return STORE_ABSENT;
    memcpy(value, found, *bytes < VALUE_BYTES ? *bytes : VALUE_BYTES);
    LSM(free)(found);
    return STORE_FOUND;
}

static int lsm_scan(void *at, store_seen *seen, void *user)
{
    struct lsm *store = at;
    LSM(iterator_t) *i = LSM(create_iterator)(store->db, store->read);
    size_t key_bytes, value_bytes;
    const char *key, *value;
    char *error = NULL;
    int end = 0;

    LSM(iter_seek_to_first)(i);
    while (!end && LSM(iter_valid)(i)) {
        key = LSM(iter_key)(i, &key_bytes);
        value = LSM(iter_value)(i, &value_bytes);
        end = seen(user, key, key_bytes, value, value_bytes);
        LSM(iter_next)(i);
    }
    LSM(iter_get_error)(i, &error);
    LSM(iter_destroy)(i);
    return lsm_failed(error);
}

#endif /* KVMETA_ROT_STORE_LSM_H */
