// From the product of a token to attention's inputs: bias, RMS norm of q and k heads, rotation, and the append of k and v to
// their pages. layernorm_heads comes before it where heads have LayerNorms of their own.
// Uses: rope_pairs
//
// One wave per head; a block is the waves of 256 threads, all of one token.
// -D HEAD_DIM; INTERLEAVED.

#define MOST_WAVES 8 // 256 threads in waves of 32
#define LANE_NUMBERS ((HEAD_DIM + 31) / 32) // of a head

KERNEL(256) rope_append_kv(
    const float *qkv,         // (T, (H + 2G) * D)
    const float *bias,        // ((H + 2G) * D,) or null
    const float *q_norm,      // (D,) or null
    const float *k_norm,      // (D,) or null
    const float *cos_sin,     // (positions, pairs, 2)
    const float *query_scale, // (positions,) or null
    const i32 *positions,     // (T,)
    const i32 *slots,         // (T,) of the KV cache
    f16 *q,                   // (T, H, D)
    f16 *k_pages,             // (N, P, G, D)
    f16 *v_pages,             // (N, P, G, D)
    u32 heads,                // H
    u32 kv_heads,             // G
    u32 pairs,                // that rotate
    float eps                 // of the norms
) {
    SHARED float staged[MOST_WAVES][HEAD_DIM];
    u32 token = BLOCK_X, wave = THREAD / WAVE;
    u32 head = BLOCK_Y * (256 / WAVE) + wave;
    u32 all = heads + 2 * kv_heads;
    bool there = head < all; // the wave takes part in the shuffles and barriers anyway
    bool is_query = head < heads, is_value = head >= heads + kv_heads;

    float value[LANE_NUMBERS];
    float squares = 0;
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE) {
        u64 at = (u64)head * HEAD_DIM + d;
        value[i] = there ? qkv[(u64)token * all * HEAD_DIM + at] + (bias ? bias[at] : 0.0f) : 0.0f;
        squares += value[i] * value[i];
    }
    if (q_norm || k_norm) squares = wave_sum(squares); // the same for all: nothing diverges
    const float *norm = is_query ? q_norm : k_norm;
    bool normed = norm && !is_value;
    float scale = normed ? rms_scale(squares * (1.0f / HEAD_DIM), eps) : 1.0f;
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE)
        staged[wave][d] = normed ? value[i] * scale * norm[d] : value[i];
    barrier();
    if (!there) return;

    u32 position = (u32)positions[token], slot = (u32)slots[token];
    f16 *out = is_query ? q + ((u64)token * heads + head) * HEAD_DIM
               : is_value ? v_pages + ((u64)slot * kv_heads + head - heads - kv_heads) * HEAD_DIM
                          : k_pages + ((u64)slot * kv_heads + head - heads) * HEAD_DIM;
    float factor = is_query && query_scale ? query_scale[position] : 1.0f;
    for (u32 d = LANE; d < HEAD_DIM; d += WAVE) {
        float x = staged[wave][d];
        if (!is_value && d < 2 * pairs) {
            u32 partner = partner_of(d, pairs);
            bool first = is_first_of_pair(d, pairs);
            f32x2 turn = load<2>(cos_sin + ((u64)position * pairs + pair_of(d, partner, first)) * 2);
            x = x * turn.v[0] + staged[wave][partner] * (first ? -turn.v[1] : turn.v[1]);
        }
        out[d] = to_f16(x * factor);
    }
}

// LayerNorm of each q and k head in place. One wave per head; a block has heads of one token.
KERNEL(256) layernorm_heads(
    float *qkv,          // (T, (H + 2G) * D)
    const float *q_norm, // (H, D)
    const float *k_norm, // (G, D)
    u32 heads,           // H
    u32 kv_heads,        // G
    float eps
) {
    grid_dependency_sync();
    u32 token = BLOCK_X, head = BLOCK_Y * (256 / WAVE) + THREAD / WAVE;
    bool there = head < heads + kv_heads; // the wave takes part in the shuffles anyway
    float *row = qkv + ((u64)token * (heads + 2 * kv_heads) + head) * HEAD_DIM;
    float value[LANE_NUMBERS];
    float sum = 0, squares = 0;
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE) {
        value[i] = there ? row[d] : 0.0f;
        sum += value[i];
    }
    float mean = wave_sum(sum) * (1.0f / HEAD_DIM);
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE) {
        value[i] -= mean;
        squares += value[i] * value[i];
    }
    float scale = rms_scale(wave_sum(squares) * (1.0f / HEAD_DIM), eps);
    if (!there) return;
    const float *norm = head < heads ? q_norm + (u64)head * HEAD_DIM : k_norm + (u64)(head - heads) * HEAD_DIM;
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE) row[d] = value[i] * scale * norm[d];
}
