// Edits of the QKV product in place, before rope_append_kv or attention_decode read it.

KERNEL(256) clamp(
    float *x,    // (count,)
    float limit, // numbers end within [-limit, limit]
    u32 count
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i < count) x[i] = larger(-limit, smaller(limit, x[i]));
}

// RMSNorm of all q heads of a token together, and of all its k heads. A block has one of the two.
KERNEL(256) rmsnorm_whole(
    float *qkv,          // (T, Q + 2K)
    const float *q_norm, // (Q,)
    const float *k_norm, // (K,)
    u32 q_width,         // Q
    u32 k_width,         // K
    float eps
) {
    SHARED float scratch[MAX_WAVES(256)];
    grid_dependency_sync();
    bool is_key = BLOCK_Y == 1;
    float *row = qkv + (u64)BLOCK_X * (q_width + 2 * k_width) + (is_key ? q_width : 0);
    const float *norm = is_key ? k_norm : q_norm;
    u32 width = is_key ? k_width : q_width;
    float squares = 0;
    for (u32 i = THREAD; i < width; i += 256) squares += row[i] * row[i];
    float scale = rms_scale(fast_divide(block_sum(squares, scratch), (float)width), eps);
    for (u32 i = THREAD; i < width; i += 256) row[i] *= scale * norm[i];
}

// A thread rotates one pair of one head.
KERNEL(256) rotate_heads(
    float *qkv,           // (T, width)
    const float *cos_sin, // (positions, pairs, 2)
    const i32 *positions, // (T,)
    u32 width,
    u32 heads,      // that rotate, the first of a row
    u32 dim,        // D
    u32 pairs,      // of a head that rotate
    u32 interleaved // 1: pairs are (2i, 2i + 1); 0: (i, i + pairs)
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i >= heads * pairs) return;
    u32 head = i / pairs, pair = i % pairs;
    f32x2 turn = load<2>(cos_sin + ((u64)(u32)positions[BLOCK_Y] * pairs + pair) * 2);
    float *row = qkv + (u64)BLOCK_Y * width + head * dim;
    float *first = row + (interleaved ? 2 * pair : pair), *second = first + (interleaved ? 1 : pairs);
    float a = *first, b = *second;
    *first = a * turn.v[0] - b * turn.v[1];
    *second = b * turn.v[0] + a * turn.v[1];
}
