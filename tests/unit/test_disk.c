/*
 * A real file system below the store, ext4 in a file: it is shut down with
 * what has not reached the disk lost, and it turns read-only under an open
 * store. Needs root, a loop device and mkfs.ext4; without, it is skipped, and
 * says so.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

#include <sys/ioctl.h>
#include <sys/sysmacros.h>

/* --------------------------------------------------------------------------
 * The disk
 * -------------------------------------------------------------------------- */

#define DISK_BYTES (24 << 20)
#define POWER_CUTS 12

/* From ext4's header, which is not installed. */
#define DISK_SHUTDOWN _IOR('X', 125, uint32_t)
#define DISK_SHUTDOWN_LOSING 2u          /* neither data nor journal go out */

#define UNIT_SKIP(u, ...)                                                     \
    do {                                                                      \
        print_message("SKIPPED: " __VA_ARGS__);                               \
        (u)->passed = 1;                                                      \
        skip();                                                               \
    } while (0)

/* Runs a command of the shell in the directory of the test. */
static int run(const struct unit *u, const char *command)
{
    char line[2 * UNIT_PATH];

    snprintf(line, sizeof line, "cd '%s' && PATH=$PATH:/sbin:/usr/sbin && "
             "{ %s; } >out 2>&1", u->top, command);
    return system(line);
}

/* Mounts it where the teardown of a test unmounts. */
static int disk_mount(const struct unit *u)
{
    return run(u, "mount -t ext4 -o loop,errors=remount-ro image full");
}

static void disk_unmount(const struct unit *u)
{
    char path[UNIT_PATH];
    int tries = 0;

    snprintf(path, sizeof path, "%s/full", u->top);
    while (umount(path) != 0 && tries++ < 100) {
        unit_sleep_ms(20);               /* something may look at new disks */
    }
    assert_in_range(tries, 0, 100);
}

static void disk_make(struct unit *u)
{
    char path[UNIT_PATH + 8];
    int fd;

    snprintf(path, sizeof path, "%s/image", u->top);
    fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, DISK_BYTES), 0);
    close(fd);
    if (run(u, "mkdir full && mkfs.ext4 -q -F image") != 0 ||
        disk_mount(u) != 0) {
        UNIT_SKIP(u, "this test needs root, mkfs.ext4 and a loop device\n");
    }
    snprintf(u->dir, sizeof u->dir, "%s/full/store", u->top);
}

/* --------------------------------------------------------------------------
 * Power cuts
 * -------------------------------------------------------------------------- */

/* Everything that the file system has not written is lost. */
static int disk_cut_power(const struct unit *u)
{
    uint32_t how = DISK_SHUTDOWN_LOSING;
    char path[UNIT_PATH];
    int fd, rc;

    snprintf(path, sizeof path, "%s/full", u->top);
    fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(fd >= 0);
    rc = ioctl(fd, DISK_SHUTDOWN, &how);
    close(fd);
    return rc;
}

/* Puts number after number, now and then with a flush, until chance ends it;
 * *durable: how many of them had to be on disk. */
static uint64_t write_some(kvmeta *db, struct test_rng *rng, uint64_t count,
                           uint64_t *durable)
{
    unsigned flags;

    while (test_rng_below(rng, 200) != 0) {
        flags = test_rng_below(rng, 4) == 0 ? KVMETA_DURABLE : KVMETA_WRITTEN;
        unit_fill(db, count, count + 1, 0, flags);
        count++;
        if (test_rng_below(rng, 60) == 0) {
            unit_ok(kvmeta_flush(db));
            *durable = count;
        }
        if (flags == KVMETA_DURABLE) *durable = count;
    }
    return count;
}

/* Writes, cuts the power off, and looks what is there. Returns the new count
 * of records. */
static uint64_t live_and_cut(struct unit *u, struct test_rng *rng,
                             uint64_t count)
{
    struct kvmeta_options options = unit_quiet(u);
    uint64_t durable = count, found;
    kvmeta *db = unit_open(u, &options);

    assert_true(kvmeta_count(db) == count);
    count = write_some(db, rng, count, &durable);
    if (disk_cut_power(u) != 0) {
        unit_close(db);
        UNIT_SKIP(u, "this ext4 cannot be shut down: %s\n", strerror(errno));
    }
    unit_is(kvmeta_put(db, "12345678", "12345678", 0), KVMETA_E_IO);
    unit_is(kvmeta_put(db, "12345678", "12345678", 0), KVMETA_E_FAILED);
    unit_holds(db, 0, count, 0);
    assert_true(kvmeta_close(db) != KVMETA_OK);
    disk_unmount(u);
    assert_int_equal(disk_mount(u), 0);
    db = unit_open(u, &options);
    found = kvmeta_count(db);
    assert_in_range(found, durable, count);
    unit_holds(db, 0, found, 0);
    unit_ok(kvmeta_verify(db, NULL));
    unit_close(db);
    return found;
}

/* Goal: what was acknowledged as durable outlives a power cut of a real file
 * system; what remains is a prefix; until the cut is noticed nothing false is
 * said. Method: ext4 is shut down without its caches and journal going out,
 * mounted again, and recovers by its own means first. */
static void a_power_cut_of_ext4_keeps_what_is_durable(struct unit *u)
{
    struct test_rng rng = {test_args.seed};
    uint64_t cuts = POWER_CUTS * (test_args.scale ? test_args.scale : 1);
    uint64_t count = 0, i;

    disk_make(u);
    for (i = 0; i < cuts; i++) {
        count = live_and_cut(u, &rng, count);
    }
    assert_true(count > 0);
    disk_unmount(u);
}

/* --------------------------------------------------------------------------
 * Read-only from one moment to the next
 * -------------------------------------------------------------------------- */

/* Lets ext4 find an error, upon which it takes no more writes, open files or
 * not: what it does when a disk breaks. */
static void disk_turn_read_only(struct unit *u)
{
    char path[UNIT_PATH];
    struct stat st;
    int fd;

    assert_int_equal(stat(u->dir, &st), 0);
    snprintf(path, sizeof path, "/sys/fs/ext4/loop%u/trigger_fs_error",
             minor(st.st_dev));
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) UNIT_SKIP(u, "there is no %s\n", path);
    assert_int_equal(write(fd, "1", 1), 1);
    close(fd);
}

/* Goal: when the disk turns read-only under an open store, writes fail for
 * good with nothing changed, reads go on, and so does the next life on a disk
 * that takes writes again. */
static void a_disk_that_turns_read_only_fails_the_writes_alone(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    struct kvmeta_digest digest;
    struct kvmeta_error err;
    kvmeta *db;

    disk_make(u);
    db = unit_open(u, &options);
    unit_fill(db, 0, 200, 0, KVMETA_WRITTEN);
    unit_ok(kvmeta_flush(db));
    unit_fill(db, 200, 300, 0, KVMETA_WRITTEN);
    unit_fill(db, 300, 301, 0, KVMETA_DURABLE);
    digest = kvmeta_digest(db);
    disk_turn_read_only(u);
    unit_is(kvmeta_put(db, "12345678", "12345678", 0), KVMETA_E_IO);
    unit_is(kvmeta_put(db, "12345678", "12345678", 0), KVMETA_E_FAILED);
    unit_is(kvmeta_sync(db), KVMETA_E_FAILED);
    unit_is(kvmeta_last_error(db, &err), KVMETA_E_IO);
    assert_int_equal(err.sys_errno, EROFS);
    unit_holds(db, 0, 301, 0);
    unit_same_digest(kvmeta_digest(db), digest);
    assert_true(kvmeta_close(db) != KVMETA_OK);
    disk_unmount(u);
    assert_int_equal(disk_mount(u), 0);
    db = unit_open(u, &options);
    unit_same_digest(kvmeta_digest(db), digest);
    unit_fill(db, 301, 400, 0, KVMETA_DURABLE);
    unit_close(db);
    disk_unmount(u);
}

static struct unit_case cases[] = {
    UNIT_CASE(a_power_cut_of_ext4_keeps_what_is_durable),
    UNIT_CASE(a_disk_that_turns_read_only_fails_the_writes_alone),
};

UNIT_MAIN(cases)
