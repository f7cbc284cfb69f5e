/*
 * Tables: whole ones that say what is not so, planes and blocks at their
 * limits, and an index that is larger than the writer's buffer. Looks inside,
 * for the sums.
 *
 * SPDX-License-Identifier: MIT
 */
#define KVMETA_STATIC
#include "unit.h"
#include "unit_files.h"

#include "../../kvmeta.c"

/* --------------------------------------------------------------------------
 * Lies
 * -------------------------------------------------------------------------- */

enum { RECORDS = 10000 };                /* in two blocks */

/* A table as bytes, and where its parts are. */
struct image {
    unsigned char *data;
    size_t bytes;
    size_t index_off;
    size_t entry_bytes;
    size_t blocks;
    unsigned char *footer;
};

static unsigned char *entry_of(struct image *image, size_t i)
{
    return image->data + image->index_off + i * image->entry_bytes;
}

/* Sets the sums of all blocks, of the index and of the footer right; returns
 * the last. */
static uint32_t sum_table(const struct kv_env *env, uint32_t seed,
                          struct image *image)
{
    size_t index_bytes = image->blocks * image->entry_bytes;
    uint32_t crc;

    for (size_t i = 0; i < image->blocks; i++) {
        struct kv_block block = kv_table_entry_decode(entry_of(image, i));

        crc = kv_crc_add(&env->crc, seed, image->data + block.off,
                         block.stored_bytes);
        kv_store_le32(entry_of(image, i) + 20, crc);
    }
    crc = kv_crc_add(&env->crc, seed, image->data + image->index_off,
                     index_bytes);
    kv_store_le32(image->footer + 88, crc);
    crc = kv_crc_add(&env->crc, seed, image->footer, 92);
    kv_store_le32(image->footer + 92, crc);
    return crc;
}

static void index_before_the_blocks(struct image *image)
{
    kv_store_le64(image->footer + 48, KV_TABLE_HEADER_BYTES - 1);
}

static void index_behind_the_footer(struct image *image)
{
    kv_store_le64(image->footer + 48, image->bytes - 1);
}

static void no_blocks_at_all(struct image *image)
{
    image->index_off = image->bytes - KV_TABLE_FOOTER_BYTES;
    image->blocks = 0;
    kv_store_le64(image->footer + 48, image->index_off);
    kv_store_le64(image->footer + 32, 0);
}

static void less_than_a_table(struct image *image)
{
    image->bytes = KV_TABLE_HEADER_BYTES + KV_TABLE_FOOTER_BYTES - 1;
}

/* The first block ends after three bytes, the second has the others. */
static void block_of_three_bytes(struct image *image)
{
    struct kv_block first = kv_table_entry_decode(entry_of(image, 0));
    struct kv_block second = kv_table_entry_decode(entry_of(image, 1));
    uint32_t moved = first.stored_bytes - 3;

    kv_store_le32(entry_of(image, 0) + 8, 3);
    kv_store_le64(entry_of(image, 1), second.off - moved);
    kv_store_le32(entry_of(image, 1) + 8, second.stored_bytes + moved);
}

/* The second block begins, so the index says, within the first. */
static void blocks_overlap(struct image *image)
{
    unsigned char *key = entry_of(image, 1) + KV_TABLE_ENTRY_BYTES;

    kvmeta_u64_to_key(kv_load_be64(key) - 1, key);
}

static void other_first_key(struct image *image)
{
    unsigned char *key = entry_of(image, 0) + KV_TABLE_ENTRY_BYTES;

    kvmeta_u64_to_key(kv_load_be64(key) + 1, key);
}

static void other_record_sum(struct image *image)
{
    image->footer[56] ^= 1;
}

static const struct lie {
    void (*edit)(struct image *image);
    const char *want;
} lies[] = {
    {index_before_the_blocks, "index is out of the file"},
    {index_behind_the_footer, "index is out of the file"},
    {no_blocks_at_all, "blocks do not end at the index"},
    {less_than_a_table, "too short for a table"},
    {block_of_three_bytes, "block is no zstd frame"},
    {blocks_overlap, "last key is not below the next block"},
    {other_first_key, "first key is not the index's"},
    {other_record_sum, "record sum is wrong"},
};

/* Reads the table with this lie in it, and returns what is said of it. */
static const char *read_lie(struct unit *u, kvmeta *db, const char *name,
                            const struct lie *lie)
{
    static struct kvmeta_error err;
    struct kv_job job = {.env = &db->env};
    struct kv_table_meta meta = db->tables[0].meta;
    struct kv_table t;
    struct image image;
    int rc;

    image.data = unit_read_path(unit_path(u, name), &image.bytes);
    image.footer = image.data + image.bytes - KV_TABLE_FOOTER_BYTES;
    image.index_off = (size_t)kv_load_le64(image.footer + 48);
    image.entry_bytes = kv_table_entry_bytes(&db->env.shape);
    image.blocks = db->tables[0].blocks;
    assert_true(image.blocks >= 2);
    if (lie) lie->edit(&image);
    meta.footer_crc = sum_table(&db->env, db->tables[0].seed, &image);
    meta.bytes = image.bytes;
    unit_write_path(unit_path(u, name), image.data, image.bytes);
    free(image.data);
    rc = kv_table_open(&db->env, &meta, &t, &err);
    if (!rc) rc = kv_table_check_records(&job, &t, &err);
    if (!rc || t.file.open) kv_table_close(&db->env, &t);
    if (rc) assert_int_equal(rc, KVMETA_E_CORRUPT);
    return rc ? err.message : NULL;
}

/* Goal: a table that is whole and wrong is corrupt, and what is wrong with it
 * is said. Method: one lie at a time, with all sums put right, those of the
 * manifest, too. */
static void a_table_that_says_what_is_not_so_is_corrupt(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char *bytes;
    char name[64];
    size_t size;
    kvmeta *db = unit_open(u, &options);

    unit_fill_random(db, 0, RECORDS, 1);
    unit_ok(kvmeta_flush(db));
    assert_true(unit_find(u, ".tab", 0, name));
    bytes = unit_read_path(unit_path(u, name), &size);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        const char *said = read_lie(u, db, name, &lies[i]);

        if (!said || !strstr(said, lies[i].want))
            fail_msg("lie %zu: said \"%s\", want \"%s\"", i,
                     said ? said : "", lies[i].want);
        unit_write_path(unit_path(u, name), bytes, size);
    }
    assert_null(read_lie(u, db, name, NULL));
    unit_ok(kvmeta_verify(db, NULL));
    free(bytes);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Limits
 * -------------------------------------------------------------------------- */

/* Goal: (B1) a plane of any length, in any mode, is decoded to what it was,
 * and nothing else is touched. */
static void planes_of_each_length_and_mode_come_back(struct unit *u)
{
    unsigned char plane[70], low[70], coded[70];
    struct test_rng rng = {test_args.seed};

    (void)u;
    for (size_t n = 0; n < sizeof plane; n++) {
        for (int mode = 0; mode < KV_PLANE_MODES; mode++) {
            test_rng_bytes(&rng, plane, sizeof plane);
            test_rng_bytes(&rng, low, sizeof low);
            memset(coded, 0xa5, sizeof coded);
            if (n > 0 || mode == KV_PLANE_PLAIN)
                kv_plane_encode(mode, plane, low, 0, n, coded);
            kv_plane_decode(mode, coded, low, n);
            assert_memory_equal(coded, plane, n);
            for (size_t i = n; i < sizeof coded; i++)
                assert_int_equal(coded[i], 0xa5);
        }
    }
}

/* Goal: of numbers that grow by random steps the table holds the steps: eight
 * bits a record of key and as many of value, and little more. */
static void growing_numbers_take_the_room_of_their_steps(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct test_rng rng = {test_args.seed};
    uint64_t number = 0, other = 0, bytes;
    unsigned char key[8], value[8];
    kvmeta *db = unit_open(u, &options);

    for (uint64_t i = 0; i < 50000; i++) {
        number += 1 + test_rng_below(&rng, 255);
        other += test_rng_below(&rng, 256);
        kvmeta_u64_to_key(number, key);
        kv_store_le64(value, other);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_flush(db));
    bytes = unit_stats(db).table_bytes;
    assert_true(bytes < 2 * 50000 + 50000 / 10);
    unit_close(db);
}

/* Goal: a full block of records of any width fits, with all values and with
 * one tombstone, which costs more bits than it saves bytes where values are
 * small. */
static void a_full_block_fits_at_each_width(struct unit *u)
{
    struct kv_shape shape;

    (void)u;
    for (uint32_t bytes = 1;
         bytes <= KVMETA_KEY_BYTES_MAX + KVMETA_VALUE_BYTES_MAX; bytes++) {
        uint32_t key_bytes = bytes < KVMETA_KEY_BYTES_MAX
            ? bytes : KVMETA_KEY_BYTES_MAX;
        uint32_t n;

        kv_shape_init(&shape, key_bytes, bytes - key_bytes);
        n = kv_block_records_max(&shape);
        assert_true(n >= 1);
        assert_true(kv_block_raw_bytes(&shape, n, 0) <= KV_BLOCK_RAW_MAX);
        assert_true(kv_block_raw_bytes(&shape, n, 1) <= KV_BLOCK_RAW_MAX);
        assert_true(n * (uint64_t)bytes <= KV_BLOCK_RAW_MAX);
        assert_true((n + 2) * (uint64_t)bytes + (n + 9) / 8
                    + kv_block_mode_bytes(&shape, n) > KV_BLOCK_RAW_MAX
                    || n == KV_BLOCK_PLANES_MIN - 1);
    }
}

/* Fails the write `fail_write_at` from now; 0: none. */
static int fail_write_at;

static int64_t write_or_fail(void *user, int file, const void *buf,
                             size_t bytes, uint64_t off)
{
    return fail_write_at > 0 && --fail_write_at == 0
        ? -EIO : unit_fault_write(user, file, buf, bytes, off);
}

/* Goal: a table whose index is larger than what is written at once is whole,
 * and an error of one of its writes is one of the flush alone. Method: the
 * widest records, one in a block, all alike, which takes next to no room, so
 * that the table is written in two parts; a flush that could not begin its
 * table has sealed the log before. */
static void an_index_larger_than_the_buffer_is_written(struct unit *u)
{
    static unsigned char key[KVMETA_KEY_BYTES_MAX];
    static unsigned char value[KVMETA_VALUE_BYTES_MAX];
    struct kvmeta_options options = unit_options(u, sizeof key, sizeof value);
    struct unit_faults *faults = unit_faults_init(u);
    kvmeta *db;

    faults->vfs.file_write = write_or_fail;
    faults->create_suffix = ".tab";
    options.vfs = &faults->vfs;
    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    for (uint64_t i = 0; i < 250; i++) {
        unit_key(sizeof key, i, key);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
    atomic_store(&faults->create_errno, EMFILE);
    unit_is(kvmeta_flush(db), KVMETA_E_LIMIT);
    atomic_store(&faults->create_errno, 0);
    for (int at = 1; at <= 2; at++) {
        fail_write_at = at;
        unit_is(kvmeta_flush(db), KVMETA_E_IO);
        assert_int_equal(fail_write_at, 0);
        assert_int_equal(unit_files(u, ".tab"), 0);
    }
    unit_ok(kvmeta_flush(db));
    assert_int_equal(db->tables[0].blocks, 250);
    assert_true(250 * db->tables[0].entry_bytes > KV_TABLE_OUT_BYTES);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    db = unit_open(u, &options);
    assert_int_equal(kvmeta_count(db), 250);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_table_that_says_what_is_not_so_is_corrupt),
    UNIT_CASE(planes_of_each_length_and_mode_come_back),
    UNIT_CASE(growing_numbers_take_the_room_of_their_steps),
    UNIT_CASE(a_full_block_fits_at_each_width),
    UNIT_CASE(an_index_larger_than_the_buffer_is_written),
};

UNIT_MAIN(cases)
