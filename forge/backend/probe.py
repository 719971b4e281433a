"""Trying in a child process what may end the process: rocBLAS aborts where it has no kernels for the GPU."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

_SECONDS = 120


def failure(command: Sequence[str]) -> str | None:
    """Run a command; None if it ends well, else in one line how it ended and the last thing it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {_SECONDS} seconds"
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if not done.returncode:
        return None
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"{how}: {said[-1]}" if said else how
