/*
 * What compare.c asks of a store: to be filled by synced commits, to be read
 * back, and to say which of its files is what.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_ROT_COMPARE_H
#define KVMETA_ROT_COMPARE_H

#include <stddef.h>

#define KEY_BYTES 16
#define VALUE_BYTES 100

enum file_kind {
    FILE_LOG,                            /* log, journal */
    FILE_DATA,                           /* tables, pages */
    FILE_META,                           /* what names or guards the others */
    FILE_KINDS,
    FILE_NONE = FILE_KINDS               /* texts for people, temporary files */
};

/* 0 and more: an answer. */
enum {
    STORE_ABSENT = 0,
    STORE_FOUND = 1,
    STORE_ERROR = -1                     /* the store says that it failed */
};

/* Gets each record of a scan; returns non-zero to end it. */
typedef int store_seen(void *user, const void *key, size_t key_bytes,
                       const void *value, size_t value_bytes);

struct store {
    const char *name;                    /* for --store */
    const char *title;                   /* for the table */
    int strict;                          /* handed to open */

    /* NULL: the store reports an error. strict: with each check that it can
     * do at open and at reads and does not do by default. */
    void *(*open)(const char *dir, int strict);
    /* A commit of its own, on disk when it returns. value NULL: removes. */
    int (*put)(void *store, const void *key, const void *value);
    /* Moves what has been written from the log to the data files. NULL: there
     * is no such step. */
    int (*settle)(void *store);
    /* STORE_FOUND: at most VALUE_BYTES are copied, *bytes is what there is. */
    int (*get)(void *store, const void *key, void *value, size_t *bytes);
    int (*scan)(void *store, store_seen *seen, void *user);
    enum file_kind (*kind)(const char *name);
};

extern const struct store store_kvmeta;
extern const struct store store_sqlite, store_sqlite_strict;
extern const struct store store_leveldb, store_leveldb_strict;
extern const struct store store_rocksdb, store_rocksdb_strict;
extern const struct store store_lmdb;

/* Does the name end so? */
int name_ends(const char *name, const char *end);

#endif /* KVMETA_ROT_COMPARE_H */
