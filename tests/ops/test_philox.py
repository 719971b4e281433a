"""Philox4x32-10 against the published vectors and an implementation in plain integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.ops.philox import philox4x32, random_bits

WORD = st.integers(0, 2**32 - 1)


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123 1.14
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    result = philox4x32(words(counter), words(key))
    assert result.dtype == np.uint32
    np.testing.assert_array_equal(result, words(expected))


@given(st.lists(st.tuples(*[WORD] * 6), min_size=1, max_size=5))
def test_rows_equal_plain_integers(rows: list[tuple[int, ...]]) -> None:
    table = np.array(rows, np.uint32)
    expected = [philox_in_integers(list(row[:4]), list(row[4:])) for row in rows]
    np.testing.assert_array_equal(philox4x32(table[:, :4], table[:, 4:]), expected)


def test_leading_dims_broadcast() -> None:
    counters = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    key = np.array([7, 9], np.uint32)
    result = philox4x32(counters, key)
    assert result.shape == (2, 3, 4)
    np.testing.assert_array_equal(result[1, 2], philox_in_integers(list(range(20, 24)), [7, 9]))


@given(st.integers(0, 2**64 - 1), WORD, WORD)
def test_random_bits_take_seed_choice_and_position(seed: int, choice: int, position: int) -> None:
    word = philox_in_integers([position, choice, 0, 0], [seed % 2**32, seed >> 32])
    bits = random_bits(np.array([seed], np.uint64), np.array([choice], np.uint32), np.array([position], np.uint32))
    assert bits.dtype == np.uint64
    assert bits.tolist() == [word[0] + (word[1] << 32)]
