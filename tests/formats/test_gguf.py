"""The GGUF reader on proper files, against the `gguf` package's writer and reader."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import ARR, BOOL, F32, F64, I8, I16, I32, I64, STR, U8, U16, U32, U64, Blocks, Typed, write_gguf

from forge.errors import FormatError, UnsupportedError
from forge.formats.checkpoint import StringArray, TensorInfo
from forge.formats.ggml import GGMLType
from forge.formats.gguf import GGUF, read

SCALARS: list[tuple[int, str, Any]] = [
    (U8, "uint8", 255),
    (I8, "int8", -128),
    (U16, "uint16", 65_535),
    (I16, "int16", -32_768),
    (U32, "uint32", 2**32 - 1),
    (I32, "int32", -(2**31)),
    (F32, "float32", 0.1),
    (BOOL, "bool", True),
    (STR, "string", "grüße\n\x00"),
    (U64, "uint64", 2**64 - 1),
    (I64, "int64", -(2**63)),
    (F64, "float64", 0.1),
]


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, StringArray | list) else value


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "token_embd.weight": rng.standard_normal((12, 64)).astype(np.float32),
        "blk.0.norm": rng.standard_normal(7).astype(np.float32),
        "blk.0.experts": rng.standard_normal((2, 3, 32)).astype(np.float16),
    }


def written_by_gguf(path: Path, tensors: dict[str, np.ndarray], **writer: Any) -> Path:
    out = gguf.GGUFWriter(path, "llama", **writer)
    for _, name, value in SCALARS:
        getattr(out, f"add_{name}")(f"value.{name}", value)
    out.add_array("tokens", ["a", "", "ü"])
    out.add_array("scores", [0.5, -1.0])
    for name, tensor in tensors.items():
        out.add_tensor(name, tensor)
    quantized = gguf.quantize(tensors["token_embd.weight"], gguf.GGMLQuantizationType.Q4_1)
    out.add_tensor("quantized", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def same_as_gguf_reader(file: GGUF) -> None:
    theirs = gguf.GGUFReader(file.path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {key: plain(value) for key, value in file.metadata.items()} == fields
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape.tolist()[::-1])
        assert (int(info.type), info.nbytes, info.offset) == (tensor.tensor_type, tensor.n_bytes, tensor.data_offset)
        assert file.raw(tensor.name).tobytes() == tensor.data.tobytes()
        expected = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(info.shape)
        np.testing.assert_array_equal(file.load(tensor.name), expected)


def test_a_file_of_the_gguf_package(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    file = read(written_by_gguf(tmp_path / "m.gguf", tensors))
    assert file.version == 3
    same_as_gguf_reader(file)


def test_gguf_version_2_is_read(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    path = written_by_gguf(tmp_path / "m.gguf", tensors)
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    file = read(str(path))
    assert file.version == 2
    same_as_gguf_reader(file)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_every_alignment_of_tensors_is_read(tmp_path: Path, tensors: dict[str, np.ndarray], alignment: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors, alignment=alignment)
    file = read(path)
    same_as_gguf_reader(file)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.load(name), tensor.astype(np.float32))


@pytest.mark.parametrize(("type", "name", "value"), SCALARS, ids=[name for _, name, _ in SCALARS])
def test_every_scalar_and_array_type(tmp_path: Path, type: int, name: str, value: Any) -> None:
    values = [value, value, type_zero(value)]
    path = write_gguf(
        tmp_path / "m.gguf", {"one": Typed(type, value), "many": Typed(type, values), "none": Typed(type, [])}
    )
    found = read(path).metadata
    expected = np.float32(value).item() if type == F32 else value
    assert found["one"] == expected
    assert isinstance(found["one"], bool) == (type == BOOL)
    assert plain(found["many"]) == [expected, expected, type_zero(value)]
    assert plain(found["none"]) == []
    if type != STR:
        many = found["many"]
        assert isinstance(many, np.ndarray)
        assert many.dtype == np.dtype(name)
        assert not many.flags.writeable


def type_zero(value: Any) -> Any:
    return type(value)()


def test_nested_arrays(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"deep": Typed(ARR, [[1, 2], [], [3]]), "deeper": [[[["x"]]]]})
    assert plain(read(path).metadata["deep"]) == [[1, 2], [], [3]]
    assert plain(read(path).metadata["deeper"]) == [[[["x"]]]]


def test_a_gguf_file_without_tensors_and_keys_is_read(tmp_path: Path) -> None:
    file = read(write_gguf(tmp_path / "m.gguf"))
    assert (dict(file.metadata), dict(file.tensors)) == ({}, {})


def test_strings_that_are_no_utf8_are_replaced(tmp_path: Path) -> None:
    file = read(
        write_gguf(tmp_path / "m.gguf", {"one": Typed(STR, b"a\xff"), "many": Typed(STR, [b"\xc3", b"\xe2\x96\x81"])})
    )
    assert file.get_str("one") == "a\ufffd"
    assert plain(file.metadata["many"]) == ["\ufffd", "\u2581"]


def test_string_arrays_are_decoded_again_each_time(tmp_path: Path) -> None:
    strings = read(write_gguf(tmp_path / "m.gguf", {"s": ["a", "bc"]})).metadata["s"]
    assert isinstance(strings, StringArray)
    assert (len(strings), list(strings), list(strings), repr(strings)) == (2, ["a", "bc"], ["a", "bc"], "<2 strings>")


def test_getters_of_keys_check_type_and_range(tmp_path: Path) -> None:
    metadata = {
        "i": 7,
        "f": 0.5,
        "s": "x",
        "b": True,
        "ss": ["p", "q"],
        "ns": [1, 2],
        "nan": float("nan"),
        "long": "y" * 999,
    }
    file = read(write_gguf(tmp_path / "m.gguf", metadata))
    assert file.get_int("i", min=7, max=7) == 7
    assert file.get_int("absent", 3) == 3
    assert (file.get_float("f"), file.get_float("i"), file.get_float("absent", 1.5)) == (0.5, 7.0, 1.5)
    assert (file.get_str("s"), file.get_str("absent", "")) == ("x", "")
    wrong: list[tuple[Callable[[str], object], str, str]] = [
        (file.get_int, "absent", "missing"),
        (file.get_int, "b", "integer"),
        (file.get_int, "f", "integer"),
        (lambda key: file.get_int(key, min=8), "i", "integer from 8"),
        (lambda key: file.get_int(key, max=6), "i", "to 6"),
        (file.get_float, "s", "number"),
        (file.get_float, "b", "number"),
        (file.get_float, "nan", "finite"),
        (lambda key: file.get_float(key, min=0.6), "f", "from 0.6"),
        (file.get_str, "i", "string"),
        (file.get_int, "ns", "integer.*array of 2"),
        (file.get_str, "ss", "string.*array of 2"),
        (file.get_int, "long", "integer"),
    ]
    for getter, key, words in wrong:
        with pytest.raises(FormatError, match=words) as caught:
            getter(key)
        message = str(caught.value)
        assert str(file.path) in message
        assert repr(key) in message
        assert len(message) < 200 + len(str(file.path))


def test_raw_gives_rows_as_they_lie_in_the_file(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    file = read(write_gguf(tmp_path / "m.gguf", {}, tensors))
    wanted = tensors["blk.0.experts"].reshape(6, -1).view(np.uint8)
    np.testing.assert_array_equal(file.raw("blk.0.experts"), wanted)
    out = np.zeros((2, 64), np.uint8)
    assert file.raw("blk.0.experts", slice(3, 5), out) is out
    np.testing.assert_array_equal(out, wanted[3:5])
    assert file.raw("blk.0.experts", slice(6, 9)).shape == (0, 64)
    assert file.raw("blk.0.norm").shape == (1, 28)
    with pytest.raises(FormatError, match="'nope' is missing"):
        file.raw("nope")
    for wrong in (out[:1], out.view(np.int8), out.T):
        with pytest.raises(ValueError, match=r"out: expected C-contiguous uint8 \(2, 64\)"):
            file.raw("blk.0.experts", slice(3, 5), wrong)


def test_rows_are_loaded_into_a_given_array(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    file = read(write_gguf(tmp_path / "m.gguf", {}, tensors))
    for name, tensor in tensors.items():
        rows = tensor.astype(np.float32).reshape(-1, tensor.shape[-1])
        out = np.empty_like(rows)
        assert np.shares_memory(file.load_rows(name, slice(None), out), out)
        np.testing.assert_array_equal(out, rows)
        with pytest.raises(ValueError, match="out"):
            file.load_rows(name, slice(None), np.empty((1, *rows.shape), np.float32))


def test_loading_an_integer_tensor_names_tensor_and_type(tmp_path: Path) -> None:
    file = read(write_gguf(tmp_path / "m.gguf", {}, {"ids": Blocks(GGMLType.I32, (2, 2), bytes(16))}))
    with pytest.raises(UnsupportedError, match=r"m\.gguf: tensor 'ids': type I32"):
        file.load("ids")


def test_arrays_stay_valid_after_the_gguf_file_is_closed(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    with read(write_gguf(tmp_path / "m.gguf", {"s": ["a"]}, tensors)) as file:
        raw, strings = file.raw("blk.0.norm"), file.metadata["s"]
    assert not file.tensors
    assert not file.metadata
    del file
    assert raw.tobytes() == tensors["blk.0.norm"].tobytes()
    assert plain(strings) == ["a"]
    (tmp_path / "m.gguf").unlink()


def test_tensors_apart_from_each_other_are_fine(tmp_path: Path) -> None:
    first, second = np.ones(8, np.float32), np.zeros(8, np.float32)
    gap = {"a": first, "b": Blocks(0, (8,), bytes(64) + second.tobytes(), offset=96)}
    assert read(write_gguf(tmp_path / "m.gguf", {}, gap)).tensors["b"] == TensorInfo("b", (8,), GGMLType.F32, 32, 192)


def shards(folder: Path, tensors: dict[str, np.ndarray]) -> list[Path]:
    written_by_gguf(folder / "m.gguf", tensors, split_max_tensors=2)
    return sorted(folder.glob("m-*.gguf"))


def test_shards_of_the_gguf_package(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    paths = shards(tmp_path, tensors)
    assert [path.name for path in paths] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    file = read(paths[0])
    assert list(file.tensors) == [*tensors, "quantized"]
    assert file.get_str("general.architecture") == "llama"
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.load(name), tensor.astype(np.float32))


def test_a_file_with_a_shard_count_of_one_may_have_any_name(tmp_path: Path) -> None:
    assert (
        read(write_gguf(tmp_path / "m.gguf", {"split.no": Typed(U16, 0), "split.count": Typed(U16, 1)})).tensors == {}
    )


def test_shards_through_symbolic_links(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """As in the cache of huggingface-hub, whose blobs are named by their hashes."""
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(shards(tmp_path, tensors)):
        shutil.move(path, tmp_path / "blobs" / str(i))
        path.symlink_to(tmp_path / "blobs" / str(i))
    assert len(read(tmp_path / "m-00001-of-00002.gguf").tensors) == 4
