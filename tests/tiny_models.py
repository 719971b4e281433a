"""Tiny random models behind engines of any size, so that tests can make pages scarce and steps short."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from forge import LLM, SamplingParams, Tokenizer, models
from forge.backend import NUMPY
from forge.engine import Engine, ModelRunner
from forge.formats import gguf
from forge.state.model_state import ModelState, kinds_of
from forge.state.paged_kv import PagedKV

ARCH = Path(__file__).parent / "data" / "arch"
CONTEXT = 96


def tiny_llm(
    name: str,
    *,
    num_pages: int | tuple[int, ...] = 200,
    page_size: int = 8,
    max_sequences: int = 16,
    max_step_tokens: int = 512,
    max_prefill_tokens: int | None = None,
    context: int = CONTEXT,
    windows: bool = True,
    prefix_caching: bool = True,
    deterministic: bool = False,
) -> LLM:
    """As forge.load, but with the sizes that it chooses.

    num_pages: Of each kind of layer state. windows=False: layers with a window keep all positions, as others do.
    """
    path = ARCH / name / "model.gguf"
    with gguf.read(path) as file:
        config = models.read_config(file, context)
        tokenizer = Tokenizer.from_metadata(file.metadata, source=str(path))
        decoder = models.build(file, config, NUMPY, is_deterministic=deterministic)
    step_tokens, itemsize = max(max_step_tokens, max_sequences), NUMPY.dtype.itemsize
    kinds = kinds_of(config, context=context, page_size=page_size, step_tokens=step_tokens, itemsize=itemsize)
    if not windows:
        kinds = (PagedKV(tuple(range(config.num_layers)), page_size, config.num_kv_heads, config.head_dim, itemsize),)
    counts = (num_pages,) * len(kinds) if isinstance(num_pages, int) else num_pages
    state = ModelState(kinds, counts, page_size, NUMPY)
    runner = ModelRunner(decoder, state, NUMPY, context=context, max_sequences=max_sequences)
    engine = Engine(
        runner,
        end_ids=tokenizer.eog_ids,
        max_step_tokens=max_step_tokens,
        max_prefill_tokens=max_prefill_tokens,
        prefix_caching=prefix_caching,
    )
    for pages in (array for cache in state.caches for array in cache.arrays):
        pages.fill(np.nan)  # a position that is read before it is written poisons the result
    return LLM(engine, tokenizer, None, path=path, notes=(), load_parts={}, load_ms=0.0)


def random_prompts(count: int, longest: int, *, seed: int = 0, vocabulary: int = 250) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def count_preemptions(llm: LLM) -> list[int]:
    """A list that grows by one for every sequence that gives up its pages."""
    scheduler, found = llm.engine.scheduler, []
    make_room = scheduler._make_room

    def counting(sequence: object, length: int) -> bool:
        before = len(scheduler.waiting)
        fits = make_room(sequence, length)  # type: ignore[arg-type]
        found.extend([1] * (len(scheduler.waiting) - before))
        return fits

    scheduler._make_room = counting  # type: ignore[method-assign]
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def settle(llm: LLM) -> None:
    """Wait until the engine's thread has done what it was asked for before."""
    if not llm._loop._has_ended:
        llm._loop.run(item for item in (1, 2))


def assert_idle(llm: LLM) -> None:
    settle(llm)
    engine = llm.engine
    assert not engine.has_work
    assert not engine._siblings
    assert not llm._loop.work
    assert not llm._loop.work.choices
    assert all(pool.num_free == pool.num_pages for pool in engine.pools)


GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.5, seed=11)
