"""The history of typed texts: a private file with one JSON string per line."""

from __future__ import annotations

import json
import os

from forge import _files
from forge._files import cache_dir

_MAX_BYTES = 1 << 24
_MAX_ENTRIES = 1000
_LONGEST_ENTRY = 1 << 14
"""Most characters of an entry. Longer texts are usually pasted, and are not kept."""


class History:
    """The entries of a file. Raises ForgeError, OSError or ValueError if it cannot be used."""

    def __init__(self) -> None:
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
        os.close(self._open())

    def add(self, text: str) -> None:
        """Append an entry. A full disk is ignored."""
        if len(text) > _LONGEST_ENTRY:
            return
        try:
            file = self._open()
            try:
                os.write(file, _line(text))
            finally:
                os.close(file)
        except OSError:
            pass

    def _open(self) -> int:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(file, 0o600)
        except OSError:
            os.close(file)
            raise
        return file


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
