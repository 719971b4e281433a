"""Protobuf's wire format in hostile files: messages are read by tables, and long fields stay where they are.

Format: protobuf.dev/programming-guides/encoding. A file is read through a window of 64 KiB; a field that a table calls
a `span` costs no memory, however long it is. Each length is compared with the bytes of its message before it is used.
Stricter than the standard: a field that may be there once may not be there twice, and groups are refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from forge.errors import FormatError
from forge.formats.source import Source

MAX_DEPTH = 24
"""Messages within messages. A graph in a graph takes three."""
MAX_FIELDS = 1 << 21
"""Fields of a file that are looked at: they bound time and memory. A message counts as 8 more, as what it takes."""
_MESSAGE_FIELDS = 8
MAX_TEXT_BYTES = 1 << 16
_MAX_NUMBER = (1 << 29) - 1
_WINDOW_BYTES = 1 << 16
_MAX_VARINT_BYTES = 10
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FLOAT = Struct("<f")


class Span(NamedTuple):
    """Bytes of a file that were not read."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Field:
    """A field that is read. `kind`: "int" (64 bits, signed), "float", "text", "span" or "message", by its `schema`."""

    name: str
    kind: str
    is_repeated: bool = False
    schema: Mapping[int, "Field"] = field(default_factory=dict)


Schema = Mapping[int, Field]
Message = dict[str, Any]
_WIRES = {"int": _VARINT, "float": _FIXED32, "text": _LENGTH, "span": _LENGTH, "message": _LENGTH}


class _Problem(Exception):
    """What is wrong, and the way to it from the outermost message."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.way: list[str] = []


class Reader:
    """Reads messages of an open file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._data = b""
        self._base = 0
        self._fields_left = MAX_FIELDS

    def read(self, span: Span, schema: Schema) -> Message:
        """The fields of a message by name: a repeated one as a list, one that is missing not at all.

        Raises FormatError with the way to what is wrong: "graph.node[3].attribute[0]: ...".
        """
        with self._named():
            return self._message(span, schema, 0)

    def varints(self, span: Span) -> list[int]:
        """The numbers of a packed field, 64 bits, signed."""
        with self._named():
            return self._packed("int", span)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Problems become errors with the file's name."""
        try:
            yield
        except _Problem as problem:
            way = f"{'.'.join(reversed(problem.way))}: " if problem.way else ""
            raise FormatError(f"{self.source.path}: {way}{problem.text}") from None

    def bytes(self, span: Span) -> bytes:
        """The bytes of a span within the file."""
        start, stop = span
        if start < self._base or stop > self._base + len(self._data):
            size = min(max(stop - start, _WINDOW_BYTES), self.source.size - start)
            data = np.empty(size, np.uint8)
            self.source.read(start, data)
            self._data, self._base = data.tobytes(), start
        return self._data[start - self._base : stop - self._base]

    def _message(self, span: Span, schema: Schema, depth: int) -> Message:
        if depth > MAX_DEPTH:
            raise _Problem(f"messages are nested deeper than {MAX_DEPTH}")
        self._count(_MESSAGE_FIELDS)
        found: Message = {field.name: [] for field in schema.values() if field.is_repeated}
        position, stop = span
        while position < stop:
            self._count(1)
            key, position = self._varint(position, stop)
            number, wire = key >> 3, key & 7
            if not 1 <= number <= _MAX_NUMBER:
                raise _Problem(f"field number {number} is none")
            content, position = self._content(number, wire, position, stop)
            known = schema.get(number)
            if known is not None:
                self._keep(known, wire, content, found, depth)
        return found

    def _content(self, number: int, wire: int, position: int, stop: int) -> tuple[Any, int]:
        """The value of a varint, or where the bytes of another field are; and the first byte behind it."""
        if wire == _VARINT:
            return self._varint(position, stop)
        if wire == _LENGTH:
            size, position = self._varint(position, stop)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _Problem(f"field {number} has the wire type {wire}, which ONNX does not use")
        if size > stop - position:
            raise _Problem(
                f"field {number} needs {size} bytes and {stop - position} are left: the file is truncated or forged"
            )
        return Span(position, position + size), position + size

    def _keep(self, known: Field, wire: int, content: Any, found: Message, depth: int) -> None:
        """Add a field's value to its message."""
        name, kind = known.name, known.kind
        if known.is_repeated and wire == _LENGTH and kind in ("int", "float"):
            found[name] += self._packed(kind, content)
            return
        if wire != _WIRES[kind]:
            raise _Problem(f"{name} has the wire type {wire}, not {_WIRES[kind]}")
        if kind == "message":
            try:
                value: Any = self._message(content, known.schema, depth + 1)
            except _Problem as problem:
                problem.way.append(f"{name}[{len(found[name])}]" if known.is_repeated else name)
                raise
        elif kind == "int":
            value = _signed(content)
        elif kind == "text":
            value = self._text(name, content)
        elif kind == "float":
            value = _FLOAT.unpack(self.bytes(content))[0]
        else:
            value = content
        if known.is_repeated:
            found[name].append(value)
        elif name in found:
            raise _Problem(f"{name} is there twice")
        else:
            found[name] = value

    def _packed(self, kind: str, span: Span) -> list[Any]:
        """The numbers of a packed field."""
        if kind == "float":
            if span.size % 4:
                raise _Problem(f"packed floats of {span.size} bytes, no multiple of 4")
            self._count(span.size // 4)
            return list(np.frombuffer(self.bytes(span), "<f4").tolist())
        numbers: list[Any] = []
        position, stop = span
        while position < stop:
            self._count(1)
            number, position = self._varint(position, stop)
            numbers.append(_signed(number))
        return numbers

    def _text(self, name: str, span: Span) -> str:
        if span.size > MAX_TEXT_BYTES:
            raise _Problem(f"{name} has {span.size} bytes, allowed are {MAX_TEXT_BYTES}")
        data = self.bytes(span)
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise _Problem(f"{name} is not UTF-8: {data[:40]!r}") from None

    def _varint(self, position: int, stop: int) -> tuple[int, int]:
        """An unsigned number of 64 bits, and the first byte behind it."""
        at = position - self._base
        if at < 0 or at + _MAX_VARINT_BYTES > len(self._data):
            self.bytes(Span(position, min(position + _MAX_VARINT_BYTES, stop)))
            at = position - self._base
        data, value, shift = self._data, 0, 0
        for index in range(at, at + min(_MAX_VARINT_BYTES, stop - position)):
            byte = data[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    raise _Problem("a number has more than 64 bits")
                return value, index + self._base + 1
            shift += 7
        if stop - position < _MAX_VARINT_BYTES:
            raise _Problem("a number goes beyond the end of its message: the file is truncated or forged")
        raise _Problem(f"a number has more than {_MAX_VARINT_BYTES} bytes")

    def _count(self, number: int) -> None:
        self._fields_left -= number
        if self._fields_left < 0:
            raise _Problem(f"more than {MAX_FIELDS} fields: no model has as many")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
