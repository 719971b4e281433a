"""Steps that run ahead of their ids give the ids of steps that wait for them, and neither copy nor wait more."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, random_prompts, tiny_llm

from forge import LLM, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine.decode import DecodeLoop
from forge.engine.engine import Engine


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from here on run ahead, as on a GPU."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)


def texts(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    found = llm.generate(prompts, params)
    assert isinstance(found, list)
    assert_idle(llm)
    return [list(completion.ids) for completion in found]


@pytest.mark.parametrize("params", [GREEDY, SEEDED, SamplingParams(max_tokens=20, temperature=2.0, seed=3, n=3)])
@pytest.mark.parametrize("pages", [200, 14])
def test_ids_are_those_of_steps_that_wait(params: SamplingParams, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(7, 40)
    waiting = texts(tiny_llm("llama", num_pages=pages, max_sequences=5), prompts, params)
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    assert texts(tiny_llm("llama", num_pages=pages, max_sequences=5), prompts, params) == waiting


@pytest.mark.usefixtures("ahead")
def test_a_stop_drops_the_step_behind_it() -> None:
    llm = tiny_llm("llama")
    whole = texts(llm, [[5, 6, 7]], GREEDY)[0]
    stop = whole[7]
    cut = whole[: whole.index(stop)]
    assert texts(llm, [[5, 6, 7]], SamplingParams(max_tokens=20, ignore_eos=True, stop_ids=[stop])) == [cut]
    assert texts(llm, [[5, 6, 7]], GREEDY) == [whole]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("params", [{"logprobs": 2}, {"repetition_penalty": 1.3}, {"logit_bias": {3: 5.0}}])
def test_what_needs_each_id_at_once_gets_it(params: dict[str, object]) -> None:
    llm = tiny_llm("llama")
    alone = texts(llm, [[9, 8, 7]], SamplingParams(max_tokens=12, ignore_eos=True, **params))
    both = llm.generate([[9, 8, 7], [1, 2]], SamplingParams(max_tokens=12, ignore_eos=True, **params))
    assert isinstance(both, list)
    assert list(both[0].ids) == alone[0]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(
    ("owner", "name", "stopped", "done"),
    [
        (NumpyBackend, "record", (2, 5), False),
        (NumpyBackend, "upload", (2, 5), False),
        (NumpyBackend, "read", (2, 5), False),
        *((DecodeLoop, "collect", (5, 11, 12), done) for done in (False, True)),
        *((Engine, "_append", (5, 11, 12), done) for done in (False, True)),
    ],
)
def test_an_interrupted_step_loses_nothing(
    owner: type, name: str, stopped: tuple[int, ...], done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts at some calls of a method, before it did its work or after."""
    prompts = random_prompts(3, 20)
    expected = texts(tiny_llm("llama"), prompts, GREEDY)
    llm = tiny_llm("llama")
    sequences = [llm.engine.add(prompt, GREEDY)[0] for prompt in prompts]
    calls = Counter[str]()
    real = getattr(owner, name)

    def sometimes(self: object, *args: object) -> object:
        calls[name] += 1
        stops = calls[name] in stopped
        if stops and not done:
            raise KeyboardInterrupt
        result = real(self, *args)
        if stops:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, sometimes)
    while llm.engine.has_work:
        try:
            llm.engine.step()
        except KeyboardInterrupt:
            continue
    assert [s.completion for s in sequences] == expected


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the backend's methods that copy, by name."""
    counts = Counter[str]()
    for name in ("upload", "read", "asarray", "to_numpy"):
        real = getattr(NumpyBackend, name)

        def counted(self: NumpyBackend, *args: object, name: str = name, real: object = real) -> object:
            counts[name] += 1
            return real(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(NumpyBackend, name, counted)
    return counts


@pytest.mark.usefixtures("ahead")
def test_64_steps_read_once_each_and_upload_once_where_there_are_new_pages(calls: Counter[str]) -> None:
    llm = tiny_llm("llama", page_size=8, context=96)
    for prompt in ([1, 2, 3], [4, 5, 6, 7, 8, 9]):
        llm.engine.add(prompt, SamplingParams(max_tokens=90, ignore_eos=True))
    for _ in range(3):
        llm.engine.step()
    calls.clear()
    uploads = Counter[tuple[int, int]]()
    for _ in range(64):
        pages = sum(len(s.pages) for s in llm.engine.scheduler.running)
        before = calls["upload"]
        assert len(llm.engine.step()) == 2
        pages = sum(len(s.pages) for s in llm.engine.scheduler.running) - pages
        uploads[pages, calls["upload"] - before] += 1
    assert uploads == {(0, 0): 48, (1, 1): 16}
    assert calls == {"read": 64, "upload": 16}


@pytest.mark.usefixtures("ahead")
def test_a_step_uploads_the_new_pages_of_all_rows_at_once_and_only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = NumpyBackend.upload

    def sized(self: NumpyBackend, array: np.ndarray, values: np.ndarray) -> None:
        sizes.append(values.nbytes)
        real(self, array, values)

    monkeypatch.setattr(NumpyBackend, "upload", sized)
    llm = tiny_llm("llama", page_size=8, context=96)
    for prompt in ([1, 2, 3], [4, 5, 6], [7, 8, 9]):
        llm.engine.add(prompt, SamplingParams(max_tokens=30, ignore_eos=True))
    llm.engine.step()
    del sizes[:]
    while llm.engine.has_work:
        llm.engine.step()
    begun, *later = sizes
    assert begun == 8 * 3 * (9 + 1)  # an index and a value for each of nine words and a page
    assert later == [8 * 3] * 3  # of 33 ids the last is not computed: 32 are on four pages


@pytest.mark.usefixtures("ahead")
def test_a_loop_begins_with_one_upload(calls: Counter[str]) -> None:
    llm = tiny_llm("llama", page_size=8, context=96)
    for _ in range(5):
        llm.engine.add(list(range(1, 50)), GREEDY)
    llm.engine.step()
    calls.clear()
    llm.engine.step()  # begins, and launches two steps
    assert calls == {"upload": 1, "read": 2}


@pytest.mark.usefixtures("ahead")
def test_pages_hold_what_was_computed_when_a_long_prompt_joins() -> None:
    llm = tiny_llm("gemma3", max_step_tokens=8)
    first = llm.engine.add([3, 1, 4], GREEDY)[0]
    for _ in range(5):
        llm.engine.step()
    second = llm.engine.add(list(range(1, 30)), GREEDY)[0]
    while llm.engine.has_work:
        llm.engine.step()
    fresh = tiny_llm("gemma3")
    assert [first.completion, second.completion] == texts(fresh, [[3, 1, 4], list(range(1, 30))], GREEDY)
    assert np.isfinite(fresh.logits([1, 2])).all()
