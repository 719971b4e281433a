// Tiles without matrix cores, for waves of any size. A lane accumulates two rows by two tokens and shuffles their x from other lanes.

#if TILE == TILE_SCALAR
#define TILE_WAVE STATIC_WAVE
#define TILE_TOKENS (TILE_WAVE / 4)
#define TILE_MAX_TOKENS TILE_TOKENS
#define TILE_PARTS 1
#define TILE_LANE_ROWS 2
#define TILE_VALUES 4
#define TILE_PARTNER 8
#define TILE_LANE_TOKENS 2
#define TILE_ROW_LANES 1, 8

DEVICE u32 reader_part(u32) { return 0; }
DEVICE u32 reader_token(u32 reader) { return reader; }
DEVICE u32 tile_part() { return 0; }
DEVICE u32 tile_row(u32 r) { return LANE % 8 + 8 * r; }
DEVICE u32 tile_sum_row(u32 i) { return LANE % 8 + i / 2 * 8; }
DEVICE u32 tile_sum_token(u32 i) { return LANE / 8 * 2 + i % 2; }

template <u32 N> DEVICE void tile_multiply(float (&sum)[4], const f16_quad (&weights)[2][N], const f16_quad (&x)[N]) {
    UNROLL for (u32 q = 0; q < N; ++q)
        UNROLL for (u32 w = 0; w < 2; ++w)
            UNROLL for (u32 i = 0; i < 4; ++i) {
                u32 word = shfl(x[q].v[w], tile_sum_token(i)), own = weights[i / 2][q].v[w];
                sum[i] += to_float(f16{(u16)own}) * to_float(f16{(u16)word});
                sum[i] += to_float(f16{(u16)(own >> 16)}) * to_float(f16{(u16)(word >> 16)});
            }
}
#define HAS_TILE_LOADS 0
DEVICE u32 tile_x_row(u32, u32 i) { return i; }
DEVICE void tile_as_x(const float (&sum)[4], f16_quad (&x)[4]) {
    u32 token = LANE % TILE_TOKENS, places = token % 2 ? 0x07060302u : 0x05040100u;
    UNROLL for (u32 k = 0; k < 16; k += 2) {
        u32 two = to_f16x2(sum[k / 8 * 2], sum[k / 8 * 2 + 1]), from = token / 2 * 8 + k % 8; // of both tokens of a lane
        u32 low = shfl(two, from), high = shfl(two, from + 1);
        x[k / 4].v[k / 2 % 2] = byte_perm(high, low, places);
    }
}
#endif
