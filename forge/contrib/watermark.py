"""A watermark of generated text, and the test that finds it: arXiv:2301.10226."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forge.errors import ParameterError
from forge.keywords import check_integer, check_real
from forge.ops.philox import random_bits

__all__ = ["Detection", "Watermark"]


class Detection(NamedTuple):
    """What `Watermark.detect` has counted.

    Attributes:
        num_scored: T, tokens that were looked at.
        num_green: How many of them are on the green list of the token before.
        z: (num_green - gamma T) / sqrt(T gamma (1 - gamma)): 0 is expected without a watermark.
        p_value: How probable a z as large is without one, by the normal distribution.
    """

    num_scored: int
    num_green: int
    z: float
    p_value: float


class Watermark:
    """A logits processor: a green list of tokens, which the token before and a key choose, gets larger logits.

    The soft red list of arXiv:2301.10226 (algorithm 2). Who knows the key finds it in a text with `detect`, without
    the model. Green lists are the same on every machine.
    """

    def __init__(self, vocab_size: int, *, key: int, gamma: float = 0.25, delta: float = 2.0) -> None:
        """
        Args:
            vocab_size: V, the model's `ModelConfig.vocab_size`.
            key: A secret, 0 to 2**64 - 1.
            gamma: Share of the vocabulary that is green, above 0 and below 1.
            delta: What is added to green logits.

        Raises:
            ParameterError: A value cannot be used.
        """
        check_integer("vocab_size", vocab_size, 2)
        check_integer("key", key, 0, 2**64 - 1)
        check_real("gamma", gamma, 0, 1, is_open=True)
        check_real("delta", delta, 0, 1e6)
        self._size, self._key, self.gamma, self.delta = int(vocab_size), int(key), float(gamma), float(delta)
        self._num_green = round(gamma * vocab_size)
        if not 0 < self._num_green < vocab_size:
            message = f"gamma must leave tokens on both lists, not {gamma:g} of {vocab_size}"
            raise ParameterError(message, parameter="gamma")
        self._lists = lru_cache(maxsize=128)(self._list)

    def __call__(self, ids: list[int], logits: Any) -> None:
        """ids: Of prompt and completion. logits: float32 (V,), changed in place."""
        if len(logits) != self._size:
            message = f"vocab_size is {self._size}, and the model has {len(logits)} tokens"
            raise ParameterError(message, parameter="vocab_size", hint="use llm.config.vocab_size")
        logits[np.asarray(self.green(ids[-1]), like=logits)] += np.float32(self.delta)

    def green(self, before: int) -> npt.NDArray[np.int64]:
        """The green list behind a token: int64 (round(gamma * V),), ascending."""
        return self._lists(before)

    def _list(self, before: int) -> npt.NDArray[np.int64]:
        keys, others = np.full(self._size, self._key, np.uint64), np.full(self._size, before, np.uint32)
        bits = random_bits(keys, others, np.arange(self._size, dtype=np.uint32))
        found = np.sort(np.argsort(bits, kind="stable")[: self._num_green])
        found.setflags(write=False)
        return found

    def detect(self, ids: Sequence[int], start: int = 1) -> Detection:
        """Look for the watermark in a text's token ids.

        Args:
            ids: As the model's tokenizer gives them.
            start: The first token that counts: the number of the prompt's tokens, where ids begin with it.

        Raises:
            ParameterError: No token counts, or an id is outside the vocabulary.
        """
        check_integer("start", start, 1, max(len(ids) - 1, 1))
        if len(ids) < 2:
            raise ParameterError("ids must hold at least two tokens", parameter="ids")
        for token in ids:
            check_integer("ids", token, 0, self._size - 1)
        pairs = list(pairwise(ids[start - 1 :]))
        num_green = 0
        for before, token in pairs:
            own = self.green(before)
            place = int(np.searchsorted(own, token))
            num_green += place < len(own) and int(own[place]) == token
        z = (num_green - self.gamma * len(pairs)) / math.sqrt(len(pairs) * self.gamma * (1 - self.gamma))
        return Detection(len(pairs), num_green, z, math.erfc(z / math.sqrt(2)) / 2)
