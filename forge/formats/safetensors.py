"""Safetensors files: a validating reader of one, or of the shards that an index names.

Format: the README of github.com/huggingface/safetensors. A file is the length of its header in 8 bytes, the header, a
JSON object, and the tensors' bytes, which cover the rest of the file without a gap or an overlap. Opening reads no
weights. Weights are read and not mapped, as `source` says, so no page is held twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray

from forge.errors import ForgeError, FormatError, ParameterError, UnsupportedError
from forge.formats import strict_json
from forge.formats.model_directory import member, read_json
from forge.formats.source import PICKLE, U64, Source, guess, is_pickle, names_in, show, status
from forge.formats.strict_json import Json, show_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8},
}
"""Bytes of a number of each dtype that is read, by safetensors' name."""

# The format allows 100 MB, of which Python's objects would take gigabytes. A tensor takes about 120 bytes.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 16  # of a file; the largest models have 200,000 in a hundred files
MAX_LISTED = 1 << 19  # of an index
MAX_NAME_CHARS = 512
MAX_DIMS = 8
MAX_SHARDS = 1000

_MAX_INDEX_FIELDS = 1000  # beside the tensors; an index has three
_FIELDS = {"dtype", "shape", "data_offsets"}
_VALUES_OF_A_TENSOR = 8 + MAX_DIMS


@dataclass(frozen=True, slots=True)
class Info:
    """A tensor: the file's name of its dtype, its shape with the slowest dimension first, () for one number."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class _File:
    """One open file. `starts` are the tensors' first bytes in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, Source(path)
        try:
            header, data_start = _header(self.source)
            self.metadata = _metadata(header.pop("__metadata__", {}), path)
            if len(header) > MAX_TENSORS:
                raise FormatError(f"{path}: has {len(header)} tensors, allowed are {MAX_TENSORS}")
            self.tensors: dict[str, Info] = {}
            offsets: dict[str, tuple[int, int]] = {}
            for name, entry in header.items():
                self.tensors[name], offsets[name] = _tensor(name, entry, path)
            _check_cover(offsets, self.source.size - data_start, path)
            self.starts = {name: data_start + begin for name, (begin, _) in offsets.items()}
        except BaseException:
            self.source.close()
            raise


class SafeTensors:
    """Open files of one model.

    `path` of the file or the directory, `paths` of the files, `tensors` by name, and `metadata`, the strings that the
    first file says of itself.
    """

    def __init__(self, path: Path, files: list[_File]) -> None:
        self.path, self.paths = path, tuple(file.path for file in files)
        self.metadata: Mapping[str, str] = MappingProxyType(files[0].metadata)
        self._files = files
        self._homes = {name: file for file in files for name in file.tensors}
        self.tensors: Mapping[str, Info] = MappingProxyType(
            {name: info for file in files for name, info in file.tensors.items()}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Arrays that were read before stay valid."""
        _close(self._files)
        self.tensors, self._homes, self._files = {}, {}, []

    def check_path(self) -> None:
        """Raises FormatError if another file has replaced one of these at its path since it was opened."""
        for file in self._files:
            file.source.check_path()

    def path_of(self, name: str) -> Path:
        """The file that a tensor lies in. Raises FormatError for one that is not there."""
        if name not in self._homes:
            raise FormatError(f"{self.path}: tensor {show(name)} is missing")
        return self._homes[name].path

    def read(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Fill a C-contiguous array with the bytes of a tensor from its byte `start` on. Threads may call it.

        Raises FormatError for a tensor that is not there, and if the file has changed since it was opened,
        ParameterError for bytes that the tensor has not.
        """
        self.path_of(name)
        info, file = self.tensors[name], self._homes[name]
        if not 0 <= start <= info.nbytes - out.nbytes or not out.flags.c_contiguous:
            raise ParameterError(
                f"out: expected C-contiguous and at most {info.nbytes} bytes of tensor {show(name)}, "
                f"not {out.nbytes} from byte {start} on",
                parameter="out",
            )
        file.source.read(file.starts[name] + start, out)


def read_file(path: Path) -> SafeTensors:
    """Open one file.

    Raises FormatError for a file that is not readable, truncated, forged or foreign, UnsupportedError for a dtype that
    is not one of ITEM_BYTES.
    """
    return SafeTensors(path, [_File(path)])


def read_directory(directory: Path) -> SafeTensors:
    """Open model.safetensors of a directory, or the shards that model.safetensors.index.json names.

    Raises as `read_file` does, and FormatError for an index that is forged or does not fit its shards.
    """
    if status(single := member(directory, SINGLE), follows=False) is not None:
        return SafeTensors(directory, [_File(single)])
    listed = _listed(directory)
    files: list[_File] = []
    try:
        for path in _shards(directory, listed):
            files.append(_File(path))
            _check_shard(files[-1], listed)  # before the next: all shards have no more tensors than the index
        opened = SafeTensors(directory, files)
        for name in listed.keys() - opened.tensors.keys():
            raise FormatError(f"{directory / listed[name]}: lacks tensor {show(name)}, which {INDEX} lists")
        return opened
    except BaseException:
        _close(files)
        raise


def _close(files: list[_File]) -> None:
    for file in files:
        file.source.close()


def _header(source: Source) -> tuple[dict[str, Json], int]:
    """The header's object, and the file's first byte behind the header."""
    path = source.path
    start = np.zeros(32, np.uint8)
    source.read(0, start[: min(32, source.size)])
    magic = start.tobytes()[: source.size]
    if magic[8:9] != b"{":
        raise FormatError(f"{path}: is not a safetensors file; it looks like {guess(magic, path)}")
    (length,) = U64.unpack_from(magic)
    if length > source.size - 8:
        raise FormatError(
            f"{path}: its header has {length} bytes and {source.size - 8} are left: the file is truncated or forged"
        )
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: its header has {length} bytes, allowed are {MAX_HEADER_BYTES}")
    data = np.empty(length, np.uint8)
    source.read(8, data)
    header = strict_json.parse(data.tobytes(), f"{path}: its header", MAX_TENSORS * _VALUES_OF_A_TENSOR)
    if not isinstance(header, dict):  # [] would begin with a bracket, and so it is none that is left
        raise FormatError(f"{path}: its header should be a JSON object, not {show_json(header)}")
    return header, 8 + length


def _metadata(found: Json, path: Path) -> dict[str, str]:
    if not isinstance(found, dict):
        raise FormatError(f"{path}: its __metadata__ should be an object of strings, not {show_json(found)}")
    strings = {key: text for key, text in found.items() if isinstance(text, str)}
    for key in found.keys() - strings.keys():
        raise FormatError(f"{path}: its __metadata__ should be strings, and {show(key)} is {show_json(found[key])}")
    return strings


def _tensor(name: str, entry: Json, path: Path) -> tuple[Info, tuple[int, int]]:
    """A tensor, and where its bytes begin and end, counted from the end of the header."""

    def wrong(problem: str, error: type[ForgeError] = FormatError) -> ForgeError:
        return error(f"{path}: tensor {show(name)} {problem}")

    if not name.isprintable() or not 1 <= len(name) <= MAX_NAME_CHARS:
        raise wrong(f"should have a printable name of 1 to {MAX_NAME_CHARS} characters")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise wrong("should have dtype, shape and data_offsets, and nothing else")
    dtype, sides, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise wrong(f"has a dtype that is no name: {show_json(dtype)}")
    if dtype not in ITEM_BYTES:
        raise wrong(f"has the dtype {show(dtype)}, known are {', '.join(ITEM_BYTES)}", UnsupportedError)
    if not _are_integers(sides) or len(sides) > MAX_DIMS:
        raise wrong(f"should have a shape of at most {MAX_DIMS} integers, not {show_json(sides)}")
    if min(sides, default=0) < 0 or prod(filter(None, sides)) >= 1 << 60:  # 0 of 2^62 is impossible, too
        raise wrong(f"has the impossible shape {show(str(sides))}")
    if not _are_integers(offsets) or len(offsets) != 2:
        raise wrong(f"should have data_offsets of two integers, not {show_json(offsets)}")
    (begin, end), nbytes = offsets, prod(sides) * ITEM_BYTES[dtype]
    if not 0 <= begin <= end or end - begin != nbytes:
        raise wrong(f"is {dtype} {sides}, which takes {nbytes} bytes, and has those from {begin} to {end}")
    return Info(dtype, tuple(sides), nbytes), (begin, end)


def _are_integers(values: Json) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _check_cover(offsets: dict[str, tuple[int, int]], size: int, path: Path) -> None:
    """Raises FormatError unless the tensors cover `size` bytes, each byte once."""
    position, before = 0, None
    for name, (begin, end) in sorted(offsets.items(), key=itemgetter(1)):
        if begin != position or end > size:
            raise _misplaced(path, name, (begin, end), before, position, size)
        position, before = end, name
    if position != size:
        last = "the header" if before is None else f"tensor {show(before)}"
        raise FormatError(f"{path}: {size - position} bytes behind {last} belong to no tensor: the file is forged")


def _misplaced(
    path: Path, name: str, place: tuple[int, int], before: str | None, position: int, size: int
) -> FormatError:
    """The error for a tensor that does not begin at `position`, where the one before it ends, or ends behind `size`."""
    (begin, end), tensor = place, show(name)
    if end > size:
        return FormatError(
            f"{path}: tensor {tensor} ends at byte {end} of {size}: the file is truncated; download it again"
        )
    last = "the header" if before is None else f"tensor {show(before)}"
    if begin < position:
        return FormatError(f"{path}: {last} and tensor {tensor} overlap: the file is forged")
    hole = f"{begin - position} bytes between {last} and tensor {tensor}"
    return FormatError(f"{path}: {hole} belong to no tensor: the file is forged")


def _listed(directory: Path) -> dict[str, str]:
    """The shard of each tensor, as the index says."""
    index = read_json(directory, INDEX, MAX_LISTED + _MAX_INDEX_FIELDS)
    if index is None:
        raise _no_weights(directory)
    listed = index.get("weight_map")
    path = directory / INDEX
    if not isinstance(listed, dict) or not 1 <= len(listed) <= MAX_LISTED:
        raise FormatError(f"{path}: should have a weight_map of 1 to {MAX_LISTED} tensors, not {show_json(listed)}")
    for name, shard in listed.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard:
            raise FormatError(
                f"{path}: {show(name)} should lie in a .safetensors file beside it, not {show_json(shard)}"
            )
    return {name: shard for name, shard in listed.items() if isinstance(shard, str)}


def _shards(directory: Path, listed: dict[str, str]) -> list[Path]:
    names = sorted(set(listed.values()))
    if len(names) > MAX_SHARDS:
        raise FormatError(f"{directory / INDEX}: names {len(names)} shards, allowed are {MAX_SHARDS}")
    paths = [member(directory, name) for name in names]
    for path in paths:
        if status(path) is None:
            raise FormatError(f"{path}: one of {len(names)} shards is missing: put it beside {INDEX}")
    return paths


def _check_shard(file: _File, listed: dict[str, str]) -> None:
    """Raises FormatError unless the index lists each tensor of a shard there."""
    for name in file.tensors:
        if name not in listed:
            problem = f"has tensor {show(name)}, which {INDEX} does not list"
            raise FormatError(f"{file.path}: {problem}: the shards do not belong together")
        if listed[name] != file.path.name:
            raise FormatError(f"{file.path}: has tensor {show(name)}, which {INDEX} lists in {show(listed[name])}")


def _no_weights(directory: Path) -> FormatError:
    names = names_in(directory)
    problem = f"{directory}: has neither {SINGLE} nor {INDEX}"
    if pickles := [name for name in names if is_pickle(name)]:
        return FormatError(f"{problem}, but {show(pickles[0])}: {PICKLE}")
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return FormatError(f"{problem}, but {show(shards[0])}: download the files that are missing")
    return FormatError(f"{problem}: download the model again, with its weights")
