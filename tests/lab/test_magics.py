"""The magics in IPython's own shell, on the CPU harness, for kernels that are right, wrong or no kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from traitlets.config import Config

from forge import lab
from forge.backend import edits
from forge.errors import DeviceError, ParameterError
from forge.lab import kernels, replacing
from forge.ops.norm import Normed, norm

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

HALVES = """\
KERNEL(BLOCK) rmsnorm(const float *x, const float *weight, OUT *y, u32 width, float eps, u32 rows) {
    SHARED float scratch[MAX_WAVES(BLOCK)];
    const float *row = x + (u64)BLOCK_X * width;
    float even = 0, odd = 0; // two sums instead of one
    grid_dependency_sync();
    for (u32 i = THREAD; i < width; i += 2 * BLOCK) even += row[i] * row[i];
    for (u32 i = THREAD + BLOCK; i < width; i += 2 * BLOCK) odd += row[i] * row[i];
    float scale = rms_scale(fast_divide(block_sum(even + odd, scratch), (float)width), eps);
    for (u32 p = 0; p < PIECES; ++p) {
        float value[VECTOR];
        u32 i = (p * BLOCK + THREAD) * VECTOR;
        for (u32 j = 0; j < VECTOR; ++j) value[j] = i < width ? row[i + j] * (scale * weight[i + j]) : 0.0f;
        store_row(y, i, width, rows, value);
    }
}
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> InteractiveShell:
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    config.BaseIPythonApplication.ipython_dir = config.ProfileDir.location = str(tmp_path_factory.mktemp("ipython"))
    return InteractiveShell(config=config, ipython_dir=str(tmp_path_factory.mktemp("ipython")))


@pytest.fixture(autouse=True)
def loaded(shell: InteractiveShell) -> Iterator[None]:
    shell.run_line_magic("load_ext", "forge.lab")
    yield
    shell.run_line_magic("unload_ext", "forge.lab")
    assert edits.replaced() == {}


def run(shell: InteractiveShell, cell: str) -> ExecutionResult:
    return shell.run_cell(cell)


def norm_of(device: Harness) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(7).standard_normal((40, 700)).astype(np.float32)
    args = [device.asarray(value) for value in (x, np.ones(700, np.float32))]
    return np.asarray(norm(Normed(args[0], None, args[1], None, 1e-5, True), out="f32"))


@slow
def test_a_kernel_with_another_order_of_sums_is_accepted_and_restored_to_the_bit(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Harness(32)
    own = norm_of(device)
    done = run(shell, f"%%hip rmsnorm --device cpu\n{HALVES}")
    assert done.success, done.error_in_exec
    report = done.result
    assert isinstance(report, lab.Report)
    assert report.cases > 18
    assert 0 < report.share <= 1
    assert report.worst_case
    other = norm_of(device)
    assert (own != other).any()
    np.testing.assert_allclose(other, own, rtol=1e-5)
    shown = repr(report)
    assert "cases on the CPU harness, in waves of 32 and 64" in shown
    assert "a model on NumPy launches no kernel" in shown
    if not report.not_shown:
        assert [each.target for each in report.resources] == ["gfx942", "gfx1100"]
        assert all(each.old["VGPRs"] > 0 and each.new["VGPRs"] > 0 for each in report.resources)
        assert "VGPRs" in shown

    run(shell, "%hip_show rmsnorm")
    assert shell.rl_next_input == f"%%hip rmsnorm\n{HALVES}"
    assert run(shell, "%hip_restore rmsnorm").success
    printed = capsys.readouterr().out
    assert repr(report) in printed
    assert printed.endswith("restored: rmsnorm\n")
    assert norm_of(device).tobytes() == own.tobytes()


@slow
def test_a_wrong_kernel_is_refused_with_the_numbers_of_its_case(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last vector of each thread is not summed. Rows that one vector holds are right all the same."""
    device = Harness(32)
    own = norm_of(device)
    done = run(shell, f"%%hip rmsnorm --device cpu\n{HALVES.replace('i < width; i += 2', 'i + 2048 < width; i += 2')}")
    error = done.error_in_exec
    assert isinstance(error, ParameterError)
    assert error.parameter == "source"
    printed = capsys.readouterr().out
    assert printed.startswith("ParameterError: source: rmsnorm is wrong in case ")
    assert " times what is allowed" in printed
    assert printed.rstrip().endswith("times what is allowed")  # of the cases that are notes
    assert "the kernel in use stays" in printed
    assert "Traceback" not in printed
    assert norm_of(device).tobytes() == own.tobytes()


@slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("* factor;", "* factor", "cell:14: expected ';' after expression"),
        ("store(out + i", "store(out + i + 1", r"wrote outside an array: y|writes to .* y "),
        ("load<VECTOR>(row + i)", "load<VECTOR>(row - 64 + i)", r"reads \d+ bytes before table"),
    ],
    ids=["syntax", "writes outside", "reads outside"],
)
def test_what_is_wrong_is_said_with_the_cells_line(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    """The cell's first line is the magic's own."""
    done = run(shell, f"%%hip embed --device cpu\n{lab.source('embed').replace(old, new)}")
    assert isinstance(done.error_in_exec, ParameterError)
    with pytest.raises(ParameterError, match=message):
        raise done.error_in_exec
    assert "Traceback" not in capsys.readouterr().out
    assert edits.replaced() == {}


@slow
def test_a_kernel_without_an_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "_SECONDS", 6)
    endless = lab.source("embed").replace("{", "{\n    for (volatile u32 i = 1; i;) {}", 1)
    with pytest.raises(DeviceError, match="trial of embed ended early, the kernel in use stays: no end in 6 seconds"):
        lab.replace("embed", endless, device="cpu")


@slow
def test_a_kernel_of_hopper_is_tried_with_the_kernels_that_it_works_for() -> None:
    """No op launches it alone, and no other GPU: its cases are products of quantized matrices."""
    with lab.replaced("reorder_x", lab.source("reorder_x"), device="cpu") as report:
        assert report.device == "the CPU harness, in waves of 32"
        assert report.cases >= 5
        assert report.worst_case.startswith("linear ")
        assert "NVIDIA's Hopper alone" in report.not_shown
    wrong = lab.source("reorder_x").replace("n % steps, inner, halves", "n % steps, inner, 1 - halves")
    with pytest.raises(ParameterError, match=r"reorder_x is wrong in case .* of linear: off by"):
        lab.replace("reorder_x", wrong, device="cpu")


@slow
def test_a_context_restores_what_was_in_use_before() -> None:
    outer = edits.add(kernels.edited(kernels.find("embed"), lab.source("embed") + "// outer\n", 1))
    edits.replace({("embed", "embed"): outer})
    whole = lab.source("embed.hip").replace("* factor;", "* factor; // inner")
    with suppress(KeyError), lab.replaced("embed.hip", whole, device="cpu") as report:
        assert report.name == "embed.hip"
        assert lab.source("embed.hip") == whole
        assert {kernel for _, kernel in edits.replaced()} == {"embed", "take_rows"}
        raise KeyError
    assert lab.source("embed").endswith("// outer\n")
    assert edits.replaced() == {("embed", "embed"): outer}


@pytest.mark.parametrize("line", ["", "a b", "--device cpu", "rmsnorm --device"])
def test_usage(shell: InteractiveShell, capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert not run(shell, f"%%hip {line}\ntext").success
    assert "usage: %%hip KERNEL [--device DEVICE]" in capsys.readouterr().err


def test_an_unknown_kernel_is_one_line(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    for cell in ("%%hip rms_norm\ntext", "%hip_show rms_norm", "%hip_restore rms_norm"):
        assert not run(shell, cell).success
        printed = capsys.readouterr().out
        assert printed == (
            "ParameterError: name: no kernel and no kernel file is called 'rms_norm': did you mean rmsnorm, "
            "add_rmsnorm, rmsnorm_whole\n"
        )


def test_the_source_comes_into_the_next_cell(shell: InteractiveShell) -> None:
    assert run(shell, "%hip_show embed").success
    text = shell.rl_next_input
    assert text.startswith("%%hip embed\nKERNEL(512) embed(\n    const i32 *ids,")
    assert text.endswith("\n}\n")


def test_without_the_extension_there_are_no_magics_and_no_ipython(shell: InteractiveShell) -> None:
    shell.run_line_magic("unload_ext", "forge.lab")
    for kind, name in (("cell", "hip"), ("line", "hip_show"), ("line", "hip_restore")):
        assert shell.find_magic(name, kind) is None
    shell.run_line_magic("load_ext", "forge.lab")
