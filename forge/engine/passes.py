"""Passes over ids that no request has, in steps of their own beside those of requests."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from forge.config import SamplingParams
from forge.engine.model_runner import ModelRunner
from forge.engine.scheduler import Scheduled, Scheduler
from forge.engine.sequence import Sequence
from forge.errors import ContextLengthError, ParameterError, drop_callers, drop_frames

T = TypeVar("T")
LOGIT_BYTES = 128 << 20
"""Memory of the logits that are computed together where those of several positions are wanted."""
MAX_TOKENS = 1024
"""Tokens of a step, at most: its arrays lie beside those of requests' steps."""


@dataclass(slots=True, eq=False)
class Job:
    """A sequence of a pass."""

    sequence: Sequence
    wanted: Items[int] = ()
    """Positions whose rows are wanted, ascending. None of them lies before what the sequence starts from."""
    behind: list[Job] = field(default_factory=list)
    """Jobs whose ids begin with this one's. They start from its pages; it keeps them until they have ended."""
    is_kept: bool = False
    """Whether its pages become a state's when it has ended."""
    parent: Job | None = None
    num_behind: int = 0
    """Jobs behind it that have not ended."""


class Rows(NamedTuple):
    """Rows of a step's result: those of some of a job's wanted positions."""

    job: Job
    positions: Items[int]
    rows: slice


def job_of(
    ids: list[int],
    wanted: Items[int] = (),
    adapter: int = -1,
    origin: Sequence | None = None,
    hooks: tuple[Any, ...] = (),
    num_prompt: int | None = None,
) -> Job:
    """A job over ids. adapter, origin, hooks: As of `Sequence`. num_prompt: Of the ids, to hooks; None = all."""
    how: dict[str, Any] = {"adapter": adapter, "origin": origin, "hooks": hooks}
    length = len(ids) if num_prompt is None else num_prompt
    sequence = Sequence(0, list(ids), length, SamplingParams(), 0, len(ids), **how)
    return Job(sequence, wanted)


class Passes:
    """Base of `Engine`: which ids it takes, and passes over some, several sequences in one step."""

    runner: ModelRunner
    scheduler: Scheduler
    context: int

    def logits(self, ids: list[int], adapter: int = -1, hooks: tuple[Any, ...] = ()) -> Generator[Any, None, None]:
        """float32 logits (rows, V) of all positions, some rows at a time. What requests give is the same without it.

        Where pages run out, the youngest running sequences give theirs up and wait until it is read to its end, or
        closed. Raises ContextLengthError for too many ids, and OutOfMemoryError where other such passes, not read to
        their ends, or states hold the pages that it needs. adapter, hooks: As of `Sequence`.
        """
        self.check_ids(ids)
        for result, _ in self.run_jobs([job_of(ids, range(len(ids)), adapter, hooks=hooks)]):
            yield result

    def run_jobs(self, jobs: Iterable[Job]) -> Generator[tuple[Any, list[Rows]], None, None]:
        """float32 logits (rows, V) of the wanted positions of jobs, some of them at a time, and whose they are.

        Jobs run together as far as there are pages. Raises what `logits` does. A step without wanted positions yields
        None.
        """
        return self._run_jobs(
            jobs, self._most_rows, self._computing(lambda step, rows: self.runner.forward(step, rows=rows))
        )

    def states(self, jobs: Iterable[Job]) -> Generator[tuple[Any, list[Rows]], None, None]:
        """As `run_jobs`, but float32 (rows, E): the last layer's results through the output's norm. No logits are
        computed."""
        return self._run_jobs(jobs, MAX_TOKENS, self._computing(self.runner.states))

    def run_blocks(self, ids: list[int], hooks: tuple[Any, ...], adapter: int = -1) -> Generator[int, None, None]:
        """Run the model's blocks alone over all positions, some tokens at a time, for hooks.

        No logits are computed. Yields numbers of tokens. Raises what `logits` does.
        """
        self.check_ids(ids)
        jobs = [job_of(ids, (), adapter, hooks=hooks)]
        for result, _ in self._run_jobs(jobs, MAX_TOKENS, lambda step, _: self.runner.run_blocks(step)):
            yield result

    @property
    def _most_rows(self) -> int:
        return max(LOGIT_BYTES // (4 * self.runner.vocab_size), 1)

    def _computing(
        self, run: Callable[[list[Scheduled], list[int]], T]
    ) -> Callable[[list[Scheduled], list[int]], T | None]:
        """As `run`, but None, of the blocks alone, where no rows are wanted."""

        def wanted(step: list[Scheduled], rows: list[int]) -> T | None:
            if rows:
                return run(step, rows)
            self.runner.run_blocks(step)
            return None

        return wanted

    def _run_jobs(
        self, jobs: Iterable[Job], most: int, run: Callable[[list[Scheduled], list[int]], T]
    ) -> Generator[tuple[T, list[Rows]], None, None]:
        """Run jobs in steps of `most` wanted rows, at most. run: Takes a step and those of its tokens that are wanted.

        Beside running sequences a step has no more tokens than a step of theirs has prompt tokens.
        """
        jobs_under_way = _Jobs(self.scheduler, jobs, self.copy_started_pages)
        raised: BaseException | None = None
        try:
            while step := jobs_under_way.schedule(most):
                result = run(*step[:2])
                if raised := next((entry.sequence.error for entry in step[0] if entry.sequence.error), None):
                    drop_callers(raised)
                    raise raised
                yield result, step[2]
                jobs_under_way.commit(step[0])
        except Exception as error:
            if error is not raised:
                drop_frames(error)
            raise
        finally:
            jobs_under_way.close()

    def fork_state(self, state: Sequence, length: int) -> Sequence:
        """Another state of the first `length` ids of one. Raises OutOfMemoryError."""
        forked = self.scheduler.fork_state(state, length)
        try:
            self.copy_started_pages()
        except BaseException:
            self.scheduler.release(forked)
            raise
        return forked

    def copy_started_pages(self) -> None:
        """Copy what sequences that have begun from others' pages may not share with them."""
        copies, self.scheduler.copies = self.scheduler.copies, []
        for _, kind, source, target in copies:
            self.runner.copy_page(kind, source, target)

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raises what `add` would: ContextLengthError, or ParameterError for ids outside the vocabulary."""
        self._check_vocabulary(prompt_ids)
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
        self._check_vocabulary(ids)
        if len(ids) > self.context:
            raise ContextLengthError(
                f"{len(ids)} tokens do not fit the context of {self.context}",
                parameter="context",
                hint="use fewer, or load with a larger context",
            )

    def _check_vocabulary(self, ids: list[int]) -> None:
        vocabulary = self.runner.vocab_size
        if not ids:
            message = "the prompt is empty and this model adds no token of its own"
            raise ParameterError(message, parameter="prompt", hint="give some text")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            message = f"the prompt holds token id {wrong}, and ids go from 0 to {vocabulary - 1}"
            raise ParameterError(message, parameter="prompt")


class _Jobs:
    """The jobs of a pass: those that wait, in order, and those that have pages."""

    def __init__(self, scheduler: Scheduler, jobs: Iterable[Job], copy_pages: Callable[[], None]) -> None:
        """copy_pages: Makes the scheduler's copies."""
        self._scheduler, self._copy_pages = scheduler, copy_pages
        self._waiting = deque(jobs)
        self._running: list[Job] = []
        self._held: dict[Sequence, None] = {}
        """Those that have pages: running ones, and those that others start from."""

    def schedule(self, most: int) -> tuple[list[Scheduled], list[int], list[Rows]] | None:
        """The next step, its wanted tokens and whose they are; None where all jobs have ended."""
        scheduler = self._scheduler
        budget = min(scheduler.max_prefill_tokens if scheduler.running else scheduler.max_step_tokens, MAX_TOKENS)
        self._admit(budget)
        step: list[Scheduled] = []
        rows: list[int] = []
        found: list[Rows] = []
        offset = 0
        for job in self._running:
            start = job.sequence.num_computed
            first = bisect_left(job.wanted, start)
            stop = min(start + budget - offset, len(job.sequence.ids))
            last = bisect_left(job.wanted, stop)
            if last - first > most - len(rows):
                last = first + most - len(rows)
                stop = job.wanted[last]
            if stop == start:
                break
            scheduler.reserve_more(job.sequence, stop)
            step.append(Scheduled(job.sequence, start, stop - start))
            if last > first:
                found.append(Rows(job, job.wanted[first:last], slice(len(rows), len(rows) + last - first)))
                rows += [offset + position - start for position in job.wanted[first:last]]
            offset += stop - start
        return (step, rows, found) if step else None

    def _admit(self, budget: int) -> None:
        """Give jobs pages, as many as a step has tokens for. The first one may take those of running sequences."""
        num_tokens = sum(job.sequence.num_remaining for job in self._running)
        while self._waiting and num_tokens < budget and len(self._running) < self._scheduler.max_sequences:
            job = self._waiting[0]
            if not self._scheduler.reserve(job.sequence, may_preempt=not self._running, is_kept=job.is_kept):
                if self._running:
                    return
                if job.parent is None:
                    raise self._scheduler.out_of_pages(f"a pass over {len(job.sequence.ids)} positions")
                self._orphan(job.parent)
                continue
            self._waiting.popleft()
            self._running.append(job)
            self._held[job.sequence] = None
            num_tokens += job.sequence.num_remaining
            self._copy_pages()

    def commit(self, step: list[Scheduled]) -> None:
        """A step has run."""
        for sequence, start, count in step:
            sequence.num_computed = start + count
        ended = [job for job in self._running if not job.sequence.num_remaining]
        self._running = [job for job in self._running if job.sequence.num_remaining]
        for job in reversed(ended):
            job.num_behind = len(job.behind)
            for other in reversed(job.behind):
                other.parent, other.sequence.origin = job, job.sequence
                self._waiting.appendleft(other)
            if not job.behind:
                self._end(job)

    def _end(self, job: Job) -> None:
        del self._held[job.sequence]
        for hook in job.sequence.hooks:
            hook.finished(True)
        if job.is_kept:
            self._scheduler.keep(job.sequence)
        else:
            self._scheduler.release(job.sequence)
        if job.parent is not None:
            job.parent.num_behind -= 1
            if not job.parent.num_behind:
                self._end(job.parent)

    def _orphan(self, parent: Job) -> None:
        """There is no room for a job beside the one that it starts from: those that are left compute all their ids."""
        for job in self._waiting:
            if job.parent is parent:
                job.parent = job.sequence.origin = None
        parent.num_behind = 0
        self._end(parent)

    def close(self) -> None:
        for sequence in self._held:
            self._scheduler.release(sequence)
        self._held = {}
