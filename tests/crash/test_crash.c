/*
 * Crash tests: stores on the simulated file system are cut off at every
 * operation, in every way or many, and opened again.
 *
 * What an open recovers must be a state of the history that is not older
 * than what was acknowledged; the open must succeed; the directory must hold
 * nothing else. Some recovered stores live on: they are opened again, run a
 * second script, perhaps with failing calls, are cut off in it (also within
 * the open), and must recover by the same rules.
 *
 *   --script X --config N --from K   only this script, with cuts from its
 *                                    K-th operation on
 *   --trace 1                        print what is done
 *   --workers N                      processes; default: one a core
 *   --longest N                      of the scripts listed; default 5
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef _POSIX_C_SOURCE
#  define _POSIX_C_SOURCE 200809L        /* clock_gettime */
#endif

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "../sim/life.h"

/* What one worker did; in memory that the parent sees. */
struct tally {
    uint64_t scripts;
    uint64_t points;
    uint64_t states;                     /* crash states opened and checked */
    uint64_t kills;
    uint64_t second_lives;
    uint64_t second_states;              /* of `states`, those in them */
    uint64_t faulted_lives;
    uint64_t failed_opens;               /* under a fault, as they may */
    uint64_t rotten_manifests;
    uint64_t stale_manifests;
    uint64_t stale_refused;              /* the others did no harm */
    uint64_t listed;                     /* points with all cuts walked */
    uint64_t sampled;                    /* ... and with some of them */
    uint64_t same;                       /* scripts that end as a shorter one */
    struct sim_totals sim;
    struct life_totals life;
    int failed;                          /* no counter: stays the last */
};

struct limits {
    uint64_t plain;                      /* cuts at a point, no garbage */
    uint64_t garbage;                    /* ... and with garbage */
    uint64_t second_one_in;              /* states that live on */
    uint64_t rotten_one_in;              /* states that lose a manifest copy */
    uint64_t stale_one_in;               /* ... get an older manifest back */
};

#define MANIFESTS_MAX 32

/* A manifest that the store has had. */
struct manifest {
    unsigned char *data;
    uint64_t bytes;
};

struct explorer {
    struct life *life;
    const char *script;
    const char *second;                  /* script of the second life */
    unsigned config;
    unsigned from;
    unsigned at;                         /* operation that runs */
    unsigned depth;
    uint64_t one_in;                     /* of the points are explored */
    uint64_t given_one_in;
    int active;
    struct limits given;                 /* for the script */
    struct limits limits;                /* in this life */
    struct test_rng rng;
    struct manifest manifests[MANIFESTS_MAX];    /* oldest first */
    unsigned manifest_count;
    struct tally *tally;
};

/* One for each depth: they are large. */
static struct life lives[4];
static struct test_alloc allocs[4];

static void report(struct explorer *explorer, const struct life *life,
                   const char *where)
{
    const struct sim_fault *fault = &explorer->life->fs->fault;

    explorer->tally->failed = 1;
    printf("problem: %s [script %s, config %s, operation %u, %s%s%s]\n",
           life->problem, explorer->script,
           life_configs[explorer->config].name, explorer->at, where,
           explorer->depth > 0 ? ", second life " : "",
           explorer->depth > 0 ? explorer->second : "");
    if (fault->hits > 0) {
        printf("problem: after errno %d on %llu calls of %s, first %s%s\n",
               fault->error, (unsigned long long)fault->hits,
               sim_call_name(fault->kind), sim_call_name(fault->hit_kind),
               fault->partial ? ", partly done" : "");
    }
    test_replay("--script %s --config %u --from %u --one-in %llu --plain %llu "
                "--garbage %llu --second %llu --rotten %llu --stale %llu",
                explorer->script, explorer->config, explorer->from,
                (unsigned long long)explorer->given_one_in,
                (unsigned long long)explorer->given.plain,
                (unsigned long long)explorer->given.garbage,
                (unsigned long long)explorer->given.second_one_in,
                (unsigned long long)explorer->given.rotten_one_in,
                (unsigned long long)explorer->given.stale_one_in);
}

/* --------------------------------------------------------------------------
 * One crash state
 * -------------------------------------------------------------------------- */

static void second_life(struct explorer *first, struct sim_fs *fs, int kill,
                        unsigned found);

/* Flips one bit of the manifest: one of its copies, or the gap between. */
static int rot_manifest(struct explorer *explorer, struct sim_fs *fs)
{
    uint64_t bytes, at;
    unsigned char *data = sim_file_get(fs, "MANIFEST", &bytes);

    if (data == NULL || bytes == 0) {
        free(data);
        return 0;
    }
    at = test_rng_below(&explorer->rng, bytes);
    if (at % 2 != 0) {
        at %= 160;                       /* surely in the first copy */
    }
    data[at] ^= (unsigned char)(1u << test_rng_below(&explorer->rng, 8));
    sim_file_put(fs, "MANIFEST", data, bytes);
    free(data);
    explorer->tally->rotten_manifests++;
    return 1;
}

/* --------------------------------------------------------------------------
 * Stale manifests
 * -------------------------------------------------------------------------- */

static void manifest_note(struct explorer *explorer)
{
    const struct manifest *last = NULL;
    struct manifest now;

    now.data = sim_file_get(explorer->life->fs, "MANIFEST", &now.bytes);
    if (explorer->manifest_count > 0) {
        last = &explorer->manifests[explorer->manifest_count - 1];
    }
    if (now.data == NULL || explorer->manifest_count == MANIFESTS_MAX ||
        (last != NULL && last->bytes == now.bytes &&
         memcmp(last->data, now.data, now.bytes) == 0)) {
        free(now.data);
        return;
    }
    explorer->manifests[explorer->manifest_count++] = now;
}

/* How many manifests were there before the one that this disk has. */
static unsigned manifest_age(const struct explorer *explorer,
                             const struct sim_fs *fs)
{
    uint64_t bytes;
    unsigned char *data = sim_file_get(fs, "MANIFEST", &bytes);
    unsigned i = 0;

    if (data != NULL) {
        for (i = explorer->manifest_count; i > 0; i--) {
            if (explorer->manifests[i - 1].bytes == bytes &&
                memcmp(explorer->manifests[i - 1].data, data, bytes) == 0) {
                break;
            }
        }
    }
    free(data);
    return i > 0 ? i - 1 : 0;
}

/* After a power cut an older manifest comes back, as when a disk has lost a
 * write that it had said was done. The store must notice, or have lost
 * nothing by it; when it notices, nothing is changed. */
static void check_stale(struct explorer *explorer, const struct sim_fs *state)
{
    struct life *life = &lives[1];
    unsigned age = manifest_age(explorer, state);
    const struct manifest *old;
    struct sim_fs fs;
    uint64_t hash;

    if (age == 0) {
        return;
    }
    old = &explorer->manifests[test_rng_below(&explorer->rng, age)];
    sim_clone(&fs, state);
    sim_file_put(&fs, "MANIFEST", old->data, old->bytes);
    hash = sim_hash(&fs);
    explorer->tally->stale_manifests++;
    life_begin_after(life, explorer->life, 0, &fs, &allocs[1]);
    life->damaged = 1;
    if (life_open(life) != 0 && life->last_result == KVMETA_E_CORRUPT) {
        explorer->tally->stale_refused++;
        if (sim_hash(&fs) != hash) {
            life_problem(life, "damage was found, and files were changed");
        }
    }
    life_end(life);
    life_check_leaks(life);
    if (life->problem[0] != '\0') {
        report(explorer, life, "stale manifest");
    }
    sim_free(&fs);
}

/* Opens, checks and closes one state of the disk, and frees it. */
static void check_state(struct explorer *explorer, struct sim_fs *fs,
                        int kill, const char *how)
{
    struct life *life = &lives[explorer->depth * 2 + 1];
    struct test_alloc *alloc = &allocs[explorer->depth * 2 + 1];
    struct sim_fs copy;
    unsigned found;
    int lives_on = explorer->depth == 0 &&
        test_rng_below(&explorer->rng, explorer->limits.second_one_in) == 0;

    if (lives_on) {
        sim_clone(&copy, fs);
    } else if (explorer->depth == 0 &&
               test_rng_below(&explorer->rng,
                              explorer->limits.rotten_one_in) == 0) {
        rot_manifest(explorer, fs);
    }
    explorer->tally->states++;
    explorer->tally->kills += (uint64_t)kill;
    explorer->tally->second_states += explorer->depth > 0;
    life_begin_after(life, explorer->life, kill, fs, alloc);
    if (life_open(life) == 0) {
        life_check_directory(life);
    }
    found = life->visible;
    if (life->db != NULL) {
        life_op(life, 'C');
    }
    life_check_leaks(life);
    if (life->problem[0] != '\0') {
        report(explorer, life, how);
    }
    life_end(life);
    sim_free(fs);
    if (lives_on && !explorer->tally->failed) {
        second_life(explorer, &copy, kill, found);
    }
    if (lives_on) {
        sim_free(&copy);
    }
}

/* Walks through the cuts, unless they are too many to be listed and
 * `sampled` is 0; 1: has walked. */
static int check_cuts(struct explorer *explorer, uint64_t limit, int garbage,
                      int sampled)
{
    struct sim_fs fs;
    struct sim_cut cut;
    int walks;

    sim_cut_begin(&cut, explorer->life->fs, limit, garbage,
                  test_rng_u64(&explorer->rng));
    walks = cut.exhaustive || sampled;
    while (walks && !explorer->tally->failed && sim_cut_next(&cut, &fs)) {
        if (explorer->depth == 0 &&
            test_rng_below(&explorer->rng,
                           explorer->limits.stale_one_in) == 0) {
            check_stale(explorer, &fs);
        }
        check_state(explorer, &fs, 0, garbage ? "cut, garbage" : "cut");
    }
    explorer->tally->listed += walks && cut.exhaustive;
    explorer->tally->sampled += walks && !cut.exhaustive;
    sim_cut_end(&cut);
    return walks;
}

/* All that this moment can lead to: a kill, and power cuts. */
static void explore_point(struct explorer *explorer)
{
    const struct limits *limits = &explorer->limits;
    struct sim_fs fs;

    if (explorer->tally->failed) {
        return;
    }
    explorer->tally->points++;
    sim_clone(&fs, explorer->life->fs);
    check_state(explorer, &fs, 1, "kill");
    if (!check_cuts(explorer, limits->plain + limits->garbage, 1, 0)) {
        check_cuts(explorer, limits->plain, 0, 1);
        check_cuts(explorer, limits->garbage, 1, 1);
    }
}

static void before_op(void *user, struct sim_fs *fs, enum sim_call kind)
{
    struct explorer *explorer = user;

    (void)fs;
    (void)kind;
    if (explorer->depth == 0) {
        manifest_note(explorer);
    }
    if (explorer->active &&
        test_rng_below(&explorer->rng, explorer->one_in) == 0) {
        explore_point(explorer);
    }
}

/* --------------------------------------------------------------------------
 * Second lives
 * -------------------------------------------------------------------------- */

static void maybe_fault(struct explorer *explorer)
{
    static const int kinds[] = {SIM_FILE_SYNC, SIM_FILE_WRITE, SIM_DIR_SYNC,
                                SIM_RENAME, SIM_CALLS};
    static const int errors[] = {EIO, ENOSPC, EMFILE};
    struct sim_fault fault;

    memset(&fault, 0, sizeof fault);
    if (test_rng_below(&explorer->rng, 3) != 0) {
        return;
    }
    fault.kind = kinds[test_rng_below(&explorer->rng, 5)];
    fault.error = errors[test_rng_below(&explorer->rng, 3)];
    fault.at = 1 + test_rng_below(&explorer->rng,
                                  fault.kind == SIM_CALLS ? 50 : 6);
    fault.ever = test_rng_below(&explorer->rng, 4) == 0;
    fault.partial = (int)test_rng_below(&explorer->rng, 2);
    sim_set_fault(explorer->life->fs, fault);
    explorer->life->faulty = 1;
    explorer->tally->faulted_lives++;
}

/* After the script: the end of the process, then an open without faults. */
static void end_second_life(struct explorer *explorer)
{
    struct life *life = explorer->life;

    explorer->active = 0;
    life->fs->on_op = NULL;
    sim_clear_fault(life->fs);
    if (life->db != NULL) {
        life_op(life, 'C');
    }
    life->faulty = 0;
    if (life->problem[0] == '\0' && life_open(life) == 0) {
        life_check_directory(life);
        life_op(life, 'C');
    }
    life_check_leaks(life);
}

/* The store found on fs lives on. What a cut left is durable, so the state
 * that was found there once is the only one; a kill may still lose. */
static void second_life(struct explorer *first, struct sim_fs *fs, int kill,
                        unsigned found)
{
    static const char *const scripts[] = {
        "", "p", "ups", "ur", "pTp", "bc", "pCOp", "rC", "wOu", "xtbt",
    };
    struct explorer explorer = *first;
    struct life *life = &lives[2];
    const char *op;

    explorer.life = life;
    explorer.depth = 1;
    explorer.active = 1;
    explorer.one_in = 8;
    explorer.second = scripts[test_rng_below(&first->rng, 10)];
    explorer.limits.plain = 3;
    explorer.limits.garbage = 3;
    explorer.rng.state = test_rng_u64(&first->rng);
    first->tally->second_lives++;
    life_begin_after(life, first->life, kill, fs, &allocs[2]);
    if (!kill) {
        life->durable = life->written = life->visible = life->issued = found;
    }
    maybe_fault(&explorer);
    fs->on_op = before_op;
    fs->on_op_user = &explorer;
    if (life_open(life) != 0 && life->problem[0] == '\0') {
        first->tally->failed_opens++;
    }
    for (op = explorer.second; *op != '\0' && life->problem[0] == '\0'; op++) {
        life_op(life, *op);
    }
    if (life->problem[0] == '\0') {
        explore_point(&explorer);
        end_second_life(&explorer);
    }
    if (life->problem[0] != '\0' && !first->tally->failed) {
        report(&explorer, life, life->faulty ? "itself, faulty" : "itself");
    }
    life_end(life);
}

/* --------------------------------------------------------------------------
 * One script
 * -------------------------------------------------------------------------- */

static uint64_t hash_script(const char *script, unsigned config)
{
    struct test_rng rng = {test_args.seed * 1000003 + config};
    const char *op;

    for (op = script; *op != '\0'; op++) {
        rng.state = test_rng_u64(&rng) + (unsigned char)*op;
    }
    return test_rng_u64(&rng);
}

static void explorer_init(struct explorer *explorer, struct sim_fs *fs,
                          const char *script, unsigned config)
{
    memset(explorer, 0, sizeof *explorer);
    explorer->life = &lives[0];
    explorer->script = script;
    explorer->config = config;
    explorer->rng.state = hash_script(script, config);
    sim_init(fs, life_configs[config].cell_bytes, explorer->rng.state);
    fs->garbage_whole = life_configs[config].garbage_whole;
    fs->on_op = before_op;
    fs->on_op_user = explorer;
    life_begin(&lives[0], fs, &allocs[0], &life_configs[config]);
}

/* Runs the operations; 1: the last one called nothing that changes the disk,
 * and acknowledged nothing. */
static int run_operations(struct explorer *explorer)
{
    struct life *life = explorer->life;
    size_t length = strlen(explorer->script);
    uint64_t ops = UINT64_MAX;
    unsigned durable = 0, written = 0;

    explorer->active = explorer->from == 0;
    life_open(life);
    for (explorer->at = 1; explorer->at <= length; explorer->at++) {
        if (life->problem[0] != '\0') {
            return 0;
        }
        ops = life->fs->ops;
        durable = life->durable;
        written = life->written;
        explorer->active = explorer->at >= explorer->from;
        life_op(life, explorer->script[explorer->at - 1]);
    }
    explorer->at--;
    return life->fs->ops == ops && life->durable == durable &&
           life->written == written;
}

/* Runs a script, which opens the store first, and explores the moments from
 * its operation `from` on; 0 is the open. */
static void explore_script(struct tally *tally, const char *script,
                           unsigned config, unsigned from, uint64_t one_in,
                           struct limits limits)
{
    struct life *life = &lives[0];
    struct explorer explorer;
    struct sim_fs fs;
    int same;

    explorer_init(&explorer, &fs, script, config);
    explorer.from = from;
    explorer.one_in = one_in;
    explorer.given_one_in = one_in;
    explorer.given = limits;
    explorer.limits = limits;
    explorer.tally = tally;
    same = run_operations(&explorer);
    tally->same += (uint64_t)same;
    if (life->problem[0] == '\0') {
        manifest_note(&explorer);
        if (!same) {
            explore_point(&explorer);
        }
        explorer.active = 0;
        life_check_now(life);
        life_op(life, 'C');
        life_check_leaks(life);
    }
    if (life->problem[0] != '\0' && !tally->failed) {
        report(&explorer, life, "itself");
    }
    life_end(life);
    sim_free(&fs);
    while (explorer.manifest_count > 0) {
        free(explorer.manifests[--explorer.manifest_count].data);
    }
    tally->scripts++;
}

/* --------------------------------------------------------------------------
 * Workers
 * -------------------------------------------------------------------------- */

struct work {
    void (*run)(struct tally *tally, unsigned worker, unsigned workers);
    struct tally *tallies;               /* shared; one for each worker */
    struct tally sum;
};

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

static int worker_run(void *arg, unsigned worker, unsigned workers)
{
    struct work *work = arg;
    struct tally *tally = &work->tallies[worker];

    memset(&sim_totals, 0, sizeof sim_totals);
    memset(&life_totals, 0, sizeof life_totals);
    work->run(tally, worker, workers);
    tally->sim = sim_totals;
    tally->life = life_totals;
    return tally->failed;
}

static void print_tally(const struct tally *t, double seconds)
{
    printf("# %llu crash states (%llu kills, %llu in second lives) at %llu "
           "points of %llu scripts (%llu end as a shorter one), %.0f s\n",
           (unsigned long long)t->states, (unsigned long long)t->kills,
           (unsigned long long)t->second_states,
           (unsigned long long)t->points, (unsigned long long)t->scripts,
           (unsigned long long)t->same, seconds);
    printf("# %llu second lives, %llu with faults; %llu opens failed under "
           "them; %llu manifests with a flipped bit, %llu copies healed; %llu "
           "stale ones, %llu noticed\n",
           (unsigned long long)t->second_lives,
           (unsigned long long)t->faulted_lives,
           (unsigned long long)t->failed_opens,
           (unsigned long long)t->rotten_manifests,
           (unsigned long long)t->life.healed,
           (unsigned long long)t->stale_manifests,
           (unsigned long long)t->stale_refused);
    printf("# cells: %llu kept, %llu lost, %llu garbage; entries: %llu kept, "
           "%llu lost; sizes: %llu kept, %llu lost\n",
           (unsigned long long)t->sim.cells_kept,
           (unsigned long long)t->sim.cells_lost,
           (unsigned long long)t->sim.cells_garbage,
           (unsigned long long)t->sim.entries_kept,
           (unsigned long long)t->sim.entries_lost,
           (unsigned long long)t->sim.sizes_kept,
           (unsigned long long)t->sim.sizes_lost);
    printf("# walks with all cuts listed: %llu of %llu; torn tails: %llu "
           "header, %llu body; %llu files of ours deleted\n",
           (unsigned long long)t->listed,
           (unsigned long long)(t->listed + t->sampled),
           (unsigned long long)t->life.torn[KVMETA_TORN_HEADER],
           (unsigned long long)t->life.torn[KVMETA_TORN_BODY],
           (unsigned long long)t->life.garbage_files);
    printf("# rotations %llu, flushes %llu, merges %llu, full compactions "
           "%llu\n", (unsigned long long)t->life.rotations,
           (unsigned long long)t->life.flushes,
           (unsigned long long)t->life.merges,
           (unsigned long long)t->life.full_compactions);
    fflush(stdout);
}

/* --------------------------------------------------------------------------
 * Tests
 * -------------------------------------------------------------------------- */

/* What a replay line gives. */
static void limits_override(struct limits *limits)
{
    limits->plain = test_option_u64("plain", limits->plain);
    limits->garbage = test_option_u64("garbage", limits->garbage);
    limits->second_one_in = test_option_u64("second", limits->second_one_in);
    limits->rotten_one_in = test_option_u64("rotten", limits->rotten_one_in);
    limits->stale_one_in = test_option_u64("stale", limits->stale_one_in);
}

/* put, batch, sync, rotate (a batch that may stay in memory, then a step),
 * flush, compact, close, open. */
static const char letters[] = "pBstrcCO";

static unsigned longest(void)
{
    uint64_t otherwise = test_args.scale == 0 ? 3 : 5;

    return (unsigned)test_option_u64("longest", otherwise);
}

/* The script with this number among those of `length` operations. */
static void nth_script(uint64_t n, unsigned length, char *script)
{
    unsigned i;

    for (i = 0; i < length; i++) {
        script[i] = letters[n % 8];
        n /= 8;
    }
    script[length] = '\0';
}

/* All scripts of up to `length` operations. The moments before the last
 * operation are those of a shorter script, and explored there. */
static void list_scripts(struct tally *tally, unsigned worker,
                         unsigned workers, unsigned length, unsigned config,
                         struct limits limits)
{
    char script[16];
    unsigned n_ops;
    uint64_t n;

    for (n_ops = 0; n_ops <= length; n_ops++) {
        for (n = 0; n < (uint64_t)1 << 3 * n_ops; n++) {
            if (n % workers != worker) {
                continue;
            }
            nth_script(n, n_ops, script);
            explore_script(tally, script, config, n_ops, 1, limits);
            if (tally->failed) {
                return;
            }
        }
    }
}

static void run_listed(struct tally *tally, unsigned worker, unsigned workers)
{
    struct limits limits = {32, 48, 64, 256, 16};
    unsigned most = longest(), config;

    limits_override(&limits);
    for (config = 0; config < 3 && !tally->failed; config++) {
        list_scripts(tally, worker, workers, most, config, limits);
    }
}

/* Two small tables that remove records of an older, large one are merged
 * without it: seldom drawn, and what they remove must stay removed. */
static const char young_merge[] = "grxrxrTxrx";

static void run_random(struct tally *tally, unsigned worker, unsigned workers)
{
    static const char ops[] = "pppwuuuxbBBsrttTcCOOkv";
    struct limits limits = {16, 24, 32, 256, 16};
    struct test_rng rng = {test_args.seed * 77 + worker};
    uint64_t scripts = 6500 * test_args.scale / workers + 20;
    unsigned config, length, i;
    char script[64];

    if (worker == 0) {
        explore_script(tally, young_merge, 4, 0, 1, limits);
    }
    while (scripts-- > 0 && !tally->failed) {
        config = (unsigned)test_rng_below(&rng, 6);
        length = 4 + (unsigned)test_rng_below(&rng, 26);
        for (i = 0; i < length; i++) {
            script[i] = ops[test_rng_below(&rng, sizeof ops - 1)];
            if (test_rng_below(&rng, 128) == 0) {
                script[i] = 'g';
            }
        }
        script[length] = '\0';
        explore_script(tally, script, config, 0, 3, limits);
    }
}

static double now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Crash states of all tests of this program. */
static uint64_t states_total;

/* Runs the work in as many processes as there are cores. */
static void work_run(struct work *work)
{
    double start = now_s();
    unsigned workers = test_workers(), i;
    int failed;

    work->tallies = test_shared(workers * sizeof *work->tallies);
    failed = test_fork(workers, worker_run, work);
    for (i = 0; i < workers; i++) {
        tally_add(&work->sum, &work->tallies[i]);
    }
    print_tally(&work->sum, now_s() - start);
    states_total += work->sum.states;
    assert_int_equal(failed, 0);
    assert_int_equal(work->sum.failed, 0);
}

/* The rare branches must have been taken, or nothing was tested there. */
static void check_rare_branches(const struct tally *t)
{
    assert_true(t->states > 0);
    assert_true(t->life.torn[KVMETA_TORN_HEADER] > 0);
    assert_true(t->life.healed > 0);
    assert_true(t->life.garbage_files > 0);
    assert_true(t->sim.cells_garbage > 0);
    assert_true(t->sim.entries_lost > 0);
    assert_true(t->sim.sizes_lost > 0);
    assert_true(t->second_lives > 0);
    assert_true(t->stale_refused > 0);
    assert_true(t->stale_refused < t->stale_manifests);
}

/* Goal: no script of up to five operations loses or invents anything at any
 * crash. Method: all of them, each with every moment of its last operation,
 * and there a kill and power cuts. */
static void short_scripts_survive_every_crash(void **state)
{
    struct work work = {run_listed, NULL, {0}};

    (void)state;
    work_run(&work);
    check_rare_branches(&work.sum);
}

/* Goal: the same for what needs longer histories: merges, rotations by size,
 * other widths and cells. Method: random scripts, random moments. */
static void long_scripts_survive_random_crashes(void **state)
{
    struct work work = {run_random, NULL, {0}};

    (void)state;
    work_run(&work);
    check_rare_branches(&work.sum);
    assert_true(work.sum.life.torn[KVMETA_TORN_BODY] > 0);
    assert_true(work.sum.life.merges > 0);
    assert_true(work.sum.life.rotations > 0);
    if (test_args.scale > 0 && longest() == 5) {
        printf("# %llu crash states together\n",
               (unsigned long long)states_total);
        assert_true(states_total >= 10000000);
    }
}

/* Goal: see one failure again. Method: its script alone. */
static void given_script_survives_every_crash(void **state)
{
    struct limits limits = {32, 48, 64, 256, 16};
    struct tally tally;
    unsigned config = (unsigned)test_option_u64("config", 0);
    unsigned from = (unsigned)test_option_u64("from", 0);
    uint64_t one_in = test_option_u64("one-in", 1);

    (void)state;
    memset(&tally, 0, sizeof tally);
    limits_override(&limits);
    explore_script(&tally, test_option("script"), config, from, one_in,
                   limits);
    tally.sim = sim_totals;
    tally.life = life_totals;
    print_tally(&tally, 0);
    assert_int_equal(tally.failed, 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(short_scripts_survive_every_crash),
        cmocka_unit_test(long_scripts_survive_random_crashes),
    };
    const struct CMUnitTest one[] = {
        cmocka_unit_test(given_script_survives_every_crash),
    };

    test_parse_args(argc, argv);
    life_trace = test_option("trace") != NULL;
    if (test_option("script") != NULL) {
        return cmocka_run_group_tests(one, NULL, NULL);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
