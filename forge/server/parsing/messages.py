"""Answers that are a series of messages with headers: OpenAI's harmony format, and Muse Glimmer's."""

from __future__ import annotations

import re
from typing import Literal

from forge.server.parsing.calls import Tools
from forge.server.parsing.parser import Parser
from forge.server.parsing.source import SPACE, Malformed, Reading
from forge.server.parsing.table import CallFormat, MessageFormat
from forge.server.parts import Part

START, MESSAGE = "<|start|>", "<|message|>"
_HEADER_BEGINS = (START, MESSAGE, "<|channel|>", "<|constrain|>", "assistant", "to=")
_MAX_HEADER = 512
"""Characters. A longer one is content, and so is all that follows: the model has left the format."""


class MessageParser(Parser):
    """Tells the parts of one answer apart. A message's header says whether it is reasoning, content, or a call.

    A call counts as soon as its arguments are whole. What begins like a call and is none, or has no end, is content,
    and so is text without a header. Headers and marks are left out. An empty line is put between two messages of
    content, and between two of reasoning. The parts, joined, do not depend on how the text is cut.
    """

    def __init__(
        self, form: CallFormat, messages: MessageFormat, tools: Tools, prompt_end: str, *, shows_reasoning: bool = False
    ) -> None:
        """tools: Empty = calls are content. prompt_end: It may open the first message.

        shows_reasoning: It is content, with its header and the mark at its end.
        """
        super().__init__()
        self._form, self._messages, self._tools, self._shows_reasoning = form, messages, tools, shows_reasoning
        self._ends = (*messages.ends, START)
        self._end = re.compile("|".join(map(re.escape, self._ends)))
        self._header_ends = (MESSAGE, *messages.ends)
        self._header_end = re.compile("|".join(map(re.escape, self._header_ends)))
        self._num_calls = self._num_messages = 0
        self._begins_message = self._is_lost = False
        self._written = set[str]()
        self._run = self._answer(_open_header(prompt_end))

    def _answer(self, header: str | None) -> Reading[None]:
        while not self._source.is_done:
            if header is None:
                header = yield from self._header()
            yield from self._message(header)
            header = None

    def _header(self) -> Reading[str]:
        """The header of the next message, with <|message|>. Empty where other text comes."""
        source = self._source
        source.begin_record()
        yield from source.run(SPACE)
        text, mark = "", None
        begin = yield from source.choice(*_HEADER_BEGINS)
        while begin is not None:
            piece, mark = source.take_before(self._header_end, self._header_ends)
            text += piece
            if mark is not None or source.is_ended or len(text) > _MAX_HEADER:
                break
            yield
        is_header = begin is not None and len(text) <= _MAX_HEADER
        self._is_lost = len(text) > _MAX_HEADER
        if is_header and mark == MESSAGE:
            source.take(len(MESSAGE))
            return source.end_record()
        found = source.end_record()
        if (found.strip() or not self._num_messages) and not (is_header and found.lstrip().startswith("<|")):
            self._begins_message = True
            self._emit("content", found)
        return ""  # marks of a header that does not end say nothing

    def _message(self, header: str) -> Reading[None]:
        """Read a message behind its header, and the mark at its end."""
        source = self._source
        self._begins_message = bool(header)
        self._num_messages += 1
        called = self._messages.call.search(header)
        if called and self._tools:
            yield from self._calls(called[1])
        is_reasoning = not called and self._messages.reasoning.search(header) is not None
        is_shown = is_reasoning and self._shows_reasoning
        kind: Literal["content", "reasoning"] = "reasoning" if is_reasoning and not is_shown else "content"
        if is_shown:
            self._emit(kind, header)
        while True:
            text, mark = source.take_before(None if self._is_lost else self._end, self._ends)
            self._emit(kind, text)
            if mark is not None:
                end = source.take(len(mark)) if mark != START else ""
                self._emit(kind, end if is_shown else "")
                return
            if source.is_ended:
                return
            yield

    def _calls(self, name: str) -> Reading[None]:
        """Read calls, and what closes them. What begins another thing is content."""
        source, form = self._source, self._form
        while True:
            source.begin_record()
            try:
                found = yield from form.read(source, self._tools, name)
            except Malformed:
                self._emit("content", source.end_record())
                return
            source.end_record()
            for call in found:
                self._parts.append(Part("tool_call", call.arguments, self._num_calls, call.name))
                self._num_calls += 1
            yield from source.run(SPACE)
            if not form.marks or (following := (yield from source.choice(*form.marks, *form.closers))) is None:
                return
            if following in form.closers:
                source.take(len(following))
                return

    def _emit(self, kind: Literal["content", "reasoning"], text: str) -> None:
        if text:
            separator = "\n\n" if self._begins_message and kind in self._written else ""
            self._parts.append(Part(kind, separator + text))
            self._written.add(kind)
            self._begins_message = False


def _open_header(prompt_end: str) -> str | None:
    """The header of a message that the end of a prompt leaves open, or None."""
    start = prompt_end.rfind(START)
    message = prompt_end.find(MESSAGE, max(start, 0))
    return prompt_end[max(start, 0) : message + len(MESSAGE)] if message >= 0 else None
