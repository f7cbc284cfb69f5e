/*
 * One fault: what it changes, and what the store makes of it.
 *
 * An open of a damaged store is
 *
 *   detected   it fails with a documented error that names a file, and has
 *              changed nothing,
 *   harmless   it succeeds, and holds what an open without the fault holds;
 *              where the fault has touched the live log behind what was
 *              acknowledged: at least what stands before the fault,
 *   residual   only where the marks are not on disk: it succeeds, and lacks
 *              acknowledged commits of which the fault has touched the last,
 *   alarm      detected, though no acknowledged byte was hit: damage to
 *              marks, to one copy of the manifest, or to an un-acknowledged
 *              tail must not keep a store from opening,
 *   silent     anything else.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_ROT_JUDGE_H
#define KVMETA_TEST_ROT_JUDGE_H

#include "contexts.h"
#include "fixture.h"

enum rot_class {
    ROT_FLIP,                /* one bit */
    ROT_PAIR,                /* two bits of one file */
    ROT_BYTE,                /* one byte becomes another one */
    ROT_BURST,               /* a run of bytes */
    ROT_TRUNCATE,
    ROT_ZERO,                /* a sector */
    ROT_GARBAGE,             /* a sector */
    ROT_COPY,                /* a sector over another */
    ROT_STALE,               /* an earlier version of a file, or of a sector */
    ROT_SWAP,
    ROT_DELETE,
    ROT_RESURRECT,           /* a file that had been deleted */
    ROT_EXTEND,
    ROT_FOREIGN,             /* a file of another store */
    ROT_CLASSES
};

static const char *const rot_class_names[ROT_CLASSES] = {
    "flip", "pair", "byte", "burst", "truncate", "zero", "garbage", "copy",
    "stale", "swap", "delete", "resurrect", "extend", "foreign"
};

enum rot_verdict {
    ROT_HARMLESS,
    ROT_DETECTED,
    ROT_RESIDUAL,
    ROT_ALARM,
    ROT_SILENT,
    ROT_CRASHED,
    ROT_VERDICTS
};

static const char *const rot_verdict_names[ROT_VERDICTS] = {
    "harmless", "detected", "residual", "ALARM", "SILENT", "CRASHED"
};

/* New bytes at `off` of a file, or (whole) a new file; data NULL: none. */
struct rot_change {
    const char *name;
    const unsigned char *data;
    uint64_t bytes;
    uint64_t off;
    int whole;
};

struct rot_fault {
    enum rot_class class;
    struct rot_change changes[2];
    unsigned count;

    /* Filled in by rot_compare: */
    int differs;                         /* from what is there */
    int hits_live;                       /* the live log */
    uint64_t live_from;                  /* its first byte that differs */
    uint64_t live_to;                    /* behind the last one */
};

/* What opens have found, over all faults: branches that must be reached. */
struct rot_found {
    uint64_t opens;
    uint64_t torn[3];                    /* by enum kvmeta_torn */
    uint64_t healed;
    uint64_t garbage_files;
    uint64_t read_only;
    uint64_t second_opens;
    uint64_t hashed;                     /* directories compared in full */
};

struct rot_judge {
    const struct rot_fixture *f;
    struct rot_found *found;
    uint64_t index;                      /* of the fault */
    struct kvmeta_error err;
    char why[200];                       /* of a verdict that is a failure */
    unsigned lowest;                     /* state that may be found */
    int alarming;                        /* a detection would be an alarm */
};

/* --------------------------------------------------------------------------
 * What a fault touches
 * -------------------------------------------------------------------------- */

static void rot_widen(struct rot_fault *fault, int live, uint64_t from,
                      uint64_t to)
{
    fault->differs = 1;
    if (live) {
        fault->live_from = !fault->hits_live || from < fault->live_from
            ? from : fault->live_from;
        fault->live_to = to > fault->live_to ? to : fault->live_to;
        fault->hits_live = 1;
    }
}

/* The range in which a new content differs from the old. */
static void rot_compare_change(const struct rot_fixture *f,
                               struct rot_fault *fault,
                               const struct rot_change *change)
{
    const struct rot_file *old = rot_files_find(&f->files, change->name);
    int live = strcmp(change->name, f->live) == 0;
    uint64_t from = 0, n, old_bytes;
    const unsigned char *was;

    if (old == NULL || change->data == NULL) {
        if (old != NULL || change->data != NULL) {
            rot_widen(fault, live, 0, UINT64_MAX);
        }
        return;
    }
    old_bytes = change->whole ? old->bytes : change->bytes;
    n = old_bytes < change->bytes ? old_bytes : change->bytes;
    was = old->data + change->off;
    while (from < n && was[from] == change->data[from]) {
        from++;
    }
    if (from == n && old_bytes == change->bytes) {
        return;
    }
    if (old_bytes != change->bytes) {
        rot_widen(fault, live, change->off + from, UINT64_MAX);
        return;
    }
    while (was[n - 1] == change->data[n - 1]) {
        n--;
    }
    rot_widen(fault, live, change->off + from, change->off + n);
}

static void rot_compare(const struct rot_fixture *f, struct rot_fault *fault)
{
    unsigned i;

    fault->differs = 0;
    fault->hits_live = 0;
    fault->live_from = 0;
    fault->live_to = 0;
    for (i = 0; i < fault->count; i++) {
        rot_compare_change(f, fault, &fault->changes[i]);
    }
}

static uint64_t rot_log_first(const struct rot_fixture *f)
{
    return f->log_align > ROT_LOG_HEADER_BYTES ? f->log_align
                                               : ROT_LOG_HEADER_BYTES;
}

/* End of what was acknowledged in the live log. */
static uint64_t rot_acked_end(const struct rot_fixture *f)
{
    return f->ends[f->acked] != 0 ? f->ends[f->acked] : rot_log_first(f);
}

/* The oldest state that an open may find. Without a fault in the frames of
 * the live log it is the one that is found without any fault. */
static unsigned rot_lowest(const struct rot_fixture *f,
                           const struct rot_fault *fault)
{
    unsigned i = f->base;

    if (!fault->hits_live || fault->live_from < rot_log_first(f)) {
        return f->base;
    }
    if (f->residual && fault->live_to <= f->ends[f->issued - 1]) {
        return f->base;
    }
    while (i > 0 && f->ends[i] > fault->live_from) {
        i--;
    }
    if (!f->residual && i < f->acked) {
        i = f->acked;
    }
    return i < f->base ? i : f->base;
}

/* May this fault not be answered by an error? */
static int rot_alarming(const struct rot_fixture *f,
                        const struct rot_fault *fault)
{
    const char *name = fault->changes[0].name;
    int small = fault->class == ROT_FLIP || fault->class == ROT_BYTE;

    if (fault->class == ROT_RESURRECT) {
        return 1;
    }
    if (fault->class > ROT_GARBAGE) {
        return 0;
    }
    if (strcmp(name, "LOCK") == 0) {
        return 1;
    }
    if (strcmp(name, "MANIFEST") == 0) {
        return small || fault->class == ROT_ZERO ||
               fault->class == ROT_GARBAGE;
    }
    return fault->hits_live && fault->live_from >= rot_acked_end(f);
}

/* --------------------------------------------------------------------------
 * Bringing it about
 * -------------------------------------------------------------------------- */

/* In place: much cheaper than a new file. */
static void rot_edit(struct sim_fs *fs, const struct rot_change *change)
{
    const struct kvmeta_vfs *vfs = &fs->vfs;
    int dir, file;

    rot_must(vfs->dir_open(fs, SIM_DIR, &dir) == 0, "dir_open");
    rot_must(vfs->file_open(fs, dir, change->name, KVMETA_VFS_WRITE,
                            &file) == 0, "file_open");
    rot_must(vfs->file_write(fs, file, change->data, (size_t)change->bytes,
                             change->off) == (int64_t)change->bytes,
             "file_write");
    rot_must(vfs->file_sync(fs, file) == 0, "file_sync");
    vfs->file_close(fs, file);
    vfs->dir_close(fs, dir);
}

/* *fs: a copy of the fixture's with the fault. */
static void rot_bring_about(const struct rot_fixture *f,
                            const struct rot_fault *fault, struct sim_fs *fs)
{
    const struct rot_change *change;
    unsigned i;

    sim_clone(fs, &f->fs);
    for (i = 0; i < fault->count; i++) {
        change = &fault->changes[i];
        if (change->whole) {
            sim_file_put(fs, change->name, change->data, change->bytes);
        } else {
            rot_edit(fs, change);
        }
    }
    rot_limit_disk(fs, 0);
}

/* --------------------------------------------------------------------------
 * Judging
 * -------------------------------------------------------------------------- */

static enum rot_verdict rot_silent(struct rot_judge *judge, const char *why)
{
    snprintf(judge->why, sizeof judge->why, "%s", why);
    return ROT_SILENT;
}

/* Does the text name a file of ours? */
static int rot_names_file(const char *message)
{
    const char *dot = strchr(message, '.');

    if (strstr(message, "MANIFEST") != NULL ||
        strstr(message, "LOCK") != NULL) {
        return 1;
    }
    return dot != NULL && dot - message >= 17 &&
           (strncmp(dot, ".wal: ", 6) == 0 || strncmp(dot, ".tab: ", 6) == 0);
}

/* Nothing may have been changed. The file system counts the calls that change
 * something; it is compared byte for byte when it counted one, and now and
 * then in any case. */
static int rot_unchanged(struct rot_judge *judge,
                         const struct rot_fault *fault,
                         const struct sim_fs *fs, uint64_t ops)
{
    static struct sim_fs fresh;
    uint64_t want;

    if (fs->ops == ops && judge->index % 64 != 0) {
        return 1;
    }
    judge->found->hashed++;
    rot_bring_about(judge->f, fault, &fresh);
    want = sim_hash(&fresh);
    sim_free(&fresh);
    return sim_hash(fs) == want;
}

static enum rot_verdict rot_judge_error(struct rot_judge *judge, int rc,
                                        const struct rot_fault *fault,
                                        const struct sim_fs *fs, uint64_t ops)
{
    if (rc != KVMETA_E_CORRUPT && rc != KVMETA_E_MISMATCH &&
        rc != KVMETA_E_VERSION) {
        return rot_silent(judge, "not an error for damage");
    }
    if (judge->err.code != rc || !rot_names_file(judge->err.message)) {
        return rot_silent(judge, "the error names no file");
    }
    if (!rot_unchanged(judge, fault, fs, ops)) {
        return rot_silent(judge, "the directory was changed");
    }
    if (judge->alarming) {
        snprintf(judge->why, sizeof judge->why, "a false alarm");
        return ROT_ALARM;
    }
    return ROT_DETECTED;
}

/* Which state this is; -1: none of those that may be. States that an open
 * without damage does not find may only come out of an earlier live log. */
static int rot_find_state(const struct rot_judge *judge,
                          const struct rot_fault *fault, kvmeta *db)
{
    const struct rot_fixture *f = judge->f;
    unsigned i = fault->class == ROT_STALE && fault->hits_live ? f->issued
                                                               : f->base;

    if (test_oracle_check(&f->states[f->base], db) == NULL) {
        return (int)f->base;
    }
    for (i++; i > judge->lowest; i--) {
        if (test_oracle_check(&f->states[i - 1], db) == NULL) {
            return (int)i - 1;
        }
    }
    return -1;
}

static void rot_count_open(struct rot_judge *judge,
                           const struct kvmeta_stats *stats)
{
    judge->found->torn[stats->open_torn_reason]++;
    judge->found->healed += stats->open_healed;
    judge->found->garbage_files += stats->open_garbage_files;
}

/* An open that succeeded. *state: what it holds. */
static enum rot_verdict rot_judge_content(struct rot_judge *judge,
                                          const struct rot_fault *fault,
                                          kvmeta *db, int *state)
{
    const struct rot_fixture *f = judge->f;
    struct kvmeta_stats stats;

    stats.struct_size = sizeof stats;
    if (kvmeta_stats(db, &stats) != 0) {
        return rot_silent(judge, "kvmeta_stats fails");
    }
    rot_count_open(judge, &stats);
    *state = rot_find_state(judge, fault, db);
    if (*state < 0) {
        return rot_silent(judge, "opened with other records");
    }
    if ((unsigned)*state >= f->acked) {
        return ROT_HARMLESS;
    }
    if (fault->class == ROT_FLIP && stats.open_torn_bytes == 0) {
        return rot_silent(judge, "dropped and not reported");
    }
    return ROT_RESIDUAL;
}

static int rot_leaks(struct rot_judge *judge, const struct sim_fs *fs,
                     const struct test_alloc *alloc)
{
    if (atomic_load(&alloc->live_blocks) != 0 || rot_contexts_live != 0) {
        rot_silent(judge, "memory is lost");
    } else if (sim_open_handles(fs) != 0) {
        rot_silent(judge, "files are left open");
    } else if (fs->misuses != 0) {
        rot_silent(judge, "a file was used after its close");
    } else {
        return 0;
    }
    return 1;
}

/* After the fault was taken as harmless: the store is whole from now on. */
static int rot_goes_on(struct rot_judge *judge, struct sim_fs *fs,
                       const struct kvmeta_options *options, int state)
{
    const struct test_oracle *want = &judge->f->states[state];
    struct kvmeta_stats stats;
    unsigned char key[256];
    kvmeta *db = NULL;
    int rc;

    judge->found->second_opens++;
    if (kvmeta_open(SIM_DIR, options, &db, &judge->err) != 0) {
        return 0;
    }
    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    rc = kvmeta_stats(db, &stats);
    if (stats.open_healed != 0 || stats.open_torn_bytes != 0 ||
        stats.open_garbage_files != 0 || test_oracle_check(want, db) != NULL) {
        rc = 1;
    }
    rc = rc != 0 ? rc : kvmeta_verify(db, &judge->err);
    memset(key, 0x5a, sizeof key);
    kvmeta_remove(db, key, KVMETA_WRITTEN);
    rc = rc != 0 ? rc : kvmeta_flush(db);
    return kvmeta_close(db) == 0 && rc == 0 && sim_open_handles(fs) == 0;
}

/* A read-only open must say the same, and never change anything. */
static enum rot_verdict rot_judge_read_only(struct rot_judge *judge,
                                            const struct rot_fault *fault,
                                            struct sim_fs *fs,
                                            struct kvmeta_options options,
                                            struct test_alloc *alloc)
{
    uint64_t ops = fs->ops;
    enum rot_verdict verdict;
    kvmeta *db = NULL;
    int state, rc;

    judge->found->read_only++;
    options.flags |= KVMETA_READ_ONLY;
    rc = kvmeta_open(SIM_DIR, &options, &db, &judge->err);
    if (rc != 0) {
        /* Nothing at all is a store that is not there. */
        verdict = rc == KVMETA_NOT_FOUND && fault->class == ROT_DELETE
            ? ROT_HARMLESS : rot_judge_error(judge, rc, fault, fs, ops);
    } else {
        verdict = rot_judge_content(judge, fault, db, &state);
        if (kvmeta_close(db) != 0) {
            return rot_silent(judge, "a read-only close fails");
        }
    }
    if (!rot_unchanged(judge, fault, fs, ops)) {
        return rot_silent(judge, "a read-only open changed something");
    }
    return rot_leaks(judge, fs, alloc) ? ROT_SILENT : verdict;
}

static enum rot_verdict rot_judge_writing(struct rot_judge *judge,
                                          const struct rot_fault *fault,
                                          struct sim_fs *fs,
                                          const struct kvmeta_options *options,
                                          struct test_alloc *alloc)
{
    int large = fault->class != ROT_FLIP && fault->class != ROT_BYTE;
    uint64_t ops = fs->ops;
    enum rot_verdict verdict;
    kvmeta *db = NULL;
    int state = -1, rc;

    judge->found->opens++;
    rc = kvmeta_open(SIM_DIR, options, &db, &judge->err);
    if (rc != 0) {
        verdict = rot_judge_error(judge, rc, fault, fs, ops);
    } else {
        verdict = rot_judge_content(judge, fault, db, &state);
        rc = kvmeta_close(db);
        if (rc != 0 && verdict != ROT_SILENT) {
            return rot_silent(judge, "a close fails");
        }
    }
    if (rot_leaks(judge, fs, alloc)) {
        return ROT_SILENT;
    }
    if (state >= 0 && judge->index % (large ? 8 : 64) == 0 &&
        !rot_goes_on(judge, fs, options, state)) {
        return rot_silent(judge, "not whole afterwards");
    }
    return verdict;
}

/* The verdict on one fault, which must differ from what is there. */
static enum rot_verdict rot_judge_fault(struct rot_judge *judge,
                                        const struct rot_fault *fault)
{
    static struct sim_fs fs;
    enum rot_verdict verdict, other;
    struct kvmeta_options options;
    struct test_alloc alloc;

    memset(&alloc, 0, sizeof alloc);
    judge->why[0] = '\0';
    judge->lowest = rot_lowest(judge->f, fault);
    judge->alarming = rot_alarming(judge->f, fault);
    rot_bring_about(judge->f, fault, &fs);
    rot_options(&options, judge->f, &fs, &alloc);
    if (judge->index % 16 == 0) {
        other = rot_judge_read_only(judge, fault, &fs, options, &alloc);
        verdict = other == ROT_SILENT ? other
            : rot_judge_writing(judge, fault, &fs, &options, &alloc);
        if (other != verdict && verdict != ROT_SILENT) {
            verdict = rot_silent(judge, "a read-only open says otherwise");
        }
    } else {
        verdict = rot_judge_writing(judge, fault, &fs, &options, &alloc);
    }
    sim_free(&fs);
    return verdict;
}

#endif /* KVMETA_TEST_ROT_JUDGE_H */
