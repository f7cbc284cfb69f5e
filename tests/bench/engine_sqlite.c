/*
 * Adapter: SQLite, a table WITHOUT ROWID in WAL mode, one connection for each
 * thread, a cache that holds everything. Durable: synchronous=FULL, a write is
 * a transaction. Buffered: synchronous=OFF, BENCH_TXN puts to a transaction.
 *
 * SPDX-License-Identifier: MIT
 */
#include "bench.h"

#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>

#define SQL_PUT "INSERT OR REPLACE INTO records VALUES(?1,?2)"

struct store {
    struct engine_setup setup;
};

/* A writer or a reader. */
struct link {
    const struct engine_setup *setup;
    sqlite3 *db;
    sqlite3_stmt *statement;    /* SQL_PUT, or the SELECT of a get */
    unsigned puts;              /* of this transaction */
    bool held;
};

static void must(const struct link *link, int rc, const char *what)
{
    if (rc == SQLITE_OK || rc == SQLITE_DONE || rc == SQLITE_ROW) return;
    bench_die("sqlite: %s: %s", what, sqlite3_errmsg(link->db));
}

static void run(struct link *link, const char *sql)
{
    must(link, sqlite3_exec(link->db, sql, NULL, NULL, NULL), sql);
}

static void link_open(struct link *link, const struct engine_setup *setup,
                      const char *sql)
{
    char path[4096];

    link->setup = setup;
    link->statement = NULL;
    link->puts = 0;
    link->held = false;
    (void)snprintf(path, sizeof path, "%s/sqlite", setup->dir);
    must(link, sqlite3_open(path, &link->db), "open");
    sqlite3_busy_timeout(link->db, 60000);
    run(link, "PRAGMA journal_mode=WAL;PRAGMA cache_size=-2000000");
    run(link, setup->durable ? "PRAGMA synchronous=FULL"
                             : "PRAGMA synchronous=OFF");
    if (sql == NULL) return;
    must(link, sqlite3_prepare_v2(link->db, sql, -1, &link->statement, NULL),
         sql);
}

static void link_close(struct link *link)
{
    sqlite3_finalize(link->statement);
    must(link, sqlite3_close(link->db), "close");
}

static void *store_open(const struct engine_setup *setup)
{
    struct store *store = bench_alloc(sizeof *store);
    struct link link;

    store->setup = *setup;
    link_open(&link, setup, NULL);
    run(&link, "CREATE TABLE IF NOT EXISTS records"
               "(k BLOB PRIMARY KEY,v BLOB) WITHOUT ROWID");
    link_close(&link);
    return store;
}

static void store_close(void *store)
{
    free(store);
}

static void *writer_open(void *at)
{
    struct link *link = bench_alloc(sizeof *link);
    struct store *store = at;

    link_open(link, &store->setup, SQL_PUT);
    return link;
}

static void writer_commit(struct link *link)
{
    if (link->puts > 0) run(link, "COMMIT");
    link->puts = 0;
}

static void writer_close(void *at)
{
    writer_commit(at);
    link_close(at);
    free(at);
}

static void writer_put(struct link *link, const void *key, const void *value)
{
    sqlite3_stmt *statement = link->statement;

    if (link->puts++ == 0) run(link, "BEGIN IMMEDIATE");
    sqlite3_bind_blob(statement, 1, key, (int)link->setup->key_bytes,
                      SQLITE_STATIC);
    sqlite3_bind_blob(statement, 2, value, (int)link->setup->value_bytes,
                      SQLITE_STATIC);
    must(link, sqlite3_step(statement), "put");
    must(link, sqlite3_reset(statement), "put");
}

static void put(void *at, const void *key, const void *value)
{
    struct link *link = at;

    writer_put(link, key, value);
    if (link->setup->durable || link->puts == BENCH_TXN) writer_commit(link);
}

static void put_batch(void *at, const void *keys, const void *values,
                      size_t n)
{
    struct link *link = at;
    size_t i;

    for (i = 0; i < n; i++) {
        writer_put(link, (const char *)keys + i * link->setup->key_bytes,
                   (const char *)values + i * link->setup->value_bytes);
    }
    writer_commit(link);
}

static void *reader_open(void *at, bool held)
{
    struct link *link = bench_alloc(sizeof *link);
    struct store *store = at;

    link_open(link, &store->setup, "SELECT v FROM records WHERE k=?1");
    link->held = held;
    if (held) run(link, "BEGIN");
    return link;
}

static void reader_close(void *at)
{
    struct link *link = at;

    if (link->held) run(link, "COMMIT");
    link_close(link);
    free(link);
}

static bool get(void *at, const void *key, void *value)
{
    struct link *link = at;
    int rc;

    sqlite3_bind_blob(link->statement, 1, key, (int)link->setup->key_bytes,
                      SQLITE_STATIC);
    rc = sqlite3_step(link->statement);
    must(link, rc, "get");
    if (rc == SQLITE_ROW) {
        memcpy(value, sqlite3_column_blob(link->statement, 0),
               link->setup->value_bytes);
    }
    must(link, sqlite3_reset(link->statement), "get");
    return rc == SQLITE_ROW;
}

static void scan(void *at, struct scan_sum *sum)
{
    struct link *link = at;
    sqlite3_stmt *statement;
    int rc;

    must(link, sqlite3_prepare_v2(link->db, "SELECT k,v FROM records "
                                  "ORDER BY k", -1, &statement, NULL),
         "scan");
    while ((rc = sqlite3_step(statement)) == SQLITE_ROW) {
        scan_add(sum, sqlite3_column_blob(statement, 0),
                 sqlite3_column_blob(statement, 1));
    }
    must(link, rc, "scan");
    sqlite3_finalize(statement);
}

static void run_alone(void *at, const char *sql)
{
    struct store *store = at;
    struct link link;

    link_open(&link, &store->setup, NULL);
    run(&link, sql);
    link_close(&link);
}

static void settle(void *store)
{
    run_alone(store, "PRAGMA wal_checkpoint(TRUNCATE)");
}

static void compact(void *store)
{
    run_alone(store, "VACUUM;PRAGMA wal_checkpoint(TRUNCATE)");
}

const struct engine engine_sqlite = {
    "sqlite", "SQLite", 0,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, NULL, scan, settle, compact, NULL
};
