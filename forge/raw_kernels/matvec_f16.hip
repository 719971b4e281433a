// GEMV: one row of x times a float16 matrix, with a norm before it or a gated activation behind it.
// Uses: matvec_row
//
// A block computes ROWS rows of the matrix at a time, then goes on to others. Its threads share the inner dimension. Each holds
// its vectors of x in registers for all rows. As soon as a weight is used, its successor in the next rows is prefetched, so that
// memory has work during the reductions.
// -D BLOCK=threads; PIECES=vectors of 8 numbers of a row that a thread takes; ROWS, even for gated outputs; IN=f16, or float: x is
// the residual stream and is normalized here; OUT=float, or f16: activation(gate) * up; SILU=1, or 0: the activation is GELU.

// Where a thread's p-th vector of a row is. Past the end of a row it is the row's last vector, for which x has zeros: the compiler
// can wait for each load alone where no branch is in front of it.
DEVICE u32 place(u32 p, u32 inner) {
    u32 unit = p * BLOCK + THREAD, last = inner / 8 - 1;
    return unit < last ? unit : last;
}

DEVICE u32x4 read_weight(const f16 *weight, u32 first, u32 r, u32 p, u32 inner, u32 outer) {
    u64 row = team_row<OUT, ROWS>(first, r, outer);
    return ((const u32x4 *)(weight + row * inner))[place(p, inner)];
}

// Computes the block's outputs from `first` on. MORE: prefetches the weights of those from `next` on.
template <bool MORE>
DEVICE void multiply_rows(
    u32x4 (&w)[PIECES][ROWS],
    const float (&x)[PIECES][8],
    float (&partial)[MAX_WAVES(BLOCK)][ROWS],
    u32 first,
    u32 next,
    const f16 *weight,
    const float *bias,
    OUT *y,
    u32 inner,
    u32 outer,
    u32 accumulate
) {
    u32 n = own_output<BLOCK, OUT, ROWS, BLOCK>(first, outer);
    Addends more{};
    if (n < outer) more = read_addends(y, n, bias, outer, accumulate);
    float sum[ROWS];
    UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
    UNROLL for (u32 p = 0; p < PIECES; ++p)
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            UNROLL for (u32 i = 0; i < 8; ++i) sum[r] += unpack(w[p][r], i) * x[p][i];
            if (MORE) compiler_fence(sum[r]), w[p][r] = read_weight(weight, next, r, p, inner, outer);
        }
    finish_vector<BLOCK>(sum, partial, n, more, y, outer);
}

KERNEL(BLOCK) matvec_f16(
    const IN *x,       // (K,)
    const float *norm, // (K,) weights of the RMS norm of x, or null
    float eps,         // of the norm
    const f16 *weight, // (N, K); gated: (2N, K) gates, then ups
    const float *bias, // (N,) or (2N,), or null
    OUT *y,            // (N,)
    u32 inner,         // K, a multiple of 8
    u32 outer,         // N
    u32 blocks,        // of the launch
    u32 accumulate     // 0 or 1: y is added to
) {
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], scratch[MAX_WAVES(BLOCK)];
    const u32 outputs = Outputs<OUT, ROWS>::per_team;
    u32 first = BLOCK_X * outputs, stride = blocks * outputs, turn = 0;
    u32 at[PIECES];
    UNROLL for (u32 p = 0; p < PIECES; ++p) at[p] = (p * BLOCK + THREAD) * 8;
    Row<IN, PIECES> row;
    u32x4 w[PIECES][ROWS], packed[PIECES];
    float own[PIECES][8];
    auto read_weights = [&] {
        UNROLL for (u32 p = 0; p < PIECES; ++p)
            UNROLL for (u32 r = 0; r < ROWS; ++r) w[p][r] = read_weight(weight, first, r, p, inner, outer);
    };
    if (HAS_PDL) read_weights(); // elsewhere x comes first, because it is needed first
    grid_dependency_sync();
    read_row(row, x, norm, at, inner);
    if (!HAS_PDL) read_weights();
    finish_row(packed, row, eps, inner, scratch);
    UNROLL for (u32 p = 0; p < PIECES; ++p)
        UNROLL for (u32 i = 0; i < 8; ++i) own[p][i] = unpack(packed[p], i);
    for (; first + stride < outer; first += stride, turn ^= 1)
        multiply_rows<true>(w, own, partial[turn], first, first + stride, weight, bias, y, inner, outer, accumulate);
    multiply_rows<false>(w, own, partial[turn], first, 0, weight, bias, y, inner, outer, accumulate);
}
