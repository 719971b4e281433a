"""The heap of a server's processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOWS_ARENAS = """
import ctypes, sys
from threading import Barrier, Thread
from forge.server.heap import use_one_arena
libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_stats"):
    sys.exit("no glibc")
if sys.argv[1] == "one":
    use_one_arena()
together = Barrier(3)
threads = [Thread(target=lambda: (together.wait(), bytes(100_000), together.wait())) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_stats()
"""


@pytest.mark.parametrize(("wanted", "arenas"), [("one", False), ("many", True)])
def test_threads_allocate_from_one_arena(wanted: str, arenas: bool) -> None:
    done = subprocess.run([sys.executable, "-c", SHOWS_ARENAS, wanted], capture_output=True, text=True, timeout=60)
    if done.stderr == "no glibc\n":
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr
    assert "Arena 0:" in done.stderr
    assert ("Arena 1:" in done.stderr) == arenas
