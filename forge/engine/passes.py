"""Passes over all positions of ids that no request has, in steps of their own beside those of requests."""

from __future__ import annotations

from collections.abc import Callable, Generator
from traceback import clear_frames
from typing import Any, TypeVar

from forge.config import Hook, SamplingParams
from forge.engine.model_runner import ModelRunner
from forge.engine.scheduler import Scheduled, Scheduler
from forge.engine.sequence import Sequence
from forge.errors import ContextLengthError, OutOfMemoryError, ParameterError

T = TypeVar("T")
LOGIT_BYTES = 128 << 20
"""Memory of the logits that are computed together where all positions' are wanted."""
MAX_TOKENS = 1024
"""Tokens of a step, at most: its arrays lie beside those of requests' steps."""


def run_pass(
    scheduler: Scheduler, ids: list[int], most: int, run: Callable[[list[Scheduled]], T], adapter: int = -1
) -> Generator[T, None, None]:
    """Run steps over ids, of `most` tokens at most; yields what `run` returns. adapter: As of `Sequence`.

    Beside running sequences a step has no more tokens than a step of theirs has prompt tokens. Where pages run out, the
    youngest of them give theirs up. Raises OutOfMemoryError where other passes hold the pages that it needs.
    """
    sequence = Sequence(0, list(ids), len(ids), SamplingParams(), 0, len(ids), adapter=adapter)
    if not scheduler.reserve(sequence):
        raise OutOfMemoryError(
            f"a pass over {len(ids)} positions needs pages of the KV cache that other passes hold, which are not "
            "read to their ends: read or close them first"
        )
    try:
        while (start := sequence.num_computed) < len(ids):
            rows = scheduler.max_prefill_tokens if scheduler.running else scheduler.max_step_tokens
            count = min(most, rows, MAX_TOKENS, len(ids) - start)
            scheduler.reserve_more(sequence, start + count)
            yield run([Scheduled(sequence, start, count)])
            sequence.num_computed = start + count
    except BaseException as error:
        clear_frames(error.__traceback__)
        raise
    finally:
        scheduler.release(sequence)


class Passes:
    """Base of `Engine`: which ids it takes, and passes over all positions of some."""

    runner: ModelRunner
    scheduler: Scheduler
    context: int

    def logits(self, ids: list[int], hook: Hook | None = None, adapter: int = -1) -> Generator[Any, None, None]:
        """float32 logits (rows, V) of all positions, some rows at a time. What requests give is the same without it.

        Where pages run out, the youngest running sequences give theirs up and wait until it is read to its end, or
        closed. Raises ContextLengthError for too many ids, and OutOfMemoryError where other such passes, not read to
        their ends, hold the pages that it needs.
        """
        most = LOGIT_BYTES // (4 * self.runner.vocab_size)
        return self._run_pass(ids, most, lambda step: self.runner.forward(step, all_logits=True, hook=hook), adapter)

    def run_blocks(self, ids: list[int], hook: Hook, adapter: int = -1) -> Generator[int, None, None]:
        """Run the model's blocks alone over all positions, some tokens at a time, and show a hook their results.

        No logits are computed. Yields numbers of tokens. Raises what `logits` does.
        """
        return self._run_pass(ids, len(ids), lambda step: self.runner.run_blocks(step, hook), adapter)

    def states(self, ids: list[int], adapter: int = -1) -> Generator[Any, None, None]:
        """float32 (rows, E) of all positions, some rows at a time: the last layer's results through the output's norm.

        No logits are computed. Raises what `logits` does.
        """
        return self._run_pass(ids, len(ids), self.runner.states, adapter)

    def _run_pass(
        self, ids: list[int], most: int, run: Callable[[list[Scheduled]], T], adapter: int
    ) -> Generator[T, None, None]:
        self.check_ids(ids)
        yield from run_pass(self.scheduler, ids, most, run, adapter)

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raises what `add` would: ContextLengthError, or ParameterError for ids outside the vocabulary."""
        self._check_ids(prompt_ids)
        if len(prompt_ids) >= self.context:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds {self.context}, one of which must be "
                "free",
                parameter="context",
                hint="shorten the prompt or load with a larger context",
            )
        vocabulary = self.runner.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if max(ids, default=0) >= vocabulary:
                message = f"{name} names token {max(ids)}, and ids go from 0 to {vocabulary - 1}"
                raise ParameterError(message, parameter=name)

    def check_ids(self, ids: list[int]) -> None:
        """Raises what `logits` would of these ids: ParameterError, or ContextLengthError for too many."""
        self._check_ids(ids)
        if len(ids) > self.context:
            raise ContextLengthError(
                f"{len(ids)} tokens do not fit the context of {self.context}",
                parameter="context",
                hint="use fewer, or load with a larger context",
            )

    def _check_ids(self, ids: list[int]) -> None:
        vocabulary = self.runner.vocab_size
        if not ids:
            message = "the prompt is empty and this model adds no token of its own"
            raise ParameterError(message, parameter="prompt", hint="give some text")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            message = f"the prompt holds token id {wrong}, and ids go from 0 to {vocabulary - 1}"
            raise ParameterError(message, parameter="prompt")
