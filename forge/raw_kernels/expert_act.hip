// Activations between the products of experts whose gates and ups are two matrices. A pair of a row and an expert is a block's x: there
// may be more than a grid has in y.
// Uses: expert_activation

#define THREADS 256

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
