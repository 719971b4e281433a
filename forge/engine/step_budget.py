"""How many prompt tokens a step takes beside sequences that decode, from the times of the steps before it."""

from __future__ import annotations

import time
from collections.abc import Callable

TARGET_S = 0.05
"""Seconds that a step with prompt tokens is to take, where others decode in it: 20 tokens a second for who reads. A
step that decodes alone may take longer; prompts then have as much time as decoding."""
_MIN_TOKENS = 64
_SLOWER_SHARE, _FASTER_SHARE = 0.25, 0.5
"""Of the latest step in what is known of its kind. A slow one may have been the first of its shape, or have waited."""
_DIGITS = 3
"""Leading binary digits that a budget keeps: steps of few different sizes are recorded once each."""


class StepBudget:
    """Times of steps that run one behind the other, and the prompt tokens that the next one may have.

    A step's time is a fixed part, which is what a step without prompt tokens takes, and one for each of these.
    """

    def __init__(
        self, most: int, *, target_s: float = TARGET_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """most: Tokens of a step, at most, and what is allowed before any step with a prompt was timed."""
        self._most, self._target_s, self.clock = most, target_s, clock
        self._ended_at = 0.0
        self._decode_s: float | None = None
        """Seconds of a step without prompt tokens."""
        self._token_s: float | None = None
        """Seconds of each prompt token."""

    @property
    def tokens(self) -> int:
        """Prompt tokens of a step in which others decode."""
        if not self._token_s:
            return self._most
        fixed = self._decode_s or 0.0
        count = int(max(self._target_s - fixed, fixed) / self._token_s)
        shift = max(count.bit_length() - _DIGITS, 0)
        return min(max(count >> shift << shift, _MIN_TOKENS), self._most)

    def measured(self, decoding: int, prompt_tokens: int, queued_at: float) -> None:
        """A step has ended: it has run since the one before ended, or since it was queued, if that was later.

        decoding: Sequences that decoded in it. queued_at: By the clock.
        """
        now = self.clock()
        seconds, self._ended_at = now - max(queued_at, self._ended_at), now
        if not prompt_tokens:
            self._decode_s = _mean(self._decode_s, seconds)
        else:
            fixed = self._decode_s or 0.0 if decoding else 0.0
            self._token_s = _mean(self._token_s, max(seconds - fixed, seconds / 8) / prompt_tokens)  # times vary


def _mean(known: float | None, latest: float) -> float:
    if known is None:
        return latest
    return known + (_FASTER_SHARE if latest < known else _SLOWER_SHARE) * (latest - known)
