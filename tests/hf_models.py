"""The models of tests/data/arch as the Hugging Face directories that they were converted from (make_hf_goldens.py)."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
ARCH, HF, EXPORTS = DATA / "arch", DATA / "hf", DATA / "onnx/directories"
RUN = 64
"""Bytes that a copy of an ONNX file's tensor has at least."""
NAMES = sorted(path.name for path in HF.iterdir() if path.is_dir())


def decode(packed: bytes, source: bytes) -> bytes:
    """The file that `make_hf_goldens.encode` has written as copies out of `source` and other bytes."""
    data = lzma.decompress(packed)
    (count,) = np.frombuffer(data, "<u4", 1)
    table = np.frombuffer(data, "<u4", 3 * count, offset=4).reshape(-1, 3).tolist()
    other = memoryview(data)[4 + 12 * int(count) :]
    out, at = bytearray(), 0
    for before, start, length in table:
        out += other[at : at + before]
        out += source[start : start + length]
        at += before
    return bytes(out + other[at:])


def int4_directory(name: str, directory: Path) -> Path:
    """A model of tests/data/int4 (make_int4_goldens.py), with the tokenizer of all."""
    shutil.copytree(DATA / "int4" / name, directory, dirs_exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HF / file, directory)
    return directory


def unpacked(name: str, directory: Path) -> Path:
    """The directory of a model."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", f"{name}/config.json"):
        shutil.copy(HF / file, directory)
    source = (ARCH / name / "model.gguf").read_bytes()
    packed = (HF / name / "model.safetensors.xz").read_bytes()
    (directory / "model.safetensors").write_bytes(decode(packed, source))
    return directory


def floats_of(directory: Path) -> bytes:
    """The directory's tensors of F16 and F32 in float32, each as it lies and transposed, one behind the other."""
    data = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    out = bytearray()
    for name, info in sorted(json.loads(data[8 : 8 + size]).items()):
        if name == "__metadata__":
            continue
        start, stop = (8 + size + offset for offset in info["data_offsets"])
        array = np.frombuffer(data[start:stop], {"F16": "<f2", "F32": "<f4"}[info["dtype"]]).reshape(info["shape"])
        for each in (array, array.swapaxes(-1, -2)) if array.ndim > 1 else (array,):
            for matrix in (each, *each) if each.ndim > 2 else (each,):
                out += matrix.astype("<f4").tobytes()
    return bytes(out)


def exported(name: str, directory: Path) -> Path:
    """The directory of a model, with optimum's export (make_onnx_exports.py) in place of its safetensors."""
    unpacked(name, directory)
    packed = (EXPORTS / f"{name}.onnx.xz").read_bytes()
    (directory / "model.onnx").write_bytes(decode(packed, floats_of(directory)))
    (directory / "model.safetensors").unlink()
    return directory


def older(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers wrote it before version 5: RoPE in several keys."""
    text = config.get("text_config", config)
    rope = text.pop("rope_parameters", None)
    if rope is None:
        return config
    local = rope.get("sliding_attention")
    rope = dict(rope.get("full_attention", rope))
    text["rope_theta"] = rope.pop("rope_theta")
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if name in rope and (name == "partial_rotary_factor" or rope["rope_type"] == "longrope"):
            text[name] = rope.pop(name)
    kind = rope.pop("rope_type")
    text["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if local and "gemma" in text["model_type"]:
        text["rope_local_base_freq"] = local["rope_theta"]
    return config
