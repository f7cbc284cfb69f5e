/*
 * A simulated file system; see sim.h.
 *
 * Content is kept in cells that are shared between versions, files and
 * clones by reference counts, and gathered in images (arrays of cells) that
 * are shared likewise and copied when one owner changes them. A cell of
 * zeros is NULL, so that preallocated files cost nothing.
 *
 * SPDX-License-Identifier: MIT
 */
#include "sim.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sim_totals sim_totals;

/* --------------------------------------------------------------------------
 * Cells and images
 * -------------------------------------------------------------------------- */

struct cell {
    uint32_t refs;
    uint32_t pad;
    unsigned char data[];
};

struct image {
    uint32_t refs;
    uint32_t count;                      /* cells; those beyond are zeros */
    struct cell *cells[];
};

/* One write of one cell that is not durable yet. */
struct pending {
    uint32_t index;
    struct cell *cell;                   /* the whole cell after the write */
};

struct sim_inode {
    uint32_t refs;                       /* entries, versions and handles */
    int locked;                          /* slot of the owner + 1; 0: free */
    int gated;                           /* a sync failed: `current` holds
                                            cells that will not be durable */
    struct image *durable;               /* NULL: empty */
    struct image *current;
    uint64_t durable_bytes;
    uint64_t current_bytes;
    struct pending *pending;             /* in the order of writing */
    unsigned pending_count;
    unsigned pending_capacity;
    uint64_t *sizes;                     /* un-synced sizes, oldest first */
    unsigned size_count;
    unsigned size_capacity;
    struct sim_inode *copy;              /* scratch while cloning */
};

static void *allocate(size_t bytes)
{
    void *p = malloc(bytes);

    if (p == NULL) {
        fprintf(stderr, "sim: out of memory\n");
        abort();
    }
    return p;
}

/* Makes room for one more element of an array that doubles. */
static void *grow(void *array, unsigned count, unsigned *capacity,
                  size_t element_bytes)
{
    if (count < *capacity) {
        return array;
    }
    *capacity = *capacity == 0 ? 16 : *capacity * 2;
    array = realloc(array, *capacity * element_bytes);
    if (array == NULL) {
        abort();
    }
    return array;
}

static struct cell *cell_ref(struct cell *cell)
{
    if (cell != NULL) {
        cell->refs++;
    }
    return cell;
}

static void cell_unref(struct cell *cell)
{
    if (cell != NULL && --cell->refs == 0) {
        free(cell);
    }
}

static int all_zero(const unsigned char *data, size_t bytes)
{
    return bytes == 0 ||
           (data[0] == 0 && memcmp(data, data + 1, bytes - 1) == 0);
}

/* A new cell with the content of `old`. */
static struct cell *cell_copy(const struct cell *old, uint32_t cell_bytes)
{
    struct cell *cell = allocate(sizeof *cell + cell_bytes);

    cell->refs = 1;
    cell->pad = 0;
    if (old != NULL) {
        memcpy(cell->data, old->data, cell_bytes);
    } else {
        memset(cell->data, 0, cell_bytes);
    }
    return cell;
}

static int cell_equal(const struct cell *a, const struct cell *b,
                      uint32_t cell_bytes)
{
    if (a == b) {
        return 1;
    }
    if (a == NULL || b == NULL) {
        return all_zero(a == NULL ? b->data : a->data, cell_bytes);
    }
    return memcmp(a->data, b->data, cell_bytes) == 0;
}

/* The same cell with zeros from `from` on; takes over the reference. */
static struct cell *cell_cut(struct cell *cell, uint32_t from,
                             uint32_t cell_bytes)
{
    struct cell *cut;

    if (cell == NULL || all_zero(cell->data + from, cell_bytes - from)) {
        return cell;
    }
    cut = cell_copy(cell, cell_bytes);
    memset(cut->data + from, 0, cell_bytes - from);
    cell_unref(cell);
    return cut;
}

static struct cell *image_cell(const struct image *image, uint32_t index)
{
    return image != NULL && index < image->count ? image->cells[index] : NULL;
}

static struct image *image_ref(struct image *image)
{
    if (image != NULL) {
        image->refs++;
    }
    return image;
}

static void image_unref(struct image *image)
{
    uint32_t i;

    if (image == NULL || --image->refs > 0) {
        return;
    }
    for (i = 0; i < image->count; i++) {
        cell_unref(image->cells[i]);
    }
    free(image);
}

/* A new image of at least `count` cells with the content of `old`. */
static struct image *image_copy(const struct image *old, uint32_t count)
{
    uint32_t old_count = old != NULL ? old->count : 0;
    struct image *image;
    uint32_t i;

    count = count > old_count ? count : old_count;
    image = allocate(sizeof *image + count * sizeof image->cells[0]);
    image->refs = 1;
    image->count = count;
    for (i = 0; i < old_count; i++) {
        image->cells[i] = cell_ref(old->cells[i]);
    }
    for (; i < count; i++) {
        image->cells[i] = NULL;
    }
    return image;
}

/* Makes *image one that only its owner sees, with `count` cells or more. */
static void image_own(struct image **image, uint32_t count)
{
    struct image *copy;

    if (*image != NULL && (*image)->refs == 1 && (*image)->count >= count) {
        return;
    }
    if (*image != NULL && count > (*image)->count) {
        count += count / 4;              /* files mostly grow step by step */
    }
    copy = image_copy(*image, count);
    image_unref(*image);
    *image = copy;
}

/* Takes over the reference to `cell`. */
static void image_set(struct image **image, uint32_t index, struct cell *cell)
{
    image_own(image, index + 1);
    cell_unref((*image)->cells[index]);
    (*image)->cells[index] = cell;
}

/* Zeros from byte `bytes` on. */
static void image_truncate(struct image **image, uint64_t bytes,
                           uint32_t cell_bytes)
{
    uint32_t keep = (uint32_t)((bytes + cell_bytes - 1) / cell_bytes);
    uint32_t within = (uint32_t)(bytes % cell_bytes);
    uint32_t i;

    if (*image == NULL) {
        return;
    }
    image_own(image, 0);
    for (i = keep; i < (*image)->count; i++) {
        cell_unref((*image)->cells[i]);
        (*image)->cells[i] = NULL;
    }
    if (within != 0 && keep <= (*image)->count) {
        (*image)->cells[keep - 1] =
            cell_cut((*image)->cells[keep - 1], within, cell_bytes);
    }
}

/* --------------------------------------------------------------------------
 * Inodes
 * -------------------------------------------------------------------------- */

static struct sim_inode *inode_new(void)
{
    struct sim_inode *inode = calloc(1, sizeof *inode);

    if (inode == NULL) {
        abort();
    }
    return inode;
}

static struct sim_inode *inode_ref(struct sim_inode *inode)
{
    if (inode != NULL) {
        inode->refs++;
    }
    return inode;
}

static void inode_drop_pending(struct sim_inode *inode)
{
    unsigned i;

    for (i = 0; i < inode->pending_count; i++) {
        cell_unref(inode->pending[i].cell);
    }
    inode->pending_count = 0;
}

static void inode_unref(struct sim_inode *inode)
{
    if (inode == NULL || --inode->refs > 0) {
        return;
    }
    inode_drop_pending(inode);
    image_unref(inode->durable);
    image_unref(inode->current);
    free(inode->pending);
    free(inode->sizes);
    free(inode);
}

/* A copy with all that is pending; the images are shared. */
static struct sim_inode *inode_copy(const struct sim_inode *from)
{
    struct sim_inode *inode = inode_new();
    unsigned i;

    inode->gated = from->gated;
    inode->durable = image_ref(from->durable);
    inode->current = image_ref(from->current);
    inode->durable_bytes = from->durable_bytes;
    inode->current_bytes = from->current_bytes;
    if (from->pending_count > 0) {
        inode->pending_capacity = from->pending_count;
        inode->pending_count = from->pending_count;
        inode->pending = allocate(from->pending_count *
                                  sizeof *inode->pending);
        for (i = 0; i < from->pending_count; i++) {
            inode->pending[i] = from->pending[i];
            cell_ref(from->pending[i].cell);
        }
    }
    if (from->size_count > 0) {
        inode->size_capacity = from->size_count;
        inode->size_count = from->size_count;
        inode->sizes = allocate(from->size_count * sizeof *inode->sizes);
        memcpy(inode->sizes, from->sizes,
               from->size_count * sizeof *inode->sizes);
    }
    return inode;
}

/* Takes over the reference to `cell`, which is in `current` as well. */
static void inode_add_pending(struct sim_inode *inode, uint32_t index,
                              struct cell *cell)
{
    inode->pending = grow(inode->pending, inode->pending_count,
                          &inode->pending_capacity, sizeof *inode->pending);
    inode->pending[inode->pending_count].index = index;
    inode->pending[inode->pending_count].cell = cell;
    inode->pending_count++;
}

static void inode_set_size(struct sim_inode *inode, uint64_t bytes)
{
    if (bytes == inode->current_bytes) {
        return;
    }
    inode->current_bytes = bytes;
    inode->sizes = grow(inode->sizes, inode->size_count,
                        &inode->size_capacity, sizeof *inode->sizes);
    inode->sizes[inode->size_count++] = bytes;
}

/* The durable content after the first `size_count` changes of size have
 * reached the disk, without any pending cell: what lay beyond the smallest
 * of the sizes is gone. */
static struct image *inode_base(const struct sim_inode *inode,
                                unsigned size_count, uint32_t cell_bytes)
{
    struct image *image = image_copy(inode->durable, 0);
    uint64_t smallest = inode->durable_bytes;
    unsigned i;

    for (i = 0; i < size_count; i++) {
        smallest = inode->sizes[i] < smallest ? inode->sizes[i] : smallest;
    }
    if (smallest < inode->durable_bytes) {
        image_truncate(&image, smallest, cell_bytes);
    }
    return image;
}

/* What is pending becomes durable. After a failed sync that is not all that
 * reads see, so the image cannot just be shared. */
static void inode_sync(struct sim_inode *inode, uint32_t cell_bytes)
{
    struct image *image;
    unsigned i;

    if (inode->gated) {
        image = inode_base(inode, inode->size_count, cell_bytes);
        for (i = 0; i < inode->pending_count; i++) {
            image_set(&image, inode->pending[i].index,
                      cell_ref(inode->pending[i].cell));
        }
        image_truncate(&image, inode->current_bytes, cell_bytes);
    } else {
        image = image_ref(inode->current);
    }
    image_unref(inode->durable);
    inode->durable = image;
    inode->durable_bytes = inode->current_bytes;
    inode->size_count = 0;
    inode_drop_pending(inode);
}

/* A failed sync: the system takes the cells for clean, so reads go on seeing
 * them but no later sync writes them. With `partial` some had been written
 * before the failure. */
static void inode_fail_sync(struct sim_inode *inode, int partial,
                            struct test_rng *rng)
{
    unsigned i;

    for (i = 0; partial && i < inode->pending_count; i++) {
        if (test_rng_below(rng, 2) == 0) {
            image_set(&inode->durable, inode->pending[i].index,
                      cell_ref(inode->pending[i].cell));
        }
    }
    inode_drop_pending(inode);
    inode->gated = 1;
}

/* Writes into one cell. */
static void inode_write_cell(struct sim_inode *inode, uint32_t index,
                             uint32_t within, const unsigned char *data,
                             size_t bytes, uint32_t cell_bytes)
{
    struct cell *old = image_cell(inode->current, index);
    struct cell *cell = NULL;

    if ((old != NULL && bytes < cell_bytes) || !all_zero(data, bytes)) {
        cell = cell_copy(old, cell_bytes);
        memcpy(cell->data + within, data, bytes);
    }
    image_set(&inode->current, index, cell);
    inode_add_pending(inode, index, cell_ref(cell));
}

static void inode_write(struct sim_inode *inode, const unsigned char *data,
                        size_t bytes, uint64_t off, uint32_t cell_bytes)
{
    uint64_t end = off + bytes;
    uint32_t within;
    size_t n;

    while (bytes > 0) {
        within = (uint32_t)(off % cell_bytes);
        n = cell_bytes - within;
        n = n < bytes ? n : bytes;
        inode_write_cell(inode, (uint32_t)(off / cell_bytes), within, data, n,
                         cell_bytes);
        data += n;
        off += n;
        bytes -= n;
    }
    if (end > inode->current_bytes) {
        inode_set_size(inode, end);
    }
}

static void inode_truncate(struct sim_inode *inode, uint64_t bytes,
                           uint32_t cell_bytes)
{
    uint32_t keep = (uint32_t)((bytes + cell_bytes - 1) / cell_bytes);
    unsigned i, n = 0;

    if (bytes < inode->current_bytes) {
        image_truncate(&inode->current, bytes, cell_bytes);
        for (i = 0; i < inode->pending_count; i++) {
            if (inode->pending[i].index < keep) {
                inode->pending[n++] = inode->pending[i];
            } else {
                cell_unref(inode->pending[i].cell);
            }
        }
        inode->pending_count = n;
    }
    inode_set_size(inode, bytes);
}

static size_t inode_read(const struct sim_inode *inode, unsigned char *buf,
                         size_t bytes, uint64_t off, uint32_t cell_bytes)
{
    const struct cell *cell;
    uint32_t within;
    size_t n, done = 0;

    if (off >= inode->current_bytes) {
        return 0;
    }
    if (bytes > inode->current_bytes - off) {
        bytes = (size_t)(inode->current_bytes - off);
    }
    while (done < bytes) {
        within = (uint32_t)((off + done) % cell_bytes);
        n = cell_bytes - within;
        n = n < bytes - done ? n : bytes - done;
        cell = image_cell(inode->current,
                          (uint32_t)((off + done) / cell_bytes));
        if (cell != NULL) {
            memcpy(buf + done, cell->data + within, n);
        } else {
            memset(buf + done, 0, n);
        }
        done += n;
    }
    return done;
}

/* --------------------------------------------------------------------------
 * Entries and handles
 * -------------------------------------------------------------------------- */

static struct sim_entry *entry_find(const struct sim_fs *fs, const char *name)
{
    unsigned i;

    for (i = 0; i < fs->entry_count; i++) {
        if (strcmp(fs->entries[i].name, name) == 0) {
            return (struct sim_entry *)(uintptr_t)&fs->entries[i];
        }
    }
    return NULL;
}

static struct sim_entry *entry_add(struct sim_fs *fs, const char *name)
{
    struct sim_entry *entry = entry_find(fs, name);

    if (entry != NULL) {
        return entry;
    }
    if (fs->entry_count == SIM_ENTRIES_MAX ||
        strlen(name) >= SIM_NAME_BYTES) {
        fprintf(stderr, "sim: no room for the entry %s\n", name);
        abort();
    }
    entry = &fs->entries[fs->entry_count++];
    memset(entry, 0, sizeof *entry);
    strcpy(entry->name, name);
    return entry;
}

/* Points a name at another inode, or at none, until the next dir_sync
 * pending. When one name changes too often, the oldest step is forgotten. */
static void entry_change(struct sim_entry *entry, struct sim_inode *inode)
{
    if (entry->version_count == SIM_ENTRY_VERSIONS_MAX) {
        inode_unref(entry->versions[0]);
        memmove(&entry->versions[0], &entry->versions[1],
                (SIM_ENTRY_VERSIONS_MAX - 1) * sizeof entry->versions[0]);
        entry->version_count--;
    }
    inode_ref(inode);
    entry->versions[entry->version_count++] = inode_ref(inode);
    inode_unref(entry->current);
    entry->current = inode;
}

static void entry_release(struct sim_entry *entry)
{
    unsigned i;

    for (i = 0; i < entry->version_count; i++) {
        inode_unref(entry->versions[i]);
    }
    entry->version_count = 0;
    inode_unref(entry->durable);
    inode_unref(entry->current);
    entry->durable = NULL;
    entry->current = NULL;
}

/* All entries become durable; names that are gone leave the array. */
static void entries_sync(struct sim_fs *fs)
{
    struct sim_entry *entry;
    struct sim_inode *current;
    unsigned i, n = 0;

    for (i = 0; i < fs->entry_count; i++) {
        entry = &fs->entries[i];
        current = inode_ref(entry->current);
        entry_release(entry);
        if (current != NULL) {
            entry->current = current;
            entry->durable = inode_ref(current);
            if (n != i) {
                fs->entries[n] = *entry;
            }
            n++;
        }
    }
    fs->entry_count = n;
}

/* Slot and generation in one number, so that a stale handle is noticed. */
static int handle_new(struct sim_fs *fs, struct sim_inode *inode, int flags)
{
    struct sim_handle *handle;
    unsigned slot;

    for (slot = 0; slot < SIM_HANDLES_MAX && fs->handles[slot].used; slot++) {
    }
    if (slot == SIM_HANDLES_MAX) {
        return -1;
    }
    handle = &fs->handles[slot];
    if (slot >= fs->handle_top) {
        fs->handle_top = slot + 1;
        handle->generation = 0;
    }
    handle->inode = inode_ref(inode);
    handle->used = 1;
    handle->flags = flags;
    handle->generation = (handle->generation + 1) & 0xffffu;
    return (int)(handle->generation * SIM_HANDLES_MAX + slot);
}

static struct sim_handle *handle_get(struct sim_fs *fs, int number, int dir)
{
    unsigned slot = (unsigned)number % SIM_HANDLES_MAX;
    struct sim_handle *handle = &fs->handles[slot];

    if (number < 0 || slot >= fs->handle_top || !handle->used ||
        handle->generation != (unsigned)number / SIM_HANDLES_MAX ||
        (handle->inode == NULL) != dir) {
        fs->misuses++;
        return NULL;
    }
    return handle;
}

static void handle_free(struct sim_fs *fs, struct sim_handle *handle)
{
    int owner = (int)(handle - fs->handles) + 1;

    if (handle->inode != NULL && handle->inode->locked == owner) {
        handle->inode->locked = 0;
    }
    inode_unref(handle->inode);
    handle->inode = NULL;
    handle->used = 0;
}

/* --------------------------------------------------------------------------
 * Faults and the crash point
 * -------------------------------------------------------------------------- */

#define SHORT_TRANSFER (-1)

static int fault_hits(struct sim_fs *fs, enum sim_call kind)
{
    struct sim_fault *fault = &fs->fault;

    if (fault->armed && kind == SIM_FILE_WRITE) {
        fault->armed = 0;
        return 1;
    }
    if (fault->at == 0 ||
        (fault->kind != SIM_CALLS && fault->kind != (int)kind)) {
        return 0;
    }
    fault->seen++;
    if (fault->seen != fault->at &&
        !(fault->ever && fault->seen > fault->at)) {
        return 0;
    }
    if (fault->error == 0 && kind != SIM_FILE_READ && kind != SIM_FILE_WRITE) {
        return 0;
    }
    if (fault->hits++ == 0) {
        fault->hit_kind = (int)kind;
    }
    if (kind == SIM_FILE_WRITE && fault->partial && fault->error != EIO &&
        fault->hits == 1) {
        fault->armed = 1;
    }
    return 1;
}

/* Begins a call: locks, counts, and says how it is to fail: 0, an errno, or
 * SHORT_TRANSFER. `changes`: it is an operation that changes the state. */
static int enter(struct sim_fs *fs, enum sim_call kind, int changes)
{
    if (changes && fs->on_op != NULL && !fs->crashed) {
        fs->on_op(fs->on_op_user, fs, kind);
    }
    pthread_mutex_lock(&fs->mutex);
    if (changes && fs->ops >= fs->crash_at) {
        fs->crashed = 1;
    }
    if (fs->crashed) {
        return SIM_CRASHED;
    }
    fs->ops += (uint64_t)changes;
    fs->calls[kind]++;
    if (fault_hits(fs, kind)) {
        return fs->fault.error != 0 && !fs->fault.armed ? fs->fault.error
                                                        : SHORT_TRANSFER;
    }
    return 0;
}

static int leave(struct sim_fs *fs, int rc)
{
    pthread_mutex_unlock(&fs->mutex);
    return rc;
}

/* --------------------------------------------------------------------------
 * The calls on the directory
 * -------------------------------------------------------------------------- */

static int sim_dir_create(void *user, const char *path)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_DIR_CREATE, 1);

    if (rc == 0 && strcmp(path, SIM_DIR) != 0) {
        rc = ENOENT;
    } else if (rc == 0 && fs->dir_current) {
        rc = EEXIST;
    } else if (rc == 0) {
        fs->dir_current = 1;
    }
    return leave(fs, rc);
}

static int sim_dir_sync_parent(void *user, const char *path)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_DIR_SYNC_PARENT, 1);

    if (rc == 0 && strcmp(path, SIM_DIR) != 0) {
        rc = ENOENT;
    } else if (rc == 0) {
        fs->dir_durable = fs->dir_current;
    }
    return leave(fs, rc);
}

static int sim_dir_open(void *user, const char *path, int *dir)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_DIR_OPEN, 0);
    int number;

    if (rc == 0 && (strcmp(path, SIM_DIR) != 0 || !fs->dir_current)) {
        rc = ENOENT;
    } else if (rc == 0) {
        number = handle_new(fs, NULL, 0);
        rc = number < 0 ? EMFILE : 0;
        if (rc == 0) {
            *dir = number;
        }
    }
    return leave(fs, rc);
}

/* The names are copied first, because fn may change the directory. */
static int sim_dir_list(void *user, int dir,
                        int (*fn)(void *arg, const char *name), void *arg)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_DIR_LIST, 0);
    char names[SIM_ENTRIES_MAX][SIM_NAME_BYTES];
    unsigned i, start, count = 0;

    if (rc == 0 && handle_get(fs, dir, 1) == NULL) {
        rc = EBADF;
    }
    if (rc == 0 && fs->entry_count > 0) {
        start = (unsigned)test_rng_below(&fs->rng, fs->entry_count);
        for (i = 0; i < fs->entry_count; i++) {
            struct sim_entry *entry =
                &fs->entries[(start + i) % fs->entry_count];

            if (entry->current != NULL) {
                memcpy(names[count++], entry->name, SIM_NAME_BYTES);
            }
        }
    }
    leave(fs, rc);
    for (i = 0; rc == 0 && i < count; i++) {
        rc = fn(arg, names[i]);
    }
    return rc;
}

static int sim_dir_sync(void *user, int dir)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_DIR_SYNC, 1);

    if (rc == 0 && handle_get(fs, dir, 1) == NULL) {
        rc = EBADF;
    } else if (rc == 0) {
        entries_sync(fs);
    }
    return leave(fs, rc);
}

/* A handle is gone even where its close reports an error. */
static int close_handle(struct sim_fs *fs, enum sim_call kind, int number)
{
    int rc = enter(fs, kind, 0);
    struct sim_handle *handle = handle_get(fs, number, kind == SIM_DIR_CLOSE);

    if (handle == NULL) {
        rc = EBADF;
    } else {
        handle_free(fs, handle);
    }
    return leave(fs, rc);
}

static int sim_dir_close(void *user, int dir)
{
    return close_handle(user, SIM_DIR_CLOSE, dir);
}

static int sim_rename(void *user, int dir, const char *from, const char *to)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_RENAME, 1);
    struct sim_entry *old, *new;

    if (rc == 0 && handle_get(fs, dir, 1) == NULL) {
        rc = EBADF;
    }
    if (rc == 0) {
        old = entry_find(fs, from);
        if (old == NULL || old->current == NULL) {
            rc = ENOENT;
        } else {
            new = entry_add(fs, to);
            old = entry_find(fs, from);
            entry_change(new, old->current);
            entry_change(old, NULL);
        }
    }
    return leave(fs, rc);
}

static int sim_unlink(void *user, int dir, const char *name)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_UNLINK, 1);
    struct sim_entry *entry;

    if (rc == 0 && handle_get(fs, dir, 1) == NULL) {
        rc = EBADF;
    }
    if (rc == 0) {
        entry = entry_find(fs, name);
        if (entry == NULL || entry->current == NULL) {
            rc = ENOENT;
        } else {
            entry_change(entry, NULL);
        }
    }
    return leave(fs, rc);
}

/* --------------------------------------------------------------------------
 * The calls on files
 * -------------------------------------------------------------------------- */

static int would_create(struct sim_fs *fs, const char *name, int flags)
{
    struct sim_entry *entry;

    pthread_mutex_lock(&fs->mutex);
    entry = entry_find(fs, name);
    pthread_mutex_unlock(&fs->mutex);
    return (flags & KVMETA_VFS_CREATE) != 0 &&
           (entry == NULL || entry->current == NULL);
}

static int open_entry(struct sim_fs *fs, const char *name, int flags,
                      int *file)
{
    struct sim_entry *entry = entry_find(fs, name);
    int there = entry != NULL && entry->current != NULL;
    int number;

    if (there && (flags & KVMETA_VFS_EXCL) != 0) {
        return EEXIST;
    }
    if (!there && (flags & KVMETA_VFS_CREATE) == 0) {
        return ENOENT;
    }
    if (!there) {
        entry = entry_add(fs, name);
        entry_change(entry, inode_new());
    }
    number = handle_new(fs, entry->current, flags);
    if (number < 0) {
        return EMFILE;
    }
    *file = number;
    return 0;
}

static int sim_file_open(void *user, int dir, const char *name, int flags,
                         int *file)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_FILE_OPEN, would_create(fs, name, flags));

    if (rc == 0 && handle_get(fs, dir, 1) == NULL) {
        rc = EBADF;
    } else if (rc == 0) {
        rc = open_entry(fs, name, flags, file);
    }
    return leave(fs, rc);
}

static int sim_file_lock(void *user, int file)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_FILE_LOCK, 0);
    struct sim_handle *handle;
    int owner;

    if (rc == 0) {
        handle = handle_get(fs, file, 0);
        owner = handle != NULL ? (int)(handle - fs->handles) + 1 : 0;
        if (handle == NULL) {
            rc = EBADF;
        } else if (handle->inode->locked != 0 &&
                   handle->inode->locked != owner) {
            rc = EWOULDBLOCK;
        } else {
            handle->inode->locked = owner;
        }
    }
    return leave(fs, rc);
}

static int sim_file_size(void *user, int file, uint64_t *bytes)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_FILE_SIZE, 0);
    struct sim_handle *handle;

    if (rc == 0) {
        handle = handle_get(fs, file, 0);
        rc = handle == NULL ? EBADF : 0;
        if (rc == 0) {
            *bytes = handle->inode->current_bytes;
        }
    }
    return leave(fs, rc);
}

/* A short transfer moves half, but never nothing. */
static size_t shortened(int rc, size_t bytes)
{
    return rc == SHORT_TRANSFER && bytes > 1 ? bytes / 2 : bytes;
}

static int64_t sim_file_read(void *user, int file, void *buf, size_t bytes,
                             uint64_t off)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_FILE_READ, 0);
    struct sim_handle *handle;
    int64_t result = -rc;

    if (rc == 0 || rc == SHORT_TRANSFER) {
        handle = handle_get(fs, file, 0);
        result = handle == NULL ? -EBADF :
                 (int64_t)inode_read(handle->inode, buf, shortened(rc, bytes),
                                     off, fs->cell_bytes);
    }
    leave(fs, 0);
    return result;
}

static struct sim_handle *writable(struct sim_fs *fs, int file)
{
    struct sim_handle *handle = handle_get(fs, file, 0);

    if (handle != NULL && (handle->flags & KVMETA_VFS_WRITE) == 0) {
        fs->misuses++;
        return NULL;
    }
    return handle;
}

/* A kill may come in the middle of a long write: writes some of its cells,
 * and says so. Returns the bytes written. */
static size_t write_begin(struct sim_fs *fs, struct sim_inode *inode,
                          const void *buf, size_t bytes, uint64_t off)
{
    uint64_t first = off / fs->cell_bytes;
    uint64_t cells = (off + bytes - 1) / fs->cell_bytes - first;
    size_t n;

    if (fs->on_op == NULL || bytes == 0 || cells == 0) {
        return 0;
    }
    n = (size_t)((first + 1 + test_rng_below(&fs->rng, cells)) *
                 fs->cell_bytes - off);
    inode_write(inode, buf, n, off, fs->cell_bytes);
    pthread_mutex_unlock(&fs->mutex);
    fs->on_op(fs->on_op_user, fs, SIM_FILE_WRITE);
    pthread_mutex_lock(&fs->mutex);
    return n;
}

static int64_t sim_file_write(void *user, int file, const void *buf,
                              size_t bytes, uint64_t off)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_FILE_WRITE, 1);
    struct sim_handle *handle;
    int64_t result = -rc;
    size_t n;

    if (rc != SIM_CRASHED) {
        handle = writable(fs, file);
        if (handle == NULL) {
            result = -EBADF;
        } else if (rc == 0 || rc == SHORT_TRANSFER) {
            bytes = shortened(rc, bytes);
            result = (int64_t)bytes;
            n = write_begin(fs, handle->inode, buf, bytes, off);
            inode_write(handle->inode, (const unsigned char *)buf + n,
                        bytes - n, off + n, fs->cell_bytes);
        } else if (fs->fault.partial) {
            inode_write(handle->inode, buf, bytes / 2, off, fs->cell_bytes);
        }
    }
    leave(fs, 0);
    return result;
}

static int sim_file_truncate(void *user, int file, uint64_t bytes)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_FILE_TRUNCATE, 1);
    struct sim_handle *handle;

    if (rc == 0) {
        handle = writable(fs, file);
        rc = handle == NULL ? EBADF : 0;
        if (rc == 0) {
            inode_truncate(handle->inode, bytes, fs->cell_bytes);
        }
    }
    return leave(fs, rc);
}

static int sim_file_sync(void *user, int file)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_FILE_SYNC, 1);
    struct sim_handle *handle;

    if (rc != SIM_CRASHED) {
        handle = handle_get(fs, file, 0);
        if (handle == NULL) {
            rc = EBADF;
        } else if (rc == 0) {
            inode_sync(handle->inode, fs->cell_bytes);
        } else {
            inode_fail_sync(handle->inode, fs->fault.partial, &fs->rng);
        }
    }
    return leave(fs, rc);
}

static int sim_file_close(void *user, int file)
{
    return close_handle(user, SIM_FILE_CLOSE, file);
}

/* --------------------------------------------------------------------------
 * The other calls
 * -------------------------------------------------------------------------- */

static int sim_random(void *user, void *buf, size_t bytes)
{
    struct sim_fs *fs = user;
    int rc = enter(fs, SIM_RANDOM, 0);

    if (rc == 0) {
        test_rng_bytes(&fs->rng, buf, bytes);
    }
    return leave(fs, rc);
}

static uint64_t sim_clock_ns(void *user)
{
    struct sim_fs *fs = user;
    uint64_t now;

    pthread_mutex_lock(&fs->mutex);
    now = fs->clock_now_ns += fs->clock_step_ns;
    pthread_mutex_unlock(&fs->mutex);
    return now;
}

static uint64_t sim_process_id(void *user)
{
    struct sim_fs *fs = user;

    return fs->pid;
}

static void fill_vfs(struct sim_fs *fs)
{
    struct kvmeta_vfs *vfs = &fs->vfs;

    vfs->struct_size = sizeof *vfs;
    vfs->user = fs;
    vfs->dir_create = sim_dir_create;
    vfs->dir_sync_parent = sim_dir_sync_parent;
    vfs->dir_open = sim_dir_open;
    vfs->dir_list = sim_dir_list;
    vfs->dir_sync = sim_dir_sync;
    vfs->dir_close = sim_dir_close;
    vfs->file_open = sim_file_open;
    vfs->file_lock = sim_file_lock;
    vfs->file_size = sim_file_size;
    vfs->file_read = sim_file_read;
    vfs->file_write = sim_file_write;
    vfs->file_truncate = sim_file_truncate;
    vfs->file_sync = sim_file_sync;
    vfs->file_close = sim_file_close;
    vfs->rename = sim_rename;
    vfs->unlink = sim_unlink;
    vfs->random = sim_random;
    vfs->clock_ns = sim_clock_ns;
    vfs->process_id = sim_process_id;
}

/* --------------------------------------------------------------------------
 * Life of a file system
 * -------------------------------------------------------------------------- */

/* The arrays are large; only what their counters say is in use is set. */
static void reset(struct sim_fs *fs)
{
    memset(fs, 0, offsetof(struct sim_fs, entries));
    fs->entry_count = 0;
    fs->handle_top = 0;
    pthread_mutex_init(&fs->mutex, NULL);
    fill_vfs(fs);
    fs->crash_at = UINT64_MAX;
}

void sim_init(struct sim_fs *fs, uint32_t cell_bytes, uint64_t seed)
{
    assert(cell_bytes == 512 || cell_bytes == 4096);
    reset(fs);
    memset(fs->handles, 0, sizeof fs->handles);
    fs->cell_bytes = cell_bytes;
    fs->garbage_whole = cell_bytes == 512;
    fs->rng.state = seed;
    fs->clock_now_ns = 1000000000u;
    fs->clock_step_ns = 1000u;
    fs->pid = 1;
}

void sim_free(struct sim_fs *fs)
{
    unsigned i;

    for (i = 0; i < fs->handle_top; i++) {
        if (fs->handles[i].used) {
            handle_free(fs, &fs->handles[i]);
        }
    }
    for (i = 0; i < fs->entry_count; i++) {
        entry_release(&fs->entries[i]);
    }
    fs->entry_count = 0;
    pthread_mutex_destroy(&fs->mutex);
}

/* Everything but files, entries and handles. */
static void clone_settings(struct sim_fs *to, const struct sim_fs *from)
{
    unsigned i;

    reset(to);
    for (i = 0; i < SIM_HANDLES_MAX; i++) {
        to->handles[i].used = 0;
    }
    to->cell_bytes = from->cell_bytes;
    to->garbage_whole = from->garbage_whole;
    to->rng.state = from->rng.state * 0x2545f4914f6cdd1du + 0x9e37u;
    to->clock_now_ns = from->clock_now_ns;
    to->clock_step_ns = from->clock_step_ns;
    to->pid = from->pid + 1;
}

static void forget_copies(const struct sim_fs *fs)
{
    const struct sim_entry *entry;
    unsigned i, j;

    for (i = 0; i < fs->entry_count; i++) {
        entry = &fs->entries[i];
        if (entry->current != NULL) {
            entry->current->copy = NULL;
        }
        if (entry->durable != NULL) {
            entry->durable->copy = NULL;
        }
        for (j = 0; j < entry->version_count; j++) {
            if (entry->versions[j] != NULL) {
                entry->versions[j]->copy = NULL;
            }
        }
    }
}

/* One copy for each inode, however many names lead to it. */
static struct sim_inode *copied(struct sim_inode *inode)
{
    if (inode == NULL) {
        return NULL;
    }
    if (inode->copy == NULL) {
        inode->copy = inode_copy(inode);
    }
    return inode_ref(inode->copy);
}

void sim_clone(struct sim_fs *to, const struct sim_fs *from)
{
    const struct sim_entry *old;
    struct sim_entry *new;
    unsigned i, j;

    clone_settings(to, from);
    to->dir_durable = from->dir_durable;
    to->dir_current = from->dir_current;
    forget_copies(from);
    for (i = 0; i < from->entry_count; i++) {
        old = &from->entries[i];
        new = &to->entries[i];
        memcpy(new->name, old->name, SIM_NAME_BYTES);
        new->durable = copied(old->durable);
        new->current = copied(old->current);
        new->version_count = old->version_count;
        for (j = 0; j < old->version_count; j++) {
            new->versions[j] = copied(old->versions[j]);
        }
    }
    to->entry_count = from->entry_count;
}

unsigned sim_open_handles(const struct sim_fs *fs)
{
    unsigned i, count = 0;

    for (i = 0; i < fs->handle_top; i++) {
        count += fs->handles[i].used != 0;
    }
    return count;
}

void sim_set_fault(struct sim_fs *fs, struct sim_fault fault)
{
    fs->fault = fault;
    fs->fault.seen = 0;
    fs->fault.hits = 0;
}

void sim_clear_fault(struct sim_fs *fs)
{
    memset(&fs->fault, 0, sizeof fs->fault);
}

const char *sim_call_name(int kind)
{
    static const char *const names[] = {
        "dir_create", "dir_sync_parent", "dir_open", "dir_list", "dir_sync",
        "dir_close", "file_open", "file_lock", "file_size", "file_read",
        "file_write", "file_truncate", "file_sync", "file_close", "rename",
        "unlink", "random", "any",
    };

    return kind >= 0 && kind <= SIM_CALLS ? names[kind] : "?";
}

/* --------------------------------------------------------------------------
 * Power cuts
 * -------------------------------------------------------------------------- */

#define ALTERNATIVES_MAX 6

enum point_kind { POINT_DIR, POINT_ENTRY, POINT_SIZE, POINT_CELL };

/* One thing that a cut may leave in more than one way. Alternative 0 is what
 * is durable, the last one the newest; for a cell, garbage comes after. */
struct sim_cut_point {
    enum point_kind kind;
    unsigned alternatives;               /* without garbage */
    unsigned choices;                    /* with it */
    unsigned chosen;
    uint32_t index;                      /* of the entry, or of the cell */
    union {                              /* no references are held */
        struct sim_inode *inode;
        struct cell *cell;
        unsigned size_count;             /* changes of size that happened */
    } of[ALTERNATIVES_MAX];
};

static struct sim_cut_point *point_add(struct sim_cut *cut,
                                       enum point_kind kind, uint32_t index)
{
    struct sim_cut_point *point;

    cut->points = grow(cut->points, cut->point_count, &cut->point_capacity,
                       sizeof *cut->points);
    point = &cut->points[cut->point_count++];
    memset(point, 0, sizeof *point);
    point->kind = kind;
    point->index = index;
    return point;
}

/* Makes room for one more alternative: the oldest but the durable one goes. */
static unsigned point_slot(struct sim_cut_point *point)
{
    if (point->alternatives == ALTERNATIVES_MAX) {
        memmove(&point->of[1], &point->of[2],
                (ALTERNATIVES_MAX - 2) * sizeof point->of[0]);
        point->alternatives--;
    }
    return point->alternatives++;
}

static void point_add_inode(struct sim_cut_point *point,
                            struct sim_inode *inode)
{
    unsigned i;

    for (i = 0; i < point->alternatives; i++) {
        if (point->of[i].inode == inode) {
            return;
        }
    }
    i = point_slot(point);
    point->of[i].inode = inode;
}

static void point_add_cell(struct sim_cut_point *point, struct cell *cell,
                           uint32_t cell_bytes)
{
    unsigned i;

    for (i = 0; i < point->alternatives; i++) {
        if (cell_equal(point->of[i].cell, cell, cell_bytes)) {
            return;
        }
    }
    i = point_slot(point);
    point->of[i].cell = cell;
}

static void cut_add_inode(struct sim_cut *cut, struct sim_inode *inode)
{
    if (inode == NULL || inode->copy != NULL) {
        return;
    }
    inode->copy = inode;                 /* seen */
    cut->inodes[cut->inode_count++] = inode;
}

/* The points of the entries, and all inodes that a cut may leave linked. */
static void cut_collect_entries(struct sim_cut *cut)
{
    const struct sim_fs *fs = cut->fs;
    const struct sim_entry *entry;
    struct sim_cut_point *point;
    unsigned i, j;

    if (fs->dir_current && !fs->dir_durable) {
        point = point_add(cut, POINT_DIR, 0);
        point->alternatives = 2;
    }
    for (i = 0; i < fs->entry_count; i++) {
        entry = &fs->entries[i];
        cut_add_inode(cut, entry->durable);
        if (entry->version_count == 0) {
            continue;
        }
        point = point_add(cut, POINT_ENTRY, i);
        point->of[point->alternatives++].inode = entry->durable;
        for (j = 0; j < entry->version_count; j++) {
            cut_add_inode(cut, entry->versions[j]);
            point_add_inode(point, entry->versions[j]);
        }
    }
}

static struct sim_cut_point *cut_cell_point(struct sim_cut *cut,
                                            unsigned first,
                                            const struct sim_inode *inode,
                                            uint32_t index)
{
    struct sim_cut_point *point;
    unsigned i;

    for (i = cut->point_count; i > first; i--) {
        point = &cut->points[i - 1];
        if (point->kind == POINT_CELL && point->index == index) {
            return point;
        }
    }
    point = point_add(cut, POINT_CELL, index);
    point->of[point->alternatives++].cell = image_cell(inode->durable, index);
    return point;
}

/* Zeros over zeros differ from what is durable only where they become
 * garbage. A preallocated file has so many that a few of them stand for all;
 * which ones is drawn for each walk. */
static int cut_passes_over(struct sim_cut *cut, const struct sim_inode *inode,
                           const struct pending *pending, unsigned phase)
{
    unsigned stride = inode->pending_count / 4;

    stride = stride < 16 ? 16 : stride;
    return pending->cell == NULL &&
           image_cell(inode->durable, pending->index) == NULL &&
           (!cut->garbage || (pending->index + phase) % stride != 0);
}

static void cut_collect_inode(struct sim_cut *cut,
                              const struct sim_inode *inode)
{
    unsigned first = cut->point_count;
    unsigned phase = (unsigned)test_rng_below(&cut->rng, 4096);
    struct sim_cut_point *point;
    unsigned i, slot;

    if (inode->size_count > 0) {
        point = point_add(cut, POINT_SIZE, 0);
        point->of[point->alternatives++].size_count = 0;
        for (i = 1; i <= inode->size_count; i++) {
            slot = point_slot(point);
            point->of[slot].size_count = i;
        }
    }
    for (i = 0; i < inode->pending_count; i++) {
        if (cut_passes_over(cut, inode, &inode->pending[i], phase)) {
            continue;
        }
        point = cut_cell_point(cut, first, inode, inode->pending[i].index);
        point_add_cell(point, inode->pending[i].cell, cut->fs->cell_bytes);
    }
}

/* The product of all choices, or anything above the limit. */
static uint64_t cut_product(const struct sim_cut *cut)
{
    uint64_t product = 1;
    unsigned i;

    for (i = 0; i < cut->point_count && product <= cut->limit; i++) {
        product *= cut->points[i].choices;
    }
    return product;
}

void sim_cut_begin(struct sim_cut *cut, const struct sim_fs *fs,
                   uint64_t limit, int garbage, uint64_t seed)
{
    unsigned inodes_max = fs->entry_count * (SIM_ENTRY_VERSIONS_MAX + 1) + 1;
    unsigned i;

    memset(cut, 0, sizeof *cut);
    cut->fs = fs;
    cut->limit = limit;
    cut->garbage = garbage;
    cut->rng.state = seed;
    cut->inodes = allocate(inodes_max * sizeof *cut->inodes);
    cut->inode_points = allocate((inodes_max + 1) * sizeof(unsigned));
    forget_copies(fs);
    cut_collect_entries(cut);
    for (i = 0; i < cut->inode_count; i++) {
        cut->inode_points[i] = cut->point_count;
        cut_collect_inode(cut, cut->inodes[i]);
    }
    cut->inode_points[i] = cut->point_count;
    for (i = 0; i < cut->point_count; i++) {
        cut->points[i].choices = cut->points[i].alternatives +
            (garbage && cut->points[i].kind == POINT_CELL);
    }
    cut->exhaustive = cut_product(cut) <= limit;
}

void sim_cut_end(struct sim_cut *cut)
{
    free(cut->points);
    free(cut->inodes);
    free(cut->inode_points);
    memset(cut, 0, sizeof *cut);
}

/* Counts up; 0 once all combinations have been. */
static int cut_advance(struct sim_cut *cut)
{
    unsigned i;

    for (i = 0; i < cut->point_count; i++) {
        if (++cut->points[i].chosen < cut->points[i].choices) {
            return 1;
        }
        cut->points[i].chosen = 0;
    }
    return 0;
}

static void cut_choose_all(struct sim_cut *cut, int newest)
{
    unsigned i;

    for (i = 0; i < cut->point_count; i++) {
        cut->points[i].chosen = newest ? cut->points[i].alternatives - 1 : 0;
    }
}

/* Random choices. How likely things are lost or garbage is drawn for each
 * state, so that nearly whole and nearly empty states come up, too. */
static void cut_choose_random(struct sim_cut *cut)
{
    static const unsigned kept_percents[] = {3, 50, 97};
    static const unsigned garbage_percents[] = {0, 3, 40};
    unsigned kept = kept_percents[test_rng_below(&cut->rng, 3)];
    unsigned garbage = garbage_percents[test_rng_below(&cut->rng, 3)];
    struct sim_cut_point *point;
    unsigned i;

    for (i = 0; i < cut->point_count; i++) {
        point = &cut->points[i];
        if (point->choices > point->alternatives &&
            test_rng_below(&cut->rng, 100) < garbage) {
            point->chosen = point->alternatives;
        } else if (test_rng_below(&cut->rng, 100) < kept) {
            point->chosen = point->alternatives - 1;
        } else {
            point->chosen =
                (unsigned)test_rng_below(&cut->rng, point->alternatives);
        }
    }
}

/* Everything or nothing but for one point that goes another way. */
static void cut_choose_single(struct sim_cut *cut)
{
    struct sim_cut_point *point;

    cut_choose_all(cut, test_rng_below(&cut->rng, 2) == 0);
    point = &cut->points[test_rng_below(&cut->rng, cut->point_count)];
    point->chosen = (unsigned)test_rng_below(&cut->rng, point->choices);
}

/* 0: there are no more states. */
static int cut_choose(struct sim_cut *cut)
{
    if (cut->exhaustive) {
        return cut->done == 0 || cut_advance(cut);
    }
    if (cut->done >= cut->limit) {
        return 0;
    }
    if (cut->done < 2) {
        cut_choose_all(cut, cut->done == 1);
    } else if (cut->done % 3 == 0) {
        cut_choose_single(cut);
    } else {
        cut_choose_random(cut);
    }
    return 1;
}

/* Some cell that is durable somewhere: what a reused block may hold. */
static const struct cell *any_cell(struct sim_cut *cut)
{
    const struct image *image;

    if (cut->inode_count == 0) {
        return NULL;
    }
    image = cut->inodes[test_rng_below(&cut->rng, cut->inode_count)]->durable;
    if (image == NULL || image->count == 0) {
        return NULL;
    }
    return image->cells[test_rng_below(&cut->rng, image->count)];
}

/* Fills data[0..bytes) with one of several kinds of garbage. */
static void garbage_fill(struct sim_cut *cut, unsigned char *data,
                         const unsigned char *old, const unsigned char *new,
                         size_t bytes)
{
    size_t at = (size_t)test_rng_below(&cut->rng, bytes / 8) * 8;

    switch (test_rng_below(&cut->rng, 5)) {
    case 0:
        memcpy(data, new, at);           /* torn: the front is new */
        memcpy(data + at, old + at, bytes - at);
        break;
    case 1:
        memcpy(data, old, at);           /* torn: the end is new */
        memcpy(data + at, new + at, bytes - at);
        break;
    case 2:
        memcpy(data, new, bytes);
        data[at] ^= (unsigned char)(1u << test_rng_below(&cut->rng, 8));
        break;
    case 3:
        memset(data, test_rng_below(&cut->rng, 2) ? 0xff : 0, bytes);
        break;
    default:
        test_rng_bytes(&cut->rng, data, bytes);
        break;
    }
}

static struct cell *garbage_cell(struct sim_cut *cut,
                                 const struct sim_cut_point *point)
{
    uint32_t cell_bytes = cut->fs->cell_bytes;
    struct cell *old = cell_copy(point->of[0].cell, cell_bytes);
    struct cell *new = cell_copy(point->of[point->alternatives - 1].cell,
                                 cell_bytes);
    struct cell *cell = cell_copy(new, cell_bytes);
    const struct cell *other = any_cell(cut);
    uint32_t at;

    if (cut->fs->garbage_whole && other != NULL &&
        test_rng_below(&cut->rng, 6) == 0) {
        memcpy(cell->data, other->data, cell_bytes);
    } else if (cut->fs->garbage_whole) {
        garbage_fill(cut, cell->data, old->data, new->data, cell_bytes);
    } else {
        for (at = 0; at < cell_bytes; at += 512) {
            if (memcmp(old->data + at, new->data + at, 512) != 0) {
                garbage_fill(cut, cell->data + at, old->data + at,
                             new->data + at, 512);
            }
        }
    }
    cell_unref(old);
    cell_unref(new);
    return cell;
}

static void count_choice(const struct sim_cut_point *point)
{
    int kept = point->chosen > 0;

    switch (point->kind) {
    case POINT_CELL:
        sim_totals.cells_garbage += point->chosen == point->alternatives;
        sim_totals.cells_lost += !kept;
        sim_totals.cells_kept += kept && point->chosen < point->alternatives;
        break;
    case POINT_SIZE:
        sim_totals.sizes_kept += (uint64_t)kept;
        sim_totals.sizes_lost += (uint64_t)!kept;
        break;
    default:
        sim_totals.entries_kept += (uint64_t)kept;
        sim_totals.entries_lost += (uint64_t)!kept;
        break;
    }
}

/* The file as the choices leave it on disk. */
static struct sim_inode *cut_build_inode(struct sim_cut *cut, unsigned which)
{
    const struct sim_inode *from = cut->inodes[which];
    uint32_t cell_bytes = cut->fs->cell_bytes;
    struct sim_inode *inode = inode_new();
    const struct sim_cut_point *point;
    unsigned i = cut->inode_points[which];
    unsigned end = cut->inode_points[which + 1];
    unsigned sizes = 0;

    inode->durable_bytes = from->durable_bytes;
    if (i == end) {
        inode->durable = image_ref(from->durable);
    } else {
        if (cut->points[i].kind == POINT_SIZE) {
            sizes = cut->points[i].of[cut->points[i].chosen].size_count;
            i++;
        }
        inode->durable = inode_base(from, sizes, cell_bytes);
        if (sizes > 0) {
            inode->durable_bytes = from->sizes[sizes - 1];
        }
        for (; i < end; i++) {
            point = &cut->points[i];
            if (point->chosen == point->alternatives) {
                image_set(&inode->durable, point->index,
                          garbage_cell(cut, point));
            } else if (point->chosen > 0) {
                image_set(&inode->durable, point->index,
                          cell_ref(point->of[point->chosen].cell));
            }
        }
        image_truncate(&inode->durable, inode->durable_bytes, cell_bytes);
    }
    inode->current = image_ref(inode->durable);
    inode->current_bytes = inode->durable_bytes;
    return inode;
}

static void cut_build_entry(struct sim_fs *to, const char *name,
                            struct sim_inode *inode)
{
    struct sim_entry *entry;

    if (inode == NULL) {
        return;
    }
    entry = &to->entries[to->entry_count++];
    memcpy(entry->name, name, SIM_NAME_BYTES);
    entry->version_count = 0;
    entry->durable = inode_ref(inode->copy);
    entry->current = inode_ref(inode->copy);
}

static void cut_build(struct sim_cut *cut, struct sim_fs *to)
{
    const struct sim_fs *fs = cut->fs;
    const struct sim_cut_point *points = cut->points;
    unsigned end = cut->inode_points[0], at = 0, i;

    to->dir_durable = fs->dir_durable;
    if (at < end && points[at].kind == POINT_DIR) {
        to->dir_durable = points[at++].chosen != 0;
    }
    to->dir_current = to->dir_durable;
    for (i = 0; i < cut->inode_count; i++) {
        cut->inodes[i]->copy = inode_ref(cut_build_inode(cut, i));
    }
    for (i = 0; i < fs->entry_count && to->dir_durable; i++) {
        if (at < end && points[at].index == i) {
            cut_build_entry(to, fs->entries[i].name,
                            points[at].of[points[at].chosen].inode);
            at++;
        } else {
            cut_build_entry(to, fs->entries[i].name, fs->entries[i].durable);
        }
    }
    for (i = 0; i < cut->inode_count; i++) {
        inode_unref(cut->inodes[i]->copy);
        cut->inodes[i]->copy = NULL;
    }
}

int sim_cut_next(struct sim_cut *cut, struct sim_fs *to)
{
    unsigned i;

    if (!cut_choose(cut)) {
        return 0;
    }
    clone_settings(to, cut->fs);
    to->rng.state += cut->done * 0xd1342543de82ef95u;
    cut_build(cut, to);
    for (i = 0; i < cut->point_count; i++) {
        count_choice(&cut->points[i]);
    }
    cut->done++;
    sim_totals.states++;
    return 1;
}

/* --------------------------------------------------------------------------
 * Looking at files, and planting them
 * -------------------------------------------------------------------------- */

void sim_each_file(const struct sim_fs *fs,
                   void (*fn)(void *user, const char *name, uint64_t bytes),
                   void *user)
{
    unsigned i;

    for (i = 0; i < fs->entry_count; i++) {
        if (fs->entries[i].current != NULL) {
            fn(user, fs->entries[i].name,
               fs->entries[i].current->current_bytes);
        }
    }
}

unsigned char *sim_file_get(const struct sim_fs *fs, const char *name,
                            uint64_t *bytes)
{
    const struct sim_entry *entry = entry_find(fs, name);
    unsigned char *data;

    if (entry == NULL || entry->current == NULL) {
        return NULL;
    }
    *bytes = entry->current->current_bytes;
    data = allocate((size_t)*bytes + 1);
    inode_read(entry->current, data, (size_t)*bytes, 0, fs->cell_bytes);
    return data;
}

void sim_file_put(struct sim_fs *fs, const char *name, const void *data,
                  uint64_t bytes)
{
    struct sim_entry *entry = entry_find(fs, name);
    struct sim_inode *inode = NULL;

    fs->dir_current = 1;
    fs->dir_durable = 1;
    if (data == NULL && entry == NULL) {
        return;
    }
    entry = entry_add(fs, name);
    entry_release(entry);
    if (data != NULL) {
        inode = inode_new();
        inode_write(inode, data, (size_t)bytes, 0, fs->cell_bytes);
        inode_sync(inode, fs->cell_bytes);
        entry->durable = inode_ref(inode);
        entry->current = inode_ref(inode);
    }
}

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    uint64_t word;
    size_t n;

    while (bytes > 0) {
        n = bytes < sizeof word ? bytes : sizeof word;
        word = 0;
        memcpy(&word, p, n);
        hash = (hash ^ word) * 0x9fb21c651e98df25u;
        hash ^= hash >> 32;
        p += n;
        bytes -= n;
    }
    return hash;
}

/* Zeros are hashed as a position only, so that holes and written zeros are
 * the same. */
static uint64_t hash_inode(const struct sim_inode *inode, uint64_t hash,
                           uint32_t cell_bytes)
{
    const struct cell *cell;
    uint32_t i;

    hash = hash_bytes(hash, &inode->current_bytes,
                      sizeof inode->current_bytes);
    for (i = 0; (uint64_t)i * cell_bytes < inode->current_bytes; i++) {
        cell = image_cell(inode->current, i);
        if (cell != NULL && !all_zero(cell->data, cell_bytes)) {
            hash = hash_bytes(hash, &i, sizeof i);
            hash = hash_bytes(hash, cell->data, cell_bytes);
        }
    }
    return hash;
}

uint64_t sim_hash(const struct sim_fs *fs)
{
    const struct sim_entry *entry;
    uint64_t sum = (uint64_t)fs->dir_current;
    uint64_t hash;
    unsigned i;

    for (i = 0; i < fs->entry_count; i++) {
        entry = &fs->entries[i];
        if (entry->current != NULL) {
            hash = hash_bytes(1, entry->name, strlen(entry->name));
            sum += hash_inode(entry->current, hash, fs->cell_bytes);
        }
    }
    return sum;
}
