"""What may end the process is tried in a child."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from forge.backend import probe


def test_a_child_that_ends_well() -> None:
    assert probe.failure([sys.executable, "-c", "pass"]) is None


def test_a_child_that_aborts_says_what_it_said_last() -> None:
    trial = "import os, sys; print('rocBLAS error: Cannot read library', file=sys.stderr, flush=True); os.abort()"
    assert probe.failure([sys.executable, "-c", trial]) == "Aborted: rocBLAS error: Cannot read library"


def test_a_child_that_raises() -> None:
    assert probe.failure([sys.executable, "-c", "raise SystemExit('no device')"]) == "exit code 1: no device"


def test_a_command_that_is_not_there() -> None:
    assert probe.failure(["/nowhere/python"]) == "/nowhere/python: No such file or directory"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_output_and_end_of_a_command() -> None:
    both = "import sys; print('out', flush=True); print('é', file=sys.stderr, flush=True); sys.exit(3)"
    assert probe.run(python(both), 60) == ("exit code 3", "out\né\n")
    assert probe.run(python("import sys; sys.stdout.buffer.write(b'\\xff' * 300_000)"), 60) == ("", "\ufffd" * 300_000)
    assert probe.run(python("import os; print(os.environ['X'])"), 60, {"X": "y"}) == ("", "y\n")


def test_a_command_that_writes_without_end() -> None:
    code = "import os\nwhile True: os.write(1, bytes(65536))"
    assert probe.run(python(code), 600).how == "it wrote more than 1 MiB"


def test_a_command_that_hangs_ends_with_all_that_it_has_started() -> None:
    how, output = probe.run(["/bin/sh", "-c", "sleep 600 & echo $!; wait"], 1)
    assert how == "no end in 1 seconds"
    deadline = time.monotonic() + 60
    while psutil.pid_exists(int(output)) and psutil.Process(int(output)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nobody_waits_for_what_a_command_leaves_behind() -> None:
    """Here a process that has its output open."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    how, output = probe.run(python(code), 60)
    psutil.Process(int(output)).kill()
    assert how == ""


def test_a_command_that_closes_its_output_has_not_ended() -> None:
    code = "exec >&- 2>&-; sleep {}; exit 7"
    assert probe.run(["/bin/sh", "-c", code.format(0.3)], 60).how == "exit code 7"
    assert probe.run(["/bin/sh", "-c", code.format(600)], 0.3).how == "no end in 0.3 seconds"


def test_an_interrupt_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], *_: object) -> str:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "_fault", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe.run(["sleep", "600"], 600)
    assert started[0].returncode == -9
