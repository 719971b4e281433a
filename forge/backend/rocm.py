"""ROCm as CuPy and the kernels need it: found where pip puts it, loaded before CuPy, and what is missing of it.

AMD's index has ROCm as packages: rocm-sdk-core holds `_rocm_sdk_core/lib` and a compiler, rocm-sdk-libraries-<family>
holds `_rocm_sdk_libraries_<family>/lib`. The dynamic linker knows neither. What is loaded already under the same name
serves for CuPy's own libraries, whose RPATHs do not lead there. Source: TheRock, docs/packaging/python_packaging.md.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

HOW_TO_INSTALL = (
    "install ROCm 7, from your system's packages, or by pip, for gfx110X: pip install --index-url "
    "https://repo.amd.com/rocm/whl/gfx110X-all/ 'rocm[libraries]' (other GPUs: docs/amd.md)"
)

_OF_CUPY = (
    *("roctx64", "roctracer64", "amdhip64", "hiprtc", "rocblas", "rocsolver", "hipblas", "rocfft", "hipfft"),
    *("hiprand", "hipsparse", "rccl"),
)
"""What CuPy is linked to, or opens, each behind what it needs itself."""
_IN_PACKAGES = ("lib", "lib/rocm_sysdeps/lib", "lib/host-math/lib", "lib/llvm/lib")
_MISSING = re.compile(r"(?P<name>\S+\.so[.\d]*): cannot open shared object file")
_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


def preload() -> list[str]:
    """Load what CuPy needs of a ROCm that pip has installed, for all libraries to see; what could not be, and why.

    Nothing where there is no such ROCm, and no library twice: another ROCm may be loaded in this process.
    """
    directories = library_directories()
    failed = []
    for name in _OF_CUPY:
        path = next((path for folder in directories for path in sorted(folder.glob(f"lib{name}.so*"))), None)
        if path is not None and (fault := _load(path, directories, set())):
            failed.append(fault)
    return failed


def library_directories() -> list[Path]:
    """Directories of ROCm's libraries, if pip has installed them into this environment."""
    packages = [*_packages("_rocm_sdk_core")[:1], *_of_this_gpu(_packages("_rocm_sdk_libraries"))]
    return [path for package in packages for part in _IN_PACKAGES if (path := package / part).is_dir()]


def compiler() -> str | None:
    """The clang++ of a ROCm that pip has installed."""
    for package in _packages("_rocm_sdk_core"):
        path = package / "lib/llvm/bin/clang++"
        if os.access(path, os.X_OK):
            return str(path)
    return None


def installed_cupy() -> str | None:
    """The installed CuPy's package and version; None where there is none."""
    module = sys.modules.get("cupy")
    spec = module.__spec__ if module else importlib.util.find_spec("cupy")
    if spec is None:
        return None
    for path in sorted(Path(spec.origin).parents[1].glob("cupy*.dist-info")) if spec.origin else ():
        package = importlib.metadata.PathDistribution(path)
        if "cupy" in (package.read_text("top_level.txt") or "").split():
            return f"{package.name} {package.version}"
    # Its metadata lies elsewhere. This reads every package's list of files: 0.5 s in a large environment.
    packages = importlib.metadata.packages_distributions().get("cupy", ())
    return next((f"{name} {importlib.metadata.version(name)}" for name in packages), None)


def diagnose(error: BaseException, failed: list[str]) -> tuple[str, str]:
    """Why CuPy cannot be imported, in one line, and the fix. `failed` is what `preload` gave.

    CuPy wraps the cause in a banner: what it was raised from says which library is missing.
    """
    seen = set()  # causes may go round in a circle
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        if id(inner) in seen:
            break
        seen.add(id(inner))
        error = inner
    cause = failed[0] if failed else _said(error)
    cause = cause.removesuffix(": No such file or directory")
    missing = _MISSING.search(cause)
    name = missing["name"] if missing else ""
    held = next((path for path in _installations() if name and (path / Path(name).name).exists()), None)
    if held is not None:
        return cause, f"it is in {held}: set LD_LIBRARY_PATH={held}"
    stem = Path(name).name.partition(".")[0].removeprefix("lib")
    if stem in _OF_CUPY or stem.startswith(("roc", "hip", "hsa", "amd")):
        others = sorted({other.name for path in _installations() for other in path.glob(f"lib{stem}.so.*")})
        other = f"there is {others[0]}, of another version of ROCm: " if others else ""
        return cause, other + HOW_TO_INSTALL
    package = (installed_cupy() or "cupy-rocm-7-0").partition(" ")[0]
    if missing and "cuda" in package:
        return cause, f"install NVIDIA's driver, and CUDA's libraries: pip install '{package}[ctk]'"
    if missing:
        return cause, f"install the package that holds {name}, or set LD_LIBRARY_PATH to its directory"
    return cause, f"CuPy, NumPy and ROCm do not fit each other: pip install --upgrade --force-reinstall {package}"


def _said(error: BaseException) -> str:
    """An error's text in one line; its type where it says nothing, or fails at saying it."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return text or type(error).__name__


def _installations() -> list[Path]:
    """Directories that may hold libraries of ROCm and that the dynamic linker does not know."""
    roots = [os.environ.get("ROCM_PATH"), "/opt/rocm", "/opt/rocm/core"]
    return [*library_directories(), *(Path(root, "lib") for root in dict.fromkeys(filter(None, roots)))]


def _packages(prefix: str) -> list[Path]:
    """Directories that Python imports from whose names begin so, as rocm-sdk's do: a family or a version may follow."""
    found = []
    for folder in dict.fromkeys(sys.path):
        try:
            names = sorted(name for name in os.listdir(folder or ".") if name.startswith(prefix))
        except OSError:
            continue
        found += [path for name in names if (path := Path(folder, name).absolute()).is_dir()]
    return found


def _of_this_gpu(packages: list[Path]) -> list[Path]:
    """The package of libraries for a GPU that is here, where there are several families, as rocm_sdk chooses."""
    wanted = os.environ.get("ROCM_SDK_TARGET_FAMILY", "").replace("-", "_")
    for package in packages:
        if wanted and package.name.endswith(f"_{wanted}"):
            return [package]
    for package in packages:
        family = re.search(r"_(gfx[0-9a-f]+)(X?)", package.name)
        if family and any(re.fullmatch(family[1] + ("." if family[2] else ""), gpu) for gpu in _gpus()):
            return [package]
    return packages[:1]


def _gpus() -> list[str]:
    """Names of the GPUs that the kernel's driver shows, before any library of ROCm is loaded."""
    found = []
    for node in sorted(_NODES.glob("*/properties")):
        try:
            match = re.search(r"^gfx_target_version (\d+)$", node.read_text(), re.MULTILINE)
        except OSError:
            continue
        if match and (number := int(match[1])):
            found.append(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return found


def _load(path: Path, directories: list[Path], tried: set[Path]) -> str:
    """Load a library, and before it the libraries of ROCm that it misses; what is wrong, or ""."""
    tried.add(path)
    while True:
        try:
            ctypes.CDLL(path.name, os.RTLD_NOW | os.RTLD_NOLOAD)
            return ""
        except OSError:
            pass
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            return ""
        except OSError as error:
            fault = " ".join(str(error).split())
        match = _MISSING.search(fault)
        name = Path(match["name"]).name if match else ""
        needed = next((other for folder in directories if name and (other := folder / name).exists()), None)
        if needed is None or needed in tried or _load(needed, directories, tried):
            return fault
