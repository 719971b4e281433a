"""A model as one GGUF file, version 3: any checkpoint, by rows, so that no tensor is held as a whole.

Format: docs/gguf.md of ggml. The `gguf` package has a writer, too: it takes whole tensors, which for experts are
gigabytes, and leaves half a file behind when it is stopped.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from struct import pack
from typing import Any, cast

import numpy as np

from forge.backend.parallel import run_all
from forge.backend.threads import THREADS
from forge.config import Progress
from forge.errors import ForgeError, UnsupportedError
from forge.formats.checkpoint import Checkpoint, StringArray, TensorInfo, Value
from forge.formats.gguf_header import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAX_DIMS, MAX_NAME_BYTES, NUMBERS, STRING
from forge.formats.source import names_in, show, status

_PART_WEIGHTS = 1 << 21
"""Weights that a thread reads, converts and writes at once."""
_LEFT = re.compile(r"\..+\.gguf\.[0-9a-f]{8}\.part", re.DOTALL)
"""Names of files that are being written."""
_SHARDS = ("split.no", "split.count", "split.tensors.count")
_UINT32, _INT32, _FLOAT32, _UINT64, _INT64 = 4, 5, 6, 10, 11
_TYPE_OF_DTYPE = {np.dtype(text): number for number, text in NUMBERS.items()}
_INT32_KEYS = ("general.sampling.top_k",)
"""Keys whose integers are signed. All others are unsigned, as llama.cpp reads them."""

Part = tuple[TensorInfo, int, int, int]
"""Rows of a tensor from one to another, and where they lie in the file."""


def write_gguf(model: Checkpoint, path: Path, progress: Progress | None = None) -> int:
    """Write a model to a file, which appears whole or not at all, and replaces another one. Returns its bytes.

    A value has the type that the model's file gives it, else what llama.cpp reads: uint32, float32. Memory: some
    20 MB for each thread.

    Raises:
        UnsupportedError: A tensor has a type or a name that a GGUF file cannot hold.
        ForgeError: The file cannot be written, as where the disk is full.
    """
    infos = list(model.tensors.values())
    for info in infos:
        if not info.type.in_files:
            message = f"{model.path}: tensor {show(info.name)} is {info.type.name}, which GGUF does not have"
            raise UnsupportedError(message, hint='use type="Q4_1" or another of GGUF\'s')
        if len(info.shape) > MAX_DIMS or len(info.name.encode()) >= MAX_NAME_BYTES:
            raise UnsupportedError(
                f"{model.path}: tensor {show(info.name)} has too long a name, or too many dimensions"
            )
    alignment = model.get_int("general.alignment", DEFAULT_ALIGNMENT, min=1)
    offsets, size = [], 0
    for info in infos:
        offsets.append(size)
        size = _up(size + info.nbytes, alignment)
    header = b"".join(_header(model, infos, offsets))
    start = _up(len(header), alignment)
    parts = [part for info, offset in zip(infos, offsets, strict=True) for part in _parts(info, start + offset)]
    total = start + size if infos else len(header)
    try:
        _remove_left(path.parent)
        _check_room(path, total)
        file = _scratch(path)
        scratch = Path(file.name)
        try:
            with file:
                file.write(header)
                file.truncate(total)
                _write_parts(model, file.fileno(), parts, f"writing {path.name}", progress)
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ForgeError(f"{path}: cannot be written: {error.strerror or error}") from None
    return total


def _scratch(path: Path) -> io.FileIO:
    """A new file beside `path`, locked for as long as it is open: by that others know that its writer lives."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"), "xb", buffering=0)  # noqa: SIM115
        with suppress(OSError):  # a file system without locks: then nobody removes it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = status(Path(file.name))
        if there is not None and os.path.samestat(os.fstat(file.fileno()), there):
            return file
        file.close()  # removed before it was locked


def _remove_left(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder: nobody has locked it."""
    for name in names_in(folder):
        if not _LEFT.fullmatch(name):
            continue
        with suppress(OSError):  # in use, gone, or another's
            left = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISREG(os.fstat(left).st_mode):
                    os.unlink(folder / name)
            finally:
                os.close(left)


def _check_room(path: Path, total: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise ForgeError(f"{path}: takes {total:,} bytes, and {path.parent.absolute()} has {free:,} free")


def _up(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _parts(info: TensorInfo, place: int) -> Iterator[Part]:
    rows = prod(info.shape[:-1])
    width = info.nbytes // rows
    step = max(_PART_WEIGHTS // info.shape[-1], 1)
    for start in range(0, rows, step):
        yield info, start, min(start + step, rows), place + start * width


def _write_parts(model: Checkpoint, file: int, parts: list[Part], stage: str, progress: Progress | None) -> None:
    total = sum(info.nbytes for info in model.tensors.values())
    done = 0

    def write(part: Part) -> None:
        info, start, stop, place = part
        left = model.raw(info.name, slice(start, stop)).reshape(-1).data
        while left:
            count = os.pwrite(file, left, place)
            left, place = left[count:], place + count

    def ended(part: Part) -> None:
        nonlocal done
        info, start, stop, _ = part
        done += info.nbytes // prod(info.shape[:-1]) * (stop - start)
        if progress is not None:
            progress(stage, done, total)

    run_all(write, parts, THREADS.count, ended)


def _header(model: Checkpoint, infos: list[TensorInfo], offsets: list[int]) -> Iterator[bytes]:
    values = {key: value for key, value in model.metadata.items() if key not in _SHARDS}
    yield b"GGUF" + pack("<IQQ", 3, len(infos), len(values))
    for key, value in values.items():
        yield _string(key) + _typed(key, value, model.value_types)
    for info, offset in zip(infos, offsets, strict=True):
        dims = info.shape[::-1]
        yield _string(info.name) + pack(f"<I{len(dims)}QIQ", len(dims), *dims, info.type, offset)


def _typed(key: str, value: Value, types: Mapping[str, int]) -> bytes:
    if isinstance(value, bool | int | float | str):
        type = types.get(key, _INT32 if key in _INT32_KEYS else _type(value))
        return pack("<I", type) + _scalar(type, value)
    return pack("<I", ARRAY) + _array(value)


def _type(value: bool | int | float | str) -> int:
    """The type of a value that no file gives one."""
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, str):
        return STRING
    if isinstance(value, float):
        return _FLOAT32
    if value < 0:
        return _INT32 if value >= -(2**31) else _INT64
    return _UINT32 if value < 2**32 else _UINT64


def _scalar(type: int, value: Any) -> bytes:
    return _string(value) if type == STRING else np.array(value, NUMBERS[type]).tobytes()


def _array(value: Any) -> bytes:
    if isinstance(value, StringArray):
        return pack("<IQ", STRING, len(value)) + value.packed()
    if isinstance(value, np.ndarray):
        return pack("<IQ", _TYPE_OF_DTYPE[value.dtype], len(value)) + value.tobytes()
    kinds = set(map(type, value))
    if kinds == {str}:
        return pack("<IQ", STRING, len(value)) + b"".join(map(_string, value))
    if kinds <= {bool, int, float}:
        number = BOOL if kinds == {bool} else _FLOAT32 if float in kinds else _INT32
        return pack("<IQ", number, len(value)) + np.array(value, NUMBERS[number]).tobytes()
    return pack("<IQ", ARRAY, len(value)) + b"".join(_array(item) for item in cast(list[Value], value))


def _string(text: str) -> bytes:
    data = text.encode()
    return pack("<Q", len(data)) + data
