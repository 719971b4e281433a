"""Hostile, broken and foreign files: one clear line each, little memory, no hang."""

import itertools
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf  # noqa: F401 - forge imports it when a rare type is dequantized: not to be counted there
import numpy as np
import pytest
from gguf_files import (
    ARR,
    BOOL,
    STR,
    U8,
    U16,
    U32,
    U64,
    Blocks,
    Typed,
    array,
    gguf_bytes,
    header,
    key_value,
    string,
    tensor_info,
    write_gguf,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.errors import ForgeError, FormatError, UnsupportedError
from forge.formats.checkpoint import StringArray
from forge.formats.gguf import read

MAX_PEAK_BYTES = 5 << 20
HUGE = 2**64 - 1
ONES = np.ones(8, np.float32)  # 32 bytes


def keys(*entries: tuple[str | bytes, Any]) -> bytes:
    return gguf_bytes(entries)


def raw_key(data: bytes) -> bytes:
    """A file of one key-value, given as bytes."""
    return header(0, 1) + data


def typed(kind: int, data: bytes) -> bytes:
    return struct.pack("<I", kind) + data


def raw_array(item: int, count: int, data: bytes = b"") -> bytes:
    return keys(("a", typed(ARR, struct.pack("<IQ", item, count) + data)))


def raw_info(info: bytes) -> bytes:
    """A file of one tensor info, given as bytes, and 64 bytes of data."""
    head = header(1, 0) + info
    return head + bytes(-len(head) % 32 + 64)


def tensors(**named: Any) -> bytes:
    return gguf_bytes({}, named)


def nested(depth: int) -> bytes:
    return keys(("a", typed(ARR, struct.pack("<IQ", ARR, 1) * (depth - 1) + array(U8, [1]))))


VALID = gguf_bytes(
    {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "eps": 1e-5,
        "flag": True,
        "tokens": ["a", "bc", "ü"],
        "scores": [0.5, 1.5],
        "deep": Typed(ARR, [[1, 2], [3]]),
    },
    {"w": np.ones((2, 8), np.float32), "q": Blocks(3, (2, 32), bytes(40)), "x": Blocks(39, (1, 32), bytes(17))},
)

# name: (bytes of the file, words that the message must have)
FORGED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # the header
    "one byte": (b"G", ("not a GGUF file",)),
    "magic alone": (b"GGUF", ("version", "truncated")),
    "half a version": (b"GGUF\3\0", ("version", "truncated")),
    "no counts": (b"GGUF" + struct.pack("<I", 3), ("header", "truncated")),
    "half the counts": (header(0, 0)[:20], ("header", "truncated")),
    "all tensors there can be": (header(HUGE, 0) + bytes(64), (str(HUGE), "tensors")),
    "all keys there can be": (header(0, HUGE) + bytes(64), (str(HUGE), "keys")),
    "a negative count": (header(0, 1 << 63) + bytes(64), ("keys",)),
    "counts whose sizes overflow": (header(1 << 59, 1 << 60) + bytes(64), ("may hold",)),
    "one tensor too many": (gguf_bytes({}, {"t": ONES}, num_tensors=2), ("tensor 2 of 2",)),
    "one key too many": (gguf_bytes({"k": "v" * 40}, num_keys=2), ("key 2 of 2", "truncated")),
    "more keys than any model": (header(0, 70_000) + bytes(1 << 20), ("70000 keys",)),
    "more tensors than any model": (header(70_000, 0) + bytes(3 << 20), ("70000 tensors",)),
    # key-values
    "key of all lengths": (raw_key(struct.pack("<Q", HUGE) + bytes(64)), ("key 1 of 1", str(HUGE))),
    "key beyond the end": (raw_key(struct.pack("<Q", 100) + bytes(64)), ("key 1 of 1", "truncated")),
    "key of no bytes": (raw_key(string("") + bytes(32)), ("key 1 of 1", "0 bytes")),
    "key of too many bytes": (keys(("k" * 65_536, 1)), ("65536 bytes",)),
    "key that is no UTF-8": (keys((b"k\xff\xfe", 1)), ("key 1 of 1", "UTF-8")),
    "key twice": (keys(("k", 1), ("k", 2)), ("'k'", "twice")),
    "key of two lines twice": (keys(("a\nb", 1), ("a\nb", 2)), (r"'a\nb'", "twice")),
    "long key twice": (keys(("k" * 999, 1), ("k" * 999, 2)), ("kkk...", "twice")),
    "key without a type": (raw_key(string("k" * 20)), ("'kkk", "truncated")),
    "value type 13": (keys(("k", typed(13, bytes(8)))), ("'k'", "type 13")),
    "value type of all bits": (keys(("k", typed(2**32 - 1, bytes(8)))), ("'k'", "type 4294967295")),
    "half a number": (keys(("kkk", typed(U64, bytes(7)))), ("'kkk'", "truncated")),
    "no number": (keys(("kkkkkk", typed(U32, b""))), ("'kkkkkk'", "truncated")),
    "string of all lengths": (keys(("k", typed(STR, struct.pack("<Q", HUGE)))), ("'k'", str(HUGE))),
    "string one byte too long": (keys(("k", typed(STR, struct.pack("<Q", 4) + b"abc"))), ("'k'", "truncated")),
    "boolean of two": (keys(("k", typed(BOOL, b"\2"))), ("'k'", "boolean")),
    "boolean of 255 in an array": (raw_array(BOOL, 3, b"\0\1\xff"), ("'a'", "boolean")),
    "array of an unknown type": (raw_array(77, 3, bytes(64)), ("'a'", "type 77")),
    "array without a length": (keys(("aaaa", typed(ARR, struct.pack("<I", U8)))), ("'aaaa'", "truncated")),
    "bytes of all lengths": (raw_array(U8, HUGE, bytes(64)), ("'a'", str(HUGE))),
    "numbers whose size overflows": (raw_array(U64, 1 << 61, bytes(64)), ("'a'", str(1 << 64))),
    "booleans of all lengths": (raw_array(BOOL, HUGE, bytes(64)), ("'a'", str(HUGE))),
    "half an array": (raw_array(U32, 4, bytes(15)), ("'a'", "truncated")),
    "strings of all lengths": (raw_array(STR, HUGE, bytes(64)), ("'a'", f"{HUGE} strings")),
    "strings whose size overflows": (raw_array(STR, 1 << 61, bytes(64)), ("'a'", "strings")),
    "one string too many": (raw_array(STR, 3, string("a" * 20) + string("b")), ("'a'", "3 strings")),
    "last string too long": (raw_array(STR, 2, string("a") + struct.pack("<Q", 9) + b"b"), ("'a'", "truncated")),
    "first string of all lengths": (raw_array(STR, 2, struct.pack("<Q", HUGE) + string("bbb")), ("'a'", "strings")),
    "strings that step back to the start": (raw_array(STR, 5, struct.pack("<Q", 2**64 - 8) * 5), ("'a'", "strings")),
    "all arrays there can be": (raw_array(ARR, HUGE, bytes(64)), ("'a'", f"{HUGE} arrays")),
    "arrays whose size overflows": (raw_array(ARR, 1 << 62, bytes(64)), ("'a'", "arrays")),
    "arrays in arrays of all lengths": (
        raw_array(ARR, 2, struct.pack("<IQ", ARR, 1 << 60) + bytes(64)),
        ("'a'", "arrays"),
    ),
    "arrays nested five deep": (nested(5), ("'a'", "nested")),
    "arrays nested without end": (nested(20_000), ("'a'", "nested")),
    "unknown type in a nested array": (raw_array(ARR, 1, struct.pack("<IQ", 99, 1) + bytes(64)), ("'a'", "type 99")),
    "half a nested array": (raw_array(ARR, 2, array(U8, [1])), ("'a'", "truncated")),
    # alignment
    "alignment 0": (keys(("general.alignment", Typed(U32, 0))), ("general.alignment", "power of 2")),
    "alignment 24": (keys(("general.alignment", Typed(U32, 24))), ("general.alignment", "power of 2")),
    "alignment 2 GiB": (keys(("general.alignment", Typed(U32, 1 << 31))), ("general.alignment", "to 1048576")),
    "alignment is a string": (keys(("general.alignment", "32")), ("general.alignment", "'32'")),
    "alignment is a boolean": (keys(("general.alignment", True)), ("general.alignment", "True")),
    "alignment is an array": (keys(("general.alignment", [32])), ("general.alignment", "an array of 1")),
    # tensor infos
    "tensor without a name": (raw_info(tensor_info("", [8], 0, 0)), ("tensor 1 of 1", "0 bytes")),
    "tensor name of 65 bytes": (raw_info(tensor_info("t" * 65, [8], 0, 0)), ("tensor 1 of 1", "65 bytes")),
    "tensor name of all lengths": (raw_info(struct.pack("<Q", HUGE)), ("tensor 1 of 1", str(HUGE))),
    "tensor name beyond the end": (header(1, 0) + struct.pack("<Q", 60) + bytes(40), ("tensor 1 of 1", "truncated")),
    "tensor name that is no UTF-8": (raw_info(tensor_info(b"\xc0\x80", [8], 0, 0)), ("tensor 1 of 1", "UTF-8")),
    "tensor twice": (gguf_bytes({}, [("t", ONES), ("t", ONES)]), ("'t'", "twice")),
    "no dimensions": (raw_info(tensor_info("t", [], 0, 0)), ("'t'", "0 dimensions")),
    "five dimensions": (raw_info(tensor_info("t", [1] * 5, 0, 0)), ("'t'", "5 dimensions")),
    "all dimensions there can be": (raw_info(tensor_info("t", [8], 0, 0, 2**32 - 1)), ("'t'", "4294967295 dimensions")),
    "dimension of 0": (raw_info(tensor_info("t", [8, 0], 0, 0)), ("'t'", "shape (0, 8)")),
    "dimension of all bits": (raw_info(tensor_info("t", [HUGE], 0, 0)), ("'t'", "shape")),
    "dimensions whose product wraps to 0": (raw_info(tensor_info("t", [1 << 32, 1 << 32], 0, 0)), ("'t'", "shape")),
    "dimensions whose product wraps to 8": (raw_info(tensor_info("t", [(1 << 61) + 1, 8], 0, 0)), ("'t'", "shape")),
    "size in bytes that wraps": (raw_info(tensor_info("t", [1 << 62], 28, 0)), ("'t'", "truncated")),
    "rows of 33 in Q4_1": (raw_info(tensor_info("t", [33], 3, 0)), ("'t'", "Q4_1", "32")),
    "rows of 640 in Q4_K": (raw_info(tensor_info("t", [640, 2], 12, 0)), ("'t'", "Q4_K", "256")),
    "info without its shape": (header(1, 0) + string("t" * 30) + struct.pack("<I", 4), ("'ttt", "truncated")),
    "info without its type": (header(1, 0) + tensor_info("t" * 60, [8], 0, 0)[:-12], ("'ttt", "truncated")),
    "info without its offset": (header(1, 0) + tensor_info("t" * 60, [8], 0, 0)[:-8], ("'ttt", "truncated")),
    # data
    "offset not aligned": (raw_info(tensor_info("t", [8], 0, 4)), ("'t'", "aligned")),
    "offset beyond the end": (raw_info(tensor_info("t", [8], 0, 96)), ("'t'", "truncated")),
    "offset that wraps to the header": (raw_info(tensor_info("t", [8], 0, 2**64 - 64)), ("'t'", "truncated")),
    "one byte short": (tensors(t=ONES)[:-1], ("'t'", "truncated", "download")),
    "no data": (header(1, 0) + tensor_info("t", [8], 0, 0), ("'t'", "truncated")),
    "no data for the second": (tensors(t=ONES, u=ONES)[:-32], ("'u'", "truncated")),
    "tensor larger than the file": (raw_info(tensor_info("t", [1 << 40], 0, 0)), ("'t'", "truncated")),
    "two tensors in one place": (
        tensors(t=ONES, u=Blocks(0, (8,), ONES.tobytes(), offset=0)),
        ("'t'", "'u'", "overlap"),
    ),
    "tensor inside another": (tensors(t=np.ones(24, np.float32), u=Blocks(0, (8,), b"", offset=32)), ("overlap",)),
    "tensor into the next": (tensors(t=Blocks(0, (9,), bytes(32)), u=ONES), ("'t'", "'u'", "overlap")),
    "alignment moves the data out": (
        gguf_bytes({"general.alignment": Typed(U32, 4096)}, {"t": ONES}),
        ("'t'", "truncated"),
    ),
    # foreign files
    "empty": (b"", ("empty",)),
    "zeros": (bytes(4096), ("zeros", "download")),
    "text": (b"hello, model", ("not a GGUF file", "hello, m")),
    "control characters": (b"\n\r\x1b[2J" * 9, ("not a GGUF file", r"\n\r\x1b")),
    "lower-case magic": (b"gguf" + VALID[4:], ("not a GGUF file",)),
    "safetensors": (struct.pack("<Q", 64) + b'{"__metadata__":{}}', ("safetensors",)),
    "zip": (b"PK\x03\x04" + bytes(60), ("zip",)),
    "pickle": (b"\x80\x02}q\x00.", ("pickle",)),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), ("gzip",)),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), ("zstd",)),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), ("HDF5",)),
    "web page": (b"<!DOCTYPE html><html>404", ("web page",)),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ("git lfs pull",)),
    "JSON": (b'{"model_type": "llama"}', ("JSON",)),
    "GGML": (b"lmgg" + bytes(60), ("before GGUF",)),
    "GGJT": (b"tjgg" + bytes(60), ("before GGUF",)),
    "big-endian magic": (b"FUGG" + bytes(60), ("big-endian",)),
}
UNSUPPORTED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "version 0": (gguf_bytes(version=0), ("version 0",)),
    "version 1": (gguf_bytes(version=1), ("version 1", "convert")),
    "version 4": (gguf_bytes(version=4), ("version 4",)),
    "version of all bits": (gguf_bytes(version=2**32 - 1), ("version 4294967295",)),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian",)),
    "tensor type that was removed": (raw_info(tensor_info("t", [32], 4, 0)), ("'t'", "type 4")),
    "tensor type of the future": (raw_info(tensor_info("t", [32], 9999, 0)), ("'t'", "type 9999")),
}


@contextmanager
def bounded(max_calls: int = 2000) -> Iterator[None]:
    """What happens inside takes little memory (NumPy's included) and few calls and returns of functions."""
    calls = itertools.count()
    tracemalloc.start()
    sys.setprofile(lambda *_: next(calls))
    try:
        yield
    finally:
        sys.setprofile(None)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < MAX_PEAK_BYTES
    assert next(calls) < max_calls


def refuse(path: Path, words: tuple[str, ...], error: type[ForgeError] = FormatError, named: str | None = None) -> None:
    with bounded(), pytest.raises(ForgeError) as caught:
        read(path)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.isprintable()  # one line
    assert (named or path.name) in message
    assert len(message) < len(str(path)) + 200
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_gguf_file_is_a_format_error(tmp_path: Path, name: str) -> None:
    data, words = FORGED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    refuse(path, words)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_gguf_file_is_named(tmp_path: Path, name: str) -> None:
    data, words = UNSUPPORTED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    refuse(path, words, UnsupportedError)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing.gguf", ("No such file",)),
        (lambda folder: folder, ("directory",)),
        (fifo, ("pipe or a device",)),
        (loop, ("symbolic links",)),
        (lambda folder: Path("/dev/null"), ("pipe or a device",)),
        (lambda folder: Path("/dev/zero"), ("pipe or a device",)),
        (lambda folder: Path("/proc/self/maps"), ("empty",)),
        (lambda folder: write_gguf(folder / "m.gguf") / "m", ("Not a directory",)),
        (lambda folder: folder / ("m" * 300), ("too long",)),
    ],
    ids=["missing", "directory", "fifo", "loop", "null", "zero", "proc", "below-a-file", "long-name"],
)
def test_path_that_is_no_file(tmp_path: Path, make: Callable[[Path], Path], words: tuple[str, ...]) -> None:
    path = make(tmp_path)
    with pytest.raises(FormatError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_path_with_a_null_byte() -> None:
    with pytest.raises(FormatError, match="null byte"):
        read("m\0.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.chmod(0)
    refuse(path, ("Permission denied",))


@pytest.mark.parametrize(
    "value",
    [
        typed(STR, struct.pack("<Q", 1 << 33)),
        typed(ARR, struct.pack("<IQ", STR, 1 << 30)),
        typed(ARR, struct.pack("<IQ", STR, 1) + struct.pack("<Q", 1 << 33)),
        typed(ARR, struct.pack("<IQ", BOOL, 1 << 33)),
        typed(ARR, struct.pack("<IQ", ARR, 1 << 29)),
    ],
    ids=["string", "strings", "long string", "booleans", "arrays"],
)
def test_a_sparse_file_of_terabytes_is_refused_at_once(tmp_path: Path, value: bytes) -> None:
    """16 GiB that take no disk: the bytes claimed are there."""
    path = tmp_path / "m.gguf"
    path.write_bytes(keys(("k", value)))
    os.truncate(path, 1 << 34)
    refuse(path, ("'k'", "forged"))


# Shards: the keys of the two files of a set, each holding a tensor; what is wrong, and where.
def shard(number: Any, count: Any = 2, total: int = 2) -> dict[str, Any]:
    split = {"split.no": number, "split.count": count, "split.tensors.count": Typed(U16, total)}
    return {key: value for key, value in split.items() if value is not None}


@pytest.mark.parametrize(
    ("first", "second", "named", "words"),
    [
        (shard(0), None, "m-00002-of-00002.gguf", ("missing", "shard 2 of 2")),
        (shard(0), shard(0), "m-00002-of-00002.gguf", ("shard 1 of 2", "belong")),
        (shard(0), shard(1, 3), "m-00002-of-00002.gguf", ("shard 2 of 3", "belong")),
        (shard(0), {}, "m-00002-of-00002.gguf", ("split.no", "missing")),
        (shard(0), shard("1"), "m-00002-of-00002.gguf", ("split.no", "integer")),
        (shard(0, total=3), shard(1), "m-00001-of-00002.gguf", ("2 tensors", "3")),
        (shard(None), shard(1), "m-00001-of-00002.gguf", ("split.no", "missing")),
        (shard("0"), shard(1), "m-00001-of-00002.gguf", ("split.no", "integer")),
        (shard(2), shard(1), "m-00001-of-00002.gguf", ("split.no", "to 1")),
        (shard(0, "2"), shard(1), "m-00001-of-00002.gguf", ("split.count", "integer")),
        (shard(0, 65_536), shard(1), "m-00001-of-00002.gguf", ("split.count", "65535")),
        (shard(0, 65_535), shard(1), "m-00001-of-00002.gguf", ("named", "-00001-of-65535.gguf")),
        (shard(1), shard(1), "m-00001-of-00002.gguf", ("named", "-00002-of-00002.gguf")),
    ],
)
def test_shards_that_disagree_are_refused(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any] | None, named: str, words: tuple[str, ...]
) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", first, {"a": ONES})
    if second is not None:
        write_gguf(tmp_path / "m-00002-of-00002.gguf", second, {"b": ONES})
    refuse(path, words, named=named)


def test_a_later_shard_names_the_first(tmp_path: Path) -> None:
    refuse(write_gguf(tmp_path / "m-00002-of-00002.gguf", shard(1)), ("shard 2 of 2", "open", "m-00001-of-00002.gguf"))


def test_a_renamed_shard(tmp_path: Path) -> None:
    refuse(write_gguf(tmp_path / "m.gguf", shard(0)), ("shard 1 of 2", "-00001-of-00002.gguf"))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", shard(0), {"a": ONES})
    write_gguf(tmp_path / "m-00002-of-00002.gguf", shard(1), {"a": ONES})
    refuse(path, ("'a'", "m-00001-of-00002.gguf"), named="m-00002-of-00002.gguf")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", shard(0), {"a": ONES})
    second = write_gguf(tmp_path / "m-00002-of-00002.gguf", shard(1), {"b": ONES})
    second.write_bytes(second.read_bytes()[:-1])
    refuse(path, ("'b'", "truncated"), named="m-00002-of-00002.gguf")


def use(path: Path) -> bool:
    """Read all there is; False where the file is refused."""
    try:
        with read(path) as file:
            for value in file.metadata.values():
                list(value) if isinstance(value, StringArray) else repr(value)
            for name, info in file.tensors.items():
                assert file.load(name).shape == info.shape
    except (FormatError, UnsupportedError):
        return False
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.gguf"


@pytest.mark.slow
def test_every_prefix_of_a_file_is_refused(scratch: Path) -> None:
    scratch.write_bytes(VALID)
    assert use(scratch)
    with bounded(2000 * len(VALID)):
        for size in range(len(VALID)):
            scratch.write_bytes(VALID[:size])
            assert not use(scratch), size


@pytest.mark.slow
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_every_byte_changed(scratch: Path, byte: int) -> None:
    used = 0
    with bounded(2000 * len(VALID)):
        for i in range(len(VALID)):
            scratch.write_bytes(VALID[:i] + bytes([byte]) + VALID[i + 1 :])
            used += use(scratch)
    assert 0 < used < len(VALID)


@pytest.mark.slow
@settings(max_examples=400)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), max_size=4),
    size=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID))),
    tail=st.binary(max_size=64),
)
def test_random_edits(scratch: Path, edits: list[tuple[int, bytes]], size: int, tail: bytes) -> None:
    data = bytearray(VALID)
    for at, change in edits:
        data[at : at + len(change)] = change
    scratch.write_bytes(data[:size] + tail)
    use(scratch)


@pytest.mark.slow
def test_many_small_things(tmp_path: Path) -> None:
    """Strings, arrays and keys of almost no bytes: Python's objects are larger than they are, within bounds."""
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_array(STR, 1 << 17, bytes(1 << 20)))
    with bounded(2_000_000):
        assert len(list(read(path).metadata["a"])) == 1 << 17
    path.write_bytes(raw_array(ARR, 1 << 13, array(U8, []) * (1 << 13)))
    with bounded(2_000_000):
        assert read(path).metadata["a"] is not None
    path.write_bytes(header(0, 20_000) + b"".join(key_value(f"{i}", True) for i in range(20_000)))
    with bounded(2_000_000):
        assert len(read(path).metadata) == 20_000
