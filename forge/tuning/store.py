"""What `forge tune` measured on this machine: a file in the cache for each architecture, validated as a whole.

``tuning/gfx1100.json``: {"forge", "arch", "device", "date", "choices": [{"kernel", "shape", "values", "default_us",
"us"}]}, where a shape is one class of each kind that the table lists for the kernel, and the values are among those
that may be tried for it. A file that holds anything else is not used: it may be another version's, or anybody's.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forge import _files
from forge._files import cache_dir
from forge.errors import DownloadError, ForgeError
from forge.tuning import Choices, Key
from forge.tuning.spec import Values
from forge.tuning.table import KERNELS

_MAX_BYTES = 1 << 20
_MAX_TEXT = 200
_MAX_US = 1e9
_MEND = "`forge tune` measures anew, `forge tune --reset` removes it"
_FOREIGN = "holds what this version's `forge tune` does not write"


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest values for a class of shapes, and the time that it took with them and with the table's."""

    kernel: str
    shape: Mapping[str, int | str]
    values: Values
    default_us: float
    us: float

    @property
    def key(self) -> Key:
        return self.kernel, tuple(self.shape.values())


@dataclass(frozen=True, slots=True)
class Stored:
    """What there is for an architecture; `fault` says why a file is not used."""

    path: Path | None
    """None where there is no cache directory."""
    device: str = ""
    date: str = ""
    version: str = ""
    """The version of forge that measured."""
    choices: tuple[Measured, ...] = ()
    fault: str = ""

    @property
    def tuned(self) -> dict[Key, Values]:
        return {choice.key: choice.values for choice in self.choices}


def read(arch: str) -> Stored:
    """What is stored for an architecture, whatever lies in its place. Raises nothing."""
    try:
        path = cache_dir() / "tuning" / f"{arch}.json"
    except DownloadError:
        return Stored(None)
    try:
        data = _files.read(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return Stored(path)
    except (OSError, ValueError) as error:
        return Stored(path, fault=f"cannot be read: {_files.reason(error)}")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return Stored(path, fault="is no JSON")
    try:
        return _parsed(path, found, arch)
    except (AttributeError, LookupError, TypeError, ValueError):  # something else in the place of what is written
        return Stored(path, fault=_FOREIGN)


def load(arch: str, *, can_compile: bool) -> Choices:
    """The choices of a device: the table's, and the stored ones before them.

    A file that is not valid is ignored with a warning. So is one where nothing can be compiled: what is prebuilt are
    the table's variants.
    """
    stored = read(arch)
    if stored.fault:
        warnings.warn(f"{stored.path} {stored.fault}, and is not used: {_MEND}", stacklevel=2)
    elif stored.choices and not can_compile:
        warnings.warn(
            f"{stored.path} is not used: there is no compiler here, and prebuilt kernels are those of forge's table; "
            "`forge tune --reset` removes it",
            stacklevel=2,
        )
        return Choices(arch)
    return Choices(arch, stored.tuned)


def save(arch: str, device: str, version: str, choices: list[Measured]) -> Path:
    """Keep what was measured, beside what was before of other classes of shapes. Raises ForgeError where it cannot."""
    stored = read(arch)
    if stored.path is None:
        cache_dir()  # says what is wrong
        raise AssertionError
    kept = {choice.key: choice for choice in (*stored.choices, *choices)}
    about = {"forge": version, "arch": arch, "device": device, "date": datetime.now(UTC).date().isoformat()}
    rows = [asdict(choice) for choice in kept.values()]
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{json.dumps(about)[:-1]}, "choices": [\n{lines}\n]}}\n'
    try:
        stored.path.parent.mkdir(parents=True, exist_ok=True)
        _files.replace(stored.path, text.encode())
    except OSError as error:
        raise ForgeError(
            f"{stored.path}: cannot be written: {_files.reason(error)}: make it writable, or set FORGE_CACHE"
        ) from None
    return stored.path


def remove(arch: str) -> Path | None:
    """Remove what is stored; its path if there was something. Raises ForgeError where it cannot be removed."""
    path = read(arch).path
    if path is None or not os.path.lexists(path):
        return None
    try:
        path.unlink()
    except OSError as error:
        raise ForgeError(f"{path}: cannot be removed: {_files.reason(error)}: remove it yourself") from None
    return path


def _parsed(path: Path, found: Any, arch: str) -> Stored:
    """What a file holds. Raises whatever comes of something else in its place."""
    _require(isinstance(found["choices"], list))
    choices = tuple(map(_choice, found["choices"]))
    about = {name: text for name, text in found.items() if name != "choices"}
    _require(about.keys() == {"forge", "arch", "device", "date"})
    _require(all(isinstance(text, str) and len(text) <= _MAX_TEXT and text.isprintable() for text in about.values()))
    _require(len({choice.key for choice in choices}) == len(choices))
    if about["arch"] != arch:
        return Stored(path, fault=f"is for {about['arch']}, not for {arch}")
    return Stored(path, about["device"], about["date"], about["forge"], choices)


def _choice(found: dict[str, Any]) -> Measured:
    choice = Measured(**found)
    spec = KERNELS[choice.kernel]
    _require(list(choice.shape) == list(spec.classes))
    for name, classes in spec.classes.items():
        _require(any(type(choice.shape[name]) is type(one) and choice.shape[name] == one for one in classes))
    _require(all(type(value) is int for value in choice.values.values()))
    _require(choice.values in spec.permitted(choice.key[1]))
    _require(all(type(us) in (int, float) and 0 < us < _MAX_US for us in (choice.default_us, choice.us)))
    return choice


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError
