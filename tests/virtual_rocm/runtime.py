"""libamdhip64: GPUs whose memory is the host's, and whose streams do their work when something waits for it.

VIRTUAL_ROCM_GFX names their architectures, one for each with commas between; VIRTUAL_ROCM_UNITS how many compute units
each has, with an "i" behind those of integrated ones.

Error codes, and what is allowed while a stream is captured, are those of `hip/hip_runtime_api.h` and of ROCm/clr's
`hip_memory.cpp`, `hip_module.cpp`, `hip_graph.cpp` and `hip_stream.cpp` in release 6.3; where HIP 7 changed them
("HIP 7 changes" in HIP's documentation), those of HIP 7.
"""

import ctypes
import gc
import os
import sys
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from itertools import count
from typing import Any

from virtual_rocm.calls import LOCK, THREAD, UNKNOWN, Failure, provided

INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONFIGURATION, NO_DEVICE, INVALID_DEVICE = 1, 2, 9, 100, 101
INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_HANDLE, ILLEGAL_STATE = 200, 209, 400, 401
NOT_FOUND, NOT_READY, LAUNCH_FAILURE, NOT_SUPPORTED = 500, 600, 719, 801
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_IMPLICIT = 900, 901, 906
ERRORS = {
    0: ("hipSuccess", "no error"),
    INVALID_VALUE: ("hipErrorInvalidValue", "invalid argument"),
    OUT_OF_MEMORY: ("hipErrorOutOfMemory", "out of memory"),
    INVALID_CONFIGURATION: ("hipErrorInvalidConfiguration", "invalid configuration argument"),
    NO_DEVICE: ("hipErrorNoDevice", "no ROCm-capable device is detected"),
    INVALID_DEVICE: ("hipErrorInvalidDevice", "invalid device ordinal"),
    INVALID_IMAGE: ("hipErrorInvalidImage", "device kernel image is invalid"),
    NO_BINARY_FOR_GPU: ("hipErrorNoBinaryForGpu", "no kernel image is available for execution on the device"),
    INVALID_HANDLE: ("hipErrorInvalidHandle", "invalid resource handle"),
    ILLEGAL_STATE: ("hipErrorIllegalState", "the operation cannot be performed in the present state"),
    NOT_FOUND: ("hipErrorNotFound", "named symbol not found"),
    NOT_READY: ("hipErrorNotReady", "device not ready"),
    LAUNCH_FAILURE: ("hipErrorLaunchFailure", "unspecified launch failure"),
    NOT_SUPPORTED: ("hipErrorNotSupported", "operation not supported"),
    CAPTURE_UNSUPPORTED: (
        "hipErrorStreamCaptureUnsupported",
        "operation not permitted when stream is capturing",
    ),
    CAPTURE_INVALIDATED: (
        "hipErrorStreamCaptureInvalidated",
        "operation failed due to a previous error during capture",
    ),
    UNKNOWN: ("hipErrorUnknown", "unknown error"),
    CAPTURE_IMPLICIT: ("hipErrorStreamCaptureImplicit", "operation would make the legacy stream depend on a capture"),
}
"""Names and texts as `hip_error.cpp` has them."""

ARCHS = os.environ.get("VIRTUAL_ROCM_GFX", "gfx1100").split(",")
GFX = ARCHS[0]
UNITS = os.environ.get("VIRTUAL_ROCM_UNITS", ",".join("8" for _ in ARCHS)).split(",")
FEATURES = {"gfx90a": ":sramecc+:xnack-", "gfx942": ":sramecc+:xnack-"}


def wave_of(arch: str) -> int:
    return 64 if arch.startswith("gfx9") else 32


def capability_of(arch: str) -> tuple[int, int]:
    """What HIP calls the compute capability: gfx1100 and gfx1101 have the same."""
    return int(arch[3:-2]), int(arch[-2], 16)


WAVE = wave_of(GFX)
VERSION = 70051831  # HIP 7.0.51831
MEMORY_BYTES = 1 << 30
NUM_DEVICES = int(os.environ.get("VIRTUAL_ROCM_DEVICES", len(ARCHS)))
_POISON = 0xFF  # NaN
_libc = ctypes.CDLL(None)
_libc.aligned_alloc.restype = c_void_p
_libc.aligned_alloc.argtypes = [c_size_t, c_size_t]
_libc.free.argtypes = [c_void_p]


class Properties(ctypes.Structure):
    """hipDeviceProp_tR0600 to gcnArchName, in the order of the header."""

    _fields_ = [
        ("name", ctypes.c_char * 256),
        ("uuid", ctypes.c_char * 16),
        ("luid", ctypes.c_char * 8),
        ("luidDeviceNodeMask", c_uint),
        ("totalGlobalMem", c_size_t),
        ("sharedMemPerBlock", c_size_t),
        ("regsPerBlock", c_int),
        ("warpSize", c_int),
        ("memPitch", c_size_t),
        ("maxThreadsPerBlock", c_int),
        ("maxThreadsDim", c_int * 3),
        ("maxGridSize", c_int * 3),
        ("clockRate", c_int),
        ("totalConstMem", c_size_t),
        ("major", c_int),
        ("minor", c_int),
        ("textureAlignment", c_size_t),
        ("texturePitchAlignment", c_size_t),
        ("deviceOverlap", c_int),
        ("multiProcessorCount", c_int),
        ("kernelExecTimeoutEnabled", c_int),
        ("integrated", c_int),
        ("from_canMapHostMemory_to_maxSurfaceCubemapLayered", c_int * 42),
        ("surfaceAlignment", c_size_t),
        ("from_concurrentKernels_to_memoryBusWidth", c_int * 10),
        ("l2CacheSize", c_int),
        ("from_persistingL2CacheMaxSize_to_localL1CacheSupported", c_int * 5),
        ("sharedMemPerMultiprocessor", c_size_t),
        ("from_regsPerMultiprocessor_to_cooperativeMultiDeviceLaunch", c_int * 12),
        ("sharedMemPerBlockOptin", c_size_t),
        ("from_pageableMemoryAccessUsesHostPageTables_to_maxBlocksPerMultiProcessor", c_int * 3),
        ("accessPolicyMaxWindowSize", c_int),
        ("reservedSharedMemPerBlock", c_size_t),
        ("from_hostRegisterSupported_to_unifiedFunctionPointers", c_int * 13),
        ("reserved", c_int * 63),
        ("hipReserved", c_int * 32),
        ("gcnArchName", ctypes.c_char * 256),
        ("rest", ctypes.c_char * 128),
    ]


class PointerAttributes(ctypes.Structure):
    """hipPointerAttribute_t."""

    _fields_ = [
        ("type", c_int),
        ("device", c_int),
        ("devicePointer", c_void_p),
        ("hostPointer", c_void_p),
        ("isManaged", c_int),
        ("allocationFlags", c_uint),
    ]


def current() -> int:
    """The GPU that this thread has chosen."""
    return getattr(THREAD, "device", 0)


class Memory:
    """Allocations of one kind: addresses in order, and their sizes."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.sizes: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        """The GPU that was current when each was made."""

    def add(self, size: int) -> int:
        address = _libc.aligned_alloc(4096, max(-(-size // 4096) * 4096, 4096))
        if not address:
            raise Failure(OUT_OF_MEMORY)
        ctypes.memset(address, _POISON, size)
        insort(self.starts, address)
        self.sizes[address] = size
        self.owners[address] = current()
        return int(address)

    def remove(self, address: int) -> None:
        if address not in self.sizes:
            raise Failure(INVALID_VALUE)
        self.starts.remove(address)
        del self.sizes[address], self.owners[address]
        _libc.free(address)

    def holds(self, address: int, size: int = 1) -> bool:
        """Whether so many bytes lie in one allocation."""
        return self.owner(address, size) is not None

    def owner(self, address: int, size: int = 1) -> int | None:
        """The GPU of the allocation that holds so many bytes."""
        place = bisect_right(self.starts, address) - 1
        if place < 0:
            return None
        start = self.starts[place]
        return self.owners[start] if address + size <= start + self.sizes[start] else None

    @property
    def used(self) -> int:
        """By all GPUs together."""
        return sum(self.sizes.values())


Work = Callable[[], None]


class Graph:
    """Work of a captured stream."""

    def __init__(self) -> None:
        self.nodes: list[Work] = []


class Event:
    """A mark in a stream: not recorded, waiting, or with the time when it was reached."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.time: float | None = None


class Stream:
    """Work in order."""

    def __init__(self, blocking: bool) -> None:
        self.blocking = blocking
        self.device = current()
        self.queue: deque[Work] = deque()
        self.capture: Graph | None = None
        self.invalidated = False

    def add(self, work: Work) -> None:
        if self.invalidated:
            raise Failure(CAPTURE_INVALIDATED)
        (self.queue if self.capture is None else self.capture.nodes).append(work)

    def work_once(self) -> None:
        """The first piece. Python collects no garbage meanwhile: that may hold memory, and to free it is to wait for
        all work, so that the pieces behind this one would be done in the midst of it.
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            if self.queue:
                self.queue.popleft()()
        finally:
            if collects:
                gc.enable()

    def work_until(self, is_done: Callable[[], bool]) -> None:
        while self.queue and not is_done():
            self.work_once()

    def work(self) -> None:
        self.work_until(lambda: False)


class Device:
    """All that the process has made of the GPU."""

    def __init__(self) -> None:
        self.memory, self.pinned = Memory(), Memory()
        self.objects: dict[int, Any] = {}
        self.next_handle = count(0x1000, 0x10)
        self.null = Stream(blocking=True)
        self.broken = 0
        """What every call gives that waits or launches, once a kernel has failed."""
        self.launches: list[tuple[str, str]] = []
        """Variant and kernel of each launch that was called, in a graph or not."""
        self.foreign: list[str] = []
        """Kernels that were launched and are not forge's."""
        self.missing: Callable[[], str] = str
        self.good_replays = float("inf")
        """How many graphs are still launched right. Later ones leave their first kernel out, so that the others find
        what an earlier launch left: stale data, as reported of drivers (ROCm/hip#3887)."""

    def reaches(self, address: int, gpu: int | None) -> bool:
        """Whether a GPU, or any, can read there: another's memory only where peers were given access."""
        owner = self.memory.owner(address)
        return (owner is not None and gpu in (None, owner)) or self.pinned.holds(address)

    def new(self, thing: Any) -> int:
        handle = next(self.next_handle)
        self.objects[handle] = thing
        return handle

    def get(self, handle: int | None, kind: type[Any]) -> Any:
        if kind is Stream and not handle:
            for stream in self.streams():
                if stream.capture is not None:  # the legacy stream waits for blocking ones
                    stream.invalidated = True
                    raise Failure(CAPTURE_IMPLICIT)
                if stream.blocking:
                    stream.work()
            return self.null
        thing = self.objects.get(handle or 0)
        if not isinstance(thing, kind):
            raise Failure(INVALID_HANDLE)
        return thing

    def drop(self, handle: int | None, kind: type[Any]) -> Any:
        thing = self.get(handle, kind)
        del self.objects[handle or 0]
        return thing

    def streams(self) -> list[Stream]:
        return [thing for thing in self.objects.values() if isinstance(thing, Stream)]

    def wait(self, error_while_captured: int) -> None:
        for stream in self.streams():
            if stream.capture is not None:
                stream.invalidated = True
                raise Failure(error_while_captured)
        self.work()
        self.check()

    def work(self) -> None:
        """All that has been asked for."""
        for stream in [self.null, *self.streams()]:
            stream.work()

    def check(self) -> None:
        if self.broken:
            raise Failure(self.broken)

    def run(self, launch: Callable[[], str], pointers: list[int], gpu: int | None = None) -> None:
        """A kernel with these arrays; after one has failed nothing runs, as on a GPU whose queue has stopped."""
        if self.broken:
            return
        astray = [f"{pointer:#x} is no memory of the GPU's" for pointer in pointers if not self.reaches(pointer, gpu)]
        if error := "; ".join(astray) or launch():
            print(f"virtual ROCm: {error}", file=sys.stderr, flush=True)
            self.broken = LAUNCH_FAILURE

    def copy(self, target: int, source: int, size: int, to_device: bool, from_device: bool) -> None:
        """What is the GPU's when a copy is called must still be when it runs."""

        def move() -> str:
            ctypes.memmove(target, source, size)
            return ""

        self.run(move, [address for address, own in ((target, to_device), (source, from_device)) if own and size])

    def fill(self, target: int, value: int, size: int) -> None:
        def fill() -> str:
            ctypes.memset(target, value, size)
            return ""

        self.run(fill, [target] if size else [])


DEVICE = Device()


def _put(pointer: int | None, value: Any) -> None:
    """Write a C value where a caller wants it."""
    if not pointer:
        raise Failure(INVALID_VALUE)
    ctypes.memmove(pointer, ctypes.byref(value), ctypes.sizeof(value))


def hipGetDeviceCount(pointer: c_void_p) -> c_int:
    _put(pointer, c_int(NUM_DEVICES))
    if not NUM_DEVICES:
        raise Failure(NO_DEVICE)


def hipGetDevice(pointer: c_void_p) -> c_int:
    if not NUM_DEVICES:
        raise Failure(NO_DEVICE)
    _put(pointer, c_int(current()))


def hipSetDevice(index: c_int) -> c_int:
    if not NUM_DEVICES:
        raise Failure(NO_DEVICE)
    if not 0 <= index < NUM_DEVICES:
        raise Failure(INVALID_DEVICE)
    THREAD.device = index


def hipRuntimeGetVersion(pointer: c_void_p) -> c_int:
    _put(pointer, c_int(VERSION))


def hipDriverGetVersion(pointer: c_void_p) -> c_int:
    _put(pointer, c_int(VERSION))


def hipGetDevicePropertiesR0600(pointer: c_void_p, index: c_int) -> c_int:
    if not 0 <= index < NUM_DEVICES:
        raise Failure(INVALID_DEVICE)
    arch, units = ARCHS[index], UNITS[index]
    capability, cores = capability_of(arch), int(units.removesuffix("i"))
    properties = Properties(
        name=b"Virtual AMD GPU",
        totalGlobalMem=MEMORY_BYTES,
        sharedMemPerBlock=64 << 10,
        regsPerBlock=64 << 10,
        warpSize=wave_of(arch),
        maxThreadsPerBlock=1024,
        maxThreadsDim=(1024, 1024, 1024),
        maxGridSize=(2**31 - 1, 65536, 65536),
        major=capability[0],
        minor=capability[1],
        # HIP counts pairs of compute units on RDNA, where a workgroup may have both.
        multiProcessorCount=cores // 2 if (10, 0) <= capability < (12, 5) else cores,
        integrated=units.endswith("i"),
        l2CacheSize=4 << 20,
        gcnArchName=(arch + FEATURES.get(arch, "")).encode(),
    )
    ctypes.memmove(pointer, ctypes.byref(properties), Properties.rest.offset)


def hipDeviceGetAttribute(pointer: c_void_p, attribute: c_int, index: c_int) -> c_int:
    major, minor = capability_of(ARCHS[index])
    values = {23: major, 61: minor, 87: wave_of(ARCHS[index])}  # compute capability, major and minor; wave size
    if attribute not in values:
        raise Failure(INVALID_VALUE)
    _put(pointer, c_int(values[attribute]))


def hipMalloc(pointer: c_void_p, size: c_size_t) -> c_int:
    if DEVICE.memory.used + size > MEMORY_BYTES:
        raise Failure(OUT_OF_MEMORY)
    _put(pointer, c_void_p(DEVICE.memory.add(size)))


def hipFree(address: c_void_p) -> c_int:
    _free(DEVICE.memory, address)


def hipHostMalloc(pointer: c_void_p, size: c_size_t, flags: c_uint) -> c_int:
    _put(pointer, c_void_p(DEVICE.pinned.add(size)))


def hipHostFree(address: c_void_p) -> c_int:
    _free(DEVICE.pinned, address)


def _free(memory: Memory, address: int | None) -> None:
    if address:
        DEVICE.work()  # it waits for it
        memory.remove(address)


def hipMemGetInfo(free: c_void_p, total: c_void_p) -> c_int:
    _put(free, c_size_t(MEMORY_BYTES - DEVICE.memory.used))
    _put(total, c_size_t(MEMORY_BYTES))


def hipPointerGetAttributes(pointer: c_void_p, address: c_void_p) -> c_int:
    _put(pointer, PointerAttributes(device=-2))  # unregistered; hipInvalidDeviceId
    if DEVICE.memory.holds(address or 0):
        _put(pointer, PointerAttributes(type=2, devicePointer=address))
    elif DEVICE.pinned.holds(address or 0):
        _put(pointer, PointerAttributes(type=1, devicePointer=address, hostPointer=address))


def _check_range(address: int | None, size: int) -> bool:
    """Whether it is the GPU's own. Raises Failure where an allocation ends before the range (`ihipMemcpy_validate`)."""
    for memory in (DEVICE.memory, DEVICE.pinned):
        if memory.holds(address or 0) and not memory.holds(address or 0, size):
            raise Failure(INVALID_VALUE)
    return DEVICE.memory.holds(address or 0)


def hipMemcpy(target: c_void_p, source: c_void_p, size: c_size_t, kind: c_int) -> c_int:
    DEVICE.get(None, Stream)
    DEVICE.check()
    _check_range(target, size)
    _check_range(source, size)
    ctypes.memmove(target, source, size)


def hipMemcpyAsync(target: c_void_p, source: c_void_p, size: c_size_t, kind: c_int, stream: c_void_p) -> c_int:
    queue = DEVICE.get(stream, Stream)
    DEVICE.check()
    to_device, from_device = _check_range(target, size), _check_range(source, size)
    if queue.capture is None and not (from_device or DEVICE.pinned.holds(source or 0)):
        held = ctypes.create_string_buffer(ctypes.string_at(source, size), size)  # pageable memory is staged
        queue.add(lambda: DEVICE.copy(target, ctypes.addressof(held), size, to_device, False))
    else:
        queue.add(lambda: DEVICE.copy(target, source, size, to_device, from_device))
    if queue is DEVICE.null or (queue.capture is None and not (to_device or DEVICE.pinned.holds(target or 0))):
        queue.work()  # the copy to pageable memory is synchronous


def hipMemset(target: c_void_p, value: c_int, size: c_size_t) -> c_int:
    hipMemsetAsync(target, value, size, None)


def hipMemsetAsync(target: c_void_p, value: c_int, size: c_size_t, stream: c_void_p) -> c_int:
    queue = DEVICE.get(stream, Stream)
    DEVICE.check()
    if not _check_range(target, size):
        raise Failure(INVALID_VALUE)
    queue.add(lambda: DEVICE.fill(target, value, size))
    if queue is DEVICE.null:
        queue.work()


def hipDeviceSynchronize() -> c_int:
    DEVICE.wait(CAPTURE_UNSUPPORTED)


def hipStreamCreate(pointer: c_void_p) -> c_int:
    _put(pointer, c_void_p(DEVICE.new(Stream(blocking=True))))


def hipStreamCreateWithFlags(pointer: c_void_p, flags: c_uint) -> c_int:
    _put(pointer, c_void_p(DEVICE.new(Stream(blocking=not flags & 1))))  # hipStreamNonBlocking


def hipStreamCreateWithPriority(pointer: c_void_p, flags: c_uint, priority: c_int) -> c_int:
    hipStreamCreateWithFlags(pointer, flags)


def hipStreamGetPriority(stream: c_void_p, pointer: c_void_p) -> c_int:
    _put(pointer, c_int(0))


def hipStreamGetFlags(stream: c_void_p, pointer: c_void_p) -> c_int:
    _put(pointer, c_uint(not DEVICE.get(stream, Stream).blocking))


def hipStreamDestroy(stream: c_void_p) -> c_int:
    DEVICE.get(stream, Stream).work()
    DEVICE.drop(stream, Stream)


def hipStreamSynchronize(stream: c_void_p) -> c_int:
    queue = DEVICE.get(stream, Stream)
    if queue.capture is not None:
        queue.invalidated = True
        raise Failure(CAPTURE_UNSUPPORTED)
    queue.work()
    DEVICE.check()


def hipStreamQuery(stream: c_void_p) -> c_int:
    queue = DEVICE.get(stream, Stream)
    if queue.capture is not None:
        queue.invalidated = True
        raise Failure(CAPTURE_UNSUPPORTED)
    DEVICE.check()
    if queue.queue:
        queue.work_once()  # so that who asks again and again gets an end
        raise Failure(NOT_READY)


def hipStreamWaitEvent(stream: c_void_p, event: c_void_p, flags: c_uint) -> c_int:
    waited = DEVICE.get(event, Event)
    DEVICE.get(stream, Stream).add(lambda: _reach(waited))


def hipStreamIsCapturing(stream: c_void_p, pointer: c_void_p) -> c_int:
    queue = DEVICE.objects.get(stream or 0)
    status = 0 if queue is None or queue.capture is None else 2 if queue.invalidated else 1
    _put(pointer, c_int(status))


def hipStreamBeginCapture(stream: c_void_p, mode: c_int) -> c_int:
    if not stream:
        raise Failure(CAPTURE_UNSUPPORTED)
    queue = DEVICE.get(stream, Stream)
    if queue.capture is not None:
        raise Failure(ILLEGAL_STATE)
    queue.capture, queue.invalidated = Graph(), False


def hipStreamEndCapture(stream: c_void_p, pointer: c_void_p) -> c_int:
    queue = DEVICE.get(stream, Stream)
    if queue.capture is None:
        raise Failure(ILLEGAL_STATE)
    graph, invalidated = queue.capture, queue.invalidated
    queue.capture, queue.invalidated = None, False
    if invalidated:
        _put(pointer, c_void_p(None))
        raise Failure(CAPTURE_INVALIDATED)
    _put(pointer, c_void_p(DEVICE.new(graph)))


def hipGraphInstantiate(
    pointer: c_void_p, graph: c_void_p, failed_node: c_void_p, log: c_void_p, size: c_size_t
) -> c_int:
    executable = Graph()
    executable.nodes = list(DEVICE.get(graph, Graph).nodes)
    _put(pointer, c_void_p(DEVICE.new(executable)))


def hipGraphLaunch(graph: c_void_p, stream: c_void_p) -> c_int:
    DEVICE.check()
    nodes = tuple(DEVICE.get(graph, Graph).nodes)
    DEVICE.good_replays -= 1
    if DEVICE.good_replays < 0:
        nodes = nodes[1:]

    def run() -> None:
        for work in nodes:
            work()

    DEVICE.get(stream, Stream).add(run)


def hipGraphDestroy(graph: c_void_p) -> c_int:
    DEVICE.drop(graph, Graph)


def hipGraphExecDestroy(graph: c_void_p) -> c_int:
    DEVICE.drop(graph, Graph)


def hipEventCreate(pointer: c_void_p) -> c_int:
    _put(pointer, c_void_p(DEVICE.new(Event())))


def hipEventCreateWithFlags(pointer: c_void_p, flags: c_uint) -> c_int:
    hipEventCreate(pointer)


def hipEventDestroy(event: c_void_p) -> c_int:
    DEVICE.drop(event, Event)


def hipEventRecord(event: c_void_p, stream: c_void_p) -> c_int:
    marked, queue = DEVICE.get(event, Event), DEVICE.get(stream, Stream)
    marked.stream, marked.time = queue, None

    def reach() -> None:
        marked.time = time.perf_counter()

    queue.add(reach)
    if queue is DEVICE.null:
        queue.work()


def hipEventQuery(event: c_void_p) -> c_int:
    marked = DEVICE.get(event, Event)
    _refuse_captured(marked)
    DEVICE.check()
    if marked.stream is not None and marked.time is None:
        if marked.stream.queue:
            marked.stream.work_once()
        raise Failure(NOT_READY)


def hipEventSynchronize(event: c_void_p) -> c_int:
    marked = DEVICE.get(event, Event)
    _refuse_captured(marked)
    _reach(marked)
    DEVICE.check()


def _refuse_captured(event: Event) -> None:
    if event.stream is not None and event.stream.capture is not None:
        event.stream.invalidated = True
        raise Failure(CAPTURE_UNSUPPORTED)


def _reach(event: Event) -> None:
    if event.stream is not None:
        event.stream.work_until(lambda: event.time is not None)


def hipEventElapsedTime(pointer: c_void_p, start: c_void_p, end: c_void_p) -> c_int:
    times = [DEVICE.get(event, Event) for event in (start, end)]
    if any(event.stream is None for event in times):
        raise Failure(INVALID_HANDLE)
    if any(event.time is None for event in times):
        raise Failure(NOT_READY)
    _put(pointer, c_float(1000 * (times[1].time - times[0].time)))


class Module:
    """A loaded code object."""

    def __init__(self, kernels: dict[str, Any]) -> None:
        self.kernels = kernels
        self.device = current()


class Function:
    """A kernel of a module."""

    def __init__(self, kernel: Any, device: int) -> None:
        self.kernel, self.device = kernel, device


def hipModuleLoadData(pointer: c_void_p, image: c_void_p) -> c_int:
    from virtual_rocm import execution

    DEVICE.check()
    arch = ARCHS[current()]
    found = execution.load(execution.image(image), arch, wave_of(arch))
    with LOCK:
        _put(pointer, c_void_p(DEVICE.new(Module(found))))


hipModuleLoadData.in_parallel = True  # type: ignore[attr-defined]  # the harness compiles beside it


def hipModuleUnload(module: c_void_p) -> c_int:
    DEVICE.drop(module, Module)


def hipModuleGetFunction(pointer: c_void_p, module: c_void_p, name: c_char_p) -> c_int:
    held = DEVICE.get(module, Module)
    found = held.kernels.get(name.decode())
    if found is None:
        raise Failure(NOT_FOUND)
    _put(pointer, c_void_p(DEVICE.new(Function(found, held.device))))


def hipModuleLaunchKernel(
    function: c_void_p,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    lds_bytes: c_uint,
    stream: c_void_p,
    parameters: c_void_p,
    extra: c_void_p,
) -> c_int:
    """The limits are those of `hipModuleLaunchKernel` and `ihipLaunchKernel_validate` in ROCm/clr."""
    called = DEVICE.get(function, Function)
    kernel, wave = called.kernel, wave_of(ARCHS[called.device])
    queue = DEVICE.get(stream, Stream)
    DEVICE.check()
    if stream and queue.device != called.device:  # the function is another device's
        raise Failure(INVALID_HANDLE)
    grid, threads = (grid_x, grid_y, grid_z), block_x * block_y * block_z
    if grid_x > 2**31 - 1 or grid_y > 2**16 or grid_z > 2**16 or not all(grid):
        raise Failure(INVALID_VALUE)
    if grid_x * block_x >= 2**32 or not threads or threads > 1024:
        raise Failure(INVALID_CONFIGURATION)
    if kernel.lds_bytes + lds_bytes > 64 << 10 or extra or (kernel.sizes and not parameters):
        raise Failure(INVALID_VALUE)
    if threads > kernel.threads:
        raise Failure(LAUNCH_FAILURE)
    pointers = ctypes.cast(parameters, ctypes.POINTER(c_void_p))
    arguments = [ctypes.string_at(pointers[i], size) for i, size in enumerate(kernel.sizes)]  # copied now, as HIP does
    arrays = [int.from_bytes(arguments[i], "little") for i in kernel.arrays]
    if kernel.variant is None:
        DEVICE.foreign.append(kernel.name)
    else:
        DEVICE.launches.append((kernel.variant.name, kernel.name))
    addresses = [a for a in arrays if a]
    queue.add(lambda: DEVICE.run(lambda: kernel.launch(grid, threads, arguments, wave), addresses, called.device))


def hipLaunchKernel(
    function: c_void_p,
    grid: c_void_p,
    block: c_void_p,
    parameters: c_void_p,
    lds_bytes: c_size_t,
    stream: c_void_p,
) -> c_int:
    """Of a kernel compiled into CuPy: CUB and Thrust. The wheel has them for few GPUs."""
    DEVICE.foreign.append("one compiled into CuPy")
    raise Failure(NO_BINARY_FOR_GPU)


def hipPeekAtLastError() -> c_int:
    return getattr(THREAD, "last_error", 0)


def hipGetLastError() -> c_int:
    code, THREAD.last_error = getattr(THREAD, "last_error", 0), 0
    return code


_texts = {text: ctypes.create_string_buffer(text.encode()) for pair in ERRORS.values() for text in pair}


def hipGetErrorName(code: c_int) -> c_void_p:
    return ctypes.addressof(_texts[ERRORS[code][0]]) if code in ERRORS else _unknown(code)


def hipGetErrorString(code: c_int) -> c_void_p:
    if code == NOT_SUPPORTED and (name := DEVICE.missing()):
        return _unknown(code, f"the virtual ROCm has no {name}")
    return ctypes.addressof(_texts[ERRORS[code][1]]) if code in ERRORS else _unknown(code)


def _unknown(code: int, text: str = "") -> int:
    text = text or f"hipError {code}"
    return ctypes.addressof(_texts.setdefault(text, ctypes.create_string_buffer(text.encode())))


def functions() -> dict[str, Callable[..., Any]]:
    """All of them, by name."""
    return provided([value for name, value in globals().items() if name.startswith("hip")])
