/*
 * Logical threads that take turns: exactly one runs at any time, and a seeded
 * scheduler says at every point who goes on. The same seed gives the same
 * order again. Mutexes and conditions are those of pthread in all that a
 * caller may rely on, and in nothing else: a woken thread may find the lock
 * taken, a signal may reach any of those who wait, a wait may end for nothing.
 *
 * There are three kinds of schedules:
 *
 *   walk  at each point the running thread loses its turn with a probability
 *         that is fixed for the schedule (one in `gap`); who follows is drawn
 *         among all that can run.
 *   pct   every thread has a random priority, and the highest one that can
 *         run does. At a few points, drawn beforehand, the running thread's
 *         priority falls below all others. A bug that needs d such changes
 *         is found with a probability of at least 1 / (n * k^(d-1)), for n
 *         threads and k points: S. Burckhardt, P. Kothari, M. Musuvathi and
 *         S. Nagarakatte, "A randomized scheduler with probabilistic
 *         guarantees of finding bugs", ASPLOS 2010.
 *   focus a walk with few switches, but for the points of one name in eight:
 *         there every other one is a switch. Two threads that must both be
 *         stopped at the same few lines are, now and then.
 *
 * Time is virtual: it goes on a little at each point, and where nobody can
 * run it jumps to the next time-out. No thread that can run, and no time-out
 * either, is a deadlock; more points than the limit is a livelock.
 *
 * Threads are contexts on stacks of their own within one thread of the
 * system, since a switch by way of the kernel would cost far more than this.
 * So thread-local variables are shared, and all of memory is seen at once: of
 * weak ordering this shows nothing, ThreadSanitizer does.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_TURNS_H
#define KVMETA_TEST_TURNS_H

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

#include "../support/support.h"

#if defined(__SANITIZE_ADDRESS__)
#  define TURN_ASAN 1
#elif defined(__has_feature)
#  if __has_feature(address_sanitizer)
#    define TURN_ASAN 1
#  endif
#endif
#ifndef TURN_ASAN
#  define TURN_ASAN 0
#endif
#if TURN_ASAN
#  include <sanitizer/common_interface_defs.h>
#endif

#define TURN_THREADS_MAX 12
#define TURN_STACK_BYTES ((size_t)256 << 10)
#define TURN_CHANGES_MAX 8
#define TURN_SPIN_MAX 4000           /* points of a thread without a wait */
#define TURN_SKIP_MAX 20000          /* that are none in this schedule */

/* What counts as a point: each kind includes those before it. */
enum turn_grain {
    TURN_COARSE,                     /* locks, conditions, files, named */
    TURN_ATOMIC,                     /* operations on atomics */
    TURN_COPY                        /* copies of memory */
};

enum turn_kind { TURN_WALK, TURN_PCT, TURN_FOCUS, TURN_KINDS };

enum turn_state {
    TURN_FREE,
    TURN_READY,
    TURN_LOCKING,
    TURN_WAITING,
    TURN_JOINING,
    TURN_DONE
};

struct turn_thread {
    ucontext_t context;
    const void *stack;               /* made once; NULL: not yet */
    size_t stack_bytes;
    enum turn_state state;
    const void *on;                  /* what it waits for */
    uint64_t deadline_ns;            /* of a wait; UINT64_MAX: none */
    int timed_out;
    int64_t priority;                /* pct */
    uint64_t ran;                    /* points since it last gave way */
    void *(*fn)(void *);
    void *arg;
    void *fake_stack;                /* AddressSanitizer's */
};

struct turns {
    int running;                     /* turn_begin .. turn_end */
    int off;                         /* > 0: what runs now has no points */
    int trace;
    enum turn_kind kind;
    enum turn_grain grain;
    uint64_t gap;                    /* walk: mean points of a turn */
    uint32_t focus;                  /* which names are in focus */
    int spurious;                    /* waits may end for nothing */
    uint64_t step_ns;
    uint64_t points_max;

    struct test_rng rng;
    uint64_t points;
    uint64_t next;                   /* the point of the next decision */
    uint64_t skipped;                /* finer ones since the last point */
    uint64_t switches;
    uint64_t timeouts;
    uint64_t contended;              /* locks that were taken */
    uint64_t now_ns;
    uint64_t alarm_ns;               /* no deadline is before */
    uint64_t changes[TURN_CHANGES_MAX];     /* pct: points, ascending */
    unsigned change_count;
    unsigned change_next;
    int64_t lowest;                  /* priority that was given last */
    unsigned current;
    unsigned count;                  /* slots that have been used */
    struct turn_thread threads[TURN_THREADS_MAX];
};

struct turn_mutex {
    unsigned owner;                  /* thread + 1; 0: free */
};

struct turn_cond {
    unsigned waiters;
};

typedef uint64_t turn_handle;        /* of a thread: its number + 1 */

static struct turns turns;

/* Says what is wrong, and does not return. The test's. */
static void turn_fail(const char *what);

/* --------------------------------------------------------------------------
 * Contexts
 * -------------------------------------------------------------------------- */

/* AddressSanitizer wants to know on which stack it is. */
static void turn_leave_stack(struct turn_thread *from,
                             const struct turn_thread *next)
{
#if TURN_ASAN
    __sanitizer_start_switch_fiber(&from->fake_stack, next->stack,
                                   next->stack_bytes);
#else
    (void)from;
    (void)next;
#endif
}

static void turn_enter_stack(struct turn_thread *thread)
{
#if TURN_ASAN
    const void *bottom;
    size_t bytes;

    __sanitizer_finish_switch_fiber(thread->fake_stack, &bottom, &bytes);
    /* Thread 0 is on the stack of the process. Whoever runs first after it
     * learns of that. */
    if (turns.threads[0].stack_bytes == 0) {
        turns.threads[0].stack = bottom;
        turns.threads[0].stack_bytes = bytes;
    }
#else
    (void)thread;
#endif
}

static void turn_switch(unsigned to)
{
    struct turn_thread *from = &turns.threads[turns.current];
    struct turn_thread *next = &turns.threads[to];

    if (to == turns.current) return;
    turns.switches++;
    turns.current = to;
    turn_leave_stack(from, next);
    swapcontext(&from->context, &next->context);
    turn_enter_stack(from);
}

static void turn_exit(void);

/* A context outlives its thread: the next one in the slot goes on in it. */
static void turn_main(void)
{
    turn_enter_stack(&turns.threads[turns.current]);
    for (;;) {
        struct turn_thread *self = &turns.threads[turns.current];

        self->fn(self->arg);
        turn_exit();
    }
}

static void turn_make_context(struct turn_thread *thread)
{
    size_t page = 4096;
    unsigned char *memory;

    if (thread->stack != NULL) return;
    memory = mmap(NULL, TURN_STACK_BYTES + page, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0 ||
        getcontext(&thread->context) != 0) {
        abort();
    }
    thread->stack = memory + page;
    thread->stack_bytes = TURN_STACK_BYTES;
    thread->context.uc_stack.ss_sp = memory + page;
    thread->context.uc_stack.ss_size = TURN_STACK_BYTES;
    thread->context.uc_link = NULL;
    makecontext(&thread->context, turn_main, 0);
}

/* --------------------------------------------------------------------------
 * Who goes on
 * -------------------------------------------------------------------------- */

static void turn_trace(const char *what)
{
    if (turns.trace) {
        printf("%7llu %10.3f ms  thread %u  %s\n",
               (unsigned long long)turns.points, (double)turns.now_ns / 1e6,
               turns.current, what);
    }
}

/* Waits whose time is over end; finds the next one. */
static void turn_expire(void)
{
    unsigned i;

    turns.alarm_ns = UINT64_MAX;
    for (i = 0; i < turns.count; i++) {
        struct turn_thread *t = &turns.threads[i];

        if (t->state != TURN_WAITING) continue;
        if (t->deadline_ns <= turns.now_ns) {
            t->state = TURN_READY;
            t->timed_out = 1;
            turns.timeouts++;
        } else if (t->deadline_ns < turns.alarm_ns) {
            turns.alarm_ns = t->deadline_ns;
        }
    }
}

static unsigned turn_pick_walk(int but_self)
{
    unsigned ready[TURN_THREADS_MAX];
    unsigned i, n = 0;

    for (i = 0; i < turns.count; i++) {
        if (turns.threads[i].state == TURN_READY &&
            !(but_self && i == turns.current)) {
            ready[n++] = i;
        }
    }
    if (n == 0) return but_self ? turn_pick_walk(0) : TURN_THREADS_MAX;
    return ready[test_rng_below(&turns.rng, n)];
}

static unsigned turn_pick_pct(void)
{
    unsigned i, best = TURN_THREADS_MAX;

    for (i = 0; i < turns.count; i++) {
        if (turns.threads[i].state == TURN_READY &&
            (best == TURN_THREADS_MAX ||
             turns.threads[i].priority > turns.threads[best].priority)) {
            best = i;
        }
    }
    return best;
}

/* but_self: another one if there is any. TURN_THREADS_MAX: nobody can run. */
static unsigned turn_pick(int but_self)
{
    if (turns.kind != TURN_PCT) return turn_pick_walk(but_self);
    if (but_self) {
        turns.threads[turns.current].priority = --turns.lowest;
        turns.threads[turns.current].ran = 0;
    }
    return turn_pick_pct();
}

/* Draws the point of the next decision. */
static void turn_plan(void)
{
    uint64_t next;

    if (turns.kind != TURN_PCT) {
        next = turns.points + 1 + test_rng_below(&turns.rng,
                                                 2 * turns.gap - 1);
    } else {
        next = turns.points + TURN_SPIN_MAX;
        if (turns.change_next < turns.change_count &&
            turns.changes[turns.change_next] < next) {
            next = turns.changes[turns.change_next];
        }
    }
    turns.next = next;
}

/* In this order: a thread that is new does not come out of turn_switch. */
static void turn_pass(unsigned next)
{
    turn_plan();
    turn_switch(next);
}

/* Somebody has become able to run, who may come first. */
static void turn_reconsider(void)
{
    if (turns.kind == TURN_PCT) turns.next = turns.points;
}

/* One waiting thread wakes for nothing: pthread allows it. */
static void turn_spurious(void)
{
    unsigned i = (unsigned)test_rng_below(&turns.rng, turns.count);

    if (turns.threads[i].state == TURN_WAITING) {
        turns.threads[i].state = TURN_READY;
        turn_trace("spurious wake-up");
    }
}

static void turn_decide(void)
{
    int change = 0;

    if (turns.points > turns.points_max) turn_fail("livelock");
    if (turns.spurious && test_rng_below(&turns.rng, 16) == 0) {
        turn_spurious();
    }
    while (turns.change_next < turns.change_count &&
           turns.changes[turns.change_next] <= turns.points) {
        turns.change_next++;
        change = 1;
    }
    /* A thread that spins until another one has done something. */
    if (turns.threads[turns.current].ran >= TURN_SPIN_MAX) change = 1;
    turn_pass(turn_pick(change && turns.kind == TURN_PCT));
}

static int turn_in_focus(const char *name)
{
    uint32_t hash = turns.focus;

    if (turns.kind != TURN_FOCUS) return 0;
    for (; *name != '\0'; name++) {
        hash = (hash ^ (unsigned char)*name) * 16777619u;
    }
    return hash >> 29 == 0 && test_rng_below(&turns.rng, 2);
}

/* The running thread can do nothing until others have run. */
static void turn_yield(const char *what)
{
    if (!turns.running || turns.off) return;
    turns.points++;
    turns.now_ns += turns.step_ns;
    turn_trace(what);
    if (turns.points > turns.points_max) turn_fail("livelock");
    if (turns.now_ns >= turns.alarm_ns) turn_expire();
    turn_pass(turn_pick(1));
}

/* A place that is too fine for this schedule. A thread that only comes by
 * such places may be spinning, without a word, until another one has run. */
static void turn_skip(const char *what)
{
    if (++turns.skipped < TURN_SKIP_MAX) return;
    turns.skipped = 0;
    turn_yield(what);
}

/* A place where another thread may go on. */
static void turn_point(enum turn_grain grain, const char *what)
{
    if (!turns.running || turns.off) return;
    if (grain > turns.grain) {
        turn_skip(what);
        return;
    }
    turns.skipped = 0;
    turns.points++;
    turns.threads[turns.current].ran++;
    turns.now_ns += turns.step_ns;
    turn_trace(what);
    if (turns.now_ns >= turns.alarm_ns) {
        turn_expire();
        turn_reconsider();
    }
    if (turns.points >= turns.next || turn_in_focus(what)) turn_decide();
}

/* The running thread's state says that it cannot run. Returns once it has
 * been made ready, and has its turn. */
static void turn_block(void)
{
    unsigned next;

    turns.points++;
    turns.threads[turns.current].ran = 0;
    if (turns.points > turns.points_max) turn_fail("livelock");
    next = turn_pick(0);
    if (next == TURN_THREADS_MAX && turns.alarm_ns != UINT64_MAX) {
        turns.now_ns = turns.alarm_ns;
        turn_expire();
        next = turn_pick(0);
    }
    if (next == TURN_THREADS_MAX) turn_fail("deadlock");
    turn_pass(next);
}

/* Makes all ready that wait in this state for this. */
static void turn_wake(enum turn_state state, const void *on)
{
    unsigned i;

    for (i = 0; i < turns.count; i++) {
        if (turns.threads[i].state == state && turns.threads[i].on == on) {
            turns.threads[i].state = TURN_READY;
            turn_reconsider();
        }
    }
}

/* --------------------------------------------------------------------------
 * Mutexes
 * -------------------------------------------------------------------------- */

static int turn_mutex_init(struct turn_mutex *mutex)
{
    mutex->owner = 0;
    return 0;
}

static int turn_mutex_destroy(struct turn_mutex *mutex)
{
    if (mutex->owner != 0) turn_fail("a mutex that is held is destroyed");
    return 0;
}

static int turn_mutex_lock(struct turn_mutex *mutex)
{
    struct turn_thread *self;

    turn_point(TURN_COARSE, "lock");
    while (mutex->owner != 0) {
        if (turns.off) turn_fail("a lock is taken outside of the turns");
        turn_trace("waits for a lock");
        turns.contended++;
        self = &turns.threads[turns.current];
        self->state = TURN_LOCKING;
        self->on = mutex;
        turn_block();
    }
    mutex->owner = turns.current + 1;
    return 0;
}

static int turn_mutex_trylock(struct turn_mutex *mutex)
{
    turn_point(TURN_COARSE, "trylock");
    if (mutex->owner != 0) return EBUSY;
    mutex->owner = turns.current + 1;
    return 0;
}

static int turn_mutex_unlock(struct turn_mutex *mutex)
{
    if (mutex->owner != turns.current + 1) {
        turn_fail("a mutex is unlocked by a thread that does not hold it");
    }
    mutex->owner = 0;
    turn_wake(TURN_LOCKING, mutex);
    turn_point(TURN_COARSE, "unlock");
    return 0;
}

/* --------------------------------------------------------------------------
 * Conditions
 * -------------------------------------------------------------------------- */

static int turn_cond_init(struct turn_cond *cond)
{
    cond->waiters = 0;
    return 0;
}

static int turn_cond_destroy(struct turn_cond *cond)
{
    if (cond->waiters != 0) turn_fail("a condition in use is destroyed");
    return 0;
}

static int turn_wait_until(struct turn_cond *cond, struct turn_mutex *mutex,
                           uint64_t deadline_ns)
{
    struct turn_thread *self = &turns.threads[turns.current];

    if (mutex->owner != turns.current + 1) {
        turn_fail("a wait without the mutex");
    }
    if (turns.off) turn_fail("a wait outside of the turns");
    turn_trace("waits");
    mutex->owner = 0;
    turn_wake(TURN_LOCKING, mutex);
    cond->waiters++;
    self->state = TURN_WAITING;
    self->on = cond;
    self->timed_out = 0;
    self->deadline_ns = deadline_ns;
    if (deadline_ns < turns.alarm_ns) turns.alarm_ns = deadline_ns;
    turn_block();
    cond->waiters--;
    turn_mutex_lock(mutex);
    return self->timed_out ? ETIMEDOUT : 0;
}

static int turn_cond_wait(struct turn_cond *cond, struct turn_mutex *mutex)
{
    return turn_wait_until(cond, mutex, UINT64_MAX);
}

static uint64_t turn_ns(const struct timespec *time)
{
    return (uint64_t)time->tv_sec * 1000000000u + (uint64_t)time->tv_nsec;
}

static int turn_cond_timedwait(struct turn_cond *cond,
                               struct turn_mutex *mutex,
                               const struct timespec *until)
{
    if (until->tv_nsec < 0 || until->tv_nsec >= 1000000000) {
        turn_fail("a timed wait until no time");
    }
    return turn_wait_until(cond, mutex, turn_ns(until));
}

static int turn_cond_broadcast(struct turn_cond *cond)
{
    turn_wake(TURN_WAITING, cond);
    turn_point(TURN_COARSE, "broadcast");
    return 0;
}

/* Any one of those who wait. */
static int turn_cond_signal(struct turn_cond *cond)
{
    unsigned first = (unsigned)test_rng_below(&turns.rng, TURN_THREADS_MAX);
    unsigned i;

    for (i = 0; i < TURN_THREADS_MAX; i++) {
        struct turn_thread *t =
            &turns.threads[(first + i) % TURN_THREADS_MAX];

        if (t->state == TURN_WAITING && t->on == cond) {
            t->state = TURN_READY;
            turn_reconsider();
            break;
        }
    }
    turn_point(TURN_COARSE, "signal");
    return 0;
}

/* --------------------------------------------------------------------------
 * Time
 * -------------------------------------------------------------------------- */

static int turn_clock_gettime(struct timespec *time)
{
    time->tv_sec = (time_t)(turns.now_ns / 1000000000u);
    time->tv_nsec = (long)(turns.now_ns % 1000000000u);
    return 0;
}

static int turn_nanosleep(const struct timespec *time)
{
    turns.now_ns += turn_ns(time);
    turn_yield("sleep");
    return 0;
}

/* --------------------------------------------------------------------------
 * Threads
 * -------------------------------------------------------------------------- */

static void turn_thread_start(struct turn_thread *thread, void *(*fn)(void *),
                              void *arg)
{
    thread->state = TURN_READY;
    thread->on = NULL;
    thread->ran = 0;
    thread->fn = fn;
    thread->arg = arg;
    thread->priority =
        1 + (int64_t)test_rng_below(&turns.rng, (uint64_t)1 << 40);
}

static int turn_create(turn_handle *handle, void *(*fn)(void *), void *arg)
{
    unsigned i = 0;

    if (turns.off || !turns.running) return EAGAIN;
    while (i < turns.count && turns.threads[i].state != TURN_FREE) i++;
    if (i == TURN_THREADS_MAX) return EAGAIN;
    if (i == turns.count) turns.count++;
    turn_make_context(&turns.threads[i]);
    turn_thread_start(&turns.threads[i], fn, arg);
    *handle = i + 1;
    turn_reconsider();
    turn_point(TURN_COARSE, "create");
    return 0;
}

static void turn_exit(void)
{
    struct turn_thread *self = &turns.threads[turns.current];

    turn_trace("ends");
    self->state = TURN_DONE;
    turn_wake(TURN_JOINING, self);
    turn_block();
}

static int turn_join(turn_handle handle)
{
    struct turn_thread *thread = &turns.threads[handle - 1];
    struct turn_thread *self = &turns.threads[turns.current];

    turn_point(TURN_COARSE, "join");
    while (thread->state != TURN_DONE) {
        if (thread->state == TURN_FREE) turn_fail("joined twice");
        self->state = TURN_JOINING;
        self->on = thread;
        turn_block();
    }
    thread->state = TURN_FREE;
    return 0;
}

static turn_handle turn_self(void)
{
    return turns.current + 1;
}

/* --------------------------------------------------------------------------
 * A schedule
 * -------------------------------------------------------------------------- */

static int turn_order(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* The number of points is not known beforehand: the changes are drawn from
 * the first 64 to 64 K of them, so that short and long ones get theirs. */
static void turn_draw_changes(void)
{
    uint64_t range = (uint64_t)64 << test_rng_below(&turns.rng, 11);
    unsigned i;

    turns.change_count =
        1 + (unsigned)test_rng_below(&turns.rng, TURN_CHANGES_MAX - 1);
    turns.change_next = 0;
    for (i = 0; i < turns.change_count; i++) {
        turns.changes[i] = 1 + test_rng_below(&turns.rng, range);
    }
    qsort(turns.changes, turns.change_count, sizeof turns.changes[0],
          turn_order);
}

/* Draws the kind of schedule from the seed. The caller becomes thread 0. */
static void turn_begin(uint64_t seed, uint64_t points_max)
{
    static const uint64_t steps_ns[] = {100, 10000, 1000000};
    static const uint64_t gaps[] = {2, 6, 20, 80};
    unsigned i;

    for (i = 0; i < TURN_THREADS_MAX; i++) {
        turns.threads[i].state = TURN_FREE;
    }
    turns.rng.state = seed;
    turns.kind = (enum turn_kind)test_rng_below(&turns.rng, TURN_KINDS);
    turns.grain = (enum turn_grain)test_rng_below(&turns.rng, 3);
    turns.gap = gaps[test_rng_below(&turns.rng, 4)];
    if (turns.kind == TURN_FOCUS) turns.gap = 200;
    turns.focus = (uint32_t)test_rng_u64(&turns.rng);
    turns.spurious = test_rng_below(&turns.rng, 4) == 0;
    turns.step_ns = steps_ns[test_rng_below(&turns.rng, 3)];
    turns.points_max = points_max;
    turns.points = turns.switches = turns.timeouts = turns.contended = 0;
    turns.skipped = 0;
    turns.now_ns = (uint64_t)1000 * 1000000000u;
    turns.alarm_ns = UINT64_MAX;
    turns.lowest = 0;
    turn_draw_changes();
    if (turns.kind != TURN_PCT) turns.change_count = 0;
    turns.off = 0;
    turns.current = 0;
    turns.count = 1;
    turn_thread_start(&turns.threads[0], NULL, NULL);
    turns.running = 1;
    turn_plan();
}

static void turn_end(void)
{
    unsigned i;

    for (i = 1; i < turns.count; i++) {
        if (turns.threads[i].state != TURN_FREE) {
            turn_fail("a thread was not joined");
        }
    }
    turns.running = 0;
}

static const char *turn_kind_name(void)
{
    static const char *const names[] = {"walk", "pct", "focus"};

    return names[turns.kind];
}

static const char *turn_grain_name(void)
{
    static const char *const names[] = {"coarse", "atomic", "copy"};

    return names[turns.grain];
}

/* What each thread does, for a failure. */
static void turn_print(void)
{
    static const char *const names[] = {
        "free", "ready", "waits for a lock", "waits for a condition",
        "waits for a thread", "ended"
    };
    unsigned i;

    printf("%s schedule, grain %s, gap %llu, after %llu points; thread %u "
           "runs\n", turn_kind_name(), turn_grain_name(),
           (unsigned long long)turns.gap, (unsigned long long)turns.points,
           turns.current);
    for (i = 0; i < turns.count; i++) {
        printf("  thread %u: %s\n", i, names[turns.threads[i].state]);
    }
}

#endif /* KVMETA_TEST_TURNS_H */
