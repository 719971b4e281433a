"""Every kernel compiles for every AMD target, within its registers and LDS; the committed table says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("clang++-19"), reason="no clang++-19: run scripts/install-toolchain")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 273 variants for 6 targets: 5 minutes on 2 cores where none is in the cache
def test_no_kernel_spills_on_any_target_and_the_table_is_up_to_date() -> None:
    script = ROOT / "scripts" / "amd_resources.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
