"""From the numbers of a config.json to GGUF's keys, as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from forge.checkpoints import edits
from forge.checkpoints.settings import Settings
from forge.checkpoints.views import View
from forge.errors import UnsupportedError
from forge.formats.checkpoint import Value

Metadata = dict[str, Value]
"""By the key below the architecture's prefix; a key that begins with a dot has no prefix."""
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
    """Base and scaling of the rotation."""
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
            number("factor", "factor")
        case "yarn":
            found["rope.scaling.type"] = "yarn"
            number("factor", "factor")
            found["rope.scaling.original_context_length"] = _original_context(settings)
            number("yarn_ext_factor", "extrapolation_factor")
            number("yarn_attn_factor", "attention_factor", "attn_factor")
            number("yarn_beta_fast", "beta_fast")
            number("yarn_beta_slow", "beta_slow")
        case "longrope":
            found["rope.scaling.type"] = "longrope"
        case "default" | "llama3" | "dynamic" | "proportional":  # tensors or other keys say these
            pass
        case kind:
            raise UnsupportedError(f"{settings.path}: RoPE scaling {kind!r:.60} is not supported")
    found |= rope_base(settings, {})
    if (local := settings.local_rope()) and "rope_theta" in local:
        found["rope.freq_base_swa"] = single(settings.checked_number("rope_theta", local["rope_theta"], 1.0))
    return found


def rope_base(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """The base of the rotation alone."""
    base = settings.rope().get("rope_theta")
    return {} if base is None else {"rope.freq_base": single(settings.checked_number("rope_theta", base, 1.0))}


def _original_context(settings: Settings) -> int:
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


LIKE_LLAMA: tuple[Keys, ...] = (SIZES, kv_heads, rope, EPS, EXPERTS, gating)


def ministral(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """YaRN's multiplier and the temperature of long contexts."""
    scaling = settings.rope()
    if scaling["rope_type"] != "yarn":
        raise UnsupportedError(
            f"{settings.path}: rope_type {scaling['rope_type']!r:.60} is not supported in ministral3"
        )
    names = {
        "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
        "attention.temperature_scale": "llama_4_scaling_beta",
    }
    return {key: single(settings.checked_number(name, scaling.get(name, 0.0))) for key, name in names.items()}


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


def gemma4(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Windowed layers have heads of their own, the last layers read keys and values of earlier ones."""
    local = settings.is_local()
    if local is None:
        settings.refuse("layer_types", "a list", None)
    shared = settings.integer("num_kv_shared_layers", 0, max=settings.layers - 1)
    of_all = settings.of_global_layers("head_dim", "global_head_dim")
    found: Metadata = {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": settings.integer("hidden_size_per_layer_input", 0),
        "attention.sliding_window_pattern": np.array(local),
        "attention.key_length": of_all,
        "attention.value_length": of_all,
        "attention.key_length_swa": settings.head_dim,
        "attention.value_length_swa": settings.head_dim,
        "rope.dimension_count": of_all,
        "rope.dimension_count_swa": settings.head_dim,
    }
    if settings.has("use_double_wide_mlp") and settings.flag("use_double_wide_mlp"):
        width = settings.integer("intermediate_size", max=2**30)
        widths = [width if layer < settings.layers - shared else 2 * width for layer in range(settings.layers)]
        found["feed_forward_length"] = np.array(widths, np.int32)
    of_global = settings.of_global_layers("num_key_value_heads", "num_global_key_value_heads")
    if of_global != settings.kv_heads:
        heads = [settings.kv_heads if is_local else of_global for is_local in local]
        found["attention.head_count_kv"] = np.array(heads, np.int32)
    return found


def llama4(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Chunks, and queries that grow with the position in layers that are not rotated."""
    number, found = settings.integer, Metadata()
    found["feed_forward_length"] = number("intermediate_size_mlp")
    found["expert_feed_forward_length"] = number("intermediate_size")
    found["interleave_moe_layer_step"] = number("interleave_moe_layer_step", 1)
    local = settings.is_local()
    if local is not None and not any(local):
        return found | {"attention.sliding_window": 0}
    found["attention.sliding_window"] = number("attention_chunk_size", 8192)
    if settings.values.get("attn_temperature_tuning", True):  # the first files say 4
        scale = settings.number("attn_scale", 0.1)
        found |= {
            "attention.temperature_length": number("floor_scale", 8192),
            "attention.temperature_scale": single(scale),
        }
    else:
        found["attention.temperature_scale"] = 0.0
    return found


def ernie_experts(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """ERNIE's experts, and the layers that have them."""
    width = settings.integer("moe_intermediate_size", max=2**20)
    shared = settings.integer("moe_num_shared_experts", 0, max=2**10)
    if 0 <= settings.integer("moe_layer_end_index", -1, min=-1) < settings.layers - 1:
        raise UnsupportedError(f"{settings.path}: dense layers behind those with experts are not supported")
    found: Metadata = {
        "expert_count": settings.integer("moe_num_experts"),
        "expert_used_count": settings.integer("moe_k"),
        "interleave_moe_layer_step": settings.integer("moe_layer_interval", 1),
        "leading_dense_block_count": settings.integer("moe_layer_start_index", 0),
        "expert_shared_count": shared,
    }
    return found | ({"expert_shared_feed_forward_length": width * shared} if shared else {})


def shared_width(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Numbers of Granite's shared expert; 0 = there is none."""
    width = settings.integer("shared_intermediate_size", 0)
    return {"expert_shared_feed_forward_length": width} if width else {}


def glm4_experts(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """GLM's experts, and its layers of multi-token prediction."""
    prediction = settings.integer("num_nextn_predict_layers", 0, max=settings.layers)
    return {
        "block_count": settings.layers + prediction,
        "expert_shared_count": settings.integer("n_shared_experts", 0),
        "leading_dense_block_count": settings.integer("first_k_dense_replace", 0),
        "expert_gating_func": 2,
        "expert_weights_scale": single(settings.number("routed_scaling_factor", 1.0)),
        "expert_weights_norm": settings.flag("norm_topk_prob", True),
        "nextn_predict_layers": prediction,
    }


def hunyuan(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """A base of the rotation that grows with alpha, by the rule that is called NTK-aware."""
    scaling = settings.rope()
    if scaling["rope_type"] != "dynamic":
        return {}
    alpha = settings.checked_number("alpha", scaling.get("alpha", 50.0), 1.0, 1e6)
    base = settings.checked_number("rope_theta", scaling.get("rope_theta", 10_000.0), 1.0, 1e9)
    dim = max(settings.head_dim, 4)
    return {
        "rope.freq_base": single(base * alpha ** (dim / (dim - 2))),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": 256 * 1024,
        "context_length": 256 * 1024,
    }


def xielu(settings: Settings, tensors: Mapping[str, View]) -> Metadata:
    """Numbers of each layer's activation, which are tensors of one number."""
    found: Metadata = {}
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        views = [tensors.get(f"layers.{layer}.mlp.act_fn.{name}") for layer in range(settings.layers)]
        if all(view is not None and view.shape == (1,) for view in views):
            values = [view.floats()[0] for view in views if view is not None]
            found[f".xielu.{name}"] = np.array(values, np.float32)
    return found


def phi3_scaling(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Factors of the frequencies, by which the magnitude grows, too."""
    trained, original = settings.integer("max_position_embeddings", min=2), _original_context(settings)
    found: Metadata = {
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": settings.integer("sliding_window", 0),
    }
    scaling = settings.rope()
    if scaling["rope_type"] == "longrope":
        growth = math.log(max(trained / original, 1.0)) / math.log(max(original, 2))
        stated = scaling.get("attention_factor", math.sqrt(1 + growth))
        found["rope.scaling.attn_factor"] = single(settings.checked_number("attention_factor", stated))
    return found


def wide_feed_forward(names: str) -> Keys:
    """A feed-forward four times as wide as the model, where the file says no other under one of these names."""

    def keys(settings: Settings, _: Mapping[str, View]) -> Metadata:
        width = settings.integer("hidden_size n_embd", max=2**28)
        return {"feed_forward_length": settings.integer(names, 4 * width)}

    return keys


def falcon_heads(settings: Settings, _: Mapping[str, View]) -> Metadata:
    """Heads of keys: one, or as many as config.json says."""
    return {"attention.head_count_kv": edits.falcon_groups(settings), "tensor_data_layout": "jploski"}


def constant(**values: Any) -> Keys:
    """Keys that the family's files have, whatever the model. Two underscores stand for a dot."""
    return lambda settings, tensors: {key.replace("__", "."): value for key, value in values.items()}
