// Rows in LDS as wgmma of NVIDIA's Hopper reads them: lines of 64 float16 numbers, 128 bytes, swizzled in blocks of 8 rows.
//
//   GROUP_WAVES     Waves of a group (warpgroup), which multiplies together.
//   GroupRows<N>    N rows of 64 numbers, LINE pieces of 8; piece p of row r lies in [r][line_place(r, p)].
//   group_landed()  Makes what the thread's copies brought, or what it waited for, visible to the matrix cores: before the barrier
//                   behind which they read it, or behind the wait.
//   group_descriptor(rows, ahead)  What wgmma is told of rows: where they lie, and the bytes to further lines of the same rows.
//
// Source: the PTX ISA on wgmma's matrix descriptors and on the layout of 128 bytes with swizzle.

#define GROUP_WAVES 4
#define LINE 8

template <u32 N> struct alignas(1024) GroupRows {
    u32x4 v[N][LINE];
};
DEVICE u32 line_place(u32 row, u32 piece) { return piece ^ row % 8; }

#if defined(FORGE_HARNESS)
// Products by wgmma start with the operands' addresses and are computed when they are awaited, from the operands as they are then.
extern "C" {
void forge_start(void (*finish)(void *const *), void *a, void *b, void *c, void *d);
void forge_commit(void);
void forge_await(u32 batches);
}
DEVICE void group_landed() {}
// Number k of a row as the matrix cores find it: by its address, of which bits 4 to 6 are exchanged by bits 7 to 9.
template <u32 N> DEVICE f16 line_number(const GroupRows<N> *lines, u32 row, u32 k) {
    u32 at = row * 128 + k % 64 * 2;
    return *(const f16 *)((const char *)&lines[k / 64] + (at ^ at >> 3 & 0x70));
}
#else
DEVICE void group_landed() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
// Blocks of 8 rows lie 1,024 bytes apart.
DEVICE u64 group_descriptor(const void *rows, u32 ahead = 16) {
    return (u64)((u32)__cvta_generic_to_shared(rows) >> 4 & 0x3fff) | (u64)(ahead >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
#endif
