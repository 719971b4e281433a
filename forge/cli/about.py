"""What every `--json` says of its origin: forge's version, the device, the model and its SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge import files
from forge.cli import output
from forge.errors import DownloadError, ForgeError

_SHARD = re.compile(r"(?P<name>.+)-00001-of-(?P<count>\d{5})\.gguf")
_BLOCK_BYTES = 1 << 22
_MOST_NOTED = 1000
_MOST_NOTE_BYTES = 1 << 20
_SETTLED_NS = 2 * 10**9
"""A file that was written so lately may change again without another time of change."""


def about(device: str, model: Path | None = None) -> dict[str, Any]:
    """The first members of a JSON object: forge, device, model, model_sha256; null where there is no model.

    The hash is of the whole file, as `sha256sum` and the Hub show it: about a second per GB, once. It is kept in the
    cache directory until the file's size or times change. Of a model in several files there is a list, in their order.
    """
    import forge

    hashes = None
    if model is not None:
        with output.Progress() as progress:
            hashes = [sha256(path, progress) for path in _parts(model)]
    return {
        "forge": forge.__version__,
        "device": device,
        "model": model.name if model else None,
        "model_sha256": hashes[0] if hashes and len(hashes) == 1 else hashes,
    }


def sha256(path: Path, progress: Callable[[str, int, int | None], None] | None = None) -> str:
    """A file's SHA-256 in hexadecimal, read anew only if its size, times or place on the disk are not those noted."""
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
            notes, key = _notes(), os.path.realpath(path)
            if (noted := notes.get(key)) and noted[:-1] == state:
                return str(noted[-1])
            digest = hashlib.sha256()
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                if progress:
                    progress(f"hashing {path.name}", file.tell(), stat.st_size)
            settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
            if settled and os.fstat(file.fileno()).st_mtime_ns == stat.st_mtime_ns:
                _note(notes, key, [*state, digest.hexdigest()])
            return digest.hexdigest()
    except OSError as error:
        raise ForgeError(f"{path}: cannot be read: {files.reason(error)}") from None


def _parts(model: Path) -> list[Path]:
    """The files of a model."""
    if not (match := _SHARD.fullmatch(model.name)):
        return [model]
    count = int(match["count"])
    return [model.with_name(f"{match['name']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def _store() -> Path:
    from forge.paths import cache_dir  # with its imports, for which --help has no time

    return cache_dir() / "sha256.json"


def _notes() -> dict[str, list[Any]]:
    """By path: what a file was like, and its SHA-256 behind it. What is no such table counts as none."""
    try:
        found = json.loads(files.read(_store(), _MOST_NOTE_BYTES))
    except (OSError, ValueError, RecursionError, DownloadError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: noted for key, noted in found.items() if _is_note(noted)}


def _is_note(noted: Any) -> bool:
    return isinstance(noted, list) and re.fullmatch(r"[0-9a-f]{64}", str(noted[-1:] and noted[-1])) is not None


def _note(notes: dict[str, list[Any]], key: str, noted: list[Any]) -> None:
    """Put it last, and drop the oldest where there are many. That it cannot be kept costs only time."""
    others = [(k, v) for k, v in notes.items() if k != key][1 - _MOST_NOTED :]
    try:
        path = _store()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps(dict([*others, (key, noted)])).encode())
    except (OSError, DownloadError):
        pass
