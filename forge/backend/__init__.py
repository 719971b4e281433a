"""Where arrays live and ops run: the Backend protocol, selection by device, and dispatch by array type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from forge.backend.numpy import NUMPY
from forge.errors import DeviceError, ParameterError


class Launchable(Protocol):
    """What a backend needs of an op: the function that runs on NumPy arrays."""

    @property
    def numpy(self) -> Callable[..., Any]: ...


class Backend(Protocol):
    """One kind of device. `launch` is the only way an op runs on it."""

    @property
    def device(self) -> str:
        """The device as a person would name it."""
        ...

    @property
    def activations(self) -> np.dtype[Any]:
        """dtype of matrix inputs and of the KV cache."""
        ...

    def launch(self, op: Launchable, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any: ...

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Any: ...

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any: ...

    def to_numpy(self, array: Any) -> npt.NDArray[Any]: ...

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""
        ...


def backend_of(array: object) -> Backend:
    """The backend on which an array lives."""
    if isinstance(array, np.ndarray):
        return NUMPY
    raise TypeError(f"not an array of a known device: {type(array).__name__}")


def select(device: str) -> Backend:
    """The backend for ``"auto"``, ``"cpu"``, ``"hip"``, ``"cuda"``, ``"hip:1"``.

    Raises ParameterError for an unknown name and DeviceError for a device that cannot be used: a device that was asked
    for is never replaced by another.
    """
    kind, colon, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in ("auto", "cpu", "hip", "cuda") or (colon and not (kind in ("hip", "cuda") and index.isdecimal())):
        raise ParameterError(f"device must be auto, cpu, hip, cuda, hip:N or cuda:N, not {device!r}")
    if kind in ("hip", "cuda"):
        raise DeviceError(f"device {device} is not available: forge has no GPU kernels yet; use --device cpu")
    return NUMPY
