"""Memory for arrays of a moment, which a thread keeps: fresh pages cost more than most operations on them."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class _Held(threading.local):
    def __init__(self) -> None:
        self.memory: dict[str, NDArray[np.uint8]] = {}


_HELD = _Held()


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array whose contents are undefined. It is this thread's until the name is used again."""
    size = prod(shape) * np.dtype(dtype).itemsize
    held = _HELD.memory.get(name)
    if held is None or held.size < size:
        held = _HELD.memory[name] = np.empty(size, np.uint8)
    return held[:size].view(dtype).reshape(shape)
