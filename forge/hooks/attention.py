"""Attention weights of one whole prompt, in one array."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.config import ModelConfig
from forge.engine.hooked import Ints, Mask, Where
from forge.engine.passes import MAX_TOKENS
from forge.errors import OutOfMemoryError


class AttentionWeights:
    """A hook of a pass over one prompt: `weights` is filled layer by layer, some tokens at a time.

    weights: float32 (layers, H, T, T) on the host.
    """

    request = 0
    recorded = None

    def __init__(self, config: ModelConfig, layers: range, num_tokens: int, free: int) -> None:
        """Raises OutOfMemoryError, with the numbers, where `free` bytes of the host are too few for a pass."""
        self._layers = layers
        self.names = frozenset(f"blk.{layer}.attn.pattern" for layer in layers)
        shape = len(layers), config.num_heads, num_tokens, num_tokens
        size = 4 * (prod(shape) + 2 * config.num_heads * num_tokens * min(num_tokens, MAX_TOKENS))
        several = len(layers) > 1
        message = (
            f"the attention of {num_tokens} tokens in {f'{len(layers)} layers' if several else 'one layer'} needs "
            f"{size / 1e9:.2f} GB, {{}}: use a shorter prompt{' or one layer at a time' if several else ''}"
        )
        if size > free:
            raise OutOfMemoryError(message.format(f"{free / 1e9:.2f} GB are free"))
        try:
            self.weights: npt.NDArray[np.float32] = np.zeros(shape, np.float32)
        except MemoryError:  # whatever was free when it was looked at
            raise OutOfMemoryError(message.format("the system gives less")) from None

    def selects(self, positions: Ints, num_prompt: int) -> Mask:
        return np.ones(len(positions), bool)

    def at(self, value: Any, where: Where) -> None:
        assert where.layer is not None
        self.weights[where.layer - self._layers.start, :, where.positions, : value.shape[2]] = value.swapaxes(0, 1)

    def end(self) -> None: ...

    def finished(self, is_whole: bool) -> None: ...
