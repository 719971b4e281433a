"""Cases of the norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from forge.devtools.cases.case import Case, normal
from forge.ops.norm import Normed
from forge.ops.op import Array, Arrays


def _cases(kind: str, *, pending: bool = False, out: str = "act") -> list[Case]:
    """Widths around wave and tile edges, one row and many, tiny and huge values."""

    def make(rows: int, width: int, scale: float) -> Callable[[np.random.Generator], Arrays]:
        def build(rng: np.random.Generator) -> Arrays:
            x = normal(rng, rows, width) * np.float32(scale)
            addend = normal(rng, rows, width) * np.float32(scale) if pending else None
            weight = 1 + 0.1 * normal(rng, width)
            bias = 1 + 0.1 * normal(rng, width) if kind == "layer" else None
            return (Normed(x, addend, weight, bias, 1e-5, kind == "rms"),)

        return build

    sizes = [(1, 1), (1, 31), (3, 64), (2, 65), (5, 576), (1, 1025), (2, 8192)]
    named = [(f"{rows}x{width}", make(rows, width, 1.0)) for rows, width in sizes]
    named += [("large values", make(2, 640, 1e5)), ("small values", make(2, 640, 1e-4))]
    prefix = f"{'pending ' * pending}{kind} {'f32 ' * (out == 'f32')}"
    return [Case(prefix + name, build, {"out": out}) for name, build in named]


def _f32(*values: float) -> Array:
    return np.array(values, np.float32)


def _by_hand(name: str, x: Array, pending: Array | None, *rest: Any, normed: list[float], stream: list[float]) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        addend = None if pending is None else pending[None].copy()
        return (Normed(x[None].copy(), addend, *rest),)

    return Case(name, make, {"out": "act"}, expected=([normed],), written=([stream],))


def _operand(rows: int, width: int, *, pending: bool) -> Callable[[np.random.Generator], Arrays]:
    return lambda rng: (normal(rng, rows, width), normal(rng, rows, width) if pending else None)


CASES = {
    "norm": [
        *_cases("rms"),
        *_cases("rms", out="f32"),
        *_cases("layer"),
        *_cases("rms", pending=True),
        *_cases("layer", pending=True),
        # 3, 4 have the mean square 12.5; with eps = 3.5 the divisor is 4
        _by_hand("rms by hand", _f32(3, 4), None, _f32(1, 2), None, 3.5, True, normed=[0.75, 2], stream=[3, 4]),
        _by_hand(
            *("pending rms by hand", _f32(1, 5), _f32(2, -1), _f32(1, 2), None, 3.5, True),
            normed=[0.75, 2],
            stream=[3, 4],
        ),
        # 1, 3 have mean 2 and variance 1; with eps = 3 the divisor is 2
        _by_hand(
            *("layer by hand", _f32(1, 3), None, _f32(1, 2), _f32(0, 10), 3.0, False), normed=[-0.5, 11], stream=[1, 3]
        ),
    ],
    "as_operand": [
        *(
            Case(f"{rows}x{width}{' pending' * pending}", _operand(rows, width, pending=pending))
            for rows, width in ((1, 31), (5, 576))
            for pending in (False, True)
        ),
        Case(
            "by hand",
            lambda _: (_f32(1, 2)[None].copy(), _f32(3, -5)[None].copy()),
            expected=([[4, -3]],),
            written=([[4, -3]],),
        ),
    ],
}
