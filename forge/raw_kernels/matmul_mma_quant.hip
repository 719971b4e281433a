// Products of up to 16 rows of x with a quantized matrix, as matmul.hip, by NVIDIA's mma.m16n8k16.
// Uses: quant_blocks, tile, tile_mma, tile_bits, matmul_epilogue, mma_quant
// Target: sm_90a
//
// -D as mma_quant.

KERNEL(BLOCK) matmul_mma_quant(
    const f16 *x,     // (M, K)
    const u8 *weight, // the planes of (N, K), see quant_blocks.hip; with a gate N / 2 gates, then ups
    const u8 *high,
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
    DYNAMIC_SHARED(Memory, memory, 1);
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    Planes planes{weight, high, scales, deltas};
    u32 wave = THREAD / TILE_WAVE, lines = inner / LINE_WEIGHTS, share = (lines + splits - 1) / splits;
    u32 begin = BLOCK_Y * share < lines ? BLOCK_Y * share : lines, end = begin + share < lines ? begin + share : lines;
    LineCopies copies;
    prepare_line(copies, [&](u32 tile, u32 row) { return matrix_row(product, tile, row); }, planes, lines, begin);
    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
        if (begin + s < end) copy_weights(memory[0].stages[s][wave], copies);
        commit_copies();
    }
    Rest rests[TILES][TILE_LANE_ROWS] = {};
    u32 rest_at[TILES][TILE_LANE_ROWS];
    if (HAS_REST)
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
                rest_at[t][r] = matrix_row(product, t, tile_row(r)) * lines;
                if (begin < end) rests[t][r] = load_rest(deltas, rest_at[t][r] + begin);
            }
    grid_dependency_sync();
    Sums sum, minima;
    clear_sums(sum);
    clear_sums(minima);
    const Masks masks = masks_of((rows >> 31) * THREAD << 20);
    const Places places = places_of_codes();
    u32 at = 0; // the stage's place in LDS
    ROLLED for (u32 first = begin; first < end; first += X_LINES) {
        if (first > begin) lds_barrier(); // the x before was read
        place_x(memory[0].x, x, [](u32 token) { return token; }, first, end, rows, inner);
        lds_barrier();
        u32 last = first + X_LINES < end ? first + X_LINES : end;
        ROLLED for (u32 line = first; line < last; ++line) {
            wait_copies<STAGES - 2>();
            wave_sync();
            u32 free = at == 0 ? STAGES - 1 : at - 1, next = line + STAGES - 1;
            if (next < end) copy_weights(memory[0].stages[free][wave], copies);
            commit_copies();
            const WaveStage &stage = memory[0].stages[at][wave];
            const XLine *own_x = &memory[0].x[(line - first) * OCTETS];
            WaveScales own_scales;
            UNROLL for (u32 t = 0; t < TILES; ++t)
                UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) own_scales[t][r] = read_scales(stage, t * 16 + tile_row(r), rests[t][r]);
            if (HAS_REST && line + 1 < end)
                UNROLL for (u32 t = 0; t < TILES; ++t)
                    UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) rests[t][r] = load_rest(deltas, rest_at[t][r] + line + 1);
            multiply_line(sum, minima, stage, own_x, own_scales, places, masks);
            at = at + 1 == STAGES ? 0 : at + 1;
        }
    }
    finish_sums(sum, minima);
    store_sums(product, sum, 0);
}
