"""A virtual AMD GPU: the real CuPy for ROCm, with the libraries of ROCm written in Python and kernels run on the CPU.

`libraries` builds what the wheel loads; `runtime`, `rtc` and `blas` say what the functions do; `execution` runs a code
object's kernels on the harness. Where the real thing is not known from a run, HIP's public headers and sources decide:
`hip/hip_runtime_api.h`, `hip/hiprtc.h`, `hipblas.h`, and in ROCm/clr `hipamd/src`; comments name them.

What differs from a real GPU, beside speed: work is done as late as HIP allows, when something waits for it; LDS and
new device memory hold NaN; one wave runs at a time. There are no races between waves to be seen here, no caches, no
hipBLAS kernels: products are NumPy's. A kernel that fails is told of when the host next waits, where a ROCm driver may
end the process.
"""
