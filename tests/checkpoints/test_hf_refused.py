"""What a Hugging Face directory may not hold: each is one line that says what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import unpacked
from safetensors_files import safetensors_bytes
from test_hf_stored import tensors_of

from forge import models
from forge.backend import NUMPY
from forge.checkpoints import open_checkpoint
from forge.errors import ForgeError, FormatError, UnsupportedError

HUGE = 2**63


def changed(directory: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """A model's directory with other settings; None removes one."""
    unpacked(name, directory)
    config = json.loads((directory / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("mistral", {"model_type": "mistrale"}, UnsupportedError, "'mistrale' is not supported; .* like it: mistral"),
        ("mistral", {"model_type": "zzz"}, UnsupportedError, "names like it: none"),
        ("mistral", {"model_type": None}, FormatError, "model_type should be the name of a family, not null"),
        ("mistral", {"model_type": 7}, FormatError, "model_type should be the name of a family, not 7"),
        ("mistral", {"num_hidden_layers": None}, FormatError, "'num_hidden_layers' is missing"),
        ("mistral", {"num_hidden_layers": 0}, FormatError, "'num_hidden_layers' should be an integer from 1 to 1024"),
        ("mistral", {"num_hidden_layers": HUGE}, FormatError, "'num_hidden_layers' should be an integer"),
        ("mistral", {"num_hidden_layers": True}, FormatError, "'num_hidden_layers' should be an integer"),
        ("mistral", {"num_hidden_layers": 1}, FormatError, "tensor 'layers.1.* is of a layer beyond"),
        ("mistral", {"num_attention_heads": -4}, FormatError, "'num_attention_heads' should be an integer from 1"),
        ("mistral", {"num_attention_heads": 5}, FormatError, "cannot be that of 5 heads"),
        ("mistral", {"num_key_value_heads": 8}, FormatError, "'num_key_value_heads' should be an integer from 1 to 4"),
        ("mistral", {"hidden_size": "48"}, FormatError, "'hidden_size' should be an integer from .* not '48'"),
        ("mistral", {"hidden_size": 47.5}, FormatError, "'hidden_size' should be an integer"),
        ("mistral", {"hidden_size": [48]}, FormatError, "'hidden_size' should be an integer .* not an array of 1"),
        ("mistral", {"head_dim": 2**30}, FormatError, "'head_dim' should be an integer from 1 to 65536"),
        ("mistral", {"rms_norm_eps": "small"}, FormatError, "'rms_norm_eps' should be a number, not 'small'"),
        ("mistral", {"rms_norm_eps": 1e300}, FormatError, "'rms_norm_eps' should be a number"),
        ("mistral", {"rope_parameters": [1]}, FormatError, "'rope_parameters' should be an object, not an array of 1"),
        ("mistral", {"rope_parameters": {"rope_type": "ntk"}}, UnsupportedError, "RoPE scaling 'ntk' is not supported"),
        ("mistral", {"rope_parameters": {"rope_type": {}}}, FormatError, "'rope_type' should be a string"),
        ("mistral", {"rope_parameters": {"rope_theta": 0.5}}, FormatError, "'rope_theta' should be a number"),
        ("mistral", {"hidden_act": "relu"}, UnsupportedError, "hidden_act = 'relu' is not supported"),
        ("mistral", {"tie_word_embeddings": 1}, FormatError, "'tie_word_embeddings' should be true or false, not 1"),
        ("mistral", {"quantization_config": {"quant_method": "awk"}}, UnsupportedError, "quantized by 'awk'"),
        ("mistral", {"quantization_config": 4}, FormatError, "'quantization_config' should be an object, not 4"),
        ("mistral", {"model_type": "qwen3"}, FormatError, "tensor 'blk.0.attn_q_norm.weight' is missing"),
        ("qwen3", {"tie_word_embeddings": False}, FormatError, "lm_head.weight is missing"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, FormatError, "'layer_types' should be a list for 3 layers"),
        ("gpt_oss", {"layer_types": ["linear"] * 3}, FormatError, "should be full_attention, sliding_attention or"),
        ("qwen3moe", {"mlp_only_layers": [0]}, UnsupportedError, "mlp_only_layers = an array of 1 is not supported"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, UnsupportedError, "no_rope_layers says other layers"),
        ("falcon", {"alibi": True}, UnsupportedError, "alibi = True is not supported"),
        ("gpt_oss", {"swiglu_limit": 9.0}, UnsupportedError, "swiglu_limit = 9.0 is not supported"),
        (
            "phi3_longrope",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            FormatError,
            "long_factor",
        ),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}},
            UnsupportedError,
            "a scaled RoPE of layers with a window is not supported",
        ),
        ("muse_glimmer", {"text_config": {}}, UnsupportedError, "model_type 'muse_glimmer' is not supported"),
    ],
)
def test_a_config_is_refused(
    name: str, settings: Mapping[str, Any], error: type[ForgeError], message: str, tmp_path: Path
) -> None:
    directory = changed(tmp_path, name, settings)
    with pytest.raises(error, match=message) as caught, open_checkpoint(directory) as file:
        models.build(file, models.read_config(file), NUMPY)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "drop", "add", "error", "message"),
    [
        ("mistral", "", {"model.layers.0.self_attn.odd.weight": (4, 4)}, FormatError, "has no place in llama"),
        ("mistral", "", {"model.layers.x.mlp.up_proj.weight": (4, 4)}, FormatError, "has no place in llama"),
        (
            "mistral",
            "",
            {"model.layers.2.mlp.up_proj.weight": (4, 4)},
            FormatError,
            "is of a layer beyond the 2 there are",
        ),
        (
            "mistral",
            "",
            {"model.layers.00.mlp.up_proj.weight": (4, 4)},
            FormatError,
            "two tensors are blk.0.ffn_up.weight",
        ),
        ("mistral", "", {"layers.0.mlp.up_proj.weight": (4, 4)}, FormatError, "there are two tensors 'layers.0.mlp.up"),
        ("mistral", "embed_tokens.weight", {}, FormatError, "the embedding is missing"),
        ("mistral", "layers.1.mlp.up_proj.weight", {}, FormatError, "'blk.1.ffn_up.weight' is missing"),
        ("mistral", "", {"model.norm.bias": (0,)}, FormatError, "tensor 'model.norm.bias' is empty"),
        ("qwen3moe", "0.mlp.experts.3.up_proj.weight", {}, FormatError, "5 of the experts 0 to 5 are there"),
        (
            "qwen3moe",
            "",
            {"model.layers.0.mlp.experts.6.up_proj.weight": (3, 3)},
            FormatError,
            "differ in shape or type",
        ),
        ("qwen3moe", "", {"model.layers.0.mlp.experts.999999.up_proj.weight": (16, 48)}, FormatError, "0 to 999999"),
        (
            "gptneox",
            "",
            {"gpt_neox.layers.0.attention.query_key_value.weight": (9, 64)},
            FormatError,
            "has 9 rows and not",
        ),
        (
            "granitemoe",
            "",
            {"model.layers.0.block_sparse_moe.input_linear.weight": (64,)},
            FormatError,
            r"a tensor \(64,\) cannot be gates and ups",
        ),
    ],
)
def test_tensors_are_refused(
    name: str, drop: str, add: Mapping[str, tuple[int, ...]], error: type[ForgeError], message: str, tmp_path: Path
) -> None:
    directory = unpacked(name, tmp_path)
    tensors = {tensor: weight for tensor, weight in tensors_of(directory).items() if not drop or drop not in tensor}
    tensors |= {tensor: np.ones(shape, np.float16) for tensor, shape in add.items()}
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(error, match=message) as caught, open_checkpoint(directory) as file:
        models.build(file, models.read_config(file), NUMPY)
    assert "\n" not in str(caught.value)


def test_a_weight_of_another_dtype_is_refused(tmp_path: Path) -> None:
    directory = unpacked("mistral", tmp_path)
    tensors = tensors_of(directory) | {"model.norm.weight": np.ones(48, np.int8)}
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(UnsupportedError, match=r"'model\.norm\.weight' has I8 numbers, not weights"):
        open_checkpoint(directory)


def test_a_directory_without_a_config_or_a_tokenizer_is_refused(tmp_path: Path) -> None:
    directory = unpacked("mistral", tmp_path)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"has no tokenizer\.json"):
        open_checkpoint(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FormatError, match=r"has no config\.json: give a GGUF file, or a directory"):
        open_checkpoint(directory)
