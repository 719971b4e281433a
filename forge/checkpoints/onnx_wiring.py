"""Whether an ONNX graph feeds each weight what the family feeds it: which tensor of numbers goes where.

The graph is walked once, in its order. Of each value it is known which weights' results are in it, down to the nearest
ones: as terms, where it is a sum of them, each once, else as the weights alone. So the input of each product and norm
is known, and both operands of the attention's products. What is done to numbers between two weights is not: that the
operations are the family's is `onnx_operations`' part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from forge.checkpoints.onnx_expected import Expected
from forge.checkpoints.onnx_parameters import Constants
from forge.checkpoints.onnx_steps import CURVES, FUSED_ACTIVATIONS, Roles, Steps, Terms, Value, is_close
from forge.config import ModelConfig
from forge.errors import UnsupportedError
from forge.formats.onnx import Graph, Node
from forge.formats.source import show

_FUSED = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
_SKIP = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits")
_SAME = {
    *("Cast", "Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Slice", "Split"),
    *("Concat", "Where", "Gather"),
}
"""What moves numbers, or takes some of them, and computes none."""
_PARTS = ("Split", "Slice", "Gather")
_FROM_END = 1 << 40
_MOST_WORK = 1 << 26
"""Members of all sets of terms: a graph that takes more is no decoder's."""


class Wiring:
    """roles: What a node reads in a constant, as "attn_q.0" or "output_norm", by the node's first output and it."""

    def __init__(self, constants: Constants, roles: Mapping[tuple[str, str], str], numbers: ModelConfig) -> None:
        self.constants, self.roles = constants, roles
        self.steps = Steps(constants)
        self.expected = Expected(roles.values(), numbers)
        adding = {node.outputs[0] for node in constants.model.graph.walk() if node.op_type == "Add" and node.outputs}
        self.biased = {role for (output, _), role in roles.items() if output in adding}
        self.of_operations: dict[int, Roles] = {}
        self.work = 0
        self.attended: set[str] = set()
        self.ends: dict[tuple[str, str], int] = {}
        """Parts of joined matrices by what they are taken of and where they end."""

    def check(self) -> None:
        """Raises UnsupportedError for a graph that feeds weights with something else than the family does."""
        graph = self.constants.model.graph
        values = self._walk(graph, {}, {})
        ends = [values[name] for name in graph.outputs if name in values and values[name].roles == {"output"}]
        cap = self.expected.numbers.final_softcap
        scale = cap or self.expected.numbers.logit_scale
        if not ends or not is_close(ends[0].factor, scale):
            self._fail(
                f"none of its outputs is {scale:.6g} times what comes of the output's matrix: there are no logits"
            )
        missing = self.expected.layers_with_attention - self.attended
        if missing:
            self._fail(f"layer {min(missing)} has no products of queries, keys and values in their order")

    def _walk(self, graph: Graph, values: dict[str, Value], weights: dict[str, str]) -> dict[str, Value]:
        for node in graph.nodes:
            inner = [g for value in node.attributes.values() for g in _graphs(value)]
            if inner:  # the branches of an If: each computes the model, or both what is beside it
                for branch in inner:
                    self._spend(len(values) + len(weights))
                    found = self._walk(branch, dict(values), dict(weights))
                    for name, target in zip(branch.outputs, node.outputs, strict=False):
                        if name in found:
                            values[target] = found[name]
                continue
            of_weights = {
                place: role
                for place, name in enumerate(node.inputs)
                if (role := self.roles.get((_key(node), name)) or weights.get(name))
            }
            stream = [(place, values[name]) for place, name in enumerate(node.inputs) if name in values]
            if of_weights and not stream and node.op_type in _SAME - {"Gather"}:
                weights.update((name, of_weights[min(of_weights)]) for name in node.outputs)
            elif of_weights or stream:
                made = self._made(node, of_weights, stream)
                for place, name in enumerate(node.outputs):
                    if name and made is not None:
                        values[name] = made[min(place, len(made) - 1)]
        return values

    def _made(self, node: Node, weights: Mapping[int, str], stream: list[tuple[int, Value]]) -> list[Value] | None:
        """The outputs of an operation, the last one also for those that follow."""
        kind, inputs = node.op_type, [value for _, value in stream]
        if kind == "Shape":
            return None
        if kind in _SKIP:
            total = self._sum(node, inputs)
            return [self._of_weight(node, weights, total), total]
        if weights:
            return [self._weighed(node, weights, inputs)]
        if kind in _FUSED:
            return [self._attention(node, stream)]
        if kind in _PRODUCTS and len(inputs) == 2:
            return [self._product(node, *inputs)]
        if kind in (*CURVES, *FUSED_ACTIVATIONS):
            self._check_activation(node, inputs[0])
        if kind in _NORMS:
            return [self._new(inputs).with_step("normed", inputs[0].terms)]
        if kind in _SAME or self._is_scaling(node, stream):
            return self._moved(node, inputs)
        if kind == "RotaryEmbedding":
            return [self._new(inputs).with_step("rotated", inputs[0].terms)]
        places = {place for place, _ in stream}
        step, of = self.steps.of(node, inputs, [name for at, name in enumerate(node.inputs) if at not in places])
        if kind == "Add" and len(inputs) == 2 and not step:
            return [self._sum(node, inputs)]
        if step == "softmax" or (kind == "Tanh" and step == "scores"):
            self._check_scores(node, inputs[0])
        made = replace(self._new(inputs).with_step(step, of), factor=self.steps.factor_of(node, inputs, step))
        return [replace(made, is_curve=kind == "Add" and inputs[0].step == "curve")]

    def _check_scores(self, node: Node, scores: Value) -> None:
        """Before the soft cap, and before the softmax. SDPA has no cap, and exports of models that have one neither."""
        scale, cap = self.expected.numbers.attention_scale, self.expected.numbers.attention_softcap
        if node.op_type == "Tanh":
            self._check_factor(node, scores, scale / (cap or 1.0))
        elif not (cap and is_close(scores.factor, cap)):
            self._check_factor(node, scores, scale)

    def _check_factor(self, node: Node, value: Value, wanted: float) -> None:
        if not is_close(value.factor, wanted):
            problem = f"{value.factor:.6g} times {_named(value.roles)}, and the family {wanted:.6g} times"
            self._refuse(node, f"reads {problem}")

    def _weighed(self, node: Node, weights: Mapping[int, str], inputs: list[Value]) -> Value:
        """What an operation with a weight makes of the rest."""
        role = next(iter(weights.values()))
        if node.op_type.startswith("Gather"):
            return _result(role)
        if not inputs or (node.op_type in (*_PRODUCTS, "Add", "Mul") and len(inputs) > 1):
            self._refuse(node, f"has no one input beside {role}")
        one = self._join(inputs)
        if node.op_type != "Add":
            return self._of_weight(node, weights, one)
        if one.terms != {_unbiased(role)}:
            self._refuse(node, f"adds the bias of {role} to {_named(one.roles)}")
        return _result(role)

    def _of_weight(self, node: Node, weights: Mapping[int, str], source: Value) -> Value:
        role = next(iter(weights.values()), "")
        if not role:
            self._refuse(node, f"norms {_named(source.roles)} and has no weights")
        role = "output" if role == "token_embd" and node.op_type in _PRODUCTS else role
        is_product = node.op_type in _PRODUCTS
        if (is_product and self.expected.has_plain_norm(role)) or node.op_type == "Mul":
            if source.step != "normed":
                self._refuse(node, f"reads {_named(source.roles)} for {role}, which is not normed")
            found = source.of
        else:
            found = source.terms
        if not self.expected.is_norm(role):
            self._check_factor(node, source, 1.0)
        step = self.expected.step_of(role)
        if step and source.step != step:
            self._refuse(node, f"reads {_named(source.roles)} for {role}, which is not {step}")
        wanted = self.expected.source_of(role)
        flat = self._flat(found)
        is_exact = step or self.expected.numbers.experts or found == flat
        if not (is_exact and flat in wanted) and not self.expected.is_of_experts(role, flat, wanted):
            of_family = _named(wanted[0]) if wanted else "nothing"
            self._refuse(node, f"reads {_named(flat)} for {role}, and the family reads {of_family}")
        return _result(_unbiased(role) if role in self.biased and node.op_type != "Add" else role)

    def _sum(self, node: Node, inputs: list[Value]) -> Value:
        if len(inputs) != 2 or inputs[0].terms & inputs[1].terms:
            self._refuse(node, f"adds {_named(self._join(inputs).roles)} twice, or to nothing")
        for value in inputs:
            self._check_factor(node, value, self.expected.factor_of(value.terms))
        return replace(self._joined(inputs), step="", factor=1.0)

    def _moved(self, node: Node, inputs: list[Value]) -> list[Value]:
        """Numbers in other places, and parts of them."""
        one = self._join(inputs)
        if node.op_type in ("Mul", "Div"):
            return [replace(one, factor=self._scaled(node, one))]
        if node.op_type == "Concat" and (known := self.steps.concat(inputs)):
            return [self._new(inputs).with_step(*known)]
        if node.op_type == "Where" and one.step == "scores":
            return [one.with_step("masked", one.of)]
        if node.op_type not in _PARTS or (node.op_type == "Gather" and not self.expected.is_joined(one.roles)):
            return [one]
        is_joined = self.expected.is_joined(one.roles) and one.part is None
        if node.op_type == "Split":
            parts = range(len(node.outputs))
            return [replace(one, start=place, part=place if is_joined else one.part) for place in parts]
        source, start, end = (*node.inputs, "", "", "")[:3]
        number = self.constants.number(start)
        if not is_joined:
            return [one if node.op_type == "Gather" else replace(one, start=number)]
        if number is None:  # computed: where another part ends
            number = self.ends.get((source, start))
        elif number < 0:  # counted from the end
            number += _FROM_END
        if number is None:
            self._refuse(node, f"takes a part of {_named(one.roles)}, and its place is not known")
        self.ends[source, end] = number + 1
        return [replace(one, part=number)]

    def _product(self, node: Node, first: Value, second: Value) -> Value:
        """Of queries and keys, or of the softmax of such and values. Others are of experts, chosen by rows."""
        if first.step == "softmax":
            layer = self.expected.values(second.roles)
            if layer is None or layer not in self.expected.layers_of(first.roles):
                self._refuse(node, f"multiplies by {_named(second.roles)} where the family has values")
            if self.expected.is_joined(second.roles) and second.part in (None, 0):
                self._refuse(node, "multiplies by another part of the joined matrix than values")
            self.attended.add(layer)
            return replace(self._new([first, second]).with_step("attended"), factor=second.factor)
        wanted = self.expected.scores(first.roles | second.roles)
        if wanted is None:
            if self.expected.is_attention(first.roles | second.roles):
                self._refuse(node, f"multiplies {_named(first.roles)} by {_named(second.roles)}")
            return self._new([first, second])
        if (first.roles, second.roles) != wanted:
            self._refuse(node, f"multiplies {_named(first.roles)} by {_named(second.roles)}: queries are not first")
        if wanted[0] == wanted[1] and (first.part is None or second.part is None or first.part >= second.part):
            self._refuse(node, "takes queries and keys of each other's part of the joined matrix")
        rotates = self.expected.rotates(first.roles)
        if rotates is not None and [one.step == "rotated" for one in (first, second)] != [rotates, rotates]:
            self._refuse(
                node, f"reads queries and keys that are{' not' if rotates else ''} rotated, both or one of them"
            )
        factor = None if first.factor is None or second.factor is None else first.factor * second.factor
        return replace(self._new([first, second]).with_step("scores"), factor=factor)

    def _attention(self, node: Node, stream: list[tuple[int, Value]]) -> Value:
        given = {place: value for place, value in stream if place < 3}
        roles = [given[place].roles if place in given else frozenset[str]() for place in range(3)]
        layer = self.expected.attention(roles)
        if layer is None or len(given) < len(stream):
            self._refuse(node, f"has {', '.join(map(_named, roles))} for queries, keys and values")
        self.attended.add(layer)
        return self._new([value for _, value in stream]).with_step("attended")

    def _check_activation(self, node: Node, value: Value) -> None:
        if self.expected.is_up(value.roles):
            self._refuse(node, f"is of {_named(value.roles)}, and the family's is of the gate")
        if self.expected.is_joined(value.roles) and value.part not in (None, 0):
            self._refuse(node, "is of the second half of the joined matrix, and the family's is of the first")

    # Values

    def _join(self, inputs: Iterable[Value]) -> Value:
        """One value, or several that are one behind the other or chosen from."""
        inputs = list(inputs)
        return inputs[0] if len(inputs) == 1 else self._joined(inputs)

    def _joined(self, inputs: list[Value]) -> Value:
        factors = {value.factor for value in inputs}
        parts, steps = {value.part for value in inputs}, {(value.step, value.of) for value in inputs if value.step}
        step, of = steps.pop() if len(steps) == 1 else ("", frozenset[str | int]())
        return Value(
            self._union(value.terms for value in inputs),
            self._union(value.roles for value in inputs),
            step,
            of,
            parts.pop() if len(parts) == 1 else None,
            None,
            factors.pop() if len(factors) == 1 else None,
        )

    def _new(self, inputs: list[Value]) -> Value:
        """The result of an operation that is a term of its own."""
        joined = self._joined(inputs)
        number = len(self.of_operations)
        self.of_operations[number] = joined.roles
        return Value(frozenset({number}), joined.roles, part=joined.part)

    def _flat(self, terms: Terms) -> Roles:
        """The weights of terms, those of operations' results too."""
        return self._union(self.of_operations[term] if isinstance(term, int) else {term} for term in terms)

    def _union(self, sets: Iterable[Iterable[Any]]) -> frozenset[Any]:
        found = frozenset[Any]().union(*sets)
        self._spend(len(found))
        return found

    def _spend(self, count: int) -> None:
        self.work += count
        if self.work > _MOST_WORK:
            self._fail("its operations depend on too many others")

    def _is_scaling(self, node: Node, stream: list[tuple[int, Value]]) -> bool:
        """Whether it multiplies by a constant of one number, or divides by one."""
        if len(stream) != 1 or node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and stream[0][0]):
            return False
        found = [self.constants.found.get(name) for name in node.inputs]
        return any(tensor is not None and all(side == 1 for side in tensor.shape) for tensor in found)

    def _scaled(self, node: Node, one: Value) -> float | None:
        number = next((found for name in node.inputs if (found := self.constants.value(name)) is not None), None)
        if number is None or one.factor is None or (node.op_type == "Div" and not number):
            return None
        return one.factor / number if node.op_type == "Div" else one.factor * number

    def _refuse(self, node: Node, problem: str) -> NoReturn:
        raise UnsupportedError(f"{self.constants.path}: {node.op_type} {show(node.name)} {problem}")

    def _fail(self, problem: str) -> NoReturn:
        raise UnsupportedError(f"{self.constants.path}: {problem}")


def _key(node: Node) -> str:
    return next((name for name in node.outputs if name), "")


def _unbiased(role: str) -> str:
    return f"unbiased {role}"


def _result(role: str) -> Value:
    return Value(frozenset({role}), frozenset({role}))


def _graphs(value: Any) -> Iterator[Graph]:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, Graph):
            yield one


def _named(roles: Iterable[str]) -> str:
    found = sorted(roles)
    return " and ".join(found[:4]) + (f" and {len(found) - 4} others" if len(found) > 4 else "") if found else "nothing"
