"""Hostile, broken and foreign safetensors files, indices and JSON: one clear line each, little memory, no hang."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors_files import framed, ones, safetensors_bytes, write_model

from forge.errors import ForgeError, FormatError, UnsupportedError
from forge.formats import safetensors
from forge.formats.source import Source

MAX_PEAK_BYTES = 5 << 20
DIGITS = "9" * 30


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), size: int = 8) -> bytes:
    """A file of one tensor `t` and of `size` bytes of data."""
    return framed(json.dumps({"t": entry(dtype, shape, offsets)}), bytes(size))


def several(size: int, **tensors: Any) -> bytes:
    return framed(json.dumps(tensors), bytes(size))


def text(part: str, size: int = 8) -> bytes:
    """A file of one tensor `t` whose header has `part` in the place of its fields."""
    return framed(f'{{"t":{{{part}}}}}', bytes(size))


VALID = safetensors_bytes(
    {"a": ones(2, 3), "b": ("BF16", np.arange(4, dtype=np.uint16)), "c": np.arange(3, dtype=np.int64), "d": ones(0)},
    {"format": "pt"},
)

# name: (bytes of the file, words that the message must have)
FORGED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # the length of the header
    "empty": (b"", ("is empty", "download")),
    "one byte": (b"\x08", ("not a safetensors file",)),
    "seven bytes": (bytes([1]) * 7, ("not a safetensors file",)),
    "a length alone": (struct.pack("<Q", 2), ("not a safetensors file",)),
    "a header of no bytes": (struct.pack("<Q", 0), ("not a safetensors file",)),
    "a header of no bytes before data": (struct.pack("<Q", 0) + b"{}", ("header is not JSON", "character 0")),
    "a header of one byte": (framed("{"), ("header is not JSON",)),
    "a header one byte too long": (struct.pack("<Q", 3) + b"{}", ("header has 3 bytes", "2 are left", "truncated")),
    "a header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", (str(1 << 63), "truncated or forged")),
    "a header of all bits": (struct.pack("<Q", 2**64 - 1) + b"{}", (str(2**64 - 1), "truncated or forged")),
    "a header whose end wraps": (struct.pack("<Q", 2**64 - 8) + b"{}", (str(2**64 - 8), "truncated or forged")),
    "half a header": (VALID[:60], ("header has", "truncated")),
    "an empty header of spaces": (framed(" " * 8), ("not a safetensors file",)),
    # the header's JSON
    "spaces before the header": (framed(" {}"), ("not a safetensors file",)),
    "an array for a header": (framed("[]"), ("not a safetensors file",)),
    "two objects": (framed("{}{}"), ("header is not JSON", "Extra data", "character 2")),
    "zeros behind the object": (framed(b"{}\0\0"), ("header is not JSON", "Extra data")),
    "an object without an end": (framed('{"t":'), ("header is not JSON",)),
    "a string without an end": (framed('{"t'), ("header is not JSON",)),
    "a comma at the end": (framed('{"t":{},}'), ("header is not JSON",)),
    "single quotes": (framed("{'t':{}}"), ("header is not JSON",)),
    "a comment": (framed("{/*t*/}"), ("header is not JSON",)),
    "a control character in a string": (framed(b'{"a\nb":{}}'), ("header is not JSON", "control character")),
    "an unknown escape": (framed(r'{"a\x":{}}'), ("header is not JSON", "escape")),
    "bytes that are no UTF-8": (framed(b'{"a\xff":{}}'), ("header is not UTF-8", "byte 3")),
    "an overlong zero": (framed(b'{"a\xc0\x80":{}}'), ("header is not UTF-8",)),
    "a surrogate in UTF-8": (framed(b'{"a\xed\xa0\x80":{}}'), ("header is not UTF-8",)),
    "half a surrogate pair": (framed(r'{"a\ud800":{}}'), ("half a surrogate pair",)),
    "half a surrogate pair in a value": (text(r'"dtype":"\uDFFF","shape":[2],"data_offsets":[0,8]'), ("surrogate",)),
    "UTF-16": (framed('{"t":{}}'.encode("utf-16-le")), ("header is not JSON",)),
    "a tensor twice": (framed('{"t":{},"t":{}}'), ("'t' twice",)),
    "a tensor twice, once escaped": (framed(r'{"t":{},"\u0074":{}}'), ("'t' twice",)),
    "a field twice": (text('"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]'), ("'dtype' twice",)),
    "metadata twice": (framed('{"__metadata__":{},"__metadata__":{}}'), ("'__metadata__' twice",)),
    "33 objects in each other": (framed('{"a":' * 33 + "1" + "}" * 33), ("nested deeper than 32",)),
    "100,000 arrays in each other": (framed('{"a":' + "[" * 100_000), ("nested deeper than 32",)),
    "arrays behind an escaped quote": (framed(r'{"a\\\"":' + "[" * 100_000), ("nested deeper than 32",)),
    "a number of 5,000 digits": (text(f'"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,8]'), ("5000 digits",)),
    "NaN": (text('"dtype":"F32","shape":[NaN],"data_offsets":[0,8]'), ("NaN",)),
    "Infinity": (text('"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]'), ("Infinity",)),
    "-Infinity": (text('"dtype":"F32","shape":[2],"data_offsets":[-Infinity,8]'), ("-Infinity",)),
    "1e999": (text('"dtype":"F32","shape":[1e999],"data_offsets":[0,8]'), ("1e999", "float64")),
    "a number with a zero before it": (text('"dtype":"F32","shape":[02],"data_offsets":[0,8]'), ("not JSON",)),
    # metadata
    "metadata is a string": (framed('{"__metadata__":"pt"}'), ("__metadata__", "'pt'")),
    "metadata is null": (framed('{"__metadata__":null}'), ("__metadata__", "null")),
    "metadata holds a number": (framed('{"__metadata__":{"a":"b","c":1}}'), ("__metadata__", "'c' is 1")),
    "metadata holds an object": (framed('{"__metadata__":{"a":{"b":"c"}}}'), ("'a' is an object of 1",)),
    # names
    "a name of no characters": (several(8, **{"": entry()}), ("tensor ''", "printable name")),
    "a name with a new line": (several(8, **{"a\nb": entry()}), (r"'a\nb'", "printable")),
    "a name with an escape of a terminal": (several(8, **{"a\x1b[2J": entry()}), (r"'a\x1b[2J'", "printable")),
    "a name with a zero": (several(8, **{"a\0": entry()}), (r"'a\x00'", "printable")),
    "a name that runs backwards": (several(8, **{"a\u202eb": entry()}), (r"'a\u202eb'", "printable")),
    "a name of 513 characters": (several(8, **{"n" * 513: entry()}), ("nnn...", "1 to 512")),
    # fields
    "a tensor is a number": (framed('{"t":7}'), ("'t'", "dtype, shape and data_offsets")),
    "a tensor is null": (framed('{"t":null}'), ("'t'", "dtype, shape and data_offsets")),
    "a tensor is an array": (framed('{"t":["F32",[2],[0,8]]}'), ("'t'", "dtype, shape and data_offsets")),
    "no dtype": (text('"shape":[2],"data_offsets":[0,8]'), ("'t'", "should have dtype")),
    "no shape": (text('"dtype":"F32","data_offsets":[0,8]'), ("'t'", "should have dtype, shape")),
    "no offsets": (text('"dtype":"F32","shape":[2]'), ("'t'", "data_offsets")),
    "a fourth field": (text('"dtype":"F32","shape":[2],"data_offsets":[0,8],"file":"/etc/passwd"'), ("nothing else",)),
    "a field in capitals": (text('"DTYPE":"F32","shape":[2],"data_offsets":[0,8]'), ("nothing else",)),
    # dtypes
    "a dtype that is a number": (one(7), ("'t'", "dtype", "7")),
    "a dtype that is null": (one(None), ("'t'", "dtype", "null")),
    "a dtype that is an array": (one(["F32"]), ("'t'", "dtype", "an array of 1")),
    "a dtype of half the size": (one("F16"), ("'t' is F16 [2]", "4 bytes", "from 0 to 8")),
    "a dtype of twice the size": (one("F64"), ("'t' is F64 [2]", "16 bytes", "from 0 to 8")),
    # shapes
    "a shape that is a number": (one(shape=2), ("'t'", "shape", "2")),
    "a shape that is a string": (one(shape="2"), ("'t'", "shape", "'2'")),
    "a shape that is an object": (one(shape={"0": 2}), ("'t'", "shape", "an object of 1")),
    "a side that is a float": (one(shape=[2.0]), ("'t'", "shape", "integers")),
    "a side that is a boolean": (one(shape=[True, 2]), ("'t'", "shape", "integers")),
    "a side that is a string": (one(shape=["2"]), ("'t'", "shape", "integers")),
    "a side that is null": (one(shape=[None]), ("'t'", "shape", "integers")),
    "a side in a side": (one(shape=[[2]]), ("'t'", "shape", "integers")),
    "a negative side": (one(shape=[-2]), ("'t'", "impossible shape", "[-2]")),
    "two negative sides": (one(shape=[-1, -2]), ("'t'", "impossible shape", "[-1, -2]")),
    "a side of 2^63": (one(shape=[1 << 63]), ("'t'", "impossible shape", str(1 << 63))),
    "a side of 30 digits": (one(shape=[int(DIGITS)]), ("'t'", "impossible shape", DIGITS)),
    "sides whose product wraps to 0": (one(shape=[1 << 32, 1 << 32]), ("'t'", "impossible shape")),
    "sides whose product wraps to 2": (one(shape=[(1 << 63) + 1, 2]), ("'t'", "impossible shape")),
    "nothing of 2^63": (one(shape=[0, 1 << 63], offsets=(0, 0), size=0), ("'t'", "impossible shape")),
    "nine sides": (one(shape=[1] * 9), ("'t'", "at most 8", "an array of 9")),
    "10,000 sides": (one(shape=[1] * 10_000), ("'t'", "at most 8", "an array of 10000")),
    "a shape larger than its bytes": (one(shape=[3]), ("'t' is F32 [3]", "12 bytes", "from 0 to 8")),
    "a shape smaller than its bytes": (one(shape=[1]), ("'t' is F32 [1]", "4 bytes", "from 0 to 8")),
    "a shape of nothing with bytes": (one(shape=[0]), ("'t' is F32 [0]", "0 bytes", "from 0 to 8")),
    # offsets
    "offsets are a number": (one(offsets=8), ("'t'", "data_offsets of two integers", "8")),
    "no offset": (one(offsets=[]), ("'t'", "data_offsets of two integers")),
    "three offsets": (one(offsets=[0, 8, 8]), ("'t'", "data_offsets of two integers", "an array of 3")),
    "offsets are floats": (one(offsets=[0.0, 8.0]), ("'t'", "data_offsets of two integers")),
    "an offset is a boolean": (one(offsets=[False, 8]), ("'t'", "data_offsets of two integers")),
    "an offset is a string": (one(offsets=["0", 8]), ("'t'", "data_offsets of two integers")),
    "offsets are an object": (one(offsets={"0": 0, "1": 8}), ("'t'", "data_offsets of two integers")),
    "offsets run backwards": (one(offsets=[8, 0]), ("'t'", "from 8 to 0")),
    "a negative offset": (one(offsets=[-8, 0]), ("'t'", "from -8 to 0")),
    "offsets beyond the end": (one(offsets=[8, 16]), ("'t'", "ends at byte 16 of 8", "truncated")),
    "an offset of 2^63": (one(offsets=[1 << 63, (1 << 63) + 8]), ("'t'", "of 8", "truncated")),
    "an offset of 2^64 - 8, which wraps": (one(offsets=[2**64 - 8, 2**64]), ("'t'", "of 8", "truncated")),
    "one byte short": (VALID[:-1], ("'c'", "truncated", "download")),
    "one byte more": (VALID + b"\0", ("1 bytes behind tensor 'd'", "belong to no tensor")),
    "data without tensors": (framed("{}", bytes(8)), ("8 bytes behind the header",)),
    "a tensor of a petabyte": (one(shape=[1 << 48], offsets=(0, 1 << 50)), ("'t'", "of 8", "truncated")),
    "two tensors in one place": (several(8, t=entry(), u=entry()), ("'t' and tensor 'u' overlap",)),
    "a tensor inside another": (
        several(16, t=entry(shape=[4], offsets=[0, 16]), u=entry(shape=[1], offsets=[4, 8])),
        ("'t' and tensor 'u' overlap",),
    ),
    "a tensor into the next": (several(12, t=entry(), u=entry(offsets=[4, 12])), ("'t' and tensor 'u' overlap",)),
    "a tensor of nothing inside another": (
        several(8, t=entry(), u=entry(shape=[0], offsets=[4, 4])),
        ("'t' and tensor 'u' overlap",),
    ),
    "a hole at the start": (one(offsets=[4, 12], size=12), ("4 bytes between the header and tensor 't'",)),
    "a hole between two": (
        several(20, t=entry(), u=entry(offsets=[12, 20])),
        ("4 bytes between tensor 't' and tensor 'u'",),
    ),
    # foreign files
    "zeros": (bytes(4096), ("not a safetensors file", "zeros", "download")),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), ("not a safetensors file", "GGUF", "*.gguf")),
    "JSON": (b'{"weight_map": {}}', ("not a safetensors file", "JSON")),
    "web page": (b"<!DOCTYPE html><html>404", ("web page", "download")),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ("git lfs pull",)),
    "a zip of PyTorch": (b"PK\x03\x04" + bytes(60), ("PyTorch", "pickles run code", "save_pretrained")),
    "pickle 2": (b"\x80\x02\x8a\nl\xfc\x9cF", ("pickles run code",)),
    "pickle 5": (b"\x80\x05\x95\x0b\0\0\0\0", ("pickles run code",)),
}
UNSUPPORTED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    f"dtype {name}": (one(name), ("'t'", f"'{name[:50]}", "known are", "BF16", "F8_E4M3"))
    for name in ("F4", "F6_E2M3", "F8_E8M0", "U16", "U32", "U64", "C64", "I4", "f32", "F32 ", "", "float32", "x" * 99)
}


def refuse(
    path: Path, words: tuple[str, ...], error: type[ForgeError] = FormatError, named: Path | None = None
) -> None:
    """Opening a file or a directory takes little memory, and fails with a line that has the words."""
    tracemalloc.start()
    try:
        with pytest.raises(ForgeError) as caught:
            safetensors.read_directory(path) if path.is_dir() else safetensors.read_file(path)
        assert tracemalloc.get_traced_memory()[1] < MAX_PEAK_BYTES
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.isprintable()  # one line
    assert message.startswith(f"{named or path}: ")
    assert len(message) < len(str(named or path)) + 250
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_safetensors_file_is_a_format_error(tmp_path: Path, name: str) -> None:
    data, words = FORGED[name]
    path = tmp_path / "m"
    path.write_bytes(data)
    refuse(path, words)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_dtype_is_named(tmp_path: Path, name: str) -> None:
    data, words = UNSUPPORTED[name]
    path = tmp_path / "m"
    path.write_bytes(data)
    refuse(path, words, UnsupportedError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.PTH", "m.ckpt"])
def test_a_name_of_pytorch_is_refused_whatever_it_holds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"(dp0\n.")
    refuse(tmp_path / name, ("PyTorch", "pickles run code when they are opened", "save_pretrained"))


def test_a_header_of_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    """8 GB that take no disk: the bytes claimed are there."""
    path = tmp_path / "m"
    path.write_bytes(struct.pack("<Q", 1 << 32) + b"{}")
    os.truncate(path, 1 << 33)
    refuse(path, (str(1 << 32), "allowed are 16777216"))


def index_of(weight_map: Any, **more: Any) -> str:
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map, **more})


# name: (text of the index, words that the message must have). Its directory has the shard 1.safetensors with `a`.
INDICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty": ("", ("is empty",)),
    "no JSON": ("weights", ("is not JSON",)),
    "an array": ("[]", ("should be a JSON object", "an array of 0")),
    "a number": ("7", ("should be a JSON object", "7")),
    "no map": ("{}", ("weight_map", "null")),
    "a map of nothing": (index_of({}), ("weight_map", "an object of 0")),
    "a map that is an array": (index_of(["a"]), ("weight_map", "an array of 1")),
    "a shard that is a number": (index_of({"a": 1}), ("'a'", ".safetensors file", "1")),
    "a shard that is an object": (index_of({"a": {}}), ("'a'", ".safetensors file", "an object of 0")),
    "a shard of pickles": (index_of({"a": "pytorch_model-00001-of-00002.bin"}), ("'a'", ".safetensors file", ".bin")),
    "the parent": (index_of({"a": "../1.safetensors"}), (".safetensors file beside it", "../1")),
    "a path from the root": (index_of({"a": "/etc/x.safetensors"}), (".safetensors file beside it", "/etc/x")),
    "a folder": (index_of({"a": "b/1.safetensors"}), (".safetensors file beside it", "b/1")),
    "a path of Windows": (index_of({"a": "..\\1.safetensors"}), ("no name of a file in this directory",)),
    "a new line": (index_of({"a": "\n.safetensors"}), (r"'\n.safetensors'", "no name of a file")),
    "a null byte": (index_of({"a": "1\0.safetensors"}), (r"'1\x00.safetensors'", "no name of a file")),
    "a tensor twice": ('{"weight_map":{"a":"1.safetensors","a":"1.safetensors"}}', ("'a' twice",)),
    "two maps": ('{"weight_map":{},"weight_map":{}}', ("'weight_map' twice",)),
    "1,001 shards": (index_of({str(n): f"{n}.safetensors" for n in range(1001)}), ("1001 shards", "allowed are 1000")),
    "nested": ('{"weight_map":' * 40 + "1" + "}" * 40, ("nested deeper",)),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_forged_index_is_a_format_error(tmp_path: Path, name: str) -> None:
    text, words = INDICES[name]
    (tmp_path / "1.safetensors").write_bytes(safetensors_bytes({"a": ones(2)}))
    path = tmp_path / safetensors.INDEX
    path.write_text(text)
    refuse(tmp_path, words, named=tmp_path if "no name of a file" in words[-1] else path)


def reindex(directory: Path, **changes: str | None) -> None:
    """Lists tensors in other shards; None = does not list it."""
    path = directory / safetensors.INDEX
    listed = json.loads(path.read_text())["weight_map"] | changes
    path.write_text(json.dumps({"weight_map": {name: shard for name, shard in listed.items() if shard}}))


def secret(directory: Path) -> Path:
    """A right file outside a directory."""
    path = directory.parent / "secret.safetensors"
    path.write_bytes(safetensors_bytes({"b": ones(1)}))
    return path


def to_another_snapshot(directory: Path) -> None:
    """A link to ../../blobs where the directory is no snapshot."""
    blobs = directory.parent.parent / "blobs"
    blobs.mkdir()
    (directory / "2.safetensors").rename(blobs / "0123")
    (directory / "2.safetensors").symlink_to("../../blobs/0123")


# name: (what happens to a directory of the shards 1 with `a` and `c`, and 2 with `b`, the file to blame, words)
CHANGES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "a shard is missing": (lambda d: (d / "2.safetensors").unlink(), "2.safetensors", ("one of 2 shards is missing",)),
    "a shard is a directory": (
        lambda d: ((d / "2.safetensors").unlink(), (d / "2.safetensors").mkdir()),
        "2.safetensors",
        ("a directory and not a file",),
    ),
    "a shard is a pipe": (
        lambda d: ((d / "2.safetensors").unlink(), os.mkfifo(d / "2.safetensors")),
        "2.safetensors",
        ("a pipe or a device",),
    ),
    "a shard is truncated": (
        lambda d: (d / "2.safetensors").write_bytes((d / "2.safetensors").read_bytes()[:-1]),
        "2.safetensors",
        ("'b'", "truncated"),
    ),
    "a shard links out": (
        lambda d: ((d / "2.safetensors").unlink(), (d / "2.safetensors").symlink_to(secret(d))),
        "2.safetensors",
        ("a link that leads out of its directory",),
    ),
    "a shard links up": (
        lambda d: ((d / "2.safetensors").unlink(), (d / "2.safetensors").symlink_to(f"../{secret(d).name}")),
        "2.safetensors",
        ("a link that leads out of its directory",),
    ),
    "blobs where there is no snapshot": (to_another_snapshot, "2.safetensors", ("leads out of its directory",)),
    "a shard links to itself": (
        lambda d: ((d / "2.safetensors").unlink(), (d / "2.safetensors").symlink_to("2.safetensors")),
        "2.safetensors",
        ("cannot be read: Too many levels of symbolic links",),
    ),
    "the index links out": (
        lambda d: (
            (d / safetensors.INDEX).rename(d.parent / "index"),
            (d / safetensors.INDEX).symlink_to("../index"),
        ),
        safetensors.INDEX,
        ("a link that leads out of its directory",),
    ),
    "a tensor lies in the other shard": (
        lambda d: reindex(d, a="2.safetensors"),
        "1.safetensors",
        ("'a'", "lists in '2.safetensors'"),
    ),
    "a tensor lies in no shard": (
        lambda d: reindex(d, x="2.safetensors"),
        "2.safetensors",
        ("lacks tensor 'x'", "which model.safetensors.index.json lists"),
    ),
    "a tensor that is not listed": (
        lambda d: (d / "2.safetensors").write_bytes(safetensors_bytes({"b": ones(2), "x": ones(1)})),
        "2.safetensors",
        ("'x'", "does not list", "belong together"),
    ),
    "the shard of another model": (
        lambda d: (d / "2.safetensors").write_bytes(safetensors_bytes({"x": ones(2)})),
        "2.safetensors",
        ("has tensor 'x'", "does not list"),
    ),
    "a tensor in both shards": (
        lambda d: (d / "2.safetensors").write_bytes(safetensors_bytes({"a": ones(2), "b": ones(2)})),
        "2.safetensors",
        ("has tensor 'a'", "lists in '1.safetensors'"),
    ),
    "no index": (lambda d: (d / safetensors.INDEX).unlink(), "", ("'1.safetensors'", "download the files")),
    "pickles alone": (
        lambda d: (
            [path.unlink() for path in d.iterdir()],
            (d / "pytorch_model.bin").write_bytes(b"\x80\x02}"),
        ),
        "",
        ("'pytorch_model.bin'", "pickles run code when they are opened", "save_pretrained"),
    ),
    "nothing at all": (lambda d: [path.unlink() for path in d.iterdir()], "", ("has neither model.safetensors nor",)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    change, named, words = CHANGES[name]
    shards = {"1.safetensors": {"a": ones(2), "c": ones(1)}, "2.safetensors": {"b": ones(3)}}
    directory = write_model(tmp_path / "models" / "m", shards)
    change(directory)
    refuse(directory, words, named=directory / named)


def test_an_index_of_more_values_than_tensors_may_have_is_refused_before_objects_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "MAX_LISTED", 500)
    (tmp_path / safetensors.INDEX).write_bytes(b'{"weight_map":[' + b"[]," * 1000 + b"0]}")
    refuse(tmp_path, ("2003 values, allowed are 1500",), named=tmp_path / safetensors.INDEX)


def test_shards_are_opened_no_further_than_the_index_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand shards could hold 65 million tensors that no index lists."""
    directory = write_model(tmp_path, {f"{n}.safetensors": {str(n): ones(1)} for n in range(5)})
    (directory / "1.safetensors").write_bytes(safetensors_bytes({"1": ones(1), "x": ones(1)}))
    opened: list[str] = []

    class Counted(Source):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(path.name)

    monkeypatch.setattr(safetensors, "Source", Counted)
    refuse(directory, ("has tensor 'x'", "does not list"), named=directory / "1.safetensors")
    assert opened == ["0.safetensors", "1.safetensors"]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_is_refused_leaves_no_file_open(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", {f"{n}.safetensors": {str(n): ones(1)} for n in range(5)})
    before = open_descriptors()
    reindex(directory, x="4.safetensors")
    refuse(directory, ("lacks tensor 'x'",), named=directory / "4.safetensors")
    (directory / "4.safetensors").write_bytes(b"{}")
    refuse(directory, ("not a safetensors file",), named=directory / "4.safetensors")
    assert open_descriptors() == before


def test_a_file_that_is_truncated_or_replaced_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(VALID)
    out = np.empty(24, np.uint8)
    with safetensors.read_file(path) as file:
        os.truncate(path, len(VALID) - 24)
        with pytest.raises(FormatError, match="changed from"):
            file.read("a", 0, out)
    path.write_bytes(VALID)
    with safetensors.read_file(path) as file:
        file.check_path()
        (tmp_path / "new").write_bytes(VALID)
        (tmp_path / "new").rename(path)
        file.read("a", 0, out)
        with pytest.raises(FormatError, match="was replaced"):
            file.check_path()


def use(path: Path) -> bool:
    """Read all there is; False where the file is refused."""
    try:
        with safetensors.read_file(path) as file:
            for name, info in file.tensors.items():
                out = np.empty(info.nbytes, np.uint8)
                file.read(name, 0, out)
    except (FormatError, UnsupportedError):
        return False
    return True


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Seeded: bytes replaced, removed, repeated and exchanged. Most damage to a header is found; none is a crash."""
    rng = random.Random(21)
    path = tmp_path / "m"
    header_bytes = struct.unpack_from("<Q", VALID)[0] + 8
    outcomes = {True: 0, False: 0}
    tracemalloc.start()
    for _ in range(150):
        data = bytearray(VALID)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at, length = rng.randrange(header_bytes), rng.randrange(1, 9)
            change = rng.randrange(5)
            if change == 0:
                data[at] = rng.randrange(256)
            elif change == 1:
                data[at] = rng.choice(b'{}[]",:0123456789-eE\\ tfn')
            elif change == 2:
                del data[at : at + length]
            elif change == 3:
                data[at:at] = data[at : at + length]
            else:
                data[at : at + length] = rng.choice((b"-1", b"9223372036854775808", b"null", b"1e400", b"[[[", b"NaN"))
        if rng.randrange(2):  # the length fits again, so the JSON is read to its end
            data[:8] = struct.pack("<Q", max(len(data) - (len(VALID) - header_bytes) - 8, 0))
        path.unlink(missing_ok=True)  # some file systems write a file out when it is truncated
        path.write_bytes(data)
        outcomes[use(path)] += 1
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < MAX_PEAK_BYTES
    assert outcomes[True] > 0  # a letter of a name
    assert outcomes[False] > 100
