"""`forge tune` on the virtual machine: its times mean nothing, what it does with them is all real."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import forge as library
from forge.backend import select
from forge.cli import run
from forge.devtools import autotune
from virtual_rocm import tiny
from virtual_rocm.command import forge

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

ON = ("gfx1100",)
MODEL = tiny.ARCH / "llama" / "model.gguf"
GENERATE = ("generate", "--model", str(MODEL), "--device", "hip", "--max-tokens", "6", "--ignore-eos", "--json", "abc")


@pytest.fixture
def device() -> Any:
    """The one in use: tests before may have made it anew."""
    return select("hip")


@pytest.fixture
def cache(device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    start_anew(device)
    yield tmp_path
    start_anew(device)


def start_anew(device: Any) -> None:
    """As if the process had just begun."""
    vars(device).pop("tuning", None)
    device._modules = type(device._modules)(device.arch)


def of_vectors(device: Any) -> set[int]:
    """ROWS of the variants that were compiled for products of one row."""
    return {dict(variant.defines)["ROWS"] for variant in device._modules.loaded if variant.file == "matvec_f16"}


def test_what_is_tuned_is_launched_by_the_next_process(
    device: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(device: Any, steps: Sequence[Callable[[], object]]) -> list[float]:
        assert all(seconds >= 0 for seconds in measure(device, steps))
        return [1.0 / (1 + n) for n in range(len(steps))]  # the last is the fastest

    measure = autotune.rotated
    monkeypatch.setattr(autotune, "rotated", timed)
    monkeypatch.setattr(autotune, "ROTATED_BYTES", 20_000)
    monkeypatch.setattr(autotune, "_ROUNDS", 1)
    usual = forge(*GENERATE)
    library.load(MODEL, device="hip").close()
    assert of_vectors(device) == {8}
    assert run(["tune", str(MODEL), "--device", "hip", "--kernel", "matvec_f16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["arch"] == "gfx1100"
    assert {choice["values"]["ROWS"] for choice in report["choices"]} == {4}
    assert {choice["shape"]["op"] for choice in report["choices"]} == {"linear", "rms_linear", "rms_gated"}
    assert Path(report["path"]).parent.parent == cache
    start_anew(device)
    library.load(MODEL, device="hip").close()
    assert of_vectors(device) == {4}
    tuned = forge(*GENERATE)
    assert json.loads(tuned.stdout)["ids"] == json.loads(usual.stdout)["ids"]
    assert f"{len(report['choices'])} measured" in forge("doctor").stdout


def test_a_damaged_file_is_named(cache: Path) -> None:
    path = cache / "tuning" / "gfx1100.json"
    path.parent.mkdir()
    path.write_text("{")
    done = forge(*GENERATE)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if str(path) in line]
    assert (
        line
        == f"forge: {path} is no JSON, and is not used: `forge tune` measures anew, `forge tune --reset` removes it"
    )
    assert forge("tune", "--reset", "--device", "hip").stdout == f"{path} is removed\n"
    assert str(path) not in forge(*GENERATE).stderr
