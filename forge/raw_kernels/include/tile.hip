// The interface of the matrix cores. All lanes of a wave together compute a tile: float32 accumulators (16 rows of weights x
// TILE_TOKENS tokens) += float16 weights (16 x k) . x (k x TILE_TOKENS). One file for each family of instructions defines:
//
//   TILE_WAVE        Lanes of a wave; the file asserts that waves have so many.
//   TILE_TOKENS      Tokens of a tile.
//   TILE_MAX_TOKENS  Tokens that a wave has registers to accumulate for.
//   TILE_PARTS       Parts that the inner dimension is divided into. Lanes of one part hold the same k's; which ones is free.
//   TILE_LANE_ROWS   Rows whose weights a lane holds.
//   TILE_VALUES      Accumulators of a lane.
//   TILE_PARTNER     Distance of two rows that one lane accumulates, in accumulators i and i + TILE_VALUES / 2. Rows are paired so
//                    within blocks of 2 * TILE_PARTNER.
//   TILE_LANE_TOKENS Tokens that a lane accumulates; accumulator i is of tile_sum_token(i % TILE_LANE_TOKENS).
//   TILE_ROW_LANES   Two numbers, from and to: lanes that differ in these powers of two accumulate other rows of the same tokens.
//   tile_part()      The lane's part.
//   tile_row(r)      The r-th row whose weights the lane holds.
//   reader_part(lane), reader_token(lane)  The part and the token whose x a lane holds. Lanes from TILE_PARTS * TILE_TOKENS on hold
//                    copies.
//   tile_multiply(sum, weights, x)  Multiplies 4 N k's of each part: N words of four numbers of each of the lane's rows, and of its
//                    token. N is a multiple of 4 / TILE_PARTS.
//   tile_sum_row(i), tile_sum_token(i)  Row and token of the lane's i-th accumulator.
//   tile_as_x(sum, x)  The accumulators of a tile, rounded to float16, as the x of a product with 16 k's: its rows become k's. The lane
//                    holds TILE_X_QUADS words of four, of the token reader_token(LANE % (TILE_PARTS * TILE_TOKENS)); lanes of a part
//                    hold the k's tile_x_row(part, i) in i's order. Behind a product with other k's in another order the sum is wrong.
//   HAS_TILE_LOADS   Whether there are loads from LDS of what a product with 16 k's takes, with the k's of tile_x_row. Rows are `stride`
//                    numbers apart; their begin is a multiple of 16 bytes.
//                    tile_load(rows, stride, weights, q)  weights[r][q] of 16 rows.
//                    tile_load_transposed(rows, stride, weights)  The same from 16 k's of 16 numbers: rows become k's.
//                    tile_load_x(rows, stride, x)  x of TILE_TOKENS tokens and twice 16 k's.
//
// Sources: the PTX ISA on mma.m16n8k16; AMD's ISA manuals of CDNA 3, RDNA 3 and RDNA 4 on matrix instructions.

#define TILE_SCALAR 0
#define TILE_MMA 1     // NVIDIA, from sm_80 on
#define TILE_MFMA 2    // CDNA
#define TILE_WMMA_11 3 // RDNA 3
#define TILE_WMMA_12 4 // RDNA 4

#ifndef TILE // -D in the harness, which plays each family
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
#define TILE_X_QUADS (4 / TILE_PARTS)

#if defined(FORGE_HARNESS)
// A matrix instruction, played from the numbers that all lanes hold: `at_a(row, k)` and `at_b(k, column)` give the lane and the place
// of each number there. With TILE_FLUSH subnormals count as 0.
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
    __builtin_memcpy(own, a, 2 * a_count), __builtin_memcpy(own + 16, b, 2 * b_count); // words to the compiler
    const f16(*all)[32] = (const f16(*)[32])forge_share(own, sizeof own);
    for (u32 i = 0; i < N; ++i)
        for (u32 k = 0; k < K; ++k) {
            TilePlace left = at_a(row(i), k), right = at_b(k, column(i));
            sum[i] += tile_number(all[left.lane][left.number]) * tile_number(all[right.lane][16 + right.number]);
        }
}
#endif
