"""Philox4x32-10: random numbers as a function of a key and a counter, with no state to keep or to share.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, doi:10.1145/2063384.2063405.
NumPy's own `np.random.Philox` is another member of the family (4x64-10) and gives other numbers; 32-bit words are what
a GPU multiplies fast.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)


def philox4x32(counter: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Four random words for each counter and key: u32[...,4], u32[...,2] -> u32[...,4]; leading dims broadcast."""
    even, odd = counter[..., 0::2].astype(np.uint64), counter[..., 1::2].astype(np.uint64)  # words 0 2, words 1 3
    round_key = key.astype(np.uint64)
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS
        even = (product >> _HALF)[..., ::-1] ^ odd ^ round_key
        odd = (product & _LOW)[..., ::-1]
        round_key = (round_key + _KEY_STEPS) & _LOW
    return np.stack([even, odd], axis=-1).astype(np.uint32).reshape(*even.shape[:-1], 4)


def random_bits(
    seed: npt.NDArray[np.uint64], choice: npt.NDArray[np.uint32], position: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint64]:
    """64 random bits per row: u64[B], u32[B], u32[B] -> u64[B].

    The key is the seed (low word first), the counter (position, choice, 0, 0), the result word 0 + 2**32 * word 1.
    """
    key = np.stack([seed & _LOW, seed >> _HALF], axis=-1).astype(np.uint32)
    zero = np.zeros_like(position)
    words = philox4x32(np.stack([position, choice, zero, zero], axis=-1), key).astype(np.uint64)
    bits: npt.NDArray[np.uint64] = words[..., 0] | words[..., 1] << _HALF
    return bits
