"""The residual stream: what every layer reads, normalized, and adds its result to."""

from __future__ import annotations

from typing import Any

from forge.models.layers import Linear, Norm
from forge.ops.activation import add
from forge.ops.embed import take_rows
from forge.ops.norm import norm as normalize


class ResidualStream:
    """The residual stream of a step's T tokens, float32 (T, E).

    A result that a norm follows may be left pending: the launch of that norm adds it. This is the one place where
    results are added, so a model on several devices would reduce its partial results here.
    """

    def __init__(self, x: Any, *, leaves_pending: bool) -> None:
        """leaves_pending: products leave their results to the norms behind them where that saves a launch."""
        self.x = x
        self._pending: Any = None
        self._leaves_pending = leaves_pending
        self._kept: Any = None

    def normed(self, norm: Norm | None, *, keep: bool = False) -> Any:
        """The operand of a product: the normalized stream, to which what is pending is added first.

        The operand is used once. keep: the feed-forward reads it too, as what a norm of None gives.
        """
        if norm is None:
            operand, self._kept = self._kept, None
            return operand
        operand, self._pending = norm.operand(self.x, self._pending), None
        if not keep:
            return operand
        self._kept = normalize(operand, out="act")
        return self._kept

    def add(self, linear: Linear, h: Any, post_norm: Norm | None) -> None:
        """Add linear(h), normalized if there is a post_norm, in place or by leaving it pending."""
        if post_norm is not None:
            self._leave(post_norm(linear(h)))
        elif self._leaves_pending and self._kept is None:
            self._leave(linear(h, split_k="allowed"))
        else:
            linear(h, residual=self.x)

    def _leave(self, addend: Any) -> None:
        if self._pending is not None:  # no norm came between two results
            self.x = add(self.x, self._pending)
        self._pending = addend

    def take(self, rows: Any) -> None:
        """Keep these rows, int32 (R,), alone."""
        self.x = take_rows(rows, self.x)  # (R, E)
        if self._pending is not None:
            self._pending = take_rows(rows, self._pending)

    def value(self) -> Any:
        """The stream with what is pending, for hooks."""
        return self.x if self._pending is None else add(self.x, self._pending)
