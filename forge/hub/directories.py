"""Models that are directories: which files of a repository, or of a snapshot in the cache, make one up."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from forge import _files
from forge.errors import DownloadError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
TOKENIZERS = {"tokenizer.json", "tokenizer.model"}
MAX_BESIDE_BYTES = 128 << 20
"""Most bytes of a file beside the weights. The largest known is a tokenizer.json of 33 MB."""

_MAX_SHARDS = 1000
_BESIDE = re.compile(
    r"(?:(?:generation_|genai_)?config|tokenizer[\w.-]*|added_tokens|special_tokens_map|chat_template)\.json"
    r"|tokenizer\.model"
    r"|(?:chat_template|additional_chat_templates/[\w.-]+)\.jinja|model\.safetensors\.index\.json",
    re.ASCII,
)
# Not consolidated.safetensors, the same weights again in another layout, nor an adapter's.
_WEIGHTS = re.compile(
    r"(?!consolidated|adapter)[\w.-]+\.safetensors|(?:onnx/)?[\w.-]+\.onnx(?:[._]data[\w.-]*)?", re.ASCII
)
_IN_FOLDER = ("onnx/model.onnx", "onnx/decoder_model_merged.onnx", "onnx/decoder_model.onnx")
"""A folder `onnx`, as transformers.js has it, holds the model in several types. These have the whole weights."""
_NAMED = re.compile(rb'"([\w.-]+\.safetensors)"')
_PICKLE = re.compile(r".*\.(?:bin|pt|pth|ckpt)", re.IGNORECASE | re.DOTALL)


def belongs(file: str) -> bool:
    """Whether a file may be part of a model's directory."""
    return bool(_BESIDE.fullmatch(file) or _WEIGHTS.fullmatch(file))


def beside(files: Collection[str]) -> list[str]:
    """The files of a repository that a model needs beside its weights, and the index of these unless they are one.

    A tokenizer.json holds what tokenizer.model and added_tokens.json do, too.
    """
    held = {INDEX} if SINGLE in files else set()
    held |= {"tokenizer.model", "added_tokens.json"} if "tokenizer.json" in files else set()
    return sorted(file for file in files if _BESIDE.fullmatch(file) and file not in held)


def is_model(files: Collection[str]) -> bool:
    """Whether files are those of a model: safetensors with config.json, or ONNX with a configuration."""
    if "config.json" in files and (SINGLE in files or INDEX in files):
        return True
    return bool({"config.json", "genai_config.json"}.intersection(files)) and any(_is_onnx(file) for file in files)


def has_weights(files: Collection[str]) -> bool:
    """Whether there are weights, or an index of them, whatever else is missing."""
    return INDEX in files or any(_WEIGHTS.fullmatch(file) for file in files)


def weights(files: Collection[str], folder: Path) -> list[str]:
    """The files of a model's weights. An index of shards is read in `folder`.

    Raises DownloadError for an index that is too long, names no shards, too many, or some that are not among `files`.
    """
    if SINGLE in files:
        return [SINGLE]
    if INDEX not in files:
        onnx = sorted(file for file in files if _WEIGHTS.fullmatch(file) and not file.endswith(".safetensors"))
        if above := [file for file in onnx if "/" not in file]:
            return above
        start = next((file for file in _IN_FOLDER if file in files), "onnx/")
        return [file for file in onnx if file.startswith(start)]
    try:
        data = _files.read(folder / INDEX, MAX_BESIDE_BYTES)
    except ValueError as error:
        raise DownloadError(f"{INDEX} cannot be used: {error}") from None
    # The names alone, found without a parser: whoever opens the model reads the whole index, and strictly.
    named: set[str] = set()
    for match in _NAMED.finditer(data):
        named.add(match[1].decode("ascii"))
        if len(named) > _MAX_SHARDS:
            raise DownloadError(f"{INDEX} names more than {_MAX_SHARDS} shards")
    if not named:
        raise DownloadError(f"{INDEX} names no shards")
    if missing := sorted(named.difference(files)):
        raise DownloadError(f"{INDEX} names {missing[0]}, which is not there")
    return sorted(named)


def is_graph(file: str) -> bool:
    """Whether a file has a name of ONNX files."""
    return file.lower().endswith(".onnx")


def of_graph(file: str, files: Collection[str]) -> list[str]:
    """An ONNX file of a repository, which may hold several, and its external data: what has its name before the end."""
    data = re.compile(re.escape(file) + r"[._]data[\w.-]*", re.ASCII)
    return [file, *sorted(other for other in files if data.fullmatch(other))]


def graphs(files: Collection[str]) -> list[str]:
    """ONNX files that have to be named, as others are taken where none is."""
    return sorted(file for file in files if _is_onnx(file) and file not in _taken(files))


def is_taken(files: Collection[str]) -> bool:
    """Whether there are weights that are taken where no file is named."""
    return bool(_taken(files))


def _taken(files: Collection[str]) -> list[str]:
    if held := [file for file in (SINGLE, INDEX) if file in files]:
        return held
    above = [file for file in files if _is_onnx(file) and "/" not in file]
    return above or [file for file in _IN_FOLDER if file in files][:1]


def pickle(files: Collection[str]) -> str | None:
    """A checkpoint of PyTorch among files, or None."""
    return next((file for file in sorted(files) if _PICKLE.fullmatch(file)), None)


def _is_onnx(file: str) -> bool:
    return file.endswith(".onnx") and _WEIGHTS.fullmatch(file) is not None
