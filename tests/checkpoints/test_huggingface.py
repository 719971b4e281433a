"""Each family's directory against what llama.cpp's converter makes of it, and against transformers' logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hf_models import ARCH, NAMES, unpacked

import forge
from forge.checkpoints import open_checkpoint
from forge.checkpoints.families import FAMILIES
from forge.formats import gguf
from forge.models.arch import ARCHS

QUICK = {"gemma3", "llama_bias_tied", "falcon_40b", "gpt_oss", "stablelm_parallel", "apertus"}
"""Reordered rows, norms less one, queries in groups, transposed experts, stacked norms, tensors that become keys."""
NOT_COMPARED = {
    "general.name",  # of what is written, which only a converter knows
    "general.size_label",
    "general.file_type",
    "general.quantization_version",
    "falcon.context_length",  # the converter writes 2048 for all, and config.json says it
}
"""Beside tokenizer.*, which tests/tokenizer compares with the converter's."""


def cases(quick: set[str]) -> list[object]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", cases(QUICK))
def test_tensors_and_keys_are_those_of_the_converter(name: str, tmp_path: Path) -> None:
    expected = gguf.read(ARCH / name / "model.gguf")
    with open_checkpoint(unpacked(name, tmp_path)) as found:
        keys = [
            {key: plain(value) for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
            for file in (found, expected)
        ]
        ours, theirs = ({key: each[key] for key in each.keys() - NOT_COMPARED} for each in keys)
        assert ours == theirs
        assert found.tensors.keys() == expected.tensors.keys()
        for tensor, info in expected.tensors.items():
            ours_info = found.tensors[tensor]
            assert (ours_info.shape, ours_info.type, ours_info.nbytes) == (info.shape, info.type, info.nbytes), tensor
            np.testing.assert_array_equal(found.raw(tensor), expected.raw(tensor), err_msg=tensor)


@pytest.mark.parametrize("name", cases({"qwen3"}))
def test_logits_equal_transformers_at_every_position(name: str, tmp_path: Path) -> None:
    golden = np.load(ARCH / name / "logits.npz")
    contexts = json.loads((ARCH / name / "meta.json").read_text()).get("context", {})
    directory = unpacked(name, tmp_path)
    for prompt in ("24", "96"):
        with forge.load(directory, context=contexts.get(prompt, 512)) as llm:
            found = llm.logits(golden[f"ids_{prompt}"].tolist())
        np.testing.assert_allclose(found, golden[f"logits_{prompt}"], rtol=0, atol=5e-4)


def test_every_architecture_has_a_family_and_every_family_a_model() -> None:
    assert {family.arch for family in FAMILIES.values()} == ARCHS.keys() - {"mistral"}  # converters write llama
    proven = {gguf.read(ARCH / name / "model.gguf").get_str("general.architecture") for name in NAMES}
    assert proven == ARCHS.keys() - {"mistral"}


@pytest.mark.parametrize("name", cases({"gpt2", "gpt_oss"}))
def test_rows_are_read_alike_whole_and_in_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut of a tensor's rows, and steps of few bytes within it."""
    monkeypatch.setattr("forge.checkpoints.views.STEP_BYTES", 300)
    random = np.random.default_rng(1)
    with open_checkpoint(unpacked(name, tmp_path)) as file, gguf.read(ARCH / name / "model.gguf") as expected:
        for tensor in file.tensors:
            rows = np.prod(file.tensors[tensor].shape[:-1], dtype=int)
            start, stop = sorted(random.integers(0, rows + 1, 2).tolist())
            np.testing.assert_array_equal(
                file.raw(tensor, slice(start, stop)), expected.raw(tensor, slice(start, stop)), err_msg=tensor
            )
