"""Hugging Face model directories, as `save_pretrained` writes them, in GGUF's words.

config.json says the family, a row of `families`, and its numbers. The weights lie in safetensors files, the tokenizer
in tokenizer.json. Opening reads headers and small files; a tensor is put together when its rows are read (`views`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from forge.checkpoints.completion import check_rope_kind, complete
from forge.checkpoints.families import FAMILIES
from forge.checkpoints.family import Family
from forge.checkpoints.hf_tokenizer import read_tokenizer
from forge.checkpoints.keys import Metadata
from forge.checkpoints.recipes import is_float32
from forge.checkpoints.refusals import check_read
from forge.checkpoints.settings import Settings
from forge.checkpoints.stored import stored_views
from forge.checkpoints.views import Stacked, View, Widened
from forge.errors import FormatError, UnsupportedError
from forge.formats import safetensors
from forge.formats.blocks import Bytes
from forge.formats.checkpoint import Checkpoint, TensorInfo, Value
from forge.formats.ggml import GGMLType
from forge.formats.model_directory import read_json
from forge.formats.source import show, status
from forge.formats.strict_json import Json, show_json
from forge.models.arch import ARCHS

_SUFFIXES = (".weight", ".bias", ".scale")
_CONFIG = "config.json"


class Opened(Protocol):
    """Open files of a model."""

    @property
    def paths(self) -> tuple[Path, ...]: ...

    def close(self) -> None: ...

    def check_path(self) -> None: ...


class HuggingFaceDirectory(Checkpoint):
    """An open directory: `metadata` and `tensors` in GGUF's words."""

    format = "safetensors"

    def __init__(self, path: Path, files: Opened, metadata: Mapping[str, Value], views: Mapping[str, View]) -> None:
        self.path, self.paths, self._files, self._views = path, files.paths, files, views
        self.metadata = MappingProxyType(metadata)
        self.tensors = MappingProxyType(
            {name: TensorInfo(name, view.shape, view.type, view.nbytes) for name, view in views.items()}
        )

    def close(self) -> None:
        self._files.close()
        self.metadata, self.tensors, self._views = {}, {}, {}

    def check_path(self) -> None:
        self._files.check_path()

    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None:
        if len(out):
            self._views[info.name].read(start, out)


def open_directory(directory: Path) -> HuggingFaceDirectory:
    """Open a directory with config.json, safetensors files and tokenizer.json.

    Raises FormatError for files that are missing, truncated or forged, and for tensors that the family has not;
    UnsupportedError for a family without a row, and for what its row cannot express.
    """
    config = read_json(directory, _CONFIG)
    if config is None:
        raise FormatError(f"{directory}: has no {_CONFIG}: give a GGUF file, or a directory of save_pretrained")
    family = family_of(config, directory / _CONFIG)
    settings = Settings(directory / _CONFIG, config, family.defaults)
    files = safetensors.read_directory(directory)
    try:
        stored = stored_views(files, settings, family)
        return HuggingFaceDirectory(directory, files, *in_words_of_gguf(directory, config, settings, family, stored))
    except BaseException:
        files.close()
        raise


def has_safetensors(directory: Path) -> bool:
    """Whether a directory has the files that `open_directory` reads weights of."""
    return any(status(directory / name, follows=False) for name in (safetensors.SINGLE, safetensors.INDEX))


def in_words_of_gguf(
    directory: Path, config: Mapping[str, Json], settings: Settings, family: Family, stored: Mapping[str, View]
) -> tuple[dict[str, Any], dict[str, View]]:
    """Metadata and tensors of a model in GGUF's words.

    stored: Its weights by their names in Hugging Face directories, without prefixes. Raises as `open_directory` does.
    """
    keys = keys_of(settings, family, stored)
    layers = keys["block_count"]
    assert isinstance(layers, int)
    views = _translated(stored, settings, family, layers)
    if "token_embd.weight" not in views:
        raise FormatError(f"{directory}: the embedding is missing, of {len(stored)} tensors")
    if "output" in ARCHS[family.arch].outer.split():  # the family's files have one, and this model's is tied
        views.setdefault("output.weight", views["token_embd.weight"])
    metadata: dict[str, Any] = {"general.architecture": family.arch, "general.type": "model"}
    metadata |= {key[1:] if key[0] == "." else f"{family.arch}.{key}": value for key, value in keys.items()}
    rows = views["token_embd.weight"].shape[0]
    return metadata | read_tokenizer(directory, config, architecture=family.arch, vocab_size=rows), views


def keys_of(settings: Settings, family: Family, stored: Mapping[str, View]) -> Metadata:
    """The model's keys below its architecture's prefix, by its numbers and its stored tensors."""
    check_rope_kind(settings, family)
    check_read(settings, family, stored)
    keys: Metadata = {}
    for some in family.keys:
        keys |= some(settings, stored)
    complete(keys, settings, family)
    return keys


def family_of(config: Mapping[str, Json], path: Path) -> Family:
    """The row of a config.json. Raises UnsupportedError, with names like it, for a model without one."""
    text = config.get("text_config")
    kinds = [*([text.get("model_type")] if isinstance(text, dict) else []), config.get("model_type")]
    named = [kind for kind in kinds if isinstance(kind, str)]
    if not named:
        raise FormatError(f"{path}: model_type should be the name of a family, not {show_json(kinds[-1])}")
    for kind in named:
        if kind in FAMILIES:
            return FAMILIES[kind]
    alike = ", ".join(get_close_matches(named[0], FAMILIES, 5, 0.4)) or "none"
    raise UnsupportedError(
        f"{path}: model_type {show(named[0])} is not supported; of the {len(FAMILIES)} that are, these have names "
        f"like it: {alike}"
    )


def _translated(stored: Mapping[str, View], settings: Settings, family: Family, layers: int) -> dict[str, View]:
    """Views of GGUF's tensors. Raises FormatError for a stored tensor that the family has not.

    layers: With those of multi-token prediction.
    """
    views: dict[str, View] = {}
    experts: dict[tuple[str, str, str], dict[int, View]] = {}
    for name, view in stored.items():
        if family.unused and re.fullmatch(family.unused, name):
            continue
        pattern, layer, expert = numbers_of(name)
        known, suffix = (pattern, "") if pattern in family.names else without_suffix(pattern)
        if known not in family.names:
            raise FormatError(f"{settings.path.parent}: tensor {show(name)} has no place in {family.arch}")
        if layer and int(layer) >= layers:
            raise FormatError(
                f"{settings.path.parent}: tensor {show(name)} is of a layer beyond the {layers} there are"
            )
        if expert is not None:
            experts.setdefault((known, suffix, layer), {})[expert] = view
        else:
            _add(views, known, suffix, layer, view, settings, family)
    for (known, suffix, layer), parts in experts.items():
        _add(views, known, suffix, layer, _stacked(parts, known, layer, settings), settings, family)
    for extra in family.extras:
        views |= extra(settings)
    return views


def numbers_of(name: str) -> tuple[str, str, int | None]:
    """A name with # for the layer's number and * for the expert's, and these; "" and None where it has none."""
    parts = name.split(".")
    numbers: list[str] = []
    for place, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and len(part) < 7 and len(numbers) < 2:
            numbers.append(part)
            parts[place] = "#*"[len(numbers) - 1]
    layer, expert = [*numbers, "", ""][:2]
    return ".".join(parts), layer, int(expert) if expert else None


def without_suffix(pattern: str) -> tuple[str, str]:
    """A name without .weight or .bias, and that."""
    suffix = next((suffix for suffix in _SUFFIXES[:2] if pattern.endswith(suffix)), "")
    return pattern.removesuffix(suffix), suffix


def _stacked(parts: Mapping[int, View], known: str, layer: str, settings: Settings) -> View:
    where = f"{settings.path.parent}: layer {layer}: {show(known)}"
    if sorted(parts) != list(range(len(parts))):
        raise FormatError(f"{where}: {len(parts)} of the experts 0 to {max(parts)} are there")
    if len({(view.shape, view.type) for view in parts.values()}) > 1:
        raise FormatError(f"{where}: experts differ in shape or type")
    return Stacked([parts[number] for number in range(len(parts))])


def _add(
    views: dict[str, View], known: str, suffix: str, layer: str, view: View, settings: Settings, family: Family
) -> None:
    """Put the tensors that a stored one becomes into `views`."""
    targets = family.names[known].split()
    edit = family.edits.get(known)
    made = edit(view, settings) if edit else (view,)
    assert len(made) == len(targets), known
    for target, part in zip(targets, made, strict=True):
        name = target.replace("#", str(int(layer)) if layer else "#")
        name += "" if name.endswith(_SUFFIXES) else suffix or ".weight"
        if re.fullmatch(family.norms_less_one, name.removesuffix(".weight").rpartition(".")[2]):
            part = Widened(part, 1.0)
        elif part.type is not GGMLType.F32 and is_float32(name, part.shape):
            part = Widened(part)
        if name in views:
            raise FormatError(f"{settings.path.parent}: two tensors are {name}, one of them {show(known)}")
        views[name] = part
