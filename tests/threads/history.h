/*
 * A history of concurrent batches and reads, and the check of it.
 *
 * Each batch takes a ticket before it is written and stores it in every key
 * of the groups that it writes; the commit number that the write returned is
 * entered afterwards. A read enters the tickets that it saw, one for each
 * group, and the highest commit number acknowledged before it began. When all
 * threads have ended, every read must have seen one state: there must be a
 * commit number after which each group held exactly the ticket seen, not older
 * than what was acknowledged before, nor than what the same thread saw before.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_HISTORY_H
#define KVMETA_TEST_HISTORY_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef GROUPS
#  define GROUPS 12
#  define TICKETS_MAX 60000
#  define EVENTS_MAX 20000
#endif
#define NO_TICKET UINT32_MAX         /* this read did not look at the group */

struct history_batch {
    uint64_t seq;                    /* 0 until acknowledged */
    uint32_t groups;                 /* a bit for each group written */
    uint32_t ticket;
};

struct history {
    atomic_uint_fast64_t acked_seq;  /* highest acknowledged */
    atomic_uint_fast32_t tickets;    /* given out */
    struct history_batch *batches;   /* by ticket; each has one writer */
    uint64_t *next_seq;              /* [ticket * GROUPS + group]: when its
                                        value was replaced */
};

struct history_event {
    uint64_t acked_seq;              /* before the read */
    uint64_t exact_seq;              /* of a snapshot; 0: not known */
    uint32_t tickets[GROUPS];
};

/* The reads of one thread, in their order. */
struct history_reader {
    struct history_event *events;
    size_t count;
};

static inline void history_init(struct history *h)
{
    atomic_init(&h->acked_seq, 0);
    atomic_init(&h->tickets, 0);
    h->batches = calloc(TICKETS_MAX, sizeof *h->batches);
    h->next_seq = calloc((size_t)TICKETS_MAX * GROUPS, sizeof *h->next_seq);
    if (h->batches == NULL || h->next_seq == NULL) {
        abort();
    }
}

static inline void history_free(struct history *h)
{
    free(h->batches);
    free(h->next_seq);
}

/* A ticket for a batch over these groups; NO_TICKET when all are given. */
static inline uint32_t history_begin(struct history *h, uint32_t groups)
{
    uint32_t ticket = (uint32_t)atomic_fetch_add(&h->tickets, 1);

    if (ticket >= TICKETS_MAX) {
        atomic_fetch_sub(&h->tickets, 1);
        return NO_TICKET;
    }
    h->batches[ticket].groups = groups;
    h->batches[ticket].ticket = ticket;
    return ticket;
}

static inline void history_ack(struct history *h, uint64_t seq)
{
    uint64_t old = atomic_load(&h->acked_seq);

    while (old < seq &&
           !atomic_compare_exchange_weak(&h->acked_seq, &old, seq)) {
        /* old was reloaded by the exchange. */
    }
}

static inline void history_end(struct history *h, uint32_t ticket,
                               uint64_t seq)
{
    h->batches[ticket].seq = seq;
    history_ack(h, seq);
}

/* The batch changed nothing: its ticket may never be seen. */
static inline void history_cancel(struct history *h, uint32_t ticket)
{
    h->batches[ticket].groups = 0;
}

static inline struct history_event *
history_read(struct history_reader *reader, const struct history *h)
{
    struct history_event *event;
    int g;

    if (reader->count == EVENTS_MAX) {
        return NULL;
    }
    event = &reader->events[reader->count++];
    event->acked_seq = atomic_load(&h->acked_seq);
    event->exact_seq = 0;
    for (g = 0; g < GROUPS; g++) {
        event->tickets[g] = NO_TICKET;
    }
    return event;
}

/* --------------------------------------------------------------------------
 * The check, when all threads have ended
 * -------------------------------------------------------------------------- */

static inline int history_order(const void *a, const void *b)
{
    uint64_t x = ((const struct history_batch *)a)->seq;
    uint64_t y = ((const struct history_batch *)b)->seq;

    return (x > y) - (x < y);
}

/* Fills next_seq, and last[g]: the ticket that each group must end with.
 * Returns what is wrong with the commit numbers themselves, or NULL. */
static inline const char *history_close(struct history *h, uint32_t *last)
{
    uint32_t all = (uint32_t)atomic_load(&h->tickets), count = 0, i, g;
    struct history_batch *sorted = malloc((all + 1) * sizeof *sorted);
    uint64_t next[GROUPS];
    const char *wrong = NULL;

    for (i = 0; i < all; i++) {
        if (h->batches[i].groups != 0) {
            sorted[count++] = h->batches[i];
        }
    }
    qsort(sorted, count, sizeof *sorted, history_order);
    for (g = 0; g < GROUPS; g++) {
        next[g] = UINT64_MAX;
        last[g] = NO_TICKET;
    }
    for (i = count; i-- > 0;) {
        if (sorted[i].seq == 0) {
            wrong = "a batch has no commit number";
        } else if (i > 0 && sorted[i].seq == sorted[i - 1].seq) {
            wrong = "two batches have one commit number";
        }
        for (g = 0; g < GROUPS; g++) {
            h->next_seq[(size_t)sorted[i].ticket * GROUPS + g] = next[g];
            if (sorted[i].groups >> g & 1) {
                last[g] = last[g] == NO_TICKET ? sorted[i].ticket : last[g];
                next[g] = sorted[i].seq;
            }
        }
    }
    free(sorted);
    return wrong;
}

/* One read: *floor is the state that its thread surely saw before. */
static inline const char *history_event_check(const struct history *h,
                                              const struct history_event *e,
                                              uint64_t *floor)
{
    uint64_t low = 0, high = UINT64_MAX, next;
    uint32_t count = (uint32_t)atomic_load(&h->tickets), t, g;

    for (g = 0; g < GROUPS; g++) {
        t = e->tickets[g];
        if (t == NO_TICKET) {
            continue;
        }
        if (t >= count || !(h->batches[t].groups >> g & 1)) {
            return "a read saw a ticket that was never written there";
        }
        next = h->next_seq[(size_t)t * GROUPS + g];
        low = h->batches[t].seq > low ? h->batches[t].seq : low;
        high = next < high ? next : high;
    }
    if (low >= high) {
        return "a read saw a mixture of states";
    }
    if (high <= e->acked_seq) {
        return "a read missed what was acknowledged before it";
    }
    if (high <= *floor) {
        return "a read went back behind an earlier one";
    }
    if (e->exact_seq != 0 && (e->exact_seq < low || e->exact_seq >= high)) {
        return "a snapshot is not of its commit number";
    }
    *floor = low > *floor ? low : *floor;
    *floor = e->exact_seq > *floor ? e->exact_seq : *floor;
    return NULL;
}

static inline const char *history_check(const struct history *h,
                                        const struct history_reader *reader)
{
    const char *wrong = NULL;
    uint64_t floor = 0;
    size_t i;

    for (i = 0; i < reader->count && wrong == NULL; i++) {
        wrong = history_event_check(h, &reader->events[i], &floor);
    }
    return wrong;
}

#endif /* KVMETA_TEST_HISTORY_H */
