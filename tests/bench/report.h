/*
 * The figures of a run: kept, printed, written as JSON, and held against the
 * targets.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BENCH_REPORT_H
#define BENCH_REPORT_H

#include "bench.h"

#include <stdio.h>

#define ROUNDS_MAX 31u

/* Keeps a figure of one round. */
void report_add(const char *engine, const char *workload,
                const struct run *run, double value);
/* Tables of the medians, a row for each workload, a column for each engine. */
void report_print(FILE *out);
/* One object; each of its results stands on a line of its own. */
void report_json(const char *path, int argc, char **argv);
/* Prints which targets are reached; false when one is missed by more than the
 * margin (0.15: 15 %). */
bool targets_print(FILE *out, double margin);

#endif /* BENCH_REPORT_H */
