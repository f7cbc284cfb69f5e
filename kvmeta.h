/*
 * kvmeta - an embedded store of fixed-width records for the metadata of
 * larger systems: object maps, block maps, inode and page tables, indexes.
 *
 * All records live in memory in an ordered tree, so a read does no I/O and
 * cannot fail. All of it is on disk too: in a checksummed write-ahead log and
 * in compressed sorted tables that a background thread compacts. One process
 * owns a store at a time; every thread of it may use the handle.
 *
 * To use it, copy kvmeta.h and kvmeta.c into your project, and link with
 * -lzstd -lpthread.
 *
 * Conventions, valid for every function unless its comment says otherwise:
 *
 *  1. Functions that can fail return int: 0 (KVMETA_OK), a positive answer
 *     (KVMETA_NOT_FOUND, KVMETA_CONFLICT), or a negative error (KVMETA_E_*).
 *     Out-parameters are written only on success, except where stated.
 *  2. After a failed write the records are what they were before the call.
 *  3. A pointer may be NULL only where the comment says so; NULL elsewhere is
 *     KVMETA_E_INVALID. "The store's key" is exactly key_bytes long, "the
 *     store's value" exactly value_bytes; buffers need no alignment. Where
 *     value_bytes is 0, value pointers are not looked at and may be NULL.
 *  4. Every function may be called from any thread at any time; batches and
 *     cursors belong to one thread at a time. Nothing may be called on a
 *     handle after kvmeta_close has begun.
 *  5. The caller owns what it passes in; the library keeps no pointer to it
 *     after the call, except the callbacks and `user` of the options.
 *  6. Sizes are in bytes, times in milliseconds unless the name says so. Keys
 *     are ordered as memcmp orders them.
 *  7. The library never prints, aborts, installs a signal handler, reads the
 *     environment or keeps global state. Error texts hold file names and
 *     offsets, never keys or values.
 *  8. After a fork the handle is the parent's. The child may close it, with
 *     KVMETA_E_FORKED for an answer, read and release snapshots, cursors and
 *     batches from before the fork, and ask for anything that returns
 *     KVMETA_E_FORKED. It must not call kvmeta_get, _has, _get_many, _count or
 *     _digest: they may wait for ever, for a thread that is not there. Until
 *     it has closed the handle, ends, or calls exec, the store stays locked,
 *     also when the parent has closed it.
 *
 * What can still be lost, after everything below: if the power fails before
 * the last mark (100 ms after the last commit at the latest) has reached the
 * disk, and those last frames of the log are damaged separately on top, then
 * the damage cannot be told from a write that was never acknowledged, and
 * these last commits are dropped, counted and reported.
 *
 * Compile-time switches:
 *
 *   KVMETA_API     what stands before each declaration (default: visibility
 *                  "default" with GCC and Clang, nothing elsewhere)
 *   KVMETA_STATIC  all functions are static, for `#include "kvmeta.c"` in one
 *                  translation unit
 *   NDEBUG         leaves out the assertions (about 5 % of the write path)
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_H
#define KVMETA_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef KVMETA_API
#  ifdef KVMETA_STATIC
#    if defined(__GNUC__)
#      define KVMETA_API __attribute__((unused)) static
#    else
#      define KVMETA_API static
#    endif
#  elif defined(__GNUC__)
#    define KVMETA_API __attribute__((visibility("default")))
#  else
#    define KVMETA_API
#  endif
#endif

#define KVMETA_VERSION_MAJOR 1
#define KVMETA_VERSION_MINOR 0
#define KVMETA_VERSION_PATCH 0
#define KVMETA_VERSION_STRING "1.0.0"

/* --------------------------------------------------------------------------
 * Results
 * -------------------------------------------------------------------------- */

enum kvmeta_result {
    KVMETA_OK = 0,
    KVMETA_NOT_FOUND = 1,    /* no record has this key, or no more records */
    KVMETA_CONFLICT = 2,     /* an expectation did not hold; nothing done */

    KVMETA_E_INVALID = -1,   /* the caller's mistake: an argument or option */
    KVMETA_E_NOMEM = -2,     /* an allocation failed */
    KVMETA_E_IO = -3,        /* the operating system reported a failure */
    KVMETA_E_NOSPACE = -4,   /* the disk is full; the next try may succeed */
    KVMETA_E_BUSY = -5,      /* another process or handle has the store open */
    KVMETA_E_CORRUPT = -6,   /* bytes on disk are not what was written */
    KVMETA_E_MISMATCH = -7,  /* the store has other widths than asked for */
    KVMETA_E_VERSION = -8,   /* written by a format this code does not know */
    KVMETA_E_READONLY = -9,  /* write to a store opened read-only */
    KVMETA_E_FAILED = -10,   /* a write failed before; see kvmeta_last_error */
    KVMETA_E_LIMIT = -11,    /* a limit of the options, of the format or of
                                the open files of the process is reached */
    KVMETA_E_FORKED = -12    /* the handle belongs to the parent process */
};

/* What went wrong, in full. `message` ends with NUL, has no newline, and names
 * file and offset where there is one. */
struct kvmeta_error {
    int code;                /* enum kvmeta_result */
    int sys_errno;           /* errno of the failed system call, or 0 */
    char message[248];
};

/* A short name for a result, such as "not found" or "file is damaged".
 * Never NULL; the string is static. */
KVMETA_API const char *kvmeta_strerror(int code);

/* The version of the library that runs, such as "1.0.0". Static. */
KVMETA_API const char *kvmeta_version(void);

/* --------------------------------------------------------------------------
 * Options
 * -------------------------------------------------------------------------- */

#define KVMETA_KEY_BYTES_MAX 255u
#define KVMETA_VALUE_BYTES_MAX 65535u

/* When does a write call return? Values of options.durability, and of the
 * `flags` of every write call, where 0 stands for the store's own. */
enum kvmeta_durability {
    KVMETA_DURABLE = 1,      /* when it is on disk: survives a power cut */
    KVMETA_WRITTEN = 2,      /* when the operating system has it: survives a
                                kill of the process, not a power cut */
    KVMETA_BUFFERED = 3      /* at once: up to log_buffer_bytes of the last
                                changes are lost when the process is killed */
};

/* options.flags */
enum kvmeta_flag {
    KVMETA_READ_ONLY = 1,    /* change nothing on disk; writes are refused */
    KVMETA_MUST_EXIST = 2,   /* do not create a store that is not there */
    KVMETA_NO_THREAD = 4     /* start no thread; the host calls kvmeta_step */
};

/* Levels of log_fn. */
enum kvmeta_log_level {
    KVMETA_LOG_ERROR = 1,
    KVMETA_LOG_WARNING = 2,
    KVMETA_LOG_INFO = 3
};

struct kvmeta_vfs;

/*
 * Options of kvmeta_open. Fill in with kvmeta_options_init, then change what
 * you need. 0 or NULL in any field but the first three means its default.
 * Fields are only ever appended; struct_size tells which ones the caller has.
 */
struct kvmeta_options {
    size_t struct_size;      /* sizeof (struct kvmeta_options) */

    /* Widths of every record: 1..255 and 0..65535. They are fixed when the
     * store is created and must be the same at every later open. */
    uint32_t key_bytes;
    uint32_t value_bytes;

    uint32_t flags;          /* enum kvmeta_flag, or'ed */
    uint32_t durability;     /* enum kvmeta_durability; default DURABLE */

    /* The background work makes written and buffered changes durable this
     * often. Default 0: only kvmeta_sync does. Up to 3,600,000. */
    uint32_t sync_interval_ms;

    /* Bytes of buffered changes that may be only in memory; 4 KiB..64 MiB,
     * default 32 KiB. More makes fewer, larger writes. */
    uint32_t log_buffer_bytes;

    /* Synced log frames are padded to a multiple of this, so that a sector
     * that was acknowledged is never written again: the disk's unit of atomic
     * writing. A power of two, 8..65536, default 512. */
    uint32_t log_align;

    /* Merge `merge_window` or more adjacent tables when the largest is at
     * most `merge_ratio` times the smallest. Window 2..64, default 16; ratio
     * 1..100, default 3. A smaller window means less space and more writing. */
    uint32_t merge_ratio;
    uint32_t merge_window;

    /* zstd level of table blocks, -7..19; 0 = 3. */
    int32_t zstd_level;

    /* Threads that load the tables at open, 1..64; 0 = one a core. */
    uint32_t open_threads;

    uint32_t reserved;       /* must be 0 */

    /* Size at which a log is sealed and compacted, 64 KiB..4 GiB, default
     * 32 MiB. Larger means less write amplification and a longer reopen. */
    uint64_t log_bytes_max;

    /* Bytes per second that compaction may read and write together, so that
     * it leaves bandwidth to others; 65,536 at least. Default 0 = as fast as
     * it can. Writers wait once the backlog of logs is full. */
    uint64_t compaction_bytes_per_s;

    /* Upper bound of the memory held in tree nodes; a write that would pass
     * it fails with KVMETA_E_LIMIT, except for removes. Default 0 = none. */
    uint64_t memory_bytes_max;

    /* Everything is rewritten into one table when the tables hold more than
     * this many times the live records: smaller takes less disk and writes
     * more. 1.05..100, default 1.4: 42 bytes for 30 of records. */
    double space_amp_max;

    /* One function for all memory: realloc's contract; bytes == 0 frees and
     * returns NULL. Called from any thread, also at the same time. NULL: the
     * C library, and the system's anonymous pages for tree nodes. */
    void *(*realloc_fn)(void *user, void *old, size_t bytes);

    /* Told of what an operator wants to know: recovery, healing, background
     * errors. Called from any thread, also at the same time. Writers and the
     * background may have to wait until it returns, readers do not. Must not
     * call back into the store, nor wait for a thread that does: such a wait
     * might never end. */
    void (*log_fn)(void *user, int level, const char *message);

    void *user;              /* handed to realloc_fn and log_fn */

    /* System calls; NULL: POSIX. Must outlive the handle. */
    const struct kvmeta_vfs *vfs;
};

/* Fills *options: the two widths, struct_size, and 0 in every other field. */
KVMETA_API void kvmeta_options_init(struct kvmeta_options *options,
                                    uint32_t key_bytes, uint32_t value_bytes);

/* --------------------------------------------------------------------------
 * Open and close
 * -------------------------------------------------------------------------- */

typedef struct kvmeta kvmeta;
typedef struct kvmeta_batch kvmeta_batch;
typedef struct kvmeta_snapshot kvmeta_snapshot;
typedef struct kvmeta_cursor kvmeta_cursor;

/*
 * Opens the store in directory `dir`, creating both where they are missing
 * (parents must exist), recovers it and checks every byte that it relies on.
 * dir: path, copied. options: copied. *db: the handle, to be closed with
 * kvmeta_close. err: may be NULL; filled in on failure.
 *
 * Blocks until all records are in memory (reads all tables and logs once).
 * A torn tail of the log that was never acknowledged is dropped, and counted
 * in the statistics. Nothing is written before everything has been checked.
 *
 * KVMETA_E_INVALID   an option is out of range (the message names it)
 * KVMETA_E_BUSY      another handle or process has it open, or somebody
 *                    removes LOCK again and again (only LOCK is new then)
 * KVMETA_E_MISMATCH  it has other widths
 * KVMETA_E_CORRUPT   acknowledged bytes are damaged or missing, or the
 *                    directory holds files of a store but no manifest
 * KVMETA_E_VERSION   it was written by a newer format
 * KVMETA_NOT_FOUND   there is no store and MUST_EXIST or READ_ONLY is set
 * KVMETA_E_READONLY  the directory is missing on a read-only file system
 * KVMETA_E_NOSPACE   the disk is too full to write the recovered log's table
 * KVMETA_E_LIMIT     memory_bytes_max is too low, or no file can be opened
 * KVMETA_E_NOMEM, _E_IO
 *
 * After _INVALID, _BUSY, _MISMATCH, _CORRUPT, _VERSION and KVMETA_NOT_FOUND
 * the directory is as it was. After any other the next open finds what this
 * one found. Files that kvmeta did not write are never touched.
 */
KVMETA_API int kvmeta_open(const char *dir,
                           const struct kvmeta_options *options,
                           kvmeta **db, struct kvmeta_error *err);

/*
 * Makes everything durable, seals the log, stops the thread and frees the
 * handle; NULL is allowed. Snapshots and cursors must have been released:
 * otherwise KVMETA_E_INVALID, and the handle stays open. Waits for the
 * background step that runs, not for those still to be done.
 *
 * On any other error the handle is gone all the same, and the store is as
 * after a kill at this moment: what was durable stays so. In a forked child:
 * KVMETA_E_FORKED, and the parent is not disturbed. The child's memory and
 * descriptors are given back; but where at the fork another thread, that of
 * the store included, was at work on it, or there was a snapshot, all but
 * LOCK and the directory stay until the child ends or calls exec.
 */
KVMETA_API int kvmeta_close(kvmeta *db);

/* --------------------------------------------------------------------------
 * Reading. None of these does I/O, waits for a writer's I/O, or fails but for
 * KVMETA_E_INVALID (and, in a forked child, a scan for KVMETA_E_FORKED).
 *
 * On Linux an open registers the process for membarrier(2), by which gets are
 * faster while nobody writes. Where that call is not allowed, or no longer,
 * they are only slower.
 * -------------------------------------------------------------------------- */

/* Copies the value of `key` to `value` (value_bytes long). KVMETA_NOT_FOUND
 * when there is none. */
KVMETA_API int kvmeta_get(kvmeta *db, const void *key, void *value);

/* KVMETA_OK when there is a record with `key`, else KVMETA_NOT_FOUND. */
KVMETA_API int kvmeta_has(kvmeta *db, const void *key);

/*
 * Looks up n keys in one consistent state, much faster than one by one.
 * keys: n * key_bytes, one after another, in any order, repeats allowed.
 * values: n * value_bytes; the i-th value is written at i * value_bytes, and
 * left as it was where there is none. found: n bytes, 1 or 0 each.
 */
KVMETA_API int kvmeta_get_many(kvmeta *db, const void *keys, size_t n,
                               void *values, unsigned char *found);

/*
 * Calls fn for every record with from <= key < to, ascending, in the state at
 * the time of the call. from, to: the store's keys; NULL: from the first, to
 * the last. key and value are valid during the call of fn only. fn returns 0
 * to go on; anything else ends the scan, and the scan returns it.
 */
KVMETA_API int kvmeta_scan(kvmeta *db, const void *from, const void *to,
                           int (*fn)(void *user, const void *key,
                                     const void *value),
                           void *user);

/* Number of records. */
KVMETA_API uint64_t kvmeta_count(kvmeta *db);

/*
 * A 128-bit sum over all records that does not depend on their order or
 * history: two stores of the same widths have the same digest exactly when
 * they hold the same records, but for chance. O(1). It finds accidents; it
 * does not stand up to a forger who can choose records.
 */
struct kvmeta_digest {
    uint64_t lo;
    uint64_t hi;
};
KVMETA_API struct kvmeta_digest kvmeta_digest(kvmeta *db);

/* --------------------------------------------------------------------------
 * Writing
 *
 * `flags` is one of enum kvmeta_durability, or 0 for the store's default. A
 * durable change is visible to readers only once it is on disk; others are
 * visible when the call returns. Concurrent calls share a sync: while one
 * writes and syncs for all, the others give way to any thread that wants to run
 * and look again, for up to a millisecond, and then sleep.
 *
 * Errors of every write call, after each of which the records are unchanged:
 *   KVMETA_E_INVALID, _E_READONLY, _E_FORKED, _E_NOMEM,
 *   KVMETA_E_LIMIT    memory_bytes_max, or a batch of over 2^31 log bytes; or
 *                     no file can be opened for the next log, or as many logs
 *                     wait as may, because the background fails (see
 *                     kvmeta_last_error): once that is over, later calls
 *                     succeed
 *   KVMETA_E_NOSPACE  the log could not grow; later calls may succeed
 *   KVMETA_E_IO       a write or sync failed. What of the call is on disk is
 *                     unknown until the next open; this handle reads on, and
 *                     refuses further writes with
 *   KVMETA_E_FAILED
 * -------------------------------------------------------------------------- */

/* Stores the record; replaces the value when the key is there. */
KVMETA_API int kvmeta_put(kvmeta *db, const void *key, const void *value,
                          unsigned flags);

/* Removes the record. KVMETA_NOT_FOUND when there is none. */
KVMETA_API int kvmeta_remove(kvmeta *db, const void *key, unsigned flags);

/* Stores the record, and copies the value that it replaced to `previous`
 * (value_bytes; NULL: not wanted). KVMETA_NOT_FOUND when the key was new: the
 * record is stored then too, and `previous` is left as it was. */
KVMETA_API int kvmeta_swap(kvmeta *db, const void *key, const void *value,
                           void *previous, unsigned flags);

enum kvmeta_op_type {
    KVMETA_OP_PUT = 1,       /* store the record */
    KVMETA_OP_REMOVE = 2,    /* remove it; it need not be there */
    KVMETA_OP_EXPECT = 3     /* go on only if the key has this value before
                                the batch; value NULL: only if it is absent.
                                With value_bytes 0 any non-NULL pointer means
                                "is there" */
};

struct kvmeta_op {
    int type;                /* enum kvmeta_op_type */
    const void *key;
    const void *value;       /* not looked at for REMOVE */
};

/*
 * Applies n operations as one batch: all of them or none, also across a
 * crash, and no reader sees a part. Later operations on a key win. The
 * expectations are all tested against the state before the batch. n may be 0.
 * *seq (may be NULL) gets the commit number of the batch; commit numbers
 * ascend in the order in which batches took effect. A batch that changes
 * nothing gets the number of the last one that did.
 * KVMETA_CONFLICT when an expectation does not hold: nothing was done.
 */
KVMETA_API int kvmeta_write(kvmeta *db, const struct kvmeta_op *ops, size_t n,
                            unsigned flags, uint64_t *seq);

/*
 * A batch that grows and copies what it is given, for callers without an
 * array. One thread at a time. The batch keeps its content after a commit,
 * whatever the result: clear it for the next. Free all batches of a handle
 * before closing it. Adding returns KVMETA_OK, _E_INVALID, _E_NOMEM, or
 * _E_LIMIT; after an error the batch is as before.
 */
KVMETA_API int kvmeta_batch_new(kvmeta *db, kvmeta_batch **batch);
KVMETA_API int kvmeta_batch_put(kvmeta_batch *batch, const void *key,
                                const void *value);
KVMETA_API int kvmeta_batch_remove(kvmeta_batch *batch, const void *key);
KVMETA_API int kvmeta_batch_expect(kvmeta_batch *batch, const void *key,
                                   const void *value);
KVMETA_API size_t kvmeta_batch_count(const kvmeta_batch *batch);
KVMETA_API void kvmeta_batch_clear(kvmeta_batch *batch);
KVMETA_API void kvmeta_batch_free(kvmeta_batch *batch);   /* NULL allowed */
/* As kvmeta_write. The batch must come from the same handle. */
KVMETA_API int kvmeta_commit(kvmeta *db, const kvmeta_batch *batch,
                             unsigned flags, uint64_t *seq);

/* --------------------------------------------------------------------------
 * Integer keys
 * -------------------------------------------------------------------------- */

/* Big-endian bytes, so that the order of keys is the order of numbers. */
KVMETA_API inline void kvmeta_u64_to_key(uint64_t number, void *key8)
{
    unsigned char *b = (unsigned char *)key8;

    /* One by one: compilers see one store in this, but not in a loop. */
    b[0] = (unsigned char)(number >> 56);
    b[1] = (unsigned char)(number >> 48);
    b[2] = (unsigned char)(number >> 40);
    b[3] = (unsigned char)(number >> 32);
    b[4] = (unsigned char)(number >> 24);
    b[5] = (unsigned char)(number >> 16);
    b[6] = (unsigned char)(number >> 8);
    b[7] = (unsigned char)number;
}

KVMETA_API uint64_t kvmeta_key_to_u64(const void *key8);

/* --------------------------------------------------------------------------
 * Snapshots and cursors
 * -------------------------------------------------------------------------- */

/*
 * Takes the state of this moment, which stays as it is whatever is written. A
 * few microseconds, however many records there are: it waits for no disk, and
 * for writers only while up to 32 buffered puts find their places in memory.
 * It costs the memory of what is changed while it lives.
 * May be read by many threads at once. KVMETA_E_NOMEM, _E_FORKED.
 */
KVMETA_API int kvmeta_snapshot_take(kvmeta *db, kvmeta_snapshot **snapshot);
/* NULL allowed. Cursors over it must have been closed. */
KVMETA_API void kvmeta_snapshot_release(kvmeta_snapshot *snapshot);
/* As kvmeta_get and kvmeta_get_many, in the state of the snapshot. */
KVMETA_API int kvmeta_snapshot_get(const kvmeta_snapshot *snapshot,
                                   const void *key, void *value);
KVMETA_API int kvmeta_snapshot_get_many(const kvmeta_snapshot *snapshot,
                                        const void *keys, size_t n,
                                        void *values, unsigned char *found);
KVMETA_API uint64_t kvmeta_snapshot_count(const kvmeta_snapshot *snapshot);
/* Commit number of the last batch that it contains. */
KVMETA_API uint64_t kvmeta_snapshot_seq(const kvmeta_snapshot *snapshot);
KVMETA_API struct kvmeta_digest
kvmeta_snapshot_digest(const kvmeta_snapshot *snapshot);

/*
 * A position in a snapshot, which must outlive it. A new cursor has no
 * record. The movers return KVMETA_OK and stand on a record, or
 * KVMETA_NOT_FOUND and stand on none; then next and prev go on returning
 * KVMETA_NOT_FOUND until it is placed anew. KVMETA_E_NOMEM at open.
 *
 * The fields are for the inline functions below, which spare a scan three
 * calls a record, a quarter of its time; who cannot inline them finds them in
 * the library. The fields are not for callers, and may change with a release.
 */
struct kvmeta_cursor {
    unsigned char *key;           /* put together there; NULL on no record */
    const unsigned char *value;   /* NULL on no record */
    const unsigned char *place;   /* which head and row of the leaf it is */
    const unsigned char *last;    /* the last of the leaf's places */
    const int64_t *heads;         /* first 8 bytes of keys, top bit flipped */
    const unsigned char *rows;    /* rest of a key, value */
    size_t row_bytes;
    size_t tail_bytes;            /* the rest of a key */
};
KVMETA_API int kvmeta_cursor_open(kvmeta_snapshot *snapshot,
                                  kvmeta_cursor **cursor);
KVMETA_API void kvmeta_cursor_close(kvmeta_cursor *cursor); /* NULL allowed */
KVMETA_API int kvmeta_cursor_first(kvmeta_cursor *cursor);
KVMETA_API int kvmeta_cursor_last(kvmeta_cursor *cursor);
/* The first record with a key >= `key`; the last with a key <= `key`. */
KVMETA_API int kvmeta_cursor_seek(kvmeta_cursor *cursor, const void *key);
KVMETA_API int kvmeta_cursor_seek_le(kvmeta_cursor *cursor, const void *key);
KVMETA_API int kvmeta_cursor_prev(kvmeta_cursor *cursor);
/* What kvmeta_cursor_next does where a leaf ends: for it alone. */
KVMETA_API int kvmeta_cursor_cross(kvmeta_cursor *cursor);

/* To a record of the leaf: for the functions here alone. */
KVMETA_API inline void kvmeta_cursor_show(kvmeta_cursor *cursor,
                                          const unsigned char *place)
{
    const unsigned char *row = cursor->rows + *place * cursor->row_bytes;
    uint64_t head = (uint64_t)cursor->heads[*place];

    cursor->place = place;
    kvmeta_u64_to_key(head ^ (uint64_t)1 << 63, cursor->key);
    if (cursor->tail_bytes == 8)
        memcpy(cursor->key + 8, row, 8);
    else if (cursor->tail_bytes)
        memcpy(cursor->key + 8, row, cursor->tail_bytes);
    cursor->value = row + cursor->tail_bytes;
}

KVMETA_API inline int kvmeta_cursor_next(kvmeta_cursor *cursor)
{
    if (!cursor || cursor->place == cursor->last)
        return kvmeta_cursor_cross(cursor);
    kvmeta_cursor_show(cursor, cursor->place + 1);
    return KVMETA_OK;
}

/* The record's key (valid until the cursor is moved or closed) and value
 * (not copied: valid until the snapshot is released). NULL on no record. */
KVMETA_API inline const void *kvmeta_cursor_key(const kvmeta_cursor *cursor)
{
    return cursor ? cursor->key : NULL;
}

KVMETA_API inline const void *kvmeta_cursor_value(const kvmeta_cursor *cursor)
{
    return cursor ? cursor->value : NULL;
}

/* --------------------------------------------------------------------------
 * Durability and background work
 * -------------------------------------------------------------------------- */

/* Returns when everything committed before the call is on disk. Errors as of
 * a write call. */
KVMETA_API int kvmeta_sync(kvmeta *db);

/* Seals the log and waits until it is in a table. Errors of the background
 * work included. Without a thread it does the work itself; so do the next
 * two. */
KVMETA_API int kvmeta_flush(kvmeta *db);

/* Waits until there is one table, without tombstones, and no sealed log. */
KVMETA_API int kvmeta_compact(kvmeta *db);

/* Waits until the background has nothing left to do. */
KVMETA_API int kvmeta_wait_idle(kvmeta *db);

/*
 * Does one step of background work: one flush, one merge, one heal, one
 * preparation of a log, or one interval sync. Blocks for as long as that
 * takes; *did_work gets 1, or 0 when there was nothing to do. Meant for
 * stores opened with KVMETA_NO_THREAD (elsewhere KVMETA_E_INVALID), from one
 * thread of the host, besides others that read and write. An error is also
 * kept for kvmeta_last_error; the step may be tried again.
 */
KVMETA_API int kvmeta_step(kvmeta *db, int *did_work);

/*
 * Checks everything there is to check: the structure of the tree, its digest,
 * and every byte of every table and sealed log on disk. Reads and writes go
 * on meanwhile; the background work waits. err: may be NULL. KVMETA_E_CORRUPT
 * names the first damage found; where it is in a file, the background work
 * then writes the data anew from memory.
 */
KVMETA_API int kvmeta_verify(kvmeta *db, struct kvmeta_error *err);

/* The write error that made the store refuse writes or, without one, the
 * latest error of the background work that has not been overcome since; the
 * code is returned, too. KVMETA_OK, and err->code 0, when all is well. */
KVMETA_API int kvmeta_last_error(kvmeta *db, struct kvmeta_error *err);

/* --------------------------------------------------------------------------
 * Statistics
 * -------------------------------------------------------------------------- */

/* Counters start at 0 when the store is opened. */
struct kvmeta_stats {
    size_t struct_size;            /* set by the caller */

    uint64_t records;
    uint64_t logical_bytes;        /* records * (key_bytes + value_bytes) */
    uint64_t resident_bytes;       /* tree nodes in use, and their free ones */
    uint64_t pinned_bytes;         /* nodes kept only for snapshots, readers */
    uint64_t snapshots;            /* not yet released */
    uint64_t oldest_snapshot_seq;  /* 0: no snapshot */
    uint64_t seq;                  /* last commit number */
    uint64_t durable_seq;          /* last commit number known to be on disk */

    uint64_t log_bytes;            /* on disk now: logs, live one included */
    uint64_t table_bytes;          /* on disk now: tables */
    uint64_t table_records;        /* tombstones and shadowed ones included */
    uint64_t tables;
    uint64_t logs_waiting;         /* sealed, not yet in a table */

    uint64_t user_bytes;           /* key and value bytes of changes made */
    uint64_t bytes_logged;         /* written to logs, padding included */
    uint64_t bytes_written;        /* written to all files */
    uint64_t bytes_read;
    double write_amplification;    /* bytes_written / user_bytes */
    double space_amplification;    /* table_records / records */

    uint64_t commits;              /* batches */
    uint64_t groups;               /* frames written; commits share them */
    uint64_t group_commits_max;    /* most batches in a frame */
    uint64_t syncs;                /* of the log, for callers */
    uint64_t rotations;
    uint64_t flushes;
    uint64_t merges;
    uint64_t full_compactions;
    uint64_t heals;
    uint64_t stalls;               /* writes that waited for the background */
    uint64_t stall_us;             /* time that they waited, together */
    uint64_t background_errors;
    uint64_t leader_handovers;     /* groups led by a caller that had waited */
    uint64_t versions_copied;      /* changes made beside a reader: copies */
    uint64_t versions_in_place;    /* changes made in place */

    /* What the open found. */
    uint64_t open_ms;
    uint64_t open_tables;
    uint64_t open_table_records;
    uint64_t open_logs;
    uint64_t open_log_frames;
    uint64_t open_log_batches;
    uint64_t open_torn_bytes;      /* dropped at the end of the live log */
    uint32_t open_torn_reason;     /* enum kvmeta_torn */
    uint32_t open_healed;          /* damaged manifest copies put right */
    uint64_t open_garbage_files;   /* unlisted files of ours, deleted */
};

/* Why the tail of the live log was dropped at open. */
enum kvmeta_torn {
    KVMETA_TORN_NONE = 0,
    KVMETA_TORN_HEADER = 1,        /* the bytes after the last frame are no
                                      valid header of one that follows it */
    KVMETA_TORN_BODY = 2           /* a valid header, a damaged body */
};

/* Fills *stats, at most stats->struct_size bytes of it. */
KVMETA_API int kvmeta_stats(kvmeta *db, struct kvmeta_stats *stats);

/* --------------------------------------------------------------------------
 * System calls
 * -------------------------------------------------------------------------- */

/* Flags of kvmeta_vfs.file_open. */
enum kvmeta_vfs_open {
    KVMETA_VFS_WRITE = 1,          /* read and write; otherwise read only */
    KVMETA_VFS_CREATE = 2,         /* create, mode 0600, where missing */
    KVMETA_VFS_EXCL = 4            /* with CREATE: fail if it exists */
};

/*
 * Everything that kvmeta asks of the operating system, for tests and for
 * hosts with a file layer of their own. Every int function returns 0 or a
 * positive errno; read and write return the bytes moved or a negative errno,
 * and may move less than asked for (0 from read: end of file). Handles are
 * numbers >= 0 of the implementation's choice. Called from many threads.
 *
 * file_open must not follow a symbolic link, must not block on a device or
 * pipe, and must fail with EINVAL on anything but a regular file. dir_open
 * returns ENOENT where there is no directory. file_lock is exclusive, does
 * not wait (EWOULDBLOCK when taken), and lasts until the file is closed.
 */
struct kvmeta_vfs {
    size_t struct_size;
    void *user;
    int (*dir_create)(void *user, const char *path);      /* mode 0700 */
    int (*dir_sync_parent)(void *user, const char *path); /* entry of path */
    int (*dir_open)(void *user, const char *path, int *dir);
    int (*dir_list)(void *user, int dir,
                    int (*fn)(void *arg, const char *name), void *arg);
    int (*dir_sync)(void *user, int dir);
    int (*dir_close)(void *user, int dir);
    int (*file_open)(void *user, int dir, const char *name, int flags,
                     int *file);
    int (*file_lock)(void *user, int file);
    int (*file_size)(void *user, int file, uint64_t *bytes);
    int64_t (*file_read)(void *user, int file, void *buf, size_t bytes,
                         uint64_t off);
    int64_t (*file_write)(void *user, int file, const void *buf, size_t bytes,
                          uint64_t off);
    int (*file_truncate)(void *user, int file, uint64_t bytes);
    int (*file_sync)(void *user, int file);   /* data and what reads need */
    int (*file_close)(void *user, int file);
    int (*rename)(void *user, int dir, const char *from, const char *to);
    int (*unlink)(void *user, int dir, const char *name);
    int (*random)(void *user, void *buf, size_t bytes);
    uint64_t (*clock_ns)(void *user);         /* monotonic */
    uint64_t (*process_id)(void *user);
};

/* The POSIX implementation, to wrap or to borrow from. Static. */
KVMETA_API const struct kvmeta_vfs *kvmeta_vfs_posix(void);

#ifdef __cplusplus
}
#endif

#endif /* KVMETA_H */
