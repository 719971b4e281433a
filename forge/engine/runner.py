"""Runs steps: a batch through the model, and its logits through the sampler."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.engine import batch
from forge.engine.scheduler import Scheduled
from forge.engine.sequence import Sequence
from forge.engine.slots import Slots
from forge.kv_cache import KVCache
from forge.models import Decoder
from forge.models.decoder import Tap
from forge.ops.embed import take_rows
from forge.ops.logprobs import logprobs, top_logprobs
from forge.ops.sampling import penalize


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, under the model's own distribution (no penalties, no temperature)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable ids with theirs, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new id of a sequence; -1 where the logits were not finite."""

    sequence: Sequence
    id: int
    logprobs: TokenLogprobs | None


class Runner:
    """A model, its cache and their device."""

    def __init__(self, model: Decoder, cache: KVCache, backend: Backend) -> None:
        self.model, self.cache, self.backend = model, cache, backend

    def forward(self, step: list[Scheduled], *, all_logits: bool = False, tap: Tap | None = None) -> Any:
        """float32 logits (R, V): one row for each entry that reaches its last id, or one for every token."""
        with self.backend.active():
            self.model.reserve(max(entry.start + entry.count for entry in step))
            arrays = batch.build(step, self.cache.page_size, self.backend, all_logits=all_logits)
            return self.model(arrays, self.cache, tap)

    def sample(self, logits: Any, rows: list[int], sequences: list[Sequence]) -> list[Sampled]:
        """The next id of each sequence, drawn from its row of the logits, which are used up."""
        asarray = self.backend.asarray
        if rows != list(range(len(logits))):
            logits = take_rows(asarray(rows, np.int32), logits)  # (B, V)
        params = [sequence.params for sequence in sequences]
        raw = logits
        if any(is_penalized(sequence) for sequence in sequences):
            if any(p.logprobs is not None for p in params):  # which are of what is about to be changed
                logits = take_rows(asarray(np.arange(len(raw)), np.int32), raw)
            penalize(logits, *(asarray(array) for array in _penalties(sequences)))
        slots = Slots(self.backend, len(sequences))
        slots.fill(sequences)
        ids = slots.draw(logits)
        host = self.backend.to_numpy(ids).tolist()
        details: list[TokenLogprobs | None] = [None] * len(sequences)
        most = max((p.logprobs for p in params if p.logprobs is not None), default=None)
        if most is not None:
            details = self._logprobs(raw, ids, most, [p.logprobs for p in params])
        return [Sampled(*entry) for entry in zip(sequences, host, details, strict=True)]

    def _logprobs(self, logits: Any, ids: Any, most: int, wanted: list[int | None]) -> list[TokenLogprobs | None]:
        to_numpy = self.backend.to_numpy
        chosen = to_numpy(logprobs(logits, ids)).tolist()
        top_ids, top_values = (to_numpy(array).tolist() for array in top_logprobs(logits, most))
        return [
            None
            if count is None or token < 0
            else TokenLogprobs(token, value, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
            for token, value, row_ids, row_values, count in zip(
                to_numpy(ids).tolist(), chosen, top_ids, top_values, wanted, strict=True
            )
        ]


def is_penalized(sequence: Sequence) -> bool:
    """Whether its logits are changed before it draws, by what it holds so far."""
    p = sequence.params
    return bool(p.logit_bias) or (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)


def _penalties(sequences: list[Sequence]) -> list[np.ndarray[Any, Any]]:
    """The arguments of `penalize` after the logits."""
    starts, bias_starts = [0], [0]
    tokens: list[int] = []
    generated: list[int] = []
    bias_tokens: list[int] = []
    bias_values: list[float] = []
    for sequence in sequences:
        if is_penalized(sequence):
            counts = Counter(dict.fromkeys(sequence.ids, 0))
            counts.update(sequence.completion)
            tokens += counts.keys()
            generated += counts.values()
            bias_tokens += sequence.params.logit_bias.keys()
            bias_values += sequence.params.logit_bias.values()
        starts.append(len(tokens))
        bias_starts.append(len(bias_tokens))
    params = [sequence.params for sequence in sequences]
    return [
        np.array(starts, np.int32),
        np.array(tokens, np.int32),
        np.array(generated, np.int32),
        np.array([p.repetition_penalty for p in params], np.float32),
        np.array([p.presence_penalty for p in params], np.float32),
        np.array([p.frequency_penalty for p in params], np.float32),
        np.array(bias_starts, np.int32),
        np.array(bias_tokens, np.int32),
        np.array(bias_values, np.float32),
    ]
