"""Gemma 3 with pages of windows: a third of the memory, and the ids of a model whose layers hold all positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import forge
from forge import planning
from forge.backend import NUMPY
from forge.config import EngineConfig, ModelConfig, SamplingParams
from forge.formats import gguf
from forge.state import budget
from forge.state.kind import Kind
from forge.state.paged_kv import PagedKV

pytestmark = pytest.mark.slow
CONTEXT = 32_768
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
REQUESTS = {"greedy": GREEDY, "sampled forks": replace(GREEDY, temperature=0.9, seed=5, n=3)}


def plain(config: ModelConfig, *, page_size: int, itemsize: int, **_: Any) -> tuple[PagedKV, ...]:
    """All layers hold all positions, as in releases before 0.2."""
    return (PagedKV(tuple(range(config.num_layers)), page_size, config.num_kv_heads, config.head_dim, itemsize),)


@pytest.fixture(scope="module")
def prompts(gemma3_path: Path) -> list[list[int]]:
    """Of 1,340 tokens, in three chunks, and of 40: the window is 512. The fifth new id begins a page."""
    text = Path(__file__).parents[1].joinpath("data/golden/ppl_passage.txt").read_text()
    ids = forge.load_tokenizer(gemma3_path).encode_prompt(text)
    assert len(ids) >= 1340
    return [ids[:1340], ids[:40]]


@pytest.fixture(scope="module")
def expected(gemma3_path: Path, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "kinds_of", plain)
        with forge.load(gemma3_path, device="cpu", context=CONTEXT) as llm:
            assert [kind.name for kind in llm.engine.runner.kinds] == ["all positions"]
            return {name: ids(llm, prompts, params) for name, params in REQUESTS.items()}


def ids(llm: forge.LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    found = llm.generate(prompts, params)
    assert isinstance(found, list)
    return [completion.ids for completion in found]


@pytest.mark.parametrize("max_sequences", [None, 1])
def test_a_context_of_32k_takes_a_third_of_what_it_took(
    gemma3_path: Path, max_sequences: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forge.load(gemma3_path, device="cpu", context=CONTEXT, max_sequences=max_sequences) as llm:
        state = llm.engine.runner.state
        taken = sum(array.nbytes for cache in state.caches for array in cache.arrays)
        assert budget.bytes_of(state.kinds, state.num_pages) == taken
        config = llm.config
    one_layer_token = 2 * config.num_kv_heads * config.head_dim * 4
    whole, window = state.kinds
    assert (whole.name, whole.token_bytes) == ("all positions", 3 * one_layer_token)
    assert (window.name, round(window.num_pages(CONTEXT) * window.page_bytes / 1e5)) == ("window of 512", 334)
    before = (512 + 1) * 64 * config.num_layers * one_layer_token
    assert 3 * taken <= before
    with gguf.read(gemma3_path) as file:
        monkeypatch.setattr(planning, "kinds_of", plain)
        settings = EngineConfig(context=CONTEXT, max_sequences=max_sequences)
        plan = planning.make_plan(file, settings, NUMPY)
    assert budget.bytes_of(plan.kinds, plan.num_pages) == before


def test_ids_are_those_of_layers_that_hold_all_positions(
    gemma3_path: Path, prompts: list[list[int]], expected: dict[str, list[list[int]]]
) -> None:
    with forge.load(gemma3_path, device="cpu", context=CONTEXT) as llm:
        assert [kind.name for kind in llm.engine.runner.kinds] == ["all positions", "window of 512"]
        assert {name: ids(llm, prompts, params) for name, params in REQUESTS.items()} == expected


def test_forks_whose_windows_find_no_pages_are_computed_again(
    gemma3_path: Path,
    prompts: list[list[int]],
    expected: dict[str, list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scarce(kinds: Sequence[Kind], context: int, *_: Any) -> tuple[int, ...]:
        plain, window = budget.pages_of(kinds, context)
        return plain, window

    monkeypatch.setattr(budget, "share_out", scarce)
    with forge.load(gemma3_path, device="cpu", context=CONTEXT) as llm:
        preempted = count_preemptions(llm)
        found = ids(llm, prompts[:1], replace(GREEDY, n=5))  # the most probable ids do not depend on the last bits
        assert found == 5 * expected["greedy"][:1]
        assert preempted()


def count_preemptions(llm: forge.LLM) -> Callable[[], int]:
    scheduler, count = llm.engine.scheduler, 0
    preempt = scheduler.preempt

    def counted() -> Any:
        nonlocal count
        count += 1
        return preempt()

    scheduler.preempt = counted  # type: ignore[method-assign]
    return lambda: count
