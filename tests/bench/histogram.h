/*
 * A log-linear histogram of nanoseconds: 64 buckets for each power of two, so
 * that a percentile is at most 1.6 % too high.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_BUCKETS (64u * 59u)

struct histogram {
    uint64_t count;
    uint64_t max;
    uint64_t buckets[HISTOGRAM_BUCKETS];
};

static inline void histogram_add(struct histogram *histogram, uint64_t ns)
{
    unsigned shift = ns < 128 ? 0 : 57u - (unsigned)__builtin_clzll(ns);

    histogram->buckets[shift * 64u + (unsigned)(ns >> shift)]++;
    histogram->count++;
    if (ns > histogram->max) histogram->max = ns;
}

/* The largest number that falls into the bucket. */
static inline uint64_t histogram_upper(unsigned bucket)
{
    unsigned shift = bucket < 128 ? 0 : bucket / 64u - 1;

    return (((uint64_t)bucket - shift * 64u + 1) << shift) - 1;
}

/* What at least this part (0..1) of all numbers does not exceed. */
static inline uint64_t histogram_quantile(const struct histogram *histogram,
                                          double part)
{
    uint64_t below = 0;
    unsigned i;

    for (i = 0; i < HISTOGRAM_BUCKETS; i++) {
        below += histogram->buckets[i];
        if ((double)below >= part * (double)histogram->count) break;
    }
    if (i == HISTOGRAM_BUCKETS || histogram_upper(i) > histogram->max) {
        return histogram->max;
    }
    return histogram_upper(i);
}

#endif /* BENCH_HISTOGRAM_H */
