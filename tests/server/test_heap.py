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


SHOWS_TRIMMED = """
import sys
import psutil
from forge.server.heap import trim
kept = []
for _ in range(200_000):
    block = bytes(600)
    kept.append(bytes(40))  # so that what is freed lies between what is not
    kept.append(block)
del kept[1::2], block
before = psutil.Process().memory_info().rss
trim()
print(before - psutil.Process().memory_info().rss)
"""


def test_free_pages_within_the_heap_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWS_TRIMMED], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) > 10_000_000
