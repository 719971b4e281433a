"""Users' functions in the choice of an id: logits processors, and a sampler in place of the draw.

What one raises, or gives that is no logits or no id, ends its own sequence: `Sequence.error`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import index
from typing import Any, TypeVar

import numpy as np

from forge.backend import Backend
from forge.config import SamplingParams
from forge.engine.sequence import Sequence
from forge.errors import ParameterError, of_user
from forge.keywords import shown
from forge.ops.sampling import candidates, divisor

T = TypeVar("T")


def processed(backend: Backend, logits: Any, sequences: list[Sequence]) -> Any:
    """Logits f32 (B, V) behind the processors of each row's sequence, in memory of their own where there are any."""
    own = [(row, sequence) for row, sequence in enumerate(sequences) if sequence.params.logits_processors]
    if not own:
        return logits
    found = backend.snapshot(logits)
    for row, sequence in own:
        _guarded(sequence, partial(_process, sequence, found[row]))
    return found


def choose(backend: Backend, sequences: list[Sequence], logits: Any, ids: Any) -> None:
    """Put what samplers give in the place of drawn ids, i32 (B,), that are not -1.

    logits: f32 (B, V) behind processors, biases and penalties.
    """
    drawn = backend.to_numpy(ids)
    for row, sequence in enumerate(sequences):
        if sequence.params.sampler is None or sequence.error or drawn[row] < 0:
            continue
        token = _guarded(sequence, partial(_sample, backend, sequence, logits[row]))
        if token is not None:
            ids[row] = token


def blame(backend: Backend, sequence: Sequence, logits: Any) -> None:
    """A sequence has no id: say so where the model's own logits (V,) would have given one."""
    if sequence.params.logits_processors and not sequence.error and np.isfinite(backend.to_numpy(logits).max()):
        names = ", ".join(map(_name, sequence.params.logits_processors))
        sequence.error = ParameterError(
            f"logits_processors left no token to draw: the greatest logit behind {names} is infinite or NaN",
            parameter="logits_processors",
            hint="leave a finite logit, and give -inf for a token that is forbidden",
        )


def _guarded(sequence: Sequence, call: Callable[[], T]) -> T | None:
    try:
        return call()
    except BaseException as error:  # an exit, too, is meant for the thread of the user
        sequence.error = of_user(error, __file__)
        return None


def _process(sequence: Sequence, row: Any) -> None:
    ids = list(sequence.ids)
    for number, function in enumerate(_functions(sequence)[:-1]):
        found = function(ids, row)
        if found is None or found is row:
            continue
        if not isinstance(found, type(row)) or found.shape != row.shape or found.dtype != row.dtype:
            raise ParameterError(
                f"logits_processors[{number}] ({_name(function)}) gave {_shown(found)}, and the logits are "
                f"{_shown(row)}",
                parameter="logits_processors",
                hint="return what is like them, or None after a change in place",
            )
        row[...] = found


def _sample(backend: Backend, sequence: Sequence, row: Any) -> int:
    sampler, params = _functions(sequence)[-1], sequence.params
    key = np.array([sequence.seed, sequence.choice << 32 | len(sequence.ids)], np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    found = sampler(list(sequence.ids), _limited(backend, row, params), random)
    try:
        found = backend.to_numpy(found).item() if getattr(found, "shape", None) == () else found  # as argmax gives it
        token = -1 if isinstance(found, bool | np.bool_) else index(found)
    except TypeError:
        token = -1
    if not 0 <= token < len(row):
        raise ParameterError(
            f"sampler ({_name(sampler)}) gave {_shown(found)}: it must give an id, an integer from 0 to {len(row) - 1}",
            parameter="sampler",
        )
    return token


def _limited(backend: Backend, row: Any, params: SamplingParams) -> Any:
    """A row divided by the temperature, in memory of its own; -inf where `sample` could not draw."""
    temperature = params.temperature or 1.0
    scaled = row / divisor(temperature)
    if 0 < params.top_k < len(row) or params.top_p < 1.0 or params.min_p > 0.0:
        host = backend.to_numpy(row)
        ids, weights = candidates(host, temperature, min(params.top_k, len(host)), params.top_p, params.min_p)
        kept = np.flatnonzero(weights) if ids is None else ids[weights > 0]
        limited = np.full_like(host, -np.inf)
        limited[kept] = backend.to_numpy(scaled)[kept]
        scaled = backend.asarray(limited)
    return scaled


def _functions(sequence: Sequence) -> tuple[Any, ...]:
    """The choice's own functions, the sampler last: those with a method `begin` have given them for its prompt."""
    if not sequence.functions:
        prompt, given = sequence.ids[: sequence.num_prompt], sequence.params
        sequence.functions = tuple(
            one.begin(list(prompt)) if hasattr(one, "begin") else one
            for one in (*given.logits_processors, given.sampler)
        )
    return sequence.functions


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _shown(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape") and value.shape:
        return f"{type(value).__module__.partition('.')[0]} {value.dtype} {tuple(value.shape)}"
    return shown(value)
