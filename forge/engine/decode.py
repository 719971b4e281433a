"""Decode steps of the same sequences, one behind the other: the device never waits for the host to see an id."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.engine.runner import Runner, Sampled, sampled
from forge.engine.sequence import Sequence
from forge.engine.slots import Slots
from forge.models.batch import Batch
from forge.ops.step import advance, decode_inputs

_MOST_PLANS = 16
"""Recorded steps that are kept: one for each number of rows, of slots with penalties and of top log probabilities, with
and without draws, that occurred lately."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A launched step: whose ids it samples, and a function that waits for them."""

    sequences: tuple[Sequence, ...]
    read: Callable[[], list[np.ndarray[Any, Any]]]


class DecodeLoop:
    """Rows of the running sequences, whose last ids, lengths and sampling parameters live and advance on the device.

    Nothing is uploaded from step to step but the new pages of sequences that get one. Where anything else changes (a
    sequence ends, another starts), the loop is drained and begun again, with one upload of the rows' state.
    """

    def __init__(self, runner: Runner, max_sequences: int, context: int) -> None:
        self.runner = runner
        backend, cache = runner.backend, runner.cache
        runner.model.reserve(context)  # recorded steps hold the RoPE tables' addresses
        self.sequences: tuple[Sequence, ...] = ()
        self._pending: deque[_Pending] = deque()
        self.slots = Slots(backend, max_sequences, runner.model.config.vocab_size, -(-context // cache.page_size))
        self._rows = backend.asarray(np.arange(max_sequences), np.int32)
        self._starts = backend.asarray(np.arange(max_sequences + 1), np.int32)
        self._plans: dict[tuple[int, int, int | None, bool], Callable[[], list[Any]]] = {}

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def begin(self, sequences: list[Sequence]) -> None:
        """Upload the state of these sequences, whose ids are all known."""
        self.sequences = tuple(sequences)
        self.slots.fill(sequences)

    def rehearse(self, logits: Any, sequences: list[Sequence]) -> None:
        """Call what a step calls beside the model, on rows of logits."""
        count, rows = len(sequences), self._rows[: len(sequences)]
        slots = Slots(self.runner.backend, count, logits.shape[1], len(sequences[0].pages))
        slots.fill(sequences)
        last_ids, lengths = slots.fields["last_id"], slots.fields["length"]
        decode_inputs(rows, last_ids, lengths, slots.page_table, self.runner.cache.page_size)
        ids, _ = slots.draw(logits)
        advance(ids, rows, last_ids, lengths, slots.counts)

    def launch(self) -> None:
        """Queue the next step. The sequences have the pages that it needs."""
        runner, rows = self.runner, len(self.sequences)
        self.slots.grow(list(self.sequences))
        key = rows, self.slots.penalized_slots, self.slots.num_top, self.slots.draws
        plan = self._plans.pop(key, None)
        if plan is None:
            step, state = (lambda: self._step(rows)), self.slots.advancing(rows)
            outputs, plan = runner.backend.record(step, state, self.slots.disturbed)
            if penalized := self.slots.penalized_slots:  # those of a history that was made anew keep the old one
                self._plans = {k: p for k, p in self._plans.items() if k[1] in (0, penalized)}
            if len(self._plans) >= _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
        else:
            outputs = plan()
        self._plans[key] = plan  # the latest last
        self._pending.append(_Pending(self.sequences, runner.backend.read(outputs[:1])))
        for sequence in self.sequences:
            sequence.num_computed += 1
            sequence.num_pending += 1

    def _step(self, rows: int) -> list[Any]:
        """One step of the first rows; what `sampled` takes, and the logits, by which a replay is compared."""
        runner, slots, row_numbers = self.runner, self.slots, self._rows[:rows]
        last_ids, lengths = slots.fields["last_id"], slots.fields["length"]
        ids, positions, kv_slots, row_lengths = decode_inputs(
            row_numbers, last_ids, lengths, slots.page_table, runner.cache.page_size
        )
        page_table = slots.page_table[:rows]  # row r is slot r
        batch = Batch(ids, positions, kv_slots, self._starts[: rows + 1], row_lengths, page_table, None)
        logits = runner.model(batch, runner.cache)
        ids, drawn = slots.draw(logits)
        advance(ids, row_numbers, last_ids, lengths, slots.counts)
        return [drawn, logits]

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
        (drawn,) = pending.read()
        self._pending.popleft()
        found = [token for token in sampled(pending.sequences, drawn) if token.sequence.finish_reason is None]
        for token in found:
            token.sequence.num_pending -= 1
        return found
