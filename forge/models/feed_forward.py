"""Feed-forwards: sublayers that compute each token by itself."""

from __future__ import annotations

from typing import Any

from forge.config import Hook
from forge.models.batch import Batch
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear, Norm
from forge.models.residual import ResidualStream
from forge.ops.activation import gelu, gelu_erf, xielu
from forge.ops.matmul import takes_orders


class FeedForward:
    """Gated, down(activation(gate(x)) * up(x)) (arXiv:2002.05202), or plain, down(activation(up(x))).

    Attributes that hold weights are named like the file's tensors.
    """

    def __init__(self, tensors: LayerTensors, beside: Norm | None) -> None:
        """beside: The norm whose kept operand is read instead, in layers whose halves read the same stream."""
        config = tensors.config
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

    def __call__(self, stream: ResidualStream, batch: Batch, hook: Hook | None) -> None:
        """Add the result to the stream."""
        operand = stream.kept() if self.beside else stream.normed(self.ffn_norm)
        slots = batch.adapters
        split_k = self._split_k if slots is None else "never"  # adapters read x as it is
        h = self.ffn_up(operand, slots, glu=self.glu, split_k=split_k)  # (T, F)
        stream.add(self.ffn_down, self.activate(h) if self.glu == "none" else h, self.post_ffw_norm, slots)

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
