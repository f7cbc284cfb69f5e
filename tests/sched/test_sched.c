/*
 * Seeded schedules: writers, readers, snapshots, the background work and the
 * close of a store against each other, in orders that are drawn and can be
 * drawn again. kvmeta.c is compiled in here with its locks, conditions,
 * atomics and copies of memory turned into points of a scheduler; see
 * turns.h. What was seen is checked as a history; see world.h.
 *
 *   --schedules N     so many, from --seed on; default 100,000 at scale 1
 *   --ops A,B,C,D,E   operations of each thread at most: two writers, two
 *                     readers, the host
 *   --order N         of the turns, for one seed; default 0
 *   --orders N        so many orders for each seed, from --order on
 *   --host N          the host's only kind of operation; see run_host
 *   --shrink 0        leave a failure as it is
 *   --trace 1         print every point
 *   --workers N       processes; default: one a core
 *
 * SPDX-License-Identifier: MIT
 */
#if defined(__APPLE__)
#  define _XOPEN_SOURCE 700              /* <ucontext.h> wants it */
#  define _DARWIN_C_SOURCE 1
#endif
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE                    /* what kvmeta.c wants */
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#undef test_realloc                      /* cmocka's; support.h has its own */

#include <signal.h>
#include <sys/wait.h>
#if defined(__GLIBC__)
#  include <malloc.h>
#endif

#define KVMETA_STATIC
#include "actors.h"
#include "turns_pthread.h"
#define KV_PINS_CALM 2                   /* so that the bias comes and goes */
#include "../../kvmeta.c"

#if defined(__SANITIZE_THREAD__)
#  define UNDER_TSAN 1
#elif defined(__has_feature)
#  if __has_feature(thread_sanitizer)
#    define UNDER_TSAN 1
#  endif
#endif
#ifndef UNDER_TSAN
#  define UNDER_TSAN 0
#endif

#define SCHEDULES 100000u
#define POINTS_MAX 2000000u
#define SECONDS_MAX 60

static struct records shapes[] = {
    {.name = "flat", .key_bytes = 8, .value_bytes = 24, .always = 2,
     .extras = 3},
    {.name = "deep", .key_bytes = 248, .value_bytes = 24, .always = 10,
     .extras = 8},
    {.name = "logs", .key_bytes = 8, .value_bytes = 1000, .always = 5,
     .extras = 5},
};

#define SHAPES (sizeof shapes / sizeof shapes[0])

/* What one worker has done; in memory that the parent sees. */
struct tally {
    uint64_t schedules[TURN_KINDS];      /* by kind */
    uint64_t points;
    uint64_t switches;
    uint64_t timeouts;
    uint64_t contended;
    uint64_t reads;
    uint64_t commits;
    uint64_t conflicts;
    uint64_t groups_shared;              /* schedules with a group of more
                                            than one batch */
    uint64_t handovers;
    uint64_t rotations;
    uint64_t flushes;
    uint64_t merges;
    uint64_t full;
    uint64_t in_place;
    uint64_t copied;
    uint64_t crashes;                    /* stores opened after one */
    uint64_t failed_seed;
    uint64_t failed_order;
    int failed;
};

static struct tally *tally;              /* this worker's */
static struct plan plan_now;
static int quiet;

/* --------------------------------------------------------------------------
 * Failure
 * -------------------------------------------------------------------------- */

static void turn_fail(const char *what)
{
    if (!quiet) {
        printf("problem: schedule %llu: %s\n",
               (unsigned long long)plan_now.seed, what);
        turn_print();
        fflush(stdout);
    }
    tally->failed = 1;
    tally->failed_seed = plan_now.seed;
    tally->failed_order = plan_now.order;
    _exit(1);
}

static void on_signal(int number)
{
    turn_fail(number == SIGALRM   ? "hangs outside of any point"
              : number == SIGABRT ? "an assertion failed"
                                  : "memory is misused");
}

/* On a stack of its own: that of a thread may be what has run over. */
static void catch_signals(void)
{
    static const int numbers[] = {SIGALRM, SIGABRT, SIGSEGV, SIGBUS};
    static unsigned char memory[65536];
    struct sigaction action;
    stack_t stack;
    size_t i;

    memset(&stack, 0, sizeof stack);
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, NULL);
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK;
    for (i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        sigaction(numbers[i], &action, NULL);
    }
}

/* --------------------------------------------------------------------------
 * A schedule
 * -------------------------------------------------------------------------- */

static void world_options(struct world *w)
{
    static const uint32_t windows[] = {2, 3, 8, 8};
    struct kvmeta_options *o = &w->options;

    records_options(w->records, &w->disk.fs, o);
    o->flags = test_rng_below(&w->rng, 4) == 0 ? KVMETA_NO_THREAD : 0;
    o->merge_window = windows[test_rng_below(&w->rng, 4)];
    o->merge_ratio = 100;
    o->space_amp_max = test_rng_below(&w->rng, 6) ? 6 : 1.1;
    o->open_threads = test_rng_below(&w->rng, 8) == 0 ? 2 : 1;
    o->durability = w->buffered_only ? KVMETA_BUFFERED : KVMETA_DURABLE;
    o->sync_interval_ms = (uint32_t)test_rng_below(&w->rng, 3);
    o->realloc_fn = test_realloc;
    o->user = &w->alloc;
}

/* Which records, and how many operations for each thread; some have none. */
static void world_draw(struct world *w, const struct plan *plan)
{
    static const unsigned most[ACTORS] = {7, 7, 8, 8, 5};
    uint64_t dice;
    unsigned i;

    w->plan = plan;
    w->crashes = 0;
    w->rng.state = plan->seed * 0x9e3779b97f4a7c15u;
    dice = test_rng_below(&w->rng, 10);
    w->records = &shapes[dice < 7 ? 0 : dice < 9 ? 1 : 2];
    dice = test_rng_below(&w->rng, 10);
    w->durable_only = dice < 4;
    w->buffered_only = dice >= 7;
    w->puts_only = dice == 9;
    w->crash_at = test_rng_below(&w->rng, 3) == 0
                      ? 1 + test_rng_below(&w->rng, 250) : 0;
    for (i = 0; i < ACTORS; i++) {
        struct actor *a = &w->actors[i];

        a->world = w;
        a->number = i;
        a->rng.state = test_rng_u64(&w->rng);
        a->ops = (unsigned)test_rng_below(&a->rng, most[i] + 1);
        a->ops = a->ops < plan->ops[i] ? a->ops : plan->ops[i];
        a->reader.events = a->events;
        a->reader.count = 0;
    }
}

/* The state that the store begins with. */
static void world_begin_history(struct world *w)
{
    memset(w->history.batches, 0, TICKETS_MAX * sizeof *w->history.batches);
    atomic_store(&w->history.tickets, 0);
    atomic_store(&w->history.acked_seq, 0);
    memset(&w->attempts[0], 0, sizeof w->attempts[0]);
    w->attempts[0].expect = NO_TICKET;
    history_end(&w->history, history_begin(&w->history, (1u << GROUPS) - 1),
                w->records->base_seq);
}

static void world_count(const struct world *w)
{
    struct kvmeta_stats s;
    unsigned i;

    s.struct_size = sizeof s;
    OK(kvmeta_stats(w->db, &s));
    WANT(s.background_errors == 0);
    OK(kvmeta_last_error(w->db, NULL));
    tally->commits += s.commits;
    tally->groups_shared += s.group_commits_max > 1;
    tally->handovers += s.leader_handovers;
    tally->rotations += s.rotations;
    tally->flushes += s.flushes;
    tally->merges += s.merges;
    tally->full += s.full_compactions;
    tally->in_place += s.versions_in_place;
    tally->copied += s.versions_copied;
    tally->crashes += w->crashes;
    for (i = 1; i < (unsigned)atomic_load(&w->history.tickets); i++) {
        tally->conflicts += (uint64_t)w->attempts[i].conflict;
    }
    for (i = 0; i < ACTORS; i++) tally->reads += w->actors[i].reader.count;
}

static void world_run(struct world *w)
{
    turn_handle handles[ACTORS];
    unsigned i;

    w->db = records_open(&w->options);
    for (i = 0; i < ACTORS; i++) {
        void *(*fn)(void *) = i < WRITERS ? run_writer
                              : i < HOST  ? run_reader : run_host;

        if (turn_create(&handles[i], fn, &w->actors[i]) != 0) {
            turn_fail("no room for a thread");
        }
    }
    for (i = 0; i < ACTORS; i++) turn_join(handles[i]);
    world_count(w);
    OK(kvmeta_close(w->db));
}

/* What the close has left, opened once more. */
static void world_reopen(struct world *w)
{
    uint32_t tickets[GROUPS], t;

    for (t = 1; t < (uint32_t)atomic_load(&w->history.tickets); t++) {
        if (!w->attempts[t].conflict && !world_durable(w, t)) {
            turn_fail("closed, and not on disk");
        }
    }
    w->options.flags = KVMETA_NO_THREAD;
    w->options.open_threads = 1;
    w->db = records_open(&w->options);
    crash_read(w->records, w->db, tickets);
    if (memcmp(tickets, w->state[w->states - 1], sizeof tickets) != 0) {
        turn_fail("another state after a close and an open");
    }
    OK(kvmeta_verify(w->db, NULL));
    OK(kvmeta_close(w->db));
}

static struct world *world_new(void)
{
    struct world *w = calloc(1, sizeof *w);
    unsigned i;

    if (w == NULL) abort();
    history_init(&w->history);
    for (i = 0; i < ACTORS; i++) {
        w->actors[i].values = malloc((size_t)(KEYS_MAX + 1) * 1000);
        if (w->actors[i].values == NULL) abort();
    }
    return w;
}

static void one_schedule(struct world *w, const struct plan *plan)
{
    plan_now = *plan;
    alarm(SECONDS_MAX);
    world_draw(w, plan);
    disk_init(&w->disk, &w->records->base, test_rng_u64(&w->rng));
    w->disk.fs.on_op = world_on_op;
    w->disk.fs.on_op_user = w;
    world_options(w);
    world_begin_history(w);
    turn_begin(test_rng_u64(&w->rng) + plan->order * 0x2545f491u, POINTS_MAX);
    world_run(w);
    turn_end();
    world_check(w);
    world_reopen(w);
    WANT(atomic_load(&w->alloc.live_blocks) == 0);
    WANT(sim_open_handles(&w->disk.fs) == 0 && w->disk.fs.misuses == 0);
    disk_free(&w->disk);
    tally->schedules[turns.kind]++;
    tally->points += turns.points;
    tally->switches += turns.switches;
    tally->timeouts += turns.timeouts;
    tally->contended += turns.contended;
    alarm(0);
}

/* --------------------------------------------------------------------------
 * Many of them
 * -------------------------------------------------------------------------- */

struct range {
    struct tally *tallies;
    struct plan plan;                    /* of the first one */
    uint64_t count;
    uint64_t orders;                     /* for each of them */
};

static int run_range(void *arg, unsigned worker, unsigned workers)
{
    struct range *range = arg;
    struct plan plan = range->plan;
    struct world *w;
    uint64_t i, k;

    tally = &range->tallies[worker];
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 64 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
    catch_signals();
    for (i = 0; i < SHAPES; i++) records_init(&shapes[i]);
    w = world_new();
    for (i = worker; i < range->count; i += workers) {
        plan.seed = range->plan.seed + i;
        for (k = 0; k < range->orders; k++) {
            plan.order = range->plan.order + k;
            one_schedule(w, &plan);
        }
    }
    return 0;
}

static void plan_options(struct plan *plan)
{
    const char *text = test_option("ops");
    unsigned i;
    char *end;

    plan->order = test_option_u64("order", 0);
    plan->host = (unsigned)test_option_u64("host", 10);
    for (i = 0; i < ACTORS; i++) {
        plan->ops[i] = UINT32_MAX;
        if (text == NULL) continue;
        plan->ops[i] = (unsigned)strtoul(text, &end, 10);
        text = *end == ',' ? end + 1 : end;
    }
}

/* Does the plan fail in one of `orders` orders of the turns? Found out in a
 * process of its own; then plan->order says in which. */
static int plan_fails(struct plan *plan, uint64_t orders)
{
    struct range range = {test_shared(sizeof(struct tally)), *plan, 1, 1};
    int status = 0;
    pid_t pid = fork();

    if (pid == 0) {
        quiet = 1;
        range.orders = orders;
        _exit(run_range(&range, 0, 1));
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status == 0) return 0;
    plan->order = range.tallies->failed_order;
    return 1;
}

/* Fewer operations, for as long as it fails, in whatever way. */
static void plan_shrink(struct plan *plan)
{
    struct plan less;
    unsigned i, tries = 0;
    int better = 1;

    for (i = 0; i < ACTORS; i++) {
        plan->ops[i] = plan->ops[i] < 8 ? plan->ops[i] : 8;
    }
    while (better && tries < 60) {
        better = 0;
        for (i = 0; i < 3 * ACTORS; i++) {
            less = *plan;
            if (less.ops[i / 3] == 0) continue;
            less.ops[i / 3] = i % 3 == 0   ? 0
                              : i % 3 == 1 ? less.ops[i / 3] / 2
                                           : less.ops[i / 3] - 1;
            tries++;
            if (plan_fails(&less, 200)) {
                *plan = less;
                better = 1;
            }
        }
    }
}

/* The first schedule that failed: as small as it gets, with its replay. */
static void report_failure(const struct range *range, unsigned workers)
{
    struct plan plan = range->plan;
    unsigned i;

    plan.seed = UINT64_MAX;
    for (i = 0; i < workers; i++) {
        if (range->tallies[i].failed &&
            range->tallies[i].failed_seed < plan.seed) {
            plan.seed = range->tallies[i].failed_seed;
            plan.order = range->tallies[i].failed_order;
        }
    }
    if (plan.seed == UINT64_MAX) return;
    if (!test_option_u64("trace", 0) && test_option_u64("shrink", 1)) {
        plan_shrink(&plan);
    }
    test_args.seed = plan.seed;
    test_replay("--schedules 1 --order %llu --host %u --ops %u,%u,%u,%u,%u",
                (unsigned long long)plan.order, plan.host, plan.ops[0],
                plan.ops[1], plan.ops[2], plan.ops[3], plan.ops[4]);
}

static void add_up(struct tally *sum, const struct tally *t, unsigned workers)
{
    const uint64_t *from;
    uint64_t *to = (uint64_t *)(void *)sum;
    size_t i, words = offsetof(struct tally, failed_seed) / sizeof *to;
    unsigned k;

    memset(sum, 0, sizeof *sum);
    for (k = 0; k < workers; k++) {
        from = (const uint64_t *)(const void *)&t[k];
        for (i = 0; i < words; i++) to[i] += from[i];
    }
}

#define NUMBER(x) ((unsigned long long)(x))

static void print_tally(const struct tally *t)
{
    const uint64_t *kinds = t->schedules;

    printf("# %llu schedules (%llu walk, %llu pct, %llu focus), %llu points, "
           "%llu switches, %llu time-outs, %llu locks found taken\n",
           NUMBER(kinds[TURN_WALK] + kinds[TURN_PCT] + kinds[TURN_FOCUS]),
           NUMBER(kinds[TURN_WALK]), NUMBER(kinds[TURN_PCT]),
           NUMBER(kinds[TURN_FOCUS]),
           NUMBER(t->points), NUMBER(t->switches), NUMBER(t->timeouts),
           NUMBER(t->contended));
    printf("# %llu commits, %llu conflicts, %llu reads checked, %llu crashes "
           "opened; %llu schedules shared a sync, %llu handovers\n",
           NUMBER(t->commits), NUMBER(t->conflicts), NUMBER(t->reads),
           NUMBER(t->crashes), NUMBER(t->groups_shared),
           NUMBER(t->handovers));
    printf("# %llu rotations, %llu flushes, %llu merges, %llu full "
           "compactions, %llu commits in place, %llu beside readers\n",
           NUMBER(t->rotations), NUMBER(t->flushes), NUMBER(t->merges),
           NUMBER(t->full), NUMBER(t->in_place), NUMBER(t->copied));
}

/* The rare ways must have been gone. */
static void check_tally(const struct tally *t)
{
    assert_true(t->schedules[TURN_WALK] > 0 && t->schedules[TURN_PCT] > 0);
    assert_true(t->schedules[TURN_FOCUS] > 0);
    assert_true(t->timeouts > 0 && t->contended > 0);
    assert_true(t->conflicts > 0 && t->crashes > 0);
    assert_true(t->groups_shared > 0 && t->handovers > 0);
    assert_true(t->rotations > 0 && t->flushes > 0);
    assert_true(t->merges > 0 && t->full > 0);
    assert_true(t->in_place > 0 && t->copied > 0);
}

/* Goal: whatever runs beside whatever, in any order: reads see one state each
 * and the right one, what is durable is on disk, nobody waits for ever.
 * Method: see the top of this file. */
static void schedules_show_one_history(void **state)
{
    unsigned workers = test_workers();
    uint64_t count = test_args.scale == 0 ? 3000
                                          : SCHEDULES * test_args.scale;
    struct range range;
    struct tally sum;
    int failed;

    (void)state;
    if (UNDER_TSAN) skip();              /* there is but one thread here */
    range.tallies = test_shared(workers * sizeof *range.tallies);
    range.count = test_option_u64("schedules", count);
    range.orders = test_option_u64("orders", 1);
    range.plan.seed = test_args.seed;
    plan_options(&range.plan);
    failed = test_fork(workers, run_range, &range);
    add_up(&sum, range.tallies, workers);
    print_tally(&sum);
    if (failed) report_failure(&range, workers);
    assert_int_equal(failed, 0);
    if (range.count >= 3000 && test_option("ops") == NULL) check_tally(&sum);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(schedules_show_one_history),
    };

    test_parse_args(argc, argv);
    turns.trace = (int)test_option_u64("trace", 0);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
