// Attention step by step, with the weights in memory: for looking inside.

#define THREADS 256

// scores (H, T, S). A thread per score.
KERNEL(THREADS) attention_scores(const f16 *q, const f16 *k, float *scores, u32 heads, u32 kv_heads, u32 queries, u32 keys, u32 dim, float scale, float softcap) {
    u32 key = BLOCK_X * THREADS + THREAD, query = BLOCK_Y, head = BLOCK_Z;
    if (key >= keys) return;
    const f16 *a = q + ((u64)query * heads + head) * dim;
    const f16 *b = k + ((u64)key * kv_heads + head / (heads / kv_heads)) * dim;
    float sum = 0;
    for (u32 d = 0; d < dim; ++d) sum += to_float(a[d]) * to_float(b[d]);
    sum *= scale;
    if (softcap > 0.0f) sum = softcap * fast_tanh(fast_divide(sum, softcap));
    scores[((u64)head * queries + query) * keys + key] = sum;
}

KERNEL(THREADS) causal_mask(float *scores, u32 queries, u32 keys, u32 window) {
    u32 key = BLOCK_X * THREADS + THREAD, query = BLOCK_Y, head = BLOCK_Z;
    if (key >= keys) return;
    u32 position = query + keys - queries;
    if (key > position || (window && key + window <= position))
        scores[((u64)head * queries + query) * keys + key] = NEG_INFINITY;
}

// A block per row.
KERNEL(THREADS) softmax(const float *scores, float *weights, u32 keys) {
    SHARED float scratch[MAX_WAVES(THREADS)];
    const float *row = scores + (u64)BLOCK_X * keys;
    float *out = weights + (u64)BLOCK_X * keys;
    float most = NEG_INFINITY, sum = 0;
    for (u32 i = THREAD; i < keys; i += THREADS) most = larger(most, row[i]);
    most = block_max(most, scratch);
    for (u32 i = THREAD; i < keys; i += THREADS) sum += fast_exp(row[i] - most);
    sum = block_sum(sum, scratch);
    for (u32 i = THREAD; i < keys; i += THREADS) out[i] = fast_divide(fast_exp(row[i] - most), sum);
}

// out (T, H, D). A thread per number.
KERNEL(THREADS) attention_values(const float *weights, const f16 *v, f16 *out, u32 heads, u32 kv_heads, u32 queries, u32 keys, u32 dim) {
    u32 d = BLOCK_X * THREADS + THREAD, query = BLOCK_Y, head = BLOCK_Z;
    if (d >= dim) return;
    const float *row = weights + ((u64)head * queries + query) * keys;
    float sum = 0;
    for (u32 key = 0; key < keys; ++key)
        sum += row[key] * to_float(v[((u64)key * kv_heads + head / (heads / kv_heads)) * dim + d]);
    out[((u64)query * heads + head) * dim + d] = to_f16(sum);
}
