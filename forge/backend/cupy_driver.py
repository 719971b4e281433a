"""What the driver says through CuPy: which GPUs there are, its errors as forge's, its versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cupy as cp
from cupy_backends.cuda.libs import cublas

from forge.backend import amd, compilers, kernel_cache
from forge.errors import DeviceError, OutOfMemoryError

IS_HIP = bool(cp.cuda.runtime.is_hip)
KIND = "hip" if IS_HIP else "cuda"
_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation, hipErrorOutOfMemory

_HIDING = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "CUDA_VISIBLE_DEVICES")
"""Variables that choose which GPUs a process sees, and in what order."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU that the driver shows."""

    index: int
    name: str
    arch: str
    num_cus: int
    is_integrated: bool

    @property
    def text(self) -> str:
        """The GPU as a person would name it."""
        return f"{KIND}:{self.index} ({self.name}, {self.arch}{', integrated' if self.is_integrated else ''})"


def cards() -> list[Card]:
    """The GPUs, best first: GPUs with kernels before others, then discrete ones, then by number of compute units.

    Raises DeviceError where there is none, or the driver cannot be asked.
    """
    try:
        found = [card_of(index) for index in range(cp.cuda.runtime.getDeviceCount())]
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f"no usable GPU: {one_line(error)}{hiding()}") from None
    if not found:
        raise DeviceError(f"no usable GPU: the driver shows none{hiding()}")
    return sorted(found, key=lambda one: (bool(amd.refusal(one.arch)), one.is_integrated, -one.num_cus, one.index))


def card_of(index: int) -> Card:
    """What the driver says of a GPU."""
    about = cp.cuda.runtime.getDeviceProperties(index)
    arch = about["gcnArchName"].decode().partition(":")[0] if IS_HIP else f"sm_{about['major']}{about['minor']}"
    multiprocessors = int(about["multiProcessorCount"])
    num_cus = amd.compute_units(arch, multiprocessors) if IS_HIP else multiprocessors
    return Card(index, about["name"].decode(), arch, num_cus, bool(about["integrated"]))


def hiding() -> str:
    """Variables that may hide GPUs from this process, as the end of a message."""
    found = [f"{name}={os.environ[name]}" for name in _HIDING if name in os.environ]
    return f" ({', '.join(found)} chooses which are seen)" if found else ""


@contextmanager
def errors() -> Iterator[None]:
    """CuPy's errors as forge's."""
    try:
        yield
    except cp.cuda.memory.OutOfMemoryError as error:
        raise _out_of_memory(one_line(error).removeprefix("Out of memory ").rstrip(".")) from None
    except (cp.cuda.driver.CUDADriverError, cp.cuda.runtime.CUDARuntimeError, cublas.CUBLASError) as error:
        text = one_line(error)
        if isinstance(error, cp.cuda.runtime.CUDARuntimeError) and error.status == _MEMORY_ALLOCATION:
            raise _out_of_memory(f"{text}, of the device or pinned of the host") from None
        raise DeviceError(f"the GPU failed: {text}") from None


def check(status: int) -> None:
    """A CUresult as the error that CuPy's own calls raise for it."""
    if status:
        raise cp.cuda.driver.CUDADriverError(status)


def facts(device: Any) -> list[tuple[str, str]]:
    """What there is to say about a CupyBackend's GPU, as (what, found)."""
    runtime = cp.cuda.runtime
    free, total = runtime.memGetInfo()
    return [
        ("device", "; ".join(filter(None, (device.device, compilers.untested(device.arch))))),
        ("waves", f"{device.wave_size} threads, {device.num_cus} {'compute units' if IS_HIP else 'multiprocessors'}"),
        ("device memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"),
        (
            "driver, runtime",
            f"{_api_version(runtime.driverGetVersion())}, {_api_version(runtime.runtimeGetVersion())}",
        ),
        ("CuPy", f"{cp.__version__} for {'ROCm' if IS_HIP else 'CUDA'}"),
        ("BLAS", _blas(device)),
        ("kernel cache", str(kernel_cache.stores()[0])),
    ]


def _blas(device: Any) -> str:
    name = "hipBLAS" if IS_HIP else "cuBLAS"
    if not device.has_blas:  # making its handle may be what ends the process
        return f"{name}, which has no kernels for {device.arch}: prompts are slower"
    version = _version(cublas.getVersion(cp.cuda.device.get_cublas_handle()), 100, 100)
    return f"{name}; CuPy was built for rocBLAS {version}" if IS_HIP else f"{name} {version}"


def _out_of_memory(what: str) -> OutOfMemoryError:
    message = f"out of device memory: {what}"
    return OutOfMemoryError(message, parameter="context", hint="use a smaller context or model")


def _version(number: int, minors: int, patches: int) -> str:
    """Text of a version that is one number, with `minors` per major version and `patches` per minor version."""
    return f"{number // minors // patches}.{number // patches % minors}.{number % patches}"


def _api_version(number: int) -> str:
    """Version of HIP or CUDA as text: 70051831 is HIP 7.0.51831, 13010 is CUDA 13.1.0."""
    return f"HIP {_version(number, 100, 100_000)}" if IS_HIP else f"CUDA {_version(number, 100, 10)}"


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())
