// What is between and behind the products of experts, where it is not in their epilogues: their activations, and the sum of a row's
// results, which others call combine. A row or a pair is a block's x: there may be more than a grid has in y.
// Uses: expert_activation

#define THREADS 256

KERNEL(THREADS) expert_sum(
    const float *parts,   // (M, U, K) results of each row's experts
    const float *weights, // (M, U), or null: all are 1
    float *y,             // (M, K)
    u32 width,            // K
    u32 used,             // U
    u32 accumulate        // 0 or 1: y is added to
) {
    grid_dependency_sync();
    u32 n = BLOCK_Y * THREADS + THREAD;
    if (n >= width) return;
    u64 at = (u64)BLOCK_X * width + n;
    const float *part = parts + (u64)BLOCK_X * used * width + n;
    float sum = 0;
    for (u32 u = 0; u < used; ++u) sum += (weights ? weights[BLOCK_X * used + u] : 1.0f) * part[(u64)u * width];
    y[at] = accumulate ? y[at] + sum : sum;
}

KERNEL(THREADS) expert_act(
    const float *first, // (P, 2F) gates, then ups
    f16 *h,             // (P, F)
    u32 width,          // F
    u32 activation
) {
    grid_dependency_sync();
    u32 n = BLOCK_Y * THREADS + THREAD;
    if (n >= width) return;
    const float *row = first + (u64)BLOCK_X * 2 * width;
    h[(u64)BLOCK_X * width + n] = to_f16(expert_activate(row[n], row[width + n], activation));
}
