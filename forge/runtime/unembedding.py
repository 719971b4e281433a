"""Rows of the residual stream through the output's norm and product, some at a time: what a logit lens computes."""

from __future__ import annotations

from collections.abc import Generator
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forge.backend import select
from forge.engine import Engine
from forge.engine.passes import LOGIT_BYTES
from forge.errors import OutOfMemoryError, ParameterError
from forge.keywords import shown
from forge.runtime.loop import EngineLoop

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Predicted(NamedTuple):
    """What N rows of the residual stream predict."""

    ids: Ints
    """(N, K), the most probable first; of equal ones the lower id."""
    logprobs: Floats
    """(N, K) natural log probabilities. NaN where the logits are not finite."""
    of_given: Floats
    """(N,) those of an id that was given for each row."""


def rows_of(engine: Engine, residuals: Any) -> Floats:
    """Residuals as float32 (..., E) on the host. Raises ParameterError for what has another width."""
    backend, width = engine.runner.backend, engine.runner.config.width
    try:
        given = residuals if isinstance(residuals, list | tuple | np.ndarray) else backend.to_numpy(residuals)
        rows = np.asarray(given, np.float32)
    except (AttributeError, TypeError, ValueError):
        raise ParameterError(
            f"residuals must be an array (..., {width}) of numbers, not {shown(residuals)}", parameter="residuals"
        ) from None
    if not rows.ndim or rows.shape[-1] != width:
        message = f"residuals have the shape {rows.shape}, and the model's stream has (..., {width})"
        raise ParameterError(message, parameter="residuals")
    return rows


def unembed(loop: EngineLoop, engine: Engine, residuals: Any) -> Floats:
    """Logits (..., V). Raises what `LLM.unembed` does."""
    rows, vocabulary = rows_of(engine, residuals), engine.runner.vocab_size
    count = prod(rows.shape[:-1])
    size, free = 4 * count * vocabulary, select("cpu").free_bytes()
    if size > free:
        message = f"the logits of {count} rows need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise OutOfMemoryError(message, hint="give fewer rows")
    logits = np.empty((count, vocabulary), np.float32)
    loop.run(_logits(engine, rows.reshape(count, rows.shape[-1]), logits))
    return logits.reshape(*rows.shape[:-1], vocabulary)


def predicted(loop: EngineLoop, engine: Engine, rows: Floats, given: Ints, count: int) -> Predicted:
    """What rows (N, E) predict, K = min(count, V) ids each, and ids (N,) that are given. Logits are not kept."""
    num, most = len(rows), min(count, engine.runner.vocab_size)
    found = Predicted(np.empty((num, most), np.int32), np.empty((num, most), np.float32), np.empty(num, np.float32))
    loop.run(_predicted(engine, rows, given, found))
    return found


# Run in the engine's thread


def _parts(engine: Engine, count: int) -> Generator[slice, None, None]:
    """Rows whose logits are computed together. Requests' steps come in between."""
    most = max(LOGIT_BYTES // (4 * engine.runner.vocab_size), 1)
    yield from (slice(start, min(start + most, count)) for start in range(0, count, most))


def _logits(engine: Engine, rows: Floats, logits: Floats) -> Generator[None, None, None]:
    for part in _parts(engine, len(rows)):
        logits[part] = engine.runner.backend.to_numpy(engine.runner.unembed(rows[part]))
        yield


def _predicted(engine: Engine, rows: Floats, given: Ints, found: Predicted) -> Generator[None, None, None]:
    for part in _parts(engine, len(rows)):
        ids, values = engine.runner.most_probable(engine.runner.unembed(rows[part]), given[part], found.ids.shape[1])
        found.of_given[part] = values[:, 0]
        found.ids[part], found.logprobs[part] = ids[:, 1:], values[:, 1:]
        yield
