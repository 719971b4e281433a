"""Where arrays live and ops run: the Backend protocol, selection by device, and dispatch by array type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from forge.backend import rocm
from forge.backend.numpy import NUMPY
from forge.config import Progress
from forge.errors import DeviceError, ParameterError

T = TypeVar("T")


class Launchable(Protocol):
    """What a backend needs of an op: the function that runs on NumPy arrays, the one that launches its kernels."""

    @property
    def name(self) -> str: ...

    @property
    def run_cpu(self) -> Callable[..., Any]: ...

    @property
    def run_gpu(self) -> Callable[..., Any] | None: ...

    def check(self, args: Sequence[Any], options: dict[str, Any]) -> dict[str, int]: ...


class Backend(Protocol):
    """One kind of device. `launch` is the only way an op runs on it."""

    @property
    def device(self) -> str:
        """The device as a person would name it."""
        ...

    @property
    def arch(self) -> str:
        """The GPU's architecture as its compiler names it: gfx1100, sm_90; "" where there is no GPU."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of matrix inputs and of the KV cache."""
        ...

    @property
    def is_gpu(self) -> bool:
        """Whether kernels run here. Quantized weights then stay in their blocks; else they become floats."""
        ...

    def launch(self, op: Launchable, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any: ...

    def active(self) -> AbstractContextManager[None]:
        """Makes the device current for the ops within. They give no warnings about NaN and infinity."""
        ...

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Any: ...

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any: ...

    def to_numpy(self, array: Any) -> npt.NDArray[Any]: ...

    @property
    def is_asynchronous(self) -> bool:
        """Ops return before they have run, so steps can be queued ahead of their results."""
        ...

    def upload(self, array: Any, values: npt.NDArray[Any]) -> None:
        """Overwrite an array with a host's values of its dtype, in order with the ops before and after."""
        ...

    def host_visible(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Any, npt.NDArray[Any]]:
        """Host memory that ops write: the array for ops, and the same memory for the host to read behind an event."""
        ...

    def record_event(self) -> Callable[[], None]:
        """Record an event behind all ops so far; the function waits until they have run."""
        ...

    def prepare(self, run: Callable[[], None], progress: Progress | None = None) -> None:
        """Compile what the ops that `run` calls launch. `run` must not use their results."""
        ...

    def capture(
        self, step: Callable[[], T], state: Sequence[Any], perturb: Callable[[list[Any]], list[Any]] | None
    ) -> tuple[T, Callable[..., T | None]]:
        """Run a step of ops; its result, and a function that replays it on the same arrays.

        The function gives the step's result. With compare=True it gives None where a replay did something else than the
        ops do.

        state: The arrays that the step reads and changes. A step from the same values gives the same result, so that a
        backend may try a replay.
        perturb: From values of the state, other values from which the step computes something else. None: the ops are
        launched one by one.
        """
        ...

    def facts(self) -> list[tuple[str, str]]:
        """What there is to say about the device, as (what, found)."""
        ...

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""
        ...

    def release_memory(self) -> None:
        """Wait for all work, then give memory back to the system that no array uses any more."""
        ...


_OWNERS: dict[type, Callable[[Any], Backend]] = {np.ndarray: lambda array: NUMPY}


def register(array_type: type, owner: Callable[[Any], Backend]) -> None:
    """Ops on arrays of this type run on the backend that `owner` gives for one."""
    _OWNERS[array_type] = owner


def backend_of(array: object) -> Backend:
    """The backend on which an array lives."""
    if owner := _OWNERS.get(type(array)):
        return owner(array)
    raise TypeError(f"not an array of a known device: {type(array).__name__}")


def select(device: str) -> Backend:
    """The backend for ``"auto"``, ``"cpu"``, ``"hip"``, ``"cuda"``, ``"hip:1"``.

    auto takes a GPU if CuPy finds one, of several the discrete one with the most compute units; else NumPy. `explain`
    says why. Raises ParameterError for an unknown name and
    DeviceError for a device that cannot be used: a device that was asked for is never replaced by another.
    """
    kind, colon, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    is_number = index.isdecimal() and len(index) < 5
    if kind not in ("auto", "cpu", "hip", "cuda") or (colon and not (kind in ("hip", "cuda") and is_number)):
        message = f"device must be auto, cpu, hip, cuda, hip:N or cuda:N, not {device!r:.60}"
        raise ParameterError(message, parameter="device")
    if kind == "cpu":
        return NUMPY
    if kind == "auto":
        try:
            return _gpu(None, None)
        except DeviceError:
            return NUMPY
    return _gpu(kind, int(index or 0))


def explain() -> str:
    """Why `auto` is what it is: which GPU it took and which are there beside it, or why it found none."""
    try:
        cupy = _cupy(None)
        best, *others = cupy.cards()
    except DeviceError as error:
        return str(error)
    if not others:
        return "the GPU that CuPy found"
    others.sort(key=lambda card: int(card.index))
    return (
        f"{best.text} is the {'' if best.is_integrated else 'discrete '}GPU with the most compute units; also there: "
        f"{', '.join(card.text for card in others)}; the device {best.kind}:N is another"
    )


def cupy_fault() -> tuple[str, str] | None:
    """Why the CuPy that is installed cannot be imported, and the fix; None where it can be, or there is none."""
    try:
        _cupy(None)
    except _CupyError as error:
        return error.cause, error.fix
    except DeviceError:
        pass
    return None


class _CupyError(DeviceError):
    """A CuPy that is installed and cannot be imported."""

    def __init__(self, device: str, cause: str, fix: str) -> None:
        super().__init__(f"device {device}: CuPy cannot be imported: {cause}", parameter="device", hint=fix)
        self.cause, self.fix = cause, fix


def _gpu(kind: str | None, index: int | None) -> Backend:
    """The backend of a GPU of this kind (None = either) and number (None = the best of them).

    Raises DeviceError saying what is missing.
    """
    cupy = _cupy(kind)
    found: Backend = cupy.backend(cupy.cards()[0].index if index is None else index)
    register(cupy.ARRAY, lambda array: cupy.backend(array.device.id))
    return found


def _cupy(kind: str | None) -> Any:
    """The module of GPUs. Raises DeviceError where CuPy is missing, cannot be imported, or is for another kind."""
    package = _PACKAGES.get(kind or "", "cupy-rocm-7-0 (AMD) or cupy-cuda13x (NVIDIA)")
    failed = rocm.preload() if rocm.installed_cupy() else []
    try:
        from forge.backend import cupy
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # CuPy raises what it likes, SystemExit too, where libraries do not fit it
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            if kind is None:
                raise DeviceError(f"no GPU is used without CuPy: for one install {package}") from None
            hint = f'install {package}, or use device="cpu"'
            raise DeviceError(f"device {kind} needs CuPy", parameter="device", hint=hint) from None
        raise _CupyError(kind or "auto", *rocm.diagnose(error, failed)) from error
    if kind not in (None, cupy.KIND):
        message = f"device {kind} needs {package}: the CuPy installed here is for {cupy.KIND}"
        raise DeviceError(message, parameter="device")
    return cupy


_PACKAGES = {"hip": "cupy-rocm-7-0", "cuda": "cupy-cuda13x"}
