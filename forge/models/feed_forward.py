"""Feed-forwards: sublayers that compute each token by itself."""

from __future__ import annotations

from forge.config import Hook
from forge.models.batch import Batch
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear
from forge.models.residual import ResidualStream
from forge.ops.activation import gelu
from forge.ops.quant import Packed


class FeedForward:
    """Gated, down(activation(gate(x)) * up(x)) (arXiv:2002.05202), or plain, down(gelu(up(x))).

    Attributes that hold weights are named like the file's tensors.
    """

    def __init__(self, tensors: LayerTensors) -> None:
        config = tensors.config
        self.glu = config.activation if tensors.kind == "gated" else "none"
        self.ffn_norm = tensors.norm("ffn_norm")
        """None where the feed-forward reads the input of the mixer again."""
        matrices = ("ffn_up",) if self.glu == "none" else ("ffn_gate", "ffn_up")  # one product computes them all
        self.ffn_up = tensors.linear(dict.fromkeys(matrices, config.ffn_width), config.width, "ffn_up")
        self.ffn_down = tensors.linear({"ffn_down": config.width}, config.ffn_width)
        # Only products with quantized matrices read what a gate leaves in their orders.
        self._split_k = "allowed" if self.glu != "none" and isinstance(self.ffn_down.weight, Packed) else "never"
        self.post_ffw_norm = tensors.norm("post_ffw_norm")

    def linears(self) -> list[Linear]:
        """The layer's matrix products, in the order of their launches."""
        return [self.ffn_up, self.ffn_down]

    def __call__(self, stream: ResidualStream, batch: Batch, hook: Hook | None) -> None:
        """Add the result to the stream."""
        h = self.ffn_up(stream.normed(self.ffn_norm), glu=self.glu, split_k=self._split_k)  # (T, F)
        stream.add(self.ffn_down, gelu(h) if self.glu == "none" else h, self.post_ffw_norm)
