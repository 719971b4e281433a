"""From the numbers of a config.json to GGUF's keys, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from forge.checkpoints.settings import Settings
from forge.checkpoints.views import View
from forge.formats.checkpoint import Value

Metadata = dict[str, Value]
"""By the key below the architecture's prefix; a key that begins with a dot has no prefix."""
FACTORS = 1e-3, 1e6
"""Bounds of what RoPE is scaled by."""
_LENGTHS = ("context_length", "feed_forward_length")
"""Keys of which files have several names with several values."""
Keys = Callable[[Settings, Mapping[str, View]], Metadata]
"""Keys of a model by its numbers and its stored tensors, whose names have a # for each number."""


def single(value: float) -> float:
    """The number that a file holds as float32."""
    return float(np.float32(value))


def table(text: str) -> Keys:
    """Lines of: int, float or flag; GGUF's key; the names that the number may have in config.json, of which the first
    that is there counts. Behind a question mark a key that need not be there."""
    lines = [line.split(maxsplit=2) for line in text.strip().splitlines()]

    def keys(settings: Settings, _: Mapping[str, View]) -> Metadata:
        """What the lines of a table say."""
        found: Metadata = {}
        for kind, key, names in lines:
            if kind.endswith("?") and not settings.has(names):
                continue
            if key not in _LENGTHS:
                settings.check_alike(names)
            match kind.rstrip("?"):
                case "int":
                    found[key] = settings.integer(names)
                case "float":
                    found[key] = single(settings.number(names))
                case "flag":
                    found[key] = settings.flag(names)
        return found

    return keys


SIZES = table("""
int block_count num_hidden_layers n_layer n_layers num_layers
int context_length max_position_embeddings n_ctx n_positions
int embedding_length hidden_size n_embd
int attention.head_count num_attention_heads n_head n_heads
int? feed_forward_length intermediate_size n_inner
""")
EPS = table("""
float? attention.layer_norm_rms_epsilon rms_norm_eps norm_eps
float? attention.layer_norm_epsilon layer_norm_eps layer_norm_epsilon norm_epsilon
""")
EXPERTS = table("""
int? expert_count num_local_experts num_experts n_routed_experts
int? expert_used_count num_experts_per_tok num_experts_per_token top_k_experts
int? expert_group_count n_group
int? expert_group_used_count topk_group
""")
VOCABULARY = table("int vocab_size vocab_size")
WINDOW = table("int? attention.sliding_window sliding_window")
FINAL_SOFTCAP = table("float? final_logit_softcapping final_logit_softcapping")
SOFTCAP = table("float? attn_logit_softcapping attn_logit_softcapping")
LOGIT_SCALE = table("float logit_scale logit_scale")
PARALLEL = table("flag use_parallel_residual use_parallel_residual")
GRANITE = table("""
float? attention.scale attention_multiplier
float? embedding_scale embedding_multiplier
float? residual_scale residual_multiplier
float? logit_scale logits_scaling
""")
EXPERT_WIDTH = table("int? expert_feed_forward_length moe_intermediate_size")


def kv_heads(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Heads of keys and values."""
    return {"attention.head_count_kv": settings.kv_heads}


def head_length(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Of families whose configuration has a head_dim."""
    return {"attention.key_length": settings.head_dim, "attention.value_length": settings.head_dim}


def stated_head_length(settings: Settings, tensors: Mapping[str, View]) -> Metadata:
    """Of families whose files may have a head_dim."""
    return head_length(settings, tensors) if settings.has("head_dim") else {}


def rope(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Base and scaling of the rotation, linear or YaRN: tensors and other keys say the other kinds."""
    scaling = settings.rope()
    found: Metadata = {}

    def number(key: str, *names: str) -> None:
        for name in names:
            if scaling.get(name) is not None:
                found[f"rope.scaling.{key}"] = single(settings.checked_number(name, scaling[name], -1e6, 1e6))
                return

    match scaling["rope_type"]:
        case "linear":
            found["rope.scaling.type"] = "linear"
            found["rope.scaling.factor"] = single(settings.rope_number("factor", *FACTORS))
        case "yarn":
            found["rope.scaling.type"] = "yarn"
            found["rope.scaling.factor"] = single(settings.rope_number("factor", *FACTORS))
            found["rope.scaling.original_context_length"] = original_context(settings)
            number("yarn_ext_factor", "extrapolation_factor")
            number("yarn_attn_factor", "attention_factor", "attn_factor")
            number("yarn_beta_fast", "beta_fast")
            number("yarn_beta_slow", "beta_slow")
    return found | rope_base(settings, {})


def rope_base(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """The base of the rotation alone, and that of layers with a window where they have their own."""
    bases = {"rope.freq_base": settings.rope(), "rope.freq_base_swa": settings.local_rope()}
    return {
        key: single(settings.checked_number("rope_theta", rope["rope_theta"], 1.0))
        for key, rope in bases.items()
        if "rope_theta" in rope
    }


def original_context(settings: Settings) -> int:
    """Positions that a model was trained for before its RoPE was scaled."""
    found = settings.rope().get("original_max_position_embeddings")
    if found is None:
        return settings.integer("max_position_embeddings", min=1)
    if type(found) is not int or not 0 < found < 2**31:
        settings.refuse("original_max_position_embeddings", "a whole number", found)
    return found


def rotated_head(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Heads rotate whole."""
    return {"rope.dimension_count": settings.head_dim}


def rotated_share(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """A share of each head rotates."""
    return {"rope.dimension_count": int(settings.rotary_share * settings.head_dim)}


def gating(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """How the router's logits become weights."""
    kinds = {"softmax": 1, "sigmoid": 2}
    if not settings.has("scoring_func"):
        return {}
    settings.expect("scoring_func", tuple(kinds))
    return {"expert_gating_func": kinds[settings.text("scoring_func")]}


def rotated_share_or_dim(settings: Settings, tensors: Mapping[str, View]) -> Metadata:
    """A share of each head rotates, or as many numbers of it as rotary_dim says."""
    if "partial_rotary_factor" in settings.rope():
        return rotated_share(settings, tensors)
    return {"rope.dimension_count": settings.integer("rotary_dim", settings.head_dim, min=1)}


PLAIN: tuple[Keys, ...] = (SIZES, kv_heads)
LIKE_LLAMA: tuple[Keys, ...] = (*PLAIN, rope, EPS, EXPERTS, gating)


def no_scaling(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """A rotation without scaling, said as llama.cpp's converter says it."""
    return {"rope.scaling.type": "none"}


def local_pattern(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """The layers with a window, and it."""
    if not settings.has("sliding_window"):
        return {}
    found: Metadata = {"attention.sliding_window": settings.integer("sliding_window")}
    local = settings.is_local()
    return found if local is None else found | {"attention.sliding_window_pattern": np.array(local)}


def wide_feed_forward(names: str) -> Keys:
    """A feed-forward four times as wide as the model, where the file says no other under one of these names."""

    def keys(settings: Settings, _: Mapping[str, View]) -> Metadata:
        width = settings.integer("hidden_size n_embd", max=2**28)
        return {"feed_forward_length": settings.integer(names, 4 * width)}

    return keys


def constant(**values: Any) -> Keys:
    """Keys that the family's files have, whatever the model. Two underscores stand for a dot."""
    return lambda settings, tensors: {key.replace("__", "."): value for key, value in values.items()}
