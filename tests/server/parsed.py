"""Parsers of answers, by the name of a format, and what they make of a text."""

from collections.abc import Iterable
from typing import Any

from forge.server.api.generation import joined
from forge.server.parsing import OutputFormat
from forge.server.parsing.table import CALL_FORMATS, REASONING_FORMATS
from forge.server.parts import OutputParser, Part

CALLS = {one.name: one for one in CALL_FORMATS if one.messages is None}
MESSAGES = {one.name: one for one in CALL_FORMATS if one.messages}
REASONING = {one.start: one for one in REASONING_FORMATS}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "hourly": {"type": "boolean"},
        "area": {"type": "object"},
        "note": {"type": ["string", "null"]},
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


def parser(
    calls: str | None = None,
    reasoning: str | None = None,
    *,
    tools: list[dict[str, Any]] = TOOLS,
    prompt_end: str = "",
    tells_reasoning: bool = True,
) -> OutputParser:
    """calls: Name of a format. reasoning: Its first mark."""
    form = OutputFormat((CALLS | MESSAGES)[calls] if calls else None, REASONING[reasoning] if reasoning else None)
    return form.parser(tools, prompt_end, tells_reasoning=tells_reasoning)


def parsed(parser: OutputParser, pieces: Iterable[str]) -> list[Part]:
    parts = [part for piece in pieces for part in parser.push(piece)]
    return joined([*parts, *parser.finish()])


def content(text: str) -> Part:
    return Part("content", text)


def reasoning(text: str) -> Part:
    return Part("reasoning", text)


def call(number: int, name: str, arguments: str) -> Part:
    return Part("tool_call", arguments, number, name)
