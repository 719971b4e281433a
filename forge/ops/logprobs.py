"""Log probabilities under the logits as the model gives them.

A row whose greatest logit is not finite has no distribution: NaN log probabilities, and the top ids 0, 1, 2 and so on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op
from forge.ops.sampling import first_ids


@op("logits:f32[B,V] ids:i32[B] -> logprobs:f32[B]", gpu_rtol=1e-5, gpu_atol=1e-5)
def logprobs(logits: Array, ids: Array) -> Array:
    """Log probability of one token per row under the logits as given; NaN where there is no distribution.

    Id -1 gives the log probability of id 0. `sample` draws -1 where penalties leave no distribution, and these logits,
    without the penalties, may have one.
    """
    return _log_probabilities(logits, np.maximum(ids, 0)[:, None])[:, 0]


@logprobs.gpu
def _logprobs_gpu(device: GPU, logits: Any, ids: Any) -> Any:
    rows, vocabulary = logits.shape
    values = device.empty((rows,), np.float32)
    device.run("logprobs", "logprobs", rows, logits, ids, values, vocabulary)
    return values


@op("logits:f32[B,V] n:i32 -> ids:i32[B,N] values:f32[B,N]", gpu_rtol=1e-5, gpu_atol=1e-5)
def top_logprobs(logits: Array, n: int) -> tuple[Array, Array]:
    """The N = min(n, V) most probable tokens of each row with their log probabilities, by (logit descending, id)."""
    ids = np.zeros((len(logits), min(n, logits.shape[1])), np.int32)
    for row, z in zip(ids, logits, strict=True):
        ordered = sorted(range(len(z)), key=lambda i: (-z[i], i)) if np.isfinite(z.max()) else range(len(z))
        row[:] = ordered[: len(row)]
    return ids, _log_probabilities(logits, ids)


@top_logprobs.cpu
def _top_logprobs_cpu(logits: Array, n: int) -> tuple[Array, Array]:
    count = min(n, logits.shape[1])
    ids = np.tile(np.arange(count, dtype=np.int32), (len(logits), 1))  # (B, N)
    for row in np.flatnonzero(np.isfinite(logits.max(axis=1)) & (count > 0)):
        top = first_ids(logits[row], count)
        ids[row] = top[np.argsort(-logits[row, top], kind="stable")]
    return ids, _log_probabilities(logits, ids)


@top_logprobs.gpu
def _top_logprobs_gpu(device: GPU, logits: Any, n: int) -> tuple[Any, Any]:
    rows, vocabulary = logits.shape
    count = min(n, vocabulary)
    ids, values = device.empty((rows, count), np.int32), device.empty((rows, count), np.float32)
    device.run("logprobs", "top_logprobs", rows if count else 0, logits, ids, values, vocabulary, count)
    return ids, values


def _log_probabilities(logits: Array, ids: Array) -> Array:
    """Log probability of each id of a row: f32[B,V], i32[B,N] -> f32[B,N]. The sum is float64."""
    greatest = logits.max(axis=1, keepdims=True)
    greatest[~np.isfinite(greatest)] = np.nan
    with np.errstate(over="ignore"):  # to -inf, a probability of 0
        sums = np.exp(logits - greatest).sum(axis=1, keepdims=True, dtype=np.float64)
        result: Array = (np.take_along_axis(logits, ids, axis=1) - (greatest + np.log(sums))).astype(logits.dtype)
    return result


@op("ids:i32[B] values:f32[B] top_ids:i32[B,N] top_values:f32[B,N] -> packed:i32[B,2*N+2]")
def pack_logprobs(ids: Array, values: Array, top_ids: Array, top_values: Array) -> Array:
    """Each row's id, its top ids, and the bits of their float32 values in the same order: one array to copy."""
    floats = np.concatenate([values[:, None], top_values], axis=1).astype(np.float32)  # (B, N + 1)
    return np.concatenate([ids[:, None], top_ids, floats.view(np.int32)], axis=1)


@pack_logprobs.gpu
def _pack_logprobs_gpu(device: GPU, ids: Any, values: Any, top_ids: Any, top_values: Any) -> Any:
    rows, count = top_ids.shape
    packed = device.empty((rows, 2 * count + 2), np.int32)
    device.run("logprobs", "pack_logprobs", rows, ids, values, top_ids, top_values, packed, count)
    return packed
