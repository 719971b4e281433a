"""What a model's answers look like: calls of tools and reasoning, in the format of its chat template."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forge.server.parsing.answer import AnswerParser
from forge.server.parsing.messages import MessageParser
from forge.server.parsing.table import CallFormat, ReasoningFormat, answer_marks, call_format, reasoning_format
from forge.server.parts import OutputParser, Plain

__all__ = ["OutputFormat", "call_format", "reasoning_format"]
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class OutputFormat:
    """How the answers of a model are to be read.

    Attributes:
        calls: Of calls of tools; None = no format that the table has.
        reasoning: Of reasoning; None = the model has none.
        answer: Marks at the beginning and at the end of the content; None = the model writes none.
    """

    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None
    answer: tuple[str, str] | None = None

    @classmethod
    def of(cls, template: str) -> OutputFormat:
        """template: The source of the model's chat template."""
        return cls(call_format(template), reasoning_format(template), answer_marks(template))

    def parser(self, tools: Sequence[dict[str, Any]], prompt_end: str, *, tells_reasoning: bool) -> OutputParser:
        """A parser for one answer.

        Args:
            tools: The tools that the model was shown, as in OpenAI's API.
            prompt_end: The end of the prompt as text, which may open the reasoning.
            tells_reasoning: Whether reasoning is told apart. False = it is content.
        """
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        if self.calls and self.calls.messages:
            return MessageParser(
                self.calls, self.calls.messages, schemas, prompt_end, shows_reasoning=not tells_reasoning
            )
        calls = self.calls if tools else None
        if calls is None and self.answer is None and (self.reasoning is None or not tells_reasoning):
            return Plain()
        is_open = self.reasoning is not None and prompt_end.rstrip().endswith(self.reasoning.start)
        return AnswerParser(
            calls,
            schemas,
            self.reasoning,
            self.answer,
            begins_inside=is_open,
            shows_reasoning=not tells_reasoning,
        )

    def new_call_id(self) -> str:
        """An id for a call, of a form that the model's template accepts when the call comes back."""
        if self.calls is None or self.calls.id_length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(self.calls.id_length))
