"""One answer of a model, taken apart as it comes: reasoning, content, calls of tools."""

from __future__ import annotations

import re
from typing import Literal

from forge.server.parsing.calls import Reader, Tools
from forge.server.parsing.parser import Parser
from forge.server.parsing.source import SPACE, SPACES, Malformed, Reading
from forge.server.parsing.table import CallFormat, ReasoningFormat
from forge.server.parts import Part


class AnswerParser(Parser):
    """Tells the parts of one answer apart.

    A call counts as soon as its name and its arguments are whole; a mark behind it is left out. What begins like a call
    and is none, or has no end, is content. White space around calls, and at both ends of the reasoning, is left out.
    All else is kept. The parts, joined, do not depend on how the text is cut.
    """

    def __init__(
        self,
        calls: CallFormat | None,
        tools: Tools,
        reasoning: ReasoningFormat | None,
        answer: tuple[str, str] | None = None,
        *,
        begins_inside: bool = False,
        shows_reasoning: bool = False,
    ) -> None:
        """calls: None = calls are content. reasoning: None = there is none. answer: Marks around the content.

        begins_inside: The prompt ends with the mark that begins the reasoning. shows_reasoning: It is content, marks
        and all; but no calls are looked for in it.
        """
        super().__init__()
        self._calls, self._tools, self._reasoning, self._answer_marks = calls, tools, reasoning, answer
        self._begins_inside, self._shows_reasoning = begins_inside, shows_reasoning
        self._num_calls = 0
        self._gap: list[str] = []
        """White space that is content if content follows, and left out if a call does."""
        self._has_content = False
        self._is_edge = False
        """Whether the reasoning or a call has ended, and no content has come since."""
        self._run = self._answer()
        self._advance()

    def _answer(self) -> Reading[None]:
        if self._reasoning:
            yield from self._reason(self._reasoning)
        yield from self._content()
        if not self._is_edge:
            self._emit("content", "".join(self._gap))

    def _reason(self, marks: ReasoningFormat) -> Reading[None]:
        source = self._source
        if not self._begins_inside:
            space = yield from source.run(SPACE)
            if not (yield from source.skip(marks.start)):
                self._gap.append(space)
                return
            if self._shows_reasoning:
                self._say(space + marks.start)
        pattern, gap, has_text, mark = re.compile(re.escape(marks.end)), list[str](), False, None
        while True:
            text, mark = source.take_before(pattern, (marks.end,))
            if self._shows_reasoning:
                self._say(text + source.take(len(mark or "")))
            else:
                text = _trimmed(gap, text, at_start=not has_text, at_end=True)
                has_text = has_text or bool(text)
                self._emit("reasoning", text)
            if mark is not None or source.is_ended:
                break
            yield
        if not self._shows_reasoning:
            source.take(len(mark or ""))
            self._is_edge = True

    def _content(self) -> Reading[None]:
        calls, source = self._calls, self._source
        marks = calls.marks if calls else ()
        end = (yield from self._begin_answer(*self._answer_marks)) if self._answer_marks else None
        if end is not None:
            marks = (*marks, end)
        pattern = re.compile("|".join(map(re.escape, marks))) if marks else None
        if calls and calls.read_bare:
            yield from self._bare_calls(calls, calls.read_bare)
        while True:
            text, mark = source.take_before(pattern, marks)
            self._say(text)
            if mark is not None and mark == end:
                source.take(len(mark))
                self._gap, self._is_edge = [], True
            elif mark is not None and calls:
                if (yield from self._has_calls(calls, calls.read, mark)) and calls.read_bare:
                    yield from self._bare_calls(calls, calls.read_bare)
            elif source.is_ended:
                return
            else:
                yield

    def _begin_answer(self, start: str, end: str) -> Reading[str | None]:
        """The mark that will end the content, if a mark begins it. Both are left out, with the white space around."""
        space = yield from self._source.run(SPACE)
        if (yield from self._source.skip(start)):
            self._gap, self._is_edge = [], True
            return end
        self._say(space)
        return None

    def _bare_calls(self, calls: CallFormat, read: Reader) -> Reading[None]:
        """Calls without a mark, one behind the other."""
        separators = calls.separators if self._num_calls else ""
        while True:
            between = yield from self._source.run(re.compile(f"[{re.escape(SPACES + separators)}]*"))
            if (yield from self._source.choice(calls.bare or "")) is None:
                self._say(between)
                return
            if not (yield from self._has_calls(calls, read, None, between)):
                return
            separators = calls.separators

    def _has_calls(self, calls: CallFormat, read: Reader, mark: str | None, before: str = "") -> Reading[bool]:
        """Whether calls come. before: What stands between them and the calls before."""
        source = self._source
        source.begin_record()
        source.take(len(mark or ""))
        try:
            found = yield from read(source, self._tools, mark or "")
        except Malformed:
            self._say(before + source.end_record())
            return False
        source.end_record()
        for call in found:
            self._parts.append(Part("tool_call", call.arguments, self._num_calls, call.name))
            self._num_calls += 1
        self._gap, self._is_edge = [], True
        if calls.closers:
            space = yield from source.run(SPACE)
            closer = yield from source.choice(*calls.closers)
            self._say(space) if closer is None else source.take(len(closer))
        return True

    def _say(self, text: str) -> None:
        at_start = self._is_edge and not self._has_content
        text = _trimmed(self._gap, text, at_start=at_start, at_end=bool(self._calls or self._answer_marks))
        if text:
            self._emit("content", text)
            self._has_content, self._is_edge = True, False

    def _emit(self, kind: Literal["content", "reasoning"], text: str) -> None:
        if text:
            self._parts.append(Part(kind, text))


def _trimmed(gap: list[str], text: str, *, at_start: bool, at_end: bool) -> str:
    """The text behind the white space in `gap`. at_end: White space at its end is held back, in `gap`."""
    if (at_start or at_end) and not text.strip(SPACES):
        gap.append(text)
        return ""
    text = "".join(gap) + text
    gap.clear()
    if at_start:
        text = text.lstrip(SPACES)
    if at_end:
        kept = text.rstrip(SPACES)
        gap.append(text[len(kept) :])
        text = kept
    return text
