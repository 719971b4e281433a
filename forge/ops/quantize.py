"""Weights of a file to ggml's blocks, on the device to which they are loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.formats.ggml import GGMLType, row_bytes
from forge.formats.quantize import fill
from forge.ops.op import Array, op

_BLOCK = 128
TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4 Q4_K Q5_K Q6_K"


@op(f"source:u8[R,S] stored=F32|F16|BF16 type={'|'.join(TYPES.split())} -> blocks:u8[R,B]")
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
    of, to = GGMLType[stored], GGMLType[type]
    rows, cols = source.shape[0], source.shape[1] // of.type_size
    blocks = device.empty((rows, row_bytes(to, cols)), np.uint8)
    groups = rows * cols // (16 if to is GGMLType.Q6_K else 32)
    device.run("quantize", "quantize", -(-groups // _BLOCK), source, blocks, groups, FORMAT=to.value, STORED=of.value)
    return blocks
