/*
 * zstd contexts that are kept from one open to the next.
 *
 * Making one asks the processor what it can do (cpuid), which takes up to
 * 20 us in a virtual machine: more than all the rest of opening a tiny store.
 * To be included before kvmeta.c.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef KVMETA_TEST_ROT_CONTEXTS_H
#define KVMETA_TEST_ROT_CONTEXTS_H

#define ZSTD_STATIC_LINKING_ONLY         /* ZSTD_customMem, as in kvmeta.c */
#include <zstd.h>

#define ROT_CONTEXTS 64

static ZSTD_DCtx *rot_dctx[ROT_CONTEXTS];
static ZSTD_CCtx *rot_cctx[ROT_CONTEXTS];
static unsigned rot_dctx_count;
static unsigned rot_cctx_count;
static int rot_contexts_live;            /* handed out */

static ZSTD_DCtx *rot_dctx_create(ZSTD_customMem memory)
{
    (void)memory;
    rot_contexts_live++;
    if (rot_dctx_count == 0) {
        return ZSTD_createDCtx();
    }
    return rot_dctx[--rot_dctx_count];
}

static size_t rot_dctx_free(ZSTD_DCtx *context)
{
    if (context == NULL) {
        return 0;
    }
    rot_contexts_live--;
    if (rot_dctx_count == ROT_CONTEXTS) {
        return ZSTD_freeDCtx(context);
    }
    rot_dctx[rot_dctx_count++] = context;
    return ZSTD_DCtx_reset(context, ZSTD_reset_session_and_parameters);
}

static ZSTD_CCtx *rot_cctx_create(ZSTD_customMem memory)
{
    (void)memory;
    rot_contexts_live++;
    if (rot_cctx_count == 0) {
        return ZSTD_createCCtx();
    }
    return rot_cctx[--rot_cctx_count];
}

static size_t rot_cctx_free(ZSTD_CCtx *context)
{
    if (context == NULL) {
        return 0;
    }
    rot_contexts_live--;
    if (rot_cctx_count == ROT_CONTEXTS) {
        return ZSTD_freeCCtx(context);
    }
    rot_cctx[rot_cctx_count++] = context;
    return ZSTD_CCtx_reset(context, ZSTD_reset_session_and_parameters);
}

#define ZSTD_createDCtx_advanced rot_dctx_create
#define ZSTD_createCCtx_advanced rot_cctx_create
#define ZSTD_freeDCtx rot_dctx_free
#define ZSTD_freeCCtx rot_cctx_free

#endif /* KVMETA_TEST_ROT_CONTEXTS_H */
