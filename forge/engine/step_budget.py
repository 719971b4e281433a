"""How many prompt tokens a step takes beside sequences that decode, from the times of the steps before it."""

from __future__ import annotations

import time
from collections.abc import Callable

TARGET_S = 0.05
"""Seconds that a step with prompt tokens is to take, where others read along: 20 tokens a second. A step that decodes
alone may take longer; prompts then have as much time as decoding."""
LONGEST_S = 0.5
"""Seconds of any step with prompt tokens: an abort, a new request and all that decode in it wait for it."""
_MIN_TOKENS = 64
_MIN_LONGEST = 512
"""Tokens that may take longer than LONGEST_S: fewer at a time would not be computed sooner on most devices."""
_SLOWER_SHARE, _FASTER_SHARE = 0.25, 0.5
"""Of the latest step in what is known of its kind. A slow one may have been the first of its shape, or have waited."""
_DIGITS = 3
"""Leading binary digits that a budget keeps: steps of few different sizes are recorded once each."""


class StepBudget:
    """Times of steps that run one behind the other, and the prompt tokens that the next one may have.

    A step's time is a fixed part, which is what a step without prompt tokens takes, and one for each of these. Long
    steps have the fixed part less often: prompts are computed sooner, and the sequences then decode together, which
    takes little more time than one alone. But they hold up the sequences that decode already.

    So a step's time depends on who gains and who loses. Prompts that come before those of others are computed are one
    crowd, until no prompt is left. The sequences that decoded before it are settled. Those of the crowd that decode by
    now are no reason to hurry: what they wait for the others they get back, when all decode together. A step takes
    TARGET_S for each settled sequence's share of the crowd: 50 ms while the crowd is not larger than the settled, twice
    as long if it is twice as large, and LONGEST_S at most, also where nobody decoded before. A prompt of any length
    beside chats is read in steps of 50 ms; requests that come at once, in the largest steps.
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

    def tokens(self, num_settled: int, num_crowd: int, num_decoding: int) -> int:
        """Prompt tokens of the next step.

        num_settled, num_crowd: Sequences that decoded before the first of the prompts came, and those that came since.
        num_decoding: Sequences that decode in the step. All tokens of it together are a number of few binary digits.
        """
        if not self._token_s or not num_settled:
            return self.longest
        target, fixed = self._target_s * max(1.0, num_crowd / num_settled), self._decode_s or 0.0
        count = num_decoding + min(int(max(target - fixed, fixed) / self._token_s), self._most)
        return min(max(_rounded(count) - num_decoding, _MIN_TOKENS), self.longest)

    @property
    def longest(self) -> int:
        """Prompt tokens of a step, at most, whoever decodes in it."""
        if not self._token_s:
            return self._most
        return min(max(_rounded(int(LONGEST_S / self._token_s)), _MIN_LONGEST), self._most)

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


def _rounded(count: int) -> int:
    """The leading binary digits."""
    shift = max(count.bit_length() - _DIGITS, 0)
    return count >> shift << shift


def _mean(known: float | None, latest: float) -> float:
    if known is None:
        return latest
    return known + (_FASTER_SHARE if latest < known else _SLOWER_SHARE) * (latest - known)
