// Rows of x as the bulk copy engine takes them to LDS for matmul_wgmma_quant_many and matmul_tma: lines as wgmma reads them; for
// quantized matrices with numbers in the order in which lanes hold weights (quant_lines).
// Uses: tile_lines
// Target: sm_90a

#define BLOCK 256

// A thread has a step of 16 numbers: four of each part.
KERNEL(BLOCK) x_lines(
    const f16 *x, // (M, K)
    f16 *to,      // (ceil(M / tokens), K / 64, tokens, 64), zeros behind the last row
    u32 rows,     // M
    u32 inner,    // K, a multiple of 256
    u32 tokens,   // of a block of the product
    u32 halves    // 0 or 1: a part is 32 numbers of each half of 128, as Q6_K has them, else 64 that follow each other
) {
    grid_dependency_sync();
    u32 n = BLOCK_X * BLOCK + THREAD, step = n % 4, half = n / 4 % 2, group = n / 8 % 2, line = n / 16 % (inner / 256), row = n / 16 / (inner / 256);
    if (row >= (rows + tokens - 1) / tokens * tokens) return;
    u32x2 numbers[4] = {};
    UNROLL for (u32 c = 0; c < 4; ++c) {
        u32 start = halves ? c / 2 * 128 + c % 2 * 32 + group * 64 : c * 64 + group * 32;
        if (row < rows) numbers[c] = *(const u32x2 *)(x + (u64)row * inner + line * 256 + start + half * 16 + step * 4);
    }
    u32 token = row % tokens;
    u64 quarter = (u64)(row / tokens) * (inner / 64) + line * 4 + group * 2 + half;
    UNROLL for (u32 j = 0; j < 2; ++j) {
        u32x4 words;
        UNROLL for (u32 c = 0; c < 4; ++c) words.v[c] = byte_perm(numbers[c].v[1], numbers[c].v[0], j ? 0x07060302u : 0x05040100u);
        ((u32x4 *)to)[(quarter * tokens + token) * LINE + line_place(token, step * 2 + j)] = words;
    }
}

// The same for matmul_tma, with numbers in their order. A thread has 8.
KERNEL(BLOCK) x_lines_in_order(
    const f16 *x, // (M, K)
    f16 *to,      // (ceil(M / tokens), ceil(K / 64), tokens, 64), zeros behind the last row and the last number
    u32 rows,     // M
    u32 inner,    // K, a multiple of 8
    u32 tokens    // of a block of the product
) {
    grid_dependency_sync();
    u32 lines = (inner + 63) / 64, n = BLOCK_X * BLOCK + THREAD, piece = n % LINE, line = n / LINE % lines, row = n / LINE / lines;
    if (row >= (rows + tokens - 1) / tokens * tokens) return;
    u32 k = line * 64 + piece * 8, token = row % tokens;
    u32x4 numbers = {};
    if (row < rows && k < inner) numbers = *(const u32x4 *)(x + (u64)row * inner + k);
    ((u32x4 *)to)[((u64)(row / tokens * lines + line) * tokens + token) * LINE + line_place(token, piece)] = numbers;
}
