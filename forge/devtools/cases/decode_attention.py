"""Cases of a decode step's attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.devtools.cases.case import Case, normal
from forge.devtools.cases.kv_cache import random_pages
from forge.devtools.cases.rope import random_rope
from forge.ops.attention import AttentionSpec
from forge.ops.kv_cache import KVPages
from forge.ops.op import Arrays
from forge.ops.rope import RopeArgs


def decode_case(
    name: str,
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    style: str = "neox",
    *,
    rotated: int | None = None,
    extras: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    page_size: int = 16,
    more_pages: int = 0,
    has_sinks: bool = False,
    is_chunked: bool = False,
    values_are_keys: bool = False,
    rest: int = 0,
) -> Case:
    """`more_pages`: columns of the page table beyond those of the longest sequence."""

    def make(rng: np.random.Generator) -> Arrays:
        # The op writes the last position. Pages that lie wholly before its window were released.
        first = [max(length - window, 0) // page_size * page_size if window else 0 for length in lengths]
        filled = [(start, length - 1) for start, length in zip(first, lengths, strict=True)]
        kv, table = random_pages(rng, lengths, filled, page_size, heads[1], dim, more_pages)
        rows, last = len(lengths), np.array(lengths, np.int32) - 1
        slot_mapping = table[np.arange(rows), last // page_size] * page_size + last % page_size
        kinds: dict[str, Any] = {"extras": extras, "values_are_keys": values_are_keys, "rest": rest}
        qkv, rope = random_rope(rng, rows, heads, dim, max(lengths), dim if rotated is None else rotated, **kinds)
        sinks = 2 * normal(rng, heads[0]) if has_sinks else None
        spec = AttentionSpec(dim**-0.5, window, softcap, sinks=sinks, is_chunked=is_chunked)
        return qkv, rope, last + 1, slot_mapping, kv, table, spec

    return Case(name, make, {"style": style})


def _by_hand(style: str, value: float) -> Case:
    """At position 1, a quarter turn makes (ln 3, 0) of the query and (1, 0) of the key, in either style; the key before
    is zero. Scores 0 and ln 3, a sink of ln 4: weights 1/8 and 3/8 over values 8 and 16."""

    def make(rng: np.random.Generator) -> Arrays:
        qkv = np.array([[0, -np.log(3), 0, -1, 16, value]], np.float32)
        rope = RopeArgs(None, None, None, np.array([[[1, 0]], [[0, 1]]], np.float32), None, 0.0)
        kv = KVPages(np.zeros((1, 2, 1, 2), np.float32), np.array([[[[8, 0]], [[0, 0]]]], np.float32))
        lengths, slot_mapping, table = (np.array(each, np.int32) for each in ([2], [1], [[0]]))
        spec = AttentionSpec(1.0, 0, 0.0, sinks=np.array([np.log(4)], np.float32))
        return qkv, rope, lengths, slot_mapping, kv, table, spec

    written = [[[[0, 0]], [[1, 0]]]], [[[[8, 0]], [[16, value]]]]
    return Case(f"{style} by hand", make, {"style": style}, ([[[7, 0.375 * value]]],), written)


CASES = {
    "decode_attention": [
        decode_case("one position", [1], (2, 1), 8),
        decode_case("interleaved, one position", [1], (1, 1), 64, "interleaved"),
        decode_case("page edges", [16, 17, 32, 33], (6, 2), 64),
        # Split-KV: lengths around the 64 positions that a split has at least, and around what a block takes at a time.
        *(
            decode_case(f"{length} positions", [length], (2, 1), 64)
            for length in (2, 63, 64, 65, 66, 127, 128, 129, 130)
        ),
        decode_case("interleaved, 129 positions", [129], (4, 2), 64, "interleaved"),
        decode_case("long contexts and short ones", [1, 130, 1023], (4, 2), 64, extras=True),
        decode_case("interleaved, long contexts and short ones", [700, 3], (4, 2), 64, "interleaved", extras=True),
        decode_case("more positions than the shortest splits hold", [1500], (8, 8), 32),
        decode_case("a page table for a longer context", [200, 5], (4, 1), 64, more_pages=90),
        decode_case("one row of one head, in as many splits as there can be", [1300], (1, 1), 32, more_pages=20),
        decode_case("window over splits", [400, 90], (8, 1), 128, window=200),
        decode_case("window shorter than a split", [700, 20], (4, 1), 64, window=50),
        decode_case("window of one", [9, 1], (2, 2), 16, window=1, extras=True),
        decode_case("window as long as the context", [16], (4, 2), 16, window=16),
        decode_case("soft cap over splits", [300], (2, 1), 64, softcap=2.0),
        decode_case(
            "soft cap, interleaved, bias and norms", [300, 1], (4, 1), 256, "interleaved", softcap=1.5, extras=True
        ),
        *(decode_case(f"{heads} heads of one KV head", [70, 9], (heads, 1), 32) for heads in (3, 5, 6, 7, 9, 17)),
        decode_case("heads as in an 8B model", [300, 17], (32, 8), 128),
        decode_case("heads as in a 0.5B model", [130], (14, 2), 64, extras=True),
        decode_case("chunks of heads of several KV heads, in splits", [200, 65], (10, 2), 64, extras=True),
        *(
            decode_case(f"heads of {dim}", [20, 137], (6, 2), dim)
            for dim in (4, 20, 36, 70, 80, 96, 100, 128, 192, 256)
        ),
        *(
            decode_case(
                f"{style}, {rotated} of {dim} numbers rotated, bias and norms",
                [20, 37],
                (6, 2),
                dim,
                style,
                rotated=rotated,
                extras=True,
            )
            for style in ("neox", "interleaved")
            for dim, rotated in ((80, 32), (96, 96), (36, 20), (64, 2))
        ),
        decode_case("pages longer than splits", [140, 3], (2, 1), 32, page_size=100),
        decode_case("window from a page that begins within a tile", [160, 3], (2, 1), 32, window=55, page_size=100),
        decode_case("values are keys", [130, 17], (6, 2), 64, extras=True, values_are_keys=True),
        decode_case("a gate behind the values", [20, 1], (4, 2), 36, "interleaved", rotated=20, extras=True, rest=150),
        decode_case("chunks", [96, 97, 300], (4, 2), 64, window=96, is_chunked=True),
        decode_case("sinks over splits", [1, 130, 1023], (8, 1), 64, extras=True, has_sinks=True),
        decode_case("sinks, one split, window, soft cap", [20, 9], (10, 2), 80, window=12, softcap=2.0, has_sinks=True),
        _by_hand("neox", 4.0),
        _by_hand("interleaved", 4.0),
    ]
}
