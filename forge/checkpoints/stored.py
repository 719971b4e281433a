"""The weights of a Hugging Face directory by name, whatever they are stored as: floats, FP8 or MXFP4 with scales."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from forge.checkpoints.family import UNUSED, Family
from forge.checkpoints.int4_views import int4_views
from forge.checkpoints.scaled import SCALE_BLOCK, Fp8, Mxfp4
from forge.checkpoints.settings import Settings
from forge.checkpoints.views import STEP_BYTES, Stored, View
from forge.errors import FormatError, UnsupportedError
from forge.formats.safetensors import SafeTensors
from forge.formats.source import show
from forge.formats.strict_json import show_json

_PREFIX = re.compile(r"((language_model|model|text_model|transformer|gpt_neox|ernie)\.)+")
"""What is before `layers` and the like, as versions of transformers, and models that hold a text model, differ in."""
_UNREAD_SCALES = (".input_scale", "activation_scale", ".k_scale", ".v_scale")
"""Of activations and of cached keys and values, which are not rounded here."""
_SCALED = ("F8_E4M3", "U8")
"""Dtypes of matrices that have scales beside them."""
_FORMATS = ("float-quantized", "naive-quantized", "pack-quantized")
"""Of compressed-tensors: FP8, and integers of 4 bits."""
_METHODS = ("fp8", "mxfp4", "compressed-tensors", "fbgemm_fp8", "modelopt", "gptq", "awq")


def stored_views(files: SafeTensors, settings: Settings, family: Family) -> dict[str, View]:
    """The weights by their names without prefixes. Tables, towers of images and what is tied are left out.

    Raises FormatError for two tensors of one name and for scales that do not fit, UnsupportedError for a quantization
    that is not known.
    """
    _check_method(settings)
    found: dict[str, View] = {}
    matrices, unread = int4_views(files, settings)
    names = [*(name for name in files.tensors if name not in unread), *matrices]
    for name, short in _used(names, files, settings, family):
        if short in found:
            raise FormatError(f"{files.path}: there are two tensors {show(short)}, one of them {show(name)}")
        found[short] = matrices[name] if name in matrices else _view(files, name)
    if settings.flag("tie_word_embeddings", family.is_tied):
        _drop_equal(found, family)
    return found


def _drop_equal(found: dict[str, View], family: Family) -> None:
    """Take out an output's matrix that is the embedding. One that differs is used, as transformers 5 does."""
    embedding, output = (
        next((f"{name}.weight" for name, new in family.names.items() if new == wanted), "")
        for wanted in ("token_embd", "output")
    )
    if output in found and embedding in found and _are_equal(found[embedding], found[output]):
        del found[output]


def _are_equal(one: View, other: View) -> bool:
    if (one.shape, one.type) != (other.shape, other.type) or len(one.shape) != 2 or not one.nbytes:
        return False
    rows, width = one.shape[0], one.nbytes // one.shape[0]
    step = max(STEP_BYTES // width, 1)
    for start in range(0, rows, step):
        left, right = (np.empty((min(step, rows - start), width), np.uint8) for _ in range(2))
        one.read(start, left)
        other.read(start, right)
        if not np.array_equal(left, right):
            return False
    return True


def without_prefix(name: str) -> str:
    """A name without what is before `layers` and the like."""
    return _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name


def _check_method(settings: Settings) -> None:
    """Raises UnsupportedError for a quantization that nothing here reads."""
    config = settings.object("quantization_config")
    method, form, block = (config.get(key) for key in ("quant_method", "format", "weight_block_size"))
    if method is not None and method not in _METHODS:
        raise UnsupportedError(
            f"{settings.path}: weights quantized by {method!r:.60} are not supported, of {', '.join(_METHODS)} they are"
        )
    if method == "compressed-tensors":
        if form not in _FORMATS:
            raise UnsupportedError(f"{settings.path}: weights of the format {form!r:.60} are not supported")
        _check_changed(settings, config)
    if block not in (None, [SCALE_BLOCK, SCALE_BLOCK]):
        raise UnsupportedError(f"{settings.path}: scales of blocks of {block!r:.60} weights are not supported")


def _check_changed(settings: Settings, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for weights that are multiplied by other matrices, or stored without their zeros."""
    sparsity = config.get("sparsity_config")
    is_dense = type(sparsity) is dict and sparsity.get("format") in (None, "dense")
    transform = config.get("transform_config")
    is_plain = type(transform) is dict and not transform.get("config_groups")
    for name, is_read in (("sparsity_config", is_dense), ("transform_config", is_plain)):
        if config.get(name) is not None and not is_read:
            raise UnsupportedError(f"{settings.path}: {name} = {show_json(config[name])} is not supported")


def _used(names: list[str], files: SafeTensors, settings: Settings, family: Family) -> Iterator[tuple[str, str]]:
    """The tensors that are weights of the text model: name, and name without prefix."""
    tied = settings.flag("tie_word_embeddings", family.is_tied)
    outputs = [name for name, new in family.names.items() if new == "output"]
    for name in names:
        short = without_prefix(name)
        if UNUSED.search(short):
            continue
        if short.endswith(_UNREAD_SCALES):
            continue
        if (base := _scaled(name, files)) is not None:
            if files.tensors[base].dtype not in _SCALED:
                dtype = files.tensors[base].dtype
                raise UnsupportedError(f"{files.path}: {dtype} weights with scales, {show(name)}, are not supported")
            continue
        yield name, short
    if not tied and outputs and not any(name.endswith(f"{outputs[0]}.weight") for name in names):
        raise FormatError(
            f"{files.path}: {outputs[0]}.weight is missing, and {settings.path.name} does not say tie_word_embeddings"
        )


def _scaled(name: str, files: SafeTensors) -> str | None:
    """The tensor that a scale belongs to."""
    bases = (name.removesuffix("_scale_inv"), name.removesuffix("_scale"), f"{name.removesuffix('_scales')}_blocks")
    return next((base for base in bases if base != name and base in files.tensors), None)


def _view(files: SafeTensors, name: str) -> View:
    dtype = files.tensors[name].dtype
    if dtype == "F8_E4M3":
        return Fp8(files, name, _scale_of(files, name, ("_scale_inv", "_scale")))
    if dtype == "U8" and name.endswith("_blocks"):
        return Mxfp4(files, name, _scale_of(files, name.removesuffix("_blocks"), ("_scales",)))
    return Stored(files, name)


def _scale_of(files: SafeTensors, name: str, ends: tuple[str, ...]) -> str:
    for end in ends:
        if name + end in files.tensors:
            return name + end
    raise FormatError(f"{files.path}: tensor {show(name + ends[0])}, the scales of {show(name)}, is missing")
