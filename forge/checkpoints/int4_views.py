"""Matrices of 4 bits in a Hugging Face directory, of GPTQ, AWQ or compressed-tensors: config.json says which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from forge.checkpoints.settings import Settings
from forge.checkpoints.views import View
from forge.errors import FormatError, UnsupportedError
from forge.formats import int4
from forge.formats.blocks import Bytes
from forge.formats.safetensors import SafeTensors
from forge.formats.source import show
from forge.formats.strict_json import show_json

_CONFIG = "quantization_config"


class Int4View(View):
    """A matrix as rows of blocks of forge's own types."""

    def __init__(self, matrix: int4.Int4) -> None:
        self.shape, self.type, self._matrix = matrix.shape, matrix.type, matrix

    def read(self, start: int, out: Bytes) -> None:
        self._matrix.read(start, out)


@dataclass(frozen=True, slots=True)
class _Layout:
    """arrays: Names of a matrix's arrays, the codes first; unread: of others that lie beside them."""

    arrays: tuple[str, ...]
    make: Callable[[str, dict[str, int4.Stored]], int4.Int4]
    unread: tuple[str, ...] = ()


def int4_views(files: SafeTensors, settings: Settings) -> tuple[dict[str, View], set[str]]:
    """The matrices by the names of plain weights, and the stored tensors that are not to be read beside them.

    Those are also biases of a kind of matrix that are zeros in all layers, which AutoGPTQ writes beside matrices
    without a bias. Raises FormatError for arrays that do not belong together and for a wrong configuration,
    UnsupportedError for one that has no kernels.
    """
    layout = _layout(settings)
    if layout is None:
        return {}, set()
    found: dict[str, dict[str, int4.Stored]] = {}
    used = set()
    for name, info in files.tensors.items():
        base, _, end = name.rpartition(".")
        if end in (*layout.arrays, *layout.unread):
            used.add(name)
        if end in layout.arrays:
            read = partial(files.read, name)
            found.setdefault(base, {})[end] = int4.Stored(end, info.dtype, info.shape, read)
    views: dict[str, View] = {}
    for base, arrays in found.items():
        where = f"{files.path_of(next(f'{base}.{end}' for end in arrays))}: {show(base)}"
        views[f"{base}.weight"] = Int4View(layout.make(where, arrays))
    return views, used | _zero_biases(files, views)


def _zero_biases(files: SafeTensors, views: Mapping[str, View]) -> set[str]:
    kinds: dict[str, list[bool]] = {}
    biases: dict[str, str] = {}
    for name, view in views.items():
        bias = f"{name.removesuffix('.weight')}.bias"
        info = files.tensors.get(bias)
        if info is not None and info.shape == view.shape[:1]:
            biases[bias] = kind = ".".join("#" if part.isdecimal() else part for part in bias.split("."))
            data = np.empty(info.nbytes, np.uint8)
            files.read(bias, 0, data)
            kinds.setdefault(kind, []).append(not data.any())
    return {bias for bias, kind in biases.items() if all(kinds[kind])}


# What config.json says


def _layout(settings: Settings) -> _Layout | None:
    config = settings.object(_CONFIG)
    method = config.get("quant_method")
    if method == "gptq":
        return _gptq(settings, config)
    if method == "awq":
        return _awq(settings, config)
    if method == "compressed-tensors" and config.get("format") == "pack-quantized":
        return _compressed(settings, config)
    return None


def _gptq(settings: Settings, config: dict[str, Any]) -> _Layout:
    _expect_bits(settings, config.get("bits"))
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        _refuse(settings, "checkpoint_format", "marlin" if config.get("is_marlin_format") else stored)
    overrides = config.get("dynamic") or {}
    if type(overrides) is not dict or any(
        not rule.startswith("-:") for rule in overrides
    ):  # those are of plain weights
        _refuse(settings, "dynamic", overrides)
    make = partial(int4.gptq, group=_group(settings, config.get("group_size")), is_v2=stored == "gptq_v2")
    return _Layout(("qweight", "qzeros", "scales", "g_idx"), make)


def _awq(settings: Settings, config: dict[str, Any]) -> _Layout:
    _expect_bits(settings, config.get("bits", config.get("w_bit")))
    version = config.get("version") or config.get("format") or "gemm"
    if version not in ("gemm", "GEMM", "exllama", "ipex"):  # the latter two are ways to compute the first
        _refuse(settings, "version", version)
    if config.get("backend") == "llm-awq":
        _refuse(settings, "backend", "llm-awq")
    group = _group(settings, config.get("group_size", config.get("q_group_size")))
    return _Layout(("qweight", "qzeros", "scales"), partial(int4.awq, group=group))


def _compressed(settings: Settings, config: dict[str, Any]) -> _Layout:
    groups = config.get("config_groups")
    if type(groups) is not dict or not groups:
        settings.refuse(f"{_CONFIG}.config_groups", "an object of groups", groups)
    sizes, have_zeros = set(), set()
    for name, group in groups.items():
        weights = group.get("weights") if type(group) is dict else None
        if type(weights) is not dict:
            settings.refuse(f"{_CONFIG}.config_groups.{name}.weights", "an object", weights)
        _expect_bits(settings, weights.get("num_bits"))
        for key, known in (("type", ("int", None)), ("strategy", ("group", "channel", None))):
            if weights.get(key) not in known:
                _refuse(settings, f"weights.{key}", weights.get(key))
        have_zeros.add(weights.get("symmetric", True) is not True)
        size = weights.get("group_size")
        sizes.add(-1 if size is None or weights.get("strategy") == "channel" else _group(settings, size))
    if len(sizes) > 1:
        found = ", ".join(map(str, sorted(sizes)))
        raise UnsupportedError(
            f"{settings.path}: config_groups with groups of different sizes, {found}, are not supported"
        )
    if len(have_zeros) > 1:
        raise UnsupportedError(f"{settings.path}: config_groups of which some are symmetric are not supported")
    arrays = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    make = partial(int4.compressed, group=sizes.pop(), has_zeros=have_zeros.pop())
    return _Layout(arrays, make, ("weight_shape",))


def _group(settings: Settings, size: Any) -> int:
    if type(size) is not int or (size < 1 and size != -1):
        settings.refuse(f"{_CONFIG}.group_size", "a whole number, or -1 for whole rows", size)
    return size


def _expect_bits(settings: Settings, bits: Any) -> None:
    if type(bits) is not int:
        raise FormatError(f"{settings.path}: {_CONFIG} should say its bits, not {show_json(bits)}")
    if bits != 4:
        raise UnsupportedError(f"{settings.path}: weights of {bits} bits are not supported, those of 4 are")


def _refuse(settings: Settings, name: str, value: Any) -> None:
    message = f"{settings.path}: {_CONFIG}: {name} = {show_json(value)} is not supported"
    raise UnsupportedError(message, hint="take a checkpoint in AutoGPTQ's or AutoAWQ's own format")
