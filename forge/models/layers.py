"""Linear, Embedding and Norm: weights and the op that uses them. They know no model."""

from __future__ import annotations

from typing import Any

from forge.config import Activation, NormKind
from forge.ops.embed import embed
from forge.ops.linear import linear, linear_sliced
from forge.ops.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm
from forge.ops.project import linear_gated, rms_gated, rms_linear


class Linear:
    """weight: (N, K), float or QuantTensor; bias: float32 (N,) or None."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Any, bias: Any = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Any, residual: Any = None) -> Any:
        """(M, K) -> float32 (M, N); with a residual (M, N), added to it in place."""
        return linear(x, self.weight, self.bias, residual)

    def sliced(self, x: Any) -> Any:
        """(M, K) -> float32 (M, N), or what it is the sum of, for an op that adds it as it reads it."""
        return linear_sliced(x, self.weight, self.bias)

    def product(self, x: Any, norm: Norm, delta: Any = None, *, sliced: bool = False) -> Any:
        """The product with the normalized residual stream (T, E) alone, for an op that adds the bias itself.

        With `sliced` that op also adds what the product may be the sum of.
        """
        if norm.is_rms and delta is None and (len(x) == 1 or not sliced):
            return rms_linear(x, norm.weight, norm.eps, self.weight)
        h = norm(x, delta)
        return linear_sliced(h, self.weight, None) if sliced else linear(h, self.weight, None, None)

    def gated(self, x: Any, norm: Norm | None, delta: Any = None, *, activation: Activation) -> Any:
        """(T, F) activation(gate) * up, for a product, of gate and up (T, 2F) of the normalized residual stream.

        Without a norm, x is normalized.
        """
        if norm is not None and norm.is_rms and delta is None:
            return rms_gated(x, norm.weight, norm.eps, self.weight, self.bias, activation=activation)
        h = x if norm is None else norm(x, delta)
        return linear_gated(h, self.weight, self.bias, activation=activation)


class Embedding:
    """weight: (V, E), float or QuantTensor."""

    __slots__ = ("scale", "weight")

    def __init__(self, weight: Any, scale: float) -> None:
        self.weight, self.scale = weight, scale

    def __call__(self, ids: Any) -> Any:
        """int32 (T,) -> float32 (T, E)."""
        return embed(ids, self.weight, self.scale)


class Norm:
    """weight: float32 (E,); bias: float32 (E,) or None, for LayerNorm only."""

    __slots__ = ("bias", "eps", "is_rms", "weight")

    def __init__(self, kind: NormKind, weight: Any, bias: Any, eps: float) -> None:
        self.is_rms = kind == "rms"
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Any, delta: Any = None) -> Any:
        """(T, E) normalized, for a product; a delta (T, E) is first added to x in place."""
        if self.is_rms and delta is None:
            return rmsnorm(x, self.weight, self.eps, out="act")
        if self.is_rms:
            return add_rmsnorm(x, delta, self.weight, self.eps)
        if delta is None:
            return layernorm(x, self.weight, self.bias, self.eps)
        return add_layernorm(x, delta, self.weight, self.bias, self.eps)

    def of_residual(self, x: Any) -> Any:
        """(T, E) RMS-normalized in float32, for the residual stream: Gemma's norms behind its products."""
        return rmsnorm(x, self.weight, self.eps, out="f32")
