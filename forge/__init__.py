"""forge: LLM inference for AMD GPUs as a Python library."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # `as` says to type checkers that the name is public
    from forge.checkpoints.converting import Converted as Converted
    from forge.checkpoints.converting import convert as convert
    from forge.config import EngineConfig as EngineConfig
    from forge.config import ModelConfig as ModelConfig
    from forge.config import SamplingParams as SamplingParams
    from forge.engine import TokenLogprobs as TokenLogprobs
    from forge.engine.hooked import Where as Where
    from forge.errors import *  # noqa: F403
    from forge.hooks.cache import Cache as Cache
    from forge.hooks.cache import Captured as Captured
    from forge.llm import LLM as LLM
    from forge.loading import load as load
    from forge.loading import load_tokenizer as load_tokenizer
    from forge.memory import MemoryPlan as MemoryPlan
    from forge.memory import plan_memory as plan_memory
    from forge.models.hooks import HookPoint as HookPoint
    from forge.outputs import Chunk as Chunk
    from forge.outputs import Completion as Completion
    from forge.outputs import Perplexity as Perplexity
    from forge.outputs import Score as Score
    from forge.outputs import Timings as Timings
    from forge.runtime.state import State as State
    from forge.tokenizer import Tokenizer as Tokenizer

# Where each public name lives: it is imported when it is first used, so that `import forge` costs nothing.
_HOMES = {
    "forge.config": "EngineConfig ModelConfig SamplingParams",
    "forge.checkpoints.converting": "Converted convert",
    "forge.engine": "TokenLogprobs",
    "forge.errors": "ChatTemplateError ContextLengthError DeviceError DownloadError ForgeError FormatError "
    "ModelNotFoundError NumericsError OutOfMemoryError ParameterError RequestTimeoutError TokenizerError "
    "UnsupportedError",
    "forge.engine.hooked": "Where",
    "forge.hooks.cache": "Cache Captured",
    "forge.llm": "LLM",
    "forge.loading": "load load_tokenizer",
    "forge.memory": "MemoryPlan plan_memory",
    "forge.models.hooks": "HookPoint",
    "forge.outputs": "Chunk Completion Perplexity Score Timings",
    "forge.runtime.state": "State",
    "forge.tokenizer": "Tokenizer",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'forge' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
