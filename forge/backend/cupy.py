"""The CuPy backend: kernels compiled at run time for the GPU at hand, matrix products through its BLAS.

The only module that imports CuPy. The same code runs on HIP and on CUDA.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import RLock, get_ident
from typing import Any, TypeVar

import cupy as cp
import numpy as np
import numpy.typing as npt
from cupy_backends.cuda.libs import cublas, nvrtc

from forge.backend import amd, compilers, host, kernel_cache, probe, sources
from forge.backend.gpu import GPU, Perturb, arrays_in, checked, compared
from forge.backend.pdl import DependentLaunch
from forge.errors import DeviceError, OutOfMemoryError
from forge.tuning import Choices, store

IS_HIP = bool(cp.cuda.runtime.is_hip)
ARRAY = cp.ndarray
KIND = "hip" if IS_HIP else "cuda"
_R_32F, _R_16F = 0, 2  # cudaDataType
_COMPUTE_32F = _R_32F if IS_HIP else 68  # CUBLAS_COMPUTE_32F, which ends the process in CuPy for ROCm 7
_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation, hipErrorOutOfMemory
_NON_TRANSPOSED, _TRANSPOSED = 0, 1
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_FLAGS = ("-std=c++17",)
_DEFAULT_ALGORITHM = -1

_NOTHING: AbstractContextManager[None] = nullcontext()
T = TypeVar("T")
_COPIED_BYTES = 1 << 28
_COPIES = 8
_MAX_NODES = 190
"""Launches of a graph: a longer step is several. Larger ones have gone wrong on AMD (ROCm/hip#3887)."""
_GUARD_BYTES = 1024  # keeps the alignment of what lies between
Progress = Callable[[str, int, int | None], None]


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
    kind: str = KIND

    @property
    def text(self) -> str:
        """As a person would name it."""
        return f"{KIND}:{self.index} ({self.name}, {self.arch}{', integrated' if self.is_integrated else ''})"


def cards() -> list[Card]:
    """The GPUs, best first: those with kernels, of them discrete ones, of them those with the most compute units.

    Raises DeviceError where there is none, or the driver cannot be asked.
    """
    try:
        found = [_card(index) for index in range(cp.cuda.runtime.getDeviceCount())]
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f"no usable GPU: {_one_line(error)}{_hiding()}") from None
    if not found:
        raise DeviceError(f"no usable GPU: the driver shows none{_hiding()}")
    return sorted(found, key=lambda card: (bool(amd.refusal(card.arch)), card.is_integrated, -card.num_cus, card.index))


def _card(index: int) -> Card:
    about = cp.cuda.runtime.getDeviceProperties(index)
    arch = about["gcnArchName"].decode().partition(":")[0] if IS_HIP else f"sm_{about['major']}{about['minor']}"
    multiprocessors = int(about["multiProcessorCount"])
    num_cus = amd.compute_units(arch, multiprocessors) if IS_HIP else multiprocessors
    return Card(index, about["name"].decode(), arch, num_cus, bool(about["integrated"]))


def _hiding() -> str:
    """What may hide GPUs from this process, to be read behind a complaint."""
    found = [f"{name}={os.environ[name]}" for name in _HIDING if name in os.environ]
    return f" ({', '.join(found)} chooses which are seen)" if found else ""


class CupyBackend(GPU):
    """One GPU. All work goes to one stream, in order; nothing here waits for it but `to_numpy` and `synchronize`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._cuda_device = cp.cuda.Device(index)
        properties = cp.cuda.runtime.getDeviceProperties(index)
        card = _card(index)
        self.name, self.arch, self.num_cus = card.name, card.arch, card.num_cus
        self.is_integrated = card.is_integrated
        self.wave_size = int(properties["warpSize"])
        self._has_pdl = not IS_HIP and properties["major"] >= 9
        self.has_wgmma = self.arch == "sm_90" and nvrtc.getVersion() >= (12, 0)
        self.device = card.text
        if why := amd.refusal(self.arch):
            raise DeviceError(f"{self.device}: {self.arch} {why}")
        self._modules: dict[sources.Variant, Any] = {}
        self._functions: dict[sources.Entry, Any] = {}
        self._collected: dict[sources.Variant, None] | None = None
        self._log: list[Any] | None = None
        self._guarded: list[_Guarded] | None = None
        self._staged: deque[_Staged] = deque()
        self._scratch: Any = None
        self._graphs = True
        self._graph_pool = cp.cuda.MemoryPool()
        self._lock = RLock()
        self._thread: int | None = None
        with self._cuda_device:
            self._stream = cp.cuda.Stream(non_blocking=True)

    def active(self) -> AbstractContextManager[None]:
        """This device and its stream are CuPy's current ones; nothing to do within another such context.

        One thread at a time: what it launches is not to land in a step that another records.
        """
        # The stream alone does not tell: where HIP fails while one is left, CuPy goes on to call it the current one.
        is_within = self._thread == get_ident() and cp.cuda.get_current_stream().ptr == self._stream.ptr
        return _NOTHING if is_within else self._enter()

    @contextmanager
    def _enter(self) -> Iterator[None]:
        with self._lock, _errors(), self._cuda_device, self._stream:
            outer, self._thread = self._thread, get_ident()
            try:
                yield
            finally:
                self._thread = outer

    def launch(self, op: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        with self.active():
            return super().launch(op, args, options)

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        if self._collected is not None:
            self._collected[entry.variant] = None
            return
        function = self._functions.get(entry)
        if function is None:
            function = self._module(entry.variant).get_function(entry.function)
            if entry.lds_bytes:  # the driver refuses more than 48 KB where nobody has asked for it
                cp.cuda.driver.funcSetAttribute(_pointer(function), _MAX_DYNAMIC_SHARED_SIZE_BYTES, entry.lds_bytes)
            self._functions[entry] = function
        if self._log is not None and self._has_pdl and entry.uses_pdl:
            early = DependentLaunch(_pointer(function), grid, entry.threads, args, entry.lds_bytes)
            self._call(lambda: _check(early(self._stream.ptr)), (function, args))
        else:
            block = (entry.threads, 1, 1)
            self._call(lambda: function(grid, block, tuple(args), shared_mem=entry.lds_bytes), (function, args))

    def _module(self, variant: sources.Variant) -> Any:
        module = self._modules.get(variant)
        if module is None:
            if IS_HIP:
                module = self._loaded(variant, kernel_cache.obtain(variant, self.arch))
            elif target := sources.target(variant.file):
                module = self._loaded(variant, kernel_cache.kept(variant, target, lambda: _nvrtc(variant, target)))
            else:
                module = self._compiled(variant)
            self._modules[variant] = module
        return module

    def _compiled(self, variant: sources.Variant) -> Any:
        """By CuPy and NVRTC, which keep what they compile."""
        module = cp.RawModule(code=sources.source(variant.file), options=(*_FLAGS, *variant.options))
        try:
            module.compile()
        except cp.cuda.compiler.CompileException as error:
            why = compilers.reason(str(error), variant)
            raise DeviceError(f"{variant.name} does not compile for {self.arch}: {why}") from None
        return module

    def _loaded(self, variant: sources.Variant, code: bytes) -> Any:
        """From the bytes that were verified: RawModule(path=) would read the file again."""
        module = cp.cuda.Module()
        try:
            module.load(code)
        except (cp.cuda.driver.CUDADriverError, cp.cuda.runtime.CUDARuntimeError) as error:
            raise DeviceError(
                f"{variant.name}: the driver refuses its code object for {self.arch}: {_one_line(error)}"
            ) from None
        return module

    def prepare(self, run: Callable[[], None], progress: Progress | None = None) -> None:
        """Compile in parallel what `run` would launch, without launching it; the results are kept on disk."""
        with self.active():
            self._collected = {}
            try:
                run()
                missing = [variant for variant in self._collected if variant not in self._modules]
            finally:
                self._collected = None

        def build(variant: sources.Variant) -> None:
            with _errors(), self._cuda_device:
                self._module(variant)

        pool = ThreadPoolExecutor(os.cpu_count(), "forge-compile")
        try:
            tasks = [pool.submit(build, variant) for variant in missing]
            for done, task in enumerate(as_completed(tasks), 1):
                task.result()
                if progress:
                    progress("compiling kernels", done, len(missing))
        finally:
            pool.shutdown(cancel_futures=True)

    @cached_property
    def tuning(self) -> Choices:
        """Read once: the same choices for all steps, whatever is measured meanwhile."""
        return store.load(self.arch, can_compile=not IS_HIP or compilers.find_compiler() is not None)

    @cached_property
    def has_blas(self) -> bool:
        if not IS_HIP:
            return True
        trial = f"import sys; sys.path[:] = {sys.path!r}; from forge.backend import select"
        failure = probe.failure([sys.executable, "-c", f"{trial}; select('{KIND}:{self.index}').try_blas()"])
        if failure:
            warnings.warn(
                f"{self.device}: hipBLAS cannot multiply here ({failure}); prompts are computed by forge's own "
                "kernels, slower",
                stacklevel=2,
            )
        return not failure

    def try_blas(self) -> None:
        """A small product. rocBLAS aborts the process where it has no kernels for this GPU."""
        ones, out = (self.asarray(np.ones((32, 32)), dtype) for dtype in (np.float16, np.float32))
        with self.active():
            self.matmul(ones, ones, out, 0, accumulate=True)
        if (self.to_numpy(out) != 33).any():
            raise DeviceError(f"{self.device}: hipBLAS computes wrong products")

    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        if self._collected is not None or not (x.size and weight.size):
            return
        rows, inner = x.shape
        outer = weight.shape[0]
        alpha, beta = np.float32(1.0), np.float32(1.0 if accumulate else 0.0)
        one, other = np.array([alpha]), np.array([beta])
        # Row-major out = x @ weight.T is column-major out.T = weight @ x.T; BLAS sees each array transposed.
        sizes = (
            _TRANSPOSED,
            _NON_TRANSPOSED,
            outer,
            rows,
            inner,
            one.ctypes.data,
            weight.data.ptr,
            _R_16F,
            inner,
            x.data.ptr,
            _R_16F,
            inner,
            other.ctypes.data,
            out.data.ptr + column * out.itemsize,
            _R_32F,
            out.shape[1],
            _COMPUTE_32F,
            _DEFAULT_ALGORITHM,
        )
        kept = (x, weight, out, one, other)
        self._call(lambda: cublas.gemmEx(cp.cuda.device.get_cublas_handle(), *sizes), kept, capturable=False)

    def _call(self, call: Callable[[], Any], kept: object, *, capturable: bool = True) -> None:
        """Run something on the stream; while a step is recorded, also note it, with what it needs alive."""
        call()
        if self._log is not None:
            self._log.append((call, kept, capturable))

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Any:
        values = np.ascontiguousarray(array, dtype)
        with self.active():
            if self._guarded is None:
                return cp.asarray(values)
            made = self.empty(values.shape, values.dtype)
            made.set(values)
            return made

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        with self.active():
            if self._guarded is None:
                return cp.empty(shape, dtype)
            size = math.prod(shape) * np.dtype(dtype).itemsize
            guarded = _Guarded(cp.empty(size + 2 * _GUARD_BYTES, np.uint8), len(self._guarded))
            self.poison(guarded.memory)  # cp.full would compile a kernel of CuPy's
            for band, values in zip(guarded.bands, guarded.values, strict=True):
                band.set(values)
            self._guarded.append(guarded)
            return guarded.memory[_GUARD_BYTES:-_GUARD_BYTES].view(dtype).reshape(shape)

    def scratch(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """One piece of memory for all ops: recorded steps would otherwise each keep as much as their largest uses."""
        if self._guarded is not None:
            return self.empty(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self.active():
            if self._scratch is None or self._scratch.nbytes < size:
                self._scratch = cp.empty(size, np.uint8)
            return self._scratch[:size].view(dtype).reshape(shape)

    @contextmanager
    def guarded(self) -> Iterator[Callable[[], bool]]:
        made: list[_Guarded] = []

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

    def upload(self, array: Any, values: npt.NDArray[Any]) -> None:
        """Through pinned memory, which stays alive until the copy has run."""
        with self.active():
            staged = _Staged(_pinned(values.shape, values.dtype), cp.cuda.Event(block=False, disable_timing=True))
            np.copyto(staged.array, values)
            array.data.copy_from_host_async(staged.array.ctypes.data, values.nbytes, self._stream)
            staged.event.record(self._stream)
            self._staged.append(staged)
            while len(self._staged) > 1 and self._staged[0].event.done:
                self._staged.popleft()

    def poison(self, array: Any) -> None:
        """Every byte of it becomes 255."""
        with self.active():
            array.data.memset_async(255, array.nbytes, self._stream)

    def snapshot(self, array: Any) -> Any:
        """A copy, in order with the ops before and after."""
        with self.active():
            copy = cp.empty(array.shape, array.dtype)
            copy.data.copy_from_device_async(array.data, array.nbytes, self._stream)
            return copy

    def host_visible(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Any, npt.NDArray[Any]]:
        with self.active():
            # Not of CuPy's pool: of memory with default flags alone HIP promises that the host sees what kernels
            # store, and the pool would give it away while the last steps of a dropped model still write to it.
            size = math.prod(shape)
            memory = cp.cuda.PinnedMemory(max(size * np.dtype(dtype).itemsize, 1))
            host = np.frombuffer(cp.cuda.PinnedMemoryPointer(memory, 0), dtype, size).reshape(shape)
            host.fill(0)
            address = cp.cuda.runtime.pointerGetAttributes(host.ctypes.data).devicePointer
            mapped = cp.cuda.UnownedMemory(address, host.nbytes, host, self.index)
            return cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(mapped, 0)), host

    def record_event(self) -> Callable[[], None]:
        with self.active():
            event = cp.cuda.Event(block=False, disable_timing=True)
            event.record(self._stream)

        def wait() -> None:
            with _errors():
                event.synchronize()

        return wait

    def capture(
        self, step: Callable[[], T], state: Sequence[Any], perturb: Perturb | None
    ) -> tuple[T, Callable[..., T | None]]:
        """Its launches are kept, with memory of their own, and run again: as graphs, or one by one where a product
        goes to BLAS, which CuPy does not capture on CUDA, and from the first time on that capturing fails or a graph
        computes something else.
        """
        log: list[Any] = []
        with self.active():
            before = [self.to_numpy(array) for array in state] if self._graphs and perturb else []
            self._log = log
            try:
                with cp.cuda.using_allocator(self._graph_pool.malloc):
                    result = step()
            finally:
                self._log = None
            results = arrays_in(result)

            def launches() -> None:
                for call, _, _ in log:
                    call()

            graph = self._graph(log) if self._graphs and perturb else None
            if graph and perturb and checked(self, graph, launches, results, state, before, perturb) is launches:
                self._graphs, graph = False, None

        def again(compare: bool = False) -> T | None:
            with self.active():
                if graph is None or not self._graphs:
                    launches()
                elif not compare:
                    graph()
                elif not compared(self, graph, launches, results, state):
                    self._graphs = False
                    return None
            return result

        return result, again

    def _graph(self, log: list[Any]) -> Callable[[], None] | None:
        """What launches the log as graphs; None where it cannot be captured.

        Within `active`, whose own errors would hide the driver's from the fallback.
        """
        if not all(capturable for _, _, capturable in log):
            return None
        graphs = []
        try:
            for start in range(0, len(log), _MAX_NODES):
                self._stream.begin_capture()
                try:
                    for call, _, _ in log[start : start + _MAX_NODES]:
                        call()
                finally:
                    graphs.append(self._stream.end_capture())
        except RuntimeError as error:  # what CuPy and the driver raise
            self._graphs = False
            reason = _one_line(error)
            warnings.warn(f"{self.device}: steps are launched one by one, not as a graph: {reason}", stacklevel=2)
            return None

        def launch(kept: object = log) -> None:  # the log keeps the arrays alive that graphs read and write
            for graph in graphs:
                graph.launch(self._stream)

        return launch

    def free_bytes(self) -> int:
        """Free on the device, and free in CuPy's pool; no more than the host has where both share their memory.

        There the driver counts what programs of the host have taken as free (ROCm/hip#3892).
        """
        with _errors(), self._cuda_device:
            free, _ = cp.cuda.runtime.memGetInfo()
            if self.is_integrated:
                free = min(free, host.free_bytes())
            return int(free) + int(cp.get_default_memory_pool().free_bytes())

    def release_memory(self) -> None:
        """Memory of arrays and graphs that are no more goes back to the driver, and so does what ops share.

        Waits for all work. Arrays that are in use stay, those that a captured step of another model keeps, too.
        """
        with self.active():
            self._stream.synchronize()
            self._staged.clear()
            self._scratch = self._counters = None
            self._graph_pool.free_all_blocks()
            cp.get_default_memory_pool().free_all_blocks()
            cp.get_default_pinned_memory_pool().free_all_blocks()

    def seconds(self, run: Callable[[], object]) -> float:
        """Time that the device takes for what `run` queues. It is called twice: behind the first the device is busy."""
        with self.active():
            start, end = cp.cuda.Event(), cp.cuda.Event()
            run()
            start.record(self._stream)
            run()
            end.record(self._stream)
            end.synchronize()
            return float(cp.cuda.get_elapsed_time(start, end)) / 1000

    def read_seconds(self, size: int) -> float:
        """Time in which so many bytes are read at the rate of a large copy, measured now."""
        with self.active():
            source = cp.empty(_COPIED_BYTES, np.uint8)
            target = cp.empty_like(source)

            def copy() -> None:
                for _ in range(_COPIES):
                    target.data.copy_from_device_async(source.data, _COPIED_BYTES, self._stream)

            seconds = self.seconds(copy) / _COPIES
        return size * seconds / (2 * _COPIED_BYTES)

    def _blas(self) -> str:
        name = "hipBLAS" if IS_HIP else "cuBLAS"
        if not self.has_blas:  # making its handle may be what ends the process
            return f"{name}, which has no kernels for {self.arch}: prompts are slower"
        version = _version(cublas.getVersion(cp.cuda.device.get_cublas_handle()), 100, 100)
        return f"{name}; CuPy was built for rocBLAS {version}" if IS_HIP else f"{name} {version}"

    def facts(self) -> list[tuple[str, str]]:
        """What there is to say about the device, as (what, found)."""
        with _errors(), self._cuda_device:
            return self._facts()

    def _facts(self) -> list[tuple[str, str]]:
        runtime = cp.cuda.runtime
        free, total = runtime.memGetInfo()
        return [
            ("device", "; ".join(filter(None, (self.device, compilers.untested(self.arch))))),
            ("waves", f"{self.wave_size} threads, {self.num_cus} {'compute units' if IS_HIP else 'multiprocessors'}"),
            ("device memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"),
            (
                "driver, runtime",
                f"{_api_version(runtime.driverGetVersion())}, {_api_version(runtime.runtimeGetVersion())}",
            ),
            ("CuPy", f"{cp.__version__} for {'ROCm' if IS_HIP else 'CUDA'}"),
            ("BLAS", self._blas()),
            ("kernel cache", _kernel_cache()),
        ]


@dataclass(frozen=True, slots=True)
class _Guarded:
    """An array's memory with a band before and behind it."""

    memory: Any
    number: int
    """Of the array: others have other numbers in their bands."""

    @property
    def bands(self) -> tuple[Any, Any]:
        return self.memory[:_GUARD_BYTES], self.memory[-_GUARD_BYTES:]

    @property
    def values(self) -> npt.NDArray[np.uint8]:
        """Of the two bands."""
        return np.random.default_rng(self.number).integers(0, 256, (2, _GUARD_BYTES), np.uint8)


@dataclass(frozen=True, slots=True)
class _Staged:
    """Host memory that the device copies from, and when it has."""

    array: npt.NDArray[Any]
    event: Any


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Host memory that the device can reach, of the GPU that is current."""
    size = math.prod(shape)
    memory = cp.cuda.alloc_pinned_memory(max(size * dtype.itemsize, 1))
    return np.frombuffer(memory, dtype, size).reshape(shape)


@contextmanager
def _errors() -> Iterator[None]:
    """CuPy's errors as forge's."""
    try:
        yield
    except cp.cuda.memory.OutOfMemoryError as error:
        raise _out_of_memory(_one_line(error).removeprefix("Out of memory ").rstrip(".")) from None
    except (cp.cuda.driver.CUDADriverError, cp.cuda.runtime.CUDARuntimeError, cublas.CUBLASError) as error:
        text = _one_line(error)
        if isinstance(error, cp.cuda.runtime.CUDARuntimeError) and error.status == _MEMORY_ALLOCATION:
            raise _out_of_memory(f"{text}, of the device or pinned of the host") from None
        raise DeviceError(f"the GPU failed: {text}") from None


def _nvrtc(variant: sources.Variant, target: str) -> bytes:
    """A variant's code for a target that CuPy does not name to NVRTC: one with what only this architecture has."""
    program = nvrtc.createProgram(sources.source(variant.file), f"{variant.file}.hip", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={target}", "-ftz=true", *_FLAGS, *variant.options))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError:
        why = compilers.reason(nvrtc.getProgramLog(program), variant)
        raise DeviceError(f"{variant.name} does not compile for {target}: {why}") from None
    finally:
        nvrtc.destroyProgram(program)


def _pointer(function: Any) -> int:
    """The driver's function: CuPy has two kinds of kernels, of modules that it compiled and that it loaded."""
    return int(getattr(function, "kernel", function).ptr)


def _check(status: int) -> None:
    """A CUresult as the error that CuPy's own calls raise for it."""
    if status:
        raise cp.cuda.driver.CUDADriverError(status)


def _kernel_cache() -> str:
    """Where what is compiled here is kept: by forge on HIP, by CuPy on CUDA."""
    if IS_HIP:
        return str(kernel_cache.stores()[0])
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))


def _out_of_memory(what: str) -> OutOfMemoryError:
    return OutOfMemoryError(f"out of device memory: {what}: use a smaller --context or model")


def _version(number: int, minors: int, patches: int) -> str:
    """A version that is kept as one number: so many minor ones of a major one, so many patches of a minor one."""
    return f"{number // minors // patches}.{number // patches % minors}.{number % patches}"


def _api_version(number: int) -> str:
    """As HIP and CUDA count: 70051831 is HIP 7.0.51831, 13010 is CUDA 13.1.0."""
    return f"HIP {_version(number, 100, 100_000)}" if IS_HIP else f"CUDA {_version(number, 100, 10)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


_BACKENDS: dict[int, CupyBackend] = {}


def backend(index: int) -> CupyBackend:
    """The backend of a GPU; there is one of each."""
    if index not in _BACKENDS:
        found = len(cards())
        if index >= found:
            there = f"{found} GPU{'s are' if found != 1 else ' is'} there"
            raise DeviceError(f"{KIND}:{index} does not exist: {there}{_hiding()}")
        with _errors():
            _BACKENDS[index] = CupyBackend(index)
    return _BACKENDS[index]
