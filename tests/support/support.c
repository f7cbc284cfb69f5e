/*
 * What the tests share; see support.h.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE                    /* MAP_ANONYMOUS */
#endif

#include "support.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* --------------------------------------------------------------------------
 * Arguments and replay lines
 * -------------------------------------------------------------------------- */

struct test_args test_args = {"test", 1, 1};

static int option_argc;
static char **option_argv;

void test_parse_args(int argc, char **argv)
{
    int i;

    test_args.program = argv[0];
    for (i = 1; i < argc; i += 2) {
        if (strncmp(argv[i], "--", 2) != 0 || i + 1 >= argc) {
            fprintf(stderr, "usage: %s [--seed N] [--scale N] "
                            "[--name value ...]\n", argv[0]);
            exit(2);
        }
    }
    option_argc = argc;
    option_argv = argv;
    test_args.seed = test_option_u64("seed", 1);
    test_args.scale = test_option_u64("scale", 1);
}

const char *test_option(const char *name)
{
    int i;

    for (i = 1; i + 1 < option_argc; i += 2) {
        if (strcmp(option_argv[i] + 2, name) == 0) {
            return option_argv[i + 1];
        }
    }
    return NULL;
}

uint64_t test_option_u64(const char *name, uint64_t otherwise)
{
    const char *text = test_option(name);

    return text != NULL ? strtoull(text, NULL, 0) : otherwise;
}

void test_replay(const char *format, ...)
{
    char text[1024];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("replay: %s --seed %llu --scale %llu %s\n", test_args.program,
           (unsigned long long)test_args.seed,
           (unsigned long long)test_args.scale, text);
    fflush(stdout);
}

/* --------------------------------------------------------------------------
 * Processes
 * -------------------------------------------------------------------------- */

#define WORKERS_MAX 64

void *test_shared(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return p;
}

unsigned test_workers(void)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t workers = test_option_u64("workers",
                                       cores < 1 ? 1 : (uint64_t)cores);

    return workers > WORKERS_MAX ? WORKERS_MAX : (unsigned)workers;
}

static int worker_failed(unsigned worker, int status)
{
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        return 0;
    }
    if (WIFSIGNALED(status)) {
        printf("worker %u was ended by signal %d\n", worker,
               WTERMSIG(status));
    } else {
        printf("worker %u returned %d\n", worker, WEXITSTATUS(status));
    }
    return 1;
}

int test_fork(unsigned workers,
              int (*run)(void *arg, unsigned worker, unsigned workers),
              void *arg)
{
    pid_t pids[WORKERS_MAX];
    int status, failed = 0;
    unsigned i;

    fflush(stdout);
    for (i = 0; i < workers; i++) {
        pids[i] = fork();
        if (pids[i] < 0) {
            perror("fork");
            exit(2);
        }
        if (pids[i] == 0) {
            status = run(arg, i, workers);
            fflush(stdout);
            _exit(status != 0);
        }
    }
    for (i = 0; i < workers; i++) {
        if (waitpid(pids[i], &status, 0) != pids[i]) {
            failed++;
        } else {
            failed += worker_failed(i, status);
        }
    }
    fflush(stdout);
    return failed;
}

/* --------------------------------------------------------------------------
 * Random numbers
 * -------------------------------------------------------------------------- */

void test_rng_bytes(struct test_rng *rng, void *buf, size_t bytes)
{
    unsigned char *p = buf;
    uint64_t word;
    size_t n;

    while (bytes > 0) {
        word = test_rng_u64(rng);
        n = bytes < sizeof word ? bytes : sizeof word;
        memcpy(p, &word, n);
        p += n;
        bytes -= n;
    }
}

/* --------------------------------------------------------------------------
 * Counting allocator
 * -------------------------------------------------------------------------- */

#define BLOCK_MAGIC 0x6b766d657461414cu

/* Stands before each block; 32 bytes keep the alignment that malloc gives. */
struct block {
    uint64_t magic;
    uint64_t bytes;
    uint64_t pad[2];
};

static void block_check(const struct block *block)
{
    if (block->magic != BLOCK_MAGIC) {
        fprintf(stderr, "free of a block that is not live\n");
        abort();
    }
}

static void account(struct test_alloc *alloc, int64_t blocks, int64_t bytes)
{
    int64_t live = atomic_fetch_add(&alloc->live_bytes, bytes) + bytes;
    int64_t peak = atomic_load(&alloc->peak_bytes);

    atomic_fetch_add(&alloc->live_blocks, blocks);
    while (live > peak &&
           !atomic_compare_exchange_weak(&alloc->peak_bytes, &peak, live)) {
        /* peak was reloaded by the exchange. */
    }
}

static int refuse(struct test_alloc *alloc, size_t bytes)
{
    uint64_t call = atomic_fetch_add(&alloc->calls, 1) + 1;
    int64_t live = atomic_load(&alloc->live_bytes);

    if (alloc->limit_bytes != 0 &&
        (uint64_t)live + bytes > alloc->limit_bytes) {
        return 1;
    }
    return alloc->fail_at != 0 && (call == alloc->fail_at ||
                                   (alloc->fail_ever && call > alloc->fail_at));
}

void *test_realloc(void *user, void *old, size_t bytes)
{
    struct test_alloc *alloc = user;
    struct block *block = NULL;
    int64_t old_bytes = 0;

    if (old != NULL) {
        block = (struct block *)old - 1;
        block_check(block);
        old_bytes = (int64_t)block->bytes;
    }
    if (bytes == 0) {
        if (block != NULL) {
            block->magic = 0;
            account(alloc, -1, -old_bytes);
            free(block);
        }
        return NULL;
    }
    if (refuse(alloc, bytes)) {
        atomic_fetch_add(&alloc->failures, 1);
        return NULL;
    }
    block = realloc(block, sizeof *block + bytes);
    if (block == NULL) {
        return NULL;
    }
    block->magic = BLOCK_MAGIC;
    block->bytes = bytes;
    account(alloc, old == NULL, (int64_t)bytes - old_bytes);
    return block + 1;
}

void test_log(void *user, int level, const char *message)
{
    struct test_alloc *alloc = user;

    if (level >= 0 && level < 4) {
        atomic_fetch_add(&alloc->logs[level], 1);
    }
    if (alloc->log_prints) {
        printf("log %d: %s\n", level, message);
    }
}

/* --------------------------------------------------------------------------
 * Oracle
 * -------------------------------------------------------------------------- */

static size_t record_bytes(const struct test_oracle *oracle)
{
    return (size_t)oracle->key_bytes + oracle->value_bytes;
}

static unsigned char *record_at(struct test_oracle *oracle, size_t i)
{
    return oracle->records + i * record_bytes(oracle);
}

static void reserve(struct test_oracle *oracle, size_t count)
{
    if (count <= oracle->capacity) {
        return;
    }
    oracle->capacity = count < 16 ? 16 : count * 2;
    oracle->records = realloc(oracle->records,
                              oracle->capacity * record_bytes(oracle));
    if (oracle->records == NULL) {
        abort();
    }
}

void test_oracle_init(struct test_oracle *oracle, uint32_t key_bytes,
                      uint32_t value_bytes)
{
    memset(oracle, 0, sizeof *oracle);
    oracle->key_bytes = key_bytes;
    oracle->value_bytes = value_bytes;
}

void test_oracle_free(struct test_oracle *oracle)
{
    free(oracle->records);
    oracle->records = NULL;
    oracle->count = 0;
    oracle->capacity = 0;
}

void test_oracle_copy(struct test_oracle *to, const struct test_oracle *from)
{
    if (to->key_bytes != from->key_bytes ||
        to->value_bytes != from->value_bytes) {
        test_oracle_free(to);
        test_oracle_init(to, from->key_bytes, from->value_bytes);
    }
    reserve(to, from->count);
    to->count = from->count;
    if (from->count > 0) {
        memcpy(to->records, from->records, from->count * record_bytes(from));
    }
}

int test_oracle_equal(const struct test_oracle *a, const struct test_oracle *b)
{
    return a->count == b->count &&
           (a->count == 0 || memcmp(a->records, b->records,
                                    a->count * record_bytes(a)) == 0);
}

size_t test_oracle_find(const struct test_oracle *oracle, const void *key)
{
    size_t low = 0, high = oracle->count, middle;

    while (low < high) {
        middle = low + (high - low) / 2;
        if (memcmp(test_oracle_at(oracle, middle), key,
                   oracle->key_bytes) < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static int holds(const struct test_oracle *oracle, size_t i, const void *key)
{
    return i < oracle->count && memcmp(test_oracle_at(oracle, i), key,
                                       oracle->key_bytes) == 0;
}

const void *test_oracle_get(const struct test_oracle *oracle, const void *key)
{
    size_t i = test_oracle_find(oracle, key);

    if (!holds(oracle, i, key)) {
        return NULL;
    }
    return test_oracle_at(oracle, i) + oracle->key_bytes;
}

int test_oracle_put(struct test_oracle *oracle, const void *key,
                    const void *value)
{
    size_t i = test_oracle_find(oracle, key);
    int there = holds(oracle, i, key);

    if (!there) {
        reserve(oracle, oracle->count + 1);
        memmove(record_at(oracle, i + 1), record_at(oracle, i),
                (oracle->count - i) * record_bytes(oracle));
        memcpy(record_at(oracle, i), key, oracle->key_bytes);
        oracle->count++;
    }
    if (oracle->value_bytes > 0) {
        memcpy(record_at(oracle, i) + oracle->key_bytes, value,
               oracle->value_bytes);
    }
    return there;
}

int test_oracle_remove(struct test_oracle *oracle, const void *key)
{
    size_t i = test_oracle_find(oracle, key);

    if (!holds(oracle, i, key)) {
        return 0;
    }
    memmove(record_at(oracle, i), record_at(oracle, i + 1),
            (oracle->count - i - 1) * record_bytes(oracle));
    oracle->count--;
    return 1;
}

int test_oracle_walk_step(void *user, const void *key, const void *value)
{
    struct test_oracle_walk *walk = user;
    const struct test_oracle *oracle = walk->oracle;
    const unsigned char *record;

    if (walk->at >= oracle->count) {
        return 1;
    }
    record = test_oracle_at(oracle, walk->at++);
    if (memcmp(record, key, oracle->key_bytes) != 0) {
        return 1;
    }
    return oracle->value_bytes > 0 &&
           memcmp(record + oracle->key_bytes, value,
                  oracle->value_bytes) != 0;
}
