"""The sampler draws the reference's ids, one for one, for random parameters and at the edges of its loops."""

from __future__ import annotations

import numpy as np
import pytest
from harness import COMPILER, Harness

from forge.ops.sampling import sample

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("size", [1, 2, 255, 1023, 1024, 1025, 4097])
def test_ids_are_the_references(size: int, wave: int) -> None:
    rng, rows = np.random.default_rng(size), 48
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
    assert_equal_ids(wave, *arguments)


@pytest.mark.parametrize("wave", [32, 64])
def test_subnormals_are_not_zero(wave: int) -> None:
    """The harness flushes them, as AMD does under CuPy's options: the kernel must not lose their order."""
    rng, rows, size = np.random.default_rng(0), 64, 300
    few = np.array([0.0, -0.0, 1e-45, -1e-45, 3e-42, 1e-39, -1e-39], np.float32)
    logits = few[rng.integers(0, len(few), (rows, size))]
    assert_equal_ids(
        wave,
        logits,
        np.resize(np.array([0.0, 1e-41, 1e-3, 1.0], np.float32), rows),
        np.resize(np.array([0, 1, 7, 100, 250], np.int32), rows),
        np.resize(np.array([1e-40, 0.5, 1.0], np.float32), rows),
        np.resize(np.array([0.0, 1e-40, 0.5, 1.0], np.float32), rows),
        rng.integers(0, 2**63, rows).astype(np.uint64),
        np.zeros(rows, np.uint32),
        np.arange(rows, dtype=np.uint32),
    )


def assert_equal_ids(wave: int, *arguments: np.ndarray) -> None:
    wanted = sample.reference(*arguments)
    device = Harness(wave)
    got = device.to_numpy(device.launch(sample, tuple(device.asarray(a) for a in arguments), {}))
    np.testing.assert_array_equal(got, wanted)
