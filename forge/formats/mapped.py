"""Files taken as hostile: opening and mapping them, and reading numbers and names from them within bounds."""

import mmap
import os
import stat
from collections.abc import Sized
from pathlib import Path
from struct import Struct

from forge.errors import FormatError

U64 = Struct("<Q")

_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer and not the model itself: fetch it with 'git lfs pull'"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or a wheel): convert it to GGUF"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint): convert it to GGUF"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"\x89HDF", "an HDF5 file: convert it to GGUF"),
    (b"lmgg", "a file of the GGML format that came before GGUF: convert the model again"),
    (b"tjgg", "a file of the GGML format that came before GGUF: convert the model again"),
    (b"fmgg", "a file of the GGML format that came before GGUF: convert the model again"),
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


def guess(magic: bytes) -> str:
    """What a file that is not the one expected looks like, by its first bytes, and how to fix that."""
    if magic[8:10] == b'{"':
        return "a safetensors file: convert it to GGUF"
    known = (description for start, description in _FOREIGN if magic.startswith(start))
    return next(known, f"nothing known, it starts with {magic[:8]!r}")


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file, read-only; FormatError for what is missing, empty, unreadable or no regular file."""
    try:
        # O_NONBLOCK: the open of a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
                raise FormatError(f"{path}: is {kind} and not a file: give a .gguf file")
            if status.st_size == 0:
                raise FormatError(f"{path}: is empty: download it again")
            return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte in the path
        raise FormatError(f"{show(str(path))}: cannot be read: {error}") from None


class Cursor:
    """A position in a mapped file; whatever is taken is first compared with the bytes left before `stop`."""

    def __init__(self, path: Path, data: mmap.mmap, stop: int) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.stop = min(stop, len(data))

    @property
    def left(self) -> int:
        return self.stop - self.position

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}")

    def take(self, size: int, where: str) -> int:
        """Step over `size` bytes; returns where they start."""
        if size > self.left:
            raise self.error(f"{where} needs {size} bytes and {self.left} are left: the file is truncated or forged")
        start = self.position
        self.position += size
        return start

    def numbers(self, form: Struct, where: str) -> tuple[int, ...]:
        return form.unpack_from(self.data, self.take(form.size, where))

    def number(self, form: Struct, where: str) -> int:
        return self.numbers(form, where)[0]

    def bytes(self, where: str) -> bytes:
        start = self.take(self.number(U64, where), where)
        return self.data[start : self.position]

    def name(self, limit: int, where: str) -> str:
        size = self.number(U64, where)
        if not 1 <= size <= limit:
            raise self.error(f"the name of {where} has {size} bytes, allowed are 1 to {limit}")
        start = self.take(size, where)
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the name of {where} is not UTF-8: {show(self.data[start : self.position])}") from None
