// Products by wgmma.m64nNk16 of NVIDIA's Hopper whose sums are 64 rows x N: a group's left rows come from LDS or from registers, the
// right ones from LDS, float16; sums are float32. A wave has 16 of the rows.
//
//   Sums<N>         A lane's sums: of its two rows, group_row(0) and group_row(1) of the 64, at the columns group_column(t) and the
//                   next of each tile t of 8 columns, in v[t][2 * row + i].
//   Weights<K>      Left rows in registers: those that a lane has the sums of, K columns, packed from sums by pack_weights.
//   group_begin()   Before products of registers, or into sums, that were written otherwise.
//   group_scores<DIM>(sum, left, first, right)  Starts sum = left . right.T; rows of DIM numbers in lines: 64 on the left from `first`
//                   on, N on the right.
//   group_weighted(sum, weights, right)  Starts sum += weights . right; K rows of N numbers in lines.
//   group_commit()  What was started since the last is a batch.
//   group_wait<N>() Until all of the group's batches but the last N have ended; sums of those that have are there behind arrived(sum).
//
// Source: the PTX ISA on wgmma.

template <u32 N> struct Sums {
    float v[N / 8][4];
};
template <u32 K> struct Weights {
    u32 v[K / 16][4];
};
DEVICE u32 group_row(u32 r) { return THREAD / 32 % GROUP_WAVES * 16 + LANE / 4 + 8 * r; }
DEVICE u32 group_column(u32 t) { return t * 8 + LANE % 4 * 2; }
template <u32 N> DEVICE void pack_weights(const Sums<N> &sum, Weights<N> &weights) {
    UNROLL for (u32 k = 0; k < N / 16; ++k)
        UNROLL for (u32 i = 0; i < 4; ++i) weights.v[k][i] = to_f16x2(sum.v[2 * k + i / 2][i % 2 * 2], sum.v[2 * k + i / 2][i % 2 * 2 + 1]);
}

#if defined(FORGE_HARNESS)
DEVICE void group_begin() {}
DEVICE void group_commit() { forge_commit(); }
template <u32 N> DEVICE void group_wait() { forge_await(N); }
template <u32 N> DEVICE void arrived(Sums<N> &) {}
template <u32 DIM, u32 ROWS, u32 N> DEVICE void compute_scores(void *const *operands) {
    Sums<N> &sum = *(Sums<N> *)operands[0];
    const GroupRows<ROWS> *left = (const GroupRows<ROWS> *)operands[1];
    const GroupRows<N> *right = (const GroupRows<N> *)operands[2];
    for (u32 r = 0; r < 2; ++r) {
        float own[DIM];
        u32 row = (u32)(u64)operands[3] + group_row(r);
        for (u32 k = 0; k < DIM; ++k) own[k] = to_float(line_number(left, row, k));
        for (u32 n = 0; n < N / 4; ++n) {
            u32 other = group_column(n / 2) + n % 2;
            float dot = 0;
            for (u32 k = 0; k < DIM; ++k) dot += own[k] * to_float(line_number(right, other, k));
            sum.v[n / 2][2 * r + n % 2] = dot;
        }
    }
}
template <u32 DIM, u32 ROWS, u32 N, u32 LINES> DEVICE void group_scores(Sums<N> &sum, const GroupRows<ROWS> (&left)[LINES], u32 first, const GroupRows<N> (&right)[LINES]) {
    forge_start(compute_scores<DIM, ROWS, N>, &sum, (void *)left, (void *)right, (void *)(u64)first);
}
template <u32 N, u32 K> DEVICE void add_weighted(void *const *operands) {
    Sums<N> &sum = *(Sums<N> *)operands[0];
    const Weights<K> &weights = *(const Weights<K> *)operands[1];
    const GroupRows<K> *right = (const GroupRows<K> *)operands[2];
    for (u32 k = 0; k < K / 16; ++k) {
        const u32(*all)[16] = (const u32(*)[16])forge_share(weights.v[k], sizeof weights.v[k]);
        for (u32 r = 0; r < 2; ++r)
            for (u32 i = 0; i < 16; ++i) {
                u32 word = all[LANE / 4 * 4 + i % 8 / 2][i / 8 * 2 + r], row = 16 * k + i;
                float weight = to_float(f16{(u16)(word >> 16 * (i % 2))});
                for (u32 n = 0; n < N / 4; ++n) sum.v[n / 2][2 * r + n % 2] += weight * to_float(line_number(right, row, group_column(n / 2) + n % 2));
            }
    }
}
template <u32 N, u32 K, u32 LINES> DEVICE void group_weighted(Sums<N> &sum, const Weights<K> &weights, const GroupRows<K> (&right)[LINES]) {
    forge_start(add_weighted<N, K>, &sum, (void *)&weights, (void *)right, nullptr);
}
#else
DEVICE void group_begin() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <u32 N> DEVICE void group_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory"); }
template <u32 N> DEVICE void arrived(Sums<N> &sum) {
    UNROLL for (u32 t = 0; t < N / 8; ++t)
        UNROLL for (u32 i = 0; i < 4; ++i) asm volatile("" : "+f"(sum.v[t][i]) : : "memory");
}

#define NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NUMBERS_16 NUMBERS_8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_24 NUMBERS_16 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define NUMBERS_32 NUMBERS_24 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_40 NUMBERS_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define NUMBERS_48 NUMBERS_40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define NUMBERS_56 NUMBERS_48 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define NUMBERS_64 NUMBERS_56 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_72 NUMBERS_64 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define NUMBERS_80 NUMBERS_72 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define NUMBERS_88 NUMBERS_80 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define NUMBERS_96 NUMBERS_88 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define NUMBERS_104 NUMBERS_96 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define NUMBERS_112 NUMBERS_104 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define NUMBERS_120 NUMBERS_112 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define NUMBERS_128 NUMBERS_120 ", " "%120, %121, %122, %123, %124, %125, %126, %127"
#define TILE_SUMS(t) "+f"(sum.v[t][0]), "+f"(sum.v[t][1]), "+f"(sum.v[t][2]), "+f"(sum.v[t][3])
#define SUMS_16(t) TILE_SUMS(t), TILE_SUMS(t + 1), TILE_SUMS(t + 2), TILE_SUMS(t + 3)
#define SUMS_32 SUMS_16(0), SUMS_16(4)
#define SUMS_40 SUMS_32, TILE_SUMS(8), TILE_SUMS(9)
#define SUMS_48 SUMS_32, SUMS_16(8)
#define SUMS_64 SUMS_48, SUMS_16(12)
#define SUMS_96 SUMS_64, SUMS_16(16), SUMS_16(20)
#define SUMS_128 SUMS_96, SUMS_16(24), SUMS_16(28)
// Of N columns, with N / 2 sums; then the numbers of the operands behind them. Without ADD the sums are set.
#define WGMMA_FORMS(N, COUNT, A, B, C, D, E, F)                                                                                           \
    template <u32 ADD> DEVICE void wgmma_16(Sums<N> &sum, u64 left, u64 right) {                                                             \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NUMBERS_##COUNT "}, " A ", " B ", " C ", 1, 1, 0, 0;"        \
            : SUMS_##COUNT                                                                                                                   \
            : "l"(left), "l"(right), "n"(ADD));                                                                                              \
    }                                                                                                                                        \
    template <u32 ADD> DEVICE void wgmma_16(Sums<N> &sum, const u32(&left)[4], u64 right) {                                   \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NUMBERS_##COUNT "}, {" A ", " B ", " C ", " D "}, " E        \
            ", " F ", 1, 1, 1;"                                                                                                          \
            : SUMS_##COUNT                                                                                                                   \
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "n"(ADD));                                 \
    }
WGMMA_FORMS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_FORMS(80, 40, "%40", "%41", "%42", "%43", "%44", "%45")
WGMMA_FORMS(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
WGMMA_FORMS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_FORMS(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
WGMMA_FORMS(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

template <u32 DIM, u32 ROWS, u32 N, u32 LINES> DEVICE void group_scores(Sums<N> &sum, const GroupRows<ROWS> (&left)[LINES], u32 first, const GroupRows<N> (&right)[LINES]) {
    u64 a = group_descriptor(&left[0].v[first]), b = group_descriptor(&right[0]);
    UNROLL for (u32 k = 0; k < DIM / 16; ++k) { // 16 numbers of a line are 32 bytes, a descriptor counts in 16
        u32 within = k % 4 * 2;
        if (k == 0)
            wgmma_16<0>(sum, a, b);
        else
            wgmma_16<1>(sum, a + k / 4 * (ROWS * 8) + within, b + k / 4 * (N * 8) + within);
    }
}
template <u32 N, u32 K, u32 LINES> DEVICE void group_weighted(Sums<N> &sum, const Weights<K> &weights, const GroupRows<K> (&right)[LINES]) {
    u64 b = group_descriptor(&right[0], sizeof right[0]);
    UNROLL for (u32 k = 0; k < K / 16; ++k) wgmma_16<1>(sum, weights.v[k], b + k * 128);
}
#endif
