"""The Hugging Face cache on the disk, shared with other programs: blobs, snapshots that link to them, refs.

Forge adds `.forge/<file>/<etag>`, the partial download of a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forge import _files
from forge.hub import directories
from forge.hub.names import is_gguf, is_inside

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)


def root() -> Path:
    """Directory of all repositories."""
    from huggingface_hub import constants  # not before a cache is looked at: it takes time

    return Path(os.path.abspath(constants.HF_HUB_CACHE))


@dataclass(frozen=True, slots=True)
class Repo:
    """The folder of one repository."""

    name: str

    @property
    def folder(self) -> Path:
        return root() / f"models--{self.name.replace('/', '--')}"

    @property
    def partials(self) -> Path:
        return self.folder / ".forge"

    def pointer(self, commit: str, file: str) -> Path:
        return self.snapshot(commit) / file

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def lock(self, etag: str) -> Path:
        """Path of the lock that `huggingface_hub` takes for the same file."""
        return root() / ".locks" / self.folder.name / f"{etag}.lock"

    def refs(self) -> dict[str, str]:
        """Branch or tag to its commit, as of the last request."""
        base = self.folder / "refs"
        return {name: commit for name in _below(base) if is_inside(name) and (commit := self.commit(name))}

    def commit(self, revision: str) -> str | None:
        """Commit of a revision, or None if the cache does not know it."""
        if _COMMIT.fullmatch(revision):
            return revision
        with suppress(OSError, ValueError):
            commit = _files.read(self.folder / "refs" / revision, 100).decode("ascii").strip()
            return commit if _COMMIT.fullmatch(commit) else None
        return None

    def commits(self) -> list[str]:
        """Commits that have a snapshot in the cache."""
        with suppress(OSError):
            return sorted(name for name in os.listdir(self.folder / "snapshots") if _COMMIT.fullmatch(name))
        return []

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def files(self, commit: str) -> list[str]:
        """Files of models in a snapshot. Their blobs may be gone."""
        return sorted(file for file in _below(self.snapshot(commit)) if _is_of_model(file))

    def partial_files(self) -> list[tuple[str, Path]]:
        """Files that are partially downloaded, each with the path of its part."""
        found = ((file.rpartition("/")[0], self.partials / file) for file in sorted(_below(self.partials)))
        return [(file, path) for file, path in found if _is_of_model(file)]

    def blob_of(self, pointer: Path) -> Path | None:
        """The blob that a file of a snapshot links to."""
        if not pointer.is_symlink():
            return None
        blob = Path(os.path.normpath(pointer.parent / os.readlink(pointer)))
        return blob if blob.parent == self.folder / "blobs" and os.path.lexists(blob) else None

    def linked_blobs(self) -> set[Path]:
        """The blobs that some file of some snapshot links to."""
        base = self.folder / "snapshots"
        return {blob for file in _below(base) if (blob := self.blob_of(base / file))}

    def forget_lost(self) -> None:
        """Removes the refs whose snapshots are gone."""
        for ref, commit in self.refs().items():
            if not self.snapshot(commit).exists():
                path = self.folder / "refs" / ref
                path.unlink(missing_ok=True)
                prune(path.parent, root())

    def link(self, blob: Path, pointer: Path) -> None:
        """Link a file of a snapshot to its blob."""
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except PermissionError:  # a file system without symbolic links
            os.replace(blob, pointer)

    def remember(self, revision: str, commit: str) -> None:
        """Store the commit of a revision, so that it is found without the Hub. A failure is ignored."""
        if revision != commit and self.commit(revision) != commit:
            path = self.folder / "refs" / revision
            with suppress(OSError):  # the cache may be read-only, and a ref `feat` is in the way of `feat/x`
                path.parent.mkdir(parents=True, exist_ok=True)
                _files.replace(path, commit.encode())


def _is_of_model(file: str) -> bool:
    """Whether a path within a repository is that of a GGUF file, or of a part of a directory."""
    return (is_gguf(file) and is_inside(file)) or directories.belongs(file)


def _below(base: Path) -> Iterator[str]:
    """Every file and link below a directory, as a path from there."""
    for place, _, found in os.walk(base):
        yield from (Path(place, name).relative_to(base).as_posix() for name in found)


def repos() -> Iterator[Repo]:
    """All repositories of models in the cache."""
    with suppress(OSError):
        for name in sorted(os.listdir(root())):
            if match := _FOLDER.fullmatch(name):
                yield Repo(f"{match[1]}/{match[2]}")


def prune(path: Path, stop: Path) -> None:
    """Removes empty directories from `path` upwards, `stop` not included."""
    with suppress(OSError):
        while path != stop and stop in path.parents:
            path.rmdir()
            path = path.parent
