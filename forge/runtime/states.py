"""What the engine's thread does for a `State`: its pages are computed, forked, read and written."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forge.config import SamplingParams
from forge.engine import Engine
from forge.engine.passes import job_of
from forge.engine.prefix_cache import can_share
from forge.engine.stored_pages import StoredPart, read_part, stored_parts, write_part
from forge.errors import UnsupportedError
from forge.hooks.scope import Hooks
from forge.runtime.loop import EngineLoop
from forge.runtime.request import Hold

Logits = npt.NDArray[np.float32]


class Computed(NamedTuple):
    """Ids whose state is computed."""

    hold: Hold
    logits: Logits | None
    """Of the last one, (V,). None = not computed."""

    @property
    def ids(self) -> list[int]:
        return self.hold.sequence.ids


def computed(
    loop: EngineLoop,
    engine: Engine,
    ids: list[int],
    adapter: int,
    hooks: Hooks,
    start: Hold | None = None,
    *,
    is_kept: bool = True,
) -> Generator[None, None, Computed]:
    """A state of ids, of which `start` has the first ones; `start` itself, with logits, unless it is to be kept.

    hooks: See what is computed, which is not what `start` has.
    """
    if not can_share(engine.runner.kinds, engine.runner.page_size):
        raise UnsupportedError("layers of this model keep a recurrence, which states do not hold yet")
    job = job_of(ids, [len(ids) - 1], adapter, start.sequence if start else None, hooks)
    job.is_kept = is_kept
    row = np.zeros(0, np.float32)
    with closing(engine.run_jobs([job])) as steps:
        for part, of_jobs in steps:
            if of_jobs:
                row = np.array(engine.runner.backend.to_numpy(part)[0])
            yield
    if not is_kept:
        assert start is not None
        return Computed(start, row)
    return Computed(loop.hold(job.sequence), row)


def rolled_back(loop: EngineLoop, engine: Engine, state: Hold, length: int) -> Generator[None, None, Computed]:
    """A state of the first `length` ids of another one."""
    yield
    return Computed(loop.hold(engine.fork_state(state.sequence, length)), None)


def read(engine: Engine, state: Hold) -> Generator[None, None, dict[str, npt.NDArray[Any]]]:
    """What a state's pages hold, (S, ...) of each array: its last S positions, from a page's start on."""
    found, length = {}, state.sequence.num_computed
    for part in stored_parts(engine.runner.state):
        pages, first = _held(engine, part, state)
        found[part.name] = read_part(part, pages, length - first * part.page_size, engine.runner.backend)
        yield
    return found


def _held(engine: Engine, part: StoredPart, state: Hold) -> tuple[list[int], int]:
    """The pages that a state has of a part, and how many there were before these."""
    listed = state.sequence.pages[part.kind]
    pages = engine.scheduler.pools[part.kind].held(listed)
    return pages, len(listed) - len(pages)


def written(
    loop: EngineLoop,
    engine: Engine,
    ids: list[int],
    adapter: int,
    arrays: dict[str, npt.NDArray[Any]],
    logits: Logits,
) -> Generator[None, None, Computed]:
    """A state of ids from arrays as `read` gives them."""
    parts, released = stored_parts(engine.runner.state), [0] * len(engine.runner.kinds)
    for part in parts:
        released[part.kind] = (len(ids) - len(arrays[part.name])) // part.page_size
    hold = loop.hold(engine.scheduler.new_state(ids, SamplingParams(), adapter, released))  # given back if it fails
    for part in parts:
        write_part(part, _held(engine, part, hold)[0], arrays[part.name], engine.runner.backend)
        yield
    return Computed(hold, logits)
