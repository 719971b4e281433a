"""The work of the engine's thread: requests and passes under way, and the steps that they share."""

from __future__ import annotations

import time
from collections import deque
from typing import Any
from weakref import ref

from forge.engine import Engine, Sampled, Sequence
from forge.errors import RequestTimeoutError
from forge.runtime.request import Choice, Pass, Request, deliver


class Work:
    """What an engine has to do for callers. Only the engine's thread uses it.

    A caller's waiter is referred to weakly: work that nobody waits for any more is dropped.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.requests: dict[ref[Any], Request] = {}
        """Those that have not ended, by the reference to their waiter."""
        self.choices: dict[Sequence, tuple[Choice, Request]] = {}
        """Their choices that have not ended."""
        self._timed: dict[Request, float] = {}
        """Those that have a deadline."""
        self.passes: deque[Pass] = deque()
        """Passes over all positions. Only the first one runs: each may need all pages."""
        self._num_owed = 0
        """Steps with new ids that requests get before the next pass begins: passes would hold all pages for ever."""

    # What callers send

    def add(self, request: Request) -> None:
        if request.waiter() is None:
            return
        self.requests[request.waiter] = request
        if request.deadline is not None:
            self._timed[request] = request.deadline
        try:
            for number, ids in enumerate(request.prompts):
                hooks = request.hooks[number] if request.hooks else None
                for sequence in self._engine.add(ids, request.params, request.adapter, hooks, origin=request.origin):
                    self.choices[sequence] = request.begin(sequence), request
        except BaseException as error:
            self._fail(request, error)

    def cancel(self, request: Request) -> None:
        """End a request, unless it has ended. Nothing more of it is delivered."""
        for choice in request.choices:
            if self.choices.pop(choice.sequence, None):
                self._engine.finish(choice.sequence, "abort")
        request.num_running = 0
        self._forget(request)

    def add_pass(self, current: Pass) -> None:
        if current.waiter() is not None:
            self.passes.append(current)

    def end_pass(self, current: Pass) -> None:
        """End a pass, unless it has ended."""
        if current in self.passes:
            self.passes.remove(current)
            current.parts.close()  # in this thread: it gives pages back

    def release(self, state: Sequence) -> None:
        """Give back the pages of a state that nobody refers to any more."""
        self._engine.scheduler.release(state)

    def drop(self, waiter: ref[Any]) -> None:
        """End what was delivered to a waiter that is gone."""
        if request := self.requests.get(waiter):
            self.cancel(request)
        for current in [one for one in self.passes if one.waiter is waiter]:
            self.end_pass(current)

    # What the thread does between messages

    @property
    def has_waiters(self) -> bool:
        """Whether anybody waits for it. Another thread may ask."""
        under_way: list[Request | Pass] = [*self.requests.copy().values(), *self.passes.copy()]
        return any(one.waiter() for one in under_way)

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self.requests or self.passes)

    def can_run(self) -> bool:
        """Whether `run` would do anything."""
        while self.requests and not self.passes and self._engine.is_held_up:
            self._fail_held_up()
        return self._can_run_part() or (bool(self.requests) and not self._engine.is_held_up)

    def run(self) -> None:
        """One part of a pass, if one runs, and one step, if there are requests. Those whose time is up end before."""
        self._end_late()
        if self._can_run_part():
            self._run_part(self.passes[0])
        if self.requests:
            self._step()

    def fail_all(self, error: BaseException) -> None:
        """End all requests with an error."""
        for request in list(self.requests.values()):
            self._fail(request, error)

    def end(self, error: BaseException) -> None:
        """End all requests as aborted, and all passes with an error."""
        for request in list(self.requests.values()):
            for choice in request.choices:
                if choice.sequence in self.choices:
                    self._engine.finish(choice.sequence, "abort")
                    self._finish(choice, request)
            self._deliver_progress(request)
        for current in list(self.passes):
            self.end_pass(current)
            deliver(current, error)

    def _fail_held_up(self) -> None:
        """End the request that is next and does not fit beside states, or a pass that somebody runs by hand."""
        scheduler = self._engine.scheduler
        sequence = next(iter(scheduler.waiting))
        error = scheduler.out_of_pages(f"a request of {len(sequence.ids)} tokens")
        if entry := self.choices.get(sequence):
            self._fail(entry[1], error)
        else:  # it was added by hand
            self.fail_all(error)

    def _can_run_part(self) -> bool:
        owes = self._num_owed and self.requests and not self._engine.is_held_up
        return bool(self.passes) and (self.passes[0].has_begun or not owes)

    def _run_part(self, current: Pass) -> None:
        current.has_begun = True
        self._num_owed = self._num_owed + 1 if self.requests else 0
        try:
            next(current.parts)
            return
        except StopIteration as end:
            result = end.value
        except BaseException as error:
            result = error
        self.end_pass(current)
        deliver(current, result)

    def _end_late(self) -> None:
        now = time.perf_counter()
        for request in [request for request, deadline in self._timed.items() if deadline <= now]:
            message = f"the request did not end within {request.params.timeout:g} s"
            hint = "give it more time, or fewer max_tokens"
            self._fail(request, RequestTimeoutError(message, parameter="timeout", hint=hint))

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error, which its caller raises."""
        self.cancel(request)
        deliver(request, error)

    def _step(self) -> None:
        """One step of the engine, and to each caller what it brings, at once."""
        try:
            sampled = self._engine.step()
        except BaseException as error:  # the engine has ended the sequences of this step
            ended = dict.fromkeys(r for choice, r in self.choices.values() if choice.sequence.finish_reason)
            for request in list(ended or self.requests.values()):  # all, where none can be told: no step would end
                self._fail(request, error)
            return
        if sampled and self._num_owed:
            self._num_owed -= 1
        touched: dict[Request, None] = {}
        for token in sampled:
            if entry := self.choices.get(token.sequence):  # else it was added by hand
                choice, request = entry
                if token.sequence.error:
                    self._fail(request, token.sequence.error)
                    touched.pop(request, None)
                    continue
                touched[request] = None
                try:
                    self._push(token, choice, request)
                except BaseException as error:
                    self._fail(request, error)
        for request in touched:
            if not self._deliver_progress(request):
                self.cancel(request)

    def _push(self, token: Sampled, choice: Choice, request: Request) -> None:
        if choice.push(token):
            self._engine.finish(token.sequence, "stop")
        if token.sequence.finish_reason is not None:
            self._finish(choice, request)

    def _finish(self, choice: Choice, request: Request) -> None:
        del self.choices[choice.sequence]
        choice.finish()
        request.num_running -= 1
        if request.is_finished:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self.requests.pop(request.waiter, None)
        self._timed.pop(request, None)
        request.let_go()

    def _deliver_progress(self, request: Request) -> bool:
        """Deliver a stream's new chunks, or that all choices have ended. False where nobody waits."""
        if request.is_streamed:
            chunks = request.take_chunks()
            return not chunks or deliver(request, chunks)
        return not request.is_finished or deliver(request, None)
