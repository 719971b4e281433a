// Products of rows of x, TOKENS for each block, with a float16 or quantized matrix, on the matrix cores.
// Uses: quant_blocks, codebooks, tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, matmul_epilogue, matmul_loop
//
// Split-K: where the rows of the matrix give few blocks, several share the inner dimension, and each stores partial sums for
// split_k_reduce or the kernel that reads y.
// -D as matmul_loop.

KERNEL(BLOCK) matmul(
    const f16 *x,         // (M, K)
    const WEIGHT *weight, // (N, K) or its first plane, see quant_blocks.hip; with a gate N / 2 gates, then ups
    const u8 *high,       // the other planes, or null
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // (N,) or null
    float *y,          // (splits, M, stride) x @ weight.T + bias in the columns from `column` on
    f16 *gated,        // (M, N / 2) activation(gate) * up, or null; then y is not used
    u32 rows,          // M
    u32 inner,         // K
    u32 outer,         // N
    u32 stride,        // numbers from one row of y to the next
    u32 column,
    u32 accumulate, // 0 or 1: y is added to
    u32 gelu,       // 0 or 1: the activation is GELU, else SiLU
    u32 splits      // of the inner dimension
) {
    SHARED u32x4 stages[STAGES][STAGE_PIECES];
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    Planes planes{(const u8 *)weight, high, scales, deltas};
    u32 row[TILES][TILE_LANE_ROWS];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) row[t][r] = matrix_row(product, t, tile_row(r));
    // A split is whole turns and whole stages.
    const u32 whole = STAGE_STEPS > STEPS ? STAGE_STEPS / STEPS : 1;
    u32 turns = (inner + TURN_WEIGHTS - 1) / TURN_WEIGHTS, share = (turns + splits * whole - 1) / (splits * whole) * whole;
    u32 begin = BLOCK_Y * share < turns ? BLOCK_Y * share : turns, end = begin + share < turns ? begin + share : turns;

    load_codebook<BLOCK>(); // the first stage's barrier is behind it
    Turn held[PREFETCH + 1];
    if (PREFETCH || HAS_PDL) load_turn(held[0], weight, planes, row, begin, end, inner);
    grid_dependency_sync();
    ROLLED for (u32 base = FIRST_TOKEN; base < FIRST_TOKEN + TOKENS; base += TOGETHER) {
        Sums sum;
        clear_sums(sum);
        if (base >= rows) break;
        if (base > FIRST_TOKEN) { // everything of the tokens before was read
            lds_barrier();
            if (PREFETCH || HAS_PDL) load_turn(held[0], weight, planes, row, begin, end, inner);
        }
        multiply_turns(sum, stages, held, x, [](u32, u32 m) { return m; }, weight, planes, row, base, rows, inner, begin, end);
        store_sums(product, sum, base);
    }
}
