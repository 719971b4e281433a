"""The CuPy backend: kernels compiled at run time for the GPU at hand, matrix products through its BLAS.

The same code runs on HIP and on CUDA. Only this module and its neighbours `cupy_*` import CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import cupy as cp
import numpy as np
import numpy.typing as npt
from cupy_backends.cuda.api import driver
from cupy_backends.cuda.libs import nvrtc

from forge.backend import amd, compilers, edits, host, sources
from forge.backend.cupy_blas import multiplies, product_of
from forge.backend.cupy_driver import IS_HIP, KIND, card_of, cards, check, errors, facts, hiding
from forge.backend.cupy_memory import Copies, Guarded, Staging, host_visible, lasting
from forge.backend.cupy_modules import Modules, block_of, pointer
from forge.backend.cupy_plans import Plans
from forge.backend.cupy_steps import RecordedSteps, StepLog, StepMemory
from forge.backend.device_lock import DeviceLock
from forge.backend.gpu import GPU
from forge.backend.graphs import Graphs, Perturb
from forge.backend.pdl import DependentLaunch, Packed
from forge.backend.tensor_maps import TensorMaps
from forge.config import Progress
from forge.errors import DeviceError
from forge.tuning import Choices, store

ARRAY = cp.ndarray
__all__ = ["ARRAY", "KIND", "CupyBackend", "backend", "cards"]

T = TypeVar("T")


class CupyBackend(GPU):
    """One GPU. All work goes to one stream, in order. `to_numpy`, `seconds` and `release_memory` wait for the work."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._cuda_device = cp.cuda.Device(index)
        properties = cp.cuda.runtime.getDeviceProperties(index)
        card = card_of(index)
        self.name, self.arch, self.num_cus = card.name, card.arch, card.num_cus
        self.is_integrated = card.is_integrated
        self.wave_size = int(properties["warpSize"])
        self._has_pdl = not IS_HIP and properties["major"] >= 9
        self.has_wgmma = self.arch == "sm_90" and nvrtc.getVersion() >= (12, 3)
        self.device = card.text
        if why := amd.refusal(self.arch):
            raise DeviceError(f"{self.device}: {self.arch} {why}")
        self._modules = Modules(self.arch)
        self._guarded: list[Guarded] | None = None
        self._scratch: Any = None
        self._lock = DeviceLock()
        with self._cuda_device:
            self._stream = cp.cuda.Stream(non_blocking=True)
        self._staging = Staging(self._stream)
        self._tensor_maps = TensorMaps(self.asarray)
        self._plans, self._step_memory = Plans(self, self._modules, self._stream.ptr), StepMemory()
        self._graphs = Graphs(self, self._stream, self._step_memory)

    def active(self) -> AbstractContextManager[None]:
        """Makes this device and its stream CuPy's current ones. Within another such context there is nothing to do.

        One thread at a time is within: its launches must not land in a step that another thread captures.
        """
        return nullcontext() if self._is_within() else self._enter()

    def _is_within(self) -> bool:
        # The stream alone does not tell: where HIP fails while one is left, CuPy goes on to call it the current one.
        return self._lock.is_mine and cp.cuda.get_current_stream().ptr == self._stream.ptr

    @contextmanager
    def _enter(self) -> Iterator[None]:
        with self._lock.held(), errors(), self._cuda_device, self._stream:
            yield

    def released(self) -> AbstractContextManager[None]:
        return self._lock.released()

    def launch(self, op: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        if not self._is_within():
            with self._enter():
                return self.launch(op, args, options)
        if self._guarded is not None or self._graphs.is_capturing or op.run_gpu is None:
            return super().launch(op, args, options)
        return self._plans.launch(op, args, options)

    @property
    def is_plain(self) -> bool:
        """Whether launches are only queued: nothing is collected, guarded or captured."""
        return self._plans.collected is None and self._guarded is None and not self._graphs.is_capturing

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        function = self._modules.function(entry)
        if self._graphs.is_capturing and self._has_pdl and entry.uses_pdl:
            dependent = DependentLaunch(pointer(function), grid, entry.threads, args, entry.lds_bytes)
            self._graphs.call(lambda: check(dependent(self._stream.ptr)), args, function)
        else:
            packed = Packed(args)
            arguments = pointer(function), *grid, *block_of(entry), self._stream.ptr, packed.address, 0
            self._graphs.call(lambda: driver.launchKernel(*arguments), args, (function, packed))

    def prepare(self, run: Callable[[], None], progress: Progress | None = None) -> None:
        """Compile in parallel what `run` would launch, without launching it; the results are kept on disk."""
        with self.active():
            self._plans.collected = launched = dict[sources.Variant, None]()
            try:
                run()
            finally:
                self._plans.collected = None
            cp.get_default_memory_pool().free_all_blocks()  # of the largest step, which has memory of its own
        self.build(launched, progress)

    def build(self, variants: Iterable[sources.Variant], progress: Progress | None = None) -> None:
        self._modules.build(variants, self._on_device, progress)

    @property
    def loaded(self) -> list[sources.Variant]:
        return self._modules.loaded

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with errors(), self._cuda_device:
            yield

    @cached_property
    def tuning(self) -> Choices:
        """Read once: the same choices for all steps, whatever is measured meanwhile."""
        return store.load(self.arch, can_compile=not IS_HIP or compilers.find_compiler() is not None)

    @cached_property
    def has_blas(self) -> bool:
        return not IS_HIP or multiplies(self.device, f"{KIND}:{self.index}")

    def try_blas(self) -> None:
        """Multiply small matrices. rocBLAS aborts the process where it has no kernels for this GPU."""
        ones, out = (self.asarray(np.ones((32, 32)), dtype) for dtype in (np.float16, np.float32))
        with self.active():
            self.matmul(ones, ones, out, 0, accumulate=True)
        if (self.to_numpy(out) != 33).any():
            raise DeviceError(f"{self.device}: hipBLAS computes wrong products")

    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        if not (x.size and weight.size):
            return
        product = product_of(x, weight, out, accumulate=accumulate)
        addresses = x.data.ptr, weight.data.ptr, out.data.ptr + column * out.itemsize
        self._graphs.call(lambda: product.queue(*addresses), (x, weight, out), capturable=False)

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Any:
        if isinstance(array, cp.ndarray):  # of user code
            with self.active(), lasting():
                return cp.ascontiguousarray(array, dtype)
        values = np.ascontiguousarray(array, dtype)
        with self.active(), lasting():
            if self._guarded is None:
                return cp.asarray(values)
            made = self.empty(values.shape, values.dtype)
            made.set(values)
            return made

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        with self.active():
            if self._guarded is None:
                return cp.empty(shape, dtype)
            guarded = Guarded(math.prod(shape) * np.dtype(dtype).itemsize, len(self._guarded))
            self.poison(guarded.memory)  # cp.full would compile a kernel of CuPy's
            for band, values in zip(guarded.bands, guarded.values, strict=True):
                band.set(values)
            self._guarded.append(guarded)
            return guarded.between.view(dtype).reshape(shape)

    def map_of(self, address: int, shape: tuple[int, ...], slots: int) -> Any:
        return self._tensor_maps.of(address, shape, slots)

    def scratch(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Memory that all ops share: captured steps would otherwise each keep as much as their largest op uses."""
        if self._guarded is not None:
            return self.empty(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self.active(), lasting():
            if self._scratch is None or self._scratch.nbytes < size:
                self._scratch = cp.empty(size, np.uint8)
            return self._scratch[:size].view(dtype).reshape(shape)

    @contextmanager
    def guarded(self) -> Iterator[Callable[[], bool]]:
        made: list[Guarded] = []

        def whole() -> bool:
            return all(
                np.array_equal(self.to_numpy(band), values)
                for guarded in made
                for band, values in zip(guarded.bands, guarded.values, strict=True)
            )

        with self.active():
            self._guarded = made
            try:
                yield whole
            finally:
                self._guarded = None

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
        """A copy on the host; waits for what computes it."""
        with self.active():
            return np.asarray(cp.asnumpy(array))

    def upload(self, array: Any, values: npt.NDArray[Any], *, is_pinned: bool = False) -> None:
        """Overwrite an array by way of pinned memory, which stays alive until the copy has run."""
        with self.active():
            self._staging.upload(array, values, is_pinned=is_pinned)

    def poison(self, array: Any) -> None:
        """Set every byte of an array to 255."""
        with self.active():
            array.data.memset_async(255, array.nbytes, self._stream)

    def snapshot(self, array: Any) -> Any:
        """A copy of an array on the device, in order with the ops before and after."""
        with self.active():
            copy = cp.empty(array.shape, array.dtype)
            copy.data.copy_from_device_async(array.data, array.nbytes, self._stream)
            return copy

    def host_visible(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Any, npt.NDArray[Any]]:
        with self.active():
            return host_visible(shape, dtype, self.index)

    def record_event(self) -> Callable[[], None]:
        with self.active():
            event = cp.cuda.Event(block=False, disable_timing=True)
            event.record(self._stream)

        def wait() -> None:
            with errors():
                event.synchronize()

        return wait

    def capture(
        self, step: Callable[[], T], state: Sequence[Any], perturb: Perturb | None
    ) -> tuple[T, Callable[..., T | None]]:
        return self._graphs.capture(step, state, perturb)

    def reserve(self, nbytes: int) -> None:
        with self.active():
            self._step_memory.reserve(nbytes)

    def recorder(self) -> Callable[[Sequence[Any], Callable[[], T]], T]:
        return RecordedSteps(self, self._step_memory)

    @property
    def shared(self) -> tuple[Any, ...]:
        """What ops share. Launches that are kept hold its addresses, or what it chose."""
        return self.tuning, self._scratch, self._counters, edits.replaced()

    @contextmanager
    def recording(self, log: StepLog) -> Iterator[None]:
        """A log takes the launches of the ops within. Nothing but ops may be called."""
        self._plans.log = log
        try:
            yield
        finally:
            self._plans.log = None

    @property
    def step_generation(self) -> object:
        return self._step_memory.valid_with(edits.replaced())

    def free_bytes(self) -> int:
        """Bytes that are free on the device and in CuPy's pool.

        An integrated GPU has no more than the host: the driver counts memory of the host's programs as free
        (ROCm/hip#3892).
        """
        with errors(), self._cuda_device:
            free, _ = cp.cuda.runtime.memGetInfo()
            if self.is_integrated:
                free = min(free, host.free_bytes())
            return int(free) + int(cp.get_default_memory_pool().free_bytes())

    def release_memory(self) -> None:
        """Wait for all work, then give the driver back what pools hold, and the memory that ops share.

        Arrays in use keep their memory. So do the captured steps of other models.
        """
        with self.active():
            self._stream.synchronize()
            self._staging.clear()
            self._scratch = self._counters = None
            self._step_memory.release()
            cp.get_default_memory_pool().free_all_blocks()
            cp.get_default_pinned_memory_pool().free_all_blocks()

    def facts(self) -> list[tuple[str, str]]:
        with self._on_device():
            return facts(self)

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds that the device takes for what `run` queues: it runs twice, and the second run is timed."""
        with self.active():
            start, end = cp.cuda.Event(), cp.cuda.Event()
            run()
            start.record(self._stream)
            run()
            end.record(self._stream)
            end.synchronize()
            return float(cp.cuda.get_elapsed_time(start, end)) / 1000

    def resources(self, entry: sources.Entry) -> dict[str, int]:
        with self._on_device():
            return self._modules.resources(entry)

    def read_seconds(self, size: int) -> float:
        """Seconds to read so many bytes at the rate of a large copy, measured now."""
        with self.active():
            copies = Copies(self._stream)
            return size * self.seconds(copies.queue) / copies.nbytes


_BACKENDS: dict[int, CupyBackend] = {}


def backend(index: int) -> CupyBackend:
    """The backend of a GPU; there is one of each."""
    if index not in _BACKENDS:
        found = len(cards())
        if index >= found:
            there = f"{found} GPU{'s are' if found != 1 else ' is'} there"
            raise DeviceError(f"{KIND}:{index} does not exist: {there}{hiding()}")
        with errors():
            _BACKENDS[index] = CupyBackend(index)
    return _BACKENDS[index]
