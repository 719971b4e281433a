"""Passes over all positions of ids that no request has, in steps of their own beside those of requests."""

from __future__ import annotations

from collections.abc import Callable, Generator
from traceback import clear_frames
from typing import TypeVar

from forge.config import SamplingParams
from forge.engine.scheduler import Scheduled, Scheduler
from forge.engine.sequence import Sequence
from forge.errors import OutOfMemoryError

T = TypeVar("T")
LOGIT_BYTES = 128 << 20
"""Memory of the logits that are computed together where all positions' are wanted."""
MAX_TOKENS = 1024
"""Tokens of a step, at most: its arrays lie beside those of requests' steps."""


def run_pass(
    scheduler: Scheduler, ids: list[int], most: int, run: Callable[[list[Scheduled]], T], adapter: int = -1
) -> Generator[T, None, None]:
    """Run steps over ids, of `most` tokens at most; yields what `run` returns. adapter: As of `Sequence`.

    Beside running sequences a step has no more tokens than a step of theirs has prompt tokens. Where pages run out, the
    youngest of them give theirs up. Raises OutOfMemoryError where other passes hold the pages that it needs.
    """
    sequence = Sequence(0, list(ids), len(ids), SamplingParams(), 0, len(ids), adapter=adapter)
    if not scheduler.reserve(sequence):
        raise OutOfMemoryError(
            f"a pass over {len(ids)} positions needs pages of the KV cache that other passes hold, which are not "
            "read to their ends: read or close them first"
        )
    try:
        while (start := sequence.num_computed) < len(ids):
            rows = scheduler.max_prefill_tokens if scheduler.running else scheduler.max_step_tokens
            count = min(most, rows, MAX_TOKENS, len(ids) - start)
            scheduler.reserve_more(sequence, start + count)
            yield run([Scheduled(sequence, start, count)])
            sequence.num_computed = start + count
    except BaseException as error:
        clear_frames(error.__traceback__)
        raise
    finally:
        scheduler.release(sequence)
