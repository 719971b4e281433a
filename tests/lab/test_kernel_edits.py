"""Texts that stand for kernels: where they lie, what they must declare, and who launches them."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness

from forge import lab
from forge.backend import code_objects, compilers, edits, sources
from forge.backend.gpu import GPU
from forge.errors import DeviceError, FormatError, ParameterError
from forge.lab import kernels
from forge.ops.norm import Normed, norm

needs_clang = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")
EVERY = [(file, kernel) for file in sources.files() for kernel in sources.signatures(file)]
NORM = sources.Variant("norm", (("BLOCK", 128), ("OUT", "f16"), ("PIECES", 1), ("VECTOR", 4)))


@pytest.fixture(autouse=True)
def all_restored() -> Any:
    yield
    lab.restore()


def test_each_kernel_is_cut_out_whole_and_put_back() -> None:
    """From its line to the brace that closes it: what stands between two kernels is no part of one."""
    for file, kernel in EVERY:
        text = lab.source(kernel)
        assert text.startswith("KERNEL(")
        assert len(re.findall(r"^KERNEL\(", text, re.MULTILINE)) == 1, kernel
        code = re.sub(r"//[^\n]*|'.'", "", text)
        assert code.count("{") == code.count("}"), kernel
        assert text.endswith("\n}\n"), kernel
        assert kernels.edited(kernels.find(kernel), text, 1).text == sources.text(file), kernel


def test_a_file_is_a_text_too() -> None:
    assert lab.source("norm.hip") == sources.text("norm")
    assert kernels.edited(kernels.find("norm.hip"), sources.text("norm") + "\n\n", 1).text == sources.text("norm")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rms_norm", "did you mean rmsnorm"),
        ("norm", "did you mean norm.hip"),
        ("../norm.hip", "did you mean norm.hip"),
        ("include/prelude.hip", "the files are in forge/raw_kernels"),
        ("x" * 1000, "the files are in"),
        ("", "the files are in"),
    ],
)
def test_an_unknown_name_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ParameterError, match=f"no kernel and no kernel file is called .*{hint}") as caught:
        lab.source(name)
    assert caught.value.parameter == "name"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "u32 rows",
            "u64 rows",
            r"rmsnorm is launched with \(float \*x, float \*weight, OUT \*y, u32 width, float eps, ",
        ),
        ("float eps,", "", r"rmsnorm is launched with"),
        ("float eps,", "float *eps,", r"rmsnorm is launched with"),
        ("float eps,", "float eps[2],", "rmsnorm: not a parameter: 'float eps"),
        ("rmsnorm(", "rms(", r"declares no kernel rmsnorm: a line begins with KERNEL\(threads\) rmsnorm\("),
        ("KERNEL(BLOCK)", " void", "declares no kernel rmsnorm"),
    ],
)
def test_a_source_that_launches_do_not_fit_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ParameterError, match=f"^source: .*{message}"):
        lab.replace("rmsnorm", lab.source("rmsnorm").replace(old, new))
    assert edits.replaced() == {}


def test_a_kernel_of_a_replaced_file_is_that_of_its_text() -> None:
    """However it is written."""
    whole = sources.text("embed").replace("KERNEL(256) take_rows(", "KERNEL(256) take_rows( // } {")
    whole = whole[: whole.rindex("}")].rstrip() + " /*x*/ }  // the end }"
    name = edits.add(kernels.edited(kernels.find("embed.hip"), whole, 1))
    edits.replace({("embed", "embed"): name, ("embed", "take_rows"): name})
    assert lab.source("embed.hip") == whole + "\n"
    assert lab.source("take_rows") == whole[whole.index("KERNEL(256)") :] + "\n"
    lab.restore("take_rows")
    assert lab.source("take_rows").rstrip() in sources.text("embed")
    assert lab.source("embed.hip") == whole + "\n"


def test_a_source_that_is_no_text_is_refused() -> None:
    for character in ("\ud800", "\0"):
        with pytest.raises(ParameterError, match="source: cell:3: a character that no text file holds"):
            lab.replace("rmsnorm", f"\n// µ\n{character}{lab.source('rmsnorm')}")
    with pytest.raises(ParameterError, match="source must be a text, not a NoneType"):
        lab.replace("rmsnorm", None)  # type: ignore[arg-type]


def test_lines_of_an_edit_are_the_cells_or_the_files() -> None:
    """A cell of two more lines, whose first is its author's second: what stands behind it keeps the file's numbers."""
    start, end = sources.span("norm", "rmsnorm")
    cell = "// mine\n// mine, too\n" + lab.source("rmsnorm")
    name = edits.add(kernels.edited(kernels.find("rmsnorm"), cell, 2))
    before = sum(sources.text(part).count("\n") + 1 for part in sources.parts(name)[:-1])
    lines = sources.source(name).split("\n")
    places = {line: sources.place(name, line)[0] for line in range(before + 1, len(lines) + 1)}
    own = sources.text("norm").split("\n")
    for line, place in places.items():
        where, number = place.split(":")
        if where == "norm.hip":
            assert lines[line - 1] == own[int(number) - 1]
            assert not start < int(number) <= end
        else:
            assert lines[line - 1] == cell.split("\n")[int(number) - 2]
    assert list(places.values()).count("cell:2") == 1
    assert sources.place(name, 1)[0] == "include/prelude.hip:1"


def test_complaints_of_both_compilers_are_placed_and_the_further_ones_are_notes() -> None:
    name = edits.add(kernels.edited(kernels.find("rmsnorm"), "int x = y;\n" + lab.source("rmsnorm"), 2))
    line = next(n for n, text in enumerate(sources.source(name).split("\n"), 1) if text == "int x = y;")
    variant = sources.Variant(name, ())
    log = f"/tmp/a.hip:{line}:9: error: no y\nand\n{name}.hip({line + 1}): error: no z\n/a.hip:1:1: fatal error: no w\n"
    error = compilers.refused("it fails", log, variant)
    assert str(error) == "it fails: cell:2: no y: 'int x = y;'"
    first, second = error.__notes__
    assert first == "cell:3: no z: 'KERNEL(BLOCK) rmsnorm('"
    assert second.startswith("include/prelude.hip:1: no w: ")


def normed(device: GPU) -> bytes:
    x = np.linspace(-2, 3, 260, dtype=np.float32).reshape(2, 130)
    args = [device.asarray(value) for value in (x, np.ones(130, np.float32))]
    return np.asarray(norm(Normed(args[0], None, args[1], None, 1e-5, True), out="f32")).tobytes()


@needs_clang
def test_launches_are_those_of_the_edit_as_long_as_it_is_in_use() -> None:
    device = Harness(32)
    own = normed(device)
    double = edits.add(
        kernels.edited(
            kernels.find("rmsnorm"), lab.source("rmsnorm").replace("weight, nullptr", "x /* µ */, nullptr"), 1
        )
    )
    edits.replace({("norm", "rmsnorm"): double})
    other = normed(device)
    before = edits.replaced()
    edits.replace({("norm", "layernorm"): double})  # another kernel of the same file
    assert edits.replaced() is not before
    assert normed(device) == other != own
    assert lab.restore("layernorm") == ["layernorm"]
    assert normed(device) == other
    assert "x /* µ */, nullptr" in lab.source("rmsnorm")
    assert lab.restore() == ["rmsnorm"]
    assert normed(device) == own
    assert lab.restore() == []


@needs_clang
@pytest.mark.slow
def test_registers_are_those_that_the_compiler_names() -> None:
    """The remarks are printed by the code generator; forge reads the note that it leaves for the driver."""
    compiler = compilers.find_compiler()
    if compiler is None or compiler.is_hipcc:
        pytest.skip("no clang >= 19")
    code = compilers.compile_variant(NORM, "gfx942", compiler)
    command = [compiler.path, "--cuda-device-only", *compilers.FLAGS, "--offload-arch=gfx942", *NORM.options]
    remarks = [*command, "-Rpass-analysis=kernel-resource-usage", "-o", "/dev/null", "-"]
    text = subprocess.run(remarks, input=sources.source("norm"), capture_output=True, text=True).stderr
    found = code_objects.resources(code)
    assert set(found) == {"rmsnorm", "add_rmsnorm", "layernorm", "add_layernorm"}
    for part in text.split("Function Name: ")[1:]:
        said = {
            key.strip(): int(value)
            for key, value in re.findall(r"remark: [^\n]*?([\w ]+?)(?: \[[^\]]*\])?: (\d+) \[", part)
        }
        kernel = found[part.split(" ")[0]]
        assert (kernel["VGPRs"], kernel["AGPRs"]) == (said["VGPRs"], said["AGPRs"])
        assert kernel["SGPRs"] == said.get("TotalSGPRs", said.get("SGPRs"))
        assert kernel["LDS bytes"] == said["LDS Size"]
        assert kernel["VGPR spills"] == kernel["SGPR spills"] == kernel["scratch bytes"] == 0


def code_object(metadata: bytes) -> bytes:
    """An ELF file with one segment, a note."""
    header = b"\x7fELF\x02\x01" + bytes(26) + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 1, 0, 0, 0)
    note = struct.pack("<III", 7, len(metadata), 32) + b"AMDGPU\0\0" + metadata
    return header + struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4) + note


KERNEL = b"\x83\xa5.name\xd9\x01k\xab.vgpr_count\xcd\x01\x00\xab.sgpr_count\x10"
"""By hand: a map of three; a name of 8 bits of length, 256 in 16 bits, 16 in one byte."""


def test_metadata_made_by_hand_is_read() -> None:
    found = code_objects.resources(code_object(b"\x81\xaeamdhsa.kernels\x91" + KERNEL))
    assert found == {"k": dict.fromkeys(found["k"], 0) | {"VGPRs": 256, "SGPRs": 16}}


def test_metadata_cut_off_or_forged_is_refused() -> None:
    whole = b"\x81\xaeamdhsa.kernels\x91" + KERNEL
    forged = [whole[:n] for n in range(len(whole))]
    forged += [
        b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc1",
        b"\x81\xaeamdhsa.kernels\x01",
        b"\x81\x90\x01",
    ]
    forged += [b"\x81\xaeamdhsa.kernels\x91\x81\xa5.name\xa5k"]  # a name of five characters, of which one is there
    for metadata in forged:
        with pytest.raises(FormatError, match="metadata cannot be read"):
            code_objects.resources(code_object(metadata))
    data = code_object(whole)
    for code in [b"", b"\x7fELF", *(data[:n] for n in range(0, len(data), 7))]:
        with pytest.raises(FormatError, match="metadata cannot be read"):
            code_objects.resources(code)


@pytest.mark.slow
def test_without_a_compiler_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORGE_HARNESS_PATH", str(tmp_path))
    with pytest.raises(
        DeviceError, match=r"^there is no GPU to try a kernel on, and the CPU harness needs clang"
    ) as caught:
        lab.replace("rmsnorm", lab.source("rmsnorm"), device="cpu")
    assert "\n" not in str(caught.value)
    assert edits.replaced() == {}
