"""The same model under the names and in the layouts that versions of transformers, and other programs, write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import unpacked
from test_hf_stored import Tensors, tensors_of, write

from forge.checkpoints import open_checkpoint


def assert_same(found: Path, expected: Path) -> None:
    with open_checkpoint(found) as ours, open_checkpoint(expected) as theirs:
        assert ours.tensors == theirs.tensors
        assert {k: np.asarray(v).tolist() for k, v in ours.metadata.items() if not k.startswith("tokenizer")} == {
            k: np.asarray(v).tolist() for k, v in theirs.metadata.items() if not k.startswith("tokenizer")
        }
        for name in theirs.tensors:
            np.testing.assert_array_equal(ours.raw(name), theirs.raw(name), err_msg=name)


def stacked(tensors: Tensors) -> Tensors:
    """Experts in one tensor of gates over ups, and one of downs."""
    found = {name: weight for name, weight in tensors.items() if ".experts." not in name}
    for layer in {re.sub(r"\.experts\..*", "", name) for name in tensors if ".experts." in name}:
        count = len({name for name in tensors if name.startswith(f"{layer}.experts.")}) // 3
        gates, ups, downs = (
            np.stack([tensors[f"{layer}.experts.{expert}.{part}_proj.weight"] for expert in range(count)])
            for part in ("gate", "up", "down")
        )
        found |= {f"{layer}.experts.gate_up_proj": np.concatenate((gates, ups), 1), f"{layer}.experts.down_proj": downs}
    return found


def fused(tensors: Tensors) -> Tensors:
    """ERNIE's first files: queries, keys and values in one tensor, gates and ups in another."""
    found = {name: w for name, w in tensors.items() if not re.search(r"\.([qkv]|gate|up)_proj\.", name)}
    for name in tensors:
        if name.endswith("q_proj.weight"):
            rows = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[name.replace("q_proj", "qkv_proj")] = np.concatenate(rows)
        if name.endswith("gate_proj.weight"):
            rows = [tensors[name], tensors[name.replace("gate", "up")]]
            found[name.replace("gate_proj", "up_gate_proj")] = np.concatenate(rows)
    return {name.replace("model.", "ernie.", 1): weight for name, weight in found.items()}


def with_towers(tensors: Tensors) -> Tensors:
    """A text model within one of images, as transformers 4 wrote it."""
    towers = {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32),
        "multi_modal_projector.mm_input_projection_weight": np.ones((4, 4), np.float32),
        "vision_model.embeddings.class_embedding": np.ones(4, np.int8),
    }
    return {f"language_model.{name}": weight for name, weight in tensors.items()} | towers


def with_tables(tensors: Tensors) -> Tensors:
    """GPT-2's own files: no prefix, masks of the attention, and the output beside the embedding."""
    found = {name.removeprefix("transformer."): weight for name, weight in tensors.items()}
    masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 8, 8), np.int8) for layer in range(3)}
    masks |= {f"h.{layer}.attn.masked_bias": np.float32(-1e4).reshape(()) for layer in range(3)}
    return found | masks | {"lm_head.weight": found["wte.weight"]}


def in_a_model_of_images(tensors: Tensors) -> Tensors:
    """As transformers 5 writes it."""
    return {name.replace("model.", "model.language_model.", 1): weight for name, weight in tensors.items()}


def with_rotations(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "experts stacked": ("qwen3moe", stacked),
    "ernie's experts stacked": ("ernie4_5_moe", stacked),
    "fused": ("ernie4_5", fused),
    "with towers": ("gemma3", with_towers),
    "transformers 5": ("gemma3", in_a_model_of_images),
    "with tables": ("gpt2", with_tables),
    "base model": ("qwen3", lambda all: {name.removeprefix("model."): weight for name, weight in all.items()}),
    "rotations": ("mistral", with_rotations),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_model(layout: str, tmp_path: Path) -> None:
    name, change = LAYOUTS[layout]
    expected, found = (unpacked(name, tmp_path / folder) for folder in ("expected", "found"))
    write(found, change(tensors_of(expected)))
    assert_same(found, expected)


def test_numbers_of_a_text_model_lie_within_those_of_both(tmp_path: Path) -> None:
    expected, found = (unpacked("gemma3", tmp_path / folder) for folder in ("expected", "found"))
    text = json.loads((found / "config.json").read_text())
    both: dict[str, Any] = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 4}}
    (found / "config.json").write_text(json.dumps(both | {"hidden_size": 7}))
    assert_same(found, expected)


def test_layers_of_multi_token_prediction_keep_their_names(tmp_path: Path) -> None:
    """GLM-4.5's last layer predicts further tokens. The converter writes it, and the model does not read it."""
    directory = unpacked("glm4moe", tmp_path)
    tensors = tensors_of(directory)
    layer = {name.replace("layers.2.", "layers.3."): w for name, w in tensors.items() if "layers.2." in name}
    more = {"eh_proj": (48, 96), "enorm": (48,), "hnorm": (48,), "shared_head.norm": (48,), "embed_tokens": (272, 48)}
    layer |= {f"model.layers.3.{name}.weight": np.ones(shape, np.float16) for name, shape in more.items()}
    write(directory, tensors | layer)
    with open_checkpoint(directory) as file:
        found = {name for name in file.tensors if name.startswith("blk.3.nextn")}
        assert file.get_int("glm4moe.block_count") == 4
        assert "blk.3.ffn_up_exps.weight" in file.tensors
    ends = {"eh_proj", "enorm", "hnorm", "shared_head_norm", "embed_tokens"}
    assert found == {f"blk.3.nextn.{end}.weight" for end in ends}
