/*
 * Bit rot: every fault in every file of many small stores. A store that is
 * opened after one must refuse and name the file, or hold what it held.
 *
 *   --seed N     other stores
 *   --scale N    N times as many (0: a sample of the faults of one of each)
 *   --kind K --fixture S [--fault I]   one store, or one fault of it, again
 *
 * SPDX-License-Identifier: MIT
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#  define _GNU_SOURCE 1                  /* as kvmeta.c wants it */
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <signal.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#if defined(__GLIBC__)
#  include <malloc.h>
#endif

#define KVMETA_STATIC
#include "contexts.h"
#include "../../kvmeta.c"
#include "faults.h"

#define SEEDS 100000u                    /* more than any kind has */
#define RESTARTS_MAX 64
#define REPLAYS_MAX 12
#define FLIPS_WANTED 5000000u
#define OTHERS_WANTED 1000000u
#define SAMPLE_STRIDE 211u
#define THIN 32u
#define THIN_SAMPLED 4093u

/* What one process has found; shared with the parent, so that it outlives a
 * crash. */
struct worker {
    uint64_t job;
    int active;                          /* a job is under way */
    int making;                          /* its fixture is being made */
    uint64_t fault;                      /* the one that is tried */
    enum rot_class class;
    uint64_t resume;                     /* skip the faults before */
    uint64_t tried;
    unsigned replays;
    uint64_t counts[ROT_KINDS][ROT_CLASSES][ROT_VERDICTS];
    struct rot_found found;
};

struct shared {
    atomic_uint_fast64_t next_job;
    uint64_t jobs;
    struct worker workers[64];
};

static struct shared *shared;
static struct rot_fixture fixture;

/* --------------------------------------------------------------------------
 * Jobs: one fixture each
 * -------------------------------------------------------------------------- */

/* Seeds of a kind: at least one. */
static uint64_t seeds_of(size_t kind)
{
    return test_args.scale == 0 ? 1 : rot_kinds[kind].weight * test_args.scale;
}

static uint64_t count_jobs(void)
{
    uint64_t jobs = 0;
    size_t kind;

    for (kind = 0; kind < ROT_KINDS; kind++) {
        jobs += seeds_of(kind);
    }
    return jobs;
}

/* The kind of a job; *nth: which seed of this kind it is. The kinds take
 * turns, so that the first minute sees all of them. */
static size_t job_kind(uint64_t job, uint64_t *nth)
{
    uint64_t round;
    size_t kind;

    for (round = 0;; round++) {
        for (kind = 0; kind < ROT_KINDS; kind++) {
            if (round < seeds_of(kind) && job-- == 0) {
                *nth = round;
                return kind;
            }
        }
    }
}

static uint64_t job_seed(uint64_t job)
{
    uint64_t nth;
    size_t kind = job_kind(job, &nth);

    return (test_args.seed * SEEDS + nth) * 101 + kind;
}

struct job_run {
    struct worker *worker;
    struct rot_judge judge;
    size_t kind;
    uint64_t only;                       /* this fault; UINT64_MAX: all */
    int talks;
};

static void describe(const struct rot_fault *fault)
{
    unsigned i;

    printf("  %s:", rot_class_names[fault->class]);
    for (i = 0; i < fault->count; i++) {
        const struct rot_change *c = &fault->changes[i];

        printf(" %s %s %llu bytes at %llu;", c->name,
               c->data == NULL ? "removed," : c->whole ? "replaced by"
                                                       : "changed in",
               (unsigned long long)c->bytes, (unsigned long long)c->off);
    }
    if (fault->hits_live) {
        printf(" live log differs from %llu to %lld",
               (unsigned long long)fault->live_from,
               (long long)fault->live_to);
    }
    printf("\n");
}

static void report(struct job_run *run, uint64_t index,
                   const struct rot_fault *fault, enum rot_verdict verdict)
{
    if (!run->talks && (verdict < ROT_ALARM ||
                        run->worker->replays++ >= REPLAYS_MAX)) {
        return;
    }
    printf("%s (%s): %s; open said %d: %s\n", rot_verdict_names[verdict],
           run->judge.f->kind->name, run->judge.why, run->judge.err.code,
           run->judge.err.message);
    describe(fault);
    if (verdict >= ROT_ALARM) {
        test_replay("--kind %zu --fixture %llu --fault %llu", run->kind,
                    (unsigned long long)run->judge.f->seed,
                    (unsigned long long)index);
    }
}

static void visit(void *user, uint64_t index, const struct rot_fault *fault)
{
    struct job_run *run = user;
    struct worker *worker = run->worker;
    enum rot_verdict verdict;

    if (index < worker->resume ||
        (run->only != UINT64_MAX && index != run->only) ||
        (test_args.scale == 0 && !run->talks && index % SAMPLE_STRIDE != 0)) {
        return;
    }
    if (worker->tried++ % 256 == 0) {
        alarm(120);                      /* a hang is a crash, too */
    }
    worker->fault = index;
    worker->class = fault->class;
    run->judge.index = test_args.scale == 0 ? index / SAMPLE_STRIDE : index;
    verdict = rot_judge_fault(&run->judge, fault);
    worker->counts[run->kind][fault->class][verdict]++;
    if (verdict >= ROT_ALARM || run->talks) {
        report(run, index, fault, verdict);
    }
}

/* The first fixture of a kind has all faults; see rot_in_gap. */
static uint64_t thinness(size_t kind, uint64_t nth)
{
    return rot_kinds[kind].sampled ? THIN_SAMPLED : nth == 0 ? 1 : THIN;
}

static void run_fixture(struct worker *worker, size_t kind, uint64_t seed,
                        uint64_t thin, uint64_t only, int talks)
{
    struct job_run run;

    memset(&run, 0, sizeof run);
    run.worker = worker;
    run.judge.f = &fixture;
    run.judge.found = &worker->found;
    run.kind = kind;
    run.only = only;
    run.talks = talks;
    worker->making = 1;
    rot_fixture_make(&fixture, &rot_kinds[kind], seed);
    worker->making = 0;
    rot_walk_all(&fixture, thin, visit, &run);
    rot_fixture_free(&fixture);
}

static int run_worker(void *arg, unsigned which, unsigned workers)
{
    struct worker *worker = &shared->workers[which];
    uint64_t nth;
    size_t kind;

    (void)arg;
    (void)workers;
    for (;;) {
        if (!worker->active) {
            worker->job = atomic_fetch_add(&shared->next_job, 1);
            worker->resume = 0;
            worker->fault = 0;
        }
        if (worker->job >= shared->jobs) {
            return 0;
        }
        worker->active = 1;
        kind = job_kind(worker->job, &nth);
        run_fixture(worker, kind, job_seed(worker->job), thinness(kind, nth),
                    UINT64_MAX, 0);
        worker->active = 0;
    }
}

/* --------------------------------------------------------------------------
 * All jobs, whatever crashes
 * -------------------------------------------------------------------------- */

/* Counts the fault at which a process ended, and lets it go on behind it. */
static void bury(struct worker *worker)
{
    uint64_t nth;
    size_t kind = job_kind(worker->job, &nth);

    worker->counts[kind][worker->class][ROT_CRASHED]++;
    printf("CRASHED (%s)%s\n", rot_kinds[kind].name,
           worker->making ? " while the store was made" : "");
    test_replay("--kind %zu --fixture %llu --fault %llu", kind,
                (unsigned long long)job_seed(worker->job),
                (unsigned long long)worker->fault);
    worker->resume = worker->fault + 1;
    if (worker->making) {
        worker->active = 0;
    }
}

static void run_all(unsigned workers)
{
    unsigned i, restarts = 0;

    while (test_fork(workers, run_worker, NULL) != 0 &&
           restarts++ < RESTARTS_MAX) {
        for (i = 0; i < workers; i++) {
            if (shared->workers[i].active) {
                bury(&shared->workers[i]);
            }
        }
    }
}

/* --------------------------------------------------------------------------
 * Sums
 * -------------------------------------------------------------------------- */

static uint64_t sum(size_t kind, int class, int verdict)
{
    uint64_t n = 0;
    unsigned i;

    for (i = 0; i < 64; i++) {
        n += shared->workers[i].counts[kind][class][verdict];
    }
    return n;
}

/* A negative argument stands for all. */
static uint64_t total(int kind, int class, int verdict)
{
    uint64_t n = 0;
    int k, c, v;

    for (k = 0; k < (int)ROT_KINDS; k++) {
        for (c = 0; c < ROT_CLASSES; c++) {
            for (v = 0; v < ROT_VERDICTS; v++) {
                if ((kind < 0 || k == kind) && (class < 0 || c == class) &&
                    (verdict < 0 || v == verdict)) {
                    n += sum((size_t)k, c, v);
                }
            }
        }
    }
    return n;
}

static struct rot_found total_found(void)
{
    struct rot_found all = {0};
    const uint64_t *from;
    uint64_t *to = (uint64_t *)&all;
    size_t i, n = sizeof all / sizeof *to;
    unsigned w;

    for (w = 0; w < 64; w++) {
        from = (const uint64_t *)&shared->workers[w].found;
        for (i = 0; i < n; i++) {
            to[i] += from[i];
        }
    }
    return all;
}

static void print_row(const char *name, int kind, int class)
{
    int v;

    printf("# %-20s %9llu", name,
           (unsigned long long)total(kind, class, -1));
    for (v = 0; v < ROT_VERDICTS; v++) {
        printf(" %8llu", (unsigned long long)total(kind, class, v));
    }
    printf("\n");
}

static void print_head(const char *what)
{
    int v;

    printf("# %-20s %9s", what, "faults");
    for (v = 0; v < ROT_VERDICTS; v++) {
        printf(" %8s", rot_verdict_names[v]);
    }
    printf("\n");
}

static void print_sums(double seconds)
{
    struct rot_found found = total_found();
    uint64_t faults = total(-1, -1, -1);
    uint64_t flips = total(-1, ROT_FLIP, -1);
    int i;

    printf("# %llu flips and %llu other faults in %llu stores, %.1f s\n",
           (unsigned long long)flips, (unsigned long long)(faults - flips),
           (unsigned long long)shared->jobs, seconds);
    print_head("store");
    for (i = 0; i < (int)ROT_KINDS; i++) {
        print_row(rot_kinds[i].name, i, -1);
    }
    print_row("all", -1, -1);
    print_head("fault");
    for (i = 0; i < ROT_CLASSES; i++) {
        print_row(rot_class_names[i], -1, i);
    }
    printf("# opens %llu (torn header %llu, body %llu; healed %llu; "
           "garbage files %llu), read-only %llu, second %llu, hashed "
           "%llu\n", (unsigned long long)found.opens,
           (unsigned long long)found.torn[KVMETA_TORN_HEADER],
           (unsigned long long)found.torn[KVMETA_TORN_BODY],
           (unsigned long long)found.healed,
           (unsigned long long)found.garbage_files,
           (unsigned long long)found.read_only,
           (unsigned long long)found.second_opens,
           (unsigned long long)found.hashed);
    fflush(stdout);
}

/* --------------------------------------------------------------------------
 * Tests: all faults are tried once, before them; each asks for one thing
 * -------------------------------------------------------------------------- */

static double now_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Every open asks for some hundreds of KiB: without these the C library gets
 * them from the system, and gives them back, each time. */
static void keep_memory(void)
{
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 64 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

static int try_all_faults(void **state)
{
    double start = now_s();

    (void)state;
    shared->jobs = count_jobs();
    run_all(test_workers());
    print_sums(now_s() - start);
    return 0;
}

/* Goal: no damage at all makes a store open with other records than it had,
 * lose what was acknowledged, or change its directory before an error. */
static void no_damage_is_silent(void **state)
{
    (void)state;
    assert_int_equal(total(-1, -1, ROT_SILENT), 0);
}

/* Goal: no damage crashes or hangs an open, or makes it leak. */
static void no_damage_crashes(void **state)
{
    (void)state;
    assert_int_equal(total(-1, -1, ROT_CRASHED), 0);
    assert_true(total(-1, -1, ROT_DETECTED) > 0);
}

/* Goal: damaged marks, one damaged copy of the manifest, a damaged tail that
 * nobody was promised, and old files that come back keep no store from
 * opening. */
static void harmless_damage_raises_no_alarm(void **state)
{
    (void)state;
    assert_int_equal(total(-1, -1, ROT_ALARM), 0);
    assert_true(total(-1, -1, ROT_HARMLESS) > 0);
}

/* Goal: the window that the header of kvmeta.h admits is all there is: commits
 * are dropped only in the store whose marks were lost, and only where the
 * last one was hit. */
static void only_the_admitted_window_drops_commits(void **state)
{
    int kind;

    (void)state;
    for (kind = 0; kind < (int)ROT_KINDS; kind++) {
        if (rot_kinds[kind].live == rot_live_cut_unmarked) {
            assert_true(total(kind, -1, ROT_RESIDUAL) > 0);
        } else {
            assert_int_equal(total(kind, -1, ROT_RESIDUAL), 0);
        }
    }
}

/* Goal: the figures that are claimed were reached, in every kind of store and
 * with every kind of fault. */
static void as_many_faults_as_claimed(void **state)
{
    uint64_t flips = total(-1, ROT_FLIP, -1);
    int i;

    (void)state;
    for (i = 0; i < (int)ROT_KINDS; i++) {
        assert_true(total(i, -1, -1) > 0);
    }
    for (i = 0; i < ROT_CLASSES && test_args.scale > 0; i++) {
        assert_true(total(-1, i, -1) > 0);
    }
    if (test_args.scale > 0) {
        assert_true(flips >= FLIPS_WANTED);
        assert_true(total(-1, -1, -1) - flips >= OTHERS_WANTED);
    }
}

/* Goal: the faults have gone where recovery does something rare. */
static void rare_branches_were_taken(void **state)
{
    struct rot_found found = total_found();

    (void)state;
    assert_true(found.torn[KVMETA_TORN_HEADER] > 0);
    assert_true(found.torn[KVMETA_TORN_BODY] > 0);
    assert_true(found.healed > 0);
    assert_true(found.garbage_files > 0);
    assert_true(found.read_only > 0);
    assert_true(found.second_opens > 0);
}

/* Goal: see one fault again, in this process. */
static void given_fault_is_no_failure(void **state)
{
    size_t kind = (size_t)test_option_u64("kind", 0);
    uint64_t seed = test_option_u64("fixture", job_seed(0));
    uint64_t only = test_option_u64("fault", UINT64_MAX);
    uint64_t nth = seed / 101 % SEEDS;

    (void)state;
    assert_true(kind < ROT_KINDS);
    run_fixture(&shared->workers[0], kind, seed,
                thinness(kind, nth), only, only != UINT64_MAX);
    print_sums(0);
    assert_int_equal(total(-1, -1, ROT_SILENT), 0);
    assert_int_equal(total(-1, -1, ROT_ALARM), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_damage_is_silent),
        cmocka_unit_test(no_damage_crashes),
        cmocka_unit_test(harmless_damage_raises_no_alarm),
        cmocka_unit_test(only_the_admitted_window_drops_commits),
        cmocka_unit_test(as_many_faults_as_claimed),
        cmocka_unit_test(rare_branches_were_taken),
    };
    const struct CMUnitTest one[] = {
        cmocka_unit_test(given_fault_is_no_failure),
    };

    test_parse_args(argc, argv);
    keep_memory();
    shared = test_shared(sizeof *shared);
    if (test_option("kind") != NULL) {
        return cmocka_run_group_tests(one, NULL, NULL);
    }
    return cmocka_run_group_tests(tests, try_all_faults, NULL);
}
