// Prefill attention: several queries per sequence over its pages of the KV cache, by FlashAttention (arXiv:2205.14135, arXiv:2307.08691).
// Uses: tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, prefill_kv, prefill_softmax
//
// A block takes BLOCK_QUERIES rows of one KV head. A row is a token's query in one of the heads that read the KV head, so that keys and
// values are read once for all of these (GQA, arXiv:2305.13245). Each group of SLICES waves takes QUERIES rows. The matrix cores multiply
// keys with queries; the scores become weights in the registers in which the product with the values reads them. The waves of a group
// share the numbers of the head: each multiplies its slice of the keys and values, and the scores are added through LDS.
//
// Keys and values have one tile in LDS each. While one is multiplied, the other's next tile is under way: in copies, or in registers.
// -D THREADS of a block; QUERIES; KEYS of a tile; SLICES; HEAD_DIM; PAGE=positions of a page; LDS_BYTES=at least what a block takes.

// The rows of a block: queries of the sequence `row` from its token `first_row / group` on.
struct Task {
    u32 row, first_row, rows; // rows of the sequence from first_row on
};

// The block's tile of queries. Tiles are counted by sequence, the last of each first, because its queries see the most keys. A launch
// has as many blocks as there can be tiles: surplus ones get the row `sequences`.
DEVICE Task find_task(const i32 *starts, u32 sequences, u32 group, u32 index) {
    ROLLED for (u32 base = 0; base < sequences; base += TILE_WAVE) {
        u32 own = base + LANE < sequences ? base + LANE : sequences - 1;
        u32 rows = base + LANE < sequences ? (u32)(starts[own + 1] - starts[own]) * group : 0;
        u32 tiles = (rows + BLOCK_QUERIES - 1) / BLOCK_QUERIES, sum = tiles; // of the lanes up to this one
        for (u32 i = 1; i < TILE_WAVE; i *= 2) {
            u32 other = shfl(sum, LANE >= i ? LANE - i : LANE);
            if (LANE >= i) sum += other;
        }
        u32 passed = popcount(wave_ballot(sum <= index)), all = shfl(sum, TILE_WAVE - 1);
        if (passed < TILE_WAVE) {
            u32 place = shfl(sum, passed) - 1 - index, first_row = place * BLOCK_QUERIES;
            return Task{base + passed, first_row, shfl(rows, passed) - first_row};
        }
        index -= all;
    }
    return Task{sequences, 0, 0};
}

KERNEL(THREADS) attention_prefill(
    const f16 *q,          // (T, H, D)
    const f16 *k_pages,    // (N, P, G, D)
    const f16 *v_pages,    // (N, P, G, D)
    const i32 *starts,     // (B + 1,) first token of each sequence
    const i32 *lengths,    // (B,) positions, these tokens included
    const i32 *page_table, // (B, pages)
    f16 *out,              // (T, H, D)
    u32 sequences,         // B
    u32 heads,             // H
    u32 kv_heads,          // G
    u32 pages,             // of a row of page_table
    float scale,           // of the scores, above 0
    u32 window,            // positions that are seen, or 0: all
    float softcap,         // or 0: none
    const float *sinks     // (H,) or null
) {
    DYNAMIC_SHARED(Shared, all_shared, 1);
    Shared &shared = all_shared[0];
    u32 kv_head = BLOCK_X, group = heads / kv_heads;
    Task task = find_task(starts, sequences, group, BLOCK_Y);
    if (task.row == sequences) return;
    u32 first = (u32)starts[task.row], count = (u32)starts[task.row + 1] - first, length = (u32)lengths[task.row];
    u32 base = length - count; // position of the sequence's first query
    u32 block_rows = task.rows < BLOCK_QUERIES ? task.rows : BLOCK_QUERIES;
    u32 end = base + (task.first_row + block_rows - 1) / group + 1, first_position = base + task.first_row / group;
    u32 begin = first_seen(first_position, window);
    Cache cache{k_pages, v_pages, page_table + (u64)task.row * pages, kv_heads, kv_head, begin, end};

    // The rows of the wave's group, and their first and last position.
    u32 wave = THREAD / TILE_WAVE, wave_group = wave / SLICES, slice = wave % SLICES;
    u32 own_row = task.first_row + wave_group * QUERIES;
    bool has_rows = wave_group * QUERIES < block_rows;
    u32 last_row = own_row + QUERIES < task.first_row + block_rows ? own_row + QUERIES - 1 : task.first_row + block_rows - 1;
    u32 oldest = base + own_row / group, latest = base + last_row / group;

    Queries queries{q + ((u64)first * heads + kv_head * group) * HEAD_DIM, heads, group};
    Asked asked;
    if (HELD_QUERY)
        hold_queries(queries, own_row, count * group, slice, asked);
    else
        store_queries(queries, task.first_row, block_rows, shared);

    float acc[DIM_TILES][TOKEN_TILES][TILE_VALUES], m[TOKEN_TILES][TILE_LANE_TOKENS], l[TOKEN_TILES][TILE_LANE_TOKENS];
    State state{acc, m, l};
    init_state(state);
    const float factor = softcap > 0.0f ? 1.0f : scale * LOG2E; // makes scores powers of two
    const float cap = softcap * LOG2E, per_cap = softcap > 0.0f ? fast_divide(scale, softcap) : 0.0f;

    // Tiles of keys begin at multiples of their size, so that a query's sums do not depend on the queries beside it: a tile that
    // it does not see changes nothing.
    u32 start = begin / KEYS * KEYS;
    PagesAhead found = find_pages(cache, start);
    HeldKeys keys_ahead;
    HeldValues values_ahead;
    load_keys(cache, found, start, shared, keys_ahead);
    store_keys(shared, keys_ahead);
    ROLLED for (; start < end; start += KEYS) {
        wait_copies<0>();
        lds_barrier(); // the keys are there, and the values of the turn before were read
        load_values(cache, found, start, shared, values_ahead);
        u32 next = start + KEYS < end ? start + KEYS : start; // loads without a branch need fewer registers
        found = find_pages(cache, next);
        bool is_seen = has_rows && start <= latest && !IS_BEFORE(start + KEYS - 1, oldest, window);
        Scores score;
        if (is_seen) compute_scores(shared, wave_group, slice, asked, score);
#if SLICES > 1
        if (is_seen) store_scores(score, shared.scores[wave]);
        lds_barrier();
        if (is_seen) add_scores(shared, wave_group, score);
#endif
        Weights weights;
        if (is_seen) {
            if (softcap > 0.0f) cap_scores(score, cap, per_cap);
            if (start + KEYS - 1 > oldest || IS_BEFORE(start, latest, window)) mask_scores(score, start, base, own_row, group, window);
            update_state(state, score, factor, weights);
        }
        store_values(shared, values_ahead);
        wait_copies<0>();
        lds_barrier(); // the values are there, and the keys were read
        load_keys(cache, found, next, shared, keys_ahead);
        if (is_seen) accumulate_values(state, shared, slice, weights);
        store_keys(shared, keys_ahead);
    }
    const float *own_sinks = SINKS ? sinks + kv_head * group : nullptr;
    if (has_rows)
        store_out(state, out + ((u64)first * heads + kv_head * group) * HEAD_DIM, own_sinks, factor, heads, group, own_row, last_row, slice);
}
