/*
 * To be included right before kvmeta.c: what that calls of pthread, of the
 * clock, of <stdatomic.h> and of <string.h> goes to the turns from here on,
 * whatever it is used for. All headers of the system must have been included
 * before, so that only the text of kvmeta.c is affected.
 *
 * An atomic operation is a point before it is done. Those that name their
 * memory order become one by way of that name, the others by way of their
 * pointer; operators on _Atomic variables do not.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_TURNS_PTHREAD_H
#define KVMETA_TEST_TURNS_PTHREAD_H

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#  include <immintrin.h>
#endif
#define ZSTD_STATIC_LINKING_ONLY
#include <zstd.h>

#include "turns.h"

/* Two halves with a point between them, so that others may see one of them:
 * all that changes or reads records goes through here. */
static inline void *turn_copy(void *to, const void *from, size_t bytes)
{
    size_t half = bytes / 2 & ~(size_t)7;

    if (bytes < 8 || !turns.running || turns.off || turns.grain < TURN_COPY) {
        return memcpy(to, from, bytes);
    }
    memcpy(to, from, half);
    turn_point(TURN_COPY, "copy");
    memcpy((char *)to + half, (const char *)from + half, bytes - half);
    return to;
}

/* The parts of a move may overlap: it is done at once. */
static inline void *turn_move(void *to, const void *from, size_t bytes)
{
    turn_point(TURN_COPY, "move");
    return memmove(to, from, bytes);
}

#undef memcpy
#undef memmove
#define memcpy(to, from, bytes) turn_copy(to, from, bytes)
#define memmove(to, from, bytes) turn_move(to, from, bytes)

#define pthread_t turn_handle
#define pthread_mutex_t struct turn_mutex
#define pthread_cond_t struct turn_cond
#define pthread_self() turn_self()
#define pthread_create(thread, attr, fn, arg) turn_create(thread, fn, arg)
#define pthread_join(thread, result) turn_join(thread)
#define pthread_mutex_init(mutex, attr) turn_mutex_init(mutex)
#define pthread_mutex_destroy(mutex) turn_mutex_destroy(mutex)
#define pthread_mutex_lock(mutex) turn_mutex_lock(mutex)
#define pthread_mutex_trylock(mutex) turn_mutex_trylock(mutex)
#define pthread_mutex_unlock(mutex) turn_mutex_unlock(mutex)
#define pthread_cond_init(cond, attr) turn_cond_init(cond)
#define pthread_cond_destroy(cond) turn_cond_destroy(cond)
#define pthread_cond_wait(cond, mutex) turn_cond_wait(cond, mutex)
#define pthread_cond_timedwait(cond, mutex, until)                            \
    turn_cond_timedwait(cond, mutex, until)
#define pthread_cond_signal(cond) turn_cond_signal(cond)
#define pthread_cond_broadcast(cond) turn_cond_broadcast(cond)
#define sched_yield() turn_yield("yield")
#define nanosleep(time, rest) turn_nanosleep(time)
#define clock_gettime(clock, time) turn_clock_gettime(time)

/* The pointer of an operation, with a point on the way. */
#define TURN_AT(object) (turn_point(TURN_ATOMIC, #object), (object))

#undef atomic_load
#undef atomic_store
#undef atomic_exchange
#undef atomic_fetch_add
#undef atomic_fetch_sub
#undef atomic_fetch_or
#undef atomic_fetch_and
#undef atomic_compare_exchange_strong
#undef atomic_compare_exchange_weak
#define atomic_load(object)                                                   \
    atomic_load_explicit(TURN_AT(object), TURN_SEQ_CST)
#define TURN_WITH(call, object, n)                                            \
    call##_explicit(TURN_AT(object), n, TURN_SEQ_CST)
#define atomic_store(object, value) TURN_WITH(atomic_store, object, value)
#define atomic_exchange(object, n) TURN_WITH(atomic_exchange, object, n)
#define atomic_fetch_add(object, n) TURN_WITH(atomic_fetch_add, object, n)
#define atomic_fetch_sub(object, n) TURN_WITH(atomic_fetch_sub, object, n)
#define atomic_fetch_or(object, n) TURN_WITH(atomic_fetch_or, object, n)
#define atomic_fetch_and(object, n) TURN_WITH(atomic_fetch_and, object, n)
#define TURN_SWAP(call, object, old, new)                                     \
    call##_explicit(TURN_AT(object), old, new, TURN_SEQ_CST, TURN_SEQ_CST)
#define atomic_compare_exchange_strong(object, old, new)                      \
    TURN_SWAP(atomic_compare_exchange_strong, object, old, new)
#define atomic_compare_exchange_weak(object, old, new)                        \
    TURN_SWAP(atomic_compare_exchange_weak, object, old, new)

enum { TURN_SEQ_CST = memory_order_seq_cst };

#define memory_order_relaxed TURN_ORDER(memory_order_relaxed)
#define memory_order_acquire TURN_ORDER(memory_order_acquire)
#define memory_order_release TURN_ORDER(memory_order_release)
#define memory_order_acq_rel TURN_ORDER(memory_order_acq_rel)
#define memory_order_seq_cst TURN_ORDER(memory_order_seq_cst)
#define TURN_ORDER(order) (turn_point(TURN_ATOMIC, #order), (order))

#undef KV_SCHED_POINT
#define KV_SCHED_POINT(name) turn_point(TURN_COARSE, name)

#endif /* KVMETA_TEST_TURNS_PTHREAD_H */
