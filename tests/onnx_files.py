"""ONNX files written by hand, field by field, so that tests can also write what no proper writer would."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}
EXTERNAL = 1


def varint(value: int) -> bytes:
    """A number; negative ones as protobuf has them, in 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def integer(number: int, value: int) -> bytes:
    """A field that is a varint."""
    return varint(number << 3) + varint(value)


def span(number: int, data: bytes | str, length: int | None = None) -> bytes:
    """A field of bytes, a string or a message. length: Instead of how long it is."""
    data = data.encode() if isinstance(data, str) else data
    return varint(number << 3 | 2) + varint(len(data) if length is None else length) + data


def external(location: str, **numbers: Any) -> bytes:
    """The fields of a tensor whose data is in another file."""
    entries = {"location": location} | {key: str(value) for key, value in numbers.items()}
    return b"".join(span(13, span(1, key) + span(2, value)) for key, value in entries.items()) + integer(14, EXTERNAL)


def tensor(name: str, dims: Sequence[int], data: bytes, kind: int = 1) -> bytes:
    """A TensorProto. data: The fields that hold its numbers."""
    return b"".join(integer(1, side) for side in dims) + integer(2, kind) + span(8, name) + data


def array(name: str, values: NDArray[Any]) -> bytes:
    return tensor(name, values.shape, span(9, values.tobytes()), TYPES[values.dtype.name])


def attribute(name: str, kind: int, value: bytes) -> bytes:
    return span(1, name) + value + integer(20, kind)


def node(
    op: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", attributes: Sequence[bytes] = ()
) -> bytes:
    fields = [span(1, text) for text in inputs] + [span(2, text) for text in outputs]
    return b"".join([*fields, span(3, name), span(4, op), *(span(5, text) for text in attributes)])


def graph(nodes: Sequence[bytes] = (), tensors: Sequence[bytes] = (), rest: bytes = b"") -> bytes:
    return b"".join(span(1, one) for one in nodes) + b"".join(span(5, one) for one in tensors) + rest


def model(nodes: Sequence[bytes] = (), tensors: Sequence[bytes] = (), rest: bytes = b"") -> bytes:
    """A ModelProto. rest: More fields of its graph."""
    return integer(1, 8) + span(2, "forge") + span(8, integer(2, 18)) + span(7, graph(nodes, tensors, rest))


def fields_of(data: bytes) -> list[tuple[int, bytes]]:
    """Numbers of the fields of a message, and its bytes of them, keys and all, for varints and what has a length."""
    found, at = [], 0
    while at < len(data):
        start, numbers = at, []
        for _ in range(2):
            value = shift = 0
            while data[at] > 0x7F:
                value |= (data[at] & 0x7F) << shift
                at, shift = at + 1, shift + 7
            numbers.append(value | data[at] << shift)
            at += 1
        key, size = numbers
        at += size if key & 7 == 2 else 0
        found.append((key >> 3, data[start:at]))
    return found


def with_nodes(data: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """A model with other nodes in its graph."""
    out = b""
    for number, field in fields_of(data):
        if number == 7:
            fields = fields_of(payload_of(field))
            nodes = change([payload_of(one) for kind, one in fields if kind == 1])
            field = span(
                7, b"".join(span(1, one) for one in nodes) + b"".join(one for kind, one in fields if kind != 1)
            )
        out += field
    return out


def payload_of(field: bytes) -> bytes:
    at = 1
    while field[at] > 0x7F:
        at += 1
    return field[at + 1 :]


def nested(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    inner = graph()
    for _ in range(depth):
        inner = graph([node("If", [], [], "deep", [attribute("g", 5, span(6, inner))])])
    return inner


ONES = np.ones(4, np.float32)
