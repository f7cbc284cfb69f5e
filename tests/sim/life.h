/*
 * The life of one store on the simulated file system: it runs operations,
 * keeps the history of the states that they lead to, and says after a crash
 * whether what an open recovered is one that may be there.
 *
 * A state is known by a sum over its records, computed here from a full scan
 * and not by the library, and by its commit number. states[0..issued] are
 * those that were asked for, in order; of them
 *
 *   durable   is the newest that was acknowledged as on disk: a power cut may
 *             not go behind it,
 *   written   the newest that the system was given: a kill may not either,
 *   visible   the one that reads show now; states after it belong to a call
 *             that failed in a way that leaves its outcome open.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_LIFE_H
#define KVMETA_TEST_LIFE_H

#include "sim.h"

#define LIFE_STATES_MAX 512

struct life_config {
    const char *name;
    uint32_t cell_bytes;
    int garbage_whole;
    uint32_t log_align;
    uint32_t key_bytes;
    uint32_t value_bytes;
    uint32_t big_batch;                  /* records of operation 'g' */
    uint32_t merge_ratio;
};

/* Those that the tests use; the last one's `name` is NULL. */
extern const struct life_config life_configs[];

struct life_state {
    uint64_t sum[2];
    uint64_t count;
    uint64_t seq;
};

/* What the opens of all lives of this process found. */
struct life_totals {
    uint64_t opens;
    uint64_t torn[3];                    /* by enum kvmeta_torn */
    uint64_t healed;
    uint64_t garbage_files;
    uint64_t log_frames;
    uint64_t merges;
    uint64_t flushes;
    uint64_t rotations;
    uint64_t full_compactions;
};
extern struct life_totals life_totals;

struct life {
    struct sim_fs *fs;
    struct test_alloc *alloc;
    const struct life_config *config;
    kvmeta *db;                          /* NULL while closed */
    struct test_oracle now;              /* what reads must show */
    const struct life *before;           /* the life that it goes on from */
    struct life_state states[LIFE_STATES_MAX];
    unsigned durable;
    unsigned written;
    unsigned visible;
    unsigned issued;
    uint64_t next_number;                /* makes every value a new one */
    int faulty;                          /* calls may fail as documented */
    int damaged;                         /* the open may find damage */
    int broken;                          /* writes must be refused */
    int maybe_broken;                    /* ... or may be */
    int last_result;                     /* of the last operation or open */
    char problem[320];                   /* the first thing that was wrong */
};

/* A life that begins with no store at all. alloc and fs stay the caller's. */
void life_begin(struct life *life, struct sim_fs *fs,
                struct test_alloc *alloc, const struct life_config *config);

/* A life that goes on from a crash of `from` on another file system: what
 * may be found there is what `from` may have left after a power cut or, with
 * `kill`, after the end of the process. `from` must outlive the next open. */
void life_begin_after(struct life *life, const struct life *from, int kill,
                      struct sim_fs *fs, struct test_alloc *alloc);

/* Closes the store if it is open (the result does not matter), and frees. */
void life_end(struct life *life);

/* Opens, and checks that what is found may be there. 0, or 1 on a problem or
 * when an open that may fail did: then `db` is NULL and last_result tells. */
int life_open(struct life *life);

/*
 * Runs one operation; 0, or 1 on a problem. While the store is closed only
 * 'O' does anything.
 *
 *   p w u   put: durable, written, buffered     x   remove, durable
 *   b B     batch of three: durable, buffered   g   large batch, buffered
 *   s       kvmeta_sync                         r   kvmeta_flush
 *   t T     kvmeta_step once; until idle        c   kvmeta_compact
 *   C O     close; open (closes before)         k   200 ms pass
 *   v       kvmeta_verify
 */
int life_op(struct life *life, char op);

/* Set: every open, operation and failed call is printed, for --trace 1. */
extern int life_trace;

/* Compares the store with `now` by a full scan; 0, or 1 on a problem. */
int life_check_now(struct life *life);

/* After an open: the directory holds what the statistics say, and nothing
 * else. 0, or 1 on a problem. */
int life_check_directory(struct life *life);

/* Without a store: no memory is left, and no handle. 0, or 1 on a problem. */
int life_check_leaks(struct life *life);

/* Records the problem unless there is one already; returns 1. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int life_problem(struct life *life, const char *format, ...);

#endif /* KVMETA_TEST_LIFE_H */
