/*
 * What the machine can do at best, measured in the same run as the engines:
 * a bare sync, an access to memory, a static search tree, a scan of an array,
 * and zstd over the records as rows and as columns.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE             /* fdatasync, MAP_ANONYMOUS, MADV_HUGEPAGE */

#include "bench.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zstd.h>

/* --------------------------------------------------------------------------
 * fdatasync
 * -------------------------------------------------------------------------- */

#define SYNC_FILE_BYTES ((size_t)64 << 20)
#define SYNC_BYTES 512u         /* what kvmeta writes for a small commit */

static void limit_fdatasync(const struct run *run)
{
    char *zeros = bench_alloc(SYNC_FILE_BYTES);
    char path[4096];
    uint64_t syncs = 0;
    double start;
    int file;

    (void)snprintf(path, sizeof path, "%s/zeros", run->dir);
    memset(zeros, 0, SYNC_FILE_BYTES);
    file = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (file < 0
        || write(file, zeros, SYNC_FILE_BYTES) != (ssize_t)SYNC_FILE_BYTES
        || fsync(file) != 0) {
        bench_die("%s: cannot be written", path);
    }
    start = bench_now();
    while (bench_now() - start < run->seconds) {
        off_t off = (off_t)(syncs * SYNC_BYTES % SYNC_FILE_BYTES);

        memset(zeros, (int)syncs | 1, SYNC_BYTES);
        if (pwrite(file, zeros, SYNC_BYTES, off) != (ssize_t)SYNC_BYTES
            || fdatasync(file) != 0) {
            bench_die("%s: cannot be synced", path);
        }
        syncs++;
    }
    bench_report("limit_fdatasync",
                 (double)syncs / (bench_now() - start) / 1e3);
    close(file);
    free(zeros);
}

/* --------------------------------------------------------------------------
 * Memory
 * -------------------------------------------------------------------------- */

#define LINE_WORDS 4u           /* 32 bytes, as much as a record of 16 + 16 */
#define CHAINS 16u
#define MISSES 2000000u

static void *pages_map(size_t bytes, bool huge)
{
    void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (pages == MAP_FAILED) bench_die("no memory");
    (void)madvise(pages, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return pages;
}

/* Makes the first word of each record the number of another one, so that they
 * all form one cycle without order. */
static void cycle_make(uint64_t *words, uint64_t n)
{
    uint64_t i;

    for (i = 0; i < n; i++) words[i * LINE_WORDS] = i;
    for (i = n - 1; i > 0; i--) {
        uint64_t j = bench_pick(i, i);
        uint64_t next = words[i * LINE_WORDS];

        words[i * LINE_WORDS] = words[j * LINE_WORDS];
        words[j * LINE_WORDS] = next;
    }
}

/* Nanoseconds for an access when `chains` of them are under way at a time. */
static double cycle_walk(const uint64_t *words, uint64_t n, unsigned chains)
{
    uint64_t at[CHAINS];
    uint64_t sum = 0;
    double start;
    unsigned i, k;

    for (k = 0; k < chains; k++) at[k] = bench_pick(k, n);
    start = bench_now();
    for (i = 0; i < MISSES / chains; i++) {
        for (k = 0; k < chains; k++) at[k] = words[at[k] * LINE_WORDS];
    }
    start = bench_now() - start;
    for (k = 0; k < chains; k++) sum += at[k];
    if (sum == UINT64_MAX) bench_die("no cycle");   /* keeps the loop */
    return start / (double)(MISSES / chains * chains) * 1e9;
}

static void limit_memory(const struct run *run, bool huge)
{
    size_t bytes = (size_t)run->records * LINE_WORDS * 8;
    uint64_t *words = pages_map(bytes, huge);

    cycle_make(words, run->records);
    bench_report(huge ? "limit_miss_huge" : "limit_miss",
                 cycle_walk(words, run->records, 1));
    bench_report(huge ? "limit_miss_huge_16" : "limit_miss_16",
                 cycle_walk(words, run->records, CHAINS));
    munmap(words, bytes);
}

/* --------------------------------------------------------------------------
 * A static search tree: nodes of 16 numbers, 17 children, no pointers
 * -------------------------------------------------------------------------- */

#define NODE 16u
#define FANOUT (NODE + 1)
#define LEVELS_MAX 12u

/* Level 0 holds the heads of all records in order; a node of a higher level
 * the smallest head below each of its children but the first. Heads are made
 * signed, as AVX2 compares them, and short nodes are filled with the largest
 * number. */
struct tree {
    unsigned levels;
    int64_t *level[LEVELS_MAX];
    uint64_t nodes[LEVELS_MAX];
    unsigned char *records;         /* in order of their keys */
    uint64_t count;
    size_t key_bytes;
    size_t record_bytes;
};

static int64_t head_of(const void *key)
{
    uint64_t word = __builtin_bswap64(bench_load(key)) ^ ((uint64_t)1 << 63);
    int64_t head = (int64_t)word;

    return head < INT64_MAX ? head : head - 1;  /* so that head + 1 exists */
}

static int64_t tree_head(const struct tree *tree, uint64_t record)
{
    if (record >= tree->count) return INT64_MAX;
    return head_of(tree->records + record * tree->record_bytes);
}

static void tree_make(struct tree *tree)
{
    uint64_t below = 1;             /* records in a subtree of a child */
    uint64_t nodes = (tree->count + NODE - 1) / NODE;
    uint64_t i;

    for (tree->levels = 0; ; tree->levels++) {
        unsigned level = tree->levels;
        int64_t *heads = pages_map(nodes * NODE * sizeof *heads, true);

        for (i = 0; i < nodes * NODE; i++) {
            uint64_t child = i / NODE * FANOUT + i % NODE + 1;

            heads[i] = tree_head(tree, level == 0 ? i : child * below);
        }
        tree->level[level] = heads;
        tree->nodes[level] = nodes;
        if (nodes == 1) break;
        below *= level == 0 ? NODE : FANOUT;
        nodes = (nodes + FANOUT - 1) / FANOUT;
    }
}

static void tree_free(struct tree *tree)
{
    unsigned i;

    for (i = 0; i <= tree->levels; i++) {
        munmap(tree->level[i], tree->nodes[i] * NODE * sizeof(int64_t));
    }
    munmap(tree->records, tree->count * tree->record_bytes);
}

/* Four numbers that are compared at once, where the processor can. */
typedef int64_t quad __attribute__((vector_size(32)));

/* How many numbers of the node are below `bound`: no branches. */
static inline unsigned node_rank(const int64_t *node, int64_t bound)
{
    const quad bounds = {bound, bound, bound, bound};
    quad sum = {0};
    quad four;
    unsigned i;

    for (i = 0; i < NODE; i += 4) {
        memcpy(&four, node + i, sizeof four);
        sum -= four < bounds;               /* true is -1 */
    }
    return (unsigned)(sum[0] + sum[1] + sum[2] + sum[3]);
}

static inline bool tree_take(const struct tree *tree, uint64_t record,
                             const void *key, uint64_t *word)
{
    const unsigned char *found = tree->records + record * tree->record_bytes;
    size_t at;

    if (record >= tree->count) return false;
    for (at = 0; at < tree->key_bytes; at += 8) {
        if (bench_load(found + at) != bench_load((const char *)key + at)) {
            return false;
        }
    }
    *word += bench_load(found + tree->record_bytes - 8);
    return true;
}

/* Looks up n <= BENCH_MANY keys level by level; adds the last words of their
 * values to *word and returns how many were found. */
static inline __attribute__((always_inline)) unsigned
tree_descend(const struct tree *tree, const unsigned char *keys, unsigned n,
             uint64_t *word)
{
    uint64_t node[BENCH_MANY];
    int64_t heads[BENCH_MANY];
    unsigned found = 0;
    unsigned level, i;

    for (i = 0; i < n; i++) heads[i] = head_of(keys + i * tree->key_bytes);
    for (i = 0; i < n; i++) node[i] = 0;
    for (level = tree->levels; level > 0; level--) {
        for (i = 0; i < n; i++) {
            const int64_t *at = tree->level[level] + node[i] * NODE;

            node[i] = node[i] * FANOUT + node_rank(at, heads[i] + 1);
            if (n == 1) continue;
            at = tree->level[level - 1] + node[i] * NODE;
            __builtin_prefetch(at);
            __builtin_prefetch(at + NODE / 2);
        }
    }
    for (i = 0; i < n; i++) {
        const int64_t *at = tree->level[0] + node[i] * NODE;

        node[i] = node[i] * NODE + node_rank(at, heads[i]);
        if (n == 1) continue;
        __builtin_prefetch(tree->records + node[i] * tree->record_bytes);
    }
    for (i = 0; i < n; i++) {
        found += tree_take(tree, node[i], keys + i * tree->key_bytes, word);
    }
    return found;
}

#if defined(__x86_64__) && defined(__GNUC__)
#  define FOR_THIS_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#  define FOR_THIS_PROCESSOR
#endif

FOR_THIS_PROCESSOR
static unsigned tree_get(const struct tree *tree, const unsigned char *key,
                         uint64_t *word)
{
    return tree_descend(tree, key, 1, word);
}

FOR_THIS_PROCESSOR
static unsigned tree_gets(const struct tree *tree, const unsigned char *keys,
                          unsigned n, uint64_t *word)
{
    return tree_descend(tree, keys, n, word);
}

#define SHEET 256u              /* keys that are made ahead, as for engines */

/* Gets SHEET keys, n at a time; `wait`: which of two keys comes next depends
 * on what the last get found. Adds up what was found. */
static unsigned tree_sheet(const struct tree *tree, const unsigned char *keys,
                           unsigned n, bool wait, uint64_t *word)
{
    unsigned found = 0;
    unsigned i;

    for (i = 0; i < SHEET; i += n) {
        unsigned at = wait ? 2 * i + (unsigned)(*word & 1) : i;
        const unsigned char *key = keys + at * tree->key_bytes;

        found += n > 1 ? tree_gets(tree, key, n, word)
                       : tree_get(tree, key, word);
    }
    return found;
}

/* Millions of gets a second. */
static double tree_measure(const struct tree *tree,
                           const struct source *source, double seconds,
                           unsigned n, bool wait)
{
    unsigned char keys[2 * SHEET * BENCH_KEY_BYTES_MAX];
    unsigned made = wait ? 2 * SHEET : SHEET;
    uint64_t sum = 0, expected = 0, found = 0, done = 0;
    double end = bench_now() + seconds;
    double spent = 0;
    double start;
    unsigned i;

    while (bench_now() < end) {
        for (i = 0; i < made; i++) {
            uint64_t number = bench_pick(2 * done + i, tree->count);

            source_key(source, number, keys + i * tree->key_bytes);
            expected += source_word(source, number);
        }
        start = bench_now();
        found += tree_sheet(tree, keys, n, wait, &sum);
        spent += bench_now() - start;
        done += SHEET;
    }
    if (found != done || (!wait && sum != expected)) {
        bench_die("static tree: wrong");
    }
    return (double)done / spent / 1e6;
}

static size_t sort_bytes;

static int record_compare(const void *a, const void *b)
{
    return memcmp(a, b, sort_bytes);
}

/* All records of the source, in the order of their keys. */
static void records_make(struct tree *tree, const struct source *like)
{
    struct source source = *like;
    uint64_t i;

    tree->key_bytes = source.key_bytes;
    tree->record_bytes = source.key_bytes + source.value_bytes;
    tree->records = pages_map(tree->count * tree->record_bytes, true);
    for (i = 0; i < tree->count; i++) {
        unsigned char *record = tree->records + i * tree->record_bytes;

        source_next(&source, record, record + source.key_bytes);
    }
    sort_bytes = source.key_bytes;
    qsort(tree->records, tree->count, tree->record_bytes, record_compare);
}

static void limit_tree(const struct run *run, const struct source *source,
                       struct tree *tree)
{
    tree_make(tree);
    bench_report("limit_tree",
                 tree_measure(tree, source, run->seconds, 1, false));
    bench_report("limit_tree_wait",
                 tree_measure(tree, source, run->seconds, 1, true));
    bench_report("limit_tree_many",
                 tree_measure(tree, source, run->seconds, BENCH_MANY, false));
}

static void limit_scan(const struct tree *tree)
{
    struct scan_sum sum = {0};
    double start = bench_now();
    uint64_t i;

    sum.key_bytes = tree->key_bytes;
    sum.value_bytes = tree->record_bytes - tree->key_bytes;
    for (i = 0; i < tree->count; i++) {
        const unsigned char *record = tree->records + i * tree->record_bytes;

        scan_add(&sum, record, record + tree->key_bytes);
    }
    start = bench_now() - start;
    if (sum.words == 1) bench_die("scan: wrong");   /* keeps the loop */
    bench_report("limit_scan", (double)tree->count / start / 1e6);
}

/* --------------------------------------------------------------------------
 * zstd
 * -------------------------------------------------------------------------- */

#define BLOCK_BYTES ((size_t)128 << 10)
#define ZSTD_LEVEL 3

/* Bits that a byte costs on average if its neighbours tell nothing. */
static double plane_bits(const unsigned char *plane, size_t n)
{
    size_t counts[256] = {0};
    double bits = 0;
    size_t i;

    for (i = 0; i < n; i++) counts[plane[i]]++;
    for (i = 0; i < 256; i++) {
        if (counts[i] == 0) continue;
        bits += (double)counts[i] * log2((double)n / (double)counts[i]);
    }
    return bits;
}

/* Each byte of the records becomes a plane: as it is, or as the difference to
 * the record before, whichever costs less. */
static void planes_make(const unsigned char *records, size_t n, size_t width,
                        unsigned char *planes)
{
    unsigned char *plain = bench_alloc(n);
    size_t byte, i;

    for (byte = 0; byte < width; byte++) {
        unsigned char *plane = planes + byte * n;
        unsigned char last = 0;

        for (i = 0; i < n; i++) {
            plain[i] = records[i * width + byte];
            plane[i] = (unsigned char)(plain[i] - last);
            last = plain[i];
        }
        if (plane_bits(plain, n) <= plane_bits(plane, n)) {
            memcpy(plane, plain, n);
        }
    }
    free(plain);
}

struct packed {
    uint64_t bytes;
    double decode_seconds;
};

static void pack_block(const unsigned char *raw, size_t bytes,
                       struct packed *packed)
{
    static unsigned char out[2 * BLOCK_BYTES];
    static unsigned char back[BLOCK_BYTES];
    size_t packed_bytes = ZSTD_compress(out, sizeof out, raw, bytes,
                                        ZSTD_LEVEL);
    double start;

    if (ZSTD_isError(packed_bytes)) bench_die("zstd: failed");
    packed->bytes += packed_bytes;
    start = bench_now();
    if (ZSTD_decompress(back, sizeof back, out, packed_bytes) != bytes
        || memcmp(back, raw, bytes) != 0) {
        bench_die("zstd: wrong");
    }
    packed->decode_seconds += bench_now() - start;
}

static void limit_zstd(const struct tree *tree, const char *rows_name,
                       const char *planes_name, const char *decode_name)
{
    struct packed rows = {0}, planes = {0};
    unsigned char *columns = bench_alloc(BLOCK_BYTES);
    size_t step = BLOCK_BYTES / tree->record_bytes;
    double count = (double)tree->count;
    uint64_t at;

    for (at = 0; at < tree->count; at += step) {
        size_t n = tree->count - at < step ? (size_t)(tree->count - at) : step;
        const unsigned char *block = tree->records + at * tree->record_bytes;

        pack_block(block, n * tree->record_bytes, &rows);
        planes_make(block, n, tree->record_bytes, columns);
        pack_block(columns, n * tree->record_bytes, &planes);
    }
    bench_report(rows_name, (double)rows.bytes / count);
    bench_report(planes_name, (double)planes.bytes / count);
    bench_report(decode_name, count / planes.decode_seconds / 1e6);
    free(columns);
}

/* -------------------------------------------------------------------------- */

static void limits_of_records(const struct run *run, enum source_kind kind)
{
    struct source source;
    struct tree tree = {0};

    source_init(&source, kind, run->key_bytes, run->value_bytes);
    tree.count = run->records;
    records_make(&tree, &source);
    if (kind == SOURCE_METADATA) {
        limit_zstd(&tree, "limit_meta_rows", "limit_meta_planes",
                   "limit_meta_decode");
        munmap(tree.records, tree.count * tree.record_bytes);
        return;
    }
    limit_tree(run, &source, &tree);
    limit_scan(&tree);
    if (run_wants(run, "limit_zstd_rows")) {
        limit_zstd(&tree, "limit_zstd_rows", "limit_zstd_planes",
                   "limit_zstd_decode");
    }
    tree_free(&tree);
}

void run_limits(const struct run *run)
{
    if (run_wants(run, "limit_fdatasync")) limit_fdatasync(run);
    if (run_wants(run, "limit_miss")) limit_memory(run, false);
    if (run_wants(run, "limit_miss_huge")) limit_memory(run, true);
    if (run_wants(run, "limit_tree")) limits_of_records(run, SOURCE_RANDOM);
    if (run_wants(run, "limit_meta_rows")
        && run->key_bytes == 16 && run->value_bytes == 16) {
        limits_of_records(run, SOURCE_METADATA);
    }
}
