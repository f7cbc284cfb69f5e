/*
 * Writes the seed corpus: files of small real stores, one by one and whole
 * directories. The stores live on the simulated file system, so the seeds
 * are the same wherever this runs.
 *
 *   seeds CORPUS        writes CORPUS/log/..., CORPUS/table/..., ...
 *
 * SPDX-License-Identifier: MIT
 */
#include "dir.h"

struct seed_store {
    struct sim_fs fs;
    struct test_alloc alloc;
    struct kvmeta_options options;
    kvmeta *db;
    uint32_t next;
};

static const char *corpus;

static void write_seed(const char *target, const char *name,
                       const uint8_t *data, size_t bytes)
{
    char path[512];
    FILE *file;

    snprintf(path, sizeof path, "%s/%s/seed-%s", corpus, target, name);
    file = fopen(path, "wb");
    FUZZ_CHECK(file != NULL, "%s cannot be written", path);
    FUZZ_CHECK(fwrite(data, 1, bytes, file) == bytes, "%s: short", path);
    FUZZ_CHECK(fclose(file) == 0, "%s: close", path);
}

static void open_store(struct seed_store *s)
{
    struct kvmeta_error err = {0};
    int rc = kvmeta_open(SIM_DIR, &s->options, &s->db, &err);

    FUZZ_CHECK(rc == KVMETA_OK, "open: %s", err.message);
}

static void begin(struct seed_store *s, uint32_t key_bytes,
                  uint32_t value_bytes, uint32_t align)
{
    memset(s, 0, sizeof *s);
    sim_init(&s->fs, 512, key_bytes * 1000 + value_bytes);
    kvmeta_options_init(&s->options, key_bytes, value_bytes);
    s->options.flags = KVMETA_NO_THREAD;
    s->options.durability = KVMETA_WRITTEN;
    s->options.log_align = align;
    s->options.merge_window = 64;
    s->options.space_amp_max = 100;
    s->options.open_threads = 1;
    s->options.realloc_fn = test_realloc;
    s->options.user = &s->alloc;
    s->options.vfs = &s->fs.vfs;
    open_store(s);
}

static void end(struct seed_store *s)
{
    FUZZ_CHECK(kvmeta_close(s->db) == KVMETA_OK, "close");
    sim_free(&s->fs);
}

static void make_record(const struct seed_store *s, uint32_t n, uint8_t *key,
                        uint8_t *value)
{
    memset(key, 0, s->options.key_bytes);
    memset(value, 0, s->options.value_bytes);
    for (uint32_t i = 0; i < 3 && i < s->options.key_bytes; i++)
        key[s->options.key_bytes - 1 - i] = (uint8_t)(n >> 8 * i);
    for (uint32_t i = 0; i < s->options.value_bytes && i < 8; i++)
        value[i] = (uint8_t)(n * 512 >> 8 * i);
}

static void put(struct seed_store *s, uint32_t n, unsigned durability)
{
    static uint8_t key[KVMETA_KEY_BYTES_MAX];
    static uint8_t value[KVMETA_VALUE_BYTES_MAX];

    make_record(s, n, key, value);
    FUZZ_CHECK(kvmeta_put(s->db, key, value, durability) == KVMETA_OK, "put");
}

static void remove_key(struct seed_store *s, uint32_t n)
{
    static uint8_t key[KVMETA_KEY_BYTES_MAX];
    static uint8_t value[KVMETA_VALUE_BYTES_MAX];

    make_record(s, n, key, value);
    FUZZ_CHECK(kvmeta_remove(s->db, key, 0) == KVMETA_OK, "remove");
}

/* n records, every step'th removed again, buffered into few frames. */
static void fill(struct seed_store *s, uint32_t n, uint32_t step)
{
    uint32_t first = s->next;

    for (uint32_t i = 0; i < n; i++) put(s, s->next++, KVMETA_BUFFERED);
    for (uint32_t i = 0; step && i < n; i += step) remove_key(s, first + i);
}

/* Writes all files of the store as it is now: those of one kind each to its
 * target, and all of them as one directory. */
struct dump {
    struct seed_store *store;
    const char *name;
    struct dir_image image;
    unsigned logs, tables;
    bool fixed;                   /* LOCK and MANIFEST, too */
};

/* Zeros written ahead of a log are left out, but for a record that may end
 * in zeros, the pad of the last frame, and a few more. */
static uint64_t without_zeros(const struct kvmeta_options *o,
                              const uint8_t *data, uint64_t bytes)
{
    uint64_t used = bytes;

    while (used > 0 && data[used - 1] == 0) used--;
    used += o->key_bytes + o->value_bytes;
    used = kv_align_up(used, o->log_align) + 64;
    return kv_min(used, bytes);
}

static void dump_file(void *user, const char *name, uint64_t bytes)
{
    struct dump *dump = user;
    uint8_t *data = sim_file_get(&dump->store->fs, name, &bytes);
    char seed[64];
    uint64_t id;
    int kind = kv_file_parse_name(name, &id);

    FUZZ_CHECK(data != NULL, "%s is not there", name);
    if (kind == KV_FILE_LOG)
        bytes = without_zeros(&dump->store->options, data, bytes);
    dir_image_add(&dump->image, (uint8_t)kind, id, data, bytes);
    switch (kind) {
    case KV_FILE_LOCK:
        if (!dump->fixed) break;
        write_seed("mark", dump->name, data, (size_t)bytes);
        break;
    case KV_FILE_MANIFEST:
        if (!dump->fixed) break;
        write_seed("manifest", dump->name, data, (size_t)bytes);
        break;
    case KV_FILE_LOG:
        snprintf(seed, sizeof seed, "%s-%u", dump->name, dump->logs++);
        write_seed("log", seed, data, (size_t)bytes);
        break;
    case KV_FILE_TABLE:
        snprintf(seed, sizeof seed, "%s-%u", dump->name, dump->tables++);
        write_seed("table", seed, data, (size_t)bytes);
        break;
    default:
        break;
    }
    free(data);
}

/* Of LOCK and MANIFEST, and of whole directories, some will do. */
static void dump(struct seed_store *s, const char *name, bool fixed)
{
    struct dump d = {.store = s, .name = name, .fixed = fixed};

    dir_image_init(&d.image, s->options.key_bytes, s->options.value_bytes);
    sim_each_file(&s->fs, dump_file, &d);
    if (fixed || s->options.log_align == 8)
        write_seed("dir", name, d.image.bytes, d.image.used);
    dir_image_free(&d.image);
}

/* Tables, a sealed log, a live one with several kinds of frames. */
static void mixed_store(const char *name, uint32_t key_bytes,
                        uint32_t value_bytes, uint32_t align, uint32_t n)
{
    struct seed_store *s = malloc(sizeof *s);

    if (!s) abort();
    begin(s, key_bytes, value_bytes, align);
    fill(s, n, 0);
    FUZZ_CHECK(kvmeta_flush(s->db) == KVMETA_OK, "flush");
    fill(s, n / 2 + 1, 3);
    FUZZ_CHECK(kvmeta_flush(s->db) == KVMETA_OK, "flush");
    put(s, 1, KVMETA_DURABLE);
    fill(s, 3, 2);
    put(s, 2, KVMETA_WRITTEN);
    fill(s, 2, 0);
    put(s, 3, KVMETA_DURABLE);
    dump(s, name, key_bytes == 20);
    end(s);
    free(s);
}

/* Nothing but the moment after the creation, and after a clean close. */
static void small_stores(void)
{
    struct seed_store *s = malloc(sizeof *s);

    if (!s) abort();
    begin(s, 8, 16, 512);
    dump(s, "new", true);
    put(s, 1, KVMETA_DURABLE);
    dump(s, "one", true);
    FUZZ_CHECK(kvmeta_close(s->db) == KVMETA_OK, "close");
    dump(s, "closed", false);
    open_store(s);
    put(s, 2, KVMETA_DURABLE);
    dump(s, "sealed-and-live", true);
    end(s);
    free(s);
}

int main(int argc, char **argv)
{
    FUZZ_CHECK(argc == 2, "usage: seeds CORPUS");
    corpus = argv[1];
    small_stores();
    mixed_store("8-16", 8, 16, 512, 80);
    mixed_store("16-16", 16, 16, 8, 300);
    mixed_store("9-0", 9, 0, 64, 70);
    mixed_store("1-1", 1, 1, 8, 90);
    mixed_store("20-300", 20, 300, 512, 6);
    mixed_store("255-1", 255, 1, 8, 8);
    return 0;
}
