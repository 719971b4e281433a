"""Rotary frequencies and their cos/sin tables."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from forge.config import RopeConfig


def frequencies(rope: RopeConfig) -> npt.NDArray[np.float64]:
    """(R,) radians per position of each of the dim/2 pairs. RopeConfig names the sources."""
    pair = np.arange(rope.dim // 2)
    plain = rope.base ** (-2.0 * pair / rope.dim)
    if rope.yarn_original_context is not None:
        # Pairs that turn more than beta_fast times within the trained context keep their frequency, those that turn
        # less than beta_slow times are interpolated, and a ramp joins the two.
        def pair_of(turns: float) -> float:
            context = rope.yarn_original_context or 1
            return rope.dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

        low = max(math.floor(pair_of(rope.yarn_beta_fast)), 0)
        high = min(math.ceil(pair_of(rope.yarn_beta_slow)), rope.dim - 1)
        interpolated = np.clip((pair - low) / max(high - low, 0.001), 0.0, 1.0)
        plain *= interpolated * rope.frequency_scale + (1.0 - interpolated)
    else:
        plain *= rope.frequency_scale
    return plain if rope.factors is None else plain / np.array(rope.factors)


def tables(rope: RopeConfig, positions: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(positions, R) cos and sin, times the magnitude, computed in float64."""
    angles = np.arange(positions)[:, None] * frequencies(rope)
    return (np.cos(angles) * rope.magnitude).astype(np.float32), (np.sin(angles) * rope.magnitude).astype(np.float32)
