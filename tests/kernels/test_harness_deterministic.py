"""Kernels of the deterministic mode on the CPU harness: a row's bits do not depend on what is computed beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness

from forge.devtools.cases import CASES
from forge.devtools.cases.case import Case
from forge.devtools.cases.experts import experts_case, route_case
from forge.devtools.cases.kv_cache import random_pages
from forge.devtools.verify import on, run_case
from forge.ops import attention
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.experts import experts, route
from forge.ops.kv_cache import KVPages
from forge.ops.linear import linear
from forge.ops.lora import LowRank, lora_glu
from forge.ops.matmul import Partials
from forge.ops.norm import Normed, norm
from forge.ops.quant import QuantTensor

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

MOST = 70
"""Rows: more than a launch takes."""
COUNTS = (1, 9, 30, 64)
DEVICES: dict[str, dict[str, Any]] = {
    "MMA": {"wave": 32, "cores": 2},
    "groups": {"wave": 32, "groups": True, "cores": 2},
    "groups, many cores": {"wave": 32, "groups": True, "cores": 64},
    "MFMA": {"wave": 64, "cores": 64},
    "WMMA": {"wave": 32, "tile": "TILE_WMMA_12", "cores": 64},
    "scalar": {"wave": 64, "tile": "TILE_SCALAR", "cores": 2},
}


class Tuned(Harness):
    """Other choices for few rows than for many."""

    def choice(self, kernel: str, **shape: Any) -> Mapping[str, int]:
        values = super().choice(kernel, **shape)
        if kernel.startswith("matmul") and shape["tokens"] < 64:
            other = {"TILES": 1, "BLOCK": 128, "MIN_BLOCKS": 2, "STAGE_STEPS": 2 if kernel == "matmul_wgmma" else 8}
            return {**values, **other}
        return values


def results(device: Harness, x: np.ndarray, weight: Any, residual: np.ndarray, glu: str) -> np.ndarray:
    """The product added to the residual stream, at once or by the norm behind it, or gated."""
    if glu != "none":
        return device.to_numpy(device.launch(linear, (x, weight, None, None), {"glu": glu, "split_k": "fixed"}))
    stream = device.asarray(residual[: len(x)])
    pending = device.launch(linear, (x, weight, None, None), {"glu": glu, "split_k": "fixed_allowed"})
    if isinstance(pending, Partials):
        ones = device.asarray(np.ones(weight.shape[0], np.float32))
        device.launch(norm, (Normed(stream, pending, ones, None, 1e-5, True),), {"out": "act"})
    else:
        device.launch(linear, (x, weight, None, stream), {"glu": glu, "split_k": "fixed"})
    return device.to_numpy(stream)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "Q4_K", "Q8_0"])
@pytest.mark.parametrize(
    ("name", "is_tuned"), [*((name, False) for name in DEVICES), ("MMA", True), ("groups", True), ("scalar", True)]
)
def test_a_rows_product_has_the_same_bits_beside_any_others(name: str, is_tuned: bool, kind: str) -> None:
    rng = np.random.default_rng(0)
    device = (Tuned if is_tuned else Harness)(**DEVICES[name])
    blocks = QuantTensor.random("Q8_0" if kind == "F16" else kind, 72, 1280, rng)
    weight = device.asarray(blocks.dequantize(), np.float16) if kind == "F16" else blocks.on(device)
    x, residual = rng.standard_normal((MOST, 1280)).astype(np.float16), rng.standard_normal((MOST, 72), np.float32)
    for glu in ("none", "silu"):
        wanted = results(device, device.asarray(x), weight, residual, glu)
        for count in COUNTS:
            found = results(device, device.asarray(x[:count]), weight, residual, glu)
            np.testing.assert_array_equal(found, wanted[:count], err_msg=f"{glu}, {count} rows")
    found = results(device, device.asarray(x[::-1]), weight, residual[::-1], "silu")
    np.testing.assert_array_equal(found, wanted[::-1], err_msg="in another order")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "Q4_K"])
@pytest.mark.parametrize("cores", [2, 6, 64])
def test_a_gated_row_without_an_adapter_has_the_bits_of_a_step_without_any(cores: int, kind: str) -> None:
    """With adapters the sums are an array, which the adapters of other rows are added to before the activation."""
    rng = np.random.default_rng(0)
    device = Harness(32, cores=cores)
    blocks = QuantTensor.random("Q8_0" if kind == "F16" else kind, 144, 1280, rng)
    weight = device.asarray(blocks.dequantize(), np.float16) if kind == "F16" else blocks.on(device)
    x = rng.standard_normal((9, 1280)).astype(np.float16)
    wanted = results(device, device.asarray(x), weight, x, "silu")
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((2, 16, 1280), (2, 144, 8)))
    adapters = LowRank(
        device.asarray(a), device.asarray(b), device.asarray(np.ones(2, np.float32)), device.asarray([0, 72], np.int32)
    )
    slots = np.where(np.arange(9) % 3 == 2, 1, -1).astype(np.int32)
    y = device.launch(linear, (device.asarray(x), weight, None, None), {"glu": "none", "split_k": "fixed_glu"})
    given = device.asarray(x), device.asarray(slots), adapters, y
    found = device.to_numpy(device.launch(lora_glu, given, {"order": "fixed", "activation": "silu"}))
    np.testing.assert_array_equal(found[slots < 0], wanted[slots < 0])
    assert (found[slots >= 0] != wanted[slots >= 0]).any()


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (150, 2.0)])
@pytest.mark.parametrize(("wave", "cores"), [(32, 1), (64, 8), (32, 64)])
@pytest.mark.slow
def test_a_query_has_the_same_bits_in_a_prompt_in_its_parts_and_alone(
    wave: int, cores: int, window: int, softcap: float
) -> None:
    """Sequences lie on other pages in each call."""
    rng = np.random.default_rng(1)
    device = Harness(wave, cores=cores)
    lengths, asked, heads, kv_heads, dim = [610, 140], [140, 140], 4, 2, 32
    spec = AttentionSpec(dim**-0.5, window, softcap, is_deterministic=True)
    keys, values = ([rng.standard_normal((n, kv_heads, dim)).astype(np.float16) for n in lengths] for _ in range(2))
    queries = [rng.standard_normal((n, heads, dim)).astype(np.float16) for n in asked]

    def attended(parts: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """Results of some queries: of a sequence, from one to another."""
        ends = [lengths[s] - asked[s] + stop for s, _, stop in parts]
        kv, table = random_pages(rng, ends, [(0, end) for end in ends], 16, kv_heads, dim)
        pages = [np.array(array, np.float16) for array in (kv.k, kv.v)]
        for row, ((s, _, _), end) in enumerate(zip(parts, ends, strict=True)):
            for to, of in zip(pages, (keys, values), strict=True):
                for position in range(end):
                    to[table[row, position // 16], position % 16] = of[s][position]
        starts = np.cumsum([0, *(stop - first for _, first, stop in parts)]).astype(np.int32)
        q = np.concatenate([queries[s][first:stop] for s, first, stop in parts])
        arrays = map(device.asarray, (q, *pages, starts, np.array(ends, np.int32), table))
        q, k, v, *rest = arrays
        out = device.to_numpy(device.launch(paged_attention, (q, KVPages(k, v), *rest, spec), {}))
        return np.split(out, starts[1:-1])

    whole = attended([(0, 0, 140), (1, 0, 140)])
    for parts in (
        [(1, 0, 140)],
        [(0, 0, 77), (1, 0, 3)],
        [(1, 3, 140), (0, 77, 140)],
        [(0, 139, 140), (1, 139, 140)],
        [(1, 0, 1), (0, 5, 6)],
    ):
        for (s, first, stop), found in zip(parts, attended(parts), strict=True):
            np.testing.assert_array_equal(found, whole[s][first:stop], err_msg=f"{s}: {first} to {stop} of {parts}")


def test_more_queries_than_a_launch_takes_and_more_sequences_than_a_wave_has_lanes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_SPLIT_TOKENS", 30)
    rng = np.random.default_rng(2)
    asked = rng.integers(1, 4, 40)
    lengths = asked + rng.integers(0, 30, 40)
    kv, table = random_pages(rng, lengths.tolist(), [(0, int(length)) for length in lengths], 16, 1, 16)
    starts = np.cumsum([0, *asked]).astype(np.int32)
    spec = AttentionSpec(0.25, 0, 0.0, is_deterministic=True)
    q = rng.standard_normal((starts[-1], 2, 16)).astype(np.float32)
    case = Case("many", lambda _: (q, kv, starts, lengths.astype(np.int32), table, spec))
    for wave in (32, 64):
        error, _ = run_case(paged_attention, case, Harness(wave))
        assert error.passed, error


@pytest.mark.parametrize("groups", [False, True])
def test_further_rows_than_weights_are_read_for_once_are_right(groups: bool) -> None:
    (case,) = (case for case in CASES["linear"] if case.name == "fixed T70")
    error, _ = run_case(linear, case, Harness(32, groups=groups))
    assert error.passed, error


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize("format", ["", "Q4_K"])
def test_a_row_of_experts_does_not_depend_on_the_rows_beside_it(format: str, device: dict[str, Any]) -> None:
    """The choice and what is computed, alone and in batches of each size of tiles."""
    router = route_case("", MOST, 256, 6, 2, scores="sigmoid", extras="selection", order="fixed")
    case = experts_case("", MOST, 256, 256, 6, 2, format=format, order="fixed", extras="bias")
    rng, found = np.random.default_rng(4), []
    normed, weights = router.make(rng)
    x, chosen, shares, of_experts, _ = experts.map(_half, case.make(rng))
    for count in (1, *COUNTS, MOST):
        made = Tuned(**device)
        rows = replace(normed, x=normed.x[:count])
        choice = run_parts(made, route, (rows, weights), router.options)
        given = x[:count], chosen[:count], shares[:count], of_experts, None
        found.append([part[:1] for part in (*choice, *run_parts(made, experts, given, case.options))])
    for others in found[1:]:
        for part, other in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(part, other)


def run_parts(device: Harness, op: Any, args: tuple[Any, ...], options: dict[str, Any]) -> list[np.ndarray]:
    results = device.launch(op, on(op, args, device), options)
    return [device.to_numpy(value) for value in (results if isinstance(results, tuple) else (results,))]


def _half(arg: Any, value: Any) -> Any:
    return value.astype(np.float16) if arg.dtype in ("act", "weight") and isinstance(value, np.ndarray) else value
