"""Samplers that other programs have, as functions of `SamplingParams`: DRY, a logits processor, and XTC, a sampler."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from forge.keywords import check_integer, check_real, texts
from forge.tokenizer import Tokenizer

__all__ = ["DRY", "XTC"]
_MAX_LOG = 88.7228391  # the largest float32's
_BREAKERS = ("\n", ":", '"', "*")


class DRY:
    """A logits processor against repetition of sequences ("don't repeat yourself").

    Where the last tokens have come before, the token that came behind them loses
    ``multiplier * base ** (length - allowed_length)``, with the length of the longest such match.

    Source: https://github.com/oobabooga/text-generation-webui/pull/5677; values are those of llama.cpp.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        multiplier: float = 0.8,
        base: float = 1.75,
        allowed_length: int = 2,
        last_n: int | None = None,
        breakers: Iterable[str] = _BREAKERS,
    ) -> None:
        """
        Args:
            tokenizer: The model's, `LLM.tokenizer`.
            multiplier: What the next token of a match of `allowed_length` loses.
            base: How many times as much it loses for each further token.
            allowed_length: Matches of fewer tokens are no repetition.
            last_n: Only so many of the last tokens are looked at. None = all, the prompt's too.
            breakers: Single characters. A token that holds one of them ends a match.

        Raises:
            ParameterError: A value cannot be used.
        """
        check_real("multiplier", multiplier, 0, 1e6)
        check_real("base", base, 1, 1e6)
        check_integer("allowed_length", allowed_length, 1)
        check_integer("last_n", last_n, 1, optional=True)
        marks = [mark.encode() for mark in texts("breakers", breakers, 64, 1)]
        self._multiplier, self._base = float(multiplier), float(base)
        self._allowed, self._last_n = int(allowed_length), last_n
        self._longest = self._allowed + math.floor(_MAX_LOG / math.log(base)) if base > 1.000001 else None
        pieces = ((token, tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size if marks else 0))
        self._breakers = frozenset(token for token, piece in pieces if any(mark in piece for mark in marks))

    def __call__(self, ids: list[int], logits: Any) -> None:
        """ids: Of prompt and completion. logits: float32 (V,), changed in place."""
        tokens, lengths = self.matches(ids)
        if len(tokens):
            excess = lengths - self._allowed
            penalties = (self._multiplier * self._base ** excess.astype(np.float64)).astype(np.float32)
            logits[np.asarray(tokens, like=logits)] -= np.asarray(penalties, like=logits)

    def matches(self, ids: list[int]) -> tuple[Any, Any]:
        """Tokens that would go on with a repetition, int64 (N,), and of how many tokens the longest is, int64 (N,).

        No length is above the one whose penalty is the largest that float32 holds.
        """
        last = ids if self._last_n is None else ids[-self._last_n :]
        backwards = np.array(last[::-1], np.int64)
        broken = (place for place, token in enumerate(last[::-1]) if token in self._breakers)
        limit = next(broken, len(last))
        limit = limit if self._longest is None else min(limit, self._longest)
        found: dict[int, int] = {}
        if limit >= self._allowed:
            places = np.arange(1, len(last))  # where the last `length` tokens may have come before
            for length in range(1, limit + 1):
                places = places[places + length <= len(last)]
                places = places[backwards[places + length - 1] == backwards[length - 1]]
                if not len(places):
                    break
                if length >= self._allowed:
                    found.update(dict.fromkeys(backwards[places - 1].tolist(), length))
        return np.array(list(found), np.int64), np.array(list(found.values()), np.int64)


class XTC:
    """A sampler that leaves the most probable tokens out ("exclude top choices").

    With `probability`, of all tokens that are at least as probable as `threshold` only the least probable one stays,
    where there are two or more. Then one is drawn. Probabilities are those behind temperature and limits.

    Source: https://github.com/oobabooga/text-generation-webui/pull/6335; what is left is as in llama.cpp.
    """

    def __init__(self, *, probability: float = 0.5, threshold: float = 0.1) -> None:
        """
        Args:
            probability: How often tokens are left out, 0 to 1.
            threshold: The probability from which on a token is a top choice, above 0, to 0.5.

        Raises:
            ParameterError: A value cannot be used.
        """
        check_real("probability", probability, 0, 1)
        check_real("threshold", threshold, 0, 0.5, is_open=True)
        self._probability, self._threshold = float(probability), float(threshold)

    def __call__(self, ids: list[int], logits: Any, random: np.random.Generator) -> int:
        """The next id. logits: float32 (V,). Two numbers of `random` are used."""
        excludes, place = random.random(2).tolist()
        return draw(self.left(logits) if excludes < self._probability else logits, place)

    def left(self, logits: Any) -> Any:
        """The logits (V,) with those at -inf that are left out; in memory of their own where there are any."""
        p = np.exp((logits - logits.max()).astype(np.float64))
        p /= p.sum()
        top = p >= self._threshold
        if int(top.sum()) < 2:
            return logits
        least = np.flatnonzero(top & (p == p[top].min()))[-1]  # of equals the last one
        found = logits.copy()
        found[top] = -np.inf
        found[least] = logits[least]
        return found


def draw(logits: Any, place: float) -> int:
    """The id at a place, from 0 to below 1, of the running sum of probabilities. logits: float32 (V,)."""
    sums = np.cumsum(np.exp((logits - logits.max()).astype(np.float64)))
    total = float(sums[-1])
    return int((sums <= min(place * total, math.nextafter(total, 0))).sum())
