// Products by wgmma.m64nNk16 of NVIDIA's Hopper: a warpgroup of four waves reads N = TOKENS rows of x from LDS, and 64 rows of weights
// from LDS or from its registers, float16, and accumulates in float32. A lane's accumulators, and its weights, lie as those of mma: of
// its wave's 16 rows.
//
//   group_multiply(sum, weights, x)  Starts sum += weights . x. No thread may store to these rows before group_await. With weights in
//                   registers the n-th GroupRows behind x may be meant: group_multiply(sum, weights, x, n).
//                   weights: GroupRows<64>, or the lane's u32 [4][4] of mma.m16n8k16 for each 16 of the 64 numbers, which must not
//                   change before the products are awaited.
//   group_await(sum)  Waits for all products that were started.
//   group_await_but<N>()  Waits for all but the N group_multiply that were started last.
//   kept(x)         A number or an address that the compiler keeps in a register: it would compute it again for each line.
//
// Source: the PTX ISA on wgmma.

#if defined(FORGE_HARNESS)
template <typename T> DEVICE T kept(T x) { return x; }
DEVICE void group_await(float (&)[TOKEN_TILES][TILE_VALUES]) { forge_await(0); }
template <u32 N> DEVICE void group_await_but() { forge_await(N); }
DEVICE void add_product(void *const *operands) {
    typedef float Accumulators[TOKEN_TILES][TILE_VALUES];
    typedef u32 Weights[4][4];
    Accumulators &sum = *(Accumulators *)operands[0];
    const Weights &weights = *(const Weights *)operands[1];
    for (u32 step = 0; step < 4; ++step) {
        const f16(*all)[32] = (const f16(*)[32])forge_share(weights[step], sizeof weights[step]);
        for (u32 m = 0; m < TOKEN_TILES; ++m)
            for (u32 i = 0; i < TILE_VALUES; ++i)
                for (u32 k = 0; k < 16; ++k) {
                    f16 weight = all[tile_sum_row(i) % 8 * 4 + k % 8 / 2][tile_sum_row(i) / 8 * 2 + k / 8 * 4 + k % 2];
                    f16 other = line_number((const GroupRows<TOKENS> *)operands[2], m * TILE_TOKENS + tile_sum_token(i), step * 16 + k);
                    sum[m][i] += to_float(weight) * to_float(other);
                }
    }
}
DEVICE void group_multiply(float (&sum)[TOKEN_TILES][TILE_VALUES], const u32 (&weights)[4][4], const GroupRows<TOKENS> &x, u32 n = 0) {
    forge_start(add_product, sum, (void *)weights, (void *)(&x + n), nullptr);
    forge_commit();
}
DEVICE void add_product_of_lds(void *const *operands) {
    typedef float Accumulators[TOKEN_TILES][TILE_VALUES];
    Accumulators &sum = *(Accumulators *)operands[0];
    const GroupRows<64> *weights = (const GroupRows<64> *)operands[1];
    const GroupRows<TOKENS> *x = (const GroupRows<TOKENS> *)operands[2];
    for (u32 m = 0; m < TOKEN_TILES; ++m)
        for (u32 i = 0; i < TILE_VALUES; ++i) {
            u32 row = THREAD / TILE_WAVE % GROUP_WAVES * 16 + tile_sum_row(i), token = m * TILE_TOKENS + tile_sum_token(i);
            for (u32 k = 0; k < 8 * LINE; ++k) sum[m][i] += to_float(line_number(weights, row, k)) * to_float(line_number(x, token, k));
        }
}
DEVICE void group_multiply(float (&sum)[TOKEN_TILES][TILE_VALUES], const GroupRows<64> &weights, const GroupRows<TOKENS> &x) {
    forge_start(add_product_of_lds, sum, (void *)&weights, (void *)&x, nullptr);
    forge_commit();
}
#else
DEVICE const u32x4 *kept(const u32x4 *x) {
    asm volatile("" : "+l"(x));
    return x;
}
DEVICE u32 kept(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
DEVICE void group_await(float (&sum)[TOKEN_TILES][TILE_VALUES]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) asm volatile("" : "+f"(sum[m][i]) : : "memory");
}
template <u32 N> DEVICE void group_await_but() { asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory"); }
// The operands of a wgmma: accumulators, then weights and x in LDS (a descriptor each), or weights in registers and x in LDS.
#define SUM_1(m) "+f"(sum[m][0]), "+f"(sum[m][1]), "+f"(sum[m][2]), "+f"(sum[m][3])
#define SUM_2(m) SUM_1(m), SUM_1(m + 1)
#define SUM_4(m) SUM_2(m), SUM_2(m + 2)
#define SUM_8(m) SUM_4(m), SUM_4(m + 4)
#define SUM_16(m) SUM_8(m), SUM_8(m + 8)
#define SUM_32(m) SUM_16(m), SUM_16(m + 16)
#define TEXT_1 "%0, %1, %2, %3"
#define TEXT_2 TEXT_1 ", %4, %5, %6, %7"
#define TEXT_4 TEXT_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TEXT_8 TEXT_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT_16 TEXT_8 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TEXT_32 TEXT_16 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#if TOKENS == 8
#define SUM SUM_1(0)
#define WGMMA "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {" TEXT_1 "}, "
#define FROM_LDS "%4, %5, 1, 1, 1, 0, 0;"
#define FROM_REGISTERS "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
#elif TOKENS == 16
#define SUM SUM_2(0)
#define WGMMA "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {" TEXT_2 "}, "
#define FROM_LDS "%8, %9, 1, 1, 1, 0, 0;"
#define FROM_REGISTERS "{%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
#elif TOKENS == 32
#define SUM SUM_4(0)
#define WGMMA "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" TEXT_4 "}, "
#define FROM_LDS "%16, %17, 1, 1, 1, 0, 0;"
#define FROM_REGISTERS "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
#elif TOKENS == 64
#define SUM SUM_8(0)
#define WGMMA "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TEXT_8 "}, "
#define FROM_LDS "%32, %33, 1, 1, 1, 0, 0;"
#define FROM_REGISTERS "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
#elif TOKENS == 128
#define SUM SUM_16(0)
#define WGMMA "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TEXT_16 "}, "
#define FROM_LDS "%64, %65, 1, 1, 1, 0, 0;"
#define FROM_REGISTERS "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
#elif TOKENS == 256
#define SUM SUM_32(0)
#define WGMMA "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" TEXT_32 "}, "
#define FROM_LDS "%128, %129, 1, 1, 1, 0, 0;"
#define FROM_REGISTERS "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
#endif
DEVICE void wgmma_16(float (&sum)[TOKEN_TILES][TILE_VALUES], u64 weights, u64 x) { asm volatile(WGMMA FROM_LDS : SUM : "l"(weights), "l"(x)); }
DEVICE void wgmma_16(float (&sum)[TOKEN_TILES][TILE_VALUES], const u32 (&a)[4], u64 x) {
    asm volatile(WGMMA FROM_REGISTERS : SUM : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
}
DEVICE void group_multiply(float (&sum)[TOKEN_TILES][TILE_VALUES], const GroupRows<64> &weights, const GroupRows<TOKENS> &x) {
    u64 a = group_descriptor(&weights), b = group_descriptor(&x);
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
    UNROLL for (u32 k = 0; k < LINE / 2; ++k) wgmma_16(sum, a + 2 * k, b + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
DEVICE void group_multiply(float (&sum)[TOKEN_TILES][TILE_VALUES], const u32 (&weights)[4][4], const GroupRows<TOKENS> &x, u32 n = 0) {
    u64 b = group_descriptor(&x) + n * (sizeof(x) / 16);
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
    UNROLL for (u32 k = 0; k < LINE / 2; ++k) wgmma_16(sum, weights[k], b + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
#endif
