"""The CPU harness finds what a GPU would hang on, leave undefined, or do differently each time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness, build
from harness import compiled as module_of
from kernel_sources import replace_source

from forge.backend import sources
from forge.devtools.cases import CASES
from forge.devtools.verify import verify_case
from forge.errors import DeviceError
from forge.ops.op import REGISTRY

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

SHIFT = """
KERNEL(128) probe(const float *x, float *y) {
    SHARED float tile[128];
    tile[THREAD] = x[THREAD];
    MIDDLE
    y[THREAD] = tile[(THREAD + 64) % 128];
}
"""


def run(
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    *args: Any,
    wave: int = 32,
    seed: int = 0,
    device: Harness | None = None,
    blocks: int = 1,
) -> None:
    """Run a kernel named probe, written here, in one block or some."""
    prelude = "\n".join(map(sources._text, sources.PRELUDE)) + "\n"
    replace_source(monkeypatch, "probe", prelude + text)
    sources.signatures.cache_clear()
    sources.entry.cache_clear()
    module_of.cache_clear()
    try:
        (device or Harness(wave, seed)).run("probe", "probe", blocks, *args)
    finally:
        monkeypatch.undo()
        for cached in (sources.signatures, sources.entry, module_of):
            cached.cache_clear()


def arrays(count: int = 128) -> tuple[Any, Any]:
    device = Harness(32)
    return device.asarray(np.arange(count, dtype=np.float32)), device.empty((count,), np.float32)


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_right_kernel_is_right_in_every_order(monkeypatch: pytest.MonkeyPatch, wave: int, seed: int) -> None:
    x, y = arrays()
    run(monkeypatch, SHIFT.replace("MIDDLE", "barrier();"), x, y, wave=wave, seed=seed)
    np.testing.assert_array_equal(np.asarray(y), np.roll(np.arange(128), -64))


@pytest.mark.parametrize(
    "body",
    [
        "if (LANE < 16) y[THREAD] = shfl_xor(x[THREAD], 1); else y[THREAD] = shfl_xor(x[THREAD] * 2.0f, 17) + 5.0f;",
        "float s = x[THREAD]; for (u32 i = 0; i < (LANE < 16 ? 1 : 2); ++i) s += shfl_xor(s, 1); "
        "if (LANE < 16) s += shfl_xor(s, 2); y[THREAD] = s;",
    ],
    ids=["branches", "loops"],
)
def test_shuffles_in_branches_that_divide_a_wave_show(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    with pytest.raises(DeviceError):
        run(monkeypatch, f"KERNEL(128) probe(const float *x, float *y) {{ {body} }}", *arrays())


def test_lds_that_nobody_wrote_holds_nan_or_any_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "SHARED float tile[128]; if (x[THREAD] < 0) tile[THREAD] = 0; y[THREAD] = tile[THREAD];"
    text = f"\nKERNEL(128) probe(const float *x, float *y) {{ {body} }}\n"
    found = []
    for seed in range(3):
        x, y = arrays()
        run(monkeypatch, text, x, y, seed=seed)
        found.append(np.asarray(y).view(np.uint32).copy())
    assert (found[0] == 0xFFFFFFFF).all()
    assert all(len(np.unique(words)) > 100 for words in found[1:])
    assert (found[1] != found[2]).any()


def test_a_missing_barrier_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = arrays()
    run(monkeypatch, SHIFT.replace("MIDDLE", ""), x, y)
    assert np.isnan(np.asarray(y)).any()  # LDS that was not written is NaN


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (THREAD < 64) barrier();", "a barrier that"),
        ("if (THREAD < 32) { barrier(); y[0] = 1; } else { y[1] = 2; barrier(); y[2] = 3; }", "a barrier in a branch"),
        ("if (LANE < 3) y[0] = shfl_xor(x[0], 1);", "only 3 of 32 lanes"),
        ("y[THREAD] = shfl(x[THREAD], LANE + 1);", "shuffle from lane 32"),
        ("SHARED float tile[64]; tile[THREAD] = 1; y[THREAD] = tile[THREAD];", "outside the array"),
        ("y[THREAD + 1] = 1;", "writes to 1 bytes behind y \\(512 bytes\\)"),
        ("y[0] = x[THREAD + 4] * 0;", "reads 1 bytes behind x"),
        ("y[THREAD] = x[(i32)THREAD - 1025];", "reads 4100 bytes before x"),
        ("y[THREAD] = *(float *)8;", "reads memory that is no array's"),
        ("((float *)x)[-1] = 2;", "wrote outside an array: x"),
        ("y[THREAD] = x[128 + 4096 * 3];", "reads 49153 bytes behind x"),
    ],
)
def test_a_fault_is_named_and_the_harness_goes_on(monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    x, y = arrays()
    with pytest.raises(DeviceError, match=message):
        run(monkeypatch, f"\nKERNEL(128) probe(const float *x, float *y) {{\n {body}\n}}\n", x, y)
    x, y = arrays()
    run(monkeypatch, SHIFT.replace("MIDDLE", "barrier();"), x, y)
    assert y[0] == 64


PHASES = """
KERNEL(128) probe(const float *x, float *y) {
    SHARED float tile[2][64];
    SHARED PhaseBarrier full, empty;
    if (THREAD == 0) INIT;
    barrier();
    if (THREAD < 64)
        for (u32 i = 0; i < 4; ++i) {
            phase_wait(empty, 1 - i % 2);
            tile[0][THREAD] = x[THREAD] + i;
            phase_arrive(full);
        }
    else
        for (u32 i = 0; i < 4; ++i) {
            WAIT
            y[THREAD] = tile[0][127 - THREAD];
            named_wait(1, 64);
            ARRIVE
        }
}
"""
RIGHT = {
    "INIT": "phase_init(full, 64), phase_init(empty, 64)",
    "WAIT": "phase_wait(full, i % 2);",
    "ARRIVE": "phase_arrive(empty);",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"ARRIVE": "if (LANE) phase_arrive(empty);"}, "waits for a barrier at which too few will arrive"),
        ({"ARRIVE": "if (THREAD < 96) named_wait(2, 64); phase_arrive(empty);"}, "at which too few will arrive"),
        ({"INIT": "phase_init(full, 64)"}, "a barrier that was not initialized"),
        ({"WAIT": "phase_wait(full, 1 - i % 2);"}, "differ|too few will arrive"),
    ],
    ids=["right", "an arrival is missing", "a named barrier", "not initialized", "another parity"],
)
def test_waves_that_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str, seed: int
) -> None:
    text = sources._text("include/tile_phases") + PHASES
    for name, code in (RIGHT | change).items():
        text = text.replace(name, code)
    x, y = arrays()

    def check() -> None:
        run(monkeypatch, text, x, y, seed=seed)
        assert np.array_equal(np.asarray(y)[64:], np.arange(63, -1, -1) + 3), "numbers differ"

    with pytest.raises((AssertionError, DeviceError), match=message) if message else nullcontext():
        check()


WIDE = """
KERNEL(128) probe(const float *x, float *y) {
    SHARED GroupRows<64> left[1];
    SHARED GroupRows<64> right[1];
    for (u32 i = THREAD; i < 512; i += 128) left[0].v[i / 8][i % 8] = right[0].v[i / 8][i % 8] = u32x4{};
    barrier();
    Sums<64> sum;
    for (u32 i = 0; i < 32; ++i) sum.v[i / 4][i % 4] = 7;
    group_scores<64>(sum, left, 0, right);
    group_commit();
    WAIT
    y[THREAD] = sum.v[0][0];
}
"""


@pytest.mark.parametrize(("wait", "found"), [("group_wait<0>();", 0), ("group_wait<1>();", 7), ("", 7)])
def test_sums_of_a_group_are_there_behind_the_wait(monkeypatch: pytest.MonkeyPatch, wait: str, found: float) -> None:
    text = "".join(map(sources._text, ("include/tile_lines", "include/tile_wgmma_wide")))
    x, y = arrays()
    run(monkeypatch, text + WIDE.replace("WAIT", wait), x, y)
    assert (np.asarray(y) == found).all()


def test_arrays_may_begin_behind_a_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Harness(32)
    device.begins = True
    x = device.asarray(np.arange(128, dtype=np.float32))
    with pytest.raises(DeviceError, match="reads 4 bytes before x"):
        run(monkeypatch, "\nKERNEL(128) probe(const float *x, float *y) { y[0] = x[-1]; }\n", x, arrays()[1])


def test_bands_hold_other_numbers_in_each_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied from one array's bands to another's shows, where both begin at the same place of their pages."""
    device = Harness(32)
    device.begins = True
    x, y = (device.empty((127,), np.float32) for _ in range(2))
    with pytest.raises(DeviceError, match="wrote outside an array: y"):
        run(monkeypatch, "\nKERNEL(128) probe(const float *x, float *y) { y[THREAD] = x[THREAD]; }\n", x, y)


HANDED_ON = """
KERNEL(64) probe(float *parts, u32 *arrived, float *y, u32 blocks) {
    SHARED u32 before;
    parts[BLOCK_X * 64 + THREAD] = (float)THREAD;
    FENCE
    MEET
    if (THREAD == 0) before = atomic_add(&arrived[0], 1u);
    barrier();
    if (before != blocks - 1) return;
    FENCE_AGAIN
    if (THREAD == 0) arrived[0] = ZERO;
    float sum = 0;
    for (u32 i = 0; i < blocks; ++i) sum += parts[i * 64 + THREAD];
    y[THREAD] = sum;
    barrier();
}
"""


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("", ""),
        ("FENCE", "thread 0: does not fence what it stored before the block counts itself"),
        ("MEET", "thread .*: (meets at no barrier behind|does not fence)"),
        ("FENCE_AGAIN", "thread 0: goes on behind the count without a fence"),
        ("ZERO", "leaves counters that are not 0"),
    ],
)
def test_blocks_that_hand_results_on_do_as_the_prelude_says(
    monkeypatch: pytest.MonkeyPatch, left_out: str, message: str, wave: int
) -> None:
    text = HANDED_ON
    for name, code in (
        ("FENCE_AGAIN", "fence_device();"),
        ("FENCE", "fence_device();"),
        ("MEET", "barrier();"),
        ("ZERO", "0"),
    ):
        text = text.replace(name, code if name != left_out else "1" if name == "ZERO" else "")
    for seed in range(3):
        device = Harness(wave, seed)
        parts, y = (device.empty((count,), np.float32) for count in (40 * 64, 64))
        arguments = parts, device.counters(1), y, 40
        if message:
            with pytest.raises(DeviceError, match=message):
                run(monkeypatch, text, *arguments, device=device, blocks=40)
        else:
            run(monkeypatch, text, *arguments, device=device, blocks=40)
            np.testing.assert_array_equal(np.asarray(y), 40 * np.arange(64))


def test_blocks_run_in_other_orders_and_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block notes how many have begun before it and when it ends; its LDS is its own all the while."""
    text = """
KERNEL(64) probe(i32 *noted, i32 *begun) {
    SHARED i32 mine[64];
    if (THREAD == 0) noted[2 * BLOCK_X] = begun[0]++;
    mine[THREAD] = (i32)(BLOCK_X * 64 + THREAD);
    for (u32 i = 0; i < 4; ++i) barrier();
    if (mine[63 - THREAD] != (i32)(BLOCK_X * 64 + 63 - THREAD)) begun[1] = 1;
    barrier();
    if (THREAD == 0) noted[2 * BLOCK_X + 1] = begun[0];
}
"""
    found = []
    for seed in range(3):
        device = Harness(32, seed)
        noted, begun = device.asarray(np.zeros((50, 2), np.int32)), device.asarray(np.zeros(2, np.int32))
        run(monkeypatch, text, noted, begun, device=device, blocks=50)
        assert np.asarray(begun).tolist() == [50, 0]
        found.append(np.asarray(noted).copy())
    starts, ends = zip(*(array.T for array in found), strict=True)
    np.testing.assert_array_equal(starts[0], np.arange(50))
    np.testing.assert_array_equal(ends[0], np.arange(1, 51))
    for seed in (1, 2):
        np.testing.assert_array_equal(np.sort(starts[seed]), np.arange(50))
        assert (ends[seed] - starts[seed]).max() > 3
        assert (starts[seed] != starts[3 - seed]).any()


def test_a_lane_mapping_for_waves_of_32_is_wrong_at_64(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\nKERNEL(128) probe(const float *x, float *y) { y[THREAD] = shfl(x[THREAD], THREAD % 32); }\n"
    found = []
    for wave in (32, 64):
        x, y = arrays()
        run(monkeypatch, text, x, y, wave=wave)
        found.append(np.asarray(y).copy())
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.view(np.int32), y), "x must be float32"),
        (lambda x, y: (x[::2], y), "x must be C-contiguous"),
        (lambda x, y: (x,), "takes 2 arguments"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        run(monkeypatch, SHIFT.replace("MIDDLE", "barrier();"), *change(*arrays()))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: x > 0,
        lambda x: x.sum(),
        lambda x: np.concatenate([x, x]),
        lambda x: x[np.array([0, 1])],
        lambda x: x[[0, 1]],
        lambda x: x.__setitem__(0, 1),
        lambda x: x.astype(np.float16),
        lambda x: x.copy(),
        lambda x: x.view()[::2].reshape(8, 8),
    ],
)
def test_what_would_launch_a_kernel_of_cupys_is_refused(use: Callable[[Any], Any]) -> None:
    x, _ = arrays()
    with pytest.raises(TypeError, match="not forge's"):
        use(x)
    np.testing.assert_array_equal(np.asarray(x.reshape(2, 64)[1:, :3]), [[64, 65, 66]])


def test_compiled_kernels_are_found_again() -> None:
    variant = sources.Variant("decode_state", ())
    first, second = (build(variant, "", 32) for _ in range(2))
    assert first == second
    assert ctypes.CDLL(str(first))._name == module_of(variant, "", 32)._name


DOT4 = """
KERNEL(64) probe(const u32 *a, const u32 *b, const i32 *c, i32 *y) {
    y[THREAD] = dot4(a[THREAD], b[THREAD], c[THREAD]);
}
"""


def test_dot4_is_the_dot_product_of_signed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (2, 64, 4), np.int8)
    a[0], b[0] = -128, -128
    c = rng.integers(-(2**30), 2**30, 64, np.int32)
    device = Harness(32)
    words = [device.asarray(bytes_.view(np.uint32).ravel()) for bytes_ in (a, b)]
    y = device.empty((64,), np.int32)
    run(monkeypatch, DOT4, *words, device.asarray(c), y)
    np.testing.assert_array_equal(np.asarray(y), c + (a.astype(np.int32) * b).sum(axis=1))


def test_verify_reports_damage_and_runs_that_differ() -> None:
    op = REGISTRY["copy_page"]
    assert verify_case(op, CASES[op.name][0], Harness(32)).passed

    class Damaged(Harness):
        @contextmanager
        def guarded(self) -> Iterator[Callable[[], bool]]:
            yield lambda: False

    assert verify_case(op, CASES[op.name][0], Damaged(32)).fault == "wrote outside an array"

    class Drifting(Harness):
        reads = 0

        def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
            self.reads += 1
            return np.array(array) + np.float32(1e-7) * self.reads

    soft_cap = REGISTRY["soft_cap"]
    assert verify_case(soft_cap, CASES["soft_cap"][0], Drifting(32)).fault == "two runs differ"
