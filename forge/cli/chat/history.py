"""The history of typed texts: a private file with one JSON string per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from prompt_toolkit.history import History as PromptHistory

from forge import _files
from forge._files import cache_dir

_MAX_BYTES = 1 << 24
_MAX_ENTRIES = 1000
_LONGEST_ENTRY = 1 << 14
"""Most characters of an entry. Longer texts are usually pasted, and are not kept."""


class History(PromptHistory):
    """The entries of a file. Raises ForgeError, OSError or ValueError if it cannot be used."""

    def __init__(self) -> None:
        super().__init__()
        self._path = cache_dir() / "chat-history.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lines = _files.read(self._path, _MAX_BYTES).split(b"\n")
        except FileNotFoundError:
            lines = []
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        self.entries = entries[-_MAX_ENTRIES:]
        """Oldest first."""
        if len(entries) > 2 * _MAX_ENTRIES:
            _files.replace(self._path, b"".join(map(_line, self.entries)), mode=0o600)
        with self._opened():
            pass

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self.entries)

    def store_string(self, string: str) -> None:
        """Append an entry. A full disk is ignored."""
        if len(string) <= _LONGEST_ENTRY:
            with suppress(OSError), self._opened() as file:
                file.write(_line(string))

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NONBLOCK, 0o600)

        with open(self._path, "ab", buffering=0, opener=private) as file:  # a line is one write
            os.fchmod(file.fileno(), 0o600)
            yield file


def _line(text: str) -> bytes:
    return json.dumps(text).encode() + b"\n"


def _entry(line: bytes) -> str | None:
    """The text of a line. None if it is no JSON string, or not Unicode."""
    try:
        text = json.loads(line)
        text.encode()
    except (ValueError, RecursionError, AttributeError):
        return None
    return text if len(text) <= _LONGEST_ENTRY else None
