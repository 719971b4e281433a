// Rows of x in the order that matmul_wgmma_quant_many takes.
// Uses: x_order
// Target: sm_90a

#define BLOCK 256

// A thread has a step of 16 numbers: four of each part.
KERNEL(BLOCK) reorder_x(
    const f16 *x, // (M, K)
    f16 *to,      // (ceil(M / 64), K / 64, 64, 64)
    u32 rows,     // M
    u32 inner,    // K, a multiple of 256
    u32 halves    // 0 or 1
) {
    grid_dependency_sync();
    u32 n = BLOCK_X * BLOCK + THREAD, step = n % 4, half = n / 4 % 2, group = n / 8 % 2, line = n / 16 % (inner / 256), row = n / 16 / (inner / 256);
    if (row >= rows) return;
    u32 first = line * 256 + group * (halves ? 64 : 32) + half * 16 + step * 4;
    u32x2 numbers[4];
    UNROLL for (u32 c = 0; c < 4; ++c)
        numbers[c] = *(const u32x2 *)(x + (u64)row * inner + first + (halves ? c / 2 * 128 + c % 2 * 32 : c * 64));
    u32 place = x_word(inner, row, first, halves) / 4; // of the first part; those of the others lie beside it
    UNROLL for (u32 j = 0; j < 2; ++j) {
        u32x4 pairs;
        UNROLL for (u32 c = 0; c < 4; ++c) pairs.v[c] = byte_perm(numbers[c].v[1], numbers[c].v[0], j ? 0x07060302u : 0x05040100u);
        ((u32x4 *)to)[place ^ j] = pairs;
    }
}
