/* Keeps where each object lies: object number -> {disk, sector, length}. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "kvmeta.h"

struct place {
    uint32_t disk;
    uint32_t length;
    uint64_t sector;
};

static int show(void *user, const void *key, const void *value)
{
    struct place place;

    (void)user;
    memcpy(&place, value, sizeof place); /* it need not be aligned */
    printf("object %" PRIu64 ": disk %" PRIu32 ", sector %" PRIu64 "\n",
           kvmeta_key_to_u64(key), place.disk, place.sector);
    return 0; /* go on */
}

int main(void)
{
    struct kvmeta_options options;
    struct kvmeta_error err;
    kvmeta *db;
    unsigned char key[8];
    struct place old = {1, 4096, 2048}, new = {2, 4096, 8192}, now;
    int rc;

    kvmeta_options_init(&options, sizeof key, sizeof now);
    rc = kvmeta_open("places", &options, &db, &err);
    if (rc) {
        fprintf(stderr, "open: %s\n", err.message);
        return 1;
    }

    kvmeta_u64_to_key(42, key);
    rc = kvmeta_put(db, key, &old, 0); /* returns when it is on disk */
    if (rc) goto done;

    /* Moves the object, but only if nobody has moved it meanwhile. */
    struct kvmeta_op move[] = {{KVMETA_OP_EXPECT, key, &old},
                               {KVMETA_OP_PUT, key, &new}};
    rc = kvmeta_write(db, move, 2, 0, NULL);
    if (rc) goto done;

    rc = kvmeta_get(db, key, &now); /* from memory: no I/O, cannot fail */
    if (rc) goto done;
    printf("object 42 is on disk %" PRIu32 " now\n", now.disk);
    rc = kvmeta_scan(db, NULL, NULL, show, NULL);
done:
    if (rc) fprintf(stderr, "kvmeta: %s\n", kvmeta_strerror(rc));
    return kvmeta_close(db) || rc;
}
