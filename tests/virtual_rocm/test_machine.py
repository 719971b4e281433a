"""The virtual GPU shows the faults that a real one has: what it lets pass, no test here would find."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import forge
from forge.backend import host
from forge.errors import DeviceError
from forge.ops.activation import add
from virtual_rocm import tiny
from virtual_rocm.calls import failing, number_of_calls
from virtual_rocm.runtime import DEVICE, GFX, INVALID_VALUE, WAVE, Properties

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

LAUNCH_FAILED = "hipErrorLaunchFailure"


@pytest.fixture
def mended() -> Iterator[None]:
    """A GPU that a test breaks is another one afterwards."""
    yield
    DEVICE.broken = 0
    DEVICE.foreign.clear()


def borrowed(address: int, values: np.ndarray) -> Any:
    """An array of CuPy's at an address."""
    import cupy

    memory = cupy.cuda.UnownedMemory(address, values.nbytes, values)
    return cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(memory, 0))


def test_properties_lie_where_cupy_reads_them(gfx: str) -> None:
    import cupy

    assert Properties.gcnArchName.offset == 1160  # as a C compiler lays hipDeviceProp_tR0600 out
    found = cupy.cuda.runtime.getDeviceProperties(0)
    assert (gfx, {"gfx942": 64, "gfx1100": 32}[gfx]) == (GFX, WAVE)
    assert found["gcnArchName"].decode().partition(":")[0] == gfx
    assert found["warpSize"] == WAVE
    assert (found["maxThreadsPerBlock"], found["l2CacheSize"]) == (1024, 4 << 20)


def test_grids_are_for_all_compute_units(device: Any, gfx: str) -> None:
    """HIP counts pairs of them on RDNA (ROCm/hip#3767)."""
    import cupy

    reported = cupy.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"]
    assert (reported, device.num_cus) == ({"gfx942": 8, "gfx1100": 4}[gfx], 8)
    assert ("waves", f"{WAVE} threads, 8 compute units") in device.facts()


def test_a_gpu_that_shares_the_host_s_memory_has_no_more_than_the_host(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver counts what programs of the host have taken as free (ROCm/hip#3892)."""
    import cupy

    monkeypatch.setattr(host, "free_bytes", lambda: 12_345_678)
    assert not device.is_integrated
    assert device.free_bytes() > 100_000_000
    monkeypatch.setattr(device, "is_integrated", True)
    assert device.free_bytes() == 12_345_678 + cupy.get_default_memory_pool().free_bytes()


def test_new_memory_is_nan(device: Any) -> None:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    assert np.isnan(device.to_numpy(device.empty((1 << 20,), np.float32))).all()


def test_work_waits_until_something_waits_for_it(device: Any) -> None:
    """So that a result that is read too early, or an argument that is overwritten too early, shows."""
    from forge.backend.cupy_memory import pinned

    x = device.asarray(np.zeros(64, np.float32))
    device.to_numpy(x)
    with device.active():
        staged = pinned((64,), np.dtype(np.float32))
        staged[:] = 1
        x.data.copy_from_host_async(staged.ctypes.data, staged.nbytes, device._stream)
        staged[:] = 2
    assert (device.to_numpy(x) == 2).all()


def test_no_work_is_overtaken_where_garbage_is_collected_amidst_it(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage may hold memory, and freeing that waits for all work."""
    import cupy

    from virtual_rocm import execution

    launch = execution.Kernel.launch

    def litter(*args: Any) -> str:
        garbage: list[Any] = [cupy.cuda.Memory(64)]
        garbage.append(garbage)
        del garbage
        assert len([[] for _ in range(10_000)]) > gc.get_threshold()[0]  # so many new objects make Python collect
        return launch(*args)

    x = one = device.asarray(np.ones((1, 64), np.float32))
    gc.collect()
    monkeypatch.setattr(execution.Kernel, "launch", litter)
    for _ in range(3):
        x = device.launch(add, (x, one), {})
    assert (device.to_numpy(x) == 4).all()


def test_uploads_keep_what_they_stage(device: Any) -> None:
    arrays = [device.asarray(np.zeros(64, np.float32)) for _ in range(6)]
    for array in arrays:
        device.to_numpy(array)
    with device.active():
        for i, array in enumerate(arrays):
            device.upload(array, np.full(64, i, np.float32))
    assert [device.to_numpy(array)[0] for array in arrays] == list(range(6))


def test_recorded_steps_keep_their_memory(device: Any) -> None:
    import cupy

    prompts, params = [[4], [5, 6]], forge.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with forge.load(tiny.ARCH / "llama" / "model.gguf", device="hip", context=64, max_sequences=4) as llm:
        first = llm.generate(prompts, params)
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        before = number_of_calls("hipGraphLaunch")
        again = llm.generate(prompts, params)
        assert number_of_calls("hipGraphLaunch") > before
    assert [c.ids for c in again] == [c.ids for c in first]


def test_a_kernel_on_the_hosts_memory_fails(device: Any, mended: None) -> None:
    values = np.ones((4, 64), np.float32)
    x = device.asarray(values)
    y = device.launch(add, (x, borrowed(values.ctypes.data, values)), {})
    with pytest.raises(DeviceError, match=LAUNCH_FAILED):
        device.to_numpy(y)


def test_a_kernel_on_freed_memory_fails(device: Any, mended: None) -> None:
    import cupy

    values = np.ones((4, 64), np.float32)
    address = cupy.cuda.runtime.malloc(values.nbytes)
    gone = borrowed(address, values)
    x = device.asarray(values)
    cupy.cuda.runtime.free(address)
    y = device.launch(add, (x, gone), {})
    with pytest.raises(DeviceError, match=LAUNCH_FAILED):
        device.to_numpy(y)


def test_a_copy_beyond_an_allocation_fails() -> None:
    import cupy

    address = cupy.cuda.runtime.malloc(64)
    values = np.zeros(128, np.uint8)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="hipErrorInvalidValue"):
        cupy.cuda.runtime.memcpy(address, values.ctypes.data, values.nbytes, 1)
    cupy.cuda.runtime.free(address)


def test_kernels_of_cupys_are_found_out(device: Any, mended: None) -> None:
    import cupy

    with device.active():
        x = cupy.empty(64, np.float32)
        with pytest.raises(Exception, match=r"hip|HIP"):  # CuPy's own need ROCm's headers, which are not there
            x + 1
        source = 'extern "C" __global__ void other(float* x) { x[0] = 1; }'
        kernel = cupy.RawModule(code=source).get_function("other")
        kernel((1,), (64,), (x,))
    assert DEVICE.foreign == ["other"]
    with pytest.raises(DeviceError, match=LAUNCH_FAILED):
        device.to_numpy(x)


def test_a_launch_that_a_gpu_refuses(device: Any) -> None:
    """A real one counts threads in 32 bits: NVIDIA does not."""
    values = np.ones((4, 64), np.float32)
    device.launch(add, (device.asarray(values), device.asarray(values)), {})
    function = next(reversed(device._modules._functions.values()))
    with pytest.raises(Exception, match="hipErrorInvalidConfiguration"), device.active():
        function((1 << 30, 1, 1), (64, 1, 1), ())
    with pytest.raises(Exception, match="hipErrorInvalidConfiguration"), device.active():
        function((1, 1, 1), (2048, 1, 1), ())


def test_failures_come_when_they_are_asked_for(device: Any) -> None:
    with failing("hipMemcpyAsync", INVALID_VALUE, first=2, count=1) as fault:
        device.asarray(np.zeros(4, np.float32))
        with pytest.raises(DeviceError, match="hipErrorInvalidValue"):
            device.asarray(np.zeros(4, np.float32))
        device.asarray(np.zeros(4, np.float32))
    assert (fault.calls, fault.met) == (3, 1)
