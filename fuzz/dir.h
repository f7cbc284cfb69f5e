/*
 * Inputs of the target "dir": a whole directory in a few bytes.
 *
 *   OFFSET SIZE  head                 OFFSET SIZE  each file, one after another
 *        0    1  key_bytes                 0    1  kind (enum kv_file_kind; any
 *        1    2  value_bytes                        other: a stranger's file)
 *        3    1  bit 0: read only          1    8  id
 *                                          9    4  bytes
 *                                         13   ..  the content
 *
 * A file that is longer than what is left ends there. Two of one name: the
 * later one counts.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_FUZZ_DIR_H
#define KVMETA_FUZZ_DIR_H

#include "fix.h"

enum {
    DIR_HEAD_BYTES = 4,
    DIR_FILE_BYTES = 13,
    DIR_FILES_MAX = 40
};

/* A directory that is being put together. */
struct dir_image {
    uint8_t *bytes;
    size_t used;
};

static inline void dir_image_init(struct dir_image *image, uint32_t key_bytes,
                                  uint32_t value_bytes)
{
    image->used = DIR_HEAD_BYTES;
    image->bytes = calloc(1, image->used);
    if (!image->bytes) abort();
    image->bytes[0] = (uint8_t)key_bytes;
    image->bytes[1] = (uint8_t)value_bytes;
    image->bytes[2] = (uint8_t)(value_bytes >> 8);
}

static inline void dir_image_add(struct dir_image *image, uint8_t kind,
                                 uint64_t id, const uint8_t *data,
                                 uint64_t bytes)
{
    size_t need = image->used + DIR_FILE_BYTES + (size_t)bytes;
    uint8_t *at;

    image->bytes = realloc(image->bytes, need);
    if (!image->bytes) abort();
    at = image->bytes + image->used;
    at[0] = kind;
    kv_store_le64(at + 1, id);
    kv_store_le32(at + 9, (uint32_t)bytes);
    if (bytes) memcpy(at + DIR_FILE_BYTES, data, (size_t)bytes);
    image->used = need;
}

static inline void dir_image_free(struct dir_image *image)
{
    free(image->bytes);
    memset(image, 0, sizeof *image);
}

/* One file of an input; `data` points into it. */
struct dir_file {
    uint8_t kind;
    uint64_t id;
    uint8_t *data;
    size_t bytes;
};

struct dir_files {
    struct dir_file file[DIR_FILES_MAX];
    size_t count;
};

static inline void dir_parse(uint8_t *data, size_t bytes,
                             struct dir_files *files)
{
    size_t at = DIR_HEAD_BYTES;

    files->count = 0;
    while (at + DIR_FILE_BYTES <= bytes && files->count < DIR_FILES_MAX) {
        struct dir_file *f = &files->file[files->count++];

        f->kind = data[at];
        f->id = kv_load_le64(data + at + 1);
        f->bytes = kv_load_le32(data + at + 9);
        f->data = data + at + DIR_FILE_BYTES;
        f->bytes = (size_t)kv_min(f->bytes, bytes - at - DIR_FILE_BYTES);
        at += DIR_FILE_BYTES + f->bytes;
    }
}

static inline struct dir_file *dir_find(struct dir_files *files, uint8_t kind,
                                        uint64_t id)
{
    for (size_t i = files->count; i-- > 0;) {
        struct dir_file *f = &files->file[i];

        if (f->kind == kind
            && (f->id == id || (kind != KV_FILE_LOG && kind != KV_FILE_TABLE)))
            return f;
    }
    return NULL;
}

/* What the manifest says of its tables and logs, made true. */
static inline void dir_fix_manifest(struct dir_files *files,
                                    struct dir_file *manifest)
{
    size_t n = fix_manifest_bytes(manifest->data, manifest->bytes);
    uint8_t *p = manifest->data + KV_MANIFEST_HEAD_BYTES;
    uint32_t tables, logs;

    if (n == 0) return;
    tables = kv_load_le32(manifest->data + 80);
    logs = kv_load_le32(manifest->data + 84);
    for (uint32_t i = 0; i < tables; i++, p += KV_MANIFEST_TABLE_BYTES) {
        struct dir_file *f = dir_find(files, KV_FILE_TABLE, kv_load_le64(p));
        const uint8_t *footer;

        if (!f || f->bytes < KV_TABLE_FOOTER_BYTES) continue;
        footer = f->data + f->bytes - KV_TABLE_FOOTER_BYTES;
        kv_store_le64(p + 8, f->bytes);
        memcpy(p + 16, footer + 16, 16);
        memcpy(p + 32, footer + 72, 16);
        memcpy(p + 48, footer + 92, 4);
    }
    for (uint32_t i = 0; i < logs; i++, p += KV_MANIFEST_LOG_BYTES) {
        struct dir_file *f = dir_find(files, KV_FILE_LOG, kv_load_le64(p));
        struct fix_log_end end;

        if (!f || f->bytes < KV_LOG_HEADER_BYTES) continue;
        end = fix_log(f->data, f->bytes, FIX_SUMS);
        memcpy(p + 8, f->data + 40, KV_SALT_BYTES);
        if (kv_load_le32(p + 24) != KV_LOG_STATE_SEALED) continue;
        kv_store_le32(p + 28, end.last_hcrc);
        kv_store_le64(p + 32, end.bytes);
    }
}

/* All files of one store, with sums, sizes and ids that fit together. */
static inline void dir_fix(uint8_t *data, size_t bytes, int level)
{
    struct dir_files files;
    struct dir_file *manifest;

    dir_parse(data, bytes, &files);
    manifest = dir_find(&files, KV_FILE_MANIFEST, 0);
    for (size_t i = 0; i < files.count; i++) {
        struct dir_file *f = &files.file[i];
        const uint8_t *uuid = manifest && manifest->bytes >= 32
            ? manifest->data + 16 : NULL;

        if (f->kind == KV_FILE_LOG && f->bytes >= KV_LOG_HEADER_BYTES) {
            if (level >= FIX_ALL && uuid) {
                memcpy(f->data + 16, uuid, KV_UUID_BYTES);
                kv_store_le64(f->data + 32, f->id);
            }
            fix_log(f->data, f->bytes, level);
        }
        if (f->kind == KV_FILE_TABLE && f->bytes >= KV_TABLE_HEADER_BYTES) {
            if (level >= FIX_ALL && uuid) {
                memcpy(f->data + 24, uuid, KV_UUID_BYTES);
                kv_store_le64(f->data + 40, f->id);
            }
            fix_table(f->data, f->bytes, level);
        }
        if (f->kind == KV_FILE_LOCK) fix_marks(f->data, f->bytes, level);
    }
    if (!manifest) return;
    if (level >= FIX_ALL) dir_fix_manifest(&files, manifest);
    fix_manifest(manifest->data, manifest->bytes, level);
}

#endif /* KVMETA_FUZZ_DIR_H */
