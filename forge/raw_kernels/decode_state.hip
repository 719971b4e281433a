// The request table of a decode step: per-request state on the device, one row per request. A row of length 0 is idle.

// A thread per row of the step.
KERNEL(64) decode_inputs(
    const i32 *request_rows, // (B,) rows of the request table that take part
    const i32 *last_ids,     // (S,)
    const i32 *lengths,      // (S,) tokens
    const i32 *page_tables,  // (K, S, pages) one for each kind of layer state
    i32 *step,               // (1,) counts up
    i32 *ids,                // (B,) the last id of each request
    i32 *positions,          // (B,) its position
    i32 *slot_mapping,       // (K, B) its slot in the cache of each kind
    i32 *row_lengths,        // (B,) tokens, at least 1
    u32 rows,                // B
    u32 kinds,               // K
    u32 requests,            // S
    u32 pages,               // of a request
    u32 page_size            // slots
) {
    u32 row = BLOCK_X * 64 + THREAD;
    if (row == 0) step[0] += 1;
    if (row >= rows) return;
    u32 request = (u32)request_rows[row];
    u32 length = (u32)larger(lengths[request], 1), position = length - 1;
    ids[row] = last_ids[request];
    positions[row] = (i32)position;
    for (u32 kind = 0; kind < kinds; ++kind) {
        i32 page = page_tables[((u64)kind * requests + request) * pages + position / page_size];
        slot_mapping[kind * rows + row] = page * (i32)page_size + (i32)(position % page_size);
    }
    row_lengths[row] = (i32)length;
}

KERNEL(64) advance(
    const i32 *ids,          // (B,) new ids; -1, of a row without a distribution, counts as 0
    const i32 *request_rows, // (B,)
    i32 *last_ids,           // (S,)
    i32 *lengths,            // (S,) tokens
    i32 *counts,             // (C, V) what `penalize` reads, or null
    const i32 *drawn,        // (count,) what the step's entry of the output ring takes
    const i32 *step,         // (1,)
    i32 *output_ring,        // (entries, width) in the host's memory, or null
    u32 rows,                // B
    u32 vocabulary,          // V
    u32 count,
    u32 entries,
    u32 width
) {
    grid_dependency_sync();
    u32 row = BLOCK_X * 64 + THREAD;
    if (output_ring) {
        i32 *entry = output_ring + (u64)((u32)step[0] % entries) * width;
        for (u32 i = row; i < count; i += (rows + 63) / 64 * 64) entry[i] = drawn[i];
    }
    if (row >= rows) return;
    u32 request = (u32)request_rows[row];
    if (lengths[request] == 0) return;
    i32 id = larger(ids[row], 0);
    last_ids[request] = id;
    lengths[request] += 1;
    if (counts) {
        i32 *count = counts + (u64)request * vocabulary + (u32)id;
        *count = larger(*count, 1) + 1;
    }
}

KERNEL(64) scatter(
    const i32 *edits, // (count, 2) index and value
    i32 *words,       // words[index] = value
    u32 count
) {
    u32 i = BLOCK_X * 64 + THREAD;
    if (i < count) words[edits[2 * i]] = edits[2 * i + 1];
}

KERNEL(64) copy_rows(
    const i32 *pairs,  // (count, 2) a row of `source` and a row of `target`
    const i32 *source, // (S, width)
    i32 *target,       // (R, width) may be `source`
    u32 count,
    u32 width
) {
    u64 i = (u64)BLOCK_X * 64 + THREAD;
    if (i >= (u64)count * width) return;
    u32 pair = (u32)(i / width), column = (u32)(i % width);
    target[(u64)(u32)pairs[2 * pair + 1] * width + column] = source[(u64)(u32)pairs[2 * pair] * width + column];
}

// A thread copies 4 numbers, 256 apart: a wave's stores to the host's memory lie together.
KERNEL(256) store_in_ring(
    const float *x,  // (count,)
    const i32 *step, // (1,)
    float *ring,     // (entries, width) in the host's memory
    u32 count,
    u32 entries,
    u32 width,
    u32 first        // where x begins in the step's entry
) {
    grid_dependency_sync();
    float *entry = ring + (u64)((u32)step[0] % entries) * width + first;
    UNROLL for (u32 i = 0; i < 4; ++i) {
        u32 at = (BLOCK_X * 4 + i) * 256 + THREAD;
        if (at < count) entry[at] = x[at];
    }
}

KERNEL(64) clear(
    i32 *words, // (count,)
    u64 count
) {
    u64 i = (u64)BLOCK_X * 64 + THREAD;
    if (i < count) words[i] = 0;
}
