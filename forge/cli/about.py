"""The origin of every `--json` output: forge's version, the device, the model and its SHA-256."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge import _files
from forge.cli import output
from forge.errors import ForgeError


def about(device: str | None = None, model: Path | None = None, quantize: str | None = None) -> dict[str, Any]:
    """The first members of a JSON object: forge, device, model, model_sha256; null where there is no model. Of a model
    that was quantized while it was loaded also quantize, the type.

    Without a device it is the CPU.
    The hash is of the whole file, as `sha256sum` and the Hub show it: about a second per GB, once. It is kept in the
    cache directory until the file's size or times change. Of weights in several files there is a list, in their order.
    """
    import forge
    from forge.backend import select

    hashes = None
    if model is not None:
        with output.ProgressDisplay() as progress:
            hashes = [_sha256(path, progress) for path in _parts(model)]
    return {
        "forge": forge.__version__,
        "device": device or select("cpu").device,
        "model": _files.model_name(model) if model else None,
        "model_sha256": hashes[0] if hashes and len(hashes) == 1 else hashes,
        **({"quantize": quantize} if quantize else {}),
    }


def _parts(model: Path) -> list[Path]:
    """The files of a model's weights."""
    from forge.hub import directories, names

    if model.is_dir():
        files = [path.relative_to(model).as_posix() for path in (*model.glob("*"), *model.glob("onnx/*"))]
        return [model / name for name in directories.weights(files, model)]
    parts = names.shards(model.name) if "-00001-of-" in model.name else [model.name]
    return [model.with_name(part) for part in parts]


def _sha256(path: Path, progress: output.ProgressDisplay) -> str:
    from forge.hub import hashes  # with its imports, for which --help has no time

    try:
        return hashes.sha256(path, lambda done, size: progress(f"hashing {path.name}", done, size))
    except (OSError, ValueError) as error:
        raise ForgeError(f"{path}: cannot be read: {_files.reason(error)}") from None
