"""What lies in a directory or a file, whether forge can load it or not: for `forge inspect` of what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forge.errors import ForgeError
from forge.formats import safetensors
from forge.formats.model_directory import read_json
from forge.formats.onnx import ONNX
from forge.formats.source import is_directory, names_in, status

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it is stored: its type by the format's name, its bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What was found: format ("" = no weights that are readable), architecture, tokenizer's files, tensors, files."""

    format: str
    architecture: str | None
    layers: int | None
    tokenizer: tuple[str, ...]
    tensors: tuple[Stored, ...]
    files: tuple[Path, ...]


def contents_of(path: Path) -> Contents | None:
    """Formats are read as when a model is opened; what is not readable is left out. None = nothing was found."""
    format, architecture, layers = "", None, None
    tokenizer: tuple[str, ...] = ()
    tensors: tuple[Stored, ...] = ()
    files: tuple[Path, ...] = ()
    folder = path if _is_folder(path) else path.parent
    if folder is not path and path.suffix not in (".safetensors", ".onnx"):
        return None
    with _ignored():
        config = read_json(folder, "config.json") or {}
        text = config.get("text_config")
        for each in (text if isinstance(text, dict) else {}, config):
            kind, count = each.get("model_type"), each.get("num_hidden_layers")
            architecture = architecture or (kind if isinstance(kind, str) else None)
            layers = layers or (count if isinstance(count, int) else None)
    with _ignored():
        tokenizer = tuple(name for name in _TOKENIZERS if status(folder / name) is not None)
    with _ignored():
        graphs = [folder / name for name in names_in(folder) if name.endswith(".onnx")]
        if path.suffix == ".onnx" or (path is folder and graphs and not _has_safetensors(folder)):
            with ONNX(path if path.suffix == ".onnx" else graphs[0]) as graph:
                format, files = "ONNX", graph.paths
                found = graph.graph.initializers.values()
                tensors = tuple(Stored(each.name, each.shape, each.type, each.nbytes) for each in found)
        else:
            read = safetensors.read_directory(folder) if path is folder else safetensors.read_file(path)
            with read:
                format, files = "safetensors", read.paths
                tensors = tuple(
                    Stored(name, info.shape, info.dtype, info.nbytes) for name, info in read.tensors.items()
                )
    found_any = format or architecture or tokenizer
    return Contents(format, architecture, layers, tokenizer, tensors, files) if found_any else None


def _has_safetensors(folder: Path) -> bool:
    return any(status(folder / name, follows=False) for name in (safetensors.SINGLE, safetensors.INDEX))


def _is_folder(path: Path) -> bool:
    try:
        return is_directory(path)
    except ForgeError:
        return False


@contextmanager
def _ignored() -> Iterator[None]:
    """What one part cannot be read for is said by the error of the whole."""
    try:
        yield
    except ForgeError:
        return
