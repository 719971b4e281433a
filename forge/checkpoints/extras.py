"""Tensors that a file in GGUF has and a Hugging Face directory has not: what a config.json says in numbers instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from forge.checkpoints.keys import FACTORS
from forge.checkpoints.settings import Settings
from forge.checkpoints.views import Numbers, View
from forge.errors import UnsupportedError

Extra = Callable[[Settings], Mapping[str, View]]


def llama3_factors(settings: Settings) -> Mapping[str, View]:
    """Divisors of the frequencies of Llama 3.1."""
    rope = settings.rope()
    if rope["rope_type"] != "llama3":
        return {}
    factor = settings.rope_number("factor", *FACTORS)
    low = settings.rope_number("low_freq_factor", 1e-6, 1e6)
    high = settings.rope_number("high_freq_factor", 1e-6, 1e6)
    context = settings.rope_number("original_max_position_embeddings", 1.0)
    base = settings.checked_number("rope_theta", rope.get("rope_theta", 10_000.0), 1.0)
    dim = settings.head_dim
    frequencies = np.float32(1.0) / np.float32(base) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return {"rope_freqs.weight": Numbers(llama3_divisors(frequencies, factor, low, high, context))}


def llama3_divisors(
    frequencies: NDArray[np.float32], factor: float, low: float, high: float, context: float
) -> NDArray[np.float32]:
    """1 for short waves, `factor` for long ones, and between them a smooth change.

    Llama 3.1's rule, as transformers' modeling_rope_utils has it; computed in float32.
    """
    waves = np.float32(2 * np.pi) / frequencies
    with np.errstate(all="ignore"):  # of the numbers that np.where drops
        smooth = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
        between = np.float32(1.0) / ((np.float32(1.0) - smooth) / np.float32(factor) + smooth)
    factors = np.where(waves < context / high, np.float32(1.0), np.where(waves > context / low, factor, between))
    return factors.astype(np.float32)


def proportional_factors(settings: Settings) -> Mapping[str, View]:
    """Gemma 4: layers without a window rotate a share of their heads' numbers; the others have an endless wave."""
    if settings.rope()["rope_type"] != "proportional":
        raise UnsupportedError(f"{settings.path}: rope_type should be proportional in layers without a window")
    pairs = global_head_dim(settings) // 2
    rotated = int(global_head_dim(settings) * settings.rotary_share / 2)
    return {"rope_freqs.weight": Numbers([1.0] * rotated + [1e30] * (pairs - rotated))}


def global_head_dim(settings: Settings) -> int:
    """Numbers of a head in Gemma 4's layers without a window."""
    return settings.of_global_layers("head_dim", "global_head_dim")


def longrope_factors(settings: Settings) -> Mapping[str, View]:
    """Divisors of the frequencies for short and for long contexts (Phi 3)."""
    rope = settings.rope()
    if rope["rope_type"] != "longrope":
        return {}
    pairs = int(settings.rotary_share * settings.head_dim) // 2
    return {
        f"rope_factors_{length}.weight": Numbers(
            settings.numbers(f"{length}_factor", rope.get(f"{length}_factor"), pairs)
        )
        for length in ("long", "short")
    }


def norms_of_heads(settings: Settings) -> Mapping[str, View]:
    """Muse Glimmer's norms of q and k, without weights: the factor of the scores becomes those of q."""
    found: dict[str, View] = {}
    factor = settings.number("qk_scale_factor")
    for layer in range(settings.layers):
        found[f"blk.{layer}.attn_q_norm.weight"] = Numbers([factor] * settings.head_dim)
        found[f"blk.{layer}.attn_k_norm.weight"] = Numbers([1.0] * settings.head_dim)
    return found
