/*
 * SQLite: a table WITHOUT ROWID, WAL mode, synchronous=FULL. Strict: PRAGMA
 * integrity_check after the open.
 *
 * SPDX-License-Identifier: MIT
 */
#include "compare.h"

#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SQL_SETTINGS "PRAGMA journal_mode=WAL;PRAGMA synchronous=FULL;"
#define SQL_CREATE                                                            \
    "CREATE TABLE IF NOT EXISTS records(k BLOB PRIMARY KEY,v BLOB)"           \
    "WITHOUT ROWID"

static int sqlite_run(sqlite3 *db, const char *sql)
{
    return sqlite3_exec(db, sql, NULL, NULL, NULL) == SQLITE_OK
        ? 0 : STORE_ERROR;
}

static sqlite3_stmt *sqlite_prepare(sqlite3 *db, const char *sql,
                                    const void *key)
{
    sqlite3_stmt *statement = NULL;

    if (sqlite3_prepare_v2(db, sql, -1, &statement, NULL) != SQLITE_OK) {
        return NULL;
    }
    if (key != NULL) {
        sqlite3_bind_blob(statement, 1, key, KEY_BYTES, SQLITE_STATIC);
    }
    return statement;
}

/* The check says "ok", or what is wrong. */
static int sqlite_integrity(sqlite3 *db)
{
    sqlite3_stmt *check = sqlite_prepare(db, "PRAGMA integrity_check", NULL);
    const unsigned char *text = NULL;
    int ok;

    if (check != NULL && sqlite3_step(check) == SQLITE_ROW) {
        text = sqlite3_column_text(check, 0);
    }
    ok = text != NULL && strcmp((const char *)text, "ok") == 0;
    sqlite3_finalize(check);
    return ok ? 0 : STORE_ERROR;
}

static void *sqlite_store_open(const char *dir, int strict)
{
    char path[4096];
    sqlite3 *db = NULL;

    snprintf(path, sizeof path, "%s/store.db", dir);
    if (sqlite3_open(path, &db) != SQLITE_OK ||
        sqlite_run(db, SQL_SETTINGS SQL_CREATE) != 0 ||
        (strict && sqlite_integrity(db) != 0)) {
        sqlite3_close(db);
        return NULL;
    }
    return db;
}

static int sqlite_store_put(void *db, const void *key, const void *value)
{
    sqlite3_stmt *put = sqlite_prepare(
        db, value != NULL ? "INSERT OR REPLACE INTO records VALUES(?1,?2)"
                          : "DELETE FROM records WHERE k=?1", key);
    int rc;

    if (put == NULL) return STORE_ERROR;
    if (value != NULL) {
        sqlite3_bind_blob(put, 2, value, VALUE_BYTES, SQLITE_STATIC);
    }
    rc = sqlite3_step(put);
    sqlite3_finalize(put);
    return rc == SQLITE_DONE ? 0 : STORE_ERROR;
}

static int sqlite_store_settle(void *db)
{
    return sqlite_run(db, "PRAGMA wal_checkpoint(TRUNCATE)");
}

static int sqlite_store_get(void *db, const void *key, void *value,
                            size_t *bytes)
{
    sqlite3_stmt *get = sqlite_prepare(
        db, "SELECT v FROM records WHERE k=?1", key);
    int rc;

    if (get == NULL) return STORE_ERROR;
    rc = sqlite3_step(get);
    if (rc == SQLITE_ROW) {
        const void *found = sqlite3_column_blob(get, 0);

        *bytes = (size_t)sqlite3_column_bytes(get, 0);
        if (*bytes > 0) {
            memcpy(value, found, *bytes < VALUE_BYTES ? *bytes : VALUE_BYTES);
        }
    }
    sqlite3_finalize(get);
    if (rc == SQLITE_ROW) return STORE_FOUND;
    return rc == SQLITE_DONE ? STORE_ABSENT : STORE_ERROR;
}

static int sqlite_store_scan(void *db, store_seen *seen, void *user)
{
    sqlite3_stmt *scan = sqlite_prepare(
        db, "SELECT k,v FROM records ORDER BY k", NULL);
    int rc, end = 0;

    if (scan == NULL) return STORE_ERROR;
    while (!end && (rc = sqlite3_step(scan)) == SQLITE_ROW) {
        end = seen(user, sqlite3_column_blob(scan, 0),
                   (size_t)sqlite3_column_bytes(scan, 0),
                   sqlite3_column_blob(scan, 1),
                   (size_t)sqlite3_column_bytes(scan, 1));
    }
    sqlite3_finalize(scan);
    return end || rc == SQLITE_DONE ? 0 : STORE_ERROR;
}

static enum file_kind sqlite_store_kind(const char *name)
{
    if (name_ends(name, "-wal")) return FILE_LOG;
    if (name_ends(name, ".db")) return FILE_DATA;
    return FILE_META;                    /* -shm */
}

const struct store store_sqlite = {
    "sqlite", "SQLite", 0, sqlite_store_open, sqlite_store_put,
    sqlite_store_settle, sqlite_store_get, sqlite_store_scan,
    sqlite_store_kind
};

const struct store store_sqlite_strict = {
    "sqlite-strict", "SQLite, integrity_check", 1, sqlite_store_open,
    sqlite_store_put, sqlite_store_settle, sqlite_store_get,
    sqlite_store_scan, sqlite_store_kind
};
