"""Hostile, broken and foreign ONNX files: one clear line each, little memory, no hang."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import (
    ONES,
    array,
    attribute,
    external,
    graph,
    integer,
    model,
    nested,
    node,
    span,
    tensor,
    varint,
)

from forge.errors import ForgeError, FormatError, UnsupportedError
from forge.formats import protobuf
from forge.formats.onnx import ONNX

MAX_PEAK_BYTES = 5 << 20
HEAD = integer(1, 8)
DATA = span(9, ONES.tobytes())


def one(dims: tuple[int, ...], data: bytes, kind: int = 1) -> bytes:
    """A model of one tensor."""
    return model([], [tensor("w", dims, data, kind)])


def attr(data: bytes) -> bytes:
    """A model of one node with an attribute."""
    return model([node("Op", [], [], "n", [data])])


def outside(location: str, **numbers: object) -> bytes:
    """A model of a tensor of 16 bytes in a file beside it, `data`, of 64 bytes."""
    return one((4,), external(location, **numbers))


VALID = model(
    [
        node("MatMul", ["x", "w"], ["y"], "/a/MatMul", [attribute("k", 2, integer(3, -7))]),
        node("If", ["y"], ["z"], "if", [attribute("then", 5, span(6, graph([node("Relu", ["y"], ["z"])])))]),
        node("C", [], ["c"], "c", [attribute("v", 4, span(5, array("t", np.arange(3, dtype=np.int64))))]),
        node("F", [], ["f"], "f", [attribute("v", 6, span(7, np.float32([1, 2]).tobytes()))]),
    ],
    [array("w", np.ones((4, 2), np.float16)), tensor("o", (4,), external("data", offset=16, length=16))],
    span(11, span(1, "x")) + span(12, span(1, "z")),
)

# name: (bytes of the file, words that the message must have)
FORGED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # the wire format
    "text": (b"hello, this is no model at all", ("looks like something else",)),
    "gguf": (b"GGUF" + bytes(64), ("looks like a GGUF file",)),
    "pickle": (b"\x80\x02}q\x00" + bytes(32), ("pickle",)),
    "zeros": (bytes(64), ("field number 0", "only zeros")),
    "version alone": (HEAD, ("has no graph",)),
    "graph alone": (span(7, graph()), ("has no version",)),
    "version of zero": (integer(1, 0) + span(7, graph()), ("has no version",)),
    "version below zero": (integer(1, -1) + span(7, graph()), ("has no version",)),
    "half a tag": (HEAD + b"\xba", ("beyond the end",)),
    "tag of ten bytes": (HEAD + b"\xff" * 10, ("more than 10 bytes",)),
    "tag of 64 bits": (HEAD + varint((1 << 63) | 2), ("field number",)),
    "number of 70 bits": (b"\x08" + b"\xff" * 9 + b"\x7f", ("more than 64 bits",)),
    "number without an end": (b"\x08" + b"\x80" * 30, ("more than 10 bytes",)),
    "field number 0": (HEAD + b"\x02\x00", ("field number 0",)),
    "field number 2^29": (HEAD + varint((1 << 29 << 3) | 0) + b"\0", ("field number 536870912",)),
    "group": (HEAD + varint(50 << 3 | 3) + varint(50 << 3 | 4), ("field 50", "wire type 3")),
    "end of a group": (HEAD + varint(50 << 3 | 4), ("field 50", "wire type 4")),
    "wire type 7": (HEAD + varint(50 << 3 | 7), ("field 50", "wire type 7")),
    "length bomb": (HEAD + span(7, b"", (1 << 63) - 1), ("field 7", str((1 << 63) - 1), "truncated")),
    "length of 2^64 - 1": (HEAD + span(7, b"", (1 << 64) - 1), ("field 7", str((1 << 64) - 1))),
    "length one too long": (HEAD + span(7, graph(), 1), ("field 7", "needs 1 bytes and 0")),
    "unknown field too long": (HEAD + span(99, b"abc", 4), ("field 99", "needs 4 bytes and 3")),
    "half a float": (HEAD + varint(99 << 3 | 5) + b"abc", ("field 99", "needs 4 bytes and 3")),
    "half a double": (HEAD + varint(99 << 3 | 1) + b"abcdefg", ("field 99", "needs 8 bytes and 7")),
    "inner beyond outer": (HEAD + span(7, span(1, b"abc", 9)) + bytes(9), ("graph", "needs 9 bytes and 3")),
    "version as a string": (span(1, "8") + span(7, graph()), ("ir_version", "wire type 2, not 0")),
    "graph as a number": (HEAD + integer(7, 3), ("graph", "wire type 0, not 2")),
    "graph twice": (HEAD + span(7, graph()) * 2, ("graph is there twice",)),
    "version twice": (HEAD * 2 + span(7, graph()), ("ir_version is there twice",)),
    "graphs in graphs": (HEAD + span(7, nested(50)), ("nested deeper than 24", "graph.node[0].attribute[0].g")),
    # nodes
    "node name that is no UTF-8": (model([span(3, b"\xff\xfe")]), ("graph.node[0]", "name is not UTF-8")),
    "node name too long": (model([span(3, "n" * 70_000)]), ("node[0]", "70000 bytes")),
    "node name twice": (model([span(3, "a") * 2]), ("node[0]", "name is there twice")),
    "operation that is no name": (model([node("Ma\0\x1b[2J", [], [], "n")]), ("'n'", r"'Ma\x00\x1b[2J'", "no name")),
    "attribute twice": (
        model([node("Op", [], [], "n", [attribute("a", 2, integer(3, 1))] * 2)]),
        ("'n'", "'a' twice"),
    ),
    "attribute of type 99": (attr(attribute("a", 99, b"")), ("'a'", "'n'", "type 99")),
    "attribute without a type": (attr(span(1, "a") + integer(3, 1)), ("'a'", "type 0")),
    "attribute without its tensor": (attr(attribute("a", 4, b"")), ("'a'", "no value")),
    "attribute without its graph": (attr(attribute("a", 5, integer(3, 1))), ("'a'", "no value")),
    "float attribute as a number": (attr(attribute("a", 1, integer(2, 1))), ("attribute[0]", "f has the wire type 0")),
    "packed floats cut off": (attr(attribute("a", 6, span(7, bytes(7)))), ("7 bytes, no multiple of 4",)),
    "packed numbers cut off": (attr(attribute("a", 7, span(8, b"\x80"))), ("attribute[0]", "beyond the end")),
    "tensor of an attribute lies": (attr(attribute("a", 4, span(5, tensor("t", (9,), DATA)))), ("'t'", "36 bytes")),
    # tensors
    "no data": (one((4,), b""), ("'w', FLOAT [4], takes 16 bytes and has 0",)),
    "data too short": (one((5,), DATA), ("takes 20 bytes and has 16",)),
    "data too long": (one((3,), DATA), ("takes 12 bytes and has 16",)),
    "int4 data too long": (one((3,), span(9, bytes(3)), 22), ("INT4", "takes 2 bytes and has 3")),
    "side below zero": (one((-1, 4), DATA), ("'w'", "impossible shape '-1, 4'")),
    "side of 2^63": (one((1 << 63,), DATA), ("impossible shape",)),
    "size that overflows": (one((1 << 32, 1 << 32), DATA), ("impossible shape",)),
    "zero times 2^62": (one((0, 1 << 62), b""), ("impossible shape",)),
    "nine dimensions": (one((1,) * 9, DATA), ("impossible shape",)),
    "a thousand dimensions": (one((1,) * 1000, DATA), ("impossible shape",)),
    "data twice": (one((4,), DATA + span(4, ONES.tobytes())), ("twice", "float_data and raw_data")),
    "raw data twice": (one((4,), DATA * 2), ("raw_data is there twice",)),
    "floats as int32": (one((4,), span(5, bytes(4))), ("'w' is FLOAT and has int32_data",)),
    "int64 as floats": (one((2,), span(4, bytes(16)), 7), ("is INT64 and has float_data",)),
    "too few int32": (one((4,), span(5, b"\1\2\3"), 6), ("takes 16 bytes and has 12 in int32_data",)),
    "int32 cut off": (one((1,), span(5, b"\x80"), 6), ("beyond the end",)),
    "numbers one by one": (one((1,), integer(5, 1), 6), ("int32_data has the wire type 0",)),
    "name twice": (model([], [array("w", ONES)] * 2), ("'w' is there twice",)),
    "data location of 2": (one((4,), DATA + integer(14, 2)), ("data location 2",)),
    # external data
    "parent": (outside("../data"), ("'../data'", "'w'", "forged")),
    "parent within": (outside("a/../../data"), ("'a/../../data'",)),
    "absolute": (outside("/etc/passwd"), ("'/etc/passwd'",)),
    "backslashes": (outside("..\\data"), ("'..\\\\data'",)),
    "a null byte": (outside("da\0ta"), (r"'da\x00ta'",)),
    "a new line": (outside("da\nta"), (r"'da\nta'",)),
    "no location": (one((4,), external("") + b""), ("''",)),
    "the directory": (outside("."), ("'.'",)),
    "a directory": (outside("folder"), ("directory",)),
    "memory address": (outside("*/_ORT_MEM_ADDR_/*", offset=0, length=16), ("missing",)),
    "missing file": (outside("none"), ("none: is missing", "'w'")),
    "link out of it": (outside("link"), ("link that leads out",)),
    "pipe": (outside("fifo"), ("pipe",)),
    "empty file": (outside("empty"), ("is empty",)),
    "offset past the end": (outside("data", offset=64), ("ends at byte 80", "64", "truncated")),
    "one byte past the end": (outside("data", offset=49), ("ends at byte 65",)),
    "offset of 2^63": (outside("data", offset=1 << 63), ("offset", "no number")),
    "offset of 2^59": (outside("data", offset=1 << 59), ("ends at byte 576460752303423504",)),
    "offset below zero": (outside("data", offset=-1), ("offset", "no number: '-1'")),
    "offset in other digits": (outside("data", offset="١٢"), ("offset", "no number")),
    "offset of no digits": (outside("data", offset=""), ("offset", "no number")),
    "offset of a million digits": (outside("data", offset="9" * 60_000), ("offset", "no number")),
    "length too short": (outside("data", length=15), ("takes 16 bytes and has 15",)),
    "length below zero": (outside("data", length=-16), ("length", "no number")),
    "key twice": (one((4,), external("data") + span(13, span(1, "location") + span(2, "b"))), ("keys", "twice")),
    "data here and there": (one((4,), DATA + external("data")), ("within the file and in another",)),
    "there and not said": (one((4,), external("data")[:-2]), ("within the file and in another",)),
    "overlap": (
        model([], [tensor(n, (4,), external("data", offset=at)) for n, at in (("a", 0), ("b", 8))]),
        ("'a'", "'b'", "overlap"),
    ),
    "tied and overlap": (
        model([], [tensor(n, (4,), external("data", offset=at)) for n, at in (("a", 0), ("b", 0), ("c", 8))]),
        ("'c'", "overlap"),
    ),
}

UNSUPPORTED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "type 0": (one((4,), DATA, 0), ("'w'", "type 0")),
    "strings": (one((1,), span(6, "a"), 8), ("'w'", "type 8")),
    "type 99": (one((4,), DATA, 99), ("'w'", "type 99")),
    "segments": (one((4,), DATA + span(3, integer(1, 0))), ("'w'", "segments")),
    "sparse": (model(rest=span(15, b"")), ("sparse",)),
    "long int32": (one((1 << 20,), span(5, bytes(1 << 20)), 6), ("'w'", "raw_data")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's directory with a file of external data and what is none."""
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (folder / "data").write_bytes(bytes(range(64)))
    (folder / "empty").touch()
    (tmp_path / "secret").write_bytes(bytes(64))
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "fifo")
    return folder


def refuse(path: Path, words: tuple[str, ...], error: type[ForgeError] = FormatError) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ForgeError) as caught:
            ONNX(path)
        assert tracemalloc.get_traced_memory()[1] < MAX_PEAK_BYTES
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.isprintable()
    assert str(path.parent) in message
    assert len(message) < len(str(path)) + 300
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_onnx_file_is_a_format_error(folder: Path, name: str) -> None:
    data, words = FORGED[name]
    (folder / "m.onnx").write_bytes(data)
    refuse(folder / "m.onnx", words)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_onnx_file_is_named(folder: Path, name: str) -> None:
    data, words = UNSUPPORTED[name]
    (folder / "m.onnx").write_bytes(data)
    refuse(folder / "m.onnx", words, UnsupportedError)


def test_there_are_many_hostile_cases() -> None:
    assert len(FORGED) + len(UNSUPPORTED) >= 80


@pytest.mark.parametrize(
    ("field", "count", "words"),
    [
        (span(1, b""), 1 << 18, ("fields",)),  # nodes
        (span(5, b""), 1 << 18, ("fields",)),
        (span(1, span(1, b"") * 64), 1 << 15, ("fields",)),  # inputs of nodes
        (integer(99, 1), 1 << 21, ("fields",)),
    ],
    ids=["nodes", "initializers", "inputs", "unknown"],
)
def test_many_small_fields_take_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: bytes, count: int, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(protobuf, "MAX_FIELDS", 1 << 12)  # so that the test is quick: memory is in proportion to it
    (tmp_path / "m.onnx").write_bytes(HEAD + span(7, field * (count >> 6)))
    refuse(tmp_path / "m.onnx", words)


def test_a_file_of_terabytes_takes_no_memory(folder: Path) -> None:
    """A sparse file, whose one tensor is skipped."""
    size = 1 << 40
    inner = tensor("w", (size // 4,), span(9, b"", size))
    data = HEAD + span(7, span(5, inner, len(inner) + size), len(span(5, inner, len(inner) + size)) + size)
    with open(folder / "m.onnx", "wb") as file:
        file.write(data)
        try:
            file.truncate(len(data) + size)
        except OSError:
            pytest.skip("no file system for a file of a terabyte")
    tracemalloc.start()
    with ONNX(folder / "m.onnx") as opened:
        found = opened.graph.initializers["w"]
        out = np.ones(16, np.uint8)
        opened.read(found, size - 16, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.nbytes, found.start, out.any()) == (size, len(data), False)
    assert peak < MAX_PEAK_BYTES


def test_data_that_changes_is_refused(folder: Path) -> None:
    (folder / "m.onnx").write_bytes(outside("data", offset=16))
    with ONNX(folder / "m.onnx") as opened:
        (folder / "data").write_bytes(bytes(32))
        with pytest.raises(FormatError, match="data: changed from 64 to 32 bytes"):
            opened.read(opened.graph.initializers["w"], 0, np.empty(16, np.uint8))


def test_a_file_in_another_ones_place_is_refused(folder: Path) -> None:
    (folder / "m.onnx").write_bytes(outside("data"))
    with ONNX(folder / "m.onnx") as opened:
        opened.check_path()
        (folder / "new").write_bytes(bytes(64))
        os.replace(folder / "new", folder / "data")
        with pytest.raises(FormatError, match="data: was replaced"):
            opened.check_path()


def use(path: Path) -> bool:
    """Read all there is; False where the file is refused."""
    try:
        with ONNX(path) as opened:
            for found in opened.graph.initializers.values():
                opened.read(found, 0, np.empty(found.nbytes, np.uint8))
            return bool(list(opened.graph.walk())) or True
    except (FormatError, UnsupportedError):
        return False


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "data").write_bytes(bytes(64))
    return folder / "m.onnx"


@pytest.mark.slow
def test_no_prefix_and_no_changed_byte_is_another_error(scratch: Path) -> None:
    change: list[Callable[[int], bytes]] = [
        lambda i: VALID[:i],
        *(lambda i, b=b: VALID[:i] + bytes([b]) + VALID[i + 1 :] for b in (0, 1, 0x7F, 0x80, 0xFF)),
        *(lambda i, b=b: VALID[:i] + bytes([VALID[i] ^ 1 << b]) + VALID[i + 1 :] for b in range(8)),
    ]
    used = 0
    for i in range(len(VALID)):
        for edit in change:
            scratch.write_bytes(edit(i))
            used += use(scratch)
    assert 0 < used < len(VALID) * len(change)


@settings(max_examples=40)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), max_size=4),
    size=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID))),
    tail=st.binary(max_size=64),
)
def test_random_edits(scratch: Path, edits: list[tuple[int, bytes]], size: int, tail: bytes) -> None:
    data = bytearray(VALID)
    for at, replaced in edits:
        data[at : at + len(replaced)] = replaced
    scratch.write_bytes(data[:size] + tail)
    use(scratch)


def test_the_valid_file_is_read(scratch: Path) -> None:
    scratch.write_bytes(VALID)
    with ONNX(scratch) as opened:
        assert [found.op_type for found in opened.graph.walk()] == ["MatMul", "If", "Relu", "C", "F"]
        assert opened.graph.nodes[0].attributes == {"k": -7}
        assert opened.graph.nodes[3].attributes == {"v": [1.0, 2.0]}
        assert (opened.graph.inputs, opened.graph.outputs) == (("x",), ("z",))
        assert {name: (t.type, t.shape, t.home) for name, t in opened.graph.initializers.items()} == {
            "w": ("FLOAT16", (4, 2), 0),
            "o": ("FLOAT", (4,), 1),
        }
