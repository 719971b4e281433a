"""The cache directory, and small files that are read whole and replaced whole."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from forge.errors import DownloadError


def cache_dir() -> Path:
    """$FORGE_CACHE, else the user's cache directory for forge. Asking does not create it."""
    import platformdirs  # here, because `forge --help` needs no directory and no time

    chosen = os.environ.get("FORGE_CACHE")
    try:
        return Path(os.path.abspath(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_dir("forge"))
    except (OSError, RuntimeError) as error:  # no working directory, or no home
        raise DownloadError(f"no cache directory ({error}): set FORGE_CACHE to an absolute path") from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, to be read. Raises OSError where it cannot be, ValueError where it is something else."""
    # without O_NONBLOCK, opening a pipe would wait for its writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        yield file


def read(path: Path, most_bytes: int) -> bytes:
    """A file's bytes. Raises OSError where it cannot be read, ValueError where it is no file or too long."""
    with opened(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return data


def replace(path: Path, data: bytes, mode: int = 0o666) -> None:
    """A file that appears whole or not at all, with the permissions of `mode` that the umask leaves."""
    scratch = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with open(scratch, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def reason(error: BaseException) -> str:
    """What the system, or `read`, says is wrong."""
    return getattr(error, "strerror", None) or str(error)
