"""Locks between processes: an flock on a file that holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forge.errors import DownloadError


@contextmanager
def held(path: Path, on_wait: Callable[[], None] | None = None, *, remove: bool = False) -> Iterator[None]:
    """Hold the lock at `path`. `on_wait` is called before waiting for another process; without it there is no waiting.

    `remove` deletes the file at the end. Raises BlockingIOError if another process holds the lock and there is no
    waiting, DownloadError if `path` is no regular file, OSError if it cannot be made.
    """
    handle = _acquire(path, on_wait)
    try:
        yield
    finally:
        if remove:
            path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, on_wait: Callable[[], None] | None) -> int:
    while True:
        handle = open_regular(path, "the lock ")
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the former holder has removed the file: others may hold a new one


def open_regular(path: Path, what: str = "") -> int:
    """A descriptor of a file to read and write, which is made if it is missing. `what` names it in the message.

    Raises DownloadError if it is no regular file.
    """
    # O_NONBLOCK: opening a pipe does not wait for its other end; O_NOFOLLOW: the target of a link is not forge's
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    refusal = DownloadError(f"{what}{path} is not a regular file: remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP):
            raise refusal from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refusal
    return handle
