// RMSNorm and LayerNorm of float32 rows, alone or behind a residual addition. One block per row.
// -D BLOCK=threads (a multiple of 64); OUT=f16 or float; VECTOR=4 where rows are multiples of 4 numbers, else 1; PIECES=pieces
// of so many numbers that a thread has of a row.

#ifndef OUT
#define OUT f16
#endif

DEVICE void store(f16 *y, float x) { *y = to_f16(x); }
DEVICE void store(float *y, float x) { *y = x; }

// The next N numbers of a row from i on, 1 or 4; nothing beyond its width.
template <u32 N> DEVICE void read(const float *row, u32 i, u32 width, float (&to)[N]) {
    struct alignas(4 * N) Piece {
        float v[N];
    } piece = {};
    if (i < width) piece = *(const Piece *)(row + i);
    UNROLL for (u32 j = 0; j < N; ++j) to[j] = piece.v[j];
}
template <u32 N, typename T> DEVICE void write(T *row, u32 i, u32 width, const float (&from)[N]) {
    struct alignas(sizeof(T) * N) Piece {
        T v[N];
    } piece;
    UNROLL for (u32 j = 0; j < N; ++j) store(&piece.v[j], from[j]);
    if (i < width) *(Piece *)(row + i) = piece;
}

#define SLICES_AT_ONCE 8 // whose loads are under way together

// What is added to a row may be the sum of slices, arrays of all rows, `size` numbers apart.
struct Delta {
    const float *row;
    u64 size;
    u32 slices;
};

template <bool ADD> DEVICE float take(float *row, const Delta &delta, u32 i) {
    float x = row[i];
    if (ADD) {
        for (u32 s = 0; s < delta.slices; ++s) x += delta.row[s * delta.size + i];
        row[i] = x;
    }
    return x;
}

// A row is read once, in pieces of VECTOR numbers that its thread keeps: PIECES at most.
template <bool ADD>
DEVICE void rms(float *x, const Delta &delta, const float *weight, OUT *y, u32 width, float eps) {
    SHARED float scratch[MAX_WAVES(BLOCK)];
    u64 start = (u64)BLOCK_X * width;
    float value[PIECES][VECTOR], factor[PIECES][VECTOR];
    float squares = 0;
    UNROLL for (u32 h = 0; h < PIECES; ++h) {
        u32 i = (h * BLOCK + THREAD) * VECTOR;
        read<VECTOR>(x + start, i, width, value[h]);
        read<VECTOR>(weight, i, width, factor[h]);
        if (ADD) {
            for (u32 s = 0; s < delta.slices; s += SLICES_AT_ONCE) {
                float more[SLICES_AT_ONCE][VECTOR];
                UNROLL for (u32 n = 0; n < SLICES_AT_ONCE; ++n)
                    read<VECTOR>(delta.row + (s + n) * delta.size, i, s + n < delta.slices ? width : 0, more[n]);
                UNROLL for (u32 n = 0; n < SLICES_AT_ONCE; ++n)
                    UNROLL for (u32 j = 0; j < VECTOR; ++j) value[h][j] += more[n][j];
            }
            write<VECTOR>(x + start, i, width, value[h]);
        }
        UNROLL for (u32 j = 0; j < VECTOR; ++j) squares += value[h][j] * value[h][j];
    }
    float scale = rsqrt_fast(fast_divide(block_sum(squares, scratch), (float)width) + eps);
    UNROLL for (u32 h = 0; h < PIECES; ++h) {
        UNROLL for (u32 j = 0; j < VECTOR; ++j) value[h][j] *= scale * factor[h][j];
        write<VECTOR>(y + start, (h * BLOCK + THREAD) * VECTOR, width, value[h]);
    }
}

template <bool ADD>
DEVICE void layer(float *x, const Delta &delta, const float *weight, const float *bias, OUT *y, u32 width, float eps) {
    SHARED float scratch[MAX_WAVES(BLOCK)];
    u64 start = (u64)BLOCK_X * width;
    float *row = x + start;
    float sum = 0;
    for (u32 i = THREAD; i < width; i += BLOCK) sum += take<ADD>(row, delta, i);
    float mean = fast_divide(block_sum(sum, scratch), (float)width);
    float squares = 0;
    for (u32 i = THREAD; i < width; i += BLOCK) squares += (row[i] - mean) * (row[i] - mean);
    float scale = rsqrt_fast(fast_divide(block_sum(squares, scratch), (float)width) + eps);
    for (u32 i = THREAD; i < width; i += BLOCK)
        store(y + start + i, (row[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f));
}

DEVICE Delta delta_of(const float *delta, u32 width, u32 slices, u32 rows) {
    return Delta{delta + (u64)BLOCK_X * width, (u64)rows * width, slices};
}

KERNEL(BLOCK) rmsnorm(const float *x, const float *weight, OUT *y, u32 width, float eps) {
    grid_dependency_sync();
    rms<false>((float *)x, Delta{}, weight, y, width, eps);
}
KERNEL(BLOCK) add_rmsnorm(float *residual, const float *delta, const float *weight, OUT *y, u32 width, float eps, u32 rows, u32 slices) {
    grid_dependency_sync();
    rms<true>(residual, delta_of(delta, width, slices, rows), weight, y, width, eps);
}
KERNEL(BLOCK) layernorm(const float *x, const float *weight, const float *bias, OUT *y, u32 width, float eps) {
    grid_dependency_sync();
    layer<false>((float *)x, Delta{}, weight, bias, y, width, eps);
}
KERNEL(BLOCK) add_layernorm(float *residual, const float *delta, const float *weight, const float *bias, OUT *y, u32 width, float eps, u32 rows, u32 slices) {
    grid_dependency_sync();
    layer<true>(residual, delta_of(delta, width, slices, rows), weight, bias, y, width, eps);
}
