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
from forge.checkpoints.huggingface import family_of, keys_of
from forge.checkpoints.settings import Settings


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


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, object]]] = {
    "google/gemma-3-12b-it": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 3840,
                "intermediate_size": 15360,
                "model_type": "gemma3_text",
                "num_attention_heads": 16,
                "num_hidden_layers": 48,
                "num_key_value_heads": 8,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "num_attention_heads": 16},
        },
        {
            "context_length": 131072,
            "attention.key_length": 256,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "attention.sliding_window": 1024,
        },
    ),
    "meta-llama/Llama-4-Maverick-17B-128E": (
        {
            "model_type": "llama4",
            "text_config": {
                "attention_chunk_size": 8192,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 5120,
                "interleave_moe_layer_step": 2,
                "intermediate_size": 8192,
                "intermediate_size_mlp": 16384,
                "max_position_embeddings": 1048576,
                "model_type": "llama4_text",
                "no_rope_layers": [],
                "num_attention_heads": 40,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 48,
                "num_key_value_heads": 8,
                "num_local_experts": 128,
                "rms_norm_eps": 1e-05,
                "rope_scaling": None,
                "rope_theta": 500000.0,
                "use_qk_norm": False,
                "vocab_size": 202048,
            },
        },
        {
            "expert_count": 128,
            "expert_used_count": 1,
            "feed_forward_length": 16384,
            "expert_feed_forward_length": 8192,
            "interleave_moe_layer_step": 2,
            "attention.sliding_window": 8192,
            "rope.freq_base": 5e5,
        },
    ),
    "MiniMaxAI/MiniMax-M2": (
        {
            "model_type": "minimax_m2",
            "vocab_size": 200064,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 62,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 196608,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "num_mtp_modules": 3,
            "use_qk_norm": True,
            "rotary_dim": 64,
            "rope_theta": 5000000,
        },
        {
            "rope.dimension_count": 64,
            "rope.freq_base": 5e6,
            "expert_gating_func": 2,
            "expert_feed_forward_length": 1536,
        },
    ),
    "zai-org/GLM-4.5-Air": (
        {
            "model_type": "glm4_moe",
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 96,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 46,
            "num_key_value_heads": 8,
            "num_nextn_predict_layers": 1,
            "partial_rotary_factor": 0.5,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "use_qk_norm": False,
            "vocab_size": 151552,
        },
        {"block_count": 47, "nextn_predict_layers": 1, "rope.dimension_count": 64, "leading_dense_block_count": 1},
    ),
    "baidu/ERNIE-4.5-21B-A3B-PT": (
        {
            "model_type": "ernie4_5_moe",
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "max_position_embeddings": 131072,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "head_dim": None,
            "num_hidden_layers": 28,
            "rope_theta": 500000,
            "moe_num_experts": 64,
            "moe_layer_start_index": 1,
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 2,
            "moe_layer_end_index": None,
        },
        {"expert_count": 64, "expert_used_count": 6, "expert_shared_feed_forward_length": 3072, "rope.freq_base": 5e5},
    ),
    "google/gemma-4-31b": (
        {
            "model_type": "gemma4",
            "text_config": {
                "attention_k_eq_v": True,
                "enable_moe_block": False,
                "expert_intermediate_size": None,
                "final_logit_softcapping": 30.0,
                "global_head_dim": 512,
                "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size": 5376,
                "hidden_size_per_layer_input": 0,
                "intermediate_size": 21504,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
                "max_position_embeddings": 262144,
                "model_type": "gemma4_text",
                "num_attention_heads": 32,
                "num_experts": None,
                "num_global_key_value_heads": 4,
                "num_hidden_layers": 60,
                "num_key_value_heads": 16,
                "num_kv_shared_layers": 0,
                "rms_norm_eps": 1e-06,
                "rope_parameters": {
                    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
                },
                "sliding_window": 1024,
                "top_k_experts": None,
                "use_bidirectional_attention": "vision",
                "use_double_wide_mlp": False,
            },
        },
        {
            "attention.key_length": 512,
            "attention.key_length_swa": 256,
            "attention.head_count_kv": ([16] * 5 + [4]) * 10,
            "rope.freq_base_swa": 1e4,
            "rope.dimension_count_swa": 256,
            "feed_forward_length": 21504,
        },
    ),
}
"""Numbers of real config.json, as other programs' tests quote them, and the keys that they mean."""


@pytest.mark.parametrize("repository", PUBLISHED)
def test_published_configurations_are_read(repository: str) -> None:
    config, expected = PUBLISHED[repository]
    family = family_of(config, Path(repository))
    keys = keys_of(Settings(Path(repository), config, family.defaults), family, {})
    assert {key: np.asarray(keys[key]).tolist() for key in expected} == expected
