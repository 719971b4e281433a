// The sigmoid gate of a shared expert: each row of its activations times a number of the row. A block per row.

#define THREADS 256

KERNEL(THREADS) gate_rows(
    f16 *h,            // (M, F) in place
    const float *x,    // (M, K)
    const float *norm, // (K,) weights of the RMS norm of x
    const float *gate, // (K,)
    u32 inner,         // K
    u32 width,         // F
    float eps          // of the norm
) {
    SHARED float scratch[MAX_WAVES(THREADS)];
    grid_dependency_sync();
    float sum = 0, squares = 0;
    for (u32 k = THREAD; k < inner; k += THREADS) {
        float number = x[(u64)BLOCK_X * inner + k];
        squares += number * number;
        sum += number * norm[k] * gate[k];
    }
    float scale = rms_scale(fast_divide(block_sum(squares, scratch), (float)inner), eps);
    float factor = fast_divide(1.0f, 1.0f + fast_exp(-block_sum(sum, scratch) * scale));
    for (u32 f = THREAD; f < width; f += THREADS) {
        f16 &own = h[(u64)BLOCK_X * width + f];
        own = to_f16(to_float(own) * factor);
    }
}
