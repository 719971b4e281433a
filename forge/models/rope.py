"""Rotary embeddings: frequencies, and tables of cos and sin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.config import RopeConfig


def frequencies(rope: RopeConfig) -> npt.NDArray[np.float64]:
    """(R,) radians per position of each of the dim/2 pairs; without rotation of one pair, which stands still.

    RopeConfig names the sources.
    """
    if not rope.dim:
        return np.zeros(1)  # not empty: kernels load a pair before they know whether it rotates
    pair = np.arange(rope.dim // 2)
    plain = rope.base ** (-2.0 * pair / rope.dim)
    if rope.yarn_betas is not None:
        # Pairs that turn more than beta_fast times within the trained context keep their frequency, those that turn
        # less than beta_slow times are interpolated, and a ramp joins the two.
        def pair_of(turns: float) -> float:
            return rope.dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

        fast, slow = rope.yarn_betas
        first, last = pair_of(fast), pair_of(slow)
        low = max(math.floor(first) if rope.yarn_rounds else first, 0)
        high = min(math.ceil(last) if rope.yarn_rounds else last, rope.dim - 1)
        interpolated = np.clip((pair - low) / max(high - low, 0.001), 0.0, 1.0)
        plain *= interpolated * rope.frequency_scale + (1.0 - interpolated)
    else:
        plain *= rope.frequency_scale
    return plain if rope.factors is None else plain / np.array(rope.factors)


class RotaryEmbedding:
    """A rotary embedding and its tables by position, float32 on the model's device.

    cos_sin: (positions, R, 2), cos and sin of each pair's angle, times the magnitude.
    query_scale: (positions,) factors of the queries, or None.
    """

    def __init__(self, config: RopeConfig, backend: Backend) -> None:
        self.config, self._backend = config, backend
        self.cos_sin: Any = None
        self.query_scale: Any = None

    def compute(self, positions: int) -> None:
        """Compute the tables of positions 0 to `positions` - 1, in float64, and keep them as float32."""
        rope, position = self.config, np.arange(positions)
        with np.errstate(all="ignore"):  # a file's numbers may be beyond float32: the logits say so
            angles = position[:, None] * frequencies(rope)
            cos_sin = (np.stack([np.cos(angles), np.sin(angles)], axis=-1) * rope.magnitude).astype(np.float32)
            if rope.query_growth:
                scale = (
                    1 + rope.query_growth * np.log(1 + (position + rope.query_offset) // rope.original_context)
                ).astype(np.float32)
                self.query_scale = self._backend.asarray(scale)
        self.cos_sin = self._backend.asarray(cos_sin)
