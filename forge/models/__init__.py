"""Model families: from a file to a Decoder."""

from __future__ import annotations

from forge.backend import Backend
from forge.config import ModelConfig, Progress
from forge.formats.gguf import GGUF
from forge.models.decoder import Decoder
from forge.models.hparams import read_config
from forge.models.weights import Weights, kept_type

__all__ = ["Decoder", "build", "kept_type", "read_config"]


def build(
    file: GGUF,
    config: ModelConfig,
    backend: Backend,
    progress: Progress | None = None,
    weights_of: type[Weights] = Weights,
    *,
    is_deterministic: bool = False,
) -> Decoder:
    """Load the weights of an open file.

    weights_of: How tensors become arrays. is_deterministic: As of `EngineConfig`.

    Raises FormatError for a tensor that is missing, misshapen or has no place, UnsupportedError for a tensor type.
    """
    stored_layers = file.get_int(f"{config.arch}.block_count")
    with weights_of(file, backend, range(config.num_layers, stored_layers), progress) as weights:
        decoder = Decoder(weights, config, backend, is_deterministic=is_deterministic)
    file.check_path()
    return decoder
