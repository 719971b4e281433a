"""Kernel sources: a `.hip` file and what it uses as one text, its kernels' parameters, and its `-D` variants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from forge.backend import edits

PRELUDE = tuple(
    f"include/{part}"
    for part in ("prelude", "platform_clang", "platform_amd", "platform_nvidia", "platform_harness", "device_functions")
)
"""What comes before every kernel: the contract, its implementations and what is built on them."""

_DIRECTORY = resources.files("forge") / "raw_kernels"
_FILE = re.compile(r"[a-z]\w*")
_KERNEL = re.compile(r"^KERNEL\((?P<threads>[^)]*)\)\s*(?P<name>\w+)\((?P<parameters>[^)]*)\)", re.MULTILINE)
_AWAITS_EARLIER = "grid_dependency_sync("
_NUMBER = re.compile(r"^#define (\w+) (\d+)$", re.MULTILINE)
_USES = re.compile(r"^// Uses: (.+)$", re.MULTILINE)
_TARGET = re.compile(r"^// Target: (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*")
_BRACE = re.compile(r"[{}]")
_PARAMETER = re.compile(r"(?P<const>const )?(?P<type>\w+) ?(?P<pointer>\*)? ?(?P<name>\w+)$")
DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "i32": np.dtype(np.int32),
    "u32": np.dtype(np.uint32),
    "u64": np.dtype(np.uint64),
    "u8": np.dtype(np.uint8),
}
"""dtype of each type that a parameter may have, or point to."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a kernel as its source declares it; `type` may be a macro of the variant."""

    name: str
    type: str
    is_pointer: bool
    is_const: bool


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel file compiled with some -D values: one module, with all kernels of the file."""

    file: str
    """Name in raw_kernels/ without .hip."""
    defines: tuple[tuple[str, int | str], ...]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(f"-D{name}={value}" for name, value in self.defines)

    @property
    def name(self) -> str:
        return "-".join([self.file, *(f"{name}={value}" for name, value in self.defines)])

    @classmethod
    def parse(cls, name: str) -> Variant | None:
        """The variant of a name. None where the name is no variant's, or its kernel file is not there."""
        file, *parts = name.split("-")
        defines = (part.partition("=")[::2] for part in parts)
        variant = cls(file, tuple((key, int(value) if value.isdecimal() else value) for key, value in defines))
        is_known = edits.of(file) or (_FILE.fullmatch(file) and (_DIRECTORY / f"{file}.hip").is_file())
        return variant if is_known and variant.name == name else None


@cache
def _text(part: str) -> str:
    edit = edits.of(part)
    return edit.text if edit else (_DIRECTORY / f"{part}.hip").read_text(encoding="utf-8")


def text(file: str) -> str:
    """A kernel file as it is written."""
    return _text(file)


def files() -> list[str]:
    """The kernel files, by name."""
    return sorted(path.name[: -len(".hip")] for path in _DIRECTORY.iterdir() if path.name.endswith(".hip"))


@cache
def parts(file: str) -> tuple[str, ...]:
    """The files of which a kernel file's source consists: the prelude, the files that it uses, itself."""
    uses = _USES.search(_text(file))
    return (*PRELUDE, *(f"include/{part}" for part in (uses[1].split(", ") if uses else ())), file)


@cache
def source(file: str) -> str:
    """The text that is compiled: CuPy's disk cache does not look into files that a source includes."""
    return "\n".join(map(_text, parts(file)))


@cache
def target(file: str) -> str | None:
    """The one architecture that a kernel file says it is for, as its compiler spells it; None where it is for all."""
    said = _TARGET.search(_text(file))
    return said[1] if said else None


def place(file: str, line: int) -> tuple[str, str]:
    """The place that a line of `source(file)`, counted from 1, comes from, as "norm.hip:12", and the line's text."""
    lines = source(file).split("\n")
    text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    for part in parts(file)[:-1]:
        length = _text(part).count("\n") + 1
        if line <= length:
            return f"{part}.hip:{line}", text
        line -= length
    edit = edits.of(file)
    return edit.place(line) if edit else f"{file}.hip:{line}", text


def _code(file: str) -> str:
    return _COMMENT.sub("", source(file))


def span(file: str, kernel: str) -> tuple[int, int]:
    """Where a kernel stands in its file, from the line of its name to that of its closing brace: lines, from 0, end
    excluded."""
    code = _COMMENT.sub(_blank, _text(file))
    match = next(match for match in _KERNEL.finditer(code) if match["name"] == kernel)
    end, depth = len(code), 0
    for brace in _BRACE.finditer(code, match.end()):
        depth += 1 if brace[0] == "{" else -1
        if depth <= 0:
            end = brace.end()
            break
    return code.count("\n", 0, match.start()), code.count("\n", 0, end) + 1


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


@cache
def signatures(file: str) -> dict[str, tuple[str, tuple[Parameter, ...]]]:
    """Threads (a number, or the -D name of one) and parameters of each kernel in a file, by name."""
    code = _code(file)
    numbers: dict[str, str] = dict(_NUMBER.findall(code))
    found: dict[str, tuple[str, tuple[Parameter, ...]]] = {}
    for match in _KERNEL.finditer(code):
        parameters = []
        for declaration in match["parameters"].split(","):
            parsed = _PARAMETER.match(" ".join(declaration.split()))
            if not parsed:
                raise ValueError(f"{file}.hip: {match['name']}: not a parameter: {declaration.strip()!r}")
            parameters.append(Parameter(parsed["name"], parsed["type"], bool(parsed["pointer"]), bool(parsed["const"])))
        found[match["name"]] = (numbers.get(match["threads"], match["threads"]), tuple(parameters))
    return found


def _uses_pdl(file: str, function: str) -> bool:
    """Whether `grid_dependency_sync` is called between a kernel's line and the next kernel's."""
    code = _code(file)
    started = next(match for match in _KERNEL.finditer(code) if match["name"] == function)
    following = _KERNEL.search(code, started.end())
    return _AWAITS_EARLIER in code[started.end() : following.start() if following else None]


@dataclass(frozen=True, slots=True, eq=False)  # there is one object of each, so its identity is its hash
class Entry:
    """A kernel of a variant, ready to be launched."""

    variant: Variant
    function: str
    threads: int
    """Threads of a block."""
    parameters: tuple[tuple[str, np.dtype[Any], bool], ...]
    """Name, dtype of the number or of the array, and whether it is an array."""
    uses_pdl: bool
    """Whether the kernel waits by itself for earlier launches."""
    lds_bytes: int
    """What a launch on NVIDIA allots of LDS, beside what the kernel declares with a fixed size: -D LDS_BYTES."""

    def bind(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of a launch, numbers as NumPy scalars of the declared type.

        Raises TypeError where an array has another dtype than the kernel's source says or is not C-contiguous: a kernel
        would read something else without a word.
        """
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.function} takes {len(self.parameters)} arguments, not {len(args)}")
        bound: list[Any] = []
        for (name, dtype, is_array), value in zip(self.parameters, args, strict=True):
            if not is_array:
                bound.append(dtype.type(value))
                continue
            if value is not None:
                if value.dtype != dtype:
                    raise TypeError(f"{self.function}: {name} must be {dtype}, not {value.dtype}")
                if not value.flags.c_contiguous:
                    raise TypeError(f"{self.function}: {name} must be C-contiguous")
            bound.append(value)
        return bound


@cache
def entry(file: str, function: str, defines: tuple[tuple[str, int | str], ...]) -> Entry:
    """A kernel of a file in the variant of these -D values. A type or a thread count may be the name of one."""
    values = dict(defines)
    threads, parameters = signatures(file)[function]
    return Entry(
        Variant(file, tuple(sorted(defines))),
        function,
        int(values.get(threads, threads)),
        tuple((p.name, DTYPES[str(values.get(p.type, p.type))], p.is_pointer) for p in parameters),
        _uses_pdl(file, function),
        int(values.get("LDS_BYTES", 0)),
    )
