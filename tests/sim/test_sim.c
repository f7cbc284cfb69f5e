/*
 * Tests of the simulated file system itself: what the crash tests prove is
 * worth no more than the cuts they are given.
 *
 * SPDX-License-Identifier: MIT
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "sim.h"

#define CREATE (KVMETA_VFS_WRITE | KVMETA_VFS_CREATE)

static int in_dir(struct sim_fs *fs)
{
    int dir = -1;

    assert_int_equal(fs->vfs.dir_create(fs, SIM_DIR), 0);
    assert_int_equal(fs->vfs.dir_sync_parent(fs, SIM_DIR), 0);
    assert_int_equal(fs->vfs.dir_open(fs, SIM_DIR, &dir), 0);
    return dir;
}

static int make_file(struct sim_fs *fs, int dir, const char *name)
{
    int file = -1;

    assert_int_equal(fs->vfs.file_open(fs, dir, name, CREATE, &file), 0);
    return file;
}

static void fill(struct sim_fs *fs, int file, int byte, size_t bytes,
                 uint64_t off)
{
    unsigned char data[4096];

    memset(data, byte, sizeof data);
    assert_true(bytes <= sizeof data);
    assert_int_equal(fs->vfs.file_write(fs, file, data, bytes, off),
                     (int64_t)bytes);
}

/* The byte that fills a file's cell, -1 past the end, -2 when it is mixed. */
static int cell_of(const struct sim_fs *fs, const char *name, size_t cell)
{
    uint64_t bytes;
    unsigned char *data = sim_file_get(fs, name, &bytes);
    int result = -1;
    size_t i;

    if (data != NULL && bytes >= (cell + 1) * fs->cell_bytes) {
        result = data[cell * fs->cell_bytes];
        for (i = 0; i < fs->cell_bytes; i++) {
            if (data[cell * fs->cell_bytes + i] != result) {
                result = -2;
                break;
            }
        }
    }
    free(data);
    return result;
}

/* Goal: after a sync of file and directory there is one state only, the
 * current one. Method: walk the cuts with garbage on. */
static void synced_content_survives_every_cut(void **state)
{
    struct sim_fs fs, cut_fs;
    struct sim_cut cut;
    int dir, file;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    fill(&fs, file, 7, 1024, 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    sim_cut_begin(&cut, &fs, 100, 1, 1);
    assert_int_equal(sim_cut_next(&cut, &cut_fs), 1);
    assert_int_equal(sim_hash(&cut_fs), sim_hash(&fs));
    sim_free(&cut_fs);
    assert_int_equal(sim_cut_next(&cut, &cut_fs), 0);
    sim_cut_end(&cut);
    sim_free(&fs);
}

/* Goal: two un-synced cells, one of them written twice, leave 2 x 3 states,
 * each of them once. Method: count them by what the cells hold. */
static void unsynced_cells_survive_in_every_combination(void **state)
{
    struct sim_fs fs, cut_fs;
    struct sim_cut cut;
    int dir, file, seen[3][2] = {{0}};

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    fill(&fs, file, 9, 1024, 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    fill(&fs, file, 1, 1024, 0);
    fill(&fs, file, 2, 512, 0);
    sim_cut_begin(&cut, &fs, 100, 0, 1);
    while (sim_cut_next(&cut, &cut_fs)) {
        int a = cell_of(&cut_fs, "a", 0), b = cell_of(&cut_fs, "a", 1);

        assert_true(a == 9 || a == 1 || a == 2);
        assert_true(b == 9 || b == 1);
        seen[a == 9 ? 0 : a][b == 9 ? 0 : 1]++;
        sim_free(&cut_fs);
    }
    for (int i = 0; i < 6; i++) {
        assert_int_equal(seen[i / 2][i % 2], 1);
    }
    sim_cut_end(&cut);
    sim_free(&fs);
}

/* Goal: a renamed name and its target are old or new each on its own until
 * the directory is synced. Method: count the four states of tmp and main. */
static void rename_reaches_the_disk_name_by_name(void **state)
{
    struct sim_fs fs, cut_fs;
    struct sim_cut cut;
    int dir, file, seen[2][2] = {{0}};

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "main");
    fill(&fs, file, 1, 512, 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    file = make_file(&fs, dir, "tmp");
    fill(&fs, file, 2, 512, 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    assert_int_equal(fs.vfs.rename(&fs, dir, "tmp", "main"), 0);
    sim_cut_begin(&cut, &fs, 100, 1, 1);
    while (sim_cut_next(&cut, &cut_fs)) {
        int main_is = cell_of(&cut_fs, "main", 0);
        int tmp_is = cell_of(&cut_fs, "tmp", 0);

        assert_true(main_is == 1 || main_is == 2);
        assert_true(tmp_is == -1 || tmp_is == 2);
        seen[main_is - 1][tmp_is == 2]++;
        sim_free(&cut_fs);
    }
    for (int i = 0; i < 4; i++) {
        assert_int_equal(seen[i / 2][i % 2], 1);
    }
    sim_cut_end(&cut);
    sim_free(&fs);
}

/* Goal: a file that grew un-synced is short or long, and a long one may lack
 * the new content. Method: look for each of the three among the cuts. */
static void unsynced_size_is_kept_or_not(void **state)
{
    struct sim_fs fs, cut_fs;
    struct sim_cut cut;
    int dir, file, short_seen = 0, hole_seen = 0, whole_seen = 0;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    fill(&fs, file, 5, 512, 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    fill(&fs, file, 6, 512, 512);
    sim_cut_begin(&cut, &fs, 100, 0, 1);
    while (sim_cut_next(&cut, &cut_fs)) {
        int b = cell_of(&cut_fs, "a", 1);

        assert_int_equal(cell_of(&cut_fs, "a", 0), 5);
        short_seen += b == -1;
        hole_seen += b == 0;
        whole_seen += b == 6;
        sim_free(&cut_fs);
    }
    assert_true(short_seen > 0);
    assert_int_equal(hole_seen, 1);
    assert_int_equal(whole_seen, 1);
    sim_cut_end(&cut);
    sim_free(&fs);
}

/* Goal: content whose sync failed reads well and is never durable, whatever
 * is synced later; content written after it is. Method: fail one sync, write
 * another cell, sync again, cut, and kill. */
static void failed_sync_loses_its_cells_for_good(void **state)
{
    struct sim_fault fault = {1, SIM_FILE_SYNC, EIO, 0, 0, 0, 0, 0, 0};
    struct sim_fs fs, cut_fs, kill_fs;
    struct sim_cut cut;
    int dir, file;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    fill(&fs, file, 1, 1024, 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    fill(&fs, file, 2, 512, 0);
    sim_set_fault(&fs, fault);
    assert_int_equal(fs.vfs.file_sync(&fs, file), EIO);
    fill(&fs, file, 3, 512, 512);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(cell_of(&fs, "a", 0), 2);
    sim_clone(&kill_fs, &fs);
    assert_int_equal(cell_of(&kill_fs, "a", 0), 2);
    sim_free(&fs);
    sim_cut_begin(&cut, &kill_fs, 100, 1, 1);
    while (sim_cut_next(&cut, &cut_fs)) {
        assert_int_equal(cell_of(&cut_fs, "a", 0), 1);
        assert_int_equal(cell_of(&cut_fs, "a", 1), 3);
        sim_free(&cut_fs);
    }
    sim_cut_end(&cut);
    sim_free(&kill_fs);
}

/* Goal: garbage hits un-synced cells, and in a large cell that is not
 * written as one only the sectors that changed. Method: change one sector of
 * a 4096-byte cell, and look at the rest in many cuts. */
static void garbage_stays_where_something_was_written(void **state)
{
    struct sim_fs fs, cut_fs;
    struct sim_cut cut;
    int dir, file, damaged = 0;

    (void)state;
    sim_init(&fs, 4096, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    fill(&fs, file, 5, 4096, 0);
    fill(&fs, file, 5, 4096, 4096);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    for (uint64_t seed = 0; seed < 50; seed++) {
        fill(&fs, file, 6, 512, 1024);
        sim_cut_begin(&cut, &fs, 3, 1, seed);
        while (sim_cut_next(&cut, &cut_fs)) {
            uint64_t bytes, i;
            unsigned char *data = sim_file_get(&cut_fs, "a", &bytes);

            assert_int_equal(bytes, 8192);
            for (i = 0; i < bytes; i++) {
                if (i < 1024 || i >= 1536) {
                    assert_int_equal(data[i], 5);
                } else {
                    damaged += data[i] != 5 && data[i] != 6;
                }
            }
            free(data);
            sim_free(&cut_fs);
        }
        sim_cut_end(&cut);
    }
    assert_true(damaged > 0);
    sim_free(&fs);
}

/* Goal: a walk that cannot list all states still has the empty and the full
 * one. Method: 30 un-synced cells, 20 states. */
static void large_cuts_hold_nothing_and_everything(void **state)
{
    struct sim_fs fs, cut_fs;
    struct sim_cut cut;
    int dir, file, none = 0, all = 0, count = 0;
    uint64_t empty, full;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    assert_int_equal(fs.vfs.file_truncate(&fs, file, 16384), 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    empty = sim_hash(&fs);
    for (int i = 0; i < 30; i++) {
        fill(&fs, file, i + 1, 512, 512 * (uint64_t)i);
    }
    full = sim_hash(&fs);
    sim_cut_begin(&cut, &fs, 20, 1, 1);
    assert_int_equal(cut.exhaustive, 0);
    while (sim_cut_next(&cut, &cut_fs)) {
        none += sim_hash(&cut_fs) == empty;
        all += sim_hash(&cut_fs) == full;
        count++;
        sim_free(&cut_fs);
    }
    assert_int_equal(count, 20);
    assert_true(none >= 1);
    assert_true(all >= 1);
    sim_cut_end(&cut);
    sim_free(&fs);
}

/* Goal: locks exclude a second handle and end with the first; handles that
 * are left open, closed twice or misused are noticed. Method: do each. */
static void locks_and_handles_are_watched(void **state)
{
    struct sim_fs fs;
    int dir, a, b;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    a = make_file(&fs, dir, "LOCK");
    assert_int_equal(fs.vfs.file_open(&fs, dir, "LOCK", 0, &b), 0);
    assert_int_equal(fs.vfs.file_lock(&fs, a), 0);
    assert_int_equal(fs.vfs.file_lock(&fs, b), EWOULDBLOCK);
    assert_int_equal(sim_open_handles(&fs), 3);
    assert_int_equal(fs.vfs.file_close(&fs, a), 0);
    assert_int_equal(fs.vfs.file_lock(&fs, b), 0);
    assert_int_equal(fs.misuses, 0);
    assert_int_equal(fs.vfs.file_close(&fs, a), EBADF);
    assert_int_equal(fs.vfs.file_truncate(&fs, b, 0), EBADF);
    assert_int_equal(fs.misuses, 2);
    assert_int_equal(fs.vfs.file_close(&fs, b), 0);
    assert_int_equal(fs.vfs.dir_close(&fs, dir), 0);
    assert_int_equal(sim_open_handles(&fs), 0);
    sim_free(&fs);
}

/* Goal: nothing changes past the crash point and every call fails. Method:
 * crash before the second of two writes. */
static void nothing_changes_past_the_crash_point(void **state)
{
    struct sim_fs fs;
    unsigned char byte = 1;
    int dir, file;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    fs.crash_at = fs.ops + 1;
    fill(&fs, file, 1, 512, 0);
    assert_int_equal(fs.vfs.file_write(&fs, file, &byte, 1, 512),
                     -SIM_CRASHED);
    assert_int_equal(fs.vfs.file_sync(&fs, file), SIM_CRASHED);
    assert_int_equal(fs.vfs.unlink(&fs, dir, "a"), SIM_CRASHED);
    fs.vfs.file_close(&fs, file);
    fs.vfs.dir_close(&fs, dir);
    assert_int_equal(sim_open_handles(&fs), 0);
    assert_int_equal(cell_of(&fs, "a", 0), 1);
    assert_int_equal(cell_of(&fs, "a", 1), -1);
    sim_free(&fs);
}

/* Goal: the directory itself is lost with all in it when its entry was not
 * synced. Method: sync a file in it, but not the parent. */
static void directory_needs_its_parent_synced(void **state)
{
    struct sim_fs fs, cut_fs;
    struct sim_cut cut;
    int dir, file, gone = 0, there = 0;

    (void)state;
    sim_init(&fs, 512, 1);
    assert_int_equal(fs.vfs.dir_create(&fs, SIM_DIR), 0);
    assert_int_equal(fs.vfs.dir_open(&fs, SIM_DIR, &dir), 0);
    file = make_file(&fs, dir, "a");
    fill(&fs, file, 1, 512, 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.dir_sync(&fs, dir), 0);
    sim_cut_begin(&cut, &fs, 100, 0, 1);
    while (sim_cut_next(&cut, &cut_fs)) {
        there += cut_fs.dir_current && cell_of(&cut_fs, "a", 0) == 1;
        gone += !cut_fs.dir_current && cell_of(&cut_fs, "a", 0) == -1;
        sim_free(&cut_fs);
    }
    assert_int_equal(gone, 1);
    assert_int_equal(there, 1);
    sim_cut_end(&cut);
    sim_free(&fs);
}

/* Goal: faults hit the call they are set on, once or for ever, and short
 * transfers move a part. Method: a short write, then failing syncs. */
static void faults_hit_the_chosen_call(void **state)
{
    struct sim_fault second = {2, SIM_FILE_WRITE, 0, 0, 0, 0, 0, 0, 0};
    struct sim_fault ever = {2, SIM_FILE_SYNC, ENOSPC, 1, 0, 0, 0, 0, 0};
    struct sim_fault full = {1, SIM_FILE_WRITE, ENOSPC, 0, 1, 0, 0, 0, 0};
    struct sim_fs fs;
    unsigned char data[100] = {0};
    int dir, file;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    sim_set_fault(&fs, second);
    assert_int_equal(fs.vfs.file_write(&fs, file, data, 100, 0), 100);
    assert_int_equal(fs.vfs.file_write(&fs, file, data, 100, 0), 50);
    assert_int_equal(fs.vfs.file_write(&fs, file, data, 100, 0), 100);
    assert_int_equal(fs.fault.hits, 1);
    sim_set_fault(&fs, ever);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.file_sync(&fs, file), ENOSPC);
    assert_int_equal(fs.vfs.file_sync(&fs, file), ENOSPC);
    sim_clear_fault(&fs);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    sim_set_fault(&fs, full);
    assert_int_equal(fs.vfs.file_write(&fs, file, data, 100, 0), 50);
    assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
    assert_int_equal(fs.vfs.file_write(&fs, file, data, 50, 50), -ENOSPC);
    assert_int_equal(fs.vfs.file_write(&fs, file, data, 50, 50), 50);
    sim_free(&fs);
}

/* Goal: reads see what a plain array of bytes would hold, through writes,
 * truncations, syncs and clones. Method: random operations beside one. */
static void content_matches_a_plain_array(void **state)
{
    enum { BYTES = 9000 };
    static unsigned char plain[BYTES], data[BYTES], back[BYTES];
    struct test_rng rng = {test_args.seed};
    struct sim_fs fs;
    uint64_t size = 0, at, n, i;
    int dir, file;

    (void)state;
    sim_init(&fs, 512, 1);
    dir = in_dir(&fs);
    file = make_file(&fs, dir, "a");
    memset(plain, 0, sizeof plain);
    for (i = 0; i < 3000 + 3000 * test_args.scale; i++) {
        at = test_rng_below(&rng, BYTES);
        n = test_rng_below(&rng, BYTES - at) + 1;
        switch (test_rng_below(&rng, 5)) {
        case 0:
            assert_int_equal(fs.vfs.file_truncate(&fs, file, at), 0);
            memset(plain + at, 0, BYTES - at);
            size = at;
            break;
        case 1:
            assert_int_equal(fs.vfs.file_sync(&fs, file), 0);
            break;
        default:
            memset(data, (int)test_rng_below(&rng, 3), n);
            assert_int_equal(fs.vfs.file_write(&fs, file, data, n, at),
                             (int64_t)n);
            memcpy(plain + at, data, n);
            size = at + n > size ? at + n : size;
            break;
        }
        assert_int_equal(fs.vfs.file_read(&fs, file, back, BYTES, 0),
                         (int64_t)size);
        if (memcmp(back, plain, size) != 0) {
            test_replay("(step %llu)", (unsigned long long)i);
            fail();
        }
    }
    sim_free(&fs);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(synced_content_survives_every_cut),
        cmocka_unit_test(unsynced_cells_survive_in_every_combination),
        cmocka_unit_test(rename_reaches_the_disk_name_by_name),
        cmocka_unit_test(unsynced_size_is_kept_or_not),
        cmocka_unit_test(failed_sync_loses_its_cells_for_good),
        cmocka_unit_test(garbage_stays_where_something_was_written),
        cmocka_unit_test(large_cuts_hold_nothing_and_everything),
        cmocka_unit_test(locks_and_handles_are_watched),
        cmocka_unit_test(nothing_changes_past_the_crash_point),
        cmocka_unit_test(directory_needs_its_parent_synced),
        cmocka_unit_test(faults_hit_the_chosen_call),
        cmocka_unit_test(content_matches_a_plain_array),
    };

    test_parse_args(argc, argv);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
