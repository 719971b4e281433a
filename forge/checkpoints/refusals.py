"""What a config.json says and its family does not compute: refused by name. What transformers does is the measure.

transformers reads some of these in some families, ignores them in others, and fails in a few. A file that says what is
not computed is not passed over, whichever it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forge.checkpoints.family import Family
from forge.checkpoints.keys import Metadata
from forge.checkpoints.settings import Settings
from forge.errors import FormatError, UnsupportedError
from forge.formats.source import show
from forge.formats.strict_json import show_json
from forge.models.arch import ARCHS
from forge.models.family import Arch

_SHARES = ("partial_rotary_factor", "rotary_pct", "rope_pct")
_ROTATED_COUNTS = ("rotary_dim", "rotary_ndims")
"""Names by which files say how much of each head rotates."""
_OF_ALL: Mapping[str, tuple[Any, ...]] = {"is_causal": (True,), "use_bidirectional_attention": (False, "vision")}
"""Values that every family computes with. With "vision" positions of images alone see each other."""
_QKV = r"(.*\.)?(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn)\.bias"
_QK_NORM = r".*\.([qk]|query|key)_(norm|layernorm)\..*"
_WITHOUT = {
    "attention_bias": _QKV,
    "qkv_bias": _QKV,
    "use_qkv_bias": _QKV,
    "attention_out_bias": r".*\.o_proj\.bias",
    "mlp_bias": r".*\.mlp\..*\.bias",
    "bias": r".*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.bias",
    "use_bias": r".*\.(self_attn|mlp)\..*\.bias",
    "use_qk_norm": _QK_NORM,
    "qk_layernorm": _QK_NORM,
}
"""Flags that are false where a model has no such tensors: regular expressions of stored names."""
_NEEDED = ("use_qk_norm", "qk_layernorm")
"""Those that are true where it has some. A bias that is not there is zero."""


def check_read(settings: Settings, family: Family, stored: Iterable[str]) -> None:
    """Raises UnsupportedError for numbers and flags that the family's row does not read, and that say something else.

    stored: Names of the weights. Raises FormatError for flags that contradict them.
    """
    for name, values in {**_OF_ALL, **family.expects}.items():
        settings.expect(name, values)
    router = ARCHS[family.arch].router
    settings.expect("scoring_func", (router.scores,))
    if "norm_topk_prob" not in family.defaults:
        settings.expect("norm_topk_prob", (router.renormalizes,))
    local = settings.is_local() or []
    if family.local_layers == "none" and any(local):
        raise UnsupportedError(f"{settings.path}: layer_types with windows are not supported in {family.arch}")
    has_window = settings.has(family.window) and settings.stated.get("use_sliding_window") is not False
    if family.local_layers == "all" and any(local) and not all(local) and has_window:
        raise UnsupportedError(f"{settings.path}: layer_types without windows are not supported in {family.arch}")
    _check_layers(settings, family)
    _check_tensors(settings, ARCHS[family.arch], list(stored))


def _check_tensors(settings: Settings, arch: Arch, stored: Sequence[str]) -> None:
    """Raises FormatError for a flag of tensors that are there, or that are not."""
    for name, pattern in _WITHOUT.items():
        value = settings.stated.get(name)
        needs = name in _NEEDED and not arch.norms_rotated_heads  # whose norms have no weights
        if value is not False and not (value is True and needs and stored):
            continue
        found = next((tensor for tensor in stored if re.fullmatch(pattern, tensor)), None)
        if (found is not None) is not value:
            raise FormatError(f"{settings.path}: {name} = {value}, and the files have {show(found or 'no such norms')}")
    if arch.parallel == "without_ffn_norm" and stored:
        second = next((tensor for tensor in stored if ".post_attention_layernorm." in tensor), None)
        value = settings.flag("use_parallel_residual")
        if (second is None) is not value:
            problem = f"the files have {show(second or 'no second norms')}"
            raise FormatError(f"{settings.path}: use_parallel_residual = {value}, and {problem}")


def _check_layers(settings: Settings, family: Family) -> None:
    """Raises UnsupportedError for layers with numbers of their own, but for heads of Gemma 4's global layers."""
    configs = settings.object("per_layer_config")
    local = settings.is_local() or [True] * settings.layers
    of_global = {
        name: settings.of_global_layers(name, overall)
        for name, overall in (("head_dim", "global_head_dim"), ("num_key_value_heads", "num_global_key_value_heads"))
        if family.arch == "gemma4"
    }
    for layer, config in configs.items():
        is_global = layer.isdecimal() and int(layer[:9]) < len(local) and not local[int(layer[:9])]
        is_said = type(config) is dict and all(of_global.get(name) == value for name, value in config.items())
        if not (is_global and is_said):
            raise UnsupportedError(
                f"{settings.path}: per_layer_config.{layer:.20} = {show_json(config)} is not supported in {family.arch}"
            )


def check_share(keys: Metadata, settings: Settings, family: Family) -> None:
    """Raises UnsupportedError if a number says that another share of the heads rotates than is computed."""
    rope = settings.rope()
    whole = keys.get("attention.key_length", settings.head_dim)
    rotated = keys.get("rope.dimension_count", whole)
    assert isinstance(whole, int)
    shares = {name: settings.stated.get(name) for name in _SHARES}
    of_layers = {"rope_parameters": rope, "rope_parameters.sliding_attention": settings.local_rope()}
    shares |= {f"{where}.{_SHARES[0]}": found.get(_SHARES[0]) for where, found in of_layers.items()}
    if rope["rope_type"] == "proportional":  # its factors are made of the share
        shares = {name: share for name, share in shares.items() if "sliding" in name or "partial" not in name}
    counts = {name: settings.stated.get(name) for name in _ROTATED_COUNTS}
    for name, value in (shares | counts).items():
        if value is None:
            continue
        said = settings.checked_number(name, value, 0.0) * (1 if name in counts else whole)
        if int(said) != rotated:
            raise UnsupportedError(
                f"{settings.path}: {name} = {show_json(value)} is not supported: in {family.arch} {rotated} of "
                f"the {whole} numbers of a head rotate"
            )
