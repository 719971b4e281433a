"""Compilers of HIP: ROCm's hipcc, or a plain clang, which needs nothing of ROCm because kernels include nothing.

They run in child processes: in parallel, as hipRTC does not, and without the end of this process when one crashes.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import TypeVar

from forge import _files
from forge.backend import amd, probe, rocm, sources
from forge.backend.parallel import run_all
from forge.config import Progress
from forge.errors import DeviceError

T = TypeVar("T")

FLAGS = (
    *("-x", "hip", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib", "-O3", "-std=c++17"),
    "-fcuda-flush-denormals-to-zero",  # as CuPy compiles on HIP
    "-fuse-cuid=none",  # else the result depends on the source's path
)
"""Options of every compilation, for hipcc as for clang: nothing of ROCm is included or linked."""

MIN_CLANG = 19
COMPILERS = f"ROCm's hipcc, or clang >= {MIN_CLANG} with lld (Debian, Ubuntu: apt install clang-19 lld-19)"
"""What to install where there is no compiler."""

TESTED = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1151", "gfx1201")
"""AMD GPUs that every kernel is compiled for on every change, within their registers and local memory."""

_ERROR = re.compile(
    r"(?::(?P<line>\d+):\d+|\((?P<of_nvrtc>\d+)\)): (?:fatal |catastrophic )?error(?: #[\w-]+)?: (?P<text>.*)$",
    re.MULTILINE,
)
_MAX_COMPLAINTS = 8
_COMPILE_SECONDS = 60
"""A kernel takes 0.3 of one; more than this is no slow compiler."""
_VERSION_SECONDS = 30
MAX_CODE_BYTES = 64 << 20
_MAX_CHARS = 300
_UNKNOWN_TARGET = "the compiler does not know this GPU: use a newer one"
_AMDGPU = 224  # e_machine
_TARGET = re.compile(rb"amdhsa\.target(?:[\xa0-\xbf]|\xd9.)amdgcn-amd-amdhsa-\w*-(gfx[0-9a-f]+)", re.DOTALL)
"""The note's entry, a MessagePack string: the length takes one byte or two."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A program that compiles HIP."""

    path: str
    is_hipcc: bool
    version: str
    """The line in which it names its version."""


def compile_variant(variant: sources.Variant, arch: str, compiler: Compiler) -> bytes:
    """A variant's code object for a GPU. Raises DeviceError with the compiler's first message, or how it ended."""
    if why := amd.refusal(arch):
        raise DeviceError(f"{arch} {why}")
    try:
        with tempfile.TemporaryDirectory(prefix="forge-") as scratch:
            source, code = Path(scratch, f"{variant.file}.hip"), Path(scratch, "code.hsaco")
            source.write_text(sources.source(variant.file), encoding="utf-8")
            mode = "--genco" if compiler.is_hipcc else "--cuda-device-only"
            command = [compiler.path, mode, *FLAGS, f"--offload-arch={arch}", *variant.options]
            scratchy = {**os.environ, "TMPDIR": scratch}  # with what a crash or its end leaves behind
            how, text = probe.run([*command, str(source), "-o", str(code)], _COMPILE_SECONDS, scratchy)
            if how:
                why = reason(text, variant, how)
                if why == _UNKNOWN_TARGET:
                    raise DeviceError(f"{compiler.path} does not know {arch}: check the name, or use a newer compiler")
                raise refused(f"{variant.name} does not compile for {arch} with {compiler.path}", text, variant, how)
            data = _files.read(code, MAX_CODE_BYTES)
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"{variant.file}.hip ({variant.name}) cannot be compiled with {compiler.path}: {_files.reason(error)}"
        ) from None
    if target(data) != arch:
        raise DeviceError(f"{compiler.path} wrote no code object for {arch}: use another compiler: {COMPILERS}")
    return data


def compile_all(make: Callable[[T], None], jobs: Collection[T], progress: Progress | None) -> None:
    """Run jobs in parallel. The first error ends those that have not begun, and is raised."""
    done = count(1)

    def ended(_: T) -> None:
        if progress:
            progress("compiling kernels", next(done), len(jobs))

    run_all(make, jobs, os.cpu_count() or 1, ended)


def find_compiler() -> Compiler | None:
    """hipcc on PATH or where ROCm is installed, else the clang++ of a ROCm that pip has installed, else the newest one
    on PATH that is new enough, else None."""
    search_path = os.environ.get("PATH", os.defpath)
    homes = (os.environ.get("ROCM_PATH"), "/opt/rocm", "/opt/rocm/core")
    if hipcc := shutil.which("hipcc", path=os.pathsep.join([search_path, *(f"{home}/bin" for home in homes if home)])):
        return Compiler(hipcc, True, _version(hipcc)[1])
    if clang := rocm.compiler():
        return Compiler(clang, False, _version(clang)[1])
    return _newest_clang(search_path)


@cache
def _newest_clang(search_path: str) -> Compiler | None:
    found: dict[str, str] = {}
    for directory in search_path.split(os.pathsep):
        try:
            names = sorted(name for name in os.listdir(directory or ".") if re.fullmatch(r"clang\+\+(-\d+)?", name))
        except OSError:
            continue
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                found.setdefault(os.path.realpath(path), path)
    versions = [(*_version(path), path) for path in found.values()]
    number, line, path = max(versions, default=(0, "", ""), key=lambda version: version[0])
    return Compiler(path, False, line) if number >= MIN_CLANG else None


@cache
def _version(path: str) -> tuple[int, str]:
    """Major version and version line of a clang; (0, "") where it names none."""
    try:
        text = probe.run([path, "--version"], _VERSION_SECONDS).output
    except OSError:
        return 0, ""
    match = re.search(r"^.*\bclang version (\d{1,9})\b.*$", text, re.MULTILINE)
    return (int(match[1]), match[0].strip()) if match else (0, "")


def target(code: bytes) -> str | None:
    """The GPU that a code object names in its note, without features; None where the bytes are no AMD code object."""
    is_elf = code[:6] == b"\x7fELF\x02\x01" and int.from_bytes(code[18:20], "little") == _AMDGPU
    match = _TARGET.search(code) if is_elf else None
    return match[1].decode() if match else None


def reason(text: str, variant: sources.Variant, how: str = "no message") -> str:
    """A compiler's first complaint about a variant in one line: the place in its source, what is wrong, the line.

    Without such a complaint, the file, `how` it ended and what of its output speaks of an error.
    """
    if found := _complaints(text, variant):
        return found[0]
    if "invalid target ID" in text:
        return _UNKNOWN_TARGET
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    return f"{variant.file}.hip: {how}{f': {cause:.{_MAX_CHARS}}' if cause else ''}"


def refused(what: str, text: str, variant: sources.Variant, how: str = "no message") -> DeviceError:
    """The error of a variant that a compiler refuses, from its output. Complaints behind the first are its notes."""
    error = DeviceError(f"{what}: {reason(text, variant, how)}")
    for complaint in _complaints(text, variant)[1:]:
        error.add_note(complaint)
    return error


def _complaints(text: str, variant: sources.Variant) -> list[str]:
    """What a compiler calls errors, the first ones: each with its place and the line that stands there."""
    found = []
    for match in islice(_ERROR.finditer(text), _MAX_COMPLAINTS):
        place, line = sources.place(variant.file, int(match["line"] or match["of_nvrtc"]))
        found.append(f"{place}: {match['text']:.{_MAX_CHARS}}: {line!r}")
    return found


def untested(arch: str) -> str:
    """What to tell the user of an AMD GPU that the tests know nothing of; "" for the others."""
    if not arch.startswith("gfx") or arch in TESTED:
        return ""
    return (
        f"{arch} is untested: forge's tests cover {', '.join(TESTED)}; `forge verify` shows whether it computes right"
    )
