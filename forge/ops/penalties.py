"""The logits processors that depend on a row's text: logit bias, repetition, presence and frequency penalties."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op


@op(
    "logits:f32[B,V] counts:i32[B,V] bias:f32[B,V] repetition:f32[B] presence:f32[B] frequency:f32[B] "
    "-> penalized:f32[B,V]",
    gpu_rtol=1e-6,
    gpu_atol=1e-6,
)
def penalize(logits: Array, counts: Array, bias: Array, repetition: Array, presence: Array, frequency: Array) -> Array:
    """Logits with logit bias, repetition, presence and frequency penalties.

    counts are 0 for tokens that are not in the row's text, 1 for tokens only in its prompt, and 1 + g for tokens that
    were generated g times. Computed in float32, in this order: z = z + bias, where the bias is not 0; where there is a
    count, z = z / repetition if z > 0 else z * repetition (arXiv:1909.05858); where the token was generated,
    z = (z - presence) - frequency * g.
    """
    result = logits.copy()
    for b, t in np.ndindex(*logits.shape):
        z, generated = logits[b, t], counts[b, t] - 1
        if bias[b, t] != 0:
            z = z + bias[b, t]
        if generated >= 0:
            z = z / repetition[b] if z > 0 else z * repetition[b]
        if generated > 0:
            z = (z - presence[b]) - frequency[b] * logits.dtype.type(generated)
        result[b, t] = z
    return result


@penalize.cpu
def _penalize_cpu(
    logits: Array, counts: Array, bias: Array, repetition: Array, presence: Array, frequency: Array
) -> Array:
    result = logits.copy()
    with np.errstate(all="ignore"):  # `sample` sees what overflows
        row, token = _nonzero(bias)
        result[row, token] += bias[row, token]
        row, token = _nonzero(counts)
        z, r, generated = result[row, token], repetition[row], counts[row, token] - 1
        z = np.where(z > 0, z / r, z * r)
        penalized = (z - presence[row]) - frequency[row] * generated.astype(logits.dtype)
    result[row, token] = np.where(generated > 0, penalized, z)
    return result


def _nonzero(array: Array) -> tuple[Array, Array]:
    """Row and column of each number that is not 0. There are few: dense passes over (B, V) would take longer."""
    return np.divmod(np.flatnonzero(array != 0), array.shape[1])


@penalize.gpu
def _penalize_gpu(device: GPU, logits: Any, *changes: Any) -> Any:
    rows, vocabulary = logits.shape
    result = device.empty((rows, vocabulary), np.float32)
    device.run("penalize", "penalize", (-(-vocabulary // 256), rows), logits, *changes, result, vocabulary)
    return result
