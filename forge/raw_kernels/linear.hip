// Products with a float16 matrix whose rows are not whole vectors of 8 numbers, and biases.

// A block for each number of y.
KERNEL(64) linear(
    const f16 *x,      // (M, K)
    const f16 *weight, // (N, K)
    const float *bias, // (N,) or null
    float *y,          // (M, stride) y[:, column : column + N] = x @ weight.T + bias, or += with accumulate
    u32 inner,         // K
    u32 outer,         // N
    u32 stride,        // numbers from one row of y to the next
    u32 column,
    u32 accumulate // 0 or 1
) {
    grid_dependency_sync();
    SHARED float scratch[MAX_WAVES(64)];
    u32 n = BLOCK_X, m = BLOCK_Y;
    float sum = 0;
    for (u32 k = THREAD; k < inner; k += 64) sum += to_float(x[(u64)m * inner + k]) * to_float(weight[(u64)n * inner + k]);
    sum = block_sum(sum, scratch);
    if (THREAD || n >= outer) return;
    if (bias) sum += bias[n];
    float *out = y + (u64)m * stride + column + n;
    *out = accumulate ? *out + sum : sum;
}

KERNEL(256) add_bias(
    const float *bias, // (N,)
    float *y,          // (M, stride) y[:, column : column + N] += bias
    u32 outer,         // N
    u32 stride,        // numbers from one row of y to the next
    u32 column
) {
    grid_dependency_sync();
    u32 n = BLOCK_X * 256 + THREAD;
    if (n < outer) y[(u64)BLOCK_Y * stride + column + n] += bias[n];
}
