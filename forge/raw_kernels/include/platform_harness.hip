// The contract of prelude.hip on the CPU harness of the tests: tests/harness runs each thread as a fiber.

#if defined(FORGE_HARNESS)
#define KERNEL(threads) extern "C" __attribute__((noinline)) void
#define SHARED static __attribute__((section("forge_lds")))
#define CONSTANT static const
#define DYNAMIC_SHARED(type, name, count) SHARED type name[count]
#define UNROLL

extern "C" {
struct ForgeThread {
    u32 thread, lane;
    u32 block[3];
};
extern ForgeThread *forge_self;
extern u32 forge_wave;
void forge_barrier(void) __attribute__((noduplicate)); // all threads call it at one place
u64 forge_shuffle(u64 value, u32 lane);
u64 forge_ballot(u32 predicate);
const void *forge_share(const void *own, u64 bytes); // the `own` of all lanes of the wave, 64 bytes each
void forge_fence(void);
void forge_count(const void *at); // called before an atomic addition
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
template <typename T> DEVICE void compiler_fence(T &) {}

DEVICE float fast_exp2(float x) { return __builtin_exp2f(x); }
DEVICE float fast_log(float x) { return __builtin_logf(x); }
DEVICE float fast_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
DEVICE u32 shfl_bits(u32 x, u32 lane) { return (u32)forge_shuffle(x, lane); }
DEVICE u64 wave_ballot(bool p) { return forge_ballot(p); }
DEVICE u32 atomic_add(u32 *p, u32 x) { forge_count(p); u32 old = *p; *p = old + x; return old; }
DEVICE u64 atomic_add(u64 *p, u64 x) { u64 old = *p; *p = old + x; return old; }
// The harness is compiled with -ffp-contract=off.
DEVICE float add_rn(float a, float b) { return a + b; }
DEVICE float mul_rn(float a, float b) { return a * b; }
DEVICE float div_rn(float a, float b) { return a / b; }
DEVICE float sqrt_rn(float x) { return __builtin_sqrtf(x); }
DEVICE float fast_divide(float a, float b) { return a / b; }
DEVICE i32 dot4(u32 a, u32 b, i32 c) { return dot4_bytes(a, b, c); }
DEVICE u32x4 load_streaming(const u32x4 *p) { return *p; }
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 y = 0;
    for (u32 i = 0; i < 32; i += 16) {
        double product = (double)to_float(f16{(u16)(a >> i)}) * to_float(f16{(u16)(b >> i)});
        y |= (u32)__builtin_bit_cast(u16, (_Float16)(product + to_float(f16{(u16)(c >> i)}))) << i;
    }
    return y;
}
DEVICE u32 add_f16x2(u32 a, u32 b) { return fma_f16x2(a, 0x3c003c00u, b); }
#define HAS_NIBBLE_PERM 1
DEVICE u32 in_register(u32 x) { return x; }
DEVICE u32 nibble_perm(u32 low, u32 high, u32 places) {
    u32 picked = 0;
    for (u32 i = 0; i < 4; ++i) {
        u32 place = places >> 4 * i & 15, byte = (u32)(((u64)high << 32 | low) >> 8 * (place & 7)) & 255;
        picked |= (place < 8 ? byte : byte >> 7 ? 255 : 0) << 8 * i;
    }
    return picked;
}
DEVICE u32 byte_perm(u32 high, u32 low, u32 places) {
    u32 picked = 0;
    for (u32 i = 0; i < 32; i += 8) picked |= (u32)(((u64)high << 32 | low) >> 8 * (places >> i & 7) & 255) << i;
    return picked;
}
#endif
