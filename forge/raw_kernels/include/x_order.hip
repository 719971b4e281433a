// Rows of x for matmul_wgmma_quant_many: blocks of X_ROWS rows, in each quarter after quarter, in that row after row, 64 numbers swizzled
// as in GroupRows of tile_lines. A quarter of each 256 numbers has 16 of each of their four parts, in the order in which lanes hold weights
// (quant_lines). A part is 64 numbers that follow each other or, with `halves`, as Q6_K has them, 32 of each half of 128.

#define X_ROWS 64

// The word that has the numbers k and k + 2 of a row, where k is a multiple of 4. That of k + 1 and k + 3 is word ^ 4.
DEVICE u32 x_word(u32 inner, u32 row, u32 k, bool halves) {
    u32 part = halves ? k / 128 % 2 * 2 + k / 32 % 2 : k / 64 % 4, group = halves ? k / 64 % 2 : k / 32 % 2;
    u32 half = k / 16 % 2, step = k / 4 % 4, quarter = row / X_ROWS * (inner / 64) + k / 256 * 4 + group * 2 + half;
    return ((quarter * X_ROWS + row % X_ROWS) * 8 + (step * 2 ^ row % 8)) * 4 + part;
}
// Where the number k is, whatever k.
DEVICE u32 x_place(u32 inner, u32 row, u32 k, bool halves) { return 2 * (x_word(inner, row, k / 4 * 4, halves) ^ k % 2 * 4) + k / 2 % 2; }
// Numbers of so many rows.
DEVICE u32 x_numbers(u32 inner, u32 rows) { return (rows + X_ROWS - 1) / X_ROWS * X_ROWS * inner; }
