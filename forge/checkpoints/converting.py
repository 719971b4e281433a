"""`forge.convert`: any model as one GGUF file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from forge import _files, hub
from forge.checkpoints import open_checkpoint
from forge.checkpoints.gguf_writer import write_gguf
from forge.checkpoints.recipes import check_recipe, is_float32, new_types
from forge.checkpoints.retyped import Retyped
from forge.config import Progress
from forge.display import watched
from forge.errors import FormatError, ParameterError
from forge.formats.checkpoint import Checkpoint, TensorInfo, Value
from forge.formats.ggml import GGMLType
from forge.formats.source import is_directory, status
from forge.keywords import keywords

_FLOATS = {type.name: type for type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16)}
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K": 14,
    "Q4_K_M": 15,
    "Q5_K": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "BF16": 32,
    "MXFP4": 38,
}
"""`general.file_type`, by llama.cpp's table: of a K type its smallest mixture."""
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert` wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        notes: Remarks on what was decided, a line each.
    """

    path: Path
    bytes: int
    notes: tuple[str, ...]


@keywords()
def convert(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    type: str | None = None,
    force: bool = False,
    progress: Progress | bool | None = None,
) -> Converted:
    """Write a model as one GGUF file, with its tokenizer and all metadata, so that llama.cpp loads it.

    The file appears whole or not at all: an error or Ctrl-C leaves nothing behind. Weights are read, converted and
    written by rows, so memory does not grow with the model.

    Args:
        model: A name, a GGUF file, a Hugging Face directory, or what else `load` takes.
        path: The file to write; it ends in .gguf.
        type: "F32", "F16" or "BF16" for all matrices; norms, biases and routers are F32, as in llama.cpp's files. Or a
            type or mixture that `load(quantize=)` takes, chosen for each tensor as there: docs/quantization.md. None =
            each tensor in the type that it has, but for the 4 bits of GPTQ, AWQ and ONNX, which become Q4_1.
        force: Whether to replace a file that is there.
        progress: Called with a stage, how much of it is done, and its total. None = bars on a terminal and in a
            notebook; False = no progress.

    Raises:
        ParameterError: `path` is there already, or has another ending; the type is not known, or quantized, and the
            weights were quantized before.
        ForgeError: The model is damaged or unknown; the file cannot be written.
    """
    chosen = None if type is None else check_type(type)
    if not isinstance(model, str | os.PathLike):
        raise ParameterError(f"model must be a name or a path, not {model!r:.60}", parameter="model")
    target = _target(path, force)
    named = model if isinstance(model, str) else Path(model)
    with watched(progress) as report, open_checkpoint(hub.resolve(named, progress=report)) as source:
        there = status(target)
        if there is not None and any(os.path.samestat(there, now) for other in source.paths if (now := status(other))):
            raise ParameterError(f"path {target} is the model itself: give another one", parameter="path")
        changed = source if chosen is None and source.format == "GGUF" else retyped(source, chosen)
        return Converted(target, write_gguf(changed, target, report), changed.notes)


def _target(path: object, force: bool) -> Path:
    """The path of a file that may be written. Raises ParameterError for another."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ParameterError(f"path must be a path, not {path!r:.60}", parameter="path")
    target = Path(path)
    if target.suffix != ".gguf":
        raise ParameterError(f"path must end in .gguf, not {str(target)!r:.200}", parameter="path")
    try:
        is_closed, is_folder = not is_directory(target.parent), is_directory(target)
        is_there = status(target, follows=False) is not None  # a link that leads nowhere would be replaced, too
    except FormatError as error:
        raise ParameterError(f"path {error}", parameter="path") from None
    if is_folder or is_closed:
        what = "is a directory" if is_folder else f"cannot be written: {target.parent} is no directory"
        raise ParameterError(f"path {target} {what}", parameter="path")
    if is_there and not force:
        raise ParameterError(f"path {target} exists", parameter="path", hint="use force=True to replace it")
    return target


def retyped(model: Checkpoint, type: str | None) -> Retyped:
    """A model in the types of a name that `check_type` gives, and the keys that say so. None = all as they are.

    Matrices of GPTQ, AWQ and ONNX in 4 bits become Q4_1 where all types stay, as GGUF has no type of forge's own: the
    same codes and scales, and minima rounded to float16. Raises ParameterError for weights that were quantized before,
    where they would be quantized again.
    """
    notes: tuple[str, ...] = ()
    if type is None:
        types = {name: GGMLType.Q4_1 for name, info in model.tensors.items() if not info.type.in_files}
        if types:
            notes = (f"{len(types)} matrices are Q4_1, the nearest of GGUF's types to their 4 bits",)
    elif type in _FLOATS:
        types = dict(_floats(model, _FLOATS[type]))
    else:
        types = new_types(model, type, "type")
    changed = Retyped(model, types, "type")
    folder = model.path if model.path.is_dir() else model.path.parent
    name = model.path.stem if model.format == "GGUF" else _files.model_name(folder).rpartition("/")[2]
    name = name.encode(errors="replace").decode()  # a directory's name may be bytes of no encoding
    number = _FILE_TYPES.get(type or _usual(changed.tensors).name)
    new: dict[str, Value] = {"general.quantization_version": _QUANTIZATION_VERSION}
    new |= {} if number is None else {"general.file_type": number}
    new |= {} if "general.name" in model.metadata else {"general.name": name}
    changed.metadata, changed.notes = MappingProxyType({**model.metadata, **new}), notes
    return changed


def check_type(name: object) -> str:
    """A name of a type, or of a mixture of types, in its own case. Raises ParameterError for another."""
    return check_recipe(name, "type", _FLOATS)


def _floats(model: Checkpoint, type: GGMLType) -> Iterator[tuple[str, GGMLType]]:
    """The types of all tensors, as llama.cpp's converter chooses them."""
    for name, info in model.tensors.items():
        yield name, GGMLType.F32 if is_float32(name, info.shape) else type


def _usual(tensors: Mapping[str, TensorInfo]) -> GGMLType:
    """The type of the most bytes."""
    sizes = Counter[GGMLType]()
    for info in tensors.values():
        sizes[info.type] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else GGMLType.F32
