"""Kernels of AMD code objects, run by the CPU harness from the source that the code object was compiled from."""

import ctypes
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import harness
import yaml

from forge.backend import kernel_cache, sources
from virtual_rocm.calls import Failure
from virtual_rocm.runtime import INVALID_IMAGE, NO_BINARY_FOR_GPU

_MAX_LDS_BYTES = 64 << 10
_TILES = {
    **dict.fromkeys(("gfx908", "gfx90a", "gfx94", "gfx95"), "TILE_MFMA"),
    "gfx11": "TILE_WMMA_11",
    "gfx120": "TILE_WMMA_12",
    "gfx": "TILE_SCALAR",
}
"""The matrix cores of a family of targets."""


def tile_of(arch: str) -> tuple[str, bool]:
    """The matrix cores, and whether they take float16 subnormals for zeros."""
    return next(tile for family, tile in _TILES.items() if arch.startswith(family)), arch == "gfx90a"


@dataclass
class Kernel:
    """A kernel of a code object, with what its metadata says."""

    name: str
    variant: sources.Variant | None
    """What it was compiled from; None where that is not forge's."""
    sizes: list[int]
    """Bytes of each argument."""
    arrays: list[int]
    """Which arguments are addresses."""
    threads: int
    """Most of a block."""
    lds_bytes: int
    """What it declares."""
    tile: tuple[str, bool]
    """`tile_of` the target."""
    fault: str
    """Where the metadata is not what the source says."""

    def launch(self, grid: tuple[int, ...], threads: int, arguments: list[bytes], wave: int) -> str:
        """Run it; what went wrong, or ""."""
        if self.variant is None:
            return f"{self.name} is no kernel of forge's"
        if self.fault:
            return f"{self.variant.name}: {self.name}: {self.fault}"
        held = [ctypes.create_string_buffer(argument, len(argument)) for argument in arguments]
        error = harness.launch(
            compiled(self.variant, self.tile, wave),
            self.name,
            grid,
            threads,
            [ctypes.addressof(argument) for argument in held],
            wave=wave,
            flush=True,  # CuPy compiles with -fcuda-flush-denormals-to-zero
        )
        return f"{self.variant.name}: {self.name}: {error}" if error else ""


def read(address: int, size: int) -> bytes:
    """Memory of this process. Raises Failure where there is none: the driver would be handed a file cut off."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            data = os.pread(memory.fileno(), size, address)
        except OSError:
            data = b""
    if len(data) < size:
        raise Failure(INVALID_IMAGE)
    return data


def image(address: int) -> bytes:
    """The bytes of the ELF file at an address, which ends with its table of sections."""
    header = read(address, 64)
    if header[:4] != b"\x7fELF":
        raise Failure(INVALID_IMAGE)
    start, size, count = *struct.unpack_from("<Q", header, 40), *struct.unpack_from("<HH", header, 58)
    return read(address, start + size * count)


def compiled(variant: sources.Variant, tile: tuple[str, bool], wave: int) -> ctypes.CDLL:
    cores, tile_flush = tile
    return harness.compiled(variant, cores, wave, tile_flush)


def load(code: bytes, arch: str, wave: int) -> dict[str, Kernel]:
    """The kernels of a code object. Raises Failure where it is for another GPU."""
    target, notes = _read(code)
    if target != arch:
        raise Failure(NO_BINARY_FOR_GPU)
    variant = _variant(code, arch)
    if variant is not None:
        compiled(variant, tile_of(arch), wave)  # not at the launch: several are loaded at a time
    found = {}
    for about in notes["amdhsa.kernels"]:
        given = [argument for argument in about[".args"] if not argument[".value_kind"].startswith("hidden")]
        arrays = [i for i, argument in enumerate(given) if argument[".value_kind"] == "global_buffer"]
        sizes = [argument[".size"] for argument in given]
        kernel = Kernel(
            about[".name"],
            variant,
            sizes,
            arrays,
            about[".max_flat_workgroup_size"],
            about[".group_segment_fixed_size"],
            tile_of(arch),
            "",
        )
        if variant is not None:
            kernel.fault = _fault(variant, kernel, about, given, wave)
        found[kernel.name] = kernel
    return found


def _fault(
    variant: sources.Variant, kernel: Kernel, about: dict[str, Any], given: list[dict[str, Any]], wave: int
) -> str:
    """Where a code object's metadata is not what Python reads in the source, or not what a GPU can run."""
    entry = sources.entry(variant.file, kernel.name, variant.defines)
    wanted = [
        ("global_buffer", 8) if is_array else ("by_value", dtype.itemsize) for _, dtype, is_array in entry.parameters
    ]
    if [(argument[".value_kind"], argument[".size"]) for argument in given] != wanted:
        return "its arguments are not those of the source"
    checks: list[tuple[str, Callable[[Any], bool]]] = [
        (".max_flat_workgroup_size", lambda value: value == entry.threads),
        (".wavefront_size", lambda value: value == wave),
        (".group_segment_fixed_size", lambda value: value <= _MAX_LDS_BYTES),
        (".private_segment_fixed_size", lambda value: value == 0),
        (".vgpr_spill_count", lambda value: value == 0),
    ]
    return "; ".join(f"{key} is {about[key]}" for key, is_right in checks if not is_right(about[key]))


_held: dict[Path, tuple[int, bytes]] = {}


def _variant(code: bytes, arch: str) -> sources.Variant | None:
    """What a code object was compiled from, by its name in a store of forge's; None where it is not forge's."""
    for store in filter(None, [*kernel_cache.stores(), kernel_cache.edit_store]):
        for path in (store / arch).glob("*.hsaco"):
            when = path.stat().st_mtime_ns
            if path not in _held or _held[path][0] != when:
                _held[path] = when, path.read_bytes()
            if _held[path][1] == code:
                return sources.Variant.parse(path.stem)
    return None


@cache
def _read(code: bytes) -> tuple[str, Any]:
    """The GPU in a code object's header, and the note NT_AMDGPU_METADATA: what HIP reads to launch a kernel."""
    command = [tool("llvm-readelf-19"), "--file-header", "--notes", "-"]
    text = subprocess.run(command, input=code, capture_output=True, check=True).stdout.decode()
    flags = re.search(r"Flags: .*?\b(gfx[0-9a-f]+)", text)
    return flags[1] if flags else "", yaml.safe_load(text[text.index("---") : text.index("...")])


def tool(name: str) -> str:
    """The path of a program that the virtual machine needs, which the machine that it plays may not have."""
    path = shutil.which(name, path=harness.TOOLS)
    assert path, f"no {name}: run scripts/install-toolchain"
    return path
