"""Matrices that a GPU gets from a file: threads read rows into pinned memory while the rows before are on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.backend.parallel import run_all
from forge.backend.threads import THREADS

_PIECE_BYTES = 64 << 20
_PIECES = 2
_TASK_BYTES = 2 << 20
"""What a thread reads at a time, as the matrix has it."""
_ALIGNMENT = 256


class Run(NamedTuple):
    """Rows of a tensor that lie together in a matrix."""

    name: str
    first: int
    """The first row, of the tensor."""
    size: int


Read = Callable[[str, slice, Sequence[npt.NDArray[np.uint8]]], None]
"""Of a tensor, some rows, into arrays that are what the device gets of them: uint8 (rows, bytes)."""


def fill_host(planes: Sequence[npt.NDArray[np.uint8]], runs: Sequence[Run], read: Read) -> None:
    """Fill arrays of the host, uint8 (rows, bytes), with the rows of `runs`, one run behind the other."""
    step = max(_TASK_BYTES // sum(plane.shape[1] for plane in planes), 1)
    tasks, row = [], 0
    for name, first, count in runs:
        for done in range(0, count, step):
            rows = slice(first + done, first + min(done + step, count))
            tasks.append((name, rows, [plane[row : row + rows.stop - rows.start] for plane in planes]))
            row += rows.stop - rows.start
    run_all(lambda task: read(*task), tasks, THREADS.count, lambda _: None)


class Uploads:
    """Pieces of pinned memory, for one matrix after the other. They are given back with the object, as is the device's
    memory for rows that become others there."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._pieces: list[npt.NDArray[np.uint8]] = []
        self._are_copied: list[Callable[[], None]] = [lambda: None] * _PIECES
        self._next = 0
        self._rows: Any = None

    def fill(self, planes: Sequence[Any], runs: Sequence[Run], read: Read) -> None:
        """Fill arrays of the device, uint8 (rows, bytes), with the rows of `runs`, one run behind the other.

        The last copies may be under way when it returns; they are in order with the ops behind them.
        """
        row_bytes = sum(plane.shape[1] for plane in planes)
        step = max((_PIECE_BYTES - len(planes) * _ALIGNMENT) // row_bytes, 1)
        for start, group in _groups(runs, step):
            self._fill_rows(planes, start, group, read)

    def convert(self, row_bytes: int, runs: Sequence[Run], read: Read, use: Callable[[Any, slice], None]) -> None:
        """use(rows, where) for all rows of `runs`, some at a time: uint8 (rows, row_bytes) on the device, in memory
        that is used again behind it, and which rows of the matrix they are."""
        step = max((_PIECE_BYTES - _ALIGNMENT) // row_bytes, 1)
        if self._rows is None or self._rows.nbytes < step * row_bytes:
            self._rows = self._backend.empty((step * row_bytes,), np.uint8)
        for start, group in _groups(runs, step):
            count = sum(run.size for run in group)
            rows = self._rows[: count * row_bytes].reshape(count, row_bytes)
            self._fill_rows([rows], 0, group, read)
            use(rows, slice(start, start + count))

    def _fill_rows(self, planes: Sequence[Any], start: int, runs: Sequence[Run], read: Read) -> None:
        count = sum(run.size for run in runs)
        staged, place = [], 0
        piece = self._piece(sum(count * plane.shape[1] + _ALIGNMENT for plane in planes))
        for plane in planes:
            staged.append(piece[place : place + count * plane.shape[1]].reshape(count, -1))
            place += -(-staged[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
        fill_host(staged, runs, read)
        for plane, values in zip(planes, staged, strict=True):
            self._backend.upload(plane[start : start + count], values, is_pinned=True)
        self._are_copied[self._next - 1] = self._backend.record_event()

    def _piece(self, size: int) -> npt.NDArray[np.uint8]:
        """Memory that no copy reads any more. Of rows that are longer than a piece it is memory of their own."""
        if len(self._pieces) < _PIECES:
            self._pieces.append(self._backend.host_visible((_PIECE_BYTES,), np.uint8)[1])
        self._next = self._next % len(self._pieces) + 1
        self._are_copied[self._next - 1]()
        if size > self._pieces[self._next - 1].nbytes:
            self._pieces[self._next - 1] = self._backend.host_visible((size,), np.uint8)[1]
        return self._pieces[self._next - 1]


def _groups(runs: Sequence[Run], most: int) -> list[tuple[int, list[Run]]]:
    """The runs in groups of so many rows at most, each with the matrix's row that it begins with."""
    groups: list[tuple[int, list[Run]]] = []
    start = room = 0
    for name, first, count in runs:
        stop = first + count
        while first < stop:
            if not room:
                groups.append((start, []))
                room = most
            length = min(stop - first, room)
            groups[-1][1].append(Run(name, first, length))
            first, start, room = first + length, start + length, room - length
    return groups
