/*
 * A simulated file system behind struct kvmeta_vfs, for tests that cut the
 * power, kill the process or make calls fail at any point.
 *
 * It holds one directory (SIM_DIR) with flat files, all in memory. Each file
 * has the content that reads see and the content that is durable. Between
 * them stand un-synced cells (the unit that a disk writes at once), each with
 * all the versions it has had since the last sync; un-synced sizes; and
 * directory entries changed since the last dir_sync. sim_cut walks through
 * the states that a power cut can leave: every un-synced cell in any of its
 * versions, old or garbage; every entry and every size old or new, in any
 * combination. A kill leaves everything: that is sim_clone.
 *
 * What is assumed of a disk, and no more: what was synced stays; a cell is
 * never a mixture unless it is garbage; a cell nobody wrote is never touched.
 *
 * Deterministic: random() and the clock are part of the state. One mutex
 * makes a file system usable from many threads; clones share cells without
 * atomics, so a family of clones belongs to one thread at a time.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_SIM_H
#define KVMETA_TEST_SIM_H

#include <pthread.h>
#include <stdint.h>

#include "../../kvmeta.h"
#include "../support/support.h"

#define SIM_DIR "/store"
#define SIM_NAME_BYTES 24
#define SIM_ENTRIES_MAX 96
#define SIM_ENTRY_VERSIONS_MAX 6
#define SIM_HANDLES_MAX 64

/* Every call answers this errno once the crash point has been passed. */
#define SIM_CRASHED 9999

enum sim_call {
    SIM_DIR_CREATE,
    SIM_DIR_SYNC_PARENT,
    SIM_DIR_OPEN,
    SIM_DIR_LIST,
    SIM_DIR_SYNC,
    SIM_DIR_CLOSE,
    SIM_FILE_OPEN,
    SIM_FILE_LOCK,
    SIM_FILE_SIZE,
    SIM_FILE_READ,
    SIM_FILE_WRITE,
    SIM_FILE_TRUNCATE,
    SIM_FILE_SYNC,
    SIM_FILE_CLOSE,
    SIM_RENAME,
    SIM_UNLINK,
    SIM_RANDOM,
    SIM_CALLS                /* the number of kinds; as a kind: any call */
};

/* Makes one call fail, or all from one on. */
struct sim_fault {
    uint64_t at;             /* the Nth call of `kind` from now; 0: none */
    int kind;                /* enum sim_call; SIM_CALLS: any */
    int error;               /* errno; 0: a short read or write instead */
    int ever;                /* and every later one of the kind, too */
    int partial;             /* a write is cut short, and the next one fails
                                (but EIO fails at once, after writing the
                                first half); a failed sync has made a part
                                durable */
    int armed;               /* that next write is still to come */
    uint64_t seen;           /* calls of the kind since it was set */
    uint64_t hits;           /* of them, those made to fail or fall short */
    int hit_kind;            /* enum sim_call of the first of these */
};

struct sim_inode;

struct sim_entry {
    char name[SIM_NAME_BYTES];
    struct sim_inode *durable;           /* NULL: absent */
    struct sim_inode *current;
    /* What it was changed to since the last dir_sync, oldest first. */
    struct sim_inode *versions[SIM_ENTRY_VERSIONS_MAX];
    unsigned version_count;
};

struct sim_handle {
    struct sim_inode *inode;             /* NULL with `used`: the directory */
    int used;
    int flags;
    uint32_t generation;
};

struct sim_fs {
    struct kvmeta_vfs vfs;               /* give its address to the store */
    uint32_t cell_bytes;                 /* 512 or 4096 */

    /* 1: a garbage cell is garbage all through. 0: only where its versions
     * differ, by 512 bytes. 1 is right when log_align >= cell_bytes. */
    int garbage_whole;

    struct test_rng rng;
    uint64_t clock_now_ns;
    uint64_t clock_step_ns;              /* added by each clock_ns */
    uint64_t pid;

    /* Calls that change the state, counted. Before each, and once within a
     * write of several cells, `on_op` is told (no lock held; a cut at this
     * moment would find this state). Once `ops` is crash_at, everything
     * fails with SIM_CRASHED. */
    uint64_t ops;
    uint64_t crash_at;                   /* UINT64_MAX: never */
    int crashed;
    void (*on_op)(void *user, struct sim_fs *fs, enum sim_call kind);
    void *on_op_user;

    struct sim_fault fault;
    uint64_t calls[SIM_CALLS];
    uint64_t misuses;                    /* calls with a handle that is not
                                            open, or not open for that */

    int dir_durable;                     /* SIM_DIR's own entry */
    int dir_current;
    struct sim_entry entries[SIM_ENTRIES_MAX];
    unsigned entry_count;
    struct sim_handle handles[SIM_HANDLES_MAX];
    unsigned handle_top;                 /* slots at and past it: never used */
    pthread_mutex_t mutex;
};

/* An empty file system without SIM_DIR. Must not be moved afterwards. */
void sim_init(struct sim_fs *fs, uint32_t cell_bytes, uint64_t seed);
/* Frees it. Handles still open are forgotten; see sim_open_handles. */
void sim_free(struct sim_fs *fs);

/* *to: as `from` is after a kill: what was written is there, and what was
 * not synced still is not; no handles, faults or crash point. `to` must not
 * be initialised. Its random numbers go another way than those of `from`. */
void sim_clone(struct sim_fs *to, const struct sim_fs *from);

/* Handles that are open; a store that was closed must leave 0. */
unsigned sim_open_handles(const struct sim_fs *fs);

/* Fault `fault` is counted from now on. */
void sim_set_fault(struct sim_fs *fs, struct sim_fault fault);
void sim_clear_fault(struct sim_fs *fs);

/* The name of a kind of call, for messages. */
const char *sim_call_name(int kind);

/* --------------------------------------------------------------------------
 * Power cuts
 * -------------------------------------------------------------------------- */

/* What all cuts of this process have left. */
struct sim_totals {
    uint64_t states;
    uint64_t cells_kept;
    uint64_t cells_lost;
    uint64_t cells_garbage;
    uint64_t entries_kept;
    uint64_t entries_lost;
    uint64_t sizes_kept;
    uint64_t sizes_lost;
};
extern struct sim_totals sim_totals;

struct sim_cut {
    const struct sim_fs *fs;
    struct sim_cut_point *points;        /* what can go more than one way */
    unsigned point_count;
    unsigned point_capacity;
    struct sim_inode **inodes;
    unsigned *inode_points;              /* first point; one more at the end */
    unsigned inode_count;
    uint64_t limit;
    uint64_t done;
    int exhaustive;                      /* all states will be listed */
    int garbage;
    struct test_rng rng;
};

/*
 * Prepares the walk over the states that a cut at this moment can leave, at
 * most `limit` (>= 2) of them: all, when there are no more than that; else
 * nothing kept, everything kept, each of some single deviations from these
 * two, and random ones. garbage: cells may become garbage, too. `fs` must
 * not change until sim_cut_end.
 */
void sim_cut_begin(struct sim_cut *cut, const struct sim_fs *fs,
                   uint64_t limit, int garbage, uint64_t seed);
/* 1: *to, not initialised before, is the next state; 0: there are no more. */
int sim_cut_next(struct sim_cut *cut, struct sim_fs *to);
void sim_cut_end(struct sim_cut *cut);

/* --------------------------------------------------------------------------
 * Looking at files, and planting them
 * -------------------------------------------------------------------------- */

/* Calls fn for every file that a reader of the directory sees. */
void sim_each_file(const struct sim_fs *fs,
                   void (*fn)(void *user, const char *name, uint64_t bytes),
                   void *user);
/* The content of a file as reads see it, to be freed by free(); NULL when
 * there is no such file. *bytes gets its size. */
unsigned char *sim_file_get(const struct sim_fs *fs, const char *name,
                            uint64_t *bytes);
/* Makes SIM_DIR and the file with this content, all durable; data NULL: it
 * removes the file. */
void sim_file_put(struct sim_fs *fs, const char *name, const void *data,
                  uint64_t bytes);
/* A hash of the names and contents that reads see; what is durable does not
 * count. Two file systems with the same files have the same. */
uint64_t sim_hash(const struct sim_fs *fs);

#endif /* KVMETA_TEST_SIM_H */
