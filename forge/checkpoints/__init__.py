"""From what a model lies in to the one protocol that it is read through, `formats.checkpoint.Checkpoint`."""

from pathlib import Path

from forge.checkpoints.huggingface import has_safetensors, open_directory
from forge.checkpoints.onnx import has_onnx, open_onnx
from forge.formats import gguf
from forge.formats.checkpoint import Checkpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model: a GGUF file, a sharded one by its first shard; a Hugging Face directory, also by one of its
    .safetensors files; an .onnx file or its directory, where that has no safetensors.

    Raises FormatError for what is not readable, truncated, forged or foreign, and UnsupportedError for other versions
    and for families without a row.
    """
    if path.suffix == ".safetensors":
        path = path.parent
    if path.suffix == ".onnx" or (path.is_dir() and has_onnx(path) and not has_safetensors(path)):
        return open_onnx(path)
    return open_directory(path) if path.is_dir() else gguf.read(path)
