/*
 * Fuzzes kvmeta_open on a whole hostile directory. The input is described in
 * dir.h.
 *
 *   - Whatever is there, the open ends, with a documented result, within the
 *     bounds of memory, and leaves neither memory nor handles behind.
 *   - After E_CORRUPT, E_VERSION, E_MISMATCH and NOT_FOUND the directory is
 *     as it was, and so it is after any open that only reads.
 *   - What opens is sound: verified, in order, written to, closed, and opened
 *     again with the same records. What opens to be read opens to be written.
 *   - Files of strangers are never touched.
 *
 * SPDX-License-Identifier: MIT
 */
#include "dir.h"

struct input {
    struct sim_fs fs;
    struct test_alloc alloc;
    struct kvmeta_options options;
};

static void fill_options(struct input *in, const uint8_t *data, size_t bytes)
{
    struct kvmeta_options *o = &in->options;
    uint32_t key_bytes = bytes > 0 && data[0] ? data[0] : 8;
    uint32_t value_bytes = bytes > 2 ? data[1] | (uint32_t)data[2] << 8 : 16;

    kvmeta_options_init(o, key_bytes, value_bytes);
    o->flags = KVMETA_NO_THREAD;
    o->open_threads = 1;
    o->zstd_level = 1;
    o->merge_window = 2;
    o->realloc_fn = test_realloc;
    o->log_fn = test_log;
    o->user = &in->alloc;
    o->vfs = &in->fs.vfs;
}

static void plant(struct input *in, const struct dir_files *files)
{
    char name[KV_NAME_BYTES];

    for (size_t i = 0; i < files->count; i++) {
        const struct dir_file *f = &files->file[i];

        if (f->kind >= KV_FILE_LOCK && f->kind <= KV_FILE_TABLE)
            kv_file_name(f->kind, f->id, name);
        else
            snprintf(name, sizeof name, "stranger%u", (unsigned)f->kind);
        sim_file_put(&in->fs, name, f->data, f->bytes);
    }
}

static void check_left(struct input *in)
{
    FUZZ_CHECK(atomic_load(&in->alloc.live_blocks) == 0,
               "%lld blocks of memory are left",
               (long long)atomic_load(&in->alloc.live_blocks));
    FUZZ_CHECK(sim_open_handles(&in->fs) == 0, "%u handles are left open",
               sim_open_handles(&in->fs));
    FUZZ_CHECK(in->fs.misuses == 0, "a handle was used that is not open");
    FUZZ_CHECK(atomic_load(&in->alloc.failures) == 0,
               "more than 256 MiB were asked for");
}

static int open_store(struct input *in, uint32_t flags, kvmeta **db,
                      struct kvmeta_error *err)
{
    uint64_t before = sim_hash(&in->fs);
    int rc;

    *db = NULL;
    memset(err, 0, sizeof *err);
    in->options.flags = KVMETA_NO_THREAD | flags;
    rc = kvmeta_open(SIM_DIR, &in->options, db, err);
    if (rc == KVMETA_OK) {
        FUZZ_CHECK(*db != NULL, "opened, but there is no handle");
    } else {
        FUZZ_CHECK(rc == KVMETA_E_CORRUPT || rc == KVMETA_E_VERSION
                   || rc == KVMETA_E_MISMATCH || rc == KVMETA_E_LIMIT
                   || (rc == KVMETA_NOT_FOUND && flags),
                   "open says %d: %s", rc, err->message);
        FUZZ_CHECK(*db == NULL, "a failed open has set the handle");
        FUZZ_CHECK(err->code == rc && err->message[0],
                   "open says %d, its error %d", rc, err->code);
    }
    if (rc != KVMETA_OK || (flags & KVMETA_READ_ONLY)) {
        FUZZ_CHECK(sim_hash(&in->fs) == before,
                   "the directory has changed: open says %d", rc);
    }
    return rc;
}

struct walk {
    unsigned char last[KVMETA_KEY_BYTES_MAX];
    uint32_t key_bytes;
    uint64_t count;
};

static int walk_step(void *user, const void *key, const void *value)
{
    struct walk *walk = user;

    FUZZ_CHECK(value != NULL, "a record without a value");
    FUZZ_CHECK(walk->count == 0
               || memcmp(walk->last, key, walk->key_bytes) < 0,
               "records are out of order");
    memcpy(walk->last, key, walk->key_bytes);
    walk->count++;
    return 0;
}

static void check_records(struct input *in, kvmeta *db)
{
    struct walk walk = {.key_bytes = in->options.key_bytes};
    int rc = kvmeta_scan(db, NULL, NULL, walk_step, &walk);

    FUZZ_CHECK(rc == KVMETA_OK, "scan says %d", rc);
    FUZZ_CHECK(walk.count == kvmeta_count(db), "%llu records, not %llu",
               (unsigned long long)walk.count,
               (unsigned long long)kvmeta_count(db));
}

struct content {
    struct kvmeta_digest digest;
    uint64_t count;
};

static struct content content(kvmeta *db)
{
    struct content c = {kvmeta_digest(db), kvmeta_count(db)};

    return c;
}

static void check_content(kvmeta *db, const struct content *want,
                          const char *when)
{
    struct content now = content(db);

    FUZZ_CHECK(now.count == want->count
               && kv_digest_equal(now.digest, want->digest),
               "%s: other records", when);
}

static void close_store(struct input *in, kvmeta *db)
{
    int rc = kvmeta_close(db);

    FUZZ_CHECK(rc == KVMETA_OK, "close says %d", rc);
    check_left(in);
}

/* A write, all background work, and back again. */
static void check_writing(struct input *in, kvmeta *db)
{
    unsigned char key[KVMETA_KEY_BYTES_MAX];
    unsigned char *value = calloc(1, in->options.value_bytes + 1);
    struct kvmeta_error err = {0};
    int rc;

    if (!value) abort();
    memset(key, 0x5a, sizeof key);
    rc = kvmeta_put(db, key, value, KVMETA_DURABLE);
    FUZZ_CHECK(rc == KVMETA_OK, "put says %d", rc);
    rc = kvmeta_remove(db, key, 0);
    FUZZ_CHECK(rc == KVMETA_OK, "remove says %d", rc);
    rc = kvmeta_put(db, key, value, KVMETA_BUFFERED);
    FUZZ_CHECK(rc == KVMETA_OK, "put says %d", rc);
    rc = kvmeta_compact(db);
    FUZZ_CHECK(rc == KVMETA_OK, "compact says %d", rc);
    rc = kvmeta_verify(db, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "verify says %d: %s", rc, err.message);
    free(value);
}

/* The directory opens to be written. Once it has been opened it is sound, so
 * nothing may fail any more. */
static void check_opened(struct input *in, kvmeta *db)
{
    struct content before = content(db);
    struct kvmeta_error err;
    int rc;

    check_records(in, db);
    rc = kvmeta_verify(db, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "verify says %d: %s", rc, err.message);
    check_content(db, &before, "verify");
    close_store(in, db);
    rc = open_store(in, 0, &db, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "does not open again: %s", err.message);
    check_content(db, &before, "second open");
    check_writing(in, db);
    before = content(db);
    close_store(in, db);
    rc = open_store(in, KVMETA_MUST_EXIST, &db, &err);
    FUZZ_CHECK(rc == KVMETA_OK, "does not open a third time: %s",
               err.message);
    check_content(db, &before, "third open");
    close_store(in, db);
}

static void check_strangers(const struct input *in,
                            const struct dir_files *files)
{
    char name[KV_NAME_BYTES];
    uint64_t bytes;
    uint8_t *data;

    for (size_t i = 0; i < files->count; i++) {
        unsigned kind = files->file[i].kind;

        if (kind >= KV_FILE_LOCK && kind <= KV_FILE_TABLE) continue;
        snprintf(name, sizeof name, "stranger%u", kind);
        data = sim_file_get(&in->fs, name, &bytes);
        FUZZ_CHECK(data != NULL, "a stranger's file is gone");
        free(data);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct input in;
    static struct dir_files files;
    struct content seen = {{0, 0}, 0};
    struct kvmeta_error err;
    kvmeta *db;
    uint8_t *copy;
    int read_rc, rc;

    if (bytes > FUZZ_INPUT_BYTES_MAX) return 0;
    copy = fuzz_copy(data, bytes);
    dir_fix(copy, bytes, FIX_INPUT);
    memset(&in, 0, sizeof in);
    in.alloc.limit_bytes = FUZZ_MEMORY_BYTES_MAX;
    sim_init(&in.fs, 512, 1);
    fill_options(&in, copy, bytes);
    dir_parse(copy, bytes, &files);
    plant(&in, &files);
    read_rc = open_store(&in, KVMETA_READ_ONLY, &db, &err);
    if (read_rc == KVMETA_OK) {
        seen = content(db);
        check_records(&in, db);
        close_store(&in, db);
    }
    check_left(&in);
    rc = open_store(&in, 0, &db, &err);
    FUZZ_CHECK(read_rc == rc
               || (read_rc == KVMETA_NOT_FOUND && rc == KVMETA_OK),
               "to read it says %d, to write %d: %s", read_rc, rc,
               err.message);
    if (read_rc == KVMETA_OK) check_content(db, &seen, "open to write");
    if (rc == KVMETA_OK) {
        fuzz_accepted++;
        check_opened(&in, db);
    }
    check_left(&in);
    check_strangers(&in, &files);
    sim_free(&in.fs);
    free(copy);
    return 0;
}

#ifdef FUZZ_MUTATOR
/* Opens, and if nothing but the digest is wrong, makes that right, too: what
 * the last log ends with, or what the manifest says of the tables. */
static void fix_digest(uint8_t *data, size_t bytes)
{
    static struct input in;
    struct dir_files files;
    struct dir_file *manifest, *log = NULL;
    struct kvmeta_error err;
    unsigned long long hi, lo;
    const char *text;
    uint8_t *at;
    kvmeta *db;
    int rc;

    memset(&in, 0, sizeof in);
    sim_init(&in.fs, 512, 1);
    fill_options(&in, data, bytes);
    dir_parse(data, bytes, &files);
    plant(&in, &files);
    rc = open_store(&in, KVMETA_READ_ONLY, &db, &err);
    if (rc == KVMETA_OK) kvmeta_close(db);
    sim_free(&in.fs);
    text = rc == KVMETA_E_CORRUPT ? strstr(err.message, "records is ") : NULL;
    if (!text || sscanf(text + 11, "%16llx%16llx", &hi, &lo) != 2) return;
    manifest = dir_find(&files, KV_FILE_MANIFEST, 0);
    for (size_t i = 0; i < files.count; i++)
        if (files.file[i].kind == KV_FILE_LOG
            && (!log || files.file[i].id > log->id))
            log = &files.file[i];
    at = manifest && manifest->bytes >= 72 ? manifest->data + 56 : NULL;
    if (log) {
        uint64_t frame = fix_log(log->data, log->bytes, FIX_SUMS).last_frame;

        at = frame ? log->data + frame + 32 : log->bytes >= 128
            ? log->data + 80 : at;
    }
    if (!at) return;
    kv_store_le64(at, lo);
    kv_store_le64(at + 8, hi);
    dir_fix(data, bytes, FIX_ALL);
}

/* Repeats, drops, swaps or renames a file. Returns the size. */
static size_t change_files(struct test_rng *rng, uint8_t *data, size_t bytes,
                           size_t max, const struct dir_files *files)
{
    const struct dir_file *f = &files->file[test_rng_below(rng, files->count)];
    uint8_t *start = f->data - DIR_FILE_BYTES;
    size_t whole = f->bytes + DIR_FILE_BYTES;
    uint8_t *end = data + bytes;

    switch (test_rng_below(rng, 4)) {
    case 0:
        memmove(start, start + whole, (size_t)(end - start) - whole);
        return bytes - whole;
    case 1:
        if (whole > max - bytes) return bytes;
        memcpy(end, start, whole);
        kv_store_le64(end + 1, fix_number(rng, f->id));
        return bytes + whole;
    case 2:
        start[0] = (uint8_t)test_rng_below(rng, 7);
        return bytes;
    default:
        kv_store_le64(start + 1, fix_number(rng, f->id));
        return bytes;
    }
}

/* A table may become larger or smaller in its place. */
static size_t change_table(struct test_rng *rng, struct dir_file *f,
                           uint8_t *data, size_t bytes, size_t max)
{
    size_t room = f->bytes + (max - bytes);
    uint8_t *copy = malloc(room);
    size_t tail = (size_t)(data + bytes - (f->data + f->bytes));
    size_t n;

    if (!copy) abort();
    memcpy(copy, f->data, f->bytes);
    n = fix_change_table(rng, copy, f->bytes, room);
    memmove(f->data + n, f->data + f->bytes, tail);
    memcpy(f->data, copy, n);
    kv_store_le32(f->data - 4, (uint32_t)n);
    free(copy);
    return bytes - f->bytes + n;
}

static size_t change_file(struct test_rng *rng, struct dir_file *f,
                          uint8_t *data, size_t bytes, size_t max)
{
    switch (f->kind) {
    case KV_FILE_LOCK:
        fix_change_marks(rng, f->data, f->bytes);
        return bytes;
    case KV_FILE_MANIFEST:
        fix_change_manifest(rng, f->data, f->bytes);
        return bytes;
    case KV_FILE_LOG:
        fix_change_log(rng, f->data, f->bytes);
        return bytes;
    case KV_FILE_TABLE:
        return change_table(rng, f, data, bytes, max);
    default:
        return LLVMFuzzerMutate(data, bytes, max);
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, size_t bytes_max,
                               unsigned seed)
{
    struct test_rng rng = {seed};
    struct dir_files files;
    uint64_t choice = test_rng_below(&rng, 8);
    int level = fix_level(&rng);

    dir_parse(data, bytes, &files);
    if (choice == 0 || files.count == 0)
        bytes = LLVMFuzzerMutate(data, bytes, bytes_max);
    else if (choice == 1)
        bytes = change_files(&rng, data, bytes, bytes_max, &files);
    else
        bytes = change_file(&rng,
                            &files.file[test_rng_below(&rng, files.count)],
                            data, bytes, bytes_max);
    dir_fix(data, bytes, level);
    if (level >= FIX_ALL && test_rng_below(&rng, 2) == 0)
        fix_digest(data, bytes);
    return bytes;
}
#endif
