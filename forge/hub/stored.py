"""The contents of the caches, for `forge list` and `forge rm`."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from forge._files import cache_dir
from forge.errors import DownloadError, ModelNotFoundError
from forge.hub import directories, locks, names
from forge.hub.cache import bytes_under, is_whole, model_path, silent, work_path
from forge.hub.catalog import MODELS, Model, shown
from forge.hub.hf_cache import Repo, prune, repos, root


@dataclass(frozen=True, slots=True)
class Stored:
    """A model in a cache: its name for `forge rm` and `-m`, its (first) file or its directory, and its size.

    `state` is "complete", "damaged" (wrong size or SHA-256) or "partial" (a download that was interrupted or runs).
    """

    name: str
    path: Path
    bytes: int
    state: str


def stored() -> list[Stored]:
    """The known models in forge's cache, and those in the Hugging Face cache, whoever fetched them."""
    found = [item for model in MODELS.values() for item in _of_catalog(model)]
    return found + [item for repo in repos() for item in (*_snapshots(repo), *_partials(repo))]


def caches() -> tuple[Path, Path]:
    """The directories of forge's and of the Hugging Face cache."""
    return cache_dir(), root()


def remove(name: str) -> int:
    """Remove a model and its partial downloads from its cache. Returns the bytes that became free.

    `name` is one of `stored()`, or any name of the Hub that `pull` takes. Without a revision it means all revisions.
    Files that other models share stay, and nothing outside the caches is touched.
    Raises ModelNotFoundError for an unknown name, DownloadError if a file cannot be removed.
    """
    try:
        if names.is_hub_name(name):
            return _remove_of_hub(name)
        if name in MODELS:
            return _remove_of_catalog(MODELS[name])
    except BlockingIOError:
        raise DownloadError(f"{name} is being fetched by another process: wait for its end, or end it") from None
    except OSError as error:
        raise DownloadError(f"{name}: cannot be removed: {error.filename}: {error.strerror or error}") from error
    raise ModelNotFoundError(
        f"{shown(name)} is no name of a model in the caches, which `forge list` shows",
        hint=names.hint(name) or "delete other files yourself",
    )


# ---- forge's own cache


def _of_catalog(model: Model) -> Iterator[Stored]:
    path = model_path(model)
    if path.is_file():
        yield Stored(model.name, path, path.stat().st_size, "complete" if is_whole(model, silent) else "damaged")
    for place in sorted(work_path(model).glob("tmp-*")):
        yield Stored(model.name, place, bytes_under(place), "partial")


def _remove_of_catalog(model: Model) -> int:
    path, work = model_path(model), work_path(model)
    if not os.path.lexists(path) and not any(work.glob("tmp-*")):
        raise ModelNotFoundError(f"{model.name} is not in the cache {cache_dir()}")
    _require_inside(path.parent, cache_dir())
    _require_inside(work, cache_dir())
    with locks.held(work / "lock"):
        freed = sum(bytes_under(place) for place in work.glob("tmp-*"))
        if os.path.lexists(path):
            freed += _unlink(path)
        shutil.rmtree(work)
    return freed


# ---- the Hugging Face cache


def _snapshots(repo: Repo) -> Iterator[Stored]:
    """The models of all snapshots, one entry for all shards of one."""
    refs = {commit: ref for ref, commit in sorted(repo.refs().items(), key=lambda item: item[0] == "main")}
    for commit in repo.commits():
        ref = refs.get(commit, commit)
        at = "" if ref == "main" else f"@{quote(ref, safe='')}"
        present = [file for file in repo.files(commit) if repo.pointer(commit, file).is_file()]
        for parts in dict.fromkeys(tuple(_shards(file)) for file in present if names.is_gguf(file)):
            there = [repo.pointer(commit, part) for part in parts if part in present]
            size = sum(path.stat().st_size for path in there)
            state = "complete" if len(there) == len(parts) else "partial"
            yield Stored(f"hf:{repo.name}{at}/{parts[0]}", there[0], size, state)
        for file in directories.graphs(present) if directories.is_model(present) else []:
            size = sum(repo.pointer(commit, part).stat().st_size for part in directories.of_graph(file, present))
            yield Stored(f"hf:{repo.name}{at}/{file}", repo.pointer(commit, file), size, "complete")
        if directories.is_model(present) and directories.is_taken(present):
            yield _directory(f"hf:{repo.name}{at}", repo.snapshot(commit), present)


def _directory(name: str, folder: Path, present: list[str]) -> Stored:
    """The model that a snapshot is. Other files in it are not counted."""
    size = sum((folder / file).stat().st_size for file in present if directories.belongs(file))
    try:
        directories.weights(present, folder)
    except (DownloadError, OSError):  # a shard is missing, or the index is none
        return Stored(name, folder, size, "partial")
    return Stored(name, folder, size, "complete")


def _partials(repo: Repo) -> Iterator[Stored]:
    for file, path in repo.partial_files():
        with suppress(FileNotFoundError):  # the download has ended meanwhile
            name = f"hf:{repo.name}/{file}" if names.is_gguf(file) else f"hf:{repo.name}"
            yield Stored(name, path, path.lstat().st_size, "partial")


def _remove_of_hub(text: str) -> int:
    name = names.parse(text)
    repo = Repo(name.repo)
    pointers, partials = _meant(repo, name)
    if not pointers and not partials:
        raise ModelNotFoundError(f"{text} is not in the Hugging Face cache {root()}: `forge list` shows what is")
    blobs = {blob for pointer in pointers if (blob := repo.blob_of(pointer))}
    for path in (*pointers, *partials, *blobs):
        _require_inside(path.parent, root())
    with ExitStack() as stack:
        for etag in sorted({path.name for path in (*blobs, *partials)}):
            stack.callback(prune, repo.lock(etag).parent, root())
            stack.enter_context(locks.held(repo.lock(etag), remove=True))
        freed = sum(map(_unlink, (*pointers, *partials)))
        freed += sum(map(_unlink, blobs - repo.linked_blobs()))
        for path in (*pointers, *partials, *blobs):
            prune(path.parent, root())
        repo.forget_lost()
    return freed


def _meant(repo: Repo, name: names.Name) -> tuple[list[Path], list[Path]]:
    """Files of a name in the cache: those in snapshots, and partial downloads."""
    coming = list(repo.partial_files())
    for revision, file in name.places:
        commits = repo.commits() if revision is None else [commit] if (commit := repo.commit(revision)) else []
        present = [(commit, file) for commit in commits for file in repo.files(commit)]
        known = sorted({file for _, file in present} | {file for file, _ in coming})
        of_file = directories.of_graph(file, known) if file and directories.is_graph(file) else None
        parts = of_file or _shards(file) if file else _chosen(name, known, [file for file, _ in coming])
        pointers = [repo.pointer(commit, file) for commit, file in present if file in parts]
        partials = [path for file, path in coming if file in parts]
        if pointers or partials:
            return pointers, partials
    return [], []


def _chosen(name: names.Name, known: list[str], coming: list[str]) -> list[str]:
    """The files that a name without one means: those of a GGUF, or of a directory where no GGUF is meant."""
    is_directory = name.quant is None and (directories.has_weights(known) or any(map(directories.belongs, coming)))
    try:
        if any(map(names.is_gguf, known)):
            return _shards(names.choose(name, known, "the cache"))
    except ModelNotFoundError:
        if not is_directory:
            raise
    return list(filter(directories.belongs, known)) if is_directory else []


def _shards(file: str) -> list[str]:
    try:
        return names.shards(file)
    except ModelNotFoundError:  # an impossible name: the file exists all the same
        return [file]


def _unlink(path: Path) -> int:
    """Remove a file or a link. Returns the bytes that became free."""
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        raise DownloadError(f"{path} is a directory: remove it yourself")
    path.unlink()
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0


def _require_inside(directory: Path, cache: Path) -> None:
    """Raises DownloadError if a link on the way to a directory in a cache leads out of it."""
    if not directory.resolve().is_relative_to(cache.resolve()):
        raise DownloadError(f"{directory} leads out of the cache {cache}: remove what is there yourself")
