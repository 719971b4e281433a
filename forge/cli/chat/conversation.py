"""A conversation: its messages, those that fit the context, and the answers."""

from __future__ import annotations

import sys
from bisect import bisect_left
from contextlib import closing
from typing import TYPE_CHECKING, Any

from forge.cli import options, output
from forge.cli.chat.answer import Answer
from forge.cli.generate import answer_json, cut, show_logprobs, statistics
from forge.errors import ContextLengthError

if TYPE_CHECKING:
    from forge.config import SamplingParams
    from forge.llm import LLM
    from forge.outputs import Timings

Message = dict[str, Any]
_NEARLY_FULL = 0.8
_ROOM = 4  # 1 / _ROOM of the context is kept free for an answer, if turns can be dropped


class Conversation:
    """The messages so far and the settings of the next answer. All messages are kept; the model sees those that fit."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        opening: str,
        variables: dict[str, Any],
        *,
        drops: bool,
        is_interactive: bool = False,
    ) -> None:
        self.llm, self.params, self.system, self.opening, self.variables = llm, params, system, opening, variables
        self.drops, self.is_interactive = drops, is_interactive
        self.messages: list[Message] = []
        self.hidden = 0
        """Number of messages at the start that the model no longer sees."""
        self.timings: Timings | None = None
        """Timings of the last answer that was not interrupted."""
        self.used = 0
        """Number of tokens that the model has read and written."""
        self._warned = False

    def reset(self, messages: list[Message] | None = None) -> None:
        """Forget or replace the messages. Raises ForgeError, changing nothing, if the template refuses."""
        self.used = len(self._encode(messages, False)) if messages else 0
        self.messages, self.hidden, self.timings, self._warned = messages or [], 0, None, False

    def render_once(self) -> None:
        """Raises ForgeError if the model has no chat template, or one that fails."""
        self._encode([{"role": "user", "content": "Hi"}], False)

    def ask(self, text: str) -> None:
        """Stream the answer to a message."""
        self._answer([*self.messages, {"role": "user", "content": text}])

    def answer_json(self, text: str) -> dict[str, Any]:
        """The answer to a message as an object."""
        return answer_json(self.llm, self._fit(*self._opened([{"role": "user", "content": text}])), self.params)

    def regenerate(self) -> bool:
        """Answer the last question again. False if there is none."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            return False
        self._answer(self.messages[: last + 1])
        return True

    def go_on(self) -> bool:
        """Continue the last answer. False if there is none."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str) or not last["content"]:
            return False
        self._stream(self.messages, True)
        return True

    def _opened(self, asked: list[Message]) -> tuple[list[Message], bool]:
        """The messages with the prescribed beginning of the answer, and whether there is one."""
        return ([*asked, {"role": "assistant", "content": self.opening}], True) if self.opening else (asked, False)

    def _answer(self, asked: list[Message]) -> None:
        messages, continues = self._opened(asked)
        self._stream(messages, continues, show=self.opening)

    def _stream(self, messages: list[Message], continues: bool, show: str = "") -> None:
        """Stream an answer to the last message, or its continuation. Ctrl-C ends it, and its text so far is kept."""
        ids = self._fit(messages, continues)
        used = len(ids)
        answer = Answer(self.llm, ids)
        logprobs: list[Any] = []
        timings = reason = None
        interrupted = False
        try:
            with closing(self.llm.stream(ids, self.params, adapter=options.chosen_adapter(self.llm))) as chunks:
                output.write(show)
                for chunk in chunks:
                    used += len(chunk.ids)
                    output.write(answer.push(chunk.text))
                    logprobs += chunk.logprobs or ()
                    timings, reason = chunk.timings, chunk.finish_reason
        except KeyboardInterrupt:
            if not self.is_interactive:
                if output.is_terminal(sys.stdout):
                    output.write("\n")
                raise
            interrupted = True
        output.write(answer.finish() + "\n")
        options.check_finish(reason, self.llm)
        message = answer.message(messages[-1]["content"] if continues else "")
        if message["content"] or "reasoning_content" in message or not interrupted:
            self.used = used
            self.messages = [*(messages[:-1] if continues else messages), message]
        else:
            output.reply("stopped before a word: the message does not count")
        show_logprobs(self.llm, logprobs)
        if timings:
            self.timings = timings
            self._remark(timings, reason)

    def _remark(self, timings: Timings, reason: str | None) -> None:
        is_full = self.used >= self.llm.context
        if reason == "length":
            turns = sum(message["role"] == "user" for message in self.messages[self.hidden :])
            goes_on = self.is_interactive and (not is_full or (self.drops and turns > 1))
            output.note(cut(timings, self.params, self.llm) + ("; /continue goes on" if goes_on else ""))
        if self.is_interactive and not (self._warned or is_full) and self.used >= _NEARLY_FULL * self.llm.context:
            self._warned = True
            then = "the oldest turns are dropped" if self.drops else "messages are refused"
            output.note(
                f"{self.used} of the context's {self.llm.context} tokens are used; when it is full, {then} (/reset "
                "begins anew)"
            )
        output.status(statistics(timings, None if self.is_interactive else self.llm.load_ms))

    def _fit(self, messages: list[Message], continues: bool) -> list[int]:
        """Ids of the latest messages that fit. Raises ContextLengthError if the last question alone does not."""
        room = self.llm.context // _ROOM
        if self.params.max_tokens is not None:
            room = min(room, self.params.max_tokens)
        most = self.llm.context - max(room, 1)
        ids = self._encode(messages[self.hidden :], continues)
        starts = [i for i, message in enumerate(messages) if message["role"] == "user" and i > self.hidden]
        if len(ids) > most and self.drops and starts:
            place = bisect_left(starts, -most, key=lambda start: -len(self._encode(messages[start:], continues)))
            start = starts[min(place, len(starts) - 1)]
            turns = sum(message["role"] == "user" for message in messages[:start])
            ids = self._encode(messages[start:], continues)
            if len(ids) < self.llm.context:
                self.hidden, self._warned = start, True
                output.note(
                    f"the conversation has outgrown the context of {self.llm.context} tokens: the model no longer sees "
                    f"its oldest {'turn' if turns == 1 else f'{turns} turns'}"
                )
        if len(ids) >= self.llm.context:
            what, way = "the message takes", "shorten it, or use a larger --context"
            if continues and not self.opening:
                what, way = "the answer and its question take", "use a larger --context"
            elif starts and not self.drops:
                what, way = "the conversation takes", "/reset begins anew; or use a larger --context"
            raise ContextLengthError(f"{what} {len(ids)} tokens, the context holds {self.llm.context}: {way}")
        return ids

    def _encode(self, messages: list[Message], continues: bool) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return self.llm.encode_chat(
            [*head, *messages],
            template_variables=self.variables,
            continue_final_message=continues,
            parse_special=False,  # a user's text is text, even if it spells the end of a turn
        )
