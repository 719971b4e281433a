"""The sources of the kernels against their rules and against the declarations of the ops that launch them."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from forge.backend import sources
from forge.devtools.variants import Recorder, case_variants

DIRECTORY = Path(str(resources.files("forge"))) / "raw_kernels"
FILES = sorted(str(path.relative_to(DIRECTORY).with_suffix("")) for path in DIRECTORY.rglob("*.hip"))
KERNEL_FILES = [name for name in FILES if not name.startswith("include/")]
PORTABLE_FILES = [name for name in FILES if not re.match(r"include/(prelude|platform_|tile_)", name)]
PLATFORM = re.compile(r"#include|\b(__shfl\w*|__syncthreads|threadIdx|blockIdx|__builtin_amdgcn\w*|asm)\b")


def own_text(file: str) -> str:
    text = (DIRECTORY / f"{file}.hip").read_text(encoding="utf-8")
    return re.sub(r"//[^\n]*", "", text)


@pytest.mark.parametrize("file", PORTABLE_FILES)
def test_only_the_prelude_and_the_tiles_know_platforms(file: str) -> None:
    assert not PLATFORM.findall(own_text(file))


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_a_kernel_uses_all_of_its_parameters(file: str) -> None:
    text = own_text(file)
    for name, (_, parameters) in sources.signatures(file).items():
        start = re.search(rf"^KERNEL\([^)]*\)\s*{name}\(", text, re.MULTILINE)
        assert start, name
        body = text[start.end() :].partition("\nKERNEL(")[0].partition("{")[2]
        for parameter in parameters:
            assert re.search(rf"\b{parameter.name}\b", body), f"{name}: {parameter.name}"


@pytest.fixture(scope="module")
def launched() -> tuple[set[sources.Variant], set[str]]:
    """Variants and functions that the ops' cases launch, with wgmma and without."""
    functions: set[str] = set()
    record = Recorder._run

    def run(self: Recorder, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        functions.add(entry.function)
        record(self, entry, grid, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_run", run)
        return {*case_variants(), *case_variants(wgmma=True)}, functions


def test_every_kernel_is_launched_by_a_case_and_named_once(launched: tuple[set[sources.Variant], set[str]]) -> None:
    names = [name for file in KERNEL_FILES for name in sources.signatures(file)]
    assert sorted(names) == sorted(launched[1])


def test_blocks_are_whole_waves(launched: tuple[set[sources.Variant], set[str]]) -> None:
    for variant in launched[0]:
        for name in sources.signatures(variant.file):
            threads = sources.entry(variant.file, name, variant.defines).threads
            assert threads in range(64, 1025, 64), f"{variant.name}: {name}"


@pytest.mark.parametrize("file", FILES)
def test_no_function_of_a_kernel_file_is_over_120_lines(file: str) -> None:
    lines = (DIRECTORY / f"{file}.hip").read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and re.match(r"(template|DEVICE|KERNEL)\b", line):
            start = number
        if start is not None and (line in ("}", "};") or (number == start and line.endswith((";", "}")))):
            assert number - start < 120, lines[start]
            start = None


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_each_parameter_of_a_kernel_has_a_line(file: str) -> None:
    text = (DIRECTORY / f"{file}.hip").read_text(encoding="utf-8")
    for name, (_, parameters) in sources.signatures(file).items():
        start = text.index(f" {name}(\n")
        lines = text[start:].splitlines()[1 : len(parameters) + 1]
        for parameter, line in zip(parameters, lines, strict=True):
            assert re.match(rf"    [^/]*\b{parameter.name}\b,?( //.*)?$", re.sub(r" +//", " //", line)), (
                f"{name}: {line}"
            )
