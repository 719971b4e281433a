// What the contract of prelude.hip says of AMD and of the harness alike: both compile with clang, and launches do not overlap there.

#if !defined(FORGE_CUDA)
#define HAS_PDL 0
DEVICE void start_next_launch() {}
DEVICE void grid_dependency_sync() {}
DEVICE void late_grid_dependency_sync() {}
DEVICE i32 load_l2(const i32 *p) { return *p; }
DEVICE float to_float(f16 x) { return (float)__builtin_bit_cast(_Float16, x.bits); }
DEVICE f16 to_f16(float x) { return f16{__builtin_bit_cast(u16, (_Float16)x)}; }
DEVICE float fast_max(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE u32 to_f16x2(float low, float high) { return (u32)to_f16(high).bits << 16 | to_f16(low).bits; }
DEVICE float as_float(u32 x) { return __builtin_bit_cast(float, x); }
DEVICE u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
DEVICE u32 popcount(u64 x) { return (u32)__builtin_popcountll(x); }
DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE u32 mul_high(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
DEVICE u64 mul_high(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
DEVICE i32 dot4_bytes(u32 a, u32 b, i32 c) {
    for (u32 i = 0; i < 32; i += 8) c += (i32)(i8)(a >> i) * (i8)(b >> i);
    return c;
}
DEVICE u32 byte_perm(u32 high, u32 low, u32 places);
DEVICE u32 pick_8(const u32x2 &table, u32 word, bool upper) { return byte_perm(table.v[1], table.v[0], word >> 4 * upper & 0x0f0f0f0fu); }
DEVICE u32 pick_16(const u32x4 &table, u32 word, bool upper) {
    u32 four = word >> 4 * upper, place = four & 0x07070707u, last = (four >> 3 & 0x01010101u) * 255;
    return byte_perm(table.v[1], table.v[0], place) & ~last | byte_perm(table.v[3], table.v[2], place) & last;
}
#define HAS_COPY_ASYNC 0
#if !defined(FORGE_HARNESS)
#define HAS_NIBBLE_PERM 0
#endif
#endif
