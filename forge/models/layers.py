"""Linear and Norm: weights with the op that uses them. They know no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge.config import NormKind
from forge.ops.activation import act_and_mul, add_and_scale
from forge.ops.linear import linear
from forge.ops.lora import LowRank, lora, lora_glu
from forge.ops.matmul import Partials
from forge.ops.norm import Normed, norm


class Linear:
    """weight: (N, K), float or QuantTensor; bias: float32 (N,) or None.

    is_deterministic: A row's result does not depend on the rows beside it. factor: Of the product, which then has no
    bias. parts: The file's tensors that it multiplies by, and their rows. adapters: What rows may add to it.
    """

    __slots__ = ("adapters", "bias", "factor", "is_deterministic", "parts", "weight")

    def __init__(
        self, weight: Any, bias: Any = None, *, is_deterministic: bool = False, parts: Mapping[str, int] | None = None
    ) -> None:
        self.weight, self.bias, self.is_deterministic = weight, bias, is_deterministic
        self.parts = parts or {}
        self.factor = 1.0
        self.adapters: LowRank | None = None

    def __call__(
        self, operand: Any, slots: Any = None, *, residual: Any = None, glu: str = "none", split_k: str = "never"
    ) -> Any:
        """The product with an operand (M, K): float32 (M, N), or with glu (M, N / 2) in the precision of operands.

        operand: An array, `Normed`, or, without slots, `Ordered`.
        slots: int32 (M,), as `Batch.adapters`. None = no row has an adapter: the launches are those without any.
        residual: float32 (M, N). The product is added to it in place.
        glu: silu or gelu: The first half of the product is a gate, and the result is activation(gate) * up.
        split_k: "allowed": The result may be `Partials`, which the reader sums; with glu `Ordered`, for a product with
        a quantized matrix.
        """
        if slots is not None and self.adapters is not None:
            split_k = split_k if glu == "none" and self.factor == 1.0 else "never"
            return self._adapted(operand, slots, self.adapters, residual, glu, self._order(split_k))
        if self.factor != 1.0:
            assert self.bias is None
            assert residual is None
            y = linear(
                operand, self.weight, None, None, glu="none", split_k="fixed" if self.is_deterministic else "never"
            )
            add_and_scale(y, None, self.factor)
            return y if glu == "none" else act_and_mul(y, activation=glu)
        return linear(operand, self.weight, self.bias, residual, glu=glu, split_k=self._order(split_k))

    def _order(self, split_k: str) -> str:
        """`split_k` of the op `linear`."""
        if self.is_deterministic:
            return "fixed_allowed" if split_k == "allowed" else "fixed"
        return split_k

    def _adapted(self, operand: Any, slots: Any, adapters: LowRank, residual: Any, glu: str, split_k: str) -> Any:
        """The product, what the rows' adapters add to it, to its first partial if it is split, and only then the
        activation."""
        x = norm(operand, out="act") if isinstance(operand, Normed) else operand  # which both read
        is_one_op = glu != "none" and self.factor == 1.0
        if is_one_op and self.is_deterministic:
            split_k = "fixed_glu"  # rows without an adapter have the bits that they have in a step without any
        y = linear(x, self.weight, self.bias, residual, glu="none", split_k=split_k)
        order = "fixed" if self.is_deterministic else "any"
        if is_one_op:
            return lora_glu(x, slots, adapters, y, order=order, activation=glu)
        lora(x, slots, adapters, y.parts[0] if isinstance(y, Partials) else y, order=order)
        if self.factor != 1.0:
            add_and_scale(y, None, self.factor)
        return y if glu == "none" else act_and_mul(y, activation=glu)


class Norm:
    """weight: float32 (E,); bias: float32 (E,) or None, for layer norms only."""

    __slots__ = ("bias", "eps", "is_rms", "weight")

    def __init__(self, kind: NormKind, weight: Any, bias: Any, eps: float) -> None:
        self.is_rms = kind == "rms"
        self.weight, self.bias, self.eps = weight, bias, eps

    def operand(self, x: Any, pending: Any = None) -> Normed:
        """x (T, E), normalized, as the operand of a product. What is pending (T, E) is first added to x in place."""
        return Normed(x, pending, self.weight, self.bias, self.eps, self.is_rms)

    def __call__(self, x: Any) -> Any:
        """x (T, E), normalized, in float32. Gemma's norms after its products give this to the residual stream."""
        return norm(self.operand(x), out="f32")
