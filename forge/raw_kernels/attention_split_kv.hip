// Attention whose sums depend on a query's position alone, not on the queries and sequences beside it: each query of prompts and decode
// steps by blocks of its own, split over the context at places that its position says. Unlike attention_decode it reads finished
// queries, and every key and value, those of its own position too, from the cache.
// Uses: tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, decode_kv, decode_softmax, decode_merge
// -D THREADS of a block; POSITIONS; HEAD_DIM; PAGE=positions of a page; PACKED=query heads of a block.

KERNEL(THREADS) attention_split_kv(
    const f16 *q,          // (T, H, D)
    const f16 *k_pages,    // (N, P, G, D)
    const f16 *v_pages,    // (N, P, G, D)
    const i32 *starts,     // (B + 1,) first token of each sequence
    const i32 *lengths,    // (B,) positions, these tokens included
    const i32 *page_table, // (B, pages)
    f16 *out,              // (T, H, D)
    float *split_acc,      // (T, blocks of a token, splits, PACKED, D), or null for one split
    float *split_ml,       // (T, blocks of a token, splits, PACKED, 2), or null for one split
    u32 *arrived,          // (T, blocks of a token) zeros, or null for one split
    u32 rows,              // B
    u32 first_token,       // of q and out, as `starts` counts
    u32 heads,             // H
    u32 kv_heads,          // G
    u32 pages,             // of a row of page_table
    u32 splits,            // of the context, the grid's z
    float scale,           // of the scores
    u32 window,            // positions that are seen, or 0: all
    float softcap,         // or 0: none
    const float *sinks     // (H,) or null
) {
    SHARED Query query[PACKED];
    SHARED Rows wave_acc[WAVES][PACKED];
    SHARED float wave_m[WAVES][PACKED], wave_l[WAVES][PACKED], share[PACKED][MAX_SPLITS];
    SHARED Weights weights[WAVES][PACKED];
    SHARED u32 before;
    grid_dependency_sync();
    u32 token = BLOCK_X, split = BLOCK_Z, wave = THREAD / TILE_WAVE;
    u32 group = heads / kv_heads, chunks = (group + PACKED - 1) / PACKED;
    u32 kv_head = BLOCK_Y / chunks, first_head = BLOCK_Y % chunks * PACKED, last_head = group - 1 - first_head;

    float latest = 0; // the last sequence that begins with this token or before it
    for (u32 i = LANE; i < rows; i += WAVE)
        if ((u32)starts[i] <= first_token + token) latest = (float)i;
    u32 row = (u32)wave_max(latest);
    u32 length = (u32)(lengths[row] - starts[row + 1]) + first_token + token + 1; // up to this token

    // Splits take turns of positions in rotation. Blocks of splits without a turn end here.
    u32 first = first_seen(length - 1, window), start = first / 16 * 16;
    u32 turns = (length - start + TURN_POSITIONS - 1) / TURN_POSITIONS, used_splits = turns < splits ? turns : splits;
    if (split >= used_splits) return;
    u32 position = start + split * TURN_POSITIONS + wave * 16 * POSITIONS;
    Cache cache{k_pages + kv_head * HEAD_DIM, v_pages + kv_head * HEAD_DIM, page_table + (u64)row * pages, kv_heads, first, length - 1};
    Tiles tiles;
    Keys key;
    Values value;
    find_tiles(cache, position, tiles);
    if (PREFETCH) load_keys(cache, tiles, 0, key), load_values(cache, tiles, 0, value);

    const u32 room = sizeof(Query) / 2;
    for (u32 i = THREAD; i < PACKED * room; i += THREADS) {
        u32 h = i / room, d = i % room, of = kv_head * group + first_head + (h < last_head ? h : last_head);
        query[h].v[d] = d < HEAD_DIM ? q[((u64)token * heads + of) * HEAD_DIM + d] : f16{0};
    }
    barrier();
    float acc[PASSES][PASS_TILES][TILE_VALUES], m[TILE_LANE_TOKENS], l[TILE_LANE_TOKENS];
    State state{acc, m, l};
    init_state(state);
    const float factor = softcap > 0.0f ? scale : scale * LOG2E; // scores are in powers of two
    Span span{position, splits * TURN_POSITIONS, first, length};
    attend(state, span, cache, tiles, query, weights[wave], reader_head(), key, value, factor, softcap);

    WaveStates states{wave_acc, wave_m, wave_l};
    store_state(state, states, wave);
    barrier();
    u32 place = token * kv_heads * chunks + BLOCK_Y;
    f16 *block_out = out + ((u64)token * heads + kv_head * group + first_head) * HEAD_DIM;
    const float *own_sinks = SINKS ? sinks + kv_head * group + first_head : nullptr;
    merge(states, Splits{split_acc, split_ml, arrived, own_sinks, splits, used_splits}, split, place, last_head, block_out, share, before);
}
