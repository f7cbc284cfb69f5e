/*
 * Inputs of the target "ops": what happens to one store, step by step.
 *
 * As bytes an input is a list of slots of 4 bytes. The first is the head;
 * each other one is an operation: its number (enum ops_code, taken modulo
 * OPS_CODES), then three operands. Operands that are words are taken modulo
 * the number of words. Bytes behind the last whole slot are left out.
 *
 * As text, which is how a sequence that was found is kept and read, a line is
 * a slot: the operation, then its operands in any order, those that are 0
 * left out. Text starts with OPS_MAGIC; "#" begins a comment.
 *
 *     # kvmeta ops
 *     store widths=8x16 cell=512 seed=3
 *     put key=7 how=durable
 *     cut-in calls=4 state=3 garbage=1    # power fails within the next ones
 *     bulk key=2 how=written count=200
 *     open
 *
 * `fuzz_ops --text FILE` shows an input as text, `--bytes FILE` as bytes, and
 * `--run FILE` says what each operation does; a file may be either.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_FUZZ_OPS_H
#define KVMETA_FUZZ_OPS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OPS_MAGIC "# kvmeta ops"

enum { OPS_SLOT_BYTES = 4, OPS_SLOTS_MAX = 256 };

enum ops_code {
    OP_PUT,           /* writes: one record */
    OP_REMOVE,
    OP_SWAP,
    OP_ADD_PUT,       /* to the batch that is being gathered */
    OP_ADD_REMOVE,
    OP_ADD_EXPECT,
    OP_COMMIT,        /* the batch */
    OP_BULK,          /* `count` * 8 records from key * 16 on, as a batch */
    OP_SYNC,
    OP_FLUSH,
    OP_STEP,          /* up to `count` steps of background work */
    OP_IDLE,
    OP_COMPACT,
    OP_VERIFY,
    OP_CLOSE,
    OP_OPEN,          /* after a close, if it is open */
    OP_OPTION,        /* from the next open on */
    OP_SNAPSHOT,      /* takes one; there is room for some */
    OP_CHECK,         /* compares it */
    OP_RELEASE,
    OP_WALK,          /* a cursor over it: from the key, by the moves */
    OP_READ,          /* get, has, get_many, scan */
    OP_PASS,          /* time passes */
    OP_FAULT,         /* a file call fails, the `at`th from now */
    OP_NOMEM,         /* an allocation fails */
    OP_HEAL,          /* no more failures */
    OP_CUT,           /* power fails; the store is opened again */
    OP_KILL,          /* the process ends; the store is opened again */
    OP_CUT_IN,        /* the same, within what follows */
    OP_KILL_IN,
    OP_PEEK,          /* while closed: opens it to be read only, or with
                         other widths, which must be refused */
    OP_DAMAGE,        /* while closed: damages a copy, which must show */
    OP_ROT,           /* while open: damages a table, which must be healed */
    OPS_CODES
};

struct ops_operand {
    const char *name;                    /* NULL: none */
    const char *const *words;            /* NULL: a number */
    unsigned word_count;
};

struct ops_line {
    const char *name;
    struct ops_operand operand[3];
};

static const char *const ops_widths[] = {
    "8x16", "8x8", "16x16", "1x0", "1x1", "7x8", "9x0", "20x40", "16x1",
    "255x255", "8x2000", "2x3",
};
static const unsigned ops_width_values[][2] = {
    {8, 16}, {8, 8}, {16, 16}, {1, 0}, {1, 1}, {7, 8}, {9, 0}, {20, 40},
    {16, 1}, {255, 255}, {8, 2000}, {2, 3},
};
static const char *const ops_cells[] = {"512", "4096"};
static const char *const ops_how[] = {"store", "durable", "written",
                                      "buffered"};
static const char *const ops_expected[] = {"as-is", "absent", "wrong"};
static const char *const ops_options[] = {
    "log_align", "log_bytes_max", "log_buffer_bytes", "merge_window",
    "merge_ratio", "zstd_level", "space_amp_max", "durability",
    "sync_interval_ms", "memory_bytes_max",
};
static const char *const ops_calls[] = {
    "dir_create", "dir_sync_parent", "dir_open", "dir_list", "dir_sync",
    "dir_close", "file_open", "file_lock", "file_size", "file_read",
    "file_write", "file_truncate", "file_sync", "file_close", "rename",
    "unlink", "random", "any",
};
static const char *const ops_errors[] = {"EIO", "ENOSPC", "EINTR", "EMFILE",
                                         "short"};
static const char *const ops_damage[] = {"flip", "zero", "garble", "truncate",
                                         "delete", "copy"};

#define OPS_WORDS(list) list, sizeof(list) / sizeof(list)[0]
#define OPS_NUMBER NULL, 0

static const struct ops_line ops_head = {
    "store", {{"widths", OPS_WORDS(ops_widths)}, {"cell", OPS_WORDS(ops_cells)},
              {"seed", OPS_NUMBER}}
};

static const struct ops_line ops_lines[OPS_CODES] = {
    [OP_PUT] = {"put", {{"key", OPS_NUMBER}, {"how", OPS_WORDS(ops_how)},
                        {"value", OPS_NUMBER}}},
    [OP_REMOVE] = {"remove", {{"key", OPS_NUMBER},
                              {"how", OPS_WORDS(ops_how)}, {0}}},
    [OP_SWAP] = {"swap", {{"key", OPS_NUMBER}, {"how", OPS_WORDS(ops_how)},
                          {"value", OPS_NUMBER}}},
    [OP_ADD_PUT] = {"add-put", {{"key", OPS_NUMBER}, {"value", OPS_NUMBER},
                                {0}}},
    [OP_ADD_REMOVE] = {"add-remove", {{"key", OPS_NUMBER}, {0}, {0}}},
    [OP_ADD_EXPECT] = {"add-expect", {{"key", OPS_NUMBER},
                                      {"value", OPS_WORDS(ops_expected)},
                                      {0}}},
    [OP_COMMIT] = {"commit", {{"array", OPS_NUMBER},
                              {"how", OPS_WORDS(ops_how)}, {0}}},
    [OP_BULK] = {"bulk", {{"key", OPS_NUMBER}, {"how", OPS_WORDS(ops_how)},
                          {"count", OPS_NUMBER}}},
    [OP_SYNC] = {"sync", {{0}, {0}, {0}}},
    [OP_FLUSH] = {"flush", {{0}, {0}, {0}}},
    [OP_STEP] = {"step", {{"count", OPS_NUMBER}, {0}, {0}}},
    [OP_IDLE] = {"idle", {{0}, {0}, {0}}},
    [OP_COMPACT] = {"compact", {{0}, {0}, {0}}},
    [OP_VERIFY] = {"verify", {{0}, {0}, {0}}},
    [OP_CLOSE] = {"close", {{0}, {0}, {0}}},
    [OP_OPEN] = {"open", {{0}, {0}, {0}}},
    [OP_OPTION] = {"option", {{"name", OPS_WORDS(ops_options)},
                              {"choice", OPS_NUMBER}, {0}}},
    [OP_SNAPSHOT] = {"snapshot", {{"number", OPS_NUMBER}, {0}, {0}}},
    [OP_CHECK] = {"check", {{"number", OPS_NUMBER}, {0}, {0}}},
    [OP_RELEASE] = {"release", {{"number", OPS_NUMBER}, {0}, {0}}},
    [OP_WALK] = {"walk", {{"number", OPS_NUMBER}, {"key", OPS_NUMBER},
                          {"moves", OPS_NUMBER}}},
    [OP_READ] = {"read", {{"key", OPS_NUMBER}, {"count", OPS_NUMBER}, {0}}},
    [OP_PASS] = {"pass", {{"ms10", OPS_NUMBER}, {0}, {0}}},
    [OP_FAULT] = {"fault", {{"call", OPS_WORDS(ops_calls)},
                            {"error", OPS_WORDS(ops_errors)},
                            {"at", OPS_NUMBER}}},
    [OP_NOMEM] = {"nomem", {{"at", OPS_NUMBER}, {"ever", OPS_NUMBER}, {0}}},
    [OP_HEAL] = {"heal", {{0}, {0}, {0}}},
    [OP_CUT] = {"cut", {{"state", OPS_NUMBER}, {"garbage", OPS_NUMBER}, {0}}},
    [OP_KILL] = {"kill", {{0}, {0}, {0}}},
    [OP_CUT_IN] = {"cut-in", {{"calls", OPS_NUMBER}, {"state", OPS_NUMBER},
                              {"garbage", OPS_NUMBER}}},
    [OP_KILL_IN] = {"kill-in", {{"calls", OPS_NUMBER}, {0}, {0}}},
    [OP_PEEK] = {"peek", {{"widths", OPS_NUMBER}, {0}, {0}}},
    [OP_DAMAGE] = {"damage", {{"how", OPS_WORDS(ops_damage)},
                              {"file", OPS_NUMBER}, {"place", OPS_NUMBER}}},
    [OP_ROT] = {"rot", {{"file", OPS_NUMBER}, {"place", OPS_NUMBER},
                        {"bit", OPS_NUMBER}}},
};

static inline unsigned ops_code(const uint8_t *slot)
{
    return slot[0] % OPS_CODES;
}

/* --------------------------------------------------------------------------
 * Bytes to text
 * -------------------------------------------------------------------------- */

static inline void ops_print(FILE *out, const struct ops_line *line,
                             const uint8_t operands[3])
{
    fputs(line->name, out);
    for (int i = 0; i < 3; i++) {
        const struct ops_operand *o = &line->operand[i];

        if (!o->name) continue;
        if (o->words && operands[i] % o->word_count != 0)
            fprintf(out, " %s=%s", o->name,
                    o->words[operands[i] % o->word_count]);
        else if (!o->words && operands[i] != 0)
            fprintf(out, " %s=%u", o->name, operands[i]);
    }
    fputc('\n', out);
}

static inline void ops_to_text(FILE *out, const uint8_t *data, size_t bytes)
{
    fprintf(out, "%s\n", OPS_MAGIC);
    if (bytes < OPS_SLOT_BYTES) return;
    ops_print(out, &ops_head, data);
    for (size_t at = OPS_SLOT_BYTES; at + OPS_SLOT_BYTES <= bytes;
         at += OPS_SLOT_BYTES)
        ops_print(out, &ops_lines[ops_code(data + at)], data + at + 1);
}

/* --------------------------------------------------------------------------
 * Text to bytes
 * -------------------------------------------------------------------------- */

static inline int ops_is_text(const uint8_t *data, size_t bytes)
{
    return bytes >= strlen(OPS_MAGIC)
        && memcmp(data, OPS_MAGIC, strlen(OPS_MAGIC)) == 0;
}

/* One "name=value"; 0 when it is none of the operation's. */
static inline int ops_scan_operand(const struct ops_line *line,
                                   const char *word, uint8_t operands[3])
{
    const char *value = strchr(word, '=');
    size_t n = value ? (size_t)(value - word) : 0;

    for (int i = 0; i < 3 && value; i++) {
        const struct ops_operand *o = &line->operand[i];

        if (!o->name || strlen(o->name) != n || memcmp(o->name, word, n))
            continue;
        if (!o->words) {
            operands[i] = (uint8_t)strtoul(value + 1, NULL, 0);
            return 1;
        }
        for (unsigned k = 0; k < o->word_count; k++) {
            if (strcmp(o->words[k], value + 1) != 0) continue;
            operands[i] = (uint8_t)k;
            return 1;
        }
    }
    return 0;
}

/* One line, which is changed on the way. 1: a slot; 0: no operation; -1: it
 * cannot be understood. */
static inline int ops_scan(char *text, int is_head, uint8_t slot[4])
{
    const struct ops_line *line = is_head ? &ops_head : NULL;
    char *word = strtok(text, " \t\r\n");

    memset(slot, 0, OPS_SLOT_BYTES);
    if (!word || word[0] == '#') return 0;
    if (is_head) {
        if (strcmp(word, ops_head.name) != 0) return -1;
    } else {
        for (unsigned i = 0; i < OPS_CODES && !line; i++) {
            if (strcmp(word, ops_lines[i].name) != 0) continue;
            line = &ops_lines[i];
            slot[0] = (uint8_t)i;
        }
        if (!line) return -1;
    }
    while ((word = strtok(NULL, " \t\r\n")) != NULL && word[0] != '#')
        if (!ops_scan_operand(line, word, slot + !is_head)) return -1;
    return 1;
}

/* Returns the number of bytes, or 0 after saying which line is wrong. */
static inline size_t ops_from_text(const uint8_t *data, size_t bytes,
                                   uint8_t *out, size_t out_max)
{
    char *copy = malloc(bytes + 1);
    char *at = copy;
    size_t used = 0;
    unsigned number = 0;

    if (!copy) abort();
    memcpy(copy, data, bytes);
    copy[bytes] = '\0';
    while (at && used + OPS_SLOT_BYTES <= out_max) {
        char *end = strchr(at, '\n');
        int rc;

        if (end) *end = '\0';
        number++;
        rc = ops_scan(at, used == 0, out + used);
        if (rc < 0) {
            fprintf(stderr, "ops: line %u cannot be understood\n", number);
            used = 0;
            break;
        }
        used += rc ? OPS_SLOT_BYTES : 0;
        at = end ? end + 1 : NULL;
    }
    free(copy);
    return used;
}

#endif /* KVMETA_FUZZ_OPS_H */
