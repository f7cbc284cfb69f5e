/*
 * All faults of a fixture, in an order that depends on the fixture only, so
 * that a number names a fault.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_ROT_FAULTS_H
#define KVMETA_TEST_ROT_FAULTS_H

#include "judge.h"

#define ROT_SECTOR 512u
#define ROT_SCRATCH_BYTES (2u << 20)

/* A walk over the faults of one fixture. */
struct rot_walk {
    const struct rot_fixture *f;
    uint64_t index;                      /* faults so far, skipped ones too */
    uint64_t thin;                       /* of faults that are many and alike,
                                            one in `thin` is tried */
    struct test_rng rng;
    void (*visit)(void *user, uint64_t index, const struct rot_fault *fault);
    void *user;
};

static unsigned char rot_scratch[2][ROT_SCRATCH_BYTES];

static void rot_visit(struct rot_walk *walk, struct rot_fault *fault)
{
    rot_compare(walk->f, fault);
    if (fault->differs) {
        walk->visit(walk->user, walk->index, fault);
    }
    walk->index++;
}

/* Bytes in place. */
static void rot_visit_edit(struct rot_walk *walk, enum rot_class class,
                           const struct rot_file *file, uint64_t off,
                           const unsigned char *data, uint64_t bytes)
{
    struct rot_fault fault = {0};

    fault.class = class;
    fault.count = 1;
    fault.changes[0].name = file->name;
    fault.changes[0].data = data;
    fault.changes[0].bytes = bytes;
    fault.changes[0].off = off;
    rot_visit(walk, &fault);
}

/* A whole file; data NULL: none. */
static void rot_visit_file(struct rot_walk *walk, enum rot_class class,
                           const char *name, const unsigned char *data,
                           uint64_t bytes)
{
    struct rot_fault fault = {0};

    fault.class = class;
    fault.count = 1;
    fault.changes[0].name = name;
    fault.changes[0].data = data;
    fault.changes[0].bytes = bytes;
    fault.changes[0].whole = 1;
    rot_visit(walk, &fault);
}

/* --------------------------------------------------------------------------
 * Bits and bytes
 * -------------------------------------------------------------------------- */

/* Long runs of zeros hold nothing: most files have one, between two copies or
 * slots or ahead of the end. They are done in full by the first fixture of a
 * kind, and by the others at their ends and here and there. */
static int rot_in_gap(const struct rot_walk *walk,
                      const struct rot_file *file, uint64_t off)
{
    uint64_t from = off < 72 ? 0 : off - 72;
    uint64_t to = off + 72 < file->bytes ? off + 72 : file->bytes;

    if (walk->thin == 1 || off % walk->thin == 0) {
        return 0;
    }
    for (; from < to; from++) {
        if (file->data[from] != 0) {
            return 0;
        }
    }
    return 1;
}

static void rot_flip_bits(struct rot_walk *walk, const struct rot_file *file)
{
    unsigned char byte;
    uint64_t off;
    unsigned bit;

    for (off = 0; off < file->bytes; off++) {
        unsigned bits = rot_in_gap(walk, file, off) ? 0 : 8;

        for (bit = 0; bit < bits; bit++) {
            byte = file->data[off] ^ (unsigned char)(1u << bit);
            rot_visit_edit(walk, ROT_FLIP, file, off, &byte, 1);
        }
    }
}

/* Each byte becomes 0, and another one. */
static void rot_set_bytes(struct rot_walk *walk, const struct rot_file *file)
{
    unsigned char bytes[2] = {0, 0};
    uint64_t off;
    unsigned i;

    for (off = 0; off < file->bytes; off++) {
        unsigned count = rot_in_gap(walk, file, off) ? 0 : 2;

        bytes[1] = (unsigned char)test_rng_u64(&walk->rng);
        for (i = 0; i < count; i++) {
            rot_visit_edit(walk, ROT_BYTE, file, off, &bytes[i], 1);
        }
    }
}

/* Two bits anywhere in the file; every other pair close together. */
static void rot_flip_pairs(struct rot_walk *walk, const struct rot_file *file)
{
    struct rot_fault fault = {0};
    unsigned char bytes[2];
    uint64_t n, bits = file->bytes * 8, bit[2];
    unsigned i;

    for (n = 0; n < 256 && bits > 0; n++) {
        bit[0] = test_rng_below(&walk->rng, bits);
        bit[1] = n % 2 == 0 ? test_rng_below(&walk->rng, bits)
            : (bit[0] + 8 + test_rng_below(&walk->rng, 64)) % bits;
        memset(&fault, 0, sizeof fault);
        fault.class = ROT_PAIR;
        fault.count = bit[0] / 8 == bit[1] / 8 ? 1 : 2;
        for (i = 0; i < fault.count; i++) {
            bytes[i] = file->data[bit[i] / 8] ^
                       (unsigned char)(1u << bit[i] % 8);
            fault.changes[i].name = file->name;
            fault.changes[i].data = &bytes[i];
            fault.changes[i].bytes = 1;
            fault.changes[i].off = bit[i] / 8;
        }
        rot_visit(walk, &fault);
    }
}

/* Runs of 2 to 64 bytes that are random, or all the same. */
static void rot_burst_bytes(struct rot_walk *walk,
                            const struct rot_file *file)
{
    uint64_t n, off, bytes;

    for (n = 0; n < 512 && file->bytes > 64; n++) {
        bytes = 2 + test_rng_below(&walk->rng, 63);
        off = test_rng_below(&walk->rng, file->bytes - bytes);
        test_rng_bytes(&walk->rng, rot_scratch[0], (size_t)bytes);
        if (n % 3 == 0) {
            memset(rot_scratch[0], rot_scratch[0][0], (size_t)bytes);
        }
        rot_visit_edit(walk, ROT_BURST, file, off, rot_scratch[0], bytes);
    }
}

/* --------------------------------------------------------------------------
 * Lengths
 * -------------------------------------------------------------------------- */

static void rot_truncate(struct rot_walk *walk, const struct rot_file *file)
{
    uint64_t bytes;

    for (bytes = 0; bytes < file->bytes; bytes++) {
        if (!rot_in_gap(walk, file, bytes)) {
            rot_visit_file(walk, ROT_TRUNCATE, file->name, file->data, bytes);
        }
    }
}

/* What stands behind the end: zeros, garbage, the file's own front, a twin's
 * file of the same name. */
static void rot_extend_with(struct rot_walk *walk,
                            const struct rot_file *file, unsigned kind,
                            uint64_t more)
{
    const struct rot_file *twin = rot_files_find(&walk->f->twin, file->name);
    unsigned char *tail = rot_scratch[0] + file->bytes;

    memcpy(rot_scratch[0], file->data, (size_t)file->bytes);
    memset(tail, 0, (size_t)more);
    if (kind == 1) {
        test_rng_bytes(&walk->rng, tail, (size_t)more);
    } else if (kind == 2) {
        memcpy(tail, file->data,
               (size_t)(more < file->bytes ? more : file->bytes));
    } else if (kind == 3 && twin != NULL) {
        memcpy(tail, twin->data,
               (size_t)(more < twin->bytes ? more : twin->bytes));
    }
    rot_visit_file(walk, ROT_EXTEND, file->name, rot_scratch[0],
                   file->bytes + more);
}

static void rot_extend(struct rot_walk *walk, const struct rot_file *file)
{
    static const uint64_t lengths[] = {1, 7, 8, 63, 64, 511, 512, 513, 4096,
                                       8192};
    unsigned kind;
    size_t i;

    if (file->bytes + 8192 > ROT_SCRATCH_BYTES) {
        return;
    }
    for (i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        for (kind = 0; kind < 4; kind++) {
            rot_extend_with(walk, file, kind, lengths[i]);
        }
    }
}

/* --------------------------------------------------------------------------
 * Sectors
 * -------------------------------------------------------------------------- */

/* The part of a sector that the file has. */
static uint64_t rot_sector_bytes(const struct rot_file *file, uint64_t off)
{
    return file->bytes - off < ROT_SECTOR ? file->bytes - off : ROT_SECTOR;
}

static void rot_zero_sectors(struct rot_walk *walk,
                             const struct rot_file *file)
{
    uint64_t off;

    memset(rot_scratch[0], 0, ROT_SECTOR);
    for (off = 0; off < file->bytes; off += ROT_SECTOR) {
        rot_visit_edit(walk, ROT_ZERO, file, off, rot_scratch[0],
                       rot_sector_bytes(file, off));
    }
}

/* Random bytes, all ones, and a sector moved by some bytes. */
static void rot_garble_sectors(struct rot_walk *walk,
                               const struct rot_file *file)
{
    uint64_t off, bytes, by;
    unsigned i;

    for (off = 0; off < file->bytes; off += ROT_SECTOR) {
        bytes = rot_sector_bytes(file, off);
        for (i = 0; i < 12; i++) {
            by = test_rng_below(&walk->rng, bytes);
            test_rng_bytes(&walk->rng, rot_scratch[0], ROT_SECTOR);
            if (i == 0) {
                memset(rot_scratch[0], 0xff, ROT_SECTOR);
            } else if (i % 2 == 0) {
                memcpy(rot_scratch[0], file->data + off + by,
                       (size_t)(bytes - by));
            }
            rot_visit_edit(walk, ROT_GARBAGE, file, off, rot_scratch[0],
                           bytes);
        }
    }
}

/* Each sector of `from` over each of `to`; where one of them is short, as
 * much as there is. */
static void rot_copy_sectors(struct rot_walk *walk, enum rot_class class,
                             const struct rot_file *from,
                             const struct rot_file *to, uint64_t step)
{
    uint64_t source, off, bytes;

    for (off = 0; off < to->bytes; off += ROT_SECTOR) {
        for (source = 0; source < from->bytes; source += step) {
            bytes = rot_sector_bytes(from, source);
            if (bytes > rot_sector_bytes(to, off)) {
                bytes = rot_sector_bytes(to, off);
            }
            rot_visit_edit(walk, class, to, off, from->data + source, bytes);
        }
    }
}

static void rot_copy_all_sectors(struct rot_walk *walk,
                                 const struct rot_file *to)
{
    const struct rot_files *files = &walk->f->files;
    unsigned i;

    for (i = 0; i < files->count; i++) {
        rot_copy_sectors(walk, ROT_COPY, &files->list[i], to, ROT_SECTOR);
    }
}

/* --------------------------------------------------------------------------
 * Whole files
 * -------------------------------------------------------------------------- */

/* What the file once was, whole, and sector by sector. */
static void rot_put_back(struct rot_walk *walk, const struct rot_file *file)
{
    const struct rot_files *past = &walk->f->past;
    const struct rot_file *old;
    uint64_t off;
    unsigned i;

    for (i = 0; i < past->count; i++) {
        old = &past->list[i];
        if (strcmp(old->name, file->name) != 0) {
            continue;
        }
        rot_visit_file(walk, ROT_STALE, file->name, old->data, old->bytes);
        for (off = 0; off < file->bytes && off < old->bytes;
             off += ROT_SECTOR) {
            uint64_t bytes = rot_sector_bytes(old, off);

            if (bytes > rot_sector_bytes(file, off)) {
                bytes = rot_sector_bytes(file, off);
            }
            rot_visit_edit(walk, ROT_STALE, file, off, old->data + off,
                           bytes);
        }
    }
}

/* An earlier manifest, and a file that it does not know yet is missing, as
 * after a copy of some files back from somewhere else: nothing but the marks
 * tells. */
static void rot_put_back_manifest(struct rot_walk *walk)
{
    const struct rot_files *past = &walk->f->past;
    const struct rot_files *files = &walk->f->files;
    struct rot_fault fault = {0};
    unsigned i, k;

    fault.class = ROT_STALE;
    fault.count = 2;
    fault.changes[0].name = "MANIFEST";
    fault.changes[0].whole = 1;
    fault.changes[1].whole = 1;
    for (i = 0; i < past->count; i++) {
        for (k = 0; k < files->count &&
                    strcmp(past->list[i].name, "MANIFEST") == 0; k++) {
            if (strlen(files->list[k].name) == 21) {
                fault.changes[0].data = past->list[i].data;
                fault.changes[0].bytes = past->list[i].bytes;
                fault.changes[1].name = files->list[k].name;
                rot_visit(walk, &fault);
            }
        }
    }
}

static void rot_swap_with(struct rot_walk *walk, const struct rot_file *a,
                          const struct rot_file *b)
{
    struct rot_fault fault = {0};

    fault.class = ROT_SWAP;
    fault.count = 2;
    fault.changes[0].name = a->name;
    fault.changes[0].data = b->data;
    fault.changes[0].bytes = b->bytes;
    fault.changes[0].whole = 1;
    fault.changes[1].name = b->name;
    fault.changes[1].data = a->data;
    fault.changes[1].bytes = a->bytes;
    fault.changes[1].whole = 1;
    rot_visit(walk, &fault);
    fault.count = 1;                     /* and one copied over the other */
    rot_visit(walk, &fault);
    fault.changes[0] = fault.changes[1];
    rot_visit(walk, &fault);
}

/* Missing: this file, or this one and another. An empty store without marks
 * and manifest is no store at all, which holds the same. */
static void rot_delete(struct rot_walk *walk, unsigned which)
{
    const struct rot_files *files = &walk->f->files;
    struct rot_fault fault = {0};
    unsigned i;

    fault.class = ROT_DELETE;
    fault.changes[0].name = files->list[which].name;
    fault.changes[0].whole = 1;
    fault.count = 1;
    rot_visit(walk, &fault);
    fault.count = 2;
    for (i = which + 1; i < files->count; i++) {
        fault.changes[1].name = files->list[i].name;
        fault.changes[1].whole = 1;
        rot_visit(walk, &fault);
    }
}

/* Files that have been deleted come back, under their own names and, with
 * those that are there, under names that have not been used yet. */
static void rot_resurrect(struct rot_walk *walk)
{
    static const char *const names[] = {
        "w00000000000000ff.wal", "t00000000000000ff.tab",
        "w0000000000000000.wal", "t0000000000000000.tab", "MANIFEST.tmp"
    };
    const struct rot_files *past = &walk->f->past;
    unsigned i;
    size_t k;

    for (i = 0; i < past->count; i++) {
        if (rot_files_find(&walk->f->files, past->list[i].name) == NULL) {
            rot_visit_file(walk, ROT_RESURRECT, past->list[i].name,
                           past->list[i].data, past->list[i].bytes);
        }
        for (k = 0; k < sizeof names / sizeof names[0] && i % 4 == 0; k++) {
            rot_visit_file(walk, ROT_RESURRECT, names[k], past->list[i].data,
                           past->list[i].bytes);
        }
    }
}

/* Files and sectors of another store. */
static void rot_bring_foreign(struct rot_walk *walk)
{
    const struct rot_files *twin = &walk->f->twin;
    const struct rot_files *files = &walk->f->files;
    unsigned i, k;

    for (i = 0; i < twin->count; i++) {
        const struct rot_file *file = &twin->list[i];

        rot_visit_file(walk, ROT_FOREIGN, file->name, file->data,
                       file->bytes);
        rot_visit_file(walk, ROT_FOREIGN, file->name[0] == 'w'
                       ? "w00000000000000fe.wal" : "t00000000000000fe.tab",
                       file->data, file->bytes);
        for (k = 0; k < files->count; k++) {
            rot_visit_file(walk, ROT_FOREIGN, files->list[k].name,
                           file->data, file->bytes);
            if (strcmp(file->name, files->list[k].name) == 0) {
                rot_copy_sectors(walk, ROT_FOREIGN, file, &files->list[k],
                                 ROT_SECTOR);
            }
        }
    }
}

/* --------------------------------------------------------------------------
 * All of them
 * -------------------------------------------------------------------------- */

static void rot_walk_file(struct rot_walk *walk, unsigned which)
{
    const struct rot_file *file = &walk->f->files.list[which];
    unsigned i;

    rot_flip_bits(walk, file);
    rot_set_bytes(walk, file);
    rot_flip_pairs(walk, file);
    rot_burst_bytes(walk, file);
    rot_truncate(walk, file);
    rot_zero_sectors(walk, file);
    rot_put_back(walk, file);
    rot_extend(walk, file);
    rot_delete(walk, which);
    if (file->bytes <= ROT_VERSION_BYTES_MAX) {
        rot_garble_sectors(walk, file);
        rot_copy_all_sectors(walk, file);
    }
    for (i = which + 1; i < walk->f->files.count; i++) {
        rot_swap_with(walk, file, &walk->f->files.list[i]);
    }
}

/* Visits all faults of f that change something. */
static void rot_walk_all(const struct rot_fixture *f, uint64_t thin,
                         void (*visit)(void *user, uint64_t index,
                                       const struct rot_fault *fault),
                         void *user)
{
    struct rot_walk walk = {0};
    unsigned i;

    walk.f = f;
    walk.thin = thin;
    walk.rng.state = f->seed + 1;
    walk.visit = visit;
    walk.user = user;
    for (i = 0; i < f->files.count; i++) {
        rot_walk_file(&walk, i);
    }
    rot_put_back_manifest(&walk);
    rot_resurrect(&walk);
    rot_bring_foreign(&walk);
}

#endif /* KVMETA_TEST_ROT_FAULTS_H */
