"""The C library's heap, in processes that run for weeks."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8
"""glibc's malloc.h."""


def use_one_arena() -> None:
    """Have all threads allocate from one arena of glibc's malloc. Other C libraries are left as they are.

    Call it before threads start. What one thread allocates and another frees leaves holes in an arena of its own, and
    there would be one for each thread of the pool that encodes prompts: 60 bytes more for each request, for hours. The
    interpreter's lock has one thread allocate at a time, so that arenas save little.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Give the heap's free pages back to the system: its holes grow by some 60 bytes with each request, for hours."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
