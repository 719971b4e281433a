"""Low-rank adapters (LoRA) of a model: pairs of small matrices that products add for the rows of some requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.errors import FormatError, UnsupportedError
from forge.formats.checkpoint import Checkpoint
from forge.models.decoder import Decoder
from forge.models.layers import Linear
from forge.ops.lora import RANK_MULTIPLE, LowRank

ADAPTED = re.compile(
    r"blk\.\d{1,6}\.(?:attn_(?:q|k|v|qkv|gate|output)|ffn_(?:gate|up|down)(?:_shexp)?|inp_gate|proj)\.weight"
)
"""Tensors that may have adapters: those of the products of layers."""
_TOGETHER = (
    ("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_gate"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
)
"""Tensors that one product multiplies by: their adapters are stacked as they are."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What a matrix (N, K) gets for a row x: scale * b @ (a @ x). a: float32 (C, K). b: float32 (N, C)."""

    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as its file has it, its pairs by the model's tensors. `path` is for messages."""

    path: Path
    pairs: Mapping[str, Pair]


def adapter_bytes(file: Checkpoint, adapters: Sequence[Adapter], itemsize: int) -> int:
    """Bytes that `attach` takes at most, for a model whose tensors are these. itemsize: Of a number of an operand."""
    groups: dict[tuple[str, ...], int] = {}
    for name in {name: None for adapter in adapters for name in adapter.pairs}:
        names = _together(name, file)
        groups[names] = _rank(adapters, names)
    total = 0
    for names, rank in groups.items():
        shapes = [file.tensors[name].shape for name in names]
        numbers = sum(rank * (rows + cols) for rows, cols in shapes)
        total += len(adapters) * (numbers * itemsize + 4) + 4 * len(names)
    return total


def attach(decoder: Decoder, adapters: Sequence[Adapter]) -> None:
    """Bring adapters to the model's device, the first one in slot 0. The products of the layers have them from then on.

    Raises FormatError for a pair whose matrix no product of this model has, UnsupportedError for numbers beyond float16
    on a GPU.
    """
    homes = {name: linear for linear in decoder.layer_linears() for name in linear.parts}
    for adapter in adapters:
        for name in adapter.pairs.keys() - homes.keys():
            raise FormatError(f"{adapter.path}: adapts {name!r}, which the model does not multiply by")
    for linear in {homes[name]: None for adapter in adapters for name in adapter.pairs}:
        linear.adapters = _stacked(linear, adapters, decoder)
    decoder.num_adapters = len(adapters)


def _stacked(linear: Linear, adapters: Sequence[Adapter], decoder: Decoder) -> LowRank:
    backend = decoder.backend
    (outer, inner), parts = linear.weight.shape, list(linear.parts)
    rank = _rank(adapters, parts)
    starts = np.cumsum([0, *linear.parts.values()]).astype(np.int32)
    a = np.zeros((len(adapters), len(parts) * rank, inner), backend.dtype)
    b = np.zeros((len(adapters), outer, rank), backend.dtype)
    scales = np.zeros(len(adapters), np.float32)
    for slot, adapter in enumerate(adapters):
        pairs = [adapter.pairs.get(name) for name in parts]
        # One scale for the product, the largest: where its matrices differ in theirs, b takes the difference.
        scales[slot] = scale = max((pair.scale for pair in pairs if pair), key=abs, default=0.0)
        for part, (pair, (start, end)) in enumerate(zip(pairs, pairwise(starts), strict=True)):
            if pair:
                factor = np.float32(1.0 if pair.scale == scale else pair.scale / scale)
                a[slot, part * rank :][: pair.rank] = _in(a.dtype, pair.a, adapter, parts[part])
                b[slot, start:end, : pair.rank] = _in(b.dtype, pair.b * factor, adapter, parts[part])
    return LowRank(*map(backend.asarray, (a, b, scales, starts[:-1])))


def _in(dtype: npt.DTypeLike, numbers: npt.NDArray[np.float32], adapter: Adapter, name: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        found = numbers.astype(dtype)
    if not np.isfinite(found).all():
        message = f"{adapter.path}: the adapter of {name!r} has numbers beyond float16"
        raise UnsupportedError(message, parameter="device", hint='use device="cpu"')
    return found


def _together(name: str, file: Checkpoint) -> tuple[str, ...]:
    """The tensors of a file that one product multiplies by, of which this is one."""
    layer, short = name.removesuffix(".weight").rsplit(".", 1)
    group = next((group for group in _TOGETHER if short in group), (short,))
    return tuple(full for each in group if (full := f"{layer}.{each}.weight") in file.tensors)


def _rank(adapters: Sequence[Adapter], names: Iterable[str]) -> int:
    """C: the largest rank of these matrices' pairs, filled up."""
    pairs = (adapter.pairs.get(name) for adapter in adapters for name in names)
    most = max(pair.rank for pair in pairs if pair)
    return -(-most // RANK_MULTIPLE) * RANK_MULTIPLE
