"""Each family's directory against what llama.cpp's converter makes of it, and against transformers' logits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import ARCH, HF, NAMES, older, unpacked
from safetensors_files import safetensors_bytes
from test_hf_stored import tensors_of

import forge
from forge import models
from forge.backend import NUMPY
from forge.checkpoints import open_checkpoint
from forge.checkpoints.families import FAMILIES
from forge.checkpoints.huggingface import family_of, keys_of
from forge.checkpoints.settings import Settings
from forge.errors import ForgeError
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


def cases(quick: set[str], names: Iterable[str] = NAMES) -> list[object]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


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


@pytest.mark.parametrize("name", cases({"gpt2", "gpt_oss", "llama_bias_tied"}))
def test_rows_are_read_alike_whole_and_in_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut of a tensor's rows, and steps of few bytes within it."""
    monkeypatch.setattr("forge.checkpoints.views.STEP_BYTES", 200)
    monkeypatch.setattr("forge.checkpoints.views._NARROW", 2)
    random = np.random.default_rng(1)
    with open_checkpoint(unpacked(name, tmp_path)) as file, gguf.read(ARCH / name / "model.gguf") as expected:
        for tensor in [*file.tensors] * 3:
            rows = np.prod(file.tensors[tensor].shape[:-1], dtype=int)
            start, stop = sorted(random.integers(0, rows + 1, 2).tolist())
            np.testing.assert_array_equal(
                file.raw(tensor, slice(start, stop)), expected.raw(tensor, slice(start, stop)), err_msg=tensor
            )


@pytest.mark.parametrize(
    "name",
    cases(
        {"gemma3_linear", "phi3_longrope", "apertus", "glm4"}, set(NAMES) - {"gemma4", "gemma4_e2b", "gemma4_26b_a4b"}
    ),
)
def test_configurations_of_older_versions_say_the_same(name: str, tmp_path: Path) -> None:
    """Gemma 4 is younger. OLMo 3 had one base for all layers, which has no key of its own then."""
    directory = unpacked(name, tmp_path)
    with open_checkpoint(directory) as file:
        expected = {key: plain(value) for key, value in file.metadata.items()}, dict(file.tensors)
    if name == "olmo3":
        assert expected[0].pop("olmo2.rope.freq_base_swa") == expected[0]["olmo2.rope.freq_base"]
    config = older(json.loads((directory / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(config))
    with open_checkpoint(directory) as file:
        assert ({key: plain(value) for key, value in file.metadata.items()}, dict(file.tensors)) == expected


NEEDED = {"gemma4_text", "ministral3", "muse_glimmer_text"}
"""Families whose files have to say more than sizes, as all of them do."""
IMPLIED = {
    "exaone4": {"attention.sliding_window_pattern"},
    "olmo3": {"attention.sliding_window_pattern", "rope.freq_base_swa"},
}
"""Keys that are written where the file says it, and that mean the same where they are not there."""


def test_what_a_configuration_leaves_out_is_the_default_of_its_class() -> None:
    """Files of nothing but sizes, and what transformers' classes make of them."""
    defaults = json.loads((HF / "defaults.json").read_text())
    assert defaults.keys() == FAMILIES.keys()
    for kind, configs in defaults.items():
        if kind in NEEDED:
            continue
        family = FAMILIES[kind]
        sparse, whole = (keys_of(Settings(HF / kind, config, family.defaults), family, {}) for config in configs)
        for keys in (sparse, whole):
            for key in IMPLIED.get(kind, ()):
                keys.pop(key, None)
        assert {key: plain(value) for key, value in sparse.items()} == {k: plain(v) for k, v in whole.items()}, kind
        assert configs[1]["tie_word_embeddings"] is family.is_tied, kind


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("name", "settings", "keys"),
    [
        ("mistral", {"sliding_window": 16}, {"sliding_window": 16, "sliding_window_pattern": [True, True]}),
        (
            "qwen2_yarn",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
            {"sliding_window": 16, "sliding_window_pattern": [False, True]},
        ),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, {"sliding_window_pattern": [False] * 7}),
        ("gemma3", {"query_pre_attn_scalar": 64}, {"scale": 0.125}),
        ("qwen3moe", {"norm_topk_prob": False}, {"expert_weights_norm": False}),
        (
            "ministral3",
            {"rope_parameters": {**YARN, "mscale": 2.0}},
            {"rope.scaling.yarn_attn_factor": np.float32((0.2 * math.log(8) + 1) / (0.1 * math.log(8) + 1))},
        ),
        ("gptneox", {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.25}}, {"rope.freq_base": 5e4}),
    ],
)
def test_what_the_converter_loses_is_a_key(
    name: str, settings: dict[str, Any], keys: dict[str, object], tmp_path: Path
) -> None:
    directory = unpacked(name, tmp_path)
    config = json.loads((directory / "config.json").read_text()) | settings
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    with open_checkpoint(directory) as file:
        metadata = {
            key.partition(".")[2].removeprefix("attention."): plain(value) for key, value in file.metadata.items()
        }
    assert {key: metadata[key] for key in keys} == keys


def test_a_tied_model_of_a_family_with_outputs_has_its_embedding_for_one(tmp_path: Path) -> None:
    directory = unpacked("olmo2", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    weights = directory / "model.safetensors"
    tensors = {name: weight for name, weight in tensors_of(directory).items() if name != "lm_head.weight"}
    weights.write_bytes(safetensors_bytes(tensors))
    with open_checkpoint(directory) as file:
        np.testing.assert_array_equal(file.raw("output.weight"), file.raw("token_embd.weight"))
        models.build(file, models.read_config(file), NUMPY)


@pytest.mark.parametrize("step", [1000, 4 << 20])
def test_an_output_beside_a_tied_embedding_is_used_where_it_differs(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 ties weights that are both there only if they are equal."""
    monkeypatch.setattr("forge.checkpoints.stored.STEP_BYTES", step)
    directory = unpacked("mistral", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(directory)
    with open_checkpoint(directory) as file:
        np.testing.assert_array_equal(file.load("output.weight"), tensors["lm_head.weight"].astype(np.float32))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with open_checkpoint(directory) as file:
        assert "output.weight" not in file.tensors
    tensors["lm_head.weight"][-1, -1] += 1  # the last number of all
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with open_checkpoint(directory) as file:
        assert "output.weight" in file.tensors


def test_each_number_that_changes_logits_changes_a_key_or_is_refused() -> None:
    """Each key of each model's configuration with another value, of those that change what transformers computes."""
    changes = json.loads((HF / "changes.json").read_text())
    assert changes.keys() <= set(NAMES)
    outcomes = {"key": 0, "refused": 0}
    for name, patches in changes.items():
        original = said_by(json.loads((HF / name / "config.json").read_text()))
        for path, value in patches:
            config = json.loads((HF / name / "config.json").read_text())
            inner = config.get("text_config", config)
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            try:
                assert said_by(config) != original, (name, path, value)
                outcomes["key"] += 1
            except ForgeError:
                outcomes["refused"] += 1
    assert outcomes["key"] > 200
    assert outcomes["refused"] > 40


def said_by(config: dict[str, Any]) -> dict[str, object]:
    """Keys of a configuration, and the tensors that it stands for."""
    family = family_of(config, HF)
    settings = Settings(HF, config, family.defaults)
    keys = {key: plain(value) for key, value in keys_of(settings, family, {}).items()}
    return keys | {name: plain(view.floats()) for extra in family.extras for name, view in extra(settings).items()}
