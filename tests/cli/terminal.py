"""A program as a person at a terminal sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time


class Terminal:
    """A program behind a pseudo-terminal of some size; `forge` with arguments, if it is not named."""

    def __init__(
        self,
        *args: str,
        program: tuple[str, ...] = (sys.executable, "-m", "forge"),
        size: tuple[int, int] = (24, 80),
        **environment: str,
    ) -> None:
        self.seen = b""
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.execve(program[0], [*program, *args], os.environ | environment)
        self.resize(*size)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, pattern: bytes, seconds: float = 120.0) -> bytes:
        """Reads until the pattern is on the screen, and returns what was up to it and is forgotten."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.screen], [], [], max(deadline - time.monotonic(), 0))
            assert ready, (pattern, self.seen)
            self.seen += os.read(self.screen, 4096)
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def is_raw(self) -> bool:
        """Whether the program reads single keys, instead of the terminal whole lines."""
        return not termios.tcgetattr(self.screen)[3] & termios.ICANON

    def prompted(self) -> None:
        """Waits until the program reads keys: what is typed before is the terminal's."""
        self.wait_for(rb"> ")
        deadline = time.monotonic() + 60
        while not self.is_raw():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def exit_code(self, keys: bytes = b"", seconds: float = 60.0) -> int:
        """Press the keys until the program has ended: between a prompt and the wait for a key, Ctrl-C is seen late."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, self.seen
            with contextlib.suppress(OSError):  # the other side is closed
                self.type(keys)
                if select.select([self.screen], [], [], 0.5)[0]:
                    self.seen += os.read(self.screen, 4096)
        self.pid = 0
        return os.waitstatus_to_exitcode(ended[1])

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.screen)
