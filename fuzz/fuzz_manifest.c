/*
 * Fuzzes the reading of a manifest. The input is the file.
 *
 * What a manifest that is accepted must keep: encoded again it has the same
 * bytes; written and read back it is the same; with any one bit flipped it is
 * still the same, or refused; cut short it is still the same, or refused.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fix.h"

static int read_manifest(struct fuzz_world *w, const uint8_t *data,
                         size_t bytes, struct kv_manifest *m, bool *healed)
{
    struct kvmeta_error err = {0};
    int rc;

    memset(m, 0, sizeof *m);
    *healed = false;
    sim_file_put(&w->fs, "MANIFEST", data, bytes);
    rc = kv_manifest_read(&w->env, m, healed, &err);
    fuzz_check_code(rc, &err);
    return rc;
}

/* The bytes that `m` is encoded as, to be freed. */
static uint8_t *encode(const struct kv_env *env, const struct kv_manifest *m,
                       size_t *bytes)
{
    uint8_t *image;

    *bytes = kv_manifest_image_bytes(m->tables_count, m->logs_count);
    image = calloc(1, *bytes);
    if (!image) abort();
    kv_manifest_encode(env, m, image);
    return image;
}

/* Is the image one of the copies in the file? */
static bool is_copy(const uint8_t *data, size_t bytes, const uint8_t *image,
                    size_t image_bytes)
{
    for (size_t at = 0; at < bytes; at += KV_MANIFEST_STRIDE) {
        if (image_bytes <= bytes - at
            && memcmp(data + at, image, image_bytes) == 0)
            return true;
    }
    return false;
}

/* What a damaged file gives is `image`, or an error. */
static void check_damaged(struct fuzz_world *w, const uint8_t *data,
                          size_t bytes, const uint8_t *image,
                          size_t image_bytes, const char *what)
{
    struct kv_manifest m;
    uint8_t *again;
    size_t n;
    bool healed;
    unsigned char uuid[KV_UUID_BYTES];

    memcpy(uuid, w->env.uuid, sizeof uuid);
    if (read_manifest(w, data, bytes, &m, &healed) == KVMETA_OK) {
        again = encode(&w->env, &m, &n);
        FUZZ_CHECK(n == image_bytes && memcmp(again, image, n) == 0,
                   "%s: another manifest is accepted", what);
        free(again);
    }
    kv_manifest_free(&w->env, &m);
    memcpy(w->env.uuid, uuid, sizeof uuid);
}

static void check_store(struct fuzz_world *w, const struct kv_manifest *m,
                        const uint8_t *image, size_t image_bytes)
{
    struct kvmeta_error err = {0};
    struct kv_manifest again;
    bool renamed = false, healed = true;
    uint8_t *copy;
    size_t n;
    int rc = kv_manifest_store(&w->env, m, &renamed, &err);

    FUZZ_CHECK(rc == KVMETA_OK && renamed, "cannot be stored: %s",
               err.message);
    rc = kv_manifest_read(&w->env, &again, &healed, &err);
    FUZZ_CHECK(rc == KVMETA_OK && !healed, "cannot be read back: %s",
               err.message);
    copy = encode(&w->env, &again, &n);
    FUZZ_CHECK(n == image_bytes && memcmp(copy, image, n) == 0,
               "what was stored is not what is read back");
    free(copy);
    kv_manifest_free(&w->env, &again);
}

static void check(struct fuzz_world *w, uint8_t *data, size_t bytes)
{
    struct kv_manifest m;
    uint64_t bit = fuzz_hash(data, bytes) % (bytes * 8);
    size_t image_bytes;
    uint8_t *image;
    bool healed;

    if (read_manifest(w, data, bytes, &m, &healed) != KVMETA_OK) {
        kv_manifest_free(&w->env, &m);
        return;
    }
    fuzz_accepted++;
    image = encode(&w->env, &m, &image_bytes);
    FUZZ_CHECK(is_copy(data, bytes, image, image_bytes),
               "a manifest is accepted that is not what we would write");
    data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    check_damaged(w, data, bytes, image, image_bytes, "a flipped bit");
    data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    check_damaged(w, data, bit / 8, image, image_bytes, "cut short");
    check_store(w, &m, image, image_bytes);
    free(image);
    kv_manifest_free(&w->env, &m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct fuzz_world world;
    uint32_t key_bytes = 8, value_bytes = 16;
    uint8_t *copy;

    if (bytes == 0 || bytes > FUZZ_INPUT_BYTES_MAX) return 0;
    copy = fuzz_copy(data, bytes);
    fix_manifest(copy, bytes, FIX_INPUT);
    fuzz_world_init(&world);
    if (bytes >= KV_MANIFEST_HEAD_BYTES)
        fuzz_widths(copy + 72, copy + 76, &key_bytes, &value_bytes);
    fuzz_world_enter(&world, key_bytes, value_bytes);
    check(&world, copy, bytes);
    fuzz_world_leave(&world);
    free(copy);
    return 0;
}

FIX_MUTATOR(fix_manifest, fix_change_manifest(&rng, data, bytes))
