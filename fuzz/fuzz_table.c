/*
 * Fuzzes the reading of a table. The input is the file; what the manifest
 * would say of it is taken from its own footer.
 *
 * What a table that passes verification must keep: its records ascend and are
 * as many as stated; a range of it is the same part of it; merged with itself
 * it is itself; written anew it has the same records; and with any bit
 * flipped, or cut short, it is refused.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fix.h"

struct input {
    struct fuzz_world *world;
    struct kv_job job;
    struct kv_table_meta meta;
    char name[KV_NAME_BYTES];
};

/* All records in one array: key, value, one byte that says "tombstone". */
struct records {
    uint8_t *bytes;
    size_t count;
    size_t cap;                   /* in bytes */
    size_t record_bytes;
};

static void records_add(struct records *r, const struct kv_shape *shape,
                        const struct kv_source *s)
{
    uint8_t *to;

    r->record_bytes = (size_t)shape->record_bytes + 1;
    if ((r->count + 1) * r->record_bytes > r->cap) {
        r->cap = 2 * r->cap + r->record_bytes * 16;
        r->bytes = realloc(r->bytes, r->cap);
        if (!r->bytes) abort();
    }
    to = r->bytes + r->count++ * r->record_bytes;
    memset(to, 0, r->record_bytes);
    memcpy(to, s->key, shape->key_bytes);
    if (s->value)
        memcpy(to + shape->key_bytes, s->value, shape->value_bytes);
    else
        to[r->record_bytes - 1] = 1;
}

/* KVMETA_OK, with all records added, or an error. */
static int collect(const struct kv_shape *shape, struct kv_source *s,
                   struct records *r, struct kvmeta_error *err)
{
    int rc;

    while ((rc = s->next(s, err)) == KVMETA_OK) records_add(r, shape, s);
    return rc == KV_END ? KVMETA_OK : rc;
}

static int collect_range(struct input *in, const struct kv_table *t,
                         const uint8_t *from, const uint8_t *to,
                         struct records *r)
{
    struct kvmeta_error err = {0};
    struct kv_inputs part;
    int rc = kv_inputs_open(&in->job, t, 1, NULL, 0, from, to, &part, &err);

    FUZZ_CHECK(rc == KVMETA_OK, "a range cannot be opened: %s", err.message);
    rc = collect(&in->world->env.shape, &part.merge.base, r, &err);
    kv_inputs_close(&in->world->env, &part);
    fuzz_check_code(rc, &err);
    return rc;
}

static void check_same(const struct records *a, size_t from, size_t to,
                       const struct records *b, const char *what)
{
    FUZZ_CHECK(b->count == to - from, "%s: %zu records, not %zu", what,
               b->count, to - from);
    FUZZ_CHECK(to == from
               || memcmp(a->bytes + from * a->record_bytes, b->bytes,
                         b->count * b->record_bytes) == 0,
               "%s: records differ", what);
}

static void check_order(const struct input *in, const struct records *r,
                        const struct kv_table *t)
{
    size_t key_bytes = in->world->env.shape.key_bytes;
    uint64_t tombstones = 0;

    FUZZ_CHECK(r->count == t->meta.records, "%zu records, not %llu", r->count,
               (unsigned long long)t->meta.records);
    for (size_t i = 0; i < r->count; i++) {
        const uint8_t *at = r->bytes + i * r->record_bytes;

        tombstones += at[r->record_bytes - 1];
        FUZZ_CHECK(i == 0 || memcmp(at - r->record_bytes, at, key_bytes) < 0,
                   "record %zu is out of order", i);
    }
    FUZZ_CHECK(tombstones == t->meta.tombstones, "tombstones are miscounted");
}

static void check_range(struct input *in, const struct kv_table *t,
                        const struct records *all, uint64_t random)
{
    struct records part = {0};
    size_t from, to;
    int rc;

    if (all->count == 0) return;
    from = (size_t)(random % all->count);
    to = from + (size_t)(random / all->count % (all->count - from));
    rc = collect_range(in, t, all->bytes + from * all->record_bytes,
                       all->bytes + to * all->record_bytes, &part);
    FUZZ_CHECK(rc == KVMETA_OK, "a range cannot be read");
    check_same(all, from, to, &part, "range");
    free(part.bytes);
}

/* Three times the same table: the newest wins, the others are shadowed. */
static void check_merge(struct input *in, const struct kv_table *t,
                        const struct records *all)
{
    struct kvmeta_digest twice = t->sum;
    struct kv_table tables[3] = {*t, *t, *t};
    struct kvmeta_error err = {0};
    struct records merged = {0};
    struct kv_inputs three;
    int rc = kv_inputs_open(&in->job, tables, 3, NULL, 0, NULL, NULL, &three,
                            &err);

    three.merge.balance = true;
    if (!rc)
        rc = collect(&in->world->env.shape, &three.merge.base, &merged, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "cannot be merged: %s", err.message);
    check_same(all, 0, all->count, &merged, "merge");
    kv_digest_add(&twice, t->sum);
    FUZZ_CHECK(kv_digest_equal(twice, three.merge.shadowed),
               "the merge does not balance");
    kv_inputs_close(&in->world->env, &three);
    free(merged.bytes);
}

static void check_rewrite(struct input *in, const struct kv_table *t,
                          const struct records *all)
{
    struct kv_env *env = &in->world->env;
    struct kvmeta_error err = {0};
    struct kv_table_writer w;
    struct kv_table again = {0};
    struct records r = {0};
    int rc = kv_table_writer_open(&in->job, t->meta.id + 1, &w, &err);

    for (size_t i = 0; i < all->count && !rc; i++) {
        const uint8_t *at = all->bytes + i * all->record_bytes;
        const uint8_t *value = at[all->record_bytes - 1]
            ? NULL : at + env->shape.key_bytes;

        rc = kv_table_writer_add(&w, at, value, &err);
    }
    if (!rc) rc = kv_table_writer_finish(&w, 1, 2, &again, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "cannot be written anew: %s", err.message);
    kv_table_writer_abort(&w);
    FUZZ_CHECK(kv_digest_equal(again.sum, t->sum),
               "written anew, the sum differs");
    rc = collect_range(in, &again, NULL, NULL, &r);
    FUZZ_CHECK(rc == KVMETA_OK, "what was written cannot be read");
    check_same(all, 0, all->count, &r, "rewrite");
    free(r.bytes);
    kv_table_close(env, &again);
}

/* Opens and verifies. */
static int verify(struct input *in, const uint8_t *data, size_t bytes)
{
    struct kvmeta_error err = {0};
    struct kv_table t;
    int rc;

    sim_file_put(&in->world->fs, in->name, data, bytes);
    rc = kv_table_open(&in->world->env, &in->meta, &t, &err);
    if (!rc) rc = kv_table_verify(&in->job, &t, &err);
    fuzz_check_code(rc, &err);
    kv_table_close(&in->world->env, &t);
    return rc;
}

static void check_damaged(struct input *in, uint8_t *data, size_t bytes,
                          uint64_t random)
{
    uint64_t bit = random % (bytes * 8);

    data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    FUZZ_CHECK(verify(in, data, bytes) != KVMETA_OK,
               "bit %llu may be flipped", (unsigned long long)bit);
    data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    FUZZ_CHECK(verify(in, data, bytes - 1) != KVMETA_OK, "may be cut short");
}

static void check(struct input *in, uint8_t *data, size_t bytes)
{
    struct kv_env *env = &in->world->env;
    uint64_t random = fuzz_hash(data, bytes);
    struct kvmeta_error err = {0};
    struct records all = {0};
    struct kv_table t;
    int read, rc;

    sim_file_put(&in->world->fs, in->name, data, bytes);
    rc = kv_table_open(env, &in->meta, &t, &err);
    fuzz_check_code(rc, &err);
    if (rc) return;
    read = collect_range(in, &t, NULL, NULL, &all);
    rc = kv_table_verify(&in->job, &t, &err);
    fuzz_check_code(rc, &err);
    if (read == KVMETA_OK) check_order(in, &all, &t);
    if (rc == KVMETA_OK) {
        fuzz_accepted++;
        FUZZ_CHECK(read == KVMETA_OK, "verified, but cannot be read");
        check_range(in, &t, &all, random);
        check_merge(in, &t, &all);
        if (all.count > 0 && in->meta.id < UINT64_MAX)
            check_rewrite(in, &t, &all);
    }
    kv_table_close(env, &t);
    free(all.bytes);
    if (rc == KVMETA_OK) check_damaged(in, data, bytes, random);
}

/* What a manifest that lists this table would say. */
static void fill_meta(struct input *in, const uint8_t *data, size_t bytes)
{
    const uint8_t *footer = data + bytes - KV_TABLE_FOOTER_BYTES;

    in->meta.id = kv_load_le64(data + 40);
    in->meta.bytes = bytes;
    in->meta.records = kv_load_le64(footer + 16);
    in->meta.tombstones = kv_load_le64(footer + 24);
    in->meta.seq_first = kv_load_le64(footer + 72);
    in->meta.seq_last = kv_load_le64(footer + 80);
    in->meta.footer_crc = kv_load_le32(footer + 92);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct fuzz_world world;
    struct input in = {.world = &world};
    uint32_t key_bytes, value_bytes;
    uint8_t *copy;

    if (bytes > FUZZ_INPUT_BYTES_MAX) return 0;
    if (bytes < KV_TABLE_HEADER_BYTES + KV_TABLE_FOOTER_BYTES) return 0;
    copy = fuzz_copy(data, bytes);
    fix_table(copy, bytes, FIX_INPUT);
    fuzz_world_init(&world);
    fuzz_widths(copy + 12, copy + 16, &key_bytes, &value_bytes);
    fuzz_world_enter(&world, key_bytes, value_bytes);
    memcpy(world.env.uuid, copy + 24, KV_UUID_BYTES);
    in.job.env = &world.env;
    in.job.zstd_level = 1;
    fill_meta(&in, copy, bytes);
    kv_file_name(KV_FILE_TABLE, in.meta.id, in.name);
    check(&in, copy, bytes);
    fuzz_world_leave(&world);
    free(copy);
    return 0;
}

FIX_MUTATOR(fix_table, bytes = fix_change_table(&rng, data, bytes, bytes_max))
