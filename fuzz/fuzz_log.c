/*
 * Fuzzes the reading of a log. The input is the file.
 *
 * What a log that is accepted must keep, whatever its bytes:
 *
 *   - the same verdict comes from the processor's CRC and from the table;
 *   - its entries are in order, each key once, each within the file;
 *   - acknowledged up to its end it is accepted still, one byte further not;
 *   - cut to its end and sealed it holds the same; with another length or
 *     last sum it is refused; and so it is with any bit flipped.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fix.h"

#define ID 7u

struct input {
    struct fuzz_world *world;
    char name[KV_NAME_BYTES];
    struct kv_log_meta meta;
};

static int load(struct input *in, const uint8_t *data, size_t bytes,
                const struct kv_log_meta *meta, uint64_t acked,
                struct kv_run *run)
{
    struct kvmeta_error err = {0};
    int rc;

    sim_file_put(&in->world->fs, in->name, data, bytes);
    rc = kv_run_load(&in->world->env, meta, acked, run, &err);
    fuzz_check_code(rc, &err);
    return rc;
}

static void check_order(const struct kv_env *env, const struct kv_run *run)
{
    uint64_t first = kv_log_first(run->head.align);

    FUZZ_CHECK(run->end >= first && run->end <= run->size,
               "a log of %llu bytes ends at %llu",
               (unsigned long long)run->size, (unsigned long long)run->end);
    for (size_t i = 0; i < run->count; i++) {
        uint64_t at = (uint64_t)run->items[i].place * 8;
        const unsigned char *key = run->bytes + at + KV_ENTRY_BYTES;
        const unsigned char *before;

        FUZZ_CHECK(at >= first && at + run->head.slot_bytes <= run->end,
                   "an entry is at %llu", (unsigned long long)at);
        FUZZ_CHECK(run->items[i].head == kv_key_head(&env->shape, key),
                   "an entry has another key's head");
        if (i == 0) continue;
        before = run->bytes + (uint64_t)run->items[i - 1].place * 8
            + KV_ENTRY_BYTES;
        FUZZ_CHECK(memcmp(before, key, env->shape.key_bytes) < 0,
                   "entries are not in order");
    }
}

static void check_same(const struct kv_run *a, const struct kv_run *b)
{
    FUZZ_CHECK(a->count == b->count && a->end == b->end
               && a->last_hcrc == b->last_hcrc && a->frames == b->frames
               && a->batches == b->batches
               && kv_digest_equal(a->digest, b->digest),
               "the log reads differently the second time");
    for (size_t i = 0; i < a->count; i++)
        FUZZ_CHECK(a->items[i].place == b->items[i].place,
                   "entry %zu is another the second time", i);
}

/* The same log with other evidence. */
static void check_evidence(struct input *in, const uint8_t *data, size_t bytes,
                           const struct kv_run *first)
{
    struct kv_env *env = &in->world->env;
    struct kv_run run;
    int rc = load(in, data, bytes, &in->meta, first->end, &run);

    FUZZ_CHECK(rc == KVMETA_OK, "refused when acknowledged to its end");
    check_same(first, &run);
    kv_run_free(env, &run);
    rc = load(in, data, bytes, &in->meta, first->end + 1, &run);
    FUZZ_CHECK(rc == KVMETA_E_CORRUPT, "acknowledged bytes were dropped");
    kv_run_free(env, &run);
}

/* Sealed: nothing is tolerated. */
static void check_sealed(struct input *in, const uint8_t *data,
                         const struct kv_run *first)
{
    struct kv_env *env = &in->world->env;
    struct kv_log_meta meta = in->meta;
    size_t end = (size_t)first->end;
    uint64_t bit = fuzz_hash(data, end) % ((uint64_t)end * 8);
    uint8_t *copy = malloc(end);
    struct kv_run run;
    int rc;

    if (!copy) abort();
    memcpy(copy, data, end);
    meta.live = false;
    meta.bytes = end;
    meta.last_hcrc = first->last_hcrc;
    rc = load(in, copy, end, &meta, 0, &run);
    FUZZ_CHECK(rc == KVMETA_OK, "refused once it is sealed");
    check_same(first, &run);
    kv_run_free(env, &run);
    FUZZ_CHECK(load(in, copy, end - 1, &meta, 0, &run) == KVMETA_E_CORRUPT,
               "a sealed log may be cut short");
    kv_run_free(env, &run);
    copy[bit / 8] ^= (uint8_t)(1u << bit % 8);
    FUZZ_CHECK(load(in, copy, end, &meta, 0, &run) == KVMETA_E_CORRUPT,
               "bit %llu of a sealed log may be flipped",
               (unsigned long long)bit);
    kv_run_free(env, &run);
    copy[bit / 8] ^= (uint8_t)(1u << bit % 8);
    meta.last_hcrc ^= 1;
    FUZZ_CHECK(load(in, copy, end, &meta, 0, &run) == KVMETA_E_CORRUPT,
               "a sealed log may end otherwise");
    kv_run_free(env, &run);
    free(copy);
}

static void check(struct input *in, const uint8_t *data, size_t bytes)
{
    struct kv_env *env = &in->world->env;
    struct kv_run run, plain;
    int rc = load(in, data, bytes, &in->meta, 0, &run);
    int plain_rc;

    kv_crc_init(&env->crc, false);
    plain_rc = load(in, data, bytes, &in->meta, 0, &plain);
    FUZZ_CHECK(rc == plain_rc, "result %d, without hardware %d", rc, plain_rc);
    if (rc == KVMETA_OK) check_same(&run, &plain);
    kv_crc_init(&env->crc, true);
    if (rc == KVMETA_OK) {
        fuzz_accepted++;
        check_order(env, &run);
        check_evidence(in, data, bytes, &run);
        check_sealed(in, data, &run);
    }
    kv_run_free(env, &plain);
    kv_run_free(env, &run);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct fuzz_world world;
    struct input in = {.world = &world};
    uint8_t *copy;
    uint32_t key_bytes = 8, value_bytes = 16;

    if (bytes > FUZZ_INPUT_BYTES_MAX) return 0;
    copy = fuzz_copy(data, bytes);
    fix_log(copy, bytes, FIX_INPUT);
    fuzz_world_init(&world);
    if (bytes >= KV_LOG_HEADER_BYTES)
        fuzz_widths(copy + 56, copy + 60, &key_bytes, &value_bytes);
    fuzz_world_enter(&world, key_bytes, value_bytes);
    in.meta.id = ID;
    in.meta.live = true;
    if (bytes >= KV_LOG_HEADER_BYTES) {
        in.meta.id = kv_load_le64(copy + 32);
        memcpy(world.env.uuid, copy + 16, KV_UUID_BYTES);
        memcpy(in.meta.salt, copy + 40, KV_SALT_BYTES);
    }
    kv_file_name(KV_FILE_LOG, in.meta.id, in.name);
    check(&in, copy, bytes);
    fuzz_world_leave(&world);
    free(copy);
    return 0;
}

FIX_MUTATOR(fix_log, fix_change_log(&rng, data, bytes))
