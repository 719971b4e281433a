"""`--timings`: the parts of the time from the start of the process to the first token."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from forge.cli import output

if TYPE_CHECKING:
    from forge.llm import LLM

_STARTED = time.perf_counter()


def seconds_of_process() -> float:
    """Seconds since the process started; where the system does not say, since the command line was imported."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - _STARTED


def write(llm: LLM, prompt_ms: float | None) -> None:
    """Write a table to stderr: what loading took, part by part, and the prompt if there was one."""
    parts = dict(llm.load_parts) | ({} if prompt_ms is None else {"prompt": prompt_ms})
    rows, total = [], 0.0
    for name, ms in parts.items():
        total += ms
        rows.append((name, f"{ms:.0f}", f"{total:.0f}"))
    columns = ("part", "ms", "since the start")
    output.write_table("to the first token", columns, rows, right=columns[1:], to_stderr=True)
