"""Continuous batching over a paged KV cache."""

from forge.engine.engine import Engine
from forge.engine.model_runner import Runner, Sampled, TokenLogprobs
from forge.engine.sequence import FinishReason, Sequence

__all__ = ["Engine", "FinishReason", "Runner", "Sampled", "Sequence", "TokenLogprobs"]
