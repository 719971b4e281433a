"""What CuPy's ROCm wheel needs to be imported where there is no ROCm: its libraries, as one table of jumps.

The wheel's own files say which symbols they want of which libraries. Each becomes a jump through a slot of a table: at
first to an error, and to a Python function where `runtime`, `rtc` or `blas` provides it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import CACHE as HARNESS_CACHE
from harness import alone

CUPY = "cupy-rocm-7-0==14.2.0"
CACHE = HARNESS_CACHE / "virtual_rocm"
_RTC = Path(__file__).with_name("rtc.py")
NOT_SUPPORTED = 801  # hipErrorNotSupported
_OF_ROCM = re.compile(r"(_{0,2}hip|roc|nccl|amd_)\w+")
_OF_THE_SYSTEM = re.compile(r"lib(c|m|dl|rt|gcc_s|pthread|stdc\+\+)\.so|ld-linux")


def wheel() -> Path:
    """The wheel's directory in the cache, fetched once: 71 MB, 377 unpacked."""
    place = CACHE / f"{CUPY.replace('==', '-')}-{sys.implementation.cache_tag}"
    with alone(place):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
                done = subprocess.run([*command, "--dest", scratch, CUPY], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{CUPY} cannot be fetched: {done.stderr.strip()}")
                (file,) = Path(scratch).glob("*.whl")
                with zipfile.ZipFile(file) as archive:
                    archive.extractall(Path(scratch, "unpacked"))
                Path(scratch, "unpacked").rename(place)
    return place


def libraries() -> Path:
    """The directory with the libraries that the wheel names, all of them links to one."""
    files = sorted(map(str, wheel().rglob("*.so")))
    made_of = [CUPY, sys.implementation.cache_tag or "", Path(__file__).read_text(), _RTC.read_text()]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    place = CACHE / f"libraries-{key}"
    with alone(place):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                whole = Path(scratch, "whole")
                whole.mkdir()
                _build(files, whole)
                whole.rename(place)
    return place


def _build(files: list[str], place: Path) -> None:
    versions: dict[str, str] = {}  # of each symbol; "" for none
    for line in _output("llvm-nm-19", "--dynamic", "--undefined-only", "--no-sort", *files).splitlines():
        name, _, version = line.split()[-1].partition("@") if line.startswith(" ") else ("", "", "")
        if _OF_ROCM.fullmatch(name):
            versions[name] = version.lstrip("@") or versions.get(name, "")
    # hipRTC is not linked but opened by name.
    versions.update(dict.fromkeys(re.findall(r"^def (hiprtc\w+)", _RTC.read_text(), re.MULTILINE), ""))
    names = sorted(versions)
    (place / "names").write_text("\n".join(names))
    (place / "jumps.s").write_text(_assembly(names))
    nodes = defaultdict(list)
    for name in names:
        nodes[versions[name]].append(name)
    nodes.pop("", None)
    (place / "versions").write_text("".join(f"{node} {{ {'; '.join(found)}; }};\n" for node, found in nodes.items()))
    command = ["clang++-19", "-shared", "-nostdlib", "-fuse-ld=lld", f"-Wl,--version-script={place}/versions"]
    subprocess.run([*command, f"{place}/jumps.s", "-o", f"{place}/libvirtual_rocm.so"], check=True)
    wanted = set(re.findall(r"NEEDED.*\[(.*)\]", _output("llvm-readelf-19", "--dynamic-table", *files)))
    for library in {*wanted, "libhiprtc.so.7"}:
        if not _OF_THE_SYSTEM.match(library):
            (place / library).symlink_to("libvirtual_rocm.so")


def _assembly(names: list[str]) -> str:
    lines = [".text"]
    for i, name in enumerate(names):
        lines += [
            f".globl {name}\n.type {name}, @function\n{name}: jmp *(slots + {8 * i})(%rip)",
            f"missing_{i}: lea name_{i}(%rip), %rax\nmov %rax, missing(%rip)\nmov ${NOT_SUPPORTED}, %eax\nret",
        ]
    lines += [".globl virtual_rocm_ended\nvirtual_rocm_ended: xor %eax, %eax\nret", ".section .rodata"]
    lines += [f'name_{i}: .asciz "{name}"' for i, name in enumerate(names)]
    lines += [".data", ".balign 8", ".globl virtual_rocm_slots, virtual_rocm_missing"]
    lines += ["virtual_rocm_missing:\nmissing: .quad 0", "virtual_rocm_slots:\nslots:"]
    lines += [f".quad missing_{i}" for i in range(len(names))]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Loaded:
    """The library in this process."""

    def __init__(self, place: Path) -> None:
        self._library = ctypes.CDLL(str(place / "libvirtual_rocm.so"), mode=ctypes.RTLD_GLOBAL)
        self._names = (place / "names").read_text().split()
        self._slots = (ctypes.c_void_p * len(self._names)).in_dll(self._library, "virtual_rocm_slots")
        self._missing = ctypes.c_char_p.in_dll(self._library, "virtual_rocm_missing")

    def provide(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Python functions for symbols; their annotations are the C types."""
        for name, function in functions.items():
            types = dict(function.__annotations__)
            result = types.pop("return")
            callback = ctypes.CFUNCTYPE(result, *types.values())(function)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))  # never freed: C code may call it at the very end
            self._slots[self._names.index(name)] = ctypes.cast(callback, ctypes.c_void_p).value

    def end(self) -> None:
        """From now on every call succeeds and does nothing: Python is about to end."""
        for i in range(len(self._names)):
            self._slots[i] = ctypes.cast(self._library.virtual_rocm_ended, ctypes.c_void_p).value

    @property
    def last_missing(self) -> str:
        """The symbol that was called last of those that nothing provides."""
        return (self._missing.value or b"").decode()


def environment(gfx: str, scratch: Path) -> dict[str, str]:
    """The variables with which a Python process finds itself on a machine with this GPU."""
    here = Path(__file__).parent
    path = [str(here / "site"), str(here.parent), str(here.parents[1]), str(wheel())]
    return {
        **os.environ,
        "VIRTUAL_ROCM_GFX": gfx,
        "LD_LIBRARY_PATH": str(libraries()),
        "PYTHONPATH": os.pathsep.join(path),
        "PATH": f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "FORGE_HARNESS_PATH": os.environ["PATH"],
        "VIRTUAL_ROCM_CACHE": str(CACHE),
        "OPENBLAS_NUM_THREADS": "1",  # the machines run side by side
        "CUPY_CACHE_DIR": str(scratch / "cupy"),
        "FORGE_CACHE": str(scratch / "forge"),
    }
