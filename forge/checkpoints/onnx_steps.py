"""The steps of norms, activations and rotations that an ONNX graph spells out: for `onnx_wiring`.

A step is known by what it is made of: the root of a variance of x plus a number divides that x and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from forge.checkpoints.onnx_parameters import Constants
from forge.formats.onnx import Node

Roles = frozenset[str]
Terms = frozenset[str | int]
FUSED_ACTIVATIONS = ("QuickGelu", "Swish", "FastGelu", "Gelu", "BiasGelu")
CURVES = ("Sigmoid", "Tanh", "Erf")
_CUBE = 0.044715
_CLOSE = 0.01
"""As of `onnx_operations`."""
_MOST_BETWEEN = 12
"""Operations between a table of the rotation and its cosines."""


@dataclass(frozen=True, slots=True)
class Value:
    """Numbers that come of weights.

    terms: What is added up, each a weight's result ("attn_q.0") or a number of an operation's. roles: The nearest
    weights. step: What it is, of the terms `of`. part: Of the result of joined matrices, which one. start: Where the
    last slice began; None = not known. factor: What it was multiplied by, in all; None = not known.
    """

    terms: Terms
    roles: Roles
    step: str = ""
    of: Terms = frozenset()
    part: int | None = None
    start: int | None = None
    factor: float | None = 1.0
    is_curve: bool = False
    """Of a weight: 1 plus a curve, so that half of it counts."""

    def with_step(self, step: str, of: Terms = frozenset()) -> Value:
        return replace(self, step=step, of=of)


def is_close(found: float | None, wanted: float) -> bool:
    """Whether a factor is the one that is wanted, or not known."""
    return found is None or abs(found - wanted) <= _CLOSE * abs(wanted)


_Rule = Callable[[Sequence[Value], Sequence[str]], tuple[str, Terms]]


class Steps:
    """Says of which step an operation is, by what its inputs are."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.producers = {name: node for node in constants.model.graph.walk() for name in node.outputs}

    def of(self, node: Node, inputs: Sequence[Value], others: Sequence[str]) -> tuple[str, Terms]:
        """The step that an operation is, and of what.

        inputs: Those that come of weights, in their order; others: the names of those that do not.
        """
        known: Mapping[str, _Rule] = {
            "Pow": self._pow,
            "Mul": self._mul,
            "Div": self._div,
            "Sub": self._sub,
            "Add": self._add,
        }
        first = inputs[0]
        match node.op_type, first.step:
            case ("ReduceMean", "square") if first.factor == 1.0:
                return "variance", first.of
            case ("ReduceMean", _):
                return "mean", first.terms
            case ("Sqrt", "steadied") if first.factor == 1.0:
                return "root", first.of
            case ("Reciprocal", "root"):
                return "inverse", first.of
            case ("Softmax", "masked"):
                return "softmax", first.of
            case ("Tanh", "scores"):
                return "scores", first.of
            case ("Neg", _):
                return "negated", first.terms
            case ("Sigmoid", "") if is_close(first.factor, 1.0):
                return "weight", first.terms
            case ("Tanh", "polynomial") if is_close(first.factor, (2 / math.pi) ** 0.5):
                return "curve", first.of
            case ("Erf", "") if is_close(first.factor, 0.5**0.5):
                return "curve", first.terms
            case (op, _) if op in FUSED_ACTIVATIONS:
                return "activated", first.terms
            case (op, _) if op in known and len(inputs) + len(others) == 2:
                return known[op](inputs, others)
        return "", frozenset()

    def factor_of(self, node: Node, inputs: Sequence[Value], step: str) -> float | None:
        """What the result of an operation is multiplied by, where that is known."""
        factors = [one.factor for one in inputs]
        if (
            step
            in ("square", "variance", "steadied", "root", "inverse", "normed", "weight", "curve", "softmax", "cube")
            or node.op_type == "Tanh"
        ):
            return 1.0
        if step == "polynomial":
            return next((one.factor for one in inputs if not one.step), None)
        if node.op_type == "Mul" and len(inputs) == 2:
            halved = (
                2.0 if step == "activated" and any(one.step == "weight" and one.is_curve for one in inputs) else 1.0
            )
            return None if None in factors else math.prod(factors) * halved  # type: ignore[arg-type]
        if node.op_type == "Mul" and self._is_computed(node):
            return None
        return factors[0] if len({*factors}) == 1 else None

    def _is_computed(self, node: Node) -> bool:
        """Whether a factor is made of a shape: D**-0.25."""
        return any(name in self.producers and self.producers[name].op_type == "Sqrt" for name in node.inputs)

    def concat(self, inputs: Sequence[Value]) -> tuple[str, Terms] | None:
        """A turned half behind its other one, or a rotated share of heads before the rest; None for neither."""
        if len(inputs) != 2 or inputs[0].roles != inputs[1].roles:
            return None
        first, second = inputs
        if first.step == "negated" and second.start == 0 and first.start != 0 and first.of == second.terms:
            return "turned", second.terms
        return ("rotated", first.of) if first.step == "rotated" and not second.step else None

    def _pow(self, inputs: Sequence[Value], others: Sequence[str]) -> tuple[str, Terms]:
        power = self.constants.value(others[0]) if len(others) == 1 else None
        steps = {2.0: "square", 3.0: "cube"}
        return (steps[power], inputs[0].terms) if power in steps else ("", frozenset())

    def _mul(self, inputs: Sequence[Value], others: Sequence[str]) -> tuple[str, Terms]:
        if len(inputs) == 1:
            return self._by_table(inputs[0], others[0])
        for one, other in (inputs, inputs[::-1]):
            if other.step == "inverse" and one.terms == other.of:
                return "normed", one.of if one.step == "centred" else one.terms
            if other.step == "weight" and one.terms == other.of:
                return "activated", one.terms
            if other.step in ("square", "square and 1") and one.terms == other.of and not one.step:
                return ("cube" if other.step == "square" else "polynomial"), one.terms
        first, second = inputs
        if first.terms == second.terms and first.step == second.step and not first.step:
            return "square", first.terms
        for one, other in (inputs, inputs[::-1]):
            if one.step == "activated" and other.step in ("", "normed"):
                return "activated", one.of
        return "", frozenset()

    def _by_table(self, one: Value, table: str) -> tuple[str, Terms]:
        """Times the cosines, or, turned, times the sines."""
        if table in self.producers and self.producers[table].op_type == "Sqrt":
            return one.step, one.of
        kind = self._kind_of(table)
        if one.step == "turned":
            return ("by_sines", one.of) if kind != "Cos" else ("", frozenset())
        return ("by_cosines", one.terms) if kind != "Sin" and not one.step else ("", frozenset())

    def _kind_of(self, name: str) -> str:
        """Cos or Sin, where the table is made by one of them; "" for others."""
        for _ in range(_MOST_BETWEEN):
            node = self.producers.get(name)
            if node is None or node.op_type in ("Cos", "Sin"):
                return "" if node is None else node.op_type
            name = node.inputs[0] if node.inputs else ""
        return ""

    def _div(self, inputs: Sequence[Value], others: Sequence[str]) -> tuple[str, Terms]:
        if len(inputs) == 2 and inputs[1].step == "root" and inputs[0].terms == inputs[1].of:
            return "normed", inputs[0].of if inputs[0].step == "centred" else inputs[0].terms
        if len(inputs) == 1 and inputs[0].step == "root" and self.constants.value(others[0]) == 1.0:
            return "inverse", inputs[0].of
        return "", frozenset()

    def _sub(self, inputs: Sequence[Value], others: Sequence[str]) -> tuple[str, Terms]:
        if len(inputs) == 2 and inputs[1].step == "mean" and inputs[1].of == inputs[0].terms:
            return "centred", inputs[0].terms
        return "", frozenset()

    def _add(self, inputs: Sequence[Value], others: Sequence[str]) -> tuple[str, Terms]:
        first = inputs[0]
        if len(inputs) == 1:
            is_one = self.constants.value(others[0]) == 1.0
            match first.step:
                case "variance":  # and an epsilon
                    return "steadied", first.of
                case "scores":
                    return "masked", first.of
                case "curve" if is_one:
                    return "weight", first.of
                case "square" if is_one and is_close(first.factor, _CUBE):
                    return "square and 1", first.of
            return "", frozenset()
        for one, other in (inputs, inputs[::-1]):
            if other.step == "cube" and one.terms == other.of and is_close(other.factor, _CUBE):
                return "polynomial", one.terms
        kinds = {one.step: one for one in inputs}
        if kinds.keys() == {"by_cosines", "by_sines"} and kinds["by_cosines"].of == kinds["by_sines"].of:
            return "rotated", kinds["by_cosines"].of
        return "", frozenset()
