// Products with a float16 matrix for few rows: y[m, column + n] = x[m] . weight[n] (+ bias[n]) (+ what y holds).
// A block computes ROWS outputs n for all rows m; its threads share the inner dimension.
// -D MOST=rows of x at most; ROWS; BLOCK=threads; WIDE=1: rows are multiples of 8 numbers, read 16 bytes at a time.

#define STEP (WIDE ? 8 : 1)

KERNEL(BLOCK) linear(const f16 *x, const f16 *weight, const float *bias, float *y, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate) {
    SHARED float partial[MOST_WAVES(BLOCK)][ROWS * MOST];
    u32 first = BLOCK_X * ROWS;
    float sum[ROWS][MOST];
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        UNROLL for (u32 m = 0; m < MOST; ++m) sum[r][m] = 0;

    for (u32 k = THREAD * STEP; k < inner; k += BLOCK * STEP) {
        float w[ROWS][STEP];
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            u32 n = first + r < outer ? first + r : outer - 1; // a row too many is computed and not stored
            const f16 *at = weight + (u64)n * inner + k;
#if WIDE
            f16x8 v = *(const f16x8 *)at;
            UNROLL for (u32 i = 0; i < 8; ++i) w[r][i] = to_float(v.v[i]);
#else
            w[r][0] = to_float(*at);
#endif
        }
        UNROLL for (u32 m = 0; m < MOST; ++m) {
            if (m >= rows) continue; // not break: the loop is unrolled
            const f16 *at = x + (u64)m * inner + k;
            float v[STEP];
#if WIDE
            f16x8 wide = *(const f16x8 *)at;
            UNROLL for (u32 i = 0; i < 8; ++i) v[i] = to_float(wide.v[i]);
#else
            v[0] = to_float(*at);
#endif
            UNROLL for (u32 r = 0; r < ROWS; ++r)
                UNROLL for (u32 i = 0; i < STEP; ++i) sum[r][m] += w[r][i] * v[i];
        }
    }
    finish_product<BLOCK>(sum, partial, bias, y, rows, outer, stride, column, accumulate);
}

KERNEL(256) add_bias(const float *bias, float *y, u32 outer, u32 stride, u32 column) {
    u32 n = BLOCK_X * 256 + THREAD;
    if (n < outer) y[(u64)BLOCK_Y * stride + column + n] += bias[n];
}
