"""What a config.json says of other families' computations: ignored where transformers ignores it, or refused by name.

Found by giving each key to each model, and comparing the logits of transformers 5.24 and forge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hf_models import HF, NAMES, unpacked
from test_hf_meaning import config_of, outcome
from test_huggingface import said_by

from forge.checkpoints import open_checkpoint
from forge.errors import ForgeError, FormatError, UnsupportedError

WINDOWS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("name", NAMES)
def test_attention_that_is_not_causal_is_refused(name: str) -> None:
    """transformers computes it in every family."""
    with pytest.raises(UnsupportedError, match="is_causal = False is not supported"):
        said_by({**config_of(name), "is_causal": False})


REFUSED: list[tuple[str, Mapping[str, Any], str]] = [
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"use_bidirectional_attention": "vision"}, "use_bidirectional_attention = 'vision'"),
    ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
    ("granite", {"layer_types": WINDOWS, "sliding_window": 8}, "layer_types with windows .* in granite"),
    ("apertus", {"layer_types": WINDOWS, "sliding_window": 8}, "layer_types with windows .* in apertus"),
    ("phi3_window", {"layer_types": WINDOWS}, "layer_types without windows .* in phi3"),
    ("mistral", {"layer_types": WINDOWS, "sliding_window": 8}, "layer_types without windows .* in llama"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob = False is not supported"),
    ("llama4_moe", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
    ("gpt_oss", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported"),
    ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
    ("llama4_moe", {"moe_layers": [0]}, "moe_layers = an array of 1 is not supported"),
    ("ernie4_5_moe", {"num_experts_per_tok": 1}, "moe_k = 2, and num_experts_per_tok = 1, which is another name"),
    ("falcon", {"layer_norm_eps": 0.1}, "layer_norm_eps = 0.1, and layer_norm_epsilon = 0.001"),
    ("starcoder2", {"layer_norm_eps": 0.1}, "layer_norm_eps = 0.1, and norm_epsilon"),
    ("mistral", {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, "per_layer_config.0 = an object of 1 is not"),
    ("gemma4", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config.0 = an object of 1 is not"),
    ("gemma4", {"per_layer_config": {"x": []}}, "per_layer_config.x = an array of 0 is not"),
    ("mistral", {"per_layer_config": [1]}, "'per_layer_config' should be an object"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_would_be_computed_otherwise_is_refused(name: str, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ForgeError, match=message) as caught:
        said_by({**config_of(name), **changes})
    assert str(HF) in str(caught.value)


IGNORED: list[tuple[str, Mapping[str, Any]]] = [
    ("cohere2", {"use_sliding_window": False}),
    ("exaone4", {"use_sliding_window": False}),
    ("gemma3", {"use_sliding_window": False}),
    ("phi3_window", {"use_sliding_window": False}),
    ("cohere2", {"_sliding_window_pattern": 2, "layer_types": None}),
    ("gemma3", {"_sliding_window_pattern": 2, "layer_types": None}),
    ("olmo3", {"sliding_window_pattern": 2, "layer_types": None}),
    ("muse_glimmer", {"rope_local_base_freq": 5e5}),
    ("mistral", {"is_causal": True, "use_bidirectional_attention": False, "per_layer_config": {}}),
    ("granite", {"layer_types": ["full_attention"] * 9}),
]


@pytest.mark.parametrize(("name", "changes"), IGNORED)
def test_what_transformers_ignores_changes_nothing(name: str, changes: Mapping[str, Any]) -> None:
    config = config_of(name)
    assert outcome({**config, **changes}) == outcome({**config, **dict.fromkeys(changes.keys() & {"layer_types"})})


FLAGS: list[tuple[str, Mapping[str, Any], str]] = [
    (
        "llama_bias_tied",
        {"attention_bias": False},
        "attention_bias = False, and the files have 'layers.0.self_attn.*bias'",
    ),
    ("llama_bias_tied", {"mlp_bias": False}, "mlp_bias = False, and the files have 'layers.0.mlp"),
    ("gptneox", {"attention_bias": False}, "'layers.0.attention.query_key_value.bias'"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias = False, and"),
    ("seed_oss", {"attention_bias": False}, "attention_bias = False, and"),
    ("starcoder2", {"use_bias": False}, "use_bias = False, and"),
    ("granitemoe_shared", {"shared_intermediate_size": 0}, "shared_intermediate_size = 0, and the files have a shared"),
    ("cohere", {"use_qk_norm": False}, "use_qk_norm = False, and the files have 'layers.0.self_attn.[kq]_norm.weight'"),
    ("glm4moe", {"use_qk_norm": False}, "use_qk_norm = False, and"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm = True, and the files have 'no such norms'"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual = True, and the files have 'layers.0.post_at"),
    (
        "falcon",
        {"new_decoder_architecture": True},
        "new_decoder_architecture = True with 2 norms of a layer is not what",
    ),
    ("falcon_40b", {"num_ln_in_parallel_attn": 1}, "new_decoder_architecture = True with 1 norms of a layer is not"),
    ("stablelm_parallel", {"use_parallel_residual": False}, "use_parallel_residual = False, and the files have 'no"),
]


@pytest.mark.parametrize(("name", "changes", "message"), FLAGS)
def test_a_flag_of_tensors_that_are_there_or_not(
    name: str, changes: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    directory = unpacked(name, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FormatError, match=message):
        open_checkpoint(directory)
