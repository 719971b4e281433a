"""Halves of low-rank pairs, from whatever file, checked against the tensors of the model that they are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.errors import FormatError, UnsupportedError
from forge.formats.checkpoint import Checkpoint
from forge.formats.source import show
from forge.models.adapters import ADAPTED, Adapter, Pair

MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class Half:
    """One of the two matrices of a pair: its name in the file, its shape, and what reads it in float32."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], npt.NDArray[np.float32]]


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
