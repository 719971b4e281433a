"""The engine: requests in, ids out, one step at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Items
from itertools import chain
from typing import Any

from forge.config import Progress, SamplingParams
from forge.engine.model_runner import ModelRunner
from forge.engine.page_pool import PagePool
from forge.engine.prefix_cache import PrefixCache, can_share
from forge.engine.recovery import OUT_OF_MEMORY, Recovery
from forge.engine.scheduler import Scheduled, Scheduler, split
from forge.engine.sequence import FinishReason, Sampled, Sequence
from forge.engine.stats import EngineStats
from forge.engine.step_budget import StepBudget
from forge.errors import drop_callers


class Engine(Recovery):
    """Runs the sequences of many requests together.

    It knows ids, not text. One thread at a time may use it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        end_ids: frozenset[int],
        max_step_tokens: int,
        max_prefill_tokens: int | None = None,
        prefix_caching: bool = True,
        budget: StepBudget | None = None,
    ) -> None:
        """budget: Says max_prefill_tokens anew for each step, where the runner has a pipeline."""
        self.runner, self.context, self.end_ids = runner, runner.context, end_ids
        if runner.pipeline:
            runner.pipeline.budget = budget
        self.pools = [PagePool(kind, count) for kind, count in zip(runner.kinds, runner.num_pages, strict=True)]
        shares = prefix_caching and can_share(runner.kinds, runner.page_size)
        self.prefix_cache = PrefixCache(self.pools, runner.page_size) if shares else None
        """None where it is not wanted, or a kind of layer state cannot share its pages."""
        self.scheduler = Scheduler(
            self.pools, runner.max_sequences, max_step_tokens, max_prefill_tokens, self.prefix_cache
        )
        self.scheduler.budget = budget
        self._siblings: dict[Sequence, list[Sequence]] = {}
        """All choices of a prompt, by each of them, until it is computed. The first one runs, the others start then."""
        self._prompt_tokens = self._generated_tokens = 0

    def stats(self) -> EngineStats:
        """What the engine does now, and what it has done. Any thread may ask."""
        siblings, cache = self._siblings.copy().items(), self.prefix_cache
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + sum(group[:1] != [one] for one, group in siblings),
            pages_used={pool.kind.name: pool.num_pages - pool.num_free for pool in self.pools},
            pages_total={pool.kind.name: pool.num_pages for pool in self.pools},
            preemptions=self.scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_asked_tokens=cache.asked_tokens if cache else 0,
            prefix_hit_tokens=cache.hit_tokens if cache else 0,
            prefix_evictions=cache.num_evictions if cache else 0,
        )

    def warm_up(self, progress: Progress | None, lap: Callable[[str], None]) -> None:
        """Compile the kernels of the steps to come, so that no request waits. `lap` is called behind each part."""
        self.runner.warm_up(self.scheduler.max_step_tokens, progress, lap)

    def add(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        adapter: int = -1,
        hooks: Items[tuple[Any, ...]] | None = None,
        origin: Sequence | None = None,
    ) -> list[Sequence]:
        """Queue a request; returns its sequences, one for each of params.n choices.

        adapter, origin: As of `Sequence`. hooks: As of `Sequence`, of each choice. A choice with hooks computes the
        prompt itself.

        Raises ContextLengthError for a prompt that leaves no room, ParameterError for ids outside the vocabulary.
        """
        self.check(prompt_ids, params)
        room = self.context - len(prompt_ids)
        length = len(prompt_ids) + (room if params.max_tokens is None else min(room, params.max_tokens))
        seed = secrets.randbits(64) if params.seed is None else params.seed
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        numbers = len(prompt_ids), params, seed, length, end_ids, adapter
        of_each = hooks or [()] * params.n
        sequences = [
            Sequence(choice, list(prompt_ids), *numbers, own, origin=origin) for choice, own in enumerate(of_each)
        ]
        if any(of_each):
            for sequence in sequences:
                self.scheduler.add(sequence)
            return sequences
        self.scheduler.add(sequences[0])
        if params.n > 1:
            siblings = list(sequences)
            self._siblings.update((sequence, siblings) for sequence in sequences)
        return sequences

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[Sampled]:
        """Run one step; returns the ids it sampled. A sequence that they end has its finish_reason set.

        An id that ends a sequence is not among the sequence's ids: an end token, one of stop_token_ids, or -1 for an
        error. Where the step fails, its sequences end with finish_reason "error", and others run in later steps. Where
        memory runs out, only the youngest prompt's sequences end so: all others have their ids computed again. Separate
        sequences run behind the others, and fail alone: `Sequence.error` says with what.
        """
        if self.runner.pipeline:
            return self._step_ahead()
        step, separate = split(self._scheduled())
        groups = [self._choices(entry.sequence) for entry in step]
        try:
            sampled = self._run(step) if step else []
        except BaseException as error:
            self._fail(groups, error)
            raise
        return sampled + self._run_separate(separate)

    def _scheduled(self, *, may_preempt: bool = True) -> list[Scheduled]:
        try:
            return self.scheduler.schedule(may_preempt=may_preempt)
        except BaseException as error:
            self._fail_all(error)
            raise

    def _run(self, step: list[Scheduled]) -> list[Sampled]:
        """Run a step, and wait for its ids."""
        self.copy_started_pages()
        logits = self.runner.forward(step)
        sampling = [entry.sequence for entry in step if entry.samples]
        # A prompt's other choices draw from its row, whether or not there is room for them to go on now.
        draws = [(row, s) for row, first in enumerate(sampling) for s in self._choices(first)]
        sampled = self.runner.sample(logits, [row for row, _ in draws], [s for _, s in draws]) if draws else []
        self._commit(step)
        self._copy_pages([fork for first in sampling for fork in self._forks(first)])
        self._append(sampled)
        return sampled

    def _run_separate(self, step: list[Scheduled]) -> list[Sampled]:
        """Run the separate sequences of a step in one forward. Those that fail have -1 for an id, and their error."""
        if not step:
            return []
        groups, sampled = [self._choices(entry.sequence) for entry in step], list[Sampled]()
        sequences = list(chain.from_iterable(groups))
        try:
            sampled = self._run(step)
        except BaseException as error:
            self._fail(groups, error)
            if not isinstance(error, Exception):
                raise
            for sequence in sequences:
                sequence.error = error if sequence.finish_reason else None
        failed = [sequence for sequence in sequences if sequence.error]
        for sequence in failed:
            if sequence.finish_reason is None and sequence.error:
                drop_callers(sequence.error)
                self._finish(sequence, "error")
        return [one for one in sampled if not one.sequence.error] + [Sampled(one, -1, None) for one in failed]

    def _commit(self, step: list[Scheduled]) -> None:
        self.scheduler.commit(step)
        for sequence, start, count in step:
            if start < sequence.num_prompt:
                self._prompt_tokens += min(count, sequence.num_prompt - start)

    def _forks(self, first: Sequence) -> list[tuple[Sequence, list[tuple[int, int, int]]]]:
        """Let the other choices of a computed prompt go on from its pages: those that there is room for, with the pages
        to copy for each. The others wait."""
        others = self._choices(first)[1:]
        forks = [(other, self.scheduler.fork(first, other)) for other in others]
        for sequence in (first, *others):
            self._siblings.pop(sequence, None)
        return [(other, copies) for other, copies in forks if other.pages]

    def _copy_pages(self, forks: list[tuple[Sequence, list[tuple[int, int, int]]]]) -> None:
        for other, copies in forks:
            try:
                for copy in copies:
                    self.runner.copy_page(*copy)
            except OUT_OF_MEMORY:
                self.scheduler.preempt(other)  # it computes the ids itself

    def _step_ahead(self) -> list[Sampled]:
        """Queue steps as far as they may be ahead, and return the ids of the oldest, and those of separate sequences.

        These run once, behind what is queued then: the device has work until their ids are known.
        """
        separate: list[Scheduled] = []
        while self._can_queue and (found := self._scheduled(may_preempt=not self._num_queued)):
            step, hooked, behind = self._hooked.parts(found)
            separate = separate or behind
            if not (step or hooked) or (step and self._pipeline.may_wait(step)):
                break
            if (step and not self._launch(step)) or (hooked and not self._launch_hooked(hooked)):
                self._start_over()
                return []
        try:
            sampled: list[Sampled] = self._pipeline.collect() if self._pipeline.num_queued else []
            sampled += self._hooked.collect()
            self._append(sampled)
        except BaseException as error:
            self._fail_all(error)
            raise
        if separate:
            sampled += self._run_separate(separate)
            self._pipeline.lose_time()
        return sampled

    _pipeline = property(lambda self: self.runner.pipeline)
    """No frame of a step has it: who keeps an error would keep the model."""
    _hooked = property(lambda self: self.runner.hooked)
    _can_queue = property(lambda self: not (self._pipeline.is_full or self._hooked.is_full))
    _num_queued = property(lambda self: max(self._pipeline.num_queued, self._hooked.num_queued))

    def _launch_hooked(self, step: list[Scheduled]) -> bool:
        """Queue the steps of sequences whose hooks are data."""
        try:
            self._commit(step)
            is_right: bool = self._hooked.launch(step)
            return is_right
        except BaseException as error:
            self._fail([[entry.sequence] for entry in step], error)
            raise

    def _launch(self, step: list[Scheduled]) -> bool:
        """Queue a step. Its prompts' other choices draw from it, where they have pages to go on."""
        siblings = self._siblings.copy()
        try:
            self.copy_started_pages()
            sampling = [entry.sequence for entry in step if entry.samples] if siblings else []
            self._commit(step)
            forks = {first: found for first in sampling if (found := self._forks(first))}
            is_right: bool = self._pipeline.launch(step, {first: [s for s, _ in own] for first, own in forks.items()})
            self._copy_pages([fork for own in forks.values() for fork in own])
            return is_right
        except BaseException as error:
            self._fail([siblings.get(entry.sequence, [entry.sequence]) for entry in step], error)
            raise

    def close(self) -> None:
        """End all sequences as aborted, and let go of the model, the KV cache and the device's memory."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting, *self._siblings):
            self._finish(sequence, "abort")
        self._siblings.clear()
        self.runner.close()

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence from outside ("stop" for a stop string, "abort").

        Its pages are free at once: a step under way that writes to them is ahead of any that is launched for their next
        owner.
        """
        if sequence.finish_reason is not None:
            return
        if siblings := self._siblings.pop(sequence, None):
            was_first = siblings[0] is sequence
            siblings.remove(sequence)
            if was_first and siblings:  # they would have started from it: the next one goes first
                self.scheduler.add(siblings[0])
        self._finish(sequence, reason)

    @property
    def is_busy(self) -> bool:
        """Whether there are requests, or passes, that have not ended."""
        return self.has_work or bool(self.scheduler.passes)

    @property
    def is_held_up(self) -> bool:
        """Whether nothing can run before passes or states give pages back."""
        scheduler = self.scheduler
        if not (scheduler.passes or scheduler.states) or not scheduler.waiting or scheduler.running:
            return False
        return not scheduler.can_start(next(iter(scheduler.waiting)))

    def _append(self, sampled: list[Sampled]) -> None:
        """Each sequence takes its new id, which may end it."""
        for sequence, token, _ in sampled:
            if token < 0 or sequence.error:
                self._finish(sequence, "error")
                continue
            if self.prefix_cache:
                self.prefix_cache.enter(sequence, len(sequence.ids))
            if token in sequence.end_ids:
                self._finish(sequence, "stop")
            else:
                sequence.ids.append(token)
                self._generated_tokens += 1
                if len(sequence.ids) >= sequence.max_length:
                    self._finish(sequence, "length")
