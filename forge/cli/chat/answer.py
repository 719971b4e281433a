"""One answer as it is shown and as it is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forge.server.parsing import OutputFormat
from forge.server.parts import OutputParser, Part, Plain

if TYPE_CHECKING:
    from forge.llm import LLM

_PROMPT_END = 32
"""Tokens at the end of a prompt in which the header of an opened message lies."""


class Answer:
    """An answer as it comes. Of messages with headers, as gpt-oss writes them, reasoning is shown between <think> tags.

    Other models' answers are shown and kept as they are, for their templates read them so.
    """

    def __init__(self, llm: LLM, prompt: list[int]) -> None:
        """prompt: Its ids, which may open a message."""
        form = OutputFormat.of(llm.chat_template.sources if llm.chat_template else "")
        self._parser: OutputParser = Plain()
        if form.calls and form.calls.messages:
            end = llm.tokenizer.decode(prompt[-_PROMPT_END:])
            self._parser = form.parser([], end, tells_reasoning=True)
        self._texts: dict[str, str] = {"reasoning": "", "content": ""}
        self._kind = "content"

    def push(self, text: str) -> str:
        """What new text adds to the screen."""
        return "".join(map(self._shown, self._parser.push(text)))

    def finish(self) -> str:
        """What is still to be shown at the end."""
        shown = "".join(map(self._shown, self._parser.finish()))
        return shown + ("\n</think>" if self._kind == "reasoning" else "")

    def message(self, before: str = "") -> dict[str, Any]:
        """The assistant's message. before: The content that the answer continues."""
        message = {"role": "assistant", "content": before + self._texts["content"]}
        return message | ({"reasoning_content": self._texts["reasoning"]} if self._texts["reasoning"] else {})

    def _shown(self, part: Part) -> str:
        self._texts[part.kind] += part.text
        tag = {"reasoning": "<think>\n", "content": "\n</think>\n\n"}[part.kind] if part.kind != self._kind else ""
        self._kind = part.kind
        return tag + part.text
