"""Runs steps: a batch through the model, and its logits through the sampler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.engine import batch
from forge.engine.request_table import Slots
from forge.engine.scheduler import Scheduled
from forge.engine.sequence import Sequence
from forge.models import Decoder
from forge.models.batch import Batch
from forge.models.decoder import Tap
from forge.ops.embed import take_rows
from forge.state.paged_kv import KVCache


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, under the model's own distribution (no penalties, no temperature).

    Attributes:
        id: The token that was generated.
        logprob: Its natural log probability.
        top: (id, log probability) of the most probable tokens, as many as were asked for, the most probable first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


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
            return self.model(self._batch(step, all_logits=all_logits), self.cache, tap)

    def look(self, step: list[Scheduled], tap: Tap) -> int:
        """The blocks alone, for the tap: no logits are computed. How many tokens there were."""
        with self.backend.active():
            tokens = self._batch(step)
            self.model.hidden(tokens, self.cache, tap)
            return len(tokens.ids)

    def _batch(self, step: list[Scheduled], *, all_logits: bool = False) -> Batch:
        self.model.reserve(max(entry.start + entry.count for entry in step))
        return batch.build(step, self.cache.page_size, self.backend, all_logits=all_logits)

    def sample(self, logits: Any, rows: list[int], sequences: list[Sequence]) -> list[Sampled]:
        """The next id of each sequence, drawn from its row of the logits."""
        with self.backend.active():
            if rows != list(range(len(logits))):
                logits = take_rows(self.backend.asarray(rows, np.int32), logits)  # (B, V)
            slots = Slots(self.backend, len(sequences), self.model.config.vocab_size)
            slots.fill(sequences)
            _, drawn = slots.draw(logits)
            return sampled(sequences, self.backend.to_numpy(drawn))


def drawn_words(num_top: int) -> int:
    """Words of 32 bits that `Slots.draw` gives for a sequence, with so many log probabilities beside its id's."""
    return 2 * num_top + 2


def sampled(sequences: Iterable[Sequence], drawn: np.ndarray[Any, Any]) -> list[Sampled]:
    """What `Slots.draw` gives last, on the host: ids (B,), or these with log probabilities (B, 2 * N + 2)."""
    if drawn.ndim == 1:
        return [Sampled(sequence, token, None) for sequence, token in zip(sequences, drawn.tolist(), strict=True)]
    half = drawn.shape[1] // 2
    found = []
    values = drawn[:, half:].view(np.float32).tolist()
    for sequence, (token, *top_ids), (value, *top) in zip(sequences, drawn[:, :half].tolist(), values, strict=True):
        count = sequence.params.logprobs
        known = count is not None and token >= 0
        pairs = tuple(zip(top_ids[:count], top[:count], strict=True))
        found.append(Sampled(sequence, token, TokenLogprobs(token, value, pairs) if known else None))
    return found
