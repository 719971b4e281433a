"""The text side of one choice of a request: ids become text, stop strings end it, times are taken."""

from __future__ import annotations

import time

from forge.engine import Sampled, Sequence, TokenLogprobs
from forge.outputs import Chunk, Completion, Timings
from forge.tokenizer import Tokenizer
from forge.tokenizer.stop import StopStrings


class Generation:
    """Collects what the engine samples for one sequence."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        self.chunks: list[Chunk] = []
        self.finished = False
        self._decoder = tokenizer.streamer(continues=True)
        self._stops = StopStrings(sequence.params.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._wants_logprobs = sequence.params.logprobs is not None
        self._stopped = False
        self._started = time.perf_counter()
        self._first = self._last = self._started

    def push(self, token: Sampled) -> bool:
        """Take a new id; True if its text completes a stop string."""
        self._last = time.perf_counter()
        if self._first == self._started:
            self._first = self._last
        sequence = self.sequence
        if sequence.finish_reason in ("stop", "error"):  # this id ended it and is not part of it
            return False
        text, self._stopped = self._stops.push(self._decoder.push(token.id))
        if self._stopped and sequence.finish_reason == "length":  # both at once: the text ends because of the string
            sequence.finish_reason = "stop"
        self._add(text, token.id, token.logprobs)
        return self._stopped

    def finish(self) -> None:
        """The sequence has ended: what was held back is let go, and the last chunk says why.

        Bytes of a character that was cut are no text, and are left out; the ids have them.
        """
        rest = "" if self._stopped else self._stops.flush()
        if rest:
            self._text.append(rest)
        self.chunks.append(
            Chunk(
                rest,
                [],
                index=self.sequence.choice,
                logprobs=() if self._wants_logprobs else None,
                finish_reason=self.sequence.finish_reason,
                timings=self.timings(),
            )
        )
        self.finished = True  # last: another thread that sees it must find the last chunk

    def take(self) -> list[Chunk]:
        """The chunks since the last call. Another thread may be adding one."""
        chunks = self.chunks[:]
        del self.chunks[: len(chunks)]
        return chunks

    def timings(self) -> Timings:
        return Timings(
            prompt_tokens=self.sequence.num_prompt,
            completion_tokens=len(self.sequence.completion),
            prefill_ms=1000 * (self._first - self._started),
            decode_ms=1000 * (self._last - self._first),
        )

    def completion(self) -> Completion:
        sequence = self.sequence
        assert sequence.finish_reason is not None
        return Completion(
            text="".join(self._text),
            ids=sequence.completion,
            prompt_ids=sequence.ids[: sequence.num_prompt],
            finish_reason=sequence.finish_reason,
            timings=self.timings(),
            logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
            index=sequence.choice,
        )

    def _add(self, text: str, token: int, logprobs: TokenLogprobs | None) -> None:
        self._text.append(text)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        found = (logprobs,) if logprobs is not None else ()
        self.chunks.append(
            Chunk(text, [token], index=self.sequence.choice, logprobs=found if self._wants_logprobs else None)
        )
