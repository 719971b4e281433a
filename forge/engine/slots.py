"""What the next ids of some sequences depend on beside the model, on the device: one slot of state for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.engine.sequence import Sequence
from forge.ops.sampling import sample
from forge.ops.step import place

_Field = tuple[str, Any, Callable[[Sequence], float]]
_FIELDS: tuple[_Field, ...] = (  # the widest first: each lies at a multiple of its size
    ("seed", np.uint64, lambda s: s.seed),
    ("choice", np.uint32, lambda s: s.choice),
    ("last_id", np.int32, lambda s: s.ids[-1]),
    ("length", np.int32, lambda s: len(s.ids)),
    ("temperature", np.float32, lambda s: s.params.temperature),
    ("top_k", np.int32, lambda s: min(s.params.top_k, 2**31 - 1)),
    ("top_p", np.float32, lambda s: s.params.top_p),
    ("min_p", np.float32, lambda s: s.params.min_p),
)
_DRAW = ("temperature", "top_k", "top_p", "min_p", "seed", "choice", "length")
_FEWEST_EDITS = 256

_Edits = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Indices of 32-bit words, and what to write there."""


class Slots:
    """State of the first so many sequences, field by field, and their pages, as views of one array of 32-bit words.

    Whatever changes from the host goes there as one upload of (index, value) pairs, which an op puts in their places.
    """

    def __init__(self, backend: Backend, count: int, most_pages: int = 0) -> None:
        self.backend, self.most_pages = backend, most_pages
        words = sum(np.dtype(dtype).itemsize // 4 for _, dtype, _ in _FIELDS)
        self._words = backend.empty((count * (words + most_pages),), np.int32)
        self._starts: dict[str, int] = {}
        self.fields: dict[str, Any] = {}
        start = 0
        for name, dtype, _ in _FIELDS:
            stop = start + count * np.dtype(dtype).itemsize // 4
            self._starts[name], self.fields[name] = start, self._words[start:stop].view(dtype)
            start = stop
        self._pages_start = start
        self.page_table = self._words[start:].reshape(count, most_pages)
        if most_pages:  # beside a sequence's own pages there are always numbers of some
            backend.upload(self.page_table, np.zeros((count, most_pages), np.int32))
        self._num_pages: list[int] = []
        self._staging = backend.empty((_FEWEST_EDITS, 2), np.int32)

    def fill(self, sequences: list[Sequence]) -> None:
        """State of these sequences in the first slots: one upload, of as much as they have."""
        edits = [
            _run(self._starts[name], np.array([value(s) for s in sequences], dtype)) for name, dtype, value in _FIELDS
        ]
        if self.most_pages:
            self._num_pages = [0] * len(sequences)
            edits += self._new_pages(sequences)
        self._place(edits)
        self._num_pages = [len(s.pages) for s in sequences]

    def grow(self, sequences: list[Sequence]) -> None:
        """Upload the pages that the sequences of the first slots got since; nothing where they got none."""
        if edits := self._new_pages(sequences):
            self._place(edits)
            self._num_pages = [len(s.pages) for s in sequences]

    def advancing(self, rows: int) -> list[Any]:
        """What a step of so many rows changes."""
        return [self.fields[name][:rows] for name in ("last_id", "length")]

    def _new_pages(self, sequences: list[Sequence]) -> list[_Edits]:
        return [
            _run(self._pages_start + row * self.most_pages + known, np.array(sequence.pages[known:], np.int32))
            for row, (sequence, known) in enumerate(zip(sequences, self._num_pages, strict=True))
            if len(sequence.pages) > known
        ]

    def _place(self, edits: Iterable[_Edits]) -> None:
        indices, values = zip(*edits, strict=True)
        pairs = np.stack([np.concatenate(indices), np.concatenate(values)], axis=1).astype(np.int32, copy=False)
        if len(pairs) > len(self._staging):  # the device is done with the old one before it is used for something else
            self._staging = self.backend.empty((1 << (len(pairs) - 1).bit_length(), 2), np.int32)
        staged = self._staging[: len(pairs)]
        self.backend.upload(staged, pairs)
        place(staged, self._words)

    def draw(self, logits: Any) -> Any:
        """int32 (B,): the next id of each row, drawn as the first B slots say."""
        fields = [self.fields[name][: len(logits)] for name in _DRAW]
        return sample(logits, *fields[:-1], fields[-1].view(np.uint32))


def _run(start: int, values: np.ndarray[Any, Any]) -> _Edits:
    """Values, one behind the other from a word on."""
    words = values.view(np.int32)
    return np.arange(start, start + len(words), dtype=np.int32), words
