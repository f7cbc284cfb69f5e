/*
 * What open says of a directory in which files are damaged, missing, foreign
 * or no files at all: an error that names the file, nothing changed, no hang.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

#define RECORDS 400

/* A store with a table, a sealed log and a manifest, closed. */
static void make_store(struct unit *u)
{
    unit_make_store(u, 1, 300, RECORDS);
    assert_int_equal(unit_files(u, ".tab"), 1);
    assert_int_equal(unit_files(u, ".wal"), 1);
}

static void check_store(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    assert_true(kvmeta_count(db) == RECORDS);
    unit_holds(db, 0, RECORDS, 0);
    unit_close(db);
}

static void want_corrupt(struct unit *u, const char *name)
{
    struct kvmeta_options options = unit_options(u, 8, 8);

    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    if (strstr(u->err.message, name) == NULL) {
        fail_msg("the message does not name %s: %s", name, u->err.message);
    }
}

/* --------------------------------------------------------------------------
 * Files gone or of another store
 * -------------------------------------------------------------------------- */

/* Goal: a directory with files of a store but no manifest is never taken for
 * a new one, whichever of the files are left. */
static void files_without_a_manifest_are_corrupt(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct unit_image image;
    char table[64], wal[64];

    make_store(u);
    unit_image_take(u->dir, &image);
    assert_true(unit_find(u, ".tab", 0, table));
    assert_true(unit_find(u, ".wal", 0, wal));
    assert_int_equal(unlink(unit_path(u, "MANIFEST")), 0);
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    assert_non_null(strstr(u->err.message, "MANIFEST: at 0: missing, but "
                           "there are logs or tables"));
    assert_int_equal(unlink(unit_path(u, wal)), 0);
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    assert_int_equal(unlink(unit_path(u, table)), 0);
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);    /* marks in LOCK */
    unit_image_restore(u->dir, &image);
    assert_int_equal(unlink(unit_path(u, "MANIFEST")), 0);
    assert_int_equal(unlink(unit_path(u, "LOCK")), 0);
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    options.flags = KVMETA_READ_ONLY;
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    unit_image_restore(u->dir, &image);
    check_store(u);
    unit_image_free(&image);
}

/* Goal: a listed file that is missing is named. */
static void a_missing_file_is_corrupt_and_named(struct unit *u)
{
    static const char *const suffixes[] = {".tab", ".wal"};
    struct unit_image image;
    char name[64];
    size_t i;

    make_store(u);
    unit_image_take(u->dir, &image);
    for (i = 0; i < 2; i++) {
        assert_true(unit_find(u, suffixes[i], 0, name));
        assert_int_equal(unlink(unit_path(u, name)), 0);
        want_corrupt(u, name);
        unit_image_restore(u->dir, &image);
    }
    check_store(u);
    unit_image_free(&image);
}

/* Goal: files of another store with the same widths, ids and history never
 * validate. Method: a twin store; each of its files is copied in, alone. */
static void a_file_of_another_store_is_corrupt(struct unit *u)
{
    struct unit_image mine, twin;
    size_t i;

    make_store(u);
    unit_image_take(u->dir, &mine);
    unit_remove_tree(u->dir);
    make_store(u);
    unit_image_take(u->dir, &twin);
    assert_int_equal(mine.count, twin.count);
    for (i = 0; i < mine.count; i++) {
        assert_string_equal(mine.files[i].name, twin.files[i].name);
        if (strcmp(mine.files[i].name, "LOCK") == 0) {
            continue;
        }
        unit_image_restore(u->dir, &mine);
        unit_write_path(unit_path(u, twin.files[i].name), twin.files[i].data,
                        twin.files[i].bytes);
        want_corrupt(u, strcmp(mine.files[i].name, "MANIFEST") == 0
                            ? "" : mine.files[i].name);
    }
    unit_image_restore(u->dir, &mine);
    check_store(u);
    unit_image_free(&mine);
    unit_image_free(&twin);
}

/* Goal: an older manifest is not accepted in place of the newer one: the
 * marks know better. */
static void a_stale_manifest_is_corrupt(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    unsigned char *older, *newer;
    size_t older_bytes, newer_bytes;
    kvmeta *db;

    make_store(u);
    older = unit_read_path(unit_path(u, "MANIFEST"), &older_bytes);
    db = unit_open(u, &options);
    unit_fill(db, 0, 10, 9, KVMETA_DURABLE);
    unit_close(db);
    newer = unit_read_path(unit_path(u, "MANIFEST"), &newer_bytes);
    unit_write_path(unit_path(u, "MANIFEST"), older, older_bytes);
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    unit_write_path(unit_path(u, "MANIFEST"), newer, newer_bytes);
    db = unit_open(u, &options);
    unit_holds(db, 0, 10, 9);
    unit_holds(db, 10, RECORDS, 0);
    unit_close(db);
    free(older);
    free(newer);
}

/* --------------------------------------------------------------------------
 * Damaged bytes
 * -------------------------------------------------------------------------- */

/* A message with file and place, such as "w00..2.wal: frame at 8192: ...". */
static void want_offset(struct unit *u, const char *name)
{
    const char *p = strstr(u->err.message, name);

    assert_non_null(p);
    p += strlen(name);
    if (strpbrk(p, "0123456789") == NULL) {
        fail_msg("the message has no offset: %s", u->err.message);
    }
}

/* Does the damage to a table and to a log of a store, which must be as before
 * afterwards. */
static void damage_table_and_log(struct unit *u,
                                 void (*damage)(struct unit *u,
                                                const char *name))
{
    char name[64];

    make_store(u);
    assert_true(unit_find(u, ".tab", 0, name));
    damage(u, name);
    assert_true(unit_find(u, ".wal", 0, name));
    damage(u, name);
    check_store(u);
}

static void flip_everywhere(struct unit *u, const char *name)
{
    uint64_t bytes = unit_size(u, name), step = bytes / 200 + 1, off;

    for (off = 0; off < bytes; off += off < 256 ? 1 : step) {
        unit_flip(u, name, off);
        want_corrupt(u, name);
        want_offset(u, name);
        unit_flip(u, name, off);
    }
}

/* Goal: after a clean close a flipped bit anywhere in a table or a log is
 * an error with file and offset. Method: each byte of the heads, then about
 * 200 places spread over the file. */
static void flipped_bits_of_tables_and_logs_are_corrupt(struct unit *u)
{
    damage_table_and_log(u, flip_everywhere);
}

/* Goal: the offset in a message is the right one. Method: a log's header is
 * one piece, so any flip in it is damage at 0. */
static void a_damaged_log_header_is_named_with_its_place(struct unit *u)
{
    char name[64], place[80];

    make_store(u);
    assert_true(unit_find(u, ".wal", 0, name));
    snprintf(place, sizeof place, "%s: at 0: ", name);
    unit_flip(u, name, 3);
    want_corrupt(u, name);
    assert_non_null(strstr(u->err.message, place));
    unit_flip(u, name, 3);
    check_store(u);
}

static void truncate_everywhere(struct unit *u, const char *name)
{
    uint64_t bytes = unit_size(u, name), step = bytes / 60 + 1, cut;
    struct unit_image image;

    unit_image_take(u->dir, &image);
    for (cut = 0; cut < bytes; cut += step) {
        assert_int_equal(truncate(unit_path(u, name), (off_t)cut), 0);
        want_corrupt(u, name);
        unit_image_restore(u->dir, &image);
    }
    assert_int_equal(truncate(unit_path(u, name), (off_t)bytes - 1), 0);
    want_corrupt(u, name);
    unit_image_restore(u->dir, &image);
    assert_int_equal(truncate(unit_path(u, name), (off_t)bytes + 1), 0);
    want_corrupt(u, name);
    unit_image_restore(u->dir, &image);
    unit_image_free(&image);
}

/* Goal: a file shorter or longer than it was is an error that names it. */
static void truncated_and_extended_files_are_corrupt(struct unit *u)
{
    damage_table_and_log(u, truncate_everywhere);
}

/* Goal: one damaged copy of the manifest is used around (read-only) and
 * healed (read-write), and counted; two damaged ones are an error. */
static void one_damaged_manifest_copy_heals_and_two_are_corrupt(struct unit *u)
{
    static const uint64_t copies[] = {8, 4096 + 8};
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db;
    size_t i;

    make_store(u);
    assert_true(unit_size(u, "MANIFEST") > 4096);
    for (i = 0; i < 2; i++) {
        unit_flip(u, "MANIFEST", copies[i]);
        options.flags = KVMETA_READ_ONLY;
        unit_close(unit_open(u, &options));
        options.flags = KVMETA_NO_THREAD;
        db = unit_open(u, &options);
        assert_int_equal(unit_stats(db).open_healed, 1);
        unit_close(db);
        db = unit_open(u, &options);
        assert_int_equal(unit_stats(db).open_healed, 0);
        unit_close(db);
    }
    unit_flip(u, "MANIFEST", copies[0]);
    unit_flip(u, "MANIFEST", copies[1]);
    want_corrupt(u, "MANIFEST");
    unit_flip(u, "MANIFEST", copies[0]);
    unit_flip(u, "MANIFEST", copies[1]);
    check_store(u);
}

/* Goal: damage to marks is lost evidence after a clean close, no error, and
 * no record changes. Method: every byte of both slots. */
static void damaged_marks_after_a_close_lose_nothing(struct unit *u)
{
    struct unit_image image;
    uint64_t off;

    make_store(u);
    unit_image_take(u->dir, &image);
    for (off = 0; off < 64; off += 3) {
        unit_flip(u, "LOCK", off);
        unit_flip(u, "LOCK", 4096 + off);
        check_store(u);
        unit_image_restore(u->dir, &image);
    }
    unit_image_free(&image);
}

/* --------------------------------------------------------------------------
 * A newer format
 * -------------------------------------------------------------------------- */

/* CRC32C of bytes that are to be exclusive-or'ed onto others. The checksum is
 * linear, so this is also what to exclusive-or onto theirs, whatever the seed
 * of the file is. */
static uint32_t crc_change(const unsigned char *bytes, size_t count)
{
    uint32_t crc = 0;
    int bit;

    while (count-- > 0) {
        crc ^= *bytes++;
        for (bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        }
    }
    return crc;
}

/* Sets the format version, at 8, of an image that ends in its checksum. */
static void set_version(unsigned char *image, size_t bytes,
                        unsigned char version)
{
    unsigned char *change = calloc(1, bytes);
    uint32_t crc;
    int i;

    assert_non_null(change);
    change[8] = image[8] ^ version;
    image[8] = version;
    crc = crc_change(change, bytes - 4);
    for (i = 0; i < 4; i++) {
        image[bytes - 4 + (size_t)i] ^= (unsigned char)(crc >> 8 * i);
    }
    free(change);
}

/* Length of the image of a manifest, at 12. */
static size_t manifest_image(const unsigned char *image)
{
    return image[12] | (size_t)image[13] << 8 | (size_t)image[14] << 16;
}

/* Goal: a store of a newer format, intact, is told from a damaged one, and
 * left alone. Method: the version of the manifest's copies, then that of a
 * table's header, is raised and the checksum made right again. */
static void a_newer_format_is_refused_as_such(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    unsigned char *data;
    char table[64];
    size_t bytes;

    make_store(u);
    data = unit_read_path(unit_path(u, "MANIFEST"), &bytes);
    set_version(data, manifest_image(data), 2);
    set_version(data + 4096, manifest_image(data + 4096), 2);
    unit_write_path(unit_path(u, "MANIFEST"), data, bytes);
    unit_open_fails(u, &options, KVMETA_E_VERSION);
    assert_non_null(strstr(u->err.message, "MANIFEST"));
    options.flags = KVMETA_READ_ONLY;
    unit_open_fails(u, &options, KVMETA_E_VERSION);
    set_version(data, manifest_image(data), 1);
    set_version(data + 4096, manifest_image(data + 4096), 1);
    unit_write_path(unit_path(u, "MANIFEST"), data, bytes);
    free(data);
    check_store(u);

    assert_true(unit_find(u, ".tab", 0, table));
    data = unit_read_path(unit_path(u, table), &bytes);
    set_version(data, 72, 2);
    unit_write_path(unit_path(u, table), data, bytes);
    unit_open_fails(u, &options, KVMETA_E_VERSION);
    assert_non_null(strstr(u->err.message, table));
    free(data);
}

/* Goal: where several threads load and each meets damage one is named. */
static void the_damage_of_one_thread_is_named(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    char name[64];
    kvmeta *db = unit_open(u, &options);
    uint64_t i;

    for (i = 0; i < 2; i++) {
        unit_fill(db, 0, 100, i, KVMETA_WRITTEN);
        unit_ok(kvmeta_flush(db));
    }
    unit_close(db);
    assert_int_equal(unit_files(u, ".tab"), 2);
    for (i = 0; i < 2; i++) {
        assert_true(unit_find(u, ".tab", i, name));
        unit_flip(u, name, 8);
    }
    options.open_threads = 2;
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
    assert_non_null(strstr(u->err.message, ".tab"));
}

/* --------------------------------------------------------------------------
 * What is no regular file
 * -------------------------------------------------------------------------- */

static void replace(struct unit *u, const char *name, const char *kind)
{
    char away[UNIT_PATH + 64];

    snprintf(away, sizeof away, "%s/moved-away", u->top);
    assert_int_equal(rename(unit_path(u, name), away), 0);
    if (strcmp(kind, "link") == 0) {
        assert_int_equal(symlink(away, unit_path(u, name)), 0);
    } else if (strcmp(kind, "fifo") == 0) {
        assert_int_equal(mkfifo(unit_path(u, name), 0600), 0);
    } else if (strcmp(kind, "socket") == 0) {
        assert_int_equal(mknod(unit_path(u, name), S_IFSOCK | 0600, 0), 0);
    } else {
        assert_int_equal(mkdir(unit_path(u, name), 0700), 0);
    }
}

static void restore(struct unit *u, const char *name)
{
    char away[UNIT_PATH + 64];

    snprintf(away, sizeof away, "%s/moved-away", u->top);
    assert_int_equal(remove(unit_path(u, name)), 0);
    assert_int_equal(rename(away, unit_path(u, name)), 0);
}

/* Goal: a link, a pipe, a socket or a directory in the place of a file is an
 * error with the file's name: links are not followed, pipes not waited on. The
 * alarm of every test catches a hang. */
static void links_pipes_and_directories_are_no_files(struct unit *u)
{
    static const char *const kinds[] = {"link", "fifo", "socket",
                                        "directory"};
    struct kvmeta_options options = unit_quiet(u);
    char names[4][64] = {"MANIFEST", "LOCK", "", ""};
    size_t file, kind;
    kvmeta *db;
    int rc;

    make_store(u);
    assert_true(unit_find(u, ".tab", 0, names[2]));
    assert_true(unit_find(u, ".wal", 0, names[3]));
    for (file = 0; file < 4; file++) {
        for (kind = 0; kind < 4; kind++) {
            replace(u, names[file], kinds[kind]);
            rc = kvmeta_open(u->dir, &options, &db, &u->err);
            if (rc != KVMETA_E_CORRUPT) {
                fail_msg("%s as a %s: open gives %d", names[file],
                         kinds[kind], rc);
            }
            unit_open_fails(u, &options, rc);
            assert_non_null(strstr(u->err.message, names[file]));
            restore(u, names[file]);
        }
    }
    check_store(u);
}

/* Goal: the same before there is a store: nothing is created through a link
 * or beside a pipe. */
static void a_store_is_not_created_over_links_and_pipes(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    char outside[UNIT_PATH + 64];
    kvmeta *db;

    snprintf(outside, sizeof outside, "%s/outside", u->top);
    assert_int_equal(mkdir(u->dir, 0700), 0);
    assert_int_equal(symlink(outside, unit_path(u, "LOCK")), 0);
    assert_true(kvmeta_open(u->dir, &options, &db, &u->err) < 0);
    assert_int_equal(access(outside, F_OK), -1);
    assert_int_equal(unlink(unit_path(u, "LOCK")), 0);
    assert_int_equal(mkfifo(unit_path(u, "MANIFEST"), 0600), 0);
    assert_true(kvmeta_open(u->dir, &options, &db, &u->err) < 0);
    assert_int_equal(unlink(unit_path(u, "MANIFEST")), 0);
}

static struct unit_case cases[] = {
    UNIT_CASE(files_without_a_manifest_are_corrupt),
    UNIT_CASE(a_missing_file_is_corrupt_and_named),
    UNIT_CASE(a_file_of_another_store_is_corrupt),
    UNIT_CASE(a_stale_manifest_is_corrupt),
    UNIT_CASE(flipped_bits_of_tables_and_logs_are_corrupt),
    UNIT_CASE(a_damaged_log_header_is_named_with_its_place),
    UNIT_CASE(truncated_and_extended_files_are_corrupt),
    UNIT_CASE(one_damaged_manifest_copy_heals_and_two_are_corrupt),
    UNIT_CASE(damaged_marks_after_a_close_lose_nothing),
    UNIT_CASE(a_newer_format_is_refused_as_such),
    UNIT_CASE(the_damage_of_one_thread_is_named),
    UNIT_CASE(links_pipes_and_directories_are_no_files),
    UNIT_CASE(a_store_is_not_created_over_links_and_pipes),
};

UNIT_MAIN(cases)
