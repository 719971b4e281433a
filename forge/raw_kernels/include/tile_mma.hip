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
#define HAS_TILE_LOADS 1
DEVICE u32 tile_x_row(u32 part, u32 i) { return part * 2 + i % 2 + i / 2 * 8; }
// Of 8 x 8 numbers a lane holds two neighbours in row LANE / 4, behind it two in column LANE / 4.
DEVICE u32 transpose_8x8(u32 own) {
#if defined(FORGE_HARNESS)
    const f16(*all)[32] = (const f16(*)[32])forge_share(&own, sizeof own);
    u32 column = LANE / 4, from = LANE % 4 * 8 + column / 2; // the lane with row 2 * (LANE % 4)
    return all[from][column % 2].bits | (u32)all[from + 4][column % 2].bits << 16;
#else
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(own));
    return y;
#endif
}
DEVICE void tile_as_x(const float (&sum)[4], f16_quad (&x)[1]) {
    x[0] = u32x2{{transpose_8x8(to_f16x2(sum[0], sum[1])), transpose_8x8(to_f16x2(sum[2], sum[3]))}};
}
// Four 8 x 8 matrices of LDS: the lane gives a row of one, lanes of each eighth in order, and gets two neighbours in row LANE / 4 of each,
// or, transposed, in column LANE / 4.
template <bool TRANSPOSED> DEVICE void load_8x8(const f16 *row, u32 &a, u32 &b, u32 &c, u32 &d) {
#if defined(FORGE_HARNESS)
    const f16 *const(*all)[8] = (const f16 *const(*)[8])forge_share(&row, sizeof row);
    u32 *to[] = {&a, &b, &c, &d}, first = LANE / 4, second = LANE % 4 * 2;
    for (u32 i = 0; i < 4; ++i)
        *to[i] = TRANSPOSED ? all[i * 8 + second][0][first].bits | (u32)all[i * 8 + second + 1][0][first].bits << 16
                            : all[i * 8 + first][0][second].bits | (u32)all[i * 8 + first][0][second + 1].bits << 16;
#else
    u32 address = (u32)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address));
#endif
}
template <u32 N> DEVICE void tile_load(const f16 *rows, u32 stride, f16_quad (&weights)[2][N], u32 q) {
    const f16 *own = rows + LANE % 16 * stride + LANE / 16 * 8;
    load_8x8<false>(own, weights[0][q].v[0], weights[1][q].v[0], weights[0][q].v[1], weights[1][q].v[1]);
}
DEVICE void tile_load_transposed(const f16 *rows, u32 stride, f16_quad (&weights)[2][1]) {
    const f16 *own = rows + (LANE / 16 * 8 + LANE % 8) * stride + LANE / 8 % 2 * 8;
    load_8x8<true>(own, weights[0][0].v[0], weights[1][0].v[0], weights[0][0].v[1], weights[1][0].v[1]);
}
DEVICE void tile_load_x(const f16 *rows, u32 stride, f16_quad (&x)[2]) {
    load_8x8<false>(rows + LANE % 8 * stride + LANE / 8 * 8, x[0].v[0], x[0].v[1], x[1].v[0], x[1].v[1]);
}
#endif
