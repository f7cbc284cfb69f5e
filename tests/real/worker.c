/*
 * A store that is worked on while its system calls fail for real, and the
 * look at what is left. tests/real/test_strace.sh runs this under strace.
 *
 *   worker --mode live --dir D --log L    goes on where L ends, by a script of
 *            writes, barriers and re-opens; notes in L what it is about to do
 *            and what came of it. After each step every record is compared
 *            with what was acknowledged. Exit status 3 and a line "bad" when
 *            that or an error code is not as documented.
 *   worker --mode verify --dir D --log L  opens the store, and compares with
 *            what L allows; writes to it, closes it and looks again.
 *
 *   --rounds N   length of the script      --error N    errno that is injected
 *   --thread 1   with a background thread  --kill-at N  SIGKILL after N steps
 *
 * What batch n does is a function of n; so a state of the store is a list of
 * batches. L has one line for each event:
 *
 *   try N D      batch N is about to be written, with durability D
 *   ack CODE     its result
 *   barrier      all that was acknowledged is in the system's hands
 *   found K N    an open has found the first K batches; N > 0: and batch N
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1
#endif

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../support/support.h"

#define KEYS 24u                         /* and one that counts the batches */
#define VALUE_BYTES 200u
#define SMALL_MAX 4u                     /* changes of a batch */
#define LARGE 200u                       /* ... of one that fills the log */
#define BATCHES_MAX 4096u
#define BEGIN_MARK "/kvmeta-worker-begins"

/* --------------------------------------------------------------------------
 * What may be found
 * -------------------------------------------------------------------------- */

struct history {
    unsigned applied[BATCHES_MAX];       /* acknowledged, in order */
    unsigned count;
    unsigned least;                      /* that many must be found */
    unsigned flying;                     /* begun, no answer; 0: none */
    unsigned durability;                 /* of that one */
    unsigned unknown;                    /* failed last, with E_IO */
    unsigned newest;                     /* highest number that was tried */
};

static struct history history;
static FILE *notes;

static void history_try(unsigned batch, unsigned durability)
{
    history.flying = batch;
    history.durability = durability;
    history.newest = batch;
}

/* What failed with E_IO may be on disk, but for one that another followed. */
static void history_ack(int rc)
{
    if (rc == KVMETA_OK) {
        history.applied[history.count++] = history.flying;
        history.unknown = 0;
        if (history.durability != KVMETA_BUFFERED) {
            history.least = history.count;
        }
    } else if (rc == KVMETA_E_IO) {
        history.unknown = history.flying;
    }
    history.flying = 0;
}

static void history_barrier(void)
{
    history.least = history.count;
}

static void history_found(unsigned count, unsigned extra)
{
    history.count = count;
    if (extra != 0) history.applied[history.count++] = extra;
    history.least = history.count;
    history.flying = 0;
    history.unknown = 0;
}

static void history_read(const char *path)
{
    FILE *file = fopen(path, "r");
    char line[128];
    unsigned a, b;
    int rc;

    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "try %u %u", &a, &b) == 2) history_try(a, b);
        if (sscanf(line, "ack %d", &rc) == 1) history_ack(rc);
        if (strcmp(line, "barrier\n") == 0) history_barrier();
        if (sscanf(line, "found %u %u", &a, &b) == 2) history_found(a, b);
    }
    if (file != NULL) fclose(file);
}

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static void note(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vfprintf(notes, format, args);
    va_end(args);
    fflush(notes);
}

#define bad(...) (note("bad: " __VA_ARGS__), note("\n"), exit(3))

/* --------------------------------------------------------------------------
 * Batches
 * -------------------------------------------------------------------------- */

struct batch {
    struct kvmeta_op ops[LARGE + 2];
    unsigned char keys[LARGE + 2][8];
    unsigned char values[LARGE + 2][VALUE_BYTES];
    size_t count;
};

/* A change is a removal in one of four; the last one counts the batches. */
static void batch_make(struct batch *batch, unsigned number)
{
    struct test_rng rng = {test_args.seed * 0x10001u + number};
    size_t i, n = number % 16 >= 14 ? LARGE
                                    : 1 + test_rng_below(&rng, SMALL_MAX);

    for (i = 0; i <= n; i++) {
        kvmeta_u64_to_key(i == n ? KEYS : test_rng_below(&rng, KEYS),
                          batch->keys[i]);
        test_rng_bytes(&rng, batch->values[i], VALUE_BYTES);
        batch->ops[i].type = i < n && test_rng_below(&rng, 4) == 0
            ? KVMETA_OP_REMOVE : KVMETA_OP_PUT;
        batch->ops[i].key = batch->keys[i];
        batch->ops[i].value = batch->values[i];
    }
    kvmeta_u64_to_key(number, batch->values[n]);
    batch->count = n + 1;
}

static void oracle_apply(struct test_oracle *oracle, unsigned number)
{
    static struct batch batch;
    size_t i;

    batch_make(&batch, number);
    for (i = 0; i < batch.count; i++) {
        if (batch.ops[i].type == KVMETA_OP_PUT) {
            test_oracle_put(oracle, batch.keys[i], batch.values[i]);
        } else {
            test_oracle_remove(oracle, batch.keys[i]);
        }
    }
}

/* NULL when the store holds the first `count` batches, and batch `extra`
 * where that is not 0; else what differs. */
static const char *differs(kvmeta *db, unsigned count, unsigned extra)
{
    struct test_oracle oracle;
    const char *why;
    unsigned i;

    test_oracle_init(&oracle, 8, VALUE_BYTES);
    for (i = 0; i < count; i++) {
        oracle_apply(&oracle, history.applied[i]);
    }
    if (extra != 0) oracle_apply(&oracle, extra);
    why = test_oracle_check(&oracle, db);
    test_oracle_free(&oracle);
    return why;
}

/* Which of the allowed states the store holds; notes it. */
static void find(kvmeta *db)
{
    unsigned extras[3] = {0, history.flying, history.unknown};
    unsigned count, i;

    for (i = 0; i < 3; i++) {
        if ((i == 0 || extras[i] != 0) &&
            differs(db, history.count, extras[i]) == NULL) {
            note("found %u %u\n", history.count, extras[i]);
            history_found(history.count, extras[i]);
            return;
        }
    }
    for (count = history.count; count-- > history.least;) {
        if (differs(db, count, 0) == NULL) {
            note("found %u 0\n", count);
            history_found(count, 0);
            return;
        }
    }
    bad("the store holds none of the states %u to %u", history.least,
        history.count);
}

/* --------------------------------------------------------------------------
 * Steps
 * -------------------------------------------------------------------------- */

struct work {
    kvmeta *db;                          /* NULL: closed, or not opened */
    struct kvmeta_options options;
    struct kvmeta_error err;
    int refuses;                         /* E_FAILED was seen */
    int sys_errno;                       /* what is injected; 0: nothing */
    uint64_t steps;
    uint64_t kill_at;
};

/* May the injected errno cause this error? */
static int fits(int sys_errno, int rc)
{
    switch (sys_errno) {
    case 0: return 0;
    case EMFILE: return rc == KVMETA_E_LIMIT;
    case ENOSPC: if (rc == KVMETA_E_NOSPACE) return 1;   /* fall through */
    default: return rc == KVMETA_E_IO || rc == KVMETA_E_FAILED;
    }
}

/* Once a handle refuses writes, it goes on to. */
static void check_code(struct work *work, const char *what, int rc,
                       int is_write)
{
    if (rc != KVMETA_OK) note("error %s %d\n", what, rc);
    if (rc != KVMETA_OK && !fits(work->sys_errno, rc)) {
        bad("%s: %d (%s)", what, rc, kvmeta_strerror(rc));
    }
    if (is_write && work->refuses && rc != KVMETA_E_FAILED) {
        bad("%s: %d, after a write was refused for good", what, rc);
    }
    work->refuses |= is_write && rc == KVMETA_E_FAILED;
}

static void check_records(struct work *work, const char *after)
{
    const char *why;

    if (work->db == NULL) return;
    why = differs(work->db, history.count, 0);
    if (why != NULL) bad("after %s: %s", after, why);
}

static void work_open(struct work *work)
{
    const char *dir = test_option("dir");
    int rc = kvmeta_open(dir, &work->options, &work->db, &work->err);

    work->refuses = 0;
    check_code(work, "open", rc, 0);
    if (rc != KVMETA_OK) {
        if (work->err.sys_errno != work->sys_errno) {
            bad("open: errno %d: %s", work->err.sys_errno,
                work->err.message);
        }
        work->db = NULL;
        return;
    }
    find(work->db);
}

static void work_write(struct work *work, unsigned durability)
{
    static struct batch batch;
    unsigned number = history.newest + 1;
    int rc;

    if (number >= BATCHES_MAX) bad("too many batches");
    batch_make(&batch, number);
    note("try %u %u\n", number, durability);
    history_try(number, durability);
    rc = kvmeta_write(work->db, batch.ops, batch.count, durability, NULL);
    note("ack %d\n", rc);
    history_ack(rc);
    check_code(work, "write", rc, 1);
}

static void barrier(struct work *work, const char *what, int rc,
                    int is_write)
{
    if (rc == KVMETA_OK) {
        note("barrier\n");
        history_barrier();
    }
    check_code(work, what, rc, is_write);
}

static void work_close(struct work *work)
{
    kvmeta *db = work->db;

    work->db = NULL;
    barrier(work, "close", kvmeta_close(db), 0);
}

/* Background work by hand, until there is none. */
static void work_idle(struct work *work)
{
    int rc = KVMETA_OK, did = 1;

    if ((work->options.flags & KVMETA_NO_THREAD) == 0) {
        check_code(work, "wait", kvmeta_wait_idle(work->db), 0);
        return;
    }
    while (did && rc == KVMETA_OK) {
        rc = kvmeta_step(work->db, &did);
    }
    check_code(work, "step", rc, 0);
}

/* A letter is a step: d w b: write durable, written, buffered; s: sync;
 * f: flush; c: compact; i: background work; r: close and open. */
static void work_step(struct work *work, char step)
{
    char name[2] = {step, 0};

    if (work->db == NULL) work_open(work);
    if (work->db == NULL) return;
    switch (step) {
    case 'd': work_write(work, KVMETA_DURABLE); break;
    case 'w': work_write(work, KVMETA_WRITTEN); break;
    case 'b': work_write(work, KVMETA_BUFFERED); break;
    case 's': barrier(work, "sync", kvmeta_sync(work->db), 1); break;
    case 'f': barrier(work, "flush", kvmeta_flush(work->db), 0); break;
    case 'c': barrier(work, "compact", kvmeta_compact(work->db), 0); break;
    case 'i': work_idle(work); break;
    default:
        work_close(work);
        work_open(work);
    }
    check_records(work, name);
    if (++work->steps == work->kill_at) kill(getpid(), SIGKILL);
}

static void live(struct work *work)
{
    static const char script[] = "ddwwsbbdfdwbcdrdiwwdid";
    uint64_t rounds = test_option_u64("rounds", 1), n;
    size_t i;

    (void)open(BEGIN_MARK, O_RDONLY);
    work_open(work);
    for (n = 0; n < rounds; n++) {
        for (i = 0; script[i] != 0; i++) {
            work_step(work, script[i]);
        }
    }
    if (work->db != NULL) work_close(work);
}

/* --------------------------------------------------------------------------
 * Afterwards
 * -------------------------------------------------------------------------- */

static void verify(struct work *work)
{
    work_open(work);
    if (kvmeta_verify(work->db, &work->err) != KVMETA_OK) {
        bad("verify: %s", work->err.message);
    }
    work_write(work, KVMETA_DURABLE);
    work_close(work);
    work->options.flags = KVMETA_READ_ONLY;
    work_open(work);
    work_close(work);
}

int main(int argc, char **argv)
{
    struct work work = {0};
    const char *mode, *log;

    test_parse_args(argc, argv);
    mode = test_option("mode");
    log = test_option("log");
    if (mode == NULL || log == NULL || test_option("dir") == NULL) {
        fprintf(stderr, "usage: %s --mode live|verify --dir D --log L\n",
                argv[0]);
        return 2;
    }
    history_read(log);
    notes = fopen(log, "a");
    if (notes == NULL) {
        perror(log);
        return 2;
    }
    kvmeta_options_init(&work.options, 8, VALUE_BYTES);
    if (!test_option_u64("thread", 0)) {
        work.options.flags = KVMETA_NO_THREAD;
        work.options.open_threads = 1;
    }
    work.options.log_bytes_max = 65536;
    work.options.log_buffer_bytes = 4096;
    work.options.merge_window = 2;
    work.sys_errno = (int)test_option_u64("error", 0);
    work.kill_at = test_option_u64("kill-at", 0);
    if (strcmp(mode, "live") == 0) {
        live(&work);
    } else {
        verify(&work);
    }
    return fclose(notes) != 0;
}
