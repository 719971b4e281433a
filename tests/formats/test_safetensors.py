"""Right safetensors files: every byte of every tensor, from one file, from shards, and from the Hugging Face cache."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors_files import framed, ones, safetensors_bytes, write_model

from forge.errors import FormatError, ParameterError
from forge.formats import model_directory, safetensors
from forge.formats.safetensors import SafeTensors

# What safetensors 0.8.0 wrote: save({"b": bfloat16 [1.5, -2], "a": float32 arange(6) as (2, 3), "q": float8_e4m3fn
# [0.5, -448, 2], "i": int64 [-1, 2**40], "s": int32 3, "z": float32 (0, 4), "m": [True, False]}, {"format": "pt"}).
WRITTEN = (
    b"\xb0\x01\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"pt"},"i":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[16,40]},'
    b'"z":{"dtype":"F32","shape":[0,4],"data_offsets":[40,40]},"s":{"dtype":"I32","shape":[],"data_offsets":[40,44]},'
    b'"b":{"dtype":"BF16","shape":[2],"data_offsets":[44,48]},"q":{"dtype":"F8_E4M3","shape":[3],'
    b'"data_offsets":[48,51]},"m":{"dtype":"BOOL","shape":[2],"data_offsets":[51,53]}}       '
    b"\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\x80?\0\0\0@\0\0@@\0\0\x80@\0\0\xa0@"
    b"\x03\0\0\0\xc0?\0\xc00\xfe@\x01\0"
)


def loaded(file: SafeTensors, name: str) -> bytes:
    out = np.empty(file.tensors[name].nbytes, np.uint8)
    file.read(name, 0, out)
    return out.tobytes()


def test_a_file_of_the_safetensors_package(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WRITTEN)
    with safetensors.read_directory(tmp_path) as file:
        assert (file.path, file.paths, dict(file.metadata)) == (tmp_path, (path,), {"format": "pt"})
        assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
            "i": ("I64", (2,)),
            "a": ("F32", (2, 3)),
            "z": ("F32", (0, 4)),
            "s": ("I32", ()),
            "b": ("BF16", (2,)),
            "q": ("F8_E4M3", (3,)),
            "m": ("BOOL", (2,)),
        }
        assert struct.unpack("<2q", loaded(file, "i")) == (-1, 2**40)
        assert struct.unpack("<6f", loaded(file, "a")) == (0, 1, 2, 3, 4, 5)
        assert struct.unpack("<i", loaded(file, "s")) == (3,)
        assert loaded(file, "z") == b""
        assert loaded(file, "b") == bytes.fromhex("c03f00c0")  # sign, 8 bits of the exponent, 7 of the fraction
        assert loaded(file, "q") == bytes.fromhex("30fe40")  # 0.5 = 2^(6-7), -448 = -1.75 * 2^8, 2 = 2^(8-7)
        assert loaded(file, "m") == b"\1\0"


def test_parts_of_tensors_are_read_by_many_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {f"t{i}": rng.integers(0, 1 << 30, (50, 7), np.int32) for i in range(8)}
    directory = write_model(
        tmp_path,
        {f"model-0000{i + 1}-of-00004.safetensors": dict(list(arrays.items())[2 * i : 2 * i + 2]) for i in range(4)},
    )
    with safetensors.read_directory(directory) as file, ThreadPoolExecutor(4) as pool:
        assert file.path == directory
        assert [path.name[:12] for path in file.paths] == [f"model-0000{i + 1}-" for i in range(4)]
        assert file.path_of("t5").name == "model-00003-of-00004.safetensors"

        def part(task: tuple[str, int]) -> None:
            name, row = task
            out = np.empty((2, 7), np.int32)
            file.read(name, row * 28, out)
            assert np.array_equal(out, arrays[name][row : row + 2])

        list(pool.map(part, [(name, row) for name in arrays for row in range(49)]))


def test_bytes_that_a_tensor_has_not(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"a": ones(4), "b": ones(4)}))
    with safetensors.read_file(path) as file:
        for start, out in ((1, np.empty(16, np.uint8)), (-4, ones(1)), (0, ones(5)), (16, ones(1)), (0, ones(8)[::2])):
            with pytest.raises(ParameterError, match="16 bytes of tensor 'a'"):
                file.read("a", start, out)
        with pytest.raises(FormatError, match="tensor 'c' is missing"):
            file.read("c", 0, ones(1))
    with pytest.raises(FormatError, match="tensor 'a' is missing"):
        file.read("a", 0, ones(1))


def snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """A snapshot of the Hugging Face cache: links to blobs."""
    folder = cache / "models--o--r" / "snapshots" / ("0" * 40)
    blobs = cache / "models--o--r" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for number, (name, data) in enumerate(files.items()):
        (blobs / f"{number}").write_bytes(data)
        (folder / name).symlink_to(f"../../blobs/{number}")
    return folder


def test_a_snapshot_of_the_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub", {"model.safetensors": WRITTEN, "config.json": b'{"a": 1}'})
    (tmp_path / "link").symlink_to(folder)
    for directory in (folder, tmp_path / "link"):
        with safetensors.read_directory(directory) as file:
            assert struct.unpack("<i", loaded(file, "s")) == (3,)
        assert model_directory.read_json(directory, "config.json") == {"a": 1}
        assert model_directory.read_json(directory, "generation_config.json") is None


def test_a_forged_cache_has_no_link_for_blobs(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub", {"model.safetensors": WRITTEN})
    blobs = tmp_path / "hub" / "models--o--r" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="leads out of its directory"):
        safetensors.read_directory(folder)


def test_links_within_a_directory_are_followed(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w").write_bytes(WRITTEN)
    (tmp_path / "model.safetensors").symlink_to("weights/w")
    with safetensors.read_directory(tmp_path) as file:
        assert struct.unpack("<i", loaded(file, "s")) == (3,)


@pytest.mark.slow
def test_the_most_tensors_of_a_file_are_read_in_bounded_calls(tmp_path: Path) -> None:
    """65,536 tensors, as no file has: each is looked at once."""
    shape = '{"dtype":"F32","shape":[1,1,1],"data_offsets":[%d,%d]}'
    header = ",".join(
        f'"model.layers.0.mlp.experts.{i}.down_proj.weight":{shape % (4 * i, 4 * i + 4)}' for i in range(1 << 16)
    )
    path = tmp_path / "m.safetensors"
    path.write_bytes(framed("{" + header + "}", bytes(4 << 16)))
    with safetensors.read_file(path) as file:
        assert len(file.tensors) == 1 << 16
    path.write_bytes(framed("{" + header + ',"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', bytes(4 << 16)))
    with pytest.raises(FormatError, match="has 65537 tensors, allowed are 65536"):
        safetensors.read_file(path)


def test_files_are_read_up_to_their_limits(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ ü }}")
    assert model_directory.read_text(tmp_path, "chat_template.jinja") == "{{ ü }}"
    assert model_directory.read_text(tmp_path, "other.jinja") is None
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(FormatError, match="not UTF-8 at byte 1"):
        model_directory.read_text(tmp_path, "chat_template.jinja")
    for name, most in (("config.json", 8 << 20), ("tokenizer.json", 128 << 20), ("chat_template.jinja", 8 << 20)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, most + 1)
        read = model_directory.read_text if name.endswith("jinja") else model_directory.read_json
        with pytest.raises(FormatError, match=f"{name}: has {most + 1} bytes, allowed are {most}"):
            read(tmp_path, name)
