"""What transformers computes and llama.cpp's keys leave unsaid: written as keys that `models` reads, or refused.

The converter writes none of these. A key is written only where `models` would compute something else without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from forge.checkpoints import extras, family_keys
from forge.checkpoints.family import Family
from forge.checkpoints.keys import FACTORS, Metadata, rope, single
from forge.checkpoints.refusals import check_share
from forge.checkpoints.settings import Settings
from forge.errors import UnsupportedError
from forge.models.arch import ARCHS
from forge.models.family import Arch

_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "gelu_erf": ("gelu", "gelu_python"),
    "xielu": ("xielu",),
}
"""What config.json calls what `models` computes."""
_BASE = 10_000.0
"""The base of the rotation where a file names none."""
_ROPE_KINDS: Mapping[Callable[..., object], tuple[str, ...]] = {
    rope: ("linear", "yarn"),
    extras.llama3_factors: ("llama3",),
    extras.longrope_factors: ("longrope",),
    extras.proportional_factors: ("proportional",),
    family_keys.hunyuan: ("dynamic",),
}
"""What of a family's row carries out which kinds of RoPE, beside the plain one."""


def check_rope_kind(settings: Settings, family: Family) -> None:
    """Raises UnsupportedError for a kind of RoPE that nothing in the family's row carries out."""
    carried = {"default"}.union(
        *(kinds for some, kinds in _ROPE_KINDS.items() if some in (*family.keys, *family.extras))
    )
    kind = settings.rope()["rope_type"]
    if kind not in carried:
        raise UnsupportedError(
            f"{settings.path}: RoPE scaling {kind!r:.60} is not supported in {family.arch}, of "
            f"{', '.join(sorted(carried))} it is"
        )


def complete(keys: Metadata, settings: Settings, family: Family) -> None:
    """Add keys. Raises UnsupportedError for a model that the family's row in `models.arch` computes differently."""
    arch = ARCHS[family.arch]
    _check(settings, family, arch)
    check_share(keys, settings, family)
    local = _windows(keys, settings, family, arch)
    scaling = settings.rope()
    base = settings.checked_number("rope_theta", scaling.get("rope_theta", _BASE), 1.0)
    _check_rotations(settings, arch, local, base)
    if "rope.freq_base" not in keys and base != _BASE and arch.nope != "all":
        keys["rope.freq_base"] = single(base)
    if settings.local_rope().get("rope_type") not in (None, "default"):
        raise UnsupportedError(f"{settings.path}: a scaled RoPE of layers with a window is not supported")
    if scaling["rope_type"] == "yarn":
        if scaling.get("truncate", True) is not arch.yarn_rounds:
            raise UnsupportedError(f"{settings.path}: truncate = {not arch.yarn_rounds} is not supported here")
        _magnitude(keys, settings)
    if keys.get("expert_count") and "norm_topk_prob" in family.defaults and "expert_weights_norm" not in keys:
        renormalizes = settings.flag("norm_topk_prob")
        if renormalizes is not arch.router.renormalizes:
            keys["expert_weights_norm"] = renormalizes
    if family.scales_scores:
        divisor = settings.number("query_pre_attn_scalar", min=1e-6, max=1e9)
        scales_by_width = settings.layers == arch.width_scaled_layers
        known = settings.integer("hidden_size", min=1) / settings.heads if scales_by_width else settings.head_dim
        if divisor != known:
            keys["attention.scale"] = single(divisor**-0.5)


def _magnitude(keys: Metadata, settings: Settings) -> None:
    """YaRN's factor of the rotated numbers, where mscale says another one than the family's files mean."""
    scaling = settings.rope()
    if "rope.scaling.yarn_attn_factor" in keys or not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        return
    growth = 0.1 * math.log(max(settings.rope_number("factor", *FACTORS), 1.0))
    of_all = settings.checked_number("mscale_all_dim", scaling["mscale_all_dim"], 0.0, 1e3)
    magnitude = (growth * settings.checked_number("mscale", scaling["mscale"], 0.0, 1e3) + 1.0) / (
        growth * of_all + 1.0
    )
    said = (growth + 1.0) / (growth * (of_all if "rope.scaling.yarn_log_multiplier" in keys else 0.0) + 1.0)
    if magnitude != said:
        keys["rope.scaling.yarn_attn_factor"] = single(magnitude)


def _check(settings: Settings, family: Family, arch: Arch) -> None:
    if arch.norms_rotated_heads:
        experts = settings.integer("num_local_experts", 0)
        settings.expect("use_qk_norm", (arch.norms_heads_of(experts),))
    found = settings.find("hidden_activation hidden_act activation_function activation")
    known = _ACTIVATIONS[arch.activation]
    if family.arch == "gemma":  # the first Gemma's files say gelu, and mean the form by tanh
        known = (*known, "gelu")
    if found and found[1] not in known:
        settings.expect(found[0], known)


def _windows(keys: Metadata, settings: Settings, family: Family, arch: Arch) -> list[bool]:
    """Whether each layer has a window. Writes the keys for that, unless the others say the same."""
    layers = range(settings.layers)
    local = _local_layers(settings, family, arch)
    window = settings.integer(family.window) if settings.has(family.window) else 0
    if not window:
        local = [False for _ in layers]
    said, every = keys.get("attention.sliding_window", arch.default_window or 0), arch.global_every
    pattern = keys.get("attention.sliding_window_pattern")
    if not isinstance(pattern, np.ndarray):
        pattern = np.array([not every or (layer + 1) % every != 0 for layer in layers])
    said_local = [bool(said) and bool(entry) for entry in pattern]
    if local != said_local or (any(local) and said != window):
        keys["attention.sliding_window"] = window
        keys["attention.sliding_window_pattern"] = np.array(local)
    return local


def _local_layers(settings: Settings, family: Family, arch: Arch) -> list[bool]:
    layers = range(settings.layers)
    flag = "use_sliding_window"
    if flag in family.defaults and settings.has(flag) and not settings.flag(flag):
        return [False for _ in layers]
    local = settings.is_local()
    if local is not None:
        return local
    match family.local_layers:
        case "none":
            return [False for _ in layers]
        case "all":
            return [True for _ in layers]
        case "listed":
            return [layer >= settings.integer("max_window_layers") for layer in layers]
        case "unrotated":
            return [not is_rotated for is_rotated in _rotated(arch, layers)]
        case every:
            found = settings.find(family.pattern)
            if found and type(found[1]) is str and found[1]:  # EXAONE's LLLG
                return [found[1][layer % len(found[1])] == "L" for layer in layers]
            every = settings.integer(family.pattern, every, min=1) if family.pattern else every
            return [(layer + 1) % every != 0 for layer in layers]


def _rotated(arch: Arch, layers: range) -> list[int]:
    """Whether each layer rotates, where every Nth does not."""
    return [int((layer + 1) % arch.nope_every != 0) for layer in layers]


def _check_rotations(settings: Settings, arch: Arch, local: list[bool], base: float) -> None:
    """Raises UnsupportedError if other layers are rotated than in all models of the family."""
    layers = range(settings.layers)
    if arch.nope_every:
        expected = _rotated(arch, layers)
    elif arch.nope == "global" and any(local):
        expected = [int(is_local) for is_local in local]
    else:
        expected = [1] * settings.layers
    name, found = "no_rope_layers", expected
    if settings.stated.get(name) not in (None, []):  # an empty list is as none in Llama 4's files
        found = [int(bool(entry)) for entry in settings.per_layer(name)]
    elif settings.has("no_rope_layer_interval"):
        name = "no_rope_layer_interval"
        every = settings.integer(name, min=1)
        found = [int((layer + 1) % every != 0) for layer in layers]
    if found != expected:
        raise UnsupportedError(f"{settings.path}: {name} says other layers than the family's are not rotated")
    bases = [base * is_rotated for is_rotated in expected]
    if settings.has("layer_rope_theta") and settings.per_layer("layer_rope_theta") != bases:
        raise UnsupportedError(f"{settings.path}: layer_rope_theta with several bases is not supported")
