// The contract of prelude.hip on NVIDIA: NVRTC and inline PTX.

#if defined(FORGE_CUDA)
#define KERNEL(threads) extern "C" __global__ __launch_bounds__(threads, MIN_BLOCKS) void
#define SHARED __shared__
#define CONSTANT static __device__ const
#define DYNAMIC_SHARED(type, name, count)                     \
    extern __shared__ __align__(1024) u32x4 dynamic_shared[]; \
    type(&name)[count] = *(type(*)[count])dynamic_shared
#define UNROLL _Pragma("unroll")
#define THREAD (threadIdx.x)
#define BLOCK_X (blockIdx.x)
#define BLOCK_Y (blockIdx.y)
#define BLOCK_Z (blockIdx.z)
#define WAVE 32u
#define STATIC_WAVE WAVE
#define LANE (threadIdx.x & 31u)
#define barrier() __syncthreads()
DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" : : : "memory"); } // weaker than __threadfence
#define lds_barrier() __syncthreads()
#define wave_sync() __syncwarp()
#if __CUDA_ARCH__ >= 900
#define HAS_PDL 1
DEVICE void grid_dependency_sync() {
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
    asm volatile("griddepcontrol.wait;" : : : "memory");
}
DEVICE void late_grid_dependency_sync() {
    asm volatile("griddepcontrol.wait;" : : : "memory");
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}
DEVICE void start_next_launch() { asm volatile("griddepcontrol.launch_dependents;" : : : "memory"); }
#else
#define HAS_PDL 0
DEVICE void start_next_launch() {}
DEVICE void grid_dependency_sync() {}
DEVICE void late_grid_dependency_sync() {}
#endif
#if __CUDA_ARCH__ >= 800
#define HAS_COPY_ASYNC 1
DEVICE void copy_async(u32x4 *to, const u32x4 *from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" : : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16u : 0u) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <u32 N> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }
#else
#define HAS_COPY_ASYNC 0
#endif
DEVICE void compiler_fence(float &x) { asm volatile("" : "+f"(x) : : "memory"); }
DEVICE void compiler_fence(u32 &x) { asm volatile("" : "+r"(x) : : "memory"); }

DEVICE float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE f16 to_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
DEVICE u32 to_f16x2(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return (u32)to_f16(high).bits << 16 | to_f16(low).bits;
#endif
}
DEVICE float as_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 as_u32(float x) { return __float_as_uint(x); }
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fast_max(float a, float b) { return fmaxf(a, b); }
DEVICE float fast_log(float x) { return __logf(x); }
DEVICE float fast_rsqrt(float x) { return rsqrtf(x); }
DEVICE u32 shfl_bits(u32 x, u32 lane) { return __shfl_sync(0xffffffffu, x, (int)lane); }
DEVICE u64 wave_ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
DEVICE u32 popcount(u64 x) { return (u32)__popcll(x); }
DEVICE u32 atomic_add(u32 *p, u32 x) { return atomicAdd(p, x); }
DEVICE u64 atomic_add(u64 *p, u64 x) { return atomicAdd(p, x); }
DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// In PTX, because CuPy compiles with -ftz=true.
#define ROUNDED(name, instruction)                                           \
    DEVICE float name(float a, float b) {                                    \
        float y;                                                             \
        asm(instruction " %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));          \
        return y;                                                            \
    }
ROUNDED(add_rn, "add.rn.f32")
ROUNDED(mul_rn, "mul.rn.f32")
ROUNDED(div_rn, "div.rn.f32")
DEVICE float sqrt_rn(float x) {
    float y;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }
DEVICE u32 mul_high(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE u64 mul_high(u64 a, u64 b) { return __umul64hi(a, b); }
DEVICE i32 dot4(u32 a, u32 b, i32 c) { return __dp4a((i32)a, (i32)b, c); }
DEVICE u32x4 load_streaming(const u32x4 *p) {
    u32x4 y;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(y.v[0]), "=r"(y.v[1]), "=r"(y.v[2]), "=r"(y.v[3]) : "l"(p));
    return y;
}
DEVICE i32 load_l2(const i32 *p) {
    i32 y;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(y) : "l"(p) : "memory");
    return y;
}
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
DEVICE u32 add_f16x2(u32 a, u32 b) {
    u32 y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
DEVICE u32 byte_perm(u32 high, u32 low, u32 places) { // the instruction takes places as four nibbles
    return __byte_perm(low, high, __byte_perm(places | places >> 4, 0, 0x4420));
}
#define HAS_NIBBLE_PERM 1
// Places as the instruction takes them: a nibble names a byte, or with its highest bit what all bits of that byte's sign make.
DEVICE u32 nibble_perm(u32 low, u32 high, u32 places) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(places));
    return y;
}
// A constant that the compiler takes for a lane's own. It keeps others where this instruction does not take them from.
DEVICE u32 in_register(u32 x) {
    u32 multiprocessors;
    asm("mov.u32 %0, %%nsmid;" : "=r"(multiprocessors));
    return x | (multiprocessors >> 24) * THREAD;
}
// Lower and upper nibbles of two bytes at once. The compiler computes once what both halves of a word need.
DEVICE u32 nibbles_apart(u32 first, u32 second, bool upper) { return nibble_perm(first, second, upper ? 0x7531u : 0x6420u); }
DEVICE u32 pick_8(const u32x2 &table, u32 word, bool upper) {
    u32 early = in_register(table.v[0]);
    return nibbles_apart(nibble_perm(early, table.v[1], word), nibble_perm(early, table.v[1], word >> 16), upper);
}
DEVICE u32 pick_16(const u32x4 &table, u32 word, bool upper) {
    u32 places = word & 0x77777777u, four = word << 4;
    u32 last = nibble_perm(four, word, 0xd9c8u), last_too = nibble_perm(four, word, 0xfbeau);
    u32 early = in_register(table.v[0]), late = in_register(table.v[2]);
    u32 first = nibble_perm(early, table.v[1], places) & ~last | nibble_perm(late, table.v[3], places) & last;
    places >>= 16;
    u32 second = nibble_perm(early, table.v[1], places) & ~last_too | nibble_perm(late, table.v[3], places) & last_too;
    return nibbles_apart(first, second, upper);
}
#endif
