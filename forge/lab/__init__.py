"""The kernel laboratory: a kernel is replaced while the process runs, verified and timed before anything uses it.

In a notebook `%load_ext forge.lab` gives the magics `%%hip`, `%hip_show` and `%hip_restore`; the functions here are the
same in plain Python. docs/research.md explains them.
"""

from __future__ import annotations

from typing import Any

from forge.lab.replacing import replace as replace
from forge.lab.replacing import replaced as replaced
from forge.lab.replacing import restore as restore
from forge.lab.replacing import source as source
from forge.lab.report import Report as Report

__all__ = ["Report", "load_ipython_extension", "replace", "replaced", "restore", "source", "unload_ipython_extension"]


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext forge.lab` calls."""
    from forge.lab.magics import register

    register(shell)


def unload_ipython_extension(shell: Any) -> None:
    """What `%unload_ext forge.lab` calls: all kernels are forge's own again."""
    from forge.lab.magics import forget

    restore()
    forget(shell)
