// Decode attention: one query per sequence over its pages of the KV cache, split over the context (flash decoding).
// Uses: tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, rope_pairs, decode_kv, decode_heads, decode_softmax, decode_merge
//
// A block takes PACKED query heads of one KV head, so that keys and values are read once for all of them, and one split of the
// positions. In a turn of the main loop each wave takes POSITIONS tiles of 16 positions. The matrix cores multiply keys with the
// queries; an online softmax (arXiv:1805.02867) turns the scores into weights, which go through LDS to a product with the values.
// The states of a block's waves are merged through LDS, those of the splits by the block that ends last (arXiv:2311.01282).
//
// A block makes its queries from the token's product: bias, RMS norm, rotation. The block whose split has the last position also
// makes the key and the value of that position; it uses them as the cache holds them, and one block of each KV head appends them.
// -D THREADS of a block; POSITIONS; HEAD_DIM; PAGE=positions of a page; PACKED; INTERLEAVED.

KERNEL(THREADS) attention_decode(
    const float *qkv,         // (partials, B, row_size) the token's product
    const float *bias,        // (row_size,) or null
    const float *q_norm,      // (D,) or null
    const float *k_norm,      // (D,) or null
    const float *v_norm,      // (D,) or null
    const float *cos_sin,     // (positions, pairs, 2)
    const float *query_scale, // (positions,) or null
    const i32 *lengths,       // (B,) positions, the last one's token included
    const i32 *slots,         // (B,) of the KV cache, for the last position
    f16 *k_pages,             // (N, P, G, D)
    f16 *v_pages,             // (N, P, G, D)
    const i32 *page_table,    // (B, pages)
    f16 *out,                 // (B, H, D)
    float *split_acc,         // (B, blocks of a row, splits, PACKED, D), or null for one split
    float *split_ml,          // (B, blocks of a row, splits, PACKED, 2), or null for one split
    u32 *arrived,             // (B, blocks of a row) zeros, or null for one split
    u32 heads,                // H
    u32 kv_heads,             // G
    u32 row_size,             // numbers of a row of qkv: heads, and what is not read here
    u32 value_head,           // the first head of the values in a row: H + G, or H where values are the keys
    u32 pages,                // of a row of page_table
    u32 pairs,                // that rotate
    u32 rows,                 // B
    u32 partials,             // split-K partials of qkv
    u32 splits,               // of the context, the grid's z
    float eps,                // of the norms
    float scale,              // of the scores
    u32 window,               // positions that are seen, or 0: all
    float softcap,            // or 0: none
    const float *sinks        // (H,) or null
) {
    SHARED Query query[PACKED];
    SHARED Rows latest[2]; // the last position's key and value
    SHARED Rows wave_acc[WAVES][PACKED];
    SHARED float wave_m[WAVES][PACKED], wave_l[WAVES][PACKED], share[PACKED][MAX_SPLITS];
    SHARED Weights weights[WAVES][PACKED];
    SHARED float squares[PACKED + 2][HEAD_SUMS];
    SHARED u32 before;
    u32 row = BLOCK_Y, split = BLOCK_Z, wave = THREAD / TILE_WAVE;
    u32 length = (u32)load_l2(lengths + row);
    const i32 *own_pages = page_table + (u64)row * pages;
    Tiles tiles; // looked up together with the length, on which only the first and the last tiles depend
    u32 own_first = split * TURN_POSITIONS + wave * 16 * POSITIONS;
    find_tiles(Cache{k_pages, v_pages, own_pages, 0, 0, pages * PAGE - 1}, own_first, tiles);
    UNROLL for (u32 u = 0; u < POSITIONS; ++u) compiler_fence(tiles.page[u]);
    u32 group = heads / kv_heads, chunks = (group + PACKED - 1) / PACKED;
    u32 kv_head = BLOCK_X / chunks, first_head = BLOCK_X % chunks * PACKED;

    // Splits take turns of positions in rotation. Blocks of splits without a turn end here.
    u32 first = first_seen(length - 1, window), start = first / 16 * 16;
    u32 turns = (length - start + TURN_POSITIONS - 1) / TURN_POSITIONS, used_splits = turns < splits ? turns : splits;
    bool is_last = split == (turns - 1) % splits;
    u32 stride = splits * TURN_POSITIONS, cached = length - 1, position = start + own_first;
    if (split >= used_splits) {
        grid_dependency_sync();
        return;
    }

    // Loads of cached keys and values come before the wait for the launch that makes the product.
    Cache cache{k_pages + kv_head * HEAD_DIM, v_pages + kv_head * HEAD_DIM, own_pages, kv_heads, first, cached ? cached - 1 : 0};
    compiler_fence(cache.first), compiler_fence(cache.last), compiler_fence(group), compiler_fence(value_head), compiler_fence(kv_head), compiler_fence(first_head); // AMD has too few scalar registers for these
    Keys key;
    Values value;
    if (start || position + 16 * POSITIONS > cached) find_tiles(cache, position, tiles);
    if (PREFETCH) load_keys(cache, tiles, 0, key), load_values(cache, tiles, 0, value);
    grid_dependency_sync();

    for (u32 i = THREAD; i < PACKED * (sizeof(Query) / 2 - HEAD_DIM); i += THREADS)
        query[i % PACKED].v[HEAD_DIM + i / PACKED] = f16{0};
    float factor = softcap > 0.0f ? scale : scale * LOG2E; // scores are in powers of two
    u32 last_head = group - 1 - first_head;
    u64 size = (u64)rows * row_size;
    Product product{qkv + (u64)row * row_size, bias, q_norm, k_norm, v_norm, cos_sin + (u64)(length - 1) * pairs * 2, size, partials, pairs, eps};
    if (query_scale) factor *= query_scale[length - 1];
    Task task{row, heads, value_head, kv_heads, kv_head, group, first_head, last_head, is_last};
    make_heads(task, product, factor, slots, k_pages, v_pages, query, latest, wave_acc[0], squares);
    barrier();

    const u32 head = reader_head();
    float acc[PASSES][PASS_TILES][TILE_VALUES], m[TILE_LANE_TOKENS], l[TILE_LANE_TOKENS];
    State state{acc, m, l};
    init_state(state);
    if (is_last && wave == 0) init_last_position(state, query, latest, softcap);
    Span span{position, stride, first, cached};
    attend(state, span, cache, tiles, query, weights[wave], head, key, value, 1.0f, softcap);

    WaveStates states{wave_acc, wave_m, wave_l};
    store_state(state, states, wave);
    barrier();
    u32 place = row * kv_heads * chunks + BLOCK_X;
    f16 *block_out = out + ((u64)row * heads + kv_head * group + first_head) * HEAD_DIM;
    const float *own_sinks = SINKS ? sinks + kv_head * group + first_head : nullptr;
    merge(states, Splits{split_acc, split_ml, arrived, own_sinks, splits, used_splits}, split, place, last_head, block_out, share, before);
}
