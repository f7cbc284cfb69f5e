/*
 * The sync of a system that has F_FULLFSYNC, on any: the call stands for a
 * function here. Looks inside, for that one function.
 *
 * SPDX-License-Identifier: MIT
 */
#define KVMETA_STATIC
#include "unit.h"

/* What the calls fail with; 0: they succeed. */
static int full_errno, plain_errno;
static unsigned full_calls, plain_calls;

static int full_fsync(void)
{
    full_calls++;
    errno = full_errno;
    return full_errno ? -1 : 0;
}

static int plain_fsync(void)
{
    plain_calls++;
    errno = plain_errno;
    return plain_errno ? -1 : 0;
}

#undef F_FULLFSYNC
#define F_FULLFSYNC 51
#define fcntl(fd, what) ((void)(fd), (void)(what), full_fsync())
#define fsync(fd) ((void)(fd), plain_fsync())

#include "../../kvmeta.c"

/* Goal: an fsync stands in for a full one only where the file system does not
 * know that; no error of a full one is hidden by an fsync that succeeds. */
static void only_an_unknown_full_sync_becomes_an_fsync(struct unit *u)
{
    static const struct {
        int full, plain, want;
        unsigned calls;                  /* of fsync */
    } cases[] = {
        {0, EIO, 0, 0},
        {EIO, 0, EIO, 0},
        {ENOSPC, 0, ENOSPC, 0},
        {EINTR, 0, EINTR, 0},
        {ENOTSUP, 0, 0, 1},
        {EINVAL, 0, 0, 1},
        {ENOTTY, 0, 0, 1},
        {ENOTSUP, EIO, EIO, 1},
    };

    (void)u;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        full_errno = cases[i].full;
        plain_errno = cases[i].plain;
        full_calls = plain_calls = 0;
        assert_int_equal(kvmeta_vfs_posix()->file_sync(NULL, 0),
                         cases[i].want);
        assert_int_equal(full_calls, 1);
        assert_int_equal(plain_calls, cases[i].calls);
    }
}

static struct unit_case cases[] = {
    UNIT_CASE(only_an_unknown_full_sync_becomes_an_fsync),
};

UNIT_MAIN(cases)
