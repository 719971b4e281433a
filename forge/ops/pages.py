"""Whole-page operations on the KV cache."""

from __future__ import annotations

import numpy as np

from forge.op import Array, Case, op


@op(
    "&pages:act[N,P,G,D] source:i32 target:i32",
    cases=[Case("copy", lambda rng: (rng.standard_normal((4, 3, 2, 5)).astype(np.float32), 1, 3))],
)
def copy_page(pages: Array, source: int, target: int) -> None:
    """pages[target] = pages[source]: a forked sequence gets its own copy of a partly filled page."""
    pages[target] = pages[source]
