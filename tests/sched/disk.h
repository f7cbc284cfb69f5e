/*
 * The simulated file system with a watch on the logs: which tickets have been
 * written to one, in which order, and which of them a sync has made durable.
 *
 * It relies on one thing only: the value of a record stands in the log as it
 * is, on a multiple of 8 bytes. So the first word of every value is a stamp
 * that is like nothing else, with the ticket in it.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_SCHED_DISK_H
#define KVMETA_TEST_SCHED_DISK_H

#include "../sim/sim.h"
#include "turns.h"

#define DISK_TICKETS_MAX 64
#define DISK_STAMP 0x5c4ed7u                 /* in the highest 24 bits */

struct disk_ticket {
    unsigned seen;                   /* entries written to a log */
    unsigned durable;                /* ... and synced */
    unsigned place;                  /* in the order of the logs, from 1 */
};

/* An entry that is written and not synced. */
struct disk_entry {
    int file;
    uint32_t ticket;
};

struct disk {
    struct sim_fs fs;                /* first: its calls get this address */
    struct disk_ticket tickets[DISK_TICKETS_MAX];
    unsigned places;                 /* tickets seen */
    unsigned char is_log[SIM_HANDLES_MAX];
    struct disk_entry *dirty;
    size_t dirty_count;
    size_t dirty_cap;
    const struct kvmeta_vfs *sim;    /* its own calls */
    struct kvmeta_vfs sim_calls;
};

static uint64_t disk_stamp(uint32_t group, uint32_t ticket)
{
    return (uint64_t)DISK_STAMP << 40 | (uint64_t)group << 32 | ticket;
}

/* A batch that is about to be written to a log takes its place. Ticket 0 is
 * from before the schedule. */
static void disk_place(struct disk *disk, int file, uint32_t ticket)
{
    (void)file;
    if (ticket >= DISK_TICKETS_MAX) turn_fail("an odd ticket is logged");
    if (ticket == 0) return;
    if (disk->tickets[ticket].place == 0) {
        disk->tickets[ticket].place = ++disk->places;
    } else if (disk->tickets[ticket].place != disk->places) {
        turn_fail("batches are mixed in the log");
    }
}

/* One entry of it has been written. */
static void disk_wrote(struct disk *disk, int file, uint32_t ticket)
{
    if (ticket == 0) return;
    disk->tickets[ticket].seen++;
    if (disk->dirty_count == disk->dirty_cap) {
        disk->dirty_cap = disk->dirty_cap * 2 + 256;
        disk->dirty = realloc(disk->dirty,
                              disk->dirty_cap * sizeof *disk->dirty);
        if (disk->dirty == NULL) abort();
    }
    disk->dirty[disk->dirty_count].file = file;
    disk->dirty[disk->dirty_count++].ticket = ticket;
}

/* Calls fn for every stamp. */
static void disk_stamps(struct disk *disk, int file, const void *buf,
                        size_t bytes,
                        void (*fn)(struct disk *, int, uint32_t))
{
    uint64_t word;
    size_t i;

    for (i = 0; i + 8 <= bytes; i += 8) {
        memcpy(&word, (const unsigned char *)buf + i, sizeof word);
        if (word >> 40 == DISK_STAMP) fn(disk, file, (uint32_t)word);
    }
}

static int disk_file_open(void *user, int dir, const char *name, int flags,
                          int *file)
{
    struct disk *disk = user;
    int rc = disk->sim->file_open(user, dir, name, flags, file);

    if (rc == 0) {
        disk->is_log[*file % SIM_HANDLES_MAX] =
            strstr(name, ".wal") != NULL;
    }
    return rc;
}

static int64_t disk_file_write(void *user, int file, const void *buf,
                               size_t bytes, uint64_t off)
{
    struct disk *disk = user;
    int is_log = disk->is_log[file % SIM_HANDLES_MAX];
    int64_t done;

    if (is_log && off % 8 != 0) turn_fail("a log is written at an odd place");
    if (is_log) disk_stamps(disk, file, buf, bytes, disk_place);
    done = disk->sim->file_write(user, file, buf, bytes, off);
    if (done != (int64_t)bytes) turn_fail("a write fails");
    if (is_log) disk_stamps(disk, file, buf, bytes, disk_wrote);
    return done;
}

static int disk_file_sync(void *user, int file)
{
    struct disk *disk = user;
    int rc = disk->sim->file_sync(user, file);
    size_t i, kept = 0;

    if (rc != 0 || !disk->is_log[file % SIM_HANDLES_MAX]) return rc;
    for (i = 0; i < disk->dirty_count; i++) {
        if (disk->dirty[i].file == file) {
            disk->tickets[disk->dirty[i].ticket].durable++;
        } else {
            disk->dirty[kept++] = disk->dirty[i];
        }
    }
    disk->dirty_count = kept;
    turn_point(TURN_COARSE, "synced");
    return rc;
}

static uint64_t disk_clock_ns(void *user)
{
    (void)user;
    return turns.now_ns;
}

/* A copy of `base`, as after a kill. */
static void disk_init(struct disk *disk, const struct sim_fs *base,
                      uint64_t seed)
{
    sim_clone(&disk->fs, base);
    disk->fs.rng.state = seed;
    disk->sim_calls = disk->fs.vfs;
    disk->sim = &disk->sim_calls;
    disk->fs.vfs.file_open = disk_file_open;
    disk->fs.vfs.file_write = disk_file_write;
    disk->fs.vfs.file_sync = disk_file_sync;
    disk->fs.vfs.clock_ns = disk_clock_ns;
    memset(disk->tickets, 0, sizeof disk->tickets);
    disk->places = 0;
    disk->dirty_count = 0;
}

static void disk_free(struct disk *disk)
{
    sim_free(&disk->fs);
    free(disk->dirty);
    disk->dirty = NULL;
    disk->dirty_cap = 0;
}

/* Has all of a batch of so many puts been synced? */
static int disk_is_durable(const struct disk *disk, uint32_t ticket,
                           unsigned entries)
{
    return ticket == 0 || disk->tickets[ticket].durable == entries;
}

#endif /* KVMETA_TEST_SCHED_DISK_H */
