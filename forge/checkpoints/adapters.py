"""Adapters of a model: low-rank pairs (LoRA) from a GGUF file, or a directory of PEFT's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from forge.checkpoints import peft
from forge.checkpoints.halves import Half, checked
from forge.errors import FormatError, ParameterError, UnsupportedError
from forge.formats import gguf
from forge.formats.checkpoint import Checkpoint
from forge.formats.source import is_directory, show
from forge.models.adapters import Adapter

MAX_ADAPTERS = 256
MAX_NAME_CHARS = 200


def check_adapters(adapters: object) -> dict[str, Path]:
    """The files of adapters by their names. Raises ParameterError for what is not a mapping of names to paths."""
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping) or len(adapters) > MAX_ADAPTERS:
        what = f"{len(adapters)} entries" if isinstance(adapters, Mapping) else f"a {type(adapters).__name__}"
        message = f"adapters must map at most {MAX_ADAPTERS} names to paths, not be {what}"
        raise ParameterError(message, parameter="adapters")
    for name, path in adapters.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            message = f"adapters: a name must be 1 to {MAX_NAME_CHARS} printable characters, not {show(name)}"
            raise ParameterError(message, parameter="adapters")
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
            what = "empty" if path == "" else f"a {type(path).__name__}"
            message = f"adapters: {show(name)} must be a path, not {what}"
            raise ParameterError(message, parameter="adapters")
    return {name: Path(path) for name, path in adapters.items()}


def read_adapter(path: Path, model: Checkpoint) -> Adapter:
    """Read an adapter of a model: a GGUF file, or a directory of PEFT's.

    Raises FormatError for a file that is not readable, forged, or of another model, UnsupportedError for what is not
    plain LoRA of the products of layers.
    """
    if is_directory(path):
        return peft.read_directory(path, model)
    if path.name in (peft.WEIGHTS, peft.CONFIG, peft.PICKLED):
        raise FormatError(f"{path}: is a file of an adapter: give its directory")
    with gguf.read(path) as file:
        return _read_gguf(file, model)


def _read_gguf(file: Checkpoint, model: Checkpoint) -> Adapter:
    """Keys and names: `convert_lora_to_gguf.py` of llama.cpp."""
    if (kind := file.get_str("general.type", "model")) != "adapter":
        raise FormatError(f"{file.path}: is no adapter: its general.type is {show(kind)}")
    if (kind := file.get_str("adapter.type")) != "lora":
        raise UnsupportedError(f"{file.path}: is an adapter of the type {show(kind)}, and lora alone is supported")
    for key in file.metadata:
        if key.startswith("adapter.alora."):
            raise UnsupportedError(f"{file.path}: is an activated LoRA ({show(key)}), which is not supported")
    found, wanted = file.get_str("general.architecture"), model.get_str("general.architecture")
    if found != wanted:
        raise FormatError(f"{file.path}: is an adapter for the architecture {show(found)}, and the model is {wanted!r}")
    halves: dict[str, dict[str, Half]] = {}
    for name, info in file.tensors.items():
        target, _, half = name.rpartition(".lora_")
        if half not in ("a", "b"):
            raise UnsupportedError(f"{file.path}: tensor {show(name)} is no half of a low-rank pair")
        halves.setdefault(target, {})[half] = Half(name, info.shape, partial(file.load, name))
    alpha = file.get_float("adapter.lora.alpha", 0.0)  # 0 = the pairs are not scaled, as in llama.cpp
    return checked(file.path, halves, lambda _, rank: alpha / rank if alpha else 1.0, model)
