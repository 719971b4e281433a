// RMSNorm and LayerNorm of float32 rows, alone or behind a residual addition. One block per row.
// -D BLOCK=threads (a multiple of 64); OUT=f16 or float; VECTOR=4 where rows are multiples of 4 numbers, else 1; PIECES=vectors of
// a row that a thread holds.
// -D ORDERS: Rows of y lie as x_order says, 1 without and 2 with halves; 3: all in the one order, then all in the other.
// Uses: x_order

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
// The same of y, of so many rows.
DEVICE void store_row(OUT *y, u32 i, u32 width, u32 rows, const float (&from)[VECTOR]) {
#ifdef ORDERS
    if (i >= width) return;
    u32 *to = (u32 *)y;
    UNROLL for (u32 halves = 0; halves < 2; ++halves) {
        if (!(ORDERS & 1 << halves)) continue;
        u32 word = x_word(width, BLOCK_X, i, halves);
        to[word] = to_f16x2(from[0], from[2]);
        to[word ^ 4] = to_f16x2(from[1], from[3]);
        to += x_numbers(width, rows) / 2;
    }
#else
    store_within(y + (u64)BLOCK_X * width, i, width, from);
#endif
}

// A thread reads its vectors of the row once and holds them in registers.
template <bool IS_LAYER, bool ADD>
DEVICE void normalize(float *x, const Delta &delta, const float *weight, const float *bias, OUT *y, u32 width, float eps, u32 rows) {
    SHARED float scratch[MAX_WAVES(BLOCK)];
    u64 start = (u64)BLOCK_X * width;
    float value[PIECES][VECTOR], factor[PIECES][VECTOR];
    float sum = 0, squares = 0;
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
        UNROLL for (u32 j = 0; j < VECTOR; ++j) sum += value[p][j];
        UNROLL for (u32 j = 0; j < VECTOR; ++j) squares += value[p][j] * value[p][j];
    }
    if (IS_LAYER) {
        float mean = fast_divide(block_sum(sum, scratch), (float)width);
        squares = 0;
        UNROLL for (u32 p = 0; p < PIECES; ++p)
            UNROLL for (u32 j = 0; j < VECTOR; ++j) {
                value[p][j] = (p * BLOCK + THREAD) * VECTOR < width ? value[p][j] - mean : 0.0f;
                squares += value[p][j] * value[p][j];
            }
    }
    float scale = rms_scale(fast_divide(block_sum(squares, scratch), (float)width), eps);
    UNROLL for (u32 p = 0; p < PIECES; ++p) {
        u32 i = (p * BLOCK + THREAD) * VECTOR;
        UNROLL for (u32 j = 0; j < VECTOR; ++j) value[p][j] *= scale * factor[p][j];
        if (IS_LAYER && bias) {
            load_within(bias, i, width, factor[p]);
            UNROLL for (u32 j = 0; j < VECTOR; ++j) value[p][j] += factor[p][j];
        }
        store_row(y, i, width, rows, value[p]);
    }
}

KERNEL(BLOCK) rmsnorm(
    const float *x,      // (T, E)
    const float *weight, // (E,)
    OUT *y,              // (T, E), or in orders of x_order
    u32 width,           // E
    float eps,
    u32 rows // T
) {
    grid_dependency_sync();
    normalize<false, false>((float *)x, Delta{}, weight, nullptr, y, width, eps, rows);
}
KERNEL(BLOCK) add_rmsnorm(
    float *residual,     // (T, E) delta is added to it first
    const float *delta,  // (partials, T, E)
    const float *weight, // (E,)
    OUT *y,              // (T, E), or in orders of x_order
    u32 width,           // E
    float eps,
    u32 rows, // T
    u32 partials
) {
    grid_dependency_sync();
    normalize<false, true>(residual, delta_of(delta, width, partials, rows), weight, nullptr, y, width, eps, rows);
}
KERNEL(BLOCK) layernorm(
    const float *x,      // (T, E)
    const float *weight, // (E,)
    const float *bias,   // (E,) or null
    OUT *y,              // (T, E), or in orders of x_order
    u32 width,           // E
    float eps,
    u32 rows // T
) {
    grid_dependency_sync();
    normalize<true, false>((float *)x, Delta{}, weight, bias, y, width, eps, rows);
}
KERNEL(BLOCK) add_layernorm(
    float *residual,     // (T, E) delta is added to it first
    const float *delta,  // (partials, T, E)
    const float *weight, // (E,)
    const float *bias,   // (E,) or null
    OUT *y,              // (T, E), or in orders of x_order
    u32 width,           // E
    float eps,
    u32 rows, // T
    u32 partials
) {
    grid_dependency_sync();
    normalize<true, true>(residual, delta_of(delta, width, partials, rows), weight, bias, y, width, eps, rows);
}
