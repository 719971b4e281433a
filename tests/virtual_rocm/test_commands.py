"""What users type on a machine that lacks something: it works all the same, or one line says why."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from forge.backend import compilers, kernel_cache, sources
from forge.ops.matmul import MAX_ROWS
from forge.tuning import store as tuning
from virtual_rocm import tiny
from virtual_rocm.command import forge

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

ON = ("gfx1100",)
HERE = Path(__file__).parent
MODEL = tiny.ARCH / "llama" / "model.gguf"
GENERATE = ("generate", "--model", str(MODEL), "--device", "hip", "--max-tokens", "6", "--ignore-eos", "--json", "abc")


def ids(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)["ids"]
    return found


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert done.returncode == 1, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("forge: compiling kernels")]
    return line


@pytest.fixture(scope="session")
def usual_ids() -> list[int]:
    return ids(forge(*GENERATE))


def test_no_device() -> None:
    nothing = {"VIRTUAL_ROCM_DEVICES": "0"}
    assert complaint(forge(*GENERATE, **nothing)) == (
        "forge: no usable GPU: hipErrorNoDevice: no ROCm-capable device is detected"
    )
    auto = forge(*("auto" if argument == "hip" else argument for argument in GENERATE), **nothing)
    assert "auto: no usable GPU: hipErrorNoDevice" in auto.stderr
    assert ids(auto)
    assert complaint(forge("verify", "--device", "hip:1")) == "forge: hip:1 does not exist: 1 GPU is there"


@pytest.mark.parametrize("other", ["gfx906", "gfx908", "gfx1103"])
def test_an_unknown_gpu_works_and_is_called_untested(other: str, usual_ids: list[int]) -> None:
    """Without BLAS, so that forge's own products serve the prompt, on matrix cores and without them."""
    done = forge(*GENERATE, VIRTUAL_ROCM_GFX=other, VIRTUAL_ROCM_BLAS="none")
    assert ids(done) == usual_ids
    (line,) = [line for line in done.stderr.splitlines() if "untested" in line]
    assert line.startswith(f"forge: device: {other} is untested: forge's tests cover gfx90a, ")
    assert f"{other} is untested" in forge("doctor", VIRTUAL_ROCM_GFX=other).stdout


@pytest.mark.parametrize("type_name", ["F16", "Q4_K"])
@pytest.mark.parametrize("other", ["gfx1151", "gfx1201"])
def test_where_blas_has_no_kernels_forges_own_serve_alone(other: str, type_name: str, tmp_path: Path) -> None:
    """A prompt of more rows than a launch takes beside BLAS, and ids after it: as NumPy's."""
    path = tiny.write("llama", type_name, tmp_path / "model.gguf")
    prompt = " ".join(f"{n} abc" for n in range(45))
    command = ("generate", "--model", str(path), "--max-tokens", "4", "--ignore-eos", "--json", prompt)
    wanted = forge(*command, "--device", "cpu")
    assert len(json.loads(wanted.stdout)["prompt_ids"]) > MAX_ROWS
    found = forge(*command, "--device", "hip", VIRTUAL_ROCM_GFX=other, VIRTUAL_ROCM_BLAS="none")
    assert ids(found) == ids(wanted)
    assert "hipBLAS cannot multiply here" in found.stderr


def test_a_gpu_that_is_too_old_is_refused_before_anything_compiles() -> None:
    assert complaint(forge(*GENERATE, VIRTUAL_ROCM_GFX="gfx803")) == (
        "forge: hip:0 (Virtual AMD GPU, gfx803): gfx803 is older than gfx900 (Vega): forge has no kernels for it, and "
        "ROCm 7 no driver"
    )


def test_a_gpu_that_the_compiler_does_not_know() -> None:
    line = complaint(forge(*GENERATE, VIRTUAL_ROCM_GFX="gfx1399"))
    assert line.endswith("/hipcc does not know gfx1399: check the name, or use a newer compiler")


def test_without_blas_kernels_of_forges_multiply(usual_ids: list[int]) -> None:
    done = forge(*GENERATE, VIRTUAL_ROCM_BLAS="none")
    assert ids(done) == usual_ids
    (line,) = [line for line in done.stderr.splitlines() if "hipBLAS" in line]
    assert "hipBLAS cannot multiply here (Aborted: rocBLAS error: Cannot read" in line


@pytest.fixture(scope="session")
def store(gfx: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Code objects of what the model needs, recorded without a GPU."""
    place = tmp_path_factory.mktemp("kernels")
    done = forge("kernels", "build", "-m", str(MODEL), "--arch", gfx, "--out", str(place), VIRTUAL_ROCM_DEVICES="0")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "kernels"))


def nothing_on_path(tmp_path: Path) -> dict[str, str]:
    """No hipcc, no clang, and nothing that was compiled before."""
    return {"PATH": str(tmp_path / "nowhere"), "FORGE_CACHE": str(tmp_path / "cache")}


def test_without_a_compiler(store: Path, usual_ids: list[int], gfx: str, tmp_path: Path) -> None:
    bare = nothing_on_path(tmp_path)
    line = complaint(forge(*GENERATE, **bare))
    assert re.fullmatch(
        rf"forge: no code for kernel \S+ on {gfx}: none is prebuilt in \S+, and there is no compiler: install .*", line
    )
    assert ids(forge(*GENERATE, **bare, FORGE_KERNELS=str(store))) == usual_ids


def test_without_a_compiler_what_was_tuned_is_not_used(
    store: Path, usual_ids: list[int], gfx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its variants are not among the prebuilt ones."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    shape, values = {"op": "linear", "inner": 512, "outer": 8191}, {"BLOCK": 64, "ROWS": 4, "MIN_BLOCKS": 10}
    path = tuning.save(gfx, "a GPU", "0.1", [tuning.Measured("matvec_f16", shape, values, 2.0, 1.0)])
    done = forge(*GENERATE, **nothing_on_path(tmp_path), FORGE_KERNELS=str(store))
    assert ids(done) == usual_ids
    (line,) = [line for line in done.stderr.splitlines() if str(path) in line]
    assert "is not used: there is no compiler here" in line


def test_a_plain_clang_serves(usual_ids: list[int], tmp_path: Path) -> None:
    """It is on PATH of every machine that runs this test, behind the directory of hipcc."""
    path = os.environ["PATH"].removeprefix(f"{HERE / 'bin'}{os.pathsep}")
    assert shutil.which("hipcc", path=path) is None
    done = forge(*GENERATE, PATH=path, FORGE_CACHE=str(tmp_path))
    assert ids(done) == usual_ids
    assert list(tmp_path.glob("kernels/gfx*/*.hsaco"))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    """And note it as if it were whole."""
    data = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(data)
    note(path, data)


def of_another_gpu(path: Path) -> None:
    other = "gfx90a" if path.parent.name != "gfx90a" else "gfx942"
    variant, compiler = sources.Variant.parse(path.stem), compilers.find_compiler()
    assert variant
    assert compiler
    data = compilers.compile_variant(variant, other, compiler)
    path.write_bytes(data)
    note(path, data)


def note(path: Path, data: bytes) -> None:
    about = json.loads(path.with_suffix(".json").read_text())
    about["code"] = hashlib.sha256(data).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [(damage, "is damaged: its SHA-256 is not the one noted"), (of_another_gpu, "is a code object for gfx90a")],
)
def test_a_code_object_that_is_refused_is_compiled_anew_or_named(
    spoil: object, fault: str, copy: Path, usual_ids: list[int], gfx: str, tmp_path: Path
) -> None:
    path = next(copy.glob(f"{gfx}/decode_state*.hsaco"))
    spoil(path)  # type: ignore[operator]
    done = forge(*GENERATE, FORGE_KERNELS=str(copy), FORGE_CACHE=str(tmp_path / "cache"))
    assert ids(done) == usual_ids
    assert [line for line in done.stderr.splitlines() if f"{path} {fault}" in line and "compiled anew" in line]
    assert kernel_cache.check(copy, sources.Variant("decode_state", ()), gfx).state == "valid"  # replaced
    spoil(path)  # type: ignore[operator]
    line = complaint(forge(*GENERATE, FORGE_KERNELS=str(copy), **nothing_on_path(tmp_path)))
    assert f"{path} {fault}" in line
    assert "there is no compiler" in line


def test_a_code_object_that_the_driver_refuses(copy: Path, gfx: str, tmp_path: Path) -> None:
    cut_off(next(copy.glob(f"{gfx}/decode_state*.hsaco")))
    line = complaint(forge(*GENERATE, FORGE_KERNELS=str(copy)))
    assert re.fullmatch(
        rf"forge: decode_state: the driver refuses its code object for {gfx}: hipErrorInvalidImage: .*", line
    )
