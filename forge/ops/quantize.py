"""Weights of a file to ggml's blocks, on the device to which they are loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.formats.ggml import GGMLType, row_bytes
from forge.formats.quantize import fill, is_sound
from forge.ops.op import Array, op
from forge.ops.quant import split

_BLOCK = 128
TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4 Q4_K Q5_K Q6_K"


_CHOICES = f"stored=F32|F16|BF16 type={'|'.join(TYPES.split())}"


@op(f"source:u8[R,S] {_CHOICES} -> blocks:u8[R,B]")
def quantize(source: Array, *, stored: str, type: str) -> Array:
    """Blocks of rows that are stored as float32, float16 or bfloat16: all are bytes, as in a file.

    `formats.quantize` has the rule of each type, and says which blocks have weights that are not finite, or too large.
    """
    cols = source.shape[1] // GGMLType[stored].type_size
    blocks = np.empty((len(source), row_bytes(GGMLType[type], cols)), np.uint8)
    fill(source, GGMLType[stored], GGMLType[type], blocks)
    return blocks


@quantize.gpu
def _quantize_gpu(device: GPU, source: Any, *, stored: str, type: str) -> Any:
    rows, cols = source.shape[0], source.shape[1] // GGMLType[stored].type_size
    blocks = device.empty((rows, row_bytes(GGMLType[type], cols)), np.uint8)
    _run(device, "quantize", source, stored, type, blocks)
    return blocks


@op(f"source:u8[R,S] &quants:u8[R,Q] &high?:u8[R,H] &scales?:u8[R,G] &deltas?:u8[R,D] &refused:i32[1] {_CHOICES}")
def quantize_planes(
    source: Array,
    quants: Array,
    high: Array | None,
    scales: Array | None,
    deltas: Array | None,
    refused: Array,
    *,
    stored: str,
    type: str,
) -> None:
    """As `quantize`, to the planes of `Packed`. refused: Becomes 1 where weights are not finite, or too large."""
    blocks = quantize.reference(source, stored=stored, type=type)
    split(GGMLType[type], blocks, (quants, high, scales, deltas))
    if not is_sound(blocks, GGMLType[type]):
        refused[0] = 1


@quantize_planes.gpu
def _quantize_planes_gpu(
    device: GPU,
    source: Any,
    quants: Any,
    high: Any,
    scales: Any,
    deltas: Any,
    refused: Any,
    *,
    stored: str,
    type: str,
) -> None:
    _run(device, "quantize_planes", source, stored, type, quants, high, scales, deltas, refused)


def _run(device: GPU, kernel: str, source: Any, stored: str, type: str, *results: Any) -> None:
    of, to = GGMLType[stored], GGMLType[type]
    groups = source.size // of.type_size // (16 if to is GGMLType.Q6_K else 32)
    blocks = -(-groups // _BLOCK)
    device.run("quantize", kernel, blocks, source, *results, groups, FORMAT=to.value, STORED=of.value)
