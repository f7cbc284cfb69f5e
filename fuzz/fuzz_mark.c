/*
 * Fuzzes the reading of the marks. The input is the file LOCK.
 *
 * A bad mark is no error, only lost evidence; one of another store is. What
 * is accepted must be, bit by bit, what encoding it gives; and a flipped bit
 * must lose the mark, or show another store, never change it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fix.h"

static int read_marks(struct fuzz_world *w, const uint8_t *data, size_t bytes,
                      struct kv_mark marks[2])
{
    struct kvmeta_error err = {0};
    struct kv_file file = {0};
    int rc;

    sim_file_put(&w->fs, "LOCK", data, bytes);
    rc = kv_file_open(&w->env, KV_FILE_LOCK, 0, 0, &file, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "LOCK cannot be opened");
    rc = kv_marks_read(&w->env, &file, marks, &err);
    fuzz_check_code(rc, &err);
    kv_file_close(&w->env, &file);
    return rc;
}

static void check_canonical(const struct kv_env *env, const uint8_t *data,
                            const struct kv_mark marks[2])
{
    unsigned char slot[KV_MARK_BYTES];

    for (unsigned i = 0; i < 2; i++) {
        if (marks[i].counter == 0) continue;
        kv_mark_encode(env, &marks[i], slot);
        FUZZ_CHECK(memcmp(slot, data + (size_t)i * KV_MARK_STRIDE,
                          sizeof slot) == 0,
                   "mark %u is not what we would write", i);
    }
}

static void check_flip(struct fuzz_world *w, uint8_t *data, size_t bytes,
                       const struct kv_mark before[2])
{
    uint64_t bit = fuzz_hash(data, bytes) % (KV_MARK_BYTES * 8);
    struct kv_mark marks[2];

    for (unsigned i = 0; i < 2; i++) {
        uint8_t *p = data + (size_t)i * KV_MARK_STRIDE + bit / 8;

        if (before[i].counter == 0) continue;
        *p ^= (uint8_t)(1u << bit % 8);
        if (read_marks(w, data, bytes, marks) == KVMETA_OK) {
            FUZZ_CHECK(marks[i].counter == 0, "bit %llu of a mark flips",
                       (unsigned long long)bit);
            FUZZ_CHECK(marks[1 - i].counter == before[1 - i].counter,
                       "the other mark is lost with it");
        }
        *p ^= (uint8_t)(1u << bit % 8);
    }
}

static void check_write(struct fuzz_world *w, const struct kv_mark *mark)
{
    struct kvmeta_error err = {0};
    struct kv_file file = {0};
    struct kv_mark marks[2];
    const struct kv_mark *got = &marks[mark->counter % 2];
    int rc = kv_file_open(&w->env, KV_FILE_LOCK, 0, KVMETA_VFS_WRITE, &file,
                          &err);

    if (!rc) rc = kv_mark_write(&w->env, &file, mark, &err);
    if (!rc) rc = kv_marks_read(&w->env, &file, marks, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "a mark cannot be written: %s", err.message);
    FUZZ_CHECK(got->counter == mark->counter && got->gen == mark->gen
               && got->log_id == mark->log_id && got->durable == mark->durable,
               "a mark is read back as another");
    kv_file_close(&w->env, &file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct fuzz_world world;
    struct kv_mark marks[2];
    uint8_t *copy;

    if (bytes > FUZZ_INPUT_BYTES_MAX) return 0;
    copy = fuzz_copy(data, bytes);
    fix_marks(copy, bytes, FIX_INPUT);
    fuzz_world_init(&world);
    fuzz_world_enter(&world, 8, 16);
    if (bytes >= KV_MARK_BYTES && kv_load_le64(copy) == KV_MARK_MAGIC)
        memcpy(world.env.uuid, copy + 8, KV_UUID_BYTES);
    else if (bytes >= KV_MARK_STRIDE + KV_MARK_BYTES)
        memcpy(world.env.uuid, copy + KV_MARK_STRIDE + 8, KV_UUID_BYTES);
    if (read_marks(&world, copy, bytes, marks) == KVMETA_OK) {
        fuzz_accepted += marks[0].counter || marks[1].counter;
        check_canonical(&world.env, copy, marks);
        check_flip(&world, copy, bytes, marks);
        for (unsigned i = 0; i < 2; i++)
            if (marks[i].counter) check_write(&world, &marks[i]);
    }
    fuzz_world_leave(&world);
    free(copy);
    return 0;
}

FIX_MUTATOR(fix_marks, fix_change_marks(&rng, data, bytes))
