"""Per-request decode state on the device, one row per sequence."""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.config import SamplingParams
from forge.engine.sampler import Edits, Sampler
from forge.engine.sequence import Sequence
from forge.ops.decode_state import copy_rows, scatter

_Field = tuple[str, Any, Callable[[Sequence], float]]
_FIELDS: tuple[_Field, ...] = (  # the widest first, so that each lies at a multiple of its size
    ("seed", np.uint64, lambda s: s.seed),
    ("choice", np.uint32, lambda s: s.choice),
    ("last_id", np.int32, lambda s: s.ids[-1] if s.ids else 0),
    ("length", np.int32, lambda s: s.num_tokens),
    ("adapter", np.int32, lambda s: s.adapter),
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

    Changes from the host are one upload of pairs of words, which ops bring to their places.
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
        """i32 (1,) steps so far, as `decode_inputs` counts them."""
        if kinds:
            backend.upload(self.page_tables, np.zeros(self.page_tables.shape, np.int32))
        spare = [[page] for page in spare_pages]
        self.idle = Sequence(0, [], 0, SamplingParams(temperature=0), 0, 0, pages=spare, finish_reason="stop")
        """What a row without a sequence holds: no ids, so that the row stays as it is, and a page that no sequence has.
        All idle rows of a step compute the same and write the same to the same place, in whatever order."""
        self._held: list[Sequence | None] = [None] * num_rows
        """The sequence that is in each row; None where that is not known."""
        self._num_entries = [[0] * num_rows for _ in range(kinds)]
        """How many entries of each sequence's page lists are in the table, by kind and row."""
        self._staging = backend.empty((_MIN_EDITS, 2), np.int32)

    def forget(self) -> None:
        """What the rows hold is not known any more."""
        self._held = [None] * self.num_rows
        self.sampler.forget()

    def fill(self, sequences: list[Sequence]) -> None:
        """Put these sequences into the first rows. All their ids are known."""
        self.sampler.serve(sequences)
        self.update(sequences, joining=range(len(sequences)))

    def update(
        self,
        sequences: list[Sequence],
        *,
        joining: Collection[int] = (),
        moves: Items[tuple[int, int]] = (),
        step: int | None = None,
    ) -> None:
        """Upload what has changed in the first rows, which are these sequences', and their new pages.

        joining: Rows whose sequence has come, and whose ids are all known.
        moves: Pairs (from, to) of rows. A sequence goes from one to the other with its last id and its history, which
        the device alone knows.
        step: What `self.step` becomes.
        """
        moved = {target for _, target in moves}
        changed = {row for row, sequence in enumerate(sequences) if sequence is not self._held[row]}
        changed |= {*joining} | moved
        edits = self._field_edits(sorted(changed - moved), sequences) + self._field_edits(
            sorted(moved), sequences, without="last_id"
        )
        for counts in self._num_entries:
            for row in changed:
                counts[row] = 0
        for kind, counts in enumerate(self._num_entries):
            start = self._pages_start + kind * self.num_rows * self.max_pages
            edits += [
                _run(start + row * self.max_pages + known, np.array(sequence.pages[kind][known:], np.int32))
                for row, (sequence, known) in enumerate(zip(sequences, counts, strict=False))
                if len(sequence.pages[kind]) > known
            ]
        if step is not None:
            edits.append(_run(len(self._words) - 1, np.array([step], np.int32)))
        history = self.sampler.begin(len(sequences), {row: sequences[row] for row in joining})
        if edits or moves:
            self._upload([np.array(moves, np.int32).reshape(-1, 2), *map(_pairs, (edits, history))])
            self._held[: len(sequences)] = sequences
            for kind, counts in enumerate(self._num_entries):
                counts[: len(sequences)] = [len(sequence.pages[kind]) for sequence in sequences]

    def changing(self, rows: int) -> list[Any]:
        """The arrays that a step of the first `rows` rows changes; the last ids first."""
        state = [*(self.fields[name][:rows] for name in ("last_id", "length")), self.step]
        return [*state, self.sampler.counts[:rows]] if self.sampler.penalized_rows else state

    def perturbed(self, state: list[Any]) -> list[Any]:
        """Other values for the arrays of `changing` and any behind them, as a step after other ids finds them."""
        last_ids, *others = state
        return [(last_ids + 1) % self.vocabulary, *others]

    def _field_edits(self, rows: list[int], sequences: list[Sequence], without: str = "") -> list[Edits]:
        edits: list[Edits] = []
        places = np.array(rows, np.int32)[:, None]
        for name, dtype, value in _FIELDS if rows else ():
            if name != without:
                words = np.array([value(sequences[row]) for row in rows], dtype).view(np.int32).reshape(len(rows), -1)
                width = words.shape[1]
                indices = self._starts[name] + places * width + np.arange(width, dtype=np.int32)
                edits.append((indices.reshape(-1), words.reshape(-1)))
        return edits

    def _upload(self, parts: list[np.ndarray[Any, Any]]) -> None:
        """Upload moves, edits of the table and edits of the history, and bring them to their places in this order."""
        pairs = np.concatenate(parts)
        if len(pairs) > len(self._staging):  # the device is done with the old one before it is used for something else
            self._staging = self.backend.empty((1 << (len(pairs) - 1).bit_length(), 2), np.int32)
        self.backend.upload(self._staging[: len(pairs)], pairs)
        first, second, _ = np.cumsum([len(part) for part in parts])
        if first:
            self._move(self._staging[:first])
        if second > first:
            scatter(self._staging[first:second], self._words)
        if len(pairs) > second:
            scatter(self._staging[second : len(pairs)], self.sampler.history.reshape(-1))

    def _move(self, moves: Any) -> None:
        """moves: i32 (N, 2) rows from and to."""
        last_ids = self.fields["last_id"].reshape(-1, 1)
        copy_rows(moves, last_ids, last_ids)
        if self.sampler.keeps_rows:  # a new history may have fewer rows than sequences come from
            for part in range(2):
                copy_rows(moves, self.sampler.history[part], self.sampler.history[part])


def _run(start: int, values: np.ndarray[Any, Any]) -> Edits:
    """Values at consecutive words from `start` on."""
    words = values.view(np.int32)
    return np.arange(start, start + len(words), dtype=np.int32), words


def _pairs(edits: list[Edits]) -> np.ndarray[Any, Any]:
    """Edits as pairs (index, value): int32 (N, 2)."""
    if not edits:
        return np.empty((0, 2), np.int32)
    return np.stack([np.concatenate(column) for column in zip(*edits, strict=True)], axis=1)
