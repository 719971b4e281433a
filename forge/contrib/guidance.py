"""Logits processors that weigh a model's logits against those of another prompt, or of another model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.errors import ParameterError
from forge.keywords import check_real
from forge.llm import LLM

__all__ = ["ClassifierFreeGuidance", "ContrastiveDecoding"]


class ClassifierFreeGuidance:
    """A logits processor that moves away from a negative prompt, and so towards the prompt.

    log p = log p_negative + scale * (log p_prompt - log p_negative), where the completion so far lies behind both
    prompts. Each choice takes pages of the KV cache for its second sequence, and a second pass for each token. Where no
    page is free, its request ends with an OutOfMemoryError.

    Source: arXiv:2306.17806, equation 7.
    """

    def __init__(
        self,
        llm: LLM,
        negative_prompt: str | Sequence[int] | None = None,
        *,
        scale: float = 1.5,
        adapter: str | None = None,
    ) -> None:
        """
        Args:
            llm: The model whose requests are to be guided.
            negative_prompt: A string or a list of token ids, as of `LLM.generate`. None = the prompt's last token.
            scale: 1 = the prompt's own logits.
            adapter: That of the requests.

        Raises:
            ForgeError: A value cannot be used.
        """
        check_real("scale", scale, -100, 100)
        self._llm, self._scale, self._adapter = llm, float(scale), adapter
        self._negative = None if negative_prompt is None else llm.encode_prompt(negative_prompt)
        if self._negative is not None:
            llm.engine.check_ids(self._negative)

    def begin(self, prompt_ids: list[int]) -> Callable[[list[int], Any], Any]:
        """The function of a choice."""
        negative = prompt_ids[-1:] if self._negative is None else self._negative
        follower = _Follower(self._llm, negative, len(prompt_ids), self._adapter)

        def guide(ids: list[int], logits: Any) -> Any:
            without = _log_softmax(follower.logits(ids, logits))
            return (without + self._scale * (_log_softmax(logits) - without)).astype(np.float32)

        return guide


class ContrastiveDecoding:
    """A logits processor that prefers what a model finds more probable than a smaller one, the amateur.

    A token's score is log p - log p_amateur. It is -inf for tokens below `alpha` times the greatest p. The amateur has
    the same vocabulary, and computes each choice in its own KV cache. It may not have this model for its amateur.

    Source: arXiv:2210.15097, equations 2 and 3.
    """

    def __init__(
        self, amateur: LLM, *, alpha: float = 0.1, temperature: float = 1.0, adapter: str | None = None
    ) -> None:
        """
        Args:
            amateur: A loaded model.
            alpha: The share of the greatest probability that a token must have, above 0, to 1.
            temperature: What the amateur's logits are divided by.
            adapter: One of the amateur's, or None.

        Raises:
            ParameterError: A value cannot be used.
        """
        check_real("alpha", alpha, 0, 1, is_open=True)
        check_real("temperature", temperature, 0, 100, is_open=True)
        self._amateur, self._adapter = amateur, adapter
        self._log_alpha, self._temperature = math.log(alpha), float(temperature)

    def begin(self, prompt_ids: list[int]) -> Callable[[list[int], Any], Any]:
        """The function of a choice."""
        follower = _Follower(self._amateur, [], 0, self._adapter)

        def contrast(ids: list[int], logits: Any) -> Any:
            own = _log_softmax(logits)
            scores = own - _log_softmax(follower.logits(ids, logits), self._temperature)
            scores[own < own.max() + self._log_alpha] = -np.inf
            return scores.astype(np.float32)

        return contrast


class _Follower:
    """The logits behind other ids, to which a choice's completion is added as it grows."""

    def __init__(self, llm: LLM, ids: list[int], skipped: int, adapter: str | None) -> None:
        """ids: What stands in the place of the choice's first `skipped` ids."""
        self._llm, self._ids, self._skipped, self._adapter = llm, ids, skipped, adapter
        self._state: Any = None

    def logits(self, ids: list[int], like: Any) -> Any:
        """float32 (V,), where `like` lies. ids: The choice's, whose prompt and completion."""
        wanted = [*self._ids, *ids[self._skipped :]]
        try:
            if self._state is None:
                self._state = self._llm.prefill(wanted, adapter=self._adapter)
            elif more := wanted[len(self._state) :]:
                self._state.extend(more)
            found: npt.NDArray[np.float32] = self._state.logits
        except BaseException:  # whoever keeps the error would keep its pages
            if self._state is not None:
                self._state.close()
            raise
        if len(found) != len(like):
            raise ParameterError(
                f"amateur has {len(found)} tokens in its vocabulary, and the model {len(like)}",
                parameter="amateur",
                hint="use a model of the same family",
            )
        return np.asarray(found, like=like)


def _log_softmax(logits: Any, temperature: float = 1.0) -> Any:
    """Log probabilities float64 (V,) of logits (V,)."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max()
    return scaled - np.log(np.exp(scaled).sum())
