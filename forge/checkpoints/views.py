"""Tensors put together out of stored ones when their rows are read: reordered, transposed, stacked, widened.

A view holds no weights. Reading some of its rows reads those bytes of the stored tensors that they are made of, a few
MB at a time, so that a model is loaded without a second copy of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError, UnsupportedError
from forge.formats.blocks import Bytes
from forge.formats.ggml import GGMLType, dequantize, nbytes, row_bytes
from forge.formats.safetensors import Info
from forge.formats.source import show

Indices = NDArray[np.int64]
Pick = Callable[[Indices], Indices]
"""From numbers of rows to the numbers of the rows that they are in another tensor."""

STEP_BYTES = 4 << 20
"""What is read at a time, where rows are not read to where they stay."""
_LEAST_RUN_BYTES = 1 << 16
"""Rows that lie together are read alone if they have so many bytes on average; shorter ones with those between them."""
_NARROW = 32
"""Columns are read alone, row by row, where they are one in so many: reading whole rows then costs as much."""
_TILE = 32, 512
"""Rows and columns that are transposed together."""
TYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
"""ggml's types of safetensors' dtypes, for weights."""


class View(ABC):
    """A tensor: `shape`, slowest dimension first, and ggml `type`. A vector is one row."""

    shape: tuple[int, ...]
    type: GGMLType

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.shape[-1])

    @property
    def nbytes(self) -> int:
        return nbytes(self.type, self.shape)

    @abstractmethod
    def read(self, start: int, out: Bytes) -> None:
        """Fill `out`, uint8 (rows, row_bytes), with the rows from `start` on. Threads may call it."""

    def step(self) -> int:
        """Rows that are read at a time."""
        return max(STEP_BYTES // self.row_bytes, 1)

    def floats(self) -> NDArray[np.float32]:
        """All of a small tensor, in its shape."""
        out = np.empty((self.num_rows, self.row_bytes), np.uint8)
        self.read(0, out)
        return dequantize(out, self.type).reshape(self.shape)


class Files(Protocol):
    """Open files that hold tensors, as `SafeTensors` are."""

    @property
    def tensors(self) -> Mapping[str, Info]: ...

    def path_of(self, name: str) -> Path: ...

    def read(self, name: str, start: int, out: NDArray[Any]) -> None: ...


class Stored(View):
    """A tensor of the files as it is."""

    def __init__(self, files: Files, name: str) -> None:
        """Raises UnsupportedError for a dtype that is not one of weights, FormatError for a tensor without numbers."""
        info = files.tensors[name]
        if info.dtype not in TYPES:
            raise UnsupportedError(f"{files.path_of(name)}: tensor {show(name)} has {info.dtype} numbers, not weights")
        if not info.nbytes:
            raise FormatError(f"{files.path_of(name)}: tensor {show(name)} is empty")
        self.files, self.name = files, name
        self.shape, self.type = info.shape or (1,), TYPES[info.dtype]

    def read(self, start: int, out: Bytes) -> None:
        self.files.read(self.name, start * self.row_bytes, out)


class Picked(View):
    """Rows of another tensor, by number."""

    def __init__(self, inner: View, pick: Pick, shape: tuple[int, ...]) -> None:
        self._inner, self._pick, self.shape, self.type = inner, pick, shape, inner.type

    def read(self, start: int, out: Bytes) -> None:
        step = self.step()
        for first in range(0, len(out), step):
            part = out[first : first + step]
            self._read_part(self._pick(np.arange(start + first, start + first + len(part))), part)

    def _read_part(self, rows: Indices, out: Bytes) -> None:
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        if out.nbytes >= _LEAST_RUN_BYTES * (len(ends) + 1) or not len(ends):
            for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
                self._inner.read(int(rows[begin]), out[begin:end])
            return
        low, high = int(rows.min()), int(rows.max()) + 1
        step = 4 * self.step()
        for first in range(low, high, step):  # the rows between may be many
            read = np.empty((min(step, high - first), out.shape[1]), np.uint8)
            self._inner.read(first, read)
            if len(read) == high - low:
                np.take(read, rows - low, axis=0, out=out, mode="clip")  # they are within, and clip needs no copy
                return
            within = (rows >= first) & (rows < first + len(read))
            out[within] = read[rows[within] - first]


class PickedNumbers(View):
    """Numbers of a vector, by number."""

    def __init__(self, inner: View, pick: Pick, count: int) -> None:
        self._inner, self._pick, self.shape, self.type = inner, pick, (count,), inner.type

    def read(self, start: int, out: Bytes) -> None:
        whole = np.empty((1, self._inner.row_bytes), np.uint8)
        self._inner.read(0, whole)
        numbers = whole.reshape(-1, self.type.type_size)
        out.reshape(-1, self.type.type_size)[:] = numbers[self._pick(np.arange(self.shape[0]))]


def picked(inner: View, pick: Pick, count: int | None = None) -> View:
    """Rows of a matrix, or numbers of a vector, in another order: `count` of them, None = as many as it has.

    A matrix may have more than two dimensions; the result then has two.
    """
    if len(inner.shape) == 1:
        return PickedNumbers(inner, pick, count or inner.shape[0])
    return Picked(inner, pick, (count or inner.num_rows, inner.shape[-1]))


class Stacked(View):
    """Tensors of one shape, stacked in a new first dimension: the experts of a layer."""

    def __init__(self, parts: Sequence[View]) -> None:
        self._parts = parts
        self.shape, self.type = (len(parts), *parts[0].shape), parts[0].type

    def read(self, start: int, out: Bytes) -> None:
        size = self._parts[0].num_rows
        done = 0
        while done < len(out):
            part, first = divmod(start + done, size)
            count = min(size - first, len(out) - done)
            self._parts[part].read(first, out[done : done + count])
            done += count


class Joined(View):
    """Matrices with rows of one length, one below the other; or vectors."""

    def __init__(self, parts: Sequence[View]) -> None:
        """Raises FormatError for parts that do not fit together."""
        if len({(part.type, part.shape[1:]) for part in parts}) > 1:
            raise FormatError(f"tensors of {', '.join(str(part.shape) for part in parts)} cannot be one")
        self._parts = parts
        self.shape, self.type = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].type

    def read(self, start: int, out: Bytes) -> None:
        if len(self.shape) == 1:
            ends = np.cumsum([part.nbytes for part in self._parts])
            for part, target in zip(self._parts, np.split(out[0], ends[:-1]), strict=True):
                part.read(0, target[None])
            return
        done = 0
        for part in self._parts:
            count = min(part.num_rows - start, len(out) - done)
            if count > 0:
                part.read(start, out[done : done + count])
                done += count
            start = max(start - part.num_rows, 0)


class Transposed(View):
    """A stored (N, K, M), or (K, M), with its last two dimensions swapped: columns first, first + every, ... of it."""

    def __init__(self, inner: Stored, first: int = 0, every: int = 1, count: int | None = None) -> None:
        *more, self._inner_rows, self._inner_cols = inner.shape
        self._inner, self._first, self._every = inner, first, every
        self._count = self._inner_cols if count is None else count
        self.shape, self.type = (*more, self._count, self._inner_rows), inner.type

    def read(self, start: int, out: Bytes) -> None:
        size, done = self.type.type_size, 0
        while done < len(out):
            matrix, column = divmod(start + done, self._count)
            count = min(self._count - column, len(out) - done)
            target = out[done : done + count].view(f"u{size}")  # (count, K)
            first = self._first + column * self._every
            self._read_columns(matrix, first, first + (count - 1) * self._every + 1, target)
            done += count

    def _read_columns(self, matrix: int, first: int, stop: int, out: NDArray[Any]) -> None:
        """The columns of one matrix, as rows of `out`. Of a few columns only these are read, row by row."""
        files, name = self._inner.files, self._inner.name
        size, cols = self.type.type_size, self._inner_cols
        narrow = (stop - first) * _NARROW < cols
        read_first, read_stop = (first, stop) if narrow else (0, cols)
        step = max(STEP_BYTES // ((read_stop - read_first) * size), 1)
        buffer = np.empty((step, read_stop - read_first), out.dtype)
        for row in range(0, self._inner_rows, step):
            part = buffer[: min(step, self._inner_rows - row)]
            place = (matrix * self._inner_rows + row) * cols + read_first
            for start, rows in enumerate(part) if narrow else ((0, part),):
                files.read(name, (place + start * cols) * size, rows)
            _transpose(part[:, first - read_first : stop - read_first : self._every], out[:, row : row + len(part)])


def _transpose(source: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy by tiles that stay in the cache: three times as fast as NumPy's copy of the whole."""
    for row in range(0, source.shape[0], _TILE[0]):
        for column in range(0, source.shape[1], _TILE[1]):
            part = source[row : row + _TILE[0], column : column + _TILE[1]]
            out[column : column + part.shape[1], row : row + part.shape[0]] = part.T


class Widened(View):
    """A tensor as float32, plus a number: norms that are stored less one."""

    type = GGMLType.F32

    def __init__(self, inner: View, plus: float = 0.0) -> None:
        self._inner, self._plus, self.shape = inner, np.float32(plus), inner.shape

    def read(self, start: int, out: Bytes) -> None:
        floats = out.view(np.float32)
        step = self.step()
        for first in range(0, len(out), step):
            part = floats[first : first + step]
            stored = np.empty((len(part), self._inner.row_bytes), np.uint8)
            self._inner.read(start + first, stored)
            dequantize(stored, self._inner.type, part)
            if self._plus:  # -0.0 + 0.0 would be 0.0
                part += self._plus


class Whole(View):
    """A small tensor that is read whole and made anew, float32."""

    type = GGMLType.F32

    def __init__(self, inner: View, make: Callable[[NDArray[np.float32]], NDArray[np.float32]], shape: tuple[int, ...]):
        self._inner, self._make, self.shape = inner, make, shape

    def read(self, start: int, out: Bytes) -> None:
        made = np.ascontiguousarray(self._make(self._inner.floats()), np.float32).reshape(-1, self.shape[-1])
        out.view(np.float32)[:] = made[start : start + len(out)]


class Numbers(View):
    """Numbers that no tensor holds: float32, one row."""

    type = GGMLType.F32

    def __init__(self, values: Sequence[float] | NDArray[np.float32]) -> None:
        self._values = np.asarray(values, np.float32)
        self.shape = self._values.shape

    def read(self, start: int, out: Bytes) -> None:
        out.reshape(-1)[:] = self._values.view(np.uint8)
