/*
 * Manifests, and marks, whose sums are right and that say what is not so: of a
 * bug, of bytes that were damaged before they were summed, of somebody
 * hostile. Looks inside, for the code that encodes them.
 *
 * SPDX-License-Identifier: MIT
 */
#define KVMETA_STATIC
#include "unit.h"
#include "unit_files.h"

#include "../../kvmeta.c"

enum { IMAGE_BYTES = 4096, TABLES = 2 };

/* Sets the sum of an image right. */
static void sum_image(const struct kv_env *env, unsigned char *image,
                      size_t bytes)
{
    uint32_t seed = kv_crc_file_seed(env, KV_FILE_MANIFEST, 0, kv_no_salt);

    kv_store_le32(image + bytes - 4,
                  kv_crc_add(&env->crc, seed, image, bytes - 4));
}

/* Writes the manifest of the store anew, changed: what it says by `edit`, or
 * the four bytes of the image at `off`. */
static void edit_manifest(struct unit *u, void (*edit)(struct kv_manifest *m),
                          size_t off, uint32_t word)
{
    static unsigned char file[2 * IMAGE_BYTES];
    struct kvmeta_options options = unit_quiet(u);
    struct kv_table_meta tables[TABLES];
    struct kv_manifest m;
    size_t bytes;
    kvmeta *db;

    options.flags = KVMETA_READ_ONLY;
    db = unit_open(u, &options);
    m = db->manifest;
    assert_int_equal(m.tables_count, TABLES);
    assert_int_equal(m.logs_count, 1);
    memcpy(tables, m.tables, sizeof tables);
    m.tables = tables;
    if (edit) edit(&m);
    memset(file, 0, sizeof file);
    bytes = kv_manifest_image_bytes(m.tables_count, m.logs_count);
    kv_manifest_encode(&db->env, &m, file);
    if (off) kv_store_le32(file + off, word);
    sum_image(&db->env, file, bytes);
    memcpy(file + IMAGE_BYTES, file, bytes);
    unit_close(db);
    unit_write_path(unit_path(u, "MANIFEST"), file, IMAGE_BYTES + bytes);
}

static void other_footer(struct kv_manifest *m)
{
    m->tables[0].footer_crc ^= 1;
}

static void other_records(struct kv_manifest *m)
{
    m->tables[0].records++;
}

static void other_tombstones(struct kv_manifest *m)
{
    m->tables[0].tombstones++;
}

static void other_first_seq(struct kv_manifest *m)
{
    m->tables[1].seq_first++;
}

static void other_last_seq(struct kv_manifest *m)
{
    m->tables[0].seq_last--;
}

static void tables_overlap(struct kv_manifest *m)
{
    m->tables[1].seq_first = m->tables[0].seq_last;
}

static void first_seq_0(struct kv_manifest *m)
{
    m->tables[0].seq_first = 0;
}

static void short_table(struct kv_manifest *m)
{
    m->tables[0].bytes = 8;
}

static void other_salt(struct kv_manifest *m)
{
    m->logs[0].salt[0] ^= 1;
}

static void other_seq(struct kv_manifest *m)
{
    m->seq++;
}

static void highest_generation(struct kv_manifest *m)
{
    m->gen = KV_NUMBER_READ_MAX;
}

static void highest_id(struct kv_manifest *m)
{
    m->next_id = KV_NUMBER_READ_MAX;
}

static void highest_seq(struct kv_manifest *m)
{
    m->seq = KV_NUMBER_READ_MAX;
}

static void other_digest(struct kv_manifest *m)
{
    m->digest.hi ^= 1;
}

static void a_table_less(struct kv_manifest *m)
{
    m->tables++;
    m->tables_count--;
}

static void a_table_and_the_log_less(struct kv_manifest *m)
{
    a_table_less(m);
    m->logs_count = 0;
}

static const struct lie {
    void (*edit)(struct kv_manifest *m);
    size_t off;
    uint32_t word;
    const char *want;                    /* a part of the message */
} lies[] = {
    {other_footer, 0, 0, "footer is not the manifest's"},
    {other_records, 0, 0, "footer differs from the manifest"},
    {other_tombstones, 0, 0, "footer differs from the manifest"},
    {other_first_seq, 0, 0, "footer differs from the manifest"},
    {other_last_seq, 0, 0, "footer differs from the manifest"},
    {tables_overlap, 0, 0, "S6: table order"},
    {first_seq_0, 0, 0, "S6: table order"},
    {short_table, 0, 0, ".tab"},
    {other_salt, 0, 0, "salt is not the manifest's"},
    {other_seq, 0, 0, "log does not follow"},
    {highest_generation, 0, 0, "MANIFEST: at 0: manifest: S3"},
    {highest_id, 0, 0, "MANIFEST: at 0: manifest: S3"},
    {highest_seq, 0, 0, "MANIFEST: at 0: manifest: S3"},
    {other_digest, 0, 0, "log does not follow"},
    {a_table_less, 0, 0, ".wal: "},
    {a_table_and_the_log_less, 0, 0, "digest of the records"},
    {NULL, 80, KV_TABLES_MAX + 1, "manifest: counts"},
    {NULL, 84, KV_MANIFEST_LOGS_MAX + 1, "manifest: counts"},
    {NULL, 84, 0, "manifest: counts"},
    {NULL, 12, 8, "MANIFEST"},
};

/* Goal: a manifest that is whole and wrong is refused, with what is wrong;
 * nothing changes on disk. Method: one lie at a time, between stores that
 * open. */
static void a_manifest_that_says_what_is_not_so_is_corrupt(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_image image;
    kvmeta *db;

    unit_make_store(u, TABLES, 200, 500);
    unit_image_take(u->dir, &image);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        edit_manifest(u, lies[i].edit, lies[i].off, lies[i].word);
        unit_open_fails(u, &options, KVMETA_E_CORRUPT);
        if (!strstr(u->err.message, lies[i].want))
            fail_msg("lie %zu: said \"%s\", want \"%s\"", i, u->err.message,
                     lies[i].want);
        unit_image_restore(u->dir, &image);
    }
    edit_manifest(u, NULL, 0, 0);        /* the truth, encoded again */
    db = unit_open(u, &options);
    unit_holds(db, 0, 500, 0);
    unit_close(db);
    unit_image_free(&image);
}

/* Goal: a manifest longer than any of ours is not read into memory. */
static void a_manifest_that_is_too_long_is_corrupt(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);

    unit_make_store(u, TABLES, 200, 500);
    assert_int_equal(truncate(unit_path(u, "MANIFEST"),
                              2 * KV_MANIFEST_BYTES_MAX + 1), 0);
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    assert_non_null(strstr(u->err.message, "too large"));
    assert_true((uint64_t)atomic_load(&u->alloc.peak_bytes)
                < 2 * KV_MANIFEST_BYTES_MAX);
}

/* Goal: what stands behind the two copies of a manifest says nothing. */
static void bytes_behind_a_manifest_are_not_read(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db;

    unit_make_store(u, TABLES, 200, 500);
    assert_int_equal(truncate(unit_path(u, "MANIFEST"), 5 * IMAGE_BYTES), 0);
    db = unit_open(u, &options);
    unit_holds(db, 0, 500, 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* LOCK with this mark, of a store whose uuid is all zeros, in slot 0 or 1. */
static void write_mark(struct unit *u, const struct kv_mark *mark)
{
    static unsigned char file[KV_MARK_STRIDE + KV_MARK_BYTES];
    struct kv_env env = {.vfs = NULL};

    kv_crc_init(&env.crc, true);
    memset(file, 0, sizeof file);
    kv_mark_encode(&env, mark, file + mark->counter % 2 * KV_MARK_STRIDE);
    unit_write_path(unit_path(u, "LOCK"), file, sizeof file);
}

/* Goal: where there is no manifest any mark that is valid shows that there
 * was one, whatever its uuid and in either slot; one that counts from zero, or
 * further than any store can, is not valid. */
static void a_mark_without_a_manifest_is_corrupt(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kv_mark mark = {.counter = 1, .gen = 1};
    kvmeta *db;

    assert_int_equal(mkdir(u->dir, 0700), 0);
    for (; mark.counter <= 2; mark.counter++) {
        write_mark(u, &mark);
        unit_open_fails(u, &options, KVMETA_E_CORRUPT);
        assert_non_null(strstr(u->err.message, "MANIFEST: at 0: missing, but "
                               "LOCK has marks"));
    }
    for (int i = 0; i < 2; i++) {
        mark.counter = i ? KV_NUMBER_MAX : 0;
        write_mark(u, &mark);
        db = unit_open(u, &options);
        unit_fill(db, 0, 10, 0, 0);
        unit_close(db);
        unit_remove_tree(u->dir);
        assert_int_equal(mkdir(u->dir, 0700), 0);
    }
}

static struct unit_case cases[] = {
    UNIT_CASE(a_manifest_that_says_what_is_not_so_is_corrupt),
    UNIT_CASE(a_manifest_that_is_too_long_is_corrupt),
    UNIT_CASE(bytes_behind_a_manifest_are_not_read),
    UNIT_CASE(a_mark_without_a_manifest_is_corrupt),
};

UNIT_MAIN(cases)
