"""What takes one answer of a model apart, as it comes."""

from __future__ import annotations

from forge.server.parsing.source import Reading, Source
from forge.server.parts import Part


class Parser:
    """A generator that reads a text from a source and leaves parts, driven by pieces of the text."""

    def __init__(self) -> None:
        self._source = Source()
        self._parts: list[Part] = []
        self._run: Reading[None]
        """Set by the class that reads."""

    def push(self, text: str) -> list[Part]:
        """The parts that new text completes. What may be the beginning of a mark, a header or a call is held back."""
        self._source.feed(text)
        return self._advance()

    def finish(self) -> list[Part]:
        """What was held back."""
        self._source.is_ended = True
        return self._advance()

    def _advance(self) -> list[Part]:
        next(self._run, None)
        parts, self._parts = self._parts, []
        return parts
