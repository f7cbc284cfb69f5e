/*
 * Recovery seen from outside: torn tails that were never acknowledged, the
 * evidence of a stale manifest, and loads by several threads.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

/* --------------------------------------------------------------------------
 * Tails of the live log
 * -------------------------------------------------------------------------- */

static void live(struct unit *u, uint64_t from, uint64_t to,
                 unsigned durability)
{
    struct unit_life life = {u, from, to, durability, 0};

    assert_int_equal(unit_in_child(unit_live_and_die, &life), 0);
}

/* Where the last frame of the live log begins: frames end on multiples of 8
 * and carry their own place at 8. */
static uint64_t last_frame(struct unit *u, const char *name)
{
    unsigned char *data;
    size_t bytes, at, last = 0, i;
    uint64_t place;

    data = unit_read_path(unit_path(u, name), &bytes);
    for (at = 8; at + 64 <= bytes; at += 8) {
        for (i = 8, place = 0; i-- > 0;) {
            place = place << 8 | data[at + 8 + i];
        }
        last = place == at ? at : last;
    }
    free(data);
    assert_true(last > 0);
    return last;
}

static void want_torn(struct unit *u, uint64_t count, uint32_t reason)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_stats s = unit_stats(db);

    assert_true(kvmeta_count(db) == count);
    unit_holds(db, 0, count, 0);
    assert_int_equal(s.open_torn_reason, reason);
    assert_true((s.open_torn_bytes > 0) == (reason != KVMETA_TORN_NONE));
    assert_true(s.open_log_frames == count && s.open_log_batches == count);
    assert_true(s.open_logs == 1);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == count);
    assert_int_equal(unit_stats(db).open_torn_reason, KVMETA_TORN_NONE);
    unit_close(db);
}

static void append(struct unit *u, const char *name, size_t bytes)
{
    int fd = open(unit_path(u, name), O_WRONLY | O_APPEND | O_CLOEXEC);
    unsigned char junk[256];

    memset(junk, 0x77, sizeof junk);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, junk, bytes), (ssize_t)bytes);
    close(fd);
}

/* Goal: what is damaged at the end of a log and was never acknowledged as
 * durable is dropped, with the reason and the bytes counted, and the rest
 * kept. Method: 20 written puts, a kill, and one damage after another to an
 * image of that; each is opened, and opened again. */
static void a_torn_tail_is_dropped_and_counted(struct unit *u)
{
    struct unit_image image;
    char name[64];
    uint64_t last;

    live(u, 0, 20, KVMETA_WRITTEN);
    unit_image_take(u->dir, &image);
    assert_true(unit_find(u, ".wal", 0, name));
    last = last_frame(u, name);
    want_torn(u, 20, KVMETA_TORN_NONE);

    unit_image_restore(u->dir, &image);
    append(u, name, 100);
    want_torn(u, 20, KVMETA_TORN_HEADER);

    unit_image_restore(u->dir, &image);
    unit_flip(u, name, last + 1);
    want_torn(u, 19, KVMETA_TORN_HEADER);

    unit_image_restore(u->dir, &image);
    unit_flip(u, name, last + 64 + 12);
    want_torn(u, 19, KVMETA_TORN_BODY);

    unit_image_restore(u->dir, &image);
    assert_int_equal(truncate(unit_path(u, name), (off_t)last + 70), 0);
    want_torn(u, 19, KVMETA_TORN_BODY);

    unit_image_restore(u->dir, &image);
    assert_int_equal(truncate(unit_path(u, name), (off_t)last), 0);
    want_torn(u, 19, KVMETA_TORN_NONE);
    unit_image_free(&image);
}

/* Goal: the same damage to frames that were acknowledged as durable is never
 * dropped. Method: as above, with durable puts; the mark vouches for all. */
static void a_damaged_durable_tail_is_corrupt(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct unit_image image;
    char name[64];
    uint64_t last, off;

    live(u, 0, 20, KVMETA_DURABLE);
    unit_image_take(u->dir, &image);
    assert_true(unit_find(u, ".wal", 0, name));
    last = last_frame(u, name);
    for (off = last; off < last + 64 + 24; off++) {
        unit_flip(u, name, off);
        unit_open_fails(u, &options, KVMETA_E_CORRUPT);
        assert_non_null(strstr(u->err.message, name));
        unit_flip(u, name, off);
    }
    for (off = 0; off < last + 64; off += 61) {
        assert_int_equal(truncate(unit_path(u, name), (off_t)off), 0);
        unit_open_fails(u, &options, KVMETA_E_CORRUPT);
        unit_image_restore(u->dir, &image);
    }
    /* What is wrong is said: at a frame's end, within its header or body. */
    for (off = last; off <= last + 65; off += off == last ? 1 : 64) {
        assert_int_equal(truncate(unit_path(u, name), (off_t)off), 0);
        unit_open_fails(u, &options, KVMETA_E_CORRUPT);
        assert_non_null(strstr(u->err.message, off == last ? "the log ends, but"
                               : off == last + 1 ? "no valid frame header, but"
                               : "frame: body crc, but"));
        unit_image_restore(u->dir, &image);
    }
    want_torn(u, 20, KVMETA_TORN_NONE);
    unit_image_free(&image);
}

/* --------------------------------------------------------------------------
 * Files that the manifest does not list
 * -------------------------------------------------------------------------- */

/* Goal: an old manifest is found out even without marks, by the log that it
 * does not know. */
static void a_log_of_a_newer_manifest_is_evidence(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char *older;
    char name[64];
    size_t bytes;
    kvmeta *db;

    db = unit_open(u, &options);
    unit_fill(db, 0, 20, 0, KVMETA_DURABLE);
    unit_ok(kvmeta_flush(db));
    unit_close(db);
    older = unit_read_path(unit_path(u, "MANIFEST"), &bytes);
    live(u, 20, 40, KVMETA_DURABLE);
    unit_write_path(unit_path(u, "MANIFEST"), older, bytes);
    free(older);
    assert_int_equal(unlink(unit_path(u, "LOCK")), 0);
    assert_true(unit_find(u, ".wal", 0, name));
    assert_true(kvmeta_open(u->dir, &options, &db, &u->err) ==
                KVMETA_E_CORRUPT);
    assert_non_null(strstr(u->err.message, name));
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
}

/* A foreign file, by its widths, in place of another of the same name. */
static const struct foreign {
    uint32_t key_bytes, value_bytes;
    const char *suffix;
    const char *name;                    /* NULL: as it was called there */
} foreigns[] = {
    {8, 8, ".tab", NULL},
    {8, 8, ".wal", NULL},
    {16, 4, ".tab", NULL},
    {16, 400, ".wal", NULL},
    {9, 0, ".tab", NULL},
    {9, 8, ".wal", NULL},
    {3, 7, ".tab", "t00000000000abcde.tab"},
    {3, 7, ".wal", "w00000000000abcde.wal"},
};

/* Reads the file of a store of its own, which is then removed. */
static unsigned char *foreign_file(struct unit *u, const struct foreign *f,
                                   char *name, size_t *bytes)
{
    struct kvmeta_options options = unit_options(u, f->key_bytes,
                                                 f->value_bytes);
    static const unsigned char zeros[512];
    unsigned char *file;
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    unit_ok(kvmeta_put(db, zeros, zeros, KVMETA_DURABLE));
    if (strcmp(f->suffix, ".tab") == 0) unit_ok(kvmeta_flush(db));
    unit_close(db);
    assert_true(unit_find(u, f->suffix, 0, name));
    file = unit_read_path(unit_path(u, name), bytes);
    unit_remove_tree(u->dir);
    if (f->name) strcpy(name, f->name);
    return file;
}

/* Goal: an unlisted file of another store is no garbage of ours, whatever its
 * widths, its format and its name: somebody put it there, and it is not
 * deleted. With a header that is damaged, or cut off, it cannot be told from
 * what a crash of ours has left. */
static void an_unlisted_file_of_another_store_is_not_deleted(struct unit *u)
{
    static const size_t damaged[] = {0, 13, 14, 20, 30, 70};
    struct kvmeta_options options = unit_quiet(u);

    for (size_t i = 0; i < sizeof foreigns / sizeof *foreigns; i++) {
        char name[64];
        size_t bytes;
        unsigned char *file = foreign_file(u, &foreigns[i], name, &bytes);
        kvmeta *db = unit_open(u, &options);

        unit_close(db);
        unit_write_path(unit_path(u, name), file, bytes);
        unit_open_fails(u, &options, KVMETA_E_CORRUPT);
        assert_non_null(strstr(u->err.message, name));
        assert_non_null(strstr(u->err.message, "of another store"));
        for (size_t k = 0; k <= sizeof damaged / sizeof *damaged; k++) {
            unit_write_path(unit_path(u, name), file, k ? bytes : 71);
            if (k) unit_flip(u, name, damaged[k - 1]);
            db = unit_open(u, &options);
            assert_int_equal(unit_stats(db).open_garbage_files, 1);
            unit_close(db);
            assert_int_equal(access(unit_path(u, name), F_OK), -1);
        }
        free(file);
        unit_remove_tree(u->dir);
    }
}

/* --------------------------------------------------------------------------
 * Loads by several threads
 * -------------------------------------------------------------------------- */

/* Records; scale 0 is for slow sanitizers. Enough for two ranges at least. */
static uint64_t large(void)
{
    return test_args.scale == 0 ? 140000 : 300000;
}

/* A key of 20 bytes: the first 8 are equal for thousands of records. */
static void large_key(uint64_t i, unsigned char *key)
{
    unit_key(20, i, key);
    key[2] = (unsigned char)(i / 50000);
}

static void large_fill(kvmeta *db, uint64_t from, uint64_t to, uint64_t salt)
{
    unsigned char key[20], value[4];
    uint64_t i;

    for (i = from; i < to; i++) {
        large_key(i * 7919 % large(), key);
        unit_value(4, i + salt, value);
        unit_ok(kvmeta_put(db, key, value, KVMETA_BUFFERED));
    }
}

/* Goal: a load split over threads and ranges of keys gives the same records
 * as a load in one go, from tables that overlap and hold tombstones, and
 * from logs alone. Method: digest, count, verify, with 1, 2, 5, 64 threads. */
static void check_load(struct unit *u, const struct kvmeta_options *from,
                       struct kvmeta_digest digest, uint64_t count)
{
    static const uint32_t threads[] = {1, 2, 5, 64, 0};
    struct kvmeta_options options = *from;
    kvmeta *db;
    size_t i;

    for (i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        options.open_threads = threads[i];
        options.flags = KVMETA_READ_ONLY;
        db = unit_open(u, &options);
        unit_same_digest(kvmeta_digest(db), digest);
        assert_true(kvmeta_count(db) == count);
        unit_ok(kvmeta_verify(db, NULL));
        unit_close(db);
    }
}

static void loads_by_several_threads_agree(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 20, 4);
    struct kvmeta_digest digest;
    unsigned char key[20];
    uint64_t i, count;
    kvmeta *db;

    options.flags = KVMETA_NO_THREAD;
    options.space_amp_max = 100;
    db = unit_open(u, &options);
    large_fill(db, 0, large(), 0);
    digest = kvmeta_digest(db);
    unit_close(db);
    check_load(u, &options, digest, large());

    db = unit_open(u, &options);
    unit_ok(kvmeta_flush(db));
    large_fill(db, large() / 3, large(), 5);
    unit_ok(kvmeta_flush(db));
    for (i = 0; i < large(); i += 3) {
        large_key(i, key);
        unit_ok(kvmeta_remove(db, key, KVMETA_BUFFERED));
    }
    unit_ok(kvmeta_flush(db));
    large_fill(db, 0, 1000, 9);
    digest = kvmeta_digest(db);
    count = kvmeta_count(db);
    assert_true(unit_stats(db).tables >= 3);
    unit_close(db);
    check_load(u, &options, digest, count);
}

/* Goal: a range of keys gets what is in the middle of a table's first block,
 * too. Method: the ranges are those of a large table; a younger one has two
 * blocks, of which the first holds most of all keys. */
static void a_range_may_begin_within_a_first_block(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_digest digest;
    kvmeta *db;
    uint64_t i;

    options.space_amp_max = 100;
    options.vfs = unit_unsynced(u);
    db = unit_open(u, &options);
    unit_fill(db, 0, 200000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    for (i = 0; i < 10000; i++)
        unit_fill(db, 20 * i, 20 * i + 1, 1, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    assert_true(unit_stats(db).tables == 2);
    digest = kvmeta_digest(db);
    unit_close(db);
    options.open_threads = 4;
    db = unit_open(u, &options);
    unit_same_digest(kvmeta_digest(db), digest);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Memory that changed by itself
 * -------------------------------------------------------------------------- */

/* Goal: verify finds a bit that flipped in memory. Method: the address of a
 * value that a cursor gives, written to behind the store's back, and put
 * right again. */
static void verify_finds_damaged_memory(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_error err;
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;
    const void *value;
    unsigned char *byte;

    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_ok(kvmeta_cursor_open(snapshot, &cursor));
    unit_ok(kvmeta_cursor_first(cursor));
    value = kvmeta_cursor_value(cursor);
    memcpy(&byte, &value, sizeof byte);
    kvmeta_cursor_close(cursor);
    kvmeta_snapshot_release(snapshot);
    unit_ok(kvmeta_verify(db, &err));
    *byte ^= 4;
    unit_is(kvmeta_verify(db, &err), KVMETA_E_CORRUPT);
    assert_int_equal(err.code, KVMETA_E_CORRUPT);
    *byte ^= 4;
    unit_ok(kvmeta_verify(db, &err));
    unit_close(db);
}

/* Goal: damaged memory is never written to disk as the truth: a heal from it
 * is refused, for good, and the next open finds what the disk has. */
static void a_heal_from_damaged_memory_is_refused(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    kvmeta_snapshot *snapshot;
    kvmeta_cursor *cursor;
    unsigned char *byte, key[8] = {0};
    const void *value;
    char name[64];
    int did;

    unit_fill(db, 0, 1000, 0, KVMETA_BUFFERED);
    unit_ok(kvmeta_flush(db));
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    unit_ok(kvmeta_cursor_open(snapshot, &cursor));
    unit_ok(kvmeta_cursor_last(cursor));
    value = kvmeta_cursor_value(cursor);
    memcpy(&byte, &value, sizeof byte);
    kvmeta_cursor_close(cursor);
    kvmeta_snapshot_release(snapshot);
    assert_true(unit_find(u, ".tab", 0, name));
    unit_flip(u, name, unit_size(u, name) / 2);
    unit_is(kvmeta_verify(db, NULL), KVMETA_E_CORRUPT);
    *byte ^= 4;
    unit_is(kvmeta_step(db, &did), KVMETA_E_CORRUPT);
    unit_is(kvmeta_last_error(db, NULL), KVMETA_E_CORRUPT);
    unit_is(kvmeta_put(db, key, key, 0), KVMETA_E_FAILED);
    kvmeta_close(db);
    unit_flip(u, name, unit_size(u, name) / 2);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 1000);
    unit_holds(db, 0, 1000, 0);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_torn_tail_is_dropped_and_counted),
    UNIT_CASE(a_damaged_durable_tail_is_corrupt),
    UNIT_CASE(a_log_of_a_newer_manifest_is_evidence),
    UNIT_CASE(an_unlisted_file_of_another_store_is_not_deleted),
    UNIT_CASE(loads_by_several_threads_agree),
    UNIT_CASE(a_range_may_begin_within_a_first_block),
    UNIT_CASE(verify_finds_damaged_memory),
    UNIT_CASE(a_heal_from_damaged_memory_is_refused),
};

UNIT_MAIN(cases)
