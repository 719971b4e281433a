"""Decode steps of the same sequences, one behind the other: the device never waits for the host to see an id."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.engine.runner import Runner, Sampled
from forge.engine.sequence import Sequence
from forge.models.batch import Batch
from forge.ops.step import advance, decode_inputs

_MOST_PLANS = 16
"""Recorded steps that are kept: one for each number of rows and of pages that occurred lately."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A launched step: whose ids it samples, and a function that waits for them."""

    sequences: tuple[Sequence, ...]
    read: Callable[[], list[np.ndarray[Any, Any]]]


class DecodeLoop:
    """Rows of the running sequences, whose last ids, lengths and sampling parameters live and advance on the device.

    Nothing is uploaded from step to step but the page table, when a sequence gets a page. Where anything else changes
    (a sequence ends, another starts), the loop is drained and begun again.
    """

    def __init__(self, runner: Runner, max_sequences: int, context: int) -> None:
        self.runner = runner
        backend, cache = runner.backend, runner.cache
        runner.model.reserve(context)  # recorded steps hold the RoPE tables' addresses
        self.sequences: tuple[Sequence, ...] = ()
        self._pending: deque[_Pending] = deque()
        self._most_pages = -(-context // cache.page_size)
        slots, ints = (max_sequences,), np.int32
        self._slots = backend.asarray(np.arange(max_sequences), ints)
        self._starts = backend.asarray(np.arange(max_sequences + 1), ints)
        self._last_ids, self._lengths = backend.empty(slots, ints), backend.empty(slots, ints)
        self._page_table = backend.empty((max_sequences, self._most_pages), ints)
        self._parameters = [backend.empty(slots, array.dtype) for array in runner.parameters([])]
        self._num_pages: list[int] = []
        self._plans: dict[tuple[int, int], Callable[[], list[Any]]] = {}

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def begin(self, sequences: list[Sequence]) -> None:
        """Upload the state of these sequences, whose ids are all known."""
        upload, rows = self.runner.backend.upload, len(sequences)
        self.sequences = tuple(sequences)
        upload(self._last_ids[:rows], np.array([s.ids[-1] for s in sequences], np.int32))
        upload(self._lengths[:rows], np.array([len(s.ids) for s in sequences], np.int32))
        for array, values in zip(self._parameters, self.runner.parameters(sequences), strict=True):
            upload(array[:rows], values)
        self._num_pages = []

    def rehearse(self, logits: Any, sequences: list[Sequence]) -> None:
        """Call what a step calls beside the model, on rows of logits."""
        self.begin(sequences)
        slots = self._slots[: len(sequences)]
        decode_inputs(slots, self._last_ids, self._lengths, self._page_table, self.runner.cache.page_size, 1)
        advance(self._draw(logits, slots), slots, self._last_ids, self._lengths)
        self.sequences = ()

    def launch(self) -> None:
        """Queue the next step. The sequences have the pages that it needs."""
        runner, rows = self.runner, len(self.sequences)
        num_pages = [len(s.pages) for s in self.sequences]
        if num_pages != self._num_pages:
            table = np.zeros((rows, self._most_pages), np.int32)
            for row, sequence in zip(table, self.sequences, strict=True):
                row[: len(sequence.pages)] = sequence.pages
            runner.backend.upload(self._page_table[:rows], table)
            self._num_pages = num_pages
        # A plan serves as many pages as the next power of two, so that a long context is not paid for from the start.
        pages = min(1 << (max(num_pages) - 1).bit_length(), self._most_pages)
        plan = self._plans.pop((rows, pages), None)
        if plan is None:
            outputs, plan = runner.backend.record(lambda: self._step(rows, pages))
            if len(self._plans) >= _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
        else:
            outputs = plan()
        self._plans[rows, pages] = plan  # the latest last
        self._pending.append(_Pending(self.sequences, runner.backend.read(outputs)))
        for sequence in self.sequences:
            sequence.num_computed += 1
            sequence.num_pending += 1

    def _step(self, rows: int, pages: int) -> list[Any]:
        """One step of the first rows, each with at most so many pages; its ids (B,)."""
        runner = self.runner
        slots = self._slots[:rows]
        ids, positions, kv_slots, lengths, table = decode_inputs(
            slots, self._last_ids, self._lengths, self._page_table, runner.cache.page_size, pages
        )
        batch = Batch(ids, positions, kv_slots, self._starts[: rows + 1], lengths, table, None)
        logits = runner.model(batch, runner.cache)
        sampled = self._draw(logits, slots)
        advance(sampled, slots, self._last_ids, self._lengths)
        return [sampled]

    def _draw(self, logits: Any, slots: Any) -> Any:
        rows = len(slots)
        return self.runner.draw(logits, [array[:rows] for array in self._parameters], self._lengths[:rows])

    def abandon(self, running: list[Sequence]) -> None:
        """After an interruption: forget the steps under way. The ids known by now are what to begin again from."""
        touched = {*self.sequences, *(s for pending in self._pending for s in pending.sequences)}
        try:
            for pending in self._pending:
                pending.read()  # its copy must not arrive in memory that is used again
        finally:
            self._pending.clear()
            self.sequences = ()
            for sequence in running:
                if sequence in touched:
                    sequence.num_pending = 0
                    sequence.num_computed = len(sequence.ids) - 1

    def collect(self) -> list[Sampled]:
        """The ids of the oldest step; those of sequences that have ended meanwhile are dropped."""
        pending = self._pending[0]
        (ids,) = pending.read()
        self._pending.popleft()
        found = []
        for sequence, token in zip(pending.sequences, ids.tolist(), strict=True):
            if sequence.finish_reason is None:
                sequence.num_pending -= 1
                found.append(Sampled(sequence, token, None))
        return found
