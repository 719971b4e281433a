"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Pass text up to the first stop string. An end that may be the beginning of a stop string is held back.

    The first stop string is the one that is complete first; the longest of several that end at the same character. So
    the result does not depend on how the text is cut into pieces, and generation ends at a complete stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that was complete."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string is complete. No push may follow one."""
        if not self._stops:
            return text, False
        text = self._held + text
        self._held = ""
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.found = min(found)
            return text[:start], True
        longest = max(len(stop) for stop in self._stops) - 1
        for start in range(max(len(text) - longest, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                self._held = text[start:]
                return text[:start], False
        return text, False

    def flush(self) -> str:
        """The text that was held back, at the end of all text."""
        held, self._held = self._held, ""
        return held
