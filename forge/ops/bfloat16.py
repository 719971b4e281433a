"""Matrices of bfloat16 on a GPU, whose kernels read float16."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op

_THREADS, _WORDS = 256, 4


@op("&words:u32[N] &beyond:i32[1]")
def bf16_to_f16(words: Array, beyond: Array) -> None:
    """Numbers of bfloat16 become float16 in place, two of each in a word. NaN stays NaN.

    beyond: Becomes 1 where one is infinite as float16.
    """
    numbers = (words.view("<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        halves = numbers.astype(np.float16)
    words[:] = halves.view(np.uint32)
    if np.isinf(halves).any():
        beyond[0] = 1


@bf16_to_f16.gpu
def _bf16_to_f16_gpu(device: GPU, words: Any, beyond: Any) -> None:
    blocks = -(-words.size // (_THREADS * _WORDS))
    device.run("bfloat16", "bf16_to_f16", blocks, words, beyond, words.size)
