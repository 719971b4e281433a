"""Attention weights of whole prompts, for looking inside: what the fused kernels never write down."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import backend_of
from forge.config import ModelConfig
from forge.errors import OutOfMemoryError
from forge.models.attention import spec_of
from forge.ops.attention import attention_weights

_SCORE_BYTES = 32 << 20
"""Scores that are computed together: temporaries stay small beside the weights."""
_TEMPORARIES = 4
"""Arrays of scores that exist at once."""


class AttentionWeights:
    """A hook of a pass over one prompt: `weights` is filled layer by layer, some tokens at a time.

    weights: float32 (layers, H, T, T) on the host. Keys of earlier tokens are kept there too, (T, G, D) of each layer.
    """

    def __init__(self, config: ModelConfig, layers: range, num_tokens: int, free: int) -> None:
        """Raises OutOfMemoryError, with the numbers, where `free` bytes of the host are too few for a pass."""
        self.config, self.layers = config, layers
        shape = len(layers), config.num_heads, num_tokens, num_tokens
        kept = sum(config.layer_kv_heads[layer] * config.layer_head_dims[layer] for layer in layers), num_tokens
        row = 4 * config.num_heads * num_tokens
        size = 4 * (prod(shape) + prod(kept)) + _TEMPORARIES * max(min(_SCORE_BYTES, row * num_tokens), row)
        several = len(layers) > 1
        message = (
            f"the attention of {num_tokens} tokens in {f'{len(layers)} layers' if several else 'one layer'} needs "
            f"{size / 1e9:.2f} GB, {{}}: use a shorter prompt{' or one layer at a time' if several else ''}"
        )
        if size > free:
            raise OutOfMemoryError(message.format(f"{free / 1e9:.2f} GB are free"))
        try:
            self.weights: npt.NDArray[np.float32] = np.empty(shape, np.float32)
            self._keys = [
                np.empty((num_tokens, config.layer_kv_heads[layer], config.layer_head_dims[layer]), np.float32)
                for layer in layers
            ]
        except MemoryError:  # whatever was free when it was looked at
            raise OutOfMemoryError(message.format("the system gives less")) from None
        self._queries: Any = None
        self._sinks: Any = None
        self._done = [0] * len(layers)

    def __call__(self, name: str, array: Any) -> None:
        match name.split("."):
            case ["blk", layer, "attn_sinks"] if int(layer) in self.layers:
                self._sinks = backend_of(array).to_numpy(array)
            case ["blk", layer, "attn_q"] if int(layer) in self.layers:  # its keys come next
                self._queries = backend_of(array).to_numpy(array)
            case ["blk", layer, "attn_k"] if int(layer) in self.layers:
                self._attend(int(layer), self._queries, backend_of(array).to_numpy(array))

    def _attend(self, layer: int, q: npt.NDArray[Any], k: npt.NDArray[Any]) -> None:
        """Compute the weights of queries (t, H, D) whose keys are (t, G, D), on the host whatever the device is."""
        config, index = self.config, layer - self.layers.start
        first, end = self._done[index], self._done[index] + len(k)
        self._done[index] = end
        self._keys[index][first:end] = k
        spec = spec_of(config, layer, self._sinks)
        rows = max(_SCORE_BYTES // (4 * config.num_heads * end), 1)
        with np.errstate(all="ignore"):  # weights of a model that are not finite
            for start in range(first, end, rows):
                stop = min(start + rows, end)
                part = np.asarray(q[start - first : stop - first], np.float32)
                weights = attention_weights(part, self._keys[index][:stop], spec)  # (H, rows, stop)
                self.weights[index, :, start:stop, :stop] = weights
                self.weights[index, :, start:stop, stop:] = 0
