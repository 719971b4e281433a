"""Child processes that may crash, hang or write without end: compilers, and what may end the process.

rocBLAS aborts where it has no kernels for the GPU, and a fatal error of LLVM ends the process that hipRTC runs in.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

_SECONDS = 120
_MAX_OUTPUT_BYTES = 1 << 20
_LOOK_MS = 50


class Ended(NamedTuple):
    """How a command ended."""

    how: str
    """How it ended, in a few words; "" if it ended well."""
    output: str
    """What it wrote to stdout and stderr."""


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command to its end, or end it: after so many seconds, or when it has written more than anybody reads.

    Raises OSError where it cannot be started.
    """
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        output = bytearray()
        fault = "interrupted"
        try:
            is_late = _read(process, output, time.monotonic() + seconds)
            fault = f"no end in {seconds:g} seconds" if is_late else ""
        except OverflowError as error:
            fault = str(error)
        finally:
            if fault:
                _end(process)
    return Ended(fault or _how(process.returncode), output.decode(errors="replace"))


def failure(command: Sequence[str]) -> str | None:
    """Run a command; None if it ends well, else in one line how it ended and the last line it wrote."""
    try:
        ended = run(command, _SECONDS)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    return ": ".join([ended.how, *lines[-1:]]) if ended.how else None


def _read(process: subprocess.Popen[bytes], output: bytearray, deadline: float) -> bool:
    """Collect what a process writes until it ends; whether it has not ended in time.

    What it has started may hold the pipe open for longer: nobody waits for that. Raises OverflowError for too much.
    """
    assert process.stdout
    pipe = process.stdout.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while time.monotonic() < deadline:
        has_ended = process.poll() is not None  # asked first: what it wrote before is in the pipe
        if not poll.poll(0 if has_ended else _LOOK_MS):
            if has_ended:
                return False
            continue
        if not (block := os.read(pipe, 1 << 16)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            break
        output += block
        if len(output) > _MAX_OUTPUT_BYTES:
            raise OverflowError(f"it wrote more than {_MAX_OUTPUT_BYTES >> 20} MiB")
    return process.poll() is None


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process and all that it has started. hipcc starts clang, and clang starts the linker."""
    import psutil

    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        children = []
    process.kill()
    for child in children:
        with suppress(psutil.Error):
            child.kill()


def _how(code: int) -> str:
    if code < 0:
        return signal.strsignal(-code) or f"signal {-code}"
    return f"exit code {code}" if code else ""
