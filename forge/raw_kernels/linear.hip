// Products with a float16 matrix whose rows are not whole pieces of 8 numbers: for small models. And biases.

// y[m, column + n] = x[m] . weight[n] (+ bias[n]) (+ what y holds). A block for each number.
KERNEL(64) linear(const f16 *x, const f16 *weight, const float *bias, float *y, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate) {
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

KERNEL(256) add_bias(const float *bias, float *y, u32 outer, u32 stride, u32 column) {
    grid_dependency_sync();
    u32 n = BLOCK_X * 256 + THREAD;
    if (n < outer) y[(u64)BLOCK_Y * stride + column + n] += bias[n];
}
