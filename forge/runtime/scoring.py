"""Passes over all positions of a prompt: logits, attention weights, embeddings, perplexity. They sample nothing."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from forge.backend import select
from forge.config import Pooling
from forge.engine import Engine
from forge.engine.passes import job_of
from forge.errors import NumericsError, OutOfMemoryError, ParameterError
from forge.models.attention_weights import AttentionWeights
from forge.outputs import Perplexity
from forge.runtime.loop import EngineLoop

_SCORED = 1 << 22
"""Logits whose likelihoods are computed between two steps of requests."""


def logits(loop: EngineLoop, engine: Engine, ids: list[int], adapter: int) -> npt.NDArray[np.float32]:
    """float32 logits (T, V) of all T positions. Raises what `LLM.logits` does.

    adapter: As of `Sequence`, here and below.
    """
    engine.check_ids(ids)
    vocabulary = engine.runner.vocab_size
    size, free = 4 * len(ids) * vocabulary, select("cpu").free_bytes()
    if size > free:
        raise OutOfMemoryError(
            f"the logits of {len(ids)} tokens need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )
    return loop.run(_logits(engine, ids, adapter))


def attention(loop: EngineLoop, engine: Engine, ids: list[int], layers: range, adapter: int) -> npt.NDArray[np.float32]:
    """Attention weights (layers, H, T, T) of some layers. Raises what `LLM.attention` does."""
    engine.check_ids(ids)
    found = AttentionWeights(engine.runner.config, layers, len(ids), select("cpu").free_bytes())
    loop.run(engine.run_blocks(ids, found, adapter))
    return found.weights


def embed(
    loop: EngineLoop,
    engine: Engine,
    prompts: list[list[int]],
    pooling: Pooling,
    adapter: int,
    *,
    normalize: bool,
    name: str,
) -> npt.NDArray[np.float32]:
    """Embeddings (B, E) of prompts. Raises what `LLM.embed` does."""
    if pooling not in get_args(Pooling):
        raise ParameterError(f"pooling must be 'mean' or 'last', not {pooling!r:.40}", parameter="pooling")
    for ids in prompts:
        engine.check_ids(ids)
    rows = np.empty((len(prompts), engine.runner.config.width), np.float32)
    for row, ids in zip(rows, prompts, strict=True):
        row[:] = loop.run(embedding(engine, ids, pooling, adapter, normalize=normalize, name=name))
    return rows


def perplexity(
    loop: EngineLoop, engine: Engine, chunks: list[list[int]], remainder: int, name: str, adapter: int
) -> Perplexity:
    """How well each chunk's ids are predicted, from its second one on.

    remainder: tokens that are in no chunk. name: the model's, for messages.
    """
    nll, count = 0.0, 0
    for chunk in chunks:
        for likelihood in loop.run(_score(engine, chunk, adapter)):
            nll -= likelihood
        count += len(chunk) - 1
    if not math.isfinite(nll):
        raise NumericsError(f"{name}: the logits are not finite: the file is damaged; check or replace it")
    return Perplexity(ppl=math.exp(min(nll / count, 700.0)), nll=nll / count, tokens=count, remainder=remainder)


# Run in the engine's thread


def embedding(
    engine: Engine, ids: list[int], pooling: Pooling, adapter: int, *, normalize: bool, name: str
) -> Generator[None, None, npt.NDArray[np.float32]]:
    """The embedding (E,) of a prompt: the mean of its states, or the last one. name: the model's, for messages."""
    total, row = np.zeros(engine.runner.config.width), np.zeros(0)
    with closing(engine.states([job_of(ids, range(len(ids)), adapter)])) as parts:
        for part, _ in parts:
            states = engine.runner.backend.to_numpy(part)  # (rows, E)
            row = states[-1].astype(np.float64)
            total += states.sum(axis=0, dtype=np.float64)
            yield
    found = row if pooling == "last" else total / len(ids)
    length = float(np.linalg.norm(found))
    if not math.isfinite(length):
        raise NumericsError(f"{name}: the embedding is not finite: the file is damaged; check or replace it")
    return np.asarray(found / length if normalize and length else found, np.float32)


def _logits(engine: Engine, ids: list[int], adapter: int) -> Generator[None, None, npt.NDArray[np.float32]]:
    """float32 logits (T, V) on the host."""
    out = np.empty((len(ids), engine.runner.vocab_size), np.float32)
    row = 0
    with closing(engine.logits(ids, adapter=adapter)) as parts:
        for part in parts:
            out[row : row + len(part)] = engine.runner.backend.to_numpy(part)
            row += len(part)
            yield
    return out


def _score(engine: Engine, ids: list[int], adapter: int) -> Generator[None, None, list[float]]:
    """Log likelihoods of all ids but the first one, summed over some of them at a time."""
    sums: list[float] = []
    position, rows = 1, max(_SCORED // engine.runner.vocab_size, 1)
    with closing(engine.logits(ids, adapter=adapter)) as parts:
        for part in parts:
            targets = ids[position : position + len(part)]
            logits = engine.runner.backend.to_numpy(part)[: len(targets)]
            likelihoods = np.empty(len(targets))
            for start in range(0, len(targets), rows):  # requests wait meanwhile, and a step on a GPU is shorter
                some = slice(start, start + rows)
                likelihoods[some] = _log_likelihoods(logits[some], targets[some])
                yield
            sums.append(float(likelihoods.sum()))
            position += len(part)
    return sums


def _log_likelihoods(logits: npt.NDArray[np.float32], targets: list[int]) -> npt.NDArray[np.float64]:
    """log softmax (T,) of each row of the logits (T, V) at its target, in float64."""
    with np.errstate(all="ignore"):  # the caller looks at the sum
        shifted: npt.NDArray[Any] = logits - logits.max(axis=1, keepdims=True)
        total = np.exp(shifted).sum(axis=1, dtype=np.float64)
        return np.asarray(shifted[np.arange(len(targets)), targets] - np.log(total))
