"""A minute of scripts/soak.py; ten are run by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"


@pytest.mark.slow
def test_a_minute_of_clients_that_leave_and_err_fails_nothing_and_leaves_memory_as_it_is(model_path: str) -> None:
    command = [sys.executable, str(SCRIPT), model_path, "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all is well\n")
