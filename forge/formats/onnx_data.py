"""The bytes of an ONNX model's tensors: its own file, and those that external data names."""

import re
from pathlib import Path

from forge.errors import FormatError
from forge.formats.model_directory import member
from forge.formats.protobuf import Message
from forge.formats.source import Source, show, status

MAX_FILES = 256
_NUMBER = re.compile(r"[0-9]{1,18}")


class DataFiles:
    """Open files of a model, its own first. Files of external data are opened when a tensor is placed in them."""

    def __init__(self, model: Source, directory: Path) -> None:
        self.path, self._directory = model.path, directory
        folder = model.path.parent.relative_to(directory).as_posix()
        self._folder = "" if folder == "." else f"{folder}/"
        self.sources = [model]
        self._numbers: dict[str, int] = {}
        self._placed: list[tuple[int, int, int, str]] = []

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(source.path for source in self.sources)

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def check_path(self) -> None:
        for source in self.sources:
            source.check_path()

    def place(self, entries: list[Message], nbytes: int, where: str) -> tuple[int, int]:
        """The number of the file that a tensor lies in, and its first byte there.

        Raises FormatError for a location that is not a file in the model's directory, and for bytes that it has not.
        """
        keys = [entry.get("key", "") for entry in entries]
        if len(set(keys)) < len(keys):
            raise FormatError(f"{self.path}: {where} has external data whose keys are there twice")
        named = {entry.get("key", ""): entry.get("value", "") for entry in entries}
        location = named.get("location", "")
        start, length = self._number(named, "offset", 0, where), self._number(named, "length", nbytes, where)
        if length != nbytes:
            raise FormatError(f"{self.path}: {where} takes {nbytes} bytes and has {length} in {show(location)}")
        home = self._home(location, where)
        source = self.sources[home]
        if start + nbytes > source.size:
            raise FormatError(
                f"{source.path}: {where} of {self.path.name} ends at byte {start + nbytes} and this file at "
                f"{source.size}: it is truncated or belongs to another model; download both again"
            )
        self._placed.append((home, start, start + nbytes, where))
        return home, start

    def check_overlaps(self) -> None:
        """Raises FormatError for tensors that share some of their bytes; those that share all are one that is tied."""
        before = -1, 0, 0, ""
        for placed in sorted(self._placed):
            home, start, stop, where = placed
            if home == before[0] and start < before[2] and (start, stop) != before[1:3]:
                raise FormatError(f"{self.sources[home].path}: {before[3]} and {where} overlap")
            if stop > start:
                before = placed

    def _home(self, location: str, where: str) -> int:
        if location not in self._numbers:
            if len(self.sources) > MAX_FILES:
                raise FormatError(
                    f"{self.path}: has its data in more than {MAX_FILES} files: save it with all tensors in one file"
                )
            try:
                path = member(self._directory, self._folder + location.removeprefix("./"))
            except FormatError as error:
                raise FormatError(f"{error} (the external data of {where})") from None
            if status(path) is None:
                raise FormatError(f"{path}: is missing: put it, the external data of {where}, beside {self.path.name}")
            self._numbers[location] = len(self.sources)
            self.sources.append(Source(path))
        return self._numbers[location]

    def _number(self, named: dict[str, str], key: str, default: int, where: str) -> int:
        text = named.get(key, "")
        if key not in named:
            return default
        if not _NUMBER.fullmatch(text):
            raise FormatError(f"{self.path}: {where} has an {key} of external data that is no number: {show(text)}")
        return int(text)
