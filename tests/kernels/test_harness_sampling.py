"""The sampler draws the reference's ids, one for one, for random parameters and at the edges of its loops."""

from __future__ import annotations

import numpy as np
import pytest
from harness import COMPILER, Harness, compiled
from kernel_sources import replace_source

from forge.backend import sources
from forge.ops import sampling
from forge.ops.sampling import sample

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")


@pytest.mark.parametrize(
    "size",
    [pytest.param(n, marks=() if n == 1023 else slow) for n in (1, 2, 255, 1023, 1024, 1025, 4097)],
)
@pytest.mark.parametrize("swapped", [0, pytest.param(1, marks=slow)])
def test_ids_are_the_references(size: int, swapped: int) -> None:
    """Each size meets both wave sizes and both ways with subnormals; swapped, the other two pairs, with more rows."""
    rng, rows = np.random.default_rng(size + swapped), 48 if size < 1025 or swapped else 24
    logits = (rng.standard_normal((rows, size)) * rng.choice([0, 0.1, 1, 8], (rows, 1))).astype(np.float32)
    logits[::7, 1::3] = -np.inf
    logits[3::7] = np.round(logits[3::7])  # ties
    arguments = (
        logits,
        rng.choice([0.0, 1e-3, 0.7, 1.0, 100.0], rows).astype(np.float32),
        rng.choice([0, 1, 2, 50, max(size - 1, 1), size, size + 5], rows).astype(np.int32),
        rng.choice([1e-6, 0.1, 0.9, 1.0], rows).astype(np.float32),
        rng.choice([0.0, 0.05, 1.0], rows).astype(np.float32),
        rng.integers(0, 2**63, rows).astype(np.uint64),
        rng.integers(0, 4, rows).astype(np.uint32),
        rng.integers(0, 1000, rows).astype(np.uint32),
    )
    wanted = sample.reference(*arguments)
    for device in (Harness(32, flush=size % 2 == swapped), Harness(64, flush=size % 2 != swapped)):
        got = device.to_numpy(device.launch(sample, tuple(device.asarray(a) for a in arguments), {}))
        np.testing.assert_array_equal(got, wanted, err_msg=f"wave {device.wave_size}")


@pytest.mark.parametrize(
    ("rows", "cores"), [(1, 132), *(pytest.param(3, cores, marks=slow) for cores in (132, 1))]
)  # many chunks of a row, few, one
@pytest.mark.parametrize("temperature", [0.5, pytest.param(1000.0, marks=slow)])
@pytest.mark.parametrize("swapped", [0, pytest.param(1, marks=slow)])
def test_chunks_and_bins_of_any_size_draw_the_same(temperature: float, rows: int, cores: int, swapped: int) -> None:
    """Filters meet waves of 32 and 64 lanes in turns, at the other temperature, and swapped, the other way round."""
    rng, size = np.random.default_rng(rows), 9000
    logits = rng.normal(0, 3, (rows, size)).astype(np.float32)
    logits[1::2] = np.round(logits[1::2] * 8) / 8  # ties
    logits[2::3, 7::9] = -1e30  # makes bins wide: under a high temperature one holds more tokens than are listed
    filters = (0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9), (4000, 0.9), (8999, 0.9999), (9000, 1e-6)
    for number, (top_k, top_p) in enumerate(filters):
        arguments = (
            logits,
            np.full(rows, temperature, np.float32),
            np.full(rows, top_k, np.int32),
            np.full(rows, top_p, np.float32),
            rng.choice([0.0, 0.01], rows).astype(np.float32),
            rng.integers(0, 2**63, rows).astype(np.uint64),
            *np.zeros((2, rows), np.uint32),
        )
        device = Harness((32, 64)[(number + (temperature > 1) + swapped) % 2], seed=1, cores=cores)
        got = device.to_numpy(device.launch(sample, tuple(device.asarray(a) for a in arguments), {}))
        np.testing.assert_array_equal(got, sample.run_cpu(*arguments), err_msg=f"top_k {top_k}, top_p {top_p}")


@pytest.mark.parametrize(
    ("wave", "cores"), [(32, 132), *(pytest.param(*row, marks=slow) for row in ((64, 1), (32, 1), (64, 132)))]
)
def test_equal_logits_are_counted_without_a_pass_over_the_row(
    wave: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All equal, of two values, behind some others, zeros of both signs, rounded to float16: without a radix select."""
    rng, size = np.random.default_rng(cores), 3500
    few = np.where(rng.random(size) < 0.01, rng.normal(3, 1, size), 0)
    two, signs = rng.integers(0, 2, size), np.where(rng.integers(0, 2, size), -0.0, 0.0)
    rows = [np.zeros(size), two, np.where(two, 1.0, -1e30), few, signs, rng.normal(0, 3, size).astype(np.float16)]
    logits = np.stack(rows).astype(np.float32)
    text = sources.source("sample")
    assert text.count("cut = select<") == 2
    replace_source(monkeypatch, "sample", text.replace("cut = select<", "cut = 0 & select<"))
    compiled.cache_clear()
    try:
        for top_k, top_p, min_p in ((50, 1.0, 0), (50, 0.9, 0), (0, 0.9, 0.3), (1200, 0.7, 0.01), (3499, 1.0, 0)):
            limits = np.full(6, top_k, np.int32), np.full(6, top_p, np.float32), np.full(6, min_p, np.float32)
            seeds = rng.integers(0, 2**63, 6).astype(np.uint64), *np.zeros((2, 6), np.uint32)
            arguments = (logits, np.ones(6, np.float32), *limits, *seeds)
            device = Harness(wave, cores=cores)
            got = device.to_numpy(device.launch(sample, tuple(device.asarray(a) for a in arguments), {}))
            np.testing.assert_array_equal(got, sample.run_cpu(*arguments), err_msg=f"{top_k}, {top_p}, {min_p}")
    finally:
        compiled.cache_clear()


SUBNORMAL = np.float32(2.0**-149)  # the least


@pytest.mark.parametrize(
    ("wave", "flush", "rows"),
    [
        (64, True, 48),
        *(pytest.param(wave, flush, 96, marks=slow) for wave in (32, 64) for flush in (False, True)),
    ],
)
def test_subnormal_logits_and_parameters_are_not_zeros(wave: int, flush: bool, rows: int) -> None:
    rng, size = np.random.default_rng(rows), 515
    few = np.array([0, 1, -1, 2, -2, 2**22, -(2**22)], np.float32) * SUBNORMAL
    logits = rng.choice(few, (rows, size))
    logits[rng.random((rows, size)) < 0.3] *= np.float32(-1.0)  # zeros of both signs
    logits[::3] = np.where(logits[::3] > 0, np.float32(-0.0), logits[::3])  # the greatest is a zero
    logits[1::6] += (rng.random((rows // 6, size)) < 0.1) * np.float32(2.0**-126)
    arguments = (
        logits,
        rng.choice(np.array([0.0, SUBNORMAL, 1e-20, 1.0], np.float32), rows),
        rng.choice(np.array([0, 1, 3, 100], np.int32), rows),
        rng.choice(np.array([SUBNORMAL, 0.3, 1.0], np.float32), rows),
        rng.choice(np.array([0.0, SUBNORMAL, 1.0], np.float32), rows),
        rng.integers(0, 2**63, rows).astype(np.uint64),
        *np.zeros((2, rows), np.uint32),
    )
    device = Harness(wave, flush=flush)
    got = device.to_numpy(device.launch(sample, tuple(device.asarray(a) for a in arguments), {}))
    np.testing.assert_array_equal(got, sample.reference(*arguments))


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("size", [4, 1024, pytest.param(8192, marks=slow)])
def test_a_draw_at_the_edge_of_a_tokens_weight_is_that_token(
    size: int, wave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equals the id-th is drawn by the bits from id / size of 2**64 on, which are given in the seed's place."""
    text = sources.source("sample")
    drawn = "random_bits(seed[BLOCK_X], choice[BLOCK_X], position[BLOCK_X])"
    assert text.count(drawn) == 1
    replace_source(monkeypatch, "sample", text.replace(drawn, "seed[BLOCK_X]"))
    monkeypatch.setattr(sampling, "random_bits", lambda seed, choice, position: seed)
    compiled.cache_clear()
    ids = np.array(sorted({1, size // 2, size // 3 + 1, size - 1}))
    edges = ids.astype(np.uint64) * np.uint64((1 << 64) // size)
    bits = np.concatenate([edges, edges - np.uint64(1), np.array([0, 2**64 - 1], np.uint64)])
    rows = len(bits)
    ones, zeros = np.ones(rows, np.float32), np.zeros(rows, np.uint32)
    arguments = (np.zeros((rows, size), np.float32), ones, zeros.view(np.int32), ones, 0 * ones, bits, zeros, zeros)
    device = Harness(wave, 1)
    try:
        got = device.to_numpy(device.launch(sample, tuple(device.asarray(a) for a in arguments), {}))
    finally:
        compiled.cache_clear()
    wanted = [*ids, *(ids - 1), 0, size - 1]
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(sample.run_cpu(*arguments), wanted)
    np.testing.assert_array_equal(sample.reference(*arguments), wanted)
