"""Feed-forwards: sublayers that compute each token by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forge.models.batch import Batch
from forge.models.hooks import ACT, F32, Hook, Points, Shape, points_in
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear, Norm
from forge.models.residual import ResidualStream
from forge.ops.activation import act_and_mul, gelu, gelu_erf, xielu
from forge.ops.matmul import takes_orders


class FeedForward:
    """Gated, down(activation(gate(x)) * up(x)) (arXiv:2002.05202), or plain, down(activation(up(x))).

    Attributes that hold weights are named like the file's tensors.
    """

    def __init__(self, tensors: LayerTensors, beside: Norm | None) -> None:
        """beside: The norm whose kept operand is read instead, in layers whose halves read the same stream."""
        config, self.index = tensors.config, tensors.index
        self.glu = config.activation if tensors.kind == "gated" else "none"
        self.activation = config.activation
        self.xielu = config.xielu[tensors.index] if config.xielu else ()
        self.beside = beside
        self.ffn_norm = beside or tensors.norm_before("ffn_norm")
        matrices = ("ffn_up",) if self.glu == "none" else ("ffn_gate", "ffn_up")  # one product computes them all
        width = config.layer_ffn_widths[tensors.index]
        self.ffn_up = tensors.linear(dict.fromkeys(matrices, width), config.width, "ffn_up")
        if self.ffn_norm is None:
            self.ffn_up.factor = config.stream_scale
        self.ffn_down = tensors.linear({"ffn_down": config.width}, width)
        self._split_k = "allowed" if self.glu != "none" and takes_orders(self.ffn_down.weight) else "never"
        self.post_ffw_norm = tensors.norm_behind("post_ffw_norm")

    def linears(self) -> list[Linear]:
        """The layer's matrix products, in the order of their launches."""
        return [self.ffn_up, self.ffn_down]

    def points(self) -> dict[str, tuple[Shape, str]]:
        """Of hooks: what is read, the product before its activation, what the second product reads, what is added."""
        (width, inner) = self.ffn_down.weight.shape
        stream: Shape = ("T", width)
        return {"in": (stream, ACT)} | gated_points(inner, self.glu) | {"down": (stream, F32)}

    def __call__(self, stream: ResidualStream, batch: Batch, hook: Hook | None) -> None:
        """Add the result to the stream."""
        operand = stream.kept() if self.beside else stream.normed(self.ffn_norm)
        slots, points = batch.adapters, points_in(hook, f"blk.{self.index}.ffn.")
        if points:
            operand = points.operand("in", operand, self.ffn_up.factor)
        if points and points.wants("gate", "up", "act"):
            h = gated(self.ffn_up, operand, slots, self.glu, points, activate=self.activate)
        else:
            split_k = self._split_k if slots is None else "never"  # adapters read x as it is
            h = self.ffn_up(operand, slots, glu=self.glu, split_k=split_k)  # (T, F)
            h = self.activate(h) if self.glu == "none" else h
        stream.add(self.ffn_down, h, self.post_ffw_norm, slots, points, "down")

    def activate(self, h: Any) -> Any:
        """The activation of a feed-forward without a gate: float32 (T, F) to operands."""
        match self.activation:
            case "gelu":
                return gelu(h)
            case "gelu_erf":
                return gelu_erf(h)
            case "xielu":
                return xielu(h, *self.xielu)
            case "silu":
                raise AssertionError("no family has silu in a feed-forward without a gate")


def gated_points(width: int, glu: str, prefix: str = "") -> dict[str, tuple[Shape, str]]:
    """The points of `gated`."""
    up: dict[str, tuple[Shape, str]] = {} if glu == "none" else {f"{prefix}up": (("T", width), F32)}
    return {f"{prefix}gate": (("T", width), F32), **up, f"{prefix}act": (("T", width), ACT)}


def gated(
    up: Linear,
    operand: Any,
    slots: Any,
    glu: str,
    points: Points,
    prefix: str = "",
    *,
    activate: Callable[[Any], Any] | None = None,
) -> Any:
    """The first product of a feed-forward and its activation (T, F), where hooks see both.

    activate: The activation where there is no gate.
    """
    if not points.wants(f"{prefix}gate", f"{prefix}up") and glu != "none":
        return points.at(f"{prefix}act", up(operand, slots, glu=glu))
    product = up(operand, slots)  # float32 (T, 2F) or (T, F)
    if glu == "none":
        assert activate
        return points.at(f"{prefix}act", activate(points.at(f"{prefix}gate", product)))
    width = product.shape[1] // 2
    for name, half in (("gate", slice(width)), ("up", slice(width, None))):
        seen = product[:, half]
        found = points.at(prefix + name, seen)
        if found is not seen:
            product[:, half] = found
    return points.at(f"{prefix}act", act_and_mul(product, activation=glu))
