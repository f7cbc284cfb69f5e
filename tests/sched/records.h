/*
 * The records of the schedules. Keys belong to groups; a batch takes a ticket
 * and writes all of a group, or of several: its first keys always, each of
 * the others (extras) is put or removed, as the ticket says. So the ticket
 * that a group holds tells all of the group, and the tickets of all groups
 * tell the state, with its count and its digest.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_SCHED_RECORDS_H
#define KVMETA_TEST_SCHED_RECORDS_H

#include <assert.h>

#include "disk.h"

#define GROUPS 12
#define TICKETS_MAX DISK_TICKETS_MAX
#define EVENTS_MAX 96
#include "../threads/history.h"

#define SINGLES 4                    /* the first groups have one key each */
#define MEMBERS_MAX 18
#define KEYS_MAX (SINGLES + (GROUPS - SINGLES) * MEMBERS_MAX)

struct records {
    const char *name;
    uint32_t key_bytes;
    uint32_t value_bytes;            /* a multiple of 8 */
    uint32_t always;                 /* keys of a group that are always there */
    uint32_t extras;

    /* Filled in by records_init. */
    size_t count;                    /* keys, whether there or not */
    unsigned char *keys;             /* ascending, one after another */
    unsigned char group[KEYS_MAX];
    unsigned char member[KEYS_MAX];
    unsigned index[GROUPS][MEMBERS_MAX];
    unsigned count_of[GROUPS][TICKETS_MAX];
    struct kvmeta_digest digest_of[GROUPS][TICKETS_MAX];
    struct sim_fs base;              /* with ticket 0 in every group */
    uint64_t base_seq;
};

static unsigned records_members(const struct records *r, unsigned group)
{
    return group < SINGLES ? 1 : r->always + r->extras;
}

/* Does a group that holds this ticket have this member? */
static int records_has(const struct records *r, unsigned group,
                       unsigned member, uint32_t ticket)
{
    struct test_rng rng = {((uint64_t)ticket << 8 | group) * 0x9e3779b9u};

    return group < SINGLES || member < r->always ||
           (test_rng_u64(&rng) >> member & 1);
}

/* Long keys begin with 8 bytes that are all the same, so that the rest of
 * them is compared, too. */
static void records_key(const struct records *r, uint64_t number,
                        unsigned char *key)
{
    memset(key, 0xab, r->key_bytes);
    kvmeta_u64_to_key(number, key + (r->key_bytes >= 16 ? 8 : 0));
}

static const unsigned char *records_key_at(const struct records *r, size_t i)
{
    return r->keys + i * r->key_bytes;
}

/* The stamp, and words that follow from it and from the key: a value that is
 * torn or of another key is none. */
static void records_value(const struct records *r, size_t i, uint32_t ticket,
                          unsigned char *value)
{
    uint64_t stamp = disk_stamp(r->group[i], ticket), word;
    uint32_t off;

    memcpy(value, &stamp, sizeof stamp);
    for (off = 8; off < r->value_bytes; off += 8) {
        word = (stamp + i) * (0x9e3779b97f4a7c15u + 2 * off) >> 24;
        memcpy(value + off, &word, sizeof word);
    }
}

/* The ticket in a value, which must be right in all its bytes. */
static uint32_t records_ticket(const struct records *r, size_t i,
                               const unsigned char *value)
{
    unsigned char want[2048];
    uint64_t stamp;

    assert(r->value_bytes <= sizeof want);
    memcpy(&stamp, value, sizeof stamp);
    records_value(r, i, (uint32_t)stamp, want);
    if (memcmp(want, value, r->value_bytes) != 0 ||
        (uint32_t)stamp >= TICKETS_MAX) {
        turn_fail("a value is not one that was written to this key");
    }
    return (uint32_t)stamp;
}

/* Entries that a batch on these groups puts. */
static unsigned records_puts(const struct records *r, uint32_t groups,
                             uint32_t ticket)
{
    unsigned g, n = 0;

    for (g = 0; g < GROUPS; g++) {
        if (groups >> g & 1) n += r->count_of[g][ticket];
    }
    return n;
}

/* --------------------------------------------------------------------------
 * A view: what a read saw, or a part of it
 * -------------------------------------------------------------------------- */

struct view {
    uint32_t tickets[GROUPS];
    unsigned char there[KEYS_MAX];
    uint64_t count;
};

static void view_init(struct view *view)
{
    unsigned g;

    memset(view, 0, sizeof *view);
    for (g = 0; g < GROUPS; g++) view->tickets[g] = NO_TICKET;
}

/* Key i was there, with this value. */
static void view_enter(const struct records *r, struct view *view, size_t i,
                       const unsigned char *value)
{
    uint32_t ticket = records_ticket(r, i, value);
    uint32_t *seen = &view->tickets[r->group[i]];

    if (*seen != NO_TICKET && *seen != ticket) {
        turn_fail("a read saw a part of a batch");
    }
    if (view->there[i]) turn_fail("a read saw a key twice");
    *seen = ticket;
    view->there[i] = 1;
    view->count++;
}

/* Of each group seen, all and nothing else must be there. */
static void view_check(const struct records *r, const struct view *view)
{
    size_t i;

    for (i = 0; i < r->count; i++) {
        uint32_t ticket = view->tickets[r->group[i]];

        if (ticket != NO_TICKET &&
            view->there[i] !=
                records_has(r, r->group[i], r->member[i], ticket)) {
            turn_fail("a read saw a part of a batch, or of a remove");
        }
    }
}

static uint64_t view_count(const struct records *r, const uint32_t *tickets)
{
    uint64_t count = 0;
    unsigned g;

    for (g = 0; g < GROUPS; g++) count += r->count_of[g][tickets[g]];
    return count;
}

static struct kvmeta_digest view_digest(const struct records *r,
                                        const uint32_t *tickets)
{
    struct kvmeta_digest sum = {0, 0};
    unsigned g;

    for (g = 0; g < GROUPS; g++) {
        sum.lo += r->digest_of[g][tickets[g]].lo;
        sum.hi += r->digest_of[g][tickets[g]].hi;
    }
    return sum;
}

static int digest_same(struct kvmeta_digest a, struct kvmeta_digest b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

/* --------------------------------------------------------------------------
 * Once for each process
 * -------------------------------------------------------------------------- */

static void records_make_keys(struct records *r)
{
    unsigned g, j;

    r->keys = calloc(KEYS_MAX, r->key_bytes);
    if (r->keys == NULL) abort();
    r->count = 0;
    for (j = 0; j < MEMBERS_MAX; j++) {
        for (g = 0; g < GROUPS; g++) {
            if (j >= records_members(r, g)) continue;
            r->index[g][j] = (unsigned)r->count;
            r->group[r->count] = (unsigned char)g;
            r->member[r->count] = (unsigned char)j;
            records_key(r, j * GROUPS + g,
                        r->keys + r->count++ * r->key_bytes);
        }
    }
}

static void records_options(const struct records *r, struct sim_fs *fs,
                            struct kvmeta_options *o)
{
    kvmeta_options_init(o, r->key_bytes, r->value_bytes);
    o->vfs = &fs->vfs;
    o->flags = KVMETA_NO_THREAD;
    o->log_bytes_max = 65536;
    o->log_buffer_bytes = 4096;
    o->open_threads = 1;
    o->zstd_level = -5;
    o->merge_window = 64;
    o->space_amp_max = 100;
}

static kvmeta *records_open(struct kvmeta_options *options)
{
    struct kvmeta_error err;
    kvmeta *db;

    if (kvmeta_open(SIM_DIR, options, &db, &err) != KVMETA_OK) {
        printf("open: %s\n", err.message);
        turn_fail("the store does not open");
    }
    return db;
}

/* The digest is a sum over the records: that of a store with one record at a
 * time tells what each of them adds. */
static void records_learn_digests(struct records *r)
{
    struct kvmeta_options options;
    struct kvmeta_digest digest;
    unsigned char value[2048];
    static struct sim_fs fs;
    uint32_t ticket;
    kvmeta *db;
    size_t i;

    sim_init(&fs, 512, 1);
    records_options(r, &fs, &options);
    options.log_bytes_max = 64 << 20;
    db = records_open(&options);
    for (i = 0; i < r->count; i++) {
        for (ticket = 0; ticket < TICKETS_MAX; ticket++) {
            unsigned g = r->group[i];

            records_value(r, i, ticket, value);
            if (kvmeta_put(db, records_key_at(r, i), value,
                           KVMETA_BUFFERED) != KVMETA_OK) {
                abort();
            }
            if (!records_has(r, g, r->member[i], ticket)) continue;
            digest = kvmeta_digest(db);
            r->count_of[g][ticket]++;
            r->digest_of[g][ticket].lo += digest.lo;
            r->digest_of[g][ticket].hi += digest.hi;
        }
        if (kvmeta_remove(db, records_key_at(r, i), KVMETA_BUFFERED)) abort();
    }
    if (kvmeta_close(db) != KVMETA_OK) abort();
    sim_free(&fs);
}

/* Ticket 0 in every group, in three tables, with tombstones among them. */
static void records_make_base(struct records *r)
{
    struct kvmeta_options options;
    unsigned char value[2048];
    kvmeta_snapshot *snapshot;
    kvmeta *db;
    size_t i;
    int part;

    sim_init(&r->base, 512, 1);
    records_options(r, &r->base, &options);
    db = records_open(&options);
    for (part = 0; part < 3; part++) {
        for (i = 0; i < r->count; i++) {
            records_value(r, i, 0, value);
            if ((part != 1 || i % 2 == 0) &&
                kvmeta_put(db, records_key_at(r, i), value,
                           KVMETA_BUFFERED)) {
                abort();
            }
            if (part == 2 && !records_has(r, r->group[i], r->member[i], 0) &&
                kvmeta_remove(db, records_key_at(r, i), KVMETA_BUFFERED)) {
                abort();
            }
        }
        if (kvmeta_flush(db) != KVMETA_OK) abort();
    }
    if (kvmeta_close(db) != KVMETA_OK) abort();
    db = records_open(&options);
    if (kvmeta_snapshot_take(db, &snapshot) != KVMETA_OK) abort();
    r->base_seq = kvmeta_snapshot_seq(snapshot);
    kvmeta_snapshot_release(snapshot);
    if (kvmeta_close(db) != KVMETA_OK) abort();
}

static void records_init(struct records *r)
{
    records_make_keys(r);
    records_learn_digests(r);
    records_make_base(r);
}

#endif /* KVMETA_TEST_SCHED_RECORDS_H */
