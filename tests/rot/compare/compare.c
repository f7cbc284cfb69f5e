/*
 * The same damage, done to kvmeta and to other stores.
 *
 * A child process makes a store: synced commits of known records, a step that
 * moves them to the data files, more synced commits that stay in the log; then
 * it is killed with SIGKILL. One fault is put into one file. Another child
 * opens the store as a user would, reads each record and scans them all:
 *
 *   harmless   no error, and every record as it was acknowledged,
 *   detected   the open or a read reported an error,
 *   silent     no error, but records are lost, wrong or back again,
 *   crashed    the process was ended by a signal, or took over 10 seconds.
 *
 * Where a fault goes is drawn from seed, file, fault and trial, the same for
 * each store, and scaled to the used length of one of its files (without the
 * zeros that stand ready at the end). The table goes to stdout as Markdown.
 * The exit status is 1 when kvmeta was silent or crashed.
 *
 *   --trials N     of each row; default 300
 *   --store X      only this one: kvmeta, sqlite, sqlite-strict, leveldb, ...
 *   --file X --fault X --trial N      only this trial, with its verdict
 *   --seed N, --workers N
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1                  /* nftw, mkdtemp */
#endif

#include "../../support/support.h"
#include "compare.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define KEYS 300u
#define DATA_COMMITS 600u                /* before the store settles */
#define LOG_COMMITS 200u                 /* after that */
#define FIXTURES 4u                      /* stores of a kind to be damaged */
#define FILES_MAX 32u
#define SECTOR 512u
#define SECONDS_MAX 10u
#define MEMORY_MAX ((rlim_t)4 << 30)

enum fault_kind { FLIP, TRUNCATE, ZERO, FAULT_KINDS };
enum verdict { HARMLESS, SILENT, DETECTED, CRASHED, VERDICTS };

static const char *const file_names[FILE_KINDS] = {"log", "data", "meta"};
static const char *const file_titles[FILE_KINDS] = {"log", "data", "metadata"};
static const char *const fault_names[FAULT_KINDS] = {"flip", "truncate",
                                                     "zero"};
static const char *const fault_titles[FAULT_KINDS] = {
    "a bit flipped", "truncated", "a sector zeroed"};
static const char *const verdict_names[VERDICTS] = {"harmless", "silent",
                                                    "detected", "crashed"};

struct file {
    char name[64];
    unsigned char *data;
    size_t bytes;
    size_t used;                         /* without the zeros at its end */
    enum file_kind kind;
};

struct fixture {
    struct file files[FILES_MAX];
    unsigned count;
};

/* What to print of a store that takes part, or why it does not. */
struct entry {
    const struct store *store;           /* NULL: it does not take part */
    const char *title;                   /* when it is not installed */
    struct fixture fixtures[FIXTURES];
};

struct trial {
    const struct entry *entry;
    enum file_kind file;
    enum fault_kind fault;
    uint64_t number;
};

typedef atomic_uint_fast64_t tally[FILE_KINDS][FAULT_KINDS][VERDICTS];

static struct entry entries[] = {
    {.store = &store_kvmeta, .title = "kvmeta"},
#ifdef HAVE_SQLITE
    {.store = &store_sqlite, .title = "SQLite"},
    {.store = &store_sqlite_strict, .title = "SQLite"},
#else
    {.title = "SQLite"},
#endif
#ifdef HAVE_LEVELDB
    {.store = &store_leveldb, .title = "LevelDB"},
    {.store = &store_leveldb_strict, .title = "LevelDB"},
#else
    {.title = "LevelDB"},
#endif
#ifdef HAVE_ROCKSDB
    {.store = &store_rocksdb, .title = "RocksDB"},
    {.store = &store_rocksdb_strict, .title = "RocksDB"},
#else
    {.title = "RocksDB"},
#endif
#ifdef HAVE_LMDB
    {.store = &store_lmdb, .title = "LMDB"},
#else
    {.title = "LMDB"},
#endif
};

#define ENTRIES (sizeof entries / sizeof entries[0])

static char top[300];                    /* all directories are below it */
static struct test_oracle oracle;
static tally *tallies;                   /* [ENTRIES], shared with children */

int name_ends(const char *name, const char *end)
{
    size_t bytes = strlen(name), want = strlen(end);

    return bytes >= want && strcmp(name + bytes - want, end) == 0;
}

static void die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("compare: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

/* --------------------------------------------------------------------------
 * Directories
 * -------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *st, int type,
                        struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}

static void fresh_dir(const char *dir)
{
    nftw(dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    if (mkdir(dir, 0700) != 0) die("%s: cannot be made", dir);
}

static void write_file(const char *dir, const struct file *file)
{
    char path[1024];
    int fd;

    snprintf(path, sizeof path, "%s/%s", dir, file->name);
    fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, file->data, file->bytes) != (ssize_t)file->bytes) {
        die("%s: cannot be written", path);
    }
    close(fd);
}

static void read_file(const char *dir, const char *name, struct file *file)
{
    char path[1024];
    struct stat st;
    int fd;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0) die("%s: cannot be opened", path);
    snprintf(file->name, sizeof file->name, "%.63s", name);
    file->bytes = (size_t)st.st_size;
    file->data = malloc(file->bytes + 1);
    if (file->data == NULL ||
        read(fd, file->data, file->bytes) != (ssize_t)file->bytes) {
        die("%s: cannot be read", path);
    }
    close(fd);
    file->used = file->bytes;
    while (file->used > 0 && file->data[file->used - 1] == 0) {
        file->used--;
    }
}

static int file_order(const void *a, const void *b)
{
    return strcmp(((const struct file *)a)->name,
                  ((const struct file *)b)->name);
}

static void read_fixture(const struct store *store, const char *dir,
                         struct fixture *f)
{
    DIR *list = opendir(dir);
    const struct dirent *child;

    if (list == NULL) die("%s: cannot be listed", dir);
    while ((child = readdir(list)) != NULL) {
        if (child->d_type != DT_REG) continue;
        if (f->count == FILES_MAX) die("%s: too many files", dir);
        read_file(dir, child->d_name, &f->files[f->count]);
        f->files[f->count].kind = store->kind(child->d_name);
        f->count++;
    }
    closedir(list);
    qsort(f->files, f->count, sizeof f->files[0], file_order);
}

/* --------------------------------------------------------------------------
 * Records
 * -------------------------------------------------------------------------- */

static void make_key(uint64_t number, unsigned char key[KEY_BYTES])
{
    struct test_rng rng = {test_args.seed * 0x10001u + number};

    kvmeta_u64_to_key(number, key);
    test_rng_bytes(&rng, key + 8, KEY_BYTES - 8);
}

/* Half of a value compresses well. */
static void make_value(uint64_t commit, unsigned char value[VALUE_BYTES])
{
    struct test_rng rng = {test_args.seed * 0x20001u + commit};

    memset(value, (int)(commit % 251), VALUE_BYTES);
    test_rng_bytes(&rng, value, VALUE_BYTES / 2);
}

/* One commit in eight removes its record. Those that stay in the log go to
 * the first third of the keys, so that the data files matter for the others.
 */
static void commit_of(uint64_t commit, unsigned char key[KEY_BYTES],
                      unsigned char value[VALUE_BYTES], int *removes)
{
    struct test_rng rng = {test_args.seed * 0x30001u + commit};

    make_key(test_rng_below(&rng, commit < DATA_COMMITS ? KEYS : KEYS / 3),
             key);
    make_value(commit, value);
    *removes = test_rng_below(&rng, 8) == 0;
}

static void make_oracle(void)
{
    unsigned char key[KEY_BYTES], value[VALUE_BYTES];
    uint64_t commit;
    int removes;

    test_oracle_init(&oracle, KEY_BYTES, VALUE_BYTES);
    for (commit = 0; commit < DATA_COMMITS + LOG_COMMITS; commit++) {
        commit_of(commit, key, value, &removes);
        if (removes) {
            test_oracle_remove(&oracle, key);
        } else {
            test_oracle_put(&oracle, key, value);
        }
    }
}

/* --------------------------------------------------------------------------
 * Children
 * -------------------------------------------------------------------------- */

/* Returns 0 in the child, which is silent, bounded, and leaves no core. */
static pid_t fork_bounded(void)
{
    struct rlimit none = {0, 0}, memory = {MEMORY_MAX, MEMORY_MAX};
    pid_t pid;
    int null;

    fflush(stdout);
    pid = fork();
    if (pid < 0) die("fork failed");
    if (pid > 0) return pid;
    null = open("/dev/null", O_RDWR);
    dup2(null, STDOUT_FILENO);
    dup2(null, STDERR_FILENO);
    setrlimit(RLIMIT_CORE, &none);
    setrlimit(RLIMIT_AS, &memory);
    alarm(SECONDS_MAX);
    return 0;
}

/* In a child: fills the store, and is killed with it open. */
static void fill_and_die(const struct store *store, const char *dir)
{
    unsigned char key[KEY_BYTES], value[VALUE_BYTES];
    void *db = store->open(dir, store->strict);
    uint64_t commit;
    int removes, rc = 0;

    if (db == NULL) _exit(1);
    for (commit = 0; commit < DATA_COMMITS + LOG_COMMITS && rc == 0;
         commit++) {
        if (commit == DATA_COMMITS && store->settle != NULL) {
            rc = store->settle(db);
        }
        commit_of(commit, key, value, &removes);
        if (rc == 0) rc = store->put(db, key, removes ? NULL : value);
    }
    if (rc != 0) _exit(2);
    kill(getpid(), SIGKILL);
}

static void make_fixture(const struct store *store, struct fixture *f)
{
    char dir[320];
    int status;
    pid_t pid;

    snprintf(dir, sizeof dir, "%s/fixture", top);
    fresh_dir(dir);
    pid = fork_bounded();
    if (pid == 0) {
        alarm(0);
        fill_and_die(store, dir);
    }
    waitpid(pid, &status, 0);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
        die("%s: the store could not be filled: status %d", store->title,
            status);
    }
    read_fixture(store, dir, f);
}

static int see(void *user, const void *key, size_t key_bytes,
               const void *value, size_t value_bytes)
{
    return key_bytes != KEY_BYTES || value_bytes != VALUE_BYTES ||
           test_oracle_walk_step(user, key, value) != 0;
}

/* Reads everything. An error anywhere is an error of the whole. */
static enum verdict read_back(const struct store *store, void *db)
{
    struct test_oracle_walk walk = {&oracle, 0};
    unsigned char key[KEY_BYTES], value[VALUE_BYTES];
    const void *want;
    size_t i, bytes;
    int rc, wrong = 0;

    for (i = 0; i < KEYS; i++) {
        make_key(i, key);
        rc = store->get(db, key, value, &bytes);
        if (rc == STORE_ERROR) return DETECTED;
        want = test_oracle_get(&oracle, key);
        wrong |= (rc == STORE_FOUND) != (want != NULL);
        wrong |= rc == STORE_FOUND && want != NULL &&
                 (bytes != VALUE_BYTES || memcmp(value, want, bytes) != 0);
    }
    if (store->scan(db, see, &walk) == STORE_ERROR) return DETECTED;
    return wrong || walk.at != oracle.count ? SILENT : HARMLESS;
}

/* The child does not close the store: that might write to it. */
static enum verdict open_and_read(const struct store *store, const char *dir)
{
    pid_t pid = fork_bounded();
    int status;

    if (pid == 0) {
        void *db = store->open(dir, store->strict);

        _exit(db == NULL ? DETECTED : (int)read_back(store, db));
    }
    waitpid(pid, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) >= CRASHED) return CRASHED;
    return (enum verdict)WEXITSTATUS(status);
}

/* --------------------------------------------------------------------------
 * Faults
 * -------------------------------------------------------------------------- */

static const struct file *choose_file(const struct fixture *f,
                                      enum file_kind kind,
                                      struct test_rng *rng)
{
    const struct file *found[FILES_MAX];
    unsigned i, count = 0;

    for (i = 0; i < f->count; i++) {
        if (f->files[i].kind == kind && f->files[i].used > 0) {
            found[count++] = &f->files[i];
        }
    }
    return count == 0 ? NULL : found[test_rng_below(rng, count)];
}

/* 0 <= p < n, at the same part of n for each store. */
static size_t place(struct test_rng *rng, size_t n)
{
    return (size_t)((double)(test_rng_u64(rng) >> 11) / 9007199254740992.0 *
                    (double)n);
}

/* A sector that holds anything but zeros. */
static void zero_sector(struct file *file, struct test_rng *rng)
{
    static const unsigned char zeros[SECTOR];
    size_t off, bytes;

    do {
        off = place(rng, file->used) / SECTOR * SECTOR;
        bytes = file->bytes - off < SECTOR ? file->bytes - off : SECTOR;
    } while (memcmp(file->data + off, zeros, bytes) == 0);
    memset(file->data + off, 0, bytes);
}

/* *damaged: a copy of the file with the fault. */
static void damage(const struct file *file, enum fault_kind fault,
                   struct test_rng *rng, struct file *damaged)
{
    size_t at;

    *damaged = *file;
    damaged->data = malloc(file->bytes + 1);
    if (damaged->data == NULL) die("out of memory");
    memcpy(damaged->data, file->data, file->bytes);
    if (fault == FLIP) {
        at = place(rng, file->used * 8);
        damaged->data[at / 8] ^= (unsigned char)(1u << at % 8);
    } else if (fault == TRUNCATE) {
        damaged->bytes = place(rng, file->used);
    } else {
        zero_sector(damaged, rng);
    }
}

static void write_damaged(const char *dir, const struct fixture *f,
                          const struct file *target,
                          const struct file *damaged)
{
    unsigned i;

    fresh_dir(dir);
    for (i = 0; i < f->count; i++) {
        write_file(dir, &f->files[i] == target ? damaged : &f->files[i]);
    }
}

/* VERDICTS: the store has no such file. */
static enum verdict run_trial(const struct trial *trial, unsigned worker)
{
    const struct fixture *f =
        &trial->entry->fixtures[trial->number % FIXTURES];
    struct test_rng rng = {test_args.seed * 0x40001u + trial->number +
                           ((uint64_t)trial->file << 32) +
                           ((uint64_t)trial->fault << 40)};
    const struct file *target;
    struct file damaged;
    char dir[320];

    target = choose_file(f, trial->file, &rng);
    if (target == NULL) return VERDICTS;
    snprintf(dir, sizeof dir, "%s/trial-%u", top, worker);
    damage(target, trial->fault, &rng, &damaged);
    write_damaged(dir, f, target, &damaged);
    free(damaged.data);
    return open_and_read(trial->entry->store, dir);
}

/* --------------------------------------------------------------------------
 * All trials
 * -------------------------------------------------------------------------- */

/* A fixture without a fault must be read back without one. */
static void check_fixture(const struct entry *entry, const struct fixture *f)
{
    char dir[320];
    enum verdict verdict;

    snprintf(dir, sizeof dir, "%s/control", top);
    write_damaged(dir, f, NULL, NULL);
    verdict = open_and_read(entry->store, dir);
    if (verdict != HARMLESS) {
        die("%s: without any fault: %s", entry->store->title,
            verdict_names[verdict]);
    }
}

static int chosen(const char *option, const char *name)
{
    const char *want = test_option(option);

    return want == NULL || strcmp(want, name) == 0;
}

static void make_fixtures(void)
{
    struct entry *entry;
    unsigned i;

    for (entry = entries; entry < entries + ENTRIES; entry++) {
        if (entry->store == NULL) {
            printf("SKIPPED: %s is not installed: make deps-bench\n",
                   entry->title);
        } else if (!chosen("store", entry->store->name)) {
            entry->store = NULL;
        }
        for (i = 0; i < FIXTURES && entry->store != NULL; i++) {
            make_fixture(entry->store, &entry->fixtures[i]);
            check_fixture(entry, &entry->fixtures[i]);
        }
    }
}

static void run_row(struct trial *trial, uint64_t trials, unsigned worker,
                    unsigned workers)
{
    tally *of = &tallies[trial->entry - entries];
    enum verdict verdict;

    for (trial->number = worker; trial->number < trials;
         trial->number += workers) {
        verdict = run_trial(trial, worker);
        if (verdict == VERDICTS) return;
        atomic_fetch_add(&(*of)[trial->file][trial->fault][verdict], 1);
        if (trial->entry->store == &store_kvmeta &&
            (verdict == SILENT || verdict == CRASHED)) {
            printf("kvmeta: %s\n", verdict_names[verdict]);
            test_replay("--store kvmeta --file %s --fault %s --trial %llu",
                        file_names[trial->file], fault_names[trial->fault],
                        (unsigned long long)trial->number);
        }
    }
}

static int run_all(void *user, unsigned worker, unsigned workers)
{
    const uint64_t *trials = user;
    struct trial trial;
    unsigned i;

    for (i = 0; i < ENTRIES * FILE_KINDS * FAULT_KINDS; i++) {
        trial.entry = &entries[i / FAULT_KINDS / FILE_KINDS];
        trial.file = (enum file_kind)(i / FAULT_KINDS % FILE_KINDS);
        trial.fault = (enum fault_kind)(i % FAULT_KINDS);
        if (trial.entry->store != NULL &&
            chosen("file", file_names[trial.file]) &&
            chosen("fault", fault_names[trial.fault])) {
            run_row(&trial, *trials, worker, workers);
        }
    }
    return 0;
}

static void run_one(uint64_t number)
{
    struct trial trial = {.number = number};
    enum verdict verdict;
    struct entry *entry;
    unsigned i;

    for (entry = entries; entry < entries + ENTRIES; entry++) {
        for (i = 0; i < FILE_KINDS * FAULT_KINDS && entry->store; i++) {
            trial.entry = entry;
            trial.file = (enum file_kind)(i / FAULT_KINDS);
            trial.fault = (enum fault_kind)(i % FAULT_KINDS);
            if (!chosen("file", file_names[trial.file]) ||
                !chosen("fault", fault_names[trial.fault])) {
                continue;
            }
            verdict = run_trial(&trial, 0);
            printf("%s, %s, %s, %llu: %s\n", entry->store->title,
                   file_titles[trial.file], fault_titles[trial.fault],
                   (unsigned long long)number,
                   verdict == VERDICTS ? "no such file"
                                       : verdict_names[verdict]);
        }
    }
}

/* --------------------------------------------------------------------------
 * The table
 * -------------------------------------------------------------------------- */

static unsigned long long count_of(const struct entry *entry, unsigned file,
                                   unsigned fault, enum verdict verdict)
{
    return atomic_load(&tallies[entry - entries][file][fault][verdict]);
}

static void print_row(const struct entry *entry, unsigned file,
                      unsigned fault)
{
    unsigned long long n[VERDICTS], trials = 0;
    unsigned i;

    for (i = 0; i < VERDICTS; i++) {
        n[i] = count_of(entry, file, fault, (enum verdict)i);
        trials += n[i];
    }
    if (trials == 0) return;
    printf("| %s | %s | %s | %llu | %llu | %llu | %llu | %llu |\n",
           entry->store->title, file_titles[file], fault_titles[fault],
           trials, n[HARMLESS], n[DETECTED], n[SILENT], n[CRASHED]);
}

/* Returns how often kvmeta was silent or crashed. */
static uint64_t print_table(void)
{
    const struct entry *entry;
    uint64_t bad = 0;
    unsigned i, k;

    printf("\n| Store | File | Fault | Trials | Harmless | Detected | Silent "
           "| Crashed |\n|---|---|---|--:|--:|--:|--:|--:|\n");
    for (entry = entries; entry < entries + ENTRIES; entry++) {
        if (entry->store == NULL) continue;
        for (i = 0; i < FILE_KINDS; i++) {
            for (k = 0; k < FAULT_KINDS; k++) {
                print_row(entry, i, k);
                if (entry->store == &store_kvmeta) {
                    bad += count_of(entry, i, k, SILENT) +
                           count_of(entry, i, k, CRASHED);
                }
            }
        }
    }
    return bad;
}

/* The same by store: how often it was silent, and how often it crashed. */
static void print_summary(void)
{
    const struct entry *entry;
    unsigned i;

    printf("\nSilent, and where there are two numbers crashed:\n\n| Store ");
    for (i = 0; i < FILE_KINDS * FAULT_KINDS; i++) {
        printf("| %s: %s ", file_titles[i / FAULT_KINDS],
               fault_titles[i % FAULT_KINDS]);
    }
    printf("|\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
    for (entry = entries; entry < entries + ENTRIES; entry++) {
        if (entry->store == NULL) continue;
        printf("| %s |", entry->store->title);
        for (i = 0; i < FILE_KINDS * FAULT_KINDS; i++) {
            unsigned file = i / FAULT_KINDS, fault = i % FAULT_KINDS, v;
            unsigned long long crashed, trials = 0;

            for (v = 0; v < VERDICTS; v++) {
                trials += count_of(entry, file, fault, v);
            }
            crashed = count_of(entry, file, fault, CRASHED);
            if (trials > 0) {
                printf(" %llu", count_of(entry, file, fault, SILENT));
            }
            if (crashed > 0) printf(" + %llu", crashed);
            fputs(trials > 0 ? " |" : " - |", stdout);
        }
        printf("\n");
    }
}

int main(int argc, char **argv)
{
    const char *tmp = getenv("TMPDIR");
    uint64_t trials, bad = 0;
    int failed = 0;

    test_parse_args(argc, argv);
    trials = test_option_u64("trials", 300);
    snprintf(top, sizeof top, "%s/kvmeta-compare-XXXXXX",
             tmp != NULL && strlen(tmp) < 256 ? tmp : "/tmp");
    if (mkdtemp(top) == NULL) die("%s: cannot be made", top);
    tallies = test_shared(ENTRIES * sizeof *tallies);
    make_oracle();
    make_fixtures();
    if (test_option("trial") != NULL) {
        run_one(test_option_u64("trial", 0));
    } else {
        failed = test_fork(test_workers(), run_all, &trials);
        bad = print_table();
        print_summary();
    }
    nftw(top, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return failed > 0 || bad > 0;
}
