"""Copies of pages of the KV cache, and of single slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, Arrays, Case, op

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
    cases=[
        _case("odd sizes", 3, 4, 3, 1, 5),
        _case("odd sizes, more than a block", 2, 3, 17, 1, 135),
        _case("whole vectors", 2, 5, 16, 2, 64),
        _case("whole vectors, not whole blocks", 2, 3, 64, 1, 80),
    ],
)
def copy_page(k_pages: Array, v_pages: Array, source: int, target: int) -> None:
    """Page `target` becomes a copy of page `source` in all layers: a forked sequence gets its own last page."""
    k_pages[:, target] = k_pages[:, source]
    v_pages[:, target] = v_pages[:, source]


def _take_slots_gpu(device: GPU, slots: Any, pages: Any) -> Any:
    y = device.empty((len(slots), *pages.shape[2:]), device.dtype)
    device.run("pages", "take_slots", len(slots), slots, pages, y, pages[0, 0].size)
    return y


@op(
    "slots:i32[T] pages:act[N,P,G,D] -> y:act[T,G,D]",
    gpu=_take_slots_gpu,
    cases=[
        Case(
            "some, one twice",
            lambda rng: (np.array([5, 0, 11, 5], np.int32), rng.standard_normal((4, 3, 3, 100)).astype(np.float32)),
        ),
        Case(
            "by hand",
            lambda rng: (np.array([3, 1], np.int32), np.arange(4, dtype=np.float32).reshape(2, 2, 1, 1)),
            expected=([[[3]], [[1]]],),
        ),
    ],
)
def take_slots(slots: Array, pages: Array) -> Array:
    """The keys (or values) of some tokens in one layer, by their slots: page * P + offset."""
    return np.asarray(pages.reshape(-1, *pages.shape[2:])[slots])
