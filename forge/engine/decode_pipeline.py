"""Decode steps of the same sequences, one behind the other: the device never waits for the host to see an id."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.config import MAX_LOGPROBS
from forge.engine.graph_cache import GraphCache, bucket
from forge.engine.model_runner import Runner, Sampled, drawn_words, sampled
from forge.engine.request_table import Slots
from forge.engine.sequence import Sequence
from forge.models.batch import Batch
from forge.ops.decode_state import advance, decode_inputs

MAX_PENDING = 2
"""Steps that are queued and not collected: the device runs one while the host sees the ids of the one before and queues
the next. A sequence that an id ends has run in those behind it: at most one ghost step, and one more with each that is
queued ahead."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A launched step: whose ids it samples, and a function that waits for them."""

    sequences: tuple[Sequence, ...]
    wait: Callable[[], None]
    drawn: np.ndarray[Any, Any]
    """What `sampled` takes; it is there after `wait`, until as many steps later as the mail has places."""


class DecodePipeline:
    """Rows of running sequences, whose last ids, lengths and sampling parameters live and advance on the device.

    Nothing is uploaded from step to step but the new pages of sequences that get one, and which rows became idle. A
    sequence that ends leaves its row idle: the step that was queued behind its last id is a ghost, whose id is dropped.
    Its pages may be given away at once, although the ghost writes to them: the device works in order, and whatever runs
    for their new owner is launched later. The loop is drained and begun again, with one upload of the rows' state,
    where a smaller bucket holds the sequences that are left, and behind a step with a prompt: that one advances every
    sequence from the host, so that all rows' state is new.
    """

    def __init__(self, runner: Runner, max_sequences: int, context: int, graphs: bool | int = True) -> None:
        self.runner, self.max_sequences = runner, max_sequences
        backend, cache = runner.backend, runner.cache
        runner.model.reserve(context)  # recorded steps hold the RoPE tables' addresses
        self._sequences: list[Sequence] = []
        """Of the rows of the next step; `slots.idle` where a row has none."""
        self._pending: deque[_Pending] = deque()
        pages = -(-context // cache.page_size)
        self.slots = Slots(backend, max_sequences, runner.model.config.vocab_size, pages, cache.spare_page)
        self._rows = backend.asarray(np.arange(max_sequences), np.int32)
        self._starts = backend.asarray(np.arange(max_sequences + 1), np.int32)
        self._plans = GraphCache(backend, self.slots, graphs)
        most_words = max_sequences * drawn_words(MAX_LOGPROBS)
        self._mail, self._host_mail = backend.host_visible((MAX_PENDING + 2, most_words), np.int32)
        """Where a step leaves what it draws for the host: a copy between steps would hold up the next one."""
        self._turn = 0
        """Steps since `begin`."""
        self.is_stale = False
        """A replay has computed something else than its launches: the loop is to be abandoned, and what is in the cache
        may be wrong."""

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def begin(self, sequences: list[Sequence]) -> None:
        """Upload the state of these sequences, whose ids are all known."""
        idle = bucket(len(sequences), self.max_sequences) - len(sequences)
        self._sequences = [*sequences, *[self.slots.idle] * idle]
        self.slots.fill(self._sequences)
        self._turn = 0

    def holds(self, sequences: list[Sequence]) -> bool:
        """Whether the next step can be one of these without beginning anew: all have rows, in the smallest bucket."""
        fits = bucket(len(sequences), self.max_sequences) == len(self._sequences)
        return fits and set(sequences).issubset(self._sequences)

    def rehearse(self, logits: Any, sequences: list[Sequence]) -> None:
        """Call what a step calls beside the model, on rows of logits."""
        count, rows = len(sequences), self._rows[: len(sequences)]
        slots = Slots(self.runner.backend, count, logits.shape[1], len(sequences[0].pages))
        slots.fill(sequences)
        last_ids, lengths = slots.fields["last_id"], slots.fields["length"]
        decode_inputs(rows, last_ids, lengths, slots.page_table, slots.turn, self.runner.cache.page_size)
        ids, _ = slots.draw(logits)
        advance(ids, rows, last_ids, lengths, slots.counts, None, None, None)

    def launch(self, sequences: list[Sequence]) -> None:
        """Queue the next step of these sequences, which the loop holds, with the pages that it needs. Other rows become
        idle before it: theirs end with an id that is known, or under way.

        Where a replay was compared and is wrong, nothing is queued and `is_stale` is set.
        """
        running = set(sequences)
        self._sequences = [s if s in running else self.slots.idle for s in self._sequences]
        self.slots.update(self._sequences)
        outputs = self._plans.run(len(self._sequences), self._step)
        if outputs is None:
            self.is_stale = True
            return
        drawn, _ = outputs
        self._turn += 1
        place = self._host_mail[self._turn % len(self._host_mail), : drawn.size].reshape(drawn.shape)
        self._pending.append(_Pending(tuple(self._sequences), self.runner.backend.record_event(), place))
        for sequence in sequences:
            sequence.num_computed += 1
            sequence.num_pending += 1

    def _step(self, rows: int) -> list[Any]:
        """One step of the first rows; what `sampled` takes, and the logits, by which a replay is compared."""
        runner, slots, row_numbers = self.runner, self.slots, self._rows[:rows]
        last_ids, lengths = slots.fields["last_id"], slots.fields["length"]
        ids, positions, kv_slots, row_lengths = decode_inputs(
            row_numbers, last_ids, lengths, slots.page_table, slots.turn, runner.cache.page_size
        )
        page_table = slots.page_table[:rows]  # row r is slot r
        batch = Batch(ids, positions, kv_slots, self._starts[: rows + 1], row_lengths, page_table, None)
        logits = runner.model(batch, runner.cache)
        ids, drawn = slots.draw(logits)
        advance(ids, row_numbers, last_ids, lengths, slots.counts, drawn.reshape(-1), slots.turn, self._mail)
        return [drawn, logits]

    def leave(self) -> None:
        """The next steps of its sequences are others'."""
        self._sequences = []

    def abandon(self, sequences: list[Sequence]) -> None:
        """After an interruption: forget the steps under way. The ids known by now are what to begin again from.

        sequences: all that are not finished; one that waits now may have run in these steps.
        """
        try:
            for pending in self._pending:
                pending.wait()  # its ids must not arrive in a place that is used again
        finally:
            self._pending.clear()
            self._sequences = []
            self.is_stale = False
            for sequence in sequences:  # a step may have gone from the loop before its ids came: all of them
                sequence.num_pending = 0
                sequence.num_computed = min(sequence.num_computed, len(sequence.ids) - 1)

    def collect(self) -> list[Sampled]:
        """The ids of the oldest step; those of idle rows and of sequences that have ended meanwhile are dropped."""
        pending = self._pending[0]
        pending.wait()
        self._pending.popleft()
        found = [token for token in sampled(pending.sequences, pending.drawn) if token.sequence.finish_reason is None]
        for token in found:
            token.sequence.num_pending -= 1
        return found
