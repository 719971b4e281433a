"""`forge inspect` of a model that cannot be loaded: what is there, on stdout, then the error, with its exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Captured
from hf_models import unpacked
from onnx_files import array, model, node
from safetensors_files import safetensors_bytes

from forge.cli import run

ONNX = Path(__file__).parents[1] / "data/onnx/genai/qwen3_int4_128"


def changed(directory: Path, **values: object) -> Path:
    unpacked("mistral", directory)
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_family_without_a_row_is_described(tmp_path: Path, capsys: Captured) -> None:
    directory = changed(tmp_path / "model", model_type="mamba2")
    assert run(["inspect", str(directory)]) == 1
    found = capsys.readouterr()
    (line,) = found.err.splitlines()
    assert "config.json: model_type 'mamba2' is not supported" in line
    rows = [line.split() for line in found.out.splitlines()]
    assert ["architecture", "mamba2"] in rows
    assert ["tokenizer", "tokenizer.json,", "tokenizer_config.json"] in rows
    assert ["model.layers.*.self_attn.k_proj.weight", "2", "32", "x", "48", "F16", "6.144", "kB"] in rows


def test_json_has_the_error_too(tmp_path: Path, capsys: Captured) -> None:
    directory = changed(tmp_path / "model", is_causal=False)
    assert run(["inspect", str(directory), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "is_causal = False is not supported" in found["error"]
    assert (found["format"], found["architecture"], found["layers"]) == ("safetensors", "mistral", 2)
    assert len(found["tensors"]) == 21
    assert found["bytes"] == sum(tensor["bytes"] for tensor in found["tensors"]) > 100_000


@pytest.mark.parametrize("file", ["", "model.onnx"])
def test_a_graph_is_described(file: str, tmp_path: Path, capsys: Captured) -> None:
    directory = Path(shutil.copytree(ONNX, tmp_path / "model"))
    weight = array("fc.weight", np.ones((32, 16), np.float32))
    (directory / "model.onnx").write_bytes(model([node("Conv", ["x", "fc.weight"], ["y"], "/fc/Conv")], [weight]))
    assert run(["inspect", str(directory / file)]) == 1
    found = capsys.readouterr()
    rows = [line.split() for line in found.out.splitlines()]
    assert ["format", "ONNX"] in rows
    assert ["fc.weight", "1", "32", "x", "16", "FLOAT", "2.048", "kB"] in rows
    assert "'Conv'" in found.err


def test_damaged_weights_leave_what_else_there_is(tmp_path: Path, capsys: Captured) -> None:
    directory = changed(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"\xff" * 100)
    assert run(["inspect", str(directory)]) == 1
    found = capsys.readouterr()
    assert "no weights that can be read" in found.out
    assert "mistral" in found.out
    assert len(found.err.splitlines()) == 1


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path, capsys: Captured) -> None:
    directory = changed(tmp_path / "model", model_type="\x1b[31m")
    tensors = {"\x1b[2J" + "a" * 5000: np.ones(4, np.float32)}
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    assert run(["inspect", str(directory)]) == 1
    found = capsys.readouterr()
    assert "\x1b" not in found.out + found.err
    assert max(map(len, found.out.splitlines())) < 400


def test_nothing_is_shown_of_what_is_no_model(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUX")
    assert run(["inspect", str(tmp_path / "a.gguf")]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
