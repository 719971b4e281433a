// Tiles by v_mfma_f32_16x16x16_f16 of CDNA.

#if TILE == TILE_MFMA
#define TILE_WAVE 64
static_assert(TILE_WAVE == STATIC_WAVE, "a tile for waves of another size");
#define TILE_TOKENS 16
#define TILE_MAX_TOKENS 64
#define TILE_PARTS 4
#define TILE_LANE_ROWS 1
#define TILE_VALUES 4
#define TILE_PARTNER 2
#define TILE_LANE_TOKENS 1
#define TILE_ROW_LANES 16, 64

DEVICE u32 reader_part(u32 reader) { return reader / 16; }
DEVICE u32 reader_token(u32 reader) { return reader % 16; }
DEVICE u32 tile_part() { return reader_part(LANE); }
DEVICE u32 tile_row(u32 r) { return LANE % 16; }
DEVICE u32 tile_sum_row(u32 i) { return LANE / 16 * 4 + i; }
DEVICE u32 tile_sum_token(u32 i) { return LANE % 16; }

#if !defined(FORGE_HARNESS)
typedef _Float16 mfma_halves __attribute__((ext_vector_type(4)));
typedef float mfma_sums __attribute__((ext_vector_type(4)));
typedef u32 mfma_words __attribute__((ext_vector_type(2)));
DEVICE mfma_halves mfma_operand(const f16_quad &quad) { return __builtin_bit_cast(mfma_halves, mfma_words{quad.v[0], quad.v[1]}); } // by words, as they are loaded
#endif

template <u32 N> DEVICE void tile_multiply(float (&sum)[4], const f16_quad (&weights)[1][N], const f16_quad (&x)[N]) {
#if defined(FORGE_HARNESS)
    for (u32 q = 0; q < N; ++q)
        tile_collective<16>(
            sum, (const f16 *)&weights[0][q], 4, (const f16 *)&x[q], 4,
            [](u32 row, u32 k) { return TilePlace{row + k / 4 * 16, k % 4}; },
            [](u32 k, u32 column) { return TilePlace{column + k / 4 * 16, k % 4}; }, tile_sum_row, tile_sum_token);
#else
    mfma_sums all = {sum[0], sum[1], sum[2], sum[3]};
    UNROLL for (u32 q = 0; q < N; ++q)
        all = __builtin_amdgcn_mfma_f32_16x16x16f16(
            mfma_operand(weights[0][q]), mfma_operand(x[q]), all, 0, 0, 0);
    UNROLL for (u32 i = 0; i < 4; ++i) sum[i] = all[i];
#endif
}
#define HAS_TILE_LOADS 0
DEVICE u32 tile_x_row(u32 part, u32 i) { return part * 4 + i; }
DEVICE void tile_as_x(const float (&sum)[4], f16_quad (&x)[1]) { x[0] = u32x2{{to_f16x2(sum[0], sum[1]), to_f16x2(sum[2], sum[3])}}; }
#endif
