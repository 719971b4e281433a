"""Download one file of the Hub into a partial file, which the next attempt continues."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from forge.config import Progress
from forge.errors import DownloadError
from forge.hub import locks
from forge.hub._failures import Absent, Refused, Unreachable
from forge.hub.client import Hub, Remote

_TRIES = 5
_STEP_BYTES = 1 << 20
"""Bytes between two reports of progress. A connection that brought as many before it broke gets all tries again."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How files of a name's end begin. `may_begin` takes the first bytes there are, at most `_HEAD_BYTES`."""

    article: str
    name: str
    may_begin: Callable[[bytes], bool]
    least_bytes: int


_HEAD_BYTES = 9
_KINDS = {
    ".gguf": _Kind("a", "GGUF file", lambda head: b"GGUF".startswith(head[:4]), 4),
    ".safetensors": _Kind("a", "safetensors file", lambda head: head[8:9] in (b"", b"{"), 10),
    ".json": _Kind("a", "JSON file", lambda head: head.lstrip()[:1] in (b"", b"{"), 2),
}
_ANY = _Kind("this", "file", lambda head: not head.startswith((b"<!DOCTYPE", b"<html")), 1)


def download(hub: Hub, remote: Remote, partial: Path, stage: str, report: Progress) -> None:
    """Fetch a file into `partial`, continuing an earlier download, and check its start, length and SHA-256.

    The end of the name in the remote's address says how it should begin.

    Wrong bytes leave no file. A broken connection or an interrupt leaves the bytes so far for the next call.
    Raises DownloadError, OSError.
    """
    require_space(partial.parent, remote.size - (partial.lstat().st_size if partial.is_file() else 0))
    try:
        with open(locks.open_regular(partial), "r+b") as out:
            _Transfer(remote, out, stage, report).run(hub)
    except (Unreachable, Refused, Absent):
        if not partial.stat().st_size:
            partial.unlink()
        raise
    except DownloadError:
        partial.unlink(missing_ok=True)
        raise


class _Transfer:
    """The state of one download. All bytes on the disk were hashed, in order."""

    def __init__(self, remote: Remote, out: IO[bytes], stage: str, report: Progress) -> None:
        self.remote, self.out, self.stage, self.report = remote, out, stage, report
        self.kind = _KINDS.get(os.path.splitext(remote.url)[1].lower(), _ANY)
        self._restart()

    def run(self, hub: Hub) -> None:
        self._take_up()
        tries, behind = _TRIES, self.have
        while self.have < self.remote.size:
            try:
                self._go_on(hub)
            except Unreachable:
                tries = _TRIES if self.have >= behind + _STEP_BYTES else tries - 1
                behind = max(behind, self.have)
                if not tries:
                    raise
                time.sleep(1)
        self._check()

    def _restart(self) -> None:
        self.have = self.told = 0
        self.head = b""
        self.digest = hashlib.sha256()

    def _take_up(self) -> None:
        """Hash the bytes that an earlier download left."""
        if os.fstat(self.out.fileno()).st_size > self.remote.size:
            self.out.truncate(0)
        while chunk := self.out.read(_STEP_BYTES):
            self._take(chunk)
        self._tell()

    def _go_on(self, hub: Hub) -> None:
        with hub.stream(self.remote, self.have) as answer:
            if answer.start != self.have:
                self.out.seek(0)
                self.out.truncate(0)
                self._restart()
            for chunk in answer.chunks:
                self._take(chunk, answer.is_html)
                self.out.write(chunk)
                if self.have >= self.told + _STEP_BYTES or self.have == self.remote.size:
                    self._tell()
        if self.have < answer.stop:
            raise DownloadError(f"the server announced {self.remote.size} bytes and sent {self.have}")

    def _take(self, chunk: bytes, is_html: bool = False) -> None:
        """Check, hash and append bytes."""
        self.have += len(chunk)
        if self.have > self.remote.size:
            raise DownloadError(f"the server announced {self.remote.size} bytes and sent more")
        self.digest.update(chunk)
        if len(self.head) < _HEAD_BYTES:
            self.head += chunk[: _HEAD_BYTES - len(self.head)]
            if (is_html and self.kind is _ANY) or not self.kind.may_begin(self.head):
                page = is_html or self.head.startswith(b"<")
                raise DownloadError(
                    f"the server sent an HTML page instead of {self.kind.article} {self.kind.name}: "
                    "is it a login page or a proxy's?"
                    if page
                    else f"the server sent something that is no {self.kind.name}: it begins with {self.head!r}"
                )

    def _check(self) -> None:
        if self.have < self.kind.least_bytes:
            raise DownloadError(f"what the server has is no {self.kind.name}: it has {self.remote.size} bytes")
        if self.remote.sha256 and self.digest.hexdigest() != self.remote.sha256:
            raise DownloadError(
                f"SHA-256 of what came is {self.digest.hexdigest()}, announced was {self.remote.sha256}: run it again"
            )
        self.out.flush()
        os.fsync(self.out.fileno())

    def _tell(self) -> None:
        self.told = self.have
        self.report(self.stage, self.have, self.remote.size)


def require_space(folder: Path, missing_bytes: int) -> None:
    """Raises DownloadError if the disk of a folder has no room for so many bytes."""
    usage = shutil.disk_usage(folder)
    if usage.total > 0 and usage.free < missing_bytes:  # some network file systems report no sizes at all
        raise DownloadError(
            f"{missing_bytes / 1e6:.0f} MB are missing, and {usage.free / 1e6:.0f} MB are free in {folder}: "
            "free some space or set HF_HOME to another disk"
        )
