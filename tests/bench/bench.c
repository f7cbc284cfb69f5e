/*
 * The benchmark: kvmeta beside its peers and beside the limits of the machine.
 *
 *   bench [--engine LIST] [--workload LIST] [--records LIST] [--rounds R]
 *         [--widths K+V] [--seconds S] [--json FILE] [--check] [--margin M]
 *         [--list]
 *
 * Every group of workloads of every engine runs in a process of its own, the
 * engines one after another within a round, so that what else the machine
 * does meets all of them. Figures are medians over the rounds; those of one
 * run may be compared, those of two runs not.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE             /* nftw, mkdtemp */

#include "bench.h"
#include "report.h"

#include <ftw.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const struct engine *const engines[] = {
    &engine_kvmeta,
#ifdef HAVE_ABSL
    &engine_absl,
#endif
#ifdef HAVE_LMDB
    &engine_lmdb,
#endif
#ifdef HAVE_ROCKSDB
    &engine_rocksdb,
#endif
#ifdef HAVE_LEVELDB
    &engine_leveldb,
#endif
#ifdef HAVE_SQLITE
    &engine_sqlite,
#endif
#ifdef HAVE_WIREDTIGER
    &engine_wiredtiger,
#endif
    NULL
};

struct options {
    const char *engine_list;
    const char *workload_list;
    const char *records_list;
    const char *json;
    unsigned rounds;
    size_t key_bytes;
    size_t value_bytes;
    double seconds;
    double margin;
    bool check;
};

static int report_fd = -1;
static volatile sig_atomic_t interrupted;

/* --------------------------------------------------------------------------
 * For all parts
 * -------------------------------------------------------------------------- */

void bench_die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    (void)fputs("bench: ", stderr);
    (void)vfprintf(stderr, format, args);
    (void)fputc('\n', stderr);
    va_end(args);
    _exit(2);
}

double bench_now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

void *bench_alloc(size_t bytes)
{
    void *memory = malloc(bytes);

    if (memory == NULL) bench_die("out of memory");
    return memory;
}

void bench_report(const char *workload, double value)
{
    if (dprintf(report_fd, "%s %.9g\n", workload, value) < 0) {
        bench_die("cannot report");
    }
}

/* --------------------------------------------------------------------------
 * Command line
 * -------------------------------------------------------------------------- */

/* Whether a list such as "a,b" names the word; "all" names every one. */
static bool list_has(const char *list, const char *word)
{
    size_t bytes = strlen(word);

    if (strcmp(list, "all") == 0) return true;
    while (list != NULL && *list != '\0') {
        if (strncmp(list, word, bytes) == 0
            && (list[bytes] == ',' || list[bytes] == '\0')) {
            return true;
        }
        list = strchr(list, ',');
        if (list != NULL) list++;
    }
    return false;
}

static bool name_known(const char *name)
{
    size_t i;

    if (strcmp(name, "limits") == 0) return true;
    for (i = 0; engines[i] != NULL; i++) {
        if (strcmp(engines[i]->name, name) == 0) return true;
    }
    for (i = 0; i < workload_count; i++) {
        if (strcmp(workloads[i].name, name) == 0) return true;
    }
    return false;
}

static void list_check(const char *list)
{
    char name[64];
    size_t bytes;

    if (strcmp(list, "all") == 0) return;
    for (; *list != '\0'; list += bytes + (list[bytes] == ',')) {
        bytes = strcspn(list, ",");
        (void)snprintf(name, sizeof name, "%.*s", (int)bytes, list);
        if (!name_known(name)) {
            bench_die("%s: no such engine in this build, or no such workload",
                      name);
        }
    }
}

static void list_print(void)
{
    size_t i;

    for (i = 0; engines[i] != NULL; i++) {
        printf("engine    %-18s %s\n", engines[i]->name, engines[i]->title);
    }
    printf("engine    %-18s %s\n", "limits", "what the machine can do");
    for (i = 0; i < workload_count; i++) {
        printf("workload  %-18s %s, %s\n", workloads[i].name,
               workloads[i].title, workloads[i].unit);
    }
}

static void widths_parse(struct options *options, const char *text)
{
    unsigned key, value;

    if (sscanf(text, "%u+%u", &key, &value) != 2 || key < 8 || value < 8
        || key % 8 != 0 || value % 8 != 0 || key > BENCH_KEY_BYTES_MAX
        || value > BENCH_VALUE_BYTES_MAX) {
        bench_die("--widths %s: want K+V, multiples of 8, up to 64", text);
    }
    options->key_bytes = key;
    options->value_bytes = value;
}

/* Takes one option that has a value. */
static void option_take(struct options *options, const char *name,
                        const char *value)
{
    if (strcmp(name, "--engine") == 0) options->engine_list = value;
    else if (strcmp(name, "--workload") == 0) options->workload_list = value;
    else if (strcmp(name, "--records") == 0) options->records_list = value;
    else if (strcmp(name, "--json") == 0) options->json = value;
    else if (strcmp(name, "--widths") == 0) widths_parse(options, value);
    else if (strcmp(name, "--seconds") == 0) options->seconds = atof(value);
    else if (strcmp(name, "--margin") == 0) options->margin = atof(value);
    else if (strcmp(name, "--rounds") == 0) {
        options->rounds = (unsigned)atoi(value);
    } else {
        bench_die("%s: no such option", name);
    }
}

static void options_parse(struct options *options, int argc, char **argv)
{
    int i;

    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--check") == 0) {
            options->check = true;
        } else if (strcmp(argv[i], "--list") == 0) {
            list_print();
            exit(0);
        } else if (i + 1 == argc) {
            bench_die("%s: no such option, or its value is missing", argv[i]);
        } else {
            option_take(options, argv[i], argv[i + 1]);
            i++;
        }
    }
    list_check(options->engine_list);
    list_check(options->workload_list);
    if (options->rounds < 1 || options->rounds > ROUNDS_MAX) {
        bench_die("--rounds: want 1 to %u", ROUNDS_MAX);
    }
}

/* --------------------------------------------------------------------------
 * One group of one engine, in a process and a directory of its own
 * -------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *stat, int type,
                        struct FTW *ftw)
{
    (void)stat;
    (void)type;
    (void)ftw;
    return remove(path);
}

static void interrupt(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
}

static void signals_set(void (*handler)(int))
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    action.sa_handler = handler;    /* no SA_RESTART: read returns EINTR */
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

static pid_t child_start(const struct run *run, int *from_child)
{
    int ends[2];
    pid_t pid;

    (void)fflush(NULL);
    if (pipe(ends) != 0 || (pid = fork()) < 0) bench_die("cannot fork");
    if (pid > 0) {
        close(ends[1]);
        *from_child = ends[0];
        return pid;
    }
    signals_set(SIG_DFL);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(ends[0]);
    report_fd = ends[1];
    run_group(run);
    _exit(0);
}

/* Reads lines "workload value" until the child has ended. */
static void child_listen(const struct run *run, const char *engine,
                         int from_child)
{
    FILE *lines = fdopen(from_child, "r");
    char workload[64];
    double value;

    while (fscanf(lines, "%63s %lf", workload, &value) == 2) {
        if (!run_wants(run, workload)) continue;
        report_add(engine, workload, run, value);
    }
    fclose(lines);
}

/* Returns whether the group ran to its end. */
static bool run_child(struct run *run, const char *engine)
{
    const char *tmp = getenv("TMPDIR");
    char dir[4096];
    int from_child;
    int status = 0;
    pid_t pid;

    (void)snprintf(dir, sizeof dir, "%s/kvmeta-bench-XXXXXX",
                   tmp != NULL && *tmp != '\0' ? tmp : "/tmp");
    if (mkdtemp(dir) == NULL) bench_die("%s: cannot be created", dir);
    run->dir = dir;
    pid = child_start(run, &from_child);
    child_listen(run, engine, from_child);
    if (interrupted) kill(pid, SIGKILL);
    while (waitpid(pid, &status, 0) < 0 && !interrupted) {}
    (void)nftw(dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    if (interrupted) bench_die("interrupted");
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static bool group_wanted(const struct run *run)
{
    size_t i;

    for (i = 0; i < workload_count; i++) {
        if (workloads[i].group == run->group && run->wanted[i]) return true;
    }
    return false;
}

/* Engine NULL: the limits of the machine. */
static bool run_engine(struct run *run, const struct engine *engine,
                       unsigned round)
{
    const char *name = engine != NULL ? engine->name : "limits";
    bool limits = run->group == GROUP_LIMITS;
    double start = bench_now();
    bool ok;

    if (limits != (engine == NULL)) return true;
    run->engine = engine;
    ok = run_child(run, name);
    (void)fprintf(stderr, "round %u: %-10s group %d, %llu records: %s %.1f s\n",
                  round + 1, name, (int)run->group,
                  (unsigned long long)run->records, ok ? "ok," : "FAILED,",
                  bench_now() - start);
    return ok;
}

static bool run_round(const struct options *options, struct run *run,
                      unsigned round)
{
    bool ok = true;
    size_t i;

    for (run->group = 0; run->group < GROUP_COUNT; run->group++) {
        if (!group_wanted(run)) continue;
        if (list_has(options->engine_list, "limits")) {
            ok = run_engine(run, NULL, round) && ok;
        }
        for (i = 0; engines[i] != NULL; i++) {
            if (!list_has(options->engine_list, engines[i]->name)) continue;
            ok = run_engine(run, engines[i], round) && ok;
        }
    }
    return ok;
}

static bool run_all(const struct options *options)
{
    unsigned char *wanted = bench_alloc(workload_count);
    const char *list = options->records_list;
    struct run run = {0};
    bool ok = true;
    unsigned round;
    size_t i;

    for (i = 0; i < workload_count; i++) {
        wanted[i] = list_has(options->workload_list, workloads[i].name);
    }
    run.wanted = wanted;
    run.key_bytes = options->key_bytes;
    run.value_bytes = options->value_bytes;
    run.seconds = options->seconds;
    for (; *list != '\0'; list += strcspn(list, ","), list += *list == ',') {
        run.records = (uint64_t)strtod(list, NULL);
        if (run.records < BENCH_TXN || run.records % BENCH_TXN != 0
            || run.records > UINT32_MAX) {
            bench_die("--records %s: want multiples of %u", list, BENCH_TXN);
        }
        for (round = 0; round < options->rounds; round++) {
            ok = run_round(options, &run, round) && ok;
        }
    }
    free(wanted);
    return ok;
}

int main(int argc, char **argv)
{
    struct options options = {
        "kvmeta,limits", "all", "1000000", NULL, 3, 16, 16, 2.0, 0.15, false
    };
    bool ok;

    options_parse(&options, argc, argv);
    signals_set(interrupt);
    ok = run_all(&options);
    report_print(stdout);
    if (options.json != NULL) report_json(options.json, argc, argv);
    if (!targets_print(stdout, options.margin) && options.check) ok = false;
    if (!ok) (void)fputs("bench: FAILED\n", stderr);
    return ok ? 0 : 1;
}
