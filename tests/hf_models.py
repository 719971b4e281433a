"""The models of tests/data/arch as the Hugging Face directories that they were converted from (make_hf_goldens.py)."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
ARCH, HF = DATA / "arch", DATA / "hf"
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
