"""Per-request decode state on the device, one row per sequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.config import SamplingParams
from forge.engine.sampler import Edits, Sampler
from forge.engine.sequence import Sequence
from forge.ops.decode_state import scatter

_Field = tuple[str, Any, Callable[[Sequence], float]]
_FIELDS: tuple[_Field, ...] = (  # the widest first, so that each lies at a multiple of its size
    ("seed", np.uint64, lambda s: s.seed),
    ("choice", np.uint32, lambda s: s.choice),
    ("last_id", np.int32, lambda s: s.ids[-1] if s.ids else 0),
    ("length", np.int32, lambda s: len(s.ids)),
    ("temperature", np.float32, lambda s: s.params.temperature),
    ("top_k", np.int32, lambda s: min(s.params.top_k, 2**31 - 1)),
    ("top_p", np.float32, lambda s: s.params.top_p),
    ("min_p", np.float32, lambda s: s.params.min_p),
    ("repetition", np.float32, lambda s: s.params.repetition_penalty),
    ("presence", np.float32, lambda s: s.params.presence_penalty),
    ("frequency", np.float32, lambda s: s.params.frequency_penalty),
)
_MIN_EDITS = 256


class RequestTable:
    """Last ids, lengths, sampling parameters and page tables of sequences, as views of one array of 32-bit words.

    Changes from the host are one upload of (index, value) pairs, which an op writes to their places.
    """

    def __init__(
        self, backend: Backend, num_rows: int, vocabulary: int, max_pages: int = 0, spare_pages: Items[int] = ()
    ) -> None:
        """
        Args:
            backend: Where the table lies.
            num_rows: Most sequences.
            vocabulary: V.
            max_pages: Entries of a sequence's page list, at most.
            spare_pages: The spare page of each kind of layer state; none = there are no page tables.
        """
        self.backend, self.num_rows, self.vocabulary, self.max_pages = backend, num_rows, vocabulary, max_pages
        self.sampler = Sampler(backend, vocabulary)
        words, kinds = sum(np.dtype(dtype).itemsize // 4 for _, dtype, _ in _FIELDS), len(spare_pages)
        self._words = backend.empty((num_rows * (words + kinds * max_pages) + 1,), np.int32)
        self._starts: dict[str, int] = {}
        self.fields: dict[str, Any] = {}
        """(num_rows,) each, by name"""
        start = 0
        for name, dtype, _ in _FIELDS:
            stop = start + num_rows * np.dtype(dtype).itemsize // 4
            self._starts[name], self.fields[name] = start, self._words[start:stop].view(dtype)
            start = stop
        self._pages_start = start
        self.page_tables = self._words[start:-1].reshape(kinds, num_rows, max_pages)
        """i32 (kinds of layer state, num_rows, max_pages). A released page stays in its entry: what it holds is not
        read any more. Entries without a page hold the number of some page."""
        self.step = self._words[-1:]
        """i32 (1,) steps since the rows were filled, as `decode_inputs` counts them."""
        if kinds:
            backend.upload(self.page_tables, np.zeros(self.page_tables.shape, np.int32))
        spare = [[page] for page in spare_pages]
        self.idle = Sequence(0, [], 0, SamplingParams(temperature=0), 0, 0, pages=spare, finish_reason="stop")
        """What a row without a sequence holds: no ids, so that the row stays as it is, and a page that no sequence has.
        All idle rows of a step compute the same and write the same to the same place, in whatever order."""
        self._held: list[Sequence | None] = []
        """The sequences of the first rows."""
        self._num_entries: list[list[int]] = []
        """How many entries of each sequence's page lists are in the table, by kind and row."""
        self._staging = backend.empty((_MIN_EDITS, 2), np.int32)

    def fill(self, sequences: list[Sequence]) -> None:
        """Put these sequences into the first rows, with one upload of all they have."""
        self._held = [None] * len(sequences)
        self._num_entries = [[0] * len(sequences) for _ in range(len(self.page_tables))]
        self._put(sequences, self.sampler.begin(sequences), [_run(len(self._words) - 1, np.zeros(1, np.int32))])

    def update(self, sequences: list[Sequence]) -> None:
        """Upload what has changed in the first rows: rows that became idle, and new pages. Nothing if neither."""
        self._put(sequences, [], [])

    def changing(self, rows: int) -> list[Any]:
        """The arrays that a step of the first `rows` rows changes; the last ids first."""
        state = [*(self.fields[name][:rows] for name in ("last_id", "length")), self.step]
        return [*state, self.sampler.counts[:rows]] if self.sampler.penalized_rows else state

    def perturbed(self, state: list[Any]) -> list[Any]:
        """Other values for the arrays of `changing` and any behind them, as a step after other ids finds them."""
        last_ids, *others = state
        return [(last_ids + 1) % self.vocabulary, *others]

    def _put(self, sequences: list[Sequence], history: list[Edits], edits: list[Edits]) -> None:
        """Upload edits of the table, what its first rows do not hold yet, and edits of the sampler's history."""
        new = [row for row, (s, held) in enumerate(zip(sequences, self._held, strict=True)) if s is not held]
        if new:
            edits = edits + self._row_edits(np.array(new, np.int32), [sequences[row] for row in new])
            for counts in self._num_entries:
                for row in new:
                    counts[row] = 0
        for kind, counts in enumerate(self._num_entries):
            start = self._pages_start + kind * self.num_rows * self.max_pages
            edits = edits + [
                _run(start + row * self.max_pages + known, np.array(sequence.pages[kind][known:], np.int32))
                for row, (sequence, known) in enumerate(zip(sequences, counts, strict=True))
                if len(sequence.pages[kind]) > known
            ]
        if edits:
            self._upload(edits, history)
            self._held = list(sequences)
            self._num_entries = [[len(s.pages[kind]) for s in sequences] for kind in range(len(self.page_tables))]

    def _row_edits(self, rows: np.ndarray[Any, Any], sequences: list[Sequence]) -> list[Edits]:
        edits = []
        for name, dtype, value in _FIELDS:
            words = np.array([value(s) for s in sequences], dtype).view(np.int32).reshape(len(rows), -1)
            width = words.shape[1]
            indices = self._starts[name] + rows[:, None] * width + np.arange(width, dtype=np.int32)
            edits.append((indices.reshape(-1), words.reshape(-1)))
        return edits

    def _upload(self, edits: list[Edits], history: list[Edits]) -> None:
        """Upload edits of the table, and the history's behind them."""
        pairs = np.stack([np.concatenate(column) for column in zip(*edits, *history, strict=True)], axis=1)
        if len(pairs) > len(self._staging):  # the device is done with the old one before it is used for something else
            self._staging = self.backend.empty((1 << (len(pairs) - 1).bit_length(), 2), np.int32)
        self.backend.upload(self._staging[: len(pairs)], pairs)
        border = sum(len(indices) for indices, _ in edits)
        scatter(self._staging[:border], self._words)
        if history:
            scatter(self._staging[border : len(pairs)], self.sampler.history.reshape(-1))


def _run(start: int, values: np.ndarray[Any, Any]) -> Edits:
    """Values at consecutive words from `start` on."""
    words = values.view(np.int32)
    return np.arange(start, start + len(words), dtype=np.int32), words
