"""Keys of single families, as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from forge.checkpoints import edits
from forge.checkpoints.keys import Metadata, original_context, single
from forge.checkpoints.settings import Settings
from forge.checkpoints.views import View
from forge.errors import FormatError, UnsupportedError


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
    found["interleave_moe_layer_step"] = every = number("interleave_moe_layer_step", 1)
    with_experts = [layer for layer in range(settings.layers) if every and (layer + 1) % every == 0]
    settings.expect("moe_layers", (with_experts, []))
    local = settings.is_local()
    if local is not None and not any(local):
        return found | {"attention.sliding_window": 0}
    found["attention.sliding_window"] = number("attention_chunk_size", 8192)
    if settings.stated.get("attn_temperature_tuning", True):  # the first files say 4
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
    used = "moe_k num_experts_per_tok"
    settings.check_alike(used)
    found: Metadata = {
        "expert_count": settings.integer("moe_num_experts"),
        "expert_used_count": settings.integer(used),
        "interleave_moe_layer_step": settings.integer("moe_layer_interval", 1),
        "leading_dense_block_count": settings.integer("moe_layer_start_index", 0),
        "expert_shared_count": shared,
    }
    return found | ({"expert_shared_feed_forward_length": width * shared} if shared else {})


def shared_width(settings: Settings, tensors: Mapping[str, View]) -> Metadata:
    """Numbers of Granite's shared expert; 0 = there is none. Raises FormatError if the files have one then."""
    width = settings.integer("shared_intermediate_size", 0)
    if not width and any(".shared_mlp." in name for name in tensors):
        raise FormatError(f"{settings.path}: shared_intermediate_size = 0, and the files have a shared expert")
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
    alpha = settings.rope_number("alpha", 1.0, 1e6)
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
    trained, original = settings.integer("max_position_embeddings", min=2), original_context(settings)
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


def falcon_heads(settings: Settings, tensors: Mapping[str, View]) -> Metadata:
    """Heads of keys: one, or as many as config.json says. Raises FormatError for norms that it does not say."""
    is_new = settings.flag("new_decoder_architecture", False)
    norms = settings.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
    if tensors and (is_new and norms == 2) is not any(".ln_attn." in name for name in tensors):
        raise FormatError(
            f"{settings.path}: new_decoder_architecture = {is_new} with {norms} norms of a layer is not what the files "
            "have"
        )
    return {"attention.head_count_kv": edits.falcon_groups(settings), "tensor_data_layout": "jploski"}
