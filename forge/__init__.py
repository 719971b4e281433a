"""forge: LLM inference for AMD GPUs as a Python library."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from forge.config import EngineConfig, ModelConfig, SamplingParams
    from forge.engine import TokenLogprobs
    from forge.errors import (
        ChatTemplateError,
        ContextLengthError,
        DeviceError,
        DownloadError,
        ForgeError,
        FormatError,
        ModelNotFoundError,
        NumericsError,
        OutOfMemoryError,
        ParameterError,
        TokenizerError,
        UnsupportedError,
    )
    from forge.llm import LLM
    from forge.loading import load, load_tokenizer
    from forge.outputs import Chunk, Completion, Perplexity, Timings
    from forge.tokenizer import Tokenizer

# Where each public name lives: it is imported when it is first used, so that `import forge` costs nothing.
_HOMES = {
    "forge.config": "EngineConfig ModelConfig SamplingParams",
    "forge.engine": "TokenLogprobs",
    "forge.errors": "ChatTemplateError ContextLengthError DeviceError DownloadError ForgeError FormatError "
    "ModelNotFoundError NumericsError OutOfMemoryError ParameterError TokenizerError UnsupportedError",
    "forge.llm": "LLM",
    "forge.loading": "load load_tokenizer",
    "forge.outputs": "Chunk Completion Perplexity Timings",
    "forge.tokenizer": "Tokenizer",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "LLM",
    "ChatTemplateError",
    "Chunk",
    "Completion",
    "ContextLengthError",
    "DeviceError",
    "DownloadError",
    "EngineConfig",
    "ForgeError",
    "FormatError",
    "ModelConfig",
    "ModelNotFoundError",
    "NumericsError",
    "OutOfMemoryError",
    "ParameterError",
    "Perplexity",
    "SamplingParams",
    "Timings",
    "TokenLogprobs",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedError",
    "load",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'forge' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
