/*
 * What is measured of an engine. Workloads that need the same store form a
 * group; a group runs in a process of its own, so that neither memory nor
 * threads of one engine are in the way of another.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE             /* FTW_PHYS, malloc_trim */

#include "bench.h"
#include "histogram.h"

#include <fcntl.h>
#include <ftw.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define READS 2000000u          /* reads of a workload, unless time is up */
#define TURNS 2u                /* of each kind of gets */
#define SHEET 256u              /* operations between two looks at the clock;
                                   their records stay in the cache */
#define THREADS_MAX 16u

const struct workload workloads[] = {
    {"put_random", GROUP_RANDOM, "M/s", "put, random, buffered"},
    {"resident_fill", GROUP_RANDOM, "B/record", "memory after random fill"},
    {"write_amp", GROUP_RANDOM, "x", "write amplification, random fill"},
    {"get_hit_held", GROUP_RANDOM, "M/s", "get, hit, held snapshot"},
    {"get_miss_held", GROUP_RANDOM, "M/s", "get, miss, held snapshot"},
    {"get_hit", GROUP_RANDOM, "M/s", "get, hit"},
    {"get_miss", GROUP_RANDOM, "M/s", "get, miss"},
    {"get_many", GROUP_RANDOM, "M/s", "get_many, 32 keys"},
    {"scan", GROUP_RANDOM, "M/s", "ordered scan by cursor"},
    {"get_2_held", GROUP_RANDOM, "M/s", "get, 2 threads, held snapshot"},
    {"get_2", GROUP_RANDOM, "M/s", "get, 2 threads"},
    {"get_beside_put", GROUP_RANDOM, "M/s", "get, beside a writing thread"},
    {"put_beside_get", GROUP_RANDOM, "M/s", "put, beside a reading thread"},
    {"overwrite", GROUP_RANDOM, "M/s", "overwrite, random, buffered"},
    {"disk_settled", GROUP_RANDOM, "B/record", "disk, settled after overwrite"},
    {"reopen_warm", GROUP_RANDOM, "M records/s", "reopen and see all, warm"},
    {"resident_reopen", GROUP_RANDOM, "B/record", "memory after reopen"},
    {"reopen_cold", GROUP_RANDOM, "M records/s", "reopen and see all, cold"},
    {"compact_peak", GROUP_RANDOM, "MiB", "memory that compaction adds"},
    {"disk_compacted", GROUP_RANDOM, "B/record", "disk, compacted"},
    {"put_ascending", GROUP_ASCENDING, "M/s", "put, ascending, buffered"},
    {"put_batches", GROUP_BATCHES, "M/s", "batches of 100, random, buffered"},
    {"put_p9999", GROUP_LATENCY, "ms", "put during random fill, p99.99"},
    {"put_max", GROUP_LATENCY, "ms", "put during random fill, worst"},
    {"durable_put_1", GROUP_DURABLE, "k/s", "durable put, 1 thread"},
    {"durable_put_16", GROUP_DURABLE, "k/s", "durable put, 16 threads"},
    {"puts_per_sync", GROUP_DURABLE, "puts", "durable put, 16 threads, a sync"},
    {"durable_batches", GROUP_DURABLE, "k/s", "durable batches of 100"},
    {"put_metadata", GROUP_METADATA, "M/s", "put, metadata-like, buffered"},
    {"get_metadata", GROUP_METADATA, "M/s", "get, metadata-like, held"},
    {"disk_metadata", GROUP_METADATA, "B/record",
     "disk, metadata-like, compacted"},
    {"limit_fdatasync", GROUP_LIMITS, "k/s", "fdatasync, pre-zeroed file"},
    {"limit_miss", GROUP_LIMITS, "ns", "memory access, dependent"},
    {"limit_miss_16", GROUP_LIMITS, "ns", "memory access, 16 overlapped"},
    {"limit_miss_huge", GROUP_LIMITS, "ns", "same, huge pages, dependent"},
    {"limit_miss_huge_16", GROUP_LIMITS, "ns", "same, huge pages, 16"},
    {"limit_tree", GROUP_LIMITS, "M/s", "static 16-ary tree, get"},
    {"limit_tree_wait", GROUP_LIMITS, "M/s", "same, each waits for the last"},
    {"limit_tree_many", GROUP_LIMITS, "M/s", "same, 32 overlapped"},
    {"limit_scan", GROUP_LIMITS, "M/s", "scan of a plain array"},
    {"limit_zstd_rows", GROUP_LIMITS, "B/record", "rows + zstd-3, random"},
    {"limit_zstd_planes", GROUP_LIMITS, "B/record", "planes + zstd-3, random"},
    {"limit_zstd_decode", GROUP_LIMITS, "M records/s", "same, decoding"},
    {"limit_meta_rows", GROUP_LIMITS, "B/record", "rows + zstd-3, metadata"},
    {"limit_meta_planes", GROUP_LIMITS, "B/record",
     "planes + zstd-3, metadata"},
    {"limit_meta_decode", GROUP_LIMITS, "M records/s", "same, decoding"}
};

const size_t workload_count = sizeof workloads / sizeof workloads[0];

/* A store under test. */
struct bed {
    const struct run *run;
    const struct engine *engine;
    struct engine_setup setup;
    void *store;
    uint64_t resident;          /* of the process before the store was opened */
};

bool run_wants(const struct run *run, const char *workload)
{
    size_t i;

    for (i = 0; i < workload_count; i++) {
        if (strcmp(workloads[i].name, workload) == 0) {
            return run->wanted[i] != 0;
        }
    }
    bench_die("no such workload: %s", workload);
}

static bool run_wants_any(const struct run *run, const char *const *names)
{
    for (; *names != NULL; names++) {
        if (run_wants(run, *names)) return true;
    }
    return false;
}

/* --------------------------------------------------------------------------
 * What the operating system says of this process and of the disk
 * -------------------------------------------------------------------------- */

/* The number that follows `label` in a file of /proc. */
static uint64_t proc_number(const char *path, const char *label)
{
    unsigned long long number = 0;
    char line[256];
    FILE *file = fopen(path, "r");

    if (file == NULL) bench_die("%s: cannot be read", path);
    while (fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, label, strlen(label)) != 0) continue;
        (void)sscanf(line + strlen(label), "%llu", &number);
    }
    fclose(file);
    return number;
}

static uint64_t resident_bytes(void)
{
    return proc_number("/proc/self/status", "VmRSS:") * 1024;
}

static uint64_t resident_peak_bytes(void)
{
    return proc_number("/proc/self/status", "VmHWM:") * 1024;
}

static void resident_peak_reset(void)
{
    FILE *file = fopen("/proc/self/clear_refs", "w");

    if (file == NULL) return;
    (void)fputs("5", file);
    fclose(file);
}

/* Bytes handed to write calls or, where an engine writes through a map, of
 * the pages that were made dirty. */
static uint64_t written_bytes(void)
{
    uint64_t calls = proc_number("/proc/self/io", "wchar:");
    uint64_t pages = proc_number("/proc/self/io", "write_bytes:");

    return calls > pages ? calls : pages;
}

static uint64_t dir_bytes;      /* nftw has no argument for its callback */

static int add_bytes(const char *path, const struct stat *stat, int type,
                     struct FTW *ftw)
{
    (void)path;
    (void)ftw;
    if (type == FTW_F) dir_bytes += (uint64_t)stat->st_blocks * 512;
    return 0;
}

uint64_t bench_dir_bytes(const char *dir)
{
    dir_bytes = 0;
    (void)nftw(dir, add_bytes, 16, FTW_PHYS);
    return dir_bytes;
}

static int drop_file(const char *path, const struct stat *stat, int type,
                     struct FTW *ftw)
{
    int file;

    (void)stat;
    (void)ftw;
    if (type != FTW_F) return 0;
    file = open(path, O_RDONLY);
    if (file < 0) return 0;
    (void)fsync(file);
    (void)posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    close(file);
    return 0;
}

static void sleep_ms(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};

    nanosleep(&time, NULL);
}

/* --------------------------------------------------------------------------
 * A store's life
 * -------------------------------------------------------------------------- */

static void bed_open(struct bed *bed)
{
    malloc_trim(0);
    bed->resident = resident_bytes();
    bed->store = bed->engine->open(&bed->setup);
}

static void bed_init(struct bed *bed, const struct run *run, bool durable)
{
    memset(bed, 0, sizeof *bed);
    bed->run = run;
    bed->engine = run->engine;
    bed->setup.dir = run->dir;
    bed->setup.key_bytes = run->key_bytes;
    bed->setup.value_bytes = run->value_bytes;
    bed->setup.records = run->records;
    bed->setup.durable = durable;
    bed_open(bed);
}

static void bed_close(struct bed *bed)
{
    bed->engine->close(bed->store);
    bed->store = NULL;
}

/* Waits for the background work; where an engine cannot tell, until its files
 * have been the same for a second. */
static void bed_settle(struct bed *bed)
{
    uint64_t before;
    uint64_t now = 0;

    if (bed->engine->traits & ENGINE_MEMORY_ONLY) return;
    if (bed->engine->settle != NULL) {
        bed->engine->settle(bed->store);
        return;
    }
    do {
        before = now;
        sleep_ms(1000);
        now = bench_dir_bytes(bed->setup.dir);
    } while (now != before);
}

static void bed_scan(struct bed *bed, struct scan_sum *sum, bool full)
{
    void *reader = bed->engine->reader_open(bed->store, true);

    memset(sum, 0, sizeof *sum);
    sum->key_bytes = bed->setup.key_bytes;
    sum->value_bytes = bed->setup.value_bytes;
    sum->full = full;
    bed->engine->scan(reader, sum);
    bed->engine->reader_close(reader);
}

static void check_sum(const struct bed *bed, const struct scan_sum *sum,
                      uint64_t records, uint64_t hash)
{
    if (sum->records == records && sum->hash == hash && sum->disorder == 0) {
        return;
    }
    bench_die("%s: WRONG DATA: %llu records of %llu, %llu out of order, "
              "hash %016llx of %016llx", bed->engine->name,
              (unsigned long long)sum->records, (unsigned long long)records,
              (unsigned long long)sum->disorder,
              (unsigned long long)sum->hash, (unsigned long long)hash);
}

/* Reads every byte of the store and compares with the first n records. */
static void bed_verify(struct bed *bed, struct source source, uint64_t n)
{
    unsigned char key[BENCH_KEY_BYTES_MAX];
    unsigned char value[BENCH_VALUE_BYTES_MAX];
    struct scan_sum sum;
    uint64_t hash = 0;
    uint64_t i;

    source.next = 0;
    source.offset = 0;
    for (i = 0; i < n; i++) {
        source_next(&source, key, value);
        hash += record_hash(key, source.key_bytes, value, source.value_bytes);
    }
    bed_scan(bed, &sum, true);
    check_sum(bed, &sum, n, hash);
}

static void report_rate(const char *workload, uint64_t count, double seconds)
{
    bench_report(workload, (double)count / seconds / 1e6);
}

static void report_per_record(const struct bed *bed, const char *workload,
                              uint64_t bytes)
{
    bench_report(workload, (double)bytes / (double)bed->run->records);
}

static void report_resident(const struct bed *bed, const char *workload)
{
    uint64_t now = resident_bytes();

    report_per_record(bed, workload,
                      now > bed->resident ? now - bed->resident : 0);
}

/* --------------------------------------------------------------------------
 * Reads
 * -------------------------------------------------------------------------- */

/* Records that are made ahead of the measured loop and checked behind it. */
struct sheet {
    unsigned char keys[SHEET * BENCH_KEY_BYTES_MAX];
    unsigned char values[SHEET * BENCH_VALUE_BYTES_MAX];
    unsigned char found[SHEET];
};

/* One reading thread. */
struct job {
    const struct bed *bed;
    struct source source;
    bool held;
    bool miss;
    bool many;
    unsigned thread;
    uint64_t first;             /* of the series of numbers that it reads */
    uint64_t done;
    double seconds;             /* spent in the engine */
};

static void job_check(const struct job *job, bool found,
                      const unsigned char *value, uint64_t number)
{
    const char *name = job->bed->engine->name;
    struct source source = job->source;
    uint64_t word;

    if (found == job->miss) {
        bench_die("%s: WRONG DATA: record %llu %s", name,
                  (unsigned long long)number, found ? "found" : "not found");
    }
    if (!found) return;
    word = bench_load(value + source.value_bytes - 8);
    if (word == source_word(&source, number)) return;
    source.version = 1;         /* a writer alternates versions 0 and 1 */
    if (word == source_word(&source, number)) return;
    bench_die("%s: WRONG DATA: value of record %llu", name,
              (unsigned long long)number);
}

static uint64_t job_number(const struct job *job, uint64_t i)
{
    uint64_t n = job->bed->run->records;
    uint64_t series = (uint64_t)(job->thread + 1) << 40;

    return bench_pick(series + i, n) + (job->miss ? n : 0);
}

static void job_get(const struct engine *engine, void *reader,
                    const struct job *job, struct sheet *sheet)
{
    size_t i;

    for (i = 0; i < SHEET; i++) {
        sheet->found[i] = engine->get(reader,
                                      sheet->keys + i * job->source.key_bytes,
                                      sheet->values
                                      + i * job->source.value_bytes);
    }
}

static void job_get_many(const struct engine *engine, void *reader,
                         const struct job *job, struct sheet *sheet)
{
    size_t i;

    for (i = 0; i < SHEET; i += BENCH_MANY) {
        engine->get_many(reader, sheet->keys + i * job->source.key_bytes,
                         BENCH_MANY,
                         sheet->values + i * job->source.value_bytes,
                         sheet->found + i);
    }
}

/* Makes keys, gets them (which alone is timed), and checks what came. */
static void job_step(struct job *job, void *reader, struct sheet *sheet)
{
    const struct engine *engine = job->bed->engine;
    const struct source *source = &job->source;
    uint64_t numbers[SHEET];
    double start;
    size_t i;

    for (i = 0; i < SHEET; i++) {
        numbers[i] = job_number(job, job->first + job->done + i);
        source_key(source, numbers[i], sheet->keys + i * source->key_bytes);
    }
    start = bench_now();
    if (job->many && engine->get_many != NULL) {
        job_get_many(engine, reader, job, sheet);
    } else {
        job_get(engine, reader, job, sheet);
    }
    job->seconds += bench_now() - start;
    for (i = 0; i < SHEET; i++) {
        job_check(job, sheet->found[i] != 0,
                  sheet->values + i * source->value_bytes, numbers[i]);
    }
    job->done += SHEET;
}

static void *job_run(void *at)
{
    struct job *job = at;
    const struct run *run = job->bed->run;
    struct sheet *sheet = bench_alloc(sizeof *sheet);
    void *reader = job->bed->engine->reader_open(job->bed->store, job->held);
    double end = bench_now() + run->seconds;

    while (job->done < READS && bench_now() < end) {
        job_step(job, reader, sheet);
    }
    job->bed->engine->reader_close(reader);
    free(sheet);
    return NULL;
}

/* Millions of gets a second of all threads together. */
static double jobs_run(struct job *like, unsigned threads)
{
    struct job jobs[THREADS_MAX];
    pthread_t ids[THREADS_MAX];
    double rate = 0;
    unsigned i;

    for (i = 0; i < threads; i++) {
        jobs[i] = *like;
        jobs[i].thread = i;
        if (pthread_create(&ids[i], NULL, job_run, &jobs[i]) != 0) {
            bench_die("no thread");
        }
    }
    for (i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        rate += (double)jobs[i].done / jobs[i].seconds / 1e6;
    }
    return rate;
}

static void measure_scan(struct bed *bed, const struct source *source)
{
    uint64_t n = bed->run->records;
    uint64_t expected = 0;
    uint64_t done = 0;
    struct scan_sum sum;
    double start;
    uint64_t i;

    if (!run_wants(bed->run, "scan")) return;
    for (i = 0; i < n; i++) {
        unsigned char key[BENCH_KEY_BYTES_MAX];

        source_key(source, i, key);
        expected += source_word(source, i) + (bench_load(key) >> 63);
    }
    start = bench_now();
    while (done < READS && bench_now() - start < bed->run->seconds) {
        bed_scan(bed, &sum, false);
        if (sum.records != n || sum.words != expected) {
            bench_die("%s: WRONG DATA: scan", bed->engine->name);
        }
        done += n;
    }
    report_rate("scan", done, bench_now() - start);
}

/* --------------------------------------------------------------------------
 * Writes
 * -------------------------------------------------------------------------- */

static double put_sheet(struct bed *bed, void *writer,
                        const struct sheet *sheet, size_t n)
{
    double start = bench_now();
    size_t i;

    for (i = 0; i < n; i++) {
        bed->engine->put(writer, sheet->keys + i * bed->setup.key_bytes,
                         sheet->values + i * bed->setup.value_bytes);
    }
    return bench_now() - start;
}

/* Writes all records of the source; returns the seconds that this took. */
static double fill(struct bed *bed, void *writer, struct source *source)
{
    struct sheet *sheet = bench_alloc(sizeof *sheet);
    double seconds = 0;
    uint64_t done = 0;

    while (done < bed->run->records) {
        uint64_t left = bed->run->records - done;
        size_t n = left < SHEET ? (size_t)left : SHEET;
        size_t i;

        for (i = 0; i < n; i++) {
            source_next(source, sheet->keys + i * source->key_bytes,
                        sheet->values + i * source->value_bytes);
        }
        seconds += put_sheet(bed, writer, sheet, n);
        done += n;
    }
    free(sheet);
    return seconds;
}

/* Numbers of an overwrite: each of 0..n-1 once, in an order that is not that
 * of the fill. */
static uint64_t shuffled(uint64_t i, uint64_t n)
{
    const uint64_t prime = 2147483647;      /* no factor of n */

    return i * prime % n;
}

static double overwrite(struct bed *bed, void *writer,
                        const struct source *source, uint64_t from,
                        uint64_t to)
{
    struct sheet *sheet = bench_alloc(sizeof *sheet);
    double seconds = 0;

    while (from < to) {
        size_t n = to - from < SHEET ? (size_t)(to - from) : SHEET;
        size_t i;

        for (i = 0; i < n; i++) {
            uint64_t number = shuffled(from + i, bed->run->records);

            source_key(source, number, sheet->keys + i * source->key_bytes);
            source_value(source, number,
                         sheet->values + i * source->value_bytes);
        }
        seconds += put_sheet(bed, writer, sheet, n);
        from += n;
    }
    free(sheet);
    return seconds;
}

/* The writing thread beside a reading one: versions 1, 0, 1 ... of all. */
struct scribble {
    struct bed *bed;
    struct source source;
    atomic_bool stop;
    uint64_t done;
    double seconds;
};

static void *scribble_run(void *at)
{
    struct scribble *scribble = at;
    struct bed *bed = scribble->bed;
    void *writer = bed->engine->writer_open(bed->store);
    uint64_t n = bed->run->records;

    while (!atomic_load(&scribble->stop)) {
        uint64_t from = scribble->done % n;
        uint64_t to = from + 1000 < n ? from + 1000 : n;

        scribble->source.version = (scribble->done / n + 1) % 2;
        (void)overwrite(bed, writer, &scribble->source, from, to);
        scribble->done += to - from;
    }
    bed->engine->writer_close(writer);
    return NULL;
}

static bool kind_wanted(const struct bed *bed, const char *workload,
                        bool beside)
{
    if (!beside) return run_wants(bed->run, workload);
    return !(bed->engine->traits & ENGINE_ONE_THREAD)
           && (run_wants(bed->run, workload)
               || run_wants(bed->run, "put_beside_get"));
}

static double beside_run(struct bed *bed, struct job *job,
                         struct scribble *scribble)
{
    double start = bench_now();
    double rate;
    pthread_t id;

    atomic_store(&scribble->stop, false);
    if (pthread_create(&id, NULL, scribble_run, scribble) != 0) {
        bench_die("no thread");
    }
    rate = jobs_run(job, 1);
    atomic_store(&scribble->stop, true);
    pthread_join(id, NULL);
    scribble->seconds += bench_now() - start;
    bed_settle(bed);
    return rate;
}

/* The kinds of gets take turns: their rates are compared with each other, and
 * a machine that others use, too, is not as fast in one second as in the
 * next. The mean of the turns is reported. The kind that has a writer comes
 * last, and the store is settled behind it. */
static void measure_gets(struct bed *bed, const struct source *source)
{
    static const struct {
        const char *workload;
        bool held, miss, many, beside;
        unsigned threads;
    } kinds[] = {
        {"get_hit_held", true, false, false, false, 1},
        {"get_hit", false, false, false, false, 1},
        {"get_miss_held", true, true, false, false, 1},
        {"get_miss", false, true, false, false, 1},
        {"get_many", true, false, true, false, 1},
        {"get_2_held", true, false, false, false, 2},
        {"get_2", false, false, false, false, 2},
        {"get_beside_put", false, false, false, true, 1}
    };
    enum { KINDS = sizeof kinds / sizeof kinds[0] };
    struct scribble scribble = {0};
    double rates[KINDS] = {0};
    unsigned turn;
    size_t i;

    scribble.bed = bed;
    scribble.source = *source;
    for (turn = 0; turn < TURNS; turn++) {
        for (i = 0; i < KINDS; i++) {
            struct job job = {0};

            if (!kind_wanted(bed, kinds[i].workload, kinds[i].beside)) continue;
            job.bed = bed;
            job.source = *source;
            job.held = kinds[i].held;
            job.miss = kinds[i].miss;
            job.many = kinds[i].many;
            job.first = turn * READS;
            rates[i] += kinds[i].beside ? beside_run(bed, &job, &scribble)
                                        : jobs_run(&job, kinds[i].threads);
        }
    }
    for (i = 0; i < KINDS; i++) {
        if (rates[i] > 0) bench_report(kinds[i].workload, rates[i] / TURNS);
    }
    if (scribble.done > 0) {
        report_rate("put_beside_get", scribble.done, scribble.seconds);
    }
}

/* --------------------------------------------------------------------------
 * Reopening and compaction
 * -------------------------------------------------------------------------- */

static void reopen(struct bed *bed, const char *workload)
{
    struct scan_sum sum;
    double start;

    bed_close(bed);
    if (strcmp(workload, "reopen_cold") == 0) {
        (void)nftw(bed->setup.dir, drop_file, 16, FTW_PHYS);
    }
    start = bench_now();
    bed_open(bed);
    if (!(bed->engine->traits & ENGINE_LOADS_AT_OPEN)) {
        bed_scan(bed, &sum, false);
    }
    report_rate(workload, bed->run->records, bench_now() - start);
}

static void measure_reopen(struct bed *bed, const struct source *source)
{
    static const char *const warm[] = {"reopen_warm", "resident_reopen", NULL};

    if (run_wants_any(bed->run, warm)) {
        reopen(bed, "reopen_warm");
        report_resident(bed, "resident_reopen");
        bed_verify(bed, *source, bed->run->records);
    }
    if (run_wants(bed->run, "reopen_cold")) {
        reopen(bed, "reopen_cold");
        bed_verify(bed, *source, bed->run->records);
    }
}

static void measure_compact(struct bed *bed, const struct source *source)
{
    static const char *const names[] = {
        "compact_peak", "disk_compacted", NULL
    };
    uint64_t before;
    uint64_t peak;
    void *writer;

    if (!run_wants_any(bed->run, names) || bed->engine->compact == NULL) {
        return;
    }
    /* A store that has settled may have nothing left to compact. */
    writer = bed->engine->writer_open(bed->store);
    (void)overwrite(bed, writer, source, 0, bed->run->records / 10);
    bed->engine->writer_close(writer);
    bed_settle(bed);
    resident_peak_reset();
    before = resident_bytes();
    bed->engine->compact(bed->store);
    peak = resident_peak_bytes();
    bench_report("compact_peak",
                 (double)(peak > before ? peak - before : 0) / 1048576);
    report_per_record(bed, "disk_compacted", bench_dir_bytes(bed->setup.dir));
    bed_verify(bed, *source, bed->run->records);
}

/* --------------------------------------------------------------------------
 * Groups
 * -------------------------------------------------------------------------- */

static void random_fill(struct bed *bed, struct source *source)
{
    void *writer = bed->engine->writer_open(bed->store);
    uint64_t written = written_bytes();
    uint64_t user = bed->run->records
                    * (bed->setup.key_bytes + bed->setup.value_bytes);

    report_rate("put_random", bed->run->records, fill(bed, writer, source));
    bed_settle(bed);
    report_resident(bed, "resident_fill");
    if (!(bed->engine->traits & ENGINE_MEMORY_ONLY)) {
        bench_report("write_amp",
                     (double)(written_bytes() - written) / (double)user);
    }
    bed->engine->writer_close(writer);
    bed_verify(bed, *source, bed->run->records);
}

static void random_overwrite(struct bed *bed, struct source *source)
{
    void *writer = bed->engine->writer_open(bed->store);
    uint64_t n = bed->run->records;

    source->version = 2;
    report_rate("overwrite", n, overwrite(bed, writer, source, 0, n));
    bed->engine->writer_close(writer);
    bed_settle(bed);
    bed_verify(bed, *source, bed->run->records);
}

static void run_random(const struct run *run)
{
    static const char *const later[] = {
        "overwrite", "disk_settled", "reopen_warm", "reopen_cold",
        "resident_reopen", "compact_peak", "disk_compacted", NULL
    };
    struct source source;
    struct bed bed;

    bed_init(&bed, run, false);
    source_init(&source, SOURCE_RANDOM, run->key_bytes, run->value_bytes);
    random_fill(&bed, &source);
    measure_scan(&bed, &source);
    measure_gets(&bed, &source);
    if (run_wants_any(run, later)) random_overwrite(&bed, &source);
    if (!(bed.engine->traits & ENGINE_MEMORY_ONLY)) {
        report_per_record(&bed, "disk_settled", bench_dir_bytes(run->dir));
        measure_reopen(&bed, &source);
        measure_compact(&bed, &source);
    }
    bed_close(&bed);
}

static void run_ascending(const struct run *run)
{
    struct source source;
    struct bed bed;
    void *writer;

    bed_init(&bed, run, false);
    source_init(&source, SOURCE_ASCENDING, run->key_bytes, run->value_bytes);
    writer = bed.engine->writer_open(bed.store);
    report_rate("put_ascending", run->records, fill(&bed, writer, &source));
    bed.engine->writer_close(writer);
    bed_verify(&bed, source, run->records);
    bed_close(&bed);
}

static void run_batches(const struct run *run)
{
    unsigned char keys[BENCH_BATCH * BENCH_KEY_BYTES_MAX];
    unsigned char values[BENCH_BATCH * BENCH_VALUE_BYTES_MAX];
    struct source source;
    struct bed bed;
    void *writer;
    double seconds = 0;
    double start;
    uint64_t i;
    size_t k;

    bed_init(&bed, run, false);
    source_init(&source, SOURCE_RANDOM, run->key_bytes, run->value_bytes);
    writer = bed.engine->writer_open(bed.store);
    for (i = 0; i < run->records; i += BENCH_BATCH) {
        for (k = 0; k < BENCH_BATCH; k++) {
            source_next(&source, keys + k * run->key_bytes,
                        values + k * run->value_bytes);
        }
        start = bench_now();
        bed.engine->put_batch(writer, keys, values, BENCH_BATCH);
        seconds += bench_now() - start;
    }
    report_rate("put_batches", run->records, seconds);
    bed.engine->writer_close(writer);
    bed_verify(&bed, source, run->records);
    bed_close(&bed);
}

static void run_latency(const struct run *run)
{
    struct histogram *histogram = bench_alloc(sizeof *histogram);
    unsigned char key[BENCH_KEY_BYTES_MAX];
    unsigned char value[BENCH_VALUE_BYTES_MAX];
    struct source source;
    struct bed bed;
    void *writer;
    uint64_t i;

    memset(histogram, 0, sizeof *histogram);
    bed_init(&bed, run, false);
    source_init(&source, SOURCE_RANDOM, run->key_bytes, run->value_bytes);
    writer = bed.engine->writer_open(bed.store);
    for (i = 0; i < run->records; i++) {
        double start;

        source_next(&source, key, value);
        start = bench_now();
        bed.engine->put(writer, key, value);
        histogram_add(histogram, (uint64_t)((bench_now() - start) * 1e9));
    }
    bench_report("put_p9999",
                 (double)histogram_quantile(histogram, 0.9999) / 1e6);
    bench_report("put_max", (double)histogram->max / 1e6);
    bed.engine->writer_close(writer);
    bed_verify(&bed, source, run->records);
    bed_close(&bed);
    free(histogram);
}

/* One thread that writes durably until time is up. */
struct pen {
    struct bed *bed;
    struct source source;
    size_t batch;               /* 1: single puts */
    uint64_t records;
    uint64_t hash;
};

static void *pen_run(void *at)
{
    struct pen *pen = at;
    struct bed *bed = pen->bed;
    unsigned char keys[BENCH_BATCH * BENCH_KEY_BYTES_MAX];
    unsigned char values[BENCH_BATCH * BENCH_VALUE_BYTES_MAX];
    void *writer = bed->engine->writer_open(bed->store);
    double end = bench_now() + bed->run->seconds;
    size_t k;

    while (bench_now() < end) {
        for (k = 0; k < pen->batch; k++) {
            unsigned char *key = keys + k * bed->setup.key_bytes;
            unsigned char *value = values + k * bed->setup.value_bytes;

            source_next(&pen->source, key, value);
            pen->hash += record_hash(key, bed->setup.key_bytes, value,
                                     bed->setup.value_bytes);
        }
        if (pen->batch == 1) bed->engine->put(writer, keys, values);
        else bed->engine->put_batch(writer, keys, values, pen->batch);
        pen->records += pen->batch;
    }
    bed->engine->writer_close(writer);
    return NULL;
}

/* Threads that write at the same time; adds what they wrote to *total, and
 * returns how many records that was. */
static uint64_t pens_run(struct bed *bed, unsigned threads, size_t batch,
                         struct scan_sum *total)
{
    uint64_t before = total->records;
    struct pen pens[THREADS_MAX];
    pthread_t ids[THREADS_MAX];
    unsigned i;

    memset(pens, 0, sizeof pens);
    for (i = 0; i < threads; i++) {
        pens[i].bed = bed;
        pens[i].batch = batch;
        source_init(&pens[i].source, SOURCE_RANDOM, bed->setup.key_bytes,
                    bed->setup.value_bytes);
        /* Ranges that no other thread and no other call has. */
        pens[i].source.next = before + ((uint64_t)i << 40);
        if (pthread_create(&ids[i], NULL, pen_run, &pens[i]) != 0) {
            bench_die("no thread");
        }
    }
    for (i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        total->records += pens[i].records;
        total->hash += pens[i].hash;
    }
    return total->records - before;
}

static void durable_threads(struct bed *bed, struct scan_sum *total)
{
    uint64_t syncs = 0;
    uint64_t records;

    if (bed->engine->syncs != NULL) syncs = bed->engine->syncs(bed->store);
    records = pens_run(bed, THREADS_MAX, 1, total);
    bench_report("durable_put_16",
                 (double)records / bed->run->seconds / 1e3);
    if (bed->engine->syncs == NULL) return;
    syncs = bed->engine->syncs(bed->store) - syncs;
    bench_report("puts_per_sync",
                 (double)records / (double)(syncs > 0 ? syncs : 1));
}

static void run_durable(const struct run *run)
{
    struct scan_sum total = {0};
    struct scan_sum sum;
    struct bed bed;
    uint64_t records;

    if (run->engine->traits & ENGINE_MEMORY_ONLY) return;
    bed_init(&bed, run, true);
    if (run_wants(run, "durable_put_1")) {
        records = pens_run(&bed, 1, 1, &total);
        bench_report("durable_put_1", (double)records / run->seconds / 1e3);
    }
    if (run_wants(run, "durable_put_16") || run_wants(run, "puts_per_sync")) {
        durable_threads(&bed, &total);
    }
    if (run_wants(run, "durable_batches")) {
        records = pens_run(&bed, 1, BENCH_BATCH, &total);
        bench_report("durable_batches",
                     (double)(records / BENCH_BATCH) / run->seconds / 1e3);
    }
    bed_scan(&bed, &sum, true);
    check_sum(&bed, &sum, total.records, total.hash);
    bed_close(&bed);
}

static void run_metadata(const struct run *run)
{
    struct source source;
    struct bed bed;
    struct job job = {0};
    void *writer;

    if (run->key_bytes != 16 || run->value_bytes != 16) return;
    bed_init(&bed, run, false);
    source_init(&source, SOURCE_METADATA, run->key_bytes, run->value_bytes);
    writer = bed.engine->writer_open(bed.store);
    report_rate("put_metadata", run->records, fill(&bed, writer, &source));
    bed.engine->writer_close(writer);
    bed_settle(&bed);
    job.bed = &bed;
    job.source = source;
    job.held = true;
    bench_report("get_metadata", jobs_run(&job, 1));
    if (bed.engine->compact != NULL) bed.engine->compact(bed.store);
    if (!(bed.engine->traits & ENGINE_MEMORY_ONLY)) {
        report_per_record(&bed, "disk_metadata", bench_dir_bytes(run->dir));
    }
    bed_verify(&bed, source, run->records);
    bed_close(&bed);
}

void run_group(const struct run *run)
{
    static void (*const groups[GROUP_COUNT])(const struct run *) = {
        run_random, run_ascending, run_batches, run_latency, run_durable,
        run_metadata, run_limits
    };

    groups[run->group](run);
}
