"""The parent's side of the process that renders chat templates: start it, ask it, kill it."""

import atexit
import os
import select
import subprocess
import sys
import threading
import time
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO

from forge.errors import ChatTemplateError

START_SECONDS = 30.0  # for a cold disk or a loaded machine; 0.06 s is usual
MAX_ERROR_BYTES = 4096


class _Ended(Exception):
    """The process closed its pipe."""


class _TimedOut(Exception):
    """The deadline passed."""


class RenderProcess:
    """One process for all templates: started when first needed, killed when it misbehaves and when Python exits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._registered = False

    def ask(self, request: bytes, seconds: float, max_bytes: int) -> tuple[bytes, str]:
        """The worker's (status, text), as told in `_chat_worker`; D for the deadline missed, X for a process that died.

        Starting the process does not count against `seconds`. Raises ChatTemplateError if it cannot be started.
        """
        with self._lock:
            if self._child is not None:
                try:
                    return self._exchange(self._child, request, seconds, max_bytes)
                except _Ended:  # perhaps killed from outside since the last rendering: a fresh one decides
                    pass
            child = self._start()
            try:
                return self._exchange(child, request, seconds, max_bytes)
            except _Ended:
                return b"X", f"the process that renders it ended (code {child.returncode})"

    def close(self) -> None:
        """End the process, if there is one. It keeps nothing worth saving."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            _close_pipes(child)

    def _exchange(
        self, child: "subprocess.Popen[bytes]", request: bytes, seconds: float, max_bytes: int
    ) -> tuple[bytes, str]:
        deadline = time.monotonic() + seconds
        try:
            _write(_fd(child.stdin), len(request).to_bytes(8, "big") + request, deadline)
            status, text = _read_reply(_fd(child.stdout), max_bytes + MAX_ERROR_BYTES, deadline)
        except _TimedOut:
            status, text = b"D", ""
        except BaseException:  # Ctrl-C too: an answer that nobody reads would be taken for the next one's
            self.close()
            raise
        if status in b"MOD":
            self.close()
        return status, text

    def _start(self) -> "subprocess.Popen[bytes]":
        if not self._registered:
            atexit.register(self.close)
            os.register_at_fork(after_in_child=self._forget)
            self._registered = True
        worker = Path(__file__).resolve().with_name("_chat_worker.py")
        packages = sorted({_package_folder(name) for name in ("jinja2", "markupsafe")})
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
        try:
            child = self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", worker, *packages],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=kept,
                start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
            )
        except OSError as error:
            raise ChatTemplateError(f"cannot start {sys.executable} for chat templates: {error.strerror}") from None
        try:
            for pipe in (child.stdin, child.stdout):
                os.set_blocking(_fd(pipe), False)
            _read_reply(_fd(child.stdout), MAX_ERROR_BYTES, time.monotonic() + START_SECONDS)
        except (_Ended, _TimedOut):
            self.close()
            raise ChatTemplateError(
                f"the process that renders chat templates does not start (code {child.returncode}); "
                f"try {sys.executable} -c 'import jinja2', and reinstall jinja2 if that fails"
            ) from None
        except BaseException:
            self.close()
            raise
        return child

    def _forget(self) -> None:
        """In a fork of this Python: the process is the parent's, and another thread may have held the lock."""
        self._lock = threading.Lock()
        child, self._child = self._child, None
        if child is not None:
            _close_pipes(child)
            child.returncode = 0  # else Popen would warn of a process that still runs


PROCESS = RenderProcess()


def _package_folder(package: str) -> str:
    """The folder on sys.path that holds the package; the working directory, where anything may lie, comes last."""
    folders = [folder for folder in sys.path if os.path.isabs(folder) and os.path.exists(folder)]
    folders.sort(key=lambda folder: os.path.samefile(folder, os.curdir))
    spec = PathFinder.find_spec(package, folders)
    if spec is None or spec.origin is None:
        raise ChatTemplateError(f"chat templates need the package {package}: pip install {package}")
    return str(Path(spec.origin).parent.parent)


def _fd(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()


def _close_pipes(child: "subprocess.Popen[bytes]") -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def _await(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise _TimedOut


def _write(fd: int, data: bytes, deadline: float) -> None:
    rest = memoryview(data)
    while rest:
        _await(fd, select.POLLOUT, deadline)
        try:
            rest = rest[os.write(fd, rest) :]
        except BrokenPipeError:
            raise _Ended from None


def _read(fd: int, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        _await(fd, select.POLLIN, deadline)
        chunk = os.read(fd, min(size - len(data), 1 << 20))
        if not chunk:
            raise _Ended
        data += chunk
    return bytes(data)


def _read_reply(fd: int, max_bytes: int, deadline: float) -> tuple[bytes, str]:
    header = _read(fd, 9, deadline)
    size = int.from_bytes(header[1:], "big")
    if size > max_bytes:  # no reply of the worker's: something else writes there
        raise _Ended
    return header[:1], _read(fd, size, deadline).decode(errors="replace")
