"""What comes behind a layer's mixer and feed-forward: its own embedding of each token (per-layer embeddings, PLE), and
a factor of the stream."""

from __future__ import annotations

from typing import Any

from forge.models.hooks import F32, Points, Shape
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear, Norm
from forge.models.residual import ResidualStream
from forge.ops.embed import embed
from forge.ops.norm import as_operand
from forge.ops.per_layer import per_layer_gate, per_layer_inputs


class PerLayerInputs:
    """The inputs of all layers, P numbers of each for a token, as in Gemma 4 E2B and E4B.

    A table has them by the token, and a product makes as many of its embedding.
    """

    def __init__(self, tensors: LayerTensors) -> None:
        config = tensors.config
        size = config.num_layers * config.per_layer_width
        self.per_layer_token_embd = tensors.matrix("per_layer_token_embd", config.vocab_size, size)
        self.per_layer_model_proj = tensors.linear({"per_layer_model_proj": size}, config.width)
        self.per_layer_proj_norm = tensors.vector("per_layer_proj_norm", config.per_layer_width)
        self._scale = config.per_layer_width**0.5
        self._eps = config.norm_eps * config.width
        """The product is scaled by E**-0.5 before its norm, which is the same as a larger epsilon."""

    def __call__(self, ids: Any, x: Any) -> Any:
        """float32 (T, layers * P) of the embeddings x (T, E)."""
        embedded = embed(ids, self.per_layer_token_embd, self._scale)
        projected = self.per_layer_model_proj(as_operand(x, None))
        return per_layer_inputs(projected, embedded, self.per_layer_proj_norm, self._eps)


class LayerEnd:
    """The gated inputs of one layer, added to the stream, and a factor of the stream. Files have both or one."""

    def __init__(self, tensors: LayerTensors) -> None:
        config = tensors.config
        width, size = config.width, config.per_layer_width
        self.inp_gate: Linear | None = None
        if size:
            self.inp_gate = tensors.linear({"inp_gate": size}, width)
            self.proj = tensors.linear({"proj": width}, size)
            self.post_norm = Norm("rms", tensors.vector("post_norm", width), None, config.norm_eps)
        self.layer_output_scale = tensors.number("layer_output_scale") if tensors.has("layer_output_scale") else 1.0
        self._norm = Norm("rms", tensors.ones(width), None, config.norm_eps)
        self._first = tensors.index * size

    def linears(self) -> list[Linear]:
        """The layer's matrix products, in the order of their launches."""
        return [self.inp_gate, self.proj] if self.inp_gate else []

    def points(self) -> dict[str, tuple[Shape, str]]:
        """Of hooks: what is added."""
        return {"per_layer": (("T", len(self._norm.weight)), F32)} if self.inp_gate else {}

    def __call__(self, stream: ResidualStream, inputs: Any, slots: Any, points: Points | None) -> None:
        """inputs: float32 (T, layers * P) of `PerLayerInputs`, or None. slots: Of adapters, as of `Linear`."""
        if self.inp_gate:
            # The gate reads the stream itself, which is beyond float16: it is normed here, and the op undoes that.
            gate = self.inp_gate(stream.normed(self._norm), slots)  # (T, P)
            h = per_layer_gate(gate, stream.x, inputs, self._first, self._norm.eps)
            stream.add(self.proj, h, self.post_norm, slots, points, "per_layer")
        if self.layer_output_scale != 1.0:
            stream.scale(self.layer_output_scale)
