"""What `forge tune` measured on this machine: a file in the cache for each architecture, validated as a whole.

``tuning/gfx1100.json``: {"forge", "arch", "device", "date", "choices": [{"kernel", "shape", "values", "default_us",
"us"}]}, where a shape is one class of each kind that the table lists for the kernel, and the values are among those
that may be tried for it. A file that holds anything else is not used: it may be another version's, or anybody's.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forge import _files
from forge.errors import DownloadError, ForgeError
from forge.tuning import Choices, Key
from forge.tuning.spec import Shape, Values
from forge.tuning.table import KERNELS

_MAX_BYTES = 1 << 20
_MAX_TEXT = 200
_MAX_US = 1e9


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest values for a class of shapes, and the time that it took with them and with the table's."""

    kernel: str
    shape: Shape
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
    choices: tuple[Measured, ...] = ()
    origin: str = ""
    """When, where and by which forge they were measured."""
    fault: str = ""


def read(arch: str) -> Stored:
    """What is stored for an architecture, whatever lies in its place. Raises nothing."""
    try:
        path = _path(arch)
    except DownloadError:
        return Stored(None)
    try:
        return _parsed(path, json.loads(_files.read(path, _MAX_BYTES)), arch)
    except (FileNotFoundError, NotADirectoryError):
        return Stored(path)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        fault = "is no JSON"
    except (OSError, ValueError) as error:
        fault = f"cannot be read: {_files.reason(error)}"
    except (AttributeError, LookupError, TypeError):
        fault = "holds what this version's `forge tune` does not write"
    return Stored(path, fault=fault)


def load(arch: str, *, can_compile: bool) -> Choices:
    """The choices of a device: the table's, and the stored ones before them.

    A file that is not valid is ignored with a warning. So is one where nothing can be compiled: what is prebuilt are
    the table's variants.
    """
    stored = read(arch)
    ignored = ""
    if stored.fault:
        ignored = f"{stored.fault}, and is not used: `forge tune` measures anew, `forge tune --reset` removes it"
    elif stored.choices and not can_compile:
        ignored = (
            "is not used: there is no compiler here, and prebuilt kernels are those of forge's table; "
            "`forge tune --reset` removes it"
        )
    if ignored:
        warnings.warn(f"{stored.path} {ignored}", stacklevel=2)
        return Choices(arch)
    return Choices(arch, {choice.key: choice.values for choice in stored.choices})


def save(arch: str, device: str, version: str, choices: list[Measured]) -> Path:
    """Keep what was measured, beside what was before of other classes of shapes. Raises ForgeError where it cannot."""
    path = _path(arch)
    kept = {choice.key: choice for choice in (*read(arch).choices, *choices)}
    about = {"forge": version, "arch": arch, "device": device, "date": datetime.now(UTC).date().isoformat()}
    lines = ",\n".join(json.dumps(asdict(choice)) for choice in kept.values())
    text = f'{json.dumps(about)[:-1]}, "choices": [\n{lines}\n]}}\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _files.replace(path, text.encode())
    except OSError as error:
        message = f"{path}: cannot be written: {_files.reason(error)}: make it writable, or set FORGE_CACHE"
        raise ForgeError(message) from None
    return path


def remove(arch: str) -> Path | None:
    """Remove what is stored; its path if there was something. Raises ForgeError where it cannot be removed."""
    path = _path(arch)
    if not os.path.lexists(path):
        return None
    try:
        path.unlink()
    except OSError as error:
        raise ForgeError(f"{path}: cannot be removed: {_files.reason(error)}: remove it yourself") from None
    return path


def _path(arch: str) -> Path:
    return _files.cache_dir() / "tuning" / f"{arch}.json"


def _parsed(path: Path, found: Any, arch: str) -> Stored:
    """What a file holds. Raises AttributeError, LookupError or TypeError for anything else than `save` writes."""
    about = {name: text for name, text in found.items() if name != "choices"}
    choices = tuple(map(_choice, found["choices"]))
    is_text = all(isinstance(text, str) and len(text) <= _MAX_TEXT and text.isprintable() for text in about.values())
    is_list = isinstance(found["choices"], list) and len({choice.key for choice in choices}) == len(choices)
    if not (is_text and is_list and about.keys() == {"forge", "arch", "device", "date"}):
        raise TypeError
    if about["arch"] != arch:
        return Stored(path, fault=f"is for {about['arch']}, not for {arch}")
    return Stored(path, choices, "measured {date} on {device} by forge {forge}".format_map(about))


def _choice(found: Any) -> Measured:
    choice = Measured(**found)
    spec = KERNELS[choice.kernel]
    shape = spec.named(spec.class_of(choice.shape))
    # As text, because 2048.0 and true are equal to numbers that they are not.
    texts = [json.dumps([shape, values]) for values in spec.permitted(shape)]
    are_times = all(type(us) in (int, float) and 0 < us < _MAX_US for us in (choice.default_us, choice.us))
    if json.dumps([choice.shape, choice.values]) not in texts or not are_times:
        raise TypeError
    return choice
