/*
 * Adapter: absl::btree_map, the fastest ordered map in Debian. It keeps
 * nothing on disk. Keys are big-endian bytes outside and native words inside,
 * so that a comparison is one of integers, not a call of memcmp.
 *
 * SPDX-License-Identifier: MIT
 */
#include "bench.h"

#include <array>

#include "absl/container/btree_map.h"

namespace {

template <size_t Words> using Key = std::array<uint64_t, Words>;

template <size_t Words> Key<Words> load_key(const void *bytes)
{
    Key<Words> key;
    std::memcpy(key.data(), bytes, sizeof key);
    for (uint64_t &word : key) word = __builtin_bswap64(word);
    return key;
}

template <size_t Words> void store_key(Key<Words> key, void *bytes)
{
    for (uint64_t &word : key) word = __builtin_bswap64(word);
    std::memcpy(bytes, key.data(), sizeof key);
}

template <size_t Words> struct Store {
    using Map = absl::btree_map<Key<Words>, Key<Words>>;

    static void put(void *store, const void *key, const void *value)
    {
        Key<Words> copy;
        std::memcpy(copy.data(), value, sizeof copy);
        static_cast<Map *>(store)->insert_or_assign(load_key<Words>(key),
                                                    copy);
    }

    static bool get(const void *store, const void *key, void *value)
    {
        const Map *map = static_cast<const Map *>(store);
        auto found = map->find(load_key<Words>(key));
        if (found == map->end()) return false;
        std::memcpy(value, found->second.data(), sizeof found->second);
        return true;
    }

    static void scan(const void *store, struct scan_sum *sum)
    {
        unsigned char key[8 * Words];
        for (const auto &record : *static_cast<const Map *>(store)) {
            store_key<Words>(record.first, key);
            scan_add(sum, key, record.second.data());
        }
    }
};

/* The width is fixed by the first store of the process. */
size_t width;

void *store_open(const struct engine_setup *setup)
{
    width = setup->key_bytes;
    if (setup->value_bytes != width || (width != 8 && width != 16)) {
        bench_die("absl: only 8 + 8 and 16 + 16 bytes");
    }
    if (width == 8) return new Store<1>::Map;
    return new Store<2>::Map;
}

void store_close(void *store)
{
    if (width == 8) delete static_cast<Store<1>::Map *>(store);
    else delete static_cast<Store<2>::Map *>(store);
}

void put(void *store, const void *key, const void *value)
{
    if (width == 8) Store<1>::put(store, key, value);
    else Store<2>::put(store, key, value);
}

void put_batch(void *store, const void *keys, const void *values, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        put(store, static_cast<const char *>(keys) + i * width,
            static_cast<const char *>(values) + i * width);
    }
}

bool get(void *store, const void *key, void *value)
{
    if (width == 8) return Store<1>::get(store, key, value);
    return Store<2>::get(store, key, value);
}

void scan(void *store, struct scan_sum *sum)
{
    if (width == 8) Store<1>::scan(store, sum);
    else Store<2>::scan(store, sum);
}

void *writer_open(void *store) { return store; }
void writer_close(void *) {}
void *reader_open(void *store, bool) { return store; }
void reader_close(void *) {}

}  /* namespace */

extern "C" const struct engine engine_absl = {
    "absl", "absl::btree_map", ENGINE_MEMORY_ONLY | ENGINE_ONE_THREAD,
    store_open, store_close, writer_open, writer_close, put, put_batch,
    reader_open, reader_close, get, nullptr, scan, nullptr, nullptr, nullptr
};
