/*
 * Puts the checksums of hostile files right, so that they are read past their
 * sums; and changes files in ways that know their fields.
 *
 * Everything works on bytes in memory and expects anything in them: what
 * makes no sense is left as it is. `level` says how far a repair goes:
 *
 *   0   nothing
 *   1   sums only
 *   2   also what else a reader compares first: offsets, the chain of frames,
 *       commit numbers, sizes and counts
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_FUZZ_FIX_H
#define KVMETA_FUZZ_FIX_H

#include "fuzz.h"

enum { FIX_NOTHING, FIX_SUMS, FIX_ALL };

/* How far a target repairs its own input. */
#ifdef FUZZ_REPAIR
enum { FIX_INPUT = FIX_ALL };
#else
enum { FIX_INPUT = FIX_NOTHING };
#endif

/* An environment for the codecs: the sums of a file start from its uuid. */
static inline struct kv_env fix_env(const uint8_t *uuid)
{
    struct kv_env env = {.dir = -1};

    kv_crc_init(&env.crc, true);
    memcpy(env.uuid, uuid, KV_UUID_BYTES);
    return env;
}

/* --------------------------------------------------------------------------
 * Logs
 * -------------------------------------------------------------------------- */

/* Where the chain of frames ends, for the manifest. */
struct fix_log_end {
    uint64_t bytes;
    uint32_t last_hcrc;
    uint64_t last_frame;          /* offset; 0: there is no frame */
};

/* The end of the frame at pos, or 0 when it does not fit. */
static inline uint64_t fix_frame_end(const struct kv_log_head *head,
                                     const uint8_t *data, uint64_t bytes,
                                     uint64_t pos)
{
    uint32_t magic;
    uint64_t entries;
    uint64_t end;

    if (pos + KV_FRAME_BYTES > bytes) return 0;
    magic = kv_load_le32(data + pos);
    entries = kv_load_le32(data + pos + 4);
    if (magic != KV_FRAME_SYNCED && magic != KV_FRAME_PLAIN) return 0;
    if (entries > bytes) return 0;
    end = pos + KV_FRAME_BYTES + entries * head->slot_bytes;
    if (magic == KV_FRAME_SYNCED) end = kv_align_up(end, head->align);
    return end <= bytes ? end : 0;
}

/* One frame; returns its end, or 0. */
static inline uint64_t fix_frame(const struct kv_env *env,
                                 const struct kv_log_head *head, uint8_t *data,
                                 uint64_t bytes, uint64_t pos, int level,
                                 uint64_t seq, struct fix_log_end *at)
{
    uint64_t end = fix_frame_end(head, data, bytes, pos);
    uint8_t *frame = data + pos;

    if (end == 0) return 0;
    if (level >= FIX_ALL) {
        kv_store_le64(frame + 8, pos);
        kv_store_le64(frame + 16, seq);
        kv_store_le32(frame + 48, at->last_hcrc);
    }
    kv_store_le32(frame + 56,
                  kv_crc_add(&env->crc, head->seed, frame + KV_FRAME_BYTES,
                             (size_t)(end - pos - KV_FRAME_BYTES)));
    at->last_hcrc = kv_crc_add(&env->crc, head->seed, frame,
                               KV_FRAME_BYTES - 4);
    kv_store_le32(frame + 60, at->last_hcrc);
    at->bytes = end;
    at->last_frame = pos;
    return end;
}

/* What the header says that the repair needs; false: it makes no sense. */
static inline bool fix_log_head(const struct kv_env *env, const uint8_t *data,
                                size_t bytes, struct kv_log_head *head)
{
    memset(head, 0, sizeof *head);
    if (bytes < KV_LOG_HEADER_BYTES) return false;
    head->align = kv_load_le32(data + 12);
    head->id = kv_load_le64(data + 32);
    memcpy(head->salt, data + 40, KV_SALT_BYTES);
    head->slot_bytes = kv_load_le32(data + 64) & ~7u;
    if (head->align < 8 || head->align > 65536
        || (head->align & (head->align - 1)) != 0
        || kv_log_first(head->align) > bytes)
        return false;
    if (head->slot_bytes < 16 || head->slot_bytes > 1 << 17) return false;
    head->seed = kv_crc_file_seed(env, KV_FILE_LOG, head->id, head->salt);
    return true;
}

static inline struct fix_log_end fix_log(uint8_t *data, size_t bytes,
                                         int level)
{
    struct fix_log_end at = {0, 0, 0};
    struct kv_log_head head;
    struct kv_env env;
    uint64_t seq;
    uint64_t pos;

    if (bytes < KV_LOG_HEADER_BYTES || level == FIX_NOTHING) return at;
    env = fix_env(data + 16);
    if (!fix_log_head(&env, data, bytes, &head)) return at;
    pos = kv_log_first(head.align);
    head.crc = kv_log_head_crc(&env, head.seed, data, (size_t)pos);
    kv_store_le32(data + 124, head.crc);
    at.last_hcrc = head.crc;
    at.bytes = pos;
    seq = kv_load_le64(data + 72);
    while (pos != 0 && pos < bytes) {
        uint64_t next = fix_frame(&env, &head, data, bytes, pos, level, seq,
                                  &at);

        if (next) seq += kv_load_le32(data + pos + 52);
        pos = next;
    }
    return at;
}

/* --------------------------------------------------------------------------
 * Tables
 * -------------------------------------------------------------------------- */

/* Where the parts of a table are; false: it makes no sense. */
struct fix_table_parts {
    struct kv_env env;
    uint32_t seed;
    size_t index_off;
    size_t entry_bytes;
    size_t blocks;
    uint8_t *footer;
};

static inline bool fix_table_parts(uint8_t *data, size_t bytes,
                                   struct fix_table_parts *p)
{
    uint32_t key_bytes, value_bytes;
    uint64_t index_off;

    if (bytes < KV_TABLE_HEADER_BYTES + KV_TABLE_FOOTER_BYTES) return false;
    p->env = fix_env(data + 24);
    fuzz_widths(data + 12, data + 16, &key_bytes, &value_bytes);
    kv_shape_init(&p->env.shape, key_bytes, value_bytes);
    p->seed = kv_crc_file_seed(&p->env, KV_FILE_TABLE,
                               kv_load_le64(data + 40), data + 48);
    p->footer = data + bytes - KV_TABLE_FOOTER_BYTES;
    index_off = kv_load_le64(p->footer + 48);
    if (index_off < KV_TABLE_HEADER_BYTES
        || index_off > bytes - KV_TABLE_FOOTER_BYTES)
        return false;
    p->index_off = (size_t)index_off;
    p->entry_bytes = kv_table_entry_bytes(&p->env.shape);
    p->blocks = (bytes - KV_TABLE_FOOTER_BYTES - p->index_off)
        / p->entry_bytes;
    return true;
}

/* Adds the records of a block to *sum; false: it cannot be decoded. */
static inline bool fix_table_sum_block(const struct fix_table_parts *p,
                                       const struct kv_block *block,
                                       const uint8_t *stored,
                                       struct kvmeta_digest *sum)
{
    unsigned char *raw = malloc(2 * KV_BLOCK_RAW_MAX + 2);
    ZSTD_DCtx *zstd = ZSTD_createDCtx();
    struct kv_block_view view;
    bool decoded = raw && zstd
        && !kv_block_decode(&p->env, zstd, p->seed, block, stored, raw,
                            raw + KV_BLOCK_RAW_MAX + 1, &view);

    if (decoded) kv_block_sum(&p->env.shape, &view, sum);
    ZSTD_freeDCtx(zstd);
    free(raw);
    return decoded;
}

/* The index and the sums of the blocks. */
static inline void fix_table_index(struct fix_table_parts *p, uint8_t *data,
                                   int level)
{
    struct kvmeta_digest sum = {0, 0};
    uint64_t off = KV_TABLE_HEADER_BYTES;
    uint64_t records = 0, tombstones = 0;
    bool all = true;

    for (size_t i = 0; i < p->blocks; i++) {
        uint8_t *entry = data + p->index_off + i * p->entry_bytes;
        struct kv_block b;

        if (level >= FIX_ALL) kv_store_le64(entry, off);
        b = kv_table_entry_decode(entry);
        off = b.off + b.stored_bytes;
        records += b.records;
        tombstones += b.tombstones;
        if (b.off > p->index_off || b.stored_bytes > p->index_off - b.off) {
            all = false;
            continue;
        }
        b.crc = kv_crc_add(&p->env.crc, p->seed, data + b.off,
                           b.stored_bytes);
        kv_store_le32(entry + 20, b.crc);
        all = all && !kv_table_check_block(&p->env.shape, &b, b.off)
            && fix_table_sum_block(p, &b, data + b.off, &sum);
    }
    if (level < FIX_ALL) return;
    kv_store_le64(p->footer + 16, records);
    kv_store_le64(p->footer + 24, tombstones);
    kv_store_le64(p->footer + 32, p->blocks);
    if (!all) return;
    kv_store_le64(p->footer + 56, sum.lo);
    kv_store_le64(p->footer + 64, sum.hi);
}

static inline void fix_table(uint8_t *data, size_t bytes, int level)
{
    struct fix_table_parts p;

    if (level == FIX_NOTHING || !fix_table_parts(data, bytes, &p)) return;
    kv_store_le32(data + 68, kv_crc_add(&p.env.crc, p.seed, data, 68));
    fix_table_index(&p, data, level);
    if (level >= FIX_ALL) {
        kv_store_le64(p.footer + 8, kv_load_le64(data + 40));
        kv_store_le64(p.footer + 40, bytes);
    }
    kv_store_le32(p.footer + 88,
                  kv_crc_add(&p.env.crc, p.seed, data + p.index_off,
                             bytes - KV_TABLE_FOOTER_BYTES - p.index_off));
    kv_store_le32(p.footer + 92, kv_crc_add(&p.env.crc, p.seed, p.footer, 92));
}

/* --------------------------------------------------------------------------
 * Manifests and marks
 * -------------------------------------------------------------------------- */

/* The length of the image at `image` by its counts, or 0. */
static inline size_t fix_manifest_bytes(const uint8_t *image, size_t room)
{
    uint64_t tables, logs;
    size_t bytes;

    if (room < kv_manifest_image_bytes(0, 0)) return 0;
    tables = kv_load_le32(image + 80);
    logs = kv_load_le32(image + 84);
    if (tables > room || logs > room) return 0;
    bytes = kv_manifest_image_bytes((size_t)tables, (size_t)logs);
    return bytes <= room ? bytes : 0;
}

static inline void fix_manifest_image(uint8_t *image, size_t bytes)
{
    struct kv_env env = fix_env(image + 16);
    uint32_t seed = kv_crc_file_seed(&env, KV_FILE_MANIFEST, 0, kv_no_salt);

    kv_store_le32(image + bytes - 4,
                  kv_crc_add(&env.crc, seed, image, bytes - 4));
}

/* Both copies; at level 2 the second becomes what the first is. Returns the
 * length of the first image, 0 when there is none. */
static inline size_t fix_manifest(uint8_t *data, size_t bytes, int level)
{
    size_t first = 0;

    if (level == FIX_NOTHING) return 0;
    for (size_t at = 0; at < bytes; at += KV_MANIFEST_STRIDE) {
        size_t n = level >= FIX_ALL
            ? fix_manifest_bytes(data + at, bytes - at) : 0;

        /* Images longer than the stride overlap. */
        if (at > 0 && first > 0 && n == first) memmove(data + at, data, first);
        if (n == 0 && bytes - at >= 16) n = kv_load_le32(data + at + 12);
        if (n < kv_manifest_image_bytes(0, 0) || n > bytes - at) continue;
        if (level >= FIX_ALL) kv_store_le32(data + at + 12, (uint32_t)n);
        fix_manifest_image(data + at, n);
        if (at == 0) first = n;
    }
    return first;
}

static inline void fix_marks(uint8_t *data, size_t bytes, int level)
{
    for (unsigned i = 0; i < 2 && level != FIX_NOTHING; i++) {
        uint8_t *slot = data + (size_t)i * KV_MARK_STRIDE;
        struct kv_env env;
        uint32_t seed;

        if (bytes < (size_t)i * KV_MARK_STRIDE + KV_MARK_BYTES) return;
        env = fix_env(slot + 8);
        seed = kv_crc_file_seed(&env, KV_FILE_LOCK, 0, kv_no_salt);
        kv_store_le32(slot + 60, kv_crc_add(&env.crc, seed, slot,
                                            KV_MARK_BYTES - 4));
    }
}

/* --------------------------------------------------------------------------
 * Mutations that know fields
 * -------------------------------------------------------------------------- */

/* A number such as breaks things. */
static inline uint64_t fix_number(struct test_rng *rng, uint64_t old)
{
    uint64_t r = test_rng_u64(rng);

    switch (r >> 60) {
    case 0: case 1: return old + 1;
    case 2: case 3: return old - 1;
    case 4: return 0;
    case 5: return UINT64_MAX - (r & 7);
    case 6: return UINT32_MAX - (r & 7);
    case 7: return (uint64_t)1 << (r & 63);
    case 8: return r & 0xff;
    case 9: return r & 0xffff;
    case 10: return old ^ (uint64_t)1 << (r & 63);
    case 11: return old * 2;
    case 12: return old + 8;
    case 13: return old - 8;
    case 14: return old + (r & 0xfff);
    default: return r;
    }
}

struct fix_field {
    uint16_t off;
    uint16_t bytes;               /* 4 or 8 */
};

/* Changes one of the fields behind `base`, if it is there. */
static inline void fix_change_field(struct test_rng *rng, uint8_t *data,
                                    size_t bytes, size_t base,
                                    const struct fix_field *fields, size_t n)
{
    const struct fix_field *f = &fields[test_rng_below(rng, n)];
    uint8_t *p;

    if (base > bytes || (size_t)f->off + f->bytes > bytes - base) return;
    p = data + base + f->off;
    if (f->bytes == 4)
        kv_store_le32(p, (uint32_t)fix_number(rng, kv_load_le32(p)));
    else
        kv_store_le64(p, fix_number(rng, kv_load_le64(p)));
}

#define FIX_CHANGE(rng, data, bytes, base, fields) \
    fix_change_field(rng, data, bytes, base, fields, \
                     sizeof(fields) / sizeof(fields)[0])

static inline void fix_change_log(struct test_rng *rng, uint8_t *data,
                                  size_t bytes)
{
    static const struct fix_field head_fields[] = {
        {8, 4}, {12, 4}, {32, 8}, {56, 4}, {60, 4}, {64, 4}, {68, 4}, {72, 8},
        {80, 8}, {96, 8}
    };
    static const struct fix_field frame_fields[] = {
        {0, 4}, {4, 4}, {8, 8}, {16, 8}, {24, 8}, {32, 8}, {48, 4}, {52, 4},
        {64, 4}, {72, 8}
    };
    struct kv_log_head head;
    struct kv_env env;
    uint64_t pos;
    unsigned skip = (unsigned)test_rng_below(rng, 8);

    if (bytes < KV_LOG_HEADER_BYTES) return;
    env = fix_env(data + 16);
    if (!fix_log_head(&env, data, bytes, &head)
        || test_rng_below(rng, 8) == 0) {
        FIX_CHANGE(rng, data, bytes, 0, head_fields);
        return;
    }
    pos = kv_log_first(head.align);
    for (; skip > 0; skip--) {
        uint64_t end = fix_frame_end(&head, data, bytes, pos);

        if (end == 0 || end + KV_FRAME_BYTES > bytes) break;
        pos = end;
    }
    /* Sometimes an entry, which looks like the end of the frame's fields. */
    if (test_rng_below(rng, 3) == 0)
        pos += test_rng_below(rng, 4) * head.slot_bytes;
    FIX_CHANGE(rng, data, bytes, (size_t)pos, frame_fields);
}

/* Changes bytes within a block's zstd frame and compresses it again, if it
 * then fits in the place of the old one or into `max`. Returns the size. */
static inline size_t fix_change_block(struct test_rng *rng, uint8_t *data,
                                      size_t bytes, size_t max)
{
    struct fix_table_parts p;
    struct kv_block b;
    uint8_t *entry, *raw, *packed;
    size_t raw_bytes, n, tail;

    if (!fix_table_parts(data, bytes, &p) || p.blocks == 0) return bytes;
    entry = data + p.index_off
        + test_rng_below(rng, p.blocks) * p.entry_bytes;
    b = kv_table_entry_decode(entry);
    if (b.off > p.index_off || b.stored_bytes > p.index_off - b.off)
        return bytes;
    raw = malloc(KV_BLOCK_RAW_MAX);
    packed = malloc(KV_BLOCK_STORED_MAX);
    if (!raw || !packed) abort();
    raw_bytes = ZSTD_decompress(raw, KV_BLOCK_RAW_MAX, data + b.off,
                                b.stored_bytes);
    if (!ZSTD_isError(raw_bytes) && raw_bytes > 0) {
        for (uint64_t i = 1 + test_rng_below(rng, 3); i > 0; i--)
            raw[test_rng_below(rng, raw_bytes)] ^=
                (uint8_t)test_rng_u64(rng);
        if (test_rng_below(rng, 8) == 0) raw_bytes--;
        n = ZSTD_compress(packed, KV_BLOCK_STORED_MAX, raw, raw_bytes, 1);
        tail = bytes - (size_t)b.off - b.stored_bytes;
        if (!ZSTD_isError(n) && bytes - b.stored_bytes + n <= max) {
            kv_store_le32(entry + 8, (uint32_t)n);
            kv_store_le64(p.footer + 48, p.index_off - b.stored_bytes + n);
            memmove(data + b.off + n, data + b.off + b.stored_bytes, tail);
            memcpy(data + b.off, packed, n);
            bytes = bytes - b.stored_bytes + n;
        }
    }
    free(packed);
    free(raw);
    return bytes;
}

static inline size_t fix_change_table(struct test_rng *rng, uint8_t *data,
                                      size_t bytes, size_t max)
{
    static const struct fix_field head_fields[] = {
        {8, 4}, {12, 4}, {16, 4}, {20, 4}, {40, 8}, {64, 4}
    };
    static const struct fix_field foot_fields[] = {
        {8, 8}, {16, 8}, {24, 8}, {32, 8}, {40, 8}, {48, 8}, {56, 8}, {72, 8},
        {80, 8}
    };
    static const struct fix_field entry_fields[] = {
        {0, 8}, {8, 4}, {12, 4}, {12, 4}, {16, 4}, {16, 4}, {24, 8}
    };
    struct fix_table_parts p;
    bool sane = fix_table_parts(data, bytes, &p);

    switch (test_rng_below(rng, 8)) {
    case 0:
        FIX_CHANGE(rng, data, bytes, 0, head_fields);
        break;
    case 1:
        if (!sane) break;
        FIX_CHANGE(rng, data, bytes, bytes - KV_TABLE_FOOTER_BYTES,
                   foot_fields);
        break;
    case 2: case 3: case 4:
        if (!sane || p.blocks == 0) break;
        FIX_CHANGE(rng, data, bytes,
                   p.index_off + test_rng_below(rng, p.blocks)
                       * p.entry_bytes, entry_fields);
        break;
    default:
        return fix_change_block(rng, data, bytes, max);
    }
    return bytes;
}

static inline void fix_change_manifest(struct test_rng *rng, uint8_t *data,
                                       size_t bytes)
{
    static const struct fix_field head_fields[] = {
        {8, 4}, {12, 4}, {32, 8}, {40, 8}, {48, 8}, {56, 8}, {72, 4}, {76, 4},
        {80, 4}, {84, 4}, {88, 8}
    };
    static const struct fix_field item_fields[] = {
        {0, 8}, {8, 8}, {16, 8}, {24, 8}, {24, 4}, {28, 4}, {32, 8}, {40, 8},
        {48, 4}, {52, 4}
    };
    size_t n = fix_manifest_bytes(data, bytes);
    size_t base = KV_MANIFEST_HEAD_BYTES;

    if (n == 0 || test_rng_below(rng, 3) == 0) {
        FIX_CHANGE(rng, data, bytes, 0, head_fields);
        return;
    }
    base += test_rng_below(rng, (n - base) / 8 + 1) * 8;
    FIX_CHANGE(rng, data, bytes, base & ~(size_t)7, item_fields);
}

static inline void fix_change_marks(struct test_rng *rng, uint8_t *data,
                                    size_t bytes)
{
    static const struct fix_field fields[] = {
        {0, 8}, {8, 8}, {24, 8}, {32, 8}, {40, 8}, {48, 8}, {56, 4}
    };

    FIX_CHANGE(rng, data, bytes, test_rng_below(rng, 2) * KV_MARK_STRIDE,
               fields);
}

/* How far to repair this time. */
static inline int fix_level(struct test_rng *rng)
{
    uint64_t r = test_rng_below(rng, 16);

    return r == 0 ? FIX_NOTHING : r < 5 ? FIX_SUMS : FIX_ALL;
}

/* The mutator of a target whose input is one file, which `fix` repairs.
 * change: a statement on rng, data, bytes and bytes_max. */
#ifdef FUZZ_MUTATOR
#  define FIX_MUTATOR(fix, change) \
    size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, \
                                   size_t bytes_max, unsigned seed) \
    { \
        struct test_rng rng = {seed}; \
\
        if (test_rng_below(&rng, 3) == 0) \
            bytes = LLVMFuzzerMutate(data, bytes, bytes_max); \
        else \
            change; \
        fix(data, bytes, fix_level(&rng)); \
        return bytes; \
    }
#else
#  define FIX_MUTATOR(fix, change)
#endif

#endif /* KVMETA_FUZZ_FIX_H */
