// Tiles by v_wmma_f32_16x16x16_f16 of RDNA 3, where both halves of a wave hold the same numbers, and of RDNA 4.

#if TILE == TILE_WMMA_11 || TILE == TILE_WMMA_12
#define TILE_WAVE 32
static_assert(TILE_WAVE == STATIC_WAVE, "a tile for waves of another size");
#define TILE_TOKENS 16
#define TILE_MAX_TOKENS 64
#define TILE_PARTS (TILE == TILE_WMMA_11 ? 1 : 2)
#define TILE_LANE_ROWS 1
#define TILE_VALUES 8
#define TILE_PARTNER (TILE == TILE_WMMA_11 ? 8 : 4)
#define TILE_LANE_TOKENS 1
#define TILE_ROW_LANES 16, 32
#define WMMA_QUADS (TILE == TILE_WMMA_11 ? 4 : 2) // of a lane, in one instruction

DEVICE u32 reader_part(u32 reader) { return TILE == TILE_WMMA_11 ? 0 : reader / 16; }
DEVICE u32 reader_token(u32 reader) { return reader % 16; }
DEVICE u32 tile_part() { return reader_part(LANE); }
DEVICE u32 tile_row(u32 r) { return LANE % 16; }
DEVICE u32 tile_sum_row(u32 i) { return TILE == TILE_WMMA_11 ? 2 * i + LANE / 16 : LANE / 16 * 8 + i; }
DEVICE u32 tile_sum_token(u32 i) { return LANE % 16; }

#if !defined(FORGE_HARNESS)
typedef _Float16 wmma_halves __attribute__((ext_vector_type(4 * WMMA_QUADS)));
typedef float wmma_sums __attribute__((ext_vector_type(8)));
typedef u32 wmma_words __attribute__((ext_vector_type(2 * WMMA_QUADS)));
template <u32 N> DEVICE wmma_halves wmma_operand(const f16_quad (&quads)[N], u32 first) { // by words, as they are loaded
    wmma_words words;
    UNROLL for (u32 i = 0; i < 2 * WMMA_QUADS; ++i) words[i] = quads[first + i / 2].v[i % 2];
    return __builtin_bit_cast(wmma_halves, words);
}
#endif

template <u32 N> DEVICE void tile_multiply(float (&sum)[8], const f16_quad (&weights)[1][N], const f16_quad (&x)[N]) {
#if !defined(FORGE_HARNESS)
    wmma_sums all;
    UNROLL for (u32 i = 0; i < 8; ++i) all[i] = sum[i];
#endif
    UNROLL for (u32 q = 0; q < N; q += WMMA_QUADS) {
#if defined(FORGE_HARNESS)
        // On RDNA 3 either copy may be used; here each half of the wave uses its own.
        const u32 in_lane = 4 * WMMA_QUADS;
        tile_collective<16>(
            sum, (const f16 *)&weights[0][q], in_lane, (const f16 *)&x[q], in_lane,
            [](u32 row, u32 k) { return TilePlace{row + (TILE == TILE_WMMA_11 ? LANE / 16 : k / 8) * 16, k % in_lane}; },
            [](u32 k, u32 column) { return TilePlace{column + (TILE == TILE_WMMA_11 ? LANE / 16 : k / 8) * 16, k % in_lane}; },
            tile_sum_row, tile_sum_token);
#elif TILE == TILE_WMMA_11
        all = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(wmma_operand(weights[0], q), wmma_operand(x, q), all);
#else
        all = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(wmma_operand(weights[0], q), wmma_operand(x, q), all);
#endif
    }
#if !defined(FORGE_HARNESS)
    UNROLL for (u32 i = 0; i < 8; ++i) sum[i] = all[i];
#endif
}
#define HAS_TILE_LOADS 0
DEVICE u32 tile_x_row(u32 part, u32 i) { return part * 8 + i; }
DEVICE void tile_as_x(const float (&sum)[8], f16_quad (&x)[TILE_X_QUADS]) {
    UNROLL for (u32 j = 0; j < 4; ++j) {
        u32 own = to_f16x2(sum[2 * j], sum[2 * j + 1]);
#if TILE == TILE_WMMA_11 // the other half of the wave has the rows between
        u32 other = shfl_xor(own, 16), even = LANE / 16 ? other : own, odd = LANE / 16 ? own : other;
        x[j] = u32x2{{byte_perm(odd, even, 0x05040100u), byte_perm(odd, even, 0x07060302u)}};
#else
        x[j / 2].v[j % 2] = own;
#endif
    }
}
#endif
