/*
 * Options: the range of each field, unknown bits, and the size of the struct.
 *
 * SPDX-License-Identifier: MIT
 */
#include "unit.h"

#include <math.h>

/* --------------------------------------------------------------------------
 * Ranges, as a table: each row sets one field to one number
 * -------------------------------------------------------------------------- */

struct field_test {
    const char *name;                /* must stand in the message */
    size_t off;
    size_t bytes;
    int64_t value;
    int good;
};

#define MEMBER_BYTES(field) sizeof(((struct kvmeta_options *)0)->field)
#define FIELD(field, value, good)                                             \
    {#field, offsetof(struct kvmeta_options, field), MEMBER_BYTES(field),     \
     value, good}
#define RANGE(field, low, high)                                               \
    FIELD(field, (low) - 1, 0), FIELD(field, low, 1), FIELD(field, high, 1),  \
        FIELD(field, (high) + 1, 0)

static const struct field_test field_tests[] = {
    RANGE(key_bytes, 1, 255),
    FIELD(key_bytes, 0xffffffff, 0),
    FIELD(value_bytes, 0, 1),
    FIELD(value_bytes, 65535, 1),
    FIELD(value_bytes, 65536, 0),
    FIELD(value_bytes, 0xffffffff, 0),
    FIELD(durability, KVMETA_DURABLE, 1),
    FIELD(durability, KVMETA_WRITTEN, 1),
    FIELD(durability, KVMETA_BUFFERED, 1),
    FIELD(durability, 4, 0),
    FIELD(durability, 0xffffffff, 0),
    FIELD(sync_interval_ms, 1, 1),
    FIELD(sync_interval_ms, 3600000, 1),
    FIELD(sync_interval_ms, 3600001, 0),
    RANGE(log_buffer_bytes, 4096, 64 << 20),
    FIELD(log_align, 4, 0),
    FIELD(log_align, 7, 0),
    FIELD(log_align, 8, 1),
    FIELD(log_align, 12, 0),
    FIELD(log_align, 513, 0),
    FIELD(log_align, 65536, 1),
    FIELD(log_align, 65537, 0),
    FIELD(log_align, 131072, 0),
    FIELD(merge_ratio, 1, 1),
    FIELD(merge_ratio, 100, 1),
    FIELD(merge_ratio, 101, 0),
    RANGE(merge_window, 2, 64),
    FIELD(zstd_level, -8, 0),
    FIELD(zstd_level, -7, 1),
    FIELD(zstd_level, 19, 1),
    FIELD(zstd_level, 20, 0),
    FIELD(open_threads, 1, 1),
    FIELD(open_threads, 64, 1),
    FIELD(open_threads, 65, 0),
    FIELD(reserved, 1, 0),
    FIELD(reserved, 0x80000000, 0),
    RANGE(log_bytes_max, 64 << 10, (int64_t)4 << 30),
    FIELD(log_bytes_max, -1, 0),
    FIELD(compaction_bytes_per_s, 100000, 1),
    FIELD(compaction_bytes_per_s, -1, 1),
    FIELD(memory_bytes_max, -1, 1),
    FIELD(flags, 8, 0),
    FIELD(flags, 0x80000000, 0),
    FIELD(flags, KVMETA_NO_THREAD | 16, 0),
    FIELD(flags, KVMETA_NO_THREAD, 1),
};

static void set_field(struct kvmeta_options *options,
                      const struct field_test *test)
{
    uint32_t narrow = (uint32_t)test->value;
    uint64_t wide = (uint64_t)test->value;

    if (test->bytes == 4) {
        memcpy((unsigned char *)options + test->off, &narrow, 4);
    } else {
        memcpy((unsigned char *)options + test->off, &wide, 8);
    }
}

/* A good option must carry a store through a write, a table and a reopen. */
static void use_store(struct unit *u, const struct kvmeta_options *options)
{
    static unsigned char value[65535];
    unsigned char key[255] = {1};
    kvmeta *db = unit_open(u, options);

    unit_ok(kvmeta_put(db, key, value, 0));
    unit_ok(kvmeta_flush(db));
    unit_is(kvmeta_swap(db, key, value, NULL, 0), KVMETA_OK);
    unit_close(db);
    db = unit_open(u, options);
    assert_true(kvmeta_count(db) == 1);
    unit_close(db);
    unit_remove_tree(u->dir);
}

/* Goal: just outside of its range each option is refused, by its name, and
 * nothing is created; at its ends it works. */
static void each_option_is_refused_outside_its_range(struct unit *u)
{
    struct kvmeta_options options;
    size_t i;

    for (i = 0; i < sizeof field_tests / sizeof field_tests[0]; i++) {
        options = unit_options(u, 8, 8);
        set_field(&options, &field_tests[i]);
        if (field_tests[i].good) {
            use_store(u, &options);
            continue;
        }
        unit_open_fails(u, &options, KVMETA_E_INVALID);
        if (strstr(u->err.message, field_tests[i].name) == NULL) {
            fail_msg("the message does not name %s: %s",
                     field_tests[i].name, u->err.message);
        }
    }
}

/* Goal: the one option that is no integer: space_amp_max 1.05..100. */
static void space_amp_max_is_a_number_in_its_range(struct unit *u)
{
    static const double bad[] = {1.0499, 1, 0.5, -1, 100.1, 1e300, -0.001};
    static const double good[] = {1.05, 2, 100, 0};
    struct kvmeta_options options = unit_options(u, 8, 8);
    size_t i;

    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        options.space_amp_max = bad[i];
        unit_open_fails(u, &options, KVMETA_E_INVALID);
        assert_non_null(strstr(u->err.message, "space_amp_max"));
    }
    options.space_amp_max = (double)NAN;
    unit_open_fails(u, &options, KVMETA_E_INVALID);
    options.space_amp_max = (double)INFINITY;
    unit_open_fails(u, &options, KVMETA_E_INVALID);
    for (i = 0; i < sizeof good / sizeof good[0]; i++) {
        options.space_amp_max = good[i];
        use_store(u, &options);
    }
}

/* Goal: a refused option leaves a store that exists as it is, too. */
static void a_bad_option_does_not_touch_an_existing_store(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);

    unit_fill(db, 0, 10, 0, 0);
    unit_close(db);
    options.merge_window = 1;
    unit_open_fails(u, &options, KVMETA_E_INVALID);
    options.merge_window = 0;
    db = unit_open(u, &options);
    unit_holds(db, 0, 10, 0);
    unit_close(db);
}

/* --------------------------------------------------------------------------
 * struct_size
 * -------------------------------------------------------------------------- */

/* Goal: a struct shorter than the first release's cannot be read. */
static void struct_size_below_the_first_release_is_refused(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    size_t size;

    for (size = 0; size < sizeof options; size++) {
        options.struct_size = size;
        unit_open_fails(u, &options, KVMETA_E_INVALID);
    }
    assert_non_null(strstr(u->err.message, "struct_size"));
    options.struct_size = SIZE_MAX;      /* nor one that cannot be meant */
    unit_open_fails(u, &options, KVMETA_E_INVALID);
}

/* Goal: a newer caller's longer struct is accepted while the fields that
 * this version does not know are 0, and refused when they ask for something.
 * Method: every byte of the tail once. */
static void a_longer_struct_must_end_in_zeros(struct unit *u)
{
    struct {
        struct kvmeta_options options;
        unsigned char tail[24];
    } longer;
    size_t i;

    memset(&longer, 0, sizeof longer);
    longer.options = unit_options(u, 8, 8);
    longer.options.struct_size = sizeof longer;
    use_store(u, &longer.options);
    for (i = 0; i < sizeof longer.tail; i++) {
        longer.tail[i] = 1;
        unit_open_fails(u, &longer.options, KVMETA_E_INVALID);
        longer.tail[i] = 0;
    }
    longer.tail[0] = 1;
    longer.options.struct_size = sizeof longer.options;
    use_store(u, &longer.options);
}

/* --------------------------------------------------------------------------
 * Callbacks and copies
 * -------------------------------------------------------------------------- */

/* Goal: a table of system calls of another size is refused by its name. */
static void a_vfs_of_another_size_is_refused(struct unit *u)
{
    struct kvmeta_options options = unit_options(u, 8, 8);
    struct kvmeta_vfs vfs = *kvmeta_vfs_posix();

    options.vfs = &vfs;
    use_store(u, &options);
    vfs.struct_size = sizeof vfs - 1;
    unit_open_fails(u, &options, KVMETA_E_INVALID);
    assert_non_null(strstr(u->err.message, "vfs"));
    vfs.struct_size = 0;
    unit_open_fails(u, &options, KVMETA_E_INVALID);
}

/* Goal: with the defaults for memory, log and system calls it works, too. */
static void all_defaults_work(struct unit *u)
{
    struct kvmeta_options options;

    kvmeta_options_init(&options, 8, 8);
    use_store(u, &options);
}

/* Goal: path and options are copied: the caller may reuse both at once. */
static void path_and_options_are_copied(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    char dir[UNIT_PATH];
    kvmeta *db;

    strcpy(dir, u->dir);
    unit_ok(kvmeta_open(dir, &options, &db, NULL));
    memset(dir, 'x', sizeof dir - 1);
    memset(&options, 0xff, sizeof options);
    unit_fill(db, 0, 100, 0, KVMETA_DURABLE);
    unit_ok(kvmeta_compact(db));
    unit_holds(db, 0, 100, 0);
    unit_close(db);
    assert_int_equal(unit_files(u, ".tab"), 1);
}

/* Goal: options.durability is what flags 0 means. Method: a durable put
 * syncs at once, a buffered one leaves durable_seq behind. */
static void the_store_s_durability_is_that_of_flags_0(struct unit *u)
{
    struct kvmeta_options options = unit_quiet(u);
    kvmeta *db = unit_open(u, &options);
    struct kvmeta_stats s;

    unit_fill(db, 0, 1, 0, 0);
    s = unit_stats(db);
    assert_true(s.durable_seq == s.seq && s.syncs == 1);
    unit_close(db);
    options.durability = KVMETA_BUFFERED;
    db = unit_open(u, &options);
    unit_fill(db, 1, 2, 0, 0);
    s = unit_stats(db);
    assert_true(s.durable_seq < s.seq);
    unit_close(db);
}

static struct unit_case cases[] = {
    UNIT_CASE(each_option_is_refused_outside_its_range),
    UNIT_CASE(space_amp_max_is_a_number_in_its_range),
    UNIT_CASE(a_bad_option_does_not_touch_an_existing_store),
    UNIT_CASE(struct_size_below_the_first_release_is_refused),
    UNIT_CASE(a_longer_struct_must_end_in_zeros),
    UNIT_CASE(a_vfs_of_another_size_is_refused),
    UNIT_CASE(all_defaults_work),
    UNIT_CASE(path_and_options_are_copied),
    UNIT_CASE(the_store_s_durability_is_that_of_flags_0),
};

UNIT_MAIN(cases)
