"""The processes that render chat templates, as their parent sees them: start, ask, kill."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

from forge.errors import ChatTemplateError

MAX_PROCESSES = 8
PATIENCE_SECONDS = 0.2  # seconds of most renderings: a longer wait is worth starting another process
START_SECONDS = 30.0  # for a cold disk or a loaded machine; 0.06 s is usual
MAX_ERROR_BYTES = 4096


class RenderPool:
    """Processes for all templates. One is kept; while it is busy others start, so no request waits for a slow template.

    A process starts when it is needed, and is killed when it misbehaves and when Python exits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: _Worker | None = None
        self._workers = set[_Worker]()
        self._registered = False

    def ask(self, request: bytes, seconds: float, max_bytes: int) -> tuple[bytes, str]:
        """The worker's (status, text), as `_chat_worker` defines them. D = missed the deadline, X = the process died.

        Waiting for a process and starting it do not count against `seconds`. Raises ChatTemplateError if no process can
        be started.
        """
        worker = self._take()
        try:
            if worker.is_running:
                with suppress(ConnectionError):  # perhaps killed from outside since the last rendering: try a fresh one
                    return worker.ask(request, seconds, max_bytes)
            worker.start()
            try:
                return worker.ask(request, seconds, max_bytes)
            except ConnectionError:
                return b"X", f"the process that renders it ended (code {worker.code})"
        finally:
            self._give_back(worker)

    def close(self) -> None:
        """End the processes."""
        with self._changed:
            workers, self._workers, self._idle = self._workers, set(), None
            self._changed.notify_all()
        for worker in workers:
            worker.close()

    def _take(self) -> "_Worker":
        """A free process, which is started if there is none."""
        until = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            if not self._registered:
                atexit.register(self.close)
                os.register_at_fork(after_in_child=self._forget)
                self._registered = True
            while self._idle is None and self._workers:
                left = until - time.monotonic()
                if left <= 0 and len(self._workers) < MAX_PROCESSES:
                    break
                self._changed.wait(max(left, 0.01))
            worker, self._idle = self._idle or _Worker(), None
            self._workers.add(worker)
            return worker

    def _give_back(self, worker: "_Worker") -> None:
        with self._changed:
            if worker in self._workers and self._idle is None and worker.is_running:
                self._idle = worker
                self._changed.notify()
                return
        worker.close()  # a process counts until it has ended
        with self._changed:
            self._workers.discard(worker)
            self._changed.notify()

    def _forget(self) -> None:
        """Forget the processes in a fork of this process: they belong to the parent, as does a held lock."""
        self._changed = threading.Condition()
        workers, self._workers, self._idle = self._workers, set(), None
        for worker in workers:
            worker.forget()


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        """This end of the process's stdin and stdout."""
        self.code: int | None = None
        """Exit code of the last process."""

    @property
    def is_running(self) -> bool:
        return self._child is not None

    def ask(self, request: bytes, seconds: float, max_bytes: int) -> tuple[bytes, str]:
        """Status and text. The process is closed if it must not be used again.

        Raises ConnectionError if it has ended.
        """
        assert self._socket is not None
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(len(request).to_bytes(8, "big") + request)
            status, text = _read_reply(self._socket, max_bytes + MAX_ERROR_BYTES, deadline)
        except TimeoutError:
            status, text = b"D", ""
        except BaseException:  # Ctrl-C too: an unread answer would be taken for the next request's
            self.close()
            raise
        if status in b"MOD":
            self.close()
        return status, text

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            self.code = child.wait()
        if self._socket is not None:
            self._socket.close()

    def forget(self) -> None:
        """Let go of a process that belongs to the parent."""
        child, self._child = self._child, None
        if child is not None:
            child.returncode = 0  # else Popen would warn of a running process
        if self._socket is not None:
            self._socket.close()

    def start(self) -> None:
        """Start the process. Raises ChatTemplateError with the reason as far as it is known."""
        worker = Path(__file__).resolve().with_name("_chat_worker.py")
        packages = sorted({_package_folder(name) for name in ("jinja2", "markupsafe")})
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
        try:
            self._socket, theirs = socket.socketpair()
            with theirs:
                self._child = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-X", "utf8", worker, *packages],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=kept,
                    start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
                )
            _read_reply(self._socket, MAX_ERROR_BYTES, time.monotonic() + START_SECONDS)
        except ConnectionError:
            assert self._child is not None
            with suppress(subprocess.TimeoutExpired):  # its pipe is closed, so it ends with its own exit code
                self._child.wait(1)
            self.close()
            raise ChatTemplateError(f"the process that renders chat templates {_end(self.code or 0)}") from None
        except TimeoutError:
            self.close()
            raise ChatTemplateError(
                f"the process that renders chat templates did not start in {START_SECONDS:.0f} s: is the machine busy?"
            ) from None
        except OSError as error:
            self.close()
            raise ChatTemplateError(f"cannot start {sys.executable} for chat templates: {error.strerror}") from None
        except BaseException:
            self.close()
            raise


PROCESSES = RenderPool()


def _end(code: int) -> str:
    """How a process ended before it was ready."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        reason = ": perhaps memory ran out" if code == -signal.SIGKILL else ""
        return f"was killed by {name} (code {code}) while it started{reason}; try again"
    return f"does not start (code {code}); try {sys.executable} -c 'import jinja2', and reinstall jinja2 if that fails"


def _package_folder(package: str) -> str:
    """The folder on sys.path that holds the package; the working directory, where anything may lie, comes last."""
    folders = [folder for folder in sys.path if os.path.isabs(folder) and os.path.exists(folder)]
    folders.sort(key=lambda folder: os.path.samefile(folder, os.curdir))
    spec = PathFinder.find_spec(package, folders)
    if spec is None or spec.origin is None:
        raise ChatTemplateError(f"chat templates need the package {package}: pip install {package}")
    return str(Path(spec.origin).parent.parent)


def _read(stream: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        stream.settimeout(max(deadline - time.monotonic(), 1e-6))  # 0 would mean not to wait at all
        chunk = stream.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise ConnectionResetError
        data += chunk
    return bytes(data)


def _read_reply(stream: socket.socket, max_bytes: int, deadline: float) -> tuple[bytes, str]:
    """Status and text. Raises TimeoutError after the deadline, ConnectionError if the process has closed its end."""
    header = _read(stream, 9, deadline)
    size = int.from_bytes(header[1:], "big")
    if size > max_bytes:  # not a reply of the worker: something else writes to the socket
        raise ConnectionResetError
    return header[:1], _read(stream, size, deadline).decode(errors="replace")
