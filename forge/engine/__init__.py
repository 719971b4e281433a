"""Continuous batching over a paged KV cache."""

from forge.engine.engine import Engine
from forge.engine.model_runner import ModelRunner
from forge.engine.sequence import FinishReason, Sampled, Sequence, TokenLogprobs
from forge.engine.stats import EngineStats

__all__ = ["Engine", "EngineStats", "FinishReason", "ModelRunner", "Sampled", "Sequence", "TokenLogprobs"]
