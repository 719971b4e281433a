"""What may end the process is tried in a child."""

from __future__ import annotations

import sys

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
