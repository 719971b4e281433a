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
// - WAVE may be a run-time value (it is in the harness): size arrays with MOST_WAVES, loop with `for (i = WAVE / 2; ...)`.
// - LDS is SHARED arrays of fixed size, indexed where they are declared or passed by reference: T (&tile)[N].
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
#define MOST_WAVES(threads) ((threads) / 32)
// Blocks that a multiprocessor of NVIDIA's is to have registers for, at least; a file may define more before a kernel.
#define RESIDENT 1

#if defined(FORGE_HARNESS) // ----------------------------------------------------------------------- CPU harness

#define KERNEL(threads) extern "C" __attribute__((noinline)) void
#define SHARED static __attribute__((section("forge_lds")))
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
}
#define THREAD (forge_self->thread)
#define BLOCK_X (forge_self->block[0])
#define BLOCK_Y (forge_self->block[1])
#define BLOCK_Z (forge_self->block[2])
#define WAVE forge_wave
#define LANE (forge_self->lane)
#define barrier() forge_barrier()
#define lds_barrier() forge_barrier()
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
DEVICE u32 atomic_add(u32 *p, u32 x) { u32 old = *p; *p = old + x; return old; }
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
#if defined(__GFX9__) || defined(__gfx90a__) || defined(__gfx942__) || defined(__gfx950__)
#define WAVE 64u
#define LANE __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u))
#else
#define WAVE 32u
#define LANE __builtin_amdgcn_mbcnt_lo(~0u, 0u)
#endif

DEVICE void barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// The fences of `barrier` wait on RDNA for all loads from memory, also those of what is needed only after it, and so does the
// compiler before a barrier that it knows for one.
DEVICE void lds_barrier() {
#if defined(__GFX12__)
    asm volatile("s_wait_dscnt 0x0\n\ts_barrier_signal -1\n\ts_barrier_wait -1" ::: "memory");
#else
    asm volatile("s_waitcnt lgkmcnt(0)\n\ts_barrier" ::: "memory");
#endif
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
#if defined(__GFX11__) || defined(__GFX12__) // v_dot4_i32_iu8; the signed form of the others is gone
DEVICE i32 dot4(u32 a, u32 b, i32 c) { return __builtin_amdgcn_sudot4(true, (i32)a, true, (i32)b, c, false); }
#else
DEVICE i32 dot4(u32 a, u32 b, i32 c) { return __builtin_amdgcn_sdot4((i32)a, (i32)b, c, false); }
#endif

#else // ----------------------------------------------------------------------------------------------------- NVIDIA

#define KERNEL(threads) extern "C" __global__ __launch_bounds__(threads, RESIDENT) void
#define SHARED __shared__
#define TABLE static __device__ __constant__ const
#define UNROLL _Pragma("unroll")
#define THREAD (threadIdx.x)
#define BLOCK_X (blockIdx.x)
#define BLOCK_Y (blockIdx.y)
#define BLOCK_Z (blockIdx.z)
#define WAVE 32u
#define LANE (threadIdx.x & 31u)
#define barrier() __syncthreads()
#define lds_barrier() __syncthreads()
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
DEVICE u32 pick_bytes(u32 high, u32 low, u32 places) { // the instruction takes the places as four nibbles
    return __byte_perm(low, high, __byte_perm(places | places >> 4, 0, 0x4420));
}

#endif // ------------------------------------------------------------------------------------------------ everywhere

#define LOG2E 1.44269504088896340736f

DEVICE float fast_exp(float x) { return exp2_fast(x * LOG2E); }
DEVICE float fast_tanh(float x) { // exact at both ends: exp overflows to infinity and underflows to 0
    return 1.0f - fast_divide(2.0f, 1.0f + exp2_fast(x * (2.0f * LOG2E)));
}
DEVICE float larger(float a, float b) { return a > b ? a : b; }
DEVICE float smaller(float a, float b) { return a < b ? a : b; }
DEVICE i32 larger(i32 a, i32 b) { return a > b ? a : b; }
DEVICE i32 smaller(i32 a, i32 b) { return a < b ? a : b; }

#define SQRT_2_OVER_PI 0.7978845608028654f

DEVICE float silu(float x) { return fast_divide(x, 1.0f + fast_exp(-x)); }
DEVICE float gelu_tanh(float x) { return 0.5f * x * (1.0f + fast_tanh(SQRT_2_OVER_PI * (x + 0.044715f * x * x * x))); }
template <bool IS_SILU> DEVICE float activate(float x) { return IS_SILU ? silu(x) : gelu_tanh(x); }

// settle(x): x is made before anything behind it is read from memory, which may take the registers of what it is made of;
// what is made of x is made after all before it has been asked for.
// fast_divide(a, b): a / b to 2 units in the last place; 0 where b is infinite, or above 2**126 and its reciprocal thus
// subnormal. Not for b that are subnormal.
// dot4(a, b, c): c + the dot product of the four signed bytes of two words. Every target has it as one instruction.
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

DEVICE void store_product(float sum, u32 n, u32 m, const float *bias, float *y, u32 rows, u32 outer, u32 stride, u32 column, u32 accumulate) {
    if (m >= rows || n >= outer) return;
    float *out = y + (u64)m * stride + column + n;
    if (bias) sum += bias[n];
    *out = accumulate ? *out + sum : sum;
}

// The end of a product of few rows, in linear.hip and quant.hip: y[m, column + n] from the sums of SHARERS threads for each
// R rows n of the matrix. A block has P * 32 threads.
template <u32 SHARERS, u32 R, u32 M, u32 P>
DEVICE void finish_product(float (&sum)[R][M], float (&partial)[P][R * M], const float *bias, float *y, u32 rows, u32 outer, u32 stride, u32 column, u32 accumulate) {
    const u32 teams = P * 32 / SHARERS;
    u32 width = SHARERS < WAVE ? SHARERS : WAVE; // a team is a part of a wave, or some waves: these join their sums
    UNROLL for (u32 r = 0; r < R; ++r)
        UNROLL for (u32 m = 0; m < M; ++m) {
            float all = wave_sum(sum[r][m], width);
            if (SHARERS > 32) {
                if (THREAD % width == 0) partial[THREAD / width][r * M + m] = all;
            } else if (THREAD % SHARERS == (r * M + m) % SHARERS) {
                store_product(all, (BLOCK_X * teams + THREAD / SHARERS) * R + r, m, bias, y, rows, outer, stride, column, accumulate);
            }
        }
    if (SHARERS <= 32) return;
    barrier();
    for (u32 i = THREAD; i < teams * R * M; i += P * 32) {
        u32 team = i / M / R;
        float total = 0;
        for (u32 p = 0; p < SHARERS / width; ++p) total += partial[team * (SHARERS / width) + p][i % (R * M)];
        store_product(total, BLOCK_X * teams * R + i / M, i % M, bias, y, rows, outer, stride, column, accumulate);
    }
}

// ------------------------------------------------------------------ products of one row: vector.hip and quant.hip
// The row x is float16, or of the residual stream in float32: then each block normalizes it, as norm.hip's rmsnorm does.
// What a thread holds of it are P eights.
template <typename X, u32 P> struct Row;
template <u32 P> struct Row<f16, P> {
    u32x4 x[P];
};
template <u32 P> struct Row<float, P> {
    f32x4 x[P][2], norm[P][2];
};

// The eights that begin at these places; zeros where that is past the row's end.
template <u32 P> DEVICE void read_row(Row<f16, P> &row, const f16 *x, const float *, const u32 (&at)[P], u32 inner) {
    UNROLL for (u32 p = 0; p < P; ++p) row.x[p] = at[p] < inner ? *(const u32x4 *)(x + at[p]) : u32x4{};
}
template <u32 P> DEVICE void read_row(Row<float, P> &row, const float *x, const float *norm, const u32 (&at)[P], u32 inner) {
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 h = 0; h < 2; ++h) {
            row.x[p][h] = at[p] < inner ? *(const f32x4 *)(x + at[p] + 4 * h) : f32x4{};
            row.norm[p][h] = at[p] < inner ? *(const f32x4 *)(norm + at[p] + 4 * h) : f32x4{};
        }
}

// The same as float16, two in a word; what was read between these two calls is on its way before they are waited for.
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<f16, P> &row, float, u32, float (&)[N]) {
    UNROLL for (u32 p = 0; p < P; ++p) {
        y[p] = row.x[p];
        UNROLL for (u32 i = 0; i < 4; ++i) settle(y[p].v[i]);
    }
}
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<float, P> &row, float eps, u32 inner, float (&scratch)[N]) {
    float squares = 0;
    settle(squares);
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 i = 0; i < 8; ++i) squares += row.x[p][i / 4].v[i % 4] * row.x[p][i / 4].v[i % 4];
    float scale = rsqrt_fast(fast_divide(block_sum(squares, scratch), (float)inner) + eps);
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 i = 0; i < 8; i += 2) {
            f16 low = to_f16(row.x[p][i / 4].v[i % 4] * scale * row.norm[p][i / 4].v[i % 4]);
            f16 high = to_f16(row.x[p][i / 4].v[i % 4 + 1] * scale * row.norm[p][i / 4].v[i % 4 + 1]);
            y[p].v[i / 2] = low.bits | (u32)high.bits << 16;
        }
}

// What becomes of the sums: y[n] in float32, sum + bias (+ what y holds); or in float16, activation(gate) * up, where the first
// half of a team's R rows of the matrix are gates n, the others the ups outer + n.
template <typename Y, u32 R> struct Outputs {
    static const bool gated = sizeof(Y) == 2;
    static const u32 per_team = gated ? R / 2 : R;
};

// What is added to an output's sum, or to its gate and its up: read before the sum is there. And what is stored.
struct Addends {
    float first, second;
};
DEVICE Addends read_addends(const float *y, u32 n, const float *bias, u32, u32 accumulate) {
    return Addends{bias ? bias[n] : 0.0f, accumulate ? y[n] : 0.0f};
}
DEVICE Addends read_addends(const f16 *, u32 n, const float *bias, u32 outer, u32) {
    return bias ? Addends{bias[n], bias[outer + n]} : Addends{};
}
template <bool IS_SILU> DEVICE void store_output(float *y, u32 n, float sum, float, Addends more) { y[n] = sum + more.first + more.second; }
template <bool IS_SILU> DEVICE void store_output(f16 *y, u32 n, float gate, float up, Addends more) {
    y[n] = to_f16(activate<IS_SILU>(gate + more.first) * (up + more.second));
}

// The row of the matrix that is a team's r-th, where `first` is the team's first output. One too many is the last one
// again, and is not stored.
template <typename Y, u32 R> DEVICE u32 team_row(u32 first, u32 r, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team;
    u32 n = first + r % outputs < outer ? first + r % outputs : outer - 1;
    return r < outputs ? n : outer + n;
}

// The output that this thread stores, of those of a block from `first` on, by teams of SHARERS threads; `outer` for none.
template <u32 SHARERS, typename Y, u32 R, u32 THREADS> DEVICE u32 own_output(u32 first, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team, teams = THREADS / SHARERS;
    u32 in_block = SHARERS <= 32 ? THREAD / SHARERS * outputs + THREAD % SHARERS : THREAD;
    bool owns = SHARERS <= 32 ? THREAD % SHARERS < outputs : THREAD < teams * outputs;
    return owns && first + in_block < outer ? first + in_block : outer;
}

// From the sums of a team's threads to its outputs; this thread stores n, if that is one. `partial` must be another one, or
// behind a barrier, in the next call.
template <u32 SHARERS, bool IS_SILU, typename Y, u32 R, u32 P>
DEVICE void finish_vector(float (&sum)[R], float (&partial)[P][R], u32 n, const Addends &more, Y *y, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team;
    u32 width = SHARERS < WAVE ? SHARERS : WAVE; // a team is a part of a wave, or some waves: these join their sums
    UNROLL for (u32 r = 0; r < R; ++r) sum[r] = wave_sum(sum[r], width);
    if (SHARERS <= 32) {
        UNROLL for (u32 o = 0; o < outputs; ++o)
            if (THREAD % SHARERS == o && n < outer) store_output<IS_SILU>(y, n, sum[o], sum[R - outputs + o], more);
        return;
    }
    UNROLL for (u32 r = 0; r < R; ++r)
        if (THREAD % width == 0) partial[THREAD / width][r] = sum[r];
    lds_barrier();
    if (n >= outer) return;
    u32 waves = SHARERS / width, wave = THREAD / outputs * waves, o = THREAD % outputs;
    float a = 0, b = 0;
    for (u32 p = wave; p < wave + waves; ++p) a += partial[p][o], b += partial[p][R - outputs + o];
    store_output<IS_SILU>(y, n, a, b, more);
}
