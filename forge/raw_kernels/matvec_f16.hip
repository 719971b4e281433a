// Products of one row of x with a float16 matrix: y[n] = x . weight[n] (+ bias[n]) (+ what y holds), or gated.
// Uses: matvec_row
//
// A block computes ROWS rows of the matrix at a time and goes on to others; its threads share the inner dimension, each with
// the same pieces of x in its registers for all rows. As soon as a weight is used, the one in its place in the next rows
// is on its way, so that memory has work while sums are joined.
// -D BLOCK=threads; MIN_BLOCKS=blocks that a multiprocessor holds; PIECES=pieces of 8 numbers of a row that a thread takes;
// ROWS, even for gated outputs; IN=f16, or float: x is of the residual stream and is normalized here; OUT=float, or f16:
// activation(gate) * up of rows n and outer + n; SILU=1, or 0: the activation is GELU.

// Where a thread's pieces of a row are. Past the end of a row stands its last piece, which x has zeros for: loads without a
// branch let the compiler wait for each alone.
DEVICE u32 place(u32 p, u32 inner) {
    u32 unit = p * BLOCK + THREAD, last = inner / 8 - 1;
    return unit < last ? unit : last;
}

// The n-th of eight float16. They stay packed in registers: as numbers of 16 bits NVIDIA's compiler gives each one of its own.
DEVICE float unpack(const u32x4 &eight, u32 n) { return to_float(f16{(u16)(eight.v[n / 2] >> 16 * (n % 2))}); }

DEVICE u32x4 read_weight(const f16 *weight, u32 first, u32 r, u32 p, u32 inner, u32 outer) {
    u64 row = team_row<OUT, ROWS>(first, r, outer);
    return ((const u32x4 *)(weight + row * inner))[place(p, inner)];
}

// The block's outputs from `first` on; MORE: those from `next` on are read meanwhile.
template <bool MORE>
DEVICE void take_rows(u32x4 (&w)[PIECES][ROWS], const float (&x)[PIECES][8], float (&partial)[MAX_WAVES(BLOCK)][ROWS], u32 first, u32 next, const f16 *weight, const float *bias, OUT *y, u32 inner, u32 outer, u32 accumulate) {
    u32 n = own_output<BLOCK, OUT, ROWS, BLOCK>(first, outer);
    Addends more{};
    if (n < outer) more = read_addends(y, n, bias, outer, accumulate);
    float sum[ROWS];
    UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
    UNROLL for (u32 p = 0; p < PIECES; ++p)
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            UNROLL for (u32 i = 0; i < 8; ++i) sum[r] += unpack(w[p][r], i) * x[p][i];
            if (MORE) settle(sum[r]), w[p][r] = read_weight(weight, next, r, p, inner, outer);
        }
    finish_vector<BLOCK, SILU>(sum, partial, n, more, y, outer);
}

KERNEL(BLOCK) matvec_f16(const IN *x, const float *norm, float eps, const f16 *weight, const float *bias, OUT *y, u32 inner, u32 outer, u32 blocks, u32 accumulate) {
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], scratch[MAX_WAVES(BLOCK)];
    const u32 outputs = Outputs<OUT, ROWS>::per_team;
    u32 first = BLOCK_X * outputs, stride = blocks * outputs, turn = 0;
    u32 at[PIECES];
    UNROLL for (u32 p = 0; p < PIECES; ++p) at[p] = (p * BLOCK + THREAD) * 8;
    Row<IN, PIECES> row;
    u32x4 w[PIECES][ROWS], halves[PIECES];
    float own[PIECES][8];
    auto read_weights = [&] {
        UNROLL for (u32 p = 0; p < PIECES; ++p)
            UNROLL for (u32 r = 0; r < ROWS; ++r) w[p][r] = read_weight(weight, first, r, p, inner, outer);
    };
    if (STARTS_EARLY) read_weights(); // elsewhere x is asked for first, because it is needed first
    grid_dependency_sync();
    read_row(row, x, norm, at, inner);
    if (!STARTS_EARLY) read_weights();
    finish_row(halves, row, eps, inner, scratch);
    UNROLL for (u32 p = 0; p < PIECES; ++p)
        UNROLL for (u32 i = 0; i < 8; ++i) own[p][i] = unpack(halves[p], i);
    for (; first + stride < outer; first += stride, turn ^= 1)
        take_rows<true>(w, own, partial[turn], first, first + stride, weight, bias, y, inner, outer, accumulate);
    take_rows<false>(w, own, partial[turn], first, 0, weight, bias, y, inner, outer, accumulate);
}
