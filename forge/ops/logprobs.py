"""Log probabilities under the logits as the model gives them.

A row whose greatest logit is not finite has no distribution: NaN log probabilities, and the top ids 0, 1, 2 and so on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, Case, op
from forge.ops.sampling import first_ids

_INF = math.inf
_f32 = np.float32


def _log_probabilities(logits: Array, ids: Array) -> Array:
    """Log probability of each id of a row: f32[B,V], i32[B,N] -> f32[B,N]; the sum is float64."""
    greatest = logits.max(axis=1, keepdims=True)
    greatest[~np.isfinite(greatest)] = np.nan
    with np.errstate(over="ignore"):  # to -inf, a probability of 0
        sums = np.exp(logits - greatest).sum(axis=1, keepdims=True, dtype=np.float64)
        result: Array = (np.take_along_axis(logits, ids, axis=1) - (greatest + np.log(sums))).astype(logits.dtype)
    return result


def _logprobs_gpu(device: GPU, logits: Any, ids: Any) -> Any:
    rows, vocabulary = logits.shape
    values = device.empty((rows,), np.float32)
    device.run("logprobs", "logprobs", rows, logits, ids, values, vocabulary)
    return values


@op(
    "logits:f32[B,V] ids:i32[B] -> logprobs:f32[B]",
    gpu=_logprobs_gpu,
    gpu_rtol=1e-5,
    gpu_atol=1e-5,
    cases=[
        Case(
            "by hand",
            lambda _: (
                np.array([[7, 7, 7, 7], [-3, -_INF, -_INF, -_INF], [5, 5, -_INF, -_INF], [0, math.nan, 0, 0]], _f32),
                np.array([1, 0, 2, 0], np.int32),
            ),
            expected=([-math.log(4), 0.0, -_INF, math.nan],),
        ),
        Case(
            "by hand: without an id where there is a distribution",
            lambda _: (np.array([[0, 0], [3, -_INF]], _f32), np.array([-1, -1], np.int32)),
            expected=([-math.log(2), 0.0],),
        ),
        Case(
            "without an id",
            lambda _: (np.array([[0, math.nan]], _f32), np.array([-1], np.int32)),
            expected=([math.nan],),
        ),
        Case(
            "by hand: far above all others, in each lane",
            lambda _: (200 * np.eye(64, dtype=_f32), np.arange(64, dtype=np.int32)),
            expected=([0.0] * 64,),
        ),
        Case(
            "random",
            lambda rng: (rng.normal(0, 5, (3, 5000)).astype(_f32), rng.integers(0, 5000, 3).astype(np.int32)),
        ),
    ],
    bytes_moved=lambda logits, ids: logits.nbytes + 8 * len(ids),
)
def logprobs(logits: Array, ids: Array) -> Array:
    """Log probability of one token per row under the logits as given; NaN where there is no distribution.

    Of id -1, which penalties can lead to where these logits have a distribution, it is that of id 0.
    """
    return _log_probabilities(logits, np.maximum(ids, 0)[:, None])[:, 0]


def _top_logprobs_cpu(logits: Array, n: int) -> tuple[Array, Array]:
    count = min(n, logits.shape[1])
    ids = np.tile(np.arange(count, dtype=np.int32), (len(logits), 1))
    for row in np.flatnonzero(np.isfinite(logits.max(axis=1)) & (count > 0)):
        top = first_ids(logits[row], count)
        ids[row] = top[np.argsort(-logits[row, top], kind="stable")]
    return ids, _log_probabilities(logits, ids)


def _top_logprobs_gpu(device: GPU, logits: Any, n: int) -> tuple[Any, Any]:
    rows, vocabulary = logits.shape
    count = min(n, vocabulary)
    ids, values = device.empty((rows, count), np.int32), device.empty((rows, count), np.float32)
    device.run("logprobs", "top_logprobs", rows if count else 0, logits, ids, values, vocabulary, count)
    return ids, values


@op(
    "logits:f32[B,V] n:i32 -> ids:i32[B,N] values:f32[B,N]",
    gpu=_top_logprobs_gpu,
    gpu_rtol=1e-5,
    gpu_atol=1e-5,
    cases=[
        Case(
            "ties in id order; without a distribution",
            lambda _: (np.array([[-900, 0, -901, 0, -900], [0, math.nan, 0, 0, 0]], _f32), 3),
            expected=([[1, 3, 0], [0, 1, 2]], [[-math.log(2), -math.log(2), -900 - math.log(2)], [math.nan] * 3]),
        ),
        Case("none", lambda rng: (rng.normal(size=(2, 4)).astype(_f32), 0)),
        Case("more than there are", lambda rng: (rng.normal(size=(2, 4)).astype(_f32), 9)),
        Case("random", lambda rng: (rng.normal(0, 5, (3, 5000)).astype(_f32), 20)),
        Case("ties in all waves", lambda rng: (rng.normal(0, 1, (3, 5000)).round().astype(_f32), 20)),
        Case("ties in all threads", lambda rng: (rng.normal(0, 0.4, (2, 5000)).round().astype(_f32), 20)),
        Case(
            "without a distribution: infinite, of either sign",
            lambda _: (np.array([[0, _INF, 0], [-_INF] * 3], _f32), 2),
            expected=([[0, 1]] * 2, [[math.nan] * 2] * 2),
        ),
    ],
    cpu=_top_logprobs_cpu,
    bytes_moved=lambda logits, n: logits.nbytes + 8 * len(logits) * min(n, logits.shape[1]),
)
def top_logprobs(logits: Array, n: int) -> tuple[Array, Array]:
    """The N = min(n, V) most probable tokens of each row with their log probabilities, by (logit descending, id)."""
    ids = np.zeros((len(logits), min(n, logits.shape[1])), np.int32)
    for row, z in zip(ids, logits, strict=True):
        ordered = sorted(range(len(z)), key=lambda i: (-z[i], i)) if np.isfinite(z.max()) else range(len(z))
        row[:] = ordered[: len(row)]
    return ids, _log_probabilities(logits, ids)


def _pack_logprobs_gpu(device: GPU, ids: Any, values: Any, top_ids: Any, top_values: Any) -> Any:
    rows, count = top_ids.shape
    packed = device.empty((rows, 2 * count + 2), np.int32)
    device.run("logprobs", "pack_logprobs", rows, ids, values, top_ids, top_values, packed, count)
    return packed


def _pack_case(name: str, rows: int, count: int) -> Case:
    def make(rng: np.random.Generator) -> tuple[Any, ...]:
        ids, top_ids = (rng.integers(0, 999, shape).astype(np.int32) for shape in (rows, (rows, count)))
        return ids, rng.normal(size=rows).astype(_f32), top_ids, rng.normal(size=(rows, count)).astype(_f32)

    return Case(name, make)


@op(
    "ids:i32[B] values:f32[B] top_ids:i32[B,N] top_values:f32[B,N] -> packed:i32[B,2*N+2]",
    gpu=_pack_logprobs_gpu,
    cases=[
        Case(
            "by hand",
            lambda _: (
                np.array([7], np.int32),
                np.array([-2.0], _f32),
                np.array([[9, 8]], np.int32),
                np.array([[1.0, -0.0]], _f32),
            ),
            expected=([[7, 9, 8, -(1 << 30), 0x3F800000, -(1 << 31)]],),
        ),
        _pack_case("none", 3, 0),
        _pack_case("more than a block", 2, 100),
    ],
)
def pack_logprobs(ids: Array, values: Array, top_ids: Array, top_values: Array) -> Array:
    """Each row's id, its top ids, and the bits of their float32 values in the same order: one array to copy."""
    floats = np.concatenate([values[:, None], top_values], axis=1).astype(_f32)
    return np.concatenate([ids[:, None], top_ids, floats.view(np.int32)], axis=1)
