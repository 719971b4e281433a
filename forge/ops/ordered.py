"""Rows of x in the orders of numbers that products of quantized matrices take them in on Hopper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forge.backend import backend_of, register
from forge.backend.gpu import GPU

ORDERS = ("parts", "halves")
"""Those of `include/x_order.hip`: without and with halves."""
_BLOCK = 256
_ROWS = 64
"""Rows that lie together."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """Rows of x (M, K).

    natural: act (M, K), the rows as they are. parts, halves: act (blocks, K / 64, 64, 64), as `include/x_order.hip` has
    them; rows past the last are undefined. None are those that nobody takes.
    """

    shape: tuple[int, int]
    natural: Any = None
    parts: Any = None
    halves: Any = None

    @property
    def _some(self) -> Any:
        return next(each for each in (self.natural, self.parts, self.halves) if each is not None)

    @property
    def dtype(self) -> Any:
        return self._some.dtype


register(Ordered, lambda ordered: backend_of(ordered._some))


def empty(device: GPU, shape: tuple[int, int], orders: Sequence[str]) -> tuple[Any, Ordered]:
    """Memory for rows (M, K) in these orders, act (orders, blocks, K / 64, 64, 64), and the rows that it will hold."""
    rows, inner = shape
    memory = device.empty((len(orders), -(-rows // _ROWS), inner // 64, _ROWS, 64), device.dtype)
    return memory, Ordered(shape, **dict(zip(orders, memory, strict=True)))


def in_orders(device: GPU, x: Any, orders: Iterable[str]) -> Ordered:
    """x, an array or `Ordered`, with all of these orders: those that are missing are made of the rows as they are."""
    ordered = x if isinstance(x, Ordered) else Ordered(x.shape, x)
    for order in orders:
        if getattr(ordered, order) is None:
            if ordered.natural is None:
                raise TypeError(f"rows of x are in another order than {order!r}, which the product takes")
            (made,), _ = empty(device, ordered.shape, [order])
            rows, inner = ordered.shape
            blocks, halves = -(-rows * inner // (16 * _BLOCK)), int(order == "halves")
            device.run("reorder_x", "reorder_x", blocks, ordered.natural, made, rows, inner, halves)
            ordered = replace(ordered, **{order: made})
    return ordered
