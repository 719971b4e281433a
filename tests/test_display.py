"""Progress where somebody watches, and nowhere else."""

import os
import pty
import subprocess
import sys

import pytest

from forge import display

LOAD = """
import sys
import forge
from forge.display import watched
with watched({progress}) as report:
    if report is not None:
        report("loading weights", 5_000_000, 20_000_000)
"""


def stderr_on_a_terminal(code: str) -> str:
    """What a fresh Python writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 1 << 16):
            shown += data
    except OSError:  # Linux says so when the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return shown.decode()


def test_a_terminal_shows_the_stage_and_how_much_of_it_is_done() -> None:
    shown = stderr_on_a_terminal(LOAD.format(progress=None))
    assert "loading weights" in shown
    assert "5 MB" in shown


def test_a_terminal_shows_nothing_where_progress_is_false() -> None:
    assert stderr_on_a_terminal(LOAD.format(progress=False)) == ""


def test_a_pipe_gets_no_progress() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD.format(progress=None)], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_callback_goes_before_the_bars() -> None:
    seen: list[tuple[str, int, int | None]] = []
    with display.watched(lambda *report: seen.append(report)) as report:
        report("downloading x", 1, None)
    assert seen == [("downloading x", 1, None)]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (98_362_432, "98.36 MB"), (10**10, "10 GB")]
)
def test_sizes_have_four_digits(count: int, text: str) -> None:
    assert display.num_bytes(count) == text


def test_what_a_terminal_would_act_upon_is_escaped() -> None:
    assert display.printable("a\x1b[2Jb\n\u202ec") == r"a\x1b[2Jb\n\u202ec"
    assert display.printable("Zürich 東京") == "Zürich 東京"
