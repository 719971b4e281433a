// From the product of a token to attention's inputs: bias, RMS norms of heads, rotation, and the append of k and v to
// their pages. layernorm_heads comes before it where heads have LayerNorms of their own.
// Uses: rope_pairs
//
// A wave takes heads of one token in turns; a block is the waves of 256 threads.
// -D HEAD_DIM; INTERLEAVED.

#define MOST_WAVES 8 // 256 threads in waves of 32
#define LANE_NUMBERS ((HEAD_DIM + 31) / 32) // of a head
#define HEADS_AT_ONCE (HEAD_DIM <= 64 ? 6 : HEAD_DIM <= 128 ? 3 : 1) // whose loads are under way together

#undef MIN_BLOCKS
#define MIN_BLOCKS (HEAD_DIM > 256 ? 2 : 5)

KERNEL(256) rope_append_kv(
    const float *qkv,         // (T, row_size)
    const float *bias,        // (row_size,) or null
    const float *q_norm,      // (D,) or null
    const float *k_norm,      // (D,) or null
    const float *v_norm,      // (D,) or null
    const float *cos_sin,     // (positions, pairs, 2)
    const float *query_scale, // (positions,) or null
    const i32 *positions,     // (T,)
    const i32 *slots,         // (T,) of the KV cache
    f16 *q,                   // (T, H, D)
    f16 *k_pages,             // (N, P, G, D), or null without KV heads
    f16 *v_pages,             // (N, P, G, D), or null
    u32 heads,                // H
    u32 kv_heads,             // G, or 0: queries alone
    u32 row_size,             // numbers of a token: heads, and what is not read here
    u32 value_head,           // the first head of the values in a row: H + G, or H where values are the keys
    u32 pairs,                // that rotate
    u32 blocks,               // that share a token
    float eps                 // of the norms
) {
    SHARED float staged[MOST_WAVES][HEAD_DIM];
    u32 token = BLOCK_X, wave = THREAD / WAVE;
    u32 all = heads + 2 * kv_heads, step = blocks * (256 / WAVE);
    u32 position = (u32)positions[token], slot = (u32)slots[token];
    const float *row = qkv + (u64)token * row_size;
    float scaled = query_scale ? query_scale[position] : 1.0f;
    f32x2 turn[LANE_NUMBERS]; // the same for all heads
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
        u32 d = i * WAVE + LANE, partner = partner_of(d, pairs);
        turn[i] = d < 2 * pairs ? load<2>(cos_sin + ((u64)position * pairs + pair_of(d, partner, is_first_of_pair(d, pairs))) * 2) : f32x2{};
    }
    ROLLED for (u32 start = BLOCK_Y * (256 / WAVE) + wave; start < all; start += HEADS_AT_ONCE * step) {
        float value[HEADS_AT_ONCE][LANE_NUMBERS];
        UNROLL for (u32 h = 0; h < HEADS_AT_ONCE; ++h)
            UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
                u32 head = start + h * step, d = i * WAVE + LANE;
                u32 from = head < heads + kv_heads ? head : head - heads - kv_heads + value_head;
                value[h][i] = head < all && d < HEAD_DIM ? row[from * HEAD_DIM + d] : 0.0f;
            }
        UNROLL for (u32 h = 0; h < HEADS_AT_ONCE; ++h) {
            u32 head = start + h * step;
            if (head >= all) break; // the same for the whole wave
            bool is_query = head < heads, is_value = head >= heads + kv_heads;
            const float *norm = is_value ? v_norm : is_query ? q_norm : k_norm;
            u32 from = is_value ? head - heads - kv_heads + value_head : head;
            if (bias)
                UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
                    u32 d = i * WAVE + LANE;
                    value[h][i] += d < HEAD_DIM ? bias[from * HEAD_DIM + d] : 0.0f;
                }
            float scale = 1.0f;
            if (norm) {
                float squares = 0;
                UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) squares += value[h][i] * value[h][i];
                scale = rms_scale(wave_sum(squares) * (1.0f / HEAD_DIM), eps);
            }
            wave_sync(); // the numbers of the head before were read
            UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
                u32 d = i * WAVE + LANE;
                if (d < HEAD_DIM) staged[wave][d] = norm ? value[h][i] * scale * norm[d] : value[h][i];
            }
            wave_sync();
            f16 *out = is_query ? q + ((u64)token * heads + head) * HEAD_DIM
                       : is_value ? v_pages + ((u64)slot * kv_heads + head - heads - kv_heads) * HEAD_DIM
                                  : k_pages + ((u64)slot * kv_heads + head - heads) * HEAD_DIM;
            float factor = is_query ? scaled : 1.0f;
            UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
                u32 d = i * WAVE + LANE;
                if (d >= HEAD_DIM) continue;
                float x = staged[wave][d];
                if (!is_value && d < 2 * pairs) {
                    bool first = is_first_of_pair(d, pairs);
                    x = x * turn[i].v[0] + staged[wave][partner_of(d, pairs)] * (first ? -turn[i].v[1] : turn[i].v[1]);
                }
                out[d] = to_f16(x * factor);
            }
        }
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
