"""The next ids of the rows of a request table: drawn on the device, read on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import repeat
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.engine.sequence import Sampled, Sequence, TokenLogprobs
from forge.ops.decode_state import clear, copy_rows
from forge.ops.logprobs import logprobs, pack_logprobs
from forge.ops.penalties import penalize
from forge.ops.sampling import argmax, sample

Edits = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Indices of 32-bit words of an array, int32 (N,), and what is written there, int32 (N,)."""

Features = tuple[int, int | None, bool]
"""What decides which ops are launched: `penalized_rows`, `num_top` and `draws`."""

_DRAW = ("temperature", "top_k", "top_p", "min_p", "seed", "choice")
_PENALTIES = ("repetition", "presence", "frequency")


class Sampler:
    """Draws ids from logits. What it launches depends on what the sequences of the table ask for."""

    def __init__(self, backend: Backend, vocabulary: int) -> None:
        self.backend, self.vocabulary = backend, vocabulary
        self.history: Any = None
        """i32 (2, rows, V), made when a sequence needs it: counts of its ids as `penalize` takes them, and biases. A
        larger one replaces it where it is too small. Steps captured with the old one are of no more use: they have
        another number of `penalized_rows`."""
        self.is_penalized = self._has_history = False
        """Whether any sequence is penalized, and whether the history holds what its sequences have so far."""
        self.keeps_rows = False
        """Whether `begin` has left the history's rows as they were. Else all are zeros."""
        self.draws = True
        """Whether any id is drawn. If none is, the greatest logits are enough."""
        self.num_top: int | None = None
        """Most log probabilities that a sequence wants at each id. None = not even the log probability of the id."""

    @property
    def penalized_rows(self) -> int:
        """Rows of the history; 0 if no sequence is penalized."""
        return self.history.shape[1] if self.is_penalized else 0

    @property
    def features(self) -> Features:
        return self.penalized_rows, self.num_top, self.draws

    def features_of(self, sequences: Collection[Sequence]) -> Features:
        """What they are where these sequences alone are served, with the history that is there."""
        rows = 0 if self.history is None else self.history.shape[1]
        wanted = [s.params.logprobs for s in sequences if s.params.logprobs is not None]
        draws = any(s.params.temperature > 0 for s in sequences)
        return rows if any(map(is_penalized, sequences)) else 0, max(wanted, default=None), draws

    @property
    def counts(self) -> Any:
        """i32 (rows, V), or None if no sequence is penalized."""
        return self.history[0] if self.penalized_rows else None

    def serve(self, sequences: Collection[Sequence], *, also: bool = False) -> None:
        """What these sequences ask for is computed from here on; with `also`, beside what is computed now."""
        _, num_top, draws = self.features_of(sequences)
        self.num_top = max((n for n in (num_top, self.num_top if also else None) if n is not None), default=None)
        self.draws = draws or (also and self.draws)
        self._has_history = self.is_penalized
        self.is_penalized = (also and self.is_penalized) or any(map(is_penalized, sequences))

    def forget(self) -> None:
        """What the history holds is not known any more."""
        self.is_penalized = False

    def begin(self, rows: int, joining: Mapping[int, Sequence]) -> list[Edits]:
        """A history of so many rows, if any sequence is penalized; rows that it has so far stay as they are.

        Returns what must be written to it, as a flat array, where sequences come to rows.
        """
        edits: list[Edits] = []
        self.keeps_rows = self.is_penalized and self._has_history
        if not self.is_penalized:
            return edits
        self._reserve(rows)
        biases = self.history.shape[1] * self.vocabulary
        for row, sequence in joining.items():
            for part in range(2 if self.keeps_rows else 0):
                clear(self.history[part, row])
            if is_penalized(sequence):
                counts = Counter(dict.fromkeys(sequence.ids, 1))
                counts.update(sequence.completion)
                bias = sequence.params.logit_bias
                start = row * self.vocabulary
                edits.append((start + _ints(counts.keys()), _ints(counts.values())))
                values = np.fromiter(bias.values(), np.float32, len(bias)).view(np.int32)
                edits.append((biases + start + _ints(bias.keys()), values))
        return edits

    def _reserve(self, rows: int) -> None:
        """Make the history, or a larger one, and clear what is not kept."""
        old = self.history
        if old is None or old.shape[1] < rows:
            self.history = self.backend.empty((2, rows, self.vocabulary), np.int32)
        elif self.keeps_rows:
            return
        clear(self.history.reshape(-1))
        if self.keeps_rows:
            same = self.backend.asarray(np.arange(old.shape[1])[:, None].repeat(2, axis=1), np.int32)
            for part in range(2):
                copy_rows(same, old[part], self.history[part])
        self._has_history = True

    def draw(
        self,
        logits: Any,
        fields: Mapping[str, Any],
        own: Any = None,
        choose: Callable[[Any, Any], None] | None = None,
    ) -> tuple[Any, Any]:
        """The next id of each row.

        Args:
            logits: f32 (B, V), of the first B rows.
            fields: Arrays of the request table, by name, (rows,) each.
            own: f32 (B, V), the model's, where `logits` are no longer these.
            choose: Called with the logits behind penalties and the drawn ids, of which it may change some.

        Returns:
            i32 (B,) ids, and the array that `read_sampled` takes.
        """
        own = logits if own is None else own  # log probabilities are the model's, without penalties
        fields = {name: array[: len(logits)] for name, array in fields.items()}
        if self.penalized_rows:
            counts, bias = (part[: len(logits)] for part in self.history)
            logits = penalize(logits, counts, bias.view(np.float32), *(fields[name] for name in _PENALTIES))
        if self.draws:
            ids = sample(logits, *(fields[name] for name in _DRAW), fields["length"].view(np.uint32))
        else:
            ids = argmax(logits)
        if choose:
            choose(logits, ids)
        if self.num_top is None:
            return ids, ids
        return ids, pack_logprobs(*logprobs(own, ids, self.num_top))


def read_sampled(sequences: Iterable[Sequence], drawn: np.ndarray[Any, Any]) -> list[Sampled]:
    """The new ids of some sequences from what `Sampler.draw` gives last.

    drawn: int32 on the host, ids (B,), or ids with the bits of their log probabilities (B, 2 * N + 2).
    """
    if drawn.ndim == 1:
        return list(map(Sampled, sequences, drawn.tolist(), repeat(None)))
    half = drawn.shape[1] // 2
    found = []
    values = drawn[:, half:].view(np.float32).tolist()
    for sequence, (token, *top_ids), (value, *top) in zip(sequences, drawn[:, :half].tolist(), values, strict=True):
        count = sequence.params.logprobs
        known = count is not None and token >= 0
        pairs = tuple(zip(top_ids[:count], top[:count], strict=True))
        found.append(Sampled(sequence, token, TokenLogprobs(token, value, pairs) if known else None))
    return found


def is_penalized(sequence: Sequence) -> bool:
    """Whether the sequence's logits are changed before an id is drawn, by a bias or by the ids it holds so far."""
    p = sequence.params
    return bool(p.logit_bias) or (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)


def _ints(values: Collection[int]) -> np.ndarray[Any, Any]:
    return np.fromiter(values, np.int32, len(values))
