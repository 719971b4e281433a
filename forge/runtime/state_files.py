"""Files of states: safetensors with ids, logits, and keys and values of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forge.backend import select
from forge.engine import Engine
from forge.engine.stored_pages import StoredPart, stored_parts
from forge.errors import ContextLengthError, ForgeError, FormatError, OutOfMemoryError, ParameterError
from forge.formats import safetensors
from forge.formats.safetensors_writer import write_file
from forge.keywords import shown
from forge.runtime.states import Logits

_VERSION = "1"
_NAMES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "I32": np.dtype(np.int32)}


class Stored(NamedTuple):
    """What a file holds."""

    ids: list[int]
    logits: Logits
    """(V,)"""
    arrays: dict[str, npt.NDArray[Any]]
    """As `states.read` gives them."""


def write(path: Path, stored: Stored, fingerprint: str, adapter: str | None) -> None:
    """Write a state to a file. fingerprint: Of the model, with the adapter."""
    tensors = {"ids": np.array(stored.ids, np.int32), "logits": stored.logits, **stored.arrays}
    metadata = {"forge_state": _VERSION, "model": fingerprint}
    try:
        write_file(path, tensors, metadata | ({} if adapter is None else {"adapter": adapter}))
    except OSError as error:
        raise ForgeError(f"{path}: the state cannot be written: {error.strerror or error}") from None


def opened(path: Path) -> safetensors.SafeTensors:
    """Open a file. Raises FormatError if it is none of a state."""
    file = safetensors.read_file(path)
    if (version := file.metadata.get("forge_state")) != _VERSION:
        file.close()
        problem = "is no state" if version is None else f"is a state of version {shown(version)}"
        raise FormatError(f"{path}: {problem}: `State.save` of this version of forge writes version {_VERSION}")
    return file


def read(file: safetensors.SafeTensors, engine: Engine, name: str) -> Stored:
    """What a file holds, checked against a model. name: The model's, for messages."""
    parts = {part.name: part for part in stored_parts(engine.runner.state)}
    wanted = {"ids", "logits", *parts}
    for tensor in wanted ^ file.tensors.keys():
        problem = "lacks" if tensor in wanted else "has"
        raise FormatError(f"{file.path}: {problem} tensor {shown(tensor)}: it is no state of {name}, or forged")
    length = _length(file, engine)
    _check(file, "logits", np.dtype(np.float32), (engine.runner.vocab_size,))
    sizes = {part.kind: file.tensors[part.name].shape[:1] for part in parts.values()}
    for part in parts.values():
        _check(file, part.name, part.array.dtype, (*sizes[part.kind], *part.shape))
        _check_positions(file, part, sizes[part.kind], length, engine)
    size, free = sum(info.nbytes for info in file.tensors.values()), select("cpu").free_bytes()
    if size > free:
        raise OutOfMemoryError(f"{file.path}: the state needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    arrays = {tensor: _array(file, tensor) for tensor in wanted}
    ids: list[int] = arrays.pop("ids").tolist()
    try:
        engine.check_ids(ids)
    except ParameterError as error:
        raise FormatError(f"{file.path}: {error}") from None
    return Stored(ids, arrays.pop("logits"), arrays)


def _length(file: safetensors.SafeTensors, engine: Engine) -> int:
    shape = file.tensors["ids"].shape
    if len(shape) != 1 or not shape[0]:
        raise FormatError(f"{file.path}: ids have the shape {shape}, which is no list of tokens")
    _check(file, "ids", np.dtype(np.int32), shape)
    if shape[0] > engine.context:
        raise ContextLengthError(
            f"{file.path}: the state has {shape[0]} tokens and the context holds {engine.context}",
            parameter="context",
            hint="load the model with a larger context",
        )
    return shape[0]


def _check(file: safetensors.SafeTensors, tensor: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    info = file.tensors[tensor]
    if _NAMES.get(info.dtype) != dtype:
        raise FormatError(
            f"{file.path}: tensor {shown(tensor)} is {info.dtype}, and this model computes in {np.dtype(dtype).name}: "
            "a state is of one kind of device"
        )
    if info.shape != shape:
        raise FormatError(f"{file.path}: tensor {shown(tensor)} has the shape {info.shape}, expected is {shape}")


def _check_positions(
    file: safetensors.SafeTensors, part: StoredPart, size: tuple[int, ...], length: int, engine: Engine
) -> None:
    """Raises FormatError unless a part has the last positions, from a page's start on, and all that are needed."""
    kind, num_positions = engine.runner.kinds[part.kind], size[0] if size else 0
    first = length - num_positions
    needed = kind.num_released(length - 1) * part.page_size
    if first < 0 or not num_positions or first > needed:
        raise FormatError(
            f"{file.path}: tensor {shown(part.name)} has {num_positions} of {length} positions, and layers with "
            f"{kind.name} need {length - needed}: it was computed with a smaller context, or is forged"
        )
    if first % part.page_size:
        raise FormatError(
            f"{file.path}: tensor {shown(part.name)} begins at position {first}, and a page of this model has "
            f"{part.page_size} positions: load it with the page_size that the state was saved with"
        )


def _array(file: safetensors.SafeTensors, tensor: str) -> npt.NDArray[Any]:
    info = file.tensors[tensor]
    out: npt.NDArray[Any] = np.empty(info.shape, _NAMES[info.dtype])
    file.read(tensor, 0, out)
    return out


def adapter_of(
    file: safetensors.SafeTensors, adapters: tuple[str, ...], fingerprints: Mapping[str | None, str]
) -> str | None:
    """The adapter of a state. Raises FormatError unless it is one of the model that has these."""
    adapter = file.metadata.get("adapter")
    if adapter is not None and adapter not in adapters:
        raise FormatError(f"{file.path}: is a state of the adapter {shown(adapter)}, which is not loaded")
    if file.metadata.get("model") != fingerprints.get(adapter, ""):
        what = "model" if adapter is None else "model or adapter"
        raise FormatError(
            f"{file.path}: was computed by another {what}, or by other weights of it: load the one that it is of"
        )
    return adapter
