// Products of tiles on the matrix cores, by all lanes of a wave together: sums (16 rows of weights x TILE_TOKENS tokens)
// += weights (16 x k) . x (k x TILE_TOKENS), float16 numbers under float32 sums. One file for each family of instructions
// gives the same names:
//
//   TILE_WAVE       lanes of a wave, and an assertion that waves have so many
//   TILE_TOKENS     tokens of a tile
//   TILE_MOST_TOKENS  of which a wave has room for the sums
//   TILE_PARTS      parts of the inner dimension: lanes of one part hold the same k's, and it does not matter which
//   TILE_LANE_ROWS  rows whose weights a lane holds
//   TILE_VALUES     sums that a lane holds
//   TILE_PARTNER    a lane that has the sum of a row also has that of the row so many below, TILE_VALUES / 2 sums on; rows
//                   are so in blocks of 2 * TILE_PARTNER
//   TILE_LANE_TOKENS  tokens that a lane has sums of: the i-th is of tile_sum_token(i % TILE_LANE_TOKENS)
//   TILE_ROW_LANES  from, to: lanes that differ in these powers of two have sums of the same tokens, of other rows
//   tile_part()     the lane's part
//   tile_row(r)     its r-th row
//   reader_part(lane), reader_token(lane)  of which part and token it holds x; lanes from TILE_PARTS * TILE_TOKENS on hold the
//                   same again
//   tile_multiply(sum, weights, x)  4 N k's of each part: of each of the lane's rows, and of its token, as N words of four
//                   numbers; N is a multiple of 4 / TILE_PARTS
//   tile_sum_row(i), tile_sum_token(i)  where the lane's i-th sum is
//
// Sources: the PTX ISA on mma.m16n8k16; AMD's ISA manuals of CDNA 3, RDNA 3 and RDNA 4 on matrix instructions.

#define TILE_SCALAR 0
#define TILE_MMA 1     // NVIDIA, from sm_80 on
#define TILE_MFMA 2    // CDNA
#define TILE_WMMA_11 3 // RDNA 3
#define TILE_WMMA_12 4 // RDNA 4

#ifndef TILE // the harness plays each of them
#if defined(FORGE_CUDA) && __CUDA_ARCH__ >= 800
#define TILE TILE_MMA
#elif defined(HAS_MFMA)
#define TILE TILE_MFMA
#elif defined(HAS_WMMA_11)
#define TILE TILE_WMMA_11
#elif defined(HAS_WMMA_12)
#define TILE TILE_WMMA_12
#else
#define TILE TILE_SCALAR
#endif
#endif

typedef u32x2 f16_quad; // four float16 numbers

#if defined(FORGE_HARNESS)
// The product of a matrix instruction from what all lanes hold: `at_a(row, k)` and `at_b(k, column)` say in which lane,
// and which of its numbers. With TILE_FLUSH subnormals count as 0.
struct TilePlace {
    u32 lane, number;
};
#ifdef TILE_FLUSH
DEVICE float tile_number(f16 x) { return x.bits & 0x7c00 ? to_float(x) : 0.0f; }
#else
DEVICE float tile_number(f16 x) { return to_float(x); }
#endif
template <u32 K, u32 N, typename A, typename B>
DEVICE void tile_collective(float (&sum)[N], const f16 *a, u32 a_count, const f16 *b, u32 b_count, A at_a, B at_b, u32 (*row)(u32), u32 (*column)(u32)) {
    f16 own[32];
    for (u32 i = 0; i < a_count; ++i) own[i] = a[i];
    for (u32 i = 0; i < b_count; ++i) own[16 + i] = b[i];
    const f16(*all)[32] = (const f16(*)[32])forge_share(own, sizeof own);
    for (u32 i = 0; i < N; ++i)
        for (u32 k = 0; k < K; ++k) {
            TilePlace left = at_a(row(i), k), right = at_b(k, column(i));
            sum[i] += tile_number(all[left.lane][left.number]) * tile_number(all[right.lane][16 + right.number]);
        }
}
#endif
