"""The base class of backends. Its methods serve where ops have run when they return, on arrays in the host's memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from forge.config import Progress

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


class Backend(ABC):
    """One kind of device. `launch` is the only way an op runs on it."""

    device: str
    """The device as a person would name it."""
    arch: str = ""
    """The GPU's architecture as its compiler names it: gfx1100, sm_90; "" where there is no GPU."""
    dtype: np.dtype[Any]
    """dtype of matrix inputs and of the KV cache."""
    is_gpu: bool
    """Whether kernels run here. Quantized weights then stay in their blocks; else they become floats."""
    is_integrated = False
    """Whether the device's memory is the host's, though it runs kernels."""
    is_asynchronous: bool
    """Ops return before they have run, so steps can be queued ahead of their results."""

    @abstractmethod
    def launch(self, op: Launchable, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any: ...

    def active(self) -> AbstractContextManager[None]:
        """Makes the device current for the ops within. They give no warnings about NaN and infinity."""
        return nullcontext()

    def released(self) -> AbstractContextManager[None]:
        """Other threads may use the device, though this one is within `active`: it waits for one of them."""
        return nullcontext()

    @abstractmethod
    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Any:
        """The array on the device."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An array whose contents are undefined."""

    @abstractmethod
    def to_numpy(self, array: Any) -> npt.NDArray[Any]: ...

    def upload(self, array: Any, values: npt.NDArray[Any], *, is_pinned: bool = False) -> None:
        """Overwrite an array with a host's values of its dtype, in order with the ops before and after.

        is_pinned: They lie in memory that `host_visible` gave, and stay as they are until an event behind this.
        """
        np.copyto(np.asarray(array), values)

    def snapshot(self, array: Any) -> Any:
        """A copy of a contiguous array on the device, in order with the ops before and after."""
        return np.array(array)

    def host_visible(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Any, npt.NDArray[Any]]:
        """Host memory that ops write: the array for ops, and the same memory for the host to read behind an event."""
        array = self.empty(shape, dtype)
        return array, np.asarray(array)

    def record_event(self) -> Callable[[], None]:
        """Record an event behind all ops so far; the function waits until they have run."""
        return lambda: None

    def prepare(self, run: Callable[[], None], progress: Progress | None = None) -> None:  # noqa: B027
        """Compile what the ops that `run` calls launch. `run` must not use their results."""

    def capture(
        self, step: Callable[[], T], state: Sequence[Any], perturb: Callable[[list[Any]], list[Any]] | None
    ) -> tuple[T, Callable[..., T | None]]:
        """Run a step of ops; its result, and a function that replays it on the same arrays.

        The function gives the step's result, which is valid until another step runs. With compare=True it gives None
        where a replay did something else than the ops do.

        state: The arrays that the step reads and changes. A step from the same values gives the same result, so that a
        backend may try a replay.
        perturb: From values of the state, other values from which the step computes something else. None: the ops are
        launched one by one.
        """
        return step(), lambda compare=False: step()

    @property
    def step_generation(self) -> object:
        """Captured steps may be replayed as long as this is the same object."""
        return None

    def reserve(self, nbytes: int) -> None:  # noqa: B027
        """Take so many bytes, in one piece, for what recorded and captured steps make, if they share memory."""

    def recorder(self) -> Callable[[Sequence[Any], Callable[[], T]], T]:
        """A function of (inputs, step) that runs a step of ops, or queues again what the step launched before.

        That is so where a step ran with inputs at the same addresses, of the same shapes. `step` may read nothing else
        that is not at the same place each time. It launches nothing but ops and returns an array, which is valid until
        the function is called again: ops that read it must be called before.
        """
        return lambda inputs, step: step()

    def facts(self) -> list[tuple[str, str]]:
        """What there is to say about the device, as (what, found)."""
        return [("device", self.device)]

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""

    def release_memory(self) -> None:  # noqa: B027
        """Wait for all work, then give memory back to the system that no array uses any more."""
