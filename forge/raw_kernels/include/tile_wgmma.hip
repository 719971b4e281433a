// Products by wgmma.m64nNk16 of NVIDIA's Hopper: a warpgroup of four waves reads 64 rows of weights and N = TOKENS rows of x from LDS,
// float16, and accumulates in float32. A lane's accumulators lie as those of mma: of its wave's 16 rows.
//
//   group_multiply(sum, weights, x)  Starts sum += weights . x. No thread may store to these rows before group_await.
//   group_await(sum)  Waits for all products that were started.
//
// Source: the PTX ISA on wgmma.

#if defined(FORGE_HARNESS)
DEVICE void group_await(float (&)[TOKEN_TILES][TILE_VALUES]) {}
DEVICE void group_multiply(float (&sum)[TOKEN_TILES][TILE_VALUES], const GroupRows<64> &weights, const GroupRows<TOKENS> &x) {
    for (u32 m = 0; m < TOKEN_TILES; ++m)
        for (u32 i = 0; i < TILE_VALUES; ++i) {
            u32 row = THREAD / TILE_WAVE % GROUP_WAVES * 16 + tile_sum_row(i), token = m * TILE_TOKENS + tile_sum_token(i);
            for (u32 k = 0; k < 8 * LINE; ++k) sum[m][i] += to_float(line_number(&weights, row, k)) * to_float(line_number(&x, token, k));
        }
}
#else
DEVICE void group_await(float (&sum)[TOKEN_TILES][TILE_VALUES]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) asm volatile("" : "+f"(sum[m][i]) : : "memory");
}
DEVICE void wgmma_16(float (&sum)[TOKEN_TILES][TILE_VALUES], u64 weights, u64 x) {
#if TOKENS == 8
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3])
        : "l"(weights), "l"(x));
#elif TOKENS == 16
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;"
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]), "+f"(sum[1][2]), "+f"(sum[1][3])
        : "l"(weights), "l"(x));
#elif TOKENS == 32
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]), "+f"(sum[1][2]), "+f"(sum[1][3]),
          "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]), "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3])
        : "l"(weights), "l"(x));
#elif TOKENS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]), "+f"(sum[1][2]), "+f"(sum[1][3]),
          "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]), "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3]),
          "+f"(sum[4][0]), "+f"(sum[4][1]), "+f"(sum[4][2]), "+f"(sum[4][3]), "+f"(sum[5][0]), "+f"(sum[5][1]), "+f"(sum[5][2]), "+f"(sum[5][3]),
          "+f"(sum[6][0]), "+f"(sum[6][1]), "+f"(sum[6][2]), "+f"(sum[6][3]), "+f"(sum[7][0]), "+f"(sum[7][1]), "+f"(sum[7][2]), "+f"(sum[7][3])
        : "l"(weights), "l"(x));
#endif
}
DEVICE void group_multiply(float (&sum)[TOKEN_TILES][TILE_VALUES], const GroupRows<64> &weights, const GroupRows<TOKENS> &x) {
    u64 a = group_descriptor(&weights), b = group_descriptor(&x);
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
    UNROLL for (u32 k = 0; k < LINE / 2; ++k) wgmma_16(sum, a + 2 * k, b + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
#endif
