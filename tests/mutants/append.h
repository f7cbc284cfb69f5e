/*
 * Mutant 20 of the protocol, put into a copy of kvmeta.c by the script
 * `protocol`: an open that has found a live log syncs it and goes on writing
 * to it, where it should have made a table of what it holds. It trusts that
 * what can be read is on disk once a sync has said so; after a sync that
 * failed earlier, neither need be true.
 *
 * SPDX-License-Identifier: MIT
 */
static int kv_recover_append(struct kv_recovery *rec, struct kvmeta_error *err)
{
    struct kvmeta *db = rec->db;
    const struct kv_run *run = &rec->runs[rec->runs_count - 1];
    struct kv_log log = {
        .head = run->head, .end = run->end, .durable = run->end,
        .size = run->size, .prev = run->last_hcrc, .digest = run->digest,
        .next_seq = rec->seq + 1,
        .extend_bytes = kv_min(KV_LOG_EXTEND_BYTES,
                               db->options.log_bytes_max / 4)
    };
    int rc = kv_file_open(&db->env, KV_FILE_LOG, run->head.id,
                          KVMETA_VFS_WRITE, &log.file, err);

    if (!rc) rc = kv_file_sync(&db->env, &log.file, err);
    if (rc) {
        kv_file_close(&db->env, &log.file);
        return rc;
    }
    db->log = log;
    db->log_end = log.end;
    db->newest_log = run->head.id;
    return KVMETA_OK;
}

