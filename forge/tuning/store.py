"""What `forge tune` measured on this machine: a file in the cache for each architecture, validated as a whole.

``tuning/gfx1100.json``: {"forge", "arch", "device", "date", "choices": [{"kernel", "shape", "values", "default_us",
"us"}]}, where a shape is one class of each kind that the table lists for the kernel, and the values are among those
that may be tried for it. Anything else is refused as a whole: it may be another version's, or anybody's.
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
from forge.tuning.kernel import Values
from forge.tuning.table import KERNELS

_MAX_BYTES = 1 << 20
_MAX_TEXT = 200
_MAX_US = 1e9
_MEND = "`forge tune` measures anew, `forge tune --reset` removes it"


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
    """Of forge."""
    choices: tuple[Measured, ...] = ()
    fault: str = ""

    @property
    def tuned(self) -> dict[Key, Values]:
        return {choice.key: choice.values for choice in self.choices}


class _Refused(Exception):
    """Why a file is not used, to be read behind its name."""


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
        return _parsed(path, json.loads(data), arch)
    except _Refused as refused:
        return Stored(path, fault=str(refused))
    except (ValueError, RecursionError):
        return Stored(path, fault="is no JSON")


def load(arch: str, *, can_compile: bool) -> Choices:
    """The choices of a device: the table's, and those stored for it.

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
    about = _fields(found, "forge", "arch", "device", "date", "choices")
    for name in ("forge", "arch", "device", "date"):
        text = about[name]
        if not (isinstance(text, str) and len(text) <= _MAX_TEXT and text.isprintable()):
            raise _Refused(f"names no {name}")
    if about["arch"] != arch:
        raise _Refused(f"is for {about['arch']}, not for {arch}")
    if not isinstance(about["choices"], list):
        raise _Refused("has no list of choices")
    choices = tuple(_choice(row, f" in choice {n}") for n, row in enumerate(about["choices"], 1))
    if len({choice.key for choice in choices}) != len(choices):
        raise _Refused("has two choices for one class of shapes")
    return Stored(path, about["device"], about["date"], about["forge"], choices)


def _choice(found: Any, where: str) -> Measured:
    row = _fields(found, "kernel", "shape", "values", "default_us", "us", where=where)
    kernel = KERNELS.get(row["kernel"]) if isinstance(row["kernel"], str) else None
    if kernel is None:
        raise _Refused(f"has{where} a kernel that forge does not tune")
    shape, values = (
        _fields(row["shape"], *kernel.classes, where=where),
        _fields(row["values"], *kernel.candidates, where=where),
    )
    for name, classes in kernel.classes.items():
        if not any(type(shape[name]) is type(one) and shape[name] == one for one in classes):
            raise _Refused(f"has{where} an unknown class of {name}")
    if any(type(value) is not int for value in values.values()) or not kernel.permits(tuple(shape.values()), values):
        raise _Refused(f"has{where} values that its kernel does not take")
    for name in ("default_us", "us"):
        if not (type(row[name]) in (int, float) and 0 < row[name] < _MAX_US):
            raise _Refused(f"has{where} no time")
    return Measured(row["kernel"], shape, values, row["default_us"], row["us"])


def _fields(found: Any, *names: str, where: str = "") -> dict[str, Any]:
    """An object with just these fields, in this order."""
    if not isinstance(found, dict) or found.keys() != set(names):
        raise _Refused(f"has{where} other fields than {', '.join(names)}")
    return {name: found[name] for name in names}
