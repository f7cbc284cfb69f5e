/*
 * fsmeta - kvmeta at its main job, on this machine's own data.
 *
 * Walks a directory tree and keeps one record for each file: key (device,
 * inode), value its size, times, mode, owner, links and blocks. Then it looks
 * records up, scans them, updates them, reads a snapshot while another thread
 * writes, kills a process in the middle of durable writes, opens what that
 * process left, and checks everything again.
 *
 * Beside the store it keeps a plain sorted array of what it has stored. After
 * each step every record is compared with that array, byte for byte: any
 * difference is a failure. The file system itself may change meanwhile; that
 * is counted and told, and is no failure.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE 1
#define _DARWIN_C_SOURCE 1

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kvmeta.h"

#ifdef __APPLE__
#  define ST_TIME(st, which) ((st)->st_##which##timespec)
#else
#  define ST_TIME(st, which) ((st)->st_##which##tim)
#endif

#define KEY_BYTES 16u
#define BATCH 1000u              /* files in a batch of the walk */
#define MANY 256u                /* keys in a call of get_many */
#define ADDS 5000u               /* additions of each thread in step 5 */
#define LOOKUP_KEYS (1u << 20)   /* random keys that are made beforehand */

/* The value of a record, in the machine's own byte order. */
struct file_record {
    uint64_t size;
    uint64_t blocks;
    int64_t mtime_ns;
    int64_t ctime_ns;
    int64_t atime_ns;
    uint32_t mode;
    uint32_t uid;
    uint32_t gid;
    uint32_t links;
    uint64_t revision;           /* how often this program has changed it */
};
_Static_assert(sizeof(struct file_record) == 64, "64 bytes a record");

/* What the store should hold, and in which order it was seen. */
struct entry {
    unsigned char key[KEY_BYTES];
    struct file_record record;
    uint64_t order;              /* of the walk; in step 9: seen again */
};

struct demo {
    const char *dir;
    char store[4096];
    int keep;
    int made_store;              /* the directory is ours to remove */
    int step;
    pid_t child;                 /* the process that is to be killed */
    kvmeta *db;
    struct entry *entries;       /* sorted by key after the walk */
    size_t count;
    size_t capacity;
    double write_seconds;        /* spent in the store during the walk */
};

/* What the child that gets killed tells its parent. */
struct shared {
    _Atomic uint64_t acked;      /* batches that were acknowledged */
};

static volatile sig_atomic_t interrupted;
static int on_terminal;
static pid_t main_process;

/* --------------------------------------------------------------------------
 * Figures and lines
 * -------------------------------------------------------------------------- */

#define TEXT_BYTES 48

/* Texts of the formatting functions: a few may stand in one printf. Only the
 * main thread formats. */
static char *text_next(void)
{
    static char texts[8][TEXT_BYTES];
    static unsigned next;

    return texts[next++ % 8];
}

/* 1234567 as "1,234,567". */
static const char *number(uint64_t n)
{
    char digits[24];
    char *text = text_next();
    int len = snprintf(digits, sizeof digits, "%" PRIu64, n);
    int i;
    int at = 0;

    for (i = 0; i < len; i++) {
        if (i > 0 && (len - i) % 3 == 0) {
            text[at++] = ',';
        }
        text[at++] = digits[i];
    }
    text[at] = 0;
    return text;
}

static const char *size_text(uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    char *text = text_next();
    double n = (double)bytes;
    size_t unit = 0;

    while (n >= 1024 && unit < 4) {
        n /= 1024;
        unit++;
    }
    snprintf(text, TEXT_BYTES, unit ? "%.1f %s" : "%.0f %s", n, units[unit]);
    return text;
}

static const char *rate_text(uint64_t n, double seconds)
{
    char *text = text_next();
    double rate = seconds > 0 ? (double)n / seconds : 0;

    if (rate >= 1e6) {
        snprintf(text, TEXT_BYTES, "%.2f million/s", rate / 1e6);
    } else {
        snprintf(text, TEXT_BYTES, "%s/s", number((uint64_t)rate));
    }
    return text;
}

static const char *time_text(double seconds)
{
    char *text = text_next();

    if (seconds < 1e-3) {
        snprintf(text, TEXT_BYTES, "%.0f us", seconds * 1e6);
    } else if (seconds < 1) {
        snprintf(text, TEXT_BYTES, "%.0f ms", seconds * 1e3);
    } else {
        snprintf(text, TEXT_BYTES, "%.2f s", seconds);
    }
    return text;
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void progress_clear(void)
{
    if (on_terminal) {
        printf("\r\033[K");
        fflush(stdout);
    }
}

static void step(struct demo *demo, const char *title)
{
    progress_clear();
    printf("\n%d  %s\n", ++demo->step, title);
    fflush(stdout);
}

/* One figure: what it is, the figure, and what to know about it. */
static void figure(const char *what, const char *value, const char *format,
                   ...) __attribute__((format(printf, 3, 4)));
static void figure(const char *what, const char *value, const char *format,
                   ...)
{
    va_list args;

    progress_clear();
    printf("     %-30s %16s", what, value);
    printf("   ");
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
}

/* --------------------------------------------------------------------------
 * Ends
 * -------------------------------------------------------------------------- */

/* Removes the store: a directory that this program made, of plain files. */
static void remove_store(struct demo *demo)
{
    DIR *dir = demo->made_store ? opendir(demo->store) : NULL;
    struct dirent *entry;

    if (!dir) {
        return;
    }
    while ((entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) {
            unlinkat(dirfd(dir), entry->d_name, 0);
        }
    }
    closedir(dir);
    rmdir(demo->store);
}

/* Ends the program. The store stays where it is, to be looked at. */
static void fail(struct demo *demo, const char *format, ...)
    __attribute__((format(printf, 2, 3), noreturn));
static void fail(struct demo *demo, const char *format, ...)
{
    va_list args;

    progress_clear();
    if (demo->step > 0) {
        printf("\nFAILED in step %d: ", demo->step);
    } else {
        printf("FAILED: ");
    }
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    if (demo->made_store) {
        printf("The store is left in %s\n", demo->store);
    }
    fflush(stdout);
    _exit(1);
}

static void check(struct demo *demo, int rc, const char *what)
{
    struct kvmeta_error err;

    if (rc == 0) {
        return;
    }
    if (demo->db && kvmeta_last_error(demo->db, &err) != 0) {
        fail(demo, "%s: %s (%s)", what, kvmeta_strerror(rc), err.message);
    }
    fail(demo, "%s: %s", what, kvmeta_strerror(rc));
}

static void *allocate(struct demo *demo, void *old, size_t n, size_t bytes)
{
    void *memory = n > SIZE_MAX / bytes ? NULL : realloc(old, n * bytes);

    if (!memory) {
        fail(demo, "out of memory");
    }
    return memory;
}

/* Shows what goes on, on a terminal only, ten times a second; and ends the
 * program when the user has asked for it. */
static void progress(struct demo *demo, const char *what, uint64_t n)
{
    static double shown;
    double t;

    if (interrupted) {
        progress_clear();
        printf("interrupted\n");
        fflush(stdout);
        if (demo->child > 0 && kill(demo->child, SIGKILL) == 0) {
            waitpid(demo->child, NULL, 0);
        }
        remove_store(demo);
        _exit(130);
    }
    if (!on_terminal) {
        return;
    }
    t = now();
    if (t - shown >= 0.1) {
        shown = t;
        printf("\r     %s %s\033[K", what, number(n));
        fflush(stdout);
    }
}

static void on_signal(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
}

/* --------------------------------------------------------------------------
 * The file system
 * -------------------------------------------------------------------------- */

struct walk {
    struct demo *demo;
    void (*visit)(struct walk *walk, const struct stat *st);
    void *user;
    dev_t dev;                   /* of the directory that was asked for */
    char **stack;                /* directories still to be read */
    size_t depth;
    size_t capacity;
    uint64_t names;
    uint64_t unreadable;         /* could not be opened or looked at */
    uint64_t vanished;           /* gone between being listed and looked at */
    uint64_t elsewhere;          /* directories of other file systems */
};

static void walk_push(struct walk *walk, const char *dir, const char *name)
{
    size_t bytes = strlen(dir) + strlen(name) + 2;
    char *path = allocate(walk->demo, NULL, bytes, 1);
    const char *slash = dir[strlen(dir) - 1] == '/' ? "" : "/";

    snprintf(path, bytes, "%s%s%s", dir, *name ? slash : "", name);
    if (walk->depth == walk->capacity) {
        walk->capacity = walk->capacity ? walk->capacity * 2 : 64;
        walk->stack = allocate(walk->demo, walk->stack, walk->capacity,
                               sizeof *walk->stack);
    }
    walk->stack[walk->depth++] = path;
}

static void walk_missed(struct walk *walk)
{
    if (errno == ENOENT) {
        walk->vanished++;
    } else {
        walk->unreadable++;
    }
}

static void walk_entry(struct walk *walk, const char *path, int dir,
                       const char *name)
{
    struct stat st;

    if (!strcmp(name, ".") || !strcmp(name, "..")) {
        return;
    }
    walk->names++;
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
        walk_missed(walk);
        return;
    }
    walk->visit(walk, &st);
    if (!S_ISDIR(st.st_mode)) {
        return;
    }
    if (st.st_dev == walk->dev) {
        walk_push(walk, path, name);
    } else {
        walk->elsewhere++;
    }
}

static void walk_directory(struct walk *walk, const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    struct dirent *entry;

    if (!dir) {
        walk_missed(walk);
        if (fd >= 0) {
            close(fd);
        }
        return;
    }
    while ((entry = readdir(dir)) != NULL) {
        walk_entry(walk, path, dirfd(dir), entry->d_name);
    }
    closedir(dir);
}

/* Visits the directory and all below it, of one file system, without
 * following links and with one open directory at a time. */
static void walk_run(struct walk *walk)
{
    struct demo *demo = walk->demo;
    struct stat st;
    char *path;

    if (stat(demo->dir, &st) != 0) {
        fail(demo, "%s: %s", demo->dir, strerror(errno));
    }
    walk->dev = st.st_dev;
    walk->names = 1;
    walk->visit(walk, &st);
    walk_push(walk, demo->dir, "");
    while (walk->depth > 0) {
        path = walk->stack[--walk->depth];
        walk_directory(walk, path);
        free(path);
    }
    free(walk->stack);
}

static int64_t nanoseconds(struct timespec t)
{
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void record_fill(const struct stat *st, unsigned char *key,
                        struct file_record *record)
{
    kvmeta_u64_to_key((uint64_t)st->st_dev, key);
    kvmeta_u64_to_key((uint64_t)st->st_ino, key + 8);
    memset(record, 0, sizeof *record);
    record->size = (uint64_t)st->st_size;
    record->blocks = (uint64_t)st->st_blocks;
    record->mtime_ns = nanoseconds(ST_TIME(st, m));
    record->ctime_ns = nanoseconds(ST_TIME(st, c));
    record->atime_ns = nanoseconds(ST_TIME(st, a));
    record->mode = (uint32_t)st->st_mode;
    record->uid = (uint32_t)st->st_uid;
    record->gid = (uint32_t)st->st_gid;
    record->links = (uint32_t)st->st_nlink;
}

/* --------------------------------------------------------------------------
 * The store beside the array
 * -------------------------------------------------------------------------- */

/* Opens the store; log_bytes_max may be 0 for the default. */
static void store_open(struct demo *demo, uint64_t log_bytes_max)
{
    struct kvmeta_options options;
    struct kvmeta_error err;

    kvmeta_options_init(&options, KEY_BYTES, sizeof(struct file_record));
    options.log_bytes_max = log_bytes_max;
    if (kvmeta_open(demo->store, &options, &demo->db, &err) != 0) {
        fail(demo, "%s", err.message);
    }
}

static void store_close(struct demo *demo)
{
    kvmeta *db = demo->db;

    demo->db = NULL;
    check(demo, kvmeta_close(db), "close");
}

static struct kvmeta_stats store_stats(struct demo *demo)
{
    struct kvmeta_stats stats = {0};

    stats.struct_size = sizeof stats;
    check(demo, kvmeta_stats(demo->db, &stats), "stats");
    return stats;
}

struct compare {
    struct demo *demo;
    size_t at;
    uint64_t file_bytes;         /* sum of the sizes in the records */
};

static int compare_record(void *user, const void *key, const void *value)
{
    struct compare *compare = user;
    const struct entry *want;
    struct file_record have;

    if (compare->at >= compare->demo->count) {
        return 1;
    }
    want = &compare->demo->entries[compare->at];
    memcpy(&have, value, sizeof have);
    if (memcmp(key, want->key, KEY_BYTES) != 0 ||
        memcmp(&have, &want->record, sizeof have) != 0) {
        return 1;
    }
    compare->at++;
    compare->file_bytes += have.size;
    return 0;
}

static void differs(struct demo *demo, size_t at, const char *where)
{
    static const unsigned char none[KEY_BYTES];
    const unsigned char *key = at < demo->count ? demo->entries[at].key : none;

    fail(demo, "%s: record %s of %s, device %" PRIu64 " inode %" PRIu64
         ", is not what was stored", where, number(at + 1),
         number(demo->count), kvmeta_key_to_u64(key),
         kvmeta_key_to_u64(key + 8));
}

/* Compares every record of the store with the array, in order. */
static uint64_t compare_all(struct demo *demo, const char *where)
{
    struct compare compare = {demo, 0, 0};
    int rc = kvmeta_scan(demo->db, NULL, NULL, compare_record, &compare);

    if (rc != 0 || compare.at != demo->count ||
        kvmeta_count(demo->db) != demo->count) {
        differs(demo, compare.at, where);
    }
    return compare.file_bytes;
}

/* --------------------------------------------------------------------------
 * Steps 1 and 2: fill the store
 * -------------------------------------------------------------------------- */

/* Stores the entries from..count as one batch. */
static void store_entries(struct demo *demo, kvmeta_batch *batch, size_t from)
{
    double start = now();
    size_t i;

    kvmeta_batch_clear(batch);
    for (i = from; i < demo->count; i++) {
        check(demo, kvmeta_batch_put(batch, demo->entries[i].key,
                                     &demo->entries[i].record), "batch");
    }
    check(demo, kvmeta_commit(demo->db, batch, KVMETA_WRITTEN, NULL),
          "commit");
    demo->write_seconds += now() - start;
}

static void visit_and_store(struct walk *walk, const struct stat *st)
{
    struct demo *demo = walk->demo;
    struct entry *entry;

    if (demo->count == demo->capacity) {
        demo->capacity = demo->capacity ? demo->capacity * 2 : 4096;
        demo->entries = allocate(demo, demo->entries, demo->capacity,
                                 sizeof *demo->entries);
    }
    entry = &demo->entries[demo->count];
    record_fill(st, entry->key, &entry->record);
    entry->order = demo->count++;
    if (demo->count % BATCH == 0) {
        store_entries(demo, walk->user, demo->count - BATCH);
        progress(demo, "names so far:", walk->names);
    }
}

static int entry_order(const void *a, const void *b)
{
    const struct entry *x = a;
    const struct entry *y = b;
    int c = memcmp(x->key, y->key, KEY_BYTES);

    return c ? c : (x->order > y->order) - (x->order < y->order);
}

/* Sorts the array; of names of one file (hard links), the last one seen is
 * what the store has kept. Returns the number of such names. */
static uint64_t sort_entries(struct demo *demo)
{
    size_t seen = demo->count;
    size_t n = 0;
    size_t i;

    qsort(demo->entries, seen, sizeof *demo->entries, entry_order);
    for (i = 0; i < seen; i++) {
        if (i + 1 == seen || memcmp(demo->entries[i].key,
                                    demo->entries[i + 1].key, KEY_BYTES)) {
            demo->entries[n++] = demo->entries[i];
        }
    }
    demo->count = n;
    return seen - n;
}

static void step_walk(struct demo *demo)
{
    struct walk walk = {0};
    kvmeta_batch *batch;
    double start = now();
    double seconds;
    uint64_t links;

    step(demo, "Walk the tree, store a record for each file");
    check(demo, kvmeta_batch_new(demo->db, &batch), "batch");
    walk.demo = demo;
    walk.visit = visit_and_store;
    walk.user = batch;
    walk_run(&walk);
    store_entries(demo, batch, demo->count - demo->count % BATCH);
    kvmeta_batch_free(batch);
    seconds = now() - start;

    start = now();
    check(demo, kvmeta_sync(demo->db), "sync");
    start = now() - start;
    figure("names", number(walk.names), "in %s", time_text(seconds));
    if (walk.unreadable + walk.vanished > 0) {
        figure("not readable, or gone", number(walk.unreadable +
               walk.vanished), "left out");
    }
    if (walk.elsewhere > 0) {
        figure("other file systems", number(walk.elsewhere),
               "not entered");
    }
    figure("time of it in the store", time_text(demo->write_seconds),
           "%s, in batches of %u",
           rate_text(demo->count, demo->write_seconds), BATCH);
    figure("until all of it was on disk", time_text(start), "one sync");
    links = sort_entries(demo);
    figure("records", number(demo->count), "%s more names are hard links",
           number(links));
    compare_all(demo, "after the walk");
}

static void step_sizes(struct demo *demo)
{
    struct kvmeta_stats stats;
    double start = now();
    double logical;

    step(demo, "Write the records to a table");
    check(demo, kvmeta_flush(demo->db), "flush");
    check(demo, kvmeta_wait_idle(demo->db), "wait_idle");
    start = now() - start;
    stats = store_stats(demo);
    logical = (double)stats.logical_bytes;
    figure("time", time_text(start), "in the background; this waited");
    figure("bytes of records", size_text(stats.logical_bytes),
           "%s x (16 + 64) bytes", number(stats.records));
    figure("bytes on disk", size_text(stats.table_bytes + stats.log_bytes),
           "%.2f of that; %" PRIu64 " table%s",
           (double)(stats.table_bytes + stats.log_bytes) / logical,
           stats.tables, stats.tables == 1 ? "" : "s");
    figure("bytes in memory", size_text(stats.resident_bytes),
           "%.2f of that", (double)stats.resident_bytes / logical);
}

/* --------------------------------------------------------------------------
 * Step 3: lookups
 * -------------------------------------------------------------------------- */

static uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93u;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93u;
    return z ^ (z >> 32);
}

/* Looks each record up once and compares it. */
static void lookup_compare(struct demo *demo)
{
    struct file_record record;
    size_t i;

    for (i = 0; i < demo->count; i++) {
        if (kvmeta_get(demo->db, demo->entries[i].key, &record) != 0 ||
            memcmp(&record, &demo->entries[i].record, sizeof record) != 0) {
            differs(demo, i, "get");
        }
        if (i % BATCH == 0) {
            progress(demo, "compared:", i);
        }
    }
}

/* Plain lookups of random keys for a second; the rate as a text. */
static const char *lookup_get(struct demo *demo, const unsigned char *keys)
{
    struct file_record record;
    double start = now();
    uint64_t n = 0;
    uint64_t missing = 0;
    size_t i;

    do {
        for (i = 0; i < 4096; i++, n++) {
            missing += 0 != kvmeta_get(
                demo->db, keys + n % LOOKUP_KEYS * KEY_BYTES, &record);
        }
        progress(demo, "lookups:", n);
    } while (now() - start < 1);
    if (missing) {
        fail(demo, "get: %s records were not found", number(missing));
    }
    return rate_text(n, now() - start);
}

/* The same, MANY keys in a call. */
static const char *lookup_many(struct demo *demo, const unsigned char *keys)
{
    static struct file_record records[MANY];
    unsigned char found[MANY];
    double start = now();
    uint64_t n = 0;
    size_t i;

    do {
        check(demo, kvmeta_get_many(demo->db,
                                    keys + n % LOOKUP_KEYS * KEY_BYTES, MANY,
                                    records, found), "get_many");
        for (i = 0; i < MANY; i++) {
            if (!found[i]) {
                fail(demo, "get_many: a record was not found");
            }
        }
        n += MANY;
        if (n % 65536 == 0) {
            progress(demo, "lookups:", n);
        }
    } while (n % 4096 || now() - start < 1);
    return rate_text(n, now() - start);
}

static void step_lookups(struct demo *demo)
{
    unsigned char *keys = allocate(demo, NULL, LOOKUP_KEYS, KEY_BYTES);
    uint64_t seed = (uint64_t)time(NULL);
    size_t i;

    step(demo, "Look records up, by random keys, on one thread");
    lookup_compare(demo);
    for (i = 0; i < LOOKUP_KEYS; i++) {
        memcpy(keys + i * KEY_BYTES,
               demo->entries[random_next(&seed) % demo->count].key,
               KEY_BYTES);
    }
    figure("kvmeta_get", lookup_get(demo, keys), "one at a time");
    figure("kvmeta_get_many", lookup_many(demo, keys), "%u keys in a call",
           MANY);
    figure("compared", number(demo->count), "each record once, all right");
    free(keys);
}

/* --------------------------------------------------------------------------
 * Steps 4 and 5: scan, conditional update
 * -------------------------------------------------------------------------- */

static void step_scan(struct demo *demo)
{
    double start = now();
    uint64_t bytes;
    double seconds;

    step(demo, "Scan all records in order");
    bytes = compare_all(demo, "scan");
    seconds = now() - start;
    figure("records", number(demo->count), "in %s, each compared",
           time_text(seconds));
    figure("rate", rate_text(demo->count, seconds), "on one thread");
    figure("size of all these files", size_text(bytes),
           "summed up from the records");
}

struct adder {
    struct demo *demo;
    uint64_t conflicts;
    int rc;
};

/* Adds 1 to the first record's revision, ADDS times: reads it, and writes it
 * on condition that it is still what was read. */
static void *adder_run(void *user)
{
    struct adder *adder = user;
    kvmeta *db = adder->demo->db;
    const unsigned char *key = adder->demo->entries[0].key;
    struct file_record old;
    struct file_record new;
    struct kvmeta_op ops[2] = {{KVMETA_OP_EXPECT, key, &old},
                               {KVMETA_OP_PUT, key, &new}};
    unsigned done = 0;

    while (done < ADDS) {
        adder->rc = kvmeta_get(db, key, &old);
        if (adder->rc) break;
        new = old;
        new.revision++;
        adder->rc = kvmeta_write(db, ops, 2, KVMETA_WRITTEN, NULL);
        if (adder->rc == KVMETA_CONFLICT) {
            adder->conflicts++;
            continue;
        }
        if (adder->rc) break;
        done++;
    }
    return NULL;
}

static void step_conditional(struct demo *demo)
{
    struct adder adders[2] = {{demo, 0, 0}, {demo, 0, 0}};
    pthread_t threads[2];
    double start = now();
    int i;

    step(demo, "Two threads count in one record, by conditional updates");
    for (i = 0; i < 2; i++) {
        if (pthread_create(&threads[i], NULL, adder_run, &adders[i])) {
            fail(demo, "cannot start a thread");
        }
    }
    for (i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        check(demo, adders[i].rc, "conditional update");
    }
    start = now() - start;
    demo->entries[0].record.revision += 2 * ADDS;
    compare_all(demo, "conditional update");
    figure("additions", number(2 * ADDS), "%s; the record says the same",
           rate_text(2 * ADDS, start));
    figure("conflicts, tried again",
           number(adders[0].conflicts + adders[1].conflicts),
           "the other one had been quicker");
}

/* --------------------------------------------------------------------------
 * Step 6: a snapshot while another thread writes
 * -------------------------------------------------------------------------- */

struct rewriter {
    struct demo *demo;
    _Atomic uint64_t passes;     /* over all records, finished */
    _Atomic int stop;
    int rc;
};

/* Writes the entries from..to with `add` more revisions, as one batch. */
static int rewrite_batch(struct demo *demo, size_t from, size_t to,
                         uint64_t add)
{
    struct file_record records[MANY];
    struct kvmeta_op ops[MANY];
    size_t i;

    for (i = from; i < to; i++) {
        records[i - from] = demo->entries[i].record;
        records[i - from].revision += add;
        ops[i - from].type = KVMETA_OP_PUT;
        ops[i - from].key = demo->entries[i].key;
        ops[i - from].value = &records[i - from];
    }
    return kvmeta_write(demo->db, ops, to - from, KVMETA_WRITTEN, NULL);
}

static void *rewriter_run(void *user)
{
    struct rewriter *rewriter = user;
    struct demo *demo = rewriter->demo;
    uint64_t pass = 0;
    size_t from;
    size_t to;

    do {
        pass++;
        for (from = 0; from < demo->count; from = to) {
            to = demo->count - from < MANY ? demo->count : from + MANY;
            rewriter->rc = rewrite_batch(demo, from, to, pass);
            if (rewriter->rc) return NULL;
        }
        atomic_store(&rewriter->passes, pass);
    } while (!atomic_load(&rewriter->stop));
    return NULL;
}

/* Reads the whole snapshot with a cursor and compares each record. */
static void snapshot_compare(struct demo *demo, kvmeta_snapshot *snapshot)
{
    struct compare compare = {demo, 0, 0};
    kvmeta_cursor *cursor;
    int rc;

    check(demo, kvmeta_cursor_open(snapshot, &cursor), "cursor");
    rc = kvmeta_cursor_first(cursor);
    while (rc == 0) {
        if (compare_record(&compare, kvmeta_cursor_key(cursor),
                           kvmeta_cursor_value(cursor)) != 0) {
            differs(demo, compare.at, "snapshot");
        }
        if (compare.at % BATCH == 0) {
            progress(demo, "records of the snapshot:", compare.at);
        }
        rc = kvmeta_cursor_next(cursor);
    }
    kvmeta_cursor_close(cursor);
    if (rc != KVMETA_NOT_FOUND || compare.at != demo->count) {
        differs(demo, compare.at, "snapshot");
    }
}

static void step_snapshot(struct demo *demo)
{
    struct rewriter rewriter = {0};
    kvmeta_snapshot *snapshot;
    struct kvmeta_digest before = kvmeta_digest(demo->db);
    struct kvmeta_digest after;
    pthread_t thread;
    double start = now();
    uint64_t scans = 0;
    uint64_t pinned;
    size_t i;

    step(demo, "Read a snapshot while another thread rewrites all records");
    check(demo, kvmeta_snapshot_take(demo->db, &snapshot), "snapshot");
    rewriter.demo = demo;
    if (pthread_create(&thread, NULL, rewriter_run, &rewriter)) {
        fail(demo, "cannot start a thread");
    }
    do {
        snapshot_compare(demo, snapshot);
        scans++;
    } while (now() - start < 1);
    atomic_store(&rewriter.stop, 1);
    pthread_join(thread, NULL);
    check(demo, rewriter.rc, "rewrite");
    start = now() - start;
    snapshot_compare(demo, snapshot);
    after = kvmeta_snapshot_digest(snapshot);
    if (before.lo != after.lo || before.hi != after.hi) {
        fail(demo, "the digest of the snapshot has changed");
    }
    pinned = store_stats(demo).pinned_bytes;
    kvmeta_snapshot_release(snapshot);

    for (i = 0; i < demo->count; i++) {
        demo->entries[i].record.revision += atomic_load(&rewriter.passes);
    }
    compare_all(demo, "after the rewriting");
    figure("records rewritten", number(rewriter.passes * demo->count),
           "%s", rate_text(rewriter.passes * demo->count, start));
    figure("the snapshot, read meanwhile", number(scans),
           "times, and always as it was");
    figure("memory that it cost", size_text(pinned),
           "until it was released");
}

/* --------------------------------------------------------------------------
 * Steps 7 and 8: a process is killed, and the store opened again
 * -------------------------------------------------------------------------- */

#define KILL_REVISION ((uint64_t)1 << 40)

/* The two records, far from each other, that batch i of the child writes. */
static void kill_pick(struct demo *demo, uint64_t i, struct entry *pair[2])
{
    uint64_t state = i;

    pair[0] = &demo->entries[random_next(&state) % demo->count];
    pair[1] = &demo->entries[random_next(&state) % demo->count];
}

/* Makes batch i in the array: both records get a revision that names it, so
 * that half a batch would be seen. */
static void kill_apply(struct demo *demo, uint64_t i, struct entry *pair[2])
{
    kill_pick(demo, i, pair);
    pair[0]->record.revision = KILL_REVISION + i;
    pair[1]->record.revision = KILL_REVISION + i;
}

/* The child: durable batches, one after the other, until it is killed. */
static void kill_child(struct demo *demo, struct shared *shared)
{
    struct entry *pair[2];
    uint64_t i;

    signal(SIGINT, SIG_IGN);     /* the parent decides */
    store_open(demo, (uint64_t)1 << 20);
    for (i = 1; getppid() == main_process; i++) {
        kill_apply(demo, i, pair);
        struct kvmeta_op ops[2] = {
            {KVMETA_OP_PUT, pair[0]->key, &pair[0]->record},
            {KVMETA_OP_PUT, pair[1]->key, &pair[1]->record}};
        if (kvmeta_write(demo->db, ops, 2, KVMETA_DURABLE, NULL) != 0) {
            break;
        }
        atomic_store(&shared->acked, i);
    }
    _exit(1);
}

/* Lets the child work for about a second, and kills it. */
static double kill_wait(struct demo *demo, struct shared *shared)
{
    struct timespec pause = {0, 10000000};
    double start = now();
    pid_t child = demo->child;
    uint64_t seed = (uint64_t)time(NULL) ^ (uint64_t)child;
    double seconds = 0.7 + (double)(random_next(&seed) % 600000) / 1e6;
    int status;

    while (now() - start < seconds ||
           (atomic_load(&shared->acked) < 10 && now() - start < 60)) {
        progress(demo, "durable batches:", atomic_load(&shared->acked));
        nanosleep(&pause, NULL);
    }
    start = now() - start;
    kill(child, SIGKILL);
    if (waitpid(child, &status, 0) != child || !WIFSIGNALED(status) ||
        WTERMSIG(status) != SIGKILL) {
        fail(demo, "the child ended by itself");
    }
    demo->child = 0;
    return start;
}

static void step_kill(struct demo *demo, struct shared *shared)
{
    uint64_t acked;
    double seconds;

    step(demo, "Kill a process (SIGKILL) in the middle of durable writes");
    store_close(demo);
    fflush(stdout);
    demo->child = fork();
    if (demo->child < 0) {
        fail(demo, "fork: %s", strerror(errno));
    }
    if (demo->child == 0) {
        kill_child(demo, shared);
    }
    seconds = kill_wait(demo, shared);
    acked = atomic_load(&shared->acked);
    figure("batches acknowledged", number(acked), "%s, one thread",
           rate_text(acked, seconds));
    if (acked > 0) {
        figure("time of one, with its sync",
               time_text(seconds / (double)acked), "on average");
    }
}

static void recovery_report(struct demo *demo, double seconds)
{
    static const char *const torn[] = {"none", "no frame follows",
                                       "damaged frame", "frame out of order"};
    struct kvmeta_stats stats = store_stats(demo);
    const char *why = stats.open_torn_reason < 4
                          ? torn[stats.open_torn_reason] : "?";

    figure("time", time_text(seconds), "%s",
           rate_text(stats.records, seconds));
    figure("tables read", number(stats.open_tables), "%s records",
           number(stats.open_table_records));
    figure("logs replayed", number(stats.open_logs),
           "%s frames, %s batches", number(stats.open_log_frames),
           number(stats.open_log_batches));
    figure("torn bytes dropped", number(stats.open_torn_bytes), "%s", why);
    figure("bytes in memory", size_text(stats.resident_bytes),
           "%.2f of the records'", (double)stats.resident_bytes /
           (double)stats.logical_bytes);
    if (stats.open_healed + stats.open_garbage_files > 0) {
        figure("left over files removed", number(stats.open_garbage_files),
               "manifest copies healed: %" PRIu32, stats.open_healed);
    }
}

/* The last batch of the child that the store holds. It may be one more than
 * was acknowledged: the kill can fall between the disk and the answer. */
static uint64_t kill_found(struct demo *demo, uint64_t acked)
{
    struct entry *pair[2];
    struct file_record record;

    kill_pick(demo, acked + 1, pair);
    check(demo, kvmeta_get(demo->db, pair[0]->key, &record), "get");
    return record.revision == KILL_REVISION + acked + 1 ? acked + 1 : acked;
}

static void step_reopen(struct demo *demo, struct shared *shared)
{
    uint64_t acked = atomic_load(&shared->acked);
    struct entry *pair[2];
    double start = now();
    uint64_t found;
    uint64_t i;

    step(demo, "Open what it left");
    store_open(demo, 0);
    recovery_report(demo, now() - start);

    found = kill_found(demo, acked);
    for (i = 1; i <= found; i++) {
        kill_apply(demo, i, pair);
    }
    compare_all(demo, "after the kill");
    figure("batches found", number(found), "%s acknowledged, %s",
           number(acked), found > acked ? "and one that was under way"
                                        : "none lost, none half");
    figure("compared", number(demo->count), "every record, all right");
}

/* --------------------------------------------------------------------------
 * Step 9: against the file system again
 * -------------------------------------------------------------------------- */

struct recheck {
    uint64_t same;
    uint64_t changed;            /* the file has changed since the walk */
    uint64_t new;                /* there was no such file then */
};

/* The fields that say whether a file has changed. Reading one changes its
 * atime, and the revision is ours. */
static int same_file(const struct file_record *a, const struct file_record *b)
{
    return a->size == b->size && a->blocks == b->blocks &&
           a->mtime_ns == b->mtime_ns && a->ctime_ns == b->ctime_ns &&
           a->mode == b->mode && a->uid == b->uid && a->gid == b->gid &&
           a->links == b->links;
}

static int entry_find(const void *key, const void *entry)
{
    return memcmp(key, ((const struct entry *)entry)->key, KEY_BYTES);
}

static void visit_and_check(struct walk *walk, const struct stat *st)
{
    struct demo *demo = walk->demo;
    struct recheck *recheck = walk->user;
    unsigned char key[KEY_BYTES];
    struct file_record file;
    struct file_record record;
    struct entry *entry;
    int rc;

    record_fill(st, key, &file);
    if (walk->names % BATCH == 0) {
        progress(demo, "names so far:", walk->names);
    }
    entry = bsearch(key, demo->entries, demo->count, sizeof *entry,
                    entry_find);
    rc = kvmeta_get(demo->db, key, &record);
    if ((entry != NULL) != (rc == 0)) {
        fail(demo, "get: %s", kvmeta_strerror(rc));
    }
    if (!entry) {
        recheck->new++;
    } else if (!entry->order) {
        entry->order = 1;        /* seen; further hard links do not count */
        if (same_file(&record, &file)) {
            recheck->same++;
        } else {
            recheck->changed++;
        }
    }
}

static void step_recheck(struct demo *demo)
{
    struct recheck recheck = {0};
    struct kvmeta_error err;
    struct walk walk = {0};
    double start = now();
    uint64_t gone;
    size_t i;

    step(demo, "Check every byte on disk, and every record against its file");
    if (kvmeta_verify(demo->db, &err) != 0) {
        fail(demo, "verify: %s", err.message);
    }
    figure("kvmeta_verify", time_text(now() - start),
           "tree, digest, all tables");

    for (i = 0; i < demo->count; i++) {
        demo->entries[i].order = 0;
    }
    walk.demo = demo;
    walk.visit = visit_and_check;
    walk.user = &recheck;
    walk_run(&walk);
    gone = demo->count - recheck.same - recheck.changed;
    figure("records that match", number(recheck.same), "of %s",
           number(demo->count));
    figure("files changed since step 1", number(recheck.changed),
           "by others; the record says how they were");
    figure("files gone since step 1", number(gone), "removed by others");
    figure("new files since step 1", number(recheck.new),
           "made by others");
    compare_all(demo, "at the end");
}

/* --------------------------------------------------------------------------
 * The program
 * -------------------------------------------------------------------------- */

static void usage(FILE *out)
{
    fputs("usage: fsmeta [--dir DIR] [--store DIR] [--keep]\n"
          "\n"
          "Shows kvmeta at work on the metadata of the files below DIR.\n"
          "\n"
          "  --dir DIR     the tree to walk; default /usr\n"
          "  --store DIR   where to make the store; must not exist yet;\n"
          "                default: a new directory in $TMPDIR or /var/tmp\n"
          "  --keep        leave the store there at the end\n"
          "  --help        this text\n"
          "\n"
          "Only reads below DIR. The exit status is 1 when anything "
          "disagrees.\n", out);
}

/* Returns -1, or the exit status when there is nothing to be done. */
static int parse_options(struct demo *demo, int argc, char **argv)
{
    static const struct option options[] = {
        {"dir", required_argument, NULL, 'd'},
        {"store", required_argument, NULL, 's'},
        {"keep", no_argument, NULL, 'k'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0}};
    struct stat st;
    int c;

    while ((c = getopt_long(argc, argv, "d:s:kh", options, NULL)) != -1) {
        switch (c) {
        case 'd': demo->dir = optarg; break;
        case 's':
            if (strlen(optarg) >= sizeof demo->store) return 2;
            strcpy(demo->store, optarg);
            break;
        case 'k': demo->keep = 1; break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    }
    if (optind < argc) {
        usage(stderr);
        return 2;
    }
    if (stat(demo->dir, &st) != 0 || !S_ISDIR(st.st_mode)) {
        fprintf(stderr, "fsmeta: %s is not a directory\n", demo->dir);
        return 2;
    }
    return -1;
}

/* Makes the directory of the store: a new one, so that removing it at the
 * end removes nothing else. */
static void make_store(struct demo *demo)
{
    const char *tmp = getenv("TMPDIR");
    int rc;

    if (demo->store[0]) {
        rc = mkdir(demo->store, 0700);
    } else {
        snprintf(demo->store, sizeof demo->store, "%s/kvmeta-demo-XXXXXX",
                 tmp && *tmp ? tmp : "/var/tmp");
        rc = mkdtemp(demo->store) ? 0 : -1;
    }
    if (rc != 0) {
        fail(demo, "cannot make %s: %s", demo->store, strerror(errno));
    }
    demo->made_store = 1;
}

static struct shared *make_shared(struct demo *demo)
{
    void *shared = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (shared == MAP_FAILED) {
        fail(demo, "mmap: %s", strerror(errno));
    }
    return shared;
}

static void run(struct demo *demo)
{
    struct shared *shared = make_shared(demo);
    double start = now();

    make_store(demo);
    printf("kvmeta %s keeps the metadata of the files below %s\n"
           "store: %s\n", kvmeta_version(), demo->dir, demo->store);
    store_open(demo, 0);
    step_walk(demo);
    step_sizes(demo);
    step_lookups(demo);
    step_scan(demo);
    step_conditional(demo);
    step_snapshot(demo);
    step_kill(demo, shared);
    step_reopen(demo, shared);
    step_recheck(demo);
    store_close(demo);
    if (!demo->keep) {
        remove_store(demo);
    }
    printf("\nAll %d steps agree. %s; the store is %s.\n", demo->step,
           time_text(now() - start), demo->keep ? "kept" : "removed");
}

int main(int argc, char **argv)
{
    struct demo demo = {0};
    int rc;

    demo.dir = "/usr";
    rc = parse_options(&demo, argc, argv);
    if (rc >= 0) {
        return rc;
    }
    on_terminal = isatty(STDOUT_FILENO);
    main_process = getpid();
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    run(&demo);
    free(demo.entries);
    return fflush(stdout) != 0;
}
