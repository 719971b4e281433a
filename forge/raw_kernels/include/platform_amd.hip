// The contract of prelude.hip on AMD: compiler builtins alone, so that hipRTC, hipcc and a plain clang compile the same text.

#if defined(FORGE_HIP)
#define KERNEL(threads) extern "C" __attribute__((global, amdgpu_flat_work_group_size(threads, threads))) void
#define SHARED __attribute__((shared))
#define CONSTANT static const __attribute__((device))
#define DYNAMIC_SHARED(type, name, count) SHARED type name[count]
#define UNROLL _Pragma("unroll")
#define THREAD ((u32)__builtin_amdgcn_workitem_id_x())
#define BLOCK_X ((u32)__builtin_amdgcn_workgroup_id_x())
#define BLOCK_Y ((u32)__builtin_amdgcn_workgroup_id_y())
#define BLOCK_Z ((u32)__builtin_amdgcn_workgroup_id_z())
#if defined(__GFX9__)
#define WAVE 64u
#define LANE __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u))
#elif defined(__GFX10__) || defined(__GFX11__) || defined(__GFX12__)
#define WAVE 32u
#define LANE __builtin_amdgcn_mbcnt_lo(~0u, 0u)
#else
#error forge has no kernels for this GPU: the size of its waves is not known
#endif
#define STATIC_WAVE WAVE
// The matrix instructions of the target, 16 x 16 x 16. Compilers offer those of RDNA 3 and 4 for gfx1250 too, which has 16 x 16 x 32
// in their place.
#if __has_builtin(__builtin_amdgcn_mfma_f32_16x16x16f16)
#define HAS_MFMA 1
#elif __has_builtin(__builtin_amdgcn_wmma_f32_16x16x32_f16)
#elif __has_builtin(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12)
#define HAS_WMMA_12 1
#elif __has_builtin(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32)
#define HAS_WMMA_11 1
#endif

DEVICE void barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
DEVICE void fence_device() { __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "agent"); }
// On RDNA the fences of `barrier` wait for all loads from memory, also for those needed later. So does the compiler before a barrier
// that it recognizes.
DEVICE void lds_barrier() {
#if __has_builtin(__builtin_amdgcn_s_barrier_signal)
    asm volatile("s_wait_dscnt 0x0\n\ts_barrier_signal -1\n\ts_barrier_wait -1" ::: "memory");
#else
    asm volatile("s_waitcnt lgkmcnt(0)\n\ts_barrier" ::: "memory");
#endif
}
DEVICE void wave_sync() {
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
}
template <typename T> DEVICE void compiler_fence(T &x) { asm volatile("" : "+v"(x) : : "memory"); }
DEVICE float fast_exp2(float x) { return __builtin_amdgcn_exp2f(x); }
DEVICE float fast_log(float x) { return __builtin_logf(x); }
DEVICE float fast_rsqrt(float x) { return __builtin_amdgcn_rsqf(x); }
DEVICE u32 shfl_bits(u32 x, u32 lane) { return (u32)__builtin_amdgcn_ds_bpermute((int)(lane << 2), (int)x); }
DEVICE u64 wave_ballot(bool p) {
#if WAVE == 64u
    return __builtin_amdgcn_uicmpl((u64)p, 0ull, 33);
#else
    return (u32)__builtin_amdgcn_uicmp((u32)p, 0u, 33);
#endif
}
DEVICE u32 atomic_add(u32 *p, u32 x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
DEVICE u64 atomic_add(u64 *p, u64 x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
DEVICE float add_rn(float a, float b) {
#pragma clang fp contract(off)
    return a + b;
}
DEVICE float mul_rn(float a, float b) {
#pragma clang fp contract(off)
    return a * b;
}
// A float32 division would switch the mode for subnormals back and forth, because CuPy compiles with subnormals flushed. A division of
// doubles does not, and rounding its result to float is exact, because 53 bits are more than 2 * 24 + 1. The asm keeps the compiler
// from turning it back.
DEVICE float div_rn(float a, float b) {
    double quotient = (double)a / (double)b;
    asm("" : "+v"(quotient));
    return (float)quotient;
}
DEVICE float sqrt_rn(float x) { // as div_rn
    double root = __builtin_sqrt((double)x);
    asm("" : "+v"(root));
    return (float)root;
}
DEVICE float fast_divide(float a, float b) { return a * __builtin_amdgcn_rcpf(b); }
DEVICE u32 byte_perm(u32 high, u32 low, u32 places) { return __builtin_amdgcn_perm(high, low, places); }
typedef u32 words_t __attribute__((ext_vector_type(4)));
DEVICE u32x4 load_streaming(const u32x4 *p) { return __builtin_bit_cast(u32x4, __builtin_nontemporal_load((const words_t *)p)); }
typedef _Float16 half2_t __attribute__((ext_vector_type(2)));
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
#pragma clang fp contract(fast)
    return __builtin_bit_cast(u32, __builtin_bit_cast(half2_t, a) * __builtin_bit_cast(half2_t, b) + __builtin_bit_cast(half2_t, c));
}
DEVICE u32 add_f16x2(u32 a, u32 b) { return __builtin_bit_cast(u32, __builtin_bit_cast(half2_t, a) + __builtin_bit_cast(half2_t, b)); }
// Targets have v_dot4_i32_i8, or v_dot4_i32_iu8 from RDNA 3 on. The first ones of GFX9 and of RDNA have neither.
DEVICE i32 dot4(u32 a, u32 b, i32 c) {
#if __has_builtin(__builtin_amdgcn_sdot4)
    return __builtin_amdgcn_sdot4((i32)a, (i32)b, c, false);
#elif __has_builtin(__builtin_amdgcn_sudot4)
    return __builtin_amdgcn_sudot4(true, (i32)a, true, (i32)b, c, false);
#else
    return dot4_bytes(a, b, c);
#endif
}
#endif
