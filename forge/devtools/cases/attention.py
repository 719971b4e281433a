"""Cases of paged attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from forge.devtools.cases.case import Case, normal
from forge.devtools.cases.kv_cache import random_pages
from forge.ops.attention import AttentionSpec
from forge.ops.kv_cache import KVPages
from forge.ops.op import Arrays


def attention_case(
    name: str,
    queries: list[int],
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    page_size: int = 4,
    window: int = 0,
    softcap: float = 0.0,
    *,
    is_deterministic: bool = False,
    has_sinks: bool = False,
    is_chunked: bool = False,
) -> Case:
    """Each sequence has its last `queries` of `lengths` positions; heads: (query heads, KV heads)."""

    def make(rng: np.random.Generator) -> Arrays:
        # Pages that lie wholly before the window of a row's first query were released.
        spec = AttentionSpec(dim**-0.5, window, softcap, is_deterministic, is_chunked=is_chunked)
        first = [
            spec.first_seen(length - asked) // page_size * page_size
            for length, asked in zip(lengths, queries, strict=True)
        ]
        kv, table = random_pages(rng, lengths, list(zip(first, lengths, strict=True)), page_size, heads[1], dim)
        starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        q = normal(rng, sum(queries), heads[0], dim)
        spec = replace(spec, sinks=2 * normal(rng, heads[0]) if has_sinks else None)
        return q, kv, starts, np.array(lengths, np.int32), table, spec

    return Case(name, make)


def _by_hand(rng: np.random.Generator) -> Arrays:
    """Scores 0 and ln 3 (key 1 at the second position), a sink of ln 4: weights 1/8 and 3/8 over values 8 and 16."""
    q = np.array([[[np.log(3)]]], np.float32)
    k = np.array([[[[0]], [[1]]]], np.float32)
    v = np.array([[[[8]], [[16]]]], np.float32)
    starts, lengths, table = (np.array(each, np.int32) for each in ([0, 1], [2], [[0]]))
    return q, KVPages(k, v), starts, lengths, table, AttentionSpec(1.0, 0, 0.0, sinks=np.array([np.log(4)], np.float32))


def _deterministic() -> Iterable[Case]:
    """Queries whose positions are split by blocks of their own: turns of 128 positions."""
    for name, queries, lengths, heads, dim, *rest in (
        ("one position", [1], [1], (2, 1), 8),
        ("turns", [1] * 6, [127, 128, 129, 255, 257, 1300], (2, 2), 64, 16),
        ("prompts and decode, one without tokens", [3, 1, 130, 2, 0], [3, 300, 130, 150, 1], (4, 1), 32, 16),
        ("window", [40, 1, 1], [60, 200, 3], (6, 2), 80, 16, 33),
        ("window of one", [2, 1], [140, 18], (2, 2), 64, 16, 1),
        ("soft cap", [2, 1], [10, 150], (5, 1), 96, 16, 0, 2.0),
        ("window and soft cap", [1, 30], [300, 31], (3, 1), 128, 16, 140, 1.5),
        ("small pages, odd heads", [5], [40], (2, 1), 20, 4),
        ("small pages, window", [3, 1], [40, 43], (2, 1), 8, 4, 6),
        ("heads of 256", [2], [150], (2, 1), 256, 16),
        ("heads as in an 8B model", [1, 2], [300, 17], (32, 8), 128, 16),
    ):
        yield attention_case(f"deterministic, {name}", queries, lengths, heads, dim, *rest, is_deterministic=True)


def _with_sinks() -> Iterable[Case]:
    """Heads as in gpt-oss: eight of 64 numbers for each KV head. The sink counts once, however positions are split."""
    for is_deterministic in (False, True):
        for name, queries, lengths, heads, dim, *rest in (
            ("decode", [1, 1, 1], [1, 129, 700], (8, 1), 64, 16),
            ("mixed, window", [40, 1, 1], [60, 200, 3], (16, 2), 64, 16, 33),
            ("soft cap, odd heads", [5, 1], [40, 300], (5, 1), 36, 16, 0, 2.0),
        ):
            kind = "deterministic, " if is_deterministic else ""
            yield attention_case(
                f"{kind}sinks, {name}",
                queries,
                lengths,
                heads,
                dim,
                *rest,
                is_deterministic=is_deterministic,
                has_sinks=True,
            )
    yield attention_case("sinks, 17 heads of a KV head", [70, 2], [70, 80], (17, 1), 128, 16, has_sinks=True)


CASES = {
    "paged_attention": [
        attention_case("decode, one position", [1], [1], (2, 1), 8),
        attention_case("decode at page edges", [1, 1, 1, 1], [3, 4, 5, 17], (6, 2), 64),
        attention_case("decode in several runs", [1, 1], [700, 150], (16, 1), 16, 64),
        attention_case("more query heads than a run may have scores", [1], [3], (1500, 1), 4),
        attention_case("prefill", [9], [9], (4, 4), 32),
        attention_case("prefill after a cached part", [5], [23], (4, 2), 32),
        attention_case("longer than a query block", [130, 140], [130, 300], (2, 1), 16, 64),
        attention_case("mixed", [1, 6, 1, 2], [12, 6, 1, 9], (8, 2), 80),
        attention_case("window", [1, 20, 7], [30, 20, 19], (4, 2), 16, 4, 6),
        attention_case("window of one", [1, 3], [9, 3], (2, 2), 16, 4, 1),
        attention_case("window as long as the context", [1, 16], [16, 16], (2, 2), 16, 4, 16),
        attention_case("soft cap", [1, 11], [25, 11], (4, 1), 256, 8, 0, 2.0),
        attention_case("window and soft cap", [33], [40], (4, 2), 24, 8, 10, 1.5),
        # Decode: one query of each sequence, with lengths around multiples of pages and tiles.
        *(
            attention_case(f"decode of {length}", [1], [length], (2, 1), 64, 16)
            for length in (15, 16, 17, 63, 64, 65, 127, 128, 129)
        ),
        attention_case("decode of long contexts", [1, 1, 1], [1, 129, 1023], (4, 2), 64, 16),
        attention_case("decode of 1500 positions, eight KV heads", [1], [1500], (8, 8), 32, 16),
        attention_case("decode, eight heads of one KV head, a long window", [1, 1], [400, 90], (8, 1), 128, 16, 200),
        attention_case("decode, a short window in a long context", [1, 1], [700, 20], (4, 1), 64, 16, 50),
        attention_case("decode, soft cap", [1], [300], (2, 1), 64, 16, 0, 2.0),
        *(
            attention_case(f"decode, {heads} heads of one KV head", [1, 1], [70, 9], (heads, 1), 32, 16)
            for heads in (3, 5, 9, 17)
        ),
        *(
            attention_case(f"decode, heads of {dim}", [1, 1], [20, 37], (6, 2), dim, 16)
            for dim in (4, 20, 36, 80, 96, 100, 128, 192, 256, 512)
        ),
        # Prefill: tiles of 16 to 128 rows, a query in a head each, and of 16 to 64 keys.
        *(
            attention_case(f"prefill of {count}", [count, 1], [count + 5, 3], (2, 1), 64, 16)
            for count in (31, 32, 33, 64, 65)
        ),
        *(
            attention_case(f"prefill of {count}, one head", [count], [count], (2, 2), 64, 16)
            for count in (2, 63, 64, 65)
        ),
        *(
            attention_case(f"prefill up to {length}", [3], [length], (1, 1), 32, 16)
            for length in (31, 32, 33, 63, 64, 65, 96, 97)
        ),
        *(
            attention_case(f"prefill, {heads} heads of one KV head", [13, 9], [40, 9], (2 * heads, 2), 32, 16)
            for heads in (3, 4, 5, 8)
        ),
        attention_case("prefill, a token's heads fill several tiles", [2], [5], (150, 1), 8),
        *(
            attention_case(f"prefill, heads of {dim}", [33], [40], (2, 1), dim, 16)
            for dim in (4, 20, 36, 80, 96, 100, 128, 192, 256, 512)
        ),
        attention_case("prefill, window over tiles", [70], [100], (2, 2), 32, 16, 40),
        *(
            attention_case(f"prefill, window of {window}", [68], [100], (1, 1), 32, 16, window)
            for window in (2, 31, 32, 33, 64, 99)
        ),
        attention_case("prefill, pages longer than tiles", [40, 3], [75, 50], (2, 1), 32, 50),
        attention_case("mixed, decode of a long context", [1, 70, 1, 1, 5], [300, 70, 129, 1, 90], (4, 1), 64, 16),
        attention_case(
            "mixed, many short prompts", [2, 1, 3, 2, 1, 1, 2, 4, 1], [2, 4, 30, 3, 8, 1, 40, 4, 33], (2, 1), 16
        ),
        attention_case("decode, heads as in an 8B model", [1, 1], [300, 17], (32, 8), 128, 16),
        attention_case("prefill, heads as in an 8B model", [35], [50], (32, 8), 128, 16),
        attention_case("mixed, window and soft cap", [40, 1, 1], [50, 200, 7], (4, 2), 80, 16, 30, 3.0),
        *_deterministic(),
        *_with_sinks(),
        attention_case("chunks, decode", [1, 1, 1, 1], [32, 33, 64, 200], (2, 1), 64, 16, 32, is_chunked=True),
        attention_case("chunks, mixed", [70, 1, 5], [100, 300, 35], (4, 2), 64, 16, 40, is_chunked=True),
        attention_case(
            "deterministic, chunks", [40, 1], [100, 300], (2, 1), 64, 16, 24, is_deterministic=True, is_chunked=True
        ),
        Case("by hand", _by_hand, expected=([[[7.0]]],)),
    ]
}
