"""Passes over prompts: logits, attention weights, embeddings. They sample nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator
from collections.abc import Sequence as Items
from contextlib import closing
from typing import get_args

import numpy as np
import numpy.typing as npt

from forge.backend import select
from forge.config import Pooling
from forge.engine import Engine
from forge.engine.passes import job_of
from forge.errors import NumericsError, OutOfMemoryError, ParameterError
from forge.hooks.attention import AttentionWeights
from forge.hooks.scope import Hooks, bound, entered
from forge.keywords import refusal
from forge.runtime.loop import EngineLoop

Positions = int | slice | Items[int] | None
"""Which positions of a prompt; None = all."""
Logits = npt.NDArray[np.float32]
_TOGETHER = 64
"""Prompts of one pass. Those of other callers come in between."""


def logits(
    loop: EngineLoop, engine: Engine, prompts: list[list[int]], positions: Positions, adapter: int
) -> list[Logits]:
    """float32 logits of some positions of each prompt, (R, V), or (V,) of one. Raises what `LLM.logits` does.

    adapter: As of `Sequence`, here and below.
    """
    for ids in prompts:
        engine.check_ids(ids)
    places = [places_of(positions, len(ids)) for ids in prompts]
    vocabulary = engine.runner.vocab_size
    count = sum(map(np.size, places))
    size, free = 4 * count * vocabulary, select("cpu").free_bytes()
    if size > free:
        of = "tokens" if positions is None else "positions"
        raise OutOfMemoryError(f"the logits of {count} {of} need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    hooks = _hooks(loop, prompts)
    found: list[Logits] = []
    for start in range(0, len(prompts), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        found += loop.run(_logits(engine, prompts[some], places[some], adapter, hooks[some]))
    return found


def _hooks(loop: EngineLoop, prompts: list[list[int]]) -> list[Hooks]:
    """The hooks of each prompt, of the blocks that the caller is in."""
    return [hooks for (hooks,) in bound(entered(loop), prompts)]


def places_of(positions: Positions, length: int) -> npt.NDArray[np.int64]:
    """The positions of a prompt that were asked for, int64 (R,), or () for one; counted from its start.

    Raises ParameterError for those that it has not.
    """
    allowed = "an integer, a slice, or a list of integers"
    try:
        if positions is None or isinstance(positions, slice):
            return np.arange(length)[positions or slice(None)]
        places = np.asarray(positions)
    except (TypeError, ValueError):
        raise refusal("positions", allowed, positions) from None
    if places.ndim > 1 or (places.size and places.dtype.kind not in "iu"):
        raise refusal("positions", allowed, positions)
    wrong = places[(places < -length) | (places >= length)] if places.size else places
    if wrong.size:
        raise ParameterError(
            f"positions holds {int(wrong.flat[0])}, and the prompt has {length} tokens", parameter="positions"
        )
    return np.where(places < 0, places + length, places).astype(np.int64)


def attention(loop: EngineLoop, engine: Engine, ids: list[int], layers: range, adapter: int) -> npt.NDArray[np.float32]:
    """Attention weights (layers, H, T, T) of some layers. Raises what `LLM.attention` does."""
    engine.check_ids(ids)
    found = AttentionWeights(engine.runner.config, layers, len(ids), select("cpu").free_bytes())
    loop.run(engine.run_blocks(ids, (*_hooks(loop, [ids])[0], found), adapter))
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
    rows, hooks = np.empty((len(prompts), engine.runner.config.width), np.float32), _hooks(loop, prompts)
    for start in range(0, len(prompts), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        rows[some] = loop.run(
            embeddings(engine, prompts[some], pooling, adapter, normalize=normalize, name=name, hooks=hooks[some])
        )
    return rows


# Run in the engine's thread


def embeddings(
    engine: Engine,
    prompts: list[list[int]],
    pooling: Pooling,
    adapter: int,
    *,
    normalize: bool,
    name: str,
    hooks: list[Hooks] | None = None,
) -> Generator[None, None, npt.NDArray[np.float32]]:
    """The embeddings (B, E) of prompts: the mean of the states of each, or the last one. name: the model's, for
    messages."""
    first = -1 if pooling == "last" else 0
    jobs = [
        job_of(ids, range(len(ids))[first:], adapter, hooks=own)
        for ids, own in zip(prompts, hooks or [()] * len(prompts), strict=True)
    ]
    totals = {job: np.zeros(engine.runner.config.width) for job in jobs}
    with closing(engine.states(jobs)) as steps:
        for part, of_jobs in steps:
            for job, _, rows in of_jobs:
                states = engine.runner.backend.to_numpy(part[rows])  # (rows, E)
                totals[job] += states.sum(axis=0, dtype=np.float64)
            yield
    found = np.stack([totals[job] / len(job.wanted) for job in jobs])
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise NumericsError(f"{name}: the embedding is not finite: the file is damaged; check or replace it")
    if normalize:
        found /= np.where(lengths, lengths, 1.0)
    return found.astype(np.float32)


def embedding(
    engine: Engine, ids: list[int], pooling: Pooling, adapter: int, *, normalize: bool, name: str
) -> Generator[None, None, npt.NDArray[np.float32]]:
    """The embedding (E,) of one prompt, as `embeddings`."""
    found = yield from embeddings(engine, [ids], pooling, adapter, normalize=normalize, name=name)
    row: npt.NDArray[np.float32] = found[0]
    return row


def _logits(
    engine: Engine,
    prompts: list[list[int]],
    places: list[npt.NDArray[np.int64]],
    adapter: int,
    hooks: list[Hooks],
) -> Generator[None, None, list[Logits]]:
    """float32 logits on the host of the places of each prompt, in their order."""
    jobs = [
        job_of(ids, np.unique(own).tolist(), adapter, hooks=its)
        for ids, own, its in zip(prompts, places, hooks, strict=True)
    ]
    found = {job: np.empty((len(job.wanted), engine.runner.vocab_size), np.float32) for job in jobs}
    with closing(engine.run_jobs([job for job in jobs if job.wanted or job.sequence.hooks])) as steps:
        for part, of_jobs in steps:
            for job, positions, rows in of_jobs:
                first = bisect_left(job.wanted, positions[0])
                found[job][first : first + len(positions)] = engine.runner.backend.to_numpy(part[rows])
            yield
    return [_taken(found[job], job.wanted, own) for job, own in zip(jobs, places, strict=True)]


def _taken(rows: Logits, wanted: Items[int], places: npt.NDArray[np.int64]) -> Logits:
    """The rows of `wanted`, which is sorted, that belong to places. No copy where these are the same."""
    if places.ndim and np.array_equal(wanted, places):
        return rows
    return np.asarray(rows[np.searchsorted(wanted, places)], np.float32)
