"""Hostile files: opening and reading them, and numbers and names from them within bounds.

Files are read and not mapped: if a mapped file is truncated, touching a lost page ends the process.
"""

import mmap
import os
import stat
import weakref
from collections.abc import Sized
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError, OutOfMemoryError

U64 = Struct("<Q")

_MIN_READ = 1 << 16
_MAX_PATH_CHARS = 500

PICKLE = "PyTorch's pickles run code when they are opened: take the model's safetensors, or save_pretrained it anew"
_PICKLE_ENDS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_FOREIGN = (
    (b"GGUF", "a GGUF file: give its path, with the name *.gguf"),
    (b"version https://git-lfs", "a Git LFS pointer and not the model itself: fetch it with 'git lfs pull'"),
    (b"PK\x03\x04", f"a zip archive of PyTorch, or a wheel; {PICKLE}"),
    (tuple(bytes((0x80, protocol)) for protocol in range(2, 6)), f"a pickle; {PICKLE}"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"\x89HDF", "an HDF5 file: convert it to GGUF"),
    ((b"lmgg", b"tjgg", b"fmgg"), "a file of the GGML format that came before GGUF: convert the model again"),
    (b"FUGG", "a big-endian GGUF file: convert the model again, as little-endian"),
    (b"<", "a web page and not a model: the download went wrong"),
    (b"{", "a JSON file"),
    (b"\x00\x00\x00\x00", "only zeros at its start: an unfinished download; download it again"),
)


def show(value: str | bytes | bool | int | float | Sized) -> str:
    """A value from a file for a message: one line, at most 60 characters."""
    if isinstance(value, str | bytes):
        value = value[:60]
    elif isinstance(value, Sized):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def status(path: Path, *, follows: bool = True) -> os.stat_result | None:
    """What is at a path; None = nothing. follows: A link is what it leads to, and one that leads nowhere is nothing.

    Raises FormatError for a path that cannot be looked at: too long, behind a closed directory, links in a circle.
    """
    try:
        return os.stat(path, follow_symlinks=follows)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FormatError(f"{_shown(path)}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte, or what the file system's encoding cannot spell
        raise FormatError(f"{show(str(path))}: cannot be read: {error}") from None


def is_directory(path: Path) -> bool:
    """Whether a path is a directory. Raises FormatError as `status` does."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def names_in(directory: Path) -> list[str]:
    """The sorted names in a directory, none if there is no such directory. Raises FormatError for a closed one."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise FormatError(f"{_shown(directory)}: cannot be read: {error.strerror}") from None


def _shown(path: Path) -> str:
    """A path for a message; of one that is too long for the system its begin."""
    return str(path) if len(str(path)) <= _MAX_PATH_CHARS else show(str(path))


def is_pickle(name: str) -> bool:
    """Whether a file has one of the names of PyTorch's checkpoints."""
    return name.lower().endswith(_PICKLE_ENDS)


def guess(magic: bytes, path: Path) -> str:
    """The likely kind of a file of another format, by its first bytes and its name, and the fix."""
    if magic[8:10] == b'{"':
        return "a safetensors file: give its directory, which has config.json too"
    other = f"a PyTorch checkpoint; {PICKLE}" if is_pickle(path.name) else None
    known = (description for start, description in _FOREIGN if magic.startswith(start))
    return next(known, other or f"something else, which starts with {magic[:8]!r}: give a .gguf file or a directory")


def read_whole(path: Path, max_bytes: int) -> bytes:
    """A small file. Raises FormatError for one of more bytes, and as `Source` does."""
    source = Source(path)
    try:
        if source.size > max_bytes:
            raise FormatError(
                f"{path}: has {source.size} bytes, allowed are {max_bytes}: it is forged, or another file"
            )
        data = np.empty(source.size, np.uint8)
        source.read(0, data)
    finally:
        source.close()
    return data.tobytes()


class Source:
    """An open file of `size` bytes. Reading gives the content at the time of opening, or an error."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError for a file that is missing, empty, unreadable or not regular."""
        self.path = path
        try:
            # O_NONBLOCK: the open of a FIFO would wait for its writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:  # a null byte in the path
            raise FormatError(f"{show(str(path))}: cannot be read: {error}") from None
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self._status = os.fstat(self._descriptor)
        self.size = self._status.st_size
        if not stat.S_ISREG(self._status.st_mode):
            kind = "a directory" if stat.S_ISDIR(self._status.st_mode) else "a pipe or a device"
            raise FormatError(f"{path}: is {kind} and not a file")
        if self.size == 0:
            raise FormatError(f"{path}: is empty: download it again")

    def read(self, start: int, out: NDArray[Any]) -> None:
        """Fill a C-contiguous array with the bytes from `start` on. Safe to call from several threads.

        Raises FormatError if the bytes cannot be read, or the file has changed since it was opened.
        """
        self.read_strided(start, 0, out.reshape(1, -1))

    def read_strided(self, start: int, step: int, out: NDArray[Any]) -> None:
        """Fill the rows of a C-contiguous array, each with the bytes from `step` behind those of the row before."""
        rest = 0
        try:
            for number, row in enumerate(out.reshape(len(out), -1).view(np.uint8)):
                if rest := self._read_row(start + number * step, row.data):
                    break
            now = os.fstat(self._descriptor)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read at byte {start}: {error.strerror}") from None
        if now.st_size != self.size:
            sizes = f"from {self.size} to {now.st_size} bytes"
            raise FormatError(f"{self.path}: changed {sizes} while it was read: load it again when it is whole")
        if rest or now.st_mtime_ns != self._status.st_mtime_ns:
            raise FormatError(f"{self.path}: was written to while it was read: load it again when it is whole")

    def _read_row(self, start: int, rest: memoryview) -> int:
        """Fill `rest` from `start` on. Returns how many bytes the file ended before."""
        while rest:
            count = os.preadv(self._descriptor, [rest], start)
            if not count:
                break
            start, rest = start + count, rest[count:]
        return len(rest)

    def check_path(self) -> None:
        """Raises FormatError if another file has replaced this one at its path."""
        try:
            now = os.stat(self.path)
        except OSError:  # the opened file is still complete
            return
        if not os.path.samestat(now, self._status):
            raise FormatError(f"{self.path}: was replaced while it was read: load it again")


class Cursor:
    """A position in a file. Each length is compared with the bytes left before `stop` before anything is read.

    `data` has room for the file up to `stop`. It is filled as far as the file was read.
    """

    def __init__(self, source: Source, stop: int) -> None:
        self.source, self.path = source, source.path
        self.position = 0
        self.stop = min(stop, source.size)
        try:  # the system gives memory as it is filled
            memory = mmap.mmap(-1, self.stop, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            size = f"{self.stop / 1e6:.0f} MB"
            raise OutOfMemoryError(
                f"{self.path}: no address space for {size} of its header: {error.strerror}"
            ) from None
        self._bytes = np.frombuffer(memory, np.uint8)
        self.data = self._bytes.data.toreadonly()
        self.filled = 0

    def fill(self, end: int) -> None:
        """Read at least up to `end`."""
        if end > self.filled:
            end = min(max(end, 2 * self.filled, _MIN_READ), self.stop)
            self.source.read(self.filled, self._bytes[self.filled : end])
            self.filled = end

    @property
    def left(self) -> int:
        return self.stop - self.position

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}")

    def take(self, size: int, where: str) -> int:
        """Step over `size` bytes. Returns their start."""
        if size > self.left:
            raise self.error(f"{where} needs {size} bytes and {self.left} are left: the file is truncated or forged")
        start = self.position
        self.position += size
        if self.position > self.filled:
            self.fill(self.position)
        return start

    def numbers(self, form: Struct, where: str) -> tuple[int, ...]:
        return form.unpack_from(self.data, self.take(form.size, where))

    def number(self, form: Struct, where: str) -> int:
        return self.numbers(form, where)[0]

    def bytes(self, where: str) -> bytes:
        start = self.take(self.number(U64, where), where)
        return bytes(self.data[start : self.position])

    def name(self, limit: int, where: str) -> str:
        size = self.number(U64, where)
        if not 1 <= size <= limit:
            raise self.error(f"the name of {where} has {size} bytes, allowed are 1 to {limit}")
        start = self.take(size, where)
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError:
            name = bytes(self.data[start : self.position])
            raise self.error(f"the name of {where} is not UTF-8: {show(name)}") from None
