"""Download one file of the Hub into a partial file, which the next attempt continues."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import IO

from forge.config import Progress
from forge.errors import DownloadError
from forge.hub import locks
from forge.hub._failures import Absent, Refused, Unreachable
from forge.hub.client import Hub, Remote

_MAGIC = b"GGUF"
_TRIES = 5
_STEP_BYTES = 1 << 20
"""Bytes between two reports of progress. A connection that brought as many before it broke gets all tries again."""


def download(hub: Hub, remote: Remote, partial: Path, stage: str, report: Progress) -> None:
    """Fetch a file into `partial`, continuing an earlier download, and check magic, length and SHA-256.

    Wrong bytes leave no file. A broken connection or an interrupt leaves the bytes so far for the next call.
    Raises DownloadError, OSError.
    """
    _require_space(partial, remote.size)
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
        if len(self.head) < len(_MAGIC):
            self.head += chunk[: len(_MAGIC) - len(self.head)]
            if not _MAGIC.startswith(self.head):
                page = is_html or self.head.startswith(b"<")
                raise DownloadError(
                    "the server sent an HTML page instead of a GGUF file: is it a login page or a proxy's?"
                    if page
                    else f"the server sent something that is no GGUF file: it begins with {self.head!r}"
                )

    def _check(self) -> None:
        if self.head != _MAGIC:
            raise DownloadError(f"what the server has is no GGUF file: it has {self.remote.size} bytes")
        if self.remote.sha256 and self.digest.hexdigest() != self.remote.sha256:
            raise DownloadError(
                f"SHA-256 of what came is {self.digest.hexdigest()}, announced was {self.remote.sha256}: run it again"
            )
        self.out.flush()
        os.fsync(self.out.fileno())

    def _tell(self) -> None:
        self.told = self.have
        self.report(self.stage, self.have, self.remote.size)


def _require_space(partial: Path, size: int) -> None:
    missing = size - (partial.lstat().st_size if partial.is_file() else 0)
    usage = shutil.disk_usage(partial.parent)
    if usage.total > 0 and usage.free < missing:  # some network file systems report no sizes at all
        raise DownloadError(
            f"{missing / 1e6:.0f} MB are missing, and {usage.free / 1e6:.0f} MB are free in {partial.parent}: "
            "free some space or set HF_HOME to another disk"
        )
