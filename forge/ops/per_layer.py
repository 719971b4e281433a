"""Embeddings of each layer's own, as in Gemma 3n and Gemma 4's small models: P numbers a layer for each token."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.activation import gelu
from forge.ops.op import Array, op

_BLOCK_THREADS = 256


@op("projected:f32[T,X] embedded:f32[T,X] weight:f32[P] eps:f32 -> y:f32[T,X]")
def per_layer_inputs(projected: Array, embedded: Array, weight: Array, eps: float) -> Array:
    """(RMS norm of each layer's projected numbers + the embedded ones) / sqrt(2), for all layers: X = layers * P."""
    x = projected.reshape(len(projected), -1, len(weight))  # (T, layers, P)
    normed = x / np.sqrt(np.mean(x * x, axis=2, keepdims=True) + x.dtype.type(eps)) * weight
    return (normed.reshape(projected.shape) + embedded) * projected.dtype.type(np.sqrt(0.5))


@per_layer_inputs.gpu
def _per_layer_inputs_gpu(device: GPU, projected: Any, embedded: Any, weight: Any, eps: float) -> Any:
    y = device.empty(projected.shape, np.float32)
    size = len(weight)
    groups = projected.size // size
    blocks = -(-groups // (_BLOCK_THREADS // device.wave_size))
    device.run("per_layer", "per_layer_inputs", blocks, projected, embedded, weight, y, groups, size, eps)
    return y


@op("gate:f32[T,P] x:f32[T,E] inputs:f32[T,X] first:i32 eps:f32 -> y:act[T,P]")
def per_layer_gate(gate: Array, x: Array, inputs: Array, first: int, eps: float) -> Array:
    """GELU of the gate times a layer's inputs, which begin with number `first` of a row.

    The gate is a product of x / sqrt(mean(x**2) + eps), because x may be beyond float16: the root is given back here.
    """
    root = np.sqrt(np.mean(x * x, axis=1, keepdims=True) + x.dtype.type(eps))
    return np.asarray(gelu.reference(gate * root) * inputs[:, first : first + gate.shape[1]])


@per_layer_gate.gpu
def _per_layer_gate_gpu(device: GPU, gate: Any, x: Any, inputs: Any, first: int, eps: float) -> Any:
    rows, size = gate.shape
    y = device.empty(gate.shape, device.dtype)
    sizes = size, x.shape[1], inputs.shape[1], first, eps
    device.run("per_layer", "per_layer_gate", rows, gate, x, inputs, y, *sizes)
    return y
