"""Adapters of a model: low-rank pairs (LoRA) from a GGUF file, checked against the model's tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.errors import FormatError, ParameterError, UnsupportedError
from forge.formats import gguf
from forge.formats.checkpoint import Checkpoint
from forge.formats.source import show
from forge.models.adapters import ADAPTED, Adapter, Pair

MAX_ADAPTERS = 256
MAX_NAME_CHARS = 200
MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class Half:
    """One of the two matrices of a pair: its name in the file, its shape, and what reads it in float32."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], npt.NDArray[np.float32]]


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
        if not isinstance(path, str | os.PathLike):
            message = f"adapters: {show(name)} must be a path, not a {type(path).__name__}"
            raise ParameterError(message, parameter="adapters")
    return {name: Path(path) for name, path in adapters.items()}


def read_adapter(path: Path, model: Checkpoint) -> Adapter:
    """Read an adapter of a model: a GGUF file.

    Raises FormatError for a file that is not readable, forged, or of another model, UnsupportedError for what is not
    plain LoRA of the products of layers.
    """
    if path.suffix in (".bin", ".pt", ".pth", ".safetensors") or path.is_dir():
        raise FormatError(f"{path}: an adapter is a GGUF file: convert it by llama.cpp's convert_lora_to_gguf.py")
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


def checked(
    path: Path,
    halves: Mapping[str, Mapping[str, Half]],
    scale_of: Callable[[str, int], float],
    model: Checkpoint,
) -> Adapter:
    """The adapter of these halves, "a" and "b" by the model's tensor. scale_of: From the tensor and its rank."""
    if not halves:
        raise FormatError(f"{path}: has no tensors")
    pairs: dict[str, Pair] = {}
    for target, both in halves.items():
        _check_target(path, target, model)
        for one, other in (("a", "b"), ("b", "a")):
            if one not in both:
                raise FormatError(f"{path}: {show(both[other].name)} has no lora_{one} beside it: the file is damaged")
        (a, b), (rows, cols) = (both["a"], both["b"]), model.tensors[target].shape
        for half in (a, b):
            if len(half.shape) != 2:
                raise FormatError(f"{path}: tensor {show(half.name)} should be a matrix, not of shape {half.shape}")
        rank = a.shape[0]
        if not 1 <= rank <= MAX_RANK:
            raise FormatError(f"{path}: tensor {show(a.name)} has the rank {rank}, allowed are 1 to {MAX_RANK}")
        for half, shape in ((a, (rank, cols)), (b, (rows, rank))):
            if half.shape != shape:
                raise FormatError(
                    f"{path}: tensor {show(half.name)} has shape {half.shape}, not {shape}: it is for another model"
                )
        scale = scale_of(target, rank)
        if not math.isfinite(scale) or abs(scale) > np.finfo(np.float32).max:
            raise FormatError(f"{path}: the scale of {show(target)} is {scale}: alpha should be a finite number")
        pairs[target] = Pair(_finite(path, a), _finite(path, b), scale)
    return Adapter(path, pairs)


def _check_target(path: Path, target: str, model: Checkpoint) -> None:
    """Raises for a tensor of a model that may have no adapter."""
    if target.removesuffix(".weight") in ("token_embd", "output"):
        raise UnsupportedError(f"{path}: adapts the embedding or the output's matrix ({show(target)}): not supported")
    if "_exps." in target:
        raise UnsupportedError(f"{path}: adapts a mixture's experts ({show(target)}): not supported")
    if target not in model.tensors:
        raise FormatError(f"{path}: adapts {show(target)}, which the model has not: it is for another model")
    if not ADAPTED.fullmatch(target) or len(model.tensors[target].shape) != 2:
        raise UnsupportedError(
            f"{path}: adapts {show(target)}, which is no matrix of a layer's products: not supported"
        )


def _finite(path: Path, half: Half) -> npt.NDArray[Any]:
    found = half.load()
    if not np.isfinite(found).all():
        raise FormatError(f"{path}: tensor {show(half.name)} holds numbers that are not finite")
    return found
