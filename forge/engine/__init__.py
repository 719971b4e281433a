"""Continuous batching over a paged KV cache."""

from forge.engine.engine import Engine
from forge.engine.model_runner import ModelRunner
from forge.engine.sequence import FinishReason, Sampled, Sequence, TokenLogprobs

__all__ = ["Engine", "FinishReason", "ModelRunner", "Sampled", "Sequence", "TokenLogprobs"]
