"""What commands print, as golden text."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from virtual_rocm import tiny
from virtual_rocm.command import forge

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
MODEL = tiny.ARCH / "llama" / "model.gguf"
_OF_THE_MACHINE = "Python|CPU|NumPy|memory|kernel cache|cache|smollm2|gemma3-270m|fetches models with"


def assert_golden(name: str, text: str) -> None:
    """UPDATE_GOLDEN=1 writes the files anew."""
    path = GOLDEN / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("name", "environment", "code"),
    [("doctor", {}, 0), ("doctor-without-blas", {"VIRTUAL_ROCM_BLAS": "none"}, 1)],
)
def test_doctor(name: str, environment: dict[str, str], code: int, gfx: str, tmp_path: Path) -> None:
    done = forge("doctor", "--device", "hip", FORGE_CACHE=str(tmp_path), **environment)
    assert done.returncode == code
    shown = re.sub(rf"^({_OF_THE_MACHINE})( +).*", r"\1\2<this machine's>", done.stdout, flags=re.MULTILINE)
    assert_golden(f"{name}-{gfx}", shown.replace(str(HERE), "<tests>"))


def test_verify(gfx: str) -> None:
    done = forge("verify", "--device", "hip")
    assert done.returncode == 0, done.stdout + done.stderr
    # the largest errors depend on the C library's functions and NumPy's BLAS; where their columns end does not
    assert_golden(
        f"verify-{gfx}",
        re.sub(r" +\S+ +[\d.]+%(?=  )", lambda found: "<error> <%>".rjust(len(found[0])), done.stdout),
    )


def test_bench() -> None:
    sizes = ("--prompt-tokens", "20", "--gen-tokens", "4", "--batch", "1", "--repetitions", "1")
    done = forge("bench", "--model", str(MODEL), "--device", "hip", "--context", "64", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["device"].startswith("hip:0")
    assert [(run["batch"], run["tokens_per_s"] > 0) for run in found["decode"]] == [(1, True)]
