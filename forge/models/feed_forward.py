"""Feed-forwards: sublayers that compute each token by itself."""

from __future__ import annotations

from forge.config import Hook
from forge.models.batch import Batch
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear
from forge.models.residual import ResidualStream
from forge.ops.activation import gelu


class _FeedForward:
    """Weights of both kinds. Attributes that hold weights are named like the file's tensors."""

    def __init__(self, tensors: LayerTensors, up: dict[str, int]) -> None:
        """up: Rows of the matrices that read the stream. One product computes them all."""
        config = tensors.config
        self.ffn_norm = tensors.norm_or_none("ffn_norm")
        """None where the feed-forward reads the input of the mixer again."""
        self.ffn_up = tensors.linear(up, config.width, "ffn_up")
        self.ffn_down = tensors.linear({"ffn_down": config.width}, config.ffn_width)
        self.post_ffw_norm = tensors.norm_or_none("post_ffw_norm")

    def linears(self) -> list[Linear]:
        """The layer's matrix products, in the order of their launches."""
        return [self.ffn_up, self.ffn_down]


class GatedFeedForward(_FeedForward):
    """down(activation(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, tensors: LayerTensors) -> None:
        width = tensors.config.ffn_width
        super().__init__(tensors, {"ffn_gate": width, "ffn_up": width})
        self.activation = tensors.config.activation

    def __call__(self, stream: ResidualStream, batch: Batch, hook: Hook | None) -> None:
        """Add the result to the stream."""
        h = self.ffn_up(stream.normed(self.ffn_norm), glu=self.activation)  # (T, F)
        stream.add(self.ffn_down, h, self.post_ffw_norm)


class PlainFeedForward(_FeedForward):
    """down(gelu(up(x)))."""

    def __init__(self, tensors: LayerTensors) -> None:
        super().__init__(tensors, {"ffn_up": tensors.config.ffn_width})

    def __call__(self, stream: ResidualStream, batch: Batch, hook: Hook | None) -> None:
        """Add the result to the stream."""
        h = gelu(self.ffn_up(stream.normed(self.ffn_norm)))  # (T, F)
        stream.add(self.ffn_down, h, self.post_ffw_norm)
