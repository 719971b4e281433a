"""Decode steps of the same sequences, one behind the other: the device never waits for the host to see an id."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.config import MAX_LOGPROBS
from forge.engine.graph_cache import GraphCache, bucket
from forge.engine.request_table import RequestTable
from forge.engine.sampler import read_sampled
from forge.engine.sequence import Sampled, Sequence
from forge.models import Decoder
from forge.models.batch import Batch, PageTable
from forge.ops.decode_state import advance, decode_inputs
from forge.state.model_state import ModelState

_MAX_QUEUED = 2
"""Steps that are queued and not collected. The device runs one while the host reads the ids of the step before and
queues the next. A sequence that an id ends still runs in the step behind it."""
_RING_ENTRIES = _MAX_QUEUED + 2


@dataclass(frozen=True, slots=True)
class _Queued:
    """A launched step."""

    sequences: tuple[Sequence, ...]
    """The sequence of each row."""
    wait: Callable[[], None]
    """Waits until the step has run."""
    drawn: np.ndarray[Any, Any]
    """The step's entry of the output ring, for `read_sampled`. It is valid from `wait` on, until the ring's entry is
    used again."""


class DecodePipeline:
    """Rows of running sequences, whose last ids, lengths and sampling parameters live and advance on the device.

    From step to step nothing is uploaded but new pages, and which rows became idle. A sequence that ends leaves its row
    idle. One more step of it is queued by then, whose id is dropped. The sequence's pages may be given away at once,
    although that step writes to them: the device works in order, and whatever runs for their new owner is
    launched later. The pipeline is drained and filled again, with one upload of all rows, where a smaller bucket holds
    the sequences that are left, and behind a step with a prompt, which advances every sequence from the host.
    """

    def __init__(
        self, model: Decoder, state: ModelState, backend: Backend, max_sequences: int, context: int, graphs: bool | int
    ) -> None:
        self.model, self.state, self.backend, self.max_sequences = model, state, backend, max_sequences
        model.reserve(context)  # captured steps hold the addresses of the RoPE tables
        self._sequences: list[Sequence] = []
        """The sequence of each row of the next step; `table.idle` where a row has none."""
        self._queue: deque[_Queued] = deque()
        pages = max(kind.num_entries(context) for kind in state.kinds)
        self.table = RequestTable(backend, max_sequences, model.config.vocab_size, pages, state.num_pages)
        self._rows = backend.asarray(np.arange(max_sequences), np.int32)
        self._starts = backend.asarray(np.arange(max_sequences + 1), np.int32)
        self._graphs = GraphCache(backend, self.table, state, graphs)
        most_words = max_sequences * (2 * MAX_LOGPROBS + 2)  # as `pack_logprobs` gives them
        self._ring, self._host_ring = backend.host_visible((_RING_ENTRIES, most_words), np.int32)
        """Output ring: a step writes its ids to an entry in the host's memory. A copy between steps would hold up the
        next one."""
        self._step_index = 0
        """Steps since the rows were filled."""

    @property
    def num_queued(self) -> int:
        """Steps that are queued and not collected."""
        return len(self._queue)

    @property
    def is_full(self) -> bool:
        """Whether no further step may be queued."""
        return len(self._queue) >= _MAX_QUEUED

    def can_follow(self, sequences: list[Sequence]) -> bool:
        """Whether a step of these sequences may be queued behind the ones under way, if any.

        All of them must have rows, and no smaller bucket would do.
        """
        fits = bucket(len(sequences), self.max_sequences) == len(self._sequences)
        return not self._queue or (fits and set(sequences).issubset(self._sequences))

    def warm_up(self, logits: Any, sequences: list[Sequence]) -> None:
        """Call the ops that a step calls beside the model, on rows of logits (B, V)."""
        count, rows = len(sequences), self._rows[: len(sequences)]
        pages = max(len(pages) for pages in sequences[0].pages)
        table = RequestTable(self.backend, count, logits.shape[1], pages, self.state.num_pages)
        table.fill(sequences)
        last_ids, lengths = table.fields["last_id"], table.fields["length"]
        decode_inputs(rows, last_ids, lengths, table.page_tables, table.step, self.state.page_size)
        ids, _ = table.sampler.draw(logits, table.fields)
        advance(ids, rows, last_ids, lengths, table.sampler.counts, None, None, None)

    def launch(self, sequences: list[Sequence]) -> bool:
        """Queue the next step of these sequences, with the pages that it needs. Other rows become idle before it.

        Where steps are queued, the pipeline must hold the sequences. Else all ids must be known: the rows are filled
        with these sequences.

        Returns:
            False where a replay was compared with its launches and is wrong. Nothing is queued then.
        """
        if not self._queue:
            self._fill(sequences)
        running = set(sequences)
        self._sequences = [s if s in running else self.table.idle for s in self._sequences]
        self.table.update(self._sequences)
        outputs = self._graphs.run(len(self._sequences), self._step)
        if outputs is None:
            return False
        drawn, _ = outputs
        self._step_index += 1
        entry = self._host_ring[self._step_index % _RING_ENTRIES, : drawn.size].reshape(drawn.shape)
        self._queue.append(_Queued(tuple(self._sequences), self.backend.record_event(), entry))
        for sequence in sequences:
            sequence.num_computed += 1
            sequence.num_pending += 1
        return True

    def _fill(self, sequences: list[Sequence]) -> None:
        """Upload the state of these sequences, whose ids are all known."""
        idle = bucket(len(sequences), self.max_sequences) - len(sequences)
        self._sequences = [*sequences, *[self.table.idle] * idle]
        self.table.fill(self._sequences)
        self._step_index = 0

    def _step(self, rows: int) -> list[Any]:
        """One step of the first rows: what `read_sampled` takes, and the logits, by which a replay is compared."""
        table, row_numbers = self.table, self._rows[:rows]
        last_ids, lengths = table.fields["last_id"], table.fields["length"]
        ids, positions, slot_mapping, row_lengths = decode_inputs(
            row_numbers, last_ids, lengths, table.page_tables, table.step, self.state.page_size
        )
        tables = tuple(PageTable(own, pages[:rows]) for own, pages in zip(slot_mapping, table.page_tables, strict=True))
        batch = Batch(ids, positions, self._starts[: rows + 1], row_lengths, tables, None)  # row r is slot r
        logits = self.model(batch, self.state)
        ids, drawn = table.sampler.draw(logits, table.fields)
        advance(ids, row_numbers, last_ids, lengths, table.sampler.counts, drawn.reshape(-1), table.step, self._ring)
        return [drawn, logits]

    def collect(self) -> list[Sampled]:
        """The ids of the oldest step. Ids of idle rows and of sequences that have ended meanwhile are dropped."""
        queued = self._queue[0]
        queued.wait()
        self._queue.popleft()
        sampled = read_sampled(queued.sequences, queued.drawn)
        found = [token for token in sampled if token.sequence.finish_reason is None]
        for token in found:
            token.sequence.num_pending -= 1
        return found

    def discard(self) -> None:
        """Forget the queued steps. Waits for them first: their ids must not arrive in an entry that is used again."""
        try:
            for queued in self._queue:
                queued.wait()
        finally:
            self._queue.clear()
            self._sequences = []
