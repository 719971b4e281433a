"""The magics of the kernel laboratory. IPython is there: it has loaded this module."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from IPython.core.error import UsageError

from forge.errors import ForgeError
from forge.lab import replacing
from forge.lab.report import Report

_USAGE = "usage: %%hip KERNEL [--device DEVICE], such as %%hip rmsnorm, or %%hip norm.hip for the whole file"


def hip(line: str, cell: str) -> Report:
    """%%hip KERNEL [--device DEVICE]: replace a kernel, or a file of kernels, by the cell's text.

    It is compiled, verified and timed first. Where that fails, the kernel in use stays. `%hip_show KERNEL` puts the
    present text into the next cell, and `%hip_restore` goes back to forge's kernels.
    """
    words = shlex.split(line)
    device = "auto"
    if "--device" in words[:-1]:
        place = words.index("--device")
        device = words[place + 1]
        del words[place : place + 2]
    if len(words) != 1 or words[0].startswith("-"):
        raise UsageError(_USAGE)
    with _shortly():
        return replacing.replace(words[0], cell, device=device, first_line=2)  # the magic's own line is the first


def hip_show(line: str, shell: Any) -> None:
    """%hip_show KERNEL: put the present source of a kernel, or of a file of kernels, into the next cell, to edit it."""
    with _shortly():
        shell.set_next_input(f"%%hip {line.strip()}\n{replacing.source(line.strip())}")


def hip_restore(line: str) -> None:
    """%hip_restore [KERNEL ...]: forge's own kernels again, from the next launch on; without a name all of them."""
    with _shortly():
        chosen: list[str | None] = [*line.split()] or [None]
        names = [kernel for name in chosen for kernel in replacing.restore(name)]
    print(f"restored: {', '.join(names)}" if names else "nothing was replaced")


def register(shell: Any) -> None:
    """Give a shell the magics."""
    magics: list[tuple[Callable[..., Any], str, str]] = [(hip, "cell", "hip"), (hip_restore, "line", "hip_restore")]
    for function, kind, name in magics:
        shell.register_magic_function(function, kind, name)
    shell.register_magic_function(partial(hip_show, shell=shell), "line", "hip_show")


def forget(shell: Any) -> None:
    """Take them away."""
    for kind, name in (("cell", "hip"), ("line", "hip_restore"), ("line", "hip_show")):
        shell.magics_manager.magics[kind].pop(name, None)


@contextmanager
def _shortly() -> Iterator[None]:
    """Errors of forge show their message and the compiler's further complaints, not the traceback of a magic."""
    try:
        yield
    except ForgeError as error:
        lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
        error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]
        raise
