"""What the next ids of some sequences depend on beside the model, on the device: one slot of state for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.config import SamplingParams
from forge.engine.sequence import Sequence
from forge.ops.decode_state import clear, scatter
from forge.ops.logprobs import logprobs, pack_logprobs, top_logprobs
from forge.ops.penalties import penalize
from forge.ops.sampling import argmax, sample

_Field = tuple[str, Any, Callable[[Sequence], float]]
_FIELDS: tuple[_Field, ...] = (  # the widest first: each lies at a multiple of its size
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
_DRAW = ("temperature", "top_k", "top_p", "min_p", "seed", "choice")
_PENALTIES = ("repetition", "presence", "frequency")
_MIN_EDITS = 256

_Edits = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Indices of 32-bit words, and what to write there."""


class Slots:
    """State of the first so many sequences, field by field, and their pages, as views of one array of 32-bit words.

    Whatever changes from the host goes there as one upload of (index, value) pairs, which an op puts in their places.
    """

    def __init__(
        self, backend: Backend, count: int, vocabulary: int, most_pages: int = 0, spare_pages: Items[int] = ()
    ) -> None:
        """
        Args:
            most_pages: Entries of a sequence's page list, at most.
            spare_pages: The spare page of each kind of layer state; none = there are no page tables.
        """
        self.backend, self.count, self.vocabulary, self.most_pages = backend, count, vocabulary, most_pages
        words = sum(np.dtype(dtype).itemsize // 4 for _, dtype, _ in _FIELDS)
        kinds = len(spare_pages)
        self._words = backend.empty((count * (words + kinds * most_pages) + 1,), np.int32)
        self._starts: dict[str, int] = {}
        self.fields: dict[str, Any] = {}
        start = 0
        for name, dtype, _ in _FIELDS:
            stop = start + count * np.dtype(dtype).itemsize // 4
            self._starts[name], self.fields[name] = start, self._words[start:stop].view(dtype)
            start = stop
        self._pages_start = start
        self.page_tables = self._words[start:-1].reshape(kinds, count, most_pages)
        """Of each kind of layer state. A released page stays in its entry, which nobody follows any more."""
        self.turn = self._words[-1:]
        """Steps since the slots were filled, as `decode_inputs` counts them."""
        if kinds:  # beside a sequence's own pages there are always numbers of some
            backend.upload(self.page_tables, np.zeros((kinds, count, most_pages), np.int32))
        spare = [[page] for page in spare_pages]
        self.idle = Sequence(0, [], 0, SamplingParams(temperature=0), 0, 0, pages=spare, finish_reason="stop")
        """What a slot without a sequence holds: no ids, so that it stays as it is, and a page that no sequence has. All
        idle rows of a step compute the same and write the same to the same place, in whatever order."""
        self._held: list[Sequence | None] = []
        """The sequences that the first slots hold, and how many pages of each, by kind."""
        self._num_pages: list[list[int]] = []
        self._staging = backend.empty((_MIN_EDITS, 2), np.int32)
        self._history: Any = None
        """(2, slots, V), made when a sequence needs it: counts of its ids as `penalize` takes them, and biases. Made
        anew where it is too small: recorded steps of other `penalized_slots` are of no more use."""
        self.penalized_slots = 0
        """Slots that the history holds; 0 if no sequence of these is penalized."""
        self.draws = True
        """Whether the ids of any of these are drawn: without, the greatest logits are enough."""
        self.num_top: int | None = None
        """Most log probabilities that a sequence of these wants at each id; None if they want not even the id's."""

    def fill(self, sequences: list[Sequence]) -> None:
        """State of these sequences in the first slots: one upload, of as much as they have."""
        self._held, self._num_pages = [None] * len(sequences), [[]] * len(sequences)
        history = self._begin_history(sequences) if any(is_penalized(s) for s in sequences) else []
        self._put(sequences, history, [_run(len(self._words) - 1, np.zeros(1, np.int32))])
        self.penalized_slots = self._history.shape[1] if history else 0
        self.draws = any(s.params.temperature > 0 for s in sequences)
        self.num_top = max((s.params.logprobs for s in sequences if s.params.logprobs is not None), default=None)

    def update(self, sequences: list[Sequence]) -> None:
        """Upload what of the first slots has changed since: slots that became idle, and pages that sequences got;
        nothing where there is neither."""
        self._put(sequences, [], [])

    @property
    def counts(self) -> Any:
        """i32 (slots, V), or None if no sequence is penalized."""
        return self._history[0] if self.penalized_slots else None

    def advancing(self, rows: int) -> list[Any]:
        """What a step of so many rows changes."""
        state = [*(self.fields[name][:rows] for name in ("last_id", "length")), self.turn]
        return [*state, self.counts[:rows]] if self.penalized_slots else state

    def perturbed(self, state: list[Any]) -> list[Any]:
        """Other values for what `advancing` gives: of a step after other ids."""
        last_ids, *others = state
        return [(last_ids + 1) % self.vocabulary, *others]

    def _begin_history(self, sequences: list[Sequence]) -> list[_Edits]:
        rows = len(sequences)
        if self._history is None or self._history.shape[1] < rows:
            self._history = self.backend.empty((2, rows, self.vocabulary), np.int32)
        for part in range(2):
            clear(self._history[part, :rows].reshape(-1))
        edits = []
        biases = self._history.shape[1] * self.vocabulary
        for row, sequence in enumerate(sequences):
            if is_penalized(sequence):
                counts = Counter(dict.fromkeys(sequence.ids, 1))
                counts.update(sequence.completion)
                bias = sequence.params.logit_bias
                start = row * self.vocabulary
                edits.append((start + _ints(counts.keys()), _ints(counts.values())))
                values = np.fromiter(bias.values(), np.float32, len(bias)).view(np.int32)
                edits.append((biases + start + _ints(bias.keys()), values))
        return edits

    def _put(self, sequences: list[Sequence], history: list[_Edits], edits: list[_Edits]) -> None:
        """Upload edits, what the first slots do not hold yet of these sequences, and edits of the history."""
        new = [row for row, (s, held) in enumerate(zip(sequences, self._held, strict=True)) if s is not held]
        for row in new:
            self._num_pages[row] = [0] * len(self.page_tables)
        if new:
            edits = edits + self._state(np.array(new, np.int32), [sequences[row] for row in new])
        edits = edits + [
            _run(self._pages_start + (kind * self.count + row) * self.most_pages + known, np.array(pages, np.int32))
            for row, (sequence, counts) in enumerate(zip(sequences, self._num_pages, strict=True))
            for kind, known in enumerate(counts)
            if (pages := sequence.pages[kind][known:])
        ]
        if edits:
            self._place(edits, history)
            self._held = list(sequences)
            self._num_pages = [[len(pages) for pages in s.pages[: len(self.page_tables)]] for s in sequences]

    def _state(self, slots: np.ndarray[Any, Any], sequences: list[Sequence]) -> list[_Edits]:
        """The fields of these slots."""
        edits = []
        for name, dtype, value in _FIELDS:
            words = np.array([value(s) for s in sequences], dtype).view(np.int32).reshape(len(slots), -1)
            width = words.shape[1]
            indices = self._starts[name] + slots[:, None] * width + np.arange(width, dtype=np.int32)
            edits.append((indices.reshape(-1), words.reshape(-1)))
        return edits

    def _place(self, edits: list[_Edits], history: list[_Edits]) -> None:
        """Upload edits of the words, and those of the history behind them."""
        both = edits + history
        pairs = np.stack([np.concatenate(column) for column in zip(*both, strict=True)], axis=1)
        if len(pairs) > len(self._staging):  # the device is done with the old one before it is used for something else
            self._staging = self.backend.empty((1 << (len(pairs) - 1).bit_length(), 2), np.int32)
        self.backend.upload(self._staging[: len(pairs)], pairs)
        border = sum(len(indices) for indices, _ in edits)
        scatter(self._staging[:border], self._words)
        if history:
            scatter(self._staging[border : len(pairs)], self._history.reshape(-1))

    def draw(self, logits: Any) -> tuple[Any, Any]:
        """The next id of each row, int32 (B,), drawn as the first B slots say; and what `sampled` takes."""
        fields = {name: array[: len(logits)] for name, array in self.fields.items()}
        own = logits  # of which log probabilities are
        if self.penalized_slots:
            counts, bias = (part[: len(logits)] for part in self._history)
            logits = penalize(logits, counts, bias.view(np.float32), *(fields[name] for name in _PENALTIES))
        if self.draws:
            ids = sample(logits, *(fields[name] for name in _DRAW), fields["length"].view(np.uint32))
        else:
            ids = argmax(logits)
        if self.num_top is None:
            return ids, ids
        return ids, pack_logprobs(ids, logprobs(own, ids), *top_logprobs(own, self.num_top))


def is_penalized(sequence: Sequence) -> bool:
    """Whether its logits are changed before it draws, by what it holds so far."""
    p = sequence.params
    return bool(p.logit_bias) or (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)


def _run(start: int, values: np.ndarray[Any, Any]) -> _Edits:
    """Values, one behind the other from a word on."""
    words = values.view(np.int32)
    return np.arange(start, start + len(words), dtype=np.int32), words


def _ints(values: Collection[int]) -> np.ndarray[Any, Any]:
    return np.fromiter(values, np.int32, len(values))
