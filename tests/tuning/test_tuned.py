"""What `forge tune` may try: kernels compute their references with it, and what it finds is launched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness, HarnessArray
from host_memory import HostMemory

from forge import backend as backends
from forge.backend import sources
from forge.cli import run
from forge.devtools import autotune, verify, workloads
from forge.devtools.cases import attention
from forge.devtools.cases import linear as linear_cases
from forge.devtools.cases.case import Case
from forge.devtools.cases.decode_attention import decode_case
from forge.devtools.cases.experts import experts_case
from forge.devtools.cases.linear import blocks, float_case, floats, normed_case, quantized_case
from forge.devtools.recorder import Recorder
from forge.devtools.verify import expect, run_case
from forge.errors import DeviceError, OutOfMemoryError
from forge.ops.attention import paged_attention
from forge.ops.decode_attention import decode_attention
from forge.ops.experts import experts
from forge.ops.linear import linear
from forge.ops.norm import Normed, norm
from forge.ops.op import Op
from forge.tuning import Choices, store
from forge.tuning.spec import ANY, Row
from forge.tuning.table import KERNELS

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")
Captured = pytest.CaptureFixture[str]

WGMMA = {
    "matmul_wgmma",
    "matmul_tma",
    "matmul_wgmma_quant",
    "matmul_wgmma_quant_many",
    "matmul_mma_quant",
    "expert_mma_quant",
    "quant_product",
    "attention_wgmma",
}
"""Kernels of GPUs that have it."""
GATED = normed_case("K1040", 1, floats(1040, 42), "silu", bias=True)
GATED_BLOCKS = normed_case("Q4_0", 1, blocks("Q4_0", 1056, 42), "silu")


def normal(rng: np.random.Generator) -> tuple[Any, ...]:
    x = rng.standard_normal((2, 3000)).astype(np.float32)
    return (Normed(x, None, np.ones(3000, np.float32), None, 1e-5, True),)


CASES: dict[str, tuple[Op, Case]] = {
    "matvec_f16 linear 2048": (linear, float_case(1, 2048, 37, bias=True, residual=True)),
    "matvec_f16 rms_gated 2048": (linear, GATED),
    "matvec_quant linear Q4_K 2048": (linear, quantized_case("Q4_K", 1, 1280, 37)),
    "matvec_quant rms_gated Q4_0 2048": (linear, GATED_BLOCKS),
    "expert_up MXFP4": (experts, experts_case("up", 1, 96, 32, 2, 2, format="MXFP4", extras="normed")),
    "expert_down Q4_K": (experts, experts_case("down", 1, 256, 256, 3, 2, format="Q4_K", extras="residual")),
    "matmul_wgmma 16": (linear, float_case(9, 264, 70, bias=True, residual=True)),
    "matmul_tma 256": (linear, float_case(130, 1096, 300, bias=True, residual=True)),
    "matmul_mma_quant Q6_K 16": (linear, normed_case("Q6_K", 9, blocks("Q6_K", 1280, 70), "silu")),
    "matmul_wgmma_quant Q6_K 32": (linear, quantized_case("Q6_K", 17, 512, 70, extras=True)),
    "matmul F16 16": (linear, float_case(9, 264, 70, bias=True, residual=True)),
    "matmul Q4_K 64": (linear, quantized_case("Q4_K", 33, 512, 70)),
    "attention_decode 64 2": (decode_attention, decode_case("parts", [300, 1, 130], (4, 2), 64, extras=True)),
    "attention_prefill 64": (paged_attention, attention.attention_case("parts", [70, 1], [150, 200], (2, 1), 64, 16)),
    "matmul_wgmma_quant_many Q4_K 64": (linear, quantized_case("Q4_K", 40, 768, 70, extras=True)),
    "attention_wgmma 64": (paged_attention, attention.attention_case("parts", [70, 1], [150, 200], (2, 1), 64, 16)),
    "expert_mma_quant Q4_K 1024": (experts, experts_case("", 5, 512, 512, 3, 2, format="Q4_K", activation="relu2")),
    "norm 4096": (norm, Case("wide", normal, {"out": "act"})),
}


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 5) for name in CASES if not name.startswith(("expert", "matmul_tma"))),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in CASES),
    ],
)
def test_kernels_take_every_candidate(name: str, every: int) -> None:
    kernel = name.partition(" ")[0]
    op, case = CASES[name]
    groups = kernel in WGMMA
    plain = Harness(32, groups=groups)
    expected = expect(op, case, plain)
    run_case(op, case, plain, expected)
    ((_, shape),) = [asked for asked in plain.tuning.asked if asked[0] == kernel]
    key = kernel, KERNELS[kernel].class_of(shape)
    for wave in (32,) if groups else (32, 64):
        for values in KERNELS[kernel].permitted(shape)[::every]:
            device = Harness(wave, seed=1, groups=groups)
            device.tuning = Choices("", {key: values})
            error, _ = run_case(op, case, device, expected)
            assert error.passed, f"wave {wave}: {values}: {error}"
            launched = {item for variant in device.variants for item in variant.defines}
            assert {item for item in values.items() if item[0] in ("ROWS", "THREADS_PER_ROW", "TILES")} <= launched


class TunedBackend(HostMemory, Harness):
    """A GPU whose kernels take the time that a test says."""

    name, arch, device = "virtual", "gfx1100", "hip:0 (virtual, gfx1100)"

    def __init__(self) -> None:
        super().__init__(32)
        self.tuning = store.load(self.arch, can_compile=True)

    def capture(self, step: Callable[[], Any], state: Any, perturb: Any) -> tuple[Any, Callable[[], Any]]:
        chosen = dict(self.tuning.tuned)
        return step(), lambda: chosen


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "ROTATED_BYTES", 1)
    monkeypatch.setattr(workloads, "_NORM_ROWS", (2, 3))


NORM = {"width": 4096}
KEY = ("norm", (4096,))
CLASSES = {KEY: [{"width": 3000}]}


def timer(*rounds: dict[int, float]) -> Callable[..., list[float]]:
    """In place of `rotated`: seconds by MAX_THREADS, one round for each call; 1024 is the default's."""
    left = list(rounds)

    def times(device: Any, steps: Sequence[Callable[[], Any]]) -> list[float]:
        times = left.pop(0)
        return [times[step()[KEY]["MAX_THREADS"]] for step in steps]

    return times


def best(*rounds: dict[int, float]) -> store.Measured:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "rotated", timer(*rounds))
        (found,) = autotune.tune(TunedBackend(), CLASSES)
    return found


FIRST = {1024: 1.0, 512: 0.5, 256: 0.9}


def test_the_fastest_is_chosen_where_it_is_so_again() -> None:
    found = best(FIRST, {1024: 4.0, 512: 2.8})
    assert found == store.Measured("norm", NORM, {"MAX_THREADS": 512}, 4e6, pytest.approx(2.8e6))


def test_what_was_only_lucky_is_not_chosen() -> None:
    found = best(FIRST, {1024: 2.0, 512: 1.96})
    assert found == store.Measured("norm", NORM, {"MAX_THREADS": 1024}, 2e6, 2e6)


def test_less_than_noise_is_not_measured_again() -> None:
    almost = {1024: 1.0, 512: 0.971, 256: 1.5}
    assert best(almost).values == {"MAX_THREADS": 1024}


def spoilt(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], None], threads: int = 512) -> None:
    """The kernel in blocks of so many threads goes wrong."""
    run = TunedBackend._run

    def launch(self: TunedBackend, entry: sources.Entry, grid: Any, args: list[Any]) -> None:
        run(self, entry, grid, args)
        if entry.threads == threads:
            fault(args)

    monkeypatch.setattr(TunedBackend, "_run", launch)


def test_a_candidate_whose_results_differ_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(args: list[Any]) -> None:
        y = next(arg for arg in args if isinstance(arg, HarnessArray) and arg.dtype == np.float16)
        np.asarray(y)[0, 7] += np.float16(0.02)

    spoilt(monkeypatch, fault)
    with pytest.warns(
        UserWarning, match="norm with MAX_THREADS 512 is left out: its results differ from the default's"
    ):
        assert best(FIRST, FIRST).values == {"MAX_THREADS": 256}


def test_a_candidate_that_the_device_refuses_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(args: list[Any]) -> None:
        raise DeviceError("too many resources")

    spoilt(monkeypatch, fault)
    with pytest.warns(UserWarning, match="norm with MAX_THREADS 512 is left out: too many resources"):
        assert best(FIRST, FIRST).values == {"MAX_THREADS": 256}


def test_a_default_that_the_device_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(args: list[Any]) -> None:
        raise DeviceError("too many resources")

    spoilt(monkeypatch, fault, threads=768)  # of a row of 3,000 numbers, 4 at a time
    with pytest.raises(DeviceError, match="norm fails with the values of forge's table: too many resources: run"):
        best()


def test_a_class_for_which_memory_does_not_suffice_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(args: list[Any]) -> None:
        raise OutOfMemoryError("no memory")

    spoilt(monkeypatch, fault)
    device = TunedBackend()
    before = device.tuning
    with pytest.warns(UserWarning, match="norm width 4096: left out: no memory"):
        assert list(autotune.tune(device, CLASSES)) == []
    assert device.tuning is before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[], TunedBackend]:
    """Starts anew: another process on the machine."""

    def start() -> TunedBackend:
        device = TunedBackend()
        monkeypatch.setattr(backends, "select", lambda name: device)
        return device

    start()
    times = {1024: 1.0, 512: 0.75, 256: 2.0}
    monkeypatch.setattr(autotune, "rotated", lambda device, steps: timer(times)(device, steps))
    monkeypatch.setattr(workloads, "shapes_of", lambda device, path: CLASSES)
    return start


def launched(device: TunedBackend) -> tuple[set[Any], Any]:
    """The blocks in which a norm is launched, and its result."""
    (given,) = normal(np.random.default_rng(0))
    normed = replace(given, x=device.asarray(given.x), weight=device.asarray(given.weight))
    y = device.launch(norm, (normed,), {"out": "act"})
    return {dict(variant.defines)["BLOCK"] for variant in device.variants}, device.to_numpy(y)


def test_what_is_tuned_is_launched_from_the_next_start_on(
    machine: Callable[[], TunedBackend], capsys: Captured
) -> None:
    before = launched(machine())
    assert run(["tune", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (choice,) = report["choices"]
    assert (choice["values"], choice["default"]) == ({"MAX_THREADS": 512}, {"MAX_THREADS": 1024})
    assert (choice["default_us"], choice["us"]) == (1e6, 0.75e6)
    assert Path(report["path"]).name == "gfx1100.json"
    after = launched(machine())
    assert (before[0], after[0]) == ({768}, {512})
    np.testing.assert_allclose(before[1], after[1], rtol=2e-3)
    assert run(["tune", "--show", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["choices"]
    assert rows[0]["values"] == {"MAX_THREADS": 512}
    assert rows[0]["from"].startswith("measured 2")
    assert all(row["from"].startswith("forge's table: ") for row in rows[1:])
    for arguments in (["tune", "--show"], ["tune"]):
        assert run(arguments) == 0
        out = capsys.readouterr().out
        assert "width 4096" in out
        assert "MAX_THREADS 512" in out
    assert run(["tune", "--reset"]) == 0
    assert capsys.readouterr().out == f"{report['path']} is removed\n"
    assert launched(machine())[0] == {768}
    assert run(["tune", "--reset"]) == 0
    assert capsys.readouterr().out == "nothing is stored for gfx1100\n"


def test_ctrl_c_loses_nothing(
    machine: Callable[[], TunedBackend], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def interrupted(*arguments: Any) -> Iterator[store.Measured]:
        yield store.Measured("norm", NORM, {"MAX_THREADS": 512}, 2.0, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(autotune, "tune", interrupted)
    assert run(["tune"]) == 130
    assert capsys.readouterr().out == ""
    assert launched(machine())[0] == {512}


def test_wrong_usage_and_no_gpu(
    machine: Callable[[], TunedBackend], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert run(["tune", "--kernel", "rope"]) == 2
    assert "--kernel must be one of matvec_f16, " in capsys.readouterr().err
    assert run(["tune", "--show", "--reset"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    monkeypatch.setattr(backends, "select", lambda name: backends.NUMPY)
    for arguments in ([], ["--show"], ["--reset"]):
        assert run(["tune", *arguments]) == 1
        assert capsys.readouterr().err.startswith("forge: forge tune needs a GPU, and cpu ")


@pytest.mark.parametrize("groups", [False, True])
def test_workloads_launch_the_kernel_at_the_shape_that_they_are_for(
    groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(has_wgmma=groups)
    classes = workloads.shapes_of(recorder)
    assert {kernel for kernel, _ in classes} == KERNELS.keys() - ({"attention_prefill", "matmul"} if groups else WGMMA)
    shapes = [(kernel, shape) for (kernel, _), shapes in classes.items() for shape in shapes]
    of_8b = {"format": "Q4_K", "inner": 4096, "outer": 14_336}
    for one in (
        ("matvec_f16", {"op": "rms_linear", "inner": 2048, "outer": 3072}),
        ("matvec_quant", {"op": "rms_gated", **of_8b}),
        ("matmul_wgmma_quant" if groups else "matmul", {"op": "rms_gated", **of_8b, "tokens": 32}),
        ("product", {"format": "Q4_K", "inner": 14_336, "outer": 4096, "rows": 512}),
        ("attention_decode", {"dim": 128, "packed": 4, "kv_heads": 8, "rows": ANY}),
        ("norm", {"width": 4096}),
    ):
        assert one in shapes
    monkeypatch.setattr(workloads, "_CONTEXTS", {1: ((1, 40),), 16: ((2, 40),), ANY: ((17, 40),)})
    for module in (workloads, linear_cases):  # a recorder computes nothing, and drawing takes long
        monkeypatch.setattr(module, "normal", lambda _, *shape: np.zeros(shape, np.float32))
    small = {"outer": 6, "kv_heads": 1}
    for kernel, shape in shapes[:: len(shapes) // 40] + [
        one for one in shapes if one[0] in ("norm", "attention_decode")
    ]:
        shape = {name: small.get(name, value) for name, value in shape.items()}
        chosen = Row({}, (int(kernel == "matmul_wgmma_quant"),))  # which of two kernels depends on the size
        monkeypatch.setitem(KERNELS, "quant_product", replace(KERNELS["quant_product"], rows=(chosen,)))
        device = Recorder(has_wgmma=groups)
        verify.launch(workloads.workloads(kernel, shape), device)
        if kernel in ("attention_decode", "product"):  # of other numbers of rows, of the same class
            asked = {KERNELS[one].class_of(found) for one, found in device.tuning.asked if one == kernel}
            assert asked == {KERNELS[kernel].class_of(shape)}
        else:
            assert (kernel, shape) in device.tuning.asked


def test_a_models_shapes_are_those_that_its_kernels_are_asked_for() -> None:
    path = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
    classes = workloads.shapes_of(TunedBackend(), path)
    shapes = [(kernel, shape) for (kernel, _), shapes in classes.items() for shape in shapes]
    assert {kernel for kernel, _ in shapes} == {
        "matvec_f16",
        "matmul",
        "product",
        "attention_decode",
        "attention_prefill",
    }  # norms are too short
    tokens = {(shape["outer"], shape["tokens"]) for kernel, shape in shapes if kernel == "matmul"}
    assert {number for _, number in tokens} == {8, 16, 32, 64}
    assert len(tokens) == 4 * len({outer for outer, _ in tokens})
    assert {shape["rows"] for kernel, shape in shapes if kernel == "attention_decode"} == {1, 16, ANY}
    ops = {shape["op"] for kernel, shape in shapes if kernel == "matvec_f16"}
    assert ops == {"linear", "rms_linear", "rms_gated"}


def test_shapes_of_a_class_are_measured_together_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(path: Path | None, device: Recorder) -> None:
        for width in (64, 3000, 3000, 2500):
            device.choice("norm", width=width)
        for rows in (1, 8, 17):
            device.choice("attention_decode", dim=64, packed=1, kv_heads=2, rows=rows)

    monkeypatch.setattr(workloads, "record", asks)
    heads = {"dim": 64, "packed": 1, "kv_heads": 2}
    assert workloads.shapes_of(TunedBackend()) == {  # a row of 64 leaves no choice
        KEY: [{"width": 3000}, {"width": 2500}],
        ("attention_decode", (64, 1, 1)): [{**heads, "rows": 1}],
        ("attention_decode", (64, 1, 16)): [{**heads, "rows": 16}],
        ("attention_decode", (64, 1, ANY)): [{**heads, "rows": ANY}],
    }
