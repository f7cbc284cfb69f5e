/*
 * Fault tests: for every script in a list and every N, the Nth system call or
 * the Nth allocation fails, once or for ever, in the ways that they can.
 *
 * While that lasts every call must answer with a documented error, leave the
 * records as they were, and reads must go on; a failed sync or write makes
 * the store refuse writes, a full disk or no memory do not. Afterwards the
 * process is killed or the power cut, and the store must recover what was
 * acknowledged. Nothing may be leaked: memory, or handles.
 *
 *   --script X --config N --call N --error N --ever N --partial N
 *   --script X --config N --alloc N --ever N
 *   ... --recovery 1 --state N, for a fault in an open after a crash
 *                  only this one
 *   --workers N    processes; default: one a core
 *
 * SPDX-License-Identifier: MIT
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../sim/life.h"

static const char *const scripts[] = {
    "uuuswwBt",                          /* these two alone at scale 0 */
    "pBsrcCO",
    "ppbBsCOpxCO",
    "pruTpruTc",
    "pbrpbrpbrTcp",
    "pkttpktt",
    "prprprCOpTvc",
    "Bgug",
    "gpgTgsT",
    "xpxbpvrv",
};
#define SCRIPT_COUNT (sizeof scripts / sizeof scripts[0])

struct tally {
    uint64_t runs;                       /* a script with a fault in it */
    uint64_t hits;                       /* ... that the fault did hit */
    uint64_t states;                     /* crash states recovered after it */
    uint64_t refused;                    /* ended refusing writes */
    uint64_t no_space;                   /* operations that said E_NOSPACE */
    uint64_t no_memory;                  /* ... E_NOMEM */
    uint64_t failed_opens;
    uint64_t by_call[SIM_CALLS];         /* which call was hit */
    int failed;                          /* no counter: stays the last */
};

/* One fault in one run; what the replay line says. */
struct plan {
    const char *script;
    unsigned config;
    unsigned state;                      /* of the disk before a recovery */
    struct sim_fault fault;
    uint64_t alloc_at;                   /* instead of a system call */
    int ever;
    int recovery;                        /* in the open of `state` */
};

static struct life life_run;             /* large, hence not on the stack */
static struct life life_after;
static struct test_alloc alloc_run;
static struct test_alloc alloc_after;

static void report(struct tally *tally, const struct plan *plan,
                   const struct life *life, const char *where)
{
    if (tally->failed) {
        return;
    }
    tally->failed = 1;
    printf("problem: %s [script %s, config %s, %s; hit: %s]\n", life->problem,
           plan->script, life_configs[plan->config].name, where,
           life_run.fs != NULL && life_run.fs->fault.hits > 0
               ? sim_call_name(life_run.fs->fault.hit_kind) : "no call");
    if (plan->alloc_at != 0) {
        test_replay("--script %s --config %u --alloc %llu --ever %d "
                    "--recovery %d --state %u", plan->script, plan->config,
                    (unsigned long long)plan->alloc_at, plan->ever,
                    plan->recovery, plan->state);
    } else {
        test_replay("--script %s --config %u --call %llu --error %d "
                    "--ever %d --partial %d --recovery %d --state %u",
                    plan->script, plan->config,
                    (unsigned long long)plan->fault.at, plan->fault.error,
                    plan->fault.ever, plan->fault.partial, plan->recovery,
                    plan->state);
    }
}

/* --------------------------------------------------------------------------
 * Faults
 * -------------------------------------------------------------------------- */

static void faults_begin(const struct plan *plan, struct life *life)
{
    life->faulty = 1;
    if (plan->alloc_at != 0) {
        life->alloc->fail_at = atomic_load(&life->alloc->calls) +
                               plan->alloc_at;
        life->alloc->fail_ever = plan->ever;
    } else {
        sim_set_fault(life->fs, plan->fault);
    }
}

/* 1: the fault was met. The counters of the fault stay for the report. */
static int faults_end(struct life *life)
{
    int hit = life->fs->fault.hits > 0 ||
              atomic_load(&life->alloc->failures) > 0;

    life->fs->fault.at = 0;
    life->alloc->fail_at = 0;
    life->faulty = 0;
    return hit;
}

static void count_hit(struct tally *tally, const struct life *life)
{
    tally->hits++;
    if (life->fs->fault.hits > 0) {
        tally->by_call[life->fs->fault.hit_kind]++;
    }
}

/* --------------------------------------------------------------------------
 * After a fault
 * -------------------------------------------------------------------------- */

static void recover(struct tally *tally, const struct plan *plan,
                    struct sim_fs *fs, int kill, const char *where)
{
    struct life *life = &life_after;

    tally->states++;
    life_begin_after(life, &life_run, kill, fs, &alloc_after);
    if (life_open(life) == 0) {
        life_check_directory(life);
        life_op(life, 'p');
        life_op(life, 'C');
    }
    life_check_leaks(life);
    if (life->problem[0] != '\0') {
        report(tally, plan, life, where);
    }
    life_end(life);
    sim_free(fs);
}

/* The end of the process at this moment, or a power cut. */
static void recover_all(struct tally *tally, const struct plan *plan,
                        uint64_t limit, const char *where)
{
    struct sim_fs fs;
    struct sim_cut cut;
    int garbage;

    sim_clone(&fs, life_run.fs);
    recover(tally, plan, &fs, 1, where);
    for (garbage = 0; garbage < 2; garbage++) {
        sim_cut_begin(&cut, life_run.fs, limit, garbage,
                      plan->fault.at * 31 + plan->alloc_at);
        while (!tally->failed && sim_cut_next(&cut, &fs)) {
            recover(tally, plan, &fs, 0, where);
        }
        sim_cut_end(&cut);
    }
}

/* A full disk is no reason to refuse writes for good; nor is a lack of
 * memory or of descriptors. */
static void check_not_broken(const struct plan *plan, struct life *life)
{
    if (plan->alloc_at != 0 && life->broken) {
        life_problem(life, "writes are refused after a lack of memory");
    }
    if (plan->fault.error == ENOSPC && life->broken &&
        life->fs->fault.hit_kind == SIM_FILE_WRITE && !plan->fault.ever) {
        life_problem(life, "writes are refused after a full disk");
    }
    if (plan->fault.error == EMFILE && life->broken && !plan->fault.ever &&
        (life->fs->fault.hit_kind == SIM_FILE_OPEN ||
         life->fs->fault.hit_kind == SIM_RANDOM)) {
        life_problem(life, "writes are refused after a lack of descriptors");
    }
}

/* With the fault gone a store that takes writes does all it should, and has
 * no error left to report. */
static void use_after_fault(struct tally *tally, const struct plan *plan,
                            struct life *life)
{
    struct kvmeta_error error;
    const char *op;

    check_not_broken(plan, life);
    if (kvmeta_last_error(life->db, &error) != 0) {
        life->maybe_broken = 1;          /* by what did not fail a call */
    }
    if (life->broken || life->maybe_broken) {
        life->faulty = 1;
        life_op(life, 'p');
        check_not_broken(plan, life);
    }
    life->faulty = life->broken;
    if (life->broken) {
        tally->refused++;
        return;
    }
    for (op = "pTs"; *op != '\0' && life->problem[0] == '\0'; op++) {
        life_op(life, *op);
    }
    if (life->problem[0] == '\0' && kvmeta_last_error(life->db, &error) != 0) {
        life_problem(life, "an error that is over is still reported: %s",
                     error.message);
    }
}

/* --------------------------------------------------------------------------
 * One run
 * -------------------------------------------------------------------------- */

static void count_result(struct tally *tally, int result)
{
    tally->no_space += result == KVMETA_E_NOSPACE;
    tally->no_memory += result == KVMETA_E_NOMEM;
}

/* Opens, and again when a fault that comes once made the first try fail. */
static void open_with_fault(struct tally *tally, const struct plan *plan,
                            struct life *life)
{
    if (life_open(life) == 0 || life->problem[0] != '\0') {
        return;
    }
    tally->failed_opens++;
    count_result(tally, life->last_result);
    if (life_check_leaks(life)) {
        return;
    }
    recover_all(tally, plan, 3, "after the failed open");
    if (plan->ever) {
        faults_end(life);
    }
    life->faulty = 0;
    life_open(life);
    life->faulty = !plan->ever;
}

static void run_script(struct tally *tally, const struct plan *plan,
                       struct life *life)
{
    const char *op;

    open_with_fault(tally, plan, life);
    for (op = plan->script; *op != '\0' && life->problem[0] == '\0'; op++) {
        if (*op == 'O' && life->db == NULL) {
            open_with_fault(tally, plan, life);
        } else if (*op != 'O') {
            life_op(life, *op);
            count_result(tally, life->last_result);
        }
    }
    if (life->db == NULL && life->problem[0] == '\0') {
        open_with_fault(tally, plan, life);
    }
}

/* The script with the fault, then use, a crash, a close, and a crash. */
static void run_plan(struct tally *tally, const struct plan *plan)
{
    struct life *life = &life_run;
    struct sim_fs fs;

    memset(&alloc_run, 0, sizeof alloc_run);
    sim_init(&fs, life_configs[plan->config].cell_bytes, test_args.seed);
    fs.garbage_whole = life_configs[plan->config].garbage_whole;
    life_begin(life, &fs, &alloc_run, &life_configs[plan->config]);
    faults_begin(plan, life);
    run_script(tally, plan, life);
    tally->runs++;
    if (faults_end(life)) {
        count_hit(tally, life);
    }
    if (life->problem[0] == '\0') {
        life_check_now(life);
        if (plan->fault.at % 2 == 0) {
            recover_all(tally, plan, 4, "crash with the fault");
        }
        use_after_fault(tally, plan, life);
    }
    if (life->problem[0] == '\0') {
        recover_all(tally, plan, 4, "crash after the fault");
        if (life->db != NULL) {
            life_op(life, 'C');
        }
        life_check_leaks(life);
        recover_all(tally, plan, 3, "after the close");
    }
    if (life->problem[0] != '\0') {
        report(tally, plan, life, "the run itself");
    }
    life_end(life);
    sim_free(&fs);
    life->fs = NULL;
}

/* How many system calls and allocations the script takes without faults. */
static void measure(const char *script, unsigned config, uint64_t *calls,
                    uint64_t *allocs)
{
    struct life *life = &life_run;
    struct sim_fs fs;
    unsigned i;

    memset(&alloc_run, 0, sizeof alloc_run);
    sim_init(&fs, life_configs[config].cell_bytes, test_args.seed);
    fs.garbage_whole = life_configs[config].garbage_whole;
    life_begin(life, &fs, &alloc_run, &life_configs[config]);
    life_open(life);
    for (; *script != '\0'; script++) {
        life_op(life, *script);
    }
    *calls = 0;
    for (i = 0; i < SIM_CALLS; i++) {
        *calls += fs.calls[i];
    }
    *allocs = atomic_load(&alloc_run.calls);
    life_end(life);
    sim_free(&fs);
    life->fs = NULL;
}

/* --------------------------------------------------------------------------
 * Faults during recovery
 * -------------------------------------------------------------------------- */

/* States of the disk that a script leaves when it is cut off at its end: 0 a
 * kill, then power cuts. 0: there are not so many. */
static int make_state(const struct plan *plan, struct sim_fs *disk)
{
    struct life *life = &life_run;
    struct sim_cut cut;
    struct sim_fs fs;
    const char *op;
    unsigned n;
    int there = 1;

    memset(&alloc_run, 0, sizeof alloc_run);
    sim_init(&fs, life_configs[plan->config].cell_bytes, test_args.seed);
    fs.garbage_whole = life_configs[plan->config].garbage_whole;
    life_begin(life, &fs, &alloc_run, &life_configs[plan->config]);
    life_open(life);
    for (op = plan->script; *op != '\0'; op++) {
        life_op(life, *op);
    }
    if (plan->state == 0) {
        sim_clone(disk, &fs);
    } else {
        sim_cut_begin(&cut, &fs, 6, 1, test_args.seed);
        for (n = 1; n <= plan->state && there; n++) {
            there = sim_cut_next(&cut, disk);
            if (there && n < plan->state) {
                sim_free(disk);
            }
        }
        sim_cut_end(&cut);
    }
    life->fs = disk;                     /* what closing it does is not seen */
    life_end(life);
    sim_free(&fs);
    return there;
}

/* Opens this disk with the fault, crashes, and opens without. */
static void run_recovery(struct tally *tally, const struct plan *plan,
                         const struct sim_fs *disk)
{
    static struct life before;
    struct life *life = &life_run;
    struct sim_fs fs;

    sim_clone(&fs, disk);
    before = *life;
    memset(&alloc_run, 0, sizeof alloc_run);
    life_begin_after(life, &before, plan->state == 0, &fs, &alloc_run);
    faults_begin(plan, life);
    open_with_fault(tally, plan, life);
    tally->runs++;
    if (faults_end(life)) {
        count_hit(tally, life);
    }
    if (life->problem[0] == '\0') {
        recover_all(tally, plan, 4, "crash after the open");
        use_after_fault(tally, plan, life);
    }
    if (life->problem[0] == '\0') {
        if (life->db != NULL) {
            life_op(life, 'C');
        }
        life_check_leaks(life);
        recover_all(tally, plan, 2, "after the close");
    }
    if (life->problem[0] != '\0') {
        report(tally, plan, life, "a recovery");
    }
    life_end(life);
    sim_free(&fs);
    *life = before;
}

/* What an open of this disk takes without faults. */
static void measure_recovery(const struct sim_fs *disk, unsigned state,
                             uint64_t *calls, uint64_t *allocs)
{
    struct life *life = &life_after;
    struct sim_fs fs;
    unsigned i;

    memset(&alloc_after, 0, sizeof alloc_after);
    sim_clone(&fs, disk);
    life_begin_after(life, &life_run, state == 0, &fs, &alloc_after);
    life_open(life);
    *calls = 0;
    for (i = 0; i < SIM_CALLS; i++) {
        *calls += fs.calls[i];
    }
    *allocs = atomic_load(&alloc_after.calls);
    life_end(life);
    sim_free(&fs);
}

/* --------------------------------------------------------------------------
 * All of them
 * -------------------------------------------------------------------------- */

/* The ways in which a system call fails; error 0 is a short transfer. */
static const struct sim_fault faults[] = {
    {1, SIM_CALLS, EIO, 0, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, EIO, 0, 1, 0, 0, 0, 0},
    {1, SIM_CALLS, EIO, 1, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, ENOSPC, 0, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, ENOSPC, 0, 1, 0, 0, 0, 0},
    {1, SIM_CALLS, ENOSPC, 1, 1, 0, 0, 0, 0},
    {1, SIM_CALLS, EINTR, 0, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, EMFILE, 0, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, EMFILE, 1, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, EROFS, 0, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, EROFS, 1, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, 0, 0, 0, 0, 0, 0, 0},
    {1, SIM_CALLS, 0, 1, 0, 0, 0, 0, 0},
};
#define FAULT_COUNT (sizeof faults / sizeof faults[0])

struct work {
    void (*run)(struct tally *tally, struct plan *plan, unsigned worker,
                unsigned workers);
    struct tally *tallies;               /* shared; one for each worker */
    struct tally sum;
};

/* Large batches only where the values are wide: they take long. */
static unsigned config_of(const char *script, unsigned pass)
{
    return strchr(script, 'g') != NULL ? 3 : pass;
}

/* Each N in turn, spread over the workers. */
static void run_calls(struct tally *tally, struct plan *plan,
                      unsigned worker, unsigned workers)
{
    uint64_t calls, allocs, n;
    size_t i;

    measure(plan->script, plan->config, &calls, &allocs);
    for (n = 1 + worker; n <= calls + 2; n += workers) {
        for (i = 0; i < FAULT_COUNT && !tally->failed; i++) {
            plan->fault = faults[i];
            plan->fault.at = n;
            plan->ever = plan->fault.ever;
            run_plan(tally, plan);
        }
    }
}

static void run_allocs(struct tally *tally, struct plan *plan,
                       unsigned worker, unsigned workers)
{
    uint64_t calls, allocs, n;

    measure(plan->script, plan->config, &calls, &allocs);
    for (n = 1 + worker; n <= allocs + 2; n += workers) {
        plan->alloc_at = n;
        for (plan->ever = 0; plan->ever < 2 && !tally->failed; plan->ever++) {
            run_plan(tally, plan);
        }
    }
}

static void run_recoveries_of(struct tally *tally, struct plan *plan,
                              const struct sim_fs *disk, unsigned worker,
                              unsigned workers)
{
    uint64_t calls, allocs, n;
    size_t i;

    measure_recovery(disk, plan->state, &calls, &allocs);
    for (n = 1 + worker; n <= calls; n += workers) {
        for (i = 0; i < FAULT_COUNT && !tally->failed; i++) {
            plan->fault = faults[i];
            plan->fault.at = n;
            plan->ever = plan->fault.ever;
            run_recovery(tally, plan, disk);
        }
    }
    memset(&plan->fault, 0, sizeof plan->fault);
    for (n = 1 + worker; n <= allocs; n += workers) {
        plan->alloc_at = n;
        for (plan->ever = 0; plan->ever < 2 && !tally->failed; plan->ever++) {
            run_recovery(tally, plan, disk);
        }
    }
    plan->alloc_at = 0;
}

static void run_recoveries(struct tally *tally, struct plan *plan,
                           unsigned worker, unsigned workers)
{
    struct sim_fs disk;

    plan->recovery = 1;
    for (plan->state = 0; make_state(plan, &disk); plan->state++) {
        run_recoveries_of(tally, plan, &disk, worker, workers);
        sim_free(&disk);
    }
    plan->state = 0;
}

/* All scripts, with one configuration each, or all small ones at scale 2. */
static int worker_run(void *arg, unsigned worker, unsigned workers)
{
    struct work *work = arg;
    struct tally *tally = &work->tallies[worker];
    struct plan plan;
    unsigned passes = test_args.scale > 1 ? 3 : 1, pass;
    size_t i, count = test_args.scale == 0 ? 2 : SCRIPT_COUNT;

    for (pass = 0; pass < passes; pass++) {
        for (i = 0; i < count && !tally->failed; i++) {
            memset(&plan, 0, sizeof plan);
            plan.script = scripts[i];
            plan.config = config_of(scripts[i], pass);
            work->run(tally, &plan, worker, workers);
        }
    }
    return tally->failed;
}

static void print_tally(const struct tally *t)
{
    unsigned i;

    printf("# %llu runs, %llu hit by their fault, %llu crash states after; "
           "%llu opens failed\n", (unsigned long long)t->runs,
           (unsigned long long)t->hits, (unsigned long long)t->states,
           (unsigned long long)t->failed_opens);
    printf("# %llu runs ended refusing writes; %llu results no space, %llu "
           "no memory\n# hit:", (unsigned long long)t->refused,
           (unsigned long long)t->no_space,
           (unsigned long long)t->no_memory);
    for (i = 0; i < SIM_CALLS; i++) {
        if (t->by_call[i] != 0) {
            printf(" %s %llu", sim_call_name((int)i),
                   (unsigned long long)t->by_call[i]);
        }
    }
    printf("\n");
    fflush(stdout);
}

static void tally_add(struct tally *sum, const struct tally *one)
{
    /* Nothing but counters up to `failed`. */
    const uint64_t *from = (const uint64_t *)(const void *)one;
    uint64_t *to = (uint64_t *)(void *)sum;
    size_t i;

    for (i = 0; i < offsetof(struct tally, failed) / sizeof *to; i++) {
        to[i] += from[i];
    }
    sum->failed |= one->failed;
}

static void work_run(struct work *work)
{
    unsigned workers = test_workers(), i;
    int failed;

    work->tallies = test_shared(workers * sizeof *work->tallies);
    failed = test_fork(workers, worker_run, work);
    for (i = 0; i < workers; i++) {
        tally_add(&work->sum, &work->tallies[i]);
    }
    print_tally(&work->sum);
    assert_int_equal(failed, 0);
    assert_int_equal(work->sum.failed, 0);
    assert_true(work->sum.runs > 0);
    assert_true(work->sum.states > 0);
    assert_true(work->sum.failed_opens > 0);
}

/* Goal: no failing system call loses, invents or leaks anything, or makes
 * the store lie about it. Method: every script, every call, every way. */
static void every_system_call_may_fail(void **state)
{
    struct work work = {run_calls, NULL, {0}};

    (void)state;
    work_run(&work);
    assert_true(work.sum.refused > 0);
    assert_true(work.sum.no_space > 0);
    assert_true(work.sum.by_call[SIM_FILE_WRITE] > 0);
    assert_true(work.sum.by_call[SIM_FILE_SYNC] > 0);
    assert_true(work.sum.by_call[SIM_DIR_SYNC] > 0);
    assert_true(work.sum.by_call[SIM_RENAME] > 0);
    assert_true(work.sum.by_call[SIM_UNLINK] > 0);
    assert_true(work.sum.by_call[SIM_FILE_READ] > 0);
}

/* Goal: the same for memory. Method: every script, every allocation. */
static void every_allocation_may_fail(void **state)
{
    struct work work = {run_allocs, NULL, {0}};

    (void)state;
    work_run(&work);
    assert_true(work.sum.no_memory > 0);
    assert_int_equal(work.sum.refused, 0);
}

/* Goal: a recovery that fails half-way leaves the store for the next one.
 * Method: crash states of every script; every call and every allocation of
 * their recovery fails; a crash; then recoveries without faults. */
static void every_recovery_may_fail(void **state)
{
    struct work work = {run_recoveries, NULL, {0}};

    (void)state;
    work_run(&work);
    assert_true(work.sum.no_memory > 0);
}

/* Goal: see one failure again. */
static void given_fault_does_no_harm(void **state)
{
    struct tally tally;
    struct plan plan;
    struct sim_fs disk;

    (void)state;
    memset(&tally, 0, sizeof tally);
    memset(&plan, 0, sizeof plan);
    plan.script = test_option("script");
    plan.config = (unsigned)test_option_u64("config", 0);
    plan.state = (unsigned)test_option_u64("state", 0);
    plan.recovery = (int)test_option_u64("recovery", 0);
    plan.alloc_at = test_option_u64("alloc", 0);
    plan.ever = (int)test_option_u64("ever", 0);
    plan.fault.at = test_option_u64("call", 0);
    plan.fault.kind = SIM_CALLS;
    plan.fault.error = (int)test_option_u64("error", 0);
    plan.fault.ever = plan.ever;
    plan.fault.partial = (int)test_option_u64("partial", 0);
    if (plan.recovery) {
        assert_true(make_state(&plan, &disk));
        run_recovery(&tally, &plan, &disk);
        sim_free(&disk);
    } else {
        run_plan(&tally, &plan);
    }
    print_tally(&tally);
    assert_int_equal(tally.failed, 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_system_call_may_fail),
        cmocka_unit_test(every_allocation_may_fail),
        cmocka_unit_test(every_recovery_may_fail),
    };
    const struct CMUnitTest one[] = {
        cmocka_unit_test(given_fault_does_no_harm),
    };

    test_parse_args(argc, argv);
    life_trace = test_option("trace") != NULL;
    if (test_option("script") != NULL) {
        return cmocka_run_group_tests(one, NULL, NULL);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
