"""Log probabilities under the logits as the model gives them.

A row whose greatest logit is not finite has no distribution: NaN log probabilities, and the top ids 0, 1, 2 and so on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op
from forge.ops.sampling import first_ids

_ROWS = 4
"""Of logits whose sums NumPy computes together."""


@op("logits:f32[B,V] ids:i32[B] n:i32 -> top_ids:i32[B,N] values:f32[B,N]", gpu_rtol=1e-5, gpu_atol=1e-5)
def logprobs(logits: Array, ids: Array, n: int) -> tuple[Array, Array]:
    """Each row's id and its min(n, V) most probable ids by (logit descending, id), with their log probabilities.

    The value of id -1 is the log probability of id 0. `sample` draws -1 where penalties leave no distribution, and
    these logits, without the penalties, may have one.
    """
    top = np.zeros((len(logits), min(n, logits.shape[1])), np.int32)
    for row, z in zip(top, logits, strict=True):
        ordered = sorted(range(len(z)), key=lambda i: (-z[i], i)) if np.isfinite(z.max()) else range(len(z))
        row[:] = ordered[: len(row)]
    return _with_values(logits, ids, top)


@logprobs.cpu
def _logprobs_cpu(logits: Array, ids: Array, n: int) -> tuple[Array, Array]:
    count = min(n, logits.shape[1])
    if count == 1:  # the first of equal ones; 0 where the greatest is NaN or infinite
        best = np.where(np.isfinite(logits.max(axis=1)), logits.argmax(axis=1), 0)
        return _with_values(logits, ids, best[:, None].astype(np.int32))
    top = np.tile(np.arange(count, dtype=np.int32), (len(logits), 1))  # (B, n)
    for row in np.flatnonzero(np.isfinite(logits.max(axis=1)) & (count > 0)):
        first = first_ids(logits[row], count)
        top[row] = first[np.argsort(-logits[row, first], kind="stable")]
    return _with_values(logits, ids, top)


@logprobs.gpu
def _logprobs_gpu(device: GPU, logits: Any, ids: Any, n: int) -> tuple[Any, Any]:
    rows, vocabulary = logits.shape
    count = min(n, vocabulary)
    top_ids, values = device.empty((rows, count + 1), np.int32), device.empty((rows, count + 1), np.float32)
    device.run("logprobs", "logprobs", rows, logits, ids, top_ids, values, vocabulary, count)
    return top_ids, values


def _with_values(logits: Array, ids: Array, top: Array) -> tuple[Array, Array]:
    """Log probability of each id of a row: f32[B,V], i32[B], i32[B,n] -> i32[B,n+1], f32[B,n+1]. The sum is float64."""
    top_ids = np.concatenate([ids[:, None], top], axis=1)
    greatest = logits.max(axis=1, keepdims=True)
    greatest[~np.isfinite(greatest)] = np.nan
    with np.errstate(over="ignore"):  # to -inf, a probability of 0
        sums = np.empty((len(logits), 1))
        for row in range(0, len(logits), _ROWS):  # their differences stay in the cache
            part = slice(row, row + _ROWS)
            powers = logits[part] - greatest[part]
            np.exp(powers, out=powers).sum(axis=1, keepdims=True, dtype=np.float64, out=sums[part])
        asked = np.take_along_axis(logits, np.maximum(top_ids, 0), axis=1)
        values: Array = (asked - (greatest + np.log(sums))).astype(logits.dtype)
    return top_ids, values


@op("ids:i32[B,N] values:f32[B,N] -> packed:i32[B,2*N]")
def pack_logprobs(ids: Array, values: Array) -> Array:
    """Each row's ids, then the bits of their float32 values: one array to copy."""
    return np.concatenate([ids, values.astype(np.float32).view(np.int32)], axis=1)


@pack_logprobs.gpu
def _pack_logprobs_gpu(device: GPU, ids: Any, values: Any) -> Any:
    rows, count = ids.shape
    packed = device.empty((rows, 2 * count), np.int32)
    device.run("logprobs", "pack_logprobs", rows, ids, values, packed, count)
    return packed
