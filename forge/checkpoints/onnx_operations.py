"""Whether an ONNX graph computes what forge computes of its weights: its operations, their attributes, its factors.

forge does not execute the graph. It follows the numbers that come of the weights, through every operation, and compares
what these are with the model's configuration. What is between positions and masks alone is not compared.
Attributes and their defaults: Operators.md of ONNX, ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any, NoReturn

from forge.checkpoints.onnx_parameters import DTYPES, Constants, Parameter, no_decoder, shown
from forge.checkpoints.views import Stored
from forge.config import ModelConfig
from forge.errors import UnsupportedError
from forge.formats.onnx import Graph, Node
from forge.formats.source import show

_DOMAINS = ("", "ai.onnx", "com.microsoft")
_ATTENTIONS = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
_NORMS = (
    *("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
)
_STREAM = {
    *("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "GatherBlockQuantized", "RotaryEmbedding", *_ATTENTIONS, *_NORMS),
    *("Add", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "Neg", "Softmax", "Where", "IsNaN", "Cast"),
    *("Reshape", "Transpose", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Gather", "Expand", "Flatten"),
    *("Identity", "Shape", "If"),
}
"""What every family does with numbers that come of its weights."""
_MASKS = {
    *("And", "Or", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Abs", "Floor"),
    *("Ceil", "Mod", "Log", "Sub", "Cos", "Sin", "Range", "Constant", "ConstantOfShape", "Size", "Tile", "Trilu"),
    *("CumSum", "NonZero", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "ReduceMax", "ReduceSum"),
}
"""What is done to positions and masks besides."""
_EXPERTS = {
    *("TopK", "OneHot", "NonZero", "ReduceSum", "ReduceMax", "Equal", "Greater", "GatherND", "GatherElements"),
    *("ScatterND", "ScatterElements", "Sigmoid", "Clip"),
}
_ACTIVATIONS: dict[str, dict[str, Mapping[str, Any]]] = {
    "silu": {"Sigmoid": {}, "QuickGelu": {"alpha": 1.0}, "Swish": {"alpha": 1.0}},
    "gelu": {"Tanh": {}, "FastGelu": {}, "Gelu": {"approximate": "tanh"}},
    "gelu_erf": {"Erf": {}, "BiasGelu": {}, "Gelu": {"approximate": "none"}},
}
"""Operations of an activation by forge's name of it, and what their attributes are."""
_DEFAULTS = {"alpha": 1.702, "approximate": "none"}
_KNOWN = {*_STREAM, *_MASKS, *_EXPERTS, "Tanh", *(op for ops in _ACTIVATIONS.values() for op in ops)}
_ATTRIBUTES: dict[str, dict[str, tuple[Any, ...]]] = {
    "Gemm": {"alpha": (1.0,), "beta": (1.0,), "transA": (0,), "transB": (0, 1)},
    "RotaryEmbedding": {"interleaved": (0,), "scale": (1.0,), "is_packed_batching": (0,)},
    "LayerNormalization": {"axis": (-1, 1, 2, 3)},
    "SimplifiedLayerNormalization": {"axis": (-1, 1, 2, 3)},
    "RMSNormalization": {"axis": (-1, 1, 2, 3)},
    "Softmax": {"axis": (-1, 1, 2, 3)},
    "GroupQueryAttention": {
        **{"rotary_interleaved": (0,), "smooth_softmax": (0, -1), "qk_output": (0,), "causal": (1,)},
        **{"k_quant_type": ("NONE",), "v_quant_type": ("NONE",), "sliding_window_cache": (0, 1)},
    },
}
"""Values that attributes may have, where they are there."""
_READ = ("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary")
"""Attributes of GroupQueryAttention that `_check_attention` compares. It may have no others."""
_ROTARY_TABLES = slice(7, 9)
_FURTHER_INPUTS = ("attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight")
_FIRST_FURTHER = 10
_MOST_BETWEEN = 8
"""Operations between a rotation and the attention: a norm and its reshapes."""
_CLOSE = 0.01
"""Exporters round: onnxruntime-genai's builder has Gemma's sqrt(width) with two digits."""
_GELU = (0.5, 0.044715, 0.7978846, 2**0.5)
_LEAST_ADDED = 1e-12
"""Less is added to no norm, but to sums that weights of experts are divided by."""


def check_known(constants: Constants) -> None:
    """Raises UnsupportedError for an operation that no decoder has which forge knows."""
    for node in constants.model.graph.walk():
        what = f"node {show(node.name)} is {show(node.op_type)}"
        if node.domain not in _DOMAINS:
            raise no_decoder(constants, {}, f"{what} of {show(node.domain)}")
        if node.op_type not in _KNOWN:
            raise no_decoder(constants, {}, f"{what}, which is no operation of those")


def check_computation(constants: Constants, parameters: Mapping[str, Parameter], numbers: ModelConfig) -> None:
    """Raises UnsupportedError if the graph computes something else than forge does with these numbers."""
    _Check(constants, parameters, numbers).run()


class _Check:
    def __init__(self, constants: Constants, parameters: Mapping[str, Parameter], numbers: ModelConfig) -> None:
        self.constants, self.numbers = constants, numbers
        self.activating = _ACTIVATIONS.get(numbers.activation, {})
        self.allowed = {*_STREAM, *self.activating}
        if numbers.norm == "layer":
            self.allowed.add("Sub")
        if numbers.attention_softcap or numbers.final_softcap:
            self.allowed.add("Tanh")
        if numbers.num_gates:
            self.allowed.add("Sigmoid")
        if numbers.qkv_clamp:
            self.allowed.add("Clip")
        if numbers.experts:
            self.allowed |= _EXPERTS
        scale = numbers.attention_scale
        named = (numbers.embedding_scale, numbers.residual_scale, numbers.logit_scale)
        caps = (numbers.attention_softcap, numbers.final_softcap)
        experts = (numbers.experts.scale,) if numbers.experts else ()
        gelu = () if numbers.activation == "silu" else _GELU
        self.factors = (1.0, abs(scale), abs(scale) ** 0.5, *named, *caps, *experts, *gelu)
        self.stream = {parameter.constant for parameter in parameters.values()}
        """Names of values that come of weights."""
        self.producers = {name: node for node in constants.model.graph.walk() for name in node.outputs}

    def run(self) -> None:
        counts: Counter[str] = Counter()
        for node in self._followed(self.constants.model.graph):
            counts[node.op_type] += 1
            if node.op_type not in self.allowed:
                self._refuse(node, f"is no operation of {self.numbers.arch}: the graph computes another model")
            self._check_attributes(node, _ATTRIBUTES.get(node.op_type, {}))
            self._check_factor(node)
            if node.op_type in self.activating:
                self._check_activation(node)
            if node.op_type in _NORMS:
                epsilon = node.attributes.get("epsilon", 1e-12 if node.op_type.startswith("Skip") else 1e-5)
                self._check_close(node, "epsilon", epsilon, self.numbers.norm_eps)
        layers, found = self.numbers.num_layers, sum(counts[op] for op in self.activating)
        if found < layers:
            problem = (
                f"{found} operations that are {self.numbers.activation}, and its configuration says {layers} layers"
            )
            raise UnsupportedError(f"{self.constants.path}: has {problem}: the files do not belong together")
        self._check_attentions()

    def _followed(self, graph: Graph) -> Iterator[Node]:
        """Operations on numbers that come of weights, in their order."""
        for node in graph.nodes:
            is_read = any(name in self.stream for name in node.inputs)
            for value in node.attributes.values():
                for inner in value if isinstance(value, list) else [value]:
                    if isinstance(inner, Graph):
                        yield from self._followed(inner)
                        is_read = is_read or any(name in self.stream for name in inner.outputs)
            if is_read:
                if node.op_type != "Shape":
                    self.stream.update(name for name in node.outputs if name)
                yield node

    def _check_attributes(self, node: Node, values: Mapping[str, Collection[Any]]) -> None:
        for name, known in values.items():
            if name in node.attributes and node.attributes[name] not in known:
                self._refuse(node, f"has {name} = {shown(node.attributes[name])}, which is not supported")

    def _check_activation(self, node: Node) -> None:
        for name, wanted in self.activating[node.op_type].items():
            found = node.attributes.get(name, 1.0 if node.op_type == "Swish" else _DEFAULTS[name])
            if node.domain == "com.microsoft" and node.op_type == "Gelu":
                found = "none"
            if found != wanted:
                self._refuse(node, f"has {name} = {shown(found)}: it is not {self.numbers.activation}")

    def _check_factor(self, node: Node) -> None:
        """A factor that is one constant, or what is added, has to be one of the configuration's."""
        known = [*self.factors, *(1 / factor for factor in self.factors if factor)]
        if node.op_type in ("Add", "Sub"):
            known = [self.numbers.norm_eps, 1.0]
        for value in self._constants_of(node):
            is_tiny = node.op_type == "Add" and 0 <= value < _LEAST_ADDED
            if not is_tiny and not any(abs(value - one) <= _CLOSE * abs(one) for one in known):
                self._refuse(node, f"computes with {value:.6g}: {self.numbers.arch}'s configuration has no such number")

    def _constants_of(self, node: Node) -> Iterator[float]:
        if node.op_type == "FusedMatMul" and isinstance(alpha := node.attributes.get("alpha"), int | float):
            yield alpha
        if node.op_type not in ("Mul", "Div", "Add", "Sub"):
            return
        for name in node.inputs:
            tensor = self.constants.found.get(name)
            if tensor is not None and tensor.type in DTYPES and prod(tensor.shape) == 1 and name not in self.stream:
                yield float(Stored(self.constants, name).floats().reshape(-1)[0])

    def _check_close(self, node: Node, name: str, value: Any, wanted: float) -> None:
        if type(value) not in (int, float) or not abs(value - wanted) <= _CLOSE * abs(wanted):
            self._refuse(node, f"has {name} = {shown(value)}, and its configuration says {wanted:.6g}")

    def _check_attentions(self) -> None:
        nodes = [node for node in self.constants.model.graph.walk() if node.op_type == "GroupQueryAttention"]
        layers = self.numbers.num_layers
        if len(nodes) % layers:
            problem = f"{len(nodes)} of GroupQueryAttention, and its configuration says {layers} layers"
            raise UnsupportedError(f"{self.constants.path}: has {problem}: the files do not belong together")
        for place, node in enumerate(nodes):
            self._check_attention(node, place % layers)

    def _check_attention(self, node: Node, layer: int) -> None:
        """Compare all attributes of a layer's GroupQueryAttention."""
        numbers, attributes = self.numbers, node.attributes
        for name in attributes.keys() - {*_READ, *_ATTRIBUTES[node.op_type]}:
            self._refuse(node, f"has the attribute {show(name)}, which is not known")
        for name, given in zip(_FURTHER_INPUTS, node.inputs[_FIRST_FURTHER:], strict=False):
            if given:
                self._refuse(node, f"has the input {name}, which is not supported")
        for name, heads in (("num_heads", numbers.num_heads), ("kv_num_heads", numbers.layer_kv_heads[layer])):
            if attributes.get(name) != heads:
                self._refuse(node, f"has {name} = {shown(attributes.get(name))}, and its configuration says {heads}")
        # 0 is the operation's word for its default.
        scale = attributes.get("scale", 0.0) or numbers.layer_head_dims[layer] ** -0.5
        self._check_close(node, "scale", scale, numbers.attention_scale)
        self._check_close(node, "softcap", attributes.get("softcap", 0.0), numbers.attention_softcap)
        window, wanted = attributes.get("local_window_size", -1), numbers.layer_windows[layer]
        if type(window) is not int:
            self._refuse(node, f"has local_window_size = {shown(window)}, which is no whole number")
        context = numbers.context_length
        if (window if 0 < window < context else 0) != (wanted if wanted < context else 0):
            self._refuse(node, f"has local_window_size = {window}, and its configuration says {wanted or 'none'}")
        rotates = numbers.ropes[numbers.layer_ropes[layer]].dim > 0
        if self._is_rotated(node) != rotates:
            self._refuse(node, f"has {'no ' if rotates else ''}rotated queries and keys: {numbers.arch} is not so")

    def _is_rotated(self, node: Node) -> bool:
        """Whether an attention rotates queries and keys, or gets both rotated."""
        do_rotary = node.attributes.get("do_rotary", 0)
        if do_rotary not in (0, 1):
            self._refuse(node, f"has do_rotary = {shown(do_rotary)}, which is not 0 or 1")
        if do_rotary:
            if not all(node.inputs[_ROTARY_TABLES]) or len(node.inputs) < _ROTARY_TABLES.stop:
                self._refuse(node, "has do_rotary and no tables of the rotation")
            return True
        found = {self._comes_of_rotation(name) for name in node.inputs[:2]}
        if len(found) > 1:
            self._refuse(node, "has only one rotated of queries and keys")
        return found == {True}

    def _comes_of_rotation(self, name: str) -> bool:
        for _ in range(_MOST_BETWEEN):
            producer = self.producers.get(name)
            if producer is None or producer.op_type not in ("RotaryEmbedding", "Reshape", "Cast", "Transpose", *_NORMS):
                return False
            if producer.op_type == "RotaryEmbedding":
                return True
            name = producer.inputs[0] if producer.inputs else ""
        return False

    def _refuse(self, node: Node, problem: str) -> NoReturn:
        raise UnsupportedError(f"{self.constants.path}: {node.op_type} {show(node.name)} {problem}")
