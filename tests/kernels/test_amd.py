"""Kernels compile for every AMD target, with its own instructions, or forge refuses it by name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.backend import amd, compilers, kernel_cache, sources
from forge.errors import DeviceError, ParameterError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("clang++-19"), reason="no clang++-19: run scripts/install-toolchain")

CLANG = ("clang++-19",)
ZIG = (sys.executable, "-m", "ziglang", "clang")
"""A newer clang, from PyPI."""
needs_zig = pytest.mark.skipif(
    not importlib.util.find_spec("ziglang") and not os.environ.get("FORGE_REQUIRE_TOOLCHAIN"), reason="no ziglang"
)


def variant(name: str) -> sources.Variant:
    found = sources.Variant.parse(name)
    assert found
    return found


TILE = variant("matmul-BLOCK=128-FORMAT=8-MIN_BLOCKS=4-PREFETCH=0-STAGE_STEPS=1-TILES=1-TOKENS=8-WEIGHT=u8")
VECTOR = variant(
    "matvec_quant-AHEAD=1-BLOCK=256-FORMAT=2-IN=f16-MAX_GROUPS=64-MIN_BLOCKS=2-OUT=float-PART=0-ROWS=1-SILU=0-THREADS_PER_ROW=32"
)
DECODE = variant("attention_decode-HEAD_DIM=8-INTERLEAVED=0-MIN_BLOCKS=2-PACKED=2-PAGE=16-POSITIONS=1-THREADS=256")
PREFILL = variant(
    "attention_prefill-HEAD_DIM=128-KEYS=32-LDS_BYTES=65536-MIN_BLOCKS=1-PAGE=16-QUERIES=16-SLICES=1-THREADS=256"
)

# Lanes of a wave, the matrix instruction, the dot product of bytes, the barrier: AMD's ISA manuals of each family.
NONE = "no such instruction"
VEGA = (64, NONE, NONE, "s_barrier")
VEGA_20 = (64, NONE, "v_dot4_i32_i8", "s_barrier")
CDNA = (64, "v_mfma_f32_16x16x16", "v_dot4c?_i32_i8", "s_barrier")
RDNA_1 = (32, NONE, NONE, "s_barrier")
RDNA_2 = (32, NONE, "v_dot4c?_i32_i8", "s_barrier")
RDNA_3 = (32, "v_wmma_f32_16x16x16_f16", "v_dot4_i32_iu8", "s_barrier")
RDNA_4 = (32, "v_wmma_f32_16x16x16_f16", "v_dot4_i32_iu8", "s_barrier_signal")
GFX_12_5 = (32, NONE, "v_dot4_i32_iu8", "s_barrier_signal")

TARGETS = {
    **dict.fromkeys(("gfx900", "gfx902", "gfx904", "gfx909", "gfx90c"), VEGA),
    "gfx906": VEGA_20,
    **dict.fromkeys(("gfx908", "gfx90a", "gfx940", "gfx941", "gfx942"), CDNA),
    **dict.fromkeys(("gfx1010", "gfx1013"), RDNA_1),
    **dict.fromkeys(("gfx1011", "gfx1012"), RDNA_2),
    **dict.fromkeys((f"gfx103{n}" for n in range(7)), RDNA_2),
    **dict.fromkeys(("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152"), RDNA_3),
    **dict.fromkeys(("gfx1200", "gfx1201"), RDNA_4),
}
"""Those of clang 19."""
NEWER_TARGETS = {"gfx950": CDNA, "gfx1153": RDNA_3, "gfx1250": GFX_12_5, "gfx1251": GFX_12_5}
"""Those of clang 22."""


def listed(compiler: Sequence[str]) -> set[str]:
    """The AMD GPUs that a compiler knows, and groups of them."""
    command = [*compiler, "--target=amdgcn-amd-amdhsa", "-nogpulib", "--print-supported-cpus"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"^\s+(gfx[\w-]+)$", done.stdout + done.stderr, re.MULTILINE))


def assembly(kernel: sources.Variant, target: str, compiler: Sequence[str], tmp_path: Path) -> str:
    source = tmp_path / "kernel.hip"
    source.write_text(sources.source(kernel.file))
    command = [*compiler, "--cuda-device-only", *compilers.FLAGS, f"--offload-arch={target}", "-S", *kernel.options]
    done = subprocess.run([*command, str(source), "-o", "-"], capture_output=True, text=True)
    assert done.returncode == 0, f"{kernel.name}: {done.stderr}"
    return done.stdout


def check(target: str, facts: tuple[int, str, str, str], compiler: Sequence[str], tmp_path: Path) -> None:
    wave, matrix, dot4, barrier = facts
    for kernel in (TILE, VECTOR, DECODE, PREFILL):
        text = assembly(kernel, target, compiler, tmp_path)
        assert re.search(r"\.wavefront_size: +(\d+)", text)[1] == str(wave), kernel.name
        assert set(re.findall(r"v_(?:mfma|wmma|smfmac)\w+", text)) == set(re.findall(rf"{matrix}\w*", text)), (
            kernel.name
        )
        assert bool(re.search(matrix, text)) == (matrix != NONE and kernel in (TILE, DECODE, PREFILL)), kernel.name
        assert bool(re.search(dot4, text)) == (dot4 != NONE and kernel is VECTOR), kernel.name
        assert re.search(rf"\b{barrier}\b", text), kernel.name


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_of_each_kind_has_the_instructions_of_its_target(target: str, tmp_path: Path) -> None:
    check(target, TARGETS[target], CLANG, tmp_path)


@pytest.mark.slow
@needs_zig
@pytest.mark.parametrize("target", NEWER_TARGETS)
def test_a_newer_compiler_knows_newer_targets(target: str, tmp_path: Path) -> None:
    check(target, NEWER_TARGETS[target], ZIG, tmp_path)


@pytest.mark.parametrize("compiler", [CLANG, pytest.param(ZIG, marks=needs_zig)])
def test_every_target_is_compiled_for_or_refused_by_name(compiler: Sequence[str]) -> None:
    found = listed(compiler)
    assert {"gfx803", "gfx906", "gfx1103", "gfx11-generic"} <= found
    found -= TARGETS.keys() | NEWER_TARGETS.keys()
    old = {name for name in found if name[3] in "678"}
    for name in old:
        with pytest.raises(ParameterError, match=rf"^arch {name} is older than gfx900 \(Vega\): forge has no kernels "):
            kernel_cache.check_arch(name)
        with pytest.raises(DeviceError, match=rf"^{name} is older than gfx900"):
            compilers.compile_variant(TILE, name, compilers.Compiler("/nowhere", False, ""))
    for name in found - old:
        assert name.endswith("-generic"), name
        with pytest.raises(ParameterError, match=rf"^arch must be an AMD GPU's, such as .* not '{name}'$"):
            kernel_cache.check_arch(name)


def test_a_refused_gpu_has_no_kernels_for_clang_either() -> None:
    source = sources.source(TILE.file)
    command = [*CLANG, "--cuda-device-only", *compilers.FLAGS, "--offload-arch=gfx803", *TILE.options]
    done = subprocess.run([*command, "-fsyntax-only", "-"], input=source, capture_output=True, text=True)
    assert "error: forge has no kernels for this GPU" in done.stderr


def test_a_name_with_features_is_its_gpu() -> None:
    for name in ("gfx90a:sramecc+:xnack-", "gfx90a:xnack+", "gfx90a"):
        assert kernel_cache.check_arch(name) == "gfx90a"
    for target in [*TARGETS, *NEWER_TARGETS]:
        assert kernel_cache.check_arch(target) == target
        assert amd.refusal(target) == ""


def test_only_what_every_kernel_is_compiled_for_is_called_tested() -> None:
    untested = {target for target in [*TARGETS, *NEWER_TARGETS] if compilers.untested(target)}
    assert {*TARGETS, *NEWER_TARGETS} - untested == set(compilers.TESTED)
    assert compilers.untested("gfx906").startswith("gfx906 is untested: ")


@pytest.fixture(scope="module")
def resources() -> Any:
    """scripts/amd_resources.py, as a module."""
    spec = importlib.util.spec_from_file_location("amd_resources", ROOT / "scripts" / "amd_resources.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_made_from_other_texts_variants_or_flags_is_compiled_again(
    resources: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [(TILE, "gfx90a"), (TILE, "gfx1100"), (DECODE, "gfx1100")]
    before = resources.inputs(jobs)
    assert before.keys() == {TILE.file, DECODE.file}
    assert resources.inputs(jobs[::-1]) == before
    less = resources.inputs(jobs[1:])
    assert (less[TILE.file] == before[TILE.file], less[DECODE.file]) == (False, before[DECODE.file])
    other = replace(TILE, defines=(*TILE.defines[1:], ("TOKENS", 16)))
    assert resources.inputs([jobs[0], (other, "gfx1100"), jobs[2]])[TILE.file] != before[TILE.file]
    text = sources.source
    monkeypatch.setattr(sources, "source", lambda file: text(file) + "\n" * (file == DECODE.file))
    changed = resources.inputs(jobs)
    assert (changed[TILE.file], changed[DECODE.file] == before[DECODE.file]) == (before[TILE.file], False)
    monkeypatch.setattr(compilers, "FLAGS", [*compilers.FLAGS, "-g"])
    assert resources.inputs(jobs)[TILE.file] != before[TILE.file]


def test_a_row_that_somebody_edited_is_compiled_again(resources: Any) -> None:
    usage = resources.Usage("sum", "rows-BLOCK=64", "gfx90a", 13, 18, 0, 0, 0, 8, "dot4", 0)
    text = resources.table(resources.rows([usage, usage._replace(occupancy=4)]), {"rows": "of these texts"}, 2)
    found = resources.rows_of(text)["rows"]
    assert found == ["| rows: sum | gfx90a | BLOCK=64 | 13 | 18 | 0 | 0 | 0 | 4 | dot4 |"]
    assert f"| rows | {resources.seal('of these texts', found)} |" in resources.rows_of(text)[""]
    edited = resources.rows_of(text.replace("| 13 |", "| 12 |"))
    assert f"| rows | {resources.seal('of these texts', edited['rows'])} |" not in edited[""]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 370 variants for each of 6 targets, where all were changed: 10 minutes on 2 cores
def test_no_kernel_spills_on_any_tested_target_and_the_table_is_up_to_date() -> None:
    script = ROOT / "scripts" / "amd_resources.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
