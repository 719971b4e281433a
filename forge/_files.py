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
    import platformdirs  # imported here, because `forge --help` must be quick

    chosen = os.environ.get("FORGE_CACHE")
    try:
        return Path(os.path.abspath(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_dir("forge"))
    except (OSError, RuntimeError) as error:  # no working directory, or no home
        raise DownloadError(f"no cache directory ({error}): set FORGE_CACHE to an absolute path") from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading. Raises OSError if it cannot be read, ValueError if it is not regular."""
    # without O_NONBLOCK, opening a pipe would wait for its writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        yield file


def read(path: Path, most_bytes: int) -> bytes:
    """Bytes of a file. Raises OSError if it cannot be read, ValueError if it is not regular or too long."""
    with opened(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return data


def model_name(path: Path) -> str:
    """What to call a model: its file's name, or its directory's; of a snapshot in the Hugging Face cache owner/repo."""
    folder = path.parents[1].name if path.parent.name == "snapshots" else ""
    if folder.startswith("models--"):
        return folder.removeprefix("models--").replace("--", "/", 1)
    return path.name or path.resolve().name


def replace(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace a file, which appears whole or not at all, with the permissions `mode` less the umask."""
    scratch = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with open(scratch, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def reason(error: BaseException) -> str:
    """The reason of an OSError, or of a ValueError of `read`."""
    return getattr(error, "strerror", None) or str(error)
