"""Attention by groups of waves with roles, as Hopper runs it, on the CPU harness against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness

from forge.devtools.cases import attention as cases
from forge.devtools.cases.case import Case
from forge.devtools.verify import expect, run_case
from forge.ops import attention_wgmma
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.kv_cache import KVPages
from forge.tuning import Choices
from forge.tuning.spec import ANY

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

SHAPES: dict[str, tuple[Any, ...]] = {
    "one position": ([1], [1], (2, 1), 64, 16),
    "edges of tiles of keys": ([1] * 5, [127, 128, 129, 255, 257], (2, 1), 64, 16),
    "several tiles of queries and of keys": ([200], [420], (4, 2), 64, 16),
    "prompts and decode": ([3, 1, 130, 1, 0], [300, 17, 130, 129, 1], (4, 1), 80, 16),  # and one without tokens
    "more sequences than lanes": ([1] * 30 + [5, 1, 1, 40, 2], [*range(1, 31), 9, 1, 30, 50, 2], (2, 1), 64, 16),
    "heads that do not divide a tile": ([50], [60], (12, 4), 96, 16),
    "more heads of one KV head than a tile takes": ([9, 1], [40, 3], (17, 1), 64, 16),
    "window over tiles": ([150, 1, 1], [500, 300, 3], (2, 1), 64, 16, 200),
    "window of one": ([70, 1], [300, 18], (2, 2), 64, 16, 1),
    "soft cap": ([2, 1], [150, 10], (8, 1), 256, 64, 0, 2.0),
    "window and soft cap": ([40, 1, 1], [200, 50, 7], (4, 2), 192, 16, 30, 3.0),
    "soft cap of chunks": ([150, 1, 1], [500, 300, 65], (2, 1), 64, 16, 64, 2.0),
    "pages of other sizes": ([40, 3], [75, 150], (2, 1), 128, 50),
    "heads and pages as in an 8B model": ([35, 1], [250, 20], (32, 8), 128, 64),
}
CHUNKED = ("soft cap of chunks",)
WITH_SINKS = "prompts and decode", "window and soft cap", "heads that do not divide a tile"
QUICK = "window over tiles", "prompts and decode"
SLOW = [pytest.param(name, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in SHAPES]


def device_of(seed: int, cores: int = 4) -> Harness:
    return Harness(32, seed, cores, groups=True)


def case_of(name: str) -> Case:
    return cases.attention_case(name, *SHAPES[name], has_sinks=name in WITH_SINKS, is_chunked=name in CHUNKED)


@pytest.mark.parametrize("name", SLOW)
def test_equals_the_reference_in_every_order(name: str) -> None:
    """The seed orders blocks, waves and lanes. Arrays lie behind a fence, or in front of one."""
    expected = expect(paged_attention, case_of(name), device_of(0))
    found = []
    for seed in (0, 1, 2):
        device = device_of(seed)
        device.begins = seed == 1
        error, got = run_case(paged_attention, case_of(name), device, expected)
        assert error.passed, f"seed {seed}: {error}"
        assert {variant.file for variant in device.variants} == {"attention_wgmma"}
        found.append(got[0])
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other, err_msg="depends on the order of waves")


@pytest.mark.slow
@pytest.mark.parametrize("dim", attention_wgmma.HEAD_DIMS)
@pytest.mark.parametrize("persistent", [0, 1])
def test_blocks_take_spans_in_turns(persistent: int, dim: int) -> None:
    case = cases.attention_case(f"{persistent} {dim}", [300, 70, 1], [300, 200, 600], (2, 1), dim, 16)
    for cores in (1, 3):
        device = device_of(1, cores)
        values = {**device.choice("attention_wgmma", dim=dim, rows=3), "PERSISTENT": persistent}
        device.tuning = Choices("", {("attention_wgmma", (dim, ANY)): values})
        error, _ = run_case(paged_attention, case, device)
        assert error.passed, f"{cores} multiprocessors: {error}"


def test_a_query_sees_nothing_of_what_is_hidden() -> None:
    """Keys and values behind it, or before its window, may be NaN."""
    rng = np.random.default_rng(0)
    device = device_of(1)
    k, v = (rng.standard_normal((10, 16, 1, 64)).astype(np.float16) for _ in "kv")
    k[9, 5:] = v[9, 5:] = np.nan  # position 149 is the last
    k[0, :8] = v[0, :8] = np.nan
    q = rng.standard_normal((100, 2, 64)).astype(np.float16)
    arrays = (np.array(each, np.int32) for each in ([0, 100], [149], [list(range(10))]))
    starts, lengths, table = map(device.asarray, arrays)
    kv = KVPages(device.asarray(k), device.asarray(v))
    out = np.asarray(paged_attention(device.asarray(q), kv, starts, lengths, table, AttentionSpec(0.1, 42, 0.0)))
    assert np.isfinite(out).all()
