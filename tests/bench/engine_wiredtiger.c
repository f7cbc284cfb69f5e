/*
 * Adapter: WiredTiger, a row-store table with a log that is pre-allocated and
 * zeroed, one session for each thread, a cache that holds everything.
 *
 * SPDX-License-Identifier: MIT
 */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <wiredtiger.h>

#define TABLE "table:records"

struct store {
    WT_CONNECTION *connection;
    struct engine_setup setup;
};

/* A writer or a reader. */
struct link {
    struct store *store;
    WT_SESSION *session;
    WT_CURSOR *cursor;
    bool held;
};

static void must(int rc, const char *what)
{
    if (rc != 0) bench_die("wiredtiger: %s: %s", what, wiredtiger_strerror(rc));
}

static void *store_open(const struct engine_setup *setup)
{
    struct store *store = bench_alloc(sizeof *store);
    WT_SESSION *session;
    char config[256];

    store->setup = *setup;
    (void)snprintf(config, sizeof config,
                   "create,cache_size=8GB,checkpoint=(log_size=256MB),"
                   "log=(enabled,file_max=64MB,prealloc,zero_fill),"
                   "transaction_sync=(enabled=%s,method=fsync)",
                   setup->durable ? "true" : "false");
    must(wiredtiger_open(setup->dir, NULL, config, &store->connection),
         "open");
    must(store->connection->open_session(store->connection, NULL, NULL,
                                         &session), "session");
    must(session->create(session, TABLE, "key_format=u,value_format=u"),
         "create");
    must(session->close(session, NULL), "session close");
    return store;
}

static void store_close(void *at)
{
    struct store *store = at;

    must(store->connection->close(store->connection, NULL), "close");
    free(store);
}

static struct link *link_open(void *at, const char *config)
{
    struct link *link = bench_alloc(sizeof *link);
    WT_CONNECTION *connection;

    link->store = at;
    link->held = false;
    connection = link->store->connection;
    must(connection->open_session(connection, NULL, NULL, &link->session),
         "session");
    must(link->session->open_cursor(link->session, TABLE, NULL, config,
                                    &link->cursor), "cursor");
    return link;
}

static void link_close(void *at)
{
    struct link *link = at;

    must(link->session->close(link->session, NULL), "session close");
    free(link);
}

static void *writer_open(void *store)
{
    return link_open(store, "overwrite");
}

static void put(void *at, const void *key, const void *value)
{
    struct link *link = at;
    WT_ITEM k, v;

    k.data = key;
    k.size = link->store->setup.key_bytes;
    v.data = value;
    v.size = link->store->setup.value_bytes;
    link->cursor->set_key(link->cursor, &k);
    link->cursor->set_value(link->cursor, &v);
    must(link->cursor->insert(link->cursor), "put");
}

/* Two writers that touch the same page may be told to roll back; the records
 * of different threads differ, so that this does not happen here. */
static void put_batch(void *at, const void *keys, const void *values,
                      size_t n)
{
    struct link *link = at;
    const struct engine_setup *setup = &link->store->setup;
    size_t i;

    must(link->session->begin_transaction(link->session, NULL), "begin");
    for (i = 0; i < n; i++) {
        put(link, (const char *)keys + i * setup->key_bytes,
            (const char *)values + i * setup->value_bytes);
    }
    must(link->session->commit_transaction(link->session, NULL), "commit");
}

static void *reader_open(void *store, bool held)
{
    struct link *link = link_open(store, NULL);

    link->held = held;
    if (held) {
        must(link->session->begin_transaction(link->session,
                                              "isolation=snapshot"), "begin");
    }
    return link;
}

static void reader_close(void *at)
{
    struct link *link = at;

    if (link->held) {
        must(link->session->rollback_transaction(link->session, NULL), "end");
    }
    link_close(link);
}

static bool get(void *at, const void *key, void *value)
{
    struct link *link = at;
    WT_ITEM k, v;
    int rc;

    k.data = key;
    k.size = link->store->setup.key_bytes;
    link->cursor->set_key(link->cursor, &k);
    rc = link->cursor->search(link->cursor);
    if (rc == WT_NOTFOUND) return false;
    must(rc, "get");
    must(link->cursor->get_value(link->cursor, &v), "get");
    memcpy(value, v.data, v.size);
    if (!link->held) must(link->cursor->reset(link->cursor), "reset");
    return true;
}

static void scan(void *at, struct scan_sum *sum)
{
    struct link *link = at;
    WT_CURSOR *cursor = link->cursor;
    WT_ITEM k, v;
    int rc;

    must(cursor->reset(cursor), "reset");
    while ((rc = cursor->next(cursor)) == 0) {
        must(cursor->get_key(cursor, &k), "scan");
        must(cursor->get_value(cursor, &v), "scan");
        scan_add(sum, k.data, v.data);
    }
    if (rc != WT_NOTFOUND) must(rc, "scan");
}

static void with_session(void *store, bool compact_it)
{
    struct link *link = link_open(store, NULL);

    must(link->session->checkpoint(link->session, NULL), "checkpoint");
    must(link->cursor->close(link->cursor), "cursor close");
    if (compact_it) {
        must(link->session->compact(link->session, TABLE, NULL), "compact");
        must(link->session->checkpoint(link->session, NULL), "checkpoint");
    }
    link_close(link);
}

static void settle(void *store)
{
    with_session(store, false);
}

static void compact(void *store)
{
    with_session(store, true);
}

const struct engine engine_wiredtiger = {
    "wiredtiger", "WiredTiger", 0,
    store_open, store_close, writer_open, link_close, put, put_batch,
    reader_open, reader_close, get, NULL, scan, settle, compact, NULL
};
