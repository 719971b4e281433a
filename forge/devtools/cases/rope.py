"""Cases of rotary position embedding and of LayerNorm of heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.devtools.cases.case import Case, normal
from forge.ops.kv_cache import KVPages
from forge.ops.op import Array, Arrays
from forge.ops.rope import RopeArgs


def random_rope(
    rng: np.random.Generator,
    rows: int,
    heads: tuple[int, int],
    dim: int,
    positions: int,
    rotated: int,
    *,
    extras: bool,
    values_are_keys: bool = False,
    rest: int = 0,
) -> tuple[Array, RopeArgs]:
    """A random QKV product and what is done to it, with biases, norms and query scales if `extras`.

    Values that are the keys are normed, too.
    """
    num_heads, num_kv_heads = heads
    width = (num_heads + (1 if values_are_keys else 2) * num_kv_heads) * dim + rest
    angles = normal(rng, positions, rotated // 2) * 3
    return normal(rng, rows, width), RopeArgs(
        bias=normal(rng, width) if extras else None,
        q_norm=1 + 0.1 * normal(rng, dim) if extras else None,
        k_norm=1 + 0.1 * normal(rng, dim) if extras else None,
        cos_sin=np.stack([np.cos(angles), np.sin(angles)], axis=-1),
        query_scale=1 + rng.random(positions).astype(np.float32) if extras else None,
        eps=1e-6,
        v_norm=1 + 0.1 * normal(rng, dim) if values_are_keys else None,
        values_are_keys=values_are_keys,
        rest=rest,
    )


def _case(name: str, tokens: int, heads: tuple[int, int], dim: int, rotated: int, style: str, **options: Any) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        pages, page_size, positions = 5, 4, 40
        cache = normal(rng, 2, pages, page_size, heads[1], dim)
        return (
            *random_rope(rng, tokens, heads, dim, positions, rotated, **options),
            rng.integers(0, positions, tokens).astype(np.int32),
            rng.permutation(pages * page_size)[:tokens].astype(np.int32),
            KVPages(*cache),
        )

    return Case(name, make, {"style": style})


def _queries(name: str, tokens: int, heads: int, dim: int, style: str, *, extras: bool) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        product, rope = random_rope(rng, tokens, (heads, 0), dim, 40, dim, extras=extras)
        return product.reshape(tokens, heads, dim), rope, rng.integers(0, 40, tokens).astype(np.int32)

    return Case(name, make, {"style": style})


def _by_hand(style: str, q: list[float]) -> Case:
    """A quarter turn at position 1: each pair (a, b) becomes (-b, a)."""

    def make(rng: np.random.Generator) -> Arrays:
        qkv = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]], np.float32)
        cos_sin = np.array([[[1, 0], [1, 0]], [[0, 1], [0, 1]]], np.float32)
        kv = KVPages(*np.zeros((2, 1, 2, 1, 4), np.float32))
        return qkv, RopeArgs(None, None, None, cos_sin, None, 0.0), np.array([1], np.int32), np.array([0], np.int32), kv

    return Case(f"{style} by hand", make, {"style": style}, expected=([[q]],))


_SHAPES: list[tuple[str, int, tuple[int, int], int, int]] = [
    ("one token", 1, (1, 1), 4, 4),
    ("grouped", 3, (6, 2), 64, 64),
    ("partial", 7, (2, 2), 80, 32),
    ("all slots", 20, (46, 2), 32, 32),
]


def _normed_case(name: str, tokens: int, heads: tuple[int, int], dim: int, scale: float = 1.0) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        num_heads, num_kv_heads = heads
        product = normal(rng, tokens, (num_heads + 2 * num_kv_heads) * dim) * np.float32(scale) + np.float32(3 * scale)
        return product, 1 + 0.1 * normal(rng, num_heads, dim), 1 + 0.1 * normal(rng, num_kv_heads, dim), 1e-5

    return Case(name, make)


CASES = {
    "rope_append_kv": [
        *(
            _case(f"{style} {name}{' bias norm' * extras}", tokens, heads, dim, rotated, style, extras=extras)
            for style in ("neox", "interleaved")
            for name, tokens, heads, dim, rotated in _SHAPES
            for extras in (False, True)
        ),
        _case("values are keys", 5, (6, 2), 64, 64, "neox", extras=True, values_are_keys=True),
        _case("values are keys, heads of 512", 3, (4, 1), 512, 512, "neox", extras=False, values_are_keys=True),
        _case("interleaved, a gate behind the values", 3, (4, 2), 36, 20, "interleaved", extras=True, rest=150),
        _by_hand("neox", [-3, -4, 1, 2]),
        _by_hand("interleaved", [-2, 1, -4, 3]),
    ],
    "rope_queries": [
        _queries("neox", 20, 6, 64, "neox", extras=True),
        _queries("interleaved, one of 36 numbers", 1, 1, 36, "interleaved", extras=False),
    ],
    "layernorm_heads": [
        _normed_case("one token", 1, (1, 1), 4),
        _normed_case("grouped", 3, (6, 2), 64),
        _normed_case("many heads", 5, (32, 8), 160),
        _normed_case("odd sizes", 20, (5, 1), 36),
        _normed_case("large values", 2, (2, 2), 80, 1e4),
        # q (1, 3) and k (5, 1): means 2 and 3, deviations 1 and 2. v stays.
        Case(
            "by hand",
            lambda rng: (*(np.array(x, np.float32) for x in ([[1, 3, 5, 1, 7, 9]], [[2, 3]], [[10, 20]])), 0.0),
            written=([[-2, 3, 10, -20, 7, 9]],),
        ),
    ],
}
