"""The engine: requests in, ids out, one step at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, TypeVar

from forge.config import SamplingParams
from forge.engine.decode_pipeline import MAX_PENDING, DecodePipeline
from forge.engine.model_runner import Runner, Sampled
from forge.engine.page_allocator import PageAllocator
from forge.engine.scheduler import Scheduled, Scheduler
from forge.engine.sequence import FinishReason, Sequence
from forge.errors import ContextLengthError, OutOfMemoryError, ParameterError
from forge.models.decoder import Tap

T = TypeVar("T")

_TYPICAL_ROWS = (1, 8, 16, 32, 64, 65)
"""Numbers of rows between which products are computed by other kernels."""
_LOGIT_BYTES = 128 << 20
"""Memory of the logits that are computed together where all positions' are wanted."""


class Engine:
    """Runs the sequences of many requests together.

    It knows ids, not text. `step` may be interrupted (Ctrl-C, an error) and called again: nothing is committed before
    the step's ids are drawn.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        context: int,
        end_ids: frozenset[int],
        max_sequences: int,
        max_step_tokens: int,
        graphs: bool | int = True,
    ) -> None:
        self.runner = runner
        self.context = context
        self.end_ids = end_ids
        cache = runner.cache
        self.blocks = PageAllocator(cache.num_pages)
        self.scheduler = Scheduler(self.blocks, cache.page_size, max_sequences, max_step_tokens)
        self._numbers = count()
        self._decode = (
            DecodePipeline(runner, max_sequences, context, graphs) if runner.backend.is_asynchronous else None
        )
        self._interrupted = False
        self._num_borrowed = 0
        """Pages of passes over all positions."""
        self._siblings: dict[Sequence, list[Sequence]] = {}
        """Choices that start when the first one's prompt is computed."""

    def warm_up(self, progress: Callable[[str, int, int | None], None] | None = None) -> None:
        """Compile the kernels of the steps to come, so that no request waits for them."""
        self.runner.backend.prepare(self._typical_steps, progress)

    def _typical_steps(self) -> None:
        size = self.runner.cache.page_size
        longest = min(self.context, self.scheduler.max_step_tokens, self.blocks.num_pages * size)
        most = self.scheduler.max_sequences  # a short prompt has as many rows as a batch that is not allowed
        shapes = [(rows, 1) if rows <= most else (1, min(rows, longest)) for rows in _TYPICAL_ROWS]
        everything = SamplingParams(repetition_penalty=2.0, logprobs=1)
        for rows, length in dict.fromkeys([(1, longest), *shapes, (most, 1)]):  # the last product has a row for each
            sequences = [
                Sequence(0, choice, [0] * length, length, everything, 0, length, pages=[0] * -(-length // size))
                for choice in range(rows)
            ]
            logits = self.runner.forward([Scheduled(sequence, 0, length) for sequence in sequences])
            if self._decode:
                self._decode.rehearse(logits, sequences)

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raises what `add` would: ContextLengthError, or ParameterError for ids outside the vocabulary."""
        self._check_ids(prompt_ids)
        if len(prompt_ids) >= self.context:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds {self.context}, one of which must be "
                "free: shorten the prompt or load with a larger context (--context)"
            )
        vocabulary = self.runner.model.config.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids)):
            if max(ids, default=0) >= vocabulary:
                raise ParameterError(f"{name} names token {max(ids)}, and ids go from 0 to {vocabulary - 1}")

    def add(self, prompt_ids: list[int], params: SamplingParams) -> list[Sequence]:
        """Queue a request; returns its sequences, one for each of params.n choices.

        Raises ContextLengthError for a prompt that leaves no room, ParameterError for ids outside the vocabulary.
        """
        self.check(prompt_ids, params)
        room = self.context - len(prompt_ids)
        length = len(prompt_ids) + (room if params.max_tokens is None else min(room, params.max_tokens))
        number = next(self._numbers)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        end_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        first, *others = (
            Sequence(number, choice, list(prompt_ids), len(prompt_ids), params, seed, length, end_ids)
            for choice in range(params.n)
        )
        self.scheduler.add(first)
        if others:
            self._siblings[first] = others
        return [first, *others]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[Sampled]:
        """Run one step; returns the ids it sampled. A sequence that they end has its finish_reason set.

        An id that ends a sequence (an end token, one of stop_ids, or -1 for an error) is not among the sequence's ids.
        """
        if self._decode and (sampled := self._step_ahead(self._decode)):
            return sampled
        step = self.scheduler.schedule()
        if not step:
            return []
        logits = self.runner.forward(step)
        sampling = [entry.sequence for entry in step if entry.samples]
        # A prompt's other choices draw from its row, whether or not there is room for them to go on now.
        draws = [(row, s) for row, first in enumerate(sampling) for s in (first, *self._siblings.get(first, ()))]
        sampled = self.runner.sample(logits, [row for row, _ in draws], [s for _, s in draws]) if draws else []
        self.scheduler.commit(step)
        for first in sampling:
            for sibling in self._siblings.pop(first, ()):
                if copy := self.scheduler.fork(first, sibling):
                    self.runner.cache.copy_page(*copy)
        for token in sampled:
            self._append(token.sequence, token.id)
        return sampled

    def _step_ahead(self, loop: DecodePipeline) -> list[Sampled]:
        """The ids of a decode step, while the step behind it is already under way; none where the loop cannot go on."""
        if self._interrupted:
            loop.abandon([*self.scheduler.running, *self.scheduler.waiting])
        self._interrupted = True  # until the end: the device may be ahead of what is known here
        while loop.num_pending < MAX_PENDING and (sequences := self._continuing(loop)):
            if not loop.num_pending:
                loop.begin(sequences)
            loop.launch(sequences)
            if loop.is_stale:
                self._start_over(loop)
                return []
        sampled: list[Sampled] = []
        while loop.num_pending and not sampled:
            sampled = loop.collect()
        if not sampled:
            loop.leave()
        for token in sampled:
            self._append(token.sequence, token.id)
        self._interrupted = False
        return sampled

    def _start_over(self, loop: DecodePipeline) -> None:
        """Replays were wrong, and so may be what they left in the cache: it is computed again from the ids."""
        loop.abandon([*self.scheduler.running, *self.scheduler.waiting])
        while self.scheduler.running:
            self.scheduler.preempt()
        self._interrupted = False

    def _continuing(self, loop: DecodePipeline) -> list[Sequence]:
        """The sequences of a step that can follow the loop's last one, or begin it anew where all ids are known; none
        where the loop must be drained."""
        if any(sequence in self._siblings for sequence in self.scheduler.running):
            return []
        sequences = self.scheduler.decoding()
        return [] if loop.num_pending and not loop.holds(sequences) else sequences

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence from outside ("stop" for a stop string, "abort").

        Its pages are free at once: a step under way that writes to them is ahead of any that is launched for their next
        owner.
        """
        if sequence.finish_reason is not None:
            return
        for siblings in self._siblings.values():
            if sequence in siblings:  # not started yet
                siblings.remove(sequence)
                sequence.finish_reason = reason
                return
        if siblings := self._siblings.pop(sequence, []):  # they would have started from it: the next one goes first
            self.scheduler.add(siblings[0])
            self._siblings[siblings[0]] = siblings[1:]
        self.scheduler.finish(sequence, reason)

    def logits(self, ids: list[int], tap: Tap | None = None) -> Generator[Any, None, None]:
        """float32 logits (rows, V) of all positions, some rows at a time. What requests give is the same without it.

        Where pages run out, the youngest running sequences give theirs up and wait until it is read to its end, or
        closed. Raises ContextLengthError for too many ids, and OutOfMemoryError where other such passes, not read to
        their ends, hold the pages that it needs.
        """
        most = _LOGIT_BYTES // (4 * self.runner.model.config.vocab_size)
        return self._alone(ids, most, lambda step: self.runner.forward(step, all_logits=True, tap=tap))

    def look(self, ids: list[int], tap: Tap) -> Generator[int, None, None]:
        """Show the tap all positions, some tokens at a time, without logits: how many. Raises what `logits` does."""
        return self._alone(ids, len(ids), lambda step: self.runner.look(step, tap))

    def _alone(self, ids: list[int], most: int, run: Callable[[list[Scheduled]], T]) -> Generator[T, None, None]:
        """A pass over ids that no request has, at most so many at a time."""
        self.check_ids(ids)
        sequence = Sequence(next(self._numbers), 0, list(ids), len(ids), SamplingParams(), 0, len(ids))
        pages = sequence.pages = self._borrow(-(-len(ids) // self.runner.cache.page_size))
        try:
            rows = min(most, self.scheduler.max_step_tokens)
            for start in range(0, len(ids), rows):
                yield run([Scheduled(sequence, start, min(rows, len(ids) - start))])
        finally:
            self._num_borrowed -= len(pages)
            self.blocks.release(pages)

    def _borrow(self, count: int) -> list[int]:
        """Pages for a pass. Running sequences give theirs up for it, the youngest first.

        Steps under way may still write to these, and sample ids of those sequences: the device works in order.
        """
        within_reach = count <= self.blocks.num_pages - self._num_borrowed
        while (pages := self.blocks.allocate(count)) is None:
            if not (within_reach and self.scheduler.running):
                raise OutOfMemoryError(
                    f"a pass over all positions needs {count} pages of the KV cache, and others that are not read to "
                    f"their ends hold {self._num_borrowed} of {self.blocks.num_pages}: read or close them first"
                )
            self.scheduler.preempt()
        self._num_borrowed += count
        return pages

    @property
    def is_busy(self) -> bool:
        """Whether there are requests, or passes over all positions, that have not ended."""
        return self.has_work or bool(self._num_borrowed)

    @property
    def is_held_up(self) -> bool:
        """Whether nothing can run before a pass over all positions gives its pages back."""
        return bool(self._num_borrowed and self.scheduler.waiting and not self.scheduler.running)

    def check_ids(self, ids: list[int]) -> None:
        """Raises what `logits` would of these ids: ParameterError, or ContextLengthError for too many."""
        self._check_ids(ids)
        if len(ids) > self.context:
            raise ContextLengthError(
                f"{len(ids)} tokens do not fit the context of {self.context}: use fewer, or --context"
            )

    def _check_ids(self, ids: list[int]) -> None:
        vocabulary = self.runner.model.config.vocab_size
        if not ids:
            raise ParameterError("the prompt is empty and this model adds no token of its own: give some text")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            raise ParameterError(f"the prompt holds token id {wrong}, and ids go from 0 to {vocabulary - 1}")

    def _append(self, sequence: Sequence, token: int) -> None:
        if token < 0:
            self.scheduler.finish(sequence, "error")
        elif token in sequence.end_ids:
            self.scheduler.finish(sequence, "stop")
        else:
            sequence.ids.append(token)
            if len(sequence.ids) >= sequence.max_length:
                self.scheduler.finish(sequence, "length")
