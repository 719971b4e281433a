"""Steps queued one behind the other: the device never waits for the host to see an id."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.config import MAX_LOGPROBS, SamplingParams
from forge.engine import batch
from forge.engine.graph_cache import GraphCache, bucket
from forge.engine.recorded_hooks import Edit, RecordedHook, most_rows
from forge.engine.request_table import RequestTable
from forge.engine.sampler import read_sampled
from forge.engine.scheduler import Scheduled
from forge.engine.sequence import Sampled, Sequence
from forge.engine.step_budget import StepBudget
from forge.models import Decoder
from forge.models.batch import Batch, PageTable
from forge.ops.decode_state import advance, copy_rows, decode_inputs
from forge.state.model_state import ModelState

_MAX_QUEUED = 2
"""Steps that are queued and not collected. The device runs one while the host reads the ids of the step before and
queues the next. A sequence that an id ends still runs in the step behind it."""
_RING_ENTRIES = _MAX_QUEUED + 2
_SHORT = (16, 32, 64)
"""Tokens of steps with few prompt tokens. Warm-up has run products of so many rows."""
_MIN_UPLOAD = 1 << 14
_ALIGNED = 64
"""Words at whose multiples arrays of one upload begin."""


@dataclass(frozen=True, slots=True)
class _Queued:
    """A launched step."""

    sequences: tuple[Sequence, ...]
    """The sequence of each row."""
    computed: tuple[Sequence, ...]
    """Those that have tokens in it."""
    wait: Callable[[], None]
    """Waits until the step has run."""
    drawn: np.ndarray[Any, Any]
    """The step's entry of the output ring, for `read_sampled`. It is valid from `wait` on, until the ring's entry is
    used again."""
    num_decoding: int
    num_prompt_tokens: int
    queued_at: float
    """By the budget's clock; 0 without one."""
    number: int
    positions: list[int]
    """Of each row's token, where hooks read something of it."""


class StepPipeline:
    """Steps of prompts, of decoding sequences, and of both, whose ids are on the device before the host knows them.

    A sequence has a row of the request table from the step on that samples its first id: its last id, length and
    sampling parameters live and advance there. A step with prompt tokens is built by the host, which knows all but the
    last ids. A step in which each sequence has a row is a captured one: nothing is uploaded for it but new pages, and
    which rows came, became idle or moved to a smaller bucket.

    A sequence that ends leaves its row idle. One more step of it is queued by then, whose id is dropped. The sequence's
    pages may be given away at once, although that step writes to them: the device works in order, and whatever runs for
    their new owner is launched later.
    """

    def __init__(
        self,
        model: Decoder,
        state: ModelState,
        backend: Backend,
        max_sequences: int,
        context: int,
        graphs: bool | int,
        edits: tuple[Edit, ...] = (),
    ) -> None:
        """edits: What hooks do in each step. All steps are then decode steps of sequences with these edits."""
        if edits:
            max_sequences = min(max_sequences, most_rows(edits, model.config.width, _RING_ENTRIES))
        self.model, self.state, self.backend, self.max_sequences = model, state, backend, max_sequences
        model.reserve(context)  # captured steps hold the addresses of the RoPE tables
        self._sequences: list[Sequence] = []
        """The sequence of each row of the latest step; `table.idle` where a row has none."""
        self._queue: deque[_Queued] = deque()
        pages = max(kind.num_entries(context) for kind in state.kinds)
        self.table = RequestTable(backend, max_sequences, model.config.vocab_size, pages, state.num_pages)
        self._rows = backend.asarray(np.arange(max_sequences), np.int32)
        self._starts = backend.asarray(np.arange(max_sequences + 1), np.int32)
        self._recorded = backend.recorder()
        self._graphs = GraphCache(backend, self.table, state, graphs)
        most_words = max_sequences * (2 * MAX_LOGPROBS + 2)  # as `pack_logprobs` gives them
        self._ring, self._host_ring = backend.host_visible((_RING_ENTRIES, most_words), np.int32)
        """Output ring: a step writes its ids to an entry in the host's memory. A copy between steps would hold up the
        next one."""
        self.hook: RecordedHook | None = None
        if edits:
            sizes = max_sequences, model.config.width
            self.hook = RecordedHook(edits, backend, *sizes, self.table.step, _RING_ENTRIES)
        self.budget: StepBudget | None = None
        """Told of the time of each step."""
        spare = [[page] * kind.num_entries(_SHORT[-1]) for kind, page in zip(state.kinds, state.num_pages, strict=True)]
        self._filler = Sequence(0, [0] * _SHORT[-1], 0, SamplingParams(), 0, 0, pages=spare)
        """Tokens that nobody asked for. Their keys and values go to the spare pages."""
        self._num_steps = self._num_untimed = 0
        self._is_step_known = False
        """Whether the table's count of steps is this one."""
        self._words = backend.empty((_MIN_UPLOAD,), np.int32)
        """The arrays of a step that the host builds."""

    @property
    def num_queued(self) -> int:
        """Steps that are queued and not collected."""
        return len(self._queue)

    @property
    def is_seated(self) -> bool:
        """Whether a sequence has a row."""
        return any(sequence.row == row for row, sequence in enumerate(self._sequences))

    @property
    def is_full(self) -> bool:
        """Whether no further step may be queued."""
        return len(self._queue) >= _MAX_QUEUED

    def lose_time(self) -> None:
        """Something else has run behind the queued steps: when they have ended is not known."""
        self._num_untimed = len(self._queue)

    def may_wait(self, step: list[Scheduled]) -> bool:
        """Whether the ids under way had better be read before a step: it is captured first, which takes long."""
        if not self._queue or any(entry.sequence.row is None for entry in step):
            return False
        rows, sampler = bucket(len(step), self.max_sequences), self.table.sampler
        is_smaller = rows < len(self._sequences)
        sequences = [entry.sequence for entry in step]
        features = sampler.features_of(sequences) if is_smaller else sampler.features
        return not self._graphs.holds(rows, features, is_adapted=self._is_adapted(sequences))

    def warm_up(self, logits: Any, sequences: list[Sequence]) -> None:
        """Call the ops that a step calls beside the model, on rows of logits (B, V)."""
        count, rows = len(sequences), self._rows[: len(sequences)]
        pages = max(len(pages) for pages in sequences[0].pages)
        table = RequestTable(self.backend, count, logits.shape[1], pages, self.state.num_pages)
        table.fill(sequences)
        table.update(sequences, moves=[(row, row) for row in range(count)])
        last_ids, lengths = table.fields["last_id"], table.fields["length"]
        decode_inputs(rows, last_ids, lengths, table.page_tables, table.step, self.state.page_size)
        ids, _ = table.sampler.draw(logits, table.fields)
        advance(ids, rows, last_ids, lengths, table.sampler.counts, None, None, None)

    def launch(self, step: list[Scheduled], forks: Mapping[Sequence, list[Sequence]]) -> bool:
        """Queue a step, whose sequences have the pages that it needs. Sequences that are not in it lose their rows.

        forks: Other sequences that draw from the logits of one that samples, and go on from its state.

        Returns:
            False where a replay was compared with its launches and is wrong. Nothing is queued then.
        """
        try:
            return self._launch(step, forks)
        except BaseException:  # whatever the rows hold now, no sequence goes on from it
            self._forget_rows()
            raise

    def _launch(self, step: list[Scheduled], forks: Mapping[Sequence, list[Sequence]]) -> bool:
        tokens: dict[Sequence, int] = {}  # whose logits each sequence draws from
        num_decoding = stop = 0
        for sequence, start, count in step:
            stop += count
            num_decoding += sequence.row is not None
            if start + count == len(sequence.ids) + sequence.num_pending:  # `samples` written out
                tokens[sequence] = stop - 1
                for other in forks.get(sequence, ()) if forks else ():
                    tokens[other] = stop - 1
        built = None if num_decoding == stop or self.hook else self._built(step, stop)
        joining, moves = self._seat(tokens)
        number = self._num_steps + 1
        known = number - 1 if built is None else number  # a captured step counts itself
        self.table.update(
            self._sequences,
            joining=joining,
            moves=moves,
            step=None if built is None and self._is_step_known else known,
        )
        if self.hook:
            self.hook.seat(self._sequences)
        if built is None:
            adapted = self._is_adapted(self._sequences)
            outputs = self._graphs.run(
                len(self._sequences), partial(self._step, is_adapted=adapted), is_adapted=adapted
            )
            if outputs is None:
                return False
            drawn = outputs[0]
        else:
            drawn = self._mixed_step(built, tokens)
        self._num_steps, self._is_step_known = number, True
        shape = (0,) if drawn is None else drawn.shape
        entry_of_ring = self._host_ring[number % _RING_ENTRIES, : math.prod(shape)].reshape(shape)
        sequences, wait = tuple(self._sequences[: shape[0]]), self.backend.record_event()
        now = self.budget.clock() if self.budget else 0.0
        computed = tuple(entry.sequence for entry in step)
        positions = [sequence.num_tokens - 1 for sequence in sequences] if self.hook else []
        counts = num_decoding, stop - num_decoding
        self._queue.append(_Queued(sequences, computed, wait, entry_of_ring, *counts, now, number, positions))
        for sequence in tokens:
            sequence.num_pending += 1
        return True

    def _built(self, step: list[Scheduled], num_tokens: int) -> batch.HostBatch:
        """The arrays of a step with prompt tokens. They have few shapes, so that most steps are recorded ones.

        Few tokens are filled up to one of _SHORT, and sequences without tokens up to a bucket. As many sequences as
        tokens would be a batch that decodes.
        """
        size = next((size for size in _SHORT if size >= num_tokens), num_tokens)
        if size > num_tokens:
            step = [*step, Scheduled(self._filler, 0, size - num_tokens)]
        rows = min(bucket(len(step), self.max_sequences + (size > num_tokens)), size - 1)
        return batch.build(step, self.state.page_size, rows)

    def _seat(self, sampling: Mapping[Sequence, int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Give each sequence that samples a row, and take it from the others.

        Returns the rows of those that had none, and pairs (from, to) of rows that hold a sequence's last id and its new
        ones: the first rows hold them all, in a bucket that is not larger than need be.
        """
        idle, seated = self.table.idle, self._sequences
        for row, sequence in enumerate(seated):
            if sequence.row != row:  # it ended, or gave its pages up
                seated[row] = idle
            elif sequence not in sampling:
                sequence.row, seated[row] = None, idle
        size = bucket(len(sampling), self.max_sequences) if sampling else 0
        is_smaller = size < len(seated)
        beyond = [(row, sequence) for row, sequence in enumerate(seated[size:], size) if sequence is not idle]
        self._sequences = seated = [*seated[:size], *[idle] * (size - len(seated))]
        free = [row for row, sequence in enumerate(seated) if sequence is idle]
        coming = [sequence for sequence in sampling if sequence.row is None]
        moves = [(row, to) for (row, _), to in zip(beyond, free, strict=False)]
        joining = free[len(moves) : len(moves) + len(coming)]
        for (_, sequence), (_, to) in zip(beyond, moves, strict=True):
            sequence.row, seated[to] = to, sequence
        for sequence, row in zip(coming, joining, strict=True):
            sequence.row, seated[row] = row, sequence
        if is_smaller or len(coming) == len(sampling):
            self.table.sampler.serve(list(sampling))
        elif coming:
            self.table.sampler.serve(coming, also=True)
        return joining, moves

    def _is_adapted(self, sequences: list[Sequence]) -> bool:
        """Whether a step of these has launches for adapters. Without any it is the step of a model without them."""
        return self.model.num_adapters > 0 and any(sequence.adapter >= 0 for sequence in sequences)

    def _step(self, rows: int, *, is_adapted: bool) -> list[Any]:
        """One step of the first rows: what `read_sampled` takes, and the logits, by which a replay is compared."""
        table, row_numbers = self.table, self._rows[:rows]
        last_ids, lengths = table.fields["last_id"], table.fields["length"]
        ids, positions, slot_mapping, row_lengths = decode_inputs(
            row_numbers, last_ids, lengths, table.page_tables, table.step, self.state.page_size
        )
        tables = tuple(PageTable(own, pages[:rows]) for own, pages in zip(slot_mapping, table.page_tables, strict=True))
        adapters = table.fields["adapter"][:rows] if is_adapted else None
        decoding = Batch(
            ids, positions, self._starts[: rows + 1], row_lengths, tables, None, adapters
        )  # row r is slot r
        logits = self.model(decoding, self.state, self.hook)
        return [self._draw(logits), logits]

    def _mixed_step(self, built: batch.HostBatch, tokens: Mapping[Sequence, int]) -> Any:
        """A step that the host has built: what `read_sampled` takes for the rows of the table, or None for none."""
        logit_rows = np.array([tokens.get(sequence, 0) for sequence in self._sequences], np.int32)
        on_device, followed = built.place(self._put, logit_rows)
        if len(built.followed):
            copy_rows(followed, self.table.fields["last_id"].reshape(-1, 1), on_device.ids.reshape(-1, 1))
        arrays = on_device.arrays()
        with self.backend.active():  # recorded steps of other models, of other threads, put their logits there too
            if tokens:  # no function of its own is called here: an error's frame would keep what it refers to
                return self._draw(self._recorded(arrays, partial(self.model, on_device, self.state)))
            self._recorded(arrays, partial(_stream, self.model, on_device, self.state))
        return None

    def _draw(self, logits: Any) -> Any:
        """Draw an id for each of the first rows, which take it in."""
        table, rows = self.table, self._rows[: len(logits)]
        last_ids, lengths = table.fields["last_id"], table.fields["length"]
        ids, drawn = table.sampler.draw(logits, table.fields)
        advance(ids, rows, last_ids, lengths, table.sampler.counts, drawn.reshape(-1), table.step, self._ring)
        return drawn

    def _put(self, arrays: list[np.ndarray[Any, Any]]) -> list[Any]:
        """Arrays on the device, with one upload. They are valid until the next one."""
        starts = [0, *np.cumsum([-(-array.size // _ALIGNED) * _ALIGNED for array in arrays]).tolist()]
        words = np.zeros(starts[-1], np.int32)
        if len(words) > len(self._words):
            self._words = self.backend.empty((1 << (len(words) - 1).bit_length(),), np.int32)
        places = [(slice(start, start + array.size), array.shape) for start, array in zip(starts, arrays, strict=False)]
        for (place, _), array in zip(places, arrays, strict=True):
            words[place] = array.reshape(-1)
        self.backend.upload(self._words[: len(words)], words)
        return [self._words[place].reshape(shape) for place, shape in places]

    def collect(self) -> list[Sampled]:
        """The ids of the oldest step. Ids of idle rows and of sequences that have ended meanwhile are dropped."""
        queued = self._queue[0]
        queued.wait()
        self._queue.popleft()
        is_timed, self._num_untimed = not self._num_untimed, max(self._num_untimed - 1, 0)
        if self.budget and is_timed and any(s.finish_reason is None for s in queued.computed):  # else nobody waited
            self.budget.measured(queued.num_decoding, queued.num_prompt_tokens, queued.queued_at)
        sampled = read_sampled(queued.sequences, queued.drawn)
        found = [token for token in sampled if token.sequence.finish_reason is None]
        for token in found:
            token.sequence.num_pending -= 1
        if self.hook:
            self.hook.keep(queued.sequences, queued.positions, queued.number)
        return found

    def discard(self) -> None:
        """Forget the queued steps. Waits for them first: their ids must not arrive in an entry that is used again."""
        try:
            for queued in self._queue:
                queued.wait()
        finally:
            self._queue.clear()
            self._num_untimed = 0
            self._forget_rows()

    def _forget_rows(self) -> None:
        for row, sequence in enumerate(self._sequences):
            if sequence.row == row:
                sequence.row = None
        self._sequences, self._is_step_known = [], False
        self.table.forget()


def _stream(model: Decoder, batch: Batch, state: ModelState) -> Any:
    """float32 (T, E): what is there where nobody wants logits."""
    return model.hidden(batch, state).x
