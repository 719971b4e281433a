"""Linear, Embedding and Norm: weights and the op that uses them. They know no model."""

from __future__ import annotations

from dataclasses import dataclass
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

    def __call__(
        self, operand: Any, *, glu: Activation | None = None, residual: Any = None, split_k: bool = False
    ) -> Any:
        """The product with an operand (M, K), an array or `Normed`: float32 (M, N).

        glu: the product is a gate and what it gates; the result is activation(gate) * up, (M, N / 2), for a product.
        residual: (M, N), to which the product is added in place. split_k: the caller takes the product as split-K
        partials, if it is computed so.
        """
        if isinstance(operand, Normed):
            norm = operand.norm
            if norm.is_rms and operand.pending is None:
                if glu:
                    return rms_gated(operand.x, norm.weight, norm.eps, self.weight, self.bias, activation=glu)
                if self.bias is None and residual is None and (len(operand.x) == 1 or not split_k):
                    return rms_linear(operand.x, norm.weight, norm.eps, self.weight)
            operand = operand.array()
        if glu:
            return linear_gated(operand, self.weight, self.bias, activation=glu)
        if split_k:
            return linear_sliced(operand, self.weight, self.bias)
        return linear(operand, self.weight, self.bias, residual)


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

    def of_residual(self, x: Any) -> Any:
        """(T, E) RMS-normalized in float32, for the residual stream: Gemma's norms behind its products."""
        return rmsnorm(x, self.weight, self.eps, out="f32")


@dataclass(frozen=True, slots=True)
class Normed:
    """A normalized residual stream (T, E) as the operand of a product, which may compute the norm itself.

    x: float32 (T, E). pending: (T, E), which is added to x in place before; None = nothing is.
    """

    x: Any
    pending: Any
    norm: Norm

    def array(self) -> Any:
        """(T, E) in the precision of products."""
        x, pending, norm = self.x, self.pending, self.norm
        if norm.is_rms:
            if pending is None:
                return rmsnorm(x, norm.weight, norm.eps, out="act")
            return add_rmsnorm(x, pending, norm.weight, norm.eps)
        if pending is None:
            return layernorm(x, norm.weight, norm.bias, norm.eps)
        return add_layernorm(x, pending, norm.weight, norm.bias, norm.eps)
