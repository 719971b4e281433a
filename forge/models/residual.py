"""The residual stream: every sublayer reads it through a norm and adds its result to it."""

from __future__ import annotations

from typing import Any

from forge.models.hooks import Points
from forge.models.layers import Linear, Norm
from forge.ops.activation import add, add_and_scale
from forge.ops.embed import take_rows
from forge.ops.norm import as_operand
from forge.ops.norm import norm as normalize


class ResidualStream:
    """The residual stream of T tokens, float32 (T, E).

    A result may be left pending: the next norm adds it within its own launch. All results are added here, so this is
    where a model on several devices would reduce theirs.
    """

    def __init__(self, x: Any, *, leaves_pending: bool, unit: float = 1.0) -> None:
        """leaves_pending: Products may be left pending, as split-K partials, to save the launch that sums them. unit:
        The stream is held divided by it."""
        self.x, self._unit = x, unit
        self._pending: Any = None
        self.leaves_pending = leaves_pending
        self._kept: tuple[Norm, Any] | None = None

    def normed(self, norm: Norm | None) -> Any:
        """The normalized stream as the operand of one product. The product, or its norm, adds what is pending first.

        norm: None gives the stream as it is. One whose operand is kept gives that.
        """
        if self._kept is not None and self._kept[0] is norm:
            return self._kept[1]
        pending, self._pending = self._pending, None
        return as_operand(self.x, pending) if norm is None else norm.operand(self.x, pending)

    def keep(self, norm: Norm) -> None:
        """Compute the operand of a norm now, for a product behind results that it is not to see."""
        self._kept = norm, normalize(self.normed(norm), out="act")

    def kept(self) -> Any:
        """The operand that was kept. It is kept no longer."""
        assert self._kept is not None
        operand, self._kept = self._kept[1], None
        return operand

    def add(
        self,
        linear: Linear,
        h: Any,
        post_norm: Norm | None,
        slots: Any = None,
        points: Points | None = None,
        name: str = "",
    ) -> None:
        """Add linear(h), through the post_norm if there is one, in place or by leaving it pending.

        slots: Of the rows' adapters, as of `Linear`. name: Of the point at which what is added is seen.
        """
        if post_norm is not None:
            self.leave(post_norm(linear(h, slots)), points, name)
        elif points and points.wants(name):
            self.leave(linear(h, slots), points, name)
        elif self.leaves_pending and self._kept is None:
            self.leave(linear(h, slots, split_k="allowed"))
        else:
            linear(h, slots, residual=self.x)

    def leave(self, addend: Any, points: Points | None = None, name: str = "") -> None:
        """Leave a result (T, E) pending, an array or `Partials`. name: Of the point at which it is seen."""
        if points:
            addend = points.at(name, addend, self._unit)
        if self._pending is not None:  # two results without a norm between them
            self.x = add(self.x, self._pending)
        self._pending = addend

    def scale(self, factor: float) -> None:
        """Multiply the stream, with what is pending."""
        pending, self._pending = self._pending, None
        add_and_scale(self.x, pending, factor)

    def take(self, rows: Any) -> None:
        """Reduce the stream to these rows: int32 (R,)."""
        self.x = take_rows(rows, self.x)  # (R, E)
        if self._pending is not None:
            self._pending = take_rows(rows, self._pending)

    def value(self) -> Any:
        """The stream (T, E) as it is held, with what is pending added."""
        return self.x if self._pending is None else add(self.x, self._pending)

    def show(self, points: Points | None, name: str) -> None:
        """The stream passes a point."""
        if points and points.wants(name):
            seen = self.value()
            found = points.at(name, seen, self._unit)
            if found is not seen:
                self.x, self._pending = found, None
