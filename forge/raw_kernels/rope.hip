// From the product of one token to attention's inputs: bias, RMS norm of q and k heads, rotation, and the append of k
// and v to their pages. One wave per head; a block is four waves of one token.
// layernorm_heads comes before it where heads have LayerNorms of their own.
// -D HEAD_DIM; INTERLEAVED=0 or 1: pairs are (i, i + pairs) or (2i, 2i + 1).

#define WAVES_MOST 8 // 256 threads in waves of 32
#define PER_LANE ((HEAD_DIM + 31) / 32)

KERNEL(256) rope_append_kv(const float *qkv, const float *bias, const float *q_norm, const float *k_norm, const float *rotations, const float *query_scale, const i32 *positions, const i32 *slots, f16 *q, f16 *k_pages, f16 *v_pages, u32 heads, u32 kv_heads, u32 pairs, float eps) {
    SHARED float staged[WAVES_MOST][HEAD_DIM];
    u32 token = BLOCK_X, wave = THREAD / WAVE;
    u32 head = BLOCK_Y * (256 / WAVE) + wave;
    u32 all = heads + 2 * kv_heads;
    bool there = head < all; // the wave takes part in the shuffles and barriers anyway
    bool is_query = head < heads, is_value = head >= heads + kv_heads;

    float value[PER_LANE];
    float squares = 0;
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE) {
        u64 at = (u64)head * HEAD_DIM + d;
        value[i] = there ? qkv[(u64)token * all * HEAD_DIM + at] + (bias ? bias[at] : 0.0f) : 0.0f;
        squares += value[i] * value[i];
    }
    if (q_norm || k_norm) squares = wave_sum(squares); // the same for all: nothing diverges
    const float *norm = is_query ? q_norm : k_norm;
    bool normed = norm && !is_value;
    float scale = normed ? rsqrt_fast(squares * (1.0f / HEAD_DIM) + eps) : 1.0f;
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE)
        staged[wave][d] = normed ? value[i] * scale * norm[d] : value[i];
    barrier();
    if (!there) return;

    u32 position = (u32)positions[token], slot = (u32)slots[token];
    f16 *out = is_query ? q + ((u64)token * heads + head) * HEAD_DIM
               : is_value ? v_pages + ((u64)slot * kv_heads + head - heads - kv_heads) * HEAD_DIM
                          : k_pages + ((u64)slot * kv_heads + head - heads) * HEAD_DIM;
    float factor = is_query && query_scale ? query_scale[position] : 1.0f;
    const float *rotation = rotations + (u64)position * pairs * 2;
    for (u32 d = LANE; d < HEAD_DIM; d += WAVE) {
        float x = staged[wave][d];
        if (!is_value && d < 2 * pairs) {
            u32 pair = INTERLEAVED ? d / 2 : d % pairs;
            bool first = INTERLEAVED ? d % 2 == 0 : d < pairs;
            u32 other = INTERLEAVED ? d ^ 1 : (first ? d + pairs : d - pairs);
            f32x2 turn = *(const f32x2 *)(rotation + 2 * pair);
            float cosine = turn.v[0], sine = turn.v[1];
            x = x * cosine + staged[wave][other] * (first ? -sine : sine);
        }
        out[d] = to_f16(x * factor);
    }
}

// LayerNorm of each q and k head in place, with weights of its own. One wave per head; a block has heads of one token.
KERNEL(256) layernorm_heads(float *qkv, const float *q_norm, const float *k_norm, u32 heads, u32 kv_heads, float eps) {
    grid_dependency_sync();
    u32 token = BLOCK_X, head = BLOCK_Y * (256 / WAVE) + THREAD / WAVE;
    bool there = head < heads + kv_heads; // the wave takes part in the shuffles anyway
    float *row = qkv + ((u64)token * (heads + 2 * kv_heads) + head) * HEAD_DIM;
    float value[PER_LANE];
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
    float scale = rsqrt_fast(wave_sum(squares) * (1.0f / HEAD_DIM) + eps);
    if (!there) return;
    const float *norm = head < heads ? q_norm + (u64)head * HEAD_DIM : k_norm + (u64)(head - heads) * HEAD_DIM;
    for (u32 i = 0, d = LANE; d < HEAD_DIM; ++i, d += WAVE) row[d] = value[i] * scale * norm[d];
}
