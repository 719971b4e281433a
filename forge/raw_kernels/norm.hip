// RMSNorm and LayerNorm of float32 rows, alone or behind a residual addition. One block per row.
// -D BLOCK=threads (a multiple of 64); OUT=f16 or float; VECTOR=4 where rows are multiples of 4 numbers, else 1; PIECES=vectors of
// a row that a thread holds.

#ifndef OUT
#define OUT f16
#endif

DEVICE void convert(f16 &y, float x) { y = to_f16(x); }
DEVICE void convert(float &y, float x) { y = x; }

#define PARTIALS_AT_ONCE 8 // loads in flight

// What is added to a row: the sum of split-K partials, which lie `size` numbers apart.
struct Delta {
    const float *row;
    u64 size;
    u32 partials;
};
DEVICE Delta delta_of(const float *delta, u32 width, u32 partials, u32 rows) {
    return Delta{delta + (u64)BLOCK_X * width, (u64)rows * width, partials};
}

// The vector at i of a row. Nothing past its width is loaded or stored. These functions take a row, not an
// address, and plain arrays, not Vec: NVIDIA's compiler makes other, slower code where they do not.
DEVICE void load_within(const float *row, u32 i, u32 width, float (&to)[VECTOR]) {
    Vec<float, VECTOR> x = {};
    if (i < width) x = *(const Vec<float, VECTOR> *)(row + i);
    UNROLL for (u32 j = 0; j < VECTOR; ++j) to[j] = x.v[j];
}
template <typename T> DEVICE void store_within(T *row, u32 i, u32 width, const float (&from)[VECTOR]) {
    Vec<T, VECTOR> x;
    UNROLL for (u32 j = 0; j < VECTOR; ++j) convert(x.v[j], from[j]);
    if (i < width) *(Vec<T, VECTOR> *)(row + i) = x;
}

// A thread reads its vectors of the row once and holds them in registers.
template <bool ADD>
DEVICE void rms(float *x, const Delta &delta, const float *weight, OUT *y, u32 width, float eps) {
    SHARED float scratch[MAX_WAVES(BLOCK)];
    u64 start = (u64)BLOCK_X * width;
    float value[PIECES][VECTOR], factor[PIECES][VECTOR];
    float squares = 0;
    UNROLL for (u32 p = 0; p < PIECES; ++p) {
        u32 i = (p * BLOCK + THREAD) * VECTOR;
        load_within(x + start, i, width, value[p]);
        load_within(weight, i, width, factor[p]);
        if (ADD) {
            for (u32 s = 0; s < delta.partials; s += PARTIALS_AT_ONCE) {
                float more[PARTIALS_AT_ONCE][VECTOR];
                UNROLL for (u32 n = 0; n < PARTIALS_AT_ONCE; ++n)
                    load_within(delta.row + (s + n) * delta.size, i, s + n < delta.partials ? width : 0, more[n]);
                UNROLL for (u32 n = 0; n < PARTIALS_AT_ONCE; ++n)
                    UNROLL for (u32 j = 0; j < VECTOR; ++j) value[p][j] += more[n][j];
            }
            store_within(x + start, i, width, value[p]);
        }
        UNROLL for (u32 j = 0; j < VECTOR; ++j) squares += value[p][j] * value[p][j];
    }
    float scale = rms_scale(fast_divide(block_sum(squares, scratch), (float)width), eps);
    UNROLL for (u32 p = 0; p < PIECES; ++p) {
        UNROLL for (u32 j = 0; j < VECTOR; ++j) value[p][j] *= scale * factor[p][j];
        store_within(y + start, (p * BLOCK + THREAD) * VECTOR, width, value[p]);
    }
}

template <bool ADD> DEVICE float read_sum(float *row, const Delta &delta, u32 i) {
    float x = row[i];
    if (ADD) {
        for (u32 s = 0; s < delta.partials; ++s) x += delta.row[s * delta.size + i];
        row[i] = x;
    }
    return x;
}

template <bool ADD>
DEVICE void layer(float *x, const Delta &delta, const float *weight, const float *bias, OUT *y, u32 width, float eps) {
    SHARED float scratch[MAX_WAVES(BLOCK)];
    u64 start = (u64)BLOCK_X * width;
    float *row = x + start;
    float sum = 0;
    for (u32 i = THREAD; i < width; i += BLOCK) sum += read_sum<ADD>(row, delta, i);
    float mean = fast_divide(block_sum(sum, scratch), (float)width);
    float squares = 0;
    for (u32 i = THREAD; i < width; i += BLOCK) squares += (row[i] - mean) * (row[i] - mean);
    float scale = rms_scale(fast_divide(block_sum(squares, scratch), (float)width), eps);
    for (u32 i = THREAD; i < width; i += BLOCK)
        convert(y[start + i], (row[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f));
}

KERNEL(BLOCK) rmsnorm(
    const float *x,      // (T, E)
    const float *weight, // (E,)
    OUT *y,              // (T, E)
    u32 width,           // E
    float eps
) {
    grid_dependency_sync();
    rms<false>((float *)x, Delta{}, weight, y, width, eps);
}
KERNEL(BLOCK) add_rmsnorm(
    float *residual,     // (T, E) delta is added to it first
    const float *delta,  // (partials, T, E)
    const float *weight, // (E,)
    OUT *y,              // (T, E)
    u32 width,           // E
    float eps,
    u32 rows, // T
    u32 partials
) {
    grid_dependency_sync();
    rms<true>(residual, delta_of(delta, width, partials, rows), weight, y, width, eps);
}
KERNEL(BLOCK) layernorm(
    const float *x,      // (T, E)
    const float *weight, // (E,)
    const float *bias,   // (E,) or null
    OUT *y,              // (T, E)
    u32 width,           // E
    float eps
) {
    grid_dependency_sync();
    layer<false>((float *)x, Delta{}, weight, bias, y, width, eps);
}
KERNEL(BLOCK) add_layernorm(
    float *residual,     // (T, E) delta is added to it first
    const float *delta,  // (partials, T, E)
    const float *weight, // (E,)
    const float *bias,   // (E,) or null
    OUT *y,              // (T, E)
    u32 width,           // E
    float eps,
    u32 rows, // T
    u32 partials
) {
    grid_dependency_sync();
    layer<true>(residual, delta_of(delta, width, partials, rows), weight, bias, y, width, eps);
}
