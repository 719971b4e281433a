// Tiles by mma.m16n8k16 of NVIDIA.

#if TILE == TILE_MMA
#define TILE_WAVE 32
static_assert(TILE_WAVE == STATIC_WAVE, "a tile for waves of another size");
#define TILE_TOKENS 8
#define TILE_MAX_TOKENS 64
#define TILE_PARTS 4
#define TILE_LANE_ROWS 2
#define TILE_VALUES 4
#define TILE_PARTNER 8
#define TILE_LANE_TOKENS 2
#define TILE_ROW_LANES 4, 32

DEVICE u32 reader_part(u32 reader) { return reader % 4; }
DEVICE u32 reader_token(u32 reader) { return reader / 4; }
DEVICE u32 tile_part() { return reader_part(LANE); }
DEVICE u32 tile_row(u32 r) { return LANE / 4 + 8 * r; }
DEVICE u32 tile_sum_row(u32 i) { return LANE / 4 + i / 2 * 8; }
DEVICE u32 tile_sum_token(u32 i) { return LANE % 4 * 2 + i % 2; }

DEVICE void mma_m16n8k16(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(FORGE_HARNESS)
    tile_collective<16>(
        sum, (const f16 *)a, 8, (const f16 *)b, 4,
        [](u32 row, u32 k) { return TilePlace{row % 8 * 4 + k % 8 / 2, row / 8 * 2 + k / 8 * 4 + k % 2}; },
        [](u32 k, u32 column) { return TilePlace{column * 4 + k % 8 / 2, k / 8 * 2 + k % 2}; }, tile_sum_row, tile_sum_token);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <u32 N> DEVICE void tile_multiply(float (&sum)[4], const f16_quad (&weights)[2][N], const f16_quad (&x)[N]) {
    UNROLL for (u32 q = 0; q < N; ++q) {
        u32 a[4] = {weights[0][q].v[0], weights[1][q].v[0], weights[0][q].v[1], weights[1][q].v[1]};
        mma_m16n8k16(sum, a, x[q].v);
    }
}
#endif
