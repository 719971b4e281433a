"""What the text of a model's answer consists of: content, reasoning, calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer.

    Attributes:
        kind: "content", "reasoning", or "tool_call".
        text: New text; of a tool call its arguments, a JSON object. A call is one part.
        call: Number of the tool call within the answer, from 0.
        name: Name of the tool of a tool call. Else None.
    """

    kind: Literal["content", "reasoning", "tool_call"]
    text: str
    call: int = 0
    name: str | None = None


class OutputParser(Protocol):
    """Tells the parts of one answer apart. Nothing that a model writes is an error: what has no form is content."""

    def push(self, text: str) -> list[Part]:
        """The parts that new text completes. Text that may be the beginning of a mark is held back."""

    def finish(self) -> list[Part]:
        """What was held back."""


class Plain:
    """All text is content."""

    def push(self, text: str) -> list[Part]:
        return [Part("content", text)] if text else []

    def finish(self) -> list[Part]:
        return []
