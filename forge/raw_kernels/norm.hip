// RMSNorm and LayerNorm of float32 rows, alone or behind a residual addition. One block per row.
// -D BLOCK=threads (a multiple of 64); OUT=f16 or float.

#ifndef OUT
#define OUT f16
#endif

DEVICE void store(f16 *y, float x) { *y = to_f16(x); }
DEVICE void store(float *y, float x) { *y = x; }

template <bool ADD> DEVICE float take(float *row, const float *delta, u32 i) {
    float x = row[i];
    if (ADD) {
        x += delta[i];
        row[i] = x;
    }
    return x;
}

template <bool ADD>
DEVICE void rms(float *x, const float *delta, const float *weight, OUT *y, u32 width, float eps) {
    SHARED float scratch[MOST_WAVES(BLOCK)];
    u64 start = (u64)BLOCK_X * width;
    float *row = x + start;
    float squares = 0;
    for (u32 i = THREAD; i < width; i += BLOCK) {
        float value = take<ADD>(row, delta + start, i);
        squares += value * value;
    }
    float scale = rsqrt_fast(fast_divide(block_sum(squares, scratch), (float)width) + eps);
    for (u32 i = THREAD; i < width; i += BLOCK) store(y + start + i, row[i] * scale * weight[i]);
}

template <bool ADD>
DEVICE void layer(float *x, const float *delta, const float *weight, const float *bias, OUT *y, u32 width, float eps) {
    SHARED float scratch[MOST_WAVES(BLOCK)];
    u64 start = (u64)BLOCK_X * width;
    float *row = x + start;
    float sum = 0;
    for (u32 i = THREAD; i < width; i += BLOCK) sum += take<ADD>(row, delta + start, i);
    float mean = fast_divide(block_sum(sum, scratch), (float)width);
    float squares = 0;
    for (u32 i = THREAD; i < width; i += BLOCK) squares += (row[i] - mean) * (row[i] - mean);
    float scale = rsqrt_fast(fast_divide(block_sum(squares, scratch), (float)width) + eps);
    for (u32 i = THREAD; i < width; i += BLOCK)
        store(y + start + i, (row[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f));
}

KERNEL(BLOCK) rmsnorm(const float *x, const float *weight, OUT *y, u32 width, float eps) {
    rms<false>((float *)x, x, weight, y, width, eps);
}
KERNEL(BLOCK) add_rmsnorm(float *residual, const float *delta, const float *weight, OUT *y, u32 width, float eps) {
    rms<true>(residual, delta, weight, y, width, eps);
}
KERNEL(BLOCK) layernorm(const float *x, const float *weight, const float *bias, OUT *y, u32 width, float eps) {
    layer<false>((float *)x, x, weight, bias, y, width, eps);
}
KERNEL(BLOCK) add_layernorm(float *residual, const float *delta, const float *weight, const float *bias, OUT *y, u32 width, float eps) {
    layer<true>(residual, delta, weight, bias, y, width, eps);
}
