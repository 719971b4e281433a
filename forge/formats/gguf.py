"""GGUF model files, version 2 and 3, little-endian: a validating reader.

Format: docs/gguf.md of ggml. Opening a file reads no weights, and the strings of an array are decoded when they are
used. Reading a file that has changed since it was opened is an error.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from forge.errors import FormatError
from forge.formats.blocks import Bytes
from forge.formats.checkpoint import Checkpoint, TensorInfo, Value
from forge.formats.gguf_header import Header, parse_header
from forge.formats.source import show

_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MAX_SHARDS = 65_535


class GGUF(Checkpoint):
    """An open model file with all its shards, `version` and `metadata` of the first."""

    format = "GGUF"

    def __init__(self, shards: list[Header]) -> None:
        self.path = shards[0].path
        self.paths = tuple(shard.path for shard in shards)
        self.version = shards[0].version
        self.metadata: Mapping[str, Value] = MappingProxyType(shards[0].metadata)
        self.value_types = MappingProxyType(shards[0].types)
        self._shards = shards
        self._homes: dict[str, Header] = {}
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name in shard.tensors.keys() & tensors.keys():
                raise FormatError(f"{shard.path}: tensor {show(name)} is in {self._homes[name].path.name} as well")
            tensors |= shard.tensors
            self._homes |= dict.fromkeys(shard.tensors, shard)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def close(self) -> None:
        for shard in self._shards:
            shard.source.close()
        self.metadata, self.tensors = {}, {}
        self._homes, self._shards = {}, []

    def check_path(self) -> None:
        for shard in self._shards:
            shard.source.check_path()

    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None:
        self._homes[info.name].source.read(info.offset + start * out.shape[1], out)


def read(path: str | Path) -> GGUF:
    """Open a GGUF file. A sharded one is opened by its first shard (name-00001-of-00003.gguf).

    Raises FormatError for a file that is not readable, truncated, forged or foreign, and UnsupportedError for other
    versions, byte orders and tensor types.
    """
    path = Path(path)
    first = GGUF([parse_header(path)])
    count = first.get_int("split.count", 1, max=_MAX_SHARDS)
    if count < 2:
        return first
    number = first.get_int("split.no", max=count - 1) + 1
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or (int(name[2]), int(name[3])) != (number, count):
        raise FormatError(f"{path}: is shard {number} of {count} and should be named *-{number:05}-of-{count:05}.gguf")
    paths = [path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if number > 1:
        raise FormatError(f"{path}: is shard {number} of {count}: open the first, {paths[0].name}")
    whole = GGUF([*first._shards, *(_sibling(paths, i) for i in range(1, count))])
    expected = first.get_int("split.tensors.count", len(whole.tensors))
    if expected != len(whole.tensors):
        raise FormatError(f"{path}: the shards have {len(whole.tensors)} tensors and should have {expected}")
    return whole


def _sibling(paths: list[Path], index: int) -> Header:
    path = paths[index]
    if not path.exists():
        raise FormatError(f"{path}: shard {index + 1} of {len(paths)} is missing: put it beside {paths[0].name}")
    header = parse_header(path)
    shard = GGUF([header])
    found = shard.get_int("split.no") + 1, shard.get_int("split.count")
    if found != (index + 1, len(paths)):
        raise FormatError(f"{path}: says it is shard {found[0]} of {found[1]}: the shards do not belong together")
    return header
