"""A request on its way: ids become text, stop strings end it, times are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from threading import RLock
from typing import Any
from weakref import finalize, ref

from forge.config import SamplingParams
from forge.engine import FinishReason, Sampled, Sequence, TokenLogprobs
from forge.errors import ForgeError
from forge.outputs import Chunk, Completion, Timings
from forge.tokenizer import Tokenizer
from forge.tokenizer.stop import StopStrings


class Hold:
    """A computed sequence, whose pages stay as they are while anybody uses it.

    Users are counted, and not only the references to it: an error that somebody keeps would keep pages.
    """

    def __init__(self, sequence: Sequence, release: Callable[[Sequence], None]) -> None:
        """release: Called once, in any thread, when nobody uses or refers to it any more."""
        self.sequence = sequence
        self._num_users, self._counting = 0, RLock()
        self._end = finalize(self, release, sequence)
        self._end.atexit = False

    def use(self) -> None:
        """One user more. Raises ForgeError where it has ended."""
        with self._counting:
            if not self._end.alive:
                raise ForgeError("the state is closed: prefill the prompt again")
            self._num_users += 1

    def leave(self) -> None:
        """One user less."""
        with self._counting:
            self._num_users -= 1
            if self._num_users <= 0:
                self._end()


class Request:
    """The prompts of one call, all choices of each, and the caller that waits for them.

    The engine's thread alone changes it. The caller reads it when it is finished.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        tokenizer: Tokenizer,
        waiter: ref[Any],
        adapter: int = -1,
        hold: Hold | None = None,
        hooks: list[list[tuple[Any, ...]]] | None = None,
        *,
        is_streamed: bool,
    ) -> None:
        """adapter: As of `Sequence`. hold: What the prompts begin with and is computed. hooks: Of each choice of each
        prompt; None = there are none."""
        self.prompts, self.params, self.tokenizer, self.waiter = prompts, params, tokenizer, waiter
        self.hold = hold
        self.adapter, self.hooks, self.is_streamed = adapter, hooks, is_streamed
        """Chunks are delivered as they come. Else one message says that all choices have ended."""
        self.choices: list[Choice] = []
        self.chunks: list[Chunk] = []
        """Chunks that are not delivered yet."""
        self.num_running = len(prompts) * params.n
        self._started = time.perf_counter()
        self.deadline = None if params.timeout is None else self._started + params.timeout
        """When it ends with an error, as `time.perf_counter` tells. None = never."""

    @property
    def origin(self) -> Sequence | None:
        return self.hold.sequence if self.hold else None

    def let_go(self) -> None:
        """It has ended, and uses no state any more."""
        hold, self.hold = self.hold, None
        if hold:
            hold.leave()

    @property
    def is_finished(self) -> bool:
        return not self.num_running

    def begin(self, sequence: Sequence) -> Choice:
        """The next choice, whose ids the engine samples as this sequence's."""
        emit = self.chunks.append if self.is_streamed else None
        choice = Choice(sequence, len(self.choices), self.tokenizer, self._started, emit)
        self.choices.append(choice)
        return choice

    def take_chunks(self) -> list[Chunk]:
        """The chunks since the last call."""
        chunks = self.chunks[:]
        self.chunks.clear()
        return chunks

    def completions(self) -> list[Completion]:
        """The n choices of the first prompt, then the second prompt's, and so on."""
        return [choice.completion() for choice in self.choices]


class Choice:
    """The text side of one sequence."""

    def __init__(
        self, sequence: Sequence, index: int, tokenizer: Tokenizer, started: float, emit: Callable[[Chunk], None] | None
    ) -> None:
        """index: number of the choice among those of all prompts of the request, for its chunks."""
        self.sequence = sequence
        self._emit, self._index = emit, index
        self._decoder = tokenizer.streamer(continues=True)
        self._stops = StopStrings(sequence.params.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._wants_logprobs = sequence.params.logprobs is not None
        self._has_stopped = False
        self._started = started
        self._first = self._last = started

    @property
    def finish_reason(self) -> FinishReason | None:
        """The sequence's, but "stop" where its last id completes a stop string, even if its length ends it too."""
        return "stop" if self._has_stopped else self.sequence.finish_reason

    def push(self, token: Sampled) -> bool:
        """Take a new id; True if its text completes a stop string."""
        self._last = time.perf_counter()
        if self._first == self._started:
            self._first = self._last
        if self.sequence.finish_reason in ("stop", "error"):  # this id ended the sequence and is not part of it
            return False
        text, self._has_stopped = self._stops.push(self._decoder.push(token.id))
        self._text.append(text)
        if token.logprobs is not None:
            self._logprobs.append(token.logprobs)
        if self._emit:
            found = (token.logprobs,) if token.logprobs is not None else ()
            logprobs = found if self._wants_logprobs else None
            self._emit(Chunk(text, [token.id], index=self._index, logprobs=logprobs))
        return self._has_stopped

    def finish(self) -> None:
        """The sequence has ended: text that was held back is let go, and the last chunk says why.

        Bytes of a character that was cut are no text, and are left out; the ids have them.
        """
        rest = "" if self._has_stopped else self._stops.flush()
        self._text.append(rest)
        if self._emit:
            self._emit(
                Chunk(
                    rest,
                    [],
                    index=self._index,
                    logprobs=() if self._wants_logprobs else None,
                    finish_reason=self.finish_reason,
                    timings=self.timings(),
                    stop_string=self._stops.found,
                )
            )

    def timings(self) -> Timings:
        return Timings(
            prompt_tokens=self.sequence.num_prompt,
            completion_tokens=len(self.sequence.completion),
            prefill_ms=1000 * (self._first - self._started),
            decode_ms=1000 * (self._last - self._first),
            queue_ms=1000 * max((self.sequence.started_at or self._first) - self._started, 0.0),
            cached_tokens=self.sequence.num_cached or 0,
        )

    def completion(self) -> Completion:
        sequence, reason = self.sequence, self.finish_reason
        assert reason is not None
        return Completion(
            text="".join(self._text),
            ids=sequence.completion,
            prompt_ids=sequence.ids[: sequence.num_prompt],
            finish_reason=reason,
            timings=self.timings(),
            logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
            index=sequence.choice,
            stop_string=self._stops.found,
        )


class Pass:
    """A generator that the engine's thread runs, one item between two steps. The caller waits for what it returns."""

    def __init__(self, parts: Generator[object, None, Any], waiter: ref[Any]) -> None:
        self.parts, self.waiter = parts, waiter
        self.has_begun = False


def deliver(work: Request | Pass, message: Any) -> bool:
    """Hand something to the caller that waits for it. False where nobody does."""
    waiter = work.waiter()
    if waiter is None:
        return False
    try:
        waiter.deliver(message)
    except RuntimeError:  # the event loop is closed
        return False
    return True
