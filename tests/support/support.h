/*
 * What the tests share: arguments and replay lines, a random generator, an
 * allocator that counts and fails on demand, and a sorted array that says
 * what a store should hold.
 *
 * Nothing here calls the library from support.c, so that a test may compile
 * kvmeta.c into itself (KVMETA_STATIC); the one function that does is inline.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_SUPPORT_H
#define KVMETA_TEST_SUPPORT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "../../kvmeta.h"

/* --------------------------------------------------------------------------
 * Arguments and replay lines
 * -------------------------------------------------------------------------- */

struct test_args {
    const char *program;     /* argv[0] */
    uint64_t seed;           /* --seed N, default 1 */
    uint64_t scale;          /* --scale N, default 1; 1 is `make check` */
};

/* Set by test_parse_args, which every main() calls first. */
extern struct test_args test_args;

/* Takes --seed, --scale and any other "--name value" pairs; exits with a
 * usage line when an argument has another form. */
void test_parse_args(int argc, char **argv);

/* The value of a further "--name value", or NULL when it was not given. */
const char *test_option(const char *name);
uint64_t test_option_u64(const char *name, uint64_t otherwise);

/* Prints "replay: PROGRAM --seed N --scale N " and the text: the command
 * line that shows a failure again. Goes to stdout at once. */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void test_replay(const char *format, ...);

/* Zeroed memory that forked children share with the parent; never freed. */
void *test_shared(size_t bytes);

/* The number of cores, or --workers N. */
unsigned test_workers(void);

/* Calls run(arg, i, workers) for every i < workers, each in a process of its
 * own. Returns how many of them crashed or returned something but 0; says
 * which, and why. */
int test_fork(unsigned workers,
              int (*run)(void *arg, unsigned worker, unsigned workers),
              void *arg);

/* --------------------------------------------------------------------------
 * Random numbers: small, seeded, the same on every machine
 * -------------------------------------------------------------------------- */

struct test_rng {
    uint64_t state;
};

static inline uint64_t test_rng_u64(struct test_rng *rng)
{
    uint64_t z = rng->state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0 .. n-1; n may not be 0. The bias for small n does not matter here. */
static inline uint64_t test_rng_below(struct test_rng *rng, uint64_t n)
{
    return test_rng_u64(rng) % n;
}

void test_rng_bytes(struct test_rng *rng, void *buf, size_t bytes);

/* --------------------------------------------------------------------------
 * Counting allocator: options.realloc_fn = test_realloc, options.user = &alloc
 *
 * Safe from many threads. Each block carries its size, so that frees are
 * checked and live_bytes is exact. options.user is also what log_fn gets:
 * test_log counts messages, and prints them when `log_prints` is set.
 * -------------------------------------------------------------------------- */

struct test_alloc {
    atomic_uint_fast64_t calls;          /* that ask for memory */
    atomic_uint_fast64_t failures;       /* refused so far */
    atomic_int_fast64_t live_blocks;
    atomic_int_fast64_t live_bytes;
    atomic_int_fast64_t peak_bytes;
    uint64_t fail_at;                    /* refuse this call; 0: none */
    int fail_ever;                       /* ... and all that follow */
    uint64_t limit_bytes;                /* refuse beyond; 0: no limit */
    int log_prints;
    atomic_uint_fast64_t logs[4];        /* messages by level */
};

#undef test_realloc                      /* a macro of cmocka.h */
void *test_realloc(void *user, void *old, size_t bytes);
void test_log(void *user, int level, const char *message);

/* --------------------------------------------------------------------------
 * Oracle: the records that a store should hold, as a sorted array
 * -------------------------------------------------------------------------- */

struct test_oracle {
    uint32_t key_bytes;
    uint32_t value_bytes;
    size_t count;
    size_t capacity;
    unsigned char *records;              /* key and value, one after another */
};

void test_oracle_init(struct test_oracle *oracle, uint32_t key_bytes,
                      uint32_t value_bytes);
void test_oracle_free(struct test_oracle *oracle);
void test_oracle_copy(struct test_oracle *to, const struct test_oracle *from);
int test_oracle_equal(const struct test_oracle *a,
                      const struct test_oracle *b);

/* Index of the first record with a key >= key; count when there is none. */
size_t test_oracle_find(const struct test_oracle *oracle, const void *key);
/* The value of key, or NULL; with value_bytes 0 a pointer that is not NULL. */
const void *test_oracle_get(const struct test_oracle *oracle, const void *key);
/* 1 when the key was there before. */
int test_oracle_put(struct test_oracle *oracle, const void *key,
                    const void *value);
int test_oracle_remove(struct test_oracle *oracle, const void *key);

static inline const unsigned char *
test_oracle_at(const struct test_oracle *oracle, size_t i)
{
    return oracle->records +
           i * ((size_t)oracle->key_bytes + oracle->value_bytes);
}

/* One record of a walk over a store, in order; 0, or 1 where it differs. */
struct test_oracle_walk {
    const struct test_oracle *oracle;
    size_t at;
};
int test_oracle_walk_step(void *walk, const void *key, const void *value);

/* Compares a store with the oracle by a full scan and by its count. Returns
 * NULL when they are the same, else what differs. */
static inline const char *test_oracle_check(const struct test_oracle *oracle,
                                            kvmeta *db)
{
    struct test_oracle_walk walk = {oracle, 0};

    if (kvmeta_count(db) != oracle->count) {
        return "count differs";
    }
    if (kvmeta_scan(db, NULL, NULL, test_oracle_walk_step, &walk) != 0) {
        return "a record differs";
    }
    return walk.at == oracle->count ? NULL : "records are missing";
}

#endif /* KVMETA_TEST_SUPPORT_H */
