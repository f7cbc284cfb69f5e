/*
 * The records of the benchmark, and the sums by which they are checked.
 *
 * SPDX-License-Identifier: MIT
 */
#include "bench.h"

#define METADATA_BUCKETS 1000u
#define METADATA_UNIT 512u          /* sizes are multiples of it */
#define METADATA_UNITS_MAX 128u     /* up to 64 KiB */

static void store_be64(void *bytes, uint64_t word)
{
    unsigned char *out = bytes;
    int i;

    for (i = 0; i < 8; i++) out[i] = (unsigned char)(word >> (56 - 8 * i));
}

void source_init(struct source *source, enum source_kind kind,
                 size_t key_bytes, size_t value_bytes)
{
    memset(source, 0, sizeof *source);
    source->kind = kind;
    source->key_bytes = key_bytes;
    source->value_bytes = value_bytes;
}

/* Metadata-like: the key is a bucket out of 1,000 and an object number that
 * ascends, both big-endian. The value is where the object lies: the offset,
 * which grows by the size of each object, its size, and one of four flags. */
static void metadata_key(uint64_t i, unsigned char *key)
{
    store_be64(key, bench_mix(i) % METADATA_BUCKETS);
    store_be64(key + 8, i);
}

static uint32_t metadata_size(uint64_t i)
{
    uint64_t units = 1 + bench_mix(i ^ UINT64_C(0x5151)) % METADATA_UNITS_MAX;

    return (uint32_t)(units * METADATA_UNIT);
}

void source_key(const struct source *source, uint64_t i, void *key)
{
    unsigned char *out = key;
    uint64_t word = bench_mix(i);
    size_t at;

    if (source->kind == SOURCE_METADATA) {
        metadata_key(i, out);
        return;
    }
    store_be64(out, source->kind == SOURCE_ASCENDING ? i : word);
    for (at = 8; at < source->key_bytes; at += 8) {
        word = bench_mix(word);
        bench_store(out + at, word);
    }
}

uint64_t source_word(const struct source *source, uint64_t i)
{
    uint32_t parts[2];

    if (source->kind != SOURCE_METADATA) {
        return bench_mix(i ^ ((source->version + 1) << 48));
    }
    parts[0] = metadata_size(i);
    parts[1] = (uint32_t)(bench_mix(i ^ UINT64_C(0xf1a6)) % 4);
    return bench_load(parts);
}

void source_value(const struct source *source, uint64_t i, void *value)
{
    unsigned char *out = value;
    uint64_t word = source_word(source, i);
    size_t last = source->value_bytes - 8;
    size_t at;

    bench_store(out + last, word);
    for (at = 0; at < last; at += 8) {
        word = bench_mix(word);
        bench_store(out + at, word);
    }
}

void source_next(struct source *source, void *key, void *value)
{
    uint64_t i = source->next++;

    source_key(source, i, key);
    if (source->kind != SOURCE_METADATA) {
        source_value(source, i, value);
        return;
    }
    bench_store(value, source->offset);
    bench_store((char *)value + 8, source_word(source, i));
    source->offset += metadata_size(i);
}

uint64_t record_hash(const void *key, size_t key_bytes, const void *value,
                     size_t value_bytes)
{
    uint64_t hash = 0;
    size_t at;

    for (at = 0; at < key_bytes; at += 8) {
        hash = bench_mix(hash ^ bench_load((const char *)key + at));
    }
    for (at = 0; at < value_bytes; at += 8) {
        hash = bench_mix(hash ^ bench_load((const char *)value + at));
    }
    return hash;
}

void scan_add_full(struct scan_sum *sum, const void *key, const void *value)
{
    sum->hash += record_hash(key, sum->key_bytes, value, sum->value_bytes);
    if (sum->records > 1 && memcmp(sum->last, key, sum->key_bytes) >= 0) {
        sum->disorder++;
    }
    memcpy(sum->last, key, sum->key_bytes);
}
