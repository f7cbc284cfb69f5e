/*
 * Open: who may, and what stands in the way. After an answer that the header
 * lists as harmless the directory is byte for byte what it was.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

static void check_store(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    assert_true(kvmeta_count(db) == 400);
    unit_holds(db, 0, 400, 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * Widths and existence
 * -------------------------------------------------------------------------- */

/* Goal: other widths are an answer of their own and change nothing. */
static void other_widths_are_a_mismatch(struct unit *u)
{
    struct kvmeta_options options;

    unit_make_store(u, 1, 300, 400);
    options = unit_options(u, 9, 8);
    unit_open_fails(u, &options, KVMETA_E_MISMATCH);
    options = unit_options(u, 8, 7);
    unit_open_fails(u, &options, KVMETA_E_MISMATCH);
    options = unit_options(u, 8, 0);
    options.flags = KVMETA_READ_ONLY;
    unit_open_fails(u, &options, KVMETA_E_MISMATCH);
    check_store(u);
}

/* Goal: MUST_EXIST and READ_ONLY create neither directory nor store. */
static void a_missing_store_is_not_created_when_it_must_exist(struct unit *u)
{
    static const uint32_t flags[] = {KVMETA_MUST_EXIST, KVMETA_READ_ONLY,
                                     KVMETA_MUST_EXIST | KVMETA_READ_ONLY,
                                     KVMETA_MUST_EXIST | KVMETA_NO_THREAD};
    struct kvmeta_options options = unit_options(u, 8, 8);
    size_t i;

    for (i = 0; i < 4; i++) {
        options.flags = flags[i];
        unit_open_fails(u, &options, KVMETA_NOT_FOUND);
    }
    assert_int_equal(mkdir(u->dir, 0700), 0);
    unit_write_path(unit_path(u, "notes.txt"), "mine", 4);
    for (i = 0; i < 4; i++) {
        options.flags = flags[i];
        unit_open_fails(u, &options, KVMETA_NOT_FOUND);
        assert_int_equal(u->err.sys_errno, 0);
    }
}

/* Goal: MUST_EXIST opens what is there; new files are for their owner only. */
static void must_exist_opens_what_is_there(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_image image;
    struct stat st;
    size_t i;

    unit_make_store(u, 1, 300, 400);
    options.flags |= KVMETA_MUST_EXIST;
    unit_close(unit_open(u, &options));
    assert_int_equal(stat(u->dir, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    unit_image_take(u->dir, &image);
    assert_true(image.count >= 3);
    for (i = 0; i < image.count; i++) {
        assert_int_equal(image.files[i].mode, S_IFREG | 0600);
    }
    unit_image_free(&image);
}

/* Goal: parents are the caller's business; a path that is a file is no
 * store. The errno is in the error. */
static void a_missing_parent_is_an_error_with_its_errno(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);

    snprintf(u->dir, sizeof u->dir, "%s/no/store", u->top);
    unit_open_fails(u, &options, KVMETA_E_IO);
    assert_int_equal(u->err.sys_errno, ENOENT);
    snprintf(u->dir, sizeof u->dir, "%s/file", u->top);
    unit_write_path(u->dir, "x", 1);
    unit_open_fails(u, &options, KVMETA_E_IO);
    assert_int_equal(u->err.sys_errno, ENOTDIR);
}

/* Goal: open and close without a write change nothing on disk. */
static void open_and_close_without_writes_change_nothing(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct unit_image before, after;

    unit_make_store(u, 1, 300, 400);
    check_store(u);
    unit_image_take(u->dir, &before);
    unit_close(unit_open(u, &options));
    options.flags = KVMETA_NO_THREAD;
    unit_close(unit_open(u, &options));
    unit_image_take(u->dir, &after);
    unit_image_same(&before, &after);
    unit_image_free(&before);
    unit_image_free(&after);
}

/* --------------------------------------------------------------------------
 * One owner
 * -------------------------------------------------------------------------- */

static int open_code(void *arg)
{
    struct unit *u = arg;
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = NULL;
    int rc = kvmeta_open(u->dir, &options, &db, NULL);

    if (rc == KVMETA_OK) {
        kvmeta_close(db);
    }
    return rc == KVMETA_OK ? 0 : -rc;
}

/* Goal: a second opener is told so, in this process and in another, for
 * writing and for reading; after the close the store is free. */
static void a_second_opener_is_busy(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    unit_fill(db, 0, 10, 0, 0);
    unit_open_fails(u, &options, KVMETA_E_BUSY);
    options.flags = KVMETA_READ_ONLY;
    unit_open_fails(u, &options, KVMETA_E_BUSY);
    options.flags = KVMETA_MUST_EXIST;
    unit_open_fails(u, &options, KVMETA_E_BUSY);
    assert_int_equal(unit_in_child(open_code, u), -KVMETA_E_BUSY);
    unit_fill(db, 10, 20, 0, 0);
    unit_close(db);
    assert_int_equal(unit_in_child(open_code, u), 0);
    options.flags = KVMETA_READ_ONLY;
    db = unit_open(u, &options);
    unit_open_fails(u, &options, KVMETA_E_BUSY);
    assert_int_equal(unit_in_child(open_code, u), -KVMETA_E_BUSY);
    unit_close(db);
}

/* Another process that makes the store first: when this one locks LOCK. */
static struct unit *faster;

static int lock_after_another(void *user, int file)
{
    struct unit *u = faster;

    (void)user;
    if (u) {
        faster = NULL;
        unit_make_store(u, 1, 300, 400);
    }
    return kvmeta_vfs_posix()->file_lock(NULL, file);
}

/* Goal: of two that find no store one makes it, and the other opens that. */
static void a_store_that_another_makes_meanwhile_is_opened(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();
    kvmeta *db;

    vfs.file_lock = lock_after_another;
    options.vfs = &vfs;
    faster = u;
    db = unit_open(u, &options);
    assert_null(faster);
    unit_holds(db, 0, 400, 0);
    assert_true(kvmeta_count(db) == 400);
    unit_close(db);
}

/* Another process that makes the directory, or a file of its name, first. */
static int create_after_another(void *user, const char *path)
{
    (void)user;
    if (faster) {
        assert_int_equal(mkdir(path, 0700), 0);
    } else {
        unit_write_path(path, "x", 1);
    }
    faster = NULL;
    return kvmeta_vfs_posix()->dir_create(NULL, path);
}

/* Goal: of two that find no directory one makes it, and both go on; what is no
 * directory is left alone. */
static void a_directory_that_another_makes_meanwhile_is_used(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();
    kvmeta *db = NULL;

    vfs.dir_create = create_after_another;
    options.vfs = &vfs;
    faster = u;
    db = unit_open(u, &options);
    assert_null(faster);
    unit_fill(db, 0, 10, 0, 0);
    unit_close(db);
    unit_remove_tree(u->dir);
    unit_is(kvmeta_open(u->dir, &options, &db, &u->err), KVMETA_E_IO);
    assert_int_equal(u->err.sys_errno, ENOTDIR);
    assert_int_equal(unlink(u->dir), 0);
}

/* The id of the newest log or table. */
static unsigned long long newest_id(struct unit *u)
{
    static const char *const suffixes[] = {".wal", ".tab"};
    unsigned long long id = 0, n;
    char name[64];
    size_t i, k;

    for (k = 0; k < 2; k++) {
        for (i = 0; unit_find(u, suffixes[k], i, name); i++) {
            n = strtoull(name + 1, NULL, 16);
            id = n > id ? n : id;
        }
    }
    return id;
}

/* Another process that has LOCK until now, and ends: it leaves a file of ours
 * that is not listed, or deletes one. */
static const char *leaves, *deletes;

static int lock_after_a_life(void *user, int file)
{
    struct unit *u = faster;

    (void)user;
    faster = NULL;
    if (u && leaves) unit_write_path(unit_path(u, leaves), "x", 1);
    if (u && deletes) assert_int_equal(unlink(unit_path(u, deletes)), 0);
    return kvmeta_vfs_posix()->file_lock(NULL, file);
}

/* Goal: what an open knows of the directory is from the time when it had LOCK:
 * a file that is gone is not missed, and the id of a new one is not given out
 * again. Method: the id is the next one. */
static void a_directory_is_listed_under_its_lock(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();
    kvmeta *db = NULL;
    char name[64];
    int round;

    vfs.file_lock = lock_after_a_life;
    unit_make_store(u, 1, 300, 400);
    options.vfs = &vfs;
    for (round = 0; round < 2; round++) {
        snprintf(name, sizeof name, "w%016llx.wal", newest_id(u) + 1);
        if (round) unit_write_path(unit_path(u, name), "x", 1);
        leaves = round ? NULL : name;
        deletes = round ? name : NULL;
        faster = u;
        db = unit_open(u, &options);
        assert_null(faster);
        assert_int_equal(unit_stats(db).open_garbage_files, round ? 0 : 1);
        unit_fill(db, 0, 400, 0, KVMETA_WRITTEN);
        unit_ok(kvmeta_flush(db));
        unit_close(db);
        check_store(u);
    }
}

/* Somebody removes LOCK whenever the directory is about to be listed. */
static int removals;

static int list_without_lock(void *user, int dir,
                             int (*fn)(void *arg, const char *name), void *arg)
{
    (void)user;
    if (unlinkat(dir, "LOCK", 0) == 0) removals++;
    return kvmeta_vfs_posix()->dir_list(NULL, dir, fn, arg);
}

/* Goal: an open that never finds the LOCK that it has made gives up and says
 * so: no handle comes with OK that is not there. */
static void a_lock_that_is_removed_again_is_busy(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();
    kvmeta *db = NULL;

    unit_make_store(u, 1, 300, 400);
    vfs.dir_list = list_without_lock;
    options.vfs = &vfs;
    removals = 0;
    unit_is(kvmeta_open(u->dir, &options, &db, &u->err), KVMETA_E_BUSY);
    assert_int_equal(u->err.code, KVMETA_E_BUSY);
    assert_non_null(strstr(u->err.message, "LOCK"));
    assert_int_equal(removals, 2);
    assert_null(db);
    check_store(u);
    assert_int_equal(unlink(unit_path(u, "LOCK")), 0);
    check_store(u);
}

static int dir_closes;

static int open_no_dir(void *user, const char *path, int *dir)
{
    (void)user, (void)path;
    *dir = 77;
    return EIO;
}

static int count_dir_close(void *user, int dir)
{
    (void)user, (void)dir;
    dir_closes++;
    return 0;
}

/* Goal: a directory that could not be opened is not closed, whatever the call
 * has left behind. */
static void a_directory_that_does_not_open_is_not_closed(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();

    vfs.dir_open = open_no_dir;
    vfs.dir_close = count_dir_close;
    options.vfs = &vfs;
    dir_closes = 0;
    unit_open_fails(u, &options, KVMETA_E_IO);
    assert_int_equal(dir_closes, 0);
}

/* Fails the read `fail_read_at` from now; 0: none. */
static int fail_read_at;

static int64_t read_or_fail(void *user, int file, void *buf, size_t bytes,
                            uint64_t off)
{
    (void)user;
    return fail_read_at > 0 && --fail_read_at == 0
        ? -EIO : kvmeta_vfs_posix()->file_read(NULL, file, buf, bytes, off);
}

/* Goal: each read of an open that fails makes the open fail and changes
 * nothing, those of files that the manifest does not know included. */
static void each_read_of_an_open_counts(struct unit *u)
{
    static unsigned char junk[600];
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();
    kvmeta *db = NULL;
    int at;

    unit_make_store(u, 1, 300, 400);
    unit_write_path(unit_path(u, "w00000000000000ff.wal"), junk, sizeof junk);
    unit_write_path(unit_path(u, "t00000000000000fe.tab"), junk, sizeof junk);
    vfs.file_read = read_or_fail;
    options.vfs = &vfs;
    options.flags |= KVMETA_READ_ONLY;
    for (at = 1;; at++) {
        fail_read_at = at;
        (void)kvmeta_open(u->dir, &options, &db, &u->err);
        if (fail_read_at > 0) break;
        fail_read_at = at;
        unit_open_fails(u, &options, KVMETA_E_IO);
    }
    fail_read_at = 0;
    assert_true(at > 8);
    assert_non_null(db);
    unit_close(db);
    check_store(u);
}

struct forked {
    struct unit *u;
    kvmeta *db;
    int failed;
    int no_thread;
};

static void want_forked(struct forked *forked, int rc)
{
    if (rc != KVMETA_E_FORKED) {
        forked->failed++;
    }
}

static int use_forked(void *arg)
{
    struct forked *forked = arg;
    unsigned char key[8] = {0}, value[8] = {0};
    struct kvmeta_op op = {KVMETA_OP_PUT, key, value};
    int did;

    want_forked(forked, kvmeta_put(forked->db, key, value, 0));
    want_forked(forked, kvmeta_put(forked->db, key, value, KVMETA_BUFFERED));
    want_forked(forked, kvmeta_remove(forked->db, key, 0));
    want_forked(forked, kvmeta_swap(forked->db, key, value, NULL, 0));
    want_forked(forked, kvmeta_write(forked->db, &op, 1, 0, NULL));
    want_forked(forked, kvmeta_sync(forked->db));
    want_forked(forked, kvmeta_flush(forked->db));
    want_forked(forked, kvmeta_compact(forked->db));
    want_forked(forked, kvmeta_wait_idle(forked->db));
    want_forked(forked, kvmeta_verify(forked->db, NULL));
    if (forked->no_thread) {
        want_forked(forked, kvmeta_step(forked->db, &did));
    }
    want_forked(forked, kvmeta_close(forked->db));
    return forked->failed;
}

/* Goal: a forked child can neither write through the handle nor, by closing
 * it, take the lock or the background thread from its parent. Method: the
 * child tries all writes and closes; then a stranger must still be refused. */
static void check_fork(struct unit *u, uint32_t flags)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct forked forked = {u, NULL, 0, flags == KVMETA_NO_THREAD};

    options.flags = flags;
    forked.db = unit_open(u, &options);
    unit_fill(forked.db, 0, 50, 0, KVMETA_DURABLE);
    assert_int_equal(unit_in_child(use_forked, &forked), 0);
    assert_int_equal(unit_in_child(open_code, u), -KVMETA_E_BUSY);
    unit_fill(forked.db, 50, 100, 0, KVMETA_DURABLE);
    unit_ok(kvmeta_flush(forked.db));
    unit_close(forked.db);
    options.flags = 0;
    forked.db = unit_open(u, &options);
    assert_true(kvmeta_count(forked.db) == 100);
    unit_holds(forked.db, 0, 100, 0);
    unit_close(forked.db);
    unit_remove_tree(u->dir);
}

static void a_forked_child_is_refused_and_its_parent_undisturbed(struct unit *u)
{
    check_fork(u, KVMETA_NO_THREAD);
    check_fork(u, 0);
}

/* --------------------------------------------------------------------------
 * Read-only
 * -------------------------------------------------------------------------- */

/* Goal: a read-only handle refuses every write and changes nothing, also
 * when what it found was killed and would have to be recovered. */
static void check_read_only(struct unit *u, uint64_t count)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct unit_image before, after;
    unsigned char key[8] = {0}, value[8] = {0};
    struct kvmeta_op op = {KVMETA_OP_PUT, key, value};
    kvmeta_snapshot *snapshot;
    kvmeta *db;
    int did;

    unit_image_take(u->dir, &before);
    options.flags = KVMETA_READ_ONLY | KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == count);
    unit_holds(db, 0, count, 0);
    unit_is(kvmeta_put(db, key, value, 0), KVMETA_E_READONLY);
    unit_is(kvmeta_put(db, key, value, KVMETA_BUFFERED), KVMETA_E_READONLY);
    unit_is(kvmeta_remove(db, key, 0), KVMETA_E_READONLY);
    unit_is(kvmeta_swap(db, key, value, NULL, 0), KVMETA_E_READONLY);
    unit_is(kvmeta_write(db, &op, 1, 0, NULL), KVMETA_E_READONLY);
    unit_is(kvmeta_flush(db), KVMETA_E_READONLY);
    unit_is(kvmeta_compact(db), KVMETA_E_READONLY);
    unit_is(kvmeta_wait_idle(db), KVMETA_E_READONLY);
    unit_is(kvmeta_step(db, &did), KVMETA_E_READONLY);
    unit_ok(kvmeta_snapshot_take(db, &snapshot));
    assert_true(kvmeta_snapshot_count(snapshot) == count);
    kvmeta_snapshot_release(snapshot);
    unit_ok(kvmeta_verify(db, NULL));
    unit_holds(db, 0, count, 0);
    unit_close(db);
    unit_image_take(u->dir, &after);
    unit_image_same(&before, &after);
    unit_image_free(&before);
    unit_image_free(&after);
}

/* Goal: a read-only handle tells of damage, and leaves it to others. */
static void a_read_only_store_tells_of_damage_and_heals_nothing(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_error err;
    char name[64];
    kvmeta *db;

    unit_make_store(u, 1, 300, 400);
    options.flags = KVMETA_READ_ONLY;
    db = unit_open(u, &options);
    assert_true(unit_find(u, ".wal", 0, name)
                || unit_find(u, ".tab", 0, name));
    unit_flip(u, name, unit_size(u, name) / 2);
    unit_is(kvmeta_verify(db, &err), KVMETA_E_CORRUPT);
    assert_non_null(strstr(err.message, name));
    unit_is(kvmeta_verify(db, &err), KVMETA_E_CORRUPT);
    assert_int_equal(unit_stats(db).heals, 0);
    unit_holds(db, 0, 400, 0);
    unit_close(db);
    options.flags = 0;
    unit_open_fails(u, &options, KVMETA_E_CORRUPT);
}

static void a_read_only_store_refuses_writes_and_changes_nothing(struct unit *u)
{
    struct unit_life life = {u, 400, 500, KVMETA_DURABLE, 0};

    unit_make_store(u, 1, 300, 400);
    check_read_only(u, 400);
    assert_int_equal(unit_in_child(unit_live_and_die, &life), 0);
    check_read_only(u, 500);
}

/* --------------------------------------------------------------------------
 * Files of others
 * -------------------------------------------------------------------------- */

static const char *const foreign_names[] = {
    "notes.txt", "MANIFEST.bak", "lock", "w1.wal", "w000000000000000g.wal",
    "w00000000000000001.wal", "t0000000000000001.tab.old",
    "T0000000000000001.tab", "w0000000000000001.tab", ".hidden",
    "t000000000000000A.tab",
};

#define FOREIGN_COUNT (sizeof foreign_names / sizeof foreign_names[0])

static void check_foreign(struct unit *u)
{
    unsigned char *data;
    size_t i, bytes;

    for (i = 0; i < FOREIGN_COUNT; i++) {
        data = unit_read_path(unit_path(u, foreign_names[i]), &bytes);
        assert_int_equal(bytes, strlen(foreign_names[i]));
        assert_memory_equal(data, foreign_names[i], bytes);
        free(data);
    }
}

/* Goal: a store is created beside files that kvmeta did not write, and they
 * are never touched, however much their names look like its own. */
static void files_of_others_are_never_touched(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db;
    size_t i;

    assert_int_equal(mkdir(u->dir, 0755), 0);
    for (i = 0; i < FOREIGN_COUNT; i++) {
        unit_write_path(unit_path(u, foreign_names[i]), foreign_names[i],
                        strlen(foreign_names[i]));
    }
    assert_int_equal(mkdir(unit_path(u, "subdirectory"), 0700), 0);
    db = unit_open(u, &options);
    check_foreign(u);
    unit_fill(db, 0, 100, 0, 0);
    unit_ok(kvmeta_compact(db));
    unit_close(db);
    check_foreign(u);
    db = unit_open(u, &options);
    unit_holds(db, 0, 100, 0);
    unit_fill(db, 0, 100, 1, 0);
    unit_ok(kvmeta_compact(db));
    unit_close(db);
    check_foreign(u);
    assert_int_equal(rmdir(unit_path(u, "subdirectory")), 0);
}

/* Goal: a stray file whose name has an id that no store counts up to is
 * somebody else's. The highest one that is taken for ours is deleted, and
 * ids go on above it: in a manifest that can be read, life after life. */
static void ids_beyond_all_counting_are_of_others(struct unit *u)
{
    static const char *const names[] = {
        "t3fffffffffffffff.tab", "w3fffffffffffffff.wal",
        "t1fffffffffffffff.tab", "w1fffffffffffffff.wal",
        "t1000000000000000.tab", "t0fffffffffffffff.tab"
    };
    struct kvmeta_options options = unit_quiet(u);
    size_t strangers = sizeof names / sizeof *names - 1;

    unit_make_store(u, 1, 300, 400);
    for (size_t i = 0; i <= strangers; i++)
        unit_write_path(unit_path(u, names[i]), "", 0);
    for (uint64_t life = 0; life < 4; life++) {
        kvmeta *db = unit_open(u, &options);

        unit_holds(db, 0, 400 + life, 0);
        assert_int_equal(unit_stats(db).open_garbage_files, life == 0);
        unit_fill(db, 400 + life, 401 + life, 0, KVMETA_WRITTEN);
        unit_ok(kvmeta_flush(db));
        unit_close(db);
    }
    for (size_t i = 0; i <= strangers; i++)
        assert_int_equal(access(unit_path(u, names[i]), F_OK),
                         i < strangers ? 0 : -1);
}

/* Goal: an unlisted file of ours is garbage: a read-only open leaves it, the
 * next successful read-write open deletes it and counts it. */
static void unlisted_files_of_ours_are_deleted_and_counted(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    const char *name = "t00000000000fffff.tab";
    kvmeta *db;

    unit_make_store(u, 1, 300, 400);
    unit_write_path(unit_path(u, name), "half a table", 12);
    unit_write_path(unit_path(u, "MANIFEST.tmp"), "half a manifest", 15);
    check_read_only(u, 400);
    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    assert_true(unit_stats(db).open_garbage_files >= 1);
    unit_holds(db, 0, 400, 0);
    unit_close(db);
    assert_int_equal(access(unit_path(u, name), F_OK), -1);
    assert_int_equal(access(unit_path(u, "MANIFEST.tmp"), F_OK), -1);
    check_store(u);
}

/* --------------------------------------------------------------------------
 * Error texts
 * -------------------------------------------------------------------------- */

/* Goal: messages hold names and offsets, never keys or values. Method: a
 * store full of one word, each of its files damaged at many places; neither
 * the errors nor the log may hold the word, plain or in hexadecimal. */
static void check_no_secret(const char *text)
{
    assert_null(strstr(text, "SECRET"));
    assert_null(strcasestr(text, "534543524554"));
    assert_null(strcasestr(text, "5345435245"));
}

static void damage_and_open(struct unit *u, const char *name)
{
    struct kvmeta_options options = unit_options(u, 10, 10);
    uint64_t bytes = unit_size(u, name), off;
    kvmeta *db;
    int rc;

    for (off = 0; off < bytes; off += bytes / 40 + 1) {
        unit_flip(u, name, off);
        options.flags = KVMETA_READ_ONLY;
        memset(&u->err, 0, sizeof u->err);
        rc = kvmeta_open(u->dir, &options, &db, &u->err);
        if (rc == KVMETA_OK) {
            unit_close(db);
        }
        check_no_secret(u->err.message);
        unit_flip(u, name, off);
    }
}

static void error_texts_never_hold_keys_or_values(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 10, 10);
    struct unit_image image;
    char text[11];
    kvmeta *db;
    size_t i;

    options.flags = KVMETA_NO_THREAD;
    db = unit_open(u, &options);
    for (i = 0; i < 200; i++) {
        snprintf(text, sizeof text, "SECRET%04u", (unsigned)i);
        unit_ok(kvmeta_put(db, text, text, KVMETA_DURABLE));
        if (i == 100) {
            unit_ok(kvmeta_flush(db));
        }
    }
    unit_close(db);
    unit_image_take(u->dir, &image);
    for (i = 0; i < image.count; i++) {
        damage_and_open(u, image.files[i].name);
    }
    unit_image_free(&image);
    check_no_secret(u->log);
}

/* --------------------------------------------------------------------------
 * More than can be addressed
 * -------------------------------------------------------------------------- */

/* Goal: a log whose size has more bits than a pointer is not read in part
 * and taken for whole, and one that no store writes is refused; cut to its
 * length, it opens. Method: the log of a killed process grows by a hole. */
static void a_log_that_cannot_be_addressed_is_an_error(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct unit_life life = {u, 0, 100, KVMETA_WRITTEN, 0};
    int small = sizeof(void *) == 4;
    off_t huge = ((off_t)(small ? 4 : 32) << 30) + 100;
    rlim_t limit = unit_raise_limit(RLIMIT_FSIZE);
    char name[64];
    uint64_t bytes;
    kvmeta *db;

    assert_int_equal(unit_in_child(unit_live_and_die, &life), 0);
    assert_true(unit_find(u, ".wal", 0, name));
    bytes = unit_size(u, name);
    assert_int_equal(truncate(unit_path(u, name), huge), 0);
    unit_is(kvmeta_open(u->dir, &options, &db, &u->err),
            small ? KVMETA_E_NOMEM : KVMETA_E_CORRUPT);
    assert_true(unit_size(u, name) == (uint64_t)huge);
    assert_int_equal(truncate(unit_path(u, name), (off_t)bytes), 0);
    unit_restore_limit(RLIMIT_FSIZE, limit);
    db = unit_open(u, &options);
    assert_true(kvmeta_count(db) == 100);
    unit_holds(db, 0, 100, 0);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_log_that_cannot_be_addressed_is_an_error),
    UNIT_CASE(other_widths_are_a_mismatch),
    UNIT_CASE(a_missing_store_is_not_created_when_it_must_exist),
    UNIT_CASE(must_exist_opens_what_is_there),
    UNIT_CASE(a_missing_parent_is_an_error_with_its_errno),
    UNIT_CASE(open_and_close_without_writes_change_nothing),
    UNIT_CASE(a_second_opener_is_busy),
    UNIT_CASE(a_store_that_another_makes_meanwhile_is_opened),
    UNIT_CASE(a_directory_that_another_makes_meanwhile_is_used),
    UNIT_CASE(a_directory_is_listed_under_its_lock),
    UNIT_CASE(a_lock_that_is_removed_again_is_busy),
    UNIT_CASE(a_directory_that_does_not_open_is_not_closed),
    UNIT_CASE(each_read_of_an_open_counts),
    UNIT_CASE(a_forked_child_is_refused_and_its_parent_undisturbed),
    UNIT_CASE(a_read_only_store_refuses_writes_and_changes_nothing),
    UNIT_CASE(a_read_only_store_tells_of_damage_and_heals_nothing),
    UNIT_CASE(files_of_others_are_never_touched),
    UNIT_CASE(ids_beyond_all_counting_are_of_others),
    UNIT_CASE(unlisted_files_of_ours_are_deleted_and_counted),
    UNIT_CASE(error_texts_never_hold_keys_or_values),
};

UNIT_MAIN(cases)
