"""Rows of sampled ids and log probabilities, as a step leaves them on the device, read on the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from forge.engine.sequence import Sampled, Sequence, TokenLogprobs


def words_per_row(num_top: int) -> int:
    """32-bit words that `Slots.draw` gives for a sequence with this many alternatives beside its own id."""
    return 2 * num_top + 2


def read_sampled(sequences: Iterable[Sequence], drawn: np.ndarray[Any, Any]) -> list[Sampled]:
    """The new ids of some sequences from what `Slots.draw` gives last.

    drawn: int32 on the host, ids (B,), or ids with the bits of their log probabilities (B, 2 * N + 2).
    """
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
