"""Where arrays live and ops run: selection of a backend by device, and dispatch by array type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from forge.backend import rocm
from forge.backend.base import Backend as Backend
from forge.backend.numpy import NUMPY
from forge.errors import DeviceError, ParameterError

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
        f"{', '.join(card.text for card in others)}; the device {cupy.KIND}:N is another"
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
