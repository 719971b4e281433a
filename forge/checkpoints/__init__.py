"""From what a model lies in to the one protocol that it is read through, `formats.checkpoint.Checkpoint`."""

from pathlib import Path

from forge.checkpoints.huggingface import has_safetensors, open_directory
from forge.checkpoints.onnx import has_onnx, open_onnx
from forge.errors import FormatError
from forge.formats import gguf
from forge.formats.checkpoint import Checkpoint
from forge.formats.source import is_directory, show

__all__ = ["open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model: a GGUF file, a sharded one by its first shard; a Hugging Face directory, also by one of its
    .safetensors files; an .onnx file or its directory, where that has no safetensors.

    Raises FormatError for what is not readable, truncated, forged or foreign, and UnsupportedError for other versions
    and for families without a row.
    """
    if is_directory(path):
        return open_onnx(path) if not has_safetensors(path) and has_onnx(path) else open_directory(path)
    if path.suffix == ".safetensors":
        return _of_file(path)
    return open_onnx(path) if path.suffix == ".onnx" else gguf.read(path)


def _of_file(path: Path) -> Checkpoint:
    """The model of a directory, named by one of its files of weights."""
    model = open_directory(path.parent)
    if path.name not in [file.name for file in model.paths]:
        model.close()
        problem = f"{path}: holds no weights of the model in its directory, which are in {show(model.paths[0].name)}"
        raise FormatError(f"{problem}: give the directory, or put the file and its config.json in one of their own")
    return model
