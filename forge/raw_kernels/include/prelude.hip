// The contract that every kernel is written against. Python puts this text before a kernel's.
//
// Three files implement it: platform_amd.hip (hipRTC, hipcc or a plain clang), platform_nvidia.hip (NVRTC) and
// platform_harness.hip (the CPU harness of the tests). platform_clang.hip is what the first and the last share. No other file knows platforms, except the matrix cores in tile_*.hip.
// Nothing is included and no library is linked.
//
// A kernel
//   KERNEL(threads) name(parameters)  Each parameter has a type listed below. A pointer to data that is only read is const.
//                   Python parses the list and checks each launch against it.
//   MIN_BLOCKS      Blocks that NVIDIA's compiler leaves registers for on each multiprocessor.
//   THREAD, BLOCK_X, BLOCK_Y, BLOCK_Z  The thread's index in its block and the block's index in the grid. A block has one
//                   dimension and a number of threads known at compile time, a multiple of 64.
//   WAVE, LANE      Threads of a wave (warp), 32 or 64, and the thread's index in its wave. In the harness WAVE is a run-time
//                   value: size arrays by MAX_WAVES, loop with `for (i = WAVE / 2; ...)`. Code for one size asserts
//                   TILE_WAVE == STATIC_WAVE.
//   CONSTANT        Before an array of numbers that are part of the program, in device memory.
//   UNROLL, ROLLED  Before a loop: it is unrolled, or stays a loop because unrolling would take too many registers.
//
// LDS (shared memory)
//   SHARED          Before an array of fixed size. Functions take it by reference: T (&tile)[N].
//   DYNAMIC_SHARED(type, name, count)  For more than 48 KB on NVIDIA, where a launch allots what -D LDS_BYTES says. Elsewhere as SHARED.
//
// Synchronization. All threads of a block, or of a wave, reach it together, never under a branch that divides them. The same
// holds for shuffles and ballots.
//   barrier()       Barrier of the block, for LDS and device memory.
//   lds_barrier()   Barrier of the block for LDS alone. Stores to device memory may not be visible behind it.
//   wave_sync()     Lanes of a wave see behind it what the others stored to LDS before it.
//   fence_device()  Orders this thread's accesses to device memory. Blocks of a launch hand results on as follows. All threads
//                   of the writer store, call fence_device() and meet at a barrier, then one thread counts with atomic_add.
//                   The block that finds all counted calls fence_device() in all threads before it reads. No block waits for
//                   another, and counters are left at zero.
//   grid_dependency_sync()  Programmatic dependent launch. A kernel that calls it may start while the launch before it still
//                   runs (HAS_PDL). Before the call it stores nothing. It reads weights, keys and values of earlier steps, and,
//                   through load_l2, what was stored before the step's last launch without the call. All threads of a kernel
//                   call it or none. The next launch may start behind the call.
//   late_grid_dependency_sync()  The same, but the next launch starts later: it reads, before its own call, what was stored before
//                   this launch. Such a launch may also store, where the one in front of it neither reads nor stores, and call
//                   grid_dependency_sync() as the last thing it does: it is beside that one. It calls fence_device() before it
//                   reads what others stored.
//   start_next_launch()  The next launch may start from here on.
//   compiler_fence(x)  Computes x before any later load, so that loads can take the registers x is made from. What is computed
//                   from x stays behind the fence.
//
// Memory
//   load_streaming(p)  16 bytes that no other thread reads, past L1, so that L1 keeps what is read again.
//   load_l2(p)      An i32 from L2, past L1, which may hold a value from before an earlier launch.
//   copy_async(to, from, there)  16 bytes from device memory to LDS, or zeros. Without registers where HAS_COPY_ASYNC, else at once.
//   commit_copies(), wait_copies<N>()  End a group of copies; wait for all of the thread's groups but the last N.
//   atomic_add(p, x)  u32 or u64, returns the value before.
//
// Arithmetic
//   to_float, to_f16, as_float, as_u32  Conversion of float16, and of the bits of a float.
//   to_f16x2(low, high)  Two float16 numbers in a word.
//   add_rn, mul_rn, div_rn, sqrt_rn, fma_rn  Rounded to nearest exactly as written. They keep subnormals and are never fused.
//   fast_divide(a, b)  a / b within 2 units in the last place, 0 where b > 2**126. b is not subnormal.
//   fast_exp2, fast_log, fast_rsqrt  The GPU's approximations.
//   fast_max(a, b)  The larger of two numbers, neither of which is NaN.
//   add_f16x2(a, b), fma_f16x2(a, b, c)  On the two float16 numbers in each word.
//   dot4(a, b, c)   c + the dot product of the four signed bytes of two words.
//   byte_perm(high, low, places)  Four of the eight bytes of two words; the bytes of `places` name them, 0 to 7.
//   pick_8(table, word, upper)  For each byte of a word the byte of a table of 8 that its lower four bits name, 0 to 7, or its upper
//                   four. pick_16 has a table of 16.
//   nibble_perm(low, high, places)  The same by the four nibbles of half a word (HAS_NIBBLE_PERM). One of 8 or more names what all bits
//                   of a byte's sign make.
//   mul_high(a, b)  High half of the product, u32 or u64.
//   shfl_bits(x, lane), wave_ballot(p)  The value of another lane; a bit for each lane that has p.

#if defined(FORGE_HARNESS)
#define DEVICE static inline
#elif defined(__HIP__) || defined(__HIPCC_RTC__)
#define FORGE_HIP 1
#define DEVICE static inline __attribute__((device, always_inline))
#else
#define FORGE_CUDA 1
#define DEVICE static __device__ __forceinline__
#endif

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef unsigned long long u64;

// A float16 as it lies in memory. Arithmetic is done in float.
struct f16 {
    u16 bits;
};

// N numbers that are loaded and stored as one, at an address that is a multiple of their size.
template <typename T, u32 N> struct alignas(sizeof(T) * N) Vec {
    T v[N];
};
typedef Vec<f16, 8> f16x8;
typedef Vec<float, 2> f32x2;
typedef Vec<float, 4> f32x4;
typedef Vec<u32, 2> u32x2;
typedef Vec<u32, 4> u32x4;

template <u32 N, typename T> DEVICE Vec<T, N> load(const T *from) { return *(const Vec<T, N> *)from; }
template <u32 N, typename T> DEVICE void store(T *to, const Vec<T, N> &x) { *(Vec<T, N> *)to = x; }

#define NEG_INFINITY as_float(0xff800000u)
#define ROLLED _Pragma("unroll 1")
#define MAX_WAVES(threads) ((threads) / 32)
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif
