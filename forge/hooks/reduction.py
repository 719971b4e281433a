"""What is kept of values where they themselves would be too much."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from math import prod
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.engine.hooked import PATTERN, Ints, Where
from forge.errors import ParameterError
from forge.hooks.numbers import numbers
from forge.keywords import check_integer, refusal, shown
from forge.models.hooks import HookPoint

Array = npt.NDArray[Any]
Found = dict[str, tuple[Ints, Array]]
"""By what is appended to a point's name: positions and their rows."""
Reduction = Callable[[Array, Where, dict[str, Any]], Found]
"""From float32 rows (N, ...), what they belong to, and what is known of a request so far, by point."""
_ALLOWED = "'mean', 'norm', ('project', vectors), ('top_k', encoder, bias, k), a function, or None"


def reduction_of(wanted: Any, points: list[HookPoint]) -> Reduction | None:
    """A reduction of what a user gives, for these points. Raises ParameterError for what it cannot be.

    - "mean": (...) over all positions, kept as (1, ...) of the last one. - "norm": (N,) L2 norms of rows.
    - ("project", vectors (M, E)): (N, M) products with them.
    - ("top_k", encoder (E, M), bias (M,) or None, k): the k greatest of relu(x @ encoder + bias), (N, k), and which
      they are as ``.indices``, int32 (N, k): the features of a sparse autoencoder that are active.
    - a function of (rows, where) that gives an array with as many rows.
    """
    if wanted is None:
        return None
    if any(point.name.endswith(PATTERN) for point in points) and not callable(wanted):
        raise ParameterError("reduce: attention weights have no rows of numbers: give a function", parameter="reduce")
    if callable(wanted):
        return _by_function(wanted)
    kind, *given = wanted if isinstance(wanted, tuple | list) and wanted else (wanted,)
    if not isinstance(kind, str):
        raise refusal("reduce", _ALLOWED, wanted)
    if wanted == "mean":
        return _mean
    if wanted == "norm":
        return lambda rows, where, _: {"": (where.positions, np.linalg.norm(rows.reshape(len(rows), -1), axis=1))}
    if kind == "project" and len(given) == 1:
        vectors = numbers("reduce", given[0])
        _check(vectors, 1, points)
        return lambda rows, where, _: {"": (where.positions, rows.reshape(len(rows), -1) @ vectors.T)}
    if kind == "top_k" and len(given) == 3:
        return _top_k(given[0], given[1], given[2], points)
    raise refusal("reduce", _ALLOWED, wanted)


def settings_of(wanted: Any) -> Any:
    """What tells a reduction, which is one, from others, as JSON: of arrays a hash. Functions are all alike."""
    if callable(wanted):
        return "function"
    if not isinstance(wanted, tuple | list):
        return wanted
    return [one if one is None or isinstance(one, str | Integral) else _hash(one) for one in map(_plain, wanted)]


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Integral) else value


def _hash(array: Any) -> str:
    found = numbers("reduce", array)
    return sha256(repr(found.shape).encode() + found.tobytes()).hexdigest()


def _check(matrix: Array, axis: int, points: list[HookPoint]) -> None:
    """Raises ParameterError unless a matrix takes the rows of all points."""
    for point in points:
        size = prod(int(one) for one in point.shape[1:])
        if matrix.ndim != 2 or matrix.shape[axis] != size:
            wanted = f"(M, {size})" if axis else f"({size}, M)"
            message = f"reduce: the matrix has the shape {matrix.shape}, and {point.name} takes {wanted}"
            raise ParameterError(message, parameter="reduce")


def _mean(rows: Array, where: Where, state: dict[str, Any]) -> Found:
    """Positions that are computed again, as happens where memory was short, count once."""
    seen, total = state.get(where.name, (np.zeros(0, np.int64), np.zeros(rows.shape[1:])))
    is_new = ~np.isin(where.positions, seen)
    seen, total = np.concatenate([seen, where.positions[is_new]]), total + rows[is_new].sum(axis=0, dtype=np.float64)
    state[where.name] = seen, total
    return {"": (np.zeros(1, np.int64), (total / max(len(seen), 1))[None].astype(np.float32))}


def _top_k(encoder: Any, bias: Any, k: Any, points: list[HookPoint]) -> Reduction:
    matrix = numbers("reduce", encoder)
    _check(matrix, 0, points)
    check_integer("reduce's k", k, 1, matrix.shape[1])
    offset = np.zeros(matrix.shape[1], np.float32) if bias is None else numbers("reduce", bias)
    if offset.shape != matrix.shape[1:]:
        message = f"reduce: the bias has the shape {offset.shape}, and the encoder takes {matrix.shape[1:]}"
        raise ParameterError(message, parameter="reduce")

    def reduce(rows: Array, where: Where, _: dict[str, Any]) -> Found:
        active = np.maximum(rows.reshape(len(rows), -1) @ matrix + offset, 0)
        best = np.argsort(-active, axis=1, kind="stable")[:, :k].astype(np.int32)
        values = np.take_along_axis(active, best, axis=1)
        return {"": (where.positions, values), ".indices": (where.positions, best)}

    return reduce


def _by_function(function: Callable[[Array, Where], Any]) -> Reduction:
    def reduce(rows: Array, where: Where, _: dict[str, Any]) -> Found:
        found = _kept(function(rows, where), where)
        if found.ndim == 0 or len(found) != len(where.positions):
            raise ParameterError(
                f"reduce: the function gives the shape {found.shape} for {len(where.positions)} positions of "
                f"{where.name}: it must give a row for each",
                parameter="reduce",
            )
        return {"": (where.positions, found)}

    return reduce


def _kept(given: Any, where: Where) -> Array:
    """What a function gives, as what files can hold: floating point numbers as they are, others as int32."""
    try:
        found = np.asarray(given)
        if found.dtype.kind == "f":
            return found
        if found.dtype.kind in "iub" and (not found.size or -(1 << 31) <= found.min() <= found.max() < 1 << 31):
            return found.astype(np.int32)
    except (TypeError, ValueError):
        pass
    message = f"reduce: the function gives no floats or integers of int32 for {where.name}: {shown(given)}"
    raise ParameterError(message, parameter="reduce")
