/*
 * kill -9: a child writes batches and reports each acknowledgement through a
 * pipe; the parent kills it at a random moment, reads what the directory
 * holds, and compares.
 *
 * One to three lanes (threads of the child) each write batch 1, 2, 3, ... of
 * their own keys. What batch n of a lane does is a function of seed, lane and
 * n, and every batch also stores n under the lane's counter key: so whatever
 * the parent finds must be, lane by lane, the state after exactly the batch
 * that the counter names. That batch may not be older than the last one
 * acknowledged as durable or written, nor newer than the one in flight; and
 * by the commit numbers that the child reported nothing later than a lost
 * batch may be there.
 *
 * The parent reads through a read-only handle, so the next child recovers the
 * same directory for itself, and may be killed in doing so.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#undef test_realloc                  /* cmocka's; support.h has its own */

#include <errno.h>
#include <ftw.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kvmeta.h"
#include "../support/support.h"

#define KILLS_PER_SCALE 1000
#define LANES 3
#define KEYS 500                     /* of a lane; number KEYS: the counter */
#define BATCH_MAX 8
#define FIRST_ACK_US 10000000       /* a child that is not dead by then */

struct ack {
    uint32_t lane;
    uint32_t durability;
    uint64_t n;
    uint64_t seq;
};

struct kill_run {
    struct test_rng rng;
    char dir[320];
    struct test_alloc alloc;
    uint64_t n[LANES];               /* batches that the directory holds */
    uint64_t state[LANES][KEYS + 1]; /* batch that wrote each key, or 0 */
    uint64_t seen[LANES][KEYS + 1];  /* the same, as found */
    struct ack *acks;                /* of the present life */
    size_t ack_count, ack_capacity;
    uint64_t life;
    uint64_t acked, silent_lives, torn_lives, logs_found, tables_found;
};

/* --------------------------------------------------------------------------
 * What each batch does: the same in parent and child
 * -------------------------------------------------------------------------- */

struct change {
    uint32_t key;
    int put;
};

static size_t plan(uint32_t lane, uint64_t n, struct change *changes)
{
    struct test_rng rng = {test_args.seed * 31 + lane * 7919u + (n << 20)};
    size_t count = 1 + test_rng_below(&rng, BATCH_MAX - 1), i;

    for (i = 0; i < count; i++) {
        changes[i].key = (uint32_t)test_rng_below(&rng, KEYS);
        changes[i].put = test_rng_below(&rng, 10) < 7;
    }
    return count;
}

static void make_key(uint32_t lane, uint32_t number, unsigned char *key)
{
    kvmeta_u64_to_key((uint64_t)lane << 56 | number, key);
}

/* A value names the batch that wrote it, twice. */
static void make_value(uint32_t lane, uint32_t number, uint64_t n,
                       unsigned char *value)
{
    struct test_rng rng = {n ^ (uint64_t)number << 40 ^ (uint64_t)lane << 56};

    kvmeta_u64_to_key(n, value);
    kvmeta_u64_to_key(test_rng_u64(&rng), value + 8);
}

/* --------------------------------------------------------------------------
 * The child
 * -------------------------------------------------------------------------- */

struct child {
    const struct kill_run *run;
    kvmeta *db;
    int pipe;
    int lanes;
    int no_thread;
    unsigned profile;
    uint64_t life_seed;
};

struct lane {
    struct child *child;
    uint32_t number;
    uint64_t n;                      /* last batch found at open */
};

static void child_want(int ok, const char *what, int rc)
{
    if (!ok) {
        fprintf(stderr, "child: %s: %d (%s)\n", what, rc,
                kvmeta_strerror(rc));
        _exit(1);
    }
}

static struct kvmeta_options child_options(struct child *child,
                                           struct test_rng *rng)
{
    struct kvmeta_options options;

    kvmeta_options_init(&options, 8, 16);
    options.flags = test_rng_below(rng, 4) == 0 ? KVMETA_NO_THREAD : 0;
    options.log_bytes_max = 65536;
    options.log_buffer_bytes = 4096;
    options.log_align = test_rng_below(rng, 2) ? 8 : 512;
    options.merge_window = 2;
    options.space_amp_max = test_rng_below(rng, 2) ? 1.1 : 2;
    options.sync_interval_ms = (uint32_t)test_rng_below(rng, 3);
    child->no_thread = (options.flags & KVMETA_NO_THREAD) != 0;
    return options;
}

static unsigned choose_durability(struct lane *lane, struct test_rng *rng)
{
    uint64_t dice = test_rng_below(rng, 10);

    switch (lane->child->profile) {
    case 0:
        return KVMETA_DURABLE;
    case 1:
        return dice == 0 ? KVMETA_DURABLE : KVMETA_WRITTEN;
    default:
        return dice == 0 ? KVMETA_WRITTEN : KVMETA_BUFFERED;
    }
}

static void write_one(struct lane *lane, uint64_t n, unsigned durability)
{
    unsigned char keys[BATCH_MAX][8], values[BATCH_MAX][16];
    struct kvmeta_op ops[BATCH_MAX];
    struct change changes[BATCH_MAX];
    struct ack ack = {lane->number, durability, n, 0};
    size_t count = plan(lane->number, n, changes), i;
    int rc;

    changes[count].key = KEYS;
    changes[count++].put = 1;
    for (i = 0; i < count; i++) {
        make_key(lane->number, changes[i].key, keys[i]);
        make_value(lane->number, changes[i].key, n, values[i]);
        ops[i].type = changes[i].put ? KVMETA_OP_PUT : KVMETA_OP_REMOVE;
        ops[i].key = keys[i];
        ops[i].value = values[i];
    }
    rc = kvmeta_write(lane->child->db, ops, count, durability, &ack.seq);
    child_want(rc == KVMETA_OK, "write", rc);
    child_want(write(lane->child->pipe, &ack, sizeof ack) == sizeof ack,
               "pipe", 0);
}

/* Now and then something larger, that a kill may hit. */
static void disturb(struct child *child, struct test_rng *rng)
{
    uint64_t dice = test_rng_below(rng, 400);
    int rc = KVMETA_OK, did;

    if (dice == 0) {
        rc = kvmeta_compact(child->db);
    } else if (dice < 4) {
        rc = kvmeta_flush(child->db);
    } else if (dice < 8) {
        rc = kvmeta_sync(child->db);
    } else if (child->no_thread && dice < 60) {
        rc = kvmeta_step(child->db, &did);
    }
    child_want(rc == KVMETA_OK, "background", rc);
}

static void *run_lane(void *arg)
{
    struct lane *lane = arg;
    struct test_rng rng = {lane->child->life_seed + lane->number};
    uint64_t n;

    for (n = lane->n + 1;; n++) {
        write_one(lane, n, choose_durability(lane, &rng));
        if (lane->number == 0) {
            disturb(lane->child, &rng);
        }
    }
    return NULL;
}

static uint64_t read_counter(kvmeta *db, uint32_t lane)
{
    unsigned char key[8], value[16];

    make_key(lane, KEYS, key);
    return kvmeta_get(db, key, value) == KVMETA_OK ? kvmeta_key_to_u64(value)
                                                   : 0;
}

/* Single lanes also close and open again, so that kills hit that, too. */
static void live_alone(struct child *child, struct lane *lane,
                       const struct kvmeta_options *options,
                       struct test_rng *rng)
{
    uint64_t n, stop;
    int rc;

    for (n = lane->n + 1;;) {
        stop = n + 1 + test_rng_below(rng, 200);
        for (; n < stop; n++) {
            write_one(lane, n, choose_durability(lane, rng));
            disturb(child, rng);
        }
        rc = kvmeta_close(child->db);
        child_want(rc == KVMETA_OK, "close", rc);
        rc = kvmeta_open(child->run->dir, options, &child->db, NULL);
        child_want(rc == KVMETA_OK, "open again", rc);
        child_want(read_counter(child->db, 0) == n - 1, "counter", 0);
    }
}

static void live(const struct kill_run *run, int pipe, uint64_t life_seed)
{
    struct test_rng rng = {life_seed};
    struct child child = {run, NULL, pipe, 1, 0, 0, life_seed};
    struct kvmeta_options options = child_options(&child, &rng);
    struct lane lanes[LANES];
    struct kvmeta_error err;
    pthread_t thread;
    uint32_t i;
    int rc;

    child.lanes = test_rng_below(&rng, 2) ? LANES : 1;
    child.profile = (unsigned)test_rng_below(&rng, 3);
    rc = kvmeta_open(run->dir, &options, &child.db, &err);
    child_want(rc == KVMETA_OK, err.message, rc);
    for (i = 0; i < LANES; i++) {
        lanes[i].child = &child;
        lanes[i].number = i;
        lanes[i].n = read_counter(child.db, i);
        child_want(lanes[i].n == run->n[i], "counter after open", 0);
    }
    if (child.lanes == 1) {
        live_alone(&child, &lanes[0], &options, &rng);
    }
    for (i = 1; i < LANES; i++) {
        rc = pthread_create(&thread, NULL, run_lane, &lanes[i]);
        child_want(rc == 0, "thread", 0);
    }
    run_lane(&lanes[0]);
}

/* --------------------------------------------------------------------------
 * The parent: a life and its end
 * -------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *st, int type,
                        struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}

static void kill_fail(const struct kill_run *run, const char *what)
{
    printf("life %llu: %s\n", (unsigned long long)run->life, what);
    test_replay("--kills %llu", (unsigned long long)run->life + 100);
    printf("the directory is kept: %s\n", run->dir);
    fflush(stdout);
    exit(1);
}

#define WANT(run, condition)                                                  \
    ((condition) ? (void)0 : kill_fail(run, #condition))

static void take_ack(struct kill_run *run, const struct ack *ack)
{
    if (run->ack_count == run->ack_capacity) {
        run->ack_capacity = 2 * run->ack_capacity + 1024;
        run->acks = realloc(run->acks,
                            run->ack_capacity * sizeof *run->acks);
        WANT(run, run->acks != NULL);
    }
    run->acks[run->ack_count++] = *ack;
}

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Takes acknowledgements until the deadline, until there are `enough`, or to
 * the end of the pipe. */
static void listen_until(struct kill_run *run, int pipe, uint64_t deadline,
                         size_t enough)
{
    struct pollfd poll_fd = {pipe, POLLIN, 0};
    struct ack acks[128];
    struct timespec wait;
    uint64_t now;
    ssize_t bytes, i;

    while (run->ack_count < enough && (now = now_us()) < deadline) {
        wait.tv_sec = (time_t)((deadline - now) / 1000000);
        wait.tv_nsec = (long)((deadline - now) % 1000000) * 1000;
        if (ppoll(&poll_fd, 1, &wait, NULL) <= 0) {
            continue;
        }
        bytes = read(pipe, acks, sizeof acks);
        if (bytes <= 0) {
            return;
        }
        WANT(run, bytes % (ssize_t)sizeof acks[0] == 0);
        for (i = 0; i < bytes / (ssize_t)sizeof acks[0]; i++) {
            take_ack(run, &acks[i]);
        }
    }
}

/* Listens until the moment to kill: soon, while it opens, which may take less
 * than a millisecond; or some time after the first acknowledgement, which a
 * slow disk may let wait. */
static void hear(struct kill_run *run, int pipe)
{
    uint64_t more = test_rng_below(&run->rng, 35000);

    if (test_rng_below(&run->rng, 4) == 0) {
        more = test_rng_below(&run->rng,
                              25000u >> test_rng_below(&run->rng, 8));
    } else {
        listen_until(run, pipe, now_us() + FIRST_ACK_US, 1);
    }
    listen_until(run, pipe, now_us() + more, SIZE_MAX);
}

static void live_and_kill(struct kill_run *run)
{
    uint64_t life_seed = test_rng_u64(&run->rng);
    int pipes[2], status;
    pid_t pid;

    run->ack_count = 0;
    WANT(run, pipe(pipes) == 0);
    fflush(stdout);
    pid = fork();
    WANT(run, pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(pipes[0]);
        live(run, pipes[1], life_seed);
        _exit(2);
    }
    close(pipes[1]);
    hear(run, pipes[0]);
    WANT(run, kill(pid, SIGKILL) == 0);
    WANT(run, waitpid(pid, &status, 0) == pid);
    listen_until(run, pipes[0], now_us() + FIRST_ACK_US, SIZE_MAX);
    close(pipes[0]);
    WANT(run, WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* --------------------------------------------------------------------------
 * The parent: what is there
 * -------------------------------------------------------------------------- */

static int see(void *user, const void *key, const void *value)
{
    struct kill_run *run = user;
    uint64_t number = kvmeta_key_to_u64(key);
    uint32_t lane = (uint32_t)(number >> 56);
    unsigned char want[16];
    uint64_t n;

    number &= 0xffffffff;
    if (lane >= LANES || number > KEYS) {
        return 1;
    }
    n = kvmeta_key_to_u64(value);
    make_value(lane, (uint32_t)number, n, want);
    run->seen[lane][number] = n;
    return memcmp(want, value, 16) != 0;
}

/* Brings the model of a lane from batch run->n to batch n. */
static void advance(struct kill_run *run, uint32_t lane, uint64_t n)
{
    struct change changes[BATCH_MAX];
    size_t count, i;

    while (run->n[lane] < n) {
        run->n[lane]++;
        count = plan(lane, run->n[lane], changes);
        for (i = 0; i < count; i++) {
            run->state[lane][changes[i].key] =
                changes[i].put ? run->n[lane] : 0;
        }
        run->state[lane][KEYS] = run->n[lane];
    }
}

/* The bounds of what may be found, from the acknowledgements. */
static void check_bounds(struct kill_run *run)
{
    uint64_t least[LANES], most[LANES], newest_found = 0;
    uint64_t oldest_lost = UINT64_MAX;
    const struct ack *ack;
    size_t i;

    memcpy(least, run->n, sizeof least);
    memcpy(most, run->n, sizeof most);
    for (i = 0; i < run->ack_count; i++) {
        ack = &run->acks[i];
        WANT(run, ack->lane < LANES && ack->n == most[ack->lane] + 1);
        most[ack->lane] = ack->n;
        if (ack->durability != KVMETA_BUFFERED) {
            least[ack->lane] = ack->n;
        }
        if (ack->n > run->seen[ack->lane][KEYS]) {
            oldest_lost = ack->seq < oldest_lost ? ack->seq : oldest_lost;
        } else {
            newest_found = ack->seq > newest_found ? ack->seq : newest_found;
        }
    }
    for (i = 0; i < LANES; i++) {
        WANT(run, run->seen[i][KEYS] >= least[i]);
        WANT(run, run->seen[i][KEYS] <= most[i] + 1);
    }
    WANT(run, newest_found < oldest_lost);
}

static void check_directory(struct kill_run *run)
{
    struct kvmeta_options options;
    struct kvmeta_stats stats;
    struct kvmeta_error err;
    kvmeta *db = NULL;
    uint32_t lane;
    int rc;

    kvmeta_options_init(&options, 8, 16);
    options.flags = KVMETA_READ_ONLY;
    options.open_threads = 1;
    options.realloc_fn = test_realloc;
    options.user = &run->alloc;
    memset(run->seen, 0, sizeof run->seen);
    rc = kvmeta_open(run->dir, &options, &db, &err);
    if (rc == KVMETA_OK) {
        stats.struct_size = sizeof stats;
        WANT(run, kvmeta_stats(db, &stats) == KVMETA_OK);
        WANT(run, kvmeta_scan(db, NULL, NULL, see, run) == 0);
        WANT(run, kvmeta_close(db) == KVMETA_OK);
        run->torn_lives += stats.open_torn_bytes > 0;
        run->logs_found += stats.open_logs;
        run->tables_found += stats.open_tables;
    } else if (rc != KVMETA_NOT_FOUND) {
        kill_fail(run, err.message);
    }
    check_bounds(run);
    for (lane = 0; lane < LANES; lane++) {
        advance(run, lane, run->seen[lane][KEYS]);
        WANT(run, memcmp(run->seen[lane], run->state[lane],
                         sizeof run->seen[lane]) == 0);
    }
    WANT(run, atomic_load(&run->alloc.live_blocks) == 0);
}

/* A read-write visit: recovery, everything checked, a clean close. */
static void visit(struct kill_run *run)
{
    struct kvmeta_options options;
    struct kvmeta_error err;
    kvmeta *db;

    kvmeta_options_init(&options, 8, 16);
    if (kvmeta_open(run->dir, &options, &db, &err) != KVMETA_OK ||
        kvmeta_verify(db, &err) != KVMETA_OK) {
        kill_fail(run, err.message);
    }
    WANT(run, kvmeta_close(db) == KVMETA_OK);
    run->ack_count = 0;
    check_directory(run);
}

/* --------------------------------------------------------------------------
 * The test
 * -------------------------------------------------------------------------- */

static void begin(struct kill_run *run)
{
    const char *tmp = getenv("TMPDIR");

    memset(run, 0, sizeof *run);
    run->rng.state = test_args.seed;
    snprintf(run->dir, sizeof run->dir, "%s/kvmeta-kill-XXXXXX",
             tmp != NULL && strlen(tmp) < 256 ? tmp : "/tmp");
    WANT(run, mkdtemp(run->dir) != NULL);
}

/* Goal: no kill at any moment loses an acknowledged durable or written batch
 * or leaves anything but a prefix. Method: see above. That the kills hit what
 * they should is asserted, too: some before the first acknowledgement, most
 * after many. */
static void no_kill_loses_an_acknowledged_batch(void **state)
{
    static struct kill_run run;
    uint64_t kills = test_args.scale == 0 ? KILLS_PER_SCALE / 20
                                          : KILLS_PER_SCALE * test_args.scale;

    (void)state;
    kills = test_option_u64("kills", kills);
    begin(&run);
    for (run.life = 0; run.life < kills; run.life++) {
        live_and_kill(&run);
        check_directory(&run);
        run.acked += run.ack_count;
        run.silent_lives += run.ack_count == 0;
        if (run.life % 50 == 49) {
            visit(&run);
        }
    }
    printf("%llu kills, %llu of them before the first acknowledgement; %llu "
           "batches acknowledged; found %llu logs, %llu tables, %llu torn "
           "tails\n", (unsigned long long)kills,
           (unsigned long long)run.silent_lives,
           (unsigned long long)run.acked,
           (unsigned long long)run.logs_found,
           (unsigned long long)run.tables_found,
           (unsigned long long)run.torn_lives);
    WANT(&run, run.silent_lives > 0 || kills < 50);
    WANT(&run, run.acked >= 10 * kills || kills < 50);
    WANT(&run, run.logs_found > 0 && run.tables_found > 0);
    nftw(run.dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    free(run.acks);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_kill_loses_an_acknowledged_batch),
    };

    test_parse_args(argc, argv);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
