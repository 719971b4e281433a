// What every kernel stands on. The only platform differences outside the tile files are here: HIP (hipRTC, hipcc or a
// plain clang), CUDA (NVRTC), and the CPU harness of the tests (FORGE_HARNESS). Python puts this text before a kernel's.
//
// Nothing is included and no library is linked: on AMD the few functions needed are the compiler's own builtins, so
// that hipRTC and a plain `clang -nogpuinc -nogpulib` compile the same text.
//
// Rules for kernels:
// - KERNEL(threads) name(parameters): one parameter per line or all on one, types from the list below, pointers to
//   what is only read are const. Python reads this list and checks each launch against it.
// - A block is a fixed number of threads, known when it is compiled, a multiple of 64, in one dimension.
// - WAVE may be a run-time value (it is in the harness): size arrays with MAX_WAVES, loop with `for (i = WAVE / 2; ...)`.
//   What is written for waves of one size says so: static_assert(TILE_WAVE == STATIC_WAVE).
// - LDS is SHARED arrays of fixed size, indexed where they are declared or passed by reference: T (&tile)[N]. On
//   NVIDIA more than 48 KB is DYNAMIC_SHARED(type, name, count), of LDS_BYTES, which -D gives: a launch has it allotted.
// - Blocks of a launch hand results on like this: all threads of the writer write, call fence_device() and meet at a
//   barrier, then one of them counts with atomic_add. Who finds by the count that all are there calls fence_device()
//   in all threads before they read. No block waits for another, and counters are left as zeros.
// - grid_dependency_sync() is where a kernel begins to need what launches of this step stored. One that calls it may be started while
//   the launch before it still runs. Until then it stores nothing, and reads weights, keys and values of earlier steps,
//   and what was stored before the step's last launch that does not call it; that by load_l2, for the near cache may
//   hold what was there before. All threads call it, or none. From there on the next launch may be started.
// - wave_sync() is what lanes of a wave meet at to read what others of them stored to LDS.
// - lds_barrier() is a barrier for LDS alone: what was stored to memory before it is not promised to be seen behind it.
// - Shuffles, ballots and barriers are reached by all threads of a wave (of a block) together, never under a branch
//   that divides them.

#if defined(FORGE_HARNESS)
#define DEVICE static inline
#elif defined(__HIP__) || defined(__HIPCC_RTC__)
#define FORGE_HIP 1
#ifndef __device__
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#endif
#define DEVICE static inline __attribute__((device, always_inline))
#else
#define FORGE_CUDA 1
#define DEVICE static __device__ __forceinline__
#endif

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

// A float16 as it lies in memory; arithmetic is done in float.
struct f16 {
    u16 bits;
};
struct alignas(4) f16x2 {
    f16 x, y;
};
struct alignas(8) f16x4 {
    f16 v[4];
};
struct alignas(16) f16x8 {
    f16 v[8];
};
struct alignas(16) f32x4 {
    float v[4];
};
struct alignas(8) f32x2 {
    float v[2];
};
struct alignas(8) u32x2 {
    u32 v[2];
};
struct alignas(16) u32x4 {
    u32 v[4];
};

#define NEG_INFINITY as_float(0xff800000u)
// A loop that stays one: unrolled, it would hold more registers than there are.
#define ROLLED _Pragma("unroll 1")
#define MAX_WAVES(threads) ((threads) / 32)
// Blocks that a multiprocessor of NVIDIA's is to have registers for, at least; a file may define more before a kernel.
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif

#if defined(FORGE_HARNESS) // ----------------------------------------------------------------------- CPU harness

#define KERNEL(threads) extern "C" __attribute__((noinline)) void
#define SHARED static __attribute__((section("forge_lds")))
#define DYNAMIC_SHARED(type, name, count) SHARED type name[count]
#define TABLE static const
#define UNROLL

extern "C" {
struct ForgeThread {
    u32 thread, lane;
    u32 block[3];
};
extern ForgeThread *forge_self;
extern u32 forge_wave;
void forge_barrier(void);
u64 forge_shuffle(u64 value, u32 lane);
u64 forge_ballot(u32 predicate);
const void *forge_share(const void *own, u64 bytes); // what all lanes of the wave gave, 64 bytes for each
void forge_fence(void);
void forge_count(const void *at); // comes before an atomic addition
}
#define THREAD (forge_self->thread)
#define BLOCK_X (forge_self->block[0])
#define BLOCK_Y (forge_self->block[1])
#define BLOCK_Z (forge_self->block[2])
#define WAVE forge_wave // STATIC_WAVE is given by -D where a kernel asks for it
#define LANE (forge_self->lane)
#define barrier() forge_barrier()
DEVICE void fence_device() { forge_fence(); }
#define lds_barrier() forge_barrier()
DEVICE void wave_sync() { forge_ballot(1); }
#define STARTS_EARLY 0
#define ASYNC 0
DEVICE void copy_async(u32x4 *to, const u32x4 *from, bool there) { *to = there ? *from : u32x4{}; }
DEVICE void end_copies() {}
template <u32 N> DEVICE void await_copies() {}
DEVICE void grid_dependency_sync() {}
template <typename T> DEVICE void settle(T &) {}

DEVICE float to_float(f16 x) { return (float)__builtin_bit_cast(_Float16, x.bits); }
DEVICE f16 to_f16(float x) { return f16{__builtin_bit_cast(u16, (_Float16)x)}; }
DEVICE float as_float(u32 x) { return __builtin_bit_cast(float, x); }
DEVICE u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }
DEVICE float log_fast(float x) { return __builtin_logf(x); }
DEVICE float rsqrt_fast(float x) { return 1.0f / __builtin_sqrtf(x); }
DEVICE u32 shfl_bits(u32 x, u32 lane) { return (u32)forge_shuffle(x, lane); }
DEVICE u64 wave_ballot(bool p) { return forge_ballot(p); }
DEVICE u32 atomic_add(u32 *p, u32 x) { forge_count(p); u32 old = *p; *p = old + x; return old; }
DEVICE u64 atomic_add(u64 *p, u64 x) { u64 old = *p; *p = old + x; return old; }
DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// The harness is compiled with -ffp-contract=off.
DEVICE float add_rn(float a, float b) { return a + b; }
DEVICE float mul_rn(float a, float b) { return a * b; }
DEVICE float div_rn(float a, float b) { return a / b; }
DEVICE float fast_divide(float a, float b) { return a / b; }
DEVICE u32 mul_high(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
DEVICE u64 mul_high(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
DEVICE i32 dot4(u32 a, u32 b, i32 c) {
    for (u32 i = 0; i < 32; i += 8) c += (i32)(i8)(a >> i) * (i8)(b >> i);
    return c;
}
DEVICE u32x4 load_streaming(const u32x4 *p) { return *p; }
DEVICE i32 load_l2(const i32 *p) { return *p; }
DEVICE u32 halves_fma(u32 a, u32 b, u32 c) {
    u32 y = 0;
    for (u32 i = 0; i < 32; i += 16) {
        double product = (double)to_float(f16{(u16)(a >> i)}) * to_float(f16{(u16)(b >> i)});
        y |= (u32)__builtin_bit_cast(u16, (_Float16)(product + to_float(f16{(u16)(c >> i)}))) << i;
    }
    return y;
}
DEVICE u32 halves_add(u32 a, u32 b) { return halves_fma(a, 0x3c003c00u, b); }
DEVICE u32 pick_bytes(u32 high, u32 low, u32 places) {
    u32 picked = 0;
    for (u32 i = 0; i < 32; i += 8) picked |= (u32)(((u64)high << 32 | low) >> 8 * (places >> i & 7) & 255) << i;
    return picked;
}

#elif defined(FORGE_HIP) // ---------------------------------------------------------------------------------- AMD

#define KERNEL(threads) extern "C" __attribute__((global, amdgpu_flat_work_group_size(threads, threads))) void
#define SHARED __attribute__((shared))
#define TABLE static __attribute__((device, constant)) const
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
// Products of 16 x 16 x 16 that the target has. Of those of RDNA 3 and 4 compilers say that later ones have them too, also
// gfx1250, which has 16 x 16 x 32 in their place.
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
#define STARTS_EARLY 0
#define ASYNC 0
DEVICE void grid_dependency_sync() {}
// The fences of `barrier` wait on RDNA for all loads from memory, also those of what is needed only after it, and so does the
// compiler before a barrier that it knows for one.
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
template <typename T> DEVICE void settle(T &x) { asm volatile("" : "+v"(x) : : "memory"); }
DEVICE float to_float(f16 x) { return (float)__builtin_bit_cast(_Float16, x.bits); }
DEVICE f16 to_f16(float x) { return f16{__builtin_bit_cast(u16, (_Float16)x)}; }
DEVICE float as_float(u32 x) { return __builtin_bit_cast(float, x); }
DEVICE u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
DEVICE float exp2_fast(float x) { return __builtin_amdgcn_exp2f(x); }
DEVICE float log_fast(float x) { return __builtin_logf(x); }
DEVICE float rsqrt_fast(float x) { return __builtin_amdgcn_rsqf(x); }
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
DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// As written: not joined into a fused multiply-add.
DEVICE float add_rn(float a, float b) {
#pragma clang fp contract(off)
    return a + b;
}
DEVICE float mul_rn(float a, float b) {
#pragma clang fp contract(off)
    return a * b;
}
// A float32 division would switch the mode for subnormals back and forth, which CuPy compiles without. That of doubles does
// not, and rounding its result again is exact: 53 bits are more than 2 * 24 + 1. The compiler is not to see through it.
DEVICE float div_rn(float a, float b) {
    double quotient = (double)a / (double)b;
    asm("" : "+v"(quotient));
    return (float)quotient;
}
DEVICE float fast_divide(float a, float b) { return a * __builtin_amdgcn_rcpf(b); }
DEVICE u32 mul_high(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
DEVICE u64 mul_high(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
DEVICE u32 pick_bytes(u32 high, u32 low, u32 places) { return __builtin_amdgcn_perm(high, low, places); }
typedef u32 words_t __attribute__((ext_vector_type(4)));
DEVICE u32x4 load_streaming(const u32x4 *p) { return __builtin_bit_cast(u32x4, __builtin_nontemporal_load((const words_t *)p)); }
DEVICE i32 load_l2(const i32 *p) { return *p; } // no launch starts before the one in front of it has ended
typedef _Float16 half2_t __attribute__((ext_vector_type(2)));
DEVICE u32 halves_fma(u32 a, u32 b, u32 c) {
#pragma clang fp contract(fast)
    return __builtin_bit_cast(u32, __builtin_bit_cast(half2_t, a) * __builtin_bit_cast(half2_t, b) + __builtin_bit_cast(half2_t, c));
}
DEVICE u32 halves_add(u32 a, u32 b) { return __builtin_bit_cast(u32, __builtin_bit_cast(half2_t, a) + __builtin_bit_cast(half2_t, b)); }
// A target has v_dot4_i32_i8, or v_dot4_i32_iu8 from RDNA 3 on, or neither: the first of GFX9 and of RDNA.
DEVICE i32 dot4(u32 a, u32 b, i32 c) {
#if __has_builtin(__builtin_amdgcn_sdot4)
    return __builtin_amdgcn_sdot4((i32)a, (i32)b, c, false);
#elif __has_builtin(__builtin_amdgcn_sudot4)
    return __builtin_amdgcn_sudot4(true, (i32)a, true, (i32)b, c, false);
#else
    UNROLL for (u32 i = 0; i < 32; i += 8) c += (i32)(i8)(a >> i) * (i8)(b >> i);
    return c;
#endif
}

#else // ----------------------------------------------------------------------------------------------------- NVIDIA

#define KERNEL(threads) extern "C" __global__ __launch_bounds__(threads, MIN_BLOCKS) void
#define SHARED __shared__
#define DYNAMIC_SHARED(type, name, count)                     \
    extern __shared__ __align__(1024) u32x4 dynamic_shared[]; \
    type(&name)[count] = *(type(*)[count])dynamic_shared
#define TABLE static __device__ __constant__ const
#define UNROLL _Pragma("unroll")
#define THREAD (threadIdx.x)
#define BLOCK_X (blockIdx.x)
#define BLOCK_Y (blockIdx.y)
#define BLOCK_Z (blockIdx.z)
#define WAVE 32u
#define STATIC_WAVE WAVE
#define LANE (threadIdx.x & 31u)
#define barrier() __syncthreads()
DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" : : : "memory"); } // __threadfence is a stronger one
#define lds_barrier() __syncthreads()
#define wave_sync() __syncwarp()
#if __CUDA_ARCH__ >= 900
#define STARTS_EARLY 1
DEVICE void grid_dependency_sync() {
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
    asm volatile("griddepcontrol.wait;" : : : "memory");
}
#else
#define STARTS_EARLY 0
DEVICE void grid_dependency_sync() {}
#endif
#if __CUDA_ARCH__ >= 800
#define ASYNC 1
DEVICE void copy_async(u32x4 *to, const u32x4 *from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" : : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16u : 0u) : "memory");
}
DEVICE void end_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <u32 N> DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }
#else
#define ASYNC 0
#endif
DEVICE void settle(float &x) { asm volatile("" : "+f"(x) : : "memory"); }
DEVICE void settle(u32 &x) { asm volatile("" : "+r"(x) : : "memory"); }

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
DEVICE float as_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 as_u32(float x) { return __float_as_uint(x); }
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log_fast(float x) { return __logf(x); }
DEVICE float rsqrt_fast(float x) { return rsqrtf(x); }
DEVICE u32 shfl_bits(u32 x, u32 lane) { return __shfl_sync(0xffffffffu, x, (int)lane); }
DEVICE u64 wave_ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
DEVICE u32 atomic_add(u32 *p, u32 x) { return atomicAdd(p, x); }
DEVICE u64 atomic_add(u64 *p, u64 x) { return atomicAdd(p, x); }
DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Through PTX: CuPy compiles with -ftz=true, and these keep subnormals; never joined into a fused multiply-add.
DEVICE float add_rn(float a, float b) {
    float y;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
DEVICE float mul_rn(float a, float b) {
    float y;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
DEVICE float div_rn(float a, float b) {
    float y;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
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
DEVICE u32 halves_fma(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
DEVICE u32 halves_add(u32 a, u32 b) {
    u32 y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
DEVICE u32 pick_bytes(u32 high, u32 low, u32 places) { // the instruction takes the places as four nibbles
    return __byte_perm(low, high, __byte_perm(places | places >> 4, 0, 0x4420));
}

#endif // ------------------------------------------------------------------------------------------------ everywhere

#define LOG2E 1.44269504088896340736f

DEVICE float fast_exp(float x) { return exp2_fast(x * LOG2E); }
DEVICE float fast_tanh(float x) { // exact at both ends: exp overflows to infinity and underflows to 0
    return 1.0f - fast_divide(2.0f, 1.0f + exp2_fast(x * (2.0f * LOG2E)));
}
DEVICE float silu(float x) { return fast_divide(x, 1.0f + fast_exp(-x)); }
DEVICE float gelu_tanh(float x) { // sqrt(2 / pi)
    return 0.5f * x * (1.0f + fast_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
template <bool IS_SILU> DEVICE float activate(float x) { return IS_SILU ? silu(x) : gelu_tanh(x); }
DEVICE float larger(float a, float b) { return a > b ? a : b; }
DEVICE float smaller(float a, float b) { return a < b ? a : b; }
DEVICE i32 larger(i32 a, i32 b) { return a > b ? a : b; }
DEVICE i32 smaller(i32 a, i32 b) { return a < b ? a : b; }

// settle(x): x is made before anything behind it is read from memory, which may take the registers of what it is made of;
// what is made of x is made after all before it has been asked for.
// fast_divide(a, b): a / b to 2 units in the last place; 0 where b is infinite, or above 2**126 and its reciprocal thus
// subnormal. Not for b that are subnormal.
// dot4(a, b, c): c + the dot product of the four signed bytes of two words, one instruction on all but AMD's oldest targets.
// copy_async(to, from, there): on NVIDIA where ASYNC, from memory to LDS past the registers, or zeros; a thread awaits all but its last N
// groups of them, which end_copies ends.
// load_streaming(p): what no other thread will read, past the near cache, for what is read again to stay there.
// halves_fma(a, b, c), halves_add(a, b): of the two float16 numbers in each word.
// pick_bytes(high, low, places): four of the eight bytes of two words, those that the bytes of `places` (0 to 7) name.

// Keys order as logits do; the two zeros are one. Of the bits alone: where subnormals are flushed, arithmetic takes them
// for zeros.
DEVICE u32 key_of(float z) {
    u32 bits = as_u32(z) == 0x80000000u ? 0u : as_u32(z);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float logit_of(u32 key) { return as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

DEVICE u32 bit_count(u64 x) {
#if defined(FORGE_CUDA)
    return (u32)__popcll(x);
#else
    return (u32)__builtin_popcountll(x);
#endif
}

// Value of another lane of the wave.
DEVICE u32 shfl(u32 x, u32 lane) { return shfl_bits(x, lane); }
DEVICE i32 shfl(i32 x, u32 lane) { return (i32)shfl_bits((u32)x, lane); }
DEVICE float shfl(float x, u32 lane) { return as_float(shfl_bits(as_u32(x), lane)); }
DEVICE u64 shfl(u64 x, u32 lane) { return (u64)shfl_bits((u32)(x >> 32), lane) << 32 | shfl_bits((u32)x, lane); }
template <typename T> DEVICE T shfl_xor(T x, u32 mask) { return shfl(x, LANE ^ mask); }

// Reductions whose result every lane has; the order of additions is fixed, so runs are equal bit for bit. `width` is a
// power of two: lanes in groups of so many.
template <typename T> DEVICE T wave_sum(T x, u32 width = WAVE) {
    for (u32 i = width / 2; i > 0; i /= 2) x += shfl_xor(x, i);
    return x;
}
DEVICE float wave_max(float x, u32 width = WAVE) {
    for (u32 i = width / 2; i > 0; i /= 2) x = larger(x, shfl_xor(x, i));
    return x;
}

// Of a whole block; `scratch` may be used again at once, because both barriers are inside.
template <typename T, u32 N> DEVICE T block_sum(T x, T (&scratch)[N]) {
    x = wave_sum(x);
    if (LANE == 0) scratch[THREAD / WAVE] = x;
    lds_barrier();
    T sum = scratch[0];
    for (u32 i = 1; i < N * 32 / WAVE; ++i) sum += scratch[i];
    lds_barrier();
    return sum;
}
template <u32 N> DEVICE float block_max(float x, float (&scratch)[N]) {
    x = wave_max(x);
    if (LANE == 0) scratch[THREAD / WAVE] = x;
    barrier();
    float most = scratch[0];
    for (u32 i = 1; i < N * 32 / WAVE; ++i) most = larger(most, scratch[i]);
    barrier();
    return most;
}
