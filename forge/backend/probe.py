"""Child processes that may crash, hang or write without end: compilers, and what may end the process.

rocBLAS aborts where it has no kernels for the GPU, and a fatal error of LLVM ends the process that hipRTC runs in.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

_SECONDS = 120
_MAX_OUTPUT_BYTES = 1 << 20
_LOOK_S = 0.05


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
    with (
        open(os.memfd_create("output"), "w+b") as output,
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
    ):
        fault = "interrupted"
        try:
            fault = _fault(process, output.fileno(), seconds)
        finally:
            if fault:
                _end(process)
        output.seek(0)
        text = output.read(_MAX_OUTPUT_BYTES).decode(errors="replace")
    return Ended(fault or _how(process.returncode), text)


def failure(command: Sequence[str]) -> str | None:
    """Run a command; None if it ends well, else in one line how it ended and the last line it wrote."""
    try:
        ended = run(command, _SECONDS)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    return ": ".join([ended.how, *lines[-1:]]) if ended.how else None


def _fault(process: subprocess.Popen[bytes], output: int, seconds: float) -> str:
    """Wait for a process; why it must be ended, or "". What it has started may go on: nobody waits for that."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(min(deadline - time.monotonic(), _LOOK_S), 0))
        if os.fstat(output).st_size > _MAX_OUTPUT_BYTES:
            return f"it wrote more than {_MAX_OUTPUT_BYTES >> 20} MiB"
        if process.returncode is not None:
            return ""
        if time.monotonic() >= deadline:
            return f"no end in {seconds:g} seconds"


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
