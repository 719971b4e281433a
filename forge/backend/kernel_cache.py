"""Code objects: kernels compiled for a GPU ahead of time, kept in files that are checked before they are used.

A store is a directory with one for each GPU: ``gfx1100/<variant>.hsaco`` (NVIDIA: ``sm_90a/<variant>.cubin``), and
beside each a ``.json`` that says what it is: {"arch", "source", "code", "compiler"}, with the SHA-256 of what it was
compiled from and of the file itself. Both are replaced whole. Between the two renames, or after a crash there, their
hashes disagree, and the pair is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from forge import _files
from forge._files import cache_dir
from forge.backend import amd, compilers, edits, sources
from forge.backend.compilers import COMPILERS, FLAGS, MAX_CODE_BYTES, compile_variant, find_compiler, target
from forge.config import Progress
from forge.errors import DeviceError, DownloadError, ParameterError

State = Literal["valid", "missing", "stale", "corrupt", "foreign"]

_MAX_NOTE_BYTES = 1 << 16


class Checked(NamedTuple):
    """What a store holds of a variant."""

    state: State
    path: Path
    fault: str
    """What is wrong with the file, as a predicate of its name; "" where it is valid or missing."""
    code: bytes
    """The file's bytes where it is valid, else none: what was verified is what is loaded."""


class Built(NamedTuple):
    """What a build has done for one GPU."""

    arch: str
    directory: Path
    built: int
    present: int
    """Number of files that were there and valid."""
    num_bytes: int
    """Bytes of all files, old and new."""


def stores() -> list[Path]:
    """Directories in which code objects are looked for, in this order; new ones go to the first that takes them.

    $FORGE_KERNELS if it is set, then forge's cache directory if there is one.
    """
    found = []
    if chosen := os.environ.get("FORGE_KERNELS"):
        found.append(Path(os.path.abspath(os.path.expanduser(chosen))))
    try:
        found.append(cache_dir() / "kernels")
    except DownloadError:
        if not found:
            raise
    return found


edit_store: Path | None = None
"""Where code of edits is kept, for this process and those that it starts; None: nowhere."""


def stores_of(variant: sources.Variant) -> list[Path]:
    """Where a variant's code is looked for: what is compiled of an edit is no part of the cache."""
    if edits.of(variant.file) is None:
        return stores()
    return [] if edit_store is None else [edit_store]


def check_arch(arch: str) -> str:
    """The name of an AMD GPU as directories spell it, without features. Raises ParameterError for another text."""
    name = amd.without_features(arch)
    if amd.version(name) is None:
        message = f"arch must be an AMD GPU's, such as gfx1100 or gfx942, not {arch!r:.60}"
        raise ParameterError(message, parameter="arch")
    if why := amd.refusal(name):
        raise ParameterError(f"arch {name} {why}", parameter="arch")
    return name


def obtain(variant: sources.Variant, arch: str) -> bytes:
    """A variant's verified code for the driver of an AMD GPU to load.

    What a store holds is used if it is valid; else it is compiled into a store. CuPy never compiles here: its cache
    takes the code of one GPU for another's of the same compute capability (cupy#9830). A file that is refused is named
    in a warning. Raises DeviceError where there is nothing to use and nothing to compile with.
    """
    searched = stores_of(variant)
    code, refused = _search(searched, variant, arch)
    if code is not None:
        return code
    compiler = find_compiler()
    if compiler is None:
        places = " or ".join(map(str, searched))
        found = f"{refused[0].path} {refused[0].fault}" if refused else f"none is prebuilt in {places}"
        raise DeviceError(
            f"no code for kernel {variant.name} on {arch}: {found}, and there is no compiler: install {COMPILERS}, or "
            f"run `forge kernels build --arch {arch} --out DIR` where there is one and set FORGE_KERNELS to DIR"
        )
    for checked in refused:
        _warn_once(checked, "compiled anew")
    code = compile_variant(variant, arch, compiler)
    if failed := _keep(searched, variant, arch, code, compiler.version):
        warnings.warn(f"compiled kernels cannot be kept in {' or '.join(failed)}", stacklevel=2)
    return code


def kept(variant: sources.Variant, arch: str, make: Callable[[], bytes]) -> bytes:
    """A variant's code for an NVIDIA GPU.

    `make` compiles the code where no store has it. Code that cannot be kept is compiled again by the next process.
    """
    try:
        searched = stores_of(variant)
    except DownloadError:
        searched = []
    code, _ = _search(searched, variant, arch)
    if code is None:
        code = make()
        _keep(searched, variant, arch, code, "NVRTC")
    return code


def _search(searched: list[Path], variant: sources.Variant, arch: str) -> tuple[bytes | None, list[Checked]]:
    """The code of the first store that holds the variant, and the unusable files of the stores before it."""
    refused: list[Checked] = []
    for store in searched:
        checked = check(store, variant, arch)
        if checked.state == "valid":
            return checked.code, refused
        if checked.state != "missing":
            refused.append(checked)
    return None, refused


def _keep(takers: list[Path], variant: sources.Variant, arch: str, code: bytes, compiler: str) -> list[str]:
    """Put the code into the first store that takes it; if none does, each with its reason."""
    failed = []
    for store in takers:
        try:
            _publish(store, variant, arch, code, compiler)
            return []
        except OSError as error:
            failed.append(f"{store} ({_files.reason(error)})")
    return failed


def check(store: Path, variant: sources.Variant, arch: str) -> Checked:
    """What a store holds of a variant, whatever lies there in its place. Raises nothing."""
    path = _path(store, variant, arch)

    def refused(state: State, fault: str) -> Checked:
        return Checked(state, path, fault, b"")

    try:
        code = _files.read(path, MAX_CODE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return refused("missing", "")
    except (OSError, ValueError) as error:
        return refused("corrupt", f"cannot be read: {_files.reason(error)}")
    try:
        about = json.loads(_files.read(path.with_name(f"{variant.name}.json"), _MAX_NOTE_BYTES))
    except OSError as error:
        return refused("corrupt", f"has no {variant.name}.json beside it ({_files.reason(error)})")
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        return refused("corrupt", f"has a {variant.name}.json beside it that is none of forge's")
    if about.get("code") != hashlib.sha256(code).hexdigest():
        return refused("corrupt", "is damaged: its SHA-256 is not the one noted beside it")
    found = target(code)
    if _is_amd(arch) and found != arch:
        return refused("foreign", f"is a code object for {found}" if found else "is no AMD code object")
    if about.get("arch") != arch:
        return refused("foreign", "is noted beside it as one for another GPU")
    if about.get("source") != _source_hash(variant):
        return refused("stale", "is stale: it was compiled from another version of the kernel")
    return Checked("valid", path, "", code)


def survey(store: Path) -> dict[str, tuple[Counter[State], int]]:
    """Numbers of files in each state, and bytes of all files, for each GPU that a store has a directory for.

    A file that is named after no kernel is stale.
    Raises OSError where the store cannot be listed; one that is not there holds nothing.
    """
    try:
        archs = sorted(name for name in os.listdir(store) if amd.version(name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for arch in archs:
        names = {name[: -len(".hsaco")] for name in os.listdir(store / arch) if name.endswith(".hsaco")}
        counts: Counter[State] = Counter()
        num_bytes = 0
        for name in names:
            variant = sources.Variant.parse(name)
            counts[check(store, variant, arch).state if variant else "stale"] += 1
            num_bytes += os.lstat(store / arch / f"{name}.hsaco").st_size
        found[arch] = counts, num_bytes
    return found


def missing(variants: Iterable[sources.Variant], arch: str, searched: Sequence[Path]) -> list[sources.Variant]:
    """Variants of which none of these stores holds a valid file."""
    return [v for v in variants if all(check(store, v, arch).state != "valid" for store in searched)]


def build(
    wanted: Mapping[str, Sequence[sources.Variant]], store: Path, progress: Progress | None = None
) -> list[Built]:
    """Compile, in parallel, what a store does not hold or holds in another state than valid.

    Raises DeviceError where there is no compiler, where it refuses (the first message), and where the store cannot be
    written. What was built until then is kept.

    wanted: Variants by the name of the GPU, which `check_arch` takes.
    """
    jobs = [(variant, arch) for arch, variants in wanted.items() for variant in missing(variants, arch, [store])]
    compiler = find_compiler() if jobs else None
    if jobs and compiler is None:
        raise DeviceError(f"there is no compiler for AMD GPUs: install {COMPILERS}")

    def make(job: tuple[sources.Variant, str]) -> None:
        assert compiler
        code = compile_variant(*job, compiler)
        try:
            _publish(store, *job, code, compiler.version)
        except OSError as error:
            message = f"{store}: cannot be written: {_files.reason(error)}"
            raise DeviceError(message, hint="choose another directory") from None

    compilers.compile_all(make, jobs, progress)
    found = []
    for arch, variants in wanted.items():
        built = sum(compiled == arch for _, compiled in jobs)
        num_bytes = sum(_path(store, variant, arch).stat().st_size for variant in variants)
        found.append(Built(arch, store / arch, built, len(variants) - built, num_bytes))
    return found


def _source_hash(variant: sources.Variant) -> str:
    """SHA-256 of everything that is forge's in a compilation."""
    return hashlib.sha256("\0".join([sources.source(variant.file), *FLAGS, *variant.options]).encode()).hexdigest()


def _is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def _path(store: Path, variant: sources.Variant, arch: str) -> Path:
    return store / arch / f"{variant.name}.{'hsaco' if _is_amd(arch) else 'cubin'}"


def _publish(store: Path, variant: sources.Variant, arch: str, code: bytes, compiler: str) -> None:
    about = {
        "arch": arch,
        "source": _source_hash(variant),
        "code": hashlib.sha256(code).hexdigest(),
        "compiler": compiler,
    }
    path = _path(store, variant, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.replace(path, code)
    _files.replace(path.with_name(f"{variant.name}.json"), json.dumps(about).encode() + b"\n")


_warned: set[tuple[Path, State]] = set()


def _warn_once(checked: Checked, remedy: str) -> None:
    """A warning for the first file of a directory in each state: after an update of forge, all are stale."""
    if (checked.path.parent, checked.state) not in _warned:
        _warned.add((checked.path.parent, checked.state))
        warnings.warn(f"{checked.path} {checked.fault}; {remedy}", stacklevel=3)
