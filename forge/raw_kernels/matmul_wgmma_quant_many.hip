// Products of many rows of x, TOKENS for each block, with a quantized matrix, as matmul_wgmma_quant, by waves with roles.
// Uses: quant_blocks, tile, tile_mma, tile_lines, x_order, matmul_epilogue, tile_wgmma, tile_phases, tile_bits, quant_lines, quant_roles
// Target: sm_90a
//
// -D as quant_roles.

KERNEL(THREADS) matmul_wgmma_quant_many(
    const f16 *x,     // (ceil(M / 64), K / 64, 64, 64) in an order of x_order
    const u8 *weight, // the planes of (N, K), see quant_blocks.hip; with a gate N / 2 gates, then ups
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // (N,) or null
    float *y,          // (splits, M, stride) x @ weight.T + bias in the columns from `column` on
    f16 *gated,        // (M, N / 2) activation(gate) * up, or both orders of x_order, or null; with it y is not used
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
    u32 lines = inner / LINE_WEIGHTS, share = (lines + splits - 1) / splits;
    u32 begin = BLOCK_Y * share < lines ? BLOCK_Y * share : lines, end = begin + share < lines ? begin + share : lines;
    if (THREAD == 0) prepare_barriers(memory[0]);
    barrier();
    if (THREAD >= BLOCK) {
        give_registers<PRODUCER_REGISTERS>();
        grid_dependency_sync();
        if (THREAD == BLOCK) produce(memory[0], product, x, lines, begin, end);
    } else {
        take_registers<consumer_registers(BLOCK, GROUP, MIN_BLOCKS)>();
        auto store = [&](const Sums &sum) { store_sums(product, sum, FIRST_TOKEN); };
        consume(memory[0], product, Planes{weight, high, scales, deltas}, lines, begin, end, store);
    }
}
