// Functions of a thread, a wave and a block that are the same on all platforms.

#if !HAS_COPY_ASYNC
DEVICE void copy_async(u32x4 *to, const u32x4 *from, bool there) { *to = there ? *from : u32x4{}; }
DEVICE void commit_copies() {}
template <u32 N> DEVICE void wait_copies() {}
#endif

#define LOG2E 1.44269504088896340736f

DEVICE float fast_exp(float x) { return fast_exp2(x * LOG2E); }
DEVICE float fast_tanh(float x) { // exact at both ends, where exp overflows to infinity or underflows to 0
    return 1.0f - fast_divide(2.0f, 1.0f + fast_exp2(x * (2.0f * LOG2E)));
}
DEVICE float silu(float x) { return fast_divide(x, 1.0f + fast_exp(-x)); }
DEVICE float gelu_tanh(float x) { // sqrt(2 / pi)
    return 0.5f * x * (1.0f + fast_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
DEVICE float activate(float x, bool is_gelu) { return is_gelu ? gelu_tanh(x) : silu(x); }
// RMS norm (arXiv:1910.07467) multiplies by this and by the weights.
DEVICE float rms_scale(float mean_square, float eps) { return fast_rsqrt(mean_square + eps); }
template <typename T> DEVICE T larger(T a, T b) { return a > b ? a : b; }
template <typename T> DEVICE T smaller(T a, T b) { return a < b ? a : b; }

// The first position that a query sees. -D CHUNKED=1: windows are chunks of so many positions, and a query sees those of its own.
#ifndef CHUNKED
#define CHUNKED 0
#endif
// -D SINKS=1: heads have attention sinks. Without it kernels have no code for them.
#ifndef SINKS
#define SINKS 0
#endif
DEVICE u32 first_seen(u32 position, u32 window) {
#if CHUNKED
    return position / window * window;
#else
    return window && position + 1 > window ? position + 1 - window : 0;
#endif
}

// Whether a position lies before what a query at `from` sees. A macro, as NVIDIA's compiler makes 15% more of a loop with a function.
#if CHUNKED
#define IS_BEFORE(position, from, window) ((position) < first_seen(from, window))
#else
#define IS_BEFORE(position, from, window) ((window) && (position) + (window) <= (from))
#endif

// Keys order as logits do, and the two zeros have one key. Computed from the bits alone, because float arithmetic may flush
// subnormals.
DEVICE u32 ordered_key(float z) {
    u32 bits = as_u32(z) == 0x80000000u ? 0u : as_u32(z);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float logit_of(u32 key) { return as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The value of another lane of the wave.
DEVICE u32 shfl(u32 x, u32 lane) { return shfl_bits(x, lane); }
DEVICE i32 shfl(i32 x, u32 lane) { return (i32)shfl_bits((u32)x, lane); }
DEVICE float shfl(float x, u32 lane) { return as_float(shfl_bits(as_u32(x), lane)); }
DEVICE u64 shfl(u64 x, u32 lane) { return (u64)shfl_bits((u32)(x >> 32), lane) << 32 | shfl_bits((u32)x, lane); }
template <typename T> DEVICE T shfl_xor(T x, u32 mask) { return shfl(x, LANE ^ mask); }

// Reductions over groups of `width` lanes, a power of two. Every lane has the result. The order of additions is fixed, so runs
// are equal bit for bit.
template <typename T> DEVICE T wave_sum(T x, u32 width = WAVE) {
    for (u32 i = width / 2; i > 0; i /= 2) x += shfl_xor(x, i);
    return x;
}
template <typename T> DEVICE T wave_max(T x, u32 width = WAVE) {
    for (u32 i = width / 2; i > 0; i /= 2) x = larger(x, shfl_xor(x, i));
    return x;
}

// A sum over the block. `scratch` may be used again at once, because both barriers are inside.
template <typename T, u32 N> DEVICE T block_sum(T x, T (&scratch)[N]) {
    x = wave_sum(x);
    if (LANE == 0) scratch[THREAD / WAVE] = x;
    lds_barrier();
    T sum = scratch[0];
    for (u32 i = 1; i < N * 32 / WAVE; ++i) sum += scratch[i];
    lds_barrier();
    return sum;
}
