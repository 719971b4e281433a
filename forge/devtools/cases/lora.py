"""Cases of low-rank adapters."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, normal
from forge.ops.lora import LowRank
from forge.ops.op import Arrays

_SLOTS = 3


def lora_case(
    name: str,
    slots: list[int],
    inner: int,
    parts: tuple[int, ...],
    rank: int = 8,
    *,
    options: dict[str, str] | None = None,
) -> Case:
    """slots: Of the rows. parts: Rows of each matrix. options: Further choices."""

    def make(rng: np.random.Generator) -> Arrays:
        outer = sum(parts)
        starts = np.cumsum([0, *parts[:-1]]).astype(np.int32)
        a = normal(rng, _SLOTS, len(parts) * rank, inner) * np.float32(inner**-0.5)
        b = normal(rng, _SLOTS, outer, rank) * np.float32(rank**-0.5)
        adapters = LowRank(a, b, (1 + rng.random(_SLOTS)).astype(np.float32), starts)
        return normal(rng, len(slots), inner), np.array(slots, np.int32), adapters, normal(rng, len(slots), outer)

    return Case(name, make, {"order": "any", **(options or {})})


def _by_hand() -> Case:
    """Two matrices of one row each. A of slot 1 sums x for the first and negates its last number for the second."""
    a = np.zeros((2, 16, 2), np.float32)
    a[1, 0], a[1, 8], a[0] = 1, (0, -1), 7
    b = np.zeros((2, 2, 8), np.float32)
    b[1, 0, 0], b[1, 1, 0], b[0] = 2, 3, 5
    adapters = LowRank(a, b, np.array([9, 0.5], np.float32), np.array([0, 1], np.int32))
    x = np.array([[3, 4], [3, 4]], np.float32)
    y = np.full((2, 2), 10, np.float32)
    # 10 + 0.5 * 2 * (3 + 4), 10 + 0.5 * 3 * -4; the other row has no adapter
    return Case(
        "by hand",
        lambda _: (x.copy(), np.array([-1, 1], np.int32), adapters, y.copy()),
        {"order": "any"},
        written=(np.array([[10, 10], [17, 4]], np.float32),),
    )


CASES = {
    "lora": [
        _by_hand(),
        lora_case("one row", [2], 72, (33,)),
        lora_case("rows without", [-1, 0, -1, 2, 2], 1100 * 8, (40, 8, 8), 16),
        lora_case("none has one", [-1, -1, -1], 64, (64,)),
        lora_case("no vectors", [1, 0, 1], 37, (300, 5)),
        lora_case("some rows", [*[1] * 9, -1, *[0, 2] * 6], 64, (44, 300), 16),
        lora_case("many rows", [*[0] * 11, -1, *[1] * 30, *[2, 0, 1] * 9], 136, (260, 12), 24),
        lora_case("fixed", [*[0] * 30, -1, *[1] * 40], 64, (70,), options={"order": "fixed"}),
    ],
    "lora_glu": [
        *(
            lora_case(f"{activation} {name}", slots, inner, (width, width), rank, options={"activation": activation})
            for activation in ("silu", "gelu")
            for name, slots, inner, width, rank in (
                ("one row", [1], 64, 260, 8),
                ("some rows", [*[1] * 9, -1, *[0, 2] * 6], 72, 33, 16),
                ("many rows", [*[0] * 11, -1, *[1] * 30, *[2, 0, 1] * 9], 64, 20, 8),
            )
        ),
        lora_case("silu of one matrix", [0, -1, 1], 64, (64,), options={"activation": "silu"}),
        Case(
            "by hand",
            lambda _: (
                np.ones((2, 2), np.float32),
                np.array([-1, 0], np.int32),
                LowRank(
                    np.ones((1, 16, 2), np.float32),
                    np.ones((1, 2, 8), np.float32),
                    np.array([0.5], np.float32),
                    np.array([0, 1], np.int32),
                ),
                np.array([[100, 3], [92, -4]], np.float32),
            ),
            {"order": "any", "activation": "silu"},
            # silu(100) is 100; gate and up of the other row grow by 0.5 * 8 * 2
            expected=(np.array([[300], [400]], np.float32),),
        ),
    ],
}
