"""Sampling: the fast function against the plain one, both against float64 and hand-computed rows, and the draws."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.ops import sampling
from forge.ops.logprobs import logprobs
from forge.ops.penalties import penalize
from forge.ops.sampling import sample, weights

ONE = 2**42
PINNED = [376, 385, 5, 126, 511, 177, 252, 241, 481, 2, 506, 455]


def batch(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice=0, position=0) -> tuple:
    """Arguments of `sample`; a parameter given once holds for all rows."""
    logits = np.atleast_2d(np.array(logits, np.float32))

    def column(value, dtype):
        return np.broadcast_to(np.array(value, dtype), len(logits)).copy()

    return (
        logits,
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(top_p, np.float32),
        column(min_p, np.float32),
        column(seed, np.uint64),
        column(choice, np.uint32),
        column(position, np.uint32),
    )


def random_logits(rng: np.random.Generator, v: int) -> np.ndarray:
    """One row of any character: smooth, tied, spread over the range of float32, or full of -inf."""
    kind = rng.integers(6)
    z = rng.normal(0.0, rng.choice([1e-3, 1.0, 5.0, 50.0]), v)
    if kind == 1:
        z = np.round(z)
    elif kind == 2:
        z[:] = rng.choice([-1.0, -0.0, 0.0, 1.0], v)
    elif kind == 3:
        z = rng.choice([-3e38, -1e30, -1.0, 0.0, 1e-40, 1.0, 3e38], v)
    elif kind == 4:
        z[rng.random(v) < 0.9] = -np.inf
        z[rng.integers(v)] = 2.0
    elif kind == 5:
        z[:] = z[0]
    return z.astype(np.float32)


def random_batch(rng: np.random.Generator, b: int, v: int) -> tuple:
    return batch(
        [random_logits(rng, v) for _ in range(b)],
        temperature=rng.choice([0.0, 1e-45, 1e-30, 0.01, 0.7, 1.0, 100.0], b),
        top_k=rng.choice([0, 0, 1, 2, 5, v - 1, v, v + 1, 2**31 - 1], b),
        top_p=rng.choice([1e-45, 1e-9, 0.1, 0.5, 0.9, 1 - 2**-24, 1.0], b),
        min_p=rng.choice([0.0, 1e-45, 1e-12, 0.05, 0.5, 1.0], b),
        seed=rng.integers(0, 2**64, b, np.uint64),
        choice=rng.integers(0, 2**32, b, np.uint64),
        position=rng.integers(0, 2**32, b, np.uint64),
    )


def assert_equals_reference(args: tuple) -> None:
    np.testing.assert_array_equal(sample(*args), sample.reference(*args))
    for z, *limits in zip(args[0], *(a.tolist() for a in args[1:5]), strict=True):
        if limits[0] > 0.0:
            ids, kept = sampling.candidates(z, *limits)
            ids = range(len(z)) if ids is None else ids.tolist()
            fast = [(i, w) for i, w in zip(ids, kept.tolist(), strict=True) if w]
            assert fast == [(i, w) for i, w in sampling._plain_candidates(z, *limits) if w]


class TestWeights:
    def test_each_step_is_float32_as_written(self) -> None:
        """The docstring's steps, one scalar at a time, as a kernel does them."""
        f = np.float32
        rng = np.random.default_rng(0)
        z = np.concatenate([rng.normal(0, 6, 2000), [9.5, -300.0, 0.0]]).astype(f)
        for temperature in (0.05, 0.8, 1.0, 3.0):
            scale = f(1) / f(temperature)
            expected = []
            for value in z:
                d = max(f(f(value - z.max()) * scale), f(-32))
                n = np.rint(f(d * f(1.44269504)))
                r = f(f(d - f(n * f(0.693359375))) - f(n * f(-2.12194440e-4)))
                q = f(0.001381454)
                for c in (0.008368745, 0.04166839, 0.16666521, 0.49999994):
                    q = f(f(q * r) + f(c))
                exp = f(f(f(f(q * r) * r) + r) + f(1))
                shift = 42 + int(n)
                expected.append(int(float(exp) * 2**42) >> (42 - shift))
            np.testing.assert_array_equal(weights(z, z.max(), temperature), expected)

    def test_exp_is_accurate(self) -> None:
        d = -np.linspace(0, 40, 1_000_001).astype(np.float32)
        w = weights(d, np.float32(0), 1.0)
        exact = np.exp(d.astype(np.float64)) * ONE
        assert np.all(np.abs(w - exact) <= 8.1e-8 * exact + 1)
        assert w[0] == w.max() == ONE
        assert np.all(w[d < -29.2] == 0)

    @pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1.0, 100.0])
    def test_extremes(self, temperature: float) -> None:
        z = np.array([3e38, -3e38, -np.inf, 3e38], np.float32)
        assert weights(z, z[0], temperature).tolist() == [ONE, 0, 0, ONE]


class TestSampleEqualsReference:
    @pytest.mark.parametrize("count", [100, pytest.param(400, marks=pytest.mark.slow)])
    def test_random_rows(self, count: int) -> None:
        rng = np.random.default_rng(count)
        for _ in range(count):
            assert_equals_reference(random_batch(rng, 8, int(rng.integers(1, 40))))

    def test_nuclei_wider_than_the_first_partition(self) -> None:
        rng = np.random.default_rng(2)
        for v in (1023, 1024, 1025, 3000):
            assert_equals_reference(random_batch(rng, 12, v))
            assert_equals_reference(batch(rng.normal(0, 0.1, (3, v)), 1.0, [0, 1100, 0], [0.99, 0.97, 0.3]))

    @pytest.mark.slow
    @settings(max_examples=300)
    @given(
        st.lists(
            st.one_of(st.sampled_from([-math.inf, -1.0, 0.0, 1.0]), st.floats(-60, 60, width=32)),
            min_size=1,
            max_size=30,
        ).filter(lambda z: max(z) > -math.inf),
        st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        st.integers(0, 31),
        st.floats(2**-30, 1.0, width=32),
        st.floats(0.0, 1.0, width=32),
        st.integers(0, 2**64 - 1),
    )
    def test_any_row(self, z, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
        assert_equals_reference(batch(z, temperature, top_k, top_p, min_p, seed))

    @pytest.mark.slow
    def test_vocabularies_of_real_size(self) -> None:
        rng = np.random.default_rng(3)
        assert_equals_reference(random_batch(rng, 24, 49_152))


class TestKept:
    """Which tokens can be drawn, against a sort and a float64 softmax."""

    @staticmethod
    def kept(z: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
        limits = (float(np.float32(v)) for v in (temperature, top_p, min_p))
        temperature, top_p, min_p = limits
        ids, weight = sampling.candidates(z, temperature, top_k, top_p, min_p)
        return set((np.flatnonzero(weight) if ids is None else ids[weight > 0]).tolist())

    @staticmethod
    def expected(z: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, slack: float) -> set[int]:
        """Positive slack keeps more, negative fewer."""
        z = z.astype(np.float64)
        order = np.lexsort((np.arange(len(z)), -z))[: top_k or None]
        p = np.exp((z[order] - z.max()) / temperature)
        before = np.concatenate([[0.0], np.cumsum(p)[:-1]]) / p.sum()
        keep = (before < top_p + slack) & (p >= min_p * (1 - slack)) & (p > 2.0**-42 * (1 - slack))
        return set(order[keep].tolist())

    @pytest.mark.parametrize("v", [5, 300, 5000])
    def test_agrees_with_float64_but_at_borders(self, v: int) -> None:
        rng = np.random.default_rng(v)
        strict = 0
        for _ in range(100):
            z = rng.normal(0, rng.choice([0.5, 3.0]), v).astype(np.float32)
            limits = (
                float(rng.choice([0.3, 0.8, 1.0, 2.0])),
                int(rng.choice([0, 1, 3, 40, 2000])),
                float(rng.choice([0.01, 0.5, 0.9, 0.95])),
                float(rng.choice([0.0, 0.02, 0.3])),
            )
            kept = self.kept(z, *limits)
            least, most = self.expected(z, *limits, -1e-6), self.expected(z, *limits, 1e-6)
            assert least <= kept <= most
            strict += least == most
        assert strict >= 95

    def test_top_k_cuts_ties_by_id(self) -> None:
        z = np.array([1, 2, 1, 2, 1, 0], np.float32)
        assert [sorted(self.kept(z, 1.0, k, 1.0, 0.0)) for k in range(1, 7)] == [
            [1], [1, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5],
        ]  # fmt: skip

    def test_top_p_cuts_ties_by_id_and_keeps_an_exact_border(self) -> None:
        z = np.zeros(8, np.float32)
        assert self.kept(z, 1.0, 0, 0.25, 0.0) == {0, 1}
        assert self.kept(z, 1.0, 0, 0.26, 0.0) == {0, 1, 2}
        assert self.kept(z, 1.0, 4, 0.25, 0.0) == {0}

    def test_top_p_counts_what_top_k_left(self) -> None:
        z = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
        assert self.kept(z, 1.0, 0, 0.6, 0.0) == {0, 1}
        assert self.kept(z, 1.0, 2, 0.56, 0.0) == {0}  # 4/7 = 0.571

    @given(st.floats(0.0, 1.0, width=32), st.integers(1, 2**62))
    def test_share_is_exact_and_fits_64_bits(self, p: float, total: int) -> None:
        """The docstring's split, as a GPU does it, against rational numbers."""
        fraction = Fraction(max(int(p * 2**32), 1), 2**32)
        high, low = divmod(total, 2**32)
        parts = int(fraction * 2**32) * high, int(fraction * 2**32) * low + 2**32 - 1
        assert max(parts) < 2**64
        assert sampling._top_p_weight(p, total) == math.ceil(fraction * total) == parts[0] + (parts[1] >> 32)

    def test_min_p_is_relative_to_the_most_probable(self) -> None:
        z = np.log(np.array([0.1, 0.6, 0.31, 0.29], np.float32))
        assert self.kept(z, 1.0, 0, 1.0, 0.5) == {1, 2}
        assert self.kept(np.zeros(3, np.float32), 1.0, 0, 1.0, 1.0) == {0, 1, 2}

    def test_sums_hold_two_to_the_twentieth_equals(self) -> None:
        z = np.zeros(2**20, np.float32)
        assert len(self.kept(z, 1.0, 0, 0.5, 0.0)) == 2**19
        assert sample.run_cpu(*batch(z, seed=3))[0] == 2**20 * int(sampling.random_bits(*batch(z, seed=3)[5:])[0]) >> 64


class TestDraw:
    def test_frequencies_follow_the_softmax(self) -> None:
        """Chi-square over 20,000 positions; 24.3 is the 99.9% quantile at 7 degrees of freedom."""
        n, temperature = 20_000, 0.7
        z = np.array([0.0, 1.0, -1.0, 0.5, -0.5, 0.2, -2.0, 0.9])
        ids = sample(*batch(np.tile(z, (n, 1)), temperature, seed=2024, position=np.arange(n)))
        expected = np.exp(z / temperature)
        expected *= n / expected.sum()
        assert np.sum((np.bincount(ids, minlength=8) - expected) ** 2 / expected) < 24.3

    def test_frequencies_of_a_nucleus(self) -> None:
        """10.8 is the 99.9% quantile at one degree of freedom."""
        n = 5000
        z = np.log([0.1, 0.5, 0.15, 0.25])
        ids = sample(*batch(np.tile(z, (n, 1)), 1.0, 3, 0.8, 0.0, seed=np.arange(n)))
        counts = np.bincount(ids, minlength=4)
        assert counts[[0, 2]].sum() == 0
        assert (counts[1] - n * 2 / 3) ** 2 / (n * 2 / 3) + (counts[3] - n / 3) ** 2 / (n / 3) < 10.8

    @pytest.mark.parametrize("name", ["seed", "choice", "position"])
    def test_streams_are_independent(self, name: str) -> None:
        """Neighbours in one coordinate agree as often as chance, 1 in 16, over the 1000 values of another."""
        other = "position" if name != "position" else "seed"
        z = np.zeros((1000, 16))
        first, second = (sample(*batch(z, **{name: value, other: np.arange(1000)})) for value in (5, 6))
        assert 35 < np.count_nonzero(first == second) < 95

    def test_high_words_of_the_seed_count(self) -> None:
        z = np.zeros((64, 1000))
        assert len(set(sample(*batch(z, seed=[i << 58 for i in range(64)])).tolist())) > 50

    def test_a_row_draws_the_same_in_any_batch(self) -> None:
        rng = np.random.default_rng(4)
        args = random_batch(rng, 24, 700)
        together = sample(*args)
        for b in range(24):
            assert sample(*(a[b : b + 1] for a in args))[0] == together[b]
        order = rng.permutation(24)
        np.testing.assert_array_equal(sample(*(a[order] for a in args)), together[order])

    @pytest.mark.parametrize("run", [sample.run_cpu, sample.reference])
    def test_ends_of_the_random_range(self, run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampling, "random_bits", lambda *_: np.array([0, 2**64 - 1], np.uint64))
        z = [-np.inf, -80.0, 1.0, 0.0, -80.0, -np.inf]
        for limits in ({}, {"top_p": 0.99}, {"top_k": 3}, {"min_p": 0.1}):
            assert run(*batch([z, z], **limits)).tolist() == [2, 3]

    def test_ids_are_pinned(self) -> None:
        """A change of these ids is a change of every user's texts."""
        z = (np.arange(12 * 512).reshape(12, 512) * 7919 % 1009).astype(np.float32) / 64
        ids = sample(*batch(z, [0.8, 1.0, 1.5] * 4, [0, 40] * 6, [1.0, 0.9, 0.95, 0.5] * 3, seed=7, position=range(12)))
        assert ids.dtype == np.int32
        assert ids.tolist() == PINNED

    def test_logits_are_not_written(self) -> None:
        args = random_batch(np.random.default_rng(5), 6, 100)
        before = args[0].copy()
        sample(*args)
        np.testing.assert_array_equal(args[0], before)


class TestNoDistribution:
    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_one_bad_logit_is_seen_and_others_rows_are_not_touched(self, temperature: float, bad: float) -> None:
        z = np.random.default_rng(6).normal(size=(3, 5000)).astype(np.float32)
        good = sample(*batch(z, temperature, 50, 0.9))
        z[1, 4321] = bad
        assert sample(*batch(z, temperature, 50, 0.9)).tolist() == [good[0], -1, good[2]]

    def test_all_forbidden(self) -> None:
        z = np.full((2, 9), -np.inf)
        assert sample(*batch(z, [0.0, 1.0], 3, 0.5, 0.5)).tolist() == [-1, -1]

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_log_probabilities_are_nan(self, bad: float) -> None:
        z = np.full((1, 4), bad, np.float32)
        for run in (logprobs.run_cpu, logprobs.reference):
            ids, values = run(z, np.array([2], np.int32), 2)
            assert ids.tolist() == [[2, 0, 1]]
            assert np.isnan(values).all()


def dense(rows: list[list[tuple[int, float]]], v: int, dtype: type) -> np.ndarray:
    """Values at some tokens of each row, 0 elsewhere."""
    result = np.zeros((len(rows), v), dtype)
    for row, pairs in zip(result, rows, strict=True):
        for token, value in pairs:
            row[token] = value
    return result


def penalties(v, seen, repetition, presence, frequency, bias) -> tuple:
    """Arguments of `penalize` after the logits; `seen` holds (token, how often it was generated)."""
    counts = [[(token, 1 + generated) for token, generated in pairs] for pairs in seen]
    three = (np.array(value, np.float32) for value in (repetition, presence, frequency))
    return dense(counts, v, np.int32), dense(bias, v, np.float32), *three


class TestPenalize:
    @pytest.mark.parametrize("run", [penalize.run_cpu, penalize.reference])
    def test_by_hand(self, run) -> None:
        z = np.array([[2, -2, 4, 1, 8], [1, 2, 3, 4, 5]], np.float32)
        before = z.copy()
        seen = [[(2, 2), (0, 0), (1, 1)], []]
        bias = [[(1, 1.0), (3, -np.inf)], [(0, 5.0)]]
        got = run(z, *penalties(5, seen, [2, 9], [0.5, 9], [0.25, 9], bias))
        # 2/2; ((-2+1)*2 - 0.5) - 0.25; (4/2 - 0.5) - 0.25*2; forbidden; not seen
        assert got.tolist() == [[1.0, -2.75, 1.0, -math.inf, 8.0], [6, 2, 3, 4, 5]]
        np.testing.assert_array_equal(z, before)

    def test_bias_decides_the_side_on_which_repetition_acts(self) -> None:
        z = np.array([[-1.0, 1.0]], np.float32)
        got = penalize(z, *penalties(2, [[(0, 0), (1, 0)]], [4], [0], [0], [[(0, 3.0), (1, -3.0)]]))
        assert got.tolist() == [[0.5, -8.0]]

    @pytest.mark.parametrize("seen", [[], [(t, 3) for t in range(50)]])
    def test_neutral_values_change_no_bit(self, seen: list[tuple[int, int]]) -> None:
        z = np.random.default_rng(7).normal(size=(2, 50)).astype(np.float32)
        z[0, :2] = -0.0, 0.0
        got = penalize(z, *penalties(50, [seen] * 2, [1, 1], [0, 0], [0, 0], [[], []]))
        np.testing.assert_array_equal(got.view(np.int32), z.view(np.int32))

    def test_equals_the_reference_bit_for_bit(self) -> None:
        rng = np.random.default_rng(8)
        for _ in range(100):
            b, v = int(rng.integers(1, 5)), int(rng.integers(1, 60))
            z = np.stack([random_logits(rng, v) for _ in range(b)])
            z = np.clip(z, -1e30, 1e30)
            seen = [[(t, int(rng.integers(0, 9))) for t in rng.permutation(v)[: rng.integers(v + 1)]] for _ in range(b)]
            bias = [[(t, rng.normal(0, 5)) for t in rng.permutation(v)[: rng.integers(4)]] for _ in range(b)]
            args = penalties(v, seen, rng.uniform(0.3, 3, b), rng.normal(size=b), rng.normal(size=b), bias)
            got, plain = penalize(z, *args), penalize.reference(z, *args)
            np.testing.assert_array_equal(got.view(np.int32), plain.view(np.int32))

    def test_overflow_ends_in_a_row_without_distribution(self) -> None:
        z = np.array([[5.0, 1.0]], np.float32)
        z = penalize(z, *penalties(2, [[(0, 1)]], [1e-40], [0], [0], [[]]))
        assert sample(*batch(z)).tolist() == [-1]


class TestLogprobs:
    @staticmethod
    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z.astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def test_equal_float64(self) -> None:
        z = np.random.default_rng(9).normal(100, 6, (4, 50_000)).astype(np.float32)
        ids = z.argsort(axis=1)[np.arange(4), [0, 100, -100, -1]].astype(np.int32)
        expected = self.log_softmax(z)
        top, values = logprobs(z, ids, 20)
        np.testing.assert_array_equal(top[:, 0], ids)
        np.testing.assert_array_equal(top[:, 1:], np.argsort(-z, axis=1, kind="stable")[:, :20])
        np.testing.assert_allclose(values, np.take_along_axis(expected, top.astype(np.int64), 1), rtol=2e-7, atol=1e-7)

    def test_known_probabilities(self) -> None:
        z = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)) - 3
        ids, values = logprobs(z, np.array([1], np.int32), 4)
        assert ids.tolist() == [[1, 3, 2, 1, 0]]
        np.testing.assert_allclose(np.exp(values), [[0.2, 0.4, 0.3, 0.2, 0.1]], rtol=1e-6)

    def test_top_equals_the_reference(self) -> None:
        rng = np.random.default_rng(10)
        for _ in range(200):
            v = int(rng.integers(1, 60))
            z = np.stack([random_logits(rng, v) for _ in range(3)])
            n = int(rng.integers(0, v + 3))
            ids = rng.integers(-1, v, 3).astype(np.int32)
            for fast, plain in zip(logprobs(z, ids, n), logprobs.reference(z, ids, n), strict=True):
                assert fast.dtype == plain.dtype
                np.testing.assert_array_equal(fast, plain)
