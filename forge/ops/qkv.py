"""Edits of the QKV product in place, for families whose queries and keys need more than `rope_append_kv` does."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op

_BLOCK_THREADS = 256


@op("&qkv:f32[T,N] limit:f32")
def clamp(qkv: Array, limit: float) -> None:
    """Cut all numbers to [-limit, limit], as OLMo does to queries, keys and values. Source: arXiv:2402.00838."""
    np.clip(qkv, -limit, limit, out=qkv)


@clamp.gpu
def _clamp_gpu(device: GPU, qkv: Any, limit: float) -> None:
    device.run("qkv", "clamp", -(-qkv.size // _BLOCK_THREADS), qkv, limit, qkv.size)


@op("&qkv:f32[T,Q+2*K] q_norm:f32[Q] k_norm:f32[K] eps:f32")
def rmsnorm_whole(qkv: Array, q_norm: Array, k_norm: Array, eps: float) -> None:
    """RMS norm of all query heads together, and of all key heads together, as in OLMo 2. Source: arXiv:2501.00656."""
    for part, weight in ((qkv[:, : len(q_norm)], q_norm), (qkv[:, len(q_norm) :][:, : len(k_norm)], k_norm)):
        part /= np.sqrt(np.mean(part * part, axis=1, keepdims=True) + part.dtype.type(eps))
        part *= weight


@rmsnorm_whole.gpu
def _rmsnorm_whole_gpu(device: GPU, qkv: Any, q_norm: Any, k_norm: Any, eps: float) -> None:
    device.run("qkv", "rmsnorm_whole", (len(qkv), 2), qkv, q_norm, k_norm, len(q_norm), len(k_norm), eps)


@op("&qkv:f32[T,N] cos_sin:f32[C,R,2] positions:i32[T] heads:i32 dim:i32 style=neox|interleaved")
def rotate_heads(qkv: Array, cos_sin: Array, positions: Array, heads: int, dim: int, *, style: str) -> None:
    """Rotate the first `heads` heads of `dim` numbers by position, as `rope_append_kv` does.

    For families that norm queries and keys behind the rotation. Source: arXiv:2104.09864.
    """
    pairs = cos_sin.shape[1]
    pair = np.arange(pairs)
    first, second = (pair, pair + pairs) if style == "neox" else (2 * pair, 2 * pair + 1)
    x = qkv[:, : heads * dim].reshape(len(qkv), heads, dim)
    cos, sin = np.moveaxis(cos_sin[positions], 2, 0)[:, :, None]  # (T, 1, R) each
    a, b = x[..., first], x[..., second]
    x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin
    qkv[:, : heads * dim] = x.reshape(len(qkv), -1)


@rotate_heads.gpu
def _rotate_heads_gpu(device: GPU, qkv: Any, cos_sin: Any, positions: Any, heads: int, dim: int, *, style: str) -> None:
    tokens, width = qkv.shape
    pairs = cos_sin.shape[1]
    grid = (-(-heads * pairs // _BLOCK_THREADS), tokens)
    sizes = (width, heads, dim, pairs, int(style == "interleaved"))
    device.run("qkv", "rotate_heads", grid, qkv, cos_sin, positions, *sizes)
