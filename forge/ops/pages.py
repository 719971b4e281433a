"""Whole-page operations on the KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.op import Array, Arrays, Case, op

_BLOCK = 256


def _case(name: str, *shape: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        k, v = rng.standard_normal((2, *shape)).astype(np.float32)
        return k, v, 1, shape[1] - 1

    return Case(name, make)


def _copy_page_gpu(device: GPU, k_pages: Any, v_pages: Any, source: int, target: int) -> None:
    layers, pages = k_pages.shape[:2]
    size = k_pages[0, 0].size
    grid = (-(-size // (8 * _BLOCK)), layers, 2)
    device.run("pages", "copy_page", grid, k_pages, v_pages, source, target, pages, size)


@op(
    "&k_pages:act[L,N,P,G,D] &v_pages:act[L,N,P,G,D] source:i32 target:i32",
    gpu=_copy_page_gpu,
    cases=[_case("odd sizes", 3, 4, 3, 1, 5), _case("whole vectors", 2, 5, 16, 2, 64)],
)
def copy_page(k_pages: Array, v_pages: Array, source: int, target: int) -> None:
    """Page `target` becomes a copy of page `source` in all layers: a forked sequence gets its own last page."""
    k_pages[:, target] = k_pages[:, source]
    v_pages[:, target] = v_pages[:, source]
