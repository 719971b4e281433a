// Rows of x in the order that products of quantized matrices take them in on Hopper: as they follow each other, or by tiles of experts.
// Uses: x_order
// Target: sm_90a

#define BLOCK 256

// A thread has a step of 16 numbers: four of each part. The n-th of a row, which becomes row `place`.
DEVICE void reorder(const f16 *row, f16 *to, u32 place, u32 n, u32 inner, u32 halves) {
    u32 step = n % 4, half = n / 4 % 2, group = n / 8 % 2, line = n / 16;
    u32 first = line * 256 + group * (halves ? 64 : 32) + half * 16 + step * 4;
    u32x2 numbers[4];
    UNROLL for (u32 c = 0; c < 4; ++c) numbers[c] = *(const u32x2 *)(row + first + (halves ? c / 2 * 128 + c % 2 * 32 : c * 64));
    u32 at = x_word(inner, place, first, halves) / 4; // of the first part; those of the others lie beside it
    UNROLL for (u32 j = 0; j < 2; ++j) {
        u32x4 pairs;
        UNROLL for (u32 c = 0; c < 4; ++c) pairs.v[c] = byte_perm(numbers[c].v[1], numbers[c].v[0], j ? 0x07060302u : 0x05040100u);
        ((u32x4 *)to)[at ^ j] = pairs;
    }
}

KERNEL(BLOCK) reorder_x(
    const f16 *x, // (M, K)
    f16 *to,      // (ceil(M / 64), K / 64, 64, 64)
    u32 rows,     // M
    u32 inner,    // K, a multiple of 256
    u32 halves    // 0 or 1
) {
    grid_dependency_sync();
    u32 n = BLOCK_X * BLOCK + THREAD, steps = inner / 16, row = n / steps;
    if (row < rows) reorder(x + (u64)row * inner, to, row, n % steps, inner, halves);
}

KERNEL(BLOCK) gather_x(
    const f16 *x,     // (M, K)
    f16 *to,          // (ceil(tiles * tile_rows / 64), K / 64, 64, 64) rows of tiles; those behind a tile's last are left
    const i32 *tiles, // (tiles, 4) see expert_groups
    const i32 *pairs, // (P,)
    u32 used,         // pairs of a row of x
    u32 tile_rows,    // pairs of a tile at most
    u32 inner,        // K, a multiple of 256
    u32 halves        // 0 or 1
) {
    grid_dependency_sync();
    u32 n = BLOCK_X * BLOCK + THREAD, steps = inner / 16, m = n / steps, first = (u32)tiles[4 * BLOCK_Y + 1], rows = (u32)tiles[4 * BLOCK_Y + 2];
    if (m >= rows) return;
    reorder(x + (u64)((u32)pairs[first + m] / used) * inner, to, BLOCK_Y * tile_rows + m, n % steps, inner, halves);
}
