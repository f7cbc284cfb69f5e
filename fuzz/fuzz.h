/*
 * What the fuzz targets share: kvmeta.c itself, so that they can look inside;
 * a store's surroundings on the simulated file system; checks that end the
 * process with a line that says what is wrong.
 *
 * A target defines LLVMFuzzerTestOneInput and, for libFuzzer, a mutator. With
 * FUZZ_REPAIR (AFL++, which has no mutator of ours) the target puts the
 * checksums of its input right before it uses it.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_FUZZ_H
#define KVMETA_FUZZ_H

#define KVMETA_STATIC
#include "../kvmeta.c"

#include "../tests/sim/sim.h"
#include "../tests/support/support.h"

/* No input is larger, and none may need more memory than this. */
#define FUZZ_INPUT_BYTES_MAX 65536u
#define FUZZ_MEMORY_BYTES_MAX ((uint64_t)256 << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, size_t bytes_max,
                               unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t a_bytes,
                                 const uint8_t *b, size_t b_bytes,
                                 uint8_t *out, size_t out_max, unsigned seed);
int LLVMFuzzerInitialize(int *argc, char ***argv);
size_t LLVMFuzzerMutate(uint8_t *data, size_t bytes, size_t bytes_max);

/* Inputs that were well-formed to the end. replay.c looks whether the seeds
 * are: after a change of the format they must be made anew. */
unsigned long fuzz_accepted;

/* Ends the process unless `holds`; the text is printf's. */
#define FUZZ_CHECK(holds, ...) \
    do { \
        if (!(holds)) { \
            fprintf(stderr, "fuzz: %s:%d: ", __FILE__, __LINE__); \
            fprintf(stderr, __VA_ARGS__); \
            fputc('\n', stderr); \
            abort(); \
        } \
    } while (0)

/* --------------------------------------------------------------------------
 * Surroundings: a file system, an allocator, and the library's view of both
 * -------------------------------------------------------------------------- */

struct fuzz_world {
    struct sim_fs fs;
    struct test_alloc alloc;
    struct kv_env env;            /* for calls into the library's inside */
};

/* env is usable only after this, which opens the directory. */
static inline void fuzz_world_enter(struct fuzz_world *w, uint32_t key_bytes,
                                    uint32_t value_bytes)
{
    struct kv_env *env = &w->env;
    int rc;

    memset(env, 0, sizeof *env);
    sim_file_put(&w->fs, "LOCK", "", 0);
    env->vfs = &w->fs.vfs;
    env->realloc_fn = test_realloc;
    env->user = &w->alloc;
    kv_crc_init(&env->crc, true);
    kv_shape_init(&env->shape, key_bytes, value_bytes);
    rc = env->vfs->dir_open(env->vfs->user, SIM_DIR, &env->dir);
    FUZZ_CHECK(rc == 0, "the directory cannot be opened");
}

static inline void fuzz_world_init(struct fuzz_world *w)
{
    memset(&w->alloc, 0, sizeof w->alloc);
    w->alloc.limit_bytes = FUZZ_MEMORY_BYTES_MAX;
    sim_init(&w->fs, 512, 1);
}

/* Nothing may be left over, and no limit may have been met. */
static inline void fuzz_world_check(struct fuzz_world *w)
{
    FUZZ_CHECK(atomic_load(&w->alloc.live_blocks) == 0,
               "%lld blocks of memory are left",
               (long long)atomic_load(&w->alloc.live_blocks));
    FUZZ_CHECK(sim_open_handles(&w->fs) == 0, "%u handles are left open",
               sim_open_handles(&w->fs));
    FUZZ_CHECK(w->fs.misuses == 0, "a handle was used that is not open");
}

static inline void fuzz_world_leave(struct fuzz_world *w)
{
    w->env.vfs->dir_close(w->env.vfs->user, w->env.dir);
    fuzz_world_check(w);
    FUZZ_CHECK(atomic_load(&w->alloc.failures) == 0,
               "more than 256 MiB were asked for");
    sim_free(&w->fs);
}

/* The input, to be changed and freed by the caller. */
static inline uint8_t *fuzz_copy(const uint8_t *data, size_t bytes)
{
    uint8_t *copy = malloc(bytes ? bytes : 1);

    if (!copy) abort();
    memcpy(copy, data, bytes);
    return copy;
}

/* A number that follows from the bytes: what a target picks at random must
 * be the same each time that it runs the input. */
static inline uint64_t fuzz_hash(const void *data, size_t bytes)
{
    const unsigned char *p = data;
    struct test_rng rng = {bytes};
    uint64_t sum = bytes;

    for (size_t i = 0; i < bytes; i++) {
        rng.state ^= (uint64_t)p[i] << (i % 8 * 8);
        if (i % 8 == 7 || i + 1 == bytes) sum += test_rng_u64(&rng);
    }
    return test_rng_u64(&rng) ^ sum;
}

/* Widths out of a file, or others where these are out of range: a parser
 * never sees such widths, for the options are checked before. */
static inline void fuzz_widths(const uint8_t *key, const uint8_t *value,
                               uint32_t *key_bytes, uint32_t *value_bytes)
{
    *key_bytes = kv_load_le32(key);
    *value_bytes = kv_load_le32(value);
    if (*key_bytes < 1 || *key_bytes > KVMETA_KEY_BYTES_MAX) *key_bytes = 8;
    if (*value_bytes > KVMETA_VALUE_BYTES_MAX) *value_bytes = 16;
}

/* The codes that hostile bytes may lead to. */
static inline void fuzz_check_code(int rc, const struct kvmeta_error *err)
{
    FUZZ_CHECK(rc == KVMETA_OK || rc == KVMETA_E_CORRUPT
               || rc == KVMETA_E_VERSION || rc == KVMETA_E_MISMATCH,
               "unexpected result %d: %s", rc, err->message);
    if (rc == KVMETA_OK) return;
    FUZZ_CHECK(err->code == rc, "result %d, but error %d", rc, err->code);
    FUZZ_CHECK(err->message[0] != '\0' && !strchr(err->message, '\n'),
               "error %d has no proper message", rc);
}

#endif /* KVMETA_FUZZ_H */
