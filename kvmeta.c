/*
 * kvmeta.c - a store of fixed-width records: an ordered tree in memory, a
 * checksummed write-ahead log and compressed sorted tables on disk.
 *
 * This is the maintainer's manual; what a caller must know is in kvmeta.h.
 *
 * 1. MAP. A section uses only what stands above it.
 *
 *     configuration, limits, codec, CRC32C, digest   plain functions
 *     environment      errors, memory, log callback
 *     files, POSIX     the only system calls on files
 *     node memory, tree, versions, edits, delta, cursors, bulk load
 *                      all that is in memory; no I/O
 *     jobs, merge, planes, blocks, tables
 *                      sorted tables: merge, encode, read, write
 *     log frames, log writer, log replay
 *     marks, manifest  what exists, and how far it was acknowledged
 *     the store        the handle, failing, swapping the manifest
 *     commit right, rotation, flush and compaction, background work, commit
 *     open             options, listing, recovery
 *     public functions, statistics
 *
 * 2. FILES, all integers little-endian. K and V are the widths of key and
 * value. Sums are CRC32C, seeded by (uuid, kind of file, id, salt of file).
 *
 *   LOCK            held with flock; two marks of 64 bytes, at 0 and 4096
 *   MANIFEST        one image, twice: at 0 and at the next multiple of 4096
 *   w<16 hex>.wal   log: header block, then frames
 *   t<16 hex>.tab   table: see "Table layout" and "Table blocks" below
 *
 *   off size mark                        off size log header block
 *     0   8  magic "KVMMARK1"              0   8  magic "KVMLOG1"
 *     8  16  uuid                          8   4  version
 *    24   8  counter, ascending           12   4  align (log_align)
 *    32   8  generation of the manifest   16  16  uuid
 *    40   8  id of the live log           32   8  id
 *    48   8  its durable offset           40  16  salt
 *    56   4  zero                         56   4  K
 *    60   4  sum over 0..59               60   4  V
 *                                         64   4  bytes of an entry slot
 *   off size manifest image               68   4  zero
 *     0   8  magic "KVMMAN1"              72   8  seq of the first batch
 *     8   4  version                      80  16  digest before it
 *    12   4  bytes of the image           96  28  zero
 *    16  16  uuid                        124   4  sum over all but itself
 *    32   8  generation                  128  ..  zero, up to align
 *    40   8  next id
 *    48   8  seq of the table set        off size frame, at any multiple of 8
 *    56  16  its digest                    0   4  magic "KvfS" or "KvfP"
 *    72   4  K                             4   4  n, entry slots that follow
 *    76   4  V                             8   8  pos: its own offset
 *    80   4  tables (T)                   16   8  seq of its first batch
 *    84   4  logs (L)                     24   8  durable: synced up to here
 *    88   8  zero                         32  16  digest after the frame
 *    96 56T  tables, oldest first         48   4  prev: hcrc of the frame
 *    ..  40L  logs, oldest first                  before; the header's sum
 *    ..   4  zero                         52   4  batches
 *    ..   4  sum over all before          56   4  bcrc over entries and pad
 *                                         60   4  hcrc over 0..59
 *   off size table in the manifest        64  ..  entries, then zeros: "KvfS"
 *     0   8  id                                   ends at a multiple of
 *     8   8  bytes                                align, "KvfP" of 8
 *    16   8  records
 *    24   8  of them tombstones          off size entry, align8(8 + K + V)
 *    32   8  first seq                     0   1  1 put, 2 remove
 *    40   8  last seq                      1   7  zero
 *    48   4  sum of its footer             8   K  key
 *    52   4  zero                        8+K   V  value; zeros for remove
 *                                         ..  ..  zero
 *   off size log in the manifest
 *     0   8  id
 *     8  16  salt
 *    24   4  1 live, 2 sealed
 *    28   4  last hcrc (sealed)
 *    32   8  bytes (sealed)
 *
 * A frame that is synced ("KvfS") ends on a multiple of align, so that the
 * sectors that were acknowledged are never written again. A sync after frames
 * that were not ("KvfP") writes an empty one to get there.
 *
 * 3. STATES of a store on disk, and what moves it. Only a swap of the
 * manifest changes what exists; everything else is preparation or garbage.
 *
 *      (nothing) --create--> clean --first write--> live
 *      live --rotate--> live + sealed --flush--> live + tables
 *      live --close--> clean (all sealed)
 *      live --crash, open--> clean (the log becomes a table)
 *      tables --merge, full compaction, heal--> fewer tables
 *
 * 4. INVARIANTS. Each section's banner numbers its own; the ones that hold
 * the promises together:
 *
 *   L1  a frame is valid at one offset of one log of one store only
 *   W1  bytes before `durable` are never written again
 *   W2  a commit is acknowledged as durable once `durable` has passed it
 *   R2  a tail is dropped only if nothing says that it was acknowledged
 *   S2  a swap returns OK once all that the new manifest names is on disk
 *   F1  a file is unlinked only after a swap has dropped it
 *   F2  the records of the tables sum up to the manifest's digest
 *   C2  what is visible in durable mode is on disk
 *   C3  what has reached the log cannot fail in memory
 *   P2  the digest of what was recovered is the one that was stored
 *   V1  a node is freed only when no version that may be read sees it
 *   D2  puts that wait in a delta can no longer fail
 *   D4  a version that is held has no puts waiting
 *   E1  a node is changed only if it was made in the edit's own generation
 *
 * 5. LOCKS, in the order in which they are taken:
 *
 *   job lock       one background step; the open tables
 *   commit right   (a flag with a queue) tree edits, the live log
 *   swap lock      over the I/O of a swap of the manifest
 *   mark lock      over the write of a mark
 *   state lock     short: manifest in memory, flags, the conditions
 *   queue lock     short: the queue of the commit right
 *   delta lock     short: the delta of the current version
 *   tree lock      short: node memory, the list of versions
 *
 * Gets take none of them. Whoever takes a snapshot, or asks for the count or
 * the digest, takes the delta lock; releasing one takes the tree lock.
 *
 * The last five are not held over log_fn. The job lock, the commit right and
 * the swap lock may be: steps, writers and swaps wait for what it does, and a
 * call of the store from there could wait for itself. Readers do not wait.
 *
 * 6. A CRASH at each step leaves:
 *
 *   create    no manifest: the next open creates; or generation 1: empty
 *   commit    before the sync: the frame, whole or torn; kept if whole
 *   rotate    the new log unlisted (garbage), or the swap done
 *   flush     a table unlisted (garbage), or listed with the log unlisted
 *   merge     the same
 *   open      as before it, or with the live log as a table
 *   close     live, or sealed
 *
 * 7. TORN OR DAMAGED? The live log is read up to the first place where no
 * valid frame follows the chain. If any frame in the file, or a mark, says
 * that a sync had passed that place, acknowledged bytes are damaged, and the
 * open fails. Otherwise nothing behind it was ever acknowledged: it is
 * dropped and counted. A sealed log has no tail: every byte must be there.
 *
 * SPDX-License-Identifier: MIT
 */

/* ==========================================================================
 * Configuration and platform
 *
 * Feature macros, headers, and the few things that differ between compilers
 * and processors. Everything below this section is plain C11 and POSIX, but
 * for what stands between #if KV_X86 or the name of a system; each such piece
 * has a plain twin that gives the same results.
 * ========================================================================== */

/* Feature macros come before the first header. The file sets them itself, so
 * that `cc -std=c11 -c kvmeta.c` is enough in any host. FreeBSD, NetBSD and
 * OpenBSD show flock and the like only where none is set. */

#if !defined(_FILE_OFFSET_BITS)
#  define _FILE_OFFSET_BITS 64    /* on 32 bits: large files and inodes */
#endif
#if defined(__linux__) && !defined(_GNU_SOURCE)
#  define _GNU_SOURCE 1           /* MADV_HUGEPAGE, MAP_ANONYMOUS */
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#  define _DARWIN_C_SOURCE 1      /* F_FULLFSYNC */
#elif !defined(_POSIX_C_SOURCE) && !defined(__FreeBSD__) \
    && !defined(__NetBSD__) && !defined(__OpenBSD__)
#  define _POSIX_C_SOURCE 200809L
#endif

#include "kvmeta.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#  include <sys/syscall.h>
#endif
#define ZSTD_STATIC_LINKING_ONLY   /* contexts from realloc_fn */
#include <zstd.h>

/* The x86 paths need function targets and __builtin_cpu_supports: compiled
 * for any x86-64, taken where the processor has them. On AArch64 the
 * compiler's target decides, as there is no portable way to ask. */
#if defined(__x86_64__) && defined(__GNUC__)
#  include <immintrin.h>
#  define KV_X86 1
#else
#  define KV_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#  include <arm_acle.h>
#  define KV_ARM_CRC 1
#else
#  define KV_ARM_CRC 0
#endif

/* Hints: without them everything works, only slower. KV_PREFETCH_L2 fetches
 * into the second cache, for what is needed later; KV_NOINLINE keeps rare
 * work out of functions that run all the time. */
#if defined(__GNUC__)
#  define KV_LIKELY(x) __builtin_expect(!!(x), 1)
#  define KV_UNLIKELY(x) __builtin_expect(!!(x), 0)
#  define KV_PREFETCH(p) __builtin_prefetch(p)
#  define KV_PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)
#  define KV_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#  define KV_NOINLINE __attribute__((noinline))
#  define KV_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#  define KV_LIKELY(x) (x)
#  define KV_UNLIKELY(x) (x)
#  define KV_PREFETCH(p) ((void)(p))
#  define KV_PREFETCH_L2(p) ((void)(p))
#  define KV_PRINTF(fmt, args)
#  define KV_NOINLINE
#  define KV_ALWAYS_INLINE inline
#endif

/* Pins of a reader without an edit between them after which the bias begins:
 * see "Versions and reader slots". A test build may define it. */
#ifndef KV_PINS_CALM
#  define KV_PINS_CALM 256
#endif

/* ThreadSanitizer knows no barriers but those of C11. */
#if defined(__SANITIZE_THREAD__)
#  define KV_TSAN 1
#elif defined(__has_feature)
#  define KV_TSAN __has_feature(thread_sanitizer)
#else
#  define KV_TSAN 0
#endif

/* A test build may define this to run a seeded scheduler: it marks the places
 * where the interleaving of threads matters, besides locks and atomics, which
 * such a build replaces anyway. */
#ifndef KV_SCHED_POINT
#  define KV_SCHED_POINT(name) ((void)0)
#endif

/* A test build may break one rule of the protocol, to show that the tests
 * notice: KVMETA_MUTANT=n makes KV_MUTANT(n) true. */
#ifndef KVMETA_MUTANT
#  define KVMETA_MUTANT 0
#endif
#define KV_MUTANT(n) (KVMETA_MUTANT == (n))

_Static_assert(CHAR_BIT == 8, "the formats count in bytes of 8 bits");
_Static_assert(sizeof(off_t) == 8, "files may be larger than 2 GiB");
_Static_assert(sizeof(size_t) >= 4, "blocks must fit in memory");

/* ==========================================================================
 * Limits and results
 *
 * Numbers that more than one section needs, the widths of a store, and
 * arithmetic on sizes. Plain functions, for any thread.
 * ========================================================================== */

enum {
    KV_CACHE_LINE = 64,           /* also what nodes are aligned to */
    KV_PAGE_BYTES = 4096,
    KV_UUID_BYTES = 16,           /* of a store, random */
    KV_SALT_BYTES = 16,           /* of a log or table, random */
    KV_LOGS_WAITING_MAX = 8,      /* sealed logs before writers wait */
    KV_TABLES_MAX = 1024,         /* that a manifest may list */
    KV_RETRIES_MAX = 100,         /* of a system call that says EINTR */
    KV_NAME_BYTES = 32            /* of any name of ours, with its NUL */
};

/* Ids, commit numbers and counters stay below this: nobody gets so far by
 * counting, and what a hostile file says must not overflow when it is added
 * to. What is counted on from must be lower: the numbers of a manifest that is
 * read by half, and ids in names by half again, as the next manifest has a
 * higher one. */
#define KV_NUMBER_MAX ((uint64_t)1 << 62)
#define KV_NUMBER_READ_MAX (KV_NUMBER_MAX / 2)
#define KV_NUMBER_NAME_MAX (KV_NUMBER_MAX / 4)

_Static_assert((KV_CACHE_LINE & (KV_CACHE_LINE - 1)) == 0, "a power of two");
_Static_assert(KV_NAME_BYTES > 21, "w<16 digits>.wal with its NUL");

/* Internal results, never returned by a public function. */
enum {
    KV_END = 100,                 /* a source has no more records */
    KV_STOPPED = 101              /* the store is closing; give up quietly */
};

_Static_assert(KV_END > (int)KVMETA_CONFLICT, "not to be taken for an answer");

/* The widths of a store and what follows from them. Immutable after open.
 * Records of 16 + 8 bytes: keys have a head of 8 bytes and a tail of 8. Keys
 * of up to 8 bytes have no tail, and then nobody looks at tails. */
struct kv_shape {
    uint32_t key_bytes;
    uint32_t value_bytes;
    uint32_t tail_bytes;          /* of a key, behind its first 8 bytes */
    uint32_t record_bytes;        /* key_bytes + value_bytes */
};

/* The widths have been checked, with the options that they come from. */
static void kv_shape_init(struct kv_shape *shape, uint32_t key_bytes,
                          uint32_t value_bytes)
{
    assert(key_bytes >= 1 && key_bytes <= KVMETA_KEY_BYTES_MAX);
    assert(value_bytes <= KVMETA_VALUE_BYTES_MAX);
    shape->key_bytes = key_bytes;
    shape->value_bytes = value_bytes;
    shape->tail_bytes = key_bytes > 8 ? key_bytes - 8 : 0;
    shape->record_bytes = key_bytes + value_bytes;
}

/* Of 64 bits, whatever the operands are: a caller who narrows the result
 * knows that one of them was as narrow. */
static uint64_t kv_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t kv_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* `align` is a power of two; n + align must not overflow. */
static uint64_t kv_align_up(uint64_t n, uint64_t align)
{
    assert(align > 0);
    assert((align & (align - 1)) == 0);
    assert(n <= UINT64_MAX - align);
    return (n + align - 1) & ~(align - 1);
}

/* memcpy and memcmp of the usual widths without a call: a fifth of the
 * time of a buffered put. Both take n = 0 with NULL, which memcpy may not
 * be given. */
static void kv_copy(void *to, const void *from, size_t n)
{
    assert(n == 0 || to);
    assert(n == 0 || from);
    if (n == 16)
        memcpy(to, from, 16);
    else if (n == 8)
        memcpy(to, from, 8);
    else if (n)
        memcpy(to, from, n);
}

static bool kv_same(const void *a, const void *b, size_t n)
{
    assert(n == 0 || a);
    assert(n == 0 || b);
    if (n == 16) return memcmp(a, b, 16) == 0;
    if (n == 8) return memcmp(a, b, 8) == 0;
    return n == 0 || memcmp(a, b, n) == 0;
}

/* ==========================================================================
 * Little-endian codec
 *
 * All integers on disk go through these; compilers turn each into one load
 * or store. kv_load_be64 reads the head of a key, whose order as a number is
 * the order of its bytes.
 *
 * Bytes are put together by shifts and not by a cast or a copy: p needs no
 * alignment, and the same file comes out on a big-endian machine. The caller
 * sees to it that 4, or 8, bytes are there.
 * ========================================================================== */

/* What a store writes the load of the same name reads, on every machine. */
static inline uint32_t kv_load_le32(const void *p)
{
    const unsigned char *b = p;

    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16
        | (uint32_t)b[3] << 24;
}

static inline uint64_t kv_load_le64(const void *p)
{
    const unsigned char *b = p;

    return (uint64_t)kv_load_le32(b) | (uint64_t)kv_load_le32(b + 4) << 32;
}

static void kv_store_le32(void *p, uint32_t v)
{
    unsigned char *b = p;

    b[0] = (unsigned char)v;
    b[1] = (unsigned char)(v >> 8);
    b[2] = (unsigned char)(v >> 16);
    b[3] = (unsigned char)(v >> 24);
}

static void kv_store_le64(void *p, uint64_t v)
{
    unsigned char *b = p;

    kv_store_le32(b, (uint32_t)v);
    kv_store_le32(b + 4, (uint32_t)(v >> 32));
}

static inline uint64_t kv_load_be64(const void *p)
{
    const unsigned char *b = p;

    return (uint64_t)b[0] << 56 | (uint64_t)b[1] << 48 | (uint64_t)b[2] << 40
        | (uint64_t)b[3] << 32 | (uint64_t)b[4] << 24 | (uint64_t)b[5] << 16
        | (uint64_t)b[6] << 8 | (uint64_t)b[7];
}

/* The first 8 bytes of a key as a number; shorter keys count as if followed
 * by zeros, which keeps their order because all keys have one width. Two keys
 * are ordered as their heads are, and where those are equal by the rest. */
static inline uint64_t kv_key_head(const struct kv_shape *shape,
                                   const void *key)
{
    unsigned char padded[8] = {0};

    assert(shape->key_bytes > 0);
    if (KV_LIKELY(shape->key_bytes >= 8)) return kv_load_be64(key);
    memcpy(padded, key, shape->key_bytes);
    return kv_load_be64(padded);
}

/* ==========================================================================
 * CRC32C
 *
 * The Castagnoli polynomial 0x1EDC6F41, reflected, as in iSCSI (RFC 3720).
 * A sum starts from a seed that depends on the file (kv_crc_file_seed), so
 * that bytes of another file, or of an earlier one, never validate. The same
 * sums come from the processor's instruction and from a table.
 *
 * A sum finds accidents: any burst of up to 32 bits, and of longer ones all
 * but one in 2^32. Nothing here stands up to whoever can choose bytes.
 *
 * Bits are inverted before and after, so that sums chain: with s the sum of a
 * from some seed, the sum of b from s is that of a and b in one piece. From
 * seed 0 the nine bytes "123456789" have the sum 0xE3069283.
 * ========================================================================== */

/* How this process sums; fixed after kv_crc_init, so any thread may use it.
 * The table is filled only where the processor does not help. */
struct kv_crc {
    bool hardware;
    uint32_t table[256];
};

/* allow_hardware: false only in tests, to compare both ways. The table is the
 * usual one for a byte at a time, low bit first; 0x82F63B78 is the polynomial
 * with its bits reversed. */
static void kv_crc_init(struct kv_crc *crc, bool allow_hardware)
{
#if KV_X86
    crc->hardware = allow_hardware && __builtin_cpu_supports("sse4.2");
#else
    crc->hardware = allow_hardware && KV_ARM_CRC;
#endif
    if (crc->hardware) return;

    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;

        for (int bit = 0; bit < 8; bit++)
            c = (c & 1) ? (c >> 1) ^ 0x82F63B78u : c >> 1;
        crc->table[i] = c;
    }
    assert(crc->table[0] == 0);
    assert(crc->table[128] == 0x82F63B78u);
}

/* `sum` is inverted already, before and after. Eight bytes at a time, in the
 * order of the file, hence by kv_load_le64. */
#if KV_X86
__attribute__((target("sse4.2")))
static uint32_t kv_crc_hardware(uint32_t sum, const unsigned char *p, size_t n)
{
    uint64_t wide = sum;

    for (; n >= 8; n -= 8, p += 8)
        wide = _mm_crc32_u64(wide, kv_load_le64(p));
    sum = (uint32_t)wide;
    for (; n > 0; n--) sum = _mm_crc32_u8(sum, *p++);
    return sum;
}
#elif KV_ARM_CRC
static uint32_t kv_crc_hardware(uint32_t sum, const unsigned char *p, size_t n)
{
    for (; n >= 8; n -= 8, p += 8) sum = __crc32cd(sum, kv_load_le64(p));
    for (; n > 0; n--) sum = __crc32cb(sum, *p++);
    return sum;
}
#else
static uint32_t kv_crc_hardware(uint32_t sum, const unsigned char *p, size_t n)
{
    (void)p;
    (void)n;
    return sum;                   /* never called: crc->hardware is false */
}
#endif

/* Continues `sum` (a seed, or the result for the bytes before) over n bytes. */
static uint32_t kv_crc_add(const struct kv_crc *crc, uint32_t sum,
                           const void *bytes, size_t n)
{
    const unsigned char *p = bytes;

    assert(n == 0 || bytes);
    sum = ~sum;
    if (crc->hardware) {
        sum = kv_crc_hardware(sum, p, n);
    } else {
        for (; n > 0; n--)
            sum = (sum >> 8) ^ crc->table[(sum ^ *p++) & 0xff];
    }
    return ~sum;
}

/* ==========================================================================
 * Digest
 *
 * A 128-bit sum over records that does not depend on their order: two lanes
 * mod 2^64. H mixes each 8-byte word by a bijection, with other odd constants
 * in each lane. Carries (D1): the digest of a version is the sum of H over
 * its records; every change subtracts the old record and adds the new one.
 * Tombstones have a sum of their own, for the balance of a merge.
 *
 * The five constants are the fractional parts of the square roots of 2, 3, 5,
 * 7 and 11, as in SHA-512 (FIPS 180-4): nobody chose them to fit. Those that
 * are multiplied by must be odd, or the step is no bijection. Digests are
 * stored, in frames, manifests and footers: none of this may ever change
 * without a new version of the formats.
 *
 * A sum, and not an exclusive or: a record that is there twice must not
 * cancel out. Two lanes, since among some billions of states two would have
 * the same 64 bits by chance.
 * ========================================================================== */

#define KV_DIGEST_SEED_A 0x6A09E667F3BCC908u
#define KV_DIGEST_SEED_B 0xBB67AE8584CAA73Bu
#define KV_DIGEST_ODD_A 0x3C6EF372FE94F82Bu
#define KV_DIGEST_ODD_B 0xA54FF53A5F1D36F1u
#define KV_DIGEST_TOMBSTONE 0x510E527FADE682D1u

_Static_assert(KV_DIGEST_ODD_A & 1, "or the step is no bijection");
_Static_assert(KV_DIGEST_ODD_B & 1, "or the step is no bijection");
_Static_assert(KV_DIGEST_ODD_A != KV_DIGEST_ODD_B, "lanes must not agree");

/* For a given word a bijection of h, and for a given h one of the word:
 * what differs stays different under the same word, and a different word
 * makes a difference. The shift brings the high bits, which a product
 * mixes best, back down. */
static inline void kv_digest_mix(struct kvmeta_digest *h, uint64_t word)
{
    h->lo = (h->lo ^ word) * KV_DIGEST_ODD_A;
    h->hi = (h->hi ^ word) * KV_DIGEST_ODD_B;
    h->lo ^= h->lo >> 29;
    h->hi ^= h->hi >> 29;
}

/* The last word is filled up with zeros: all records of a store have the same
 * widths, so none is mistaken for one that is longer. */
static inline void kv_digest_mix_bytes(struct kvmeta_digest *h,
                                       const void *bytes, size_t n)
{
    const unsigned char *p = bytes;
    unsigned char padded[8] = {0};

    for (; n >= 8; n -= 8, p += 8) kv_digest_mix(h, kv_load_le64(p));
    if (n == 0) return;
    memcpy(padded, p, n);
    kv_digest_mix(h, kv_load_le64(padded));
}

/* H(key, value); value NULL: of a tombstone. */
static struct kvmeta_digest kv_digest_record(const struct kv_shape *shape,
                                             const void *key,
                                             const void *value)
{
    struct kvmeta_digest h = {KV_DIGEST_SEED_A, KV_DIGEST_SEED_B};

    assert(key);
    assert(shape->record_bytes == shape->key_bytes + shape->value_bytes);
    kv_digest_mix_bytes(&h, key, shape->key_bytes);
    if (value)
        kv_digest_mix_bytes(&h, value, shape->value_bytes);
    else
        kv_digest_mix(&h, KV_DIGEST_TOMBSTONE);
    /* One more round: the last word must reach the high bits of the sum. */
    kv_digest_mix(&h, shape->record_bytes);
    return h;
}

/* Modulo 2^64 in each lane: order does not matter, and subtracting undoes.
 * The fence costs no instruction. It keeps compilers from adding both lanes
 * as one vector, for which the record's come from registers by way of memory,
 * where gcc 12 stalls for a twentieth of the time of a put. */
static void kv_digest_add(struct kvmeta_digest *sum, struct kvmeta_digest h)
{
    sum->lo += h.lo;
    atomic_signal_fence(memory_order_seq_cst);
    sum->hi += h.hi;
}

static void kv_digest_sub(struct kvmeta_digest *sum, struct kvmeta_digest h)
{
    sum->lo -= h.lo;
    atomic_signal_fence(memory_order_seq_cst);
    sum->hi -= h.hi;
}

static bool kv_digest_equal(struct kvmeta_digest a, struct kvmeta_digest b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

/* ==========================================================================
 * Environment: errors, memory, log
 *
 * What every section needs of the host. Immutable after open, but for the
 * counters. kv_fail is the only place where an error text is made. Everything
 * here may be called from any thread, with or without locks, but for kv_log.
 *
 * An error is a code that is returned and a text for *err. Whoever meets it
 * first fills *err; those above pass the code on, and fill it anew only if
 * they know better. Where err may be NULL nobody wants the text. Texts are
 * cut off, never allocated: a lack of memory must be told, too.
 * ========================================================================== */

/* One per handle, inside of it. `uuid` is that of the store, known once the
 * manifest has been read or made. */
struct kv_env {
    const struct kvmeta_vfs *vfs;
    void *(*realloc_fn)(void *user, void *old, size_t bytes);   /* or NULL */
    void (*log_fn)(void *user, int level, const char *message); /* or NULL */
    void *user;
    struct kv_shape shape;
    struct kv_crc crc;
    unsigned char uuid[KV_UUID_BYTES];
    int dir;                      /* -1: not open */
    uint64_t process_id;          /* of the process that opened the store */
    _Atomic uint64_t bytes_written;   /* to all files, since the open */
    _Atomic uint64_t bytes_read;
};

/* Fills in *err (NULL allowed) and returns `code`, a KVMETA_* that is not OK.
 * sys_errno: of the system call that failed, or 0. The text has no newline,
 * and names no keys or values; what is too long is cut off. */
KV_PRINTF(4, 5)
static int kv_fail(struct kvmeta_error *err, int code, int sys_errno,
                   const char *format, ...)
{
    va_list args;

    assert(code != KVMETA_OK);
    assert(code >= KVMETA_E_FORKED);
    assert(code <= KVMETA_CONFLICT);
    assert(format);
    if (!err) return code;
    err->code = code;
    err->sys_errno = sys_errno;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    return code;
}

/* Returns the constant, and not what kv_fail does: analysers then see that it
 * is always a failure. bytes: SIZE_MAX for more than can be asked for. */
static int kv_fail_memory(struct kvmeta_error *err, size_t bytes)
{
    kv_fail(err, KVMETA_E_NOMEM, ENOMEM, "no memory for %zu bytes", bytes);
    return KVMETA_E_NOMEM;
}

/* As realloc: NULL when there is no memory, and `old` is then as it was. All
 * memory of a handle comes from here, from kv_alloc_pages, or from the slabs,
 * so that realloc_fn sees everything; freeing has the matching three. */
static void *kv_resize(struct kv_env *env, void *old, size_t bytes)
{
    assert(bytes > 0);
    if (env->realloc_fn) return env->realloc_fn(env->user, old, bytes);
    return realloc(old, bytes);
}

static void *kv_alloc(struct kv_env *env, size_t bytes)
{
    return kv_resize(env, NULL, bytes);
}

/* Buffers of this size live as long as one job. The C library would keep
 * their memory: tens of megabytes that the store does not need afterwards.
 * The answer depends on the size alone, so freeing finds the same one.
 * With a realloc_fn nothing is hidden from it. */
static bool kv_uses_pages(const struct kv_env *env, size_t bytes)
{
#if defined(MAP_ANONYMOUS)
    return !env->realloc_fn && bytes >= 1 << 20;
#else
    (void)env;
    (void)bytes;
    return false;
#endif
}

/* Memory for the buffers of a job, not cleared; goes back to the system when
 * kv_free_pages gets it with the same size. NULL: there is none. */
static void *kv_alloc_pages(struct kv_env *env, size_t bytes)
{
    assert(bytes > 0);
#if defined(MAP_ANONYMOUS)
    if (kv_uses_pages(env, bytes)) {
        void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        return p == MAP_FAILED ? NULL : p;
    }
#endif
    return kv_alloc(env, bytes);
}

/* For structs and arrays whose zeroed state is one that may be freed. */
static void *kv_alloc_zeroed(struct kv_env *env, size_t bytes)
{
    void *p = kv_alloc(env, bytes);

    if (p) memset(p, 0, bytes);
    return p;
}

/* The first cache line that begins in memory for which a line more was asked
 * for than will be used: no allocator need align to one. */
static void *kv_line_up(void *memory)
{
    uintptr_t at = (uintptr_t)memory;

    return (unsigned char *)memory + (kv_align_up(at, KV_CACHE_LINE) - at);
}

/* For what kv_alloc, kv_alloc_zeroed or kv_resize returned; NULL allowed. */
static void kv_free(struct kv_env *env, void *p)
{
    if (!p) return;
    if (env->realloc_fn)
        env->realloc_fn(env->user, p, 0);
    else
        free(p);
}

/* bytes: as given to kv_alloc_pages. */
static void kv_free_pages(struct kv_env *env, void *p, size_t bytes)
{
    if (p && kv_uses_pages(env, bytes))
        munmap(p, bytes);
    else
        kv_free(env, p);
}

/* Makes room for `need` elements in a growing array; doubles, from 16 on.
 * On failure array and capacity are as they were. *cap counts elements;
 * *array is NULL where it is 0, and may move. No product here can
 * overflow. */
static int kv_grow(struct kv_env *env, void **array, size_t *cap, size_t need,
                   size_t element_bytes, struct kvmeta_error *err)
{
    size_t want = *cap ? *cap : 16;
    void *p;

    assert(element_bytes > 0);
    assert(*cap == 0 || *array);
    if (need <= *cap) return KVMETA_OK;
    /* Doubling makes adding one by one cost a constant time on average. */
    while (want < need) {
        if (want > SIZE_MAX / 2) return kv_fail_memory(err, SIZE_MAX);
        want *= 2;
    }
    if (want > SIZE_MAX / element_bytes) return kv_fail_memory(err, SIZE_MAX);
    p = kv_resize(env, *array, want * element_bytes);
    if (!p) return kv_fail_memory(err, want * element_bytes);
    *array = p;
    *cap = want;
    assert(*cap >= need);
    return KVMETA_OK;
}

/* Tells the host's log_fn, if there is one. Never under the mark, state, queue,
 * delta or tree lock: the host may take its time, and readers must not wait
 * for it. level: enum kvmeta_log_level. */
KV_PRINTF(3, 4)
static void kv_log(struct kv_env *env, int level, const char *format, ...)
{
    char message[320];
    va_list args;

    assert(level >= KVMETA_LOG_ERROR);
    assert(level <= KVMETA_LOG_INFO);
    if (!env->log_fn) return;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    env->log_fn(env->user, level, message);
}

/* ==========================================================================
 * Files
 *
 * Every read, write and sync goes through here; of the vfs only the rename of
 * the manifest, listing, opening and closing the directory, the lock, the
 * clock and the process id are asked for elsewhere. Names are computed from
 * kind and id. Reads and writes are whole or fail; every failure names the
 * file and the offset. A full disk is told apart from any other failure
 * (KVMETA_E_NOSPACE).
 *
 * Any thread may call; who may use which file at the same time is for the
 * sections below to say. Errors are told, not judged: whether one ends all
 * writing is kv_store_judge's decision, from the code. So the codes matter:
 *
 *   KVMETA_E_NOSPACE   there was no room; it may succeed later
 *   KVMETA_E_LIMIT     no descriptor was left; an open may succeed later
 *   KVMETA_E_NOMEM     the system had no memory for it
 *   KVMETA_E_IO        anything else: what is in the file is unknown
 *   KVMETA_E_CORRUPT   the file is not what it should be
 *
 * What the vfs returns is a host's word. Codes and sizes are checked as those
 * of the system would be; that a read moved no more than was asked for is
 * part of its contract.
 *
 * A call that a signal has interrupted is made again where that is harmless:
 * opens, reads, writes. Not for ever, since a vfs might say EINTR each time.
 * An error text looks like one of these:
 *
 *   w000000000000002a.wal: write at 8192: error 28
 *   t0000000000000007.tab: at 65536: ends here, want 512 more
 * ========================================================================== */

/* The numbers go into the seeds of sums (kv_crc_file_seed): never change
 * them. */
enum kv_file_kind {
    KV_FILE_LOCK = 1,
    KV_FILE_MANIFEST = 2,
    KV_FILE_MANIFEST_TMP = 3,
    KV_FILE_LOG = 4,
    KV_FILE_TABLE = 5
};

/* An open file, or just the name of one: kind and id are set and `open` is
 * not, where only an error text or a place in a list is wanted. Zeroed: not
 * open, nothing to close. Copying it copies the handle: one copy closes. */
struct kv_file {
    int handle;                   /* valid while `open` */
    bool open;
    uint8_t kind;                 /* enum kv_file_kind */
    uint64_t id;                  /* of logs and tables */
};

/* The one place where names are made. Ids in names have 16 digits, so names
 * of one kind sort as their ids do. id: ignored for the fixed names. */
static void kv_file_name(int kind, uint64_t id, char name[KV_NAME_BYTES])
{
    static const char *const fixed[] = {
        "", "LOCK", "MANIFEST", "MANIFEST.tmp"
    };

    assert(kind >= KV_FILE_LOCK);
    assert(kind <= KV_FILE_TABLE);
    if (kind <= KV_FILE_MANIFEST_TMP)
        snprintf(name, KV_NAME_BYTES, "%s", fixed[kind]);
    else
        snprintf(name, KV_NAME_BYTES, "%c%016llx.%s",
                 kind == KV_FILE_LOG ? 'w' : 't', (unsigned long long)id,
                 kind == KV_FILE_LOG ? "wal" : "tab");
}

/* The kind of file that has this name exactly, or 0 for one that is not
 * ours; *id for logs and tables, else 0. What is not ours is never
 * touched, so this must not be generous: the name is made again and
 * compared, and upper case, or an id beyond KV_NUMBER_NAME_MAX, is somebody
 * else's file. */
static int kv_file_parse_name(const char *name, uint64_t *id)
{
    char again[KV_NAME_BYTES];
    uint64_t n = 0;
    int kind;

    *id = 0;
    for (kind = KV_FILE_LOCK; kind <= KV_FILE_MANIFEST_TMP; kind++) {
        kv_file_name(kind, 0, again);
        if (strcmp(name, again) == 0) return kind;
    }
    /* A letter, 16 digits, a dot and three letters. */
    if (strlen(name) != 21) return 0;
    if (name[0] != 'w' && name[0] != 't') return 0;
    for (int i = 1; i <= 16; i++) {
        const char *digits = "0123456789abcdef";
        const char *digit = strchr(digits, name[i]);

        if (!digit) return 0;
        n = n << 4 | (uint64_t)(digit - digits);
    }
    kind = name[0] == 'w' ? KV_FILE_LOG : KV_FILE_TABLE;
    if (n >= KV_NUMBER_NAME_MAX) return 0;
    kv_file_name(kind, n, again);
    if (strcmp(name, again) != 0) return 0;
    *id = n;
    return kind;
}

/*
 * The seed of all sums over bytes of one file (L1): bytes of another store,
 * of another kind or id, or of an earlier file of this name do not validate
 * in it. The salt is for the last of these: ids are used once, but a file
 * that was restored from elsewhere, or blocks that come back from the dead,
 * may have the same.
 */
static uint32_t kv_crc_file_seed(const struct kv_env *env, int kind,
                                 uint64_t id,
                                 const unsigned char salt[KV_SALT_BYTES])
{
    unsigned char bytes[KV_UUID_BYTES + 4 + 8 + KV_SALT_BYTES];

    _Static_assert(KV_UUID_BYTES == 16, "as the offsets below");
    _Static_assert(sizeof bytes == 44, "as the offsets below");

    memcpy(bytes, env->uuid, KV_UUID_BYTES);
    kv_store_le32(bytes + 16, (uint32_t)kind);
    kv_store_le64(bytes + 20, id);
    memcpy(bytes + 28, salt, KV_SALT_BYTES);
    return kv_crc_add(&env->crc, 0, bytes, sizeof bytes);
}

/* A failed system call, at `off` of the file where that means something.
 * EFBIG, a limit on the size of files, counts as a full disk: the next file
 * may have room. Always fails. */
static int kv_fail_file(struct kvmeta_error *err, const struct kv_file *file,
                        int sys_errno, const char *what, uint64_t off)
{
    char name[KV_NAME_BYTES];
    int code = KVMETA_E_IO;

    assert(sys_errno != 0);
    if (sys_errno == ENOSPC || sys_errno == EDQUOT || sys_errno == EFBIG)
        code = KVMETA_E_NOSPACE;
    if (sys_errno == ENOMEM) code = KVMETA_E_NOMEM;
    kv_file_name(file->kind, file->id, name);
    return kv_fail(err, code, sys_errno, "%s: %s at %llu: error %d", name,
                   what, (unsigned long long)off, sys_errno);
}

/* A rule of the format that does not hold at `off` of the file: always
 * KVMETA_E_CORRUPT. The format is of the rule, the name is put before it. */
KV_PRINTF(4, 5)
static int kv_fail_corrupt(struct kvmeta_error *err, const struct kv_file *file,
                           uint64_t off, const char *format, ...)
{
    char name[KV_NAME_BYTES];
    char text[160];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    kv_file_name(file->kind, file->id, name);
    return kv_fail(err, KVMETA_E_CORRUPT, 0, "%s: at %llu: %s", name,
                   (unsigned long long)off, text);
}

/* What a failed open is: the want of a descriptor passes. */
static int kv_open_code(int sys_errno)
{
    return sys_errno == EMFILE || sys_errno == ENFILE ? KVMETA_E_LIMIT
                                                      : KVMETA_E_IO;
}

/* For uuids and salts. The default vfs opens a device for it, so it can lack
 * a descriptor, too. */
static int kv_random(struct kv_env *env, void *buf, size_t bytes,
                     struct kvmeta_error *err)
{
    int e = env->vfs->random(env->vfs->user, buf, bytes);

    assert(bytes > 0);
    if (!e) return KVMETA_OK;
    return kv_fail(err, kv_open_code(e), e, "random numbers: error %d", e);
}

/* flags: enum kvmeta_vfs_open. A missing file is KVMETA_NOT_FOUND, unless it is
 * to be created; a link or anything but a regular file is KVMETA_E_CORRUPT,
 * since we made none such. The lack of a descriptor is KVMETA_E_LIMIT. After
 * an error *file is closed, with kind and id set. */
static int kv_file_open(struct kv_env *env, int kind, uint64_t id, int flags,
                        struct kv_file *file, struct kvmeta_error *err)
{
    char name[KV_NAME_BYTES];
    int handle = -1;
    int e;

    assert(env->dir >= 0);
    assert(!(flags & KVMETA_VFS_CREATE) || (flags & KVMETA_VFS_WRITE));
    assert(!(flags & KVMETA_VFS_EXCL) || (flags & KVMETA_VFS_CREATE));
    memset(file, 0, sizeof *file);
    file->kind = (uint8_t)kind;
    file->id = id;
    kv_file_name(kind, id, name);
    for (int i = 0; i < KV_RETRIES_MAX; i++) {
        e = env->vfs->file_open(env->vfs->user, env->dir, name, flags,
                                &handle);
        if (e != EINTR) break;
    }
    /* A file that is to be created cannot be missing: its directory is. */
    if (e == ENOENT && !(flags & KVMETA_VFS_CREATE))
        return kv_fail(err, KVMETA_NOT_FOUND, e, "%s: missing", name);
    /* The vfs says EINVAL of anything but a regular file; the system itself
     * says ELOOP of a link, EISDIR of a directory that is to be written, and
     * ENXIO of a socket. */
    if (e == EINVAL || e == ELOOP || e == EISDIR || e == ENXIO)
        return kv_fail(err, KVMETA_E_CORRUPT, e, "%s: not a regular file",
                       name);
    if (kv_open_code(e) == KVMETA_E_LIMIT)
        return kv_fail(err, KVMETA_E_LIMIT, e, "%s: open: error %d", name, e);
    if (e) return kv_fail_file(err, file, e, "open", 0);
    file->handle = handle;
    file->open = true;
    return KVMETA_OK;
}

/* Accepts a zeroed or a closed file. That closing fails is not looked at:
 * what must be on disk has been synced before, and that was checked. */
static void kv_file_close(struct kv_env *env, struct kv_file *file)
{
    if (!file->open) return;
    file->open = false;
    env->vfs->file_close(env->vfs->user, file->handle);
}

/* Bytes, as the system says now; nothing keeps others from changing it. */
static int kv_file_size(struct kv_env *env, const struct kv_file *file,
                        uint64_t *bytes, struct kvmeta_error *err)
{
    int e = env->vfs->file_size(env->vfs->user, file->handle, bytes);

    assert(file->open);
    return e ? kv_fail_file(err, file, e, "size", 0) : KVMETA_OK;
}

/* Reads exactly `bytes`; a file that ends before is KVMETA_E_CORRUPT.
 * After an error the contents of buf are undefined. */
static int kv_file_read(struct kv_env *env, const struct kv_file *file,
                        void *buf, size_t bytes, uint64_t off,
                        struct kvmeta_error *err)
{
    unsigned char *p = buf;
    int retries = 0;

    assert(file->open);
    assert(bytes == 0 || buf);
    while (bytes > 0) {
        int64_t n = env->vfs->file_read(env->vfs->user, file->handle, p,
                                        bytes, off);

        /* The retries are of the whole call, not of each part. */
        if (n == -EINTR && retries++ < KV_RETRIES_MAX) continue;
        if (n < 0) return kv_fail_file(err, file, (int)-n, "read", off);
        if (n == 0)
            return kv_fail_corrupt(err, file, off, "ends here, want %zu more",
                                   bytes);
        assert((uint64_t)n <= bytes);
        env->bytes_read += (uint64_t)n;
        p += n;
        off += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return KVMETA_OK;
}

/* Writes exactly `bytes` at `off`, or fails; then any part of it may be in
 * the file, even after KVMETA_E_NOSPACE. It is not on disk before a sync. */
static int kv_file_write(struct kv_env *env, const struct kv_file *file,
                         const void *buf, size_t bytes, uint64_t off,
                         struct kvmeta_error *err)
{
    const unsigned char *p = buf;
    int retries = 0;

    assert(file->open);
    assert(bytes == 0 || buf);
    assert(off < KV_NUMBER_MAX);
    while (bytes > 0) {
        int64_t n = env->vfs->file_write(env->vfs->user, file->handle, p,
                                         bytes, off);

        if (n == -EINTR && retries++ < KV_RETRIES_MAX) continue;
        if (n == 0) n = -ENOSPC;  /* no progress, and no reason given */
        if (n < 0) return kv_fail_file(err, file, (int)-n, "write", off);
        assert((uint64_t)n <= bytes);
        env->bytes_written += (uint64_t)n;
        p += n;
        off += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return KVMETA_OK;
}

/* A failed sync is always KVMETA_E_IO, whatever its errno: the pages that
 * it could not write may be gone, so that nothing may be retried. The
 * system may have marked them as clean, and a second sync would succeed
 * without them. That is why EINTR is no exception here, either. Must be
 * called on the handle that has written: the system need not tell one that
 * was opened later of an error of writing back that happened before. */
static int kv_file_sync(struct kv_env *env, const struct kv_file *file,
                        struct kvmeta_error *err)
{
    int e = env->vfs->file_sync(env->vfs->user, file->handle);

    assert(file->open);
    assert(err);
    if (!e) return KVMETA_OK;
    (void)kv_fail_file(err, file, e, "sync", 0);
    return err->code = KVMETA_E_IO;
}

/* Cuts the file off at `bytes`; needs no space. */
static int kv_file_truncate(struct kv_env *env, const struct kv_file *file,
                            uint64_t bytes, struct kvmeta_error *err)
{
    int e = env->vfs->file_truncate(env->vfs->user, file->handle, bytes);

    assert(file->open);
    return e ? kv_fail_file(err, file, e, "truncate", bytes) : KVMETA_OK;
}

/* A file that is not there is no error. Readers that have it open go on.
 * The entry is gone for good only after a sync of the directory, but
 * nothing relies on that: what comes back is unlisted, and deleted by the
 * next open (F1). */
static int kv_file_unlink(struct kv_env *env, int kind, uint64_t id,
                          struct kvmeta_error *err)
{
    struct kv_file file = {.kind = (uint8_t)kind, .id = id};
    char name[KV_NAME_BYTES];
    int e;

    assert(kind != KV_FILE_LOCK);      /* it would no longer keep others out */
    assert(kind != KV_FILE_MANIFEST);  /* it is only ever replaced */
    kv_file_name(kind, id, name);
    e = env->vfs->unlink(env->vfs->user, env->dir, name);
    if (e == 0 || e == ENOENT) return KVMETA_OK;
    return kv_fail_file(err, &file, e, "unlink", 0);
}

/* Makes new names, and renames, of the store's directory durable. A sync of a
 * file does not do that for its name. */
static int kv_dir_sync(struct kv_env *env, struct kvmeta_error *err)
{
    int e = env->vfs->dir_sync(env->vfs->user, env->dir);

    assert(env->dir >= 0);
    if (!e) return KVMETA_OK;
    return kv_fail(err, KVMETA_E_IO, e, "sync of the directory: error %d", e);
}

/* ==========================================================================
 * POSIX
 *
 * The default kvmeta_vfs: the only system calls on files. Handles are file
 * descriptors. The contract of each function is in kvmeta.h, at struct
 * kvmeta_vfs: 0 or a positive errno, bytes or a negative errno. Nothing here
 * has state, so `user` is not looked at, and any thread may call. EINTR is
 * passed on to kv_file_*, which know where it is safe to try again.
 *
 * Hostile directories are met here: names are opened relative to a descriptor
 * of the directory, which stays the same if the path to it is moved or
 * replaced; links are not followed, and neither pipes nor devices are waited
 * for. All descriptors are closed by an exec of the host.
 *
 * Three things make a new file durable, and each has a call of its own: its
 * bytes and size (file_sync), its name (dir_sync), and the name of the
 * store's directory (dir_sync_parent, once, at creation). None implies
 * another.
 * ========================================================================== */

/* EEXIST where another process was faster; kv_open_dir then looks again. */
static int kv_posix_dir_create(void *user, const char *path)
{
    (void)user;
    return mkdir(path, 0700) == 0 ? 0 : errno;
}

/* Makes data and size durable. fdatasync leaves out times, which nobody
 * reads here, but not the size, without which data could not be read. On
 * macOS fsync does not flush the disk's own cache, and F_FULLFSYNC does; only
 * file systems that do not know it get an fsync. Any other error of it counts:
 * an fsync after it might succeed without what could not be written. */
static int kv_posix_sync_fd(int fd)
{
#if defined(F_FULLFSYNC)
    if (fcntl(fd, F_FULLFSYNC) == 0) return 0;
    if (errno != ENOTSUP && errno != EINVAL && errno != ENOTTY) return errno;
    return fsync(fd) == 0 ? 0 : errno;
#elif defined(__linux__) || defined(__FreeBSD__) || defined(__NetBSD__)
    return fdatasync(fd) == 0 ? 0 : errno;
#else
    return fsync(fd) == 0 ? 0 : errno;
#endif
}

/* Here a link is followed: the host may put its store behind one. */
static int kv_posix_dir_open(void *user, const char *path, int *dir)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    (void)user;
    if (fd < 0) return errno;
    *dir = fd;
    return 0;
}

/* Not fdatasync: names need not count as data of a directory everywhere. */
static int kv_posix_dir_sync(void *user, int dir)
{
    (void)user;
    return fsync(dir) == 0 ? 0 : errno;
}

static int kv_posix_dir_close(void *user, int dir)
{
    (void)user;
    return close(dir) == 0 ? 0 : errno;
}

/* Syncs the directory that holds the last component of `path`: without it
 * a power cut could take away a store that was just created, as a whole.
 * Slashes at the end do not count; a path without others is in the working
 * directory. The memory is not realloc_fn's, which the vfs does not know. */
static int kv_posix_dir_sync_parent(void *user, const char *path)
{
    size_t n = strlen(path);
    char *parent = malloc(n + 2);
    int dir = -1;
    int e;

    if (!parent) return ENOMEM;
    memcpy(parent, path, n + 1);
    /* Off with the slashes at the end, then with the last component. */
    while (n > 0 && parent[n - 1] == '/') n--;
    while (n > 0 && parent[n - 1] != '/') n--;
    if (n == 0) parent[n++] = '.';
    parent[n] = '\0';
    assert(parent[n - 1] == '/' || parent[n - 1] == '.');
    e = kv_posix_dir_open(user, parent, &dir);
    free(parent);
    if (e) return e;
    e = kv_posix_dir_sync(user, dir);
    kv_posix_dir_close(user, dir);
    return e;
}

/* Calls fn for each name, "." and ".." included, until it returns an
 * errno. The directory is opened again: fdopendir would take over the
 * descriptor, and a copy of it would share the position of an earlier
 * listing. */
static int kv_posix_dir_list(void *user, int dir,
                             int (*fn)(void *arg, const char *name), void *arg)
{
    int fd = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct dirent *entry;
    DIR *d;
    int e = 0;

    (void)user;
    if (fd < 0) return errno;
    d = fdopendir(fd);
    if (!d) {
        e = errno;
        close(fd);
        return e;
    }
    /* The end and an error look the same but for errno. */
    for (;;) {
        errno = 0;
        entry = readdir(d);
        if (!entry) {
            e = errno;
            break;
        }
        e = fn(arg, entry->d_name);
        if (e) break;
    }
    closedir(d);
    return e;
}

/* O_NONBLOCK lets the open of a pipe return, and means nothing for a regular
 * file. Only after the open, by its own descriptor, can one tell without a
 * race what it is. Mode 0600: records are nobody else's business. */
static int kv_posix_file_open(void *user, int dir, const char *name, int flags,
                              int *file)
{
    int how = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
    struct stat st;
    int fd;
    int e;

    /* Read-write, never write-only: what was written is read back. */
    (void)user;
    how |= flags & KVMETA_VFS_WRITE ? O_RDWR : O_RDONLY;
    if (flags & KVMETA_VFS_CREATE) how |= O_CREAT;
    if (flags & KVMETA_VFS_EXCL) how |= O_EXCL;
    fd = openat(dir, name, how, 0600);
    if (fd < 0) return errno;
    e = fstat(fd, &st) == 0 ? 0 : errno;
    if (!e && !S_ISREG(st.st_mode)) e = EINVAL;
    if (e) {
        close(fd);
        return e;
    }
    *file = fd;
    return 0;
}

/* flock belongs to the open file: a second open by the same process fails,
 * too, and no close of another descriptor drops it, as it would drop fcntl's.
 * A forked child shares it: its close leaves the parent's lock alone. */
static int kv_posix_file_lock(void *user, int file)
{
    (void)user;
    return flock(file, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
}

static int kv_posix_file_size(void *user, int file, uint64_t *bytes)
{
    struct stat st;

    (void)user;
    if (fstat(file, &st) != 0) return errno;
    assert(st.st_size >= 0);
    *bytes = (uint64_t)st.st_size;
    return 0;
}

/* More than this is moved in parts: some systems refuse, or cut off, what
 * does not fit in an int. */
enum { KV_POSIX_IO_MAX = 1 << 30 };

_Static_assert(KV_POSIX_IO_MAX <= INT_MAX, "ssize_t holds what was moved");

/* At most KV_POSIX_IO_MAX bytes a call; kv_file_read asks for the rest. off_t
 * has 64 bits: see the top of this file. */
static int64_t kv_posix_file_read(void *user, int file, void *buf,
                                  size_t bytes, uint64_t off)
{
    ssize_t n;

    (void)user;
    bytes = (size_t)kv_min(bytes, KV_POSIX_IO_MAX);
    n = pread(file, buf, bytes, (off_t)off);
    assert(n <= KV_POSIX_IO_MAX);
    return n < 0 ? -(int64_t)errno : (int64_t)n;
}

/* Likewise. A short write is no error; the next call tells the reason. */
static int64_t kv_posix_file_write(void *user, int file, const void *buf,
                                   size_t bytes, uint64_t off)
{
    ssize_t n;

    (void)user;
    bytes = (size_t)kv_min(bytes, KV_POSIX_IO_MAX);
    n = pwrite(file, buf, bytes, (off_t)off);
    assert(n <= KV_POSIX_IO_MAX);
    return n < 0 ? -(int64_t)errno : (int64_t)n;
}

/* Never makes a file longer: its callers cut off. */
static int kv_posix_file_truncate(void *user, int file, uint64_t bytes)
{
    (void)user;
    return ftruncate(file, (off_t)bytes) == 0 ? 0 : errno;
}

static int kv_posix_file_sync(void *user, int file)
{
    (void)user;
    return kv_posix_sync_fd(file);
}

/* After EINTR the descriptor is gone on Linux and must not be closed
 * again: it may be another thread's by then. */
static int kv_posix_file_close(void *user, int file)
{
    (void)user;
    return close(file) == 0 ? 0 : errno;
}

/* Replaces `to` at once: a crash leaves the old file or the new one. Durable
 * with the next sync of the directory. */
static int kv_posix_rename(void *user, int dir, const char *from,
                           const char *to)
{
    (void)user;
    return renameat(dir, from, dir, to) == 0 ? 0 : errno;
}

static int kv_posix_unlink(void *user, int dir, const char *name)
{
    (void)user;
    return unlinkat(dir, name, 0) == 0 ? 0 : errno;
}

/* From the device, which every system has; nothing here runs often enough for
 * getrandom or arc4random to be worth their differences. */
static int kv_posix_random(void *user, void *buf, size_t bytes)
{
    unsigned char *p = buf;
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    int e = 0;

    (void)user;
    if (fd < 0) return errno;
    while (bytes > 0 && !e) {
        ssize_t n = read(fd, p, bytes);

        if (n > 0) {
            p += n;
            bytes -= (size_t)n;
        } else if (n == 0) {
            e = EIO;
        } else if (errno != EINTR) {
            e = errno;
        }
    }
    close(fd);
    return e;
}

/* Monotonic: the host may set its clock. */
static uint64_t kv_posix_clock_ns(void *user)
{
    struct timespec now;

    (void)user;
    clock_gettime(CLOCK_MONOTONIC, &now);
    assert(now.tv_sec >= 0);
    assert(now.tv_nsec < 1000000000);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Asked for at each write, unless the system tells a child otherwise: see
 * kv_forked. */
static uint64_t kv_posix_process_id(void *user)
{
    (void)user;
    return (uint64_t)getpid();
}

/* Constant, so that it may be shared by all handles, and copied by a host
 * that replaces some of its functions. */
const struct kvmeta_vfs *kvmeta_vfs_posix(void)
{
    static const struct kvmeta_vfs vfs = {
        .struct_size = sizeof vfs,
        .dir_create = kv_posix_dir_create,
        .dir_sync_parent = kv_posix_dir_sync_parent,
        .dir_open = kv_posix_dir_open,
        .dir_list = kv_posix_dir_list,
        .dir_sync = kv_posix_dir_sync,
        .dir_close = kv_posix_dir_close,
        .file_open = kv_posix_file_open,
        .file_lock = kv_posix_file_lock,
        .file_size = kv_posix_file_size,
        .file_read = kv_posix_file_read,
        .file_write = kv_posix_file_write,
        .file_truncate = kv_posix_file_truncate,
        .file_sync = kv_posix_file_sync,
        .file_close = kv_posix_file_close,
        .rename = kv_posix_rename,
        .unlink = kv_posix_unlink,
        .random = kv_posix_random,
        .clock_ns = kv_posix_clock_ns,
        .process_id = kv_posix_process_id
    };

    return &vfs;
}

/* ==========================================================================
 * Node memory
 *
 * Tree nodes of one size come from slabs: 2 MiB of the system's pages, on
 * huge pages where there are any, or smaller ones while the store is small.
 * An empty slab is given back. A tree has two pools, for leaves and for inner
 * nodes. Callers hold the tree's lock, except for kv_pool_has and
 * kv_pool_prepare.
 *
 * A writer asks for all the nodes that its changes can need before it makes
 * the first of them (kv_tree_reserve); taking one then cannot fail, and no
 * change has to be undone half way. Two rules make that true: nobody takes
 * nodes but the writer (or the loaders of an open, before there is one); and
 * (N1) a slab is never given back if that left fewer free nodes than are
 * reserved, or than KV_POOL_KEEP. Nor, after a reservation, what the next one
 * like it would have to ask for again: slabs that came and went with each
 * small batch were a tenth of its time.
 *
 * The list of a pool holds the slabs that have a free node, those that were
 * full last in front, the empty ones behind:
 *
 *     open -> [##### ] -> [####  ] -> [##    ] -> [      ] <- open_last
 *              taken from first        given back from here
 *
 * A slab is full and on no list, or on the list; it is found again through
 * the nodes, each of which knows its slab.
 *
 * The C library's malloc would not do: it has no notion of nodes kept free,
 * it does not ask for huge pages, and what it gives back to the system is its
 * own affair, while memory_bytes_max and resident_bytes need exact figures.
 * ========================================================================== */

enum {
    KV_SLAB_BYTES = 2 << 20,      /* a huge page of x86-64 and AArch64 */
    KV_AHEAD_MIN = 64 << 20,      /* of a pool that gets slabs ahead */
    KV_POOL_KEEP = 64,            /* free nodes that are always kept */
    KV_POOL_KEEP_MAX = 2048,      /* and at most, for the next reservation */
    KV_LINES_MAX = 5              /* of heads in a node: see "Tree" */
};

_Static_assert((KV_SLAB_BYTES & (KV_SLAB_BYTES - 1)) == 0, "for kv_slab_map");
_Static_assert(KV_AHEAD_MIN >= KV_SLAB_BYTES, "one more must be little");

struct kv_node;

/* A piece of memory cut into nodes of one size. It is described from outside,
 * so that all of it is for nodes. Nodes are carved off it in order: what
 * lies behind the last one has never been touched, and costs no memory where
 * the system hands out pages at their first use. The struct is kv_alloc'ed;
 * `memory` comes from kv_slab_map if `mapped`, from kv_alloc otherwise. */
struct kv_slab {
    struct kv_slab *next;         /* in the pool's list, if any node is free */
    struct kv_slab *prev;
    void *memory;                 /* as allocated */
    size_t bytes;                 /* as allocated */
    bool mapped;
    unsigned char *base;          /* first node, on a cache line */
    uint32_t cap;                 /* nodes */
    uint32_t carved;              /* nodes that have ever been used */
    uint32_t used;                /* nodes that are taken; <= carved */
    struct kv_node *free_nodes;   /* carved and given back, by dead_next */
};

/* Nodes of one size. All is guarded by the tree's lock; the writer and the
 * worker look at the atomics without it, to learn whether the lock is worth
 * taking. free_nodes counts those that were never carved, too, and with
 * used_nodes makes up the capacity of all slabs. `reserved` is written by the
 * writer only: nodes that must stay free for the changes that it has begun,
 * or that wait in a delta. */
struct kv_pool {
    struct kv_env *env;
    size_t node_bytes;
    struct kv_slab *open;         /* slabs with a free node */
    struct kv_slab *open_last;
    _Atomic size_t free_nodes;
    size_t used_nodes;
    size_t reserved;
    size_t keep;                  /* free nodes that stay unreserved, too */
    size_t bytes;                 /* of all slabs, without `ahead` */
    _Atomic size_t empty_slabs;
    void *_Atomic ahead;          /* KV_SLAB_BYTES, touched; or NULL */
    _Atomic bool ahead_wanted;    /* the worker should make another one */
};

/*
 * A node's header; its arrays follow. Which ones depends on the level.
 *
 * A node belongs to a pool's free list, to one version under construction, to
 * all published versions that reach it, or to one dead list. `gen` says by
 * whom it may be changed (E1) and, once dead, until when it must be kept.
 * dead_next is written while readers are in the node: they never look at it.
 */
struct kv_node {
    uint64_t gen;                 /* of the version in which it was made */
    struct kv_node *dead_next;    /* in a dead list, or a slab's free list */
    struct kv_slab *slab;
    uint16_t count;               /* records, or children */
    uint8_t level;                /* 0: leaf */
    uint8_t fill[KV_LINES_MAX];   /* records of each block; leaves only */
};

_Static_assert(sizeof(struct kv_node) % 8 == 0, "heads must stay aligned");
_Static_assert(sizeof(struct kv_node) + sizeof(int64_t) * (KV_LINES_MAX - 1)
               <= KV_CACHE_LINE, "header and index fill the first line");
#if KV_X86
_Static_assert(sizeof(struct kv_node) == 32, "vectors of heads are aligned");
#endif

/* Slabs that are almost full come first, and are used first; empty ones come
 * last, so that they stay empty and can be given back. A slab comes back to
 * the list with its first free node, so at the front; it moves to the end
 * when its last node is given back. */
static void kv_slab_link(struct kv_pool *pool, struct kv_slab *slab)
{
    bool empty = slab->used == 0;

    slab->prev = empty ? pool->open_last : NULL;
    slab->next = empty ? NULL : pool->open;
    if (slab->prev)
        slab->prev->next = slab;
    else
        pool->open = slab;
    if (slab->next)
        slab->next->prev = slab;
    else
        pool->open_last = slab;
    assert(!pool->open->prev);
    assert(!pool->open_last->next);
}

static void kv_slab_unlink(struct kv_pool *pool, struct kv_slab *slab)
{
    assert(slab->prev || pool->open == slab);
    assert(slab->next || pool->open_last == slab);
    if (slab->prev)
        slab->prev->next = slab->next;
    else
        pool->open = slab->next;
    if (slab->next)
        slab->next->prev = slab->prev;
    else
        pool->open_last = slab->prev;
}

/* Pages of the system, aligned to their size, so that they can be huge. NULL:
 * there are none. Maps twice as much and gives back what is on both sides of
 * the aligned part, because mmap aligns to small pages only; until then it
 * needs the room of addresses, but no memory. That the pages will be huge is
 * a wish: on a system that does not grant it nothing else changes. */
static void *kv_slab_map(size_t bytes)
{
#if defined(MAP_ANONYMOUS)
    char *p = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    size_t before;

    if (p == MAP_FAILED) return NULL;
    before = (size_t)(kv_align_up((uintptr_t)p, bytes) - (uintptr_t)p);
    assert(before < bytes);
    if (before) munmap(p, before);
    munmap(p + before + bytes, bytes - before);
#  if defined(MADV_HUGEPAGE)
    (void)madvise(p + before, bytes, MADV_HUGEPAGE);
#  endif
    return p + before;
#else
    (void)bytes;
    return NULL;
#endif
}

/*
 * Makes the pool's next slab, and touches it. A writer that met fresh memory
 * would wait while the system clears it, for milliseconds on virtual machines
 * that must get it from their host first. Needs no lock: the slab passes from
 * the background to the writer through `ahead`, by one exchange on each side,
 * and is given back if `ahead` is taken. Without memory nothing happens: the
 * writer will map for itself, and fail there if it must.
 */
static void kv_pool_prepare(struct kv_pool *pool)
{
    unsigned char *memory = kv_slab_map(KV_SLAB_BYTES);
    void *other = NULL;

    pool->ahead_wanted = false;
    if (!memory) return;
    for (size_t i = 0; i < KV_SLAB_BYTES; i += 4096)
        *(volatile unsigned char *)(memory + i) = 0;
    if (!atomic_compare_exchange_strong(&pool->ahead, &other, memory))
        munmap(memory, KV_SLAB_BYTES);
}

/* KV_SLAB_BYTES, prepared where that is worth its memory: a small store
 * should not hold 2 MiB that it may never use. NULL: there is no memory.
 * Whoever calls owns what is returned. */
static void *kv_pool_map(struct kv_pool *pool)
{
    void *memory = atomic_exchange(&pool->ahead, NULL);

    pool->ahead_wanted = pool->bytes >= KV_AHEAD_MIN;
    return memory ? memory : kv_slab_map(KV_SLAB_BYTES);
}

/*
 * Adds a slab: an eighth of what there is, so that small stores stay small,
 * but room for eight nodes at least. Above 1 MiB it takes a whole
 * KV_SLAB_BYTES, which can be a huge page. room: the bytes that
 * memory_bytes_max leaves; KVMETA_E_LIMIT if the slab is larger. After an
 * error the pool is as it was.
 *
 * With realloc_fn all slabs come from the host, whose account of memory must
 * be complete; nodes then start on a cache line that is found within.
 */
static int kv_pool_grow(struct kv_pool *pool, uint64_t room,
                        struct kvmeta_error *err)
{
    size_t eight = 8 * pool->node_bytes;
    size_t bytes = (size_t)kv_max(eight,
                                  kv_min(pool->bytes / 8, KV_SLAB_BYTES));
    struct kv_slab *slab;

    bytes -= bytes % pool->node_bytes;
    if (bytes > KV_SLAB_BYTES / 2 && eight <= KV_SLAB_BYTES)
        bytes = KV_SLAB_BYTES;
    assert(bytes >= eight);
    assert(pool->node_bytes % KV_CACHE_LINE == 0);
    if (bytes > room)
        return kv_fail(err, KVMETA_E_LIMIT, 0,
                       "memory_bytes_max: no room for %zu more bytes", bytes);
    slab = kv_alloc_zeroed(pool->env, sizeof *slab);
    if (!slab) return kv_fail_memory(err, sizeof *slab);
    slab->bytes = bytes;
    slab->mapped = !pool->env->realloc_fn && bytes == KV_SLAB_BYTES;
    slab->memory = slab->mapped ? kv_pool_map(pool)
                                : kv_alloc(pool->env, bytes + KV_CACHE_LINE);
    if (!slab->memory) {
        kv_free(pool->env, slab);
        return kv_fail_memory(err, bytes);
    }
    slab->base = kv_line_up(slab->memory);
    slab->cap = (uint32_t)(bytes / pool->node_bytes);
    assert((uintptr_t)slab->base % KV_CACHE_LINE == 0);
    assert(slab->base + slab->cap * pool->node_bytes
           <= (unsigned char *)slab->memory + bytes + KV_CACHE_LINE);
    kv_slab_link(pool, slab);
    pool->bytes += bytes;
    pool->free_nodes += slab->cap;
    pool->empty_slabs++;
    return KVMETA_OK;
}

/* Gives a slab back, which must be empty: nothing points into it then but its
 * own free list. */
static void kv_pool_drop(struct kv_pool *pool, struct kv_slab *slab)
{
    assert(slab->used == 0);
    assert(pool->empty_slabs > 0);
    assert(pool->bytes >= slab->bytes);
    assert(pool->free_nodes >= slab->cap);
    kv_slab_unlink(pool, slab);
    pool->bytes -= slab->bytes;
    pool->free_nodes -= slab->cap;
    pool->empty_slabs--;
    if (slab->mapped)
        munmap(slab->memory, slab->bytes);
    else
        kv_free(pool->env, slab->memory);
    kv_free(pool->env, slab);
}

/* A free node must be there: see kv_tree_reserve. Only its slab is set; the
 * rest is what was there before. Takes one that has been used before if the
 * slab has any: its lines may still be in a cache. */
static struct kv_node *kv_pool_take(struct kv_pool *pool)
{
    struct kv_slab *slab = pool->open;
    struct kv_node *node;

    assert(slab);
    assert(slab->used < slab->cap);
    assert(pool->free_nodes > 0);
    if (slab->used++ == 0) pool->empty_slabs--;
    node = slab->free_nodes;
    if (node) {
        slab->free_nodes = node->dead_next;
    } else {
        assert(slab->carved < slab->cap);
        node = (struct kv_node *)(void *)(slab->base + pool->node_bytes
                                          * slab->carved++);
        node->slab = slab;
    }
    assert(node->slab == slab);
    assert(slab->used <= slab->carved);
    if (slab->used == slab->cap) kv_slab_unlink(pool, slab);
    pool->free_nodes--;
    pool->used_nodes++;
    return node;
}

/* The opposite: the node must come from this pool, and nobody may see it any
 * more. Never gives memory back to the system: see kv_pool_trim. */
static void kv_pool_give(struct kv_pool *pool, struct kv_node *node)
{
    struct kv_slab *slab = node->slab;

    assert(slab->used > 0);
    assert(slab->used <= slab->carved);
    assert(pool->used_nodes > 0);
    if (slab->used == slab->cap) kv_slab_link(pool, slab);
    node->dead_next = slab->free_nodes;
    slab->free_nodes = node;
    if (--slab->used == 0) {
        pool->empty_slabs++;
        kv_slab_unlink(pool, slab);
        kv_slab_link(pool, slab);
    }
    pool->free_nodes++;
    pool->used_nodes--;
}

/* Gives empty slabs back, but for one, and what is reserved (N1). The one
 * that stays keeps a store whose size goes up and down by a few nodes from
 * mapping and unmapping a slab each time. On the way to the empty slabs it
 * passes all others that have a free node, so callers first ask whether there
 * are empty ones. */
static void kv_pool_trim(struct kv_pool *pool)
{
    size_t keep = (size_t)kv_max(kv_max(pool->reserved, pool->keep),
                                 KV_POOL_KEEP);
    struct kv_slab *next;

    for (struct kv_slab *slab = pool->open; slab; slab = next) {
        next = slab->next;
        if (pool->empty_slabs <= 1) return;
        if (slab->used == 0 && pool->free_nodes >= keep + slab->cap)
            kv_pool_drop(pool, slab);
    }
}

/* What was reserved and not taken is free again. If it was not much, as many
 * nodes stay free from now on. */
static void kv_pool_unreserve(struct kv_pool *pool)
{
    if (pool->reserved <= KV_POOL_KEEP_MAX)
        pool->keep = (size_t)kv_max(pool->keep, pool->reserved);
    pool->reserved = 0;
}

/* Are so many nodes free, and will they be when they are taken? Without the
 * lock: nobody takes nodes but the writer, who asks, and slabs are not given
 * back down to KV_POOL_KEEP free nodes, reserved or not. */
static bool kv_pool_has(const struct kv_pool *pool, size_t nodes)
{
    assert(nodes <= KV_POOL_KEEP);
    return pool->free_nodes >= nodes;
}

/* All nodes must have been given back; so all slabs are on the list.
 * Accepts a zeroed pool. */
static void kv_pool_free(struct kv_pool *pool)
{
    while (pool->open) {
        struct kv_slab *slab = pool->open;

        assert(slab->used == 0);
        kv_pool_drop(pool, slab);
    }
    assert(pool->bytes == 0);
    if (pool->ahead) munmap(pool->ahead, KV_SLAB_BYTES);
}

/* ==========================================================================
 * Tree
 *
 * A B+tree of fixed-width records. A node holds the first 8 bytes of each key
 * as a number in one array (head), so that a search compares integers, dense
 * in memory, and looks at the rest (tail) only among equal heads. A row holds
 * a key's tail, and in a leaf the value, too; inner nodes have the children in
 * a third array. Heads are stored with the sign bit flipped: SIMD compares are
 * signed. An inner node of n children has n - 1 separators: child i holds the
 * keys k with separator[i-1] <= k < separator[i]. A separator need not be a
 * key of any record: the one that it was copied from may have been removed.
 *
 * Heads fill up to five cache lines, behind a first one with the header and
 * the index: the first head of each line of heads but the first. So a search
 * reads two lines of heads, however many there are. Two nodes for records of
 * 16 + 16 bytes on 64 bits, offsets in bytes:
 *
 *     leaf    0        32        64         384                       1344
 *             header | index 4 | 40 heads | 40 rows: tail 8, value 16 |
 *
 *     inner   0        32        64         384             704         1032
 *             header | index 4 | 40 heads | 40 rows: tail 8 | 41 children |
 *
 * In an inner node keys are dense. In a leaf each line of heads, with its
 * rows, is a block, which is filled from its front: an insert moves what is
 * behind it in its block, and a block that is full gives records to the one
 * beside it. That is less than half of the memory that an insert into one
 * dense array would touch. What is behind the last key of a block is padding
 * (T4), so that a search need not ask where the keys end.
 *
 *     block      0          1          2          3          4
 *     heads      abcd....   efghi...   jk......   lmnopqrs   tuv.....
 *     fill       4          5          2          8          3
 *     index                 e          j          l          t
 *
 * Everything here is about waiting for memory: in a store of millions of
 * records nothing but the upper levels is in a cache. Waits must overlap. The
 * processor sees to that by itself, for as many searches as fit in its window
 * of a few hundred instructions, unless a branch is guessed wrong. So searches
 * are short, and branch on nothing that differs from node to node: they count
 * heads instead of bisecting them, always as many; tail and value stand side
 * by side, since whoever has found the one wants the other. A single search
 * asks for all heads of a leaf at once, so as not to wait for the index first.
 * Those for many keys overlap in any case, and are bound by the number of
 * lines that all of them touch.
 *
 * Counting uses vectors where the processor has them. Functions that are told
 * so by `avx2` are compiled twice, into one for such processors and one for
 * others, so that counting needs no calls.
 *
 * This section only reads. Any thread may call it, on a version that it has
 * pinned or holds, or that is its own; what a function returns a pointer to
 * is valid as long as that. Nothing here can fail. Recursion is not needed:
 * a path is at most KV_HEIGHT_MAX nodes long.
 *
 * (T1) keys ascend strictly within and across leaves; (T2) all leaves are at
 * level 0, a node's children one level below it; (T3) no node is empty, nor
 * any block of a leaf before one that is not; (T4) heads where no key is are
 * KV_HEAD_PAD; (T5) a child is never younger than its parent (gen); (T6) count
 * and digest are those of the records; (T7) the index is that of the heads.
 * ========================================================================== */

enum {
    /* Sizes that nodes are to have at most: wide records make larger ones. */
    KV_LEAF_BYTES = 1536,
    KV_INNER_BYTES = 1792,
    KV_HEIGHT_MAX = 24,           /* beyond what any memory can hold */
    KV_SLOTS = 64,                /* readers at a time; a bit each */
    KV_SLOTS_OWN = 32,            /* of them, for one thread each */
    KV_OWN_TRIES = 8,             /* of these that a thread looks at */
    /* Enough for waits for memory to overlap; also the size of arrays on the
     * stack, and the most puts that a delta has. */
    KV_BATCH = 32,                /* keys looked up side by side */
    KV_WARM_MIN = 4,              /* changes that are worth it */
    /* 512 bytes a record for a full delta; above 16 KiB there is none. */
    KV_DELTA_BYTES_MAX = 16384,   /* of the records of a delta */
    KV_RECLAIM_MAX = 512          /* nodes freed per hold of the lock */
};

_Static_assert(KV_LEAF_BYTES % KV_CACHE_LINE == 0, "nodes are whole lines");
_Static_assert(KV_INNER_BYTES % KV_CACHE_LINE == 0, "nodes are whole lines");
_Static_assert(KV_BATCH % 4 == 0, "four fingerprints make a word");
#define KV_HEAD_PAD INT64_MAX

/* Where the arrays of a node are: offsets from its start, in bytes. One for
 * all leaves of a tree and one for all inner nodes; fixed at kv_tree_init. */
struct kv_layout {
    uint32_t cap;                 /* records, or children */
    uint32_t lines;               /* cache lines that heads are in */
    uint32_t row_off;
    uint32_t row_bytes;           /* of one row; may be 0 */
    uint32_t child_off;
    uint32_t bytes;               /* of a node; whole cache lines */
};

/*
 * A state of the records: those of the tree, as changed by the puts in the
 * delta, which are not in the tree yet. Immutable once a reader may see it,
 * but for the delta, which grows; see the next section for the exception.
 * The delta's records follow the struct; later ones hide earlier ones.
 *
 * Versions form a list from the oldest that somebody may see to the current
 * one, in order of `gen`. The links and `dead` are guarded by the tree's
 * lock, `refs` counts up while its holder is in a slot, and down at any time;
 * a version that is not current and has no holder is nobody's, and goes with
 * the next reclaim that finds no reader in the way. `seq` is the commit of
 * the tree without its delta: the delta's i-th put is commit seq + i + 1.
 */
struct kv_version {
    struct kv_node *root;         /* NULL: no records */
    uint32_t height;              /* levels; 0 without records */
    uint64_t count;               /* this and the next two: of the tree */
    struct kvmeta_digest digest;
    uint64_t seq;                 /* last commit */
    uint64_t gen;

    /* Changed by the writer while readers look: see "Delta". On a line of its
     * own, so that a reader that waits for it has gone on from the root. */
    _Alignas(KV_CACHE_LINE)
    _Atomic uint64_t delta_prints[KV_BATCH / 4];  /* fingerprints, 16 bits */

    _Alignas(KV_CACHE_LINE)
    _Atomic uint32_t delta_count; /* puts; at most delta_cap of the tree */
    _Atomic uint64_t refs;        /* holders */
    struct kv_version *older;
    struct kv_version *newer;     /* NULL: the current one */
    struct kv_node *dead;         /* nodes that no newer version sees */
    void *memory;                 /* as allocated */
};

_Static_assert(offsetof(struct kv_version, delta_prints) == KV_CACHE_LINE
               && sizeof(uint16_t) * KV_BATCH == KV_CACHE_LINE,
               "a line for what readers need, and one for the fingerprints");

/* Where a reader says that it reads, on a cache line of its own: readers that
 * share no slot then do not slow each other down. `gen` is that of a version
 * not above the one that is read. */
struct kv_slot {
    _Alignas(KV_CACHE_LINE) _Atomic uint64_t gen;   /* 0: free */
    uint64_t edits;               /* the owner's: edits when it last looked, */
    uint32_t pins;                /* and pins since */
};

_Static_assert(sizeof(struct kv_slot) == KV_CACHE_LINE, "a line for each");

/*
 * All records of a store in memory. The members above `current` are fixed
 * after init; the others stand in groups on cache lines of their own, by who
 * writes them: what every reader loads must not be on a line that the writer
 * keeps changing for itself.
 */
struct kv_tree {
    struct kv_env *env;
    struct kv_layout leaf;
    struct kv_layout inner;
    bool avx2;
    _Atomic bool barriers;        /* kv_barrier works */
    uint64_t memory_bytes_max;    /* of both pools; 0: no bound */
    uint32_t delta_cap;           /* puts; 0: the records are too wide */
    struct kv_slot *slots;        /* KV_SLOTS, on cache lines */
    void *slots_memory;           /* as allocated */
    bool locks_made;

    /* What readers read first. Written only when a version is published, the
     * gate is used, or a slot is taken for the first time. */
    _Alignas(KV_CACHE_LINE) struct kv_version *_Atomic current;
    _Atomic uint64_t gen;         /* of current, or of one before */
    _Atomic uint64_t slots_used;  /* bit i: slot i has been used before */
    _Atomic uint64_t bias;        /* see kv_bias_end */
    _Atomic bool gate;            /* closed: the current one is changed */

    /* Whose own the first slots are; 0: nobody's yet. */
    _Alignas(KV_CACHE_LINE) _Atomic uint64_t owners[KV_SLOTS_OWN];

    /* Bias lock: ending the bias. No other is taken under it. */
    _Alignas(KV_CACHE_LINE) pthread_mutex_t bias_lock;

    /* Delta lock: the delta of the current version. */
    _Alignas(KV_CACHE_LINE) pthread_mutex_t delta_lock;
    struct kv_version *spare;     /* for kv_edit_begin; the writer's */

    /* Lock: pools and the list of versions. Only the bias lock is taken under
     * it. */
    _Alignas(KV_CACHE_LINE) pthread_mutex_t lock;
    struct kv_pool leaves;
    struct kv_pool inners;
    struct kv_version *oldest;
    size_t dead_bytes;            /* of the nodes on all dead lists */
    uint64_t copied;              /* versions published beside readers */

    /* Written by one side, read by the other. */
    _Atomic uint64_t in_place;    /* edits that were made in place */
    _Atomic bool unreclaimed;     /* readers were in the way of freeing */
};

/* From the order of unsigned numbers to that of signed ones, and back. */
static int64_t kv_head_flip(uint64_t head)
{
    return (int64_t)(head ^ (uint64_t)1 << 63);
}

/* The next few give write access to a node that the caller may only read:
 * whether it may be changed is the edits' business (E1). */
static int64_t *kv_heads(const struct kv_node *node)
{
    return (int64_t *)((uintptr_t)node + KV_CACHE_LINE);
}

static unsigned char *kv_node_at(const struct kv_node *node, uint32_t off)
{
    return (unsigned char *)(uintptr_t)node + off;
}

static const struct kv_layout *kv_layout_of(const struct kv_tree *t,
                                            const struct kv_node *node)
{
    return node->level == 0 ? &t->leaf : &t->inner;
}

/* The tail of the i-th key, in a leaf followed by its value; i may be one
 * behind the last, to copy or to fetch from there. */
static unsigned char *kv_row(const struct kv_tree *t,
                             const struct kv_node *node, size_t i)
{
    const struct kv_layout *l = kv_layout_of(t, node);

    return kv_node_at(node, l->row_off) + i * l->row_bytes;
}

/* The same for leaves, whose header it leaves alone. */
static unsigned char *kv_leaf_row(const struct kv_tree *t,
                                  const struct kv_node *leaf, size_t i)
{
    assert(leaf->level == 0);
    return kv_node_at(leaf, t->leaf.row_off) + i * t->leaf.row_bytes;
}

/* The same as the row in records whose keys have no tail. Never NULL, even
 * where values have no bytes. */
static unsigned char *kv_value(const struct kv_tree *t,
                               const struct kv_node *leaf, size_t i)
{
    assert(i < t->leaf.cap);
    return kv_leaf_row(t, leaf, i) + t->env->shape.tail_bytes;
}

static struct kv_node **kv_children(const struct kv_tree *t,
                                    const struct kv_node *inner)
{
    assert(inner->level > 0);
    return (struct kv_node **)(void *)kv_node_at(inner, t->inner.child_off);
}

/* The first head of each line but the first; padding for lines that are
 * empty, or that the layout does not have. */
static int64_t *kv_index(const struct kv_node *node)
{
    return (int64_t *)(uintptr_t)(node + 1);
}

/* As many lines of 8 keys as fit in `bytes`, but at least `lines`, in a node
 * that is then as large as it must be. child_bytes: 0 for leaves. */
static void kv_layout_init(struct kv_layout *l, uint32_t row_bytes,
                           uint32_t child_bytes, uint32_t bytes,
                           uint32_t lines)
{
    uint32_t line_bytes = KV_CACHE_LINE + 8 * (row_bytes + child_bytes);
    uint32_t fit = (bytes - KV_CACHE_LINE - child_bytes) / line_bytes;

    assert(lines <= KV_LINES_MAX);
    l->lines = (uint32_t)kv_min(kv_max(fit, lines), KV_LINES_MAX);
    l->cap = 8 * l->lines + (child_bytes > 0);
    l->row_bytes = row_bytes;
    l->row_off = KV_CACHE_LINE * (1 + l->lines);
    l->child_off = (uint32_t)kv_align_up(l->row_off
                                         + 8 * l->lines * row_bytes, 8);
    l->bytes = (uint32_t)kv_align_up(l->child_off + l->cap * child_bytes,
                                     KV_CACHE_LINE);
}

/* How many of the n heads are at most `head`; n is the same for all nodes of
 * a layout. No branch depends on a node: guessed wrong, it would throw away
 * the searches behind it, which the processor has begun by then. */
static inline size_t kv_count_plain(const int64_t *heads, size_t n,
                                    int64_t head)
{
    size_t upto = 0;

    for (size_t i = 0; i < n; i++) upto += heads[i] <= head;
    return upto;
}

/* The same of 4 or 8 heads by vectors. Aligned to them: a node starts on a
 * cache line, and its header is half a line. */
#if KV_X86
__attribute__((target("avx2")))
static inline unsigned kv_mask_avx2(const int64_t *heads, int64_t head)
{
    __m256i x = _mm256_load_si256((const __m256i *)(const void *)heads);
    __m256i above = _mm256_cmpgt_epi64(x, _mm256_set1_epi64x(head));

    assert((uintptr_t)heads % sizeof x == 0);
    return (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(above));
}

__attribute__((target("avx2")))
static inline size_t kv_line_rank_avx2(const int64_t *heads, int64_t head)
{
    unsigned above = kv_mask_avx2(heads, head)
        | kv_mask_avx2(heads + 4, head) << 4;

    return 8 - (size_t)__builtin_popcount(above);
}

__attribute__((target("avx2")))
static inline size_t kv_index_rank_avx2(const int64_t *index, size_t n,
                                        int64_t head)
{
    return (size_t)__builtin_popcount(~kv_mask_avx2(index, head)
                                      & ((1u << n) - 1));
}
#endif

/* How many of the 8 heads of a line are at most `head`. avx2: as in the tree;
 * where it is a constant, in a function for such processors, nothing is
 * called. */
static KV_ALWAYS_INLINE size_t kv_line_rank(const int64_t *heads, int64_t head,
                                            bool avx2)
{
#if KV_X86
    if (KV_LIKELY(avx2)) return kv_line_rank_avx2(heads, head);
#else
    (void)avx2;
#endif
    return kv_count_plain(heads, 8, head);
}

/* Where the line of heads begins in which the head belongs: the last one that
 * does not begin above it, or the first. */
static KV_ALWAYS_INLINE size_t kv_node_line(const struct kv_layout *l,
                                            const struct kv_node *node,
                                            int64_t head, bool avx2)
{
    size_t n = l->lines - 1;

#if KV_X86
    if (KV_LIKELY(avx2))
        return 8 * kv_index_rank_avx2(kv_index(node), n, head);
#else
    (void)avx2;
#endif
    return 8 * kv_count_plain(kv_index(node), n, head);
}

/* A key in the form in which it is compared. Points into the key that it was
 * made of, or into a node; no longer valid than that. */
struct kv_probe {
    int64_t head;
    const unsigned char *tail;
};

static struct kv_probe kv_probe_make(const struct kv_tree *t, const void *key)
{
    struct kv_probe p;

    p.head = kv_head_flip(kv_key_head(&t->env->shape, key));
    p.tail = (const unsigned char *)key + 8;   /* read if tail_bytes > 0 */
    return p;
}

/* The key at i of a node; valid while the node is. */
static struct kv_probe kv_key_at(const struct kv_tree *t,
                                 const struct kv_node *node, size_t i)
{
    struct kv_probe p = {kv_heads(node)[i], kv_row(t, node, i)};

    return p;
}

/* As memcmp of the whole keys. */
static int kv_probe_compare(const struct kv_tree *t, struct kv_probe a,
                            struct kv_probe b)
{
    if (a.head != b.head) return a.head < b.head ? -1 : 1;
    return memcmp(a.tail, b.tail, t->env->shape.tail_bytes);
}

/* How many of the n keys from the first-th on are at most the key, for keys
 * whose heads alone do not tell. */
static size_t kv_keys_upto(const struct kv_tree *t, const struct kv_node *node,
                           size_t first, size_t n, struct kv_probe p)
{
    size_t low = 0;

    while (low < n) {
        size_t middle = low + (n - low) / 2;

        if (kv_probe_compare(t, kv_key_at(t, node, first + middle), p) <= 0)
            low = middle + 1;
        else
            n = middle;
    }
    return low;
}

/* A head that is found in an inner node need not be that of the separator
 * alone: then the whole key decides. */
KV_NOINLINE
static size_t kv_inner_child_equal(const struct kv_tree *t,
                                   const struct kv_node *node,
                                   struct kv_probe p)
{
    return kv_keys_upto(t, node, 0, node->count - 1u, p);
}

/* The child in which the key belongs: a key that equals a separator is to the
 * right of it. i is what counting has found: the separators whose heads are
 * not above the key's. The last of these decides whether that is enough; it is
 * what looks like padding, too, of which all was counted. */
static KV_ALWAYS_INLINE size_t kv_inner_settle(const struct kv_tree *t,
                                               const struct kv_node *node,
                                               struct kv_probe p, size_t i)
{
    if (KV_UNLIKELY(i > 0 && kv_heads(node)[i - 1] == p.head))
        i = kv_inner_child_equal(t, node, p);
    assert(i < node->count);
    return i;
}

static KV_ALWAYS_INLINE size_t kv_inner_child_by(const struct kv_tree *t,
                                                 const struct kv_node *node,
                                                 struct kv_probe p, bool avx2)
{
    size_t i = kv_node_line(&t->inner, node, p.head, avx2);

    assert(node->count > 0);
    i += kv_line_rank(kv_heads(node) + i, p.head, avx2);
    return kv_inner_settle(t, node, p, i);
}

static size_t kv_inner_child(const struct kv_tree *t,
                             const struct kv_node *node, struct kv_probe p)
{
    return kv_inner_child_by(t, node, p, t->avx2);
}

/* The place of a key in a leaf is behind the last record that is not above it,
 * in the same block; or 0, if there is none. The block that this is: */
static size_t kv_place_block(size_t place)
{
    return place > 0 ? (place - 1) / 8 : 0;
}

/* The place of a key whose head is found in the leaf: the whole key decides. */
KV_NOINLINE
static size_t kv_leaf_place_equal(const struct kv_tree *t,
                                  const struct kv_node *leaf,
                                  struct kv_probe p)
{
    size_t b = 0;

    while (b + 1 < t->leaf.lines && leaf->fill[b + 1] > 0
           && kv_probe_compare(t, kv_key_at(t, leaf, 8 * b + 8), p) <= 0)
        b++;
    return 8 * b + kv_keys_upto(t, leaf, 8 * b, leaf->fill[b], p);
}

/* Settles what counting has found: *place is behind the last head that is not
 * above the key's. Is the key in the leaf? Then it is right before *place. */
static KV_ALWAYS_INLINE bool kv_leaf_settle(const struct kv_tree *t,
                                            const struct kv_node *leaf,
                                            struct kv_probe p, size_t *place)
{
    size_t i = *place - 1;

    assert(leaf->level == 0);
    if (*place == 0 || kv_heads(leaf)[i] != p.head) return false;
    /* What looks like padding may be that; its row has been left over. */
    if (KV_LIKELY(p.head != KV_HEAD_PAD)
        && KV_LIKELY(kv_same(kv_leaf_row(t, leaf, i), p.tail,
                             t->env->shape.tail_bytes)))
        return true;
    *place = kv_leaf_place_equal(t, leaf, p);
    return *place > 0
        && kv_probe_compare(t, kv_key_at(t, leaf, *place - 1), p) == 0;
}

static KV_ALWAYS_INLINE size_t kv_leaf_count_by(const struct kv_tree *t,
                                                const struct kv_node *leaf,
                                                int64_t head, bool avx2)
{
    size_t line = kv_node_line(&t->leaf, leaf, head, avx2);

    return line + kv_line_rank(kv_heads(leaf) + line, head, avx2);
}

/* The place of the key. *match: the key is right before it. */
static size_t kv_leaf_place(const struct kv_tree *t,
                            const struct kv_node *leaf, struct kv_probe p,
                            bool *match)
{
    size_t place = kv_leaf_count_by(t, leaf, p.head, t->avx2);

    *match = kv_leaf_settle(t, leaf, p, &place);
    return place;
}

/* Bytes from..to of a node, and what is left of four lines; of the leaves of
 * wide records only a part. Four at a time: a search counts its instructions
 * (see above). */
static inline void kv_node_prefetch(const struct kv_node *node, uint32_t from,
                                    uint32_t to)
{
    if (to > KV_INNER_BYTES) to = KV_INNER_BYTES;
    for (uint32_t off = from; off < to; off += 4 * KV_CACHE_LINE) {
        KV_PREFETCH(kv_node_at(node, off));
        KV_PREFETCH(kv_node_at(node, off + KV_CACHE_LINE));
        KV_PREFETCH(kv_node_at(node, off + 2 * KV_CACHE_LINE));
        KV_PREFETCH(kv_node_at(node, off + 3 * KV_CACHE_LINE));
    }
}

/* The body of kv_tree_find. A search that is alone asks for all of each node
 * at once, but for the tails of inner ones. Another does so at level 1 only:
 * the levels above are in a cache, if nobody writes, and asking costs
 * instructions. */
static KV_ALWAYS_INLINE const unsigned char *
kv_tree_find_by(const struct kv_tree *t, const struct kv_version *v,
                const void *key, bool alone, bool avx2)
{
    struct kv_probe p = kv_probe_make(t, key);
    const struct kv_node *node = v->root;
    size_t i;

    KV_SCHED_POINT("find");
    if (!node) return NULL;
    for (uint32_t level = v->height - 1; level > 0; level--) {
        if (alone || level == 1) {
            kv_node_prefetch(node, 0, t->inner.row_off);
            kv_node_prefetch(node, t->inner.child_off, t->inner.bytes);
        }
        node = kv_children(t, node)[kv_inner_child_by(t, node, p, avx2)];
        KV_SCHED_POINT("descend");
        assert(node->level + 1u == level);
    }
    kv_node_prefetch(node, 0, alone ? t->leaf.bytes : t->leaf.row_off);
    i = kv_leaf_count_by(t, node, p.head, avx2);
    return kv_leaf_settle(t, node, p, &i) ? kv_value(t, node, i - 1) : NULL;
}

#if KV_X86
__attribute__((target("avx2")))
static const unsigned char *kv_tree_find_avx2(const struct kv_tree *t,
                                              const struct kv_version *v,
                                              const void *key, bool alone)
{
    return kv_tree_find_by(t, v, key, alone, true);
}
#endif

/* The value of a key in the tree, or NULL; the delta is not looked at. Valid
 * as long as the version is, and unless an edit in place changes it. alone:
 * what the caller does next keeps the processor from beginning with the next
 * search meanwhile, as a locked instruction does; so this one should be over
 * soon, and not cost little. */
static const unsigned char *kv_tree_find(const struct kv_tree *t,
                                         const struct kv_version *v,
                                         const void *key, bool alone)
{
#if KV_X86
    if (KV_LIKELY(t->avx2)) return kv_tree_find_avx2(t, v, key, alone);
#endif
    return kv_tree_find_by(t, v, key, alone, false);
}

/* Replaces each inner node, all on one level, by its child for the key: by
 * the index, the line of heads and the child's reference, all keys in step. */
static KV_ALWAYS_INLINE void
kv_inner_child_many(const struct kv_tree *t, const struct kv_probe *probes,
                    const struct kv_node **nodes, size_t n, bool avx2)
{
    size_t at[KV_BATCH];

    for (size_t i = 0; i < n; i++) {
        at[i] = kv_node_line(&t->inner, nodes[i], probes[i].head, avx2);
        KV_PREFETCH(kv_heads(nodes[i]) + at[i]);
    }
    for (size_t i = 0; i < n; i++) {
        at[i] += kv_line_rank(kv_heads(nodes[i]) + at[i], probes[i].head,
                              avx2);
        KV_PREFETCH(kv_children(t, nodes[i]) + at[i]);
    }
    for (size_t i = 0; i < n; i++) {
        at[i] = kv_inner_settle(t, nodes[i], probes[i], at[i]);
        nodes[i] = kv_children(t, nodes[i])[at[i]];
        KV_PREFETCH(kv_index(nodes[i]));
    }
}

/* Where counting the heads of its leaf leads each key, for kv_leaf_settle: by
 * the index and one line of heads, all keys in step. */
static KV_ALWAYS_INLINE void
kv_leaf_count_many(const struct kv_tree *t, const struct kv_probe *probes,
                   const struct kv_node *const *leaves, size_t n,
                   size_t *places, bool avx2)
{
    for (size_t i = 0; i < n; i++) {
        places[i] = kv_node_line(&t->leaf, leaves[i], probes[i].head, avx2);
        KV_PREFETCH(kv_heads(leaves[i]) + places[i]);
    }
    for (size_t i = 0; i < n; i++)
        places[i] += kv_line_rank(kv_heads(leaves[i]) + places[i],
                                  probes[i].head, avx2);
}

/* The body of kv_tree_descend_many. Each loop touches only what the one before
 * it has asked for, so that the waits for memory overlap. */
static KV_ALWAYS_INLINE void
kv_tree_descend_many_by(const struct kv_tree *t, const struct kv_version *v,
                        const struct kv_probe *probes, size_t n,
                        const struct kv_node **nodes, size_t *places,
                        const struct kv_node **parents, bool avx2)
{
    assert(n <= KV_BATCH);
    assert(v->root);
    assert(v->height > 0);
    for (size_t i = 0; i < n; i++) nodes[i] = v->root;
    for (uint32_t level = v->height - 1; level > 0; level--) {
        KV_SCHED_POINT("descend");
        if (level == 1 && parents) memcpy(parents, nodes, n * sizeof *nodes);
        kv_inner_child_many(t, probes, nodes, n, avx2);
    }
    KV_SCHED_POINT("find");
    kv_leaf_count_many(t, probes, nodes, n, places, avx2);
}

#if KV_X86
__attribute__((target("avx2")))
static void kv_tree_descend_many_avx2(const struct kv_tree *t,
                                      const struct kv_version *v,
                                      const struct kv_probe *probes, size_t n,
                                      const struct kv_node **nodes,
                                      size_t *places,
                                      const struct kv_node **parents)
{
    kv_tree_descend_many_by(t, v, probes, n, nodes, places, parents, true);
}
#endif

/* The leaves of up to KV_BATCH keys, and their places there, to be settled.
 * parents: of the leaves; not set in a tree of one leaf; may be NULL. The tree
 * must have records. */
static void kv_tree_descend_many(const struct kv_tree *t,
                                 const struct kv_version *v,
                                 const struct kv_probe *probes, size_t n,
                                 const struct kv_node **nodes, size_t *places,
                                 const struct kv_node **parents)
{
#if KV_X86
    if (KV_LIKELY(t->avx2)) {
        kv_tree_descend_many_avx2(t, v, probes, n, nodes, places, parents);
        return;
    }
#endif
    kv_tree_descend_many_by(t, v, probes, n, nodes, places, parents, false);
}

/* Up to KV_BATCH keys of a tree that has records. */
static void kv_tree_find_batch(const struct kv_tree *t,
                               const struct kv_version *v,
                               const unsigned char *keys, size_t n,
                               unsigned char *values, unsigned char *found)
{
    const struct kv_node *nodes[KV_BATCH];
    struct kv_probe probes[KV_BATCH] = {{0}};
    size_t places[KV_BATCH];
    size_t value_bytes = t->env->shape.value_bytes;

    for (size_t i = 0; i < n; i++)
        probes[i] = kv_probe_make(t, keys + i * t->env->shape.key_bytes);
    kv_tree_descend_many(t, v, probes, n, nodes, places, NULL);
    /* The key's row, which may reach into a second line. */
    for (size_t i = 0; i < n; i++) {
        KV_PREFETCH(kv_leaf_row(t, nodes[i], places[i] - (places[i] > 0)));
        KV_PREFETCH(kv_leaf_row(t, nodes[i], places[i]) - 1);
    }
    for (size_t i = 0; i < n; i++) {
        found[i] = kv_leaf_settle(t, nodes[i], probes[i], &places[i]);
        if (found[i] && value_bytes)
            kv_copy(values + i * value_bytes,
                    kv_value(t, nodes[i], places[i] - 1), value_bytes);
    }
}

/* Any number of keys, in any order; without a look at the delta. values: as
 * for kvmeta_get_many; may be NULL where values have no bytes. */
static void kv_tree_find_many(const struct kv_tree *t,
                              const struct kv_version *v,
                              const unsigned char *keys, size_t n,
                              unsigned char *values, unsigned char *found)
{
    const struct kv_shape *shape = &t->env->shape;

    if (!v->root) {
        if (n > 0) memset(found, 0, n);
        return;
    }
    while (n > 0) {
        size_t part = (size_t)kv_min(n, KV_BATCH);

        kv_tree_find_batch(t, v, keys, part, values, found);
        keys += part * shape->key_bytes;
        if (shape->value_bytes) values += part * shape->value_bytes;
        found += part;
        n -= part;
    }
}

/* ==========================================================================
 * Versions and reader slots
 *
 * A reader announces itself in a slot before it loads the current version; a
 * holder (snapshot) counts itself in the version. The writer either copies
 * what it changes and publishes a new version, or, when nobody can see the
 * current one, closes the gate and changes it in place. So nobody who reads
 * ever waits for a lock, and a writer alone need not copy.
 *
 * (V1) a node is freed only when no version that may be read sees it; (V2) a
 * version is freed only when it is not current, not held, and no slot shows a
 * gen that is not above its own; (V3) while a reader is in a slot with the
 * gate open, the version that it loads does not change: the writer closes the
 * gate, then looks at the slots; the reader takes the slot, then looks at the
 * gate; all four are sequentially consistent, so one of them sees the other.
 *
 *     reader (kv_tree_pin)               writer (kv_tree_close_gate)
 *       1  mark its slot as used           1  gate := closed
 *       2  slot := gen                     2  look at the used slots
 *       3  gate open? load current         3  all free: change in place
 *          closed? slot := free, retry        else: gate := open, and copy
 *
 * Whatever the order, it is not possible that the reader finds the gate open
 * in 3 and the writer finds its slot free in 2. That the slot is marked as
 * used before it is taken lets the writer skip those that never were: with a
 * few threads it looks at a few lines and not at KV_SLOTS.
 *
 * Why V2 suffices: `gen` is stored after `current`, so what a reader writes
 * to its slot is never above the version that it loads thereafter. A version
 * is looked at for freeing only when a newer one is current. If a reader has
 * loaded it, it had its slot before that, and the slot is seen; if its slot
 * is not seen, it is going to load a newer version. A reader that becomes a
 * holder counts itself while it is in the slot, and whoever frees looks at
 * the slots before the counts: one of the two keeps the version.
 *
 * C11 atomics only, and no fences: so ThreadSanitizer, which does not know
 * fences, can check all of this. The stores that free a slot or open the gate
 * need no more than release: nothing is decided by their order with a load.
 *
 * Bias: that the store of 2 comes before the load of 3 costs a reader a locked
 * instruction, and what is worse, the processor does not begin with the next
 * search before that. So while nobody writes, readers with a slot of their own
 * leave it out, and whoever is to look at slots next pays for it: it ends the
 * bias and makes all processors that run threads of this process execute a
 * barrier (Linux: membarrier; the idea is that of biased locks). Readers see
 * by `bias` that it was on all the while from before 2 to behind 3: then the
 * barrier comes after 3, and whoever has caused it sees the slot. Where there
 * is no such call, and for ThreadSanitizer, the bias is never on.
 *
 * Dead lists: a node that version N replaced is on the list of the version
 * before it, the last that sees it. When that version is freed, the nodes
 * made after the version before that one are freed, the others move to its
 * list. So a snapshot costs the nodes changed since it was taken.
 *
 *     versions      gen 3 (held)      gen 4       gen 5 (current)
 *     dead lists    a: made in 2      b: in 4     -
 *                   c: made in 1      d: in 2
 *
 * Here version 4 replaced a and c, and version 5 replaced b and d. When 4 is
 * freed, b goes with it, since only 4 saw it; d was there when 3 was made, so
 * 3 sees it, and it moves to 3's list. The gen of a node decides; no tree is
 * ever searched for it.
 * ========================================================================== */

static struct kv_pool *kv_pool_of(struct kv_tree *t, const struct kv_node *node)
{
    return node->level == 0 ? &t->leaves : &t->inners;
}

/* For whoever is the only one who may publish: the holder of the commit
 * right, or of the delta lock while the delta is not empty (D3); or before
 * there are any threads. For others it may be freed at any moment. */
static struct kv_version *kv_tree_current(const struct kv_tree *t)
{
    return atomic_load_explicit(&t->current, memory_order_relaxed);
}

/* A barrier in all threads of the process, wherever they are; false: there is
 * no such thing. kv_barrier_init asks for it, once or more. The two numbers are
 * MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED and the same without REGISTER, of
 * Linux 4.14, whose header not every system has. */
#if defined(__linux__) && defined(SYS_membarrier) && !KV_TSAN
static bool kv_barrier_init(void)
{
    return syscall(SYS_membarrier, 1 << 4, 0, 0) == 0;
}

static bool kv_barrier(void)
{
    return syscall(SYS_membarrier, 1 << 3, 0, 0) == 0;
}
#else
static bool kv_barrier_init(void)
{
    return false;
}

static bool kv_barrier(void)
{
    return false;
}
#endif

/* The bias is on, off or about to end, by the last two bits; what is above
 * them counts how often that was, so that a reader who looks twice and finds
 * the same knows that it has not been off in between. */
enum { KV_BIAS_OFF = 0, KV_BIAS_ON = 1, KV_BIAS_ENDS = 2, KV_BIAS_STATE = 3 };

static bool kv_bias_is_on(const struct kv_tree *t)
{
    return (atomic_load_explicit(&t->bias, memory_order_relaxed)
            & KV_BIAS_STATE) == KV_BIAS_ON;
}

/* After this the slots say who reads, and go on to do so until the bias is on
 * again; that is no matter for those whose gate is closed, or whose version is
 * current, by then. Any thread. A process that has shut itself off from the
 * call since the open gets no more bias; a hundredth of a second is long
 * enough for every processor to finish its stores. */
static void kv_bias_end(struct kv_tree *t)
{
    uint64_t bias;

    pthread_mutex_lock(&t->bias_lock);
    bias = atomic_load(&t->bias);
    if ((bias & KV_BIAS_STATE) != KV_BIAS_OFF) {
        atomic_store(&t->bias, bias - KV_BIAS_ON + KV_BIAS_ENDS);
        KV_SCHED_POINT("bias");
        if (!kv_barrier()) {
            t->barriers = false;
            nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
        }
        atomic_store(&t->bias, (bias | KV_BIAS_STATE) + 1);
    }
    pthread_mutex_unlock(&t->bias_lock);
}

/* For the owner of a slot, every KV_PINS_CALM pins: begins the bias, if there
 * was no edit since the last time. What counts the edits is looked at without
 * order: too early a begin costs the next writer a barrier, no more. */
static void kv_bias_begin(struct kv_tree *t, struct kv_slot *own)
{
    uint64_t bias = atomic_load(&t->bias);
    uint64_t edits = atomic_load(&t->gen)
        + atomic_load_explicit(&t->in_place, memory_order_relaxed);

    own->pins = 0;
    if (t->barriers && own->edits == edits
        && (bias & KV_BIAS_STATE) == KV_BIAS_OFF)
        (void)atomic_compare_exchange_strong(&t->bias, &bias,
                                             bias + KV_BIAS_ON);
    own->edits = edits;
}

/* What tells the calling thread from all others that are alive, if it fits. */
static uint64_t kv_thread_name(void)
{
    pthread_t self = pthread_self();
    uint64_t name = 0;

    memcpy(&name, &self, sizeof self < sizeof name ? sizeof self
                                                   : sizeof name);
    return name;
}

/* Where a thread begins to look for a slot: always at the same one, so that
 * the line stays in its processor's cache, and mostly at another one than
 * other threads do. The multiplier is 2^64 / golden ratio; the top bits of the
 * product depend on all bits of the thread's name. */
static size_t kv_slot_first(uint64_t name)
{
    return (size_t)((name * 0x9E3779B97F4A7C15u) >> 59);
}

_Static_assert(KV_SLOTS_OWN == 32, "kv_slot_first gives 5 bits");
_Static_assert(KV_SLOTS == 2 * KV_SLOTS_OWN, "and so it does for the others");

/* The thread's own slot; KV_SLOTS: it has none, or with `claim`, all that it
 * may have are others'. A slot becomes the own one of the first thread that
 * claims it, and stays so: when that has ended, only one of the same name can
 * have it. */
static inline size_t kv_slot_own(struct kv_tree *t, uint64_t name, bool claim)
{
    size_t i = kv_slot_first(name);

    for (unsigned tries = 0; tries < KV_OWN_TRIES; tries++) {
        uint64_t owner = atomic_load_explicit(&t->owners[i],
                                              memory_order_relaxed);

        if (KV_LIKELY(owner == name)) return i;
        if (owner == 0 && !claim) return KV_SLOTS;
        if (owner == 0
            && atomic_compare_exchange_strong(&t->owners[i], &owner, name)) {
            atomic_fetch_or(&t->slots_used, (uint64_t)1 << i);
            return i;
        }
        i = (i + 1) % KV_SLOTS_OWN;
    }
    return KV_SLOTS;
}

/* Pins in slot i, by a sequentially consistent store; false: others have it,
 * or the gate is closed, and the slot is given back. */
static bool kv_slot_take(struct kv_tree *t, size_t i)
{
    uint64_t gen = atomic_load(&t->gen);
    uint64_t free_slot = 0;

    assert(gen > 0);
    assert(i < KV_SLOTS);
    if (!atomic_compare_exchange_strong(&t->slots[i].gen, &free_slot, gen))
        return false;
    KV_SCHED_POINT("pin");
    if (KV_LIKELY(!atomic_load(&t->gate))) return true;
    atomic_store_explicit(&t->slots[i].gen, 0, memory_order_release);
    return false;
}

/* The body of kv_tree_pin without the bias. With the gate closed it gives its
 * slot back before it waits: the writer that has closed the gate does not wait
 * for it, but one that is about to close it again would find it taken. */
KV_NOINLINE
static struct kv_version *kv_tree_pin_slow(struct kv_tree *t, uint64_t name,
                                           unsigned *slot)
{
    size_t i = kv_slot_own(t, name, t->barriers);

    if (i < KV_SLOTS) {
        while (!kv_slot_take(t, i)) sched_yield();
        if (++t->slots[i].pins >= KV_PINS_CALM)
            kv_bias_begin(t, &t->slots[i]);
        *slot = (unsigned)i;
        return atomic_load(&t->current);
    }
    i = KV_SLOTS_OWN + kv_slot_first(name);
    for (unsigned tries = 1;; tries++) {
        if (!(atomic_load(&t->slots_used) >> i & 1))
            atomic_fetch_or(&t->slots_used, (uint64_t)1 << i);
        if (kv_slot_take(t, i)) {
            *slot = (unsigned)i;
            return atomic_load(&t->current);
        }
        if (atomic_load(&t->gate) || tries % KV_SLOTS_OWN == 0)
            sched_yield();
        else if (++i == KV_SLOTS)
            i = KV_SLOTS_OWN;
    }
}

/*
 * The current version, which stays as it is until kv_tree_unpin(*slot), but
 * for puts that are added to its delta. Waits only while the gate is closed,
 * for the few changes of one edit, or while all slots are taken, for one of
 * those short reads. For short reads only: as long as a slot is taken,
 * writers copy and memory is not reclaimed.
 *
 * While the bias is on a plain store takes the thread's own slot, to which
 * nobody else writes; the fence keeps the compiler from moving it.
 */
static inline struct kv_version *kv_tree_pin(struct kv_tree *t, unsigned *slot)
{
    uint64_t name = kv_thread_name();
    uint64_t bias = atomic_load(&t->bias);
    size_t i = (bias & KV_BIAS_STATE) == KV_BIAS_ON
        ? kv_slot_own(t, name, false) : KV_SLOTS;

    if (KV_LIKELY(i < KV_SLOTS)) {
        assert(t->slots[i].gen == 0);
        atomic_store_explicit(&t->slots[i].gen, atomic_load(&t->gen),
                              memory_order_relaxed);
        atomic_signal_fence(memory_order_seq_cst);
        KV_SCHED_POINT("pin");
        if (KV_LIKELY(!atomic_load(&t->gate))
            && KV_LIKELY(atomic_load(&t->bias) == bias)) {
            *slot = (unsigned)i;
            return atomic_load(&t->current);
        }
        atomic_store_explicit(&t->slots[i].gen, 0, memory_order_release);
    }
    return kv_tree_pin_slow(t, name, slot);
}

/* A writer that sees the slot free may change or free what was read.
 * Nobody is woken; what is left to be freed waits for the next edit. */
static void kv_tree_unpin(struct kv_tree *t, unsigned slot)
{
    assert(slot < KV_SLOTS);
    assert(t->slots[slot].gen > 0);
    atomic_store_explicit(&t->slots[slot].gen, 0, memory_order_release);
}

/* The oldest gen that a slot may see; UINT64_MAX: no slot is taken. Slots
 * that are taken while it looks may or may not be seen: callers rely only
 * on those that were taken before (V2, V3). */
static uint64_t kv_slots_oldest(struct kv_tree *t)
{
    uint64_t oldest = UINT64_MAX;
    uint64_t used;

    if (KV_UNLIKELY((atomic_load(&t->bias) & KV_BIAS_STATE) != KV_BIAS_OFF))
        kv_bias_end(t);
    used = atomic_load(&t->slots_used);
    for (size_t i = 0; used; i++, used >>= 1) {
        uint64_t gen = used & 1 ? atomic_load(&t->slots[i].gen) : 0;

        if (gen) oldest = kv_min(oldest, gen);
    }
    return oldest;
}

/* Back to its pool: no version may see it, nor any reader be in it. */
static void kv_node_free_locked(struct kv_tree *t, struct kv_node *node)
{
    assert(node->slab);
    kv_pool_give(kv_pool_of(t, node), node);
}

/* The memory of a version, with its delta; NULL: there is none. The delta's
 * records need not be cleared, only the fingerprints and the count. */
static struct kv_version *kv_version_new(const struct kv_tree *t)
{
    size_t delta = (size_t)t->delta_cap * t->env->shape.record_bytes;
    void *memory = kv_alloc(t->env, sizeof(struct kv_version) + delta
                                    + KV_CACHE_LINE);
    struct kv_version *v;

    if (!memory) return NULL;
    v = kv_line_up(memory);
    memset(v, 0, sizeof *v);
    v->memory = memory;
    return v;
}

/* Its memory alone; NULL allowed. */
static void kv_version_delete(const struct kv_tree *t, struct kv_version *v)
{
    if (v) kv_free(t->env, v->memory);
}

/* Puts a node that `v` is the last to see on its list. Owned by the list from
 * then on. */
static void kv_version_bury_locked(struct kv_tree *t, struct kv_version *v,
                                   struct kv_node *node)
{
    assert(v);
    assert(node->gen <= v->gen);
    node->dead_next = v->dead;
    v->dead = node;
    t->dead_bytes += kv_layout_of(t, node)->bytes;
}

/* Frees up to *budget nodes of a version that nobody can see, and takes them
 * off the budget; true when the version itself is gone. One whose budget ran
 * out is as valid as before, with a shorter dead list. Not for the current
 * version. */
static bool kv_version_free_locked(struct kv_tree *t, struct kv_version *v,
                                   size_t *budget)
{
    uint64_t older_gen = v->older ? v->older->gen : 0;

    assert(v->newer);
    assert(v != kv_tree_current(t));
    assert(older_gen < v->gen);
    while (v->dead && *budget > 0) {
        struct kv_node *node = v->dead;

        assert(t->dead_bytes >= kv_layout_of(t, node)->bytes);
        v->dead = node->dead_next;
        t->dead_bytes -= kv_layout_of(t, node)->bytes;
        if (node->gen > older_gen)
            kv_node_free_locked(t, node);
        else
            kv_version_bury_locked(t, v->older, node);
        --*budget;
    }
    if (v->dead) return false;
    if (v->older) v->older->newer = v->newer;
    v->newer->older = v->older;
    if (t->oldest == v) t->oldest = v->newer;
    kv_version_delete(t, v);
    return true;
}

/*
 * Frees what nobody can see any more, up to KV_RECLAIM_MAX nodes of it, since
 * others wait for the lock. Returns whether there may be more. Goes from old
 * to new: what a held version is passed over for is freed by its holder's
 * kv_tree_drop; a reader in a slot is in the way of all newer ones, too, so
 * there it stops, and `unreclaimed` asks the next edit to try again.
 */
static bool kv_tree_reclaim_locked(struct kv_tree *t)
{
    uint64_t pinned = kv_slots_oldest(t);
    size_t budget = KV_RECLAIM_MAX;
    struct kv_version *next;

    for (struct kv_version *v = t->oldest; v->newer; v = next) {
        next = v->newer;
        assert(v->gen < next->gen);
        if (atomic_load(&v->refs) > 0) continue;
        if (v->gen >= pinned) {
            t->unreclaimed = true;
            return false;
        }
        if (!kv_version_free_locked(t, v, &budget)) {
            t->unreclaimed = true;
            return true;
        }
    }
    t->unreclaimed = false;
    return false;
}

/* Gives slabs back, if there is more than the one that may stay. */
static void kv_tree_trim_locked(struct kv_tree *t)
{
    if (t->leaves.empty_slabs > 1) kv_pool_trim(&t->leaves);
    if (t->inners.empty_slabs > 1) kv_pool_trim(&t->inners);
}

/* Ends a kv_tree_hold. Any thread; nothing read of `v` may be used
 * afterwards. Whoever lets go of an old version frees what it alone has
 * kept, however much that is, with the lock given away in between; writers
 * do not pay for it. */
static void kv_tree_drop(struct kv_tree *t, struct kv_version *v)
{
    bool more = true;

    assert(atomic_load(&v->refs) > 0);
    atomic_fetch_sub(&v->refs, 1);    /* from here on it may be freed */
    while (more) {
        pthread_mutex_lock(&t->lock);
        more = kv_tree_reclaim_locked(t);
        if (!more) kv_tree_trim_locked(t);
        pthread_mutex_unlock(&t->lock);
    }
}

/* ==========================================================================
 * Edits
 *
 * The only code that changes nodes. One writer at a time: the holder of the
 * commit right, or of the delta lock while it settles a delta. (E1) a node is
 * changed only if it was made in the edit's own gen, and is copied first
 * otherwise; (E2) after kv_tree_reserve the changes cannot fail.
 *
 *     kv_tree_reserve -> kv_edit_begin -> kv_edit_apply ... -> publish
 *                                                           -> abort
 *
 * An edit has one of two forms. A private one builds a version of its own, of
 * a new gen. The first change to a node copies it, and everything above it up
 * to the root; that is what keeps T5 true, and why it is enough to look at
 * the gen of a node to know that its ancestors may be changed, too:
 *
 *         current, gen 7         private, gen 8: one record of D changed
 *
 *             A 7                    A' 8
 *            /   \                  /   \
 *         B 5     C 7            (B)     C' 8      (..) shared nodes
 *         /       /  \                   /  \
 *       ...     D 6  E 7             D' 8   (E)    A, C, D: replaced
 *
 * Publishing it makes A' current and puts A, C and D on the dead list of
 * version 7; aborting frees A', C' and D', and nothing has happened.
 *
 * What was not reached by a change is shared, however large the tree is: an
 * edit of one record copies about as many nodes as the tree is high. A batch
 * shares these copies among its changes, as each node is copied once.
 *
 * An edit in place works on the current version itself, with the gate closed
 * until it is published: the caller must have all the memory that it needs,
 * and must not wait for anything that takes long. Nodes of the current gen
 * are changed where they are. Older ones are copied all the same, since a
 * held version may see them, but only once: the copy is of the current gen.
 * What was changed cannot be taken back, so such an edit may be aborted only
 * while it is empty.
 *
 * How full nodes are. A split leaves halves, except where keys ascend: there
 * it leaves a full leaf, and a new last one. Removals join what is a quarter
 * full or less, if a sibling has room. So leaves are seldom less than a
 * quarter full; the rules only ask that none is empty, and nothing relies on
 * more, but the use of memory.
 * ========================================================================== */

/* On the stack of the writer, from kv_edit_begin to publish or abort. The
 * version is the edit's own until it is published, unless in_place. The nodes
 * on `dead` are still the current version's, and readers may be in them. */
struct kv_edit {
    struct kv_tree *tree;
    struct kv_version *version;   /* the state that is built */
    struct kv_node *dead;         /* replaced nodes, of older gens */
    uint64_t reshaped;            /* leaves split, or shared with a sibling */
    bool in_place;
};

/*
 * Nodes that n changes of a tree of this height may need. A change copies its
 * path, and a sibling; it splits a leaf, and full inner nodes on the way. A
 * leaf that was split or filled up from a sibling has room for cap/16 before
 * it splits again, which bounds what many changes need by less than what each
 * needs alone.
 *
 * `made` are the nodes that splits add: one for each change at most; and with
 * many changes one for each leaf there is, which may all be full, and one for
 * each cap/16 changes after that (kv_edit_make_room shifts half of a room of
 * cap/8). The rest are copies: of a leaf and two siblings for each change,
 * but of no leaf twice. Inner nodes likewise, where each split below counts
 * as a change, and each level of the path is copied, with a sibling. The
 * bounds are generous; what is not taken is free again when the edit ends.
 * With the lock: it reads the pools.
 */
static void kv_tree_need(const struct kv_tree *t, uint64_t height, uint64_t n,
                         uint64_t *leaves, uint64_t *inners)
{
    uint64_t made = kv_min(n, t->leaves.used_nodes + 16 * n / t->leaf.cap + 2);

    *leaves = made + kv_min(3 * n, t->leaves.used_nodes + made);
    made = kv_min(n * (height + 1), t->inners.used_nodes
                  + 4 * made / (t->inner.cap / 2) + height + 2);
    *inners = made + kv_min(2 * n * height, t->inners.used_nodes + made);
    assert(*leaves <= 4 * n);
    assert(*inners <= n * (3 * height + 1));
}

/* Sees to it that so many nodes are free in the pool, and stay so. What has
 * been added to it before an error remains, until it is trimmed. */
static int kv_pool_reserve_locked(struct kv_tree *t, struct kv_pool *pool,
                                  uint64_t nodes, bool limited,
                                  struct kvmeta_error *err)
{
    int rc = KVMETA_OK;

    if (nodes > SIZE_MAX / 2 / pool->node_bytes)
        return kv_fail_memory(err, SIZE_MAX);
    pool->reserved = (size_t)kv_max(pool->reserved, nodes);
    while (!rc && pool->free_nodes < nodes) {
        uint64_t bytes = t->leaves.bytes + t->inners.bytes;
        uint64_t room = t->memory_bytes_max == 0 || !limited ? UINT64_MAX
            : t->memory_bytes_max - kv_min(bytes, t->memory_bytes_max);

        rc = kv_pool_grow(pool, room, err);
    }
    assert(rc || pool->free_nodes >= nodes);
    return rc;
}

/*
 * After OK, `changes` more puts and removes cannot fail, until the next
 * publish or abort. v: what they change; the version of a private edit may
 * be higher by now than the current one. limited: memory_bytes_max counts; not
 * for removes alone, or a store at its limit could not be made smaller.
 * KVMETA_E_NOMEM or KVMETA_E_LIMIT leave nothing reserved; err may be NULL.
 * For the writer.
 *
 * A single change, by far the most frequent, is mostly covered by what pools
 * keep free anyway, and then takes no lock: at most one leaf is made and
 * three are copied, a node is made at each level and above the root, and two
 * are copied at each. A second call before the edit is over must state all
 * changes since the first that are not made yet.
 */
static int kv_tree_reserve(struct kv_tree *t, const struct kv_version *v,
                           size_t changes, bool limited,
                           struct kvmeta_error *err)
{
    size_t height = v->height;
    uint64_t leaves;
    uint64_t inners;
    int rc;

    if (KV_LIKELY(changes == 1) && KV_LIKELY(kv_pool_has(&t->leaves, 4))
        && KV_LIKELY(kv_pool_has(&t->inners, 3 * height + 1)))
        return KVMETA_OK;
    /* Both pools or none: one alone would only keep slabs from being freed.
     * What was added to them is given back, as far as it is not needed. */
    pthread_mutex_lock(&t->lock);
    kv_tree_need(t, height, changes, &leaves, &inners);
    rc = kv_pool_reserve_locked(t, &t->leaves, leaves, limited, err);
    if (!rc)
        rc = kv_pool_reserve_locked(t, &t->inners, inners, limited, err);
    if (rc) t->leaves.reserved = t->inners.reserved = 0;
    if (rc) t->leaves.keep = t->inners.keep = 0;
    if (rc) kv_tree_trim_locked(t);
    pthread_mutex_unlock(&t->lock);
    return rc;
}

/* Ends a reservation: what was not taken of it is free again. */
static void kv_tree_unreserve_locked(struct kv_tree *t)
{
    kv_pool_unreserve(&t->leaves);
    kv_pool_unreserve(&t->inners);
    kv_tree_trim_locked(t);
}

static void kv_tree_unreserve(struct kv_tree *t)
{
    pthread_mutex_lock(&t->lock);
    kv_tree_unreserve_locked(t);
    pthread_mutex_unlock(&t->lock);
}

/* Sees to it that the next kv_edit_begin cannot fail; false: there is no
 * memory. For the writer. */
static bool kv_tree_spare(struct kv_tree *t)
{
    if (!t->spare) t->spare = kv_version_new(t);
    return t->spare != NULL;
}

/* Closes the gate, if nobody is inside and nobody holds the version: then
 * nobody but the writer sees the current version until the gate is opened.
 * The slots come first: once they are empty, and the gate is closed,
 * nobody can begin to hold it. */
static bool kv_tree_close_gate(struct kv_tree *t)
{
    assert(!t->gate);
    atomic_store(&t->gate, true);
    KV_SCHED_POINT("gate");
    if (kv_slots_oldest(t) == UINT64_MAX
        && atomic_load(&kv_tree_current(t)->refs) == 0)
        return true;
    atomic_store(&t->gate, false);
    return false;
}

/* Should the background prepare a slab? Not where memory has a bound: a
 * prepared slab is not counted against it. Without a lock: asked by the
 * worker when it plans, and by whoever has written to the log, to wake the
 * worker. */
static bool kv_tree_wants_slab(const struct kv_tree *t)
{
    return t->leaves.ahead_wanted && t->memory_bytes_max == 0;
}

/* The delta of the current version must be empty, unless the edit is to
 * empty it. Fails only if it needs a version and there is no spare one. Each
 * edit that was begun must be published or aborted, by the same thread and
 * before the next one; until then e->version is what its reads should see. */
static int kv_edit_begin(struct kv_tree *t, struct kv_edit *e,
                         bool in_place_allowed, struct kvmeta_error *err)
{
    struct kv_version *base = kv_tree_current(t);
    struct kv_version *v;

    assert(base);
    assert(!base->newer);
    memset(e, 0, sizeof *e);
    e->tree = t;
    if (in_place_allowed && kv_tree_close_gate(t)) {
        e->in_place = true;
        e->version = base;
        return KVMETA_OK;
    }
    /* Nobody sees the new version before it is published, so all but the
     * links to its neighbours is set here, without the lock. */
    v = t->spare ? t->spare : kv_version_new(t);
    if (!v) return kv_fail_memory(err, sizeof *v);
    t->spare = NULL;
    v->root = base->root;         /* the delta stays empty */
    v->height = base->height;
    v->count = base->count;
    v->digest = base->digest;
    v->seq = base->seq;
    v->gen = base->gen + 1;
    e->version = v;
    return KVMETA_OK;
}

/* The value of a key in the state that is built so far, or NULL. Valid until
 * the next change. */
static const unsigned char *kv_edit_find(const struct kv_edit *e,
                                         const void *key)
{
    return kv_tree_find(e->tree, e->version, key, true);
}

/* Restores T7 after the heads of the node were changed. */
static void kv_index_make(const struct kv_tree *t, struct kv_node *node)
{
    const int64_t *heads = kv_heads(node);
    int64_t *index = kv_index(node);

    for (size_t line = 1; line < kv_layout_of(t, node)->lines; line++)
        index[line - 1] = heads[8 * line];
}

/* An empty node, with its heads and its index padded (T4, T7). Rows and
 * children are not cleared: nobody reads those that are not used. */
static void kv_node_init(const struct kv_tree *t, struct kv_node *node,
                         uint32_t level, uint64_t gen)
{
    const struct kv_layout *l = level == 0 ? &t->leaf : &t->inner;
    int64_t *index = kv_index(node);

    node->gen = gen;
    node->dead_next = NULL;
    node->count = 0;
    node->level = (uint8_t)level;
    memset(node->fill, 0, sizeof node->fill);
    for (size_t i = 0; i < (l->row_off - sizeof *node) / 8; i++)
        index[i] = KV_HEAD_PAD;   /* the heads follow the index */
}

/* An empty node of the edit's gen, which must be filled before the edit is
 * over (T3). Its memory has been reserved, so there always is one. */
static struct kv_node *kv_edit_new(struct kv_edit *e, uint32_t level)
{
    struct kv_tree *t = e->tree;
    struct kv_node *node;

    assert(level < KV_HEIGHT_MAX);
    pthread_mutex_lock(&t->lock);
    node = kv_pool_take(level == 0 ? &t->leaves : &t->inners);
    pthread_mutex_unlock(&t->lock);
    kv_node_init(t, node, level, e->version->gen);
    return node;
}

/*
 * A node that the version built no longer sees. Three cases:
 *
 * - a private edit replaces a node of the current version: kept aside, for
 *   readers are in it, and the edit may yet be aborted;
 * - in place, a node that an older version sees: buried there right away. The
 *   newest of the older versions is the last that can see it;
 * - a node that only this edit's version has seen: free at once.
 */
static void kv_edit_retire(struct kv_edit *e, struct kv_node *node)
{
    struct kv_tree *t = e->tree;

    assert(node->gen <= e->version->gen);
    if (node->gen < e->version->gen && !e->in_place) {
        node->dead_next = e->dead;    /* buried when the edit is published */
        e->dead = node;
        return;
    }
    pthread_mutex_lock(&t->lock);
    if (e->version->older && node->gen <= e->version->older->gen)
        kv_version_bury_locked(t, e->version->older, node);
    else
        kv_node_free_locked(t, node);
    pthread_mutex_unlock(&t->lock);
}

/* The node in *ref, as one that may be changed (E1): itself, or a copy that
 * takes its place. *ref must be in a node that the edit owns, or be the root
 * of its version. The old node must not be used by the edit any more. */
static struct kv_node *kv_edit_own(struct kv_edit *e, struct kv_node **ref)
{
    struct kv_node *old = *ref;
    const struct kv_layout *l = kv_layout_of(e->tree, old);
    struct kv_node *node;

    if (KV_LIKELY(old->gen == e->version->gen)) return old;
    assert(old->gen < e->version->gen);
    assert(old->count <= l->cap);
    node = kv_edit_new(e, old->level);
    node->count = old->count;
    memcpy(node->fill, old->fill, sizeof node->fill);
    /* All arrays, with what is not used of them. */
    memcpy(kv_index(node), kv_index(old), l->bytes - sizeof *node);
    *ref = node;
    kv_edit_retire(e, old);
    return node;
}

/* Number of keys in a node: an inner one has a separator less than children. */
static size_t kv_node_keys(const struct kv_node *node)
{
    assert(node->level == 0 || node->count > 0);
    return node->level == 0 ? node->count : node->count - 1;
}

/* Copies n heads and rows, within a node or from one to another: the keys of
 * an inner node, the records of a leaf, which must be packed, or of a block of
 * it. Both nodes are of one level; ranges within a node may overlap. `from`
 * keeps its count, and its heads. */
static void kv_rows_move(const struct kv_tree *t, struct kv_node *to,
                         size_t to_i, const struct kv_node *from,
                         size_t from_i, size_t n)
{
    size_t row_bytes = kv_layout_of(t, to)->row_bytes;

    assert(to->level == from->level);
    assert(to_i + n <= (size_t)8 * kv_layout_of(t, to)->lines);
    assert(from_i + n <= (size_t)8 * kv_layout_of(t, from)->lines);
    memmove(kv_heads(to) + to_i, kv_heads(from) + from_i, 8 * n);
    if (row_bytes)
        memmove(kv_row(t, to, to_i), kv_row(t, from, from_i), n * row_bytes);
}

/* Copies n children likewise. Counts are left to the caller in both, and so
 * is the padding behind the last key. */
static void kv_children_move(const struct kv_tree *t, struct kv_node *to,
                             size_t to_i, const struct kv_node *from,
                             size_t from_i, size_t n)
{
    assert(to_i + n <= t->inner.cap);
    assert(from_i + n <= t->inner.cap);
    memmove(kv_children(t, to) + to_i, kv_children(t, from) + from_i,
            n * sizeof to);
}

/* Writes a key only; a leaf's value is not touched. */
static void kv_key_set(const struct kv_tree *t, struct kv_node *node, size_t i,
                       struct kv_probe p)
{
    assert(i < kv_layout_of(t, node)->cap);
    kv_heads(node)[i] = p.head;
    kv_copy(kv_row(t, node, i), p.tail, t->env->shape.tail_bytes);
}

/* Restores T4 of a block of which `fill` records are used. */
static void kv_block_pad(struct kv_node *leaf, size_t b, size_t fill)
{
    int64_t *heads = kv_heads(leaf) + 8 * b;

    for (size_t i = 0; i < 8; i++) heads[i] = i < fill ? heads[i] : KV_HEAD_PAD;
    leaf->fill[b] = (uint8_t)fill;
}

/*
 * Where records are moved between leaves, they stand in one piece meanwhile:
 * a leaf is packed, changed like the arrays of any other node, and spread over
 * its blocks again.
 */
static void kv_leaf_pack(const struct kv_tree *t, struct kv_node *leaf)
{
    size_t n = leaf->fill[0];

    for (size_t b = 1; b < t->leaf.lines; b++) {
        if (n < 8 * b) kv_rows_move(t, leaf, n, leaf, 8 * b, leaf->fill[b]);
        n += leaf->fill[b];
    }
    assert(n == leaf->count);
}

/* The opposite, with as many records in each block, or one more: restores T3,
 * T4 and T7 of the leaf. From the last block on, so that each finds its
 * records where packing has left them. */
static void kv_leaf_spread(const struct kv_tree *t, struct kv_node *leaf)
{
    size_t lines = t->leaf.lines;
    size_t each, more;

    assert(lines > 0);
    each = leaf->count / lines;
    more = leaf->count % lines;
    for (size_t b = lines; b-- > 0;) {
        size_t fill = each + (b < more);
        size_t n = b * each + (size_t)kv_min(b, more);

        if (n < 8 * b) kv_rows_move(t, leaf, 8 * b, leaf, n, fill);
        kv_block_pad(leaf, b, fill);
    }
    kv_index_make(t, leaf);
}

/* How many records are before the place, in all blocks. */
static size_t kv_leaf_rank(const struct kv_node *leaf, size_t place)
{
    size_t block = kv_place_block(place);
    size_t rank = place - 8 * block;

    for (size_t b = 0; b < block; b++) rank += leaf->fill[b];
    return rank;
}

/* Where the last record is. */
static size_t kv_leaf_last(const struct kv_tree *t, const struct kv_node *leaf)
{
    size_t b = t->leaf.lines - 1;

    assert(leaf->count > 0);
    while (leaf->fill[b] == 0) b--;
    return 8 * b + leaf->fill[b] - 1u;
}

/* Makes `child` the child at i > 0 of a node with room; `separator` comes to
 * stand before it. It may point into another node, but not into this one,
 * whose rows move first. */
static void kv_inner_insert(const struct kv_tree *t, struct kv_node *node,
                            size_t i, struct kv_probe separator,
                            struct kv_node *child)
{
    size_t n = node->count;

    assert(i > 0);
    assert(i <= n);
    assert(n < t->inner.cap);
    assert(child->level + 1 == node->level);
    kv_rows_move(t, node, i, node, i - 1, n - i);
    kv_children_move(t, node, i + 1, node, i, n - i);
    kv_key_set(t, node, i - 1, separator);
    kv_children(t, node)[i] = child;
    node->count++;
    kv_index_make(t, node);
}

/* Takes out child i, with the separator before it (or behind the first).
 * May leave a node without children, which the caller has to take out in
 * turn. The child itself is not retired. */
static void kv_inner_remove(const struct kv_tree *t, struct kv_node *node,
                            size_t i)
{
    size_t n = node->count;
    size_t key = i > 0 ? i - 1 : 0;

    assert(i < n);
    if (n > 1) kv_rows_move(t, node, key, node, key + 1, n - 2 - key);
    kv_children_move(t, node, i, node, i + 1, n - 1 - i);
    node->count--;
    if (n > 1) kv_heads(node)[n - 2] = KV_HEAD_PAD;
    kv_index_make(t, node);
}

/*
 * Moves the upper part of child i, from `keep` on, to a new right sibling.
 * The edit owns parent and child, and the parent has room.
 *
 *     leaf    [a b c d] -> [a b] c [c d]     the separator is a copy
 *     inner   [A b B c C d D] -> [A b B] c [C d D]     it moves up
 */
static void kv_edit_split(struct kv_edit *e, struct kv_node *parent, size_t i,
                          size_t keep)
{
    const struct kv_tree *t = e->tree;
    struct kv_node *left = kv_children(t, parent)[i];
    struct kv_node *right = kv_edit_new(e, left->level);
    size_t n = left->count;
    struct kv_probe separator;

    assert(parent->gen == e->version->gen);
    assert(left->gen == e->version->gen);
    assert(keep > 0);
    assert(keep < n);
    if (left->level == 0) kv_leaf_pack(t, left);
    right->count = (uint16_t)(n - keep);
    kv_rows_move(t, right, 0, left, keep, kv_node_keys(right));
    if (left->level > 0)
        kv_children_move(t, right, 0, left, keep, n - keep);
    /* An inner node's separator between the halves moves up. */
    separator = left->level == 0 ? kv_key_at(t, right, 0)
                                 : kv_key_at(t, left, keep - 1);
    kv_inner_insert(t, parent, i + 1, separator, right);
    left->count = (uint16_t)keep;
    if (left->level == 0) {
        kv_leaf_spread(t, left);
        kv_leaf_spread(t, right);
        e->reshaped++;
        return;
    }
    for (size_t k = keep - 1; k < n - 1; k++) kv_heads(left)[k] = KV_HEAD_PAD;
    kv_index_make(t, left);
    kv_index_make(t, right);
}

/* Moves n records from one leaf to its neighbour, which has room for them;
 * i is the left one's place in the parent, which the edit owns. The
 * separator becomes the first key of the right leaf; neither leaf becomes
 * empty. */
static void kv_edit_shift(struct kv_edit *e, struct kv_node *parent, size_t i,
                          size_t n, bool to_left)
{
    const struct kv_tree *t = e->tree;
    struct kv_node *left = kv_edit_own(e, &kv_children(t, parent)[i]);
    struct kv_node *right = kv_edit_own(e, &kv_children(t, parent)[i + 1]);

    /* To the left: behind its last record, and what stays moves up to the
     * front. To the right: room is made in front, and filled from the end. */
    kv_leaf_pack(t, left);
    kv_leaf_pack(t, right);
    if (to_left) {
        kv_rows_move(t, left, left->count, right, 0, n);
        kv_rows_move(t, right, 0, right, n, right->count - n);
        left->count = (uint16_t)(left->count + n);
        right->count = (uint16_t)(right->count - n);
    } else {
        kv_rows_move(t, right, n, right, 0, right->count);
        kv_rows_move(t, right, 0, left, left->count - n, n);
        left->count = (uint16_t)(left->count - n);
        right->count = (uint16_t)(right->count + n);
    }
    assert(left->count > 0);
    assert(right->count > 0);
    assert(left->count <= t->leaf.cap);
    assert(right->count <= t->leaf.cap);
    kv_leaf_spread(t, left);
    kv_leaf_spread(t, right);
    e->reshaped++;
    kv_key_set(t, parent, i, kv_key_at(t, right, 0));
    kv_index_make(t, parent);
}

/* How many records more a child of the node has room for; 0: there is no such
 * child. */
static size_t kv_inner_room(const struct kv_tree *t, const struct kv_node *node,
                            size_t i)
{
    return i < node->count ? t->leaf.cap - kv_children(t, node)[i]->count : 0;
}

/* The sibling that a full leaf should share with, or i itself if none has
 * enough room. */
static size_t kv_inner_sharing(const struct kv_tree *t,
                               const struct kv_node *parent, size_t i)
{
    size_t enough = t->leaf.cap / 8 + 1;
    size_t left = i > 0 ? kv_inner_room(t, parent, i - 1) : 0;
    size_t right = kv_inner_room(t, parent, i + 1);

    if (left >= enough && left >= right) return i - 1;
    return right >= enough ? i + 1 : i;
}

/*
 * Makes room in the full leaf at i: gives half of what a sibling has room for
 * to it, or splits. At the right edge of the tree, where ascending keys go,
 * it leaves the leaf full and begins a new one.
 *
 * Shifting first keeps leaves fuller than splitting alone would, at random
 * inserts, too. A sibling with room for less than an eighth is not worth it:
 * the leaf would be full again soon, and a shift may have to copy the
 * sibling.
 *
 *     append   [full] | end      -> [all but its last] [last, and the new]
 *     shift    [  ] [full]       -> [half of the room filled] [the rest]
 *     split    [full] [full]     -> [half] [half] [full]
 *
 * The caller then looks the key's leaf up again: it can be either of the two.
 */
static void kv_edit_make_room(struct kv_edit *e, struct kv_node *parent,
                              size_t i, bool append)
{
    const struct kv_tree *t = e->tree;
    size_t cap = t->leaf.cap;
    size_t sibling = append ? i : kv_inner_sharing(t, parent, i);
    size_t n = (kv_inner_room(t, parent, sibling) + 1) / 2;

    assert(parent->gen == e->version->gen);
    assert(kv_children(t, parent)[i]->count == cap);
    if (sibling < i)
        kv_edit_shift(e, parent, sibling, n, true);
    else if (sibling > i)
        kv_edit_shift(e, parent, i, n, false);
    else
        kv_edit_split(e, parent, i, append ? cap - 1 : cap / 2);
}

/* A new root above the one that is full, with that as its only child: the
 * caller splits it at once. */
static void kv_edit_raise(struct kv_edit *e)
{
    struct kv_version *v = e->version;
    struct kv_node *root = kv_edit_new(e, v->height);

    assert(v->height < KV_HEIGHT_MAX);
    kv_children(e->tree, root)[0] = v->root;
    root->count = 1;
    v->root = root;
    v->height++;
}

/* An inner node is full by its children: it has room for one key more. */
static bool kv_node_full(const struct kv_tree *t, const struct kv_node *node)
{
    return node->count == kv_layout_of(t, node)->cap;
}

/* The path to a leaf: nodes and the child taken in each, by level;
 * index[0] is for those who have a use for a place in the leaf. Valid
 * until one of its nodes is copied, split or joined; on the stack, so that
 * no search needs memory. */
struct kv_path {
    struct kv_node *nodes[KV_HEIGHT_MAX];   /* by level */
    size_t index[KV_HEIGHT_MAX];
};

/*
 * The leaf for the key, owned, with its path. A full inner node on the way is
 * split before it is entered, so there is always room above a leaf, and no
 * way back up is needed (Cormen et al., Introduction to Algorithms, 18.2).
 * The leaf itself may be full. The right edge is split at its end: ascending
 * keys leave full nodes behind. index[0] of the path is not set.
 */
static struct kv_node *kv_edit_descend(struct kv_edit *e, struct kv_probe p,
                                       struct kv_path *path)
{
    struct kv_tree *t = e->tree;
    struct kv_version *v = e->version;
    struct kv_node *node;
    bool edge = true;

    /* edge: the path so far goes through last children only. */
    if (!v->root) {
        v->root = kv_edit_new(e, 0);
        v->height = 1;
    }
    if (v->height > 1 && kv_node_full(t, v->root)) kv_edit_raise(e);
    node = kv_edit_own(e, &v->root);
    assert(node->level + 1u == v->height);
    while (node->level > 0) {
        size_t i = kv_inner_child(t, node, p);
        struct kv_node *child = kv_children(t, node)[i];
        bool last = edge && i + 1 == node->count;

        assert(!kv_node_full(t, node));
        /* The split, or the copy, of a leaf touches all of it. */
        if (node->level == 1) kv_node_prefetch(child, 0, t->leaf.bytes);
        /* The key may belong to either half of a node that was split. */
        if (child->level > 0 && KV_UNLIKELY(kv_node_full(t, child))) {
            (void)kv_edit_own(e, &kv_children(t, node)[i]);
            kv_edit_split(e, node, i, last ? child->count - 1
                                           : child->count / 2);
            i = kv_inner_child(t, node, p);
        }
        edge = edge && i + 1u == node->count;
        path->nodes[node->level] = node;
        path->index[node->level] = i;
        node = kv_edit_own(e, &kv_children(t, node)[i]);
    }
    path->nodes[0] = node;
    return node;
}

/* Makes a record of place i, which must be the free one behind the records of
 * its block, or have been made free by moving them. Whether the keys ascend is
 * the caller's affair; so are count and digest of the version. */
static void kv_leaf_set(const struct kv_tree *t, struct kv_node *leaf,
                        size_t i, struct kv_probe p, const void *value)
{
    assert(leaf->count < t->leaf.cap);
    assert(leaf->fill[i / 8] < 8);
    kv_key_set(t, leaf, i, p);
    kv_copy(kv_value(t, leaf, i), value, t->env->shape.value_bytes);
    if (i % 8 == 0 && i > 0) kv_index(leaf)[i / 8 - 1] = p.head;
    leaf->fill[i / 8]++;
    leaf->count++;
}

/* The block that takes a record at the place: that of the record before it,
 * or if that is full, and this one comes behind it, the next. One that is full
 * in turn: there is no room. */
static size_t kv_leaf_block_for(const struct kv_tree *t,
                                const struct kv_node *leaf, size_t place)
{
    size_t b = kv_place_block(place);

    if (leaf->fill[b] == 8 && place == 8 * b + 8 && b + 1 < t->leaf.lines)
        b++;
    return b;
}

/* The block with room that is nearest to block b, which has none. There is
 * one, as the leaf is not full. */
static size_t kv_leaf_nearest(const struct kv_tree *t,
                              const struct kv_node *leaf, size_t b)
{
    assert(leaf->count < t->leaf.cap);
    for (size_t d = 1;; d++) {
        if (b + d < t->leaf.lines && leaf->fill[b + d] < 8) return b + d;
        if (b >= d && leaf->fill[b - d] < 8) return b - d;
    }
}

/* Moves the n records of a block that are next to the block beside it there,
 * where there is room. */
static void kv_block_give(const struct kv_tree *t, struct kv_node *leaf,
                          size_t from, size_t to, size_t n)
{
    size_t rest = leaf->fill[from] - n;
    size_t fill = leaf->fill[to];

    assert(n <= leaf->fill[from]);
    assert(fill + n <= 8);
    if (to < from) {
        kv_rows_move(t, leaf, 8 * to + fill, leaf, 8 * from, n);
        kv_rows_move(t, leaf, 8 * from, leaf, 8 * from + n, rest);
    } else {
        kv_rows_move(t, leaf, 8 * to + n, leaf, 8 * to, fill);
        kv_rows_move(t, leaf, 8 * to, leaf, 8 * from + rest, n);
    }
    kv_block_pad(leaf, from, rest);
    leaf->fill[to] = (uint8_t)(fill + n);
}

/*
 * Makes room in the full block b, of a leaf that is not full. The block beside
 * it gets half of what it has room for; or if it is full, too, one record of
 * b, in exchange for one that it gives away in turn, and so on up to the
 * nearest block with room. Returns where the place of a key in b is now: it
 * may have moved along.
 */
static size_t kv_block_make_room(const struct kv_tree *t, struct kv_node *leaf,
                                 size_t b, size_t place)
{
    size_t to = kv_leaf_nearest(t, leaf, b);
    bool left = to < b;
    size_t lane = place - 8 * b;
    size_t n;

    for (; to + 1 < b; to++) kv_block_give(t, leaf, to + 1, to, 1);
    for (; to > b + 1; to--) kv_block_give(t, leaf, to - 1, to, 1);
    n = (9u - leaf->fill[to]) / 2;
    if (left)
        place = lane > n ? place - n : 8 * to + leaf->fill[to] + lane;
    else if (lane == 8)
        n = 0;                    /* it goes there itself */
    else if (lane > 8 - n)
        place = 8 * to + lane - (8 - n);
    kv_block_give(t, leaf, b, to, n);
    kv_index_make(t, leaf);
    return place;
}

/* Inserts at the place of a leaf that is not full. What is behind it in its
 * block moves. */
static void kv_leaf_insert(const struct kv_tree *t, struct kv_node *leaf,
                           size_t place, struct kv_probe p, const void *value)
{
    size_t b = kv_leaf_block_for(t, leaf, place);

    assert(leaf->count < t->leaf.cap);
    if (KV_UNLIKELY(leaf->fill[b] == 8)) {
        place = kv_block_make_room(t, leaf, kv_place_block(place), place);
        b = kv_leaf_block_for(t, leaf, place);
    }
    kv_rows_move(t, leaf, place + 1, leaf, place,
                 8 * b + leaf->fill[b] - place);
    kv_leaf_set(t, leaf, place, p, value);
}

/* Takes a record out. A block that it leaves without any must be the last that
 * had some (T3); else all are spread anew. */
static void kv_leaf_remove(const struct kv_tree *t, struct kv_node *leaf,
                           size_t i)
{
    size_t b = i / 8;
    size_t end = 8 * b + leaf->fill[b];

    assert(i < end);
    kv_rows_move(t, leaf, i, leaf, i + 1, end - 1 - i);
    kv_heads(leaf)[end - 1] = KV_HEAD_PAD;
    leaf->fill[b]--;
    leaf->count--;
    if (b > 0) kv_index(leaf)[b - 1] = kv_heads(leaf)[8 * b];
    if (leaf->fill[b] == 0 && b + 1 < t->leaf.lines
        && leaf->fill[b + 1] > 0) {
        kv_leaf_pack(t, leaf);
        kv_leaf_spread(t, leaf);
    }
}

/* The leaf for the key, and its place there, after room has been made in the
 * full one that the path leads to. The path is the edit's own, and the parent
 * has room: kv_edit_descend has seen to both. The key is to be appended if
 * each step of the path is the last one. */
KV_NOINLINE
static struct kv_node *kv_edit_make_way(struct kv_edit *e,
                                        struct kv_path *path,
                                        struct kv_probe p, size_t *place)
{
    const struct kv_tree *t = e->tree;
    bool append = *place == t->leaf.cap;
    struct kv_node *parent;
    struct kv_node *leaf;
    bool match;

    if (e->version->height == 1) {
        kv_edit_raise(e);
        path->nodes[1] = e->version->root;
        path->index[1] = 0;
    }
    for (uint32_t level = 1; level < e->version->height; level++)
        append = append && path->index[level] + 1 == path->nodes[level]->count;
    parent = path->nodes[1];
    kv_edit_make_room(e, parent, path->index[1], append);
    leaf = kv_edit_own(e, &kv_children(t, parent)[kv_inner_child(t, parent,
                                                                 p)]);
    *place = kv_leaf_place(t, leaf, p, &match);
    assert(!match);
    return leaf;
}

/* Puts at the key's place in the leaf; match: there is a record with this key,
 * which is replaced. value must not be NULL. The edit owns the leaf, which has
 * room, unless a record is replaced. All puts but those of kv_edit_append end
 * here, and keep the version's count and digest (T6). */
static void kv_edit_put_at(struct kv_edit *e, struct kv_node *leaf,
                           size_t place, bool match, struct kv_probe p,
                           const void *key, const void *value)
{
    struct kv_tree *t = e->tree;
    struct kv_version *v = e->version;

    /* Before the leaf changes: the old value is read from its place. */
    assert(leaf->gen == v->gen);
    assert(!match || kv_heads(leaf)[place - 1] == p.head);
    kv_digest_add(&v->digest, kv_digest_record(&t->env->shape, key, value));
    if (match) {
        unsigned char *old = kv_value(t, leaf, place - 1);

        kv_digest_sub(&v->digest, kv_digest_record(&t->env->shape, key, old));
        kv_copy(old, value, t->env->shape.value_bytes);
        return;
    }
    v->count++;
    kv_leaf_insert(t, leaf, place, p, value);
}

/* Puts a record, whose leaf is not known. True: one was replaced. */
static bool kv_edit_put(struct kv_edit *e, struct kv_probe p, const void *key,
                        const void *value)
{
    struct kv_path path;
    struct kv_node *leaf = kv_edit_descend(e, p, &path);
    bool match;
    size_t place = kv_leaf_place(e->tree, leaf, p, &match);

    if (!match && leaf->count == e->tree->leaf.cap)
        leaf = kv_edit_make_way(e, &path, p, &place);
    kv_edit_put_at(e, leaf, place, match, p, key, value);
    return match;
}

/* Joins child i of a node with its right sibling, when both together leave
 * some room: a full node would be split by the next put. The separator
 * between two inner nodes comes down between their keys. The left node may
 * be replaced by a copy; the right one is retired without one. */
static bool kv_edit_join(struct kv_edit *e, struct kv_node *parent, size_t i)
{
    const struct kv_tree *t = e->tree;
    struct kv_node **children = kv_children(t, parent);
    struct kv_node *right = children[i + 1];
    struct kv_node *left;
    size_t n = children[i]->count;
    size_t both = n + right->count;

    assert(i + 1 < parent->count);
    assert(n > 0);
    if (both > kv_layout_of(t, right)->cap * 3 / 4) return false;
    left = kv_edit_own(e, &children[i]);
    if (left->level > 0) {
        kv_key_set(t, left, n - 1, kv_key_at(t, parent, i));
        kv_children_move(t, left, n, right, 0, right->count);
        kv_rows_move(t, left, n, right, 0, kv_node_keys(right));
        left->count = (uint16_t)both;
        kv_index_make(t, left);
    } else {
        kv_leaf_pack(t, left);
        for (size_t b = 0; b < t->leaf.lines; b++) {
            kv_rows_move(t, left, n, right, 8 * b, right->fill[b]);
            n += right->fill[b];
        }
        left->count = (uint16_t)both;
        kv_leaf_spread(t, left);
    }
    assert(left->count < kv_layout_of(t, left)->cap);
    kv_inner_remove(t, parent, i + 1);
    kv_edit_retire(e, right);
    return true;
}

/*
 * Mends the path above a leaf that lost a record: joins nodes that are less
 * than a quarter full, takes out empty ones, lowers the root. A level that
 * stays as it is ends the climb, for nothing above it has changed. Nodes may
 * stay small, where both siblings are too full to join: that costs memory and
 * breaks no rule, whereas evening them out would cost copies on each removal.
 * The edit owns the path.
 */
static void kv_edit_mend(struct kv_edit *e, struct kv_path *path)
{
    const struct kv_tree *t = e->tree;
    struct kv_version *v = e->version;

    /* Each round may take one child out of `parent`; the next looks at it. */
    for (uint32_t level = 0; level + 1 < v->height; level++) {
        struct kv_node *node = path->nodes[level];
        struct kv_node *parent = path->nodes[level + 1];
        size_t i = path->index[level + 1];

        assert(parent->gen == v->gen);
        assert(kv_children(t, parent)[i] == node);
        if (node->count > kv_layout_of(t, node)->cap / 4) break;
        /* With the right sibling if that can be, else with the left one. */
        if (node->count == 0) {
            kv_inner_remove(t, parent, i);
            kv_edit_retire(e, node);
        } else if (!(i + 1 < parent->count && kv_edit_join(e, parent, i))
                   && !(i > 0 && kv_edit_join(e, parent, i - 1))) {
            break;
        }
    }
    /* A root with one child is not needed, and what it hands over to may have
     * one child, too: loading leaves such nodes at the right edge. */
    while (v->root->level > 0 && v->root->count <= 1) {
        struct kv_node *old = v->root;

        assert(old->count == 1);
        v->root = kv_children(t, old)[0];
        v->height--;
        kv_edit_retire(e, old);
    }
    if (v->root->count == 0) {
        kv_edit_retire(e, v->root);
        v->root = NULL;
        v->height = 0;
    }
}

/* True: there was a record. Looks first, so that removing what is not there
 * copies nothing. `value` points into a leaf that the next lines may replace:
 * it is used before. */
static bool kv_edit_remove(struct kv_edit *e, const void *key)
{
    struct kv_tree *t = e->tree;
    struct kv_version *v = e->version;
    struct kv_probe p = kv_probe_make(t, key);
    const unsigned char *value = kv_edit_find(e, key);
    struct kv_path path;
    struct kv_node *leaf;
    bool match;
    size_t place;

    if (!value) return false;
    assert(v->root);
    assert(v->root->level + 1u == v->height);
    assert(v->count > 0);
    kv_digest_sub(&v->digest, kv_digest_record(&t->env->shape, key, value));
    v->count--;

    /* From the top, so that each node that is replaced is in an owned one. */
    path.nodes[v->height - 1] = kv_edit_own(e, &v->root);
    for (uint32_t level = v->height - 1; level > 0; level--) {
        struct kv_node *node = path.nodes[level];

        path.index[level] = kv_inner_child(t, node, p);
        path.nodes[level - 1] =
            kv_edit_own(e, &kv_children(t, node)[path.index[level]]);
    }
    /* Separators that equal the key may stay: they need not be keys. */
    leaf = path.nodes[0];
    place = kv_leaf_place(t, leaf, p, &match);
    assert(match);
    kv_leaf_remove(t, leaf, place - 1);
    kv_edit_mend(e, &path);
    return true;
}

/* value NULL: a removal. Both belong to the caller of the edit; where values
 * have no bytes any pointer that is not NULL makes a put. */
struct kv_change {
    const void *key;
    const void *value;
};

/* Is the place between two records of the leaf? A key whose place that is
 * belongs here, whatever has been split off or shifted. */
static bool kv_leaf_has_within(const struct kv_tree *t,
                               const struct kv_node *leaf, size_t place)
{
    return place > 0 && place <= kv_leaf_last(t, leaf);
}

/* Fetches what a put touches of a leaf in which counting has led to `place`:
 * the record before it, if that is to be replaced; or what is behind it in its
 * block, which moves, with the blocks that give way; or all of a leaf that
 * will be copied, or must give records to a sibling, which is when it returns
 * true. */
static bool kv_leaf_prefetch(const struct kv_edit *e,
                             const struct kv_node *leaf, size_t place,
                             int64_t head)
{
    const struct kv_layout *l = &e->tree->leaf;
    size_t b = kv_leaf_block_for(e->tree, leaf, place);
    bool replaces = place > 0 && kv_heads(leaf)[place - 1] == head;
    bool full = !replaces && leaf->count == l->cap;
    size_t from = replaces ? place - 1 : place;
    size_t to = replaces ? place : 8 * b + leaf->fill[b] + 1u;
    size_t end;

    if (full || leaf->gen != e->version->gen) {
        kv_node_prefetch(leaf, 0, l->bytes);
        return full;
    }
    if (!replaces && leaf->fill[b] == 8) {
        size_t last;

        b = kv_place_block(place);
        last = kv_leaf_nearest(e->tree, leaf, b);
        from = 8 * (size_t)kv_min(b, last);
        to = 8 * (size_t)kv_max(b, last) + 8;
        for (size_t i = from; i < to; i += 8) KV_PREFETCH(kv_heads(leaf) + i);
    }
    end = (size_t)kv_min(l->row_off + to * l->row_bytes, KV_INNER_BYTES);
    for (size_t off = l->row_off + from * l->row_bytes;
         off < end + KV_CACHE_LINE; off += KV_CACHE_LINE)
        KV_PREFETCH(kv_node_at(leaf, (uint32_t)off));
    return false;
}

/* Fetches what kv_edit_make_room will look at beside the child at i: the
 * headers of its siblings; then all of the one that it shares with. */
static void kv_siblings_prefetch(const struct kv_tree *t,
                                 const struct kv_node *parent, size_t i)
{
    struct kv_node *const *children = kv_children(t, parent);

    if (i > 0) KV_PREFETCH(children[i - 1]);
    if (i + 1 < parent->count) KV_PREFETCH(children[i + 1]);
}

static void kv_sharing_prefetch(const struct kv_tree *t,
                                const struct kv_node *parent, size_t i)
{
    size_t sibling = kv_inner_sharing(t, parent, i);

    if (sibling != i)
        kv_node_prefetch(kv_children(t, parent)[sibling], 0, t->leaf.bytes);
}

/* The tree must have records. */
static struct kv_node *kv_tree_last_leaf(const struct kv_tree *t,
                                         const struct kv_version *v)
{
    struct kv_node *node = v->root;

    assert(node);
    while (node->level > 0) node = kv_children(t, node)[node->count - 1];
    return node;
}

/* Puts records that ascend behind the last one of the tree. Only those
 * that find the last leaf full, or not owned, need a search. Returns how
 * many it took from the front of `changes`: up to the first that is a
 * removal, or not above the tree's last record. */
static size_t kv_edit_append(struct kv_edit *e, const struct kv_change *changes,
                             const struct kv_probe *probes, size_t n)
{
    const struct kv_tree *t = e->tree;
    struct kv_version *v = e->version;
    struct kv_node *leaf = kv_tree_last_leaf(t, v);
    size_t last = kv_leaf_last(t, leaf);
    size_t i;

    for (i = 0; i < n && changes[i].value; i++) {
        const void *key = changes[i].key;
        const void *value = changes[i].value;

        if (kv_probe_compare(t, probes[i], kv_key_at(t, leaf, last)) <= 0)
            break;
        /* The search copies or splits the path, or makes room, after which
         * there is a last leaf that takes more. */
        if (leaf->gen != v->gen || last + 1 == (size_t)8 * t->leaf.lines) {
            (void)kv_edit_put(e, probes[i], key, value);
            leaf = kv_tree_last_leaf(t, v);
            last = kv_leaf_last(t, leaf);
            continue;
        }
        kv_digest_add(&v->digest, kv_digest_record(&t->env->shape, key,
                                                   value));
        kv_leaf_set(t, leaf, ++last, probes[i], value);
        v->count++;
    }
    return i;
}

/* Fetches what many changes touch, so that their cache misses overlap: first
 * the paths, then what each will need of its leaf. leaves: for
 * kv_edit_put_near, good until the next removal. A leaf that will be copied
 * is not handed out: once it has been, others may free it. */
static void kv_edit_warm(struct kv_edit *e, const struct kv_probe *probes,
                         size_t n, const struct kv_node **leaves)
{
    const struct kv_tree *t = e->tree;
    const struct kv_node *parents[KV_BATCH] = {NULL};
    size_t places[KV_BATCH];
    size_t full = 0;

    kv_tree_descend_many(t, e->version, probes, n, leaves, places, parents);
    for (size_t i = 0; i < n; i++) {
        bool fills = kv_leaf_prefetch(e, leaves[i], places[i], probes[i].head);

        if (leaves[i]->gen != e->version->gen) leaves[i] = NULL;
        if (!fills || !parents[i]) continue;
        parents[full] = parents[i];
        places[full] = kv_inner_child(t, parents[i], probes[i]);
        kv_siblings_prefetch(t, parents[full], places[full]);
        full++;
    }
    for (size_t i = 0; i < full; i++)
        kv_sharing_prefetch(t, parents[i], places[i]);
}

/* Puts into a leaf where the key belonged a few puts ago; NULL: not known. It
 * still does if no leaf has been reshaped since, or records of this one are on
 * both sides of it. A full leaf is searched for anew: it needs its parent.
 * True: a record was replaced. */
static bool kv_edit_put_near(struct kv_edit *e, struct kv_node *leaf,
                             bool reshaped, struct kv_probe p,
                             const struct kv_change *change)
{
    const struct kv_tree *t = e->tree;

    if (leaf && leaf->count < t->leaf.cap) {
        bool match;
        size_t place = kv_leaf_place(t, leaf, p, &match);

        if (match || !reshaped || kv_leaf_has_within(t, leaf, place)) {
            kv_edit_put_at(e, leaf, place, match, p, change->key,
                           change->value);
            return match;
        }
    }
    return kv_edit_put(e, p, change->key, change->value);
}

/*
 * Applies up to KV_BATCH changes in their order. found[i]: there was such a
 * record. Memory for them has been reserved, so it cannot fail.
 *
 * What ascends behind the end of the tree goes there without a search. For
 * the rest, if it is worth it, the leaves of all are found side by side before
 * the first change. The changes in between may have moved or split what was
 * there, so each looks into its leaf again; removals may even have freed it,
 * so after one nothing of what was found is used any more.
 */
static void kv_edit_apply(struct kv_edit *e, const struct kv_change *changes,
                          size_t n, bool *found)
{
    struct kv_tree *t = e->tree;
    const struct kv_node *leaves[KV_BATCH] = {NULL};
    struct kv_probe probes[KV_BATCH] = {{0}};
    uint64_t reshaped;
    size_t i = 0;

    assert(n <= KV_BATCH);
    for (size_t k = 0; k < n; k++)
        probes[k] = kv_probe_make(t, changes[k].key);
    if (e->version->root) {
        i = kv_edit_append(e, changes, probes, n);
        memset(found, 0, i * sizeof *found);   /* all of them were new */
        if (n - i >= KV_WARM_MIN)
            kv_edit_warm(e, probes + i, n - i, leaves + i);
    }
    reshaped = e->reshaped;
    /* In the caller's order, one by one: later changes of a key win. Those
     * that were not warmed have no leaf, and are searched for from the
     * root. */
    for (; i < n; i++) {
        if (!changes[i].value) {
            found[i] = kv_edit_remove(e, changes[i].key);
            memset(leaves, 0, sizeof leaves);   /* some may be freed now */
            continue;
        }
        found[i] = kv_edit_put_near(e, (struct kv_node *)(uintptr_t)leaves[i],
                                    e->reshaped != reshaped, probes[i],
                                    &changes[i]);
    }
}

/* Frees as much as the edit has replaced, and then some: what is no longer
 * seen must not pile up behind large batches. In rounds, between which others
 * get the lock. What a reader is in the way of stays for a later edit. */
static void kv_edit_reclaim(struct kv_edit *e, size_t buried)
{
    struct kv_tree *t = e->tree;
    size_t rounds = 2 + 2 * buried / KV_RECLAIM_MAX;
    bool more = true;

    for (; more && rounds > 0; rounds--) {
        pthread_mutex_lock(&t->lock);
        more = kv_tree_reclaim_locked(t);
        kv_tree_unreserve_locked(t);
        pthread_mutex_unlock(&t->lock);
    }
}

/*
 * Makes the state built the current one, as of commit `seq`. Cannot fail.
 * From its return on, new readers see the new state; those who pinned before
 * go on with the old one, or with the gate closed there are none.
 *
 * Private: the order of the stores matters. The old version's dead list is
 * complete before anybody may free it, and `gen` follows `current`, never the
 * other way round (V2). In place: opening the gate publishes everything; the
 * lock is taken only if there is something left to do under it.
 */
static void kv_edit_publish(struct kv_edit *e, uint64_t seq)
{
    struct kv_tree *t = e->tree;
    struct kv_version *v = e->version;
    struct kv_version *base = kv_tree_current(t);
    size_t buried = 0;

    assert(seq >= v->seq);
    assert(e->in_place ? v == base : v->gen == base->gen + 1);
    assert(!e->in_place || !e->dead);
    assert(e->in_place == t->gate);
    assert(!v->root == (v->height == 0));
    assert(v->root || v->count == 0);
    v->seq = seq;
    if (e->in_place) {
        /* Only the writer counts, so no locked addition is needed. */
        atomic_store_explicit(&t->in_place, t->in_place + 1,
                              memory_order_relaxed);
        atomic_store_explicit(&t->gate, false, memory_order_release);
        if (KV_LIKELY(!t->unreclaimed && t->leaves.empty_slabs <= 1
                      && t->leaves.reserved == 0))
            return;
        kv_edit_reclaim(e, 0);
        return;
    }
    /* One hold of the lock for all of it: reclaiming walks the links. */
    pthread_mutex_lock(&t->lock);
    t->copied++;
    v->older = base;
    base->newer = v;
    /* Nobody may free `base` yet: it is still the current version. */
    while (e->dead) {
        struct kv_node *node = e->dead;

        e->dead = node->dead_next;
        kv_version_bury_locked(t, base, node);
        buried++;
    }
    atomic_store(&t->current, v);
    atomic_store(&t->gen, v->gen);
    pthread_mutex_unlock(&t->lock);
    kv_edit_reclaim(e, buried);
}

/* Frees the nodes below and at `root` that were made in gen or later: those
 * have only such ancestors (T5), so all of them are met. gen 0: all nodes.
 * Depth-first, without recursion; path.index is the child that is next. */
static void kv_tree_free_nodes_locked(struct kv_tree *t, struct kv_node *root,
                                      uint64_t gen)
{
    struct kv_path path;
    uint32_t level;

    if (!root || root->gen < gen) return;
    level = root->level;
    assert(level < KV_HEIGHT_MAX);
    path.nodes[level] = root;
    path.index[level] = 0;
    for (;;) {
        struct kv_node *node = path.nodes[level];

        if (level > 0 && path.index[level] < node->count) {
            struct kv_node *child = kv_children(t, node)[path.index[level]++];

            /* Shared with an older version, and all below it, too (T5). */
            if (child->gen < gen) continue;
            path.nodes[--level] = child;
            path.index[level] = 0;
            continue;
        }
        /* All below it is gone; on with its parent. */
        level++;
        kv_node_free_locked(t, node);
        if (node == root) return;
    }
}

/* Forgets the state built. In place: nothing may have been changed. Else the
 * nodes of the edit's gen are the edit's own, and go; those on e->dead are in
 * the current version, as they were all the time. */
static void kv_edit_abort(struct kv_edit *e)
{
    struct kv_tree *t = e->tree;

    assert(e->in_place == (e->version == kv_tree_current(t)));
    assert(e->in_place == t->gate);
    if (e->in_place) {
        atomic_store(&t->gate, false);
        return;
    }
    pthread_mutex_lock(&t->lock);
    kv_tree_free_nodes_locked(t, e->version->root, e->version->gen);
    kv_tree_unreserve_locked(t);
    pthread_mutex_unlock(&t->lock);
    kv_version_delete(t, e->version);
}

/* ==========================================================================
 * Delta
 *
 * A buffered put of one record does not go into the tree at once, where it
 * would wait for memory at every level: it goes into the delta of the current
 * version, which readers look at first, and the next one that finds the delta
 * full, or that needs the tree itself, settles it: all puts go into the tree
 * together, and their cache misses overlap. Only the holder of the commit
 * right adds to a delta; whoever wants to hold a version settles it, too.
 *
 * (D2) a delta changes only under the delta lock, and grows by puts for which
 * memory is reserved, so settling cannot fail; (D3) it is empty while another
 * edit is under way, so nobody settles beside that; (D4) it stays empty in a
 * version that is held, so such versions are immutable.
 *
 *     struct kv_version                          behind it, delta_cap places
 *     [ root ... | 32 fingerprints | count ... ][ record 0 | record 1 | .. ]
 *
 * A put writes its record, then its fingerprint, then the count; the store of
 * the count releases the other two. A reader compares fingerprints, and reads
 * the count, and records, only if one fits. Because it may do so while puts
 * arrive, two looks at one delta can differ by the puts in between: one count
 * is one state.
 *
 * How the rules are kept. D2: the first put after a settling reserves memory
 * for a full delta, and a version for the case that a reader is in the way;
 * who gets none makes that one put by an edit. D3: an edit of the holder of
 * the commit right begins with kv_tree_now, which empties the delta, and only
 * he could add to it; other threads find it empty and leave the tree alone.
 * While it is not empty, the commit right is not needed to settle, and the
 * delta lock is enough. D4: kv_tree_hold settles under the delta lock, and
 * the next put makes a version current that nobody holds (kv_delta_renew)
 * before it starts a delta there.
 *
 * The log does not know of deltas: each put is a commit with a number of its
 * own, in the log buffer like any other, whose room is reserved beforehand.
 *
 * An example, with nobody else reading:
 *
 *     put a    settles (nothing), reserves, delta [a]
 *     put b    delta [a b]
 *     get a    fits a's fingerprint: found in the delta
 *     get c    fits none, mostly: looks in the tree only
 *     hold     settles: a and b into the tree, in place; delta []
 *     put c    the version is held: makes the next one current, delta [c]
 *              there, while the holder sees a and b, and never c
 * ========================================================================== */

/* The i-th record, key and value, behind the struct. For the holder of the
 * delta lock i may be the count: where the next one goes. */
static unsigned char *kv_delta_record(const struct kv_tree *t,
                                      const struct kv_version *v, size_t i)
{
    assert(i < t->delta_cap);
    return (unsigned char *)(uintptr_t)(v + 1)
        + i * t->env->shape.record_bytes;
}

/* Pairs with the store in kv_delta_put: the records below it are complete. */
static size_t kv_delta_count(const struct kv_version *v)
{
    return atomic_load_explicit(&v->delta_count, memory_order_acquire);
}

/* As far as the caller could know: it sees all puts that returned before. The
 * first fingerprint tells, which is where the others are that a reader will
 * look at; the count is on a line that the writer writes to as often. */
static bool kv_delta_is_empty(const struct kv_version *v)
{
    return atomic_load_explicit(&v->delta_prints[0], memory_order_relaxed)
        == 0;
}

#define KV_PRINT_MULTIPLIER 0x9e3779b97f4a7c15ull   /* 2^64 / golden ratio */

/* A key's fingerprint, by Fibonacci hashing (Knuth, volume 3, 6.4); 0 is
 * that of a free place, so all others are odd. It depends on the first and
 * the last 8 bytes of the key: those between could only save a look at a
 * record. */
static uint64_t kv_delta_print(const struct kv_tree *t, const void *key)
{
    const struct kv_shape *shape = &t->env->shape;
    const unsigned char *end = (const unsigned char *)key + shape->key_bytes;
    uint64_t hash = kv_key_head(shape, key);

    if (shape->tail_bytes > 0)
        hash ^= kv_load_le64(end - 8) * KV_PRINT_MULTIPLIER;
    return (hash * KV_PRINT_MULTIPLIER) >> 48 | 1;
}

/*
 * Can the delta have a put with this key? It has not, mostly; then this is the
 * only line of the delta that is read. False is certain for all puts that the
 * caller could know of.
 *
 * Four fingerprints to a word, each compared by exclusive or, and the words
 * searched for 16 bits that are zero: Warren, Hacker's Delight, 6-1. Borrows
 * can make the bits above a zero look like zeros, too, but not without one.
 */
static bool kv_delta_may_have(const struct kv_tree *t,
                              const struct kv_version *v, const void *key)
{
    const uint64_t ones = 0x0001000100010001;
    uint64_t prints = kv_delta_print(t, key) * ones;
    uint64_t zeros = 0;

    for (size_t i = 0; i < KV_BATCH / 4; i++) {
        uint64_t x = prints ^ atomic_load_explicit(&v->delta_prints[i],
                                                   memory_order_relaxed);

        zeros |= (x - ones) & ~x;
    }
    return (zeros & ones << 15) != 0;
}

/* Place i must be free. Only one thread writes, so load and store may be two
 * steps. */
static void kv_delta_print_set(struct kv_version *v, size_t i, uint64_t print)
{
    uint64_t prints = atomic_load_explicit(&v->delta_prints[i / 4],
                                           memory_order_relaxed);

    assert(print & 1);
    assert(print <= UINT16_MAX);
    assert((prints >> i % 4 * 16 & UINT16_MAX) == 0);
    atomic_store_explicit(&v->delta_prints[i / 4],
                          prints | print << i % 4 * 16, memory_order_relaxed);
}

/* Only with the gate closed: no reader may meet the half of it. */
static void kv_delta_clear(struct kv_version *v)
{
    for (size_t i = 0; i < KV_BATCH / 4; i++)
        atomic_store_explicit(&v->delta_prints[i], 0, memory_order_relaxed);
    atomic_store_explicit(&v->delta_count, 0, memory_order_relaxed);
}

/* The value of the last of the first n puts with this key, or NULL. Valid as
 * long as the version is pinned: records are not moved, and not written twice
 * before the delta is cleared. */
static const unsigned char *kv_delta_find(const struct kv_tree *t,
                                          const struct kv_version *v, size_t n,
                                          const void *key)
{
    assert(n <= t->delta_cap);
    while (n-- > 0) {
        const unsigned char *record = kv_delta_record(t, v, n);

        if (kv_same(record, key, t->env->shape.key_bytes))
            return record + t->env->shape.key_bytes;
    }
    return NULL;
}

/* Memory for as many puts as a delta takes, and for settling them. After an
 * error nothing is reserved; a spare version that was made is kept. */
static int kv_delta_reserve(struct kv_tree *t)
{
    assert(kv_delta_count(kv_tree_current(t)) == 0);
    if (!kv_tree_spare(t)) return KVMETA_E_NOMEM;
    return kv_tree_reserve(t, kv_tree_current(t), t->delta_cap, true, NULL);
}

/*
 * Brings the puts of the delta into the tree; afterwards the current
 * version's delta is empty. By any thread, under the delta lock. The edit
 * cannot fail, as all that it needs was reserved when the delta was begun
 * (D2), and nothing was published since.
 *
 * In place if no reader looks, and then the delta is cleared before the gate
 * opens: at no moment does a reader find a put in neither. Else a version
 * with an empty delta becomes current, and the old one keeps its delta for
 * those who read it.
 */
static void kv_delta_settle_locked(struct kv_tree *t)
{
    struct kv_version *v = kv_tree_current(t);
    size_t n = kv_delta_count(v);
    struct kv_change changes[KV_BATCH];
    bool found[KV_BATCH];
    struct kv_edit e;
    int rc;

    if (n == 0) return;
    assert(n <= KV_BATCH);
    assert(v->refs == 0);         /* D4 */
    for (size_t i = 0; i < n; i++) {
        changes[i].key = kv_delta_record(t, v, i);
        changes[i].value = kv_delta_record(t, v, i) + t->env->shape.key_bytes;
    }
    /* The changes point into the delta: a private edit leaves it alone,
     * and an edit in place clears it when they have been made. */
    rc = kv_edit_begin(t, &e, true, NULL);
    assert(rc == KVMETA_OK);
    (void)rc;
    kv_edit_apply(&e, changes, n, found);
    if (e.in_place) kv_delta_clear(v);
    kv_edit_publish(&e, v->seq + n);
    assert(kv_delta_count(kv_tree_current(t)) == 0);
}

/* Makes a version current that nobody holds, with the same records. The delta
 * must be empty. KVMETA_E_NOMEM. */
static int kv_delta_renew(struct kv_tree *t)
{
    struct kv_edit e;
    int rc = kv_edit_begin(t, &e, false, NULL);

    assert(kv_delta_count(kv_tree_current(t)) == 0);
    if (!rc) kv_edit_publish(&e, e.version->seq);
    return rc;
}

/* The number of puts in the delta, with room for another one; negative: an
 * error, there is no memory, and the delta is empty. For the holder of the
 * commit right. That a delta has puts means that memory for the rest of it is
 * reserved, and that nobody holds its version. */
static int kv_delta_room_locked(struct kv_tree *t)
{
    size_t n = kv_delta_count(kv_tree_current(t));
    int rc = KVMETA_OK;

    if (n > 0 && n < t->delta_cap) return (int)n;
    /* A new delta. What a holder sees must not change (D4), so it does not
     * begin in a version that has one. */
    kv_delta_settle_locked(t);
    if (atomic_load(&kv_tree_current(t)->refs) > 0) rc = kv_delta_renew(t);
    return rc ? rc : kv_delta_reserve(t);
}

/* Adds a put to the delta, as the next commit; *seq gets its number. False:
 * it must go into the tree, since there is no memory for a whole delta, or
 * records are too wide for one. For the holder of the commit right, who must
 * have reserved what its log entry needs: the put can be seen at once. */
static bool kv_delta_put(struct kv_tree *t, const void *key, const void *value,
                         uint64_t *seq)
{
    const struct kv_shape *shape = &t->env->shape;
    struct kv_version *v;
    unsigned char *record;
    int n;

    if (t->delta_cap == 0) return false;
    pthread_mutex_lock(&t->delta_lock);
    n = kv_delta_room_locked(t);
    assert(n < (int)t->delta_cap);
    /* The count last: whoever reads it finds the rest complete. */
    if (n >= 0) {
        v = kv_tree_current(t);
        assert(v->refs == 0);     /* D4 */
        record = kv_delta_record(t, v, (size_t)n);
        kv_copy(record, key, shape->key_bytes);
        kv_copy(record + shape->key_bytes, value, shape->value_bytes);
        kv_delta_print_set(v, (size_t)n, kv_delta_print(t, key));
        *seq = v->seq + (unsigned)n + 1;
        atomic_store_explicit(&v->delta_count, (unsigned)n + 1,
                              memory_order_release);
    }
    pthread_mutex_unlock(&t->delta_lock);
    return n >= 0;
}

/* The state now, all of it in the tree. For the holder of the commit
 * right, for whom it stays so until his own next edit or put; or before
 * there are any threads. */
static struct kv_version *kv_tree_now(struct kv_tree *t)
{
    pthread_mutex_lock(&t->delta_lock);
    kv_delta_settle_locked(t);
    pthread_mutex_unlock(&t->delta_lock);
    return kv_tree_current(t);
}

/* Pins the current version, with an empty delta, which stays empty while
 * the caller has the delta lock. A slot that was kept over the settling
 * would stop that from working in place. */
static struct kv_version *kv_tree_pin_settled_locked(struct kv_tree *t,
                                                     unsigned *slot)
{
    struct kv_version *v = kv_tree_pin(t, slot);

    if (kv_delta_count(v) == 0) return v;
    kv_tree_unpin(t, *slot);      /* nobody else publishes now (D3) */
    kv_delta_settle_locked(t);
    return kv_tree_pin(t, slot);
}

/* The current version, for as long as the caller likes: until
 * kv_tree_drop. It does not change in any way meanwhile (D4), and may be
 * read by many threads. Writers then copy what they change, for this
 * version only once. Any thread; waits for no I/O. Cannot fail. */
static struct kv_version *kv_tree_hold(struct kv_tree *t)
{
    struct kv_version *v;
    unsigned slot;

    pthread_mutex_lock(&t->delta_lock);
    v = kv_tree_pin_settled_locked(t, &slot);
    assert(kv_delta_count(v) == 0);
    atomic_fetch_add(&v->refs, 1);
    kv_tree_unpin(t, slot);
    pthread_mutex_unlock(&t->delta_lock);
    return v;
}

struct kv_totals {
    uint64_t count;
    struct kvmeta_digest digest;
    uint64_t seq;
};

/* What the state now amounts to. The three belong together. */
static struct kv_totals kv_tree_totals(struct kv_tree *t)
{
    const struct kv_version *v;
    struct kv_totals totals;
    unsigned slot;

    pthread_mutex_lock(&t->delta_lock);
    v = kv_tree_pin_settled_locked(t, &slot);
    totals.count = v->count;
    totals.digest = v->digest;
    totals.seq = v->seq;
    kv_tree_unpin(t, slot);
    pthread_mutex_unlock(&t->delta_lock);
    return totals;
}

/* The value of a key in the delta, or NULL. Kept out of kv_tree_get, most of
 * whose callers meet no delta. */
KV_NOINLINE
static const unsigned char *kv_delta_get(const struct kv_tree *t,
                                         const struct kv_version *v,
                                         const void *key)
{
    return kv_delta_may_have(t, v, key)
        ? kv_delta_find(t, v, kv_delta_count(v), key) : NULL;
}

/* The value of a key in a version that is held, which has no delta (D4), or
 * pinned, or NULL. A put in the delta is newer than what the tree has for its
 * key. */
static inline const unsigned char *kv_tree_get(const struct kv_tree *t,
                                               const struct kv_version *v,
                                               const void *key, bool held)
{
    const unsigned char *value = NULL;

    assert(v);
    assert(!held || kv_delta_count(v) == 0);
    if (!held && !kv_delta_is_empty(v)) value = kv_delta_get(t, v, key);
    return value ? value : kv_tree_find(t, v, key,
                                        !held && !kv_bias_is_on(t));
}

/* The same for up to KV_BATCH keys; what is in the delta replaces what the
 * tree had. The delta may grow meanwhile: its count is taken once, so that all
 * keys are looked up in the same state. */
static void kv_tree_get_many(const struct kv_tree *t,
                             const struct kv_version *v,
                             const unsigned char *keys, size_t n,
                             unsigned char *values, unsigned char *found)
{
    const struct kv_shape *shape = &t->env->shape;
    size_t puts = kv_delta_count(v);

    assert(n <= KV_BATCH);
    kv_tree_find_many(t, v, keys, n, values, found);
    for (size_t i = 0; i < n && puts > 0; i++) {
        const unsigned char *key = keys + i * shape->key_bytes;
        const unsigned char *value = NULL;

        KV_SCHED_POINT("delta");
        if (KV_UNLIKELY(kv_delta_may_have(t, v, key)))
            value = kv_delta_find(t, v, puts, key);
        if (!value) continue;
        found[i] = 1;
        if (shape->value_bytes)
            kv_copy(values + i * shape->value_bytes, value,
                    shape->value_bytes);
    }
}

/* ==========================================================================
 * Cursors
 *
 * A path through a held version. Moving within a leaf touches the cursor
 * only, and is done by the inline functions of kvmeta.h. Carries (K1): either
 * at.place points to one of the leaf's places, from c->places to at.last, or
 * the cursor is on no record, and at.key is NULL and at.place == at.last.
 *
 * The version is held by whoever made the cursor, so it has an empty delta
 * and does not change (D4): a cursor takes no lock, cannot fail, and owns
 * nothing that would have to be freed. One thread at a time may use it; many
 * cursors may be in one version. Movers return whether there is a record. One
 * that finds none leaves the cursor on none, where next and prev stay until
 * it is placed anew.
 *
 * A pinned version would do for reading, but not while the caller thinks: a
 * slot that is taken keeps writers from working in place, and memory from
 * being freed.
 *
 *     level 2            [ . . X . ]       path.index[2] = 2
 *                             \
 *     level 1            [ . . . Y ]       path.index[1] = 3: the last
 *                               \
 *     level 0          [ r r r r r R ]     at.place == at.last
 *
 * From R, next climbs to level 2, the lowest that has a child to the right of
 * the path, steps to index 3 there, and falls to the first record below it.
 * ========================================================================== */

/* `at` is what a step within path.nodes[0] needs, and what callers of the
 * library have. path.index[0] is not kept up to date, at.place is. The path
 * above is valid while there is a record. */
struct kv_cursor {
    struct kvmeta_cursor at;      /* first: see kv_cursor_of */
    const struct kv_tree *tree;
    const struct kv_version *version;
    uint8_t places[8 * KV_LINES_MAX + 8];   /* of the records in the leaf */
    struct kv_path path;          /* down to the leaf */
    /* A key with the whole of its head, even if it is shorter than that. */
    unsigned char key[KVMETA_KEY_BYTES_MAX + 8];
};

/* On no record (K1). As place == last, next has no step within a leaf. */
static void kv_cursor_leave(struct kv_cursor *c)
{
    c->at.key = NULL;
    c->at.value = NULL;
    c->at.place = c->at.last = c->places;
}

/* On no record of a version that outlives the cursor. Nothing to undo; it
 * cannot be moved in memory. */
static void kv_cursor_init(const struct kv_tree *t,
                           const struct kv_version *v, struct kv_cursor *c)
{
    assert(kv_delta_count(v) == 0);    /* D4: it is held */
    c->tree = t;
    c->version = v;
    c->at.row_bytes = t->leaf.row_bytes;
    c->at.tail_bytes = t->env->shape.tail_bytes;
    kv_cursor_leave(c);
}

/* To the i-th record of a leaf, whose path has been set. What a step needs is
 * copied to the cursor, so that the leaf is touched for the key and the value
 * only. All places of a block are written, those that are free, too: the next
 * block's come over them. */
static void kv_cursor_enter(struct kv_cursor *c, const struct kv_node *leaf,
                            size_t i)
{
    static const uint8_t places[8 * KV_LINES_MAX] = {
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
        20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37,
        38, 39};
    size_t n = 0;

    for (size_t b = 0; b < KV_LINES_MAX; b++) {
        memcpy(c->places + n, places + 8 * b, 8);
        n += leaf->fill[b];
    }
    assert(n == leaf->count);
    assert(i < n);
    c->at.key = c->key;
    c->at.last = c->places + n - 1;
    c->at.heads = kv_heads(leaf);
    c->at.rows = kv_leaf_row(c->tree, leaf, 0);
    kvmeta_cursor_show(&c->at, c->places + i);
}

/* Goes from the node at `level`, which is on the path, down to its first, or
 * last, record. There is one: no node is empty (T3). */
static void kv_cursor_fall(struct kv_cursor *c, uint32_t level, bool last)
{
    const struct kv_tree *t = c->tree;

    assert(level < c->version->height);
    for (;; level--) {
        struct kv_node *node = c->path.nodes[level];

        assert(node->level == level);
        assert(node->count > 0);
        c->path.index[level] = last ? node->count - 1 : 0;
        if (level == 0) {
            kv_cursor_enter(c, node, c->path.index[level]);
            return;
        }
        c->path.nodes[level - 1] =
            kv_children(t, node)[c->path.index[level]];
    }
}

/* To the first or last record of the tree; false if there is none. */
static bool kv_cursor_edge(struct kv_cursor *c, bool last)
{
    kv_cursor_leave(c);
    if (!c->version->root) return false;
    c->path.nodes[c->version->height - 1] = c->version->root;
    kv_cursor_fall(c, c->version->height - 1, last);
    return true;
}

static bool kv_cursor_first(struct kv_cursor *c)
{
    return kv_cursor_edge(c, false);
}

static bool kv_cursor_last(struct kv_cursor *c)
{
    return kv_cursor_edge(c, true);
}

/* How many leaves ahead of a scan memory is asked for. More than one leaf is
 * more than the first cache can have on its way at once. */
enum { KV_SCAN_AHEAD = 4 };

/* The leaf so many places on from the one that the path leads to, or NULL.
 * Looks into the next parent, too, for the few leaves in a hundred that nobody
 * asked for would take a tenth of the time; but no further. */
static const struct kv_node *kv_cursor_ahead(const struct kv_cursor *c,
                                             bool forward)
{
    const struct kv_tree *t = c->tree;
    const struct kv_node *node = c->path.nodes[1];
    ptrdiff_t n = (ptrdiff_t)node->count;
    ptrdiff_t side = forward ? 1 : -1;
    ptrdiff_t i = (ptrdiff_t)c->path.index[1] + side * KV_SCAN_AHEAD;
    ptrdiff_t up;

    if (i >= 0 && i < n) return kv_children(t, node)[i];
    if (c->version->height < 3) return NULL;
    up = (ptrdiff_t)c->path.index[2] + side;
    if (up < 0 || up >= (ptrdiff_t)c->path.nodes[2]->count) return NULL;
    node = kv_children(t, c->path.nodes[2])[up];
    i += forward ? -n : (ptrdiff_t)node->count;
    n = (ptrdiff_t)node->count;
    return i >= 0 && i < n ? kv_children(t, node)[i] : NULL;
}

static void kv_cursor_prefetch(const struct kv_cursor *c, bool forward)
{
    const struct kv_node *leaf = kv_cursor_ahead(c, forward);

    for (uint32_t off = 0; leaf && off < c->tree->leaf.bytes;
         off += KV_CACHE_LINE)
        KV_PREFETCH_L2(kv_node_at(leaf, off));
}

/* To the neighbouring leaf; false at the end of the tree. Climbs to the
 * lowest node that has a child on that side: amortised over a scan, a
 * little more than one level for each leaf. The leaves' siblings are not
 * linked: a copy of one leaf would have to change its neighbours, and they
 * theirs. */
static bool kv_cursor_cross(struct kv_cursor *c, bool forward)
{
    const struct kv_tree *t = c->tree;

    for (uint32_t level = 1; level < c->version->height; level++) {
        struct kv_node *node = c->path.nodes[level];
        size_t i = c->path.index[level];

        if (forward ? i + 1 >= node->count : i == 0) continue;
        i = forward ? i + 1 : i - 1;
        c->path.index[level] = i;
        c->path.nodes[level - 1] = kv_children(t, node)[i];
        kv_cursor_fall(c, level - 1, !forward);
        kv_cursor_prefetch(c, forward);
        return true;
    }
    kv_cursor_leave(c);
    return false;
}

static bool kv_cursor_next(struct kv_cursor *c)
{
    if (!c->at.key) return false;
    assert(c->at.place >= c->places);
    assert(c->at.place <= c->at.last);
    if (c->at.place == c->at.last) return kv_cursor_cross(c, true);
    kvmeta_cursor_show(&c->at, c->at.place + 1);
    return true;
}

static bool kv_cursor_prev(struct kv_cursor *c)
{
    if (!c->at.key) return false;
    assert(c->at.place >= c->places);
    assert(c->at.place <= c->at.last);
    if (c->at.place == c->places) return kv_cursor_cross(c, false);
    kvmeta_cursor_show(&c->at, c->at.place - 1);
    return true;
}

/* The path on which the key would be found. index[0] is not set. */
static void kv_path_find(const struct kv_tree *t, struct kv_node *root,
                         struct kv_probe p, struct kv_path *path)
{
    struct kv_node *node = root;

    assert(root->level < KV_HEIGHT_MAX);
    for (;;) {
        uint32_t level = node->level;

        path->nodes[level] = node;
        if (level == 0) return;
        path->index[level] = kv_inner_child(t, node, p);
        node = kv_children(t, node)[path->index[level]];
    }
}

/* The first record with a key >= `key`; with `le` the last one <= `key`. If
 * the leaf for the key has none such, it is at the near end of the next leaf
 * on that side. */
static bool kv_cursor_seek(struct kv_cursor *c, const void *key, bool le)
{
    const struct kv_tree *t = c->tree;
    struct kv_probe p = kv_probe_make(t, key);
    struct kv_node *leaf;
    bool match;
    size_t rank;

    kv_cursor_leave(c);
    if (!c->version->root) return false;
    /* The rank counts the records that are not above the key: wanted is the
     * last of these, or if it is not equal, and must be, the next. */
    kv_path_find(t, c->version->root, p, &c->path);
    leaf = c->path.nodes[0];
    rank = kv_leaf_rank(leaf, kv_leaf_place(t, leaf, p, &match));
    le = le || match;
    if (le ? rank == 0 : rank == leaf->count) return kv_cursor_cross(c, !le);
    kv_cursor_enter(c, leaf, rank - le);
    return true;
}

/* ==========================================================================
 * Bulk load
 *
 * Builds the tree of an open from sorted records: each loader fills leaves on
 * its own thread, for its own range of keys; kv_tree_adopt joins them and
 * builds the levels above.
 *
 * All of it happens before the handle is handed out, so there are no readers
 * and no edits; loaders share nothing but the pools, for which they take the
 * tree's lock once a leaf. Leaves belong to their loader until they are
 * adopted. After any error the open frees loaders and tree; nothing here has
 * to leave a tree that could be used. Records come from files that have been
 * checked: keys of one loader ascend strictly, and those of the next one are
 * all above (S1, and the bounds of the ranges). That what was loaded is what
 * was stored is for the digest to say (P2).
 *
 *     loader 0       loader 1           loader 2
 *     L L L L l      L L L L L L l      L L l       leaves, l: not filled
 *     \_____________________________________/
 *       kv_tree_adopt: one array, in order of keys
 *     I     I     I     i                           kv_load_level
 *     i                                             kv_load_level: the root
 *
 * Loading leaf after leaf, without searches, is what makes an open fast; and
 * the nodes are fuller than inserts would leave them, hence smaller memory
 * right after an open.
 * ========================================================================== */

/* One range of keys, filled by one thread. `records` and `digest` are of all
 * that has been added, and go to the version with the leaves. */
struct kv_loader {
    struct kv_tree *tree;
    struct kv_node **leaves;      /* ascending; all but the last are filled */
    size_t count;                 /* leaves; 0 once they are adopted */
    size_t cap;                   /* of the array */
    uint64_t records;
    struct kvmeta_digest digest;
};

static void kv_loader_init(struct kv_tree *t, struct kv_loader *loader)
{
    memset(loader, 0, sizeof *loader);
    loader->tree = t;
}

/* Nodes are filled to about 97 %, so that the first changes find room: a full
 * leaf between full leaves would be split by its first insert. A leaf of five
 * blocks gets 39 records, of 40. */
static size_t kv_load_fill(const struct kv_layout *l)
{
    return l->cap - l->cap / 32;
}

/* A node with one more reserved for it, of the first gen. Reserved and taken
 * under one hold of the lock: another loader may come in between otherwise.
 * memory_bytes_max counts, so an open can fail by it with KVMETA_E_LIMIT. */
static int kv_load_node(struct kv_tree *t, uint32_t level,
                        struct kv_node **out, struct kvmeta_error *err)
{
    struct kv_pool *pool = level == 0 ? &t->leaves : &t->inners;
    struct kv_node *node;
    int rc;

    pthread_mutex_lock(&t->lock);
    rc = kv_pool_reserve_locked(t, pool, 1, true, err);
    node = rc ? NULL : kv_pool_take(pool);
    pthread_mutex_unlock(&t->lock);
    if (rc) return rc;
    kv_node_init(t, node, level, kv_tree_current(t)->gen);
    *out = node;
    return KVMETA_OK;
}

/* Keys must ascend. head: of the key; the value stands behind the key. Copies
 * both. After an error the loader is as before, and may only be freed. */
static int kv_loader_add(struct kv_loader *loader, uint64_t head,
                         const unsigned char *key, struct kvmeta_error *err)
{
    const unsigned char *value = key + loader->tree->env->shape.key_bytes;
    struct kv_tree *t = loader->tree;
    struct kv_node *leaf = loader->count ? loader->leaves[loader->count - 1]
                                         : NULL;
    struct kv_probe p;

    /* The array first: a leaf that has no place in it would be lost.
     * Leaves are filled one after the other; the last may stay almost
     * empty. */
    if (!leaf || leaf->count >= kv_load_fill(&t->leaf)) {
        int rc = kv_grow(t->env, (void **)&loader->leaves, &loader->cap,
                         loader->count + 1, sizeof(struct kv_node *), err);

        if (!rc) rc = kv_load_node(t, 0, &leaf, err);
        if (rc) return rc;
        loader->leaves[loader->count++] = leaf;
    }
    assert(leaf->count < t->leaf.cap);
    assert(leaf->gen == kv_tree_current(t)->gen);
    p.head = kv_head_flip(head);
    p.tail = key + 8;
    kv_leaf_set(t, leaf, leaf->count, p, value);
    assert(head == kv_key_head(&t->env->shape, key));
    /* Of the bytes that came, not of the node: kv_tree_check compares. */
    kv_digest_add(&loader->digest,
                  kv_digest_record(&t->env->shape, key, value));
    loader->records++;
    return KVMETA_OK;
}

/* Frees the leaves that were not adopted. Accepts a zeroed loader, and one
 * that has handed its leaves over: then only the array is left. */
static void kv_loader_free(struct kv_loader *loader)
{
    struct kv_tree *t = loader->tree;

    if (!t) return;
    pthread_mutex_lock(&t->lock);
    for (size_t i = 0; i < loader->count; i++)
        kv_node_free_locked(t, loader->leaves[i]);
    pthread_mutex_unlock(&t->lock);
    kv_free(t->env, loader->leaves);
    memset(loader, 0, sizeof *loader);
}

/* The first key below a node: it makes the separator before the node. */
static struct kv_probe kv_node_first_key(const struct kv_tree *t,
                                         const struct kv_node *node)
{
    while (node->level > 0) node = kv_children(t, node)[0];
    return kv_key_at(t, node, 0);
}

/* Puts parents above the n nodes of one level, into the array itself, behind
 * what has been read of it; *n becomes their number. On failure all
 * nodes given are freed, with what is below them: those that have a parent
 * already by that one, the others as they are. */
static int kv_load_level(struct kv_tree *t, struct kv_node **nodes, size_t *n,
                         struct kvmeta_error *err)
{
    size_t fill = kv_load_fill(&t->inner);
    size_t made = 0;
    size_t i = 0;
    int rc = KVMETA_OK;

    assert(*n > 1);
    assert(fill > 1);
    /* The last parent may get few children, or one, which breaks no rule. */
    while (i < *n) {
        size_t children = (size_t)kv_min(fill, *n - i);
        struct kv_node *parent = NULL;

        rc = kv_load_node(t, nodes[i]->level + 1, &parent, err);
        if (rc) break;
        for (size_t k = 0; k < children; k++) {
            struct kv_node *child = nodes[i + k];

            if (k > 0) kv_key_set(t, parent, k - 1,
                                  kv_node_first_key(t, child));
            kv_children(t, parent)[k] = child;
        }
        parent->count = (uint16_t)children;
        kv_index_make(t, parent);
        i += children;
        assert(made < i);
        nodes[made++] = parent;
    }
    /* The array holds parents up to `made`, then children that have one, then
     * from i on those that have none. */
    if (rc) {
        pthread_mutex_lock(&t->lock);
        for (size_t k = 0; k < made; k++)
            kv_tree_free_nodes_locked(t, nodes[k], 0);
        for (; i < *n; i++) kv_tree_free_nodes_locked(t, nodes[i], 0);
        pthread_mutex_unlock(&t->lock);
        made = 0;
    }
    *n = made;
    return rc;
}

/* Takes over what the loaders hold, as the state of commit `seq`. The tree
 * must be empty and unread. After an error it has no records, and may only be
 * freed; the leaves are freed, or still the loaders'. */
static int kv_tree_adopt(struct kv_tree *t, struct kv_loader *loaders,
                         size_t loaders_count, uint64_t seq,
                         struct kvmeta_error *err)
{
    struct kv_version *v = kv_tree_current(t);
    struct kv_node **nodes;
    size_t n = 0;
    int rc = KVMETA_OK;

    assert(!v->root);
    assert(!v->newer);
    assert(v->count == 0);
    for (size_t i = 0; i < loaders_count; i++) n += loaders[i].count;
    /* One more than needed: there may be no leaf at all. */
    nodes = kv_alloc(t->env, (n + 1) * sizeof(struct kv_node *));
    if (!nodes) return kv_fail_memory(err, (n + 1) * sizeof(struct kv_node *));
    n = 0;
    for (size_t i = 0; i < loaders_count; i++) {
        if (loaders[i].count)
            memcpy(nodes + n, loaders[i].leaves,
                   loaders[i].count * sizeof *nodes);
        n += loaders[i].count;
        loaders[i].count = 0;
    }
    /* The nodes are nobody else's now; an error frees them: kv_load_level. It
     * leaves n at 0, which ends the loop, and the version without a root. */
    v->height = n > 0;
    while (n > 1) {
        rc = kv_load_level(t, nodes, &n, err);   /* no nodes after an error */
        v->height++;
    }
    assert(n <= 1);
    /* Not readable before this: nobody pins a version during an open. */
    if (!rc) {
        assert(!n || nodes[0]->level + 1u == v->height);
        v->root = n ? nodes[0] : NULL;
        v->seq = seq;
        for (size_t i = 0; i < loaders_count; i++) {
            v->count += loaders[i].records;
            kv_digest_add(&v->digest, loaders[i].digest);
        }
    }
    kv_free(t->env, nodes);
    return rc;
}

/* ==========================================================================
 * Tree: start, end, check
 *
 * Making and freeing are for one thread that nobody else is beside. A tree
 * starts with one version, of gen 1, without records: 0 is the gen of a free
 * slot. The check reads a version that its caller holds, while others go on;
 * it tests T1 to T6 on whatever it finds and returns the name of the rule, so
 * that tests can break each of them and see that it is noticed. The rules of
 * versions and deltas are about what may happen when, and cannot be seen by
 * looking; the scheduler's and the threads' tests are for those.
 *
 *   T1, T4     of each node on its own (kv_node_check); T1 across leaves by
 *              the scan, between separators and leaves by kv_path_check
 *   T2, T5     of each inner node and its children; T2 also of the root
 *   T3         of each node, before anything else of it is looked at
 *   T6         by the scan: it adds up all records anew
 * ========================================================================== */

/* Accepts a zeroed tree, and one whose init failed. No version may be held
 * and no slot taken. From old to new, so that nodes end with the last
 * version that sees them; what the current one reaches is all that is left
 * then. All nodes are given back one by one: with assertions this shows
 * that none was lost. */
static void kv_tree_free(struct kv_tree *t)
{
    struct kv_version *v = kv_tree_current(t);

    if (!t->locks_made) return;
    /* Nobody else is here; the lock is what the functions below ask for. */
    pthread_mutex_lock(&t->lock);
    /* Versions that were left over, since no edit has come to free them. */
    while (t->oldest && t->oldest->newer) {
        size_t budget = SIZE_MAX;

        assert(atomic_load(&t->oldest->refs) == 0);
        (void)kv_version_free_locked(t, t->oldest, &budget);
    }
    /* Dead lists hold what newer versions replaced: its own is empty. */
    if (v) {
        assert(!v->dead);
        kv_tree_free_nodes_locked(t, v->root, 0);
        kv_version_delete(t, v);
    }
    kv_version_delete(t, t->spare);
    kv_pool_free(&t->leaves);
    kv_pool_free(&t->inners);
    pthread_mutex_unlock(&t->lock);
    kv_free(t->env, t->slots_memory);
    pthread_mutex_destroy(&t->lock);
    pthread_mutex_destroy(&t->delta_lock);
    pthread_mutex_destroy(&t->bias_lock);
    memset(t, 0, sizeof *t);
}

/* Makes an empty tree; env must have its shape, and outlive the tree.
 * memory_bytes_max: 0 for none. KVMETA_E_NOMEM; then there is nothing to
 * free, though kv_tree_free does no harm. Takes no slab yet. */
static int kv_tree_init(struct kv_tree *t, struct kv_env *env,
                        uint64_t memory_bytes_max, struct kvmeta_error *err)
{
    const struct kv_shape *shape = &env->shape;
    size_t slots_bytes = sizeof(struct kv_slot) * KV_SLOTS + KV_CACHE_LINE;
    struct kv_version *v;

    assert((uintptr_t)t % KV_CACHE_LINE == 0);
    assert(shape->record_bytes > 0);
    memset(t, 0, sizeof *t);
    t->env = env;
    t->memory_bytes_max = memory_bytes_max;
    /* Asked once: the result steers every search. */
#if KV_X86
    t->avx2 = __builtin_cpu_supports("avx2");
#endif
    t->barriers = sizeof(pthread_t) <= sizeof(uint64_t) && kv_barrier_init();
    /* Both layouts follow from the widths: nothing else of them is stored. */
    kv_layout_init(&t->leaf, shape->tail_bytes + shape->value_bytes, 0,
                   KV_LEAF_BYTES, 1);
    kv_layout_init(&t->inner, shape->tail_bytes, sizeof(struct kv_node *),
                   KV_INNER_BYTES, 2);
    assert(t->inner.child_off % sizeof(struct kv_node *) == 0);
    t->leaves.env = t->inners.env = env;
    t->leaves.node_bytes = t->leaf.bytes;
    t->inners.node_bytes = t->inner.bytes;
    if (pthread_mutex_init(&t->lock, NULL))
        return kv_fail_memory(err, sizeof t->lock);
    if (pthread_mutex_init(&t->delta_lock, NULL)) {
        pthread_mutex_destroy(&t->lock);
        return kv_fail_memory(err, sizeof t->delta_lock);
    }
    if (pthread_mutex_init(&t->bias_lock, NULL)) {
        pthread_mutex_destroy(&t->lock);
        pthread_mutex_destroy(&t->delta_lock);
        return kv_fail_memory(err, sizeof t->bias_lock);
    }
    t->locks_made = true;

    /* Settling applies one batch. Wide records make a shorter delta, or none:
     * every version has the memory of one. */
    t->delta_cap = (uint32_t)kv_min(KV_BATCH, KV_DELTA_BYTES_MAX
                                    / shape->record_bytes);
    t->slots_memory = kv_alloc_zeroed(env, slots_bytes);
    v = kv_version_new(t);
    /* The version is not the tree's yet, so it is freed by hand. */
    if (!t->slots_memory || !v) {
        kv_version_delete(t, v);
        kv_tree_free(t);
        return kv_fail_memory(err, slots_bytes);
    }
    t->slots = kv_line_up(t->slots_memory);
    assert((unsigned char *)(t->slots + KV_SLOTS)
           <= (unsigned char *)t->slots_memory + slots_bytes);
    v->gen = 1;                   /* 0 in a slot means that it is free */
    t->oldest = v;
    atomic_store(&t->current, v);
    atomic_store(&t->gen, v->gen);
    return KVMETA_OK;
}

/* T3, T4 and T7 of a leaf, whose count is right. */
static const char *kv_leaf_check(const struct kv_tree *t,
                                 const struct kv_node *leaf)
{
    size_t n = 0;

    for (size_t b = 0; b < t->leaf.lines; b++) {
        if (leaf->fill[b] > 8
            || (leaf->fill[b] == 0 && b + 1 < t->leaf.lines
                && leaf->fill[b + 1] > 0))
            return "T3: fill of blocks";
        n += leaf->fill[b];
        for (size_t i = 8 * b + leaf->fill[b]; i < 8 * b + 8; i++)
            if (kv_heads(leaf)[i] != KV_HEAD_PAD) return "T4: head pad";
    }
    return n == leaf->count ? NULL : "T3: fill of blocks";
}

/* The rules that hold for one node on its own, and for it and its children;
 * NULL: all do. The count comes first: the others rely on it. */
static const char *kv_node_check(const struct kv_tree *t,
                                 const struct kv_node *node)
{
    const struct kv_layout *l = kv_layout_of(t, node);
    const char *rule = NULL;
    size_t places = 8 * (size_t)l->lines;
    size_t last = 0;

    if (node->count < 1 || node->count > l->cap) return "T3: node count";
    if (node->level == 0) rule = kv_leaf_check(t, node);
    if (rule) return rule;
    /* An inner node with one child has no key at all; that is allowed. */
    for (size_t i = kv_node_keys(node); node->level > 0 && i < places; i++)
        if (kv_heads(node)[i] != KV_HEAD_PAD) return "T4: head pad";
    for (size_t line = 1; line < l->lines; line++)
        if (kv_index(node)[line - 1] != kv_heads(node)[8 * line])
            return "T7: index";
    /* Equal heads are allowed, equal keys are not; without a tail memcmp says
     * that such keys are equal. */
    for (size_t i = 1; i < places; i++) {
        if (node->level == 0 ? i % 8 >= node->fill[i / 8]
                             : i >= kv_node_keys(node))
            continue;
        if (kv_probe_compare(t, kv_key_at(t, node, last),
                             kv_key_at(t, node, i)) >= 0)
            return "T1: order within a node";
        last = i;
    }
    for (size_t i = 0; node->level > 0 && i < node->count; i++) {
        const struct kv_node *child = kv_children(t, node)[i];

        if (child->level + 1 != node->level) return "T2: level";
        if (child->gen > node->gen) return "T5: child younger than parent";
    }
    return NULL;
}

/* All nodes on the path of the cursor that it enters for the first time: when
 * it comes to a new leaf, that leaf, and each node above it as long as the
 * path goes through first children. last: the record before, if there is one;
 * the separator between it and the leaf is the one that ends the climb. */
static const char *kv_path_check(const struct kv_cursor *c,
                                 const unsigned char *last)
{
    const struct kv_tree *t = c->tree;

    /* From the leaf up, so that a node's first key can be relied on. */
    for (uint32_t level = 0;; level++) {
        const struct kv_node *node = c->path.nodes[level];
        const char *rule = kv_node_check(t, node);
        struct kv_probe s;

        assert(level < c->version->height);
        if (rule) return rule;
        if (level + 1 == c->version->height) return NULL;
        if (c->path.index[level + 1] == 0) continue;
        s = kv_key_at(t, c->path.nodes[level + 1],
                      c->path.index[level + 1] - 1);
        if (kv_probe_compare(t, kv_probe_make(t, last), s) >= 0
            || kv_probe_compare(t, s, kv_node_first_key(t, node)) > 0)
            return "T1: separator";
        return NULL;
    }
}

/* Reads all of a held version. Returns the broken rule, or NULL. Takes as
 * long as a scan; nobody waits for it. */
static const char *kv_tree_check(struct kv_tree *t, const struct kv_version *v)
{
    unsigned char last[KVMETA_KEY_BYTES_MAX] = {0};
    struct kvmeta_digest digest = {0, 0};
    struct kv_cursor c;
    uint64_t count = 0;
    size_t key_bytes = t->env->shape.key_bytes;

    /* What the cursor relies on to find its way at all. */
    if (!v->root != (v->height == 0)) return "T2: height";
    if (v->root && v->root->level + 1u != v->height) return "T2: height";
    kv_cursor_init(t, v, &c);
    /* The cursor has gone through the nodes that are checked next: this finds
     * broken rules in nodes that are nodes, not wild pointers. */
    for (bool there = kv_cursor_first(&c); there; there = kv_cursor_next(&c)) {
        if (count > 0 && memcmp(last, c.at.key, key_bytes) >= 0)
            return "T1: order across leaves";
        if (c.at.place == c.places) {
            const char *rule = kv_path_check(&c, last);

            if (rule) return rule;
        }
        kv_digest_add(&digest, kv_digest_record(&t->env->shape, c.at.key,
                                                c.at.value));
        memcpy(last, c.at.key, key_bytes);
        count++;
    }
    if (count != v->count) return "T6: count";
    return kv_digest_equal(digest, v->digest) ? NULL : "T6: digest";
}

/* For the statistics, in their units: see struct kvmeta_stats. */
struct kv_tree_usage {
    uint64_t resident_bytes;      /* slabs, and the one that is prepared */
    uint64_t pinned_bytes;        /* nodes on dead lists */
    uint64_t snapshots;           /* holders, of whatever kind */
    uint64_t oldest_snapshot_seq;
    uint64_t copied;
    uint64_t in_place;
};

/* Any thread; waits for the tree's lock only. Scans and heals hold versions
 * for as long as they last, and are counted with the snapshots. */
static void kv_tree_usage(struct kv_tree *t, struct kv_tree_usage *u)
{
    memset(u, 0, sizeof *u);
    pthread_mutex_lock(&t->lock);
    /* Inner nodes are few: a slab is prepared for leaves only. */
    u->resident_bytes = t->leaves.bytes + t->inners.bytes
        + (t->leaves.ahead ? KV_SLAB_BYTES : 0);
    u->pinned_bytes = t->dead_bytes;
    u->copied = t->copied;
    u->in_place = t->in_place;
    for (struct kv_version *v = t->oldest; v; v = v->newer) {
        uint64_t refs = atomic_load(&v->refs);

        /* From old to new: the first that is held is the oldest. */
        if (refs && !u->snapshots) u->oldest_snapshot_seq = v->seq;
        u->snapshots += refs;
    }
    pthread_mutex_unlock(&t->lock);
}

/* In a forked child: was nobody about to change the tree at the fork, and
 * does nobody hold a version? Then it is whole, and its locks are free.
 * Readers in slots are no matter: they are not here. */
static bool kv_tree_quiet(struct kv_tree *t)
{
    struct kv_tree_usage usage;

    if (pthread_mutex_trylock(&t->delta_lock) != 0) return false;
    if (pthread_mutex_trylock(&t->lock) != 0) return false;
    if (pthread_mutex_trylock(&t->bias_lock) != 0) return false;
    pthread_mutex_unlock(&t->bias_lock);
    pthread_mutex_unlock(&t->lock);
    pthread_mutex_unlock(&t->delta_lock);
    kv_tree_usage(t, &usage);
    return usage.snapshots == 0;
}

/* ==========================================================================
 * Background jobs and sources
 *
 * A job carries what a long piece of work needs besides its data: the order
 * to stop, and the rate that it must keep to. A source hands out records in
 * ascending order of their keys, one by one; an input, that is a table or a
 * log, hands them out many at a time, to be merged.
 *
 * What is here knows nothing of files or trees: a merge reads tables, logs
 * and held versions by these two interfaces only.
 *
 *   (S1) The keys of one source or input ascend strictly.
 *   (S2) What a source points at stays valid until its following `next`, and
 *        the rows of an input until its following `fill`.
 * ========================================================================== */

/* How soon a job that sleeps obeys an order to stop. */
enum { KV_PACE_SLICE_NS = 50 * 1000 * 1000 };

/*
 * On the stack of whoever does the work, and used by that thread only; `stop`
 * is the one thing that another may change. An open uses one without stop,
 * rate and `between`: nothing else runs yet. Inputs and writers keep a
 * pointer to their job, which must outlive them.
 */
struct kv_job {
    struct kv_env *env;
    int zstd_level;               /* for tables that it writes */
    _Atomic bool *stop;           /* or NULL: cannot be stopped */
    uint64_t bytes_per_s;         /* 0: as fast as it can */
    uint64_t due_ns;              /* the bytes so far are paid for then */
    void (*between)(void *arg);   /* what cannot wait for its end, or NULL */
    void *between_arg;
};

/* The order changes no data and is obeyed soon, not at once: it needs no
 * order among memory accesses. */
static bool kv_job_stopped(const struct kv_job *job)
{
    return job->stop && atomic_load_explicit(job->stop, memory_order_relaxed);
}

/* Sleeps in slices, so that an order to stop is obeyed soon. The time left is
 * counted down from the slices and not read from the clock again: a clock
 * that stands still, or runs backwards, must not hang the worker. */
static int kv_job_sleep(const struct kv_job *job, uint64_t ns)
{
    while (ns > 0) {
        uint64_t slice = kv_min(ns, KV_PACE_SLICE_NS);

        assert(slice < 1000000000u);
        nanosleep(&(struct timespec){.tv_nsec = (long)slice}, NULL);
        if (kv_job_stopped(job)) return KV_STOPPED;
        ns -= slice;
    }
    return KVMETA_OK;
}

/* Called for every block that is read or written, before the next one: where
 * a job can be stopped, is held back to its rate, and lets urgent work go
 * first. Idle time is not saved up for a burst. KV_STOPPED or KVMETA_OK;
 * errors of `between` are not this job's. No lock may be held but the job
 * lock. */
static int kv_job_pace(struct kv_job *job, uint64_t bytes)
{
    const struct kvmeta_vfs *vfs = job->env->vfs;
    uint64_t now;

    if (kv_job_stopped(job)) return KV_STOPPED;
    if (job->between) job->between(job->between_arg);
    if (job->bytes_per_s == 0) return KVMETA_OK;
    assert(bytes <= UINT32_MAX); /* so that the product fits */
    now = vfs->clock_ns(vfs->user);
    job->due_ns = kv_max(job->due_ns, now)
                + bytes * 1000000000u / job->bytes_per_s;
    assert(job->due_ns >= now);
    return kv_job_sleep(job, job->due_ns - now);
}

_Static_assert(KV_PACE_SLICE_NS < 1000000000, "a slice fits in tv_nsec");
_Static_assert(KV_PACE_SLICE_NS > 0, "sleeping comes to an end");

/* next: KVMETA_OK and stands on the following record, KV_END, or an error.
 * After anything but OK, key and value say nothing. Embedded as the first
 * member of what implements it. */
struct kv_source {
    int (*next)(struct kv_source *source, struct kvmeta_error *err);
    const unsigned char *key;
    const unsigned char *value;   /* NULL: a tombstone */
};

enum { KV_INPUT_ITEMS = 1024 };   /* at most, of one fill */

/* A record of an input: its key is at rows + place * unit, and the value
 * follows the key. Sixteen bytes, for sorting moves them and nothing else; the
 * head decides nearly all comparisons without a look at the row. */
struct kv_item {
    uint64_t head;                /* kv_key_head(key) */
    uint32_t place;
    uint32_t mark;                /* 2 * number of the input, + 1: tombstone */
};

_Static_assert(sizeof(struct kv_item) == 16, "an item has no padding");

/* fill: KVMETA_OK and up to KV_INPUT_ITEMS items, at least one, of input 0;
 * KV_END, with *n as it was; or an error, after which the input can only be
 * closed. `rows` may be another afterwards. An input does not know its number
 * in a merge, which adds it to the marks. */
struct kv_input {
    int (*fill)(struct kv_input *input, struct kv_item *items, size_t *n,
                struct kvmeta_error *err);
    const unsigned char *rows;
    size_t unit;
};

/* Orders two keys whose heads are known, as memcmp does. The tail of 8 bytes
 * is that of two numbers in a row, the most common key of a map. Heads of
 * keys that are shorter than 8 bytes are padded by zeros, and say all. */
static int kv_key_compare(const struct kv_shape *shape,
                          const unsigned char *a, uint64_t head_a,
                          const unsigned char *b, uint64_t head_b)
{
    if (head_a != head_b) return head_a < head_b ? -1 : 1;
    assert(head_a == kv_key_head(shape, a));
    assert(head_b == kv_key_head(shape, b));
    if (shape->tail_bytes == 0) return 0;
    if (shape->tail_bytes == 8) {
        uint64_t tail_a = kv_load_be64(a + 8);
        uint64_t tail_b = kv_load_be64(b + 8);

        return (tail_a > tail_b) - (tail_a < tail_b);
    }
    return memcmp(a + 8, b + 8, shape->tail_bytes);
}

/* ==========================================================================
 * Merge
 *
 * Many inputs to one. A round takes from each input the records up to the
 * smallest of the last keys at hand, so that whatever comes later is above
 * all of them, and sorts these runs into one array of items. Of equal keys
 * the newest input's record is passed on and the others are passed over.
 *
 *   input 0 (oldest)   2  5  9 | 14 20 31       what is at hand of each: the
 *   input 1            1  5 11 12 |             smallest of 31, 12 and 40 is
 *   input 2 (newest)   7  9 | 18 40             12, so the round goes to |
 *
 *   sorted             1 2 5 5 7 9 9 11 12      and of each key the newest:
 *   passed on          1 2 5 7 9 11 12          5 of input 1, 9 of input 2
 *
 * A heap of the inputs' first keys, the usual way, makes for each record a
 * call and several branches that no processor can predict. Rounds work on
 * arrays, and pay a few nanoseconds a record.
 *
 * Items are ordered by their heads alone, without a branch that could be
 * mispredicted, for as long as different keys have different heads; from the
 * first pair on that has not, whole keys are compared (`exact`). Keys of up
 * to 8 bytes never need that. Longer ones do as soon as two of them have the
 * same first 8 bytes: the round in which they meet is sorted a second time,
 * and all rounds after it compare whole keys from the start.
 *
 * No record may be lost or made up on the way, whatever goes wrong in here, in
 * an encoder or in memory. So a compaction takes the sums that the tables had
 * before, subtracts what was passed over and the tombstones that it left out,
 * and compares the rest with the sum of what it has read back from the new
 * table (kv_merge_balance); an open compares its records with the digest.
 * That is what `balance` is for. A flush has no sum to begin with: its table
 * is compared with the digest if it is the only one, else by the next open.
 *
 * A merge belongs to one thread. Flush and compaction take its records one by
 * one as from any source; an open, which wants them by the thousand, calls
 * kv_merge_round and looks at the items itself. Nothing here writes.
 *
 *   (M1) Sorting is stable, and runs are merged with their neighbours only:
 *        of equal keys the oldest comes first.
 *   (M2) With `balance`, the sum of the records passed on and of `shadowed`
 *        is the sum of all records taken in.
 * ========================================================================== */

/* What orders items. An item has no pointer to its key: it is found by the
 * number of its input, so that an item takes 16 bytes, and is moved often. */
struct kv_order {
    const struct kv_shape *shape;
    struct kv_input **inputs;     /* oldest first; the caller's */
    bool exact;                   /* heads are not enough; never set back */
};

/* The key, in the rows of its input: good until the input is filled again
 * (S2). */
static const unsigned char *kv_item_key(const struct kv_order *o,
                                        const struct kv_item *item)
{
    const struct kv_input *input = o->inputs[item->mark / 2];

    return input->rows + (size_t)item->place * input->unit;
}

/* NULL: a tombstone. Where values have no bytes the pointer of a put says
 * only that it is one, and may stand behind the rows. */
static const unsigned char *kv_item_value(const struct kv_order *o,
                                          const struct kv_item *item)
{
    return item->mark & 1 ? NULL
                          : kv_item_key(o, item) + o->shape->key_bytes;
}

/* By whole keys, whatever `exact` says. 0 is possible for items of different
 * inputs, or of one log that has not been settled. */
static int kv_item_compare(const struct kv_order *o, const struct kv_item *a,
                           const struct kv_item *b)
{
    if (a->head != b->head) return a->head < b->head ? -1 : 1;
    return kv_key_compare(o->shape, kv_item_key(o, a), a->head,
                          kv_item_key(o, b), b->head);
}

/* How many of n sorted items are below the key; with `equal`, not above it.
 * The items must be of one input, and sorted by whole keys. */
static size_t kv_items_rank(const struct kv_order *o,
                            const struct kv_item *items, size_t n,
                            const unsigned char *key, bool equal)
{
    uint64_t head = kv_key_head(o->shape, key);
    size_t low = 0;

    while (low < n) {
        size_t middle = low + (n - low) / 2;

        if (kv_key_compare(o->shape, kv_item_key(o, &items[middle]),
                           items[middle].head, key, head) < (int)equal)
            low = middle + 1;
        else
            n = middle;
    }
    return low;
}

/* a, or b if `second` is 1: compilers make a branch of ?:, and which one it
 * is going to be cannot be predicted here. 0 - second is a mask of zeros or
 * of ones. */
static size_t kv_pick(size_t a, size_t b, size_t second)
{
    assert(second <= 1);
    return a ^ ((a ^ b) & (0 - second));
}

/*
 * Merges from[0..left) and from[left..n) by their heads. From both ends at a
 * time: neither step waits for the other's loads. Stable (M1): of equal heads
 * the lower end takes that of the left run, the upper end that of the right.
 *
 * The inner loop does not ask whether a run is used up. It makes as many
 * steps as the shorter run is long, so that one end alone cannot use it up
 * before the last of them. If both ends together have, each of them looks at
 * the item of that run which the other end took last: the lower end at one
 * that is above all that the other run has left, the upper end at one below,
 * by the same rule for ties. So nothing outside of the runs is read, and from
 * now on both ends take from the other run, which has two items for each step.
 */
static void kv_items_merge_heads(const struct kv_item *from, size_t left,
                                 size_t n, struct kv_item *to)
{
    size_t a = 0, a_end = left;
    size_t b = left, b_end = n;
    struct kv_item *to_end = to + n;
    size_t steps;

    assert(left > 0);
    assert(left < n);
    while ((steps = (size_t)kv_min(a_end - a, b_end - b)) > 0) {
        for (; steps > 0; steps--) {
            size_t low = from[b].head < from[a].head;
            size_t high = from[b_end - 1].head >= from[a_end - 1].head;

            *to++ = from[kv_pick(a, b, low)];
            a += !low;
            b += low;
            *--to_end = from[kv_pick(a_end, b_end, high) - 1];
            a_end -= !high;
            b_end -= high;
        }
    }
    assert(a == a_end || b == b_end);
    assert((size_t)(to_end - to) == (a_end - a) + (b_end - b));
    memcpy(to, from + a, (a_end - a) * sizeof *to);
    memcpy(to + (a_end - a), from + b, (b_end - b) * sizeof *to);
}

/* Merges items[0..left) and items[left..n); tmp has room for n. Runs that are
 * in order as they stand, as those of ascending numbers are, cost one
 * comparison. That one is by whole keys also where heads decide: what is in
 * order by keys is so by heads. Otherwise both runs are copied to tmp, and
 * merged from there, since writing goes on at both ends. */
static void kv_items_merge(const struct kv_order *o, struct kv_item *items,
                           size_t left, size_t n, struct kv_item *tmp)
{
    size_t a = 0;
    size_t b = left;

    assert(left > 0 && left < n);
    if (kv_item_compare(o, &items[left - 1], &items[left]) <= 0) return;
    memcpy(tmp, items, n * sizeof *tmp);
    if (!o->exact) {
        kv_items_merge_heads(tmp, left, n, items);
        return;
    }
    while (a < left && b < n)
        *items++ = kv_item_compare(o, &tmp[b], &tmp[a]) < 0 ? tmp[b++]
                                                            : tmp[a++];
    assert(a == left || b == n);
    memcpy(items, tmp + a, (left - a) * sizeof *tmp);
    memcpy(items + (left - a), tmp + b, (n - b) * sizeof *tmp);
}

/* Sorts by heads, or by keys if o->exact. Bottom-up: no recursion, no worst
 * case. tmp has room for n. Stable (M1). */
static void kv_items_sort(const struct kv_order *o, struct kv_item *items,
                          size_t n, struct kv_item *tmp)
{
    for (size_t width = 1; width < n; width *= 2)
        for (size_t i = 0; i + width < n; i += 2 * width)
            kv_items_merge(o, items + i, width,
                           (size_t)kv_min(2 * width, n - i), tmp);
}

/* Are there neighbours of one head that are not the same key? The items are
 * sorted by head, so all of one head are neighbours. Says yes in vain where
 * whole keys are in order by luck: then they are sorted once more than
 * needed. */
static bool kv_items_tied(const struct kv_order *o,
                          const struct kv_item *items, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        assert(items[i - 1].head <= items[i].head);
        if (items[i].head == items[i - 1].head
            && kv_item_compare(o, &items[i], &items[i - 1]) != 0)
            return true;
    }
    return false;
}

/* Keeps the newest item of each key, and returns how many that are. Adds up
 * the others in *shadowed, if there is one (M2). Where not `exact`, equal
 * heads are equal keys: kv_items_tied has looked. */
static size_t kv_items_unique(const struct kv_order *o, struct kv_item *items,
                              size_t n, struct kvmeta_digest *shadowed)
{
    size_t kept = 0;

    assert(n > 0);
    for (size_t i = 0; i + 1 < n; i++) {
        bool same = items[i].head == items[i + 1].head
            && (!o->exact || kv_item_compare(o, &items[i], &items[i + 1]) == 0);

        /* Stored in any case, and overwritten by the next one if it is not to
         * be kept: no branch. */
        items[kept] = items[i];
        kept += !same;
        if (shadowed && same)
            kv_digest_add(shadowed,
                          kv_digest_record(o->shape, kv_item_key(o, &items[i]),
                                           kv_item_value(o, &items[i])));
    }
    items[kept++] = items[n - 1];
    assert(kept <= n);
    return kept;
}

/* Puts right what only whole keys tell, and leaves each key once. The items
 * are sorted by head; the sort is stable, so that it keeps ages in order.
 * Returns how many are left, at least one. */
static size_t kv_items_settle(struct kv_order *o, struct kv_item *items,
                              size_t n, struct kv_item *tmp,
                              struct kvmeta_digest *shadowed)
{
    assert(n > 0);
    if (!o->exact && o->shape->tail_bytes && kv_items_tied(o, items, n)) {
        o->exact = true;
        kv_items_sort(o, items, n, tmp);
    }
    return kv_items_unique(o, items, n, shadowed);
}

/* What an input has handed out and the merge has not taken yet: the items
 * at..end. `ended`: nothing of the range follows them. */
struct kv_merge_window {
    struct kv_item *items;        /* [KV_INPUT_ITEMS] */
    size_t at;
    size_t end;
    bool ended;
};

/*
 * Runs that wait to be merged: each more than twice as long as the next, as
 * in Timsort. So each item is moved a logarithmic number of times, however
 * unlike the runs are, and only neighbours are merged, which M1 needs. Their
 * lengths fall by halves, so that the stack is never deeper than a length has
 * bits, and one more.
 */
struct kv_merge_stack {
    size_t length[64];
    size_t depth;
    size_t end;                   /* the sum of the lengths */
};

/*
 * Windows, items and tmp are one allocation, `windows`, made at open: 48 KiB
 * for each input, and a round allocates nothing. Items of a round point into
 * the rows of the inputs, which stay as they are (S2) until a window is filled
 * again.
 *
 * A round leaves items[0..count) and sets `at` to 0. Whoever takes the items
 * by kv_merge_next moves `at`; whoever calls kv_merge_round takes all of them.
 * Nobody does both.
 */
struct kv_merge {
    struct kv_source base;
    struct kv_env *env;
    struct kv_order order;
    size_t n;                     /* inputs */
    /* The range, from <= key < to. Windows are cut to it when they are filled,
     * so that nothing behind them knows of it. */
    const unsigned char *from;    /* the caller's; NULL: no bound */
    const unsigned char *to;
    bool balance;                 /* set after open: keep `shadowed` */
    struct kvmeta_digest shadowed;
    struct kv_merge_window *windows; /* [n]; the arrays are allocated with it */
    struct kv_item *items;        /* of this round */
    struct kv_item *tmp;
    size_t count;
    size_t at;                    /* the item to be passed on next */
};

_Static_assert(sizeof(struct kv_merge_window) % _Alignof(struct kv_item) == 0,
               "items may stand behind windows");

/* Merges the topmost runs: all, or until the rule of the stack holds. The
 * runs are the last s->end items of m->items, in the order of the stack, so
 * that the two to be merged are neighbours, and the older is the left one
 * (M1). */
static void kv_merge_collapse(struct kv_merge *m, struct kv_merge_stack *s,
                              bool all)
{
    while (s->depth >= 2) {
        size_t left = s->length[s->depth - 2];
        size_t right = s->length[s->depth - 1];

        assert(left > 0 && right > 0);
        assert(s->end >= left + right);
        if (!all && left > 2 * right) return;
        kv_items_merge(&m->order, m->items + s->end - right - left, left,
                       left + right, m->tmp);
        s->length[--s->depth - 1] = left + right;
    }
}

/* Fills the window of input i, and cuts off what is not in the range. The
 * window must be empty, and nothing of the last fill be in use: the rows may
 * be overwritten. What is below `from` may fill a window and leave nothing of
 * it: the caller asks again. */
static int kv_merge_fill(struct kv_merge *m, size_t i,
                         struct kv_merge_window *w, struct kvmeta_error *err)
{
    struct kv_input *input = m->order.inputs[i];
    size_t n = 0;
    int rc = input->fill(input, w->items, &n, err);

    assert(w->at == w->end);
    assert(!w->ended);
    if (rc && rc != KV_END) return rc;
    assert((rc == KV_END) == (n == 0));
    assert(n <= KV_INPUT_ITEMS);
    for (size_t k = 0; k < n; k++) w->items[k].mark |= (uint32_t)(2 * i);
    w->at = m->from ? kv_items_rank(&m->order, w->items, n, m->from, false)
                    : 0;
    w->end = m->to ? kv_items_rank(&m->order, w->items, n, m->to, false) : n;
    assert(w->at <= w->end);
    assert(w->end <= n);
    /* Cut at the end: what follows is not below `to` either (S1). */
    w->ended = n == 0 || w->end < n;
    return KVMETA_OK;
}

/* The smallest of the last items of all windows; NULL: all have ended. Every
 * window that has not ended must have items: one that lacks them could still
 * bring smaller ones. */
static const struct kv_item *kv_merge_limit(const struct kv_merge *m)
{
    const struct kv_item *limit = NULL;

    for (size_t i = 0; i < m->n; i++) {
        const struct kv_merge_window *w = &m->windows[i];

        assert(w->at < w->end || w->ended);
        if (w->at < w->end
            && (!limit
                || kv_item_compare(&m->order, &w->items[w->end - 1],
                                   limit) < 0))
            limit = &w->items[w->end - 1];
    }
    return limit;
}

/* Takes in the following records: KV_END, or at least one item. Items stay
 * valid until the next round. After an error the merge can only be closed:
 * windows that were filled before it are lost for the records in them. */
static int kv_merge_round(struct kv_merge *m, struct kvmeta_error *err)
{
    struct kv_merge_stack stack = {.depth = 0};
    const struct kv_item *limit;

    for (size_t i = 0; i < m->n; i++) {
        struct kv_merge_window *w = &m->windows[i];

        /* An input hands out one block or less at a time, and its rows are
         * good until the next: a window is filled only once it is used up,
         * and so only here, where no item of the round before is looked at
         * any more. */
        while (w->at == w->end && !w->ended) {
            int rc = kv_merge_fill(m, i, w, err);

            if (rc) return rc;
        }
    }
    limit = kv_merge_limit(m);
    if (!limit) return KV_END;
    /* Runs go on the stack from the oldest input on (M1). */
    for (size_t i = 0; i < m->n; i++) {
        struct kv_merge_window *w = &m->windows[i];
        size_t n = kv_items_rank(&m->order, w->items + w->at, w->end - w->at,
                                 kv_item_key(&m->order, limit), true);

        if (n == 0) continue;
        assert(stack.end + n <= m->n * KV_INPUT_ITEMS);
        assert(stack.depth < sizeof stack.length / sizeof *stack.length);
        memcpy(m->items + stack.end, w->items + w->at, n * sizeof *w->items);
        w->at += n;
        stack.end += n;
        stack.length[stack.depth++] = n;
        kv_merge_collapse(m, &stack, false);
    }
    assert(stack.end > 0);        /* the limit's own window has given it */
    kv_merge_collapse(m, &stack, true);
    assert(stack.depth == 1);
    assert(stack.length[0] == stack.end);
    m->count = kv_items_settle(&m->order, m->items, stack.end, m->tmp,
                               m->balance ? &m->shadowed : NULL);
    assert(m->count > 0);
    assert(m->count <= stack.end);
    m->at = 0;
    return KVMETA_OK;
}

/* The source of a merge. Key and value point into the rows of an input, and
 * are good until the next call. */
static int kv_merge_next(struct kv_source *base, struct kvmeta_error *err)
{
    struct kv_merge *m = (struct kv_merge *)base;

    if (m->at == m->count) {
        int rc = kv_merge_round(m, err);

        if (rc) return rc;
    }
    assert(m->at < m->count);
    base->key = kv_item_key(&m->order, &m->items[m->at]);
    base->value = kv_item_value(&m->order, &m->items[m->at]);
    m->at++;
    return KVMETA_OK;
}

/* Accepts a zeroed one. The inputs stay open. */
static void kv_merge_close(struct kv_merge *m)
{
    if (m->env) kv_free(m->env, m->windows);
    memset(m, 0, sizeof *m);
}

/* All records with from <= key < to; NULL: no bound. inputs: oldest first;
 * array, inputs and keys must outlive the merge, and none may have been filled
 * from. *m: zeroed. After an error the merge can only be closed. */
static int kv_merge_open(struct kv_env *env, struct kv_input **inputs,
                         size_t n, const unsigned char *from,
                         const unsigned char *to, struct kv_merge *m,
                         struct kvmeta_error *err)
{
    size_t room = n * KV_INPUT_ITEMS;
    size_t bytes = n * sizeof *m->windows + 3 * room * sizeof *m->items;

    assert(n < UINT32_MAX / KV_INPUT_ITEMS / 64);
    assert(!from || !to || memcmp(from, to, env->shape.key_bytes) <= 0);
    assert(!m->windows && m->count == 0);
    m->base.next = kv_merge_next;
    m->order.shape = &env->shape;
    m->order.inputs = inputs;
    m->n = n;
    m->from = from;
    m->to = to;
    if (n == 0) return KVMETA_OK;
    m->windows = kv_alloc(env, bytes);
    if (!m->windows) return kv_fail_memory(err, bytes);
    m->env = env;
    /* [room] for the round, [room] for sorting it, [room] for the windows: a
     * round takes at most what is in all windows. */
    m->items = (struct kv_item *)(void *)(m->windows + n);
    m->tmp = m->items + room;
    for (size_t i = 0; i < n; i++) {
        m->windows[i] = (struct kv_merge_window){
            .items = m->tmp + room + i * KV_INPUT_ITEMS
        };
    }
    return KVMETA_OK;
}

/* ==========================================================================
 * Byte planes
 *
 * The columns of a block: plane p holds byte p of every record. A plane is
 * stored as it is, or as differences mod 256 to the record before, or as
 * differences less a carry: 1 where the neighbour plane, one byte less
 * significant, became smaller. With the carry the planes of a growing number
 * turn into the digits of its growth. Keys are big-endian, so that the
 * neighbour of plane p is p + 1; values are little-endian on most hosts, so
 * there it is p - 1. The vector code and the plain one make the same bytes.
 *
 * Keeping the bytes of a place together is what HDF5 and Blosc call a
 * shuffle. zstd finds strings that repeat, and bytes that are frequent; of
 * records side by side, which differ in their low bytes and nowhere else, it
 * makes little. By column the high bytes are one long run, and differences
 * turn what grows evenly into one, too.
 *
 * A carry is a guess: a plane that became smaller may have run over, or the
 * number may have shrunk. A wrong guess costs compression and nothing else,
 * because the decoder, which has the neighbour back by then, makes the same
 * guess. All of this is arithmetic on bytes in memory: it cannot fail, has no
 * state, and whoever has the planes may call it.
 *
 * With vectors 16 records go at a time, and those that are left one by one, by
 * the code that does all of it elsewhere. Files go from machines of one kind
 * to machines of the other, hence the same bytes.
 *
 *   (B1) Decoding a plane is the inverse of encoding it, whatever the bytes.
 * ========================================================================== */

/* As stored in a block, two bits each: the numbers are part of the format. */
enum kv_plane_mode {
    KV_PLANE_PLAIN = 0,
    KV_PLANE_DELTA = 1,
    KV_PLANE_CARRY = 2,
    KV_PLANE_MODES = 3            /* how many there are */
};

enum { KV_TILE = 16 };            /* rows and columns turned at a time */

#if KV_X86
/* Turns 16 x 16 bytes: after four rounds of interleaving row i with row i + 8
 * byte (i, j) has become byte (j, i): a round turns the eight bits of a byte's
 * row and column, read as one number, by one place. Unrolled, the rows are in
 * registers. SSE2 is part of every x86-64. */
static void kv_tile_transpose(const unsigned char *src, size_t src_stride,
                              unsigned char *dst, size_t dst_stride)
{
    __m128i a[KV_TILE], b[KV_TILE];

#pragma GCC unroll 16
    for (size_t i = 0; i < KV_TILE; i++)
        a[i] = _mm_loadu_si128((const void *)(src + i * src_stride));
#pragma GCC unroll 2
    for (int round = 0; round < 2; round++) {
#pragma GCC unroll 8
        for (size_t i = 0; i < KV_TILE / 2; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
#pragma GCC unroll 8
        for (size_t i = 0; i < KV_TILE / 2; i++) {
            a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
            a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
        }
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < KV_TILE; i++)
        _mm_storeu_si128((void *)(dst + i * dst_stride), a[i]);
}
#else
/* Turns 16 x 16 bytes. What the code above must do, too. */
static void kv_tile_transpose(const unsigned char *src, size_t src_stride,
                              unsigned char *dst, size_t dst_stride)
{
    for (size_t i = 0; i < KV_TILE; i++) {
        for (size_t j = 0; j < KV_TILE; j++)
            dst[j * dst_stride + i] = src[i * src_stride + j];
    }
}
#endif

/* A tile at the edge: goes through a square of its own, so that nothing
 * outside of the matrix is read or written. rows and columns: of the matrix,
 * both at most KV_TILE. */
static void kv_tile_transpose_edge(const unsigned char *src, size_t src_stride,
                                   unsigned char *dst, size_t dst_stride,
                                   size_t rows, size_t columns)
{
    unsigned char in[KV_TILE * KV_TILE];
    unsigned char out[KV_TILE * KV_TILE];

    assert(rows > 0 && rows <= KV_TILE);
    assert(columns > 0 && columns <= KV_TILE);
    memset(in, 0, sizeof in);
    for (size_t i = 0; i < rows; i++)
        memcpy(in + i * KV_TILE, src + i * src_stride, columns);
    kv_tile_transpose(in, KV_TILE, out, KV_TILE);
    for (size_t j = 0; j < columns; j++)
        memcpy(dst + j * dst_stride, out + j * KV_TILE, rows);
}

/* src: rows x columns bytes, row by row; dst: the same, column by column,
 * each `stride` bytes behind the one before. The two must not overlap. What
 * is left over at an edge is done by a tile that overlaps the one before and
 * writes the same bytes again, which is faster than a smaller one; only a
 * matrix that is smaller than a tile goes through the square. */
static void kv_plane_transpose(const unsigned char *src, size_t rows,
                               size_t columns, unsigned char *dst,
                               size_t stride)
{
    bool whole = rows >= KV_TILE && columns >= KV_TILE;

    assert(src != dst);
    assert(stride >= rows);
    for (size_t i = 0; i < rows; i += KV_TILE) {
        size_t high = (size_t)kv_min(KV_TILE, rows - i);
        /* The last tile starts early enough to be whole. */
        size_t y = whole ? (size_t)kv_min(i, rows - KV_TILE) : i;

        for (size_t j = 0; j < columns; j += KV_TILE) {
            size_t wide = (size_t)kv_min(KV_TILE, columns - j);
            size_t x = whole ? (size_t)kv_min(j, columns - KV_TILE) : j;
            const unsigned char *from = src + y * columns + x;
            unsigned char *to = dst + x * stride + y;

            if (KV_LIKELY(whole))
                kv_tile_transpose(from, columns, to, stride);
            else
                kv_tile_transpose_edge(from, columns, to, stride, high, wide);
        }
    }
}

/* The carry into record i out of the neighbour plane `low`; NULL: none. */
static unsigned kv_plane_carry(const unsigned char *low, size_t i)
{
    assert(i > 0);
    return low && low[i] < low[i - 1];
}

#if KV_X86
/* 16 carries at once, each 0 or 1. low: at record i >= 1. SSE2 compares bytes
 * without a sign only for equality: now >= before if the larger of the two is
 * now, which gives -1, and one more makes the carry. */
static __m128i kv_plane_carry16(const unsigned char *low)
{
    __m128i now = _mm_loadu_si128((const void *)low);
    __m128i before = _mm_loadu_si128((const void *)(low - 1));
    __m128i no_carry = _mm_cmpeq_epi8(_mm_max_epu8(now, before), now);

    return _mm_add_epi8(no_carry, _mm_set1_epi8(1));
}

#endif

/* Encodes the records from..to of plane x to `out`. low: the neighbour plane,
 * not encoded, for KV_PLANE_CARRY. Record 0 is stored as it is in every mode.
 * A part that begins later takes its first difference to the record before
 * it, though that is not part of it: samples are made so. */
static void kv_plane_encode(int mode, const unsigned char *x,
                            const unsigned char *low, size_t from, size_t to,
                            unsigned char *out)
{
    size_t i = from;

    assert(from <= to);
    assert(mode < KV_PLANE_MODES);
    assert(mode != KV_PLANE_CARRY || low);
    assert(x != out);             /* x[i - 1] is still needed */
    if (mode == KV_PLANE_PLAIN) {
        memcpy(out, x + from, to - from);
        return;
    }
    if (mode == KV_PLANE_DELTA) low = NULL;
    assert(from < to);
    /* There is no record before the first. */
    if (i == 0) out[i++] = x[0];
#if KV_X86
    for (; i + 16 <= to; i += 16) {
        __m128i d = _mm_sub_epi8(_mm_loadu_si128((const void *)(x + i)),
                                 _mm_loadu_si128((const void *)(x + i - 1)));

        if (low) d = _mm_sub_epi8(d, kv_plane_carry16(low + i));
        _mm_storeu_si128((void *)(out + (i - from)), d);
    }
#endif
    for (; i < to; i++)
        out[i - from] = (unsigned char)(x[i] - x[i - 1]
                                        - kv_plane_carry(low, i));
}

#if KV_X86
/* The inverse from record i >= 1 on, 16 at a time, where the record before is
 * decoded already. Returns the first record that is left. low NULL: without
 * carries. A running sum, by doubling steps within the 16 (Hillis and
 * Steele): after a shift by 1, 2, 4 and 8 each byte has been added to all
 * that follow it. */
static size_t kv_plane_decode16(unsigned char *x, const unsigned char *low,
                                size_t i, size_t n)
{
    __m128i sum = _mm_set1_epi8((char)x[i - 1]);

    assert(i >= 1);
    for (; i + 16 <= n; i += 16) {
        __m128i d = _mm_loadu_si128((const void *)(x + i));

        if (low) d = _mm_add_epi8(d, kv_plane_carry16(low + i));
        d = _mm_add_epi8(d, _mm_slli_si128(d, 1));
        d = _mm_add_epi8(d, _mm_slli_si128(d, 2));
        d = _mm_add_epi8(d, _mm_slli_si128(d, 4));
        d = _mm_add_epi8(d, _mm_slli_si128(d, 8));
        sum = _mm_add_epi8(d, sum);
        _mm_storeu_si128((void *)(x + i), sum);
        /* The last of the 16 goes on into the next 16: it is doubled to a
         * word, that one fills the upper half, and that both halves. */
        sum = _mm_unpackhi_epi8(sum, sum);
        sum = _mm_shufflehi_epi16(sum, 0xFF);
        sum = _mm_unpackhi_epi64(sum, sum);
    }
    return i;
}
#endif

/* The inverse of encoding the records 0..n, in place. low: decoded, and of n
 * records, too. */
static void kv_plane_decode(int mode, unsigned char *x,
                            const unsigned char *low, size_t n)
{
    size_t i = 1;

    assert(mode < KV_PLANE_MODES);
    assert(mode != KV_PLANE_CARRY || low);
    if (mode == KV_PLANE_PLAIN || n < 2) return;
    /* A neighbour that the mode does not use: without it both modes are the
     * same. */
    if (mode == KV_PLANE_DELTA) low = NULL;
#if KV_X86
    i = kv_plane_decode16(x, low, i, n);
#endif
    for (; i < n; i++)
        x[i] = (unsigned char)(x[i] + x[i - 1] + kv_plane_carry(low, i));
}

/* ==========================================================================
 * Block scheme
 *
 * How a block is to be encoded: the mode of each plane, and where the zstd
 * frame is cut into zstd blocks. A zstd block has one Huffman code for all of
 * its literals, so planes of unlike bytes are better kept apart, and planes
 * of like bytes together. Both choices are by the order-0 entropy of a
 * sample, in fixed point, so that every machine makes the same file.
 *
 * A cut in front of a plane is made if the bits that it saves, scaled from
 * the sample to the plane, are more than a Huffman code of its own costs:
 *
 *   saved = H(segment + plane) - H(segment) - H(plane)
 *   cut if saved > symbols / 2, and saved * n / sample > KV_SCHEME_CUT_BITS
 *
 * H in bits for all bytes of the samples, symbols: the different bytes in the
 * sample of the plane, n: its size. A sample of few bytes has a lower
 * entropy than what it was taken from, by about (symbols - 1) / 2 nats (Miller
 * and Madow), so that everything looks as if it should be apart; the first
 * condition stands against that.
 *
 * None of this is needed to read: the modes are stored in the block, and the
 * cuts are zstd's own. A choice may be poor, but not wrong, and the rules may
 * be changed without a new format. What they must not do is to cost more time
 * than they save: a sample has 512 bytes, whatever the plane.
 * ========================================================================== */

enum {
    KV_SCHEME_PLANES_MAX = 2048,
    KV_SCHEME_SAMPLE = 512,       /* bytes of a plane that are looked at */
    KV_SCHEME_RUNS = 8,           /* in so many runs */
    KV_SCHEME_BIT = 1024,         /* one bit of entropy */
    KV_SCHEME_CUT_BITS = 1280     /* what a Huffman code of its own costs */
};

/* What a sample of bytes looks like. */
struct kv_histogram {
    uint32_t count[256];
    uint32_t total;
    uint64_t bits;                /* of an order-0 code, in 1 / KV_SCHEME_BIT */
};

/* Of one block; planes count from 0, those of the key first. What is behind
 * the last plane is not set. */
struct kv_scheme {
    uint8_t mode[KV_SCHEME_PLANES_MAX]; /* enum kv_plane_mode */
    bool cut[KV_SCHEME_PLANES_MAX]; /* a zstd block starts with this plane */
};

static unsigned kv_log2_floor(uint32_t n)
{
    assert(n > 0);
#if defined(__GNUC__)
    return 31u - (unsigned)__builtin_clz(n);
#else
    {
        unsigned log = 0;

        while (n >>= 1) log++;
        return log;
    }
#endif
}

/* n * log2(n) * KV_SCHEME_BIT, to about one percent. The parabola stands in
 * for log2(1 + f) - f; f is the part of n behind its highest bit, in 1/1024.
 * In integers, since the last bit of a logarithm differs between C libraries,
 * and with it the file might. */
static uint64_t kv_scheme_term(uint32_t n)
{
    unsigned log = kv_log2_floor(n);
    uint64_t f = (((uint64_t)n << 10) >> log) - 1024;

    assert(f < 1024);
    return n * ((uint64_t)log * KV_SCHEME_BIT + f
                + (f * (1024 - f) * 352 >> 20));
}

/* Bits for all bytes of the sample by a code that knows their frequencies and
 * nothing else: total * log2(total) - sum of count * log2(count). Never below
 * zero, though the terms are rounded. */
static void kv_histogram_cost(struct kv_histogram *h)
{
    uint64_t bits = h->total ? kv_scheme_term(h->total) : 0;

    for (int i = 0; i < 256; i++) {
        uint64_t term = h->count[i] > 1 ? kv_scheme_term(h->count[i]) : 0;

        bits = bits > term ? bits - term : 0;
    }
    h->bits = bits;
}

/* The histogram of a sample, with its cost. */
static void kv_histogram_of(struct kv_histogram *h, const unsigned char *bytes,
                            size_t n)
{
    assert(n <= KV_SCHEME_SAMPLE);
    memset(h->count, 0, sizeof h->count);
    for (size_t i = 0; i < n; i++) h->count[bytes[i]]++;
    h->total = (uint32_t)n;
    kv_histogram_cost(h);
}

/* The histogram of two samples put together. */
static void kv_histogram_sum(struct kv_histogram *sum,
                             const struct kv_histogram *a,
                             const struct kv_histogram *b)
{
    for (int i = 0; i < 256; i++) sum->count[i] = a->count[i] + b->count[i];
    sum->total = a->total + b->total;
    assert(sum->total >= a->total);
    kv_histogram_cost(sum);
}

/* The sample of a plane as it would look in `mode`: all of it, or a few runs,
 * because differences exist between neighbours only. Returns its size. `low`
 * as for kv_plane_encode, which see. */
static size_t kv_scheme_sample(int mode, const unsigned char *plane,
                               const unsigned char *low, size_t n,
                               unsigned char sample[KV_SCHEME_SAMPLE])
{
    size_t run = KV_SCHEME_SAMPLE / KV_SCHEME_RUNS;

    if (n <= KV_SCHEME_SAMPLE) {
        kv_plane_encode(mode, plane, low, 0, n, sample);
        return n;
    }
    for (size_t i = 0; i < KV_SCHEME_RUNS; i++) {
        /* Spread over the plane; never record 0, which has no difference. */
        size_t from = 1 + (n - 1 - run) / (KV_SCHEME_RUNS - 1) * i;

        assert(from + run <= n);
        kv_plane_encode(mode, plane, low, from, from + run, sample + i * run);
    }
    return KV_SCHEME_SAMPLE;
}

/* Takes the mode that makes the plane smallest, and leaves its histogram. Of
 * equals the simplest wins. An empty plane, of a block of tombstones, stays
 * plain. low NULL: the plane has no neighbour. */
static int kv_scheme_mode(const unsigned char *plane, const unsigned char *low,
                          size_t n, struct kv_histogram *best)
{
    int mode = KV_PLANE_PLAIN;

    for (int m = 0; m < KV_PLANE_MODES; m++) {
        unsigned char sample[KV_SCHEME_SAMPLE];
        struct kv_histogram h;
        size_t bytes;

        if (m == KV_PLANE_CARRY && !low) break;
        bytes = kv_scheme_sample(m, plane, low, n, sample);
        kv_histogram_of(&h, sample, bytes);
        if (m == 0 || h.bits < best->bits) {
            mode = m;
            *best = h;
        }
        /* It cannot get any smaller: planes of zeros are common. */
        if (best->bits == 0) break;
    }
    assert(mode != KV_PLANE_CARRY || low);
    return mode;
}

/* Is it cheaper to start a zstd block before a plane like `next` than to put
 * it to those before it? The sample stands for n bytes. A sample always looks
 * more special than the whole; the symbols in it are taken as the bias.
 * `before` becomes the histogram of the segment that the plane then belongs
 * to. */
static bool kv_scheme_cuts(struct kv_histogram *before,
                           const struct kv_histogram *next, size_t n)
{
    struct kv_histogram both;
    uint64_t apart = before->bits + next->bits;
    uint64_t symbols = 0;

    /* An empty plane belongs anywhere. */
    if (next->total == 0) return false;
    kv_histogram_sum(&both, before, next);
    for (int i = 0; i < 256; i++) symbols += next->count[i] != 0;
    if (both.bits > apart + symbols * KV_SCHEME_BIT / 2
        && (both.bits - apart) * n / next->total
            > (uint64_t)KV_SCHEME_CUT_BITS * KV_SCHEME_BIT) {
        *before = *next;
        return true;
    }
    *before = both;
    return false;
}

/* The neighbour that plane p takes its carry from, or NULL. planes: the
 * planes of the keys, key_records bytes each, then those of the values. A
 * key's last plane and a value's first have none; keys lend nothing to
 * values, which may have fewer records. */
static const unsigned char *kv_scheme_low(const struct kv_shape *shape,
                                          const unsigned char *planes, size_t p,
                                          size_t key_records,
                                          size_t value_records)
{
    size_t k = shape->key_bytes;

    assert(p < shape->record_bytes);
    if (p + 1 < k) return planes + (p + 1) * key_records;
    if (p <= k) return NULL;
    return planes + k * key_records + (p - k - 1) * value_records;
}

/* Chooses the mode of each plane first, then the cut before it: a cut is
 * between planes as they are going to be stored. planes: plain, laid out as
 * for kv_scheme_low. The first plane gets no cut, for it has nothing before it
 * to be kept apart from. */
static void kv_scheme_make(struct kv_scheme *scheme,
                           const struct kv_shape *shape,
                           const unsigned char *planes, size_t key_records,
                           size_t value_records)
{
    struct kv_histogram segment = {.total = 0};
    const unsigned char *plane = planes;

    assert(shape->record_bytes <= KV_SCHEME_PLANES_MAX);
    assert(value_records <= key_records);
    for (size_t p = 0; p < shape->record_bytes; p++) {
        size_t n = p < shape->key_bytes ? key_records : value_records;
        const unsigned char *low = kv_scheme_low(shape, planes, p, key_records,
                                               value_records);
        struct kv_histogram h;

        scheme->mode[p] = (uint8_t)kv_scheme_mode(plane, low, n, &h);
        scheme->cut[p] = kv_scheme_cuts(&segment, &h, n);
        plane += n;
    }
}

/* ==========================================================================
 * Table blocks
 *
 * A block is one zstd frame that states its size. Inside, of n records, t of
 * them tombstones, with m = n - t values:
 *
 *   SIZE                     of a block with n >= KV_BLOCK_PLANES_MIN
 *   ceil((K + V) / 4)        modes: 2 bits a plane, low bits first, pad zero
 *   t > 0: ceil(n / 8)       tombstone bits, low bits first, pad zero
 *   K * n                    the planes of the keys
 *   V * m                    the planes of the values; tombstones have none
 *
 *   SIZE                     of any other block
 *   t > 0: ceil(n / 8)       tombstone bits
 *   K * n                    the keys, one after another
 *   V * m                    the values
 *
 * Few records make planes too short to be worth it, and a wide value is best
 * left in one piece. n, t, and the sum come from the index. n is bounded by
 * kv_block_records_max, so that its rows, too, fit in KV_BLOCK_RAW_MAX.
 *
 * Four keys of 4 bytes, their planes, and what is stored of them: plane 3 as
 * differences, the others as differences less the carry.
 *
 *   00 00 12 FE        plane 0   00 00 00 00        00 00 00 00
 *   00 00 12 FF        plane 1   00 00 00 00        00 00 00 00
 *   00 00 13 00        plane 2   12 12 13 13        12 00 00 00
 *   00 00 13 01        plane 3   FE FF 00 01        FE 01 01 01
 *
 * The path of a block, and who owns the bytes on the way:
 *
 *   write   rows as they come (keys, values) -> planes -> modes and cuts
 *           -> raw -> zstd -> the writer's buffer; all but the last are the
 *           encoder's, and are used again for the next block
 *   read    stored -> raw -> differences undone in place -> rows, over the
 *           stored bytes; both are the input's
 *
 * A block comes from a file and is not trusted. The decoder returns the rule
 * that is broken, and neither reads nor writes outside of its buffers for any
 * bytes; the encoder asserts. Both are used by one thread at a time.
 *
 *   (B2) The sum is right before zstd sees a byte.
 *   (B3) The frame fills exactly the size that n and t call for.
 *   (B4) The keys of a block ascend strictly, and its first is the index's.
 * ========================================================================== */

/*
 * The sizes are part of the format, as far as a reader refuses what is above
 * them, and KV_BLOCK_PLANES_MIN is, because it decides how a block is laid
 * out. 128 KiB is also the most that one zstd block holds (RFC 8878).
 */
enum {
    KV_BLOCK_RAW_MAX = 128 * 1024,
    /* Above what zstd makes of raw bytes that it cannot compress, cuts
     * included; a reader refuses more before it allocates. */
    KV_BLOCK_STORED_MAX = 2 * KV_BLOCK_RAW_MAX,
    KV_BLOCK_PLANES_MIN = 64,
    /* At most, of one cut in a zstd frame: a zstd block more, whose header has
     * 3 bytes, and the rest is margin. */
    KV_BLOCK_FLUSH_BYTES = 16
};

_Static_assert(KV_SCHEME_PLANES_MAX >= KV_BLOCK_RAW_MAX / KV_BLOCK_PLANES_MIN,
               "a block of planes has no more planes than a scheme");
_Static_assert(KV_BLOCK_RAW_MAX
                   >= 1 + KVMETA_KEY_BYTES_MAX + KVMETA_VALUE_BYTES_MAX,
               "one record always fits");

/* What the index says of a block. Of an open table all of it has been checked
 * (kv_table_check_block), but for the sum. */
struct kv_block {
    uint64_t off;                 /* in the file */
    uint32_t stored_bytes;        /* 1..KV_BLOCK_STORED_MAX */
    uint32_t records;             /* 1..kv_block_records_max */
    uint32_t tombstones;          /* of them */
    uint32_t crc;                 /* over the stored bytes */
};

/* A decoded block. In each row the value stands behind the key; it says
 * nothing where the record is a tombstone, that is where bit i of `bits` is
 * set. Points into the buffers that kv_block_decode was given, `rows` into one
 * and `bits` into the other, and owns nothing. */
struct kv_block_view {
    const unsigned char *rows;
    const unsigned char *bits;    /* NULL: no tombstones */
    uint32_t records;
};

/* Is the block stored by column? A rule on the count alone, so that no flag
 * can contradict it. */
static bool kv_block_has_planes(uint64_t records)
{
    return records >= KV_BLOCK_PLANES_MIN;
}

/* Size of the modes at the front of a block, 0 of one without planes. */
static uint64_t kv_block_mode_bytes(const struct kv_shape *shape,
                                    uint64_t records)
{
    if (!kv_block_has_planes(records)) return 0;
    return ((uint64_t)shape->record_bytes + 3) / 4;
}

/* Size of the tombstone bits: a block without tombstones has none. */
static uint64_t kv_block_bit_bytes(uint64_t records, uint64_t tombstones)
{
    return tombstones ? (records + 7) / 8 : 0;
}

/* Size of keys and values, by column or not: the last part of a block. */
static uint64_t kv_block_row_bytes(const struct kv_shape *shape,
                                   uint64_t records, uint64_t tombstones)
{
    assert(records <= UINT32_MAX);
    assert(tombstones <= records);
    return records * shape->key_bytes
         + (records - tombstones) * shape->value_bytes;
}

/* What zstd must unpack to. Cannot overflow: counts have 32 bits, a record
 * has 17. */
static uint64_t kv_block_raw_bytes(const struct kv_shape *shape,
                                   uint64_t records, uint64_t tombstones)
{
    return kv_block_mode_bytes(shape, records)
         + kv_block_bit_bytes(records, tombstones)
         + kv_block_row_bytes(shape, records, tombstones);
}

/* The most records that fit in a block whatever their tombstones. What a
 * writer fills a block up to, and what a reader accepts at most. Each record
 * takes its bytes and one tombstone bit. Below the count from which there are
 * planes no modes take room: a few widths get one record more, but no more
 * than keeps them without planes. */
static uint32_t kv_block_records_max(const struct kv_shape *shape)
{
    uint64_t room = KV_BLOCK_RAW_MAX - (shape->record_bytes + 3) / 4;
    uint64_t n = room * 8 / ((uint64_t)shape->record_bytes * 8 + 1);

    /* Modes were counted in vain: room for one more, perhaps, but never for
     * so many that there are planes after all. */
    if (!kv_block_has_planes(n))
        n = kv_min(KV_BLOCK_PLANES_MIN - 1,
                   KV_BLOCK_RAW_MAX * 8ull
                       / ((uint64_t)shape->record_bytes * 8 + 1));
    n = kv_max(n, 1);
    /* No other number of tombstones makes more: the first one brings the bits,
     * and each takes the place of a value away. */
    assert(kv_block_raw_bytes(shape, n, 0) <= KV_BLOCK_RAW_MAX);
    assert(kv_block_raw_bytes(shape, n, 1) <= KV_BLOCK_RAW_MAX);
    return (uint32_t)n;
}

static bool kv_bit_get(const unsigned char *bits, size_t i)
{
    return bits[i / 8] >> (i % 8) & 1;
}

/* --- Encoder --- */

/*
 * Gathers the records of one block. All arrays grow with what is in them:
 * the tables of a small store must not cost large buffers. Everything is kept
 * from block to block until kv_encoder_free. For full blocks that is
 * KV_BLOCK_RAW_MAX three times, as rows, as planes and as what zstd is given,
 * and what zstd needs for the level.
 */
struct kv_encoder {
    struct kv_env *env;           /* NULL: zeroed, nothing to free */
    int zstd_level;               /* -7..19, but not 0 */
    ZSTD_CCtx *zstd;              /* made for the first block */
    uint32_t records;
    uint32_t tombstones;
    uint32_t records_max;
    size_t records_cap;
    unsigned char *keys;          /* [records_cap] of each */
    unsigned char *values;        /* of puts only, without gaps */
    unsigned char *bits;          /* 1: a tombstone */
    unsigned char *raw;           /* what zstd is given */
    unsigned char *planes;
    size_t raw_cap;
    size_t planes_cap;
    struct kv_scheme *scheme;     /* made for the first block of planes */
};

/* zstd's memory is the host's, too: its limits and its accounts hold. */
static void *kv_zstd_alloc(void *env, size_t bytes)
{
    return kv_alloc(env, bytes);
}

static void kv_zstd_free(void *env, void *p)
{
    kv_free(env, p);
}

/* For contexts that live as long as their owner. zstd asks from the thread
 * that calls it, and kv_alloc may be called by any. */
static ZSTD_customMem kv_zstd_memory(struct kv_env *env)
{
    ZSTD_customMem memory = {kv_zstd_alloc, kv_zstd_free, env};

    return memory;
}

/* Allocates nothing. The encoder belongs to one table writer. */
static void kv_encoder_init(struct kv_encoder *e, struct kv_env *env,
                            int zstd_level)
{
    memset(e, 0, sizeof *e);
    e->env = env;
    e->zstd_level = zstd_level;
    e->records_max = kv_block_records_max(&env->shape);
    assert(e->records_max >= 1);
}

/* Accepts a zeroed one, and may be called again. */
static void kv_encoder_free(struct kv_encoder *e)
{
    if (!e->env) return;
    ZSTD_freeCCtx(e->zstd);
    kv_free(e->env, e->keys);
    kv_free(e->env, e->values);
    kv_free(e->env, e->bits);
    kv_free(e->env, e->raw);
    kv_free(e->env, e->planes);
    kv_free(e->env, e->scheme);
    memset(e, 0, sizeof *e);
}

/* One array to `bytes`; it stays what it was, and where it was, when there is
 * no memory. */
static int kv_encoder_resize(struct kv_encoder *e, unsigned char **array,
                             size_t bytes, struct kvmeta_error *err)
{
    void *p = kv_resize(e->env, *array, bytes);

    if (!p) return kv_fail_memory(err, bytes);
    *array = p;
    return KVMETA_OK;
}

/* Makes room for more records: four times as many, up to a full block. Values
 * may have no bytes: one more is asked for, so that this is not a request for
 * nothing. On an error all that has been gathered is still there. */
static int kv_encoder_grow(struct kv_encoder *e, struct kvmeta_error *err)
{
    const struct kv_shape *shape = &e->env->shape;
    size_t cap = (size_t)kv_min(kv_max(e->records_cap * 4, 16),
                                e->records_max);
    int rc;

    assert(e->records == e->records_cap);
    assert(cap > e->records_cap);
    assert(cap <= e->records_max);
    rc = kv_encoder_resize(e, &e->keys, cap * shape->key_bytes, err);
    if (rc) return rc;
    rc = kv_encoder_resize(e, &e->values, cap * shape->value_bytes + 1, err);
    if (rc) return rc;
    rc = kv_encoder_resize(e, &e->bits, (cap + 7) / 8, err);
    if (rc) return rc;
    e->records_cap = cap;
    return KVMETA_OK;
}

/* Must the block be ended before the next record? */
static bool kv_encoder_full(const struct kv_encoder *e)
{
    return e->records == e->records_max;
}

/* Only where the block is not full. The rows are kept as they come, values of
 * puts only; they are turned to planes when the block is ended. Copies key and
 * value. The order of keys is for the caller to keep. On an error the record
 * is not in, and those before it are. */
static int kv_encoder_add(struct kv_encoder *e, const unsigned char *key,
                          const unsigned char *value, struct kvmeta_error *err)
{
    const struct kv_shape *shape = &e->env->shape;
    size_t i = e->records;

    assert(!kv_encoder_full(e));
    if (i == e->records_cap) {
        int rc = kv_encoder_grow(e, err);

        if (rc) return rc;
    }
    memcpy(e->keys + i * shape->key_bytes, key, shape->key_bytes);
    /* The bits are not cleared when a block is ended: each byte is, with its
     * first record. */
    if (i % 8 == 0) e->bits[i / 8] = 0;
    if (!value) {
        e->bits[i / 8] = (unsigned char)(e->bits[i / 8] | 1u << (i % 8));
        e->tombstones++;
    } else if (shape->value_bytes > 0) {
        memcpy(e->values + (i - e->tombstones) * shape->value_bytes, value,
               shape->value_bytes);
    }
    e->records++;
    assert(e->records <= e->records_cap);
    assert(e->tombstones <= e->records);
    return KVMETA_OK;
}

/* Lays the planes out behind the modes and bits, at `to`. The plain planes
 * stay in e->planes: a plane's carry is taken from its neighbour as it was,
 * not as it is stored. modes: zeroed, for the modes are or-ed in. */
static void kv_encoder_put_planes(struct kv_encoder *e, unsigned char *modes,
                                  unsigned char *to)
{
    const struct kv_shape *shape = &e->env->shape;
    size_t n = e->records;
    size_t m = n - e->tombstones;
    const unsigned char *plane = e->planes;

    /* Keys have n records, values only m: a tombstone has no value. */
    kv_plane_transpose(e->keys, n, shape->key_bytes, e->planes, n);
    kv_plane_transpose(e->values, m, shape->value_bytes,
                       e->planes + n * shape->key_bytes, m);
    kv_scheme_make(e->scheme, shape, e->planes, n, m);
    /* Encoding reads e->planes and writes to `to`: never in place. */
    for (size_t p = 0; p < shape->record_bytes; p++) {
        size_t bytes = p < shape->key_bytes ? n : m;
        unsigned mode = e->scheme->mode[p];

        kv_plane_encode((int)mode, plane,
                        kv_scheme_low(shape, e->planes, p, n, m), 0, bytes,
                        to);
        modes[p / 4] = (unsigned char)(modes[p / 4] | mode << (p % 4 * 2));
        plane += bytes;
        to += bytes;
    }
    assert(plane == e->planes + kv_block_row_bytes(shape, n, e->tombstones));
}

/*
 * Writes the content of the zstd frame to e->raw. On an error the records
 * that were gathered are still there.
 *
 *   raw    | modes | bits | keys, then values: planes or pieces |
 *   sizes    kv_block_mode_bytes, _bit_bytes, _row_bytes
 *
 * Modes and bits may have no bytes. The decoder takes it apart by the same
 * three functions.
 */
static int kv_encoder_lay_out(struct kv_encoder *e, struct kvmeta_error *err)
{
    const struct kv_shape *shape = &e->env->shape;
    size_t mode_bytes = (size_t)kv_block_mode_bytes(shape, e->records);
    size_t bit_bytes = (size_t)kv_block_bit_bytes(e->records, e->tombstones);
    size_t row_bytes = (size_t)kv_block_row_bytes(shape, e->records,
                                                  e->tombstones);
    size_t key_bytes = (size_t)e->records * shape->key_bytes;
    unsigned char *rows;
    int rc;

    rc = kv_grow(e->env, (void **)&e->raw, &e->raw_cap,
                 mode_bytes + bit_bytes + row_bytes, 1, err);
    if (rc) return rc;
    memset(e->raw, 0, mode_bytes);
    memcpy(e->raw + mode_bytes, e->bits, bit_bytes);
    rows = e->raw + mode_bytes + bit_bytes;
    /* Too few for columns: as they came, keys first. */
    if (!kv_block_has_planes(e->records)) {
        memcpy(rows, e->keys, key_bytes);
        memcpy(rows + key_bytes, e->values, row_bytes - key_bytes);
        return KVMETA_OK;
    }
    rc = kv_grow(e->env, (void **)&e->planes, &e->planes_cap, row_bytes, 1,
                 err);
    if (rc) return rc;
    if (!e->scheme) e->scheme = kv_alloc(e->env, sizeof *e->scheme);
    if (!e->scheme) return kv_fail_memory(err, sizeof *e->scheme);
    kv_encoder_put_planes(e, e->raw, rows);
    return KVMETA_OK;
}

/* Everything that zstd can fail with here is a lack of memory: the level is
 * in range and the output has room. So that it is told as such, and the step
 * is tried again later. */
static int kv_encoder_fail_zstd(size_t result, struct kvmeta_error *err)
{
    return kv_fail(err, KVMETA_E_NOMEM, ENOMEM, "compression: %s",
                   ZSTD_getErrorName(result));
}

/* Makes the context for the first block; later ones find it. The memory that
 * it needs for its level comes with the first frame. */
static int kv_encoder_open_zstd(struct kv_encoder *e, struct kvmeta_error *err)
{
    size_t result;

    if (e->zstd) return KVMETA_OK;
    e->zstd = ZSTD_createCCtx_advanced(kv_zstd_memory(e->env));
    if (!e->zstd)
        return kv_fail(err, KVMETA_E_NOMEM, ENOMEM, "no memory to compress");
    result = ZSTD_CCtx_setParameter(e->zstd, ZSTD_c_compressionLevel,
                                    e->zstd_level);
    assert(!ZSTD_isError(result));   /* the level is in range */
    (void)result;
    return KVMETA_OK;
}

/* Hands zstd the bytes up to `end`; `how` ends a zstd block or the frame. The
 * output has room for everything, so nothing is left over. Returns zstd's
 * result: an error is for kv_encoder_fail_zstd. */
static size_t kv_encoder_feed(struct kv_encoder *e, ZSTD_inBuffer *in,
                              size_t end, ZSTD_EndDirective how,
                              ZSTD_outBuffer *out)
{
    size_t result;

    assert(end >= in->size);
    assert(in->pos == in->size);
    in->size = end;
    result = ZSTD_compressStream2(e->zstd, out, in, how);
    assert(ZSTD_isError(result) || result == 0);
    assert(ZSTD_isError(result) || in->pos == in->size);
    return result;
}

/* One frame, with a zstd block for each segment of the scheme. Modes and bits
 * go with the first segment. The size is pledged, so that the frame states it
 * (B3). */
static size_t kv_encoder_compress_cut(struct kv_encoder *e, size_t raw_bytes,
                                      ZSTD_outBuffer *out)
{
    const struct kv_shape *shape = &e->env->shape;
    size_t end = (size_t)(kv_block_mode_bytes(shape, e->records)
                          + kv_block_bit_bytes(e->records, e->tombstones));
    ZSTD_inBuffer in = {e->raw, 0, 0};
    size_t result = 0;

    /* Neither can fail between two frames. The reset also ends what a frame
     * that failed has left. */
    (void)ZSTD_CCtx_reset(e->zstd, ZSTD_reset_session_only);
    (void)ZSTD_CCtx_setPledgedSrcSize(e->zstd, raw_bytes);
    for (size_t p = 0; p < shape->record_bytes; p++) {
        /* A cut in front of plane p ends the zstd block with what is before
         * it. */
        assert(end <= raw_bytes);
        if (e->scheme->cut[p])
            result = kv_encoder_feed(e, &in, end, ZSTD_e_flush, out);
        if (ZSTD_isError(result)) return result;
        end += p < shape->key_bytes ? e->records
                                    : e->records - e->tombstones;
    }
    /* The last segment ends with the frame. */
    assert(end == raw_bytes);
    return kv_encoder_feed(e, &in, end, ZSTD_e_end, out);
}

/* The most bytes that the block can take: zstd's own bound, and what each
 * flush may add to it. A block may be cut in front of each of its planes. */
static size_t kv_encoder_bound(const struct kv_encoder *e)
{
    const struct kv_shape *shape = &e->env->shape;
    size_t bound = ZSTD_compressBound((size_t)kv_block_raw_bytes(
        shape, e->records, e->tombstones));

    if (kv_block_has_planes(e->records))
        bound += (size_t)shape->record_bytes * KV_BLOCK_FLUSH_BYTES;
    return bound;
}

/* Encodes the records gathered, and starts an empty block. `to` has room for
 * kv_encoder_bound. After an error the records are still there, but the
 * content of `to` is not defined. Equal records make equal bytes on every
 * machine, as long as zstd is of one version. */
static int kv_block_encode(struct kv_encoder *e, unsigned char *to,
                           size_t *stored_bytes, struct kvmeta_error *err)
{
    size_t raw_bytes = (size_t)kv_block_raw_bytes(&e->env->shape, e->records,
                                                  e->tombstones);
    ZSTD_outBuffer out = {to, kv_encoder_bound(e), 0};
    size_t result;
    int rc;

    assert(e->records > 0);
    assert(raw_bytes <= KV_BLOCK_RAW_MAX);
    rc = kv_encoder_lay_out(e, err);
    if (rc) return rc;
    rc = kv_encoder_open_zstd(e, err);
    if (rc) return rc;
    /* Without planes there is nothing to cut, and zstd does it in one call. */
    if (kv_block_has_planes(e->records)) {
        result = kv_encoder_compress_cut(e, raw_bytes, &out);
    } else {
        result = ZSTD_compress2(e->zstd, to, out.size, e->raw, raw_bytes);
        if (!ZSTD_isError(result)) out.pos = result;
    }
    if (ZSTD_isError(result)) return kv_encoder_fail_zstd(result, err);
    /* Both are what a reader asks for before it unpacks anything (B3). */
    assert(ZSTD_getFrameContentSize(to, out.pos) == raw_bytes);
    assert(out.pos <= KV_BLOCK_STORED_MAX);
    *stored_bytes = out.pos;
    /* From here on nothing can fail; the first key is still in e->keys, where
     * the writer takes it from for the index. */
    e->records = 0;
    e->tombstones = 0;
    return KVMETA_OK;
}

/*
 * --- Decoder ---
 *
 * Bytes with the right sum may still be hostile. What keeps the code inside
 * of its buffers, whatever they say:
 *
 *   records, tombstones   bounded by the index's check; raw and row buffers
 *                         are made for the largest block of the table
 *   the frame's size      what the counts call for, so that zstd cannot write
 *                         more, and leaves nothing behind from another block
 *   bits                  count exactly the tombstones: m values are placed
 *   modes                 known ones, and a carry only where a neighbour is
 *   keys                  any bytes will do, but they must ascend
 *
 * The result has rows, since a merge addresses a record by one place, and a
 * row is what the tree is loaded from.
 */

/*
 * The frame must be one zstd frame, nothing before or behind it, that states
 * the size we expect: zstd itself would skip frames, or take several. Never
 * writes more than raw_bytes. The sum has been right (B2), so that a rule
 * broken here is the fault of a writer, or malice.
 *
 * All of it is unpacked in one go, straight to `raw`: whatever window the
 * frame asks for, nothing is allocated for it. A frame that needs a
 * dictionary fails, since there is none.
 */
static const char *kv_block_decompress(ZSTD_DCtx *zstd,
                                       const unsigned char *stored,
                                       size_t stored_bytes,
                                       unsigned char *raw, size_t raw_bytes)
{
    if (stored_bytes < 4 || kv_load_le32(stored) != ZSTD_MAGICNUMBER)
        return "block is no zstd frame";
    if (ZSTD_getFrameContentSize(stored, stored_bytes) != raw_bytes)
        return "zstd frame states another size";
    if (ZSTD_findFrameCompressedSize(stored, stored_bytes) != stored_bytes)
        return "zstd frame does not fill its block";
    if (ZSTD_decompressDCtx(zstd, raw, raw_bytes, stored, stored_bytes)
        != raw_bytes)
        return "zstd frame is damaged";
    return NULL;
}

/* Are the bits from n up to the end of its last byte zero? */
static bool kv_bits_pad_zero(const unsigned char *bits, size_t n)
{
    return n % 8 == 0 || bits[n / 8] >> (n % 8) == 0;
}

/* The count decides how many values there are, so it must be exact. A pad
 * that is not zero is refused for the same reason as everywhere: one content,
 * one form. */
static const char *kv_block_check_bits(const unsigned char *bits, size_t n,
                                       uint32_t tombstones)
{
    uint32_t count = 0;

    if (tombstones == 0) return NULL;
    for (size_t i = 0; i < n; i++) count += kv_bit_get(bits, i);
    /* Otherwise kv_block_place_values would walk out of the rows. */
    if (count != tombstones) return "tombstones are not as many as stated";
    if (!kv_bits_pad_zero(bits, n)) return "tombstone bits have a pad";
    return NULL;
}

/* (B4). n is above 0. Merging, and loading the tree, rely on it: an unordered
 * block would make a tree in which keys cannot be found, and no sum of
 * records would tell, for those do not depend on the order. Each head is
 * computed once. */
static const char *kv_block_check_order(const struct kv_shape *shape,
                                        const unsigned char *rows, size_t n)
{
    uint64_t head = kv_key_head(shape, rows);

    assert(n > 0);
    for (size_t i = 1; i < n; i++) {
        const unsigned char *row = rows + i * shape->record_bytes;
        uint64_t next = kv_key_head(shape, row);

        if (kv_key_compare(shape, row - shape->record_bytes, head, row, next)
            >= 0)
            return "keys do not ascend";
        head = next;
    }
    return NULL;
}

/* The mode of plane p, of 0..3; that it is one of the modes is for
 * kv_block_check_modes to say. */
static unsigned kv_block_mode(const unsigned char *modes, size_t p)
{
    return modes[p / 4] >> (p % 4 * 2) & 3u;
}

/* Before any plane is decoded: a carry without a neighbour would read outside
 * of the planes. That are the last plane of the key and the first of the
 * value. */
static const char *kv_block_check_modes(const struct kv_shape *shape,
                                        const unsigned char *modes)
{
    size_t planes = shape->record_bytes;

    assert(planes <= KV_SCHEME_PLANES_MAX);
    for (size_t p = 0; p < planes; p++) {
        unsigned mode = kv_block_mode(modes, p);

        if (mode >= KV_PLANE_MODES) return "plane has no such mode";
        if (mode == KV_PLANE_CARRY
            && (p + 1 == shape->key_bytes || p == shape->key_bytes))
            return "plane has no neighbour to carry from";
    }
    for (size_t p = planes; p % 4 != 0; p++)
        if (kv_block_mode(modes, p) != 0) return "plane modes have a pad";
    return NULL;
}

/* Undoes the differences in place: neighbours of lower significance first,
 * that is the keys' planes from the last and the values' from the first,
 * because a carry is taken from the plane as it was before it was encoded.
 * The modes must have been checked. */
static void kv_block_decode_planes(const struct kv_shape *shape,
                                   const unsigned char *modes,
                                   unsigned char *planes, size_t n, size_t m)
{
    unsigned char *value_planes = planes + (size_t)shape->key_bytes * n;

    assert(m <= n);

    /* Big-endian: the last plane, which carries from none, comes first. */
    for (size_t p = shape->key_bytes; p-- > 0;) {
        kv_plane_decode((int)kv_block_mode(modes, p), planes + p * n,
                        kv_scheme_low(shape, planes, p, n, m), n);
    }
    /* Little-endian: the first plane carries from none. */
    for (size_t v = 0; v < shape->value_bytes; v++) {
        size_t p = shape->key_bytes + v;

        kv_plane_decode((int)kv_block_mode(modes, p), value_planes + v * m,
                        kv_scheme_low(shape, planes, p, n, m), m);
    }
}

/* Puts n pieces that stand one after another at the distance of rows. For
 * blocks without planes. */
static void kv_block_spread(const struct kv_shape *shape,
                            const unsigned char *from, size_t n, size_t bytes,
                            unsigned char *rows)
{
    for (size_t i = 0; i < n; i++)
        memcpy(rows + i * shape->record_bytes, from + i * bytes, bytes);
}

/* The m values are in the first m rows: moves each to the row of its key.
 * From the last on: a value never moves to a row in front of its own, so what
 * it overwrites has moved already. The bits must count n - m tombstones. */
static void kv_block_place_values(const struct kv_shape *shape,
                                  const unsigned char *bits, size_t n,
                                  size_t m, unsigned char *rows)
{
    unsigned char *values = rows + shape->key_bytes;

    for (size_t i = n; i-- > 0;) {
        /* A tombstone's row keeps what happens to be there. */
        if (kv_bit_get(bits, i)) continue;
        m--;
        memmove(values + i * shape->record_bytes,
                values + m * shape->record_bytes, shape->value_bytes);
    }
    assert(m == 0);
}

/* Makes rows of the planes or pieces in `body`. A transposition with the
 * roles of rows and columns exchanged is its own inverse; without tombstones
 * keys and values are turned at once, since the planes of both have one
 * length. */
static void kv_block_make_rows(const struct kv_shape *shape,
                               const unsigned char *body,
                               const unsigned char *bits, size_t n, size_t m,
                               unsigned char *rows)
{
    size_t k = shape->key_bytes;
    size_t v = shape->value_bytes;
    size_t stride = shape->record_bytes;

    /* In every case the values of puts come to the first m rows. */
    assert(m <= n);
    if (!kv_block_has_planes(n)) {
        kv_block_spread(shape, body, n, k, rows);
        kv_block_spread(shape, body + n * k, m, v, rows + k);
    } else if (m == n) {
        kv_plane_transpose(body, stride, n, rows, stride);
    } else {
        kv_plane_transpose(body, k, n, rows, stride);
        kv_plane_transpose(body + n * k, v, m, rows + k, stride);
    }
    if (m < n) kv_block_place_values(shape, bits, n, m, rows);
}

/* Checks and decodes a block. raw: room for its raw bytes, and at least 1;
 * rows: room for its rows; may be `stored`, which is done with before.
 * Returns the rule that is broken, or NULL; after a rule the view may have
 * been set, and says nothing. The block must be one that kv_table_check_block
 * has let pass: buffers are made for that. That its first key is the index's
 * is for the caller to check (B4). */
static const char *kv_block_decode(const struct kv_env *env, ZSTD_DCtx *zstd,
                                   uint32_t seed, const struct kv_block *block,
                                   const unsigned char *stored,
                                   unsigned char *raw, unsigned char *rows,
                                   struct kv_block_view *view)
{
    const struct kv_shape *shape = &env->shape;
    size_t n = block->records;
    size_t m = n - block->tombstones;
    size_t raw_bytes = (size_t)kv_block_raw_bytes(shape, n, block->tombstones);
    unsigned char *bits = raw + kv_block_mode_bytes(shape, n);
    unsigned char *body = bits + kv_block_bit_bytes(n, block->tombstones);
    const char *broken;

    assert(n > 0);
    assert(n <= kv_block_records_max(shape));
    assert(block->tombstones <= block->records);
    assert(raw_bytes <= KV_BLOCK_RAW_MAX);
    if (kv_crc_add(&env->crc, seed, stored, block->stored_bytes) != block->crc)
        return "sum of the block is wrong";
    broken = kv_block_decompress(zstd, stored, block->stored_bytes, raw,
                                 raw_bytes);
    if (!broken) broken = kv_block_check_bits(bits, n, block->tombstones);
    if (!broken && kv_block_has_planes(n))
        broken = kv_block_check_modes(shape, raw);
    /* Everything that follows is safe for whatever values the bytes have. */
    if (broken) return broken;
    if (kv_block_has_planes(n)) kv_block_decode_planes(shape, raw, body, n, m);
    kv_block_make_rows(shape, body, bits, n, m, rows);
    view->rows = rows;
    view->bits = block->tombstones ? bits : NULL;
    view->records = block->records;
    return kv_block_check_order(shape, rows, n);
}

/* ==========================================================================
 * Table layout
 *
 * header | blocks | index | footer, without a gap. All sums are CRC32C seeded
 * by the file (kv_crc_file_seed with the salt of the header).
 *
 *   OFFSET SIZE  header                OFFSET SIZE  footer, at the very end
 *        0    8  magic "KVMTAB1"            0    8  magic "KVMTABE"
 *        8    4  version                    8    8  id
 *       12    4  key_bytes                 16    8  records
 *       16    4  value_bytes               24    8  of them tombstones
 *       20    4  zero                      32    8  blocks
 *       24   16  uuid of the store         40    8  bytes of the file
 *       40    8  id of the table           48    8  offset of the index
 *       48   16  salt                      56   16  record sum (lo, hi)
 *       64    4  zero                      72    8  first commit number
 *       68    4  sum over 0..67            80    8  last commit number
 *                                          88    4  sum of the index
 *   OFFSET SIZE  index, for each block     92    4  sum over 0..91
 *        0    8  offset of the block
 *        8    4  stored bytes          The sum of a block is over its stored
 *       12    4  records               bytes. The sum of the index is over
 *       16    4  of them tombstones    all of it, so it covers the sums of
 *       20    4  sum of the block      all blocks; the footer's covers the
 *       24    K  first key             index's, and the manifest has that.
 *
 * The chain of sums is the point of it: manifest -> footer -> index -> blocks.
 * What a table was when the manifest was written cannot change by one byte, be
 * replaced by an older state of the file, or be another store's, without a
 * sum that is wrong. What the manifest holds is stored in the footer a second
 * time, so that the two are compared field by field. The record sum is over
 * what the writer was given, not over what it wrote: it also finds what the
 * encoder did wrong.
 *
 * The index is kept in memory as it is in the file, from open to close: about
 * one entry for 128 KiB of records. Whoever has an open table may call what
 * is here; nothing is locked, and nothing but the writer makes tables.
 *
 *   (Y1) The manifest's size and footer sum fix every byte of a table.
 *   (Y2) Blocks follow one another from the header to the index.
 *   (Y3) First keys ascend strictly, and the last key of a block is below the
 *        first key of the next.
 * ========================================================================== */

enum {
    KV_TABLE_VERSION = 1,
    KV_TABLE_HEADER_BYTES = 72,
    KV_TABLE_UUID_OFF = 24,
    /* Written bytes are synced this often: a large table synced in one go at
     * its end would hold up the syncs of the log meanwhile. Part of no
     * promise: the sync at the end is the one that counts. */
    KV_TABLE_SYNC_BYTES = 2 << 20,
    KV_TABLE_FOOTER_BYTES = 96,
    KV_TABLE_ENTRY_BYTES = 24     /* of the index, in front of the key */
};

#define KV_TABLE_MAGIC 0x00314241544D564Bu        /* "KVMTAB1" */
#define KV_TABLE_FOOTER_MAGIC 0x00454241544D564Bu /* "KVMTABE" */

_Static_assert(KV_TABLE_HEADER_BYTES == 24 + KV_UUID_BYTES + 8 + KV_SALT_BYTES
                                            + 4 + 4,
               "table header");
_Static_assert(KV_TABLE_FOOTER_BYTES == 7 * 8 + 16 + 2 * 8 + 2 * 4,
               "table footer");
_Static_assert(KV_TABLE_ENTRY_BYTES == 8 + 4 * 4, "index entry");

/* What the manifest holds of a table. It has the outcome of the commits
 * seq_first..seq_last; no commit is in two tables of a manifest. */
struct kv_table_meta {
    uint64_t id;                  /* counted together with those of logs */
    uint64_t bytes;               /* of the file */
    uint64_t records;             /* tombstones included; at least 1 */
    uint64_t tombstones;
    uint32_t footer_crc;
    uint64_t seq_first;
    uint64_t seq_last;
};

/* An open table. Immutable; any number of threads may read it. Owns its file
 * and its index; moved by assignment, after which the old one is forgotten. */
struct kv_table {
    struct kv_table_meta meta;
    struct kvmeta_digest sum;     /* over its records, tombstones included */
    struct kv_file file;
    uint32_t seed;                /* of all sums in the file */
    uint32_t index_crc;
    uint64_t index_off;
    size_t blocks;
    size_t entry_bytes;           /* of the index */
    unsigned char *index;         /* as in the file */
    size_t stored_bytes_max;      /* of a block, as stored or as rows */
    size_t raw_bytes_max;
};

/* Of the index. Entries have one width, so that entry i is found without a
 * look at those before it. */
static size_t kv_table_entry_bytes(const struct kv_shape *shape)
{
    return KV_TABLE_ENTRY_BYTES + (size_t)shape->key_bytes;
}

/* Every byte of the header follows from id and salt, so decoding is encoding
 * it again and comparing. header: KV_TABLE_HEADER_BYTES, all of which are
 * written. Returns the seed of the file: of all its sums, that of the header
 * among them. */
static uint32_t kv_table_header_encode(const struct kv_env *env, uint64_t id,
                                       const unsigned char *salt,
                                       unsigned char *header)
{
    uint32_t seed = kv_crc_file_seed(env, KV_FILE_TABLE, id, salt);

    memset(header, 0, KV_TABLE_HEADER_BYTES);
    kv_store_le64(header, KV_TABLE_MAGIC);
    kv_store_le32(header + 8, KV_TABLE_VERSION);
    kv_store_le32(header + 12, env->shape.key_bytes);
    kv_store_le32(header + 16, env->shape.value_bytes);
    memcpy(header + KV_TABLE_UUID_OFF, env->uuid, KV_UUID_BYTES);
    kv_store_le64(header + 40, id);
    memcpy(header + 48, salt, KV_SALT_BYTES);
    kv_store_le32(header + 68, kv_crc_add(&env->crc, seed, header, 68));
    return seed;
}

/* Tells apart why a header is not the one it should be, for the message only:
 * nothing is taken from it but the salt. The id is file->id, the one in the
 * name. *seed is set in any case. */
static int kv_table_header_decode(const struct kv_env *env,
                                  const struct kv_file *file,
                                  const unsigned char *header, uint32_t *seed,
                                  struct kvmeta_error *err)
{
    unsigned char want[KV_TABLE_HEADER_BYTES];
    uint32_t crc;

    *seed = kv_table_header_encode(env, file->id, header + 48, want);
    if (memcmp(header, want, sizeof want) == 0) return KVMETA_OK;
    /* Why not? With a sum that is right it is another format's, or another
     * store's; any other is damaged. */
    crc = kv_crc_add(&env->crc, *seed, header, 68);
    if (kv_load_le64(header) != KV_TABLE_MAGIC)
        return kv_fail_corrupt(err, file, 0, "not a table header");
    if (kv_load_le32(header + 68) != crc)
        return kv_fail_corrupt(err, file, 0, "sum of the header is wrong");
    if (kv_load_le32(header + 8) != KV_TABLE_VERSION)
        return kv_fail(err, KVMETA_E_VERSION, 0,
                       "t%016llx.tab: format %lu is not known",
                       (unsigned long long)file->id,
                       (unsigned long)kv_load_le32(header + 8));
    return kv_fail_corrupt(err, file, 0, "header is of another store");
}

/* footer: KV_TABLE_FOOTER_BYTES, all of which are written. Returns the sum of
 * the footer, which goes into the manifest. */
static uint32_t kv_table_footer_encode(const struct kv_env *env,
                                       const struct kv_table *t,
                                       unsigned char *footer)
{
    uint32_t crc;

    assert(t->file.id == t->meta.id);
    assert(t->meta.tombstones <= t->meta.records);
    assert(t->index_off >= KV_TABLE_HEADER_BYTES);
    assert(t->index_off < t->meta.bytes);
    kv_store_le64(footer, KV_TABLE_FOOTER_MAGIC);
    kv_store_le64(footer + 8, t->meta.id);
    kv_store_le64(footer + 16, t->meta.records);
    kv_store_le64(footer + 24, t->meta.tombstones);
    kv_store_le64(footer + 32, t->blocks);
    kv_store_le64(footer + 40, t->meta.bytes);
    kv_store_le64(footer + 48, t->index_off);
    kv_store_le64(footer + 56, t->sum.lo);
    kv_store_le64(footer + 64, t->sum.hi);
    kv_store_le64(footer + 72, t->meta.seq_first);
    kv_store_le64(footer + 80, t->meta.seq_last);
    kv_store_le32(footer + 88, t->index_crc);
    crc = kv_crc_add(&env->crc, t->seed, footer, 92);
    kv_store_le32(footer + 92, crc);
    return crc;
}

/* Fills in what only the footer knows; what the manifest knows too must be
 * the same. t->meta and t->seed must be there, and the file must be as long
 * as t->meta says. Returns the rule that is broken, or NULL. That sums are
 * right does not mean that sizes are: what the index takes is compared with
 * the file, so that nobody allocates by a number that the file does not bear
 * out. */
static const char *kv_table_footer_decode(const struct kv_env *env,
                                          const unsigned char *footer,
                                          struct kv_table *t)
{
    uint64_t blocks = kv_load_le64(footer + 32);
    uint64_t end = t->meta.bytes - KV_TABLE_FOOTER_BYTES;
    uint32_t crc = kv_crc_add(&env->crc, t->seed, footer, 92);

    assert(t->meta.bytes >= KV_TABLE_HEADER_BYTES + KV_TABLE_FOOTER_BYTES);
    /* Damage and another's footer are told apart in the message only. */
    if (kv_load_le32(footer + 92) != crc) return "sum of the footer is wrong";
    if (crc != t->meta.footer_crc) return "footer is not the manifest's";
    if (kv_load_le64(footer) != KV_TABLE_FOOTER_MAGIC) return "not a footer";
    if (kv_load_le64(footer + 8) != t->meta.id
        || kv_load_le64(footer + 16) != t->meta.records
        || kv_load_le64(footer + 24) != t->meta.tombstones
        || kv_load_le64(footer + 40) != t->meta.bytes
        || kv_load_le64(footer + 72) != t->meta.seq_first
        || kv_load_le64(footer + 80) != t->meta.seq_last)
        return "footer differs from the manifest";
    t->index_off = kv_load_le64(footer + 48);
    if (t->index_off < KV_TABLE_HEADER_BYTES || t->index_off > end)
        return "index is out of the file";
    t->entry_bytes = kv_table_entry_bytes(&env->shape);
    /* By division: a count that lies cannot overflow the product. */
    if ((end - t->index_off) % t->entry_bytes != 0
        || (end - t->index_off) / t->entry_bytes != blocks)
        return "index has not the stated size";
    t->blocks = (size_t)blocks;
    t->sum.lo = kv_load_le64(footer + 56);
    t->sum.hi = kv_load_le64(footer + 64);
    t->index_crc = kv_load_le32(footer + 88);
    return NULL;
}

/* entry: of kv_table_entry_bytes. key: the first of the block. */
static void kv_table_entry_encode(const struct kv_shape *shape,
                                  const struct kv_block *block,
                                  const unsigned char *key,
                                  unsigned char *entry)
{
    kv_store_le64(entry, block->off);
    kv_store_le32(entry + 8, block->stored_bytes);
    kv_store_le32(entry + 12, block->records);
    kv_store_le32(entry + 16, block->tombstones);
    kv_store_le32(entry + 20, block->crc);
    memcpy(entry + KV_TABLE_ENTRY_BYTES, key, shape->key_bytes);
    assert(block->records > 0);
    assert(block->stored_bytes > 0);
}

/* As the index has it: kv_table_check_block says whether it can be so. */
static struct kv_block kv_table_entry_decode(const unsigned char *entry)
{
    struct kv_block block = {
        .off = kv_load_le64(entry),
        .stored_bytes = kv_load_le32(entry + 8),
        .records = kv_load_le32(entry + 12),
        .tombstones = kv_load_le32(entry + 16),
        .crc = kv_load_le32(entry + 20)
    };

    return block;
}

/* ==========================================================================
 * Table reader
 *
 * Opening reads header, footer and index, and checks them against the
 * manifest and the size of the file; blocks are checked as they are read.
 * Nothing is allocated by a count that the size of the file does not bear
 * out.
 *
 * Tables are never read to answer a get, but from end to end: by an open, by
 * compaction, to verify. So there is no cache of blocks, and no way to read a
 * single record.
 *
 * What becomes of a failure is the caller's part. An open that meets damage
 * fails, and changes nothing. A store that is open has all records in memory:
 * a step or kvmeta_verify that meets damage asks for a heal, which writes a
 * new table and drops the damaged one. A read that fails otherwise is tried
 * again with the step.
 *
 * Each step trusts what the one before has shown, and nothing else:
 *
 *   manifest   size and sum of the footer, counts, commits
 *   header     this store, this id; gives the seed of all sums
 *   footer     the one that the manifest means; where the index is
 *   index      all blocks, their sizes, counts and sums; its own sum is in
 *              the footer
 *   block      its sum first, then zstd, then the rules on what is in it,
 *              and where its keys lie among those of the index
 *   all blocks add up to the record sum of the footer (kv_table_verify, and
 *              a writer before it hands a table out); an open and a merge see
 *              the same by the digest and by their balance
 *
 * An open table belongs to db->tables, under the job lock, and is read by
 * whoever holds that; an open reads with many threads. Every failure names
 * the file and an offset: KVMETA_E_CORRUPT for a rule, KVMETA_E_IO for a read
 * that fails. None of it changes the file.
 * ========================================================================== */

/* Entry i of the index, as it is in the file. */
static const unsigned char *kv_table_entry(const struct kv_table *t, size_t i)
{
    assert(i < t->blocks);
    return t->index + i * t->entry_bytes;
}

/* The first key of block i. */
static const unsigned char *kv_table_block_key(const struct kv_table *t,
                                               size_t i)
{
    return kv_table_entry(t, i) + KV_TABLE_ENTRY_BYTES;
}

/* Closes the file and frees the index. Accepts a zeroed one. That no input of
 * it is left is for the caller to know: who holds the job lock does. */
static void kv_table_close(struct kv_env *env, struct kv_table *t)
{
    kv_file_close(env, &t->file);
    kv_free(env, t->index);
    memset(t, 0, sizeof *t);
}

/* Checks what can be said of one block without reading it; off: where the
 * block before it ends (Y2). After NULL the sizes of the block fit in buffers
 * of a bounded size, whatever a hostile file says. Returns the rule that is
 * broken, or NULL. */
static const char *kv_table_check_block(const struct kv_shape *shape,
                                        const struct kv_block *b, uint64_t off)
{
    if (b->off != off) return "block is not behind the one before";
    if (b->stored_bytes == 0) return "block is empty";
    if (b->stored_bytes > KV_BLOCK_STORED_MAX) return "block is too large";
    if (b->records == 0) return "block has no records";
    if (b->tombstones > b->records) return "block has too many tombstones";
    if (b->records > kv_block_records_max(shape))
        return "block has too many records";
    return NULL;
}

/* Walks the index once, and takes the sizes of the largest block. Sums of
 * counts cannot overflow: all of the index is in memory, and each of its
 * blocks has a bounded number of records. Returns the rule that is broken, or
 * NULL. */
static const char *kv_table_check_index(const struct kv_env *env,
                                        struct kv_table *t)
{
    const struct kv_shape *shape = &env->shape;
    uint64_t off = KV_TABLE_HEADER_BYTES;
    uint64_t records = 0, tombstones = 0;

    assert(t->entry_bytes == kv_table_entry_bytes(shape));
    assert(t->index_off >= KV_TABLE_HEADER_BYTES);
    for (size_t i = 0; i < t->blocks; i++) {
        struct kv_block b = kv_table_entry_decode(kv_table_entry(t, i));
        const char *broken = kv_table_check_block(shape, &b, off);

        if (broken) return broken;
        /* (Y3): the binary search of kv_table_find relies on it. */
        if (i > 0 && memcmp(kv_table_block_key(t, i - 1),
                            kv_table_block_key(t, i), shape->key_bytes) >= 0)
            return "first keys do not ascend";
        off += b.stored_bytes;
        records += b.records;
        tombstones += b.tombstones;
        /* One buffer has the stored bytes first, and the rows then. */
        t->stored_bytes_max = (size_t)kv_max(
            t->stored_bytes_max,
            kv_max(b.stored_bytes, (uint64_t)b.records * shape->record_bytes));
        t->raw_bytes_max = (size_t)kv_max(
            t->raw_bytes_max,
                           kv_block_raw_bytes(shape, b.records, b.tombstones));
    }
    /* (Y2): not a byte of the file is left that nothing covers. */
    if (off != t->index_off) return "blocks do not end at the index";
    if (records != t->meta.records) return "records are not as many as stated";
    if (tombstones != t->meta.tombstones)
        return "tombstones are not as many as stated";
    assert(t->stored_bytes_max <= KV_BLOCK_STORED_MAX);
    assert(t->raw_bytes_max <= KV_BLOCK_RAW_MAX);
    return NULL;
}

/* The index is as large as the bytes of the file that it takes, which the
 * footer has been checked for. After an error t->index is the caller's to
 * free. */
static int kv_table_read_index(struct kv_env *env, struct kv_table *t,
                               struct kvmeta_error *err)
{
    uint64_t bytes = t->meta.bytes - KV_TABLE_FOOTER_BYTES - t->index_off;
    const char *broken;
    int rc;

    assert(!t->index);
    assert(t->index_off <= t->meta.bytes - KV_TABLE_FOOTER_BYTES);
    if (bytes > SIZE_MAX / 2) return kv_fail_memory(err, SIZE_MAX);
    assert(bytes == t->blocks * t->entry_bytes);
    t->index = kv_alloc(env, (size_t)kv_max(bytes, 1));
    if (!t->index) return kv_fail_memory(err, (size_t)bytes);
    rc = kv_file_read(env, &t->file, t->index, (size_t)bytes, t->index_off,
                      err);
    if (rc) return rc;
    if (kv_crc_add(&env->crc, t->seed, t->index, (size_t)bytes)
        != t->index_crc)
        return kv_fail_corrupt(err, &t->file, t->index_off,
                               "sum of the index is wrong");
    broken = kv_table_check_index(env, t);
    return broken ? kv_fail_corrupt(err, &t->file, t->index_off, "%s", broken)
                  : KVMETA_OK;
}

/* Fills in *t from its open file and t->meta. Nothing may be allocated in it,
 * and the sizes of its largest block must be 0. The size of the file comes
 * first: one of another length is damaged, whatever is in it. Reads three
 * times: both ends, and the index, whose place the footer tells. After an
 * error t->index may be set, and is the caller's to free. */
static int kv_table_load(struct kv_env *env, struct kv_table *t,
                         struct kvmeta_error *err)
{
    unsigned char header[KV_TABLE_HEADER_BYTES];
    unsigned char footer[KV_TABLE_FOOTER_BYTES];
    const char *broken;
    uint64_t bytes;
    int rc;

    assert(t->file.open);
    assert(t->file.id == t->meta.id);
    assert(!t->index);
    assert(t->stored_bytes_max == 0);
    assert(t->raw_bytes_max == 0);
    rc = kv_file_size(env, &t->file, &bytes, err);
    if (rc) return rc;
    if (bytes != t->meta.bytes)
        return kv_fail_corrupt(err, &t->file, bytes, "ends here, not at %llu",
                               (unsigned long long)t->meta.bytes);
    if (bytes < sizeof header + sizeof footer)
        return kv_fail_corrupt(err, &t->file, bytes, "too short for a table");
    /* A file that grows or shrinks while it is read is not a case: only this
     * store writes here, and never into a table that is listed. */
    rc = kv_file_read(env, &t->file, header, sizeof header, 0, err);
    if (rc) return rc;
    rc = kv_table_header_decode(env, &t->file, header, &t->seed, err);
    if (rc) return rc;
    rc = kv_file_read(env, &t->file, footer, sizeof footer,
                      bytes - sizeof footer, err);
    if (rc) return rc;
    /* The header gave the seed, by its salt; now the footer must be the one
     * that the manifest has the sum of. */
    broken = kv_table_footer_decode(env, footer, t);
    if (broken)
        return kv_fail_corrupt(err, &t->file, bytes - sizeof footer, "%s",
                               broken);
    return kv_table_read_index(env, t, err);
}

/* Opens the table that `meta` describes; *out is to be closed, and is zeroed
 * after an error. A missing file is KVMETA_E_CORRUPT: the manifest lists it.
 * No block is read: an open of the store reads all of them a moment later,
 * and damage that comes after that is found by what reads them then. */
static int kv_table_open(struct kv_env *env, const struct kv_table_meta *meta,
                         struct kv_table *out, struct kvmeta_error *err)
{
    struct kv_table t = {.meta = *meta};
    int rc;

    memset(out, 0, sizeof *out);
    rc = kv_file_open(env, KV_FILE_TABLE, meta->id, 0, &t.file, err);
    /* Another code would tell the caller of kvmeta_open that there is no
     * store. */
    if (rc == KVMETA_NOT_FOUND)
        rc = kv_fail_corrupt(err, &t.file, 0, "missing");
    if (rc) goto done;
    rc = kv_table_load(env, &t, err);
    if (rc) goto done;

    *out = t;                     /* ownership moves here */
    memset(&t, 0, sizeof t);
done:
    kv_table_close(env, &t);
    return rc;
}

/*
 * --- Input ---
 *
 * Which blocks may hold keys of a range is known by their first keys:
 *
 *   first keys    a       f       m       t        four blocks
 *   from = g      kv_table_find gives m: the one before it, f, may hold g
 *   from = f      it gives f: the one before, a, is read in vain
 *   to = m        it gives m, which ends the range: m itself is not in it
 *
 * A block that turns out to have nothing of the range costs its time; what is
 * outside is cut off by kv_merge_fill.
 */

/* The blocks of a table that may hold keys of a range, and so also records
 * outside of it, which the merge cuts off. Has buffers for one block of its
 * own, so that several inputs may read one table; the table must stay open for
 * as long. The rows are over the stored bytes: their address never changes. */
struct kv_table_input {
    struct kv_input base;
    struct kv_job *job;           /* NULL: zeroed, nothing to close */
    const struct kv_table *table; /* the caller's */
    unsigned char *stored;        /* then its rows; allocated with the next */
    unsigned char *raw;
    ZSTD_DCtx *zstd;
    struct kv_block_view view;
    size_t block;                 /* the next to be read */
    size_t block_end;
    size_t at;                    /* the next record of the view */
};

/* Accepts a zeroed one. The table stays open. */
static void kv_table_input_close(struct kv_table_input *s)
{
    if (!s->job) return;
    ZSTD_freeDCtx(s->zstd);
    kv_free(s->job->env, s->stored);
    memset(s, 0, sizeof *s);
}

/* The first block that starts at `key` or above; t->blocks if there is none. */
static size_t kv_table_find(const struct kv_table *t, const unsigned char *key,
                            size_t key_bytes)
{
    size_t low = 0;
    size_t high = t->blocks;

    assert(t->entry_bytes == KV_TABLE_ENTRY_BYTES + key_bytes);
    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (memcmp(kv_table_block_key(t, middle), key, key_bytes) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* (Y3) and (B4), between a decoded block i and the index. With the order
 * within each block this puts all keys of a table in order, though nobody
 * looks at two blocks together. */
static const char *kv_table_check_bounds(const struct kv_env *env,
                                         const struct kv_table *t, size_t i,
                                         const struct kv_block_view *view)
{
    size_t k = env->shape.key_bytes;
    const unsigned char *last = view->rows
        + (view->records - 1) * (size_t)env->shape.record_bytes;

    assert(view->records > 0);
    if (memcmp(view->rows, kv_table_block_key(t, i), k) != 0)
        return "first key is not the index's";
    if (i + 1 < t->blocks && memcmp(last, kv_table_block_key(t, i + 1),
                                    k) >= 0)
        return "last key is not below the next block";
    return NULL;
}

/* Reads and checks the next block, over the one before. Waits for the rate
 * of the job first, and does what is urgent meanwhile. After an error,
 * which may have been found after the block was unpacked, the input can
 * only be closed. */
static int kv_table_input_read(struct kv_table_input *s,
                                struct kvmeta_error *err)
{
    struct kv_env *env = s->job->env;
    const struct kv_table *t = s->table;
    struct kv_block block = kv_table_entry_decode(kv_table_entry(t, s->block));
    const char *broken;
    int rc;

    assert(s->zstd);
    assert(s->block < s->block_end);
    assert(block.stored_bytes <= t->stored_bytes_max);
    assert(block.off + block.stored_bytes <= t->index_off);
    rc = kv_job_pace(s->job, block.stored_bytes);
    if (rc) return rc;
    rc = kv_file_read(env, &t->file, s->stored, block.stored_bytes, block.off,
                      err);
    if (rc) return rc;
    /* The rows are laid over what was read: see kv_block_decode. */
    broken = kv_block_decode(env, s->zstd, t->seed, &block, s->stored, s->raw,
                             s->stored, &s->view);
    if (!broken) broken = kv_table_check_bounds(env, t, s->block, &s->view);
    if (broken) return kv_fail_corrupt(err, &t->file, block.off, "%s", broken);
    assert(s->view.rows == s->base.rows);
    assert(s->view.records == block.records);
    s->block++;
    s->at = 0;
    return KVMETA_OK;
}

/* The items of what is left of the block at hand, or of the next one: never
 * of two blocks, for they share their rows. Several fills may be of one
 * block; the rows stay as they are between them. */
static int kv_table_input_fill(struct kv_input *base, struct kv_item *items,
                               size_t *n, struct kvmeta_error *err)
{
    struct kv_table_input *s = (struct kv_table_input *)base;
    const struct kv_shape *shape = &s->job->env->shape;
    const unsigned char *row;

    assert(s->at <= s->view.records);
    if (s->at == s->view.records) {
        int rc;

        if (s->block >= s->block_end) return KV_END;
        rc = kv_table_input_read(s, err);
        if (rc) return rc;
    }
    /* A block of narrow records has tens of times as many: bounded, so that
     * windows need not be as large as blocks. */
    *n = (size_t)kv_min(KV_INPUT_ITEMS, s->view.records - s->at);
    assert(*n > 0);
    row = s->view.rows + s->at * shape->record_bytes;
    for (size_t i = 0; i < *n; i++) {
        items[i].head = kv_key_head(shape, row);
        items[i].place = (uint32_t)s->at;
        items[i].mark = s->view.bits && kv_bit_get(s->view.bits, s->at);
        s->at++;
        row += shape->record_bytes;
    }
    return KVMETA_OK;
}

/* Buffers are as large as the largest block of this table, no larger. After
 * an error the input is to be closed. */
static int kv_table_input_alloc(struct kv_table_input *s,
                                 struct kvmeta_error *err)
{
    struct kv_env *env = s->job->env;
    size_t raw_bytes = s->table->raw_bytes_max + 1;
    size_t bytes = s->table->stored_bytes_max + raw_bytes;

    assert(!s->stored);
    assert(s->table->stored_bytes_max > 0);
    s->stored = kv_alloc(env, bytes);
    if (!s->stored) return kv_fail_memory(err, bytes);
    s->raw = s->stored + s->table->stored_bytes_max;
    s->base.rows = s->stored;
    s->base.unit = env->shape.record_bytes;
    s->zstd = ZSTD_createDCtx_advanced(kv_zstd_memory(env));
    if (s->zstd) return KVMETA_OK;
    return kv_fail(err, KVMETA_E_NOMEM, ENOMEM, "no memory to decompress");
}

/* from, to: NULL is without a bound; the keys are looked at here only. The
 * block before the first that starts at `from` or above may hold `from`. A
 * range without blocks takes no memory. After an error there is nothing to
 * close. */
static int kv_table_input_open(struct kv_job *job, const struct kv_table *t,
                               const unsigned char *from,
                               const unsigned char *to,
                               struct kv_table_input *s,
                               struct kvmeta_error *err)
{
    size_t key_bytes = job->env->shape.key_bytes;
    int rc;

    memset(s, 0, sizeof *s);
    s->base.fill = kv_table_input_fill;
    s->job = job;
    s->table = t;
    s->block = from ? kv_table_find(t, from, key_bytes) : 0;
    if (s->block > 0) s->block--;
    /* A block that starts at `to` or above has nothing below it. */
    s->block_end = to ? kv_table_find(t, to, key_bytes) : t->blocks;
    assert(s->block_end <= t->blocks);
    if (s->block >= s->block_end) return KVMETA_OK;
    rc = kv_table_input_alloc(s, err);
    if (rc) kv_table_input_close(s);
    return rc;
}

/*
 * --- Verification ---
 *
 * For kvmeta_verify, and for each table that has just been written. Takes the
 * same way as a merge, so that what passes here can be merged.
 */
/* Adds the records of a block to *sum, as a writer does: tombstones have sums
 * of their own. */
static void kv_block_sum(const struct kv_shape *shape,
                         const struct kv_block_view *view,
                         struct kvmeta_digest *sum)
{
    for (size_t i = 0; i < view->records; i++) {
        const unsigned char *row = view->rows + i * shape->record_bytes;
        bool tombstone = view->bits && kv_bit_get(view->bits, i);

        kv_digest_add(sum, kv_digest_record(
                               shape, row,
                               tombstone ? NULL : row + shape->key_bytes));
    }
}

/* Reads all records and compares their sum with the footer's: finds records
 * that were lost, doubled or changed before the sums of their blocks were
 * made. Their number is that of the index, which has been compared. Goes from
 * block to block, without the merge: nothing is to be sorted or cut off.
 * KV_STOPPED if the job is. */
static int kv_table_check_records(struct kv_job *job, const struct kv_table *t,
                                  struct kvmeta_error *err)
{
    const struct kv_shape *shape = &job->env->shape;
    struct kv_table_input s;
    struct kvmeta_digest sum = {0, 0};
    int rc = kv_table_input_open(job, t, NULL, NULL, &s, err);

    if (rc) return rc;
    while (s.block < s.block_end) {
        rc = kv_table_input_read(&s, err);
        if (rc) break;
        kv_block_sum(shape, &s.view, &sum);
    }
    kv_table_input_close(&s);
    if (rc) return rc;
    if (!kv_digest_equal(sum, t->sum))
        return kv_fail_corrupt(err, &t->file, KV_TABLE_HEADER_BYTES,
                               "record sum is wrong");
    return KVMETA_OK;
}

/* Checks every byte, as it is in the file now: what `t` has in memory is used
 * for nothing but its file and what the manifest said. The file is lent: it
 * stays open, and stays t's. Job lock held. */
static int kv_table_verify(struct kv_job *job, const struct kv_table *t,
                           struct kvmeta_error *err)
{
    /* Never closed: its file is t's. Only its index is its own. */
    struct kv_table again = {.meta = t->meta, .file = t->file};
    int rc = kv_table_load(job->env, &again, err);

    if (!rc) rc = kv_table_check_records(job, &again, err);
    kv_free(job->env, again.index);
    return rc;
}

/* ==========================================================================
 * Table writer
 *
 * Writes one table front to back, syncs it, and reads all of it back before
 * it hands it out. The file has its final name from the start; until the
 * manifest lists it, it is garbage that the next open deletes. The sync of
 * the directory is the caller's.
 *
 *   open -> add, add, ... -> finish        a table, open and on disk
 *     |         |              |
 *     +---------+--------------+--> abort  no file is left
 *
 * abort may follow any of them, and does nothing after a finish that went
 * well, so that a caller has one way out. Of no records there is no table:
 * whoever has added none aborts. A temporary name and a rename would
 * protect nothing: what a table is worth is up to the manifest alone.
 *
 * A crash before the swap leaves the file with whatever had been written: the
 * next open deletes it, unless its header says that it is of another store. A
 * crash after it finds all of the file, since it was synced before. Reading
 * back cannot show whether the disk has the bytes, or only the cache: that is
 * up to the sync alone.
 *
 * A writer belongs to one thread, that of its job. It needs memory for one
 * block and its output, and for the index.
 * ========================================================================== */

enum { KV_TABLE_OUT_BYTES = 64 * 1024 }; /* so many are written at once */

/*
 * A table on its way to disk. What the footer will state is counted as
 * records are added, from the caller's bytes.
 *
 *   file   | header, blocks ...             |
 *   out                                     | whole blocks | room |
 *                                        out_off   + out_bytes
 *
 * Blocks are encoded at the end of `out`, which is written as a whole once it
 * has KV_TABLE_OUT_BYTES or more. Index entries are gathered apart, and
 * follow when the last block is known. The memory is the writer's; the file
 * is its to unlink while `created` is set.
 */
struct kv_table_writer {
    struct kv_job *job;
    struct kv_file file;
    bool created;                 /* and not handed out: to be unlinked */
    uint32_t seed;
    uint64_t records;
    uint64_t tombstones;
    struct kvmeta_digest sum;
    struct kv_encoder encoder;
    uint64_t out_off;             /* where `out` goes in the file */
    uint64_t unsynced_bytes;      /* written since the last sync */
    size_t out_bytes;             /* in `out`, not yet written */
    size_t out_cap;
    unsigned char *out;
    size_t blocks;                /* encoded, and in the index */
    size_t index_cap;             /* in blocks */
    unsigned char *index;         /* as it is going to be in the file */
};

/* Gives the memory back, but leaves the file and the sums. */
static void kv_table_writer_free(struct kv_table_writer *w)
{
    struct kv_env *env = w->job->env;

    kv_encoder_free(&w->encoder);
    kv_free(env, w->out);
    kv_free(env, w->index);
    w->out = NULL;
    w->index = NULL;
}

/* Closes and unlinks. Accepts a finished writer, which has nothing left to
 * give up, and one whose open has failed. That the unlinking may fail is no
 * matter: nothing lists the file. */
static void kv_table_writer_abort(struct kv_table_writer *w)
{
    assert(w->created || !w->file.open);
    assert(!w->created || w->file.open);
    kv_table_writer_free(w);
    kv_file_close(w->job->env, &w->file);
    /* Nobody can have it open: no manifest, and so no table, names it. */
    if (w->created)
        (void)kv_file_unlink(w->job->env, KV_FILE_TABLE, w->file.id, NULL);
    w->created = false;
}

/* Makes room for `bytes` more in the output. It may move: pointers into it
 * are to be taken afterwards. */
static int kv_table_writer_reserve(struct kv_table_writer *w, size_t bytes,
                                   struct kvmeta_error *err)
{
    return kv_grow(w->job->env, (void **)&w->out, &w->out_cap,
                   w->out_bytes + bytes, 1, err);
}

/* Writes what has been gathered, and keeps to the rate. Syncs now and then,
 * which is for the log's sake (KV_TABLE_SYNC_BYTES): what makes the table
 * durable is the sync at its end. After an error the file can only be thrown
 * away. */
static int kv_table_writer_write(struct kv_table_writer *w,
                                 struct kvmeta_error *err)
{
    /* Before the write: a stopped job has written less. */
    int rc = kv_job_pace(w->job, w->out_bytes);

    assert(w->out_bytes <= w->out_cap);
    if (rc) return rc;
    rc = kv_file_write(w->job->env, &w->file, w->out, w->out_bytes, w->out_off,
                       err);
    if (rc) return rc;
    w->out_off += w->out_bytes;
    w->unsynced_bytes += w->out_bytes;
    w->out_bytes = 0;
    if (w->unsynced_bytes < KV_TABLE_SYNC_BYTES) return KVMETA_OK;
    w->unsynced_bytes = 0;
    return kv_file_sync(w->job->env, &w->file, err);
}

/* Appends bytes that exist already: header, index and footer. Blocks are
 * encoded in place. Goes in pieces, so that an index of any size needs no
 * room in the output. Keeps, as all of the writer does, less than
 * KV_TABLE_OUT_BYTES in the output when it returns OK. */
static int kv_table_writer_put(struct kv_table_writer *w,
                               const unsigned char *bytes, size_t n,
                               struct kvmeta_error *err)
{
    assert(w->out_bytes < KV_TABLE_OUT_BYTES);
    while (n > 0) {
        size_t part = (size_t)kv_min(n, KV_TABLE_OUT_BYTES);
        int rc = kv_table_writer_reserve(w, part, err);

        if (rc) return rc;
        memcpy(w->out + w->out_bytes, bytes, part);
        w->out_bytes += part;
        bytes += part;
        n -= part;
        if (w->out_bytes < KV_TABLE_OUT_BYTES) continue;
        rc = kv_table_writer_write(w, err);
        if (rc) return rc;
    }
    return KVMETA_OK;
}

/* Ids are never used twice: a file that is there already is an error. From
 * created on, the file is this writer's to unlink; before, it may be
 * anybody's. The salt is asked for first, for nothing is to be undone if
 * there is none. The header is put out, not written: that comes with the
 * first blocks. */
static int kv_table_writer_create(struct kv_table_writer *w, uint64_t id,
                                  struct kvmeta_error *err)
{
    struct kv_env *env = w->job->env;
    unsigned char header[KV_TABLE_HEADER_BYTES];
    unsigned char salt[KV_SALT_BYTES];
    int rc = kv_random(env, salt, sizeof salt, err);

    if (!rc)
        rc = kv_file_open(env, KV_FILE_TABLE, id, KVMETA_VFS_WRITE
                          | KVMETA_VFS_CREATE | KVMETA_VFS_EXCL, &w->file, err);
    /* Nothing is left if one of the two has failed. */
    if (rc) return rc;
    w->created = true;
    w->seed = kv_table_header_encode(env, id, salt, header);
    return kv_table_writer_put(w, header, sizeof header, err);
}

/* After an error no file is left, and nothing is to be aborted. */
static int kv_table_writer_open(struct kv_job *job, uint64_t id,
                                struct kv_table_writer *w,
                                struct kvmeta_error *err)
{
    int rc;

    memset(w, 0, sizeof *w);
    w->job = job;
    kv_encoder_init(&w->encoder, job->env, job->zstd_level);
    rc = kv_table_writer_create(w, id, err);
    if (rc) kv_table_writer_abort(w);
    return rc;
}

/* Encodes the records gathered as a block, and enters it in the index. There
 * must be at least one. The sum is made here, right behind the encoder, so
 * that it covers as much of the way as it can. */
static int kv_table_writer_end_block(struct kv_table_writer *w,
                                     struct kvmeta_error *err)
{
    struct kv_env *env = w->job->env;
    struct kv_encoder *e = &w->encoder;
    size_t entry_bytes = kv_table_entry_bytes(&env->shape);
    struct kv_block block = {
        .off = w->out_off + w->out_bytes,
        .records = e->records,
        .tombstones = e->tombstones
    };
    unsigned char *to;
    size_t stored_bytes = 0;
    int rc;

    assert(e->records > 0);
    assert(w->out_bytes < KV_TABLE_OUT_BYTES);
    rc = kv_grow(env, (void **)&w->index, &w->index_cap, w->blocks + 1,
                 entry_bytes, err);
    if (rc) return rc;
    /* Straight into the output: the room must be there before. */
    rc = kv_table_writer_reserve(w, kv_encoder_bound(e), err);
    if (rc) return rc;
    assert(w->out_cap - w->out_bytes >= kv_encoder_bound(e));
    to = w->out + w->out_bytes;
    rc = kv_block_encode(e, to, &stored_bytes, err);
    if (rc) return rc;
    assert(stored_bytes <= KV_BLOCK_STORED_MAX);
    /* At most KV_BLOCK_STORED_MAX. */
    block.stored_bytes = (uint32_t)stored_bytes;
    block.crc = kv_crc_add(&env->crc, w->seed, to, stored_bytes);
    assert(w->blocks < w->index_cap);
    kv_table_entry_encode(&env->shape, &block, e->keys,
                          w->index + w->blocks * entry_bytes);
    w->blocks++;
    w->out_bytes += stored_bytes;
    return w->out_bytes < KV_TABLE_OUT_BYTES ? KVMETA_OK
                                             : kv_table_writer_write(w, err);
}

/* Keys ascend strictly (S1). value NULL: a tombstone. Where value_bytes is 0,
 * any other pointer is a put. A block is ended only when the next record
 * arrives, so the last key is always there to compare with. After an error the
 * writer can only be aborted. */
static int kv_table_writer_add(struct kv_table_writer *w, const void *key,
                               const void *value, struct kvmeta_error *err)
{
    const struct kv_shape *shape = &w->job->env->shape;
    struct kv_encoder *e = &w->encoder;
    int rc;

    assert(w->created);
    assert(e->records > 0 || w->records == 0);
    assert(e->records == 0
           || memcmp(e->keys + (size_t)(e->records - 1) * shape->key_bytes, key,
                     shape->key_bytes) < 0);
    if (KV_UNLIKELY(kv_encoder_full(e))) {
        rc = kv_table_writer_end_block(w, err);
        if (rc) return rc;
    }
    rc = kv_encoder_add(e, key, value, err);
    if (rc) return rc;
    kv_digest_add(&w->sum, kv_digest_record(shape, key, value));
    w->records++;
    if (!value) w->tombstones++;
    return KVMETA_OK;
}

/* The last block, index and footer; fills in *t but for its file. Sizes and
 * sums are computed before anything of it is written, for the footer states
 * them. Without a sync: that is the caller's. */
static int kv_table_writer_end(struct kv_table_writer *w, struct kv_table *t,
                               struct kvmeta_error *err)
{
    struct kv_env *env = w->job->env;
    unsigned char footer[KV_TABLE_FOOTER_BYTES];
    size_t index_bytes;
    int rc;

    assert(w->encoder.records > 0);      /* the last one is always there */
    rc = kv_table_writer_end_block(w, err);
    if (rc) return rc;
    /* Where things are is known now: the index is behind what was put out so
     * far. */
    index_bytes = w->blocks * kv_table_entry_bytes(&env->shape);
    assert(w->blocks > 0);
    assert(w->records >= w->blocks);
    t->meta.records = w->records;
    t->meta.tombstones = w->tombstones;
    t->sum = w->sum;
    t->seed = w->seed;
    t->blocks = w->blocks;
    t->index_off = w->out_off + w->out_bytes;
    t->meta.bytes = t->index_off + index_bytes + sizeof footer;
    t->index_crc = kv_crc_add(&env->crc, w->seed, w->index, index_bytes);
    t->meta.footer_crc = kv_table_footer_encode(env, t, footer);
    rc = kv_table_writer_put(w, w->index, index_bytes, err);
    if (rc) return rc;
    rc = kv_table_writer_put(w, footer, sizeof footer, err);
    if (!rc) rc = kv_table_writer_write(w, err);
    assert(rc || w->out_off == t->meta.bytes);
    return rc;
}

/*
 * Completes the table, and moves it, open, to *out. What is read back must be
 * what was added: the count and the sum of the records were taken from the
 * caller's own bytes, so that an error of the encoder, of memory, or of the
 * disk does not outlive this function.
 *
 * The file is on disk then, its name is not: the caller syncs the directory
 * before it swaps (S2). After an error the writer can only be aborted; *out
 * is zeroed.
 */
static int kv_table_writer_finish(struct kv_table_writer *w,
                                  uint64_t seq_first, uint64_t seq_last,
                                  struct kv_table *out,
                                  struct kvmeta_error *err)
{
    struct kv_table t = {
        .meta = {.id = w->file.id, .seq_first = seq_first,
                 .seq_last = seq_last},
        .file = w->file
    };
    int rc;

    assert(w->created);
    assert(seq_first <= seq_last);
    assert(w->tombstones <= w->records);
    memset(out, 0, sizeof *out);
    rc = kv_table_writer_end(w, &t, err);
    if (rc) return rc;
    /* Reading back needs buffers of its own: those of writing go first. */
    kv_table_writer_free(w);
    if (!KV_MUTANT(12)) rc = kv_file_sync(w->job->env, &w->file, err);
    if (rc) return rc;
    /* As an open would do it: of `t` only meta and file count, the rest is
     * read anew. */
    rc = kv_table_load(w->job->env, &t, err);
    if (!rc) rc = kv_table_check_records(w->job, &t, err);
    /* The file is still the writer's: abort closes and unlinks it. */
    if (rc) {
        kv_free(w->job->env, t.index);
        return rc;
    }
    assert(kv_digest_equal(t.sum, w->sum));
    assert(t.meta.records == w->records);
    assert(t.file.open);
    *out = t;                     /* ownership moves here */
    w->file.open = false;
    w->created = false;
    return KVMETA_OK;
}

/* ==========================================================================
 * Log frames
 *
 * The one place that knows the bytes of a log; the tables stand in the head
 * of this file. Encoding and decoding are neighbours. Carries (L1): a frame
 * is valid at one offset of one log of one store only, because its sums are
 * seeded by the file and its header holds its own offset.
 *
 * What each field of a frame is there for:
 *
 *   pos, seeds   a frame of a file that had these sectors before, or of a
 *                log with the same id in an earlier life, is no frame (L1)
 *   prev         frames form a chain: one that is missing, doubled or left
 *                from an older attempt breaks it
 *   seq          commits are numbered without a gap, across logs and tables
 *   durable      a witness of earlier syncs, for the next open (R2)
 *   digest       the state after it, which an open computes anew (P2)
 *   bcrc, hcrc   apart, so that a header whose body is torn can still be a
 *                witness; hcrc covers bcrc, and so names the whole frame
 *
 * An entry says what a record is afterwards, not what was done to it: whether
 * it was a put, a swap, or part of a conditional batch does not matter to a
 * replay, and entries that were replayed twice would change nothing. What did
 * not change anything, the removal of an absent key, is not logged.
 *
 * What a commit costs: a put of 8 + 8 bytes takes a slot of 24, and with the
 * header a frame of 88. Synced it takes 512 with the default align, which is
 * what concurrent commits share.
 *
 * Frames have no end mark, and zeros are no frame: behind the last one there
 * may be anything, and the chain decides what counts. The first frame's prev
 * is the sum of the log's header.
 *
 * Nothing here does I/O or takes a lock: writer and replay call with bytes.
 * ========================================================================== */

enum {
    KV_LOG_VERSION = 1,
    KV_LOG_HEADER_BYTES = 128,
    KV_LOG_UUID_OFF = 16,
    KV_LOG_ALIGN_MAX = 65536,     /* of log_align, and of a header's pad */
    KV_FRAME_BYTES = 64,
    /* A whole word: keys start at multiples of 8 (kv_run_input_init). */
    KV_ENTRY_BYTES = 8,           /* op and zeros in front of an entry */
    KV_ENTRY_PUT = 1,
    KV_ENTRY_REMOVE = 2,
    /* Which of the two it is decides where the frame ends. */
    KV_FRAME_SYNCED = 0x5366764B, /* "KvfS": padded to log_align */
    KV_FRAME_PLAIN = 0x5066764B   /* "KvfP": padded to 8 */
};

#define KV_LOG_MAGIC 0x0031474F4C4D564Bu /* "KVMLOG1" */

_Static_assert(KV_LOG_HEADER_BYTES == 8 + 2 * 4 + KV_UUID_BYTES + 8
                                          + KV_SALT_BYTES + 4 * 4 + 8 + 16 + 28
                                          + 4,
               "log header");
_Static_assert(KV_FRAME_BYTES == 2 * 4 + 3 * 8 + 16 + 4 * 4, "frame header");
_Static_assert(KV_LOG_HEADER_BYTES % 8 == 0 && KV_FRAME_BYTES % 8 == 0
                   && KV_ENTRY_BYTES % 8 == 0,
               "keys start at multiples of 8");
_Static_assert((KV_LOG_ALIGN_MAX & (KV_LOG_ALIGN_MAX - 1)) == 0,
               "the largest align is one");

/*
 * What is fixed for a log when it is made. align and slot_bytes are stored
 * though the options and the widths give them: a store may be opened with
 * another log_align than the one that its logs were written with.
 */
struct kv_log_head {
    uint64_t id;
    unsigned char salt[KV_SALT_BYTES]; /* random, another for each file */
    uint32_t align;               /* a power of two, 8..KV_LOG_ALIGN_MAX */
    uint32_t slot_bytes;          /* of an entry with its pad */
    uint64_t first_seq;           /* of its first batch */
    struct kvmeta_digest digest;  /* of the records before its first batch */
    uint32_t seed;                /* of its sums */
    uint32_t crc;                 /* of the header; the first frame's prev */
};

/* The header of a frame. As decoded, its sum is right and its place is; the
 * other fields are what the file says, for the replay to judge. */
struct kv_frame {
    bool synced;                  /* padded to align, else to 8 */
    uint32_t entries;
    uint64_t pos;
    uint64_t seq;                 /* of the first batch */
    uint64_t durable;             /* offset, <= pos: synced before */
    struct kvmeta_digest digest;  /* of all records, after this frame */
    uint32_t prev;                /* hcrc of the frame before */
    uint32_t batches;             /* <= entries; 0 if these are */
    uint32_t bcrc;                /* over entries and pad */
    uint32_t hcrc;                /* over the header before it */
};

/* Slots are of one width, so that no entry states its length: there is no
 * length that could be wrong. */
static uint32_t kv_log_slot_bytes(const struct kv_shape *shape)
{
    return (uint32_t)kv_align_up(KV_ENTRY_BYTES + shape->record_bytes, 8);
}

/* Offset of the first frame: the header has whole sectors to itself, so that
 * no frame is ever written into one of them (W1). */
static uint64_t kv_log_first(uint32_t align)
{
    assert(align >= 8);
    assert(align <= KV_LOG_ALIGN_MAX);
    return kv_align_up(KV_LOG_HEADER_BYTES, align);
}

/* End of a frame with `entries` entries that starts at `pos`. Cannot
 * overflow: an entry takes less than 2^17 bytes, and their number has 32
 * bits. */
static uint64_t kv_frame_end(const struct kv_log_head *head, uint64_t pos,
                             uint64_t entries, bool synced)
{
    uint64_t end = pos + KV_FRAME_BYTES + entries * head->slot_bytes;

    assert(entries <= UINT32_MAX);
    assert(pos % 8 == 0);
    assert(head->slot_bytes % 8 == 0);
    return synced ? kv_align_up(end, head->align) : end;
}

/* The sum covers the whole block but for itself: the pad, too. bytes: of the
 * block, kv_log_first of its align. */
static uint32_t kv_log_head_crc(const struct kv_env *env, uint32_t seed,
                                const unsigned char *block, size_t bytes)
{
    uint32_t crc = kv_crc_add(&env->crc, seed, block, KV_LOG_HEADER_BYTES - 4);

    assert(bytes >= KV_LOG_HEADER_BYTES);
    return kv_crc_add(&env->crc, crc, block + KV_LOG_HEADER_BYTES,
                      bytes - KV_LOG_HEADER_BYTES);
}

/* block: kv_log_first(head->align) bytes. Sets head->seed and head->crc. The
 * other fields of the head, the salt among them, must be there already. */
static void kv_log_head_encode(const struct kv_env *env,
                               struct kv_log_head *head, unsigned char *block)
{
    size_t bytes = (size_t)kv_log_first(head->align);

    assert(head->slot_bytes == kv_log_slot_bytes(&env->shape));
    memset(block, 0, bytes);
    kv_store_le64(block, KV_LOG_MAGIC);
    kv_store_le32(block + 8, KV_LOG_VERSION);
    kv_store_le32(block + 12, head->align);
    memcpy(block + KV_LOG_UUID_OFF, env->uuid, KV_UUID_BYTES);
    kv_store_le64(block + 32, head->id);
    memcpy(block + 40, head->salt, KV_SALT_BYTES);
    kv_store_le32(block + 56, env->shape.key_bytes);
    kv_store_le32(block + 60, env->shape.value_bytes);
    kv_store_le32(block + 64, head->slot_bytes);
    kv_store_le64(block + 72, head->first_seq);
    kv_store_le64(block + 80, head->digest.lo);
    kv_store_le64(block + 88, head->digest.hi);
    head->seed = kv_crc_file_seed(env, KV_FILE_LOG, head->id, head->salt);
    head->crc = kv_log_head_crc(env, head->seed, block, bytes);
    kv_store_le32(block + 124, head->crc);
}

/* As kv_log_head_decode, but whatever the version and the widths are: NULL
 * says that it is the header of a log with this id, of the store with env's
 * uuid. The width of the pad decides how far the sum goes, so align is checked
 * before it is believed. */
static const char *kv_log_head_sum(const struct kv_env *env, uint64_t id,
                                   const unsigned char *block, uint64_t bytes,
                                   struct kv_log_head *head)
{
    uint32_t align;

    memset(head, 0, sizeof *head);
    if (bytes < KV_LOG_HEADER_BYTES) return "shorter than a log header";
    if (kv_load_le64(block) != KV_LOG_MAGIC) return "not a log header";
    align = kv_load_le32(block + 12);
    if (align < 8 || align > KV_LOG_ALIGN_MAX || (align & (align - 1)) != 0)
        return "log header: align out of range";
    /* The whole block must be there: its pad is under the sum. */
    if (bytes < kv_log_first(align)) return "shorter than a log header";

    head->id = id;
    head->align = align;
    memcpy(head->salt, block + 40, KV_SALT_BYTES);
    head->slot_bytes = kv_load_le32(block + 64);
    head->first_seq = kv_load_le64(block + 72);
    head->digest.lo = kv_load_le64(block + 80);
    head->digest.hi = kv_load_le64(block + 88);
    head->seed = kv_crc_file_seed(env, KV_FILE_LOG, id, head->salt);
    head->crc = kv_load_le32(block + 124);
    if (kv_log_head_crc(env, head->seed, block, (size_t)kv_log_first(align))
        != head->crc)
        return "log header: crc";
    return NULL;
}

/*
 * Returns the broken rule, or NULL. `bytes` are there from the start of the
 * file; id is the one in the file's name, and enters the seed: a log under
 * another log's name has a wrong sum. So uuid, id and widths are not compared
 * one by one: the sum binds the block to one store, whose widths never
 * change. Only the width of a slot is, since places are computed from it.
 * After a rule, *head is not to be used.
 */
static const char *kv_log_head_decode(const struct kv_env *env, uint64_t id,
                                      const unsigned char *block,
                                      uint64_t bytes, struct kv_log_head *head)
{
    const char *rule = kv_log_head_sum(env, id, block, bytes, head);

    if (rule) return rule;
    /* After the sum, since these are no damage but another program's. */
    if (kv_load_le32(block + 8) != KV_LOG_VERSION)
        return "log header: version";
    if (head->slot_bytes != kv_log_slot_bytes(&env->shape))
        return "log header: widths";
    return NULL;
}

/* frame: KV_FRAME_BYTES. Sets f->hcrc. f->bcrc must be there: the body is
 * summed first. */
static void kv_frame_encode(const struct kv_env *env, uint32_t seed,
                            struct kv_frame *f, unsigned char *frame)
{
    assert(f->pos % 8 == 0);
    assert(f->durable <= f->pos);
    assert(f->batches <= f->entries);
    kv_store_le32(frame, f->synced ? KV_FRAME_SYNCED : KV_FRAME_PLAIN);
    kv_store_le32(frame + 4, f->entries);
    kv_store_le64(frame + 8, f->pos);
    kv_store_le64(frame + 16, f->seq);
    kv_store_le64(frame + 24, f->durable);
    kv_store_le64(frame + 32, f->digest.lo);
    kv_store_le64(frame + 40, f->digest.hi);
    kv_store_le32(frame + 48, f->prev);
    kv_store_le32(frame + 52, f->batches);
    kv_store_le32(frame + 56, f->bcrc);
    f->hcrc = kv_crc_add(&env->crc, seed, frame, KV_FRAME_BYTES - 4);
    kv_store_le32(frame + 60, f->hcrc);
}

/* Is this the header of a frame that was written at `pos` of this log? The
 * cheap tests come first, because the search for evidence asks at every
 * multiple of 8. *f is to be used only after true. */
static bool kv_frame_decode(const struct kv_env *env, uint32_t seed,
                            const unsigned char *frame, uint64_t pos,
                            struct kv_frame *f)
{
    uint32_t magic = kv_load_le32(frame);

    if (magic != KV_FRAME_SYNCED && magic != KV_FRAME_PLAIN) return false;
    f->synced = magic == KV_FRAME_SYNCED;
    f->entries = kv_load_le32(frame + 4);
    f->pos = kv_load_le64(frame + 8);
    if (f->pos != pos) return false;
    f->seq = kv_load_le64(frame + 16);
    f->durable = kv_load_le64(frame + 24);
    f->digest.lo = kv_load_le64(frame + 32);
    f->digest.hi = kv_load_le64(frame + 40);
    f->prev = kv_load_le32(frame + 48);
    f->batches = kv_load_le32(frame + 52);
    f->bcrc = kv_load_le32(frame + 56);
    f->hcrc = kv_load_le32(frame + 60);
    return kv_crc_add(&env->crc, seed, frame, KV_FRAME_BYTES - 4) == f->hcrc;
}

/* entry: slot bytes, all of which are written. value NULL: a removal, which
 * takes as much room as a put. */
static void kv_entry_encode(const struct kv_shape *shape, size_t slot_bytes,
                            const void *key, const void *value,
                            unsigned char *entry)
{
    size_t used = KV_ENTRY_BYTES + shape->key_bytes;

    assert(slot_bytes >= KV_ENTRY_BYTES + shape->record_bytes);
    assert(slot_bytes % 8 == 0);
    kv_store_le64(entry, value ? KV_ENTRY_PUT : KV_ENTRY_REMOVE);
    kv_copy(entry + KV_ENTRY_BYTES, key, shape->key_bytes);
    if (value) {
        kv_copy(entry + used, value, shape->value_bytes);
        used += shape->value_bytes;
    }
    if (used < slot_bytes) memset(entry + used, 0, slot_bytes - used);
}

/* Also for pads of up to a whole sector, and for no bytes at all. */
static bool kv_is_zero(const unsigned char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i]) return false;
    return true;
}

/* Returns the broken rule, or NULL. Whatever the entry does not use must be
 * zero: each state of the records has one form on disk, and no byte of a
 * frame is free to differ. */
static const char *kv_entry_check(const struct kv_shape *shape,
                                  size_t slot_bytes,
                                  const unsigned char *entry)
{
    size_t used = KV_ENTRY_BYTES + shape->key_bytes;
    uint64_t op = kv_load_le64(entry);

    assert(slot_bytes >= KV_ENTRY_BYTES + shape->record_bytes);
    if (op != KV_ENTRY_PUT && op != KV_ENTRY_REMOVE) return "unknown operation";
    if (op == KV_ENTRY_PUT) used += shape->value_bytes;
    if (!kv_is_zero(entry + used, slot_bytes - used)) return "pad not zero";
    return NULL;
}

/* ==========================================================================
 * Log writer
 *
 * Appends frames to the live log. Only the holder of the commit right calls
 * in, so nothing here locks. The buffer collects entries behind the room for
 * a frame header; kv_log_write turns them into a frame. Carries (W1): bytes
 * before `durable` are never written again; (W2): a commit is acknowledged as
 * durable only once `durable` has passed it; durable <= end <= what the file
 * holds.
 *
 *   0        durable         end              size
 *   | header | frames synced | frames written | zeros written ahead |
 *
 * W1 is meant for sectors, not for bytes: a disk that loses power while it
 * writes a sector may lose all of it, also the part that was there before. So
 * a frame that is going to be synced is padded to `align`, and a sync behind
 * frames that are not padded writes an empty frame to get there.
 *
 * The file is extended by zeros before it is needed, so that the sync of a
 * frame does not have to store a new size of the file as well: 166-190 us
 * instead of 256-315 on the machine where this was measured. Only frames that
 * are synced pay for it and gain by it.
 *
 * What may go wrong, and what is left:
 *
 *   no space   the file is cut back to `end`; the frame's commits fail, the
 *              log goes on
 *   any other  the store fails for good (the caller's part, kv_store_judge):
 *   error      what is on disk is not known
 *   a crash    the replay takes the frame if it is whole, else drops it
 *
 * The one other place where a live log is touched is the background's sync
 * ahead of a rotation, on a copy of `file`; it changes nothing in here.
 * ========================================================================== */

enum { KV_LOG_EXTEND_BYTES = 1 << 20 };

/*
 * A log that is written: the live one, guarded by the commit right, or one
 * that has been prepared (only file, size and extend_bytes and the id count
 * then), guarded by the state lock. Owns its file. Copied as a whole when it
 * changes hands; one of the two copies is then forgotten.
 */
struct kv_log {
    struct kv_file file;          /* not open: there is no live log */
    struct kv_log_head head;
    uint64_t end;                 /* of the last frame written */
    uint64_t durable;             /* offset up to which a sync returned OK */
    uint64_t size;                /* of the file, extended by zeros */
    uint64_t extend_bytes;        /* step of that */
    uint64_t next_seq;            /* of the first batch of the next frame */
    uint32_t prev;                /* hcrc of the last frame */
    struct kvmeta_digest digest;  /* after the last frame */
};

/*
 * Entries on their way into the log. Those up to `pending` are visible to
 * readers already (buffered commits), the others belong to the group that is
 * being committed. A group that fails takes its own entries out again; the
 * pending ones stay until a frame has taken them, for their callers have been
 * told OK. The header's room in front is filled in when the frame is written,
 * so that header and entries are one write and nothing is copied.
 */
struct kv_log_buffer {
    unsigned char *bytes;         /* room for a header, then entries */
    size_t cap;
    size_t used;                  /* KV_FRAME_BYTES when empty */
    uint64_t entries;             /* these have words of their own: a copy */
    uint64_t batches;             /* of two halves would wait for both */
    /* The same three, up to the last commit that was told OK. */
    size_t pending_used;
    uint64_t pending_entries;
    uint64_t pending_batches;
};

/* Empty, but for the room of a header. The memory stays. */
static void kv_log_buffer_clear(struct kv_log_buffer *buf)
{
    buf->used = buf->pending_used = KV_FRAME_BYTES;
    buf->entries = buf->pending_entries = 0;
    buf->batches = buf->pending_batches = 0;
}

/* Room for `bytes` more, and for the pad of a frame, so that kv_log_write
 * never allocates (C3). Grows by half at least. On an error the buffer is as
 * it was. */
static int kv_log_buffer_reserve(struct kv_env *env, struct kv_log_buffer *buf,
                                 size_t bytes, struct kvmeta_error *err)
{
    size_t need = buf->used + bytes + KV_LOG_ALIGN_MAX;
    void *p;

    assert(buf->used >= KV_FRAME_BYTES);
    assert(need > bytes);
    if (KV_LIKELY(need <= buf->cap)) return KVMETA_OK;
    need = (size_t)kv_max(need, buf->cap + buf->cap / 2);
    p = kv_resize(env, buf->bytes, need);
    if (!p) return kv_fail_memory(err, need);
    buf->bytes = p;
    buf->cap = need;
    return KVMETA_OK;
}

/* The room must have been reserved: this cannot fail. value NULL: a removal.
 * The caller counts the batches, of which entries know nothing. */
static void kv_log_buffer_add(const struct kv_shape *shape,
                              struct kv_log_buffer *buf, size_t slot_bytes,
                              const void *key, const void *value)
{
    assert(buf->used + slot_bytes <= buf->cap);
    assert(buf->entries < UINT32_MAX);
    kv_entry_encode(shape, slot_bytes, key, value, buf->bytes + buf->used);
    buf->used += slot_bytes;
    buf->entries++;
}

/* What is in the buffer is visible to readers now: it is not dropped again. */
static void kv_log_buffer_keep(struct kv_log_buffer *buf)
{
    assert(buf->used >= buf->pending_used);
    assert(buf->batches <= buf->entries);
    buf->pending_used = buf->used;
    buf->pending_entries = buf->entries;
    buf->pending_batches = buf->batches;
}

/* Forgets the group whose commit failed, and only that: the batches before it
 * stay, visible to readers as they are. */
static void kv_log_buffer_drop(struct kv_log_buffer *buf)
{
    assert(buf->pending_used <= buf->used);
    assert(buf->pending_entries <= buf->entries);
    assert(buf->pending_batches <= buf->batches);
    buf->used = buf->pending_used;
    buf->entries = buf->pending_entries;
    buf->batches = buf->pending_batches;
}

/* Writes zeros ahead, so that a sync need not also store a new file size;
 * always up to a multiple of extend_bytes beyond `need`. Zeros, not a hole:
 * filling a hole changes the file's map of blocks, which a sync would have
 * to store as well. A full disk is no error here: the frame itself will
 * meet it. */
static int kv_log_extend(struct kv_env *env, struct kv_log *log, uint64_t need,
                         struct kvmeta_error *err)
{
    static const unsigned char zeros[65536];
    int rc = KVMETA_OK;

    assert(log->extend_bytes > 0);
    assert(log->end <= log->size);
    if (need <= log->size) return KVMETA_OK;
    need += log->extend_bytes - need % log->extend_bytes;
    while (log->size < need && !rc) {
        uint64_t n = kv_min(sizeof zeros, need - log->size);

        rc = kv_file_write(env, &log->file, zeros, (size_t)n, log->size, err);
        if (!rc) log->size += n;
    }
    return rc == KVMETA_E_NOSPACE ? KVMETA_OK : rc;
}

/*
 * The disk was full in the middle of a frame, whose caller hears that nothing
 * has changed: what was written of it must not be found by a recovery, not
 * even if only its pad is missing. Cutting the file off needs no space. The
 * sync puts the cut on disk before another frame is written at the same
 * place: no crash leaves parts of both. If this fails, the outcome is open,
 * and *err says so: KVMETA_E_IO, which ends the writing.
 */
static int kv_log_wipe(struct kv_env *env, struct kv_log *log,
                       struct kvmeta_error *err)
{
    struct kvmeta_error own = {0};
    int rc = kv_file_truncate(env, &log->file, log->end, &own);

    assert(log->durable <= log->end);
    if (!rc) log->size = log->end;
    if (!rc) rc = kv_file_sync(env, &log->file, &own);
    if (!rc) return KVMETA_OK;
    *err = own;
    return err->code = KVMETA_E_IO;
}

/* Must a frame be written before a sync: for what is in the buffer, or an
 * empty one that fills up the sector after frames that are not padded? What
 * is acknowledged is never written again (W1). Where the frames happen to end
 * on a multiple of align, the sync alone is enough. */
static bool kv_log_must_write(const struct kv_log *log,
                              const struct kv_log_buffer *buf)
{
    if (buf->entries > 0) return true;
    return log->end > log->durable && log->end % log->head.align != 0;
}

/*
 * Writes what is in the buffer, which may be empty, as one frame. digest: of
 * all records after it. synced: pad it, since a sync is to follow. ahead:
 * extend the file beyond it. After OK the buffer is empty; nothing of it is
 * durable yet. After an error log and buffer are as before, but for bytes
 * behind the end of the log and the room of the header.
 */
static int kv_log_write(struct kv_env *env, struct kv_log *log,
                        struct kv_log_buffer *buf, struct kvmeta_digest digest,
                        bool synced, bool ahead, struct kvmeta_error *err)
{
    struct kv_frame f = {
        .synced = synced, .entries = (uint32_t)buf->entries, .pos = log->end,
        .seq = log->next_seq, .durable = log->durable, .digest = digest,
        .prev = log->prev, .batches = (uint32_t)buf->batches
    };
    uint64_t end = kv_frame_end(&log->head, log->end, buf->entries, synced);
    size_t bytes = (size_t)(end - log->end);
    int rc = KVMETA_OK;

    assert(log->file.open);
    assert(buf->used == KV_FRAME_BYTES + buf->entries * log->head.slot_bytes);
    assert(bytes >= buf->used);
    assert(bytes <= buf->cap);
    /* The buffer holds what earlier frames have left there. */
    assert(log->durable <= log->end);
    assert(!synced || end % log->head.align == 0);
    memset(buf->bytes + buf->used, 0, bytes - buf->used);
    f.bcrc = kv_crc_add(&env->crc, log->head.seed, buf->bytes + KV_FRAME_BYTES,
                        bytes - KV_FRAME_BYTES);
    kv_frame_encode(env, log->head.seed, &f, buf->bytes);

    /* From here on the outcome depends on the disk. All fields of the log
     * move together, and only after the write. */
    if (ahead) rc = kv_log_extend(env, log, end, err);
    if (!rc)
        rc = kv_file_write(env, &log->file, buf->bytes, bytes, log->end, err);
    if (rc == KVMETA_E_NOSPACE && kv_log_wipe(env, log, err))
        rc = KVMETA_E_IO;
    if (rc) return rc;

    log->end = end;
    log->size = kv_max(log->size, end);
    log->next_seq += buf->batches;
    log->prev = f.hcrc;
    log->digest = digest;
    kv_log_buffer_clear(buf);
    return KVMETA_OK;
}

/* Makes all frames durable. An error is final: the system reports it once,
 * and what it could not write may be forgotten, so that a second sync that
 * says OK would prove nothing. */
static int kv_log_sync(struct kv_env *env, struct kv_log *log,
                       struct kvmeta_error *err)
{
    int rc;

    assert(log->file.open);
    assert(log->durable <= log->end);
    if (KV_MUTANT(1)) rc = KVMETA_OK;
    else rc = kv_file_sync(env, &log->file, err);
    if (rc && KV_MUTANT(2)) rc = kv_file_sync(env, &log->file, err);
    if (rc) return rc;
    log->durable = log->end;
    return KVMETA_OK;
}

/*
 * Creates the file of a log, zero-filled up to `fill` bytes, synced, with its
 * directory entry. What is in the header is not known before the switch, so
 * kv_log_begin writes it; until then no manifest may list the log. A crash
 * leaves a file of zeros, which the next open deletes. Called with the commit
 * right, or by the background, which makes the next log ahead of time. After
 * an error the file is gone again, as far as that can be had.
 */
static int kv_log_create(struct kv_env *env, uint64_t id,
                         uint64_t log_bytes_max, uint64_t fill,
                         struct kv_log *out, struct kvmeta_error *err)
{
    struct kv_log log = {
        .extend_bytes = kv_min(KV_LOG_EXTEND_BYTES, log_bytes_max / 4)
    };
    int rc;

    assert(log.extend_bytes > 0);

    rc = kv_file_open(env, KV_FILE_LOG, id,
                      KVMETA_VFS_WRITE | KVMETA_VFS_CREATE | KVMETA_VFS_EXCL,
                      &log.file, err);
    if (rc) return rc;
    log.head.id = id;
    if (fill) rc = kv_log_extend(env, &log, fill, err);
    /* The file first, then its name: both must be there before a manifest
     * is. */
    if (!rc) rc = kv_file_sync(env, &log.file, err);
    if (!rc && !KV_MUTANT(3)) rc = kv_dir_sync(env, err);
    if (rc) {
        kv_file_close(env, &log.file);
        (void)kv_file_unlink(env, KV_FILE_LOG, id, NULL);
        return rc;
    }
    *out = log;
    return KVMETA_OK;
}

/* Writes and syncs the header: from then on the log may be listed. first_seq
 * and digest: of the next commit, and of the state before it, that is the end
 * of the log that goes before. Each log gets a salt of its own, from the
 * system's random numbers, so that what the file's sectors held before can
 * never pass for a frame (L1). After an error the log is the caller's to
 * close and unlink. */
static int kv_log_begin(struct kv_env *env, struct kv_log *log, uint32_t align,
                        uint64_t first_seq, struct kvmeta_digest digest,
                        struct kvmeta_error *err)
{
    uint64_t first = kv_log_first(align);
    unsigned char *block = kv_alloc(env, (size_t)first);
    int rc;

    assert(log->file.open);
    assert(log->end == 0);
    if (!block) return kv_fail_memory(err, (size_t)first);
    log->head.align = align;
    log->head.slot_bytes = kv_log_slot_bytes(&env->shape);
    log->head.first_seq = first_seq;
    log->head.digest = digest;
    rc = kv_random(env, log->head.salt, KV_SALT_BYTES, err);
    if (!rc) {
        kv_log_head_encode(env, &log->head, block);
        rc = kv_file_write(env, &log->file, block, (size_t)first, 0, err);
    }
    kv_free(env, block);
    /* Before the swap that lists the log: a listed log without a header is
     * corrupt. */
    if (!rc && !KV_MUTANT(4)) rc = kv_file_sync(env, &log->file, err);
    if (rc) return rc;

    /* The prepared file may be longer: its zeros are room ahead. */
    log->end = log->durable = first;
    log->size = kv_max(log->size, first);
    log->next_seq = first_seq;
    log->prev = log->head.crc;
    log->digest = digest;
    return KVMETA_OK;
}

/* ==========================================================================
 * Log replay
 *
 * Reads a log back, at open and to flush it. A sealed log must match the
 * manifest to the last byte. The live one may end in a torn tail, which is
 * told from damage by the highest offset that anything shows to have been
 * acknowledged (kv_log_evidence). The entries, sorted by key, the last one of
 * each key only, are a source for a merge. Carries (R1): what is accepted is
 * an unbroken chain of frames from the header on; (R2): a tail is dropped
 * only if no evidence says that a byte of it was acknowledged.
 *
 * A live log after a crash, with what is known of its offsets:
 *
 *   header | frame | frame | frame | ? ? ? | frame? | 0 0 0 0 0 0 |
 *                                  ^         ^                    ^
 *                                  end       written early by     size
 *                                            the system
 *
 * The chain ends where no frame is that is whole and names the last one's
 * header sum. What stands there may be a frame that the crash has torn, or
 * one that was acknowledged and is damaged. The bytes at `end` cannot tell;
 * others can: a frame further on holds the offset up to which the log had
 * been synced when it was made, and so does a mark in LOCK. If the highest of
 * them is above `end`, bytes are gone that somebody relies on, and the open
 * fails. Otherwise no sync that covers the place has been heard of, and
 * nothing behind it was promised. (The README says when both witnesses are
 * lost.)
 *
 * Three synced frames of 512 bytes, at 512, 1024 and 1536. Their `durable` is
 * 512, 1024 and 1536: each was written when the one before had been synced.
 *
 *   the second is damaged     the chain ends at 1024, the third says 1536:
 *                             acknowledged bytes are damaged, the open fails
 *   the third is damaged      the chain ends at 1536, and no frame says more;
 *                             a mark says 2048 if its sync had come back, and
 *                             the open fails; else it is a torn tail
 *
 * A frame behind a gap is never taken, though it may be whole: its digest and
 * its commit numbers count on what is missing, and prefixes are the promise.
 *
 *                     live                         sealed
 *   size of the file  whatever the crash has left  what the manifest says
 *   end of the chain  not below what is known to   the end of the file, at
 *                     have been acknowledged       the frame it was sealed by
 *   behind it         zeros, or a torn tail        nothing
 *   read by           an open                      an open, a flush, verify
 *
 * Whether the log goes on from what is before it, by its commit number and by
 * its digest, is for the caller to compare (kv_recover_chain, kv_flush_load).
 *
 * All of a log is read into memory at once; it needs another 16 bytes for
 * each entry, and as many again while it is sorted. Nothing here writes, takes
 * a lock or keeps state between two calls, so that an open reads many logs
 * side by side.
 * ========================================================================== */

/*
 * A whole log in memory: the file as it is, and an item for each of its
 * entries, by which they are sorted without being moved. One task fills it;
 * once it is loaded nothing changes it, and any number of threads may read.
 * Items point into `bytes` by their places, so that both live equally long.
 */
struct kv_run {
    unsigned char *bytes;         /* size + 1 of them, from kv_alloc_pages */
    uint64_t size;                /* of the file */
    struct kv_log_head head;
    struct kv_item *items;        /* the key is at bytes + place * 8 + 8 */
    size_t count;                 /* entries; once sorted, keys */
    size_t cap;                   /* as many as the file has room for */
    uint64_t end;                 /* of the last accepted frame */
    uint32_t last_hcrc;           /* what the next frame's prev must be */
    uint64_t frames;
    uint64_t batches;             /* seqs first_seq, first_seq + 1, ... */
    struct kvmeta_digest digest;  /* after the last frame */
    uint64_t torn_bytes;          /* behind `end`, up to the last non-zero */
    int torn_reason;              /* enum kvmeta_torn */
};

/*
 * What the manifest holds of a log. The salt ties the entry to one file: the
 * file of an earlier life with the same id has another. Of a sealed log the
 * last two fields fix every byte, because each frame's header sum covers the
 * sum of its body and that of the header before. Of the live one they are
 * zero: nobody swaps a manifest for each commit.
 */
struct kv_log_meta {
    uint64_t id;
    unsigned char salt[KV_SALT_BYTES];
    bool live;
    uint32_t last_hcrc;           /* of a sealed one */
    uint64_t bytes;               /* of a sealed one */
};

_Static_assert(KV_ENTRY_BYTES == 8, "a key is a word behind its place");
_Static_assert(KV_FRAME_BYTES % 8 == 0, "a place is a multiple of 8");

/* The number of the last commit in the log. Of a log without a frame it is
 * that of the last commit before it. */
static uint64_t kv_run_last_seq(const struct kv_run *run)
{
    return run->head.first_seq + run->batches - 1;
}

/* Accepts a zeroed run, and one that kv_run_load has left half done: each
 * array is given back by the size that it was asked for. */
static void kv_run_free(struct kv_env *env, struct kv_run *run)
{
    kv_free_pages(env, run->bytes, (size_t)run->size + 1);
    kv_free_pages(env, run->items, run->cap * sizeof *run->items);
    memset(run, 0, sizeof *run);
}

/* Is there a whole frame at `pos` that follows the chain? Otherwise *reason
 * says how it looks: no header of ours (also one that does not name the frame
 * before), or a header whose body is not there in full. After true it is
 * KVMETA_TORN_NONE. pos is at most the size of the file; nothing behind that is
 * read, whatever the header says. */
static bool kv_run_frame_at(const struct kv_env *env, const struct kv_run *run,
                            uint64_t pos, struct kv_frame *f, int *reason)
{
    uint64_t end;

    assert(pos % 8 == 0);
    assert(pos <= run->size);
    *reason = KVMETA_TORN_HEADER;
    if (run->size - pos < KV_FRAME_BYTES) return false;
    if (!kv_frame_decode(env, run->head.seed, run->bytes + pos, pos, f)
        || f->prev != run->last_hcrc)
        return false;
    *reason = KVMETA_TORN_BODY;
    /* Bounds the count before it is multiplied into an offset: the header is
     * genuine, but the file may end early. */
    if (f->entries > (run->size - pos) / run->head.slot_bytes) return false;
    end = kv_frame_end(&run->head, pos, f->entries, f->synced);
    if (end > run->size) return false;
    if (kv_crc_add(&env->crc, run->head.seed, run->bytes + pos + KV_FRAME_BYTES,
                   (size_t)(end - pos - KV_FRAME_BYTES)) != f->bcrc)
        return false;
    *reason = KVMETA_TORN_NONE;
    return true;
}

/* Adds the entries of a valid frame, and moves the end of the chain behind
 * it. Its bytes are what somebody wrote with the right sums, so a broken rule
 * is damage or a fault, never a torn tail: it fails even where no byte was
 * acknowledged. After an error the run can only be freed. */
static int kv_run_accept(struct kv_env *env, struct kv_run *run,
                         const struct kv_file *file, const struct kv_frame *f,
                         struct kvmeta_error *err)
{
    uint64_t at = f->pos + KV_FRAME_BYTES;
    uint64_t end = kv_frame_end(&run->head, f->pos, f->entries, f->synced);
    uint64_t body_end = at + (uint64_t)f->entries * run->head.slot_bytes;
    uint64_t seq = run->head.first_seq + run->batches;

    assert(f->pos >= run->end);
    assert(f->prev == run->last_hcrc);
    assert(body_end <= end);
    assert(end <= run->size);
    assert(body_end / 8 <= UINT32_MAX);
    if (f->seq != seq)
        return kv_fail_corrupt(err, file, f->pos, "frame: seq %llu, want %llu",
                               (unsigned long long)f->seq,
                               (unsigned long long)seq);
    /* A writer knows of syncs of earlier frames only. */
    if (f->durable > f->pos)
        return kv_fail_corrupt(err, file, f->pos, "frame: durable too high");
    /* A frame without batches fills up a sector; a batch that changes nothing
     * is not logged. */
    if ((f->entries == 0) != (f->batches == 0) || f->batches > f->entries)
        return kv_fail_corrupt(err, file, f->pos, "frame: batch count");
    if (!kv_is_zero(run->bytes + body_end, (size_t)(end - body_end)))
        return kv_fail_corrupt(err, file, body_end, "frame: pad not zero");

    assert(run->count + f->entries <= run->cap);
    /* Keys and values stay where they are: only their places are kept,
     * counted in units of eight, which makes 32 bits enough. */
    for (; at < body_end; at += run->head.slot_bytes) {
        const unsigned char *entry = run->bytes + at;
        const char *rule = kv_entry_check(&env->shape, run->head.slot_bytes,
                                          entry);
        struct kv_item *item = &run->items[run->count++];

        if (rule) return kv_fail_corrupt(err, file, at, "entry: %s", rule);
        item->head = kv_key_head(&env->shape, entry + KV_ENTRY_BYTES);
        item->place = (uint32_t)(at / 8);
        item->mark = entry[0] != KV_ENTRY_PUT;
    }
    assert(at == body_end);
    run->end = end;
    run->last_hcrc = f->hcrc;
    run->frames++;
    run->batches += f->batches;
    run->digest = f->digest;
    return KVMETA_OK;
}

/* The highest offset that a frame header anywhere in the file says to have
 * been durable, also beyond the end of the chain. Every multiple of 8 is
 * tried, for behind a damaged frame nobody knows where the next one starts. A
 * header that is found by chance, or as a copy in a value, does not count:
 * the sum is seeded by this file, and `pos` must be its place. A body is not
 * looked at: a header that was written is evidence though its body is torn. */
static uint64_t kv_log_evidence(const struct kv_env *env,
                                const struct kv_run *run)
{
    uint64_t highest = 0;
    struct kv_frame f;

    assert(run->bytes);
    if (KV_MUTANT(16)) return 0;
    for (uint64_t pos = kv_log_first(run->head.align);
         pos + KV_FRAME_BYTES <= run->size; pos += 8) {
        /* Frames of the chain say nothing new: none of theirs is above its
         * end. */
        if (kv_frame_decode(env, run->head.seed, run->bytes + pos, pos, &f))
            highest = kv_max(highest, f.durable);
    }
    return highest;
}

/* The end of the live log: decides whether what does not belong to the chain
 * is a torn tail, which is counted, or damage. acked: the highest offset that
 * the marks give, 0 for none. The zeros at the end are room that was written
 * ahead, and count as nothing. */
static int kv_run_check_tail(const struct kv_env *env, struct kv_run *run,
                             const struct kv_file *file, uint64_t acked,
                             struct kvmeta_error *err)
{
    /* By enum kvmeta_torn. */
    static const char *const wrong[] = {
        "the log ends", "no valid frame header", "frame: body crc"
    };
    uint64_t used = run->size;

    assert(run->end <= run->size);
    assert(run->torn_reason >= 0);
    assert((size_t)run->torn_reason < sizeof wrong / sizeof *wrong);
    /* Marks and frames may each be the only ones left that know. */
    acked = kv_max(acked, kv_log_evidence(env, run));
    if (acked > run->end)
        return kv_fail_corrupt(err, file, run->end,
                               "%s, but %llu bytes were acknowledged",
                               wrong[run->torn_reason],
                               (unsigned long long)acked);
    while (used > run->end && run->bytes[used - 1] == 0) used--;
    assert(used >= run->end);
    run->torn_bytes = used - run->end;
    if (run->torn_bytes == 0) run->torn_reason = KVMETA_TORN_NONE;
    return KVMETA_OK;
}

/* Reads the whole file to run->bytes. One byte more than needed is allocated,
 * so that an empty file is not a request for nothing. A place has 32 bits, so
 * that a log ends below 32 GiB; log_bytes_max is at most 4. What has been
 * allocated is left to kv_run_free, after an error too. */
static int kv_run_read_file(struct kv_env *env, const struct kv_file *file,
                            struct kv_run *run, struct kvmeta_error *err)
{
    int rc = kv_file_size(env, file, &run->size, err);

    assert(!run->bytes);
    if (rc) return rc;
    if (run->size > (uint64_t)UINT32_MAX * 8)
        return kv_fail_corrupt(err, file, 0, "too large for a log");
    if (run->size < SIZE_MAX / 2) /* cannot: be more on 64 bits */
        run->bytes = kv_alloc_pages(env, (size_t)run->size + 1);
    if (!run->bytes) return kv_fail_memory(err, (size_t)run->size + 1);
    return kv_file_read(env, file, run->bytes, (size_t)run->size, 0, err);
}

/* Walks the chain from the header on and leaves the entries in the order in
 * which they were committed. The manifest speaks first: of a file with
 * another salt, or of a sealed one with another size, not one frame is looked
 * at. */
static int kv_run_parse(struct kv_env *env, const struct kv_file *file,
                        const struct kv_log_meta *meta, uint64_t acked,
                        struct kv_run *run, struct kvmeta_error *err)
{
    const char *rule;
    struct kv_frame f;
    int rc;

    assert(run->bytes);
    assert(!run->items);
    rule = kv_log_head_decode(env, meta->id, run->bytes, run->size,
                              &run->head);
    if (rule) return kv_fail_corrupt(err, file, 0, "%s", rule);
    if (memcmp(run->head.salt, meta->salt, KV_SALT_BYTES) != 0)
        return kv_fail_corrupt(err, file, 40, "salt is not the manifest's");
    if (!meta->live && run->size != meta->bytes)
        return kv_fail_corrupt(err, file, kv_min(run->size, meta->bytes),
                               "%llu bytes, want %llu",
                               (unsigned long long)run->size,
                               (unsigned long long)meta->bytes);

    /* No frame can hold more entries than the file has slots, so that the
     * array never grows, and a lying count costs no memory. A slot has 16
     * bytes at least, so that the items take no more than the file. */
    run->cap = (size_t)run->size / run->head.slot_bytes + 1;
    run->items = kv_alloc_pages(env, run->cap * sizeof *run->items);
    if (!run->items)
        return kv_fail_memory(err, run->cap * sizeof *run->items);
    run->end = kv_log_first(run->head.align);
    run->last_hcrc = run->head.crc;
    run->digest = run->head.digest;
    /* The header's sum is the first link: a frame of another log that had the
     * same id, or of this one before its header was written, does not fit. */
    while (run->end < run->size
           && kv_run_frame_at(env, run, run->end, &f, &run->torn_reason)) {
        rc = kv_run_accept(env, run, file, &f, err);
        if (rc) return rc;
    }
    assert(run->end <= run->size);
    assert(run->count <= run->cap);
    assert(run->batches <= run->count);
    if (meta->live) return kv_run_check_tail(env, run, file, acked, err);
    /* The chain must reach the end of the file, and its last frame must be
     * the one that the log was sealed with. */
    if (!KV_MUTANT(19)
        && (run->end != meta->bytes || run->last_hcrc != meta->last_hcrc))
        return kv_fail_corrupt(err, file, run->end,
                               "sealed log: damaged frame");
    run->torn_reason = KVMETA_TORN_NONE;
    return KVMETA_OK;
}

/* The items of a run, from `next` on, as an input. It only looks at the run,
 * so that many threads may have inputs of one, each with a range of its own. */
struct kv_run_input {
    struct kv_input base;
    const struct kv_run *run;
    size_t next;
};

/* The items are copied, because a merge writes the number of the input into
 * them; what they point at is not. */
static int kv_run_input_fill(struct kv_input *base, struct kv_item *items,
                             size_t *n, struct kvmeta_error *err)
{
    struct kv_run_input *s = (struct kv_run_input *)(void *)base;

    (void)err;
    assert(s->next <= s->run->count);
    if (s->next == s->run->count) return KV_END;
    *n = (size_t)kv_min(KV_INPUT_ITEMS, s->run->count - s->next);
    memcpy(items, s->run->items + s->next, *n * sizeof *items);
    s->next += *n;
    return KVMETA_OK;
}

/* All of a run. The rows of this input are the slots behind their first 8
 * bytes, and its unit is 8, since frames, and with them slots, start at
 * multiples of 8 only. */
static void kv_run_input_init(const struct kv_run *run, struct kv_run_input *s)
{
    s->base.fill = kv_run_input_fill;
    s->base.rows = run->bytes + KV_ENTRY_BYTES;
    s->base.unit = 8;
    s->run = run;
    s->next = 0;
}

/* Orders the items by key and keeps the last entry of each key only. Items
 * come in the order of commits and the sort is stable (M1), so that of equal
 * keys the last one is the newest. What is dropped adds to no sum: a log has
 * none to balance, its digest is that of the state behind it. After an error
 * the items are as they were. */
static int kv_run_sort(struct kv_env *env, struct kv_run *run,
                       struct kvmeta_error *err)
{
    struct kv_run_input all;
    struct kv_input *input = &all.base;
    struct kv_order order = {.shape = &env->shape, .inputs = &input};
    size_t bytes = run->count * sizeof *run->items;
    struct kv_item *tmp;

    /* In order, and an empty log asks for no memory. */
    if (run->count < 2) return KVMETA_OK;
    tmp = kv_alloc_pages(env, bytes);
    if (!tmp) return kv_fail_memory(err, bytes);
    kv_run_input_init(run, &all);
    kv_items_sort(&order, run->items, run->count, tmp);
    run->count = kv_items_settle(&order, run->items, run->count, tmp, NULL);
    assert(run->count > 0);
    kv_free_pages(env, tmp, bytes);
    return KVMETA_OK;
}

/* Reads, checks and sorts the log that `meta` describes. acked: the highest
 * durable offset of this log that the marks give, 0 for none; a sealed log
 * needs none. Only reads: the file is as it was, whatever is found. *run is
 * to be freed by the caller, after an error too. */
static int kv_run_load(struct kv_env *env, const struct kv_log_meta *meta,
                       uint64_t acked, struct kv_run *run,
                       struct kvmeta_error *err)
{
    struct kv_file file = {0};
    int rc;

    memset(run, 0, sizeof *run);
    rc = kv_file_open(env, KV_FILE_LOG, meta->id, 0, &file, err);
    /* As with a table: not found would mean that there is no store. */
    if (rc == KVMETA_NOT_FOUND)
        rc = kv_fail_corrupt(err, &file, 0, "listed in the manifest, missing");
    if (!rc) rc = kv_run_read_file(env, &file, run, err);
    if (!rc) rc = kv_run_parse(env, &file, meta, acked, run, err);
    if (!rc) rc = kv_run_sort(env, run, err);
    kv_file_close(env, &file);
    return rc;
}

/* From the key `from` on; NULL: all. The run must have been sorted. Where the
 * range ends is the merge's business. */
static void kv_run_input_open(const struct kv_env *env,
                              const struct kv_run *run,
                              const unsigned char *from,
                              struct kv_run_input *s)
{
    struct kv_input *input = &s->base;
    struct kv_order order = {.shape = &env->shape, .inputs = &input};

    kv_run_input_init(run, s);
    if (from)
        s->next = kv_items_rank(&order, run->items, run->count, from, false);
}

/* --- Tables and logs, merged --- */

/*
 * A merge with the inputs that it takes from: what a flush, a compaction and
 * each range of an open have in common. Tables and runs stay the caller's,
 * and must outlive it. It points into itself and must not be moved.
 */
struct kv_inputs {
    struct kv_merge merge;
    size_t tables_count;
    struct kv_table_input *tables;
    struct kv_run_input *runs;    /* in the allocation of `tables`, with the */
    struct kv_input **inputs;     /* next */
};

_Static_assert(sizeof(struct kv_table_input) % _Alignof(struct kv_run_input)
                   == 0,
               "runs may stand behind tables");
_Static_assert(sizeof(struct kv_run_input) % _Alignof(struct kv_input *) == 0,
               "inputs may stand behind runs");

/* Accepts a zeroed one. */
static void kv_inputs_close(struct kv_env *env, struct kv_inputs *in)
{
    kv_merge_close(&in->merge);
    for (size_t i = 0; i < in->tables_count; i++)
        kv_table_input_close(&in->tables[i]);
    kv_free(env, in->tables);
    memset(in, 0, sizeof *in);
}

/* The records from <= key < to of tables and younger runs; oldest first,
 * NULL: no bound. All tables are older than all runs: a log is flushed in the
 * order in which it was written, so that what is still in logs came later. To
 * be closed, after an error too. */
static int kv_inputs_open(struct kv_job *job, const struct kv_table *tables,
                          size_t tables_count, const struct kv_run *runs,
                          size_t runs_count, const unsigned char *from,
                          const unsigned char *to, struct kv_inputs *in,
                          struct kvmeta_error *err)
{
    size_t n = tables_count + runs_count;
    size_t bytes = tables_count * sizeof *in->tables
        + runs_count * sizeof *in->runs + n * sizeof *in->inputs;
    int rc = KVMETA_OK;

    assert(tables_count == 0 || tables);
    assert(runs_count == 0 || runs);
    memset(in, 0, sizeof *in);
    /* Zeroed, so that inputs that were not opened can be closed. */
    in->tables = kv_alloc_zeroed(job->env, bytes + 1);
    if (!in->tables) return kv_fail_memory(err, bytes + 1);
    in->runs = (struct kv_run_input *)(void *)(in->tables + tables_count);
    in->inputs = (struct kv_input **)(void *)(in->runs + runs_count);
    in->tables_count = tables_count;
    for (size_t i = 0; i < tables_count && !rc; i++) {
        rc = kv_table_input_open(job, &tables[i], from, to, &in->tables[i],
                                 err);
        in->inputs[i] = &in->tables[i].base;
    }
    for (size_t i = 0; i < runs_count; i++) {
        kv_run_input_open(job->env, &runs[i], from, &in->runs[i]);
        in->inputs[tables_count + i] = &in->runs[i].base;
    }
    return rc ? rc : kv_merge_open(job->env, in->inputs, n, from, to,
                                   &in->merge, err);
}

/* ==========================================================================
 * Marks
 *
 * Two slots in LOCK, written in turn after each sync of the log: evidence of
 * how far the log was acknowledged and which manifest was the last. A bad or
 * missing mark is lost evidence, never an error; one of another store is.
 *
 * A log cannot tell how much of itself is missing: cut off behind a frame, it
 * looks like one that was never longer. A manifest cannot tell that a newer
 * one has been replaced by it. A mark, in another file, can tell both. It is
 * written after the sync that it speaks of and before anybody hears of the
 * commit, so that it never claims too much.
 *
 * The write of a mark is not synced with each commit, which would double the
 * price of a sync; the background syncs LOCK a moment later, and each swap of
 * the manifest does. So after a kill of the process the marks know of all that
 * was acknowledged; after a power cut they may be old, or missing, or one of
 * them torn, and then the other slot holds the one before.
 *
 * Writing is under the mark lock; reading happens at open only, before
 * anything else runs.
 * ========================================================================== */

/* The slots are in sectors, and pages, of their own: a torn write of one does
 * not touch the other. */
enum {
    KV_MARK_BYTES = 64,
    KV_MARK_STRIDE = 4096
};

#define KV_MARK_MAGIC 0x314B52414D4D564Bu /* "KVMMARK1" */

_Static_assert(KV_MARK_BYTES == 8 + KV_UUID_BYTES + 4 * 8 + 2 * 4, "mark");
_Static_assert(KV_MARK_STRIDE % KV_PAGE_BYTES == 0,
               "marks share no sector and no page");

struct kv_mark {
    uint64_t counter;             /* 0: none was found */
    uint64_t gen;                 /* of the manifest */
    uint64_t log_id;              /* 0: no log was ever live */
    uint64_t durable;             /* offset in that log */
};

/* LOCK and MANIFEST have no salt: there is one of each in a store, and each
 * write of them holds a higher count than the one before. */
static const unsigned char kv_no_salt[KV_SALT_BYTES];

/* slot: all of it is written. */
static void kv_mark_encode(const struct kv_env *env, const struct kv_mark *mark,
                           unsigned char slot[KV_MARK_BYTES])
{
    uint32_t seed = kv_crc_file_seed(env, KV_FILE_LOCK, 0, kv_no_salt);

    memset(slot, 0, KV_MARK_BYTES);
    kv_store_le64(slot, KV_MARK_MAGIC);
    memcpy(slot + 8, env->uuid, KV_UUID_BYTES);
    kv_store_le64(slot + 24, mark->counter);
    kv_store_le64(slot + 32, mark->gen);
    kv_store_le64(slot + 40, mark->log_id);
    kv_store_le64(slot + 48, mark->durable);
    kv_store_le32(slot + 60, kv_crc_add(&env->crc, seed, slot,
                                        KV_MARK_BYTES - 4));
}

/* The uuid of the slot counts, not the environment's: *foreign says whether
 * it is another one. Otherwise a LOCK of another store would look like one
 * whose marks are lost. False: no mark; *mark may have been changed. A
 * counter of this size leaves room to count on. */
static bool kv_mark_decode(const struct kv_env *env,
                           const unsigned char slot[KV_MARK_BYTES],
                           struct kv_mark *mark, bool *foreign)
{
    struct kv_env other = {.crc = env->crc};
    uint32_t seed;

    memcpy(other.uuid, slot + 8, KV_UUID_BYTES);
    /* By the uuid that the slot itself states. */
    seed = kv_crc_file_seed(&other, KV_FILE_LOCK, 0, kv_no_salt);
    if (kv_load_le64(slot) != KV_MARK_MAGIC) return false;
    if (kv_load_le32(slot + 56) != 0) return false;
    if (kv_crc_add(&env->crc, seed, slot, KV_MARK_BYTES - 4)
        != kv_load_le32(slot + 60))
        return false;
    *foreign = memcmp(other.uuid, env->uuid, KV_UUID_BYTES) != 0;
    mark->counter = kv_load_le64(slot + 24);
    mark->gen = kv_load_le64(slot + 32);
    mark->log_id = kv_load_le64(slot + 40);
    mark->durable = kv_load_le64(slot + 48);
    return mark->counter > 0 && mark->counter < KV_NUMBER_MAX;
}

/* Reads both slots; a mark that is not there, or not valid, is zeroed. Fails
 * if the file cannot be read, or if a mark is of another store: so the uuid
 * of the environment must be known, but for an open that only asks whether
 * there are any marks. Which of the two is newer, and what they mean, is the
 * caller's business: both are evidence. */
static int kv_marks_read(struct kv_env *env, const struct kv_file *file,
                         struct kv_mark marks[2], struct kvmeta_error *err)
{
    unsigned char slot[KV_MARK_BYTES];
    uint64_t bytes;
    int rc = kv_file_size(env, file, &bytes, err);

    assert(file->open);
    assert(file->kind == KV_FILE_LOCK);
    memset(marks, 0, 2 * sizeof *marks);
    for (unsigned i = 0; i < 2 && !rc; i++) {
        uint64_t off = (uint64_t)i * KV_MARK_STRIDE;
        bool foreign = false;

        if (bytes < off + KV_MARK_BYTES) break;
        rc = kv_file_read(env, file, slot, sizeof slot, off, err);
        if (rc) break;
        if (!kv_mark_decode(env, slot, &marks[i], &foreign))
            memset(&marks[i], 0, sizeof marks[i]);
        else if (foreign)
            rc = kv_fail_corrupt(err, file, off, "mark of another store");
    }
    return rc;
}

/* Overwrites the older of the two slots, for counters ascend one by one. Not
 * synced. The caller holds the mark lock. */
static int kv_mark_write(struct kv_env *env, const struct kv_file *file,
                         const struct kv_mark *mark, struct kvmeta_error *err)
{
    unsigned char slot[KV_MARK_BYTES];

    assert(mark->counter > 0);
    assert(file->kind == KV_FILE_LOCK);
    kv_mark_encode(env, mark, slot);
    return kv_file_write(env, file, slot, sizeof slot,
                         mark->counter % 2 * KV_MARK_STRIDE, err);
}

/* ==========================================================================
 * Manifest
 *
 * Says what exists. One image, twice in the file; replaced as a whole by a
 * swap. Carries (S1): only a swap changes what exists; (S2): a swap returns
 * OK only when the new manifest, and everything that it names, is on disk.
 *
 * A swap, and what a crash leaves after each step (kv_manifest_store; the
 * caller has synced the files that are new in it, and their names):
 *
 *   unlink, create MANIFEST.tmp    the old manifest, perhaps a stray file
 *   write both copies              the same
 *   sync MANIFEST.tmp              the same
 *   rename it to MANIFEST          the old one or the new one, each whole
 *   sync the directory             the new one
 *
 * What the caller may do after an error hangs on whether the rename has been
 * tried. Before it (*renamed is false) no manifest on disk names the new
 * files, and they can be unlinked. After it nobody knows which one the next
 * open will find: no file may be unlinked, neither new nor old, and the store
 * stops writing.
 *
 * A store has at most about a thousand tables and some logs, 56 and 40 bytes
 * each: most manifests fit in one page, and have their second copy in the
 * next. So writing all of it anew is cheap, and swaps are rare. A log of
 * changes would need a replay, rules for its own torn tail, and somebody to
 * shorten it.
 *
 * Two copies, because nothing else could replace a damaged manifest: with one
 * whole copy the open goes on, and heals the other by a swap. Copies that are
 * both whole and differ cannot come from a crash, for a file is written whole
 * before it has its name.
 *
 * Reading goes from bytes to meaning, and each step has its own answer:
 *
 *   kv_manifest_image_at      is there an image: magic, length, sum; if not,
 *                             this copy is damaged
 *   kv_manifest_decode        version, widths, counts; another format or
 *                             other widths are no damage, and are told so
 *   kv_manifest_check_image   one content, one form: reserved bytes are zero
 *   kv_manifest_check         what no manifest of ours has ever said
 *
 * After all four it may still not fit the files; that is found as they are
 * read. That the manifest is not an old one, put in place of a newer, the
 * marks tell by its generation, and an unlisted log with commits in it by its
 * existence.
 *
 * `seq` and `digest` are those of the tables alone. The first log goes on from
 * there, each other one from the log before it, and the state of the store is
 * that after the last (F2, P1).
 *
 * The manifest in memory, db->manifest, is guarded by the state lock, and is
 * changed with the swap lock held, too: whoever has that may read it while it
 * makes the next one from a copy.
 * ========================================================================== */

enum {
    KV_MANIFEST_VERSION = 1,
    KV_MANIFEST_HEAD_BYTES = 96,
    KV_MANIFEST_TABLE_BYTES = 56,
    KV_MANIFEST_LOG_BYTES = 40,
    KV_MANIFEST_END_BYTES = 8,    /* zero, sum */
    KV_MANIFEST_STRIDE = 4096,    /* a copy starts at a multiple of it */
    KV_MANIFEST_BYTES_MAX = 1 << 20, /* of one copy; a reader takes no more */
    /* More than the backlog: lives that were too short to flush anything have
     * left a sealed log each. */
    KV_MANIFEST_LOGS_MAX = 32,
    KV_LOG_STATE_LIVE = 1,
    KV_LOG_STATE_SEALED = 2
};

#define KV_MANIFEST_MAGIC 0x00314E414D4D564Bu /* "KVMMAN1" */

_Static_assert(KV_MANIFEST_HEAD_BYTES == 8 + 2 * 4 + KV_UUID_BYTES + 3 * 8 + 16
                                             + 4 * 4 + 8,
               "manifest head");
_Static_assert(KV_MANIFEST_TABLE_BYTES == 6 * 8 + 2 * 4, "manifest table");
_Static_assert(KV_MANIFEST_LOG_BYTES == 8 + KV_SALT_BYTES + 2 * 4 + 8,
               "manifest log");
_Static_assert(KV_MANIFEST_END_BYTES == 4 + 4, "manifest end");
_Static_assert(KV_MANIFEST_STRIDE % KV_PAGE_BYTES == 0,
               "the two copies share no sector and no page");
_Static_assert(KV_MANIFEST_BYTES_MAX % KV_MANIFEST_STRIDE == 0,
               "two copies of the largest image fit in twice its size");
_Static_assert(KV_LOGS_WAITING_MAX + 2 <= KV_MANIFEST_LOGS_MAX,
               "the backlog, the live log and its successor must fit");
_Static_assert(KV_MANIFEST_HEAD_BYTES + KV_TABLES_MAX * KV_MANIFEST_TABLE_BYTES
               + KV_MANIFEST_LOGS_MAX * KV_MANIFEST_LOG_BYTES
               + KV_MANIFEST_END_BYTES <= KV_MANIFEST_BYTES_MAX,
               "a full manifest must be readable");

/*
 * Owns `tables`. At most the last of the logs is live; after a clean close,
 * and before the first write, none is.
 *
 * next_id was right when the manifest was written. Ids have been given away
 * since, to files that a crash has left unlisted, so that an open goes on
 * above the highest id that it finds in the directory, too. gen only ever
 * grows: a mark with a higher one proves that this manifest is not the last.
 */
struct kv_manifest {
    uint64_t gen;                 /* counts swaps, from 1 */
    uint64_t next_id;             /* above all ids that it names */
    uint64_t seq;                 /* last commit in the tables */
    struct kvmeta_digest digest;  /* of the records of all tables */
    struct kv_table_meta *tables; /* oldest first */
    size_t tables_count;
    struct kv_log_meta logs[KV_MANIFEST_LOGS_MAX]; /* oldest first */
    size_t logs_count;
};

/* Accepts a zeroed one. There is nothing else in it to be freed, so that a
 * manifest may be moved by assignment. */
static void kv_manifest_free(struct kv_env *env, struct kv_manifest *m)
{
    kv_free(env, m->tables);
    memset(m, 0, sizeof *m);
}

/* A copy with room for one more table: no step adds more than one. *out needs
 * no freeing before; after an error it is as it was. Swap lock held, for
 * `from` must not change meanwhile, and nobody else may make a successor of
 * it: one of the two would be lost. */
static int kv_manifest_copy(struct kv_env *env, const struct kv_manifest *from,
                            struct kv_manifest *out, struct kvmeta_error *err)
{
    size_t bytes = (from->tables_count + 1) * sizeof *from->tables;
    struct kv_table_meta *tables = kv_alloc(env, bytes);

    assert(from->tables_count == 0 || from->tables);
    assert(from->logs_count <= KV_MANIFEST_LOGS_MAX);
    if (!tables) return kv_fail_memory(err, bytes);
    *out = *from;
    out->tables = tables;
    if (from->tables_count)
        memcpy(tables, from->tables, from->tables_count * sizeof *tables);
    return KVMETA_OK;
}

/* The live log, or NULL. Points into the manifest. It can only be the last: a
 * manifest in which another one is live does not pass (S9), and a rotation
 * seals the old one in the swap that lists the new one. */
static const struct kv_log_meta *kv_manifest_live(const struct kv_manifest *m)
{
    assert(m->logs_count <= KV_MANIFEST_LOGS_MAX);
    if (m->logs_count == 0) return NULL;
    return m->logs[m->logs_count - 1].live ? &m->logs[m->logs_count - 1] : NULL;
}

/* The counts must be those of a manifest that has been checked, or compared
 * with the limits, so that nothing overflows. */
static size_t kv_manifest_image_bytes(size_t tables, size_t logs)
{
    return KV_MANIFEST_HEAD_BYTES + tables * KV_MANIFEST_TABLE_BYTES
        + logs * KV_MANIFEST_LOG_BYTES + KV_MANIFEST_END_BYTES;
}

/* The parts of an image, each with its inverse behind it; the tables in the
 * head of this file give their offsets. What is reserved is not written: the
 * image is zeroed. Nothing is checked in decoding; for that there are
 * kv_manifest_check and kv_manifest_check_image. */
static void kv_manifest_encode_table(const struct kv_table_meta *t,
                                     unsigned char *p)
{
    kv_store_le64(p, t->id);
    kv_store_le64(p + 8, t->bytes);
    kv_store_le64(p + 16, t->records);
    kv_store_le64(p + 24, t->tombstones);
    kv_store_le64(p + 32, t->seq_first);
    kv_store_le64(p + 40, t->seq_last);
    kv_store_le32(p + 48, t->footer_crc);
}

static void kv_manifest_decode_table(const unsigned char *p,
                                     struct kv_table_meta *t)
{
    t->id = kv_load_le64(p);
    t->bytes = kv_load_le64(p + 8);
    t->records = kv_load_le64(p + 16);
    t->tombstones = kv_load_le64(p + 24);
    t->seq_first = kv_load_le64(p + 32);
    t->seq_last = kv_load_le64(p + 40);
    t->footer_crc = kv_load_le32(p + 48);
}

static void kv_manifest_encode_log(const struct kv_log_meta *l,
                                   unsigned char *p)
{
    kv_store_le64(p, l->id);
    memcpy(p + 8, l->salt, KV_SALT_BYTES);
    kv_store_le32(p + 24, l->live ? KV_LOG_STATE_LIVE : KV_LOG_STATE_SEALED);
    kv_store_le32(p + 28, l->last_hcrc);
    kv_store_le64(p + 32, l->bytes);
}

/* Any state but "live" is taken for sealed here: if it is neither, encoding
 * it again gives another image. */
static void kv_manifest_decode_log(const unsigned char *p,
                                   struct kv_log_meta *l)
{
    l->id = kv_load_le64(p);
    memcpy(l->salt, p + 8, KV_SALT_BYTES);
    l->live = kv_load_le32(p + 24) == KV_LOG_STATE_LIVE;
    l->last_hcrc = kv_load_le32(p + 28);
    l->bytes = kv_load_le64(p + 32);
}

/* image: kv_manifest_image_bytes, zeroed. Decoding and encoding again must
 * give the same bytes: kv_manifest_check_image relies on it. */
static void kv_manifest_encode(const struct kv_env *env,
                               const struct kv_manifest *m,
                               unsigned char *image)
{
    size_t bytes = kv_manifest_image_bytes(m->tables_count, m->logs_count);
    uint32_t seed = kv_crc_file_seed(env, KV_FILE_MANIFEST, 0, kv_no_salt);
    unsigned char *p = image + KV_MANIFEST_HEAD_BYTES;

    assert(m->logs_count <= KV_MANIFEST_LOGS_MAX);
    assert(m->tables_count == 0 || m->tables);
    assert(bytes <= UINT32_MAX);
    kv_store_le64(image, KV_MANIFEST_MAGIC);
    kv_store_le32(image + 8, KV_MANIFEST_VERSION);
    kv_store_le32(image + 12, (uint32_t)bytes);
    memcpy(image + 16, env->uuid, KV_UUID_BYTES);
    kv_store_le64(image + 32, m->gen);
    kv_store_le64(image + 40, m->next_id);
    kv_store_le64(image + 48, m->seq);
    kv_store_le64(image + 56, m->digest.lo);
    kv_store_le64(image + 64, m->digest.hi);
    kv_store_le32(image + 72, env->shape.key_bytes);
    kv_store_le32(image + 76, env->shape.value_bytes);
    kv_store_le32(image + 80, (uint32_t)m->tables_count);
    kv_store_le32(image + 84, (uint32_t)m->logs_count);
    for (size_t i = 0; i < m->tables_count; i++, p += KV_MANIFEST_TABLE_BYTES)
        kv_manifest_encode_table(&m->tables[i], p);
    for (size_t i = 0; i < m->logs_count; i++, p += KV_MANIFEST_LOG_BYTES)
        kv_manifest_encode_log(&m->logs[i], p);
    assert(p + KV_MANIFEST_END_BYTES == image + bytes);
    kv_store_le32(p + 4, kv_crc_add(&env->crc, seed, image, bytes - 4));
}

/* The length of the image at `image`, of which `room` bytes are there; 0 when
 * there is no valid one. Sums are seeded by the image's own uuid: what it
 * belongs to is known only after this. The length is believed once the sum
 * over it is right, and nothing behind `room` is read. */
static size_t kv_manifest_image_at(const struct kv_env *env,
                                   const unsigned char *image, size_t room)
{
    struct kv_env other = {.crc = env->crc};
    uint32_t seed;
    size_t bytes;

    if (room < kv_manifest_image_bytes(0, 0)) return 0;
    if (kv_load_le64(image) != KV_MANIFEST_MAGIC) return 0;
    bytes = kv_load_le32(image + 12);
    if (bytes < kv_manifest_image_bytes(0, 0) || bytes > room) return 0;
    memcpy(other.uuid, image + 16, KV_UUID_BYTES);
    seed = kv_crc_file_seed(&other, KV_FILE_MANIFEST, 0, kv_no_salt);
    if (kv_crc_add(&env->crc, seed, image, bytes - 4)
        != kv_load_le32(image + bytes - 4))
        return 0;
    return bytes;
}

/* Fills in *m and the uuid of the environment from a valid image. A format
 * that is not known and other widths are not damage, and are told apart from
 * it: nothing is wrong with such a store, it is only not for this program, or
 * not for these options. m->tables is allocated with room for one more, for
 * the caller to free, after an error of a later check, too. */
static int kv_manifest_decode(struct kv_env *env, const struct kv_file *file,
                              const unsigned char *image, size_t bytes,
                              struct kv_manifest *m, struct kvmeta_error *err)
{
    const unsigned char *p = image + KV_MANIFEST_HEAD_BYTES;
    uint32_t key_bytes = kv_load_le32(image + 72);
    uint32_t value_bytes = kv_load_le32(image + 76);
    size_t tables = kv_load_le32(image + 80);
    size_t logs = kv_load_le32(image + 84);

    /* The sum is right already: what differs here was meant by somebody. */
    assert(bytes >= kv_manifest_image_bytes(0, 0));
    if (kv_load_le32(image + 8) != KV_MANIFEST_VERSION)
        return kv_fail(err, KVMETA_E_VERSION, 0,
                       "MANIFEST: format %u, this code knows %u",
                       (unsigned)kv_load_le32(image + 8),
                       (unsigned)KV_MANIFEST_VERSION);
    if (key_bytes != env->shape.key_bytes
        || value_bytes != env->shape.value_bytes)
        return kv_fail(err, KVMETA_E_MISMATCH, 0,
                       "MANIFEST: the store has keys of %u and values of %u "
                       "bytes, not %u and %u", (unsigned)key_bytes,
                       (unsigned)value_bytes, (unsigned)env->shape.key_bytes,
                       (unsigned)env->shape.value_bytes);
    /* The counts before their product. */
    if (tables > KV_TABLES_MAX || logs > KV_MANIFEST_LOGS_MAX
        || bytes != kv_manifest_image_bytes(tables, logs))
        return kv_fail_corrupt(err, file, 80, "manifest: counts");

    m->tables = kv_alloc_zeroed(env, (tables + 1) * sizeof *m->tables);
    if (!m->tables)
        return kv_fail_memory(err, (tables + 1) * sizeof *m->tables);
    memcpy(env->uuid, image + 16, KV_UUID_BYTES);
    m->gen = kv_load_le64(image + 32);
    m->next_id = kv_load_le64(image + 40);
    m->seq = kv_load_le64(image + 48);
    m->digest.lo = kv_load_le64(image + 56);
    m->digest.hi = kv_load_le64(image + 64);
    m->tables_count = tables;
    m->logs_count = logs;
    for (size_t i = 0; i < tables; i++, p += KV_MANIFEST_TABLE_BYTES)
        kv_manifest_decode_table(p, &m->tables[i]);
    for (size_t i = 0; i < logs; i++, p += KV_MANIFEST_LOG_BYTES)
        kv_manifest_decode_log(p, &m->logs[i]);
    assert(p + KV_MANIFEST_END_BYTES == image + bytes);
    return KVMETA_OK;
}

/*
 * Rules that any manifest of ours keeps; returns the broken one, or NULL.
 * Asked of what was read, and asserted of what is written. What is believed
 * of a manifest elsewhere follows from them:
 *
 *   S3  counts are so low that adding to them does not overflow
 *   S4  no table has an id that is yet to be given away
 *   S5  a table has records; one that lost all of them is not listed
 *   S6  tables are oldest first, no commit is in two of them, and none is
 *       newer than `seq`, where the logs begin
 *   S7  the same as S4, of logs
 *   S8  logs are oldest first, by the ids, which ascend with time
 *   S9  only the newest log is live
 */
static const char *kv_manifest_check(const struct kv_manifest *m)
{
    /* Of the table before. */
    uint64_t seq = 0;

    if (m->gen < 1 || m->gen >= KV_NUMBER_MAX) return "S3: generation";
    if (m->next_id >= KV_NUMBER_MAX) return "S3: next id";
    if (m->seq >= KV_NUMBER_MAX) return "S3: seq";
    for (size_t i = 0; i < m->tables_count; i++) {
        const struct kv_table_meta *t = &m->tables[i];

        if (t->id >= m->next_id) return "S4: table id";
        if (t->records < 1 || t->tombstones > t->records)
            return "S5: table counts";
        /* Gaps are allowed: a flush or a merge of which no record is left has
         * no table. Commits are counted from 1. */
        if (t->seq_first <= seq) return "S6: table order";
        if (t->seq_last < t->seq_first) return "S6: table order";
        seq = t->seq_last;
    }
    /* Not equal in general: commits that left no record are in no table. */
    if (m->seq < seq) return "S6: table order";
    for (size_t i = 0; i < m->logs_count; i++) {
        const struct kv_log_meta *l = &m->logs[i];

        if (l->id >= m->next_id) return "S7: log id";
        if (i > 0 && l->id <= m->logs[i - 1].id) return "S8: log order";
        if (l->live && i + 1 < m->logs_count) return "S9: two live logs";
    }
    return NULL;
}

/* The image must be the one that its content encodes to: no other value
 * stands for the same thing, and what is reserved is zero, so that a later
 * format can use it and this one refuses it. One comparison instead of a rule
 * for each reserved field and each state of a log that is none. env->uuid
 * must be the image's, and the counts of m those of the image. */
static int kv_manifest_check_image(struct kv_env *env,
                                   const struct kv_file *file,
                                   const unsigned char *image, size_t bytes,
                                   const struct kv_manifest *m,
                                   struct kvmeta_error *err)
{
    unsigned char *again = kv_alloc_zeroed(env, bytes);
    bool same;

    assert(bytes == kv_manifest_image_bytes(m->tables_count, m->logs_count));
    if (!again) return kv_fail_memory(err, bytes);
    kv_manifest_encode(env, m, again);
    same = memcmp(image, again, bytes) == 0;
    kv_free(env, again);
    if (same) return KVMETA_OK;
    return kv_fail_corrupt(err, file, 0, "manifest: reserved bytes are set");
}

/* Finds the two copies in the file, and decodes the first whole one. *healed:
 * one of them is damaged. The second stands behind the first, at a multiple
 * of the stride; where, only the first could tell, which may be the damaged
 * one: so all multiples are tried. Bounded: the file has at most 512 of them,
 * and each is summed once at most. */
static int kv_manifest_pick(struct kv_env *env, const struct kv_file *file,
                            const unsigned char *bytes, size_t size,
                            struct kv_manifest *m, bool *healed,
                            struct kvmeta_error *err)
{
    size_t found[2] = {0, 0};
    size_t length[2] = {0, 0};
    unsigned copies = 0;
    int rc;

    for (size_t at = 0; at < size && copies < 2; at += KV_MANIFEST_STRIDE) {
        size_t n = kv_manifest_image_at(env, bytes + at, size - at);

        if (n == 0) continue;
        found[copies] = at;
        length[copies++] = n;
    }
    if (copies == 0)
        return kv_fail_corrupt(err, file, 0, "manifest: both copies damaged");
    /* No crash leaves two whole images that differ: somebody has put them
     * together, or part of the file is from another time. Which one is right
     * is not for us to guess. */
    if (copies == 2 && (length[0] != length[1]
                        || memcmp(bytes + found[0], bytes + found[1],
                                  length[0]) != 0))
        return kv_fail_corrupt(err, file, found[1],
                               "manifest: the two copies differ");
    assert(found[0] + length[0] <= size);
    assert(copies == 1 || found[0] < found[1]);
    *healed = copies == 1;
    rc = kv_manifest_decode(env, file, bytes + found[0], length[0], m, err);
    if (rc) return rc;
    return kv_manifest_check_image(env, file, bytes + found[0], length[0], m,
                                   err);
}

/* Reads the manifest and checks all that can be said of it alone.
 * KVMETA_NOT_FOUND where there is none. Sets env->uuid, by which everything
 * else is then read, also if a later check fails; *healed: a swap is to be
 * made, for one copy is damaged. Writes nothing. After an error, too, m is to
 * be freed, and so must have been zeroed. */
static int kv_manifest_read(struct kv_env *env, struct kv_manifest *m,
                            bool *healed, struct kvmeta_error *err)
{
    struct kv_file file = {0};
    unsigned char *bytes = NULL;
    const char *rule;
    uint64_t size = 0;
    int rc;

    rc = kv_file_open(env, KV_FILE_MANIFEST, 0, 0, &file, err);
    if (rc) return rc;
    rc = kv_file_size(env, &file, &size, err);
    if (rc) goto done;
    /* A hostile file may be of any size: no more is allocated for it than for
     * the largest one of ours. */
    if (size > 2 * (uint64_t)KV_MANIFEST_BYTES_MAX) {
        rc = kv_fail_corrupt(err, &file, size, "manifest: too large");
        goto done;
    }
    bytes = kv_alloc(env, (size_t)size + 1);
    if (!bytes) {
        rc = kv_fail_memory(err, (size_t)size + 1);
        goto done;
    }
    rc = kv_file_read(env, &file, bytes, (size_t)size, 0, err);
    if (!rc)
        rc = kv_manifest_pick(env, &file, bytes, (size_t)size, m, healed, err);
    if (rc) goto done;
    rule = kv_manifest_check(m);
    /* They are counted up from here. */
    if (!rule
        && kv_max(m->gen, kv_max(m->next_id, m->seq)) >= KV_NUMBER_READ_MAX)
        rule = "S3: numbers";
    if (rule) rc = kv_fail_corrupt(err, &file, 0, "manifest: %s", rule);
done:
    kv_free(env, bytes);
    kv_file_close(env, &file);
    return rc;
}

/* Writes and syncs both copies under a name that no open reads, by one write
 * and one sync. *file is the caller's to close, after an error too. A file
 * that an earlier life has left there is removed, not overwritten: nothing of
 * it may become part of the new one, nor a link in its place be followed. */
static int kv_manifest_write_tmp(struct kv_env *env,
                                 const struct kv_manifest *m,
                                 struct kv_file *file,
                                 struct kvmeta_error *err)
{
    size_t bytes = kv_manifest_image_bytes(m->tables_count, m->logs_count);
    size_t second = (size_t)kv_align_up(bytes, KV_MANIFEST_STRIDE);
    unsigned char *image = kv_alloc_zeroed(env, second + bytes);
    int rc;

    assert(!file->open);
    assert(bytes <= KV_MANIFEST_BYTES_MAX);
    assert(second >= bytes);
    if (!image) return kv_fail_memory(err, second + bytes);
    kv_manifest_encode(env, m, image);
    if (!KV_MUTANT(17)) memcpy(image + second, image, bytes);
    rc = kv_file_unlink(env, KV_FILE_MANIFEST_TMP, 0, err);
    if (!rc)
        rc = kv_file_open(env, KV_FILE_MANIFEST_TMP, 0, KVMETA_VFS_WRITE
                          | KVMETA_VFS_CREATE | KVMETA_VFS_EXCL, file, err);
    if (!rc) rc = kv_file_write(env, file, image, second + bytes, 0, err);
    if (!rc && !KV_MUTANT(5)) rc = kv_file_sync(env, file, err);
    kv_free(env, image);
    return rc;
}

/*
 * Makes `m` the manifest on disk. *renamed: whether the old one may be gone:
 * an error then leaves it open which of the two the next open finds, and the
 * caller must not write on. An error before that has changed nothing, and if
 * it was for want of space the swap may be tried again later. Swap lock held.
 * All files that m names must be on disk, their names included (S2).
 */
static int kv_manifest_store(struct kv_env *env, const struct kv_manifest *m,
                             bool *renamed, struct kvmeta_error *err)
{
    struct kv_file file = {0};
    char from[KV_NAME_BYTES];
    char to[KV_NAME_BYTES];
    int rc;

    assert(kv_manifest_check(m) == NULL);
    *renamed = false;
    kv_file_name(KV_FILE_MANIFEST_TMP, 0, from);
    kv_file_name(KV_FILE_MANIFEST, 0, to);
    rc = kv_manifest_write_tmp(env, m, &file, err);
    kv_file_close(env, &file);
    if (rc) {
        /* It takes space; the next open would remove it, but not before. */
        (void)kv_file_unlink(env, KV_FILE_MANIFEST_TMP, 0, NULL);
        return rc;
    }
    /* Set before the attempt: a rename that fails may have happened. */
    *renamed = true;
    /* The one step that counts: before it the old manifest is there, after it
     * the new one, and never none or a part (POSIX, rename). */
    rc = env->vfs->rename(env->vfs->user, env->dir, from, to);
    if (rc)
        return kv_fail(err, KVMETA_E_IO, rc, "MANIFEST: rename: error %d", rc);
    return KV_MUTANT(6) ? KVMETA_OK : kv_dir_sync(env, err);
}

/* ==========================================================================
 * The store
 *
 * What a handle holds, by who may touch it, and the small things that every
 * section below needs: failing for good, swapping the manifest, ids.
 * Lock order: job, commit right, swap, mark, state. State and queue are never
 * held over I/O or log_fn, and the mark lock not over log_fn.
 *
 * Job lock, commit right, swap lock and mark lock are held over I/O, each for
 * the one thing that it orders: steps, commits, manifests, marks. Readers
 * take none of them, nor the state lock, which is why a get never waits for a
 * disk.
 *
 * A handle is writable until something fails on the log, the manifest or LOCK
 * whose outcome on disk is not known: a sync, a write other than for want of
 * space, a rename. From then on (`failed`) no commit and no step begins;
 * reads go on. Nothing is tried again: a system that has reported a failed
 * sync once may report the next one of the same file as a success, though the
 * bytes are lost. What is certain not to have happened (kv_passing) fails one
 * call only; so does a table, which is written anew in a new file.
 * ========================================================================== */

enum {
    KV_MARK_SYNC_NS = 100 * 1000 * 1000, /* kvmeta.h names this time */
    KV_RETRY_NS = 200 * 1000 * 1000,     /* after a failed step */
    KV_WAIT_NS = 20 * 1000 * 1000,       /* at a time, for a step to end */
    KV_IN_PLACE_MAX = 128,        /* changes made while readers wait */
    KV_GROUP_BYTES_MAX = 4 << 20, /* of entries; one batch may have more */
    KV_LOG_FRAME_BYTES_MAX = INT32_MAX   /* of the entries of one batch */
};

_Static_assert(KV_GROUP_BYTES_MAX <= KV_LOG_FRAME_BYTES_MAX,
               "a group fits in a frame wherever a batch does");

enum kv_turn {
    KV_TURN_WAIT,
    KV_TURN_LEAD,                 /* the right has been handed over */
    KV_TURN_DONE                  /* another leader has done its work */
};

/*
 * One caller's batch, on the caller's stack. The caller fills in the first
 * part, and the leader the second, while the caller waits; once `turn` is
 * set, it is the caller's again and may be gone.
 *
 * Without changes it is a barrier (a sync), or only asks whether expectations
 * hold. With `exclusive` only the right itself is wanted, for work that is no
 * commit; then there is no durability, and the rest is unused.
 */
struct kv_request {
    const struct kvmeta_op *ops;
    size_t n;
    size_t changes;               /* operations that are not EXPECT */
    size_t puts;                  /* of them; the others are removes */
    unsigned durability;          /* enum kvmeta_durability; 0: exclusive */
    bool exclusive;               /* wants the commit right, for itself */
    void *previous;               /* value_bytes, or NULL: of the last op */

    bool found;                   /* the last op met a record */
    bool changed;                 /* something was logged for it */
    int rc;                       /* of the commit, once done */
    uint64_t seq;                 /* the last commit number with it in */
    _Atomic int turn;             /* enum kv_turn; set last */
    unsigned room;                /* where it waits */
    struct kv_request *next;      /* in the queue, then in the group */
};

/* For the statistics; what they mean stands in kvmeta.h. Those of commits are
 * changed by the holder of the commit right only (kv_counter_add), the others
 * by anybody. */
struct kv_counters {
    _Atomic uint64_t user_bytes;
    _Atomic uint64_t bytes_logged;
    _Atomic uint64_t commits;
    _Atomic uint64_t groups;
    _Atomic uint64_t group_commits_max;
    _Atomic uint64_t syncs;
    _Atomic uint64_t rotations;
    _Atomic uint64_t flushes;
    _Atomic uint64_t merges;
    _Atomic uint64_t full_compactions;
    _Atomic uint64_t heals;
    _Atomic uint64_t stalls;
    _Atomic uint64_t stall_us;
    _Atomic uint64_t background_errors;
    _Atomic uint64_t leader_handovers;
};

struct kvmeta {
    /* Fixed after open. */
    void *memory;                   /* what holds this struct, which begins
                                       with a cache line */
    struct kv_env env;
    struct kvmeta_options options;  /* defaults filled in */
    _Atomic uint32_t *alive;        /* 0 in a forked child; NULL: ask */
    struct kv_file lock;            /* LOCK; closed only where a read-only
                                       store has none */
    bool locks_made;
    bool has_thread;
    pthread_t thread;
    struct kvmeta_stats found;      /* open_*: what recovery saw */

    /* Has its own synchronisation. What is atomic is set by one side, with a
     * lock where one is named, and looked at by others who need no more than
     * a recent value. */
    struct kv_tree tree;
    struct kv_counters counters;
    _Atomic int failed;             /* code that made writing stop, or 0; set
                                       once, state lock */
    _Atomic bool stopping;          /* a close has begun */
    _Atomic bool backlogged;        /* writers must wait for the background;
                                       state lock */
    _Atomic bool mark_dirty;        /* written since LOCK was synced; set with
                                       dirty_since_ns under the state lock */
    _Atomic uint64_t log_end;       /* of the live log, for the background;
                                       commit right */
    _Atomic uint64_t durable_seq;   /* last commit known to be on disk; commit
                                       right */
    _Atomic bool unsynced;          /* commits are not yet durable, and
                                       unsynced_since_ns says since when; kept
                                       with sync_interval_ms only */

    /* Queue lock: the queue and who has the commit right. */
    pthread_mutex_t queue_lock;
    struct kv_request *queue_first;
    struct kv_request *queue_last;
    _Atomic size_t queue_count;
    pthread_cond_t rooms[2];        /* a group leaves its room all at once */
    unsigned room;                  /* of those who come now: 0 or 1 */
    size_t last_group;              /* requests that shared the last sync */
    _Atomic int naps;               /* waits that sleep at once: see
                                       kv_right_watch; below 0 when several
                                       have counted down at the same time */
    _Atomic int right;              /* enum kv_right */

    /* The commit right: the live log, and what is on its way into it. Not
     * open before the first change, and after a rotation without successor;
     * then the buffer is empty. */
    struct kv_log log;
    struct kv_log_buffer buffer;

    /* Job lock: one step of background work at a time; the open tables. */
    pthread_mutex_t job_lock;
    struct kv_table *tables;        /* as manifest.tables, open */
    size_t tables_count;
    size_t tables_cap;
    uint64_t tables_seq;            /* as manifest.seq */
    struct kvmeta_digest tables_digest;   /* as manifest.digest */
    _Atomic bool compaction_stopped;      /* a merge did not balance; also
                                             looked at by who waits for one */
    uint64_t background_synced;     /* kv_job_log_sync has synced the live log
                                       up to here, or one before it */
    int between_failed;             /* enum kv_step: what failed last between
                                       the blocks of a step, 0: nothing */
    uint64_t between_retry_ns;      /* it is not tried there before this */

    /* Swap lock: held over the I/O of a swap, from the copy of the manifest
     * on, so that no change of it is lost. Rotations and steps swap. */
    pthread_mutex_t swap_lock;

    /* Mark lock: held over the write of a mark. Commits and swaps write them,
     * at the same time; each changes its own part of the last one. */
    pthread_mutex_t mark_lock;
    struct kv_mark mark;            /* the last one, written or tried */

    /* State lock: short; also what the background waits on. */
    pthread_mutex_t state_lock;
    pthread_cond_t work;            /* there may be something to do */
    pthread_cond_t progress;        /* a step has ended */
    struct kv_manifest manifest;    /* as on disk; changed with the swap lock
                                       held, too, so either lock lets read */
    uint64_t next_id;               /* of a log or table; manifest.next_id is
                                       the one of the last swap */
    struct kv_log prepared;         /* file not open: none */
    uint64_t newest_log;            /* id; that of a prepared one is higher */
    uint64_t log_syncing;           /* id of the log that a job syncs, or 0 */
    struct kv_file log_retired;     /* its file, to be closed by that job */
    bool flush_wanted;              /* of sealed logs without a live one */
    bool full_wanted;               /* a full compaction, however little */
    bool heal_wanted;               /* a damaged file has been met */
    bool woken;                     /* `work` was signalled, perhaps while the
                                       worker made a plan */
    uint64_t dirty_since_ns;        /* see mark_dirty; the vfs's clock, here */
    uint64_t unsynced_since_ns;     /* and below */
    uint64_t retry_ns;              /* the worker tries again then, unless it
                                       is woken before; 0: no error */
    struct kvmeta_error failed_error;     /* why `failed` */
    struct kvmeta_error background_error; /* code 0: all is well */
};

static uint64_t kv_now(const struct kvmeta *db)
{
    return db->env.vfs->clock_ns(db->env.vfs->user);
}

/* For a counter that only the holder of the commit right changes: no locked
 * instruction. */
static void kv_counter_add(_Atomic uint64_t *counter, uint64_t n)
{
    uint64_t now = atomic_load_explicit(counter, memory_order_relaxed);

    assert(now + n >= now);
    atomic_store_explicit(counter, now + n, memory_order_relaxed);
}

/* In a forked child? The kernel empties the alive page there, so that asking
 * costs one load; a system call before every write would cost 200 ns. */
static bool kv_forked(const struct kvmeta *db)
{
    if (KV_LIKELY(db->alive != NULL))
        return atomic_load_explicit(db->alive, memory_order_relaxed) == 0;
    return db->env.vfs->process_id(db->env.vfs->user) != db->env.process_id;
}

/* Results after which the same call may succeed later: nothing is broken,
 * and what is on disk is known. Space, memory and descriptors come back; a
 * close (KV_STOPPED) is no failure at all. */
static bool kv_passing(int rc)
{
    return rc >= 0 || rc == KVMETA_E_NOSPACE || rc == KVMETA_E_NOMEM
        || rc == KVMETA_E_LIMIT;
}

/* A write failed, and what is on disk is unknown: no more writing. The first
 * reason stays: later ones may only follow from it. Wakes those who wait for
 * the background, which will do nothing more for them. The state lock must
 * not be held; any other may be. */
static void kv_store_fail(struct kvmeta *db, const struct kvmeta_error *err)
{
    bool first;

    assert(err->code < 0);
    pthread_mutex_lock(&db->state_lock);
    first = db->failed == KVMETA_OK;
    if (first) {
        db->failed_error = *err;
        db->failed = err->code;
    }
    assert(db->failed == db->failed_error.code);
    pthread_cond_broadcast(&db->progress);
    pthread_mutex_unlock(&db->state_lock);
    if (first)
        kv_log(&db->env, KVMETA_LOG_ERROR, "writes stopped: %s", err->message);
}

/* Fails the store for good unless the error is a passing one. */
static int kv_store_judge(struct kvmeta *db, int rc,
                          const struct kvmeta_error *err)
{
    assert(!rc || err->code == rc);
    if (!kv_passing(rc)) kv_store_fail(db, err);
    return rc;
}

/* An id for a log or a table. It is used once, even if its file is never
 * finished: files that a crash leaves behind are never in the way. On disk
 * the next id is noted by swaps only; an open also looks at the names of the
 * files that are there. */
static uint64_t kv_store_new_id(struct kvmeta *db)
{
    uint64_t id;

    pthread_mutex_lock(&db->state_lock);
    id = db->next_id++;
    pthread_mutex_unlock(&db->state_lock);
    assert(id > 0);               /* 0 stands for no file, or no log */
    return id;
}

/* In the second half of a log the background is woken this often, to sync it
 * up to there. */
static uint64_t kv_log_step_bytes(const struct kvmeta *db)
{
    assert(db->options.log_bytes_max >= 16);
    return db->options.log_bytes_max / 16;
}

/* There may be work. The state lock must not be held. */
static void kv_store_wake(struct kvmeta *db)
{
    pthread_mutex_lock(&db->state_lock);
    db->woken = true;
    pthread_cond_signal(&db->work);
    pthread_mutex_unlock(&db->state_lock);
}

/* A condition for kv_cond_wait_ns, whose waits do not depend on what the
 * system's clock is set to. macOS cannot tie one to a clock, but has waits of
 * a given length. */
static int kv_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    int e = pthread_condattr_init(&attr);

    if (e) return e;
#if !defined(__APPLE__)
    e = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
#endif
    if (!e) e = pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
    return e;
}

/* Waits until the condition is signalled, for `ns` at most, or for no reason
 * at all. State lock held, which is let go of meanwhile. */
static void kv_cond_wait_ns(struct kvmeta *db, pthread_cond_t *cond,
                            uint64_t ns)
{
    struct timespec until = {0, 0};

#if !defined(__APPLE__)
    clock_gettime(CLOCK_MONOTONIC, &until);
#endif
    ns += (uint64_t)until.tv_nsec;
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    assert(until.tv_nsec >= 0);
#if defined(__APPLE__)
    pthread_cond_timedwait_relative_np(cond, &db->state_lock, &until);
#else
    pthread_cond_timedwait(cond, &db->state_lock, &until);
#endif
}

/*
 * Writes a mark, without a sync. gen 0, log_id 0: what the last one said of
 * the manifest, or of the log, stays as it is. `durable` must have been
 * synced and `gen` be on disk before: a mark is evidence against other files.
 *
 * A full disk is no error: what is lost is evidence, without which a store
 * opens all the same.
 */
static int kv_store_mark(struct kvmeta *db, uint64_t gen, uint64_t log_id,
                         uint64_t durable, struct kvmeta_error *err)
{
    struct kv_mark mark;
    int rc;

    assert(gen > 0 || log_id > 0);
    assert(log_id == 0 || durable > 0);
    pthread_mutex_lock(&db->mark_lock);
    mark = db->mark;
    mark.counter++;
    assert(gen == 0 || gen > mark.gen);
    if (gen) mark.gen = gen;
    if (log_id) {
        mark.log_id = log_id;
        mark.durable = durable;
    }
    rc = kv_mark_write(&db->env, &db->lock, &mark, err);
    db->mark = mark;
    pthread_mutex_unlock(&db->mark_lock);
    if (rc == KVMETA_E_NOSPACE) return KVMETA_OK;   /* lost evidence only */
    return rc;
}

/*
 * Replaces the manifest by `next`, which the caller has made from a copy
 * while it held the swap lock, and holds still. Takes next over in any case.
 * live: the log that is live afterwards, or NULL.
 *
 * OK: `next` is on disk and in db->manifest. An error with *undone: nothing
 * changed. An error without: the store has failed, and either of the two
 * manifests may be found by the next open, so no file may be unlinked.
 *
 * The mark is synced before the caller unlinks anything: should an older
 * manifest ever come back, the generation in the mark says so. If the mark
 * fails the store does, but the swap has happened, and the caller must go on
 * with it.
 */
static int kv_store_swap(struct kvmeta *db, struct kv_manifest *next,
                         const struct kv_log *live, bool *undone,
                         struct kvmeta_error *err)
{
    struct kvmeta_error mark_err = {0};
    struct kv_manifest old;
    bool renamed = false;
    int rc;

    assert(db->lock.open);
    assert(next->tables);
    assert(next->logs_count <= KV_MANIFEST_LOGS_MAX);
    assert(!live || kv_manifest_live(next));
    assert(!live || kv_manifest_live(next)->id == live->head.id);
    /* Ids that are given out later are for files that a later swap names. */
    pthread_mutex_lock(&db->state_lock);
    next->next_id = db->next_id;
    pthread_mutex_unlock(&db->state_lock);
    next->gen = db->manifest.gen + 1;
    KV_SCHED_POINT("swap");
    rc = kv_manifest_store(&db->env, next, &renamed, err);
    *undone = !renamed;
    if (rc) {
        kv_manifest_free(&db->env, next);
        if (renamed || !kv_passing(rc)) kv_store_fail(db, err);
        return rc;
    }
    assert(renamed);
    pthread_mutex_lock(&db->state_lock);
    old = db->manifest;
    db->manifest = *next;
    pthread_mutex_unlock(&db->state_lock);
    memset(next, 0, sizeof *next);
    kv_manifest_free(&db->env, &old);

    rc = kv_store_mark(db, db->manifest.gen, live ? live->head.id : 0,
                       live ? live->durable : 0, &mark_err);
    if (!rc && !KV_MUTANT(7)) rc = kv_file_sync(&db->env, &db->lock, &mark_err);
    if (rc) kv_store_fail(db, &mark_err);
    return KVMETA_OK;
}

/* ==========================================================================
 * Commit right
 *
 * One caller at a time may change the tree and write to the log: the leader.
 * The others queue; the leader commits their batches with its own, and then
 * hands the right to the first that is left. It is a lock whose holder may do
 * the work of those who wait for it, so that they share a sync.
 *
 * As long as nobody has to wait, the right changes hands by one atomic
 * operation. QUEUED says that somebody may be in the queue: whoever has the
 * right then cannot give it back without the queue lock.
 *
 *             take                   take, queue lock held
 *     FREE ---------> TAKEN      any ---------------------> QUEUED
 *          <---------
 *             give                   give, queue lock held, queue empty
 *                             QUEUED ---------------------> FREE
 *
 * A taker under the queue lock that finds FREE has the right itself, as
 * QUEUED: the first to give it will look at the queue once for nothing. While
 * somebody waits the right is never FREE, so nobody overtakes the queue.
 *
 * Who waits for a sync stays awake first, as a sync may take little longer
 * than going to sleep and being woken (kv_right_watch). Sleepers wait in two
 * rooms. A leader that has emptied the queue sends later comers to the other
 * room, so that one broadcast wakes its group and hardly anybody else.
 *
 * (C1) Whoever has the right gives it on exactly once.
 * ========================================================================== */

enum kv_right {
    KV_RIGHT_FREE,
    KV_RIGHT_TAKEN,
    KV_RIGHT_QUEUED
};

enum {
    KV_WATCH_NS = 1000000,        /* some syncs of a fast disk */
    KV_NAPS = 256                 /* waits without one after a vain one */
};

/* Queue lock held, here and in kv_queue_pop. The request stays its caller's,
 * who sleeps until it is done or leads. */
static void kv_queue_push(struct kvmeta *db, struct kv_request *r)
{
    assert(r->turn == KV_TURN_WAIT);
    assert(db->room < 2);
    r->next = NULL;
    r->room = db->room;
    if (db->queue_last)
        db->queue_last->next = r;
    else
        db->queue_first = r;
    db->queue_last = r;
    db->queue_count++;
}

static struct kv_request *kv_queue_pop(struct kvmeta *db)
{
    struct kv_request *r = db->queue_first;

    assert(r);
    assert(db->queue_count > 0);
    db->queue_first = r->next;
    if (!db->queue_first) db->queue_last = NULL;
    db->queue_count--;
    assert((db->queue_count > 0) == (db->queue_first != NULL));
    r->next = NULL;
    return r;
}

/*
 * Waits for the request's turn without sleeping, for a while: gives way to
 * whoever wants to run, and looks again. For durable requests, since where
 * syncs are fast, putting sixteen threads to sleep and waking them took more
 * than half as long as the sync.
 *
 * It is in vain where syncs are slow, or where threads with work of their own
 * take the processor. Then those who come next sleep at once, for a number of
 * times, before one of them tries again: one thread that computed beside
 * sixteen writers lost about a twentieth by it. The idea, not its rules, is
 * that of RocksDB's write thread (enable_write_thread_adaptive_yield).
 */
static void kv_right_watch(struct kvmeta *db, const struct kv_request *r)
{
    uint64_t start;

    if (db->naps > 0) {
        db->naps--;
        return;
    }
    start = kv_now(db);
    while (r->turn == KV_TURN_WAIT && db->naps <= 0) {
        sched_yield();
        if (kv_now(db) - start > KV_WATCH_NS) db->naps = KV_NAPS;
    }
}

/*
 * Returns with the right (true), or after another leader has done the work of
 * the request (false), whose result is then in r->rc. An exclusive request is
 * never done by another: it always returns true. Waits for commits, so for
 * syncs too; only the job lock may be held.
 */
static bool kv_right_take(struct kvmeta *db, struct kv_request *r)
{
    int expected = KV_RIGHT_FREE;

    if (KV_LIKELY(atomic_compare_exchange_strong(&db->right, &expected,
                                                 KV_RIGHT_TAKEN)))
        return true;
    pthread_mutex_lock(&db->queue_lock);
    if (atomic_exchange(&db->right, KV_RIGHT_QUEUED) == KV_RIGHT_FREE) {
        pthread_mutex_unlock(&db->queue_lock);
        return true;
    }
    kv_queue_push(db, r);
    pthread_mutex_unlock(&db->queue_lock);

    if (r->durability == KVMETA_DURABLE) kv_right_watch(db, r);
    if (r->turn == KV_TURN_WAIT) {
        pthread_mutex_lock(&db->queue_lock);
        while (r->turn == KV_TURN_WAIT)
            pthread_cond_wait(&db->rooms[r->room], &db->queue_lock);
        pthread_mutex_unlock(&db->queue_lock);
    }
    assert(!r->exclusive || r->turn == KV_TURN_LEAD);
    if (r->turn == KV_TURN_DONE) return false;
    assert(db->right == KV_RIGHT_QUEUED);
    kv_counter_add(&db->counters.leader_handovers, 1);
    return true;
}

/*
 * Ends the requests of a group, whose first one is the caller's own, and
 * hands the right on. NULL: there is no group; the caller wanted the right
 * for itself. Turns are set under the lock that sleepers look at them with, so
 * no wake-up is lost though the broadcasts come after it: there those who wake
 * need not wait for this thread again.
 */
static void kv_right_give(struct kvmeta *db, struct kv_request *group)
{
    struct kv_request *r = group ? group->next : NULL;
    struct kv_request *next;
    int expected = KV_RIGHT_TAKEN;
    bool wake[2] = {false, false};

    if (KV_LIKELY(!r) && KV_LIKELY(atomic_compare_exchange_strong(
                             &db->right, &expected, KV_RIGHT_FREE)))
        return;
    pthread_mutex_lock(&db->queue_lock);
    assert(db->right == KV_RIGHT_QUEUED);
    for (; r; r = next) {         /* its memory may be gone after its turn */
        next = r->next;
        wake[r->room] = true;
        r->turn = KV_TURN_DONE;
    }
    if (db->queue_first) {
        r = kv_queue_pop(db);
        wake[r->room] = true;
        r->turn = KV_TURN_LEAD;
    } else {
        db->right = KV_RIGHT_FREE;
    }
    pthread_mutex_unlock(&db->queue_lock);
    if (wake[0]) pthread_cond_broadcast(&db->rooms[0]);
    if (wake[1]) pthread_cond_broadcast(&db->rooms[1]);
}

/* ==========================================================================
 * Rotation
 *
 * Seals the live log and, if wanted, begins its successor, in one swap. The
 * caller has the commit right, so nothing is committed meanwhile, and the
 * state of the tree is the one at the end of the old log. Called by a commit
 * whose frame does not fit or has no log yet (with a successor), and without
 * one by what needs all commits in sealed logs: a flush on demand, a heal, a
 * close. Writers wait for it, so the background does in advance what it can
 * (kv_job_prepare, kv_job_log_sync).
 *
 * (O1) Sync the old log, then create and sync the new one, then swap, then
 *      append.
 *
 *   old log synced       because the manifest will give its length and the
 *                        sum of its last frame: no tail is tolerated then
 *   new log synced       because a swap names only what is on disk (S2)
 *   manifest swapped     here the old log is sealed and the new one live
 *   first frame          not earlier: a log with frames that is not listed
 *                        shows the open that the manifest is stale
 *
 * A cut before the swap leaves the old log live, and perhaps a file without a
 * frame, which is garbage. A passing error there leaves the same, and the old
 * log goes on.
 * ========================================================================== */

/*
 * Writes what is pending, cuts the log to its length and syncs it. Afterwards
 * every commit is durable, buffered ones too, and the file holds nothing but
 * its frames. Should the rotation fail later on, this was a sync like others:
 * the log may be appended to.
 */
static int kv_rotate_end_log(struct kvmeta *db, struct kvmeta_error *err)
{
    struct kv_log *log = &db->log;
    int rc = KVMETA_OK;

    assert(log->file.open);
    /* Padded, though it is the last frame: should the swap fail for want of
     * space, the log goes on. */
    if (kv_log_must_write(log, &db->buffer))
        rc = kv_log_write(&db->env, log, &db->buffer,
                          kv_tree_now(&db->tree)->digest, true, false, err);
    /* Always: a write that met a full disk may have left bytes behind. */
    if (!rc) rc = kv_file_truncate(&db->env, &log->file, log->end, err);
    if (!rc) log->size = log->end;
    if (!rc && !KV_MUTANT(8)) rc = kv_log_sync(&db->env, log, err);
    if (!rc) {
        db->durable_seq = kv_tree_now(&db->tree)->seq;
        db->unsynced = false;
    }
    assert(rc || db->buffer.entries == 0);
    assert(rc || log->end % log->head.align == 0);
    assert(rc || log->next_seq == kv_tree_current(&db->tree)->seq + 1);
    return rc;
}

/*
 * A log with its header on disk: the prepared one, or a new one. It begins
 * with the commit after the last. newest_log says, from this moment on, that
 * lower ids have been passed over; a file that is being prepared under one is
 * thrown away by kv_job_prepare. After an error the file is gone again, also
 * a prepared one; its id is not used a second time.
 */
static int kv_rotate_new_log(struct kvmeta *db, struct kv_log *out,
                             struct kvmeta_error *err)
{
    const struct kv_version *now = kv_tree_now(&db->tree);
    struct kv_log log;
    uint64_t id;
    int rc = KVMETA_OK;

    pthread_mutex_lock(&db->state_lock);
    log = db->prepared;
    memset(&db->prepared, 0, sizeof db->prepared);
    id = log.file.open ? log.head.id : db->next_id++;
    assert(id > db->newest_log);
    db->newest_log = id;
    pthread_mutex_unlock(&db->state_lock);
    if (!log.file.open)
        rc = kv_log_create(&db->env, id, db->options.log_bytes_max, 0, &log,
                           err);
    if (rc) return rc;
    rc = kv_log_begin(&db->env, &log, db->options.log_align, now->seq + 1,
                      now->digest, err);
    if (rc) {
        kv_file_close(&db->env, &log.file);
        (void)kv_file_unlink(&db->env, KV_FILE_LOG, log.head.id, NULL);
        return rc;
    }
    assert(log.head.id == id);
    assert(log.end == log.durable);
    *out = log;
    return KVMETA_OK;
}

/*
 * The manifest after the rotation; swap lock held. Either log may be closed,
 * that is absent. An old log that holds no frame is dropped instead of being
 * sealed: there is nothing in it to flush. That there is no room for another
 * log passes, once the background has flushed one. After an error `next`
 * holds nothing.
 */
static int kv_rotate_manifest(struct kvmeta *db, const struct kv_log *old,
                              const struct kv_log *new,
                              struct kv_manifest *next,
                              struct kvmeta_error *err)
{
    int rc = kv_manifest_copy(&db->env, &db->manifest, next, err);
    struct kv_log_meta *l;

    if (rc) return rc;
    if (old->file.open) {
        assert(kv_manifest_live(next));
        l = &next->logs[next->logs_count - 1];
        assert(l->id == old->head.id);
        assert(old->end >= kv_log_first(old->head.align));
        l->live = false;
        l->bytes = old->end;
        l->last_hcrc = old->prev;
        if (old->end == kv_log_first(old->head.align)) next->logs_count--;
    }
    if (!new->file.open) return KVMETA_OK;
    if (next->logs_count == KV_MANIFEST_LOGS_MAX) {
        kv_manifest_free(&db->env, next);
        return kv_fail(err, KVMETA_E_LIMIT, 0, "too many logs wait");
    }
    assert(!kv_manifest_live(next));
    assert(next->logs_count == 0
           || next->logs[next->logs_count - 1].id < new->head.id);
    l = &next->logs[next->logs_count++];
    memset(l, 0, sizeof *l);
    l->id = new->head.id;
    memcpy(l->salt, new->head.salt, KV_SALT_BYTES);
    l->live = true;
    return KVMETA_OK;
}

/* Closes the old log's file, or leaves that to a sync of it that still runs
 * (kv_job_log_sync): a descriptor must not be closed, and used for another
 * file, under a system call. The swap has dropped a log without frames, so it
 * may be unlinked now (F1). */
static void kv_rotate_retire(struct kvmeta *db, struct kv_log *old)
{
    bool empty;

    if (!old->file.open) return;
    empty = old->end == kv_log_first(old->head.align);
    pthread_mutex_lock(&db->state_lock);
    if (db->log_syncing == old->head.id) {
        assert(!db->log_retired.open);
        db->log_retired = old->file;
        old->file.open = false;
    }
    pthread_mutex_unlock(&db->state_lock);
    kv_file_close(&db->env, &old->file);
    if (empty) (void)kv_file_unlink(&db->env, KV_FILE_LOG, old->head.id, NULL);
}

/* The swap. *undone: see kv_store_swap; also where it was not even tried. */
static int kv_rotate_switch(struct kvmeta *db, struct kv_log *new,
                            bool *undone, struct kvmeta_error *err)
{
    struct kv_manifest next = {0};
    int rc;

    *undone = true;
    pthread_mutex_lock(&db->swap_lock);
    rc = kv_rotate_manifest(db, &db->log, new, &next, err);
    if (!rc)
        rc = kv_store_swap(db, &next, new->file.open ? new : NULL, undone,
                           err);
    pthread_mutex_unlock(&db->swap_lock);
    return rc;
}

/*
 * successor: begin a new log. Without a live log and without a successor
 * there is nothing to do. After a passing error the old log goes on, and all
 * commits are durable or still in the buffer. After any other error the store
 * has failed; a new log that the swap may have named stays, without a frame.
 * db->log is another one only after success: the new log, or none.
 */
static int kv_rotate(struct kvmeta *db, bool successor,
                     struct kvmeta_error *err)
{
    struct kv_log new = {0};
    struct kv_log old;
    bool undone = true;
    int rc = KVMETA_OK;

    assert(!(db->options.flags & KVMETA_READ_ONLY));
    if (!db->log.file.open && !successor) return KVMETA_OK;
    if (db->log.file.open) rc = kv_rotate_end_log(db, err);
    if (!rc && successor) rc = kv_rotate_new_log(db, &new, err);
    if (!rc) rc = kv_rotate_switch(db, &new, &undone, err);
    if (rc) {
        kv_file_close(&db->env, &new.file);
        if (undone && new.head.id)
            (void)kv_file_unlink(&db->env, KV_FILE_LOG, new.head.id, NULL);
        return kv_store_judge(db, rc, err);
    }
    old = db->log;
    db->log = new;
    db->log_end = new.end;        /* 0: none, so nothing to prepare for */
    assert(db->log.file.open == successor);
    assert(db->buffer.entries == 0);
    assert(db->buffer.used == KV_FRAME_BYTES);
    kv_rotate_retire(db, &old);
    if (old.head.id) db->counters.rotations++;
    kv_store_wake(db);
    return KVMETA_OK;
}

/* ==========================================================================
 * Flush and compaction
 *
 * The steps of the background work; each is one function that does it all or
 * changes nothing. Called with the job lock held, by the worker or by the
 * host; an open, which has the store to itself, calls a few of them without.
 *
 *   flush    the oldest sealed log   becomes the newest table
 *   merge    a run of tables         becomes one table in their place
 *   heal     everything              becomes one table, written from memory
 *
 * Writers go on meanwhile. Neither a flush nor a merge takes the commit right
 * for itself; a heal has it only while the live log is sealed. All three end
 * in kv_job_install. A cut after each of the steps leaves:
 *
 *   table written, synced, read back      an unlisted table: garbage
 *   directory synced                      the same
 *   manifest swapped, mark synced         what it replaces is garbage
 *   what it replaces unlinked             nothing to clean up
 *
 * Age is the only thing that says which of two records with one key counts.
 * Tables stand oldest first and every log is younger than any table, so a
 * flush takes the oldest log and appends, and a merge takes neighbours only.
 * A tombstone may be left out of a table only where no older table is left
 * that could have a record for it to hide.
 *
 * (F1) Files that a swap dropped are unlinked after it; a new table that no
 *      swap has named is unlinked, unless the swap may have named it.
 * (F2) The records of the tables always sum up to manifest.digest: a flush
 *      moves both on to the log's end, a merge must not change the sum, and a
 *      heal sets both from one version.
 * ========================================================================== */

/* Syncs and preparations of the log that are due while a long step runs; see
 * "Background work". Called for every block that a job reads or writes. */
static void kv_step_between(void *arg);

/* The job of one step. A close stops it at its next block (KV_STOPPED), and
 * does not wait for its end; the rate starts anew, without debts. */
static void kv_job_init(struct kvmeta *db, struct kv_job *job)
{
    assert(db->options.zstd_level != 0);
    memset(job, 0, sizeof *job);
    job->between = kv_step_between;
    job->between_arg = db;
    job->env = &db->env;
    job->zstd_level = db->options.zstd_level;
    job->stop = &db->stopping;
    job->bytes_per_s = db->options.compaction_bytes_per_s;
}

/* Unlinks what a swap dropped. A failure leaves garbage for the next open. */
static void kv_job_unlink(struct kvmeta *db, int kind, uint64_t id)
{
    struct kvmeta_error err;

    assert(kind != KV_FILE_LOCK);
    assert(kind != KV_FILE_MANIFEST);
    if (kv_file_unlink(&db->env, kind, id, &err))
        kv_log(&db->env, KVMETA_LOG_WARNING, "%s", err.message);
}

/*
 * Closes a table that did not get into the manifest. undone: it is sure that
 * no manifest on disk names it, so the file goes as well. Otherwise it must
 * stay, since the next open may find the manifest that wants it; if that open
 * finds the older one, it deletes the file as garbage. Accepts the zeroed
 * table of a job that had no records.
 */
static void kv_job_discard(struct kvmeta *db, struct kv_table *table,
                           bool undone)
{
    uint64_t id = table->meta.id;

    assert(table->file.open == (id != 0));
    kv_table_close(&db->env, table);
    if (id && undone) kv_job_unlink(db, KV_FILE_TABLE, id);
}

/*
 * Swaps in what a job made: the tables [first, last) are replaced by `table`
 * (no records: by nothing), and all logs with an id up to logs_up_to go. Then
 * unlinks what is gone. seq, digest: of the new table set. Takes `table` over
 * in any case.
 *
 * The new manifest is made from the current one under the swap lock, not from
 * what the job saw when it began: rotations add logs meanwhile. Tables are
 * changed by nobody else, so `first` and `last` still mean the same ones.
 *
 * All memory is got before the swap, so that db->tables can follow it without
 * fail. After an error db->tables is as it was and nothing is unlinked but
 * the new table; if the outcome of the swap is open, not even that one.
 */
static int kv_job_install(struct kvmeta *db, size_t first, size_t last,
                          struct kv_table *table, uint64_t logs_up_to,
                          uint64_t seq, struct kvmeta_digest digest,
                          struct kvmeta_error *err)
{
    struct kv_manifest next = {0};
    struct kv_log_meta gone[KV_MANIFEST_LOGS_MAX];
    size_t add = table->meta.records > 0;
    size_t count = db->tables_count;
    size_t gone_count = 0;
    size_t kept = 0;
    bool undone = true;
    int rc;

    assert(first <= last);
    assert(last <= count);
    assert(add == table->file.open);
    assert(seq >= db->tables_seq);
    rc = kv_grow(&db->env, (void **)&db->tables, &db->tables_cap, count + 1,
                 sizeof *db->tables, err);
    /* The new table's name must be on disk before a manifest has it (S2). */
    if (!rc && add && !KV_MUTANT(9)) rc = kv_dir_sync(&db->env, err);
    pthread_mutex_lock(&db->swap_lock);
    if (!rc) rc = kv_manifest_copy(&db->env, &db->manifest, &next, err);
    if (!rc) {
        assert(next.tables_count == count);
        /* The copy has room for one table more. */
        memmove(&next.tables[first + add], &next.tables[last],
                (count - last) * sizeof *next.tables);
        if (add) next.tables[first] = table->meta;
        next.tables_count = count - (last - first) + add;
        for (size_t i = 0; i < next.logs_count; i++) {
            if (next.logs[i].id <= logs_up_to)
                gone[gone_count++] = next.logs[i];
            else
                next.logs[kept++] = next.logs[i];
        }
        next.logs_count = kept;
        next.seq = seq;
        next.digest = digest;
        if (KV_MUTANT(13)) kv_job_unlink(db, KV_FILE_LOG, logs_up_to);
        rc = kv_store_swap(db, &next, NULL, &undone, err);
    }
    pthread_mutex_unlock(&db->swap_lock);
    if (rc) {
        kv_job_discard(db, table, undone);
        return rc;
    }

    /* Nothing fails from here on; what cannot be unlinked is garbage. */
    for (size_t i = first; i < last; i++) {
        uint64_t id = db->tables[i].meta.id;

        kv_table_close(&db->env, &db->tables[i]);
        kv_job_unlink(db, KV_FILE_TABLE, id);
    }
    if (count > last)
        memmove(&db->tables[first + add], &db->tables[last],
                (count - last) * sizeof *db->tables);
    if (add) db->tables[first] = *table;
    memset(table, 0, sizeof *table);
    db->tables_count = count - (last - first) + add;
    assert(db->tables_count <= db->tables_cap);
    db->tables_seq = seq;
    db->tables_digest = digest;
    for (size_t i = 0; i < gone_count; i++)
        kv_job_unlink(db, KV_FILE_LOG, gone[i].id);
    return KVMETA_OK;
}

/*
 * Writes all records of `source` to a new table; tombstones too, unless
 * `drop`. *dropped gets the sum of those left out. No records: no table, and
 * *out is zeroed, as it is after an error; then the file is gone again.
 * Otherwise *out is open, synced and read back, but its name may not be on
 * disk: kv_job_install syncs the directory. The id is used up in any case.
 */
static int kv_job_write(struct kv_job *job, uint64_t id,
                        struct kv_source *source, bool drop, uint64_t seq_first,
                        uint64_t seq_last, struct kvmeta_digest *dropped,
                        struct kv_table *out, struct kvmeta_error *err)
{
    struct kv_table_writer w = {0};
    int rc = kv_table_writer_open(job, id, &w, err);

    assert(source->next);
    memset(out, 0, sizeof *out);
    memset(dropped, 0, sizeof *dropped);
    while (!rc) {
        rc = source->next(source, err);
        if (rc) break;
        if (source->value || !drop)
            rc = kv_table_writer_add(&w, source->key, source->value, err);
        else
            kv_digest_add(dropped, kv_digest_record(&job->env->shape,
                                                    source->key, NULL));
    }
    if (rc == KV_END) {           /* the source's end is this one's success */
        rc = KVMETA_OK;
        assert(w.records == 0 || seq_first <= seq_last);
        if (w.records > 0)
            rc = kv_table_writer_finish(&w, seq_first, seq_last, out, err);
    }
    kv_table_writer_abort(&w);    /* a finished one is not undone by it */
    assert(out->file.open == (out->meta.records > 0));
    assert(!rc || !out->file.open);
    assert(!drop || out->meta.tombstones == 0);
    return rc;
}

/* Loads the oldest sealed log and checks that it follows the tables: begins
 * with the commit after theirs, from the digest that they have. A log that is
 * whole in itself may still be the wrong one. *run is to be freed, after an
 * error too. */
static int kv_flush_load(struct kvmeta *db, const struct kv_log_meta *meta,
                         struct kv_run *run, struct kvmeta_error *err)
{
    struct kv_file file = {.kind = KV_FILE_LOG, .id = meta->id};
    int rc = kv_run_load(&db->env, meta, 0, run, err);

    if (rc) return rc;
    if (run->head.first_seq != db->tables_seq + 1
        || !kv_digest_equal(run->head.digest, db->tables_digest))
        return kv_fail_corrupt(err, &file, 72,
                               "log does not follow the tables");
    return KVMETA_OK;
}

/*
 * The oldest sealed log becomes the newest table. It is read from the disk
 * and not from the tree, which has gone on since, while a table holds the
 * state at the end of its log (F2). So every byte of a log is checked once
 * more before it is given up.
 *
 * The first table is everything that there is, and must have the log's digest
 * as its own sum. Later ones hold changes, whose effect on the digest depends
 * on the tables below; merges (kv_merge_balance) and the next open check
 * that.
 */
static int kv_job_flush(struct kvmeta *db, struct kvmeta_error *err)
{
    struct kv_log_meta meta;
    size_t count = db->tables_count;
    struct kv_inputs in = {0};
    struct kv_table table = {0};
    struct kvmeta_digest dropped;
    struct kv_run run;
    struct kv_job job;
    int rc;

    pthread_mutex_lock(&db->state_lock);
    assert(db->manifest.logs_count > 0);
    meta = db->manifest.logs[0];
    pthread_mutex_unlock(&db->state_lock);
    assert(!meta.live);
    assert(count < KV_TABLES_MAX);
    /* A sealed log's entry does not change, and only a step drops it. */
    kv_job_init(db, &job);
    rc = kv_flush_load(db, &meta, &run, err);
    if (rc) goto done;
    rc = kv_inputs_open(&job, NULL, 0, &run, 1, NULL, NULL, &in, err);
    if (rc) goto done;
    rc = kv_job_write(&job, kv_store_new_id(db), &in.merge.base, count == 0,
                      run.head.first_seq, kv_run_last_seq(&run), &dropped,
                      &table, err);
    if (rc) goto done;
    if (count == 0 && !kv_digest_equal(table.sum, run.digest)) {
        rc = kv_fail(err, KVMETA_E_CORRUPT, 0,
                     "w%016llx.wal: its records do not sum up to its digest",
                     (unsigned long long)meta.id);
        kv_job_discard(db, &table, true);
        goto done;
    }
    rc = kv_job_install(db, count, count, &table, meta.id,
                        kv_run_last_seq(&run),
                        run.digest, err);
    if (!rc) db->counters.flushes++;
done:
    kv_inputs_close(&db->env, &in);
    kv_run_free(&db->env, &run);
    return rc;
}

/*
 * sum(inputs) - sum(shadowed) - sum(dropped) must be sum(output). For two
 * tables, the oldest two, where "c-" is a tombstone:
 *
 *   younger       b2 c-      shadowed  b1 c1
 *   older      a1 b1 c1      dropped   c-        output  a1 b2
 *
 * The sums of the inputs were taken when they were written, those of what is
 * left out while merging, that of the output from what was handed to its
 * writer. A record that is lost, doubled or altered on the way shows.
 *
 * That the wrong one of two records was passed on does not: both count as
 * taken in. So a table of everything, which has nothing but live records,
 * must also have the digest of the table set.
 */
static int kv_merge_balance(const struct kvmeta *db, size_t first, size_t last,
                            struct kvmeta_digest shadowed,
                            struct kvmeta_digest dropped,
                            const struct kv_table *out,
                            struct kvmeta_error *err)
{
    struct kvmeta_digest sum = {0, 0};
    bool whole = first == 0 && last == db->tables_count;

    assert(last <= db->tables_count);
    for (size_t i = first; i < last; i++)
        kv_digest_add(&sum, db->tables[i].sum);
    kv_digest_sub(&sum, shadowed);
    kv_digest_sub(&sum, dropped);
    if (kv_digest_equal(sum, out->sum)
        && (!whole || kv_digest_equal(sum, db->tables_digest)))
        return KVMETA_OK;
    return kv_fail(err, KVMETA_E_CORRUPT, 0,
                   "merge of %zu tables does not balance: discarded",
                   last - first);
}

/*
 * The tables [first, last) become one. Tombstones go when there is nothing
 * older that they could hide. Seq and digest of the table set stay as they
 * are, since no state of the store changes.
 *
 * If it does not balance, the output is discarded and the inputs stay, which
 * are as good as they were. All sums over their bytes were right, so the
 * fault is in memory or in code, this or what wrote the inputs, and another
 * try may pass it on unseen: no more merges are made (compaction_stopped)
 * until a heal has written all anew.
 */
static int kv_job_merge(struct kvmeta *db, size_t first, size_t last,
                        struct kvmeta_error *err)
{
    struct kv_inputs in;
    struct kv_table table = {0};
    struct kvmeta_digest dropped = {0, 0};
    struct kv_job job;
    int rc;

    assert(first < last);
    assert(last <= db->tables_count);
    assert(!db->compaction_stopped);
    kv_job_init(db, &job);
    rc = kv_inputs_open(&job, db->tables + first, last - first, NULL, 0, NULL,
                        NULL, &in, err);
    in.merge.balance = true;
    if (!rc)
        rc = kv_job_write(&job, kv_store_new_id(db), &in.merge.base,
                          first == 0 || KV_MUTANT(15),
                          db->tables[first].meta.seq_first,
                          db->tables[last - 1].meta.seq_last, &dropped,
                          &table, err);
    if (!rc) {
        rc = kv_merge_balance(db, first, last, in.merge.shadowed, dropped,
                              &table, err);
        if (rc) {
            db->compaction_stopped = true;
            kv_job_discard(db, &table, true);
        }
    }
    kv_inputs_close(&db->env, &in);
    if (rc) return rc;
    return kv_job_install(db, first, last, &table, 0, db->tables_seq,
                          db->tables_digest, err);
}

/* A held version as a source. It has no tombstones; its digest is the sum of
 * what comes out. */
struct kv_version_source {
    struct kv_source base;
    struct kv_cursor cursor;
    bool started;                 /* the cursor stands on a record */
};

static int kv_version_source_next(struct kv_source *source,
                                  struct kvmeta_error *err)
{
    struct kv_version_source *s = (struct kv_version_source *)(void *)source;
    bool there = s->started ? kv_cursor_next(&s->cursor)
                            : kv_cursor_first(&s->cursor);

    (void)err;
    s->started = true;
    if (!there) return KV_END;
    s->base.key = s->cursor.at.key;
    s->base.value = s->cursor.at.value;
    assert(s->base.value);        /* NULL would be a tombstone */
    return KVMETA_OK;
}

/*
 * Seals the live log and holds the version at exactly that point, both under
 * the commit right: no commit comes between. *up_to: the newest log that the
 * version covers, 0 where there is none; later commits go to a newer log. The
 * manifest is read without the state lock: who could swap it needs the commit
 * right or the job lock.
 *
 * After an error there is nothing to drop. A store that has stopped writing
 * is not healed: how far its log got is not known.
 */
static int kv_heal_boundary(struct kvmeta *db, struct kv_version **version,
                            uint64_t *up_to, struct kvmeta_error *err)
{
    struct kv_request right = {.exclusive = true};
    int rc;

    (void)kv_right_take(db, &right);
    rc = db->failed ? kv_fail(err, KVMETA_E_FAILED, 0, "writing has stopped")
                    : kv_rotate(db, false, err);
    if (!rc) {
        assert(!kv_manifest_live(&db->manifest));
        *version = kv_tree_hold(&db->tree);
        *up_to = 0;
        if (db->manifest.logs_count > 0)
            *up_to = db->manifest.logs[db->manifest.logs_count - 1].id;
    }
    kv_right_give(db, NULL);
    return rc;
}

/*
 * A table or a sealed log is damaged, and memory holds the truth: writes one
 * table of everything, and drops all files that are older, damaged or not.
 * The version is held for as long as that takes, which costs the memory of
 * the nodes that are changed meanwhile; writers do not wait.
 *
 * The table's sum must be the digest, which every commit has kept. If it is
 * not, memory is damaged too and there is no truth left to save: the store
 * fails for good, and the files are left as they are.
 */
static int kv_job_heal(struct kvmeta *db, struct kvmeta_error *err)
{
    struct kv_version_source source = {0};
    struct kv_version *version = NULL;
    struct kv_table table = {0};
    struct kvmeta_digest dropped;
    struct kv_job job;
    uint64_t up_to;
    int rc = kv_heal_boundary(db, &version, &up_to, err);

    if (rc) return rc;
    kv_job_init(db, &job);
    source.base.next = kv_version_source_next;
    kv_cursor_init(&db->tree, version, &source.cursor);
    rc = kv_job_write(&job, kv_store_new_id(db), &source.base, true, 1,
                      kv_max(version->seq, 1), &dropped, &table, err);
    if (!rc && !kv_digest_equal(table.sum, version->digest)) {
        rc = kv_fail(err, KVMETA_E_CORRUPT, 0,
                     "memory is damaged: its records do not sum up to their "
                     "digest");
        kv_store_fail(db, err);
        kv_job_discard(db, &table, true);
    }
    if (!rc)
        rc = kv_job_install(db, 0, db->tables_count, &table, up_to,
                            version->seq, version->digest, err);
    kv_tree_drop(&db->tree, version);
    if (rc) return rc;
    assert(db->tables_count <= 1);
    db->compaction_stopped = false;
    db->counters.heals++;
    kv_log(&db->env, KVMETA_LOG_WARNING,
           "a damaged file was replaced by a table written from memory");
    return KVMETA_OK;
}

/*
 * Creates the file of the next log, so that a rotation need not: what it
 * would wait for is the sync of the directory, and of the zeros that a
 * durable log begins with. Salt and header are written at the rotation only,
 * so the file is no log before that; a cut leaves garbage.
 *
 * A rotation that came first has made a log with a higher id than this one's.
 * Ids of logs must ascend (S8), so this one is of no use any more.
 */
static int kv_job_prepare(struct kvmeta *db, struct kvmeta_error *err)
{
    uint64_t fill = db->options.durability == KVMETA_DURABLE
        ? kv_log_step_bytes(db) : 0;
    struct kv_log log;
    bool late;
    int rc = kv_log_create(&db->env, kv_store_new_id(db),
                           db->options.log_bytes_max, fill, &log, err);

    if (rc) return rc;
    assert(log.file.open);
    pthread_mutex_lock(&db->state_lock);
    assert(!db->prepared.file.open);
    assert(log.head.id != db->newest_log);
    late = log.head.id < db->newest_log;
    if (!late) db->prepared = log;
    pthread_mutex_unlock(&db->state_lock);
    if (!late) return KVMETA_OK;
    kv_file_close(&db->env, &log.file);
    kv_job_unlink(db, KV_FILE_LOG, log.head.id);
    return KVMETA_OK;
}

/*
 * Syncs what has been written to the live log so far, while writers append
 * to it, so that the sync of a rotation finds little left to do. The leader
 * lends its file; if it rotates meanwhile, the file is closed here. A failed
 * sync is reported once only by the system, so it must count here.
 *
 * log.durable does not move. Nothing is acknowledged by this sync, and it may
 * end within a sector that the next frame writes to (W1). The right is given
 * back before the sync, or commits would wait for the disk.
 */
static int kv_job_log_sync(struct kvmeta *db, struct kvmeta_error *err)
{
    struct kv_request right = {.exclusive = true};
    struct kv_file retired;
    struct kv_file file;
    uint64_t end;
    int rc = KVMETA_OK;

    (void)kv_right_take(db, &right);
    file = db->log.file;
    end = db->log.end;
    pthread_mutex_lock(&db->state_lock);
    assert(db->log_syncing == 0);
    assert(!db->log_retired.open);
    db->log_syncing = file.open ? file.id : 0;
    pthread_mutex_unlock(&db->state_lock);
    kv_right_give(db, NULL);

    if (!file.open) return KVMETA_OK;
    /* `file` is a copy, and stays open: kv_rotate_retire leaves it to us. */
    rc = kv_file_sync(&db->env, &file, err);
    pthread_mutex_lock(&db->state_lock);
    assert(db->log_syncing == file.id);
    assert(!db->log_retired.open || db->log_retired.id == file.id);
    db->log_syncing = 0;
    retired = db->log_retired;
    memset(&db->log_retired, 0, sizeof db->log_retired);
    pthread_mutex_unlock(&db->state_lock);
    kv_file_close(&db->env, &retired);
    db->background_synced = end;
    return kv_store_judge(db, rc, err);
}

/* ==========================================================================
 * Background work
 *
 * Picks the next step and does it: the worker thread in a loop, or the host
 * by kvmeta_step, or, where there is no thread, whoever waits (kv_wait).
 *
 * There is no queue of work. Each plan is made anew from what there is, so a
 * step that failed, was stopped, or was done by somebody else needs no
 * bookkeeping: it is due for as long as its reason lasts. Flags (*_wanted)
 * say only what the state does not show. What is due, the most urgent first:
 *
 *   sync, mark    by the clock; the options and kvmeta.h promise a time
 *   heal          a file is damaged; other steps would only meet it, too
 *   full, merge   only where the tables have piled up (kv_plan_crowded)
 *   flush         a log is sealed, and writers may wait for it
 *   full, merge   wherever they are due
 *   slab, prepare, log sync
 *                 what writers will need soon, so that they do not wait
 *
 * Steps can take minutes. What cannot wait so long, the first line and the
 * last, is also done in the middle of one, between two blocks that it reads
 * or writes (kv_step_between).
 *
 * The worker sleeps on `work`, but not if it was woken since its last sleep:
 * what is to be done may have come up after it had made its plan. What is due
 * by the clock is looked at again under the state lock before each sleep.
 *
 * (J1) One step at a time, under the job lock.
 * (J2) A step that fails changes nothing and is tried again later.
 * (J3) No step waits for the backlog, which only steps can clear: what steps
 *      commit has no changes, and kv_commit lets that pass.
 * ========================================================================== */

/* Up to KV_STEP_MERGE they change which files there are. */
enum kv_step {
    KV_STEP_NONE,
    KV_STEP_HEAL,
    KV_STEP_FLUSH,
    KV_STEP_FULL,                 /* a merge of all tables */
    KV_STEP_MERGE,
    KV_STEP_SLAB,                 /* memory for tree nodes, made ahead */
    KV_STEP_PREPARE,              /* the file of the next log */
    KV_STEP_LOG_SYNC,             /* of what a rotation would have to sync */
    KV_STEP_SYNC,                 /* sync_interval_ms is over */
    KV_STEP_MARK                  /* LOCK has a mark that is not synced */
};

_Static_assert(KV_STEP_NONE == 0, "a zeroed plan has no step");
_Static_assert(KV_STEP_MERGE < KV_STEP_SLAB && KV_STEP_MERGE < KV_STEP_SYNC,
               "steps on files come first");

struct kv_plan {
    enum kv_step step;
    size_t first;                 /* [first, last): the tables to merge */
    size_t last;
};

/* Sealed logs that wait for a flush: all but the live one, which can only be
 * the last (S9). State lock held. */
static size_t kv_logs_waiting_locked(const struct kvmeta *db)
{
    assert(db->manifest.logs_count <= KV_MANIFEST_LOGS_MAX);
    return db->manifest.logs_count
        - (kv_manifest_live(&db->manifest) ? 1 : 0);
}

/* Are the tables what a full compaction would leave? One table without
 * tombstones has no shadowed records either. */
static bool kv_tables_compact(const struct kvmeta *db)
{
    if (db->tables_count == 0) return true;
    return db->tables_count == 1 && db->tables[0].meta.tombstones == 0;
}

/*
 * Is it time to write everything anew? Either the tables have more records
 * than space_amp_max allows for `live` ones; or there are very many, because
 * neighbours were never alike enough to be merged, and each of them holds a
 * descriptor. Where nothing is live any record is too much: then no table is
 * left at all.
 */
static bool kv_plan_full(const struct kvmeta *db, uint64_t live)
{
    uint64_t records = 0;

    assert(db->options.space_amp_max > 1);
    if (kv_tables_compact(db)) return false;
    if (db->tables_count >= 8 * (size_t)db->options.merge_window) return true;
    for (size_t i = 0; i < db->tables_count; i++)
        records += db->tables[i].meta.records;
    return (double)records > db->options.space_amp_max * (double)live;
}

/*
 * The longest run of adjacent tables of like size that ends with the newest
 * table that ends one of merge_window or more. With a window of 4 and a ratio
 * of 3, the last five of these are merged, and next time all but the first:
 *
 *   900 | 210 190 180 | 60 35 30 32 31       then: 900 | 210 190 180 188
 *
 * Merging like with like is what keeps writing low: a record is rewritten
 * once each time that the tables around it grow by a factor of the window. A
 * table that is merged with one much smaller is rewritten for almost nothing.
 * Reads look at memory only, so unlike elsewhere many tables cost them
 * nothing, and the window may be wide.
 */
static bool kv_plan_merge(const struct kvmeta *db, struct kv_plan *plan)
{
    assert(db->options.merge_ratio >= 1);
    assert(db->options.merge_window >= 2);
    for (size_t last = db->tables_count; last > 0; last--) {
        uint64_t smallest = UINT64_MAX;
        uint64_t largest = 0;
        size_t first = last;

        while (first > 0) {
            uint64_t bytes = db->tables[first - 1].meta.bytes;

            smallest = kv_min(smallest, bytes);
            largest = kv_max(largest, bytes);
            if (largest / db->options.merge_ratio > smallest) break;
            first--;
        }
        if (last - first < db->options.merge_window) continue;
        plan->first = first;
        plan->last = last;
        return true;
    }
    return false;
}

/*
 * What writers will need: memory, another log, or a sync ahead of the
 * rotation. A log that is less than half full needs neither of the last two.
 * Durable commits sync the log themselves, so that a rotation has little left
 * to wait for.
 *
 * log_end belongs to the leader and may grow while this looks at it. It is
 * below background_synced only if the log has been rotated since. If the new
 * one has grown past that offset already, one sync comes later than it could.
 */
static enum kv_step kv_plan_ahead(struct kvmeta *db)
{
    uint64_t end = db->log_end;
    bool prepared;

    pthread_mutex_lock(&db->state_lock);
    prepared = db->prepared.file.open;
    pthread_mutex_unlock(&db->state_lock);
    if (kv_tree_wants_slab(&db->tree)) return KV_STEP_SLAB;
    if (end < db->background_synced) db->background_synced = 0;
    if (end < db->options.log_bytes_max / 2) return KV_STEP_NONE;
    if (!prepared) return KV_STEP_PREPARE;
    assert(end >= db->background_synced);
    if (db->options.durability != KVMETA_DURABLE
        && end >= db->background_synced + kv_log_step_bytes(db))
        return KV_STEP_LOG_SYNC;
    return KV_STEP_NONE;
}

/* Work that is due by the clock. A sync writes a mark as well, so it comes
 * first. If the clock has gone backwards, the difference wraps around and the
 * work is due at once. */
static enum kv_step kv_plan_timed(struct kvmeta *db)
{
    uint64_t interval_ns = (uint64_t)db->options.sync_interval_ms * 1000000;
    enum kv_step step = KV_STEP_NONE;
    uint64_t now = kv_now(db);

    pthread_mutex_lock(&db->state_lock);
    if (interval_ns && db->unsynced
        && now - db->unsynced_since_ns >= interval_ns)
        step = KV_STEP_SYNC;
    else if (db->mark_dirty && now - db->dirty_since_ns >= KV_MARK_SYNC_NS)
        step = KV_STEP_MARK;
    pthread_mutex_unlock(&db->state_lock);
    return step;
}

/* Flushes go first, for writers may wait for them; but where writers never
 * pause there is always one to do, and the tables must not pile up: each
 * holds a descriptor, and many processes may have no more than 1,024. */
static bool kv_plan_crowded(const struct kvmeta *db)
{
    return db->tables_count >= 2 * (size_t)db->options.merge_window;
}

/* The step that is due for fewer tables, if any. full: kvmeta_compact asked
 * for it, whatever the tables are like. *plan gets the tables of a merge; for
 * all of them it is filled in already. */
static enum kv_step kv_plan_compact(const struct kvmeta *db, uint64_t live,
                                    bool full, struct kv_plan *plan)
{
    assert(plan->first == 0);
    assert(plan->last == db->tables_count);
    if (db->compaction_stopped) return KV_STEP_NONE;
    if (full ? !kv_tables_compact(db) : kv_plan_full(db, live))
        return KV_STEP_FULL;
    return kv_plan_merge(db, plan) ? KV_STEP_MERGE : KV_STEP_NONE;
}

/*
 * What is to be done next. Job lock held. What is read of the state may
 * change before the step begins, but not so that it finds its tables or its
 * log gone, since only steps drop those.
 *
 * A sealed log is flushed once there is a live one: a store that is only
 * opened and closed stays as it is. A store that has failed has no work: no
 * step could be sure of what is on disk.
 */
static void kv_plan_make(struct kvmeta *db, struct kv_plan *plan)
{
    uint64_t live = kvmeta_count(db);
    size_t waiting;
    bool heal;
    bool flush;
    bool full;

    assert(!(db->options.flags & KVMETA_READ_ONLY));
    memset(plan, 0, sizeof *plan);
    if (db->failed) return;
    pthread_mutex_lock(&db->state_lock);
    waiting = kv_logs_waiting_locked(db);
    heal = db->heal_wanted;
    flush = waiting > 0
        && (kv_manifest_live(&db->manifest) || db->flush_wanted
            || db->backlogged);
    full = db->full_wanted;
    pthread_mutex_unlock(&db->state_lock);

    plan->last = db->tables_count;
    plan->step = kv_plan_timed(db);
    if (plan->step) return;
    if (heal)
        plan->step = KV_STEP_HEAL;
    else if (!flush || kv_plan_crowded(db))
        plan->step = kv_plan_compact(db, live, full, plan);
    if (!plan->step && flush && db->tables_count < KV_TABLES_MAX)
        plan->step = KV_STEP_FLUSH;
    if (!plan->step) plan->step = kv_plan_ahead(db);
    assert(plan->first <= plan->last);
    assert(plan->last <= db->tables_count);
    assert(plan->step != KV_STEP_FLUSH || waiting > 0);
    assert(plan->step != KV_STEP_FULL || plan->last > 0);
}

static int kv_commit(struct kvmeta *db, struct kv_request *r);

/* A commit without changes: it shares the sync of those who are committing
 * just then, and does not wait for the backlog (J3). */
static int kv_step_sync(struct kvmeta *db, struct kvmeta_error *err)
{
    struct kv_request barrier = {.durability = KVMETA_DURABLE};
    int rc = kv_commit(db, &barrier);

    assert(barrier.changes == 0);                /* J3 */
    if (!rc) return KVMETA_OK;
    return kv_fail(err, rc, 0, "interval sync: %s", kvmeta_strerror(rc));
}

/* The flag goes first: a mark that is written while this syncs may miss the
 * sync, and its commit sets the flag anew. */
static int kv_step_mark(struct kvmeta *db, struct kvmeta_error *err)
{
    db->mark_dirty = false;
    return kv_store_judge(db, kv_file_sync(&db->env, &db->lock, err), err);
}

/* Does what the plan says, whoever made it. Job lock held, no other. */
static int kv_step_do(struct kvmeta *db, const struct kv_plan *plan,
                      struct kvmeta_error *err)
{
    int rc = KVMETA_OK;

    assert(plan->step != KV_STEP_NONE);
    switch (plan->step) {
    case KV_STEP_HEAL: rc = kv_job_heal(db, err); break;
    case KV_STEP_FLUSH: rc = kv_job_flush(db, err); break;
    case KV_STEP_FULL:
    case KV_STEP_MERGE:
        rc = kv_job_merge(db, plan->first, plan->last, err);
        break;
    case KV_STEP_SLAB: kv_pool_prepare(&db->tree.leaves); break;
    case KV_STEP_PREPARE: rc = kv_job_prepare(db, err); break;
    case KV_STEP_LOG_SYNC: rc = kv_job_log_sync(db, err); break;
    case KV_STEP_SYNC: rc = kv_step_sync(db, err); break;
    default:
        assert(plan->step == KV_STEP_MARK);
        rc = kv_step_mark(db, err);
    }
    if (!rc && plan->step == KV_STEP_FULL) db->counters.full_compactions++;
    if (!rc && plan->step == KV_STEP_MERGE) db->counters.merges++;
    assert(rc != KV_END);
    assert(!rc || rc == KV_STOPPED || err->code == rc);
    return rc;
}

/*
 * Keeps the outcome of a step for those who wait and ask, and wakes them.
 *
 * Damage that a step has met is answered by a heal at once, without the pause
 * that other errors get. A heal that meets damage itself is tried again after
 * the pause. Once a merge did not balance nothing is healed by itself: no
 * file is to blame for that, and somebody should look at it (kvmeta_verify
 * may still ask for a heal). Its error stays; any other goes when the next
 * step on files succeeds. KV_STOPPED is no error: the store is closing.
 *
 * What was waited for is taken back here and not where the step is done, so
 * that it is one change under the state lock: a waiter sees the flag, the
 * error and the end of the step together.
 */
static void kv_step_report(struct kvmeta *db, const struct kv_plan *plan,
                           int rc, const struct kvmeta_error *err)
{
    bool damaged = rc == KVMETA_E_CORRUPT && !db->compaction_stopped
        && plan->step != KV_STEP_HEAL;

    assert(plan->step != KV_STEP_NONE);
    assert(rc == KVMETA_OK || rc == KV_STOPPED || err->message[0]);
    pthread_mutex_lock(&db->state_lock);
    if (rc == KVMETA_OK) {
        db->retry_ns = 0;
        if (plan->step <= KV_STEP_MERGE && !db->compaction_stopped)
            memset(&db->background_error, 0, sizeof db->background_error);
    } else if (rc != KV_STOPPED) {
        db->background_error = *err;
        db->retry_ns = kv_now(db) + KV_RETRY_NS;
        if (damaged) db->heal_wanted = true;
        if (damaged) db->retry_ns = 0;
    }
    if (plan->step == KV_STEP_HEAL && !rc) db->heal_wanted = false;
    if (plan->step == KV_STEP_FULL && !rc) db->full_wanted = false;
    if (kv_logs_waiting_locked(db) == 0) db->flush_wanted = false;
    if (kv_logs_waiting_locked(db) < KV_LOGS_WAITING_MAX)
        db->backlogged = false;
    pthread_cond_broadcast(&db->progress);
    pthread_mutex_unlock(&db->state_lock);
    if (rc == KVMETA_OK || rc == KV_STOPPED) return;
    db->counters.background_errors++;
    kv_log(&db->env, damaged ? KVMETA_LOG_WARNING : KVMETA_LOG_ERROR,
           "background: %s", err->message);
}

/*
 * The steps that cannot wait for the end of the one that runs. Called from
 * within it, so the job lock is held by this thread; none of these steps
 * touches a table, or calls in here again. An error is kept and does not end
 * the step around it; what has failed is not tried again for a while, however
 * many blocks there are, but something else may be. The outcome is not
 * reported as a step's own: that one has not ended, and its waiters are not to
 * be woken.
 */
static void kv_step_between(void *arg)
{
    struct kvmeta *db = arg;
    struct kvmeta_error err = {0};
    struct kv_plan plan = {.step = kv_plan_timed(db)};
    int rc;

    if (db->failed) return;
    if (!plan.step) plan.step = kv_plan_ahead(db);
    if (!plan.step) return;
    assert(plan.step > KV_STEP_MERGE);
    if ((int)plan.step == db->between_failed
        && kv_now(db) < db->between_retry_ns)
        return;
    rc = kv_step_do(db, &plan, &err);
    if (!rc) return;
    db->between_failed = (int)plan.step;
    db->between_retry_ns = kv_now(db) + KV_RETRY_NS;
    pthread_mutex_lock(&db->state_lock);
    db->background_error = err;
    pthread_mutex_unlock(&db->state_lock);
    db->counters.background_errors++;
    kv_log(&db->env, KVMETA_LOG_ERROR, "background: %s", err.message);
}

/* One step; *did: there was one. Returns its result, which is also kept
 * (kv_step_report). No lock held; waits for a step that runs elsewhere, also
 * for kvmeta_verify, which has the job lock for as long as it takes. */
static int kv_step_once(struct kvmeta *db, bool *did)
{
    struct kvmeta_error err = {0};
    struct kv_plan plan;
    int rc;

    pthread_mutex_lock(&db->job_lock);
    kv_plan_make(db, &plan);
    *did = plan.step != KV_STEP_NONE;
    if (!*did) {
        pthread_mutex_unlock(&db->job_lock);
        return KVMETA_OK;
    }
    KV_SCHED_POINT("step");
    rc = kv_step_do(db, &plan, &err);
    kv_step_report(db, &plan, rc, &err);
    pthread_mutex_unlock(&db->job_lock);
    return rc;
}

/* Until when, on the vfs's clock, the worker may sleep; 0: until it is woken.
 * State lock held. After an error nothing wakes it by itself but this: the
 * reason for the step is still there, and nobody else may come by. */
static uint64_t kv_worker_due_locked(const struct kvmeta *db)
{
    uint64_t interval_ns = (uint64_t)db->options.sync_interval_ms * 1000000;
    uint64_t due = UINT64_MAX;

    if (db->failed) return 0;
    if (db->mark_dirty) due = db->dirty_since_ns + KV_MARK_SYNC_NS;
    if (interval_ns && db->unsynced)
        due = kv_min(due, db->unsynced_since_ns + interval_ns);
    if (db->retry_ns) due = kv_min(due, db->retry_ns);
    return due == UINT64_MAX ? 0 : due;
}

/*
 * Sleeps until something is due, or until it is woken, or for no reason: the
 * caller makes a new plan in any case. The vfs's clock says how long; only
 * the waiting itself goes by the system's monotonic clock.
 */
static void kv_worker_sleep_locked(struct kvmeta *db)
{
    uint64_t due = kv_worker_due_locked(db);
    uint64_t now = kv_now(db);

    if (!due)
        pthread_cond_wait(&db->work, &db->state_lock);
    else if (due > now)
        kv_cond_wait_ns(db, &db->work, due - now);
}

/*
 * The worker: the only thread that the library starts, but for the loaders of
 * an open. Goes on as long as there is work, and sleeps when there is none,
 * or after an error; not after damage, whose heal is to come at once (the
 * report then leaves no time to retry at). A close sets `stopping` and then
 * signals under the state lock; it is looked at under that lock before a
 * sleep, so this signal is never lost.
 */
static void *kv_worker_main(void *arg)
{
    struct kvmeta *db = arg;

    while (!db->stopping) {
        bool did = false;
        int rc = kv_step_once(db, &did);

        pthread_mutex_lock(&db->state_lock);
        if (!did && !db->stopping) pthread_cond_broadcast(&db->progress);
        if ((!did || rc) && !db->stopping && !db->woken
            && !(rc && !db->retry_ns))
            kv_worker_sleep_locked(db);
        db->woken = false;
        pthread_mutex_unlock(&db->state_lock);
    }
    return NULL;
}

static bool kv_flush_blocked(struct kvmeta *db);
static bool kv_flushed(struct kvmeta *db, uint64_t id);
static bool kv_idle(struct kvmeta *db, uint64_t unused);
static bool kv_compacted(struct kvmeta *db, uint64_t unused);

static bool kv_heal_wanted(struct kvmeta *db)
{
    bool wanted;

    pthread_mutex_lock(&db->state_lock);
    wanted = db->heal_wanted;
    pthread_mutex_unlock(&db->state_lock);
    return wanted;
}

/* No step will do it, and none will fail to: merges have stopped. A heal that
 * was asked for would do both. */
static bool kv_wait_in_vain(struct kvmeta *db,
                            bool (*over)(struct kvmeta *, uint64_t))
{
    if (!db->compaction_stopped || kv_heal_wanted(db)) return false;
    return over == kv_compacted || (over == kv_flushed && kv_flush_blocked(db));
}

/*
 * Waits until `over` says so, doing the work itself where there is no thread.
 * Ends with the error of the first step that fails meanwhile; not with damage
 * that is about to be healed, which is no failure of what the caller wants.
 *
 * No lock may be held, nor the commit right: steps take them. `over` takes
 * locks of its own, so it is asked before the state lock is taken, and an end
 * that comes in between is not signalled to us any more. That is why a wait
 * lasts KV_WAIT_NS at most. Each round wakes the worker, which may have missed
 * what the caller has changed.
 *
 * Without a thread, a step that finds nothing to do although `over` does not
 * hold means that no step can bring it about: KVMETA_E_FAILED.
 */
static int kv_wait(struct kvmeta *db, bool (*over)(struct kvmeta *, uint64_t),
                   uint64_t target)
{
    uint64_t errors = db->counters.background_errors;
    int rc = KVMETA_OK;

    assert(!(db->options.flags & KVMETA_READ_ONLY));
    for (;;) {
        bool did = true;

        if (over(db, target)) return KVMETA_OK;
        if (db->failed) return KVMETA_E_FAILED;
        if (kv_wait_in_vain(db, over)) return KVMETA_E_FAILED;
        if (!db->has_thread) {
            rc = kv_step_once(db, &did);
            if (rc < 0 && !(rc == KVMETA_E_CORRUPT && kv_heal_wanted(db)))
                return rc;
            /* That nothing was to be done is idle, whatever others have
             * brought up since. */
            if (!did && (over == kv_idle || over(db, target)))
                return KVMETA_OK;
            if (!did) return KVMETA_E_FAILED;
            continue;
        }
        pthread_mutex_lock(&db->state_lock);
        if (db->counters.background_errors != errors
            && db->background_error.code && !db->heal_wanted)
            rc = db->background_error.code;
        pthread_cond_signal(&db->work);
        if (!rc) kv_cond_wait_ns(db, &db->progress, KV_WAIT_NS);
        pthread_mutex_unlock(&db->state_lock);
        if (rc) return rc;
    }
}

/* ==========================================================================
 * Commit
 *
 * Every write comes through kv_commit. Whoever gets the commit right there is
 * the leader: it takes what waits in the queue along as one group, does the
 * work of all of them, leaves each its result, and passes the right on (see
 * "Commit right"). All functions here but kv_commit and those that wait for the
 * background belong to the leader, and need no lock for the tree, the live log
 * and its buffer.
 *
 * There are two ways, by what the batches of the group ask for:
 *
 *   durable, written    build the next version privately -> log it -> sync it
 *                       -> mark it -> publish it. One frame, and at most one
 *                       sync, for the whole group, also for the buffered
 *                       batches in it. A failure drops the version and what
 *                       was encoded: nothing has changed. A small batch alone
 *                       is foreseen instead of built, and then, when it is
 *                       logged and synced, applied in place where no reader
 *                       looks.
 *   buffered only       write the buffer if the batch has no room in it ->
 *                       apply the batch to the tree, in place where no reader
 *                       looks -> keep its entries in the buffer. One after the
 *                       other; each has its own result. A single put goes into
 *                       the delta, and into the tree with others later.
 *
 * The order within a way is all there is to it. Readers never see what could
 * still fail: in the first way publishing comes last; in the second a change
 * is visible at once, but the only call that can fail, writing the buffer that
 * others have filled, comes before it.
 *
 * (C2) What is visible in durable mode is on disk.
 * (C3) What has reached the log cannot fail in memory: nodes, buffer and
 *      version are reserved before the first record is changed.
 * (C4) A batch that changes nothing is not logged and has no commit number:
 *      the log, its sums and the numbers speak of changes only.
 * ========================================================================== */

/* Is the record as the operation says, or absent where it gives no value? What
 * earlier batches of the group have changed counts: it is in the version. */
static bool kv_request_expects(const struct kvmeta *db,
                               const struct kv_version *version,
                               const struct kvmeta_op *op)
{
    const unsigned char *value = kv_tree_find(&db->tree, version, op->key,
                                              true);

    if (!value || !op->value) return !value && !op->value;
    return memcmp(value, op->value, db->env.shape.value_bytes) == 0;
}

/* Tests the expectations and reserves memory: after OK, kv_request_apply
 * cannot fail (C3). All expectations are tested before anything is changed, so
 * a batch cannot refer to what it does itself. reserved: the nodes are there
 * already (see kv_commit_buffered). */
static int kv_request_check(struct kvmeta *db,
                            const struct kv_version *version, bool reserved,
                            struct kv_request *r)
{
    size_t bytes = r->changes * db->log.head.slot_bytes;
    int rc;

    if (r->changes != r->n) {
        for (size_t i = 0; i < r->n; i++)
            if (r->ops[i].type == KVMETA_OP_EXPECT
                && !kv_request_expects(db, version, &r->ops[i]))
                return KVMETA_CONFLICT;
    }
    if (r->changes == 0) return KVMETA_OK;
    rc = kv_log_buffer_reserve(&db->env, &db->buffer, bytes, NULL);
    if (!rc && !reserved)
        rc = kv_tree_reserve(&db->tree, version, r->changes, r->puts > 0, NULL);
    return rc;
}

/* The changes that operations ask for, up to `max` of them; *count: how many
 * it found. Returns how many operations it took. */
static size_t kv_request_changes(const struct kvmeta_op *ops, size_t n,
                                 struct kv_change *changes, size_t max,
                                 size_t *count)
{
    size_t taken = 0;

    *count = 0;
    for (; taken < n && *count < max; taken++) {
        const struct kvmeta_op *op = &ops[taken];

        if (op->type == KVMETA_OP_EXPECT) continue;
        changes[*count].key = op->key;
        changes[*count].value = op->type == KVMETA_OP_REMOVE ? NULL
            : op->value ? op->value : op->key;
        ++*count;
    }
    return taken;
}

/* Applies the next of the operations, up to KV_BATCH, and logs what did
 * change: all puts, and removes of records that were there. Returns how many
 * operations it took. In the order of the batch, so that the last of several
 * for one key wins, in the tree as in the log. */
static size_t kv_request_apply_some(struct kvmeta *db, struct kv_edit *edit,
                                    const struct kvmeta_op *ops, size_t n,
                                    bool *last_found)
{
    struct kv_change changes[KV_BATCH] = {{NULL, NULL}};
    bool found[KV_BATCH];
    size_t count;
    size_t taken = kv_request_changes(ops, n, changes, KV_BATCH, &count);

    assert(taken <= n);
    kv_edit_apply(edit, changes, count, found);
    for (size_t i = 0; i < count; i++) {
        *last_found = found[i];
        if (!changes[i].value && !found[i]) continue;
        kv_log_buffer_add(&db->env.shape, &db->buffer,
                          db->log.head.slot_bytes, changes[i].key,
                          changes[i].value);
    }
    return taken;
}

/* The counters' part of a batch that has changed `entries` records. They are
 * read without a lock, but only the leader adds to them. */
static void kv_request_count(struct kvmeta *db, uint64_t entries)
{
    db->buffer.batches++;
    kv_counter_add(&db->counters.commits, 1);
    kv_counter_add(&db->counters.user_bytes,
                   entries * db->env.shape.record_bytes);
}

/* Changes the tree and logs what did change; memory has been reserved. The
 * commit number is the caller's: it counts changed batches (C4). */
static void kv_request_apply(struct kvmeta *db, struct kv_edit *edit,
                             struct kv_request *r)
{
    uint64_t entries = db->buffer.entries;

    if (r->previous) {
        const unsigned char *value = kv_edit_find(edit, r->ops->key);

        assert(r->n == 1);
        if (value) memcpy(r->previous, value, db->env.shape.value_bytes);
    }
    for (size_t i = 0; i < r->n;) {
        KV_SCHED_POINT("apply");
        i += kv_request_apply_some(db, edit, r->ops + i, r->n - i, &r->found);
    }
    assert(db->buffer.entries >= entries);
    entries = db->buffer.entries - entries;
    assert(entries <= r->changes);
    r->changed = entries > 0;
    if (r->changed) kv_request_count(db, entries);
}

/* Tells the statistics and the worker's timers of a commit: that the state is
 * durable now, and a mark says so that is not synced yet; or that it is not,
 * and an interval sync is due in time. The state lock is only taken for the
 * first of a row of commits: the timers run from there. */
static void kv_commit_note(struct kvmeta *db, bool synced, uint64_t seq)
{
    if (synced) {
        db->durable_seq = seq;
        db->unsynced = false;
        if (db->mark_dirty) return;
    } else if (db->unsynced || !db->options.sync_interval_ms) {
        return;
    }
    pthread_mutex_lock(&db->state_lock);
    if (synced) {
        db->dirty_since_ns = kv_now(db);
        db->mark_dirty = true;
    } else {
        db->unsynced_since_ns = kv_now(db);
        db->unsynced = true;
    }
    pthread_cond_signal(&db->work);
    pthread_mutex_unlock(&db->state_lock);
}

/* A buffered put of one record, when nobody asks what it replaces: into the
 * delta, from where it goes into the tree with others, whose cache misses
 * overlap. False: it must be done like any other batch, and nothing has been
 * done of it. The reservation comes before the delta is touched (C3). */
static bool kv_request_defer(struct kvmeta *db, struct kv_request *r)
{
    const struct kvmeta_op *op = r->ops;

    if (r->n != 1 || r->puts != 1 || r->previous) return false;
    if (kv_log_buffer_reserve(&db->env, &db->buffer, db->log.head.slot_bytes,
                              NULL)
        || !kv_delta_put(&db->tree, op->key, op->value ? op->value : op->key,
                         &r->seq))
        return false;
    kv_log_buffer_add(&db->env.shape, &db->buffer, db->log.head.slot_bytes,
                      op->key, op->value ? op->value : op->key);
    kv_request_count(db, 1);
    kv_log_buffer_keep(&db->buffer);
    kv_commit_note(db, false, r->seq);
    r->changed = true;
    return true;
}

/*
 * Writes the buffer as a frame; `sync` makes it, and all before it, durable.
 * digest: of the records after it. After an error of the write or the sync
 * nothing of the buffer counts as logged: the caller drops it, or keeps it for
 * the next try if nothing but space was wanting. Any other error fails the
 * store, since what the file holds now is not known (kv_store_judge).
 *
 * The mark comes after the sync, and says what was acknowledged; without it a
 * damaged tail could pass for a torn one. If it cannot be written the commit
 * is durable all the same, so this call succeeds; but the next could not give
 * the promise of R2, so the store fails.
 */
static int kv_commit_log(struct kvmeta *db, struct kvmeta_digest digest,
                         bool sync, struct kvmeta_error *err)
{
    struct kv_log *log = &db->log;
    uint64_t start = log->end;
    uint64_t batches = db->buffer.batches;
    bool write = sync ? kv_log_must_write(log, &db->buffer)
                      : db->buffer.entries > 0;
    int rc = KVMETA_OK;

    KV_SCHED_POINT("log");
    if (write)
        rc = kv_log_write(&db->env, log, &db->buffer, digest, sync, sync,
                          err);
    if (rc) return kv_store_judge(db, rc, err);
    if (write) {
        db->counters.groups++;
        db->counters.bytes_logged += log->end - start;
        if (batches > db->counters.group_commits_max)
            db->counters.group_commits_max = batches;
        db->log_end = log->end;
        /* In the second half of a log, now and then: there may be a log to
         * prepare, or bytes to sync ahead of the rotation. */
        if (kv_tree_wants_slab(&db->tree)
            || (log->end >= db->options.log_bytes_max / 2
                && start / kv_log_step_bytes(db)
                != log->end / kv_log_step_bytes(db)))
            kv_store_wake(db);
    }
    assert(log->durable <= log->end);
    if (!sync || log->end == log->durable) return KVMETA_OK;

    KV_SCHED_POINT("sync");
    if (KV_MUTANT(10)) (void)kv_store_mark(db, 0, log->head.id, log->end, err);
    rc = kv_log_sync(&db->env, log, err);
    if (rc) return kv_store_judge(db, rc, err);
    assert(log->durable == log->end);
    db->counters.syncs++;
    KV_SCHED_POINT("mark");
    rc = kv_store_mark(db, 0, log->head.id, log->durable, err);
    if (rc) kv_store_fail(db, err);   /* the next write fails, not this one */
    return KVMETA_OK;
}

/*
 * Buffered batches, one by one. Before each, the buffer is written if it has
 * no room: an error of that leaves the batch undone, and the older ones, which
 * readers see already, in the buffer.
 *
 * A batch that is applied in place reserves before the gate is closed, as
 * growing a pool takes long and readers would wait; a larger one is built on a
 * private version, for the same reason.
 */
static int kv_commit_buffered(struct kvmeta *db, struct kv_request *r,
                              struct kvmeta_error *err)
{
    size_t bytes = r->changes * db->log.head.slot_bytes;
    struct kv_edit edit;
    const struct kv_version *now;
    bool in_place = r->n <= KV_IN_PLACE_MAX;
    int rc;

    if (db->buffer.used + bytes > db->options.log_buffer_bytes
        && db->buffer.entries > 0) {
        rc = kv_commit_log(db, kv_tree_now(&db->tree)->digest, false, err);
        if (rc) return rc;
    }
    if (kv_request_defer(db, r)) return KVMETA_OK;
    now = kv_tree_now(&db->tree);
    if (in_place) {
        rc = kv_tree_reserve(&db->tree, now, r->changes, r->puts > 0, err);
        if (!rc)
            rc = kv_log_buffer_reserve(&db->env, &db->buffer, bytes, err);
        if (rc) return rc;
    }
    rc = kv_edit_begin(&db->tree, &edit, in_place, err);
    if (rc) return rc;
    rc = kv_request_check(db, edit.version, edit.in_place, r);
    if (rc) {
        kv_edit_abort(&edit);
        return rc;
    }
    kv_request_apply(db, &edit, r);
    assert(now == kv_tree_current(&db->tree));
    r->seq = now->seq + r->changed;
    kv_log_buffer_keep(&db->buffer);
    kv_edit_publish(&edit, r->seq);
    kv_commit_note(db, false, r->seq);
    return KVMETA_OK;
}

/*
 * All requests of the group on a private version, in the order in which they
 * came. A request whose check fails has changed nothing and does not hinder
 * the others. If the log fails, all that had succeeded fail with it, and so do
 * those that changed nothing, as what they have seen may not have happened.
 *
 * Without a live log no request of the group changes anything; a group that
 * syncs and changes nothing is a barrier, and still has to sync what others
 * have only written.
 */
static void kv_commit_private(struct kvmeta *db, struct kv_request *group,
                              bool sync)
{
    uint64_t base = kv_tree_now(&db->tree)->seq;
    uint64_t seq = base;
    struct kvmeta_error err = {0};
    struct kv_edit edit;
    int rc = kv_edit_begin(&db->tree, &edit, false, &err);

    if (rc) {
        for (struct kv_request *r = group; r; r = r->next) r->rc = rc;
        return;
    }
    for (struct kv_request *r = group; r; r = r->next) {
        r->rc = kv_request_check(db, edit.version, false, r);
        if (!r->rc) kv_request_apply(db, &edit, r);
        seq += r->changed;
        r->seq = seq;
    }
    assert(seq == base || db->log.file.open);
    if (db->log.file.open)
        rc = kv_commit_log(db, edit.version->digest, sync, &err);
    if (rc) {
        if (seq != base && KV_MUTANT(14)) kv_edit_publish(&edit, seq);
        else kv_edit_abort(&edit);
        kv_log_buffer_drop(&db->buffer);
        for (struct kv_request *r = group; r; r = r->next)
            if (r->rc == KVMETA_OK) r->rc = rc;
        return;
    }
    KV_SCHED_POINT("publish");
    if (seq == base)
        kv_edit_abort(&edit);
    else
        kv_edit_publish(&edit, seq);
    kv_commit_note(db, sync, seq);
}

/* Does no key come twice? By a table with open addressing. */
static bool kv_changes_distinct(const struct kv_tree *t,
                                const struct kv_change *changes, size_t n)
{
    uint8_t table[2 * KV_IN_PLACE_MAX] = {0};    /* 1 + index; 0: free */

    assert(n <= KV_IN_PLACE_MAX);
    for (size_t i = 0; i < n; i++) {
        const void *key = changes[i].key;
        size_t at = kv_delta_print(t, key) >> 1;

        for (;; at++) {
            uint8_t *slot = &table[at % sizeof table];

            if (*slot && kv_same(changes[*slot - 1].key, key,
                                 t->env->shape.key_bytes))
                return false;
            if (*slot) continue;
            *slot = (uint8_t)(i + 1);
            break;
        }
    }
    return true;
}

/* What a version would change to, without a change: keeps of `n` changes those
 * that are no removes of what is not there, and returns how many; *digest is
 * brought up to date. found: for all of them, as kv_edit_apply. Keys must be
 * distinct, and records not wider than a full delta takes. */
static size_t kv_changes_foresee(const struct kv_tree *t,
                                 const struct kv_version *v,
                                 struct kv_change *changes, size_t n,
                                 unsigned char *found,
                                 struct kvmeta_digest *digest)
{
    const struct kv_shape *shape = &t->env->shape;
    unsigned char keys[KV_DELTA_BYTES_MAX];      /* and values behind them */
    unsigned char *values = keys + (size_t)KV_BATCH * shape->key_bytes;
    size_t kept = 0;

    assert(shape->record_bytes <= sizeof keys / KV_BATCH);
    for (size_t from = 0; from < n; from += KV_BATCH) {
        size_t count = (size_t)kv_min(KV_BATCH, n - from);

        for (size_t i = 0; i < count; i++)
            kv_copy(keys + i * shape->key_bytes, changes[from + i].key,
                    shape->key_bytes);
        kv_tree_find_many(t, v, keys, count, values, found + from);
        for (size_t i = 0; i < count; i++) {
            struct kv_change change = changes[from + i];

            if (found[from + i])
                kv_digest_sub(digest, kv_digest_record(
                    shape, change.key, values + i * shape->value_bytes));
            if (change.value)
                kv_digest_add(digest, kv_digest_record(shape, change.key,
                                                       change.value));
            if (change.value || found[from + i]) changes[kept++] = change;
        }
    }
    return kept;
}

/* Makes changes that were foreseen and logged, as the next commit: in place if
 * no reader looks. Nodes and a spare version must have been reserved. */
static void kv_changes_apply(struct kv_tree *t, const struct kv_change *changes,
                             size_t n, struct kvmeta_digest digest)
{
    uint64_t seq = kv_tree_current(t)->seq + 1;
    bool found[KV_BATCH];
    struct kv_edit edit;
    int rc = kv_edit_begin(t, &edit, true, NULL);

    assert(rc == KVMETA_OK);      /* there is a spare version */
    (void)rc;
    for (size_t i = 0; i < n; i += KV_BATCH)
        kv_edit_apply(&edit, changes + i, (size_t)kv_min(KV_BATCH, n - i),
                      found);
    assert(kv_digest_equal(edit.version->digest, digest));
    (void)digest;
    kv_edit_publish(&edit, seq);
}

/*
 * One small batch: what it will change is foreseen, so that it is logged, and
 * synced, before the tree is touched, and needs no private version. That saves
 * the copies, a sixth of the time of a hundred durable puts.
 *
 * False: it must go the other way, and nothing has been done of it. That goes
 * for a batch whose expectations fail, too, since what it has seen may still
 * have to be synced.
 */
static bool kv_commit_ahead(struct kvmeta *db, struct kv_request *r, bool sync)
{
    struct kv_tree *t = &db->tree;
    struct kv_version *now = kv_tree_now(t);
    struct kvmeta_digest digest = now->digest;
    struct kv_change changes[KV_IN_PLACE_MAX] = {{NULL, NULL}};
    unsigned char found[KV_IN_PLACE_MAX];
    struct kvmeta_error err;
    size_t n, kept;

    if (r->next || r->n > KV_IN_PLACE_MAX || r->changes == 0
        || t->delta_cap < KV_BATCH)
        return false;
    (void)kv_request_changes(r->ops, r->n, changes, KV_IN_PLACE_MAX, &n);
    assert(n == r->changes);
    if (!kv_changes_distinct(t, changes, n)) return false;
    if (!kv_tree_spare(t) || kv_request_check(db, now, false, r)) return false;
    kept = kv_changes_foresee(t, now, changes, n, found, &digest);
    r->found = found[n - 1];
    if (r->previous && r->found)
        memcpy(r->previous, kv_tree_find(t, now, r->ops->key, true),
               db->env.shape.value_bytes);
    for (size_t i = 0; i < kept; i++)
        kv_log_buffer_add(&db->env.shape, &db->buffer,
                          db->log.head.slot_bytes, changes[i].key,
                          changes[i].value);
    r->changed = kept > 0;
    if (r->changed) kv_request_count(db, kept);
    r->seq = now->seq + r->changed;
    r->rc = kv_commit_log(db, digest, sync, &err);
    KV_SCHED_POINT("publish");
    if (r->rc) kv_log_buffer_drop(&db->buffer);
    if (r->changed && (!r->rc || KV_MUTANT(14)))
        kv_changes_apply(t, changes, kept, digest);
    else
        kv_tree_unreserve(t);
    if (!r->rc) kv_commit_note(db, sync, r->seq);
    return true;
}

/* A live log with room, for a group that changes something: begins the first
 * one, or rotates. Writers are told to wait from one log before the limit on,
 * so that those that are past the check in kv_commit find room, too. */
static int kv_commit_open_log(struct kvmeta *db, size_t bytes,
                              struct kvmeta_error *err)
{
    uint64_t need = db->log.end + db->buffer.used + bytes;
    size_t waiting;

    if (db->log.file.open && need <= db->options.log_bytes_max)
        return KVMETA_OK;
    if (db->log.file.open
        && db->log.end == kv_log_first(db->log.head.align)
        && db->buffer.entries == 0)
        return KVMETA_OK;         /* larger than any log: it gets its own */
    pthread_mutex_lock(&db->state_lock);
    waiting = kv_logs_waiting_locked(db);
    if (waiting + 1 >= KV_LOGS_WAITING_MAX) db->backlogged = true;
    pthread_mutex_unlock(&db->state_lock);
    /* Beyond the backlog the live log grows, as far as those writers take it
     * that are past the check already. */
    if (db->log.file.open && waiting >= KV_LOGS_WAITING_MAX) return KVMETA_OK;
    return kv_rotate(db, true, err);
}

/* Does the work of the group, and leaves the result in each request. One batch
 * that is durable or written, or larger than the buffer, takes the others
 * along: they cost nothing more. */
static void kv_commit_group(struct kvmeta *db, struct kv_request *group)
{
    struct kvmeta_error err;      /* filled in by whatever fails */
    bool buffered = true;
    bool sync = false;
    size_t changes = 0;
    size_t slot = kv_log_slot_bytes(&db->env.shape);
    int rc = KVMETA_OK;

    for (struct kv_request *r = group; r; r = r->next) {
        sync = sync || r->durability == KVMETA_DURABLE;
        buffered = buffered && r->durability == KVMETA_BUFFERED
            && r->changes * slot <= db->options.log_buffer_bytes;
        changes += r->changes;
    }
    if (db->failed) rc = KVMETA_E_FAILED;
    if (!rc && changes > 0)
        rc = kv_commit_open_log(db, changes * slot, &err);
    if (!rc && !buffered) {
        if (!kv_commit_ahead(db, group, sync))
            kv_commit_private(db, group, sync);
        return;
    }
    for (struct kv_request *r = group; r; r = r->next)
        r->rc = rc ? rc : kv_commit_buffered(db, r, &err);
}

/* Takes from the queue what goes into the frame of `first`, oldest first, up to
 * an exclusive request (a rotation, a snapshot) or the size of a group. The
 * room changes with the group when the queue was emptied: see "Commit right".
 * The unlocked look at the queue is for a single writer; what it misses leads
 * the next group. */
static void kv_commit_gather(struct kvmeta *db, struct kv_request *first)
{
    size_t slot = kv_log_slot_bytes(&db->env.shape);
    struct kv_request *last = first;
    size_t bytes = first->changes * slot;
    size_t count = 1;

    first->next = NULL;
    if (db->last_group == 1 && atomic_load(&db->queue_count) == 0) return;
    pthread_mutex_lock(&db->queue_lock);
    while (db->queue_first && !db->queue_first->exclusive) {
        bytes += db->queue_first->changes * slot;
        if (bytes > KV_GROUP_BYTES_MAX) break;
        last->next = kv_queue_pop(db);
        last = last->next;
        count++;
    }
    db->last_group = count;
    if (!db->queue_first) db->room = 1 - db->room;
    pthread_mutex_unlock(&db->queue_lock);
}

/*
 * Those whom the last sync woke are on their way back with their next batch:
 * a new leader lets them run first, or it would sync for itself alone and
 * they would wait twice. Bounded by a small part of the time of a sync.
 */
static void kv_commit_linger(struct kvmeta *db, const struct kv_request *r)
{
    if (r->durability != KVMETA_DURABLE) return;
    for (int i = 0; i < 64; i++) {
        size_t queued;
        size_t want;

        pthread_mutex_lock(&db->queue_lock);
        queued = db->queue_count;
        want = db->last_group;
        pthread_mutex_unlock(&db->queue_lock);
        if (queued + 1 >= want) return;
        sched_yield();
    }
}

/* Too many sealed logs: wait until the background has flushed one. */
static int kv_commit_stall(struct kvmeta *db);

/* Commits one request, with others that wait, and returns its result. Any
 * thread. What is wrong with the handle or the request itself is found before
 * the queue, so that a group holds only what may be tried. */
static int kv_commit(struct kvmeta *db, struct kv_request *r)
{
    if (KV_UNLIKELY(kv_forked(db))) return KVMETA_E_FORKED;
    if (db->options.flags & KVMETA_READ_ONLY) return KVMETA_E_READONLY;
    if (r->changes > KV_LOG_FRAME_BYTES_MAX / kv_log_slot_bytes(&db->env.shape))
        return KVMETA_E_LIMIT;
    if (KV_UNLIKELY(db->backlogged) && r->changes > 0) {
        int rc = kv_commit_stall(db);

        if (rc) return rc;
    }
    if (!kv_right_take(db, r)) return r->rc;
    kv_commit_linger(db, r);
    kv_commit_gather(db, r);
    assert(r->rc == KVMETA_OK);
    kv_commit_group(db, r);
    kv_right_give(db, r);
    return r->rc;
}

/* Nothing is merged any more, and a manifest can name no more tables: no log
 * will be flushed, and none of the steps that are due will fail, either. */
static bool kv_flush_blocked(struct kvmeta *db)
{
    bool full;

    if (!db->compaction_stopped) return false;
    pthread_mutex_lock(&db->state_lock);
    full = db->manifest.tables_count >= KV_TABLES_MAX;
    pthread_mutex_unlock(&db->state_lock);
    return full;
}

static bool kv_stall_over(struct kvmeta *db, uint64_t unused)
{
    (void)unused;
    return !db->backlogged || kv_flush_blocked(db);
}

/* Whatever keeps the background from flushing has not touched the log, and
 * nothing of this write was begun: it fails with an error that passes, or
 * with that of a store that has failed. KVMETA_E_IO would say that its bytes
 * may be on disk. */
static int kv_commit_stall(struct kvmeta *db)
{
    uint64_t start = kv_now(db);
    int rc = kv_wait(db, kv_stall_over, 0);

    db->counters.stalls++;
    db->counters.stall_us += (kv_now(db) - start) / 1000;
    if (!rc) return kv_flush_blocked(db) ? KVMETA_E_LIMIT : KVMETA_OK;
    return rc == KVMETA_E_FAILED || kv_passing(rc) ? rc : KVMETA_E_LIMIT;
}

/* ==========================================================================
 * Open: options
 *
 * From what the caller has set to what the rest of the code may rely on: each
 * value in its range, each default filled in. Only open_threads may still be
 * 0, until kv_store_new has counted the cores. The ranges stand in kvmeta.h
 * as well, as a promise: they may become wider, never narrower.
 * ========================================================================== */

/* Size of the options of the first release; later ones only append. Fields
 * that are appended must not move this, and are not there to be copied from a
 * caller that was compiled with an older header: it gets their defaults. */
enum { KV_OPTIONS_BYTES_MIN = (int)sizeof(struct kvmeta_options) };

_Static_assert(KV_OPTIONS_BYTES_MIN <= (int)sizeof(struct kvmeta_options),
               "options are only ever appended");

struct kv_option_range {
    const char *name;
    size_t offset;
    bool wide;                    /* uint64_t, else uint32_t */
    uint64_t min;
    uint64_t max;
    uint64_t otherwise;           /* default, in place of 0; need not be in
                                     the range */
};

#define KV_RANGE32(field, min, max, otherwise) \
    {#field, offsetof(struct kvmeta_options, field), false, min, max, otherwise}
#define KV_RANGE64(field, min, max, otherwise) \
    {#field, offsetof(struct kvmeta_options, field), true, min, max, otherwise}

/* All integer fields but the widths, which have no default, and zstd_level,
 * which is signed. A bound that looks arbitrary may be another section's: the
 * place of an entry in a log is a 32-bit number of 8 bytes (struct kv_item),
 * so logs must stay far below 32 GiB, also where the backlog makes them grow;
 * and the buffer of log frames is allocated with room for one log_align. */
static const struct kv_option_range kv_option_ranges[] = {
    KV_RANGE32(flags, 0, 7, 0),
    KV_RANGE32(durability, 1, 3, KVMETA_DURABLE),
    KV_RANGE32(sync_interval_ms, 0, 3600000, 0),
    KV_RANGE32(log_buffer_bytes, 4096, 64u << 20, 32 << 10),
    KV_RANGE32(log_align, 8, KV_LOG_ALIGN_MAX, 512),
    KV_RANGE32(merge_ratio, 1, 100, 3),
    KV_RANGE32(merge_window, 2, 64, 16),
    KV_RANGE32(open_threads, 0, 64, 0),
    KV_RANGE32(reserved, 0, 0, 0),
    KV_RANGE64(log_bytes_max, 64 << 10, (uint64_t)4 << 30, 32 << 20),
    KV_RANGE64(compaction_bytes_per_s, 64 << 10, UINT64_MAX, 0),
    KV_RANGE64(memory_bytes_max, 0, UINT64_MAX, 0),
};

/* Checks one integer field, or gives it its default. The error names the
 * option and its range; a value of an option is no secret. */
static int kv_option_normalize(struct kvmeta_options *o,
                               const struct kv_option_range *range,
                               struct kvmeta_error *err)
{
    unsigned char *field = (unsigned char *)o + range->offset;
    uint32_t narrow;
    uint64_t v;

    assert(range->min <= range->max);
    assert(range->wide || range->max <= UINT32_MAX);
    assert(range->otherwise <= range->max);
    assert(range->otherwise >= range->min || range->otherwise == 0);
    if (range->wide) {
        memcpy(&v, field, sizeof v);
    } else {
        memcpy(&narrow, field, sizeof narrow);
        v = narrow;
    }
    if (v == 0) v = range->otherwise;
    if (v != range->otherwise && (v < range->min || v > range->max))
        return kv_fail(err, KVMETA_E_INVALID, 0,
                       "option %s: %llu, want %llu..%llu", range->name,
                       (unsigned long long)v, (unsigned long long)range->min,
                       (unsigned long long)range->max);
    if (range->wide) {
        memcpy(field, &v, sizeof v);
    } else {
        narrow = (uint32_t)v;
        memcpy(field, &narrow, sizeof narrow);
    }
    return KVMETA_OK;
}

/*
 * Copies the caller's options, checks them, fills in the defaults. Nothing of
 * `from` is read beyond its struct_size, and not even that much if the number
 * cannot be one: most likely kvmeta_options_init was not called. A tail that
 * this code does not know must be zero; whoever sets an option of a newer
 * version must not be left to believe that it counts.
 */
static int kv_options_normalize(const struct kvmeta_options *from,
                                struct kvmeta_options *o,
                                struct kvmeta_error *err)
{
    size_t n = sizeof kv_option_ranges / sizeof kv_option_ranges[0];
    int rc = KVMETA_OK;

    if (from->struct_size < KV_OPTIONS_BYTES_MIN
        || from->struct_size > 65536)
        return kv_fail(err, KVMETA_E_INVALID, 0, "option struct_size: %zu",
                       from->struct_size);
    if (!kv_is_zero((const unsigned char *)from + sizeof *o,
                    from->struct_size - sizeof *o))
        return kv_fail(err, KVMETA_E_INVALID, 0,
                       "options of a newer version are set");
    memcpy(o, from, sizeof *o);
    for (size_t i = 0; i < n && !rc; i++)
        rc = kv_option_normalize(o, &kv_option_ranges[i], err);
    if (rc) return rc;
    if (o->key_bytes < 1 || o->key_bytes > KVMETA_KEY_BYTES_MAX)
        return kv_fail(err, KVMETA_E_INVALID, 0,
                       "option key_bytes: %u, want 1..255",
                       (unsigned)o->key_bytes);
    if (o->value_bytes > KVMETA_VALUE_BYTES_MAX)
        return kv_fail(err, KVMETA_E_INVALID, 0,
                       "option value_bytes: %u, want 0..65535",
                       (unsigned)o->value_bytes);
    if (o->log_align & (o->log_align - 1))
        return kv_fail(err, KVMETA_E_INVALID, 0,
                       "option log_align: %u is no power of two",
                       (unsigned)o->log_align);
    if (o->zstd_level < -7 || o->zstd_level > 19)
        return kv_fail(err, KVMETA_E_INVALID, 0,
                       "option zstd_level: %d, want -7..19",
                       (int)o->zstd_level);
    if (o->zstd_level == 0) o->zstd_level = 3;
    if (o->space_amp_max == 0) o->space_amp_max = 1.4;
    /* Said this way, no comparison lets a NaN through. */
    if (!(o->space_amp_max >= 1.05 && o->space_amp_max <= 100))
        return kv_fail(err, KVMETA_E_INVALID, 0,
                       "option space_amp_max: want 1.05..100");
    if (!o->vfs) o->vfs = kvmeta_vfs_posix();
    if (o->vfs->struct_size < sizeof *o->vfs)
        return kv_fail(err, KVMETA_E_INVALID, 0, "option vfs: struct_size");
    assert(o->durability >= KVMETA_DURABLE);
    assert(o->durability <= KVMETA_BUFFERED);
    assert(o->log_align % 8 == 0);      /* frames begin on multiples of 8 */
    return KVMETA_OK;
}

/* ==========================================================================
 * Open: what is in the directory
 *
 * The names of our files, and what the ones that the manifest does not list
 * can tell. Such a file is garbage of a crash, as a rule. But it is deleted
 * only if nothing says that the manifest is the wrong one: an older copy that
 * somebody has put back, or that of another store. Reads only. A file whose
 * name is not exactly one of ours is not looked at by anybody.
 *
 *   unlisted                           shows
 *   a log with frames, id >= next_id   that the manifest is stale: corrupt
 *   a whole header, another uuid       a file of another store: corrupt
 *   MANIFEST.tmp, anything else        a crash: garbage
 * ========================================================================== */

/* Files of ours that are there. To be freed after an error, too. A name is
 * all that is known of a file until it is opened: it may be a link or a
 * directory (KVMETA_E_CORRUPT then), or have been made by somebody else. */
struct kv_listing {
    struct kv_env *env;
    struct kv_file *files;        /* kind and id only; none is open */
    size_t count;
    size_t cap;
    bool manifest;
    bool lock;
    bool data;                    /* a log or a table */
    uint64_t id_max;              /* of logs and tables; 0: there are none */
    int rc;                       /* why the listing was broken off */
};

/* Called by the vfs for each name, in any order. An errno ends the listing;
 * the error itself is kept in list->rc. */
static int kv_listing_add(void *arg, const char *name)
{
    struct kv_listing *list = arg;
    uint64_t id;
    int kind = kv_file_parse_name(name, &id);

    if (!kind) return 0;
    assert(id < KV_NUMBER_NAME_MAX);
    list->rc = kv_grow(list->env, (void **)&list->files, &list->cap,
                       list->count + 1, sizeof *list->files, NULL);
    if (list->rc) return ENOMEM;
    assert(list->count < list->cap);
    memset(&list->files[list->count], 0, sizeof *list->files);
    list->files[list->count].kind = (uint8_t)kind;
    list->files[list->count++].id = id;
    if (kind == KV_FILE_MANIFEST) list->manifest = true;
    if (kind == KV_FILE_LOCK) list->lock = true;
    if (kind != KV_FILE_LOG && kind != KV_FILE_TABLE) return 0;
    list->data = true;
    list->id_max = kv_max(list->id_max, id);
    return 0;
}

/* Lists the directory, anew if it was listed before. */
static int kv_listing_read(struct kv_env *env, struct kv_listing *list,
                           struct kvmeta_error *err)
{
    int e;

    kv_free(env, list->files);
    memset(list, 0, sizeof *list);
    list->env = env;
    assert(env->dir >= 0);
    e = env->vfs->dir_list(env->vfs->user, env->dir, kv_listing_add, list);
    /* Ours before that of the vfs, which only passes ours on. */
    if (list->rc) return kv_fail_memory(err, list->cap * sizeof *list->files);
    if (e)
        return kv_fail(err, kv_open_code(e), e,
                       "listing the directory: error %d", e);
    return KVMETA_OK;
}

/* Is the file part of the store? LOCK and MANIFEST always are; a manifest
 * that was being written (MANIFEST.tmp) never is. Ids of logs and tables are
 * from one row of numbers, but it is kind and id that count. */
static bool kv_manifest_names(const struct kv_manifest *m,
                              const struct kv_file *f)
{
    if (f->kind == KV_FILE_TABLE) {
        for (size_t i = 0; i < m->tables_count; i++)
            if (m->tables[i].id == f->id) return true;
    }
    if (f->kind == KV_FILE_LOG) {
        for (size_t i = 0; i < m->logs_count; i++)
            if (m->logs[i].id == f->id) return true;
    }
    return f->kind == KV_FILE_LOCK || f->kind == KV_FILE_MANIFEST;
}

/*
 * Does the file, which the manifest does not name, hold a frame? Then it was
 * named by a manifest that is newer than ours: frames are written to a log
 * only after the swap that makes it live (O1). A log without a whole header,
 * or with a header alone, is what a rotation leaves that was cut short. So is
 * one of zeros, which was being prepared.
 */
static int kv_check_unlisted_log(struct kv_env *env,
                                 const struct kv_file *file,
                                 struct kvmeta_error *err)
{
    struct kv_run run = {0};
    struct kv_frame f;
    int reason;
    int rc = kv_run_read_file(env, file, &run, err);

    assert(file->kind == KV_FILE_LOG);
    if (!rc && !kv_log_head_decode(env, file->id, run.bytes, run.size,
                                   &run.head)) {
        /* The first frame is enough: without it there is no chain. */
        run.last_hcrc = run.head.crc;
        if (kv_run_frame_at(env, &run, kv_log_first(run.head.align), &f,
                            &reason))
            rc = kv_fail_corrupt(err, file, 0, "holds commits, but the "
                                 "manifest does not know it: the manifest "
                                 "is stale");
    }
    kv_run_free(env, &run);
    return rc;
}

_Static_assert(KV_LOG_UUID_OFF + KV_UUID_BYTES <= KV_TABLE_HEADER_BYTES
               && KV_TABLE_UUID_OFF + KV_UUID_BYTES <= KV_TABLE_HEADER_BYTES,
               "the uuid is in what kv_check_foreign reads at least");
_Static_assert(KV_LOG_HEADER_BYTES <= KV_LOG_ALIGN_MAX
               && (int)KV_TABLE_HEADER_BYTES <= (int)KV_LOG_ALIGN_MAX,
               "a header is in what it reads at most");

/* Is it the header of a log or table of another store? The uuid decides, once
 * the sum is right by the uuid, id and salt that the header itself states;
 * widths and version are those of whoever wrote it, and not looked at. */
static bool kv_header_is_foreign(const struct kv_env *env, int kind,
                                 const unsigned char *bytes, uint64_t size)
{
    struct kv_env other = {.crc = env->crc};
    struct kv_log_head head;
    uint32_t seed;

    assert(size >= KV_TABLE_HEADER_BYTES);
    memcpy(other.uuid, bytes + (kind == KV_FILE_LOG ? KV_LOG_UUID_OFF
                                                    : KV_TABLE_UUID_OFF),
           KV_UUID_BYTES);
    if (memcmp(other.uuid, env->uuid, KV_UUID_BYTES) == 0) return false;
    if (kind == KV_FILE_LOG)
        return !kv_log_head_sum(&other, kv_load_le64(bytes + 32), bytes, size,
                                &head);
    seed = kv_crc_file_seed(&other, kind, kv_load_le64(bytes + 40),
                            bytes + 48);
    return kv_load_le64(bytes) == KV_TABLE_MAGIC
        && kv_load_le32(bytes + 68) == kv_crc_add(&env->crc, seed, bytes, 68);
}

/*
 * Fails if the file begins with the header of a log or table of another store.
 * It must be whole: a file that a crash has torn proves nothing. Only the
 * header is read, however large the file is. An error of reading is an error
 * of the open: what cannot be looked at must not be deleted.
 */
static int kv_check_foreign(struct kv_env *env, const struct kv_file *file,
                            struct kvmeta_error *err)
{
    unsigned char *bytes;
    uint64_t size = 0;
    bool foreign;
    int rc = kv_file_size(env, file, &size, err);

    /* Shorter than either header: of a log's, the rest is checked below. */
    if (rc || size < KV_TABLE_HEADER_BYTES) return rc;
    size = kv_min(size, KV_LOG_ALIGN_MAX);    /* no header is longer */
    bytes = kv_alloc(env, (size_t)size);
    if (!bytes) return kv_fail_memory(err, (size_t)size);
    rc = kv_file_read(env, file, bytes, (size_t)size, 0, err);
    foreign = !rc && kv_header_is_foreign(env, file->kind, bytes, size);
    kv_free(env, bytes);
    if (foreign) rc = kv_fail_corrupt(err, file, 0, "file of another store");
    return rc;
}

/*
 * An unlisted file of ours is garbage, unless it shows that the manifest is
 * stale, or belongs to another store. Only a log whose id is not below
 * next_id can show the former: a manifest that dropped a log has a higher
 * next_id than the log's id, so a log below it may hold frames and have been
 * left behind by an unlink that failed. which: as listed, not open.
 */
static int kv_check_unlisted(struct kv_env *env, const struct kv_manifest *m,
                             const struct kv_file *which,
                             struct kvmeta_error *err)
{
    struct kv_file file = {0};
    int rc = kv_file_open(env, which->kind, which->id, 0, &file, err);

    assert(which->kind == KV_FILE_LOG || which->kind == KV_FILE_TABLE);
    if (!rc) rc = kv_check_foreign(env, &file, err);
    if (!rc && which->kind == KV_FILE_LOG && which->id >= m->next_id)
        rc = kv_check_unlisted_log(env, &file, err);
    kv_file_close(env, &file);
    return rc;
}

/* ==========================================================================
 * Open: recovery
 *
 * Everything is read and checked before anything is written (kv_recover_read,
 * kv_recover_write). An open has the store to itself: but for LOCK, which may
 * be missing until all has been read, no lock is needed here.
 *
 *   manifest         which tables and logs there are
 *   marks, names     is the manifest the last one?
 *   tables, logs     opened side by side; a log is read and sorted as a
 *                    whole, a table but for its blocks
 *   chain            does each log begin where the one before has ended?
 *   ranges           the keys are cut into ranges; for each, all tables and
 *                    logs are merged into leaves of the tree, side by side
 *   digest           are these the records that were there? (P2)
 *
 *   The peak of memory is here: the tree, all logs as they are in their files
 *   with an item for each entry, and for each thread that merges the buffers
 *   of one block of every table. Logs and buffers are freed before the store
 *   runs.
 *
 *   directory sync   what was read may not be on disk yet
 *   swap             a live log becomes a table, or a damaged copy of the
 *                    manifest is put right; else there is none
 *   unlink           what no manifest names
 *
 * The live log is not gone on with. What it holds may be in the cache only,
 * from before a kill, or be behind a sync that failed; a sync of the file
 * would not tell. Its records are written to a new file instead, whose sync
 * can be believed. A cut in between leaves the log as it was, to be recovered
 * once more.
 *
 * An open and a close without a write in between change nothing on disk, if
 * the last close was clean and no merge is due: a sealed log is not flushed
 * before there is a live one.
 *
 * (P1) What is recovered is exactly the state after the last frame accepted.
 * (P2) Its digest, computed anew, is the one that this frame (or the
 *      manifest) holds.
 * ========================================================================== */

/* Work of one open; freed at its end, whatever has been filled in. */
struct kv_recovery {
    struct kvmeta *db;
    struct kv_listing list;
    struct kv_mark marks[2];      /* counter 0: none in this slot */
    bool healed;                  /* one copy of the manifest is damaged */
    struct kv_run *runs;          /* one per log of the manifest, as there */
    size_t runs_count;
    size_t ranges;                /* of keys, one loader each; at least 1 */
    unsigned char *bounds;        /* ranges - 1 keys: where each but the first
                                     range begins */
    struct kv_loader *loaders;    /* empty once the tree has adopted them */
    uint64_t seq;                 /* of the last commit */
    struct kvmeta_digest digest;  /* after it */
};

/* One task of many that run side by side. Each takes the next index that is
 * left (*next, shared by all) until there is none, or it has met an error. */
struct kv_task {
    int (*fn)(struct kv_recovery *rec, size_t index, struct kvmeta_error *err);
    struct kv_recovery *rec;
    _Atomic size_t *next;
    size_t count;                 /* indexes, together */
    int rc;
    struct kvmeta_error err;
    pthread_t thread;
    bool started;                 /* `thread` is one, to be joined */
};

/* Also called by the opener itself, whose task has no thread. */
static void *kv_task_main(void *arg)
{
    struct kv_task *task = arg;

    while (!task->rc) {
        /* Whoever is done first takes the next: tasks need not be alike. */
        size_t i = (*task->next)++;

        if (i >= task->count) break;
        task->rc = task->fn(task->rec, i, &task->err);
    }
    return NULL;
}

enum { KV_OPEN_THREADS_MAX = 64 };

/*
 * Runs fn for 0..count-1 on the open's threads, of which the caller's is one.
 * A thread that cannot be started only means that the others do its part. One
 * that meets an error stops, and the others still do what is left; the error
 * of the first such task is returned. fn must write to nothing but what
 * belongs to its index or has its own lock. All threads are gone on return.
 */
static int kv_parallel(struct kv_recovery *rec, size_t count,
                       int (*fn)(struct kv_recovery *rec, size_t index,
                                 struct kvmeta_error *err),
                       struct kvmeta_error *err)
{
    size_t threads = (size_t)kv_min(rec->db->options.open_threads, count);
    size_t bytes = threads * sizeof(struct kv_task);
    struct kv_task *tasks;
    _Atomic size_t next = 0;
    int rc = KVMETA_OK;

    if (count == 0) return KVMETA_OK;
    assert(threads >= 1);
    assert(threads <= KV_OPEN_THREADS_MAX);
    tasks = kv_alloc_zeroed(&rec->db->env, bytes);
    if (!tasks) return kv_fail_memory(err, bytes);
    for (size_t i = 0; i < threads; i++) {
        tasks[i].fn = fn;
        tasks[i].rec = rec;
        tasks[i].next = &next;
        tasks[i].count = count;
        if (i + 1 < threads)
            tasks[i].started = pthread_create(&tasks[i].thread, NULL,
                                              kv_task_main, &tasks[i]) == 0;
    }
    /* The last task is the caller's own: with it alone all would be done. */
    kv_task_main(&tasks[threads - 1]);
    for (size_t i = 0; i < threads; i++) {
        if (tasks[i].started) pthread_join(tasks[i].thread, NULL);
        if (!rc && tasks[i].rc) {
            rc = tasks[i].rc;
            *err = tasks[i].err;
        }
    }
    kv_free(&rec->db->env, tasks);
    assert(rc || next >= count);         /* no index was left out */
    return rc;
}

/* Task: the log i of the manifest. Both marks count, the older one too: each
 * says that a sync had returned, and offsets only grow. */
static int kv_recover_log(struct kv_recovery *rec, size_t i,
                          struct kvmeta_error *err)
{
    const struct kv_log_meta *meta = &rec->db->manifest.logs[i];
    uint64_t acked = 0;

    assert(i < rec->runs_count);
    assert(!rec->runs[i].bytes);
    for (unsigned k = 0; k < 2; k++)
        if (rec->marks[k].counter && rec->marks[k].log_id == meta->id)
            acked = kv_max(acked, rec->marks[k].durable);
    return kv_run_load(&rec->db->env, meta, acked, &rec->runs[i], err);
}

/* Task: opens table i of the manifest, for as long as the store is open. Its
 * blocks are read by the merges. */
static int kv_recover_table(struct kv_recovery *rec, size_t i,
                            struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;

    assert(i < db->tables_count);
    assert(!db->tables[i].file.open);
    return kv_table_open(&db->env, &db->manifest.tables[i], &db->tables[i],
                         err);
}

/* Each log must begin where the tables, or the log before, ended: with the
 * next commit number, and from the same digest. Leaves in rec->seq and
 * rec->digest what the last of them comes to, or the tables where there is
 * none. */
static int kv_recover_chain(struct kv_recovery *rec, struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;

    rec->seq = db->manifest.seq;
    rec->digest = db->manifest.digest;
    for (size_t i = 0; i < rec->runs_count; i++) {
        const struct kv_run *run = &rec->runs[i];
        struct kv_file file = {.kind = KV_FILE_LOG, .id = run->head.id};

        if (run->head.first_seq != rec->seq + 1
            || !kv_digest_equal(run->head.digest, rec->digest))
            return kv_fail_corrupt(err, &file, 72,
                                   "log does not follow what is before it");
        /* Each frame has been checked to begin with the number that follows;
         * the digest after it is taken as it is, until P2 is checked. */
        rec->seq += run->batches;
        rec->digest = run->digest;
        db->found.open_logs++;
        db->found.open_log_frames += run->frames;
        db->found.open_log_batches += run->batches;
        db->found.open_torn_bytes += run->torn_bytes;
        if (run->torn_reason)
            db->found.open_torn_reason = (uint32_t)run->torn_reason;
    }
    return KVMETA_OK;
}

/*
 * Splits the keys into ranges of like size, by the first keys of the blocks
 * of the largest table or by the entries of the largest log: these are sorted
 * samples that are at hand, of whatever the keys are like. A poor split costs
 * time only. The bounds ascend strictly, as do the keys that they are taken
 * from, so that each record is in one range; a range may still be empty.
 */
static int kv_recover_split(struct kv_recovery *rec, struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    size_t key_bytes = db->env.shape.key_bytes;
    const struct kv_table *table = NULL;
    const struct kv_run *run = NULL;
    uint64_t records = 0;
    size_t points;

    for (size_t i = 0; i < db->tables_count; i++) {
        const struct kv_table *t = &db->tables[i];

        records += t->meta.records;
        if (!table || t->meta.records > table->meta.records) table = t;
    }
    for (size_t i = 0; i < rec->runs_count; i++) {
        records += rec->runs[i].count;
        if (!run || rec->runs[i].count > run->count) run = &rec->runs[i];
    }
    if (table && run && run->count > table->meta.records) table = NULL;
    points = table ? table->blocks : run ? run->count : 0;
    /* Four ranges a thread even out those that take longer; less than 65,536
     * records are not worth a range, and no two bounds may be the same. */
    rec->ranges = db->options.open_threads > 1
        ? (size_t)kv_min(4 * (uint64_t)db->options.open_threads,
                         records / 65536) : 1;
    rec->ranges = (size_t)kv_max(1, kv_min(rec->ranges, points));
    assert(rec->ranges == 1 || rec->ranges <= points);
    rec->bounds = kv_alloc(&db->env, rec->ranges * key_bytes);
    rec->loaders = kv_alloc_zeroed(&db->env,
                                   rec->ranges * sizeof *rec->loaders);
    if (!rec->bounds || !rec->loaders)
        return kv_fail_memory(err, rec->ranges * sizeof *rec->loaders);
    for (size_t i = 1; i < rec->ranges; i++) {
        /* Of 64 bits: the product may have more than a size_t has. */
        size_t at = (size_t)((uint64_t)points * i / rec->ranges);
        const unsigned char *key = table ? kv_table_block_key(table, at)
            : run->bytes + (uint64_t)run->items[at].place * 8 + KV_ENTRY_BYTES;

        assert(at > 0);
        assert(at < points);
        assert(i == 1 || memcmp(rec->bounds + (i - 2) * key_bytes, key,
                                key_bytes) < 0);
        memcpy(rec->bounds + (i - 1) * key_bytes, key, key_bytes);
    }
    for (size_t i = 0; i < rec->ranges; i++)
        kv_loader_init(&db->tree, &rec->loaders[i]);
    return KVMETA_OK;
}

/*
 * Task: merges all tables and logs for range i into its loader. Of equal keys
 * the youngest input's record comes out, and where that is a tombstone there
 * is no record. The rounds of the merge are used directly, without the source
 * that hands records out one by one: this is where an open spends its time.
 */
static int kv_recover_range(struct kv_recovery *rec, size_t i,
                            struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    size_t key_bytes = db->env.shape.key_bytes;
    const unsigned char *to = rec->bounds + i * key_bytes;
    struct kv_job job = {.env = &db->env};   /* no stop, no rate */
    struct kv_inputs in;
    int rc = kv_inputs_open(&job, db->tables, db->tables_count, rec->runs,
                            rec->runs_count, i > 0 ? to - key_bytes : NULL,
                            i + 1 < rec->ranges ? to : NULL, &in, err);

    assert(i < rec->ranges);
    assert(rec->loaders[i].records == 0);
    while (!rc) {
        const struct kv_item *items = in.merge.items;

        /* Items stay valid until the next round; the loader copies them. */
        rc = kv_merge_round(&in.merge, err);
        for (size_t k = 0; k < in.merge.count && !rc; k++)
            if (!(items[k].mark & 1))
                rc = kv_loader_add(&rec->loaders[i], items[k].head,
                                   kv_item_key(&in.merge.order, &items[k]),
                                   err);
    }
    kv_inputs_close(&db->env, &in);
    return rc == KV_END ? KVMETA_OK : rc;
}

/*
 * P2: the records are the ones that were there when the last commit was.
 * Every frame holds the digest that the writer's tree had; here it comes out
 * of the records themselves, by another way through tables, logs and merges.
 * By now every sum over bytes was right; what this still finds is a file that
 * is whole and wrong, or a mistake in merging. Which one cannot be told, so
 * the message names the place of the digest that was expected: the
 * manifest's, or the end of the last log.
 */
static int kv_recover_digest(struct kv_recovery *rec, struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    const struct kv_version *now = kv_tree_now(&db->tree);
    struct kv_file file = {.kind = KV_FILE_MANIFEST};
    uint64_t off = 56;

    if (kv_digest_equal(now->digest, rec->digest)) return KVMETA_OK;
    if (rec->runs_count > 0) {
        file.kind = KV_FILE_LOG;
        file.id = rec->runs[rec->runs_count - 1].head.id;
        off = rec->runs[rec->runs_count - 1].end;
    }
    return kv_fail_corrupt(err, &file, off,
                           "digest of the records is %016llx%016llx, "
                           "want %016llx%016llx",
                           (unsigned long long)now->digest.hi,
                           (unsigned long long)now->digest.lo,
                           (unsigned long long)rec->digest.hi,
                           (unsigned long long)rec->digest.lo);
}

/* Unlisted files, and a mark from a later manifest. Does not look at what the
 * manifest lists: a file that is missing is met when it is opened. */
static int kv_recover_check_files(struct kv_recovery *rec,
                                  struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    struct kv_file manifest = {.kind = KV_FILE_MANIFEST};
    int rc = KVMETA_OK;

    /* A mark is written after its swap, and never runs ahead of the disk. */
    for (unsigned i = 0; i < 2; i++)
        if (rec->marks[i].counter && rec->marks[i].gen > db->manifest.gen
            && !KV_MUTANT(18))
            return kv_fail_corrupt(err, &manifest, 32,
                                   "generation %llu, but LOCK has seen %llu: "
                                   "the manifest is stale",
                                   (unsigned long long)db->manifest.gen,
                                   (unsigned long long)rec->marks[i].gen);
    /* LOCK, MANIFEST and MANIFEST.tmp tell nothing by being there. */
    for (size_t i = 0; i < rec->list.count && !rc; i++) {
        const struct kv_file *f = &rec->list.files[i];

        if (f->kind != KV_FILE_LOG && f->kind != KV_FILE_TABLE) continue;
        if (!kv_manifest_names(&db->manifest, f))
            rc = kv_check_unlisted(&db->env, &db->manifest, f, err);
    }
    return rc;
}

/*
 * Reads and checks everything; writes nothing. OK: the tree holds the
 * records, and db the manifest and the open tables. After an error db is only
 * good for kv_store_free. Without LOCK (a read-only store may have none)
 * there are no marks, which is lost evidence and no error.
 *
 * What is cheap to find is looked for first: a store of other widths, a newer
 * format, a stale manifest fail before a table is opened.
 */
static int kv_recover_read(struct kv_recovery *rec, struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    struct kv_manifest *m = &db->manifest;
    int rc = kv_manifest_read(&db->env, m, &rec->healed, err);

    assert(!db->tables);
    assert(!rec->runs);
    if (!rc && db->lock.open)
        rc = kv_marks_read(&db->env, &db->lock, rec->marks, err);
    if (!rc) rc = kv_recover_check_files(rec, err);
    if (rc) return rc;

    /* Zeroed: whatever fails now, what was not opened yet can be closed. */
    rec->runs_count = m->logs_count;
    rec->runs = kv_alloc_zeroed(&db->env,
                                (m->logs_count + 1) * sizeof *rec->runs);
    db->tables_cap = m->tables_count + 1;
    db->tables = kv_alloc_zeroed(&db->env, db->tables_cap * sizeof *db->tables);
    if (!rec->runs || !db->tables)
        return kv_fail_memory(err, db->tables_cap * sizeof *db->tables);
    db->tables_count = m->tables_count;
    db->tables_seq = m->seq;
    db->tables_digest = m->digest;
    /* Garbage may have ids that no manifest notes; see kv_store_new_id. */
    db->next_id = kv_max(m->next_id, rec->list.id_max + 1);
    assert(db->next_id > 0);
    db->found.open_tables = m->tables_count;
    for (size_t i = 0; i < m->tables_count; i++)
        db->found.open_table_records += m->tables[i].records;

    /* Each step needs all of those before: the chain all logs, the split all
     * sizes, a range every table and log. */
    rc = kv_parallel(rec, m->tables_count, kv_recover_table, err);
    if (!rc) rc = kv_parallel(rec, rec->runs_count, kv_recover_log, err);
    if (!rc) rc = kv_recover_chain(rec, err);
    if (!rc) rc = kv_recover_split(rec, err);
    if (!rc) rc = kv_parallel(rec, rec->ranges, kv_recover_range, err);
    if (!rc)
        rc = kv_tree_adopt(&db->tree, rec->loaders, rec->ranges, rec->seq,
                           err);
    if (!rc) rc = kv_recover_digest(rec, err);
    return rc;
}

/*
 * The newest log was live: what it holds goes into a table, with all logs
 * before it, for one table holds them as well as many. The log is never
 * appended to, and never trusted to be on disk. If no log has a batch there
 * is no table, and the swap only drops the logs. The records have been
 * through P2 already; the table holds changes, and has no digest of its own.
 *
 * Where there are as many tables as a manifest can have, all of them go into
 * it, too: lives that end in a kill each leave one, and may all have been too
 * short for the background to merge any.
 */
static int kv_recover_flush(struct kv_recovery *rec, struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    size_t count = db->tables_count;
    size_t first = count < KV_TABLES_MAX ? count : 0;
    uint64_t up_to = rec->runs[rec->runs_count - 1].head.id;
    uint64_t first_seq = first < count ? db->tables[0].meta.seq_first
                                       : rec->runs[0].head.first_seq;
    struct kv_table table = {0};
    struct kvmeta_digest dropped;
    struct kv_inputs in;
    struct kv_job job;
    int rc;

    assert(rec->runs_count > 0);
    assert(count == db->manifest.tables_count);
    /* There is no live log that a step between blocks could look after. */
    kv_job_init(db, &job);
    job.between = NULL;
    rc = kv_inputs_open(&job, db->tables + first, count - first, rec->runs,
                        rec->runs_count, NULL, NULL, &in, err);
    if (!rc && rec->seq >= first_seq)
        rc = kv_job_write(&job, kv_store_new_id(db), &in.merge.base, first == 0,
                          first_seq, rec->seq, &dropped, &table, err);
    kv_inputs_close(&db->env, &in);
    if (rc) return rc;
    /* The only table has all records, which have been through P2. */
    assert(first > 0 || kv_digest_equal(table.sum, rec->digest));
    /* The live log has the highest id of all: no log stays. */
    return kv_job_install(db, first, count, &table, up_to, rec->seq,
                          rec->digest, err);
}

/* An empty swap: puts a damaged copy of the manifest right, and makes a new
 * store. A new image replaces both copies, with the next generation. Takes
 * the swap lock, which nobody else can want yet, as kv_store_swap asks for
 * it. OK does not say that the mark was written: see db->failed. */
static int kv_recover_swap(struct kvmeta *db, struct kvmeta_error *err)
{
    struct kv_manifest next;
    bool undone;
    int rc;

    assert(!kv_manifest_live(&db->manifest));
    pthread_mutex_lock(&db->swap_lock);
    rc = kv_manifest_copy(&db->env, &db->manifest, &next, err);
    if (!rc) rc = kv_store_swap(db, &next, NULL, &undone, err);
    pthread_mutex_unlock(&db->swap_lock);
    return rc;
}

/* Deletes what no manifest names, of the files that were listed and checked:
 * the last thing that an open does. A failure leaves it to the next one. */
static void kv_recover_clean(struct kv_recovery *rec)
{
    struct kvmeta *db = rec->db;

    assert(!kv_manifest_live(&db->manifest));
    for (size_t i = 0; i < rec->list.count; i++) {
        const struct kv_file *f = &rec->list.files[i];
        bool ours = false;

        if (kv_manifest_names(&db->manifest, f)) continue;
        /* What this open has swapped out is unlinked already. */
        for (size_t k = 0; k < rec->runs_count; k++)
            ours = ours || (f->kind == KV_FILE_LOG
                            && rec->runs[k].head.id == f->id);
        if (!ours) db->found.open_garbage_files++;
        if (!ours) kv_job_unlink(db, f->kind, f->id);
    }
}

/*
 * Brings the directory into the state of a store that runs: no live log, two
 * good copies of the manifest, no garbage. Everything has been checked, and
 * LOCK is held. After an error the next open finds what this one found, or
 * the table already in place of the log; an open whose swap was done but not
 * its mark fails as well, since its store could not be written to.
 */
static int kv_recover_write(struct kv_recovery *rec, struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    bool live = kv_manifest_live(&db->manifest) != NULL;
    int rc = KVMETA_OK;

    assert(db->lock.open);
    assert(!(db->options.flags & KVMETA_READ_ONLY));
    /* What has been read may be in the cache only: after a kill between the
     * rename of a swap and its sync, a power cut would bring back the
     * manifest before the one that this open goes by. */
    if (!KV_MUTANT(11)) rc = kv_dir_sync(&db->env, err);
    if (!rc && live)
        rc = kv_recover_flush(rec, err);
    else if (!rc && rec->healed)
        rc = kv_recover_swap(db, err);
    /* A swap is OK, too, when its mark has failed the store. */
    if (!rc && db->failed)
        rc = kv_fail(err, KVMETA_E_IO, db->failed_error.sys_errno, "%s",
                     db->failed_error.message);
    if (!rc) kv_recover_clean(rec);
    return rc;
}

/* What an open has left over: the logs' bytes and, if it failed, leaves that
 * are in no tree. Accepts one of which only `db` is set. */
static void kv_recovery_free(struct kv_recovery *rec)
{
    struct kv_env *env = &rec->db->env;

    for (size_t i = 0; rec->runs && i < rec->runs_count; i++)
        kv_run_free(env, &rec->runs[i]);
    for (size_t i = 0; rec->loaders && i < rec->ranges; i++)
        kv_loader_free(&rec->loaders[i]);
    kv_free(env, rec->runs);
    kv_free(env, rec->loaders);
    kv_free(env, rec->bounds);
    kv_free(env, rec->list.files);
}

/* ==========================================================================
 * Open and close
 *
 * State of a handle: made (kv_store_new) -> locked -> recovered -> running
 * (thread) -> closed. kv_store_free takes it apart from any of them.
 *
 * One handle at a time has a store, in this process or in any other: that is
 * what the lock on LOCK is for. It belongs to the open file, and goes with it
 * when the process ends, however it ends; a pid in a file could outlive its
 * process. LOCK is never unlinked, or two handles could each have locked a
 * LOCK of their own.
 *
 * A directory is in one of these states. What is refused is left as it is.
 *
 *   missing or empty                        a store is made
 *   LOCK without a mark                     the same: making one was cut
 *   no manifest, but logs, tables or marks  corrupt: the manifest is lost
 *   manifest, no LOCK                       read and checked, then LOCK is
 *                                           made, and all done again under it
 *   manifest and LOCK                       recovered
 *
 * What an open or a close leaves that is cut, or fails, after this step:
 *
 *   open   directory made, LOCK made        still no store: made by the next
 *          first swap                       an empty store
 *          live log written to a table      the log, and garbage
 *          swap                             clean, with the log as garbage
 *   close  pending frames written, synced   the live log, with every commit
 *          swap                             clean: every byte accounted for
 *          prepared log unlinked            the same, without garbage
 * ========================================================================== */

/*
 * Gives everything back, from any state of the handle, and writes nothing.
 * The thread must have ended, and no other may be in a call. What is open
 * is closed without a sync: for a store that was not sealed before, this is
 * like a kill. The last is `memory`, which holds *db itself; `env` is copied
 * since freeing needs it.
 */
static void kv_store_free(struct kvmeta *db)
{
    struct kv_env env = db->env;

    assert(db->memory);
    assert(db->tables || db->tables_count == 0);
    /* The tree first: it frees by db->env. No file is unlinked here. */
    kv_tree_free(&db->tree);
    for (size_t i = 0; db->tables && i < db->tables_count; i++)
        kv_table_close(&env, &db->tables[i]);
    kv_free(&env, db->tables);
    kv_manifest_free(&env, &db->manifest);
    kv_free(&env, db->buffer.bytes);
    kv_file_close(&env, &db->log.file);
    kv_file_close(&env, &db->log_retired);
    kv_file_close(&env, &db->prepared.file);
    kv_file_close(&env, &db->lock);
    if (env.dir >= 0) env.vfs->dir_close(env.vfs->user, env.dir);
    if (db->locks_made) {
        pthread_mutex_destroy(&db->queue_lock);
        pthread_mutex_destroy(&db->job_lock);
        pthread_mutex_destroy(&db->swap_lock);
        pthread_mutex_destroy(&db->mark_lock);
        pthread_mutex_destroy(&db->state_lock);
        pthread_cond_destroy(&db->rooms[0]);
        pthread_cond_destroy(&db->rooms[1]);
        pthread_cond_destroy(&db->work);
        pthread_cond_destroy(&db->progress);
    }
    if (db->alive) munmap((void *)(uintptr_t)db->alive, KV_PAGE_BYTES);
    kv_free(&env, db->memory);
}

/* Returns an errno. Where one of them fails, those made before are given up
 * without being destroyed. */
static int kv_store_make_locks(struct kvmeta *db)
{
    int e = pthread_mutex_init(&db->queue_lock, NULL);

    assert(!db->locks_made);
    if (!e) e = pthread_mutex_init(&db->job_lock, NULL);
    if (!e) e = pthread_mutex_init(&db->swap_lock, NULL);
    if (!e) e = pthread_mutex_init(&db->mark_lock, NULL);
    if (!e) e = pthread_mutex_init(&db->state_lock, NULL);
    if (!e) e = pthread_cond_init(&db->rooms[0], NULL);
    if (!e) e = pthread_cond_init(&db->rooms[1], NULL);
    if (!e) e = kv_cond_init(&db->work);
    if (!e) e = kv_cond_init(&db->progress);
    db->locks_made = e == 0;
    return e;
}

/*
 * A page that a fork empties: 1 here, 0 in a child (MADV_WIPEONFORK, Linux
 * 4.14). It needs no handler that a host would have to know of. NULL where
 * the system has no such thing, where all memory is to come from realloc_fn,
 * or where the vfs has its own idea of a process.
 */
static _Atomic uint32_t *kv_alive_map(const struct kv_env *env)
{
    void *page = NULL;

#ifdef MADV_WIPEONFORK
    if (env->realloc_fn || env->vfs->process_id != kv_posix_process_id)
        return NULL;
    page = mmap(NULL, KV_PAGE_BYTES, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return NULL;
    if (madvise(page, KV_PAGE_BYTES, MADV_WIPEONFORK) != 0) {
        munmap(page, KV_PAGE_BYTES);
        return NULL;
    }
    atomic_store((_Atomic uint32_t *)page, 1);
#else
    (void)env;
#endif
    return page;
}

_Static_assert(_Alignof(struct kvmeta) <= KV_CACHE_LINE,
               "a cache line is aligned enough for a handle");

/*
 * A handle that has its memory and its locks, and an empty tree; no file is
 * open. options: normalized.
 */
static int kv_store_new(const struct kvmeta_options *options,
                        struct kvmeta **out, struct kvmeta_error *err)
{
    size_t bytes = sizeof(struct kvmeta) + KV_CACHE_LINE;
    struct kv_env env = {.vfs = options->vfs, .realloc_fn = options->realloc_fn,
                         .log_fn = options->log_fn, .user = options->user,
                         .dir = -1};
    void *memory = kv_alloc_zeroed(&env, bytes);
    struct kvmeta *db;
    int rc = KVMETA_OK;

    assert(options->vfs);         /* the options are normalized */
    if (!memory) return kv_fail_memory(err, bytes);
    db = kv_line_up(memory);
    assert((uintptr_t)db % KV_CACHE_LINE == 0);
    /* From here on kv_store_free can take it apart. */
    db->memory = memory;
    db->env = env;
    db->options = *options;
    db->env.process_id = env.vfs->process_id(env.vfs->user);
    db->alive = kv_alive_map(&db->env);
    kv_shape_init(&db->env.shape, options->key_bytes, options->value_bytes);
    kv_crc_init(&db->env.crc, true);
    if (db->options.open_threads == 0) {
        long cores = sysconf(_SC_NPROCESSORS_ONLN);

        db->options.open_threads = (uint32_t)kv_min(
            KV_OPEN_THREADS_MAX, cores > 0 ? (uint64_t)cores : 1);
    }
    assert(db->options.open_threads >= 1);
    assert(db->options.open_threads <= KV_OPEN_THREADS_MAX);
    kv_log_buffer_clear(&db->buffer);
    if (kv_store_make_locks(db))
        rc = kv_fail_memory(err, sizeof(struct kvmeta));
    if (!rc)
        rc = kv_tree_init(&db->tree, &db->env, options->memory_bytes_max, err);
    if (rc) {
        kv_store_free(db);
        return rc;
    }
    *out = db;
    return KVMETA_OK;
}

/* Opens the directory, which everything else is relative to: it may be moved
 * while the store is open. Creates it where it is missing and may be. Its
 * entry in its parent is synced later (kv_open_create), by whichever open
 * makes the store: the one that made the directory may have come to nothing.
 */
static int kv_open_dir(struct kvmeta *db, const char *path,
                       struct kvmeta_error *err)
{
    const struct kvmeta_vfs *vfs = db->env.vfs;
    uint32_t must = KVMETA_READ_ONLY | KVMETA_MUST_EXIST;
    int e = vfs->dir_open(vfs->user, path, &db->env.dir);

    assert(e || db->env.dir >= 0);
    /* Its parents must be there: a wrong path makes no directories. */
    if (e == ENOENT && !(db->options.flags & must)) {
        e = vfs->dir_create(vfs->user, path);
        /* Another open may have been faster: what it made will do. */
        if (!e || e == EEXIST) e = vfs->dir_open(vfs->user, path, &db->env.dir);
    } else if (e == ENOENT) {
        return kv_fail(err, KVMETA_NOT_FOUND, e, "no such directory");
    }
    if (!e) return KVMETA_OK;
    db->env.dir = -1;
    return kv_fail(err, e == EROFS ? KVMETA_E_READONLY
                   : e == ENOSPC ? KVMETA_E_NOSPACE : kv_open_code(e), e,
                   "directory: error %d", e);
}

/* Opens LOCK and locks it; does not wait. A read-only handle locks it as
 * well, against writers and, since there is one kind of lock only, against
 * others like it. After an error db->lock may be open; kv_store_free closes
 * it. */
static int kv_open_lock(struct kvmeta *db, bool create,
                        struct kvmeta_error *err)
{
    const struct kvmeta_vfs *vfs = db->env.vfs;
    int flags = db->options.flags & KVMETA_READ_ONLY ? 0 : KVMETA_VFS_WRITE;
    int rc;

    assert(!db->lock.open);
    assert(!create || !(db->options.flags & KVMETA_READ_ONLY));
    if (create) flags |= KVMETA_VFS_CREATE;
    rc = kv_file_open(&db->env, KV_FILE_LOCK, 0, flags, &db->lock, err);
    if (rc) return rc;
    rc = vfs->file_lock(vfs->user, db->lock.handle);
    if (rc == EWOULDBLOCK)
        return kv_fail(err, KVMETA_E_BUSY, rc,
                       "LOCK: the store is open elsewhere");
    return rc ? kv_fail_file(err, &db->lock, rc, "lock", 0) : KVMETA_OK;
}

/*
 * A directory without a manifest: is a store to be made of it? Only if
 * nothing says that there has been one. Marks are first written after the
 * first swap, so LOCK without a mark is what an open leaves that was cut
 * before it. The uuid is not known without the manifest, and any mark counts.
 * Changes nothing, and needs no lock: whoever makes a store has LOCK and
 * looks again.
 */
static int kv_open_absent(struct kvmeta *db, struct kv_recovery *rec,
                          struct kvmeta_error *err)
{
    struct kv_file manifest = {.kind = KV_FILE_MANIFEST};
    uint32_t must = KVMETA_READ_ONLY | KVMETA_MUST_EXIST;
    int rc = KVMETA_OK;

    assert(!rec->list.manifest);
    /* A store was here, or files of one have been put here by hand. */
    if (rec->list.data)
        return kv_fail_corrupt(err, &manifest, 0,
                               "missing, but there are logs or tables");
    if (rec->list.lock) {
        struct kv_file lock = {0};

        rc = kv_file_open(&db->env, KV_FILE_LOCK, 0, 0, &lock, err);
        if (!rc) rc = kv_marks_read(&db->env, &lock, rec->marks, err);
        kv_file_close(&db->env, &lock);
        /* Any valid mark is one too many: also that of a foreign store. */
        if (rc == KVMETA_E_CORRUPT || rec->marks[0].counter
            || rec->marks[1].counter)
            return kv_fail_corrupt(err, &manifest, 0,
                                   "missing, but LOCK has marks");
    }
    if (rc) return rc;
    if (db->options.flags & must)
        return kv_fail(err, KVMETA_NOT_FOUND, 0, "there is no store");
    return KVMETA_OK;
}

/*
 * Makes a store in the locked directory: an empty manifest, generation 1. The
 * directory may have been made a moment ago, by this open or by another that
 * failed, so its entry is synced first: a store must not be acknowledged that
 * its parent may not have after a power cut. A cut before the swap leaves
 * LOCK without a mark; the next open begins anew, with another uuid.
 */
static int kv_open_create(struct kvmeta *db, const char *path,
                          struct kvmeta_error *err)
{
    const struct kvmeta_vfs *vfs = db->env.vfs;
    int rc = vfs->dir_sync_parent(vfs->user, path);

    assert(db->lock.open);
    assert(db->manifest.gen == 0);
    if (rc)
        return kv_fail(err, kv_open_code(rc), rc,
                       "sync of the parent directory: error %d", rc);
    rc = kv_random(&db->env, db->env.uuid, KV_UUID_BYTES, err);
    if (rc) return rc;
    db->next_id = 1;              /* 0 stands for no id */
    /* OK though the mark has failed is no success here: the handle could not
     * be written to, and the caller could not tell. */
    rc = kv_recover_swap(db, err);
    if (!rc && db->failed)
        rc = kv_fail(err, db->failed, db->failed_error.sys_errno, "%s",
                     db->failed_error.message);
    return rc;
}

/*
 * Everything from the listing to the recovered store. Where LOCK is missing
 * it is made last, once all else has been checked: a store that is found
 * damaged is left as it was. *again: LOCK was made, check anew under it,
 * since what was read without it may have been changed by another process.
 */
static int kv_open_recover(struct kvmeta *db, const char *path,
                           struct kv_recovery *rec, bool *again,
                           struct kvmeta_error *err)
{
    bool read_only = db->options.flags & KVMETA_READ_ONLY;
    int rc;

    assert(!db->lock.open);
    assert(db->env.dir >= 0);
    *again = false;
    rc = kv_listing_read(&db->env, &rec->list, err);
    if (!rc && rec->list.lock) {
        rc = kv_open_lock(db, false, err);
        /* Again: whoever had the lock may have been at work until now. */
        if (!rc) rc = kv_listing_read(&db->env, &rec->list, err);
    }
    if (rc) return rc;
    if (!rec->list.manifest) {
        rc = kv_open_absent(db, rec, err);
        if (!rc && !db->lock.open) rc = kv_open_lock(db, true, err);
        if (!rc) rc = kv_listing_read(&db->env, &rec->list, err);
        if (!rc && !rec->list.manifest) return kv_open_create(db, path, err);
        if (rc) return rc;        /* else another process was faster */
    }
    rc = kv_recover_read(rec, err);
    if (rc || read_only) return rc;
    if (!db->lock.open) {         /* the caller begins anew in any case */
        *again = true;
        return kv_open_lock(db, true, err);
    }
    /* The next mark goes to the slot of the older one. */
    for (unsigned i = 0; i < 2; i++)
        if (rec->marks[i].counter > db->mark.counter)
            db->mark = rec->marks[i];
    db->found.open_healed = rec->healed;
    return kv_recover_write(rec, err);
}

/*
 * One try of an open: makes the handle, and frees it on every way that does
 * not end in *out. With *again there is no handle, though rc is OK: all
 * that this one read is thrown away. The thread is started once nothing else
 * can fail: until then no lock is needed for what it looks at.
 */
static int kv_open_once(const char *path, const struct kvmeta_options *options,
                        struct kvmeta **out, bool *again,
                        struct kvmeta_error *err)
{
    struct kv_recovery rec = {0};
    struct kvmeta *db = NULL;
    uint64_t start;
    int rc = kv_store_new(options, &db, err);

    *again = false;
    if (rc) return rc;
    start = kv_now(db);
    rec.db = db;
    rc = kv_open_dir(db, path, err);
    if (!rc) rc = kv_open_recover(db, path, &rec, again, err);
    kv_recovery_free(&rec);
    /* Short lives may have left more than their background could flush. */
    db->backlogged = kv_logs_waiting_locked(db) >= KV_LOGS_WAITING_MAX;
    if (!rc && !*again
        && !(options->flags & (KVMETA_NO_THREAD | KVMETA_READ_ONLY))) {
        int e = pthread_create(&db->thread, NULL, kv_worker_main, db);

        db->has_thread = e == 0;
        if (e) rc = kv_fail(err, KVMETA_E_NOMEM, e, "no thread: error %d", e);
    }
    if (rc || *again) {
        kv_store_free(db);
        return rc;
    }
    assert(db->lock.open || (options->flags & KVMETA_READ_ONLY));
    db->durable_seq = kv_tree_now(&db->tree)->seq;
    db->found.open_ms = (kv_now(db) - start) / 1000000;
    if (db->found.open_torn_bytes)
        kv_log(&db->env, KVMETA_LOG_WARNING, "recovery: dropped %llu bytes "
               "that were never acknowledged",
               (unsigned long long)db->found.open_torn_bytes);
    *out = db;
    return KVMETA_OK;
}

/* A second try finds the LOCK that the first has made. err is never NULL
 * below here. A success clears it, since a try may have left the text of
 * something that was not fatal; *db is set in the last step of a try, and
 * only there. */
int kvmeta_open(const char *dir, const struct kvmeta_options *options,
                kvmeta **db, struct kvmeta_error *err)
{
    struct kvmeta_options o = {0};
    struct kvmeta_error own;
    bool again;
    int rc;

    if (!err) err = &own;
    memset(err, 0, sizeof *err);
    if (!dir || !options || !db)
        return kv_fail(err, KVMETA_E_INVALID, 0, "NULL argument");
    rc = kv_options_normalize(options, &o, err);
    if (!rc) rc = kv_open_once(dir, &o, db, &again, err);
    if (!rc && again) rc = kv_open_once(dir, &o, db, &again, err);
    if (!rc && again)
        rc = kv_fail(err, KVMETA_E_BUSY, 0, "LOCK: somebody removes it");
    if (!rc) memset(err, 0, sizeof *err);
    assert(rc <= KVMETA_NOT_FOUND);
    assert(err->code == rc);
    return rc;
}

/*
 * Everything durable, the log sealed: with that, the manifest accounts for
 * every byte, and the next open tolerates no tail. The last mark is synced as
 * well. After an error the directory is as after a kill, and the log live or
 * sealed; what was durable is there.
 */
static int kv_close_seal(struct kvmeta *db)
{
    struct kv_request right = {.exclusive = true};
    struct kvmeta_error err = {0};
    int rc;

    assert(db->stopping);
    if (db->failed) return KVMETA_E_FAILED;
    (void)kv_right_take(db, &right);
    rc = kv_rotate(db, false, &err);
    assert(rc || !kv_manifest_live(&db->manifest));
    assert(rc || db->buffer.entries == 0);
    kv_right_give(db, NULL);
    if (!rc && db->mark_dirty)
        rc = kv_file_sync(&db->env, &db->lock, &err);
    if (!rc && db->failed) rc = db->failed;
    return rc;
}

/* In a forked child: was no commit, step or change of the tree under way at
 * the fork? A lock that a thread of the parent had is never given back here,
 * so none is waited for; those that are taken are not given back either. */
static bool kv_store_quiet(struct kvmeta *db)
{
    if (atomic_load(&db->right) != KV_RIGHT_FREE) return false;
    if (pthread_mutex_trylock(&db->job_lock) != 0) return false;
    if (pthread_mutex_trylock(&db->state_lock) != 0) return false;
    return kv_tree_quiet(&db->tree);
}

/*
 * The close in a forked child. Nothing is written. Closing the child's copy
 * of LOCK does not unlock it, for the lock belongs to the open file that both
 * share, and lasts until the parent's descriptor is closed, too.
 *
 * What another thread of the parent was changing at the fork is half changed
 * here for ever: nodes that are in no version yet, a pointer to what has been
 * freed, a descriptor that has a new owner. Then only what is fixed after the
 * open is closed, and all else is left to the end of the process. The locks
 * are not destroyed: the worker may be waiting, in the parent.
 */
static void kv_store_leave(struct kvmeta *db)
{
    assert(kv_forked(db));
    db->locks_made = false;
    if (kv_store_quiet(db)) {
        kv_store_free(db);
        return;
    }
    kv_file_close(&db->env, &db->lock);
    db->env.vfs->dir_close(db->env.vfs->user, db->env.dir);
}

/*
 * The order: no more steps, then seal, then free. Until the worker is joined
 * it may hold the job lock, or wait for the right; afterwards this thread is
 * the only one. A prepared log that was never begun is no part of the store
 * and is unlinked; a crash would leave it to the next open.
 *
 * A forked child has its own way (kv_store_leave).
 */
int kvmeta_close(kvmeta *db)
{
    struct kv_tree_usage usage;
    int rc = KVMETA_OK;

    if (!db) return KVMETA_OK;
    if (kv_forked(db)) {
        kv_store_leave(db);
        return KVMETA_E_FORKED;
    }
    /* Snapshots and cursors point into the tree. A cursor has no count of its
     * own; its snapshot must outlive it. */
    kv_tree_usage(&db->tree, &usage);
    if (usage.snapshots) return KVMETA_E_INVALID;
    /* From here on the handle goes, whatever fails. */
    db->stopping = true;
    if (db->has_thread) {
        kv_store_wake(db);
        pthread_join(db->thread, NULL);
        db->has_thread = false;
    }
    if (!(db->options.flags & KVMETA_READ_ONLY)) {
        rc = kv_close_seal(db);
        if (!rc && db->prepared.file.open)
            kv_job_unlink(db, KV_FILE_LOG, db->prepared.head.id);
    }
    kv_store_free(db);
    return rc;
}

/* ==========================================================================
 * Public functions, in the order of the header
 *
 * Thin: check the arguments, call, return. kvmeta.h says what they promise;
 * here stands what it takes to keep that.
 *
 * A read pins a version (kv_tree_pin) or holds one (kv_tree_hold). A pin
 * costs a few atomics, but while it lasts the writer cannot work in place, so
 * no callback and nothing long may run under one; a hold takes the delta
 * lock, and costs what is changed meanwhile. Both leave the state as it is,
 * so what is read belongs together.
 *
 * Writes become a kv_request on the stack, which kv_commit takes to its end;
 * it is also where a forked child and a read-only store are turned down. Of
 * the reads, those that a question more does not slow down turn down a forked
 * child, too; kvmeta.h forbids it the others.
 * ========================================================================== */

const char *kvmeta_strerror(int code)
{
    switch (code) {
    case KVMETA_OK: return "ok";
    case KVMETA_NOT_FOUND: return "not found";
    case KVMETA_CONFLICT: return "an expectation does not hold";
    case KVMETA_E_INVALID: return "invalid argument";
    case KVMETA_E_NOMEM: return "out of memory";
    case KVMETA_E_IO: return "input/output error";
    case KVMETA_E_NOSPACE: return "no space left";
    case KVMETA_E_BUSY: return "the store is open elsewhere";
    case KVMETA_E_CORRUPT: return "stored bytes are damaged";
    case KVMETA_E_MISMATCH: return "the store has other widths";
    case KVMETA_E_VERSION: return "unknown format version";
    case KVMETA_E_READONLY: return "read-only";
    case KVMETA_E_FAILED: return "an earlier write failed";
    case KVMETA_E_LIMIT: return "a limit is reached";
    case KVMETA_E_FORKED: return "the handle belongs to the parent process";
    default: return "unknown result";
    }
}

const char *kvmeta_version(void)
{
    return KVMETA_VERSION_STRING;
}

void kvmeta_options_init(struct kvmeta_options *options, uint32_t key_bytes,
                         uint32_t value_bytes)
{
    if (!options) return;
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
    options->key_bytes = key_bytes;
    options->value_bytes = value_bytes;
}

/* v: held, or else pinned. value NULL: only asks whether there is a record. */
static inline int kv_read_value(const struct kv_tree *t,
                                const struct kv_version *v, const void *key,
                                bool held, void *value)
{
    const unsigned char *found = kv_tree_get(t, v, key, held);

    assert(key);
    if (!found) return KVMETA_NOT_FOUND;
    if (value) kv_copy(value, found, t->env->shape.value_bytes);
    return KVMETA_OK;
}

/* The value is copied while the version is pinned: after that its node may be
 * freed, or changed in place. */
int kvmeta_get(kvmeta *db, const void *key, void *value)
{
    const struct kv_version *v;
    unsigned slot;
    int rc;

    if (!db || !key) return KVMETA_E_INVALID;
    if (!value && db->env.shape.value_bytes) return KVMETA_E_INVALID;
    v = kv_tree_pin(&db->tree, &slot);
    rc = kv_read_value(&db->tree, v, key, false, value);
    kv_tree_unpin(&db->tree, slot);
    return rc;
}

int kvmeta_has(kvmeta *db, const void *key)
{
    const struct kv_version *v;
    unsigned slot;
    int rc;

    if (!db || !key) return KVMETA_E_INVALID;
    v = kv_tree_pin(&db->tree, &slot);
    rc = kv_read_value(&db->tree, v, key, false, NULL);
    kv_tree_unpin(&db->tree, slot);
    return rc;
}

/* Up to KV_BATCH keys are one round of searches side by side, short enough
 * for a pin; more need a hold, which also settles the delta. */
int kvmeta_get_many(kvmeta *db, const void *keys, size_t n, void *values,
                    unsigned char *found)
{
    struct kv_version *v;

    if (!db || (n > 0 && (!keys || !found))) return KVMETA_E_INVALID;
    if (n > 0 && !values && db->env.shape.value_bytes) return KVMETA_E_INVALID;
    if (n <= KV_BATCH) {
        unsigned slot;
        const struct kv_version *now = kv_tree_pin(&db->tree, &slot);

        kv_tree_get_many(&db->tree, now, keys, n, values, found);
        kv_tree_unpin(&db->tree, slot);
        return KVMETA_OK;
    }
    /* A slot is for short reads: it keeps the writer from working in place. */
    v = kv_tree_hold(&db->tree);
    kv_tree_find_many(&db->tree, v, keys, n, values, found);
    kv_tree_drop(&db->tree, v);
    return KVMETA_OK;
}

/* Holds its version: fn may take as long as it likes, and may write to the
 * store, without an effect on what it will still be shown. */
int kvmeta_scan(kvmeta *db, const void *from, const void *to,
                int (*fn)(void *user, const void *key, const void *value),
                void *user)
{
    struct kv_version *v;
    struct kv_cursor c;
    bool there;
    int rc = KVMETA_OK;

    if (!db || !fn) return KVMETA_E_INVALID;
    if (kv_forked(db)) return KVMETA_E_FORKED;
    v = kv_tree_hold(&db->tree);
    assert(kv_delta_count(v) == 0);              /* D4 */
    kv_cursor_init(&db->tree, v, &c);
    there = from ? kv_cursor_seek(&c, from, false) : kv_cursor_first(&c);
    while (there && rc == 0) {
        if (to && memcmp(c.at.key, to, db->env.shape.key_bytes) >= 0) break;
        rc = fn(user, c.at.key, c.at.value);
        there = kv_cursor_next(&c);
    }
    kv_tree_drop(&db->tree, v);
    return rc;
}

uint64_t kvmeta_count(kvmeta *db)
{
    return db ? kv_tree_totals(&db->tree).count : 0;
}

struct kvmeta_digest kvmeta_digest(kvmeta *db)
{
    struct kvmeta_digest none = {0, 0};

    return db ? kv_tree_totals(&db->tree).digest : none;
}

/* The store's own durability where the flags say nothing; 0: bad flags. */
static unsigned kv_durability(const struct kvmeta *db, unsigned flags)
{
    assert(db->options.durability >= KVMETA_DURABLE);
    assert(db->options.durability <= KVMETA_BUFFERED);
    if (flags > KVMETA_BUFFERED) return 0;
    return flags ? flags : db->options.durability;
}

/* A batch of one operation. *found is set on success only: whether there was
 * a record before, which is not known for a put that waits in a delta. */
static int kv_write_one(kvmeta *db, int type, const void *key,
                        const void *value, void *previous, unsigned flags,
                        bool *found)
{
    struct kvmeta_op op = {type, key, value};
    struct kv_request r = {.ops = &op, .n = 1, .changes = 1,
                           .puts = type == KVMETA_OP_PUT,
                           .previous = previous};
    int rc;

    assert(type == KVMETA_OP_PUT || type == KVMETA_OP_REMOVE);
    assert(!previous || type == KVMETA_OP_PUT);
    if (!db || !key) return KVMETA_E_INVALID;
    if (type == KVMETA_OP_PUT && !value && db->env.shape.value_bytes)
        return KVMETA_E_INVALID;
    r.durability = kv_durability(db, flags);
    if (!r.durability) return KVMETA_E_INVALID;
    rc = kv_commit(db, &r);
    if (!rc) *found = r.found;
    return rc;
}

int kvmeta_put(kvmeta *db, const void *key, const void *value, unsigned flags)
{
    bool found;

    return kv_write_one(db, KVMETA_OP_PUT, key, value, NULL, flags, &found);
}

/* A remove of what is not there is a commit without an effect: it writes no
 * log entry and has no number of its own, but a durable one still syncs. */
int kvmeta_remove(kvmeta *db, const void *key, unsigned flags)
{
    bool found = false;
    int rc = kv_write_one(db, KVMETA_OP_REMOVE, key, NULL, NULL, flags,
                          &found);

    if (rc) return rc;
    return found ? KVMETA_OK : KVMETA_NOT_FOUND;
}

int kvmeta_swap(kvmeta *db, const void *key, const void *value, void *previous,
                unsigned flags)
{
    unsigned char small[256];
    unsigned char *copy = small;
    bool found = false;
    int rc;

    if (!db) return KVMETA_E_INVALID;
    /* What is found goes out only once the commit has succeeded. */
    if (db->env.shape.value_bytes > sizeof small) {
        copy = kv_alloc(&db->env, db->env.shape.value_bytes);
        if (!copy) return KVMETA_E_NOMEM;
    }
    rc = kv_write_one(db, KVMETA_OP_PUT, key, value, copy, flags, &found);
    if (!rc && found && previous)
        memcpy(previous, copy, db->env.shape.value_bytes);
    if (copy != small) kv_free(&db->env, copy);
    if (rc) return rc;
    return found ? KVMETA_OK : KVMETA_NOT_FOUND;
}

/* All operations are checked before the first one is done: kv_commit takes
 * them as they are. Without changes it still waits for its turn, and for the
 * sync if it is durable. */
int kvmeta_write(kvmeta *db, const struct kvmeta_op *ops, size_t n,
                 unsigned flags, uint64_t *seq)
{
    struct kv_request r = {.ops = ops, .n = n};
    int rc;

    if (!db || (n > 0 && !ops)) return KVMETA_E_INVALID;
    for (size_t i = 0; i < n; i++) {
        if (!ops[i].key) return KVMETA_E_INVALID;
        if (ops[i].type < KVMETA_OP_PUT || ops[i].type > KVMETA_OP_EXPECT)
            return KVMETA_E_INVALID;
        if (ops[i].type == KVMETA_OP_PUT && !ops[i].value
            && db->env.shape.value_bytes)
            return KVMETA_E_INVALID;
        r.changes += ops[i].type != KVMETA_OP_EXPECT;
        r.puts += ops[i].type == KVMETA_OP_PUT;
    }
    assert(r.puts <= r.changes);
    assert(r.changes <= n);
    r.durability = kv_durability(db, flags);
    if (!r.durability) return KVMETA_E_INVALID;
    rc = kv_commit(db, &r);
    if (!rc && seq) *seq = r.seq;
    return rc;
}

/*
 * Operations, and the bytes that they point to. The i-th one's key and value
 * are at i * record_bytes; pointers to them are made at the commit, since the
 * bytes may move until then. What ops[].value says before is only whether
 * there is a value: it is the caller's pointer, and never followed.
 */
struct kvmeta_batch {
    kvmeta *db;
    struct kvmeta_op *ops;
    size_t count;
    size_t cap;
    unsigned char *bytes;         /* record_bytes for each operation */
    size_t bytes_cap;
};

/* Holds a pointer to the handle, for its allocator and widths. Memory comes
 * with the first operation, and stays until the batch is freed. */
int kvmeta_batch_new(kvmeta *db, kvmeta_batch **batch)
{
    kvmeta_batch *b;

    if (!db || !batch) return KVMETA_E_INVALID;
    b = kv_alloc_zeroed(&db->env, sizeof *b);
    if (!b) return KVMETA_E_NOMEM;
    b->db = db;
    *batch = b;
    return KVMETA_OK;
}

/* Adds to the batch, or leaves it as it is. The bound is that of a frame, but
 * counts expectations too; no product below can overflow. */
static int kv_batch_add(kvmeta_batch *b, int type, const void *key,
                        const void *value)
{
    const struct kv_shape *shape;
    unsigned char *bytes;
    int rc;

    if (!b || !key) return KVMETA_E_INVALID;
    shape = &b->db->env.shape;
    if (type == KVMETA_OP_PUT && !value && shape->value_bytes)
        return KVMETA_E_INVALID;
    if (b->count >= KV_LOG_FRAME_BYTES_MAX / kv_log_slot_bytes(shape))
        return KVMETA_E_LIMIT;
    rc = kv_grow(&b->db->env, (void **)&b->ops, &b->cap, b->count + 1,
                 sizeof *b->ops, NULL);
    if (!rc)
        rc = kv_grow(&b->db->env, (void **)&b->bytes, &b->bytes_cap,
                     (b->count + 1) * shape->record_bytes, 1, NULL);
    if (rc) return rc;
    assert(b->count < b->cap);
    assert((b->count + 1) * shape->record_bytes <= b->bytes_cap);
    bytes = b->bytes + b->count * shape->record_bytes;
    memcpy(bytes, key, shape->key_bytes);
    assert(type != KVMETA_OP_REMOVE || !value);
    if (value && shape->value_bytes)
        memcpy(bytes + shape->key_bytes, value, shape->value_bytes);
    b->ops[b->count].type = type;
    b->ops[b->count].key = NULL;  /* set when committed: bytes may move */
    b->ops[b->count].value = value;
    b->count++;
    return KVMETA_OK;
}

int kvmeta_batch_put(kvmeta_batch *batch, const void *key, const void *value)
{
    return kv_batch_add(batch, KVMETA_OP_PUT, key, value);
}

int kvmeta_batch_remove(kvmeta_batch *batch, const void *key)
{
    return kv_batch_add(batch, KVMETA_OP_REMOVE, key, NULL);
}

int kvmeta_batch_expect(kvmeta_batch *batch, const void *key,
                        const void *value)
{
    return kv_batch_add(batch, KVMETA_OP_EXPECT, key, value);
}

size_t kvmeta_batch_count(const kvmeta_batch *batch)
{
    return batch ? batch->count : 0;
}

void kvmeta_batch_clear(kvmeta_batch *batch)
{
    if (batch) batch->count = 0;
}

void kvmeta_batch_free(kvmeta_batch *batch)
{
    struct kv_env *env;

    if (!batch) return;
    env = &batch->db->env;
    kv_free(env, batch->ops);
    kv_free(env, batch->bytes);
    kv_free(env, batch);
}

/* Makes the pointers, which changes nothing that the batch's owner can see;
 * so a batch may be committed again. */
int kvmeta_commit(kvmeta *db, const kvmeta_batch *batch, unsigned flags,
                  uint64_t *seq)
{
    const struct kv_shape *shape;

    if (!db || !batch || batch->db != db) return KVMETA_E_INVALID;
    shape = &db->env.shape;
    assert(batch->count * shape->record_bytes <= batch->bytes_cap);
    for (size_t i = 0; i < batch->count; i++) {
        unsigned char *bytes = batch->bytes + i * shape->record_bytes;

        batch->ops[i].key = bytes;
        if (batch->ops[i].value) batch->ops[i].value = bytes + shape->key_bytes;
    }
    return kvmeta_write(db, batch->ops, batch->count, flags, seq);
}

uint64_t kvmeta_key_to_u64(const void *key8)
{
    return kv_load_be64(key8);
}

/* A held version. It never changes, so any number of threads read it without
 * a lock or a pin. */
struct kvmeta_snapshot {
    kvmeta *db;
    struct kv_version *version;
};

/* Memory first: a version that is held must be dropped again. */
int kvmeta_snapshot_take(kvmeta *db, kvmeta_snapshot **snapshot)
{
    kvmeta_snapshot *s;

    if (!db || !snapshot) return KVMETA_E_INVALID;
    if (kv_forked(db)) return KVMETA_E_FORKED;
    s = kv_alloc(&db->env, sizeof *s);
    if (!s) return KVMETA_E_NOMEM;
    s->db = db;
    s->version = kv_tree_hold(&db->tree);
    assert(kv_delta_count(s->version) == 0);     /* D4 */
    *snapshot = s;
    return KVMETA_OK;
}

/* Frees what only this snapshot kept alive, in parts, so that the writer
 * never waits long for the tree lock meanwhile. In a forked child it may wait
 * for that lock for ever, so the version stays held there. */
void kvmeta_snapshot_release(kvmeta_snapshot *snapshot)
{
    if (!snapshot) return;
    if (!kv_forked(snapshot->db))
        kv_tree_drop(&snapshot->db->tree, snapshot->version);
    kv_free(&snapshot->db->env, snapshot);
}

int kvmeta_snapshot_get(const kvmeta_snapshot *snapshot, const void *key,
                        void *value)
{
    if (!snapshot || !key) return KVMETA_E_INVALID;
    if (!value && snapshot->db->env.shape.value_bytes) return KVMETA_E_INVALID;
    return kv_read_value(&snapshot->db->tree, snapshot->version, key, true,
                         value);
}

int kvmeta_snapshot_get_many(const kvmeta_snapshot *snapshot, const void *keys,
                             size_t n, void *values, unsigned char *found)
{
    if (!snapshot || (n > 0 && (!keys || !found))) return KVMETA_E_INVALID;
    if (n > 0 && !values && snapshot->db->env.shape.value_bytes)
        return KVMETA_E_INVALID;
    kv_tree_find_many(&snapshot->db->tree, snapshot->version, keys, n, values,
                      found);
    return KVMETA_OK;
}

uint64_t kvmeta_snapshot_count(const kvmeta_snapshot *snapshot)
{
    return snapshot ? snapshot->version->count : 0;
}

uint64_t kvmeta_snapshot_seq(const kvmeta_snapshot *snapshot)
{
    return snapshot ? snapshot->version->seq : 0;
}

struct kvmeta_digest kvmeta_snapshot_digest(const kvmeta_snapshot *snapshot)
{
    struct kvmeta_digest none = {0, 0};

    return snapshot ? snapshot->version->digest : none;
}

/* The whole of a cursor that kvmeta_cursor_open made. */
static struct kv_cursor *kv_cursor_of(kvmeta_cursor *cursor)
{
    return (struct kv_cursor *)(void *)cursor;
}

int kvmeta_cursor_open(kvmeta_snapshot *snapshot, kvmeta_cursor **cursor)
{
    struct kv_cursor *c;

    if (!snapshot || !cursor) return KVMETA_E_INVALID;
    c = kv_alloc(&snapshot->db->env, sizeof *c);
    if (!c) return KVMETA_E_NOMEM;
    kv_cursor_init(&snapshot->db->tree, snapshot->version, c);
    *cursor = &c->at;
    return KVMETA_OK;
}

void kvmeta_cursor_close(kvmeta_cursor *cursor)
{
    if (cursor) kv_free(kv_cursor_of(cursor)->tree->env, cursor);
}

int kvmeta_cursor_first(kvmeta_cursor *cursor)
{
    if (!cursor) return KVMETA_E_INVALID;
    return kv_cursor_first(kv_cursor_of(cursor)) ? KVMETA_OK
                                                 : KVMETA_NOT_FOUND;
}

int kvmeta_cursor_last(kvmeta_cursor *cursor)
{
    if (!cursor) return KVMETA_E_INVALID;
    return kv_cursor_last(kv_cursor_of(cursor)) ? KVMETA_OK : KVMETA_NOT_FOUND;
}

int kvmeta_cursor_seek(kvmeta_cursor *cursor, const void *key)
{
    if (!cursor || !key) return KVMETA_E_INVALID;
    return kv_cursor_seek(kv_cursor_of(cursor), key, false)
        ? KVMETA_OK : KVMETA_NOT_FOUND;
}

int kvmeta_cursor_seek_le(kvmeta_cursor *cursor, const void *key)
{
    if (!cursor || !key) return KVMETA_E_INVALID;
    return kv_cursor_seek(kv_cursor_of(cursor), key, true) ? KVMETA_OK
                                                           : KVMETA_NOT_FOUND;
}

int kvmeta_cursor_prev(kvmeta_cursor *cursor)
{
    if (!cursor) return KVMETA_E_INVALID;
    return kv_cursor_prev(kv_cursor_of(cursor)) ? KVMETA_OK : KVMETA_NOT_FOUND;
}

int kvmeta_cursor_cross(kvmeta_cursor *cursor)
{
    if (!cursor) return KVMETA_E_INVALID;
    return kv_cursor_next(kv_cursor_of(cursor)) ? KVMETA_OK : KVMETA_NOT_FOUND;
}

/* What the header has inline, for callers who cannot inline it. */
#ifndef KVMETA_STATIC
extern void kvmeta_u64_to_key(uint64_t number, void *key8);
extern void kvmeta_cursor_show(kvmeta_cursor *cursor,
                               const unsigned char *place);
extern int kvmeta_cursor_next(kvmeta_cursor *cursor);
extern const void *kvmeta_cursor_key(const kvmeta_cursor *cursor);
extern const void *kvmeta_cursor_value(const kvmeta_cursor *cursor);
#endif

/* A commit without changes. The leader that takes it writes what is buffered
 * and syncs the log; where nothing is left to sync, it does no I/O. */
int kvmeta_sync(kvmeta *db)
{
    struct kv_request barrier = {.durability = KVMETA_DURABLE};

    if (!db) return KVMETA_E_INVALID;
    return kv_commit(db, &barrier);
}

/* Is every log up to `id` in a table? Logs go oldest first. */
static bool kv_flushed(struct kvmeta *db, uint64_t id)
{
    bool flushed;

    pthread_mutex_lock(&db->state_lock);
    flushed = db->manifest.logs_count == 0 || db->manifest.logs[0].id > id;
    pthread_mutex_unlock(&db->state_lock);
    return flushed;
}

/* Waits for the step that runs: what it has swapped out is unlinked then. A
 * wait that looks at the manifest may be over before that, and its caller may
 * look at the directory next, or measure it. */
static void kv_step_fence(struct kvmeta *db)
{
    pthread_mutex_lock(&db->job_lock);
    pthread_mutex_unlock(&db->job_lock);
}

/*
 * The rotation and the flag are one thing under the right: no other log can
 * be sealed in between, so `id` is the last that this call is about. Later
 * commits go to later logs, and it does not wait for those. The flag makes
 * the background flush though no log is live (kv_plan_make); it goes with the
 * last sealed log.
 */
int kvmeta_flush(kvmeta *db)
{
    struct kv_request right = {.exclusive = true};
    struct kvmeta_error err = {0};
    uint64_t id = 0;
    int rc;

    if (!db) return KVMETA_E_INVALID;
    if (kv_forked(db)) return KVMETA_E_FORKED;
    if (db->options.flags & KVMETA_READ_ONLY) return KVMETA_E_READONLY;
    (void)kv_right_take(db, &right);
    rc = db->failed ? KVMETA_E_FAILED : kv_rotate(db, false, &err);
    assert(rc || !db->log.file.open);
    pthread_mutex_lock(&db->state_lock);
    if (!rc && db->manifest.logs_count > 0) {
        id = db->manifest.logs[db->manifest.logs_count - 1].id;
        db->flush_wanted = true;
    }
    pthread_mutex_unlock(&db->state_lock);
    kv_right_give(db, NULL);
    if (!rc) rc = kv_wait(db, kv_flushed, id);
    kv_step_fence(db);
    return rc;
}

/* Full compactions may also find nothing to do. Looks at the manifest, as
 * the tables themselves are the job lock's; they say the same but for the
 * moment after a swap. Takes the wish back once it is fulfilled, by
 * whatever step. */
static bool kv_compacted(struct kvmeta *db, uint64_t unused)
{
    bool done;

    (void)unused;
    pthread_mutex_lock(&db->state_lock);
    done = db->manifest.tables_count == 0
        || (db->manifest.tables_count == 1
            && db->manifest.tables[0].tombstones == 0)
        || !db->full_wanted;
    if (done) db->full_wanted = false;
    pthread_mutex_unlock(&db->state_lock);
    return done;
}

/* Flushes first: the table is to have all that was committed before the call.
 * What is committed later is not waited for, and may be in another table. */
int kvmeta_compact(kvmeta *db)
{
    int rc = kvmeta_flush(db);

    if (rc) return rc;
    pthread_mutex_lock(&db->state_lock);
    db->full_wanted = true;
    pthread_mutex_unlock(&db->state_lock);
    rc = kv_wait(db, kv_compacted, 0);
    kv_step_fence(db);
    return rc;
}

/* Waits for the step that runs: nothing is idle before it has ended. */
static bool kv_idle(struct kvmeta *db, uint64_t unused)
{
    struct kv_plan plan;

    (void)unused;
    pthread_mutex_lock(&db->job_lock);
    kv_plan_make(db, &plan);
    pthread_mutex_unlock(&db->job_lock);
    return plan.step == KV_STEP_NONE;
}

/* Idle at one moment; writers may have brought up more work by now. */
int kvmeta_wait_idle(kvmeta *db)
{
    if (!db) return KVMETA_E_INVALID;
    if (kv_forked(db)) return KVMETA_E_FORKED;
    if (db->options.flags & KVMETA_READ_ONLY) return KVMETA_E_READONLY;
    return kv_wait(db, kv_idle, 0);
}

/* A second thread that calls this only waits for the first (J1). */
int kvmeta_step(kvmeta *db, int *did_work)
{
    bool did = false;
    int rc;

    if (!db || !did_work) return KVMETA_E_INVALID;
    if (!(db->options.flags & KVMETA_NO_THREAD)) return KVMETA_E_INVALID;
    if (kv_forked(db)) return KVMETA_E_FORKED;
    if (db->options.flags & KVMETA_READ_ONLY) return KVMETA_E_READONLY;
    if (db->failed) return KVMETA_E_FAILED;
    rc = kv_step_once(db, &did);
    if (rc == KVMETA_OK) *did_work = did;
    return rc;
}

/* Every table and every sealed log, byte for byte. Job lock held, so that no
 * step drops them meanwhile. The live log is left out: it is being written,
 * and will be read when it is flushed. */
static int kv_verify_files(struct kvmeta *db, struct kvmeta_error *err)
{
    struct kv_log_meta logs[KV_MANIFEST_LOGS_MAX];
    struct kv_job job;
    size_t count;
    int rc = KVMETA_OK;

    kv_job_init(db, &job);
    for (size_t i = 0; i < db->tables_count && !rc; i++)
        rc = kv_table_verify(&job, &db->tables[i], err);
    pthread_mutex_lock(&db->state_lock);
    count = kv_logs_waiting_locked(db);
    assert(count == 0 || !db->manifest.logs[count - 1].live);
    memcpy(logs, db->manifest.logs, count * sizeof *logs);
    pthread_mutex_unlock(&db->state_lock);
    for (size_t i = 0; i < count && !rc; i++) {
        struct kv_run run;

        rc = kv_run_load(&db->env, &logs[i], 0, &run, err);
        kv_run_free(&db->env, &run);
    }
    return rc;
}

/*
 * First memory, in a held version, then the files. The order matters: damage
 * on disk is healed from memory, so a heal is asked for only if memory has
 * just been found good. Damage in memory is reported only, and the files stay
 * as they are.
 */
int kvmeta_verify(kvmeta *db, struct kvmeta_error *err)
{
    struct kvmeta_error own;
    struct kv_version *v;
    const char *rule;
    int rc;

    if (!err) err = &own;
    memset(err, 0, sizeof *err);
    if (!db) return kv_fail(err, KVMETA_E_INVALID, 0, "NULL argument");
    if (kv_forked(db))
        return kv_fail(err, KVMETA_E_FORKED, 0, "forked child");
    v = kv_tree_hold(&db->tree);
    /* No rule broken, and the sum of what is there is the digest. */
    rule = kv_tree_check(&db->tree, v);
    kv_tree_drop(&db->tree, v);
    if (rule)
        return kv_fail(err, KVMETA_E_CORRUPT, 0, "memory: %s", rule);
    pthread_mutex_lock(&db->job_lock);
    rc = kv_verify_files(db, err);
    pthread_mutex_unlock(&db->job_lock);
    if (rc != KVMETA_E_CORRUPT || (db->options.flags & KVMETA_READ_ONLY))
        return rc;
    pthread_mutex_lock(&db->state_lock);
    db->heal_wanted = true;
    pthread_mutex_unlock(&db->state_lock);
    kv_store_wake(db);
    return rc;
}

/* What made writing stop comes first: errors of the background after that are
 * mostly its echo. */
int kvmeta_last_error(kvmeta *db, struct kvmeta_error *err)
{
    struct kvmeta_error now;

    if (!db) return KVMETA_E_INVALID;
    if (kv_forked(db))
        return kv_fail(err, KVMETA_E_FORKED, 0, "forked child");
    pthread_mutex_lock(&db->state_lock);
    now = db->failed ? db->failed_error : db->background_error;
    assert(!db->failed || db->failed == now.code);
    assert(now.code == KVMETA_OK || now.message[0]);
    pthread_mutex_unlock(&db->state_lock);
    if (err) *err = now;
    return now.code;
}

/* ==========================================================================
 * Statistics
 *
 * A look at what is counted elsewhere. Figures that one lock guards belong
 * together; all of them are not one moment's, since no lock stops everything.
 * Waits for no I/O.
 * ========================================================================== */

/* Of the live log, for which the manifest has no length: what is in it. */
static void kv_stats_files(struct kvmeta *db, struct kvmeta_stats *s)
{
    pthread_mutex_lock(&db->state_lock);
    s->tables = db->manifest.tables_count;
    for (size_t i = 0; i < db->manifest.tables_count; i++) {
        s->table_bytes += db->manifest.tables[i].bytes;
        s->table_records += db->manifest.tables[i].records;
    }
    for (size_t i = 0; i < db->manifest.logs_count; i++)
        s->log_bytes += db->manifest.logs[i].live ? db->log_end
                                                  : db->manifest.logs[i].bytes;
    s->logs_waiting = kv_logs_waiting_locked(db);
    assert(s->logs_waiting <= db->manifest.logs_count);
    pthread_mutex_unlock(&db->state_lock);
}

/* Quotients of 0 stay 0: no change was made yet, or no record is there. */
static void kv_stats_counters(struct kvmeta *db, struct kvmeta_stats *s)
{
    s->user_bytes = db->counters.user_bytes;
    s->bytes_logged = db->counters.bytes_logged;
    s->bytes_written = db->env.bytes_written;
    s->bytes_read = db->env.bytes_read;
    s->commits = db->counters.commits;
    s->groups = db->counters.groups;
    s->group_commits_max = db->counters.group_commits_max;
    s->syncs = db->counters.syncs;
    s->rotations = db->counters.rotations;
    s->flushes = db->counters.flushes;
    s->merges = db->counters.merges;
    s->full_compactions = db->counters.full_compactions;
    s->heals = db->counters.heals;
    s->stalls = db->counters.stalls;
    s->stall_us = db->counters.stall_us;
    s->background_errors = db->counters.background_errors;
    s->leader_handovers = db->counters.leader_handovers;
    if (s->user_bytes)
        s->write_amplification = (double)s->bytes_written
            / (double)s->user_bytes;
    if (s->records)
        s->space_amplification = (double)s->table_records / (double)s->records;
}

/* The caller's struct may be an older, shorter one, or a newer one, whose
 * tail is then left as it was. */
int kvmeta_stats(kvmeta *db, struct kvmeta_stats *stats)
{
    struct kv_tree_usage usage;
    struct kv_totals totals;
    struct kvmeta_stats s;
    size_t bytes;

    if (!db || !stats || stats->struct_size < sizeof stats->struct_size)
        return KVMETA_E_INVALID;
    if (kv_forked(db)) return KVMETA_E_FORKED;
    bytes = stats->struct_size;
    s = db->found;
    s.durable_seq = db->durable_seq;   /* before seq, which is never behind */
    totals = kv_tree_totals(&db->tree);
    s.records = totals.count;
    s.seq = totals.seq;
    assert(s.durable_seq <= s.seq);
    s.logical_bytes = s.records * db->env.shape.record_bytes;
    assert(s.logical_bytes / db->env.shape.record_bytes == s.records);
    kv_tree_usage(&db->tree, &usage);
    assert(usage.pinned_bytes <= usage.resident_bytes);
    s.resident_bytes = usage.resident_bytes;
    s.pinned_bytes = usage.pinned_bytes;
    s.snapshots = usage.snapshots;
    s.oldest_snapshot_seq = usage.oldest_snapshot_seq;
    s.versions_copied = usage.copied;
    s.versions_in_place = usage.in_place;
    kv_stats_files(db, &s);
    kv_stats_counters(db, &s);
    s.struct_size = bytes;
    assert(s.snapshots > 0 || s.oldest_snapshot_seq == 0);
    memcpy(stats, &s, (size_t)kv_min(bytes, sizeof s));
    return KVMETA_OK;
}
