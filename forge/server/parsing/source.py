"""Text that arrives in pieces, read by generators that wait for more of it."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Yields where more text is needed, and returns what was read. At the end of the text it yields no more."""

SPACES = " \t\r\n"
SPACE = re.compile(r"[ \t\r\n]*")


class Malformed(Exception):
    """The text does not have the form that is read. What was taken of it stays taken."""


class Source:
    """What is not read yet, and a position in it.

    All readers take what they have read as far as they know it, and keep a few characters at most while they wait. So
    the time to read a text is linear in its length, however it is cut, and what is read does not depend on the cuts.
    """

    def __init__(self) -> None:
        self.is_ended = False
        self._text = ""
        self._at = 0
        self._record: list[str] | None = None

    def feed(self, text: str) -> None:
        """More text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def is_done(self) -> bool:
        """Whether all text is read, and none comes."""
        return self.is_ended and self._at == len(self._text)

    def begin_record(self) -> None:
        """From here on, what is taken is kept."""
        self._record = []

    def end_record(self) -> str:
        """What was taken since `begin_record`."""
        pieces, self._record = self._record or (), None
        return "".join(pieces)

    def take(self, count: int) -> str:
        """The next characters, which must be there."""
        piece = self._text[self._at : self._at + count]
        self._at += count
        if self._record is not None:
            self._record.append(piece)
        return piece

    def take_before(self, marks: re.Pattern[str] | None, names: tuple[str, ...]) -> tuple[str, str | None]:
        """The text before the first mark, and that mark, which stays unread. Without one: what can be no part of one.

        marks: Matches the names. It does not wait.
        """
        if marks is not None and (found := marks.search(self._text, self._at)):
            return self.take(found.start() - self._at), found.group()
        end = len(self._text)
        if not self.is_ended:
            longest = max(map(len, names), default=1) - 1
            places = range(max(end - longest, self._at), end)
            end = next((i for i in places if any(name.startswith(self._text[i:]) for name in names)), end)
        return self.take(end - self._at), None

    def ahead(self, count: int) -> Reading[str]:
        """The next characters, which stay unread; fewer at the end."""
        while len(self._text) - self._at < count and not self.is_ended:
            yield
        return self._text[self._at : self._at + count]

    def run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """All characters that belong to a class. pattern: The class with a star."""
        pieces = []
        while True:
            found = pattern.match(self._text, self._at)
            assert found
            pieces.append(self.take(found.end() - self._at))
            if self._at < len(self._text) or self.is_ended:
                return "".join(pieces)
            yield

    def choice(self, *marks: str) -> Reading[str | None]:
        """The longest of the marks that comes next, which stays unread, or None."""
        longest = max(map(len, marks))
        while True:
            text = self._text[self._at : self._at + longest]
            if self.is_ended or not any(mark.startswith(text) and mark != text for mark in marks):
                return max((mark for mark in marks if text.startswith(mark)), key=len, default=None)
            yield

    def skip(self, mark: str) -> Reading[bool]:
        """Take a mark if it comes next."""
        if (yield from self.choice(mark)) is None:
            return False
        self.take(len(mark))
        return True

    def expect(self, mark: str) -> Reading[None]:
        """Take a mark. Raises Malformed where another text comes, of which nothing is taken."""
        if not (yield from self.skip(mark)):
            raise Malformed

    def until(self, mark: str) -> Reading[str]:
        """The text before a mark, which is taken, too. Raises Malformed where none comes."""
        pieces = []
        while (place := self._text.find(mark, self._at)) < 0:
            if self.is_ended:
                self.take(len(self._text) - self._at)
                raise Malformed
            pieces.append(self.take(max(len(self._text) - len(mark) + 1 - self._at, 0)))
            yield
        pieces.append(self.take(place - self._at))
        self.take(len(mark))
        return "".join(pieces)
