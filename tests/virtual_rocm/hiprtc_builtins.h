// Names that hipRTC has defined before a kernel's first line, so that one of forge's that is the same shows here. After
// get_hiprtc_macros in ROCm/clr's HIPRTC.cmake, and HIP's amd_hip_runtime.h, amd_hip_vector_types.h, amd_hip_fp16.h,
// amd_device_functions.h, amd_warp_functions.h and amd_warp_sync_functions.h. No kernel of forge's uses them.
#define __HIPCC_RTC__ 1
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __global__ __attribute__((global))
#define __constant__ __attribute__((constant))
#define __shared__ __attribute__((shared))
#define __align__(x) __attribute__((aligned(x)))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define launch_bounds_impl0(most) __attribute__((amdgpu_flat_work_group_size(1, most)))
#define launch_bounds_impl1(most, waves) __attribute__((amdgpu_flat_work_group_size(1, most), amdgpu_waves_per_eu(waves)))
#define select_impl_(_1, _2, impl_, ...) impl_
#define __launch_bounds__(...) select_impl_(__VA_ARGS__, launch_bounds_impl1, launch_bounds_impl0)(__VA_ARGS__)

typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __SIZE_TYPE__ size_t;
typedef long clock_t;
namespace std {
using ::clock_t;
using ::ptrdiff_t;
} // namespace std
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

struct dim3 {
    uint32_t x, y, z;
};
struct __hip_builtin_index {
    unsigned x, y, z;
};
extern const __device__ __attribute__((weak)) __hip_builtin_index threadIdx, blockIdx, blockDim, gridDim;
static constexpr int warpSize = 64;

#define BUILTIN_VECTOR(type, name) \
    struct name##1 { type x; }; \
    struct name##2 { type x, y; }; \
    struct name##3 { type x, y, z; }; \
    struct name##4 { type x, y, z, w; };
BUILTIN_VECTOR(char, char)
BUILTIN_VECTOR(unsigned char, uchar)
BUILTIN_VECTOR(short, short)
BUILTIN_VECTOR(unsigned short, ushort)
BUILTIN_VECTOR(int, int)
BUILTIN_VECTOR(unsigned int, uint)
BUILTIN_VECTOR(long, long)
BUILTIN_VECTOR(unsigned long, ulong)
BUILTIN_VECTOR(float, float)
BUILTIN_VECTOR(double, double)
#undef BUILTIN_VECTOR
struct __half_raw {
    unsigned short x;
};
struct __half {
    _Float16 data;
};
struct __half2 {
    _Float16 x, y;
};
typedef __half half;
typedef __half2 half2;
struct hip_bfloat16 {
    uint16_t data;
};

template <typename T> __device__ T min(T a, T b) { return a < b ? a : b; }
template <typename T> __device__ T max(T a, T b) { return a < b ? b : a; }
template <typename T> __device__ T __shfl(T value, int lane, int width = warpSize);
template <typename T> __device__ T __shfl_xor(T value, int mask, int width = warpSize);
template <typename T> __device__ T __shfl_up(T value, unsigned delta, int width = warpSize);
template <typename T> __device__ T __shfl_down(T value, unsigned delta, int width = warpSize);
template <typename M, typename T> __device__ T __shfl_sync(M mask, T value, int lane, int width = warpSize);
template <typename M, typename T> __device__ T __shfl_xor_sync(M mask, T value, int lanes, int width = warpSize);
template <typename T> __device__ T atomicAdd(T *address, T value);
template <typename T> __device__ T __ldg(const T *address) { return *address; }
__device__ unsigned long __ballot(int predicate);
__device__ int __all(int predicate);
__device__ int __any(int predicate);
__device__ unsigned __lane_id();
__device__ unsigned __popc(unsigned x);
__device__ unsigned __popcll(unsigned long long x);
__device__ int __clz(int x);
__device__ int __ffs(int x);
__device__ unsigned __umulhi(unsigned a, unsigned b);
__device__ unsigned __byte_perm(unsigned a, unsigned b, unsigned selector);
__device__ float __half2float(__half x);
__device__ __half __float2half(float x);
__device__ float __fdividef(float a, float b);
__device__ float __expf(float x);
__device__ float __logf(float x);
__device__ void __syncthreads();
__device__ void __threadfence();
extern "C" {
__device__ float expf(float);
__device__ float exp2f(float);
__device__ float logf(float);
__device__ float sqrtf(float);
__device__ float rsqrtf(float);
__device__ float tanhf(float);
__device__ float fmaf(float, float, float);
__device__ float fmaxf(float, float);
__device__ float fminf(float, float);
__device__ float powf(float, float);
__device__ float sinf(float);
__device__ float cosf(float);
}
