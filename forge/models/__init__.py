"""Model families: from a file to a Decoder."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf, log2

import numpy as np

from forge.backend import Backend
from forge.config import ModelConfig, Progress
from forge.formats.checkpoint import Checkpoint
from forge.models.adapters import adapter_bytes, attach
from forge.models.arch import ARCHS
from forge.models.decoder import Decoder
from forge.models.fingerprint import fingerprints
from forge.models.hparams import read_config
from forge.models.weights import Weights, expert_bytes, kept_bytes, kept_type, staging_bytes

__all__ = [
    "Decoder",
    "adapter_bytes",
    "attach",
    "build",
    "expert_bytes",
    "fingerprints",
    "kept_bytes",
    "kept_type",
    "read_config",
    "staging_bytes",
]

_MOST = 60_000.0
"""What the results of all layers may add up to: the rest of float16's 65,504 is the embedding's."""


def build(
    file: Checkpoint,
    config: ModelConfig,
    backend: Backend,
    progress: Progress | None = None,
    weights_of: type[Weights] = Weights,
    *,
    is_deterministic: bool = False,
    cpu_experts: int = 0,
) -> Decoder:
    """Load the weights of an open file.

    weights_of: How tensors become arrays. is_deterministic, cpu_experts: As of `EngineConfig`.

    Raises FormatError for a tensor that is missing, misshapen or has no place, UnsupportedError for a tensor type.
    """
    if ARCHS[config.arch].reads_stream and backend.dtype == np.float16:
        config = replace(config, stream_scale=stream_scale(file, config))
    stored_layers = file.get_int(f"{config.arch}.block_count")
    with weights_of(file, backend, range(config.num_layers, stored_layers), progress, cpu_experts) as weights:
        decoder = Decoder(weights, config, backend, is_deterministic=is_deterministic)
    file.check_path()
    return decoder


def stream_scale(file: Checkpoint, config: ModelConfig) -> float:
    """The least power of two that the residual stream, of results that are normed, has to be divided by to be within
    float16. It is exact: what reads the stream is linear or a norm.

    A result with the weights w is within sqrt(E) * |w|, and what is added up is within the sum of that.
    A missing or misshapen norm is left out, for loading says so; where a weight is not finite the scale is 1.
    """
    most = np.zeros(config.width)
    for layer in range(config.num_layers):
        for name in (f"blk.{layer}.{norm}.weight" for norm in ("post_attention_norm", "post_ffw_norm")):
            if name in file.tensors and file.tensors[name].shape == most.shape:  # loading says what is wrong
                most += np.abs(file.load(name))
    bound = config.width**0.5 * float(most.max())
    return 2.0 ** max(ceil(log2(bound / _MOST)), 0) if _MOST < bound < inf else 1.0
