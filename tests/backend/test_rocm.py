"""A CuPy that cannot be imported is said in one line with the cause and the fix; pip's ROCm is found and loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import forge
from forge.backend import cupy_fault, rocm, select
from forge.cli import run

BANNER = "=" * 64
LLAMA = str(Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf")
MISSING = "libamdhip64.so.7: cannot open shared object file: No such file or directory"
SOURCE = f"""
try:
    raise ImportError("{MISSING}")
except ImportError as error:
    raise ImportError(f'''
{BANNER}
Failed to import CuPy.

If you installed CuPy via wheels (cupy-cudaXXX or cupy-rocm-X-X), make sure that the package matches.

Original error:
  ImportError: {{error}}
{BANNER}
''') from error
"""
"""As CuPy 14.2 for ROCm does where there is no ROCm."""


Captured = pytest.CaptureFixture[str]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with such a CuPy, as pip leaves it, from which Python imports."""
    package, about = tmp_path / "site" / "cupy", tmp_path / "site" / "cupy_rocm_7_0-14.2.0.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-rocm-7-0\nVersion: 14.2.0\n")
    (about / "top_level.txt").write_text("cupy\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "site"
    sys.modules.pop("cupy", None)


@pytest.mark.usefixtures("site")
def test_a_command_names_the_cause_and_the_fix_in_one_line(capsys: Captured) -> None:
    assert run(["generate", "a", "-m", LLAMA, "--device", "hip"]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    assert line.startswith(
        "forge: device hip: CuPy cannot be imported: libamdhip64.so.7: cannot open shared object file: install ROCm 7"
    )
    assert "====" not in line
    assert run(["generate", "a", "-m", LLAMA, "--max-tokens", "1"]) == 0
    auto = capsys.readouterr().err
    assert "libamdhip64.so.7: cannot open shared object file" in auto
    assert "====" not in auto


@pytest.mark.usefixtures("site")
def test_debug_shows_the_whole_chain(capsys: Captured) -> None:
    assert run(["generate", "a", "-m", LLAMA, "--device", "hip", "--debug"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("Traceback (most recent call last)") == 3
    assert f"ImportError: {MISSING}" in shown


@pytest.mark.usefixtures("site")
def test_doctor_calls_it_a_problem(capsys: Captured) -> None:
    assert run(["doctor"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "cupy-rocm-7-0 14.2.0, cannot be imported: libamdhip64.so.7: cannot open shared object file" in shown
    assert "CuPy: it cannot be imported: install ROCm 7" in shown
    assert run(["doctor", "--device", "hip:1"]) == 1
    assert "there is no hip:1 to be used here" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["hip", "cuda:0"])
def test_doctor_demands_a_device_that_is_asked_for(device: str, capsys: Captured) -> None:
    assert run(["doctor", "--device", device]) == 1
    assert f"there is no {device} to be used here, and --device asked for it" in capsys.readouterr().out
    assert run(["doctor", "--device", f"{device}x"]) == 2


@pytest.mark.parametrize(
    ("source", "cause", "fix"),
    [
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'", "--force-reinstall cupy-rocm-7-0"),
        ("1 / 0", "division by zero", "--force-reinstall cupy-rocm-7-0"),
        ("raise ImportError('libnuma.so.1: cannot open shared object file')", "libnuma", "package that holds libnuma"),
        ("raise RuntimeError", "RuntimeError", "--force-reinstall cupy-rocm-7-0"),
        ("raise ImportError('a\\n  b')", "a b", "--force-reinstall"),
        ("raise SystemExit('no GPU')", "no GPU", "--force-reinstall"),
        ("from cupy import _core", "cannot import name '_core'", "--force-reinstall"),  # its error's name is cupy
        ("a = OSError('a')\na.__cause__ = OSError('b')\na.__cause__.__cause__ = a\nraise a", "", "--force-reinstall"),
        ("class E(Exception):\n  def __str__(self): return 1\nraise E", "E", "--force-reinstall"),
    ],
)
def test_other_causes(source: str, cause: str, fix: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "cupy" / "__init__.py").write_text(source)
    found = cupy_fault()
    assert found is not None
    assert cause in found[0]
    assert fix in found[1]
    with pytest.raises(forge.DeviceError, match=r"^device hip: CuPy cannot be imported: ") as raised:
        select("hip")
    assert raised.value.__cause__ is not None


def test_a_library_that_lies_elsewhere_or_is_of_another_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    held = tmp_path / "lib"
    held.mkdir()
    (held / "libhipblas.so.2").touch()
    cause, fix = rocm.diagnose(ImportError("libhipblas.so.3: cannot open shared object file: No such file"), [])
    assert cause.startswith("libhipblas.so.3: ")
    assert fix.startswith("there is libhipblas.so.2, of another version of ROCm: install ROCm 7")
    (held / "libhipblas.so.3").touch()
    assert rocm.diagnose(ImportError(cause), [])[1] == f"it is in {held}: set LD_LIBRARY_PATH={held}"
    # what failed before CuPy was imported is nearer to the cause than what CuPy missed afterwards
    assert rocm.diagnose(ImportError(cause), ["libnuma.so.1: cannot open shared object file"])[0].startswith("libnuma")


def library(path: Path, name: str, text: str, *needed: Path) -> None:
    """A shared library that others know by `name`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.parent.parent / f"{name}.c"
    source.write_text(text)
    links = [f"-Wl,-soname,{name}", "-Wl,--no-as-needed", *map(str, needed)]
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(path), *links], check=True)


needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.mark.slow
@needs_cc
@pytest.mark.skipif(sys.platform != "linux", reason="shared libraries of Linux")
def test_what_pip_has_installed_is_loaded_with_what_it_needs(tmp_path: Path) -> None:
    """A library of the second package needs one of the first, and that one of a directory below."""
    core, libraries = tmp_path / "_rocm_sdk_core" / "lib", tmp_path / "_rocm_sdk_libraries_gfx110X_all" / "lib"
    deep = core / "rocm_sysdeps" / "lib" / "librocm_sysdeps_x.so.1"
    library(deep, deep.name, "int amdb_deep(void) { return 3; }")
    text = "int amdb_deep(void); int amdb_hip(void) { return 10 * amdb_deep(); }"
    library(core / "libamdhip64.so.7", "libamdhip64.so.7", text, deep)
    text = "int amdb_hip(void); int amdb_blas(void) { return amdb_hip() + 4; }"
    library(libraries / "libhipblas.so.3", "libhipblas.so.3", text, core / "libamdhip64.so.7")
    user = tmp_path / "user.so"  # as CuPy's are: knows the others by name alone
    library(user, "user.so", "int amdb_blas(void); int amdb_user(void) { return amdb_blas(); }",
            libraries / "libhipblas.so.3")  # fmt: skip
    code = "import ctypes; from forge.backend import rocm; print(rocm.preload()); "
    code += f"print(ctypes.CDLL({str(user)!r}).amdb_user())"
    plain = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert done.stdout == "[]\n34\n", done.stderr
    without = subprocess.run(
        [sys.executable, "-c", code.replace("rocm.preload()", "0")], env=plain, capture_output=True
    )
    assert b"cannot open shared object file" in without.stderr
    deep.unlink()
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert done.stdout.startswith("['librocm_sysdeps_x.so.1: cannot open shared object file")


def test_of_several_families_the_one_for_this_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    monkeypatch.setattr(rocm, "_NODES", nodes)
    packages = [tmp_path / f"_rocm_sdk_libraries_{family}" for family in ("gfx103X_dgpu", "gfx1151", "gfx94X_dcgpu")]
    assert rocm._of_this_gpu(packages) == packages[:1]
    for number, (version, name, place) in enumerate(
        ((0, "", 0), (110501, "gfx1151", 1), (90402, "gfx942", 2), (100300, "gfx1030", 0), (120001, "gfx1201", 0))
    ):
        (nodes / str(number)).mkdir(parents=True)
        (nodes / str(number) / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")
        assert rocm._gpus() == ([name] if name else [])
        assert rocm._of_this_gpu(packages) == packages[place : place + 1]
        (nodes / str(number) / "properties").write_text("")
    monkeypatch.setenv("ROCM_SDK_TARGET_FAMILY", "gfx94X-dcgpu")
    assert rocm._of_this_gpu(packages) == packages[2:]
    assert rocm._of_this_gpu([]) == []


def test_the_compiler_in_pips_rocm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert rocm.compiler() is None
    path = tmp_path / "_rocm_sdk_core" / "lib" / "llvm" / "bin" / "clang++"
    path.parent.mkdir(parents=True)
    path.touch(0o755)
    assert rocm.compiler() == str(path)


def test_nothing_is_loaded_where_pip_has_no_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("loaded"))
    assert rocm.preload() == []
