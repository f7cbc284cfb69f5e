/*
 * Sums, and the rules of manifests and log frames, asked one by one: what
 * passes its sum and breaks a rule is damage, never a torn tail. No file of
 * ours breaks them, and no bit that flips gets past the sums, so kvmeta.c is
 * compiled in and its checks are called with what a fault or an enemy may
 * have written.
 *
 * SPDX-License-Identifier: MIT
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#  define _GNU_SOURCE 1                  /* as kvmeta.c wants it */
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#undef test_realloc                      /* support.h has its own */

#define KVMETA_STATIC
#include "../../kvmeta.c"
#include "../support/support.h"

/* --------------------------------------------------------------------------
 * Manifests
 * -------------------------------------------------------------------------- */

static struct kv_table_meta tables[2];

/* Two tables, a sealed log and a live one. */
static void good_manifest(struct kv_manifest *m)
{
    memset(m, 0, sizeof *m);
    memset(tables, 0, sizeof tables);
    m->gen = 1;
    m->next_id = 5;
    m->seq = 9;
    m->tables = tables;
    m->tables_count = 2;
    tables[0] = (struct kv_table_meta){.id = 1, .records = 5,
                                       .tombstones = 5, .seq_first = 1,
                                       .seq_last = 3};
    tables[1] = (struct kv_table_meta){.id = 4, .records = 1,
                                       .seq_first = 4, .seq_last = 9};
    m->logs_count = 2;
    m->logs[0].id = 2;
    m->logs[1].id = 4;
    m->logs[1].live = true;
}

static void want_rule(const struct kv_manifest *m, const char *rule)
{
    const char *broken = kv_manifest_check(m);

    assert_string_equal(broken == NULL ? "none" : broken, rule);
}

/* Sets one field, looks, and puts it back: the value that is one too many,
 * and the last one that is good. */
#define BREAKS(field, bad, good, rule) do { \
        good_manifest(&m); \
        (field) = (bad); \
        want_rule(&m, rule); \
        (field) = (good); \
        want_rule(&m, "none"); \
    } while (0)

/* Goal: every rule of a manifest holds up to its last good value. */
static void a_manifest_keeps_each_rule(void **state)
{
    struct kv_manifest m;

    (void)state;
    good_manifest(&m);
    want_rule(&m, "none");
    BREAKS(m.gen, 0, 1, "S3: generation");
    BREAKS(m.gen, KV_NUMBER_MAX, KV_NUMBER_MAX - 1, "S3: generation");
    BREAKS(m.next_id, KV_NUMBER_MAX, KV_NUMBER_MAX - 1, "S3: next id");
    BREAKS(m.seq, KV_NUMBER_MAX, KV_NUMBER_MAX - 1, "S3: seq");
    BREAKS(tables[0].id, 5, 4, "S4: table id");
    BREAKS(tables[1].records, 0, 1, "S5: table counts");
    BREAKS(tables[0].tombstones, 6, 5, "S5: table counts");
    BREAKS(tables[1].seq_first, 3, 4, "S6: table order");
    BREAKS(tables[0].seq_last, 0, 1, "S6: table order");
    BREAKS(tables[1].seq_last, 10, 9, "S6: table order");
    BREAKS(m.seq, 8, 9, "S6: table order");
    BREAKS(m.logs[1].id, 5, 4, "S7: log id");
    BREAKS(m.logs[1].id, 2, 3, "S8: log order");
    BREAKS(m.logs[0].live, true, false, "S9: two live logs");
}

/* --------------------------------------------------------------------------
 * Frames
 * -------------------------------------------------------------------------- */

/* A log in memory with one frame at 512: one batch, one put. */
struct log {
    struct kv_env env;
    struct kv_run run;
    struct kv_file file;
    struct kv_frame frame;
    struct kv_item items[2];
    unsigned char bytes[1536];
};

static void good_log(struct log *log)
{
    const unsigned char key[8] = {1}, value[8] = {2};

    memset(log, 0, sizeof *log);
    kv_shape_init(&log->env.shape, 8, 8);
    log->file.kind = KV_FILE_LOG;
    log->run.bytes = log->bytes;
    log->run.size = sizeof log->bytes;
    log->run.items = log->items;
    log->run.cap = 2;
    log->run.head.align = 512;
    log->run.head.slot_bytes = kv_log_slot_bytes(&log->env.shape);
    log->run.head.first_seq = 7;
    log->run.batches = 3;
    log->frame.synced = true;
    log->frame.pos = 512;
    log->frame.entries = 1;
    log->frame.batches = 1;
    log->frame.seq = 10;
    log->frame.durable = 512;
    kv_entry_encode(&log->env.shape, log->run.head.slot_bytes, key, value,
                    log->bytes + 512 + KV_FRAME_BYTES);
}

static void want_frame(struct log *log, int rc, const char *message)
{
    struct kvmeta_error err = {0};
    uint64_t batches = log->run.batches;

    assert_int_equal(kv_run_accept(&log->env, &log->run, &log->file,
                                   &log->frame, &err), rc);
    if (rc != KVMETA_OK) {
        assert_non_null(strstr(err.message, message));
        assert_true(log->run.batches == batches);
    }
}

#define FRAME(change, message) do { \
        good_log(&log); \
        change; \
        want_frame(&log, KVMETA_E_CORRUPT, message); \
    } while (0)

/* Goal: a frame with the right sums that breaks a rule is corrupt. */
static void a_frame_keeps_each_rule(void **state)
{
    static struct log log;
    unsigned char *entry = log.bytes + 512 + KV_FRAME_BYTES;
    size_t i;

    (void)state;
    good_log(&log);
    want_frame(&log, KVMETA_OK, "");
    assert_true(log.run.end == 1024);
    assert_true(log.run.batches == 4);
    FRAME(log.frame.seq = 9, "seq 9, want 10");
    FRAME(log.frame.seq = 11, "seq 11, want 10");
    FRAME(log.frame.durable = 513, "durable too high");
    FRAME(log.frame.batches = 0, "batch count");
    FRAME(log.frame.batches = 2, "batch count");
    FRAME(log.frame.entries = 0, "batch count");
    for (i = log.run.head.slot_bytes; i < 512 - KV_FRAME_BYTES; i++) {
        FRAME(entry[i] = 1, "frame: pad not zero");
    }
    FRAME(entry[0] = 0, "unknown operation");
    FRAME(entry[0] = 3, "unknown operation");
    for (i = 1; i < KV_ENTRY_BYTES; i++) {
        FRAME(entry[i] = 1, "unknown operation");
    }
    FRAME(entry[0] = KV_ENTRY_REMOVE, "pad not zero");
}

/* Goal: a frame of this log, at its place and with the right sums, ends the
 * chain all the same when it names another one before it. */
static void a_frame_that_does_not_follow_ends_the_chain(void **state)
{
    static struct log log;
    int reason = KVMETA_TORN_NONE;

    (void)state;
    good_log(&log);
    kv_crc_init(&log.env.crc, true);
    log.frame.prev = log.run.last_hcrc = 7;
    log.frame.bcrc = kv_crc_add(&log.env.crc, log.run.head.seed,
                                log.bytes + 512 + KV_FRAME_BYTES,
                                512 - KV_FRAME_BYTES);
    kv_frame_encode(&log.env, log.run.head.seed, &log.frame, log.bytes + 512);
    assert_true(kv_run_frame_at(&log.env, &log.run, 512, &log.frame, &reason));
    log.run.last_hcrc = 8;
    assert_false(kv_run_frame_at(&log.env, &log.run, 512, &log.frame,
                                 &reason));
    assert_int_equal(reason, KVMETA_TORN_HEADER);
}

/* --------------------------------------------------------------------------
 * Sums
 * -------------------------------------------------------------------------- */

/* Goal: a store may move between machines: the sums are CRC32C, with the
 * processor's instruction and without. Method: the known sum of "123456789",
 * then bytes of every length, in two parts. */
static void sums_are_the_same_with_and_without_hardware(void **state)
{
    static struct kv_crc hard, soft;
    struct test_rng rng = {test_args.seed};
    unsigned char bytes[300];
    uint32_t sum;
    size_t n;

    (void)state;
    kv_crc_init(&hard, true);
    kv_crc_init(&soft, false);
    assert_false(soft.hardware);
    assert_int_equal(kv_crc_add(&soft, 0, "123456789", 9), 0xe3069283u);
    assert_int_equal(kv_crc_add(&hard, 0, "123456789", 9), 0xe3069283u);
    test_rng_bytes(&rng, bytes, sizeof bytes);
    for (n = 0; n <= sizeof bytes; n++) {
        sum = kv_crc_add(&soft, 1, bytes, n / 3);
        sum = kv_crc_add(&soft, sum, bytes + n / 3, n - n / 3);
        assert_int_equal(kv_crc_add(&hard, 1, bytes, n), sum);
    }
}

/* --------------------------------------------------------------------------
 * Bytes
 * -------------------------------------------------------------------------- */

/* Goal: whatever the width, as many bytes are copied and compared as were
 * asked for, and none behind them. */
static void bytes_are_copied_and_compared_to_the_last(void **state)
{
    unsigned char from[64], to[64];

    (void)state;
    for (size_t n = 0; n < sizeof from; n++) {
        memset(from, 1, sizeof from);
        memset(to, 2, sizeof to);
        kv_copy(to, from, n);
        for (size_t i = 0; i < sizeof to; i++)
            assert_int_equal(to[i], i < n ? 1 : 2);
        assert_true(kv_same(to, from, n));
        for (size_t i = 0; i < n; i++) {
            to[i] ^= 0x80;
            assert_false(kv_same(to, from, n));
            to[i] ^= 0x80;
        }
    }
    kv_copy(NULL, NULL, 0);
    assert_true(kv_same(NULL, NULL, 0));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_manifest_keeps_each_rule),
        cmocka_unit_test(a_frame_keeps_each_rule),
        cmocka_unit_test(a_frame_that_does_not_follow_ends_the_chain),
        cmocka_unit_test(sums_are_the_same_with_and_without_hardware),
        cmocka_unit_test(bytes_are_copied_and_compared_to_the_last),
    };

    test_parse_args(argc, argv);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
