"""The residual stream on NumPy: every result is added once, whatever order norms and results come in."""

from __future__ import annotations

import numpy as np
import pytest

from forge.models.family import Arch, Sublayer
from forge.models.layers import Linear, Norm
from forge.models.residual import ResidualStream

EPS = 1e-5


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


NORM = Norm("rms", np.ones(6, np.float32), None, EPS)
DOWN = Linear(normal(6, 4))
H = normal(3, 4)
X = normal(3, 6)
PRODUCT = H @ DOWN.weight.T


@pytest.mark.parametrize("leaves_pending", [False, True])
@pytest.mark.parametrize("post_norm", [None, NORM])
def test_a_result_is_in_the_stream_before_and_behind_the_next_norm(
    post_norm: Norm | None, leaves_pending: bool
) -> None:
    stream = ResidualStream(X.copy(), leaves_pending=leaves_pending)
    stream.add(DOWN, H, post_norm)
    expected = X + (PRODUCT if post_norm is None else rms(PRODUCT))
    np.testing.assert_allclose(stream.value(), expected, rtol=1e-5, atol=1e-6)
    identity = Linear(np.eye(6, dtype=np.float32))
    np.testing.assert_allclose(identity(stream.normed(NORM)), rms(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stream.value(), expected, rtol=1e-5, atol=1e-6)


def test_a_product_waits_for_the_next_norm_only_where_it_may() -> None:
    for leaves_pending in (False, True):
        stream = ResidualStream(X.copy(), leaves_pending=leaves_pending)
        stream.add(DOWN, H, None)
        assert np.array_equal(stream.x, X) == leaves_pending


@pytest.mark.parametrize("leaves_pending", [False, True])
@pytest.mark.parametrize("post_norm", [None, NORM])
def test_two_results_without_a_norm_between_are_both_added(post_norm: Norm | None, leaves_pending: bool) -> None:
    """As attention and feed-forward that read the same input."""
    stream = ResidualStream(X.copy(), leaves_pending=leaves_pending)
    stream.keep(NORM)
    shared = stream.normed(NORM)
    stream.add(DOWN, H, post_norm)
    assert stream.kept() is shared
    np.testing.assert_allclose(shared, rms(X), rtol=1e-5)
    stream.add(DOWN, 2 * H, post_norm)
    added = 3 * PRODUCT if post_norm is None else 2 * rms(PRODUCT)
    np.testing.assert_allclose(stream.value(), X + added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leaves_pending", [False, True])
def test_a_stream_without_a_norm_is_an_operand_with_all_that_was_added(leaves_pending: bool) -> None:
    stream = ResidualStream(X.copy(), leaves_pending=leaves_pending)
    stream.add(DOWN, H, None)
    np.testing.assert_allclose(stream.value(), (X + PRODUCT), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stream.normed(None), X + PRODUCT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stream.value(), X + PRODUCT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stream.value(), (X + PRODUCT), rtol=1e-5, atol=1e-6)


def test_rows_are_taken_with_what_is_pending() -> None:
    stream = ResidualStream(X.copy(), leaves_pending=True)
    stream.add(DOWN, H, NORM)
    whole = stream.value()
    stream.take(np.array([2, 0], np.int32))
    np.testing.assert_array_equal(stream.value(), whole[[2, 0]])


def test_a_row_of_the_table_says_which_layer_has_which_sublayer() -> None:
    """Every third layer is attention with norms of heads; every second feed-forward is not gated."""
    local, full = Sublayer("attention", "attn_q"), Sublayer("attention", "attn_q attn_q_norm")
    plain, gated = Sublayer("plain", "ffn_up"), Sublayer("gated", "ffn_gate ffn_up")
    row = Arch(rope="neox", mixers=(local, local, full), feed_forwards=(plain, gated))
    expected = [(local, plain), (local, gated), (full, plain), (local, gated), (local, plain), (full, gated)]
    assert row.layers(6) == expected
    assert row.layers(1) == expected[:1]
