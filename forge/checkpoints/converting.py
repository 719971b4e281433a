"""`forge.convert`: any model as one GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from forge import hub
from forge.checkpoints import open_checkpoint
from forge.checkpoints.gguf_writer import write_gguf
from forge.checkpoints.retyped import Retyped, check_type
from forge.config import Progress
from forge.display import watched
from forge.errors import ParameterError
from forge.keywords import keywords


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
    target = Path(path)
    chosen = None if type is None else check_type(type)
    if target.suffix != ".gguf":
        raise ParameterError(f"path must end in .gguf, not {str(target)!r:.200}", parameter="path")
    if target.is_dir() or not target.parent.is_dir():
        what = "is a directory" if target.is_dir() else f"cannot be written: {target.parent} is no directory"
        raise ParameterError(f"path {target} {what}", parameter="path")
    if target.exists() and not force:
        raise ParameterError(f"path {target} exists", parameter="path", hint="use force=True to replace it")
    with watched(progress) as report, open_checkpoint(hub.resolve(str(model), progress=report)) as source:
        if any(target.exists() and other.samefile(target) for other in source.paths):
            raise ParameterError(f"path {target} is the model itself: give another one", parameter="path")
        changed = source if chosen is None and source.format == "GGUF" else Retyped(source, chosen)
        size = write_gguf(changed, target, report)
        return Converted(target, size, changed.notes if isinstance(changed, Retyped) else ())
