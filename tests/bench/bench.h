/*
 * What the parts of the benchmark share: the records that are written, the
 * adapter that each engine stands behind, and the way figures are reported.
 *
 * Everything that a store hands back is checked against what was written: a
 * store that is fast and wrong fails the run.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BENCH_KEY_BYTES_MAX 64u
#define BENCH_VALUE_BYTES_MAX 64u
#define BENCH_BATCH 100u        /* records in a batch */
#define BENCH_MANY 32u          /* keys in a get_many */
#define BENCH_TXN 1000u         /* buffered puts that engines which need a
                                   transaction for each write put into one:
                                   about what kvmeta's log buffer holds */

/* --------------------------------------------------------------------------
 * Records: record i of a source is the same in every run and engine
 * -------------------------------------------------------------------------- */

enum source_kind {
    SOURCE_RANDOM,              /* keys and values without any pattern */
    SOURCE_ASCENDING,           /* the number first, then random bytes */
    SOURCE_METADATA             /* what an object map holds, see source.c */
};

struct source {
    enum source_kind kind;
    size_t key_bytes;           /* multiples of 8 */
    size_t value_bytes;
    uint64_t version;           /* values of different versions differ */
    uint64_t next;              /* number of the record that comes next */
    uint64_t offset;            /* running offset of SOURCE_METADATA */
};

void source_init(struct source *source, enum source_kind kind,
                 size_t key_bytes, size_t value_bytes);
/* The next record in order of its number. */
void source_next(struct source *source, void *key, void *value);
/* Key of record i, and the last eight bytes of its value. */
void source_key(const struct source *source, uint64_t i, void *key);
uint64_t source_word(const struct source *source, uint64_t i);
/* The whole value of record i; not for SOURCE_METADATA. */
void source_value(const struct source *source, uint64_t i, void *value);

/* A bijection without fixed pattern: a random number for every number. */
static inline uint64_t bench_mix(uint64_t x)
{
    x += UINT64_C(0x9e6c63d0876a9a4f);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    x = (x ^ (x >> 29)) * UINT64_C(0xa0761d6478bd642f);
    return x ^ (x >> 32);
}

/* The i-th of a series of random numbers below n, which is below 2^32. */
static inline uint64_t bench_pick(uint64_t i, uint64_t n)
{
    return ((bench_mix(~i) >> 32) * n) >> 32;
}

static inline uint64_t bench_load(const void *bytes)
{
    uint64_t word;

    memcpy(&word, bytes, sizeof word);
    return word;
}

static inline void bench_store(void *bytes, uint64_t word)
{
    memcpy(bytes, &word, sizeof word);
}

/* --------------------------------------------------------------------------
 * Scans: each engine walks with its own cursor and adds up what it sees
 * -------------------------------------------------------------------------- */

struct scan_sum {
    size_t key_bytes;
    size_t value_bytes;
    bool full;                  /* look at every byte and at the order */
    uint64_t records;
    uint64_t words;             /* sum of the last eight bytes of values */
    uint64_t hash;              /* of whole records, if full */
    uint64_t disorder;          /* records not above the one before, if full */
    unsigned char last[BENCH_KEY_BYTES_MAX];
};

uint64_t record_hash(const void *key, size_t key_bytes, const void *value,
                     size_t value_bytes);
void scan_add_full(struct scan_sum *sum, const void *key, const void *value);

static inline void scan_add(struct scan_sum *sum, const void *key,
                            const void *value)
{
    sum->records++;
    sum->words += bench_load((const char *)value + sum->value_bytes - 8);
    sum->words += bench_load(key) >> 63;    /* the key is read, too */
    if (sum->full) scan_add_full(sum, key, value);
}

/* --------------------------------------------------------------------------
 * Engines
 * -------------------------------------------------------------------------- */

enum engine_trait {
    ENGINE_MEMORY_ONLY = 1,     /* no files: nothing to sync or to reopen */
    ENGINE_LOADS_AT_OPEN = 2,   /* opening reads and checks every record */
    ENGINE_ONE_THREAD = 4       /* no reads beside a write */
};

struct engine_setup {
    const char *dir;            /* exists and is empty at the first open */
    size_t key_bytes;
    size_t value_bytes;
    uint64_t records;           /* how many there will be */
    bool durable;               /* a write returns when it is on disk */
};

/* An adapter. Nothing returns an error: what fails ends the process by way of
 * bench_die. A writer or reader belongs to one thread; NULL where a function
 * is optional. */
struct engine {
    const char *name;
    const char *title;
    unsigned traits;
    void *(*open)(const struct engine_setup *setup);
    void (*close)(void *store);
    void *(*writer_open)(void *store);
    void (*writer_close)(void *writer);     /* after it all puts are seen */
    void (*put)(void *writer, const void *key, const void *value);
    void (*put_batch)(void *writer, const void *keys, const void *values,
                      size_t n);
    /* held: all gets see one state; else each sees the latest. */
    void *(*reader_open)(void *store, bool held);
    void (*reader_close)(void *reader);
    bool (*get)(void *reader, const void *key, void *value);
    void (*get_many)(void *reader, const void *keys, size_t n, void *values,
                     unsigned char *found);                   /* optional */
    void (*scan)(void *reader, struct scan_sum *sum);
    void (*settle)(void *store);        /* optional: background work is done */
    void (*compact)(void *store);       /* optional: to the smallest form */
    uint64_t (*syncs)(void *store);     /* optional: of the log, so far */
};

extern const struct engine engine_kvmeta, engine_absl, engine_lmdb,
    engine_rocksdb, engine_leveldb, engine_sqlite, engine_wiredtiger;

/* --------------------------------------------------------------------------
 * Runs and figures
 * -------------------------------------------------------------------------- */

enum group {
    GROUP_RANDOM, GROUP_ASCENDING, GROUP_BATCHES, GROUP_LATENCY,
    GROUP_DURABLE, GROUP_METADATA, GROUP_LIMITS, GROUP_COUNT
};

struct workload {
    const char *name;
    enum group group;           /* what is measured in one process */
    const char *unit;
    const char *title;
};

extern const struct workload workloads[];
extern const size_t workload_count;

/* One engine, one group of workloads, in a process of its own. */
struct run {
    const struct engine *engine;    /* NULL for GROUP_LIMITS */
    enum group group;
    const unsigned char *wanted;    /* per workload: 1 or 0 */
    const char *dir;
    size_t key_bytes;
    size_t value_bytes;
    uint64_t records;
    double seconds;                 /* length of the durable workloads */
};

void run_group(const struct run *run);
void run_limits(const struct run *run);
bool run_wants(const struct run *run, const char *workload);

/* Sends a figure to the parent process. */
void bench_report(const char *workload, double value);
/* Prints the message with a newline to stderr and ends the process. */
#ifdef __GNUC__
__attribute__((format(printf, 1, 2), noreturn))
#endif
void bench_die(const char *format, ...);
double bench_now(void);             /* seconds, monotonic */
void *bench_alloc(size_t bytes);    /* never NULL */
uint64_t bench_dir_bytes(const char *dir);

#ifdef __cplusplus
}
#endif

#endif /* BENCH_H */
