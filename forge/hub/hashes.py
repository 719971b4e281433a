"""SHA-256 of files. A file is read once after each change, and its hash is kept in the cache directory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from forge import _files
from forge._files import cache_dir
from forge.errors import DownloadError

_BLOCK_BYTES = 1 << 22
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NOTED = 1000
_MAX_NOTE_BYTES = 1 << 20
_SETTLED_NS = 20_000_000
"""A file that changed within this time may change again with the same time of change: the kernel's clock has ticks."""

_unkept: dict[str, list[Any]] = {}
"""Hashes that cannot be kept in the cache directory, which may be read-only. They last as long as the process."""


def sha256(path: Path, report: Callable[[int, int], None], *, afresh: bool = False) -> str:
    """A file's SHA-256 in hexadecimal. The file is read if its size, times or inode differ from the noted ones.

    Reading 98 MB takes 0.1 s. `afresh` reads in any case. `report` is called with bytes done and in all. Raises OSError
    for a file that cannot be read, ValueError for one that is not regular.
    """
    with _files.opened(path) as file:
        before = os.fstat(file.fileno())
        key = os.path.realpath(path)
        for noted in () if afresh else (_notes().get(key), _unkept.get(key)):
            if noted and noted[:-1] == _state(before):
                return str(noted[-1])
        digest, done = hashlib.sha256(), 0
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            report(done, before.st_size)
        settled = time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _SETTLED_NS
        if settled and _state(os.fstat(file.fileno())) == _state(before):
            _note(path, before, digest.hexdigest())
        return digest.hexdigest()


def remember(path: Path, digest: str) -> None:
    """Note the SHA-256 of a file that was hashed during its download."""
    with suppress(OSError):
        _note(path, os.stat(path), digest)


def _store() -> Path:
    return cache_dir() / "sha256.json"


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _notes() -> dict[str, list[Any]]:
    """The kept table: a path to the file's size, times, inode and SHA-256. A malformed table counts as empty."""
    try:
        found = json.loads(_files.read(_store(), _MAX_NOTE_BYTES))
    except (OSError, ValueError, RecursionError, DownloadError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        key: noted
        for key, noted in found.items()
        if isinstance(noted, list) and noted and _SHA256.fullmatch(str(noted[-1]))
    }


def _note(path: Path, status: os.stat_result, digest: str) -> None:
    """Append an entry, and drop the oldest ones if there are many."""
    key, noted = os.path.realpath(path), [*_state(status), digest]
    others = [item for item in _notes().items() if item[0] != key][1 - _MAX_NOTED :]
    try:
        _store().parent.mkdir(parents=True, exist_ok=True)
        _files.replace(_store(), json.dumps(dict([*others, (key, noted)])).encode())
    except (OSError, DownloadError):
        _unkept[key] = noted
