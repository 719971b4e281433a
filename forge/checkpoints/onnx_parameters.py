"""The parameters of an ONNX graph by their names in PyTorch, by their nodes where their own names say nothing.

Exporters name a node after the module that it was traced in, as in /model/layers.3/self_attn/q_proj/MatMul. A matrix of
a product lies transposed, often without a name (onnx::MatMul_733). Equal tensors are often one that several nodes read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.checkpoints.views import Stored
from forge.errors import UnsupportedError
from forge.formats.onnx import MAX_DIMS, ONNX, Node, Tensor
from forge.formats.safetensors import Info
from forge.formats.source import show

DTYPES = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}
"""Safetensors' names of the types that weights have."""
BLOCKED = ("MatMulNBits", "GatherBlockQuantized")

# Where an operation's parameters are: the number of an input, the parameter, whether a matrix lies there transposed.
_Place = tuple[int, str, bool]
_PLACES: dict[str, tuple[_Place, ...]] = {
    "MatMul": ((1, "weight", True),),
    "Gemm": ((1, "weight", True), (2, "bias", False)),  # transB is looked at
    "Gather": ((0, "weight", False),),
    "Transpose": ((0, "weight", True),),
    "Mul": ((0, "weight", False), (1, "weight", False)),
    "Add": ((0, "bias", False), (1, "bias", False)),
    "LayerNormalization": ((1, "weight", False), (2, "bias", False)),
    "RMSNormalization": ((1, "weight", False),),
    "SimplifiedLayerNormalization": ((1, "weight", False),),
    "SkipLayerNormalization": ((2, "weight", False), (3, "bias", False)),
    "SkipSimplifiedLayerNormalization": ((2, "weight", False),),
    "MatMulNBits": ((1, "weight", False), (5, "bias", False)),
    "GatherBlockQuantized": ((0, "weight", False),),
}
_WITH_TABLES = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
"""Operations whose other constants are tables of the rotation."""
_MAX_WIDTH = 1 << 20
"""Of a norm that is looked at."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata of a node that is a list of modules, each within the one before, and the operation."""
_PARAMETER = re.compile(r"\w+(\.\w+)*\.(weight|bias)")
_OPERATION = re.compile(r"(^|\.)(MatMul|Gemm|Add|Mul)(_\w+)?\.")
"""In a name: the name is not PyTorch's."""
_FUSED = re.compile(r"\.(Mul|Add)(_\d+)?$")
"""ONNX Runtime's optimizer names what it fuses after the last operation of what it fused."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: the constant that holds it, and a node that reads it, if any is known to.

    is_transposed: Of PyTorch's matrix. is_folded: Without a name of its own, the exporter may have computed with it.
    """

    name: str
    constant: str
    node: Node | None
    is_transposed: bool
    is_folded: bool


class Constants:
    """Tensors of a graph that are known without running it: initializers, and values of its Constant nodes.

    Read as `safetensors.SafeTensors` are.
    """

    def __init__(self, model: ONNX) -> None:
        self.model, self.path = model, model.path
        self.found: dict[str, Tensor] = dict(model.graph.initializers)
        for node in model.graph.walk():
            value = node.attributes.get("value")
            if node.op_type == "Constant" and isinstance(value, Tensor) and len(node.outputs) == 1:
                self.found.setdefault(node.outputs[0], value)
            elif len(node.outputs) == 1 and (same := self._same(node)) is not None:
                self.found.setdefault(node.outputs[0], same)
        self.tensors: Mapping[str, Info] = {
            name: Info(DTYPES.get(tensor.type, tensor.type), tensor.shape, tensor.nbytes)
            for name, tensor in self.found.items()
        }

    def _same(self, node: Node) -> Tensor | None:
        """What an Identity or a Reshape makes of a constant: a parameter equal to another, or of shared codes."""
        match node.op_type, [self.found.get(name) for name in node.inputs]:
            case "Identity", [Tensor() as data]:
                return data
            case "Reshape", [Tensor() as data, Tensor(type="INT64", shape=(int(count),)) as sizes] if count <= MAX_DIMS:
                out = np.empty(count, "<i8")
                self.model.read(sizes, 0, out)
                shape = tuple(out.tolist())
                is_same = prod(shape) == prod(data.shape) and all(side > 0 for side in shape)
                return replace(data, shape=shape) if is_same else None
        return None

    def path_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self.model.paths[self.found[name].home]

    def read(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Fill a C-contiguous array with the bytes of a tensor from its byte `start` on. Threads may call it."""
        self.model.read(self.found[name], start, out)

    def number(self, name: str) -> int | None:
        """The whole number that a constant is; None where it is none."""
        tensor = self.found.get(name)
        if tensor is None or tensor.type != "INT64" or prod(tensor.shape) != 1:
            return None
        out = np.empty(1, "<i8")
        self.model.read(tensor, 0, out)
        return int(out[0])

    def value(self, name: str) -> float | None:
        """The number that a constant is; None where it is none, or several."""
        tensor = self.found.get(name)
        if tensor is None or prod(tensor.shape) != 1:
            return None
        return float(self.number(name) or 0) if tensor.type == "INT64" else self._float(name, tensor)

    def _float(self, name: str, tensor: Tensor) -> float | None:
        return float(Stored(self, name).floats().flat[0]) if tensor.type in DTYPES else None

    def is_table(self, name: str) -> bool:
        """Whether it is for all sequences and heads, as masks and cosines that an exporter computed are."""
        shape = self.found[name].shape
        return len(shape) > 2 and shape[0] == 1

    def is_weight(self, name: str) -> bool:
        """Whether a tensor has numbers of a weight, and more than one."""
        tensor = self.found.get(name)
        return tensor is not None and tensor.type in DTYPES and prod(tensor.shape) > 1


def find_parameters(constants: Constants, *, by_nodes: bool) -> dict[str, Parameter]:
    """The parameters by name. by_nodes: Names of tensors say nothing, even where they look like PyTorch's.

    Raises UnsupportedError for a tensor without a place.
    """
    graph = constants.model.graph
    found: dict[str, Parameter] = {}
    used: set[str] = {name for node in graph.walk() for name in _tables_of(node)}
    for parameter in parameters_read(constants, by_nodes=by_nodes):
        used.add(parameter.constant)
        known = found.setdefault(parameter.name, parameter)
        if (known.constant, known.is_transposed) != (parameter.constant, parameter.is_transposed):
            raise UnsupportedError(
                f"{constants.path}: parameter {show(known.name)} is both {show(known.constant)} and "
                f"{show(parameter.constant)}"
            )
    readers = {name: node for node in graph.walk() for name in node.inputs}
    for constant in constants.found:
        if constant in used or not constants.is_weight(constant) or constants.is_table(constant):
            continue
        if not by_nodes and _is_parameter(constant):
            found.setdefault(constant, Parameter(constant, constant, None, False, False))
        elif constant in readers:
            problem = f"{readers[constant].op_type} {show(readers[constant].name)} reads tensor {show(constant)}"
            raise no_decoder(constants, found, f"{problem}, which has no place")
    return {name: parameter for name, parameter in found.items() if not _is_identity(parameter, constants)}


def parameters_read(constants: Constants, *, by_nodes: bool) -> Iterator[Parameter]:
    """What each node reads: the parameter of the constant's own name, then that of the node's, if they differ."""
    for node in constants.model.graph.walk():
        if "rotary_emb" in node.name:
            continue
        for constant, leaf, is_transposed in _parameters_of(node, constants):
            yield from _named(constants, node, constant, leaf, is_transposed, by_nodes)


def shown(value: object) -> str:
    """An attribute's value for a message."""
    return show(value) if isinstance(value, str | int | float | list) else f"a {type(value).__name__}"


def no_decoder(constants: Constants, parameters: Mapping[str, Parameter], problem: str) -> UnsupportedError:
    """The error of a graph that is no decoder which forge knows, with what it is."""
    counts = Counter(node.op_type for node in constants.model.graph.walk())
    names = [show(name)[1:-1] for name, _ in counts.most_common(6)]
    operations = ", ".join(names) + (f" and {len(counts) - 6} others" if len(counts) > 6 else "")
    first = ", ".join(list(parameters)[:2]) or "none"
    return UnsupportedError(
        f"{constants.path}: is no decoder that forge knows: {problem}; its operations are {operations or 'none'}, its "
        f"first parameters {show(first)}"
    )


def _tables_of(node: Node) -> tuple[str, ...]:
    """Inputs that may be constants and are no parameters: tables of the rotation, scales of blocks."""
    if "rotary_emb" in node.name or node.op_type == "RotaryEmbedding":
        return node.inputs
    if node.op_type in _WITH_TABLES:
        return node.inputs[3:]
    return node.inputs[2:5] if node.op_type in BLOCKED else ()


def _is_identity(parameter: Parameter, constants: Constants) -> bool:
    """Whether it is the weight or the bias of a norm that has none, for which exporters write ones and zeros."""
    is_norm = parameter.node is not None and parameter.node.op_type == "LayerNormalization"
    shape = constants.found[parameter.constant].shape
    if not is_norm or not parameter.is_folded or len(shape) != 1 or shape[0] > _MAX_WIDTH:
        return False
    value = 1.0 if parameter.name.endswith(".weight") else 0.0
    return bool((Stored(constants, parameter.constant).floats() == value).all())


def _parameters_of(node: Node, constants: Constants) -> Iterator[tuple[str, str, bool]]:
    """Constants that an operation reads as parameters: name, parameter, whether it is transposed."""
    for place, leaf, is_transposed in _PLACES.get(node.op_type, ()):
        name = node.inputs[place] if place < len(node.inputs) else ""
        if (
            node.op_type in ("Mul", "Add")
            and name in constants.found
            and len(constants.found[name].shape) not in (1, 2)
        ):
            continue  # a table or a mask: those of modules are vectors, or a row for each head
        is_blocks = node.op_type in BLOCKED and leaf == "weight" and name in constants.found
        if is_blocks or constants.is_weight(name):
            turned = is_transposed and not node.attributes.get("transB", 0)
            yield name, leaf, turned


def _named(
    constants: Constants, node: Node, constant: str, leaf: str, is_transposed: bool, by_nodes: bool
) -> Iterator[Parameter]:
    """A constant as the parameter of its own name, and as that of the node, where they differ: several share it."""
    module = _module_of(constants, node)
    if not by_nodes and _is_parameter(constant):
        own, _, leaf = constant.rpartition(".")
        for name in dict.fromkeys((own, module or own)):
            yield Parameter(f"{name}.{leaf}", constant, node, False, False)
    elif node.op_type == "Transpose" and not by_nodes:
        return  # whether the module's matrix is what it takes or what it gives is not known
    elif module:
        yield Parameter(f"{module}.{leaf}", constant, node, is_transposed, True)
    else:
        raise UnsupportedError(
            f"{constants.path}: {node.op_type} {show(node.name)} and tensor {show(constant)}, which it reads, have no "
            "names of modules: export the model with them"
        )


def _module_of(constants: Constants, node: Node) -> str:
    """The module that a node was traced in: by its name, or by what torch.onnx with dynamo says beside it."""
    module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
    module = _FUSED.sub("", module)
    if module or _SCOPES not in node.metadata:
        return module
    scopes = re.findall(r"'([\w.]*)'", constants.model.text(node.metadata[_SCOPES]))
    return scopes[-2] if len(scopes) > 1 else ""


def _is_parameter(name: str) -> bool:
    return _PARAMETER.fullmatch(name) is not None and _OPERATION.search(name) is None
