// The state of running sequences, per slot; of length 0, a slot is idle. A thread per row makes a decode step's inputs.

KERNEL(64) decode_inputs(const i32 *slots, const i32 *last_ids, const i32 *lengths, const i32 *page_tables, i32 *turn, i32 *ids, i32 *positions, i32 *kv_slots, i32 *row_lengths, u32 rows, u32 kinds, u32 slot_count, u32 pages, u32 page_size) {
    u32 row = BLOCK_X * 64 + THREAD;
    if (row == 0) turn[0] += 1;
    if (row >= rows) return;
    u32 slot = (u32)slots[row];
    u32 length = (u32)larger(lengths[slot], 1), position = length - 1;
    ids[row] = last_ids[slot];
    positions[row] = (i32)position;
    for (u32 kind = 0; kind < kinds; ++kind) {
        i32 page = page_tables[((u64)kind * slot_count + slot) * pages + position / page_size];
        kv_slots[kind * rows + row] = page * (i32)page_size + (i32)(position % page_size);
    }
    row_lengths[row] = (i32)length;
}

KERNEL(64) advance(const i32 *ids, const i32 *slots, i32 *last_ids, i32 *lengths, i32 *counts, const i32 *drawn, const i32 *turn, i32 *mail, u32 rows, u32 vocabulary, u32 count, u32 places, u32 width) {
    grid_dependency_sync();
    u32 row = BLOCK_X * 64 + THREAD;
    if (mail) { // the host's memory
        i32 *letter = mail + (u64)((u32)turn[0] % places) * width;
        for (u32 i = row; i < count; i += (rows + 63) / 64 * 64) letter[i] = drawn[i];
    }
    if (row >= rows) return;
    u32 slot = (u32)slots[row];
    if (lengths[slot] == 0) return;
    i32 id = larger(ids[row], 0);
    last_ids[slot] = id;
    lengths[slot] += 1;
    if (counts) {
        i32 *count = counts + (u64)slot * vocabulary + (u32)id;
        *count = larger(*count, 1) + 1;
    }
}

KERNEL(64) scatter(const i32 *edits, i32 *words, u32 count) {
    u32 i = BLOCK_X * 64 + THREAD;
    if (i < count) words[edits[2 * i]] = edits[2 * i + 1];
}

KERNEL(64) clear(i32 *words, u64 count) {
    u64 i = (u64)BLOCK_X * 64 + THREAD;
    if (i < count) words[i] = 0;
}
