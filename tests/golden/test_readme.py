"""The README's Python is what a user pastes first: it runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_it_runs(block: str, smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert shown.strip()
    if "capture" in block:
        assert names["cache"]["blk.29.resid_post"].shape == (1, 576)
        paris, london = next(json.loads(line) for line in shown.splitlines() if line.startswith("["))
        assert -1 < paris < 0
        assert london < paris - 2
