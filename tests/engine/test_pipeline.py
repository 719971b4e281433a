"""Steps that run ahead of their ids give the ids of steps that wait for them, and neither copy nor wait more."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, random_prompts, tiny_llm

from forge import LLM, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine.engine import Engine
from forge.engine.graph_cache import GraphCache
from forge.engine.pipeline import StepPipeline
from forge.engine.request_table import RequestTable
from forge.engine.scheduler import Scheduled
from forge.engine.sequence import Sequence


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from here on run ahead, as on a GPU."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)


def texts(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    found = llm.generate(prompts, params)
    assert isinstance(found, list)
    assert_idle(llm)
    return [list(completion.ids) for completion in found]


@pytest.mark.parametrize(
    "params",
    [GREEDY, SEEDED, pytest.param(SamplingParams(max_tokens=20, temperature=2.0, seed=3, n=3), marks=pytest.mark.slow)],
)
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
    assert texts(llm, [[5, 6, 7]], SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=[stop])) == [cut]
    assert texts(llm, [[5, 6, 7]], GREEDY) == [whole]


PENALIZED = replace(
    GREEDY, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={3: 4.0, 9: -math.inf}
)
KINDS = {
    "logprobs": replace(GREEDY, logprobs=2),
    "own logprobs": replace(SEEDED, logprobs=0),
    "repetition": replace(GREEDY, repetition_penalty=1.3),
    "presence": replace(SEEDED, presence_penalty=1.5),
    "frequency": replace(GREEDY, frequency_penalty=0.8),
    "bias": replace(GREEDY, logit_bias={3: 5.0}),
    "everything": replace(PENALIZED, logprobs=3),
}


def run_together(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[tuple[list[int], list[Any]]]:
    """The ids of each request, and its log probabilities."""
    found: dict[Sequence, list[Any]] = {llm.engine.add(*request)[0]: [] for request in requests}
    while llm.engine.has_work:
        for token in llm.engine.step():
            if token.sequence.finish_reason in (None, "length"):
                found[token.sequence].append(token.logprobs)
    assert_idle(llm)
    return [(sequence.completion, logprobs) for sequence, logprobs in found.items()]


def assert_same(got: list[tuple[list[int], list[Any]]], wanted: list[tuple[list[int], list[Any]]]) -> None:
    """Log probabilities within float32: rows of a step that runs ahead of an end are one more than those that wait."""
    for (ids, logprobs), (wanted_ids, wanted_logprobs) in zip(got, wanted, strict=True):
        assert ids == wanted_ids
        assert len(logprobs) == len(ids)
        for one, other in zip(logprobs, wanted_logprobs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.id == other.id
                assert [token for token, _ in one.top] == [token for token, _ in other.top]
                values = [[entry.logprob, *(value for _, value in entry.top)] for entry in (one, other)]
                assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_what_changes_or_describes_an_id_is_that_of_steps_that_wait(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ([7, 3, 200, 3], params)
    wanted = run_together(tiny_llm("gemma3"), [request])
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    got = run_together(tiny_llm("gemma3"), [request])
    assert_same(got, wanted)


@pytest.mark.parametrize("pages", [pytest.param(200, marks=pytest.mark.slow), 14])
def test_so_it_is_in_batches_of_all_kinds(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [GREEDY, *KINDS.values(), SEEDED]
    params = [replace(kind, max_tokens=20 + i % 4) for i, kind in enumerate(kinds)]
    requests = list(zip(random_prompts(9, 40), params, strict=True))
    sizes = {"num_pages": pages, "max_sequences": 5}
    wanted = run_together(tiny_llm("gemma3", **sizes), requests)
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    assert_same(run_together(tiny_llm("gemma3", **sizes), requests), wanted)


@pytest.mark.usefixtures("ahead")
def test_a_penalized_request_leaves_nothing_behind() -> None:
    """Its slot and its history serve the next one."""
    llm = tiny_llm("gemma3")
    wanted = run_together(llm, [([5, 6], GREEDY), ([5, 6], KINDS["repetition"])])
    run_together(llm, [([9, 8, 7], PENALIZED), ([1, 2], PENALIZED), ([3], PENALIZED)])
    assert_same(run_together(llm, [([5, 6], GREEDY), ([5, 6], KINDS["repetition"])]), wanted)


@pytest.mark.usefixtures("ahead")
def test_steps_with_and_without_draws_are_recorded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows and pages: a recorded step of greedy ids alone draws none."""
    recorded = Counter[str]()
    real = NumpyBackend.capture

    def counted(self: NumpyBackend, *args: Any) -> Any:
        recorded["steps"] += 1
        return real(self, *args)

    monkeypatch.setattr(NumpyBackend, "capture", counted)
    llm = tiny_llm("llama")
    counts = []
    for params in (GREEDY, SEEDED, GREEDY, SEEDED):
        texts(llm, [[5, 6, 7]], params)
        counts.append(recorded["steps"])
    assert counts == [counts[0], 2 * counts[0], 2 * counts[0], 2 * counts[0]]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(
    ("owner", "name", "stopped", "done"),
    [
        (NumpyBackend, "capture", (1, 2), False),
        (NumpyBackend, "upload", (2, 5), False),
        (NumpyBackend, "record_event", (2, 5), False),
        *((GraphCache, "run", (2, 5), done) for done in (False, True)),
        *((StepPipeline, "collect", (5, 11, 12), done) for done in (False, True)),
        *((Engine, "_append", (5, 11, 12), done) for done in (False, True)),
    ],
)
@pytest.mark.parametrize(
    "params",
    [
        pytest.param(GREEDY, id="greedy", marks=pytest.mark.slow),
        pytest.param(replace(PENALIZED, logprobs=1), id="penalized"),
    ],
)
def test_a_step_that_fails_ends_its_sequences_and_leaves_nothing_behind(
    owner: type,
    name: str,
    stopped: tuple[int, ...],
    done: bool,
    params: SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Failures at some calls of a method, before it did its work or after. Each time the requests are made anew."""
    prompts = random_prompts(3, 20)
    expected = texts(tiny_llm("llama"), prompts, params)
    llm = tiny_llm("llama")
    calls = Counter[str]()
    real = getattr(owner, name)

    def sometimes(self: object, *args: object, **options: object) -> object:
        calls[name] += 1
        stops = calls[name] in stopped
        if stops and not done:
            raise RuntimeError
        result = real(self, *args, **options)
        if stops:
            raise RuntimeError
        return result

    monkeypatch.setattr(owner, name, sometimes)
    failures = 0
    while True:
        sequences = [llm.engine.add(prompt, params)[0] for prompt in prompts]
        try:
            while llm.engine.has_work:
                llm.engine.step()
            break
        except RuntimeError:
            failures += 1
        assert_idle(llm)
        for sequence, wanted in zip(sequences, expected, strict=True):
            assert sequence.finish_reason in ("error", "length")
            assert sequence.completion == wanted[: len(sequence.completion)]
    assert failures == len(stopped)
    assert [s.completion for s in sequences] == expected


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Copies from and to the device and marks, by the method of the backend that makes them."""
    counts = Counter[str]()
    for name in ("upload", "record_event", "asarray", "to_numpy"):
        real = getattr(NumpyBackend, name)

        def counted(self: NumpyBackend, *args: object, name: str = name, real: object = real) -> object:
            counts[name] += 1
            return real(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(NumpyBackend, name, counted)
    return counts


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("params", [GREEDY, replace(PENALIZED, logprobs=5)], ids=["greedy", "penalized"])
def test_64_steps_are_marked_once_each_and_upload_once_where_there_are_new_pages(
    params: SamplingParams, calls: Counter[str]
) -> None:
    llm = tiny_llm("llama", page_size=8, context=96)
    for prompt, kind in (([1, 2, 3], GREEDY), ([4, 5, 6, 7, 8, 9], params)):
        llm.engine.add(prompt, replace(kind, max_tokens=90))
    for _ in range(3):
        llm.engine.step()
    calls.clear()
    uploads = Counter[tuple[int, int]]()
    for _ in range(64):
        pages = sum(len(s.pages[0]) for s in llm.engine.scheduler.running)
        before = calls["upload"]
        assert len(llm.engine.step()) == 2
        pages = sum(len(s.pages[0]) for s in llm.engine.scheduler.running) - pages
        uploads[pages, calls["upload"] - before] += 1
    assert uploads == {(0, 0): 48, (1, 1): 16}
    assert calls == {"record_event": 64, "upload": 16}


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
    assert sizes == [8 * 3] * 3  # of 33 ids the last is not computed: 32 are on four pages


@pytest.mark.usefixtures("ahead")
def test_a_sequence_that_joins_or_leaves_uploads_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five rows in a bucket of eight, and nothing of those that go on."""
    edits: list[np.ndarray] = []
    real = NumpyBackend.upload

    def noted(self: NumpyBackend, array: np.ndarray, values: np.ndarray) -> None:
        if values.ndim == 2:
            edits.append(values.copy())
        real(self, array, values)

    llm = tiny_llm("llama", page_size=64, context=96)
    for number in range(5):
        llm.engine.add([1, 2, number], replace(GREEDY, max_tokens=60))
    for _ in range(4):
        llm.engine.step()
    assert llm.engine.runner.pipeline
    table = llm.engine.runner.pipeline.table
    monkeypatch.setattr(NumpyBackend, "upload", noted)
    joins = llm.engine.add([4, 5, 6], GREEDY)[0]
    llm.engine.step()
    fields = {table._starts[name] + w * 5 + k for name, w in widths(table) for k in range(w)}
    assert len(edits) == 1
    joined = {row_of(table, int(index)) for index, _ in edits[0][:-2]}
    assert joined == {5}
    assert len(edits[0]) == len(fields) + 2  # a page, and the count of steps
    del edits[:]
    llm.engine.finish(joins, "abort")
    llm.engine.step()
    assert [{row_of(table, int(index)) for index, _ in values[:-1]} for values in edits] == [{5}]


@pytest.mark.usefixtures("ahead")
def test_a_first_id_does_not_wait_for_the_next_step_to_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    real = NumpyBackend.capture

    def noted(self: NumpyBackend, *args: Any) -> Any:
        recorded.append(args)
        return real(self, *args)

    monkeypatch.setattr(NumpyBackend, "capture", noted)
    llm = tiny_llm("llama")
    (sequence,) = llm.engine.add([1, 2, 3], GREEDY)
    assert [token.sequence for token in llm.engine.step()] == [sequence]
    assert not recorded
    llm.engine.step()
    assert len(recorded) == 1


def widths(table: RequestTable) -> list[tuple[str, int]]:
    """Words of a row in each field of the table."""
    return [(name, table.fields[name].itemsize // 4) for name in table._starts]


def row_of(table: RequestTable, index: int) -> int | None:
    """The row to which a word of the table's fields belongs."""
    for name, width in widths(table):
        start = table._starts[name]
        if start <= index < start + width * table.num_rows:
            return (index - start) // width
    return None


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("params", [GREEDY, PENALIZED], ids=["greedy", "penalized"])
def test_steps_with_prompts_wait_as_little_as_others(params: SamplingParams, calls: Counter[str]) -> None:
    """While prompts arrive, in chunks, beside others that decode: each step is marked once, and uploaded with the rows
    that changed in two copies. One more step is always under way, and nothing is read but the ids of the oldest."""
    llm = tiny_llm("llama", max_prefill_tokens=9, max_sequences=8, num_pages=400)
    steps = Counter[str]()
    pipeline = llm.engine.runner.pipeline
    assert pipeline
    real = pipeline.launch

    def noted(step: list[Scheduled], forks: object) -> bool:
        steps["mixed" if {entry.sequence.row is None for entry in step} == {True, False} else "other"] += 1
        return real(step, forks)  # type: ignore[arg-type]

    pipeline.launch = noted  # type: ignore[assignment, method-assign]
    for turn in range(3):  # a step is captured when nothing is under way, anew where there is a larger history
        sequences = llm.engine.add([1, 2, 3], replace(params, max_tokens=80))
        llm.engine.step()
        calls.clear()
        steps.clear()
        for number, prompt in enumerate(random_prompts(6, 30, seed=3 + turn)):
            sequences += llm.engine.add(prompt, replace(params, max_tokens=20 + number))
            for _ in range(6):
                llm.engine.step()
                assert pipeline.num_queued == 1 or turn < 2
        for sequence in sequences:
            llm.engine.finish(sequence, "abort")
    assert steps["mixed"] > 8
    assert calls["to_numpy"] == 0
    assert calls["record_event"] == 36
    assert calls["upload"] <= 2 * steps["mixed"] + 36


@pytest.mark.usefixtures("ahead")
def test_a_smaller_bucket_takes_the_rows_that_are_left_without_waiting(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows move on the device: while sequences end one by one, a step is under way, and ids are those of each alone."""
    kinds = [GREEDY, SEEDED, PENALIZED, replace(PENALIZED, logprobs=1)]
    prompts = random_prompts(16, 9, seed=6)
    lengths = [12 + 3 * (7 * number % 16) for number in range(16)]
    requests = [(p, replace(kinds[n % 4], max_tokens=lengths[n])) for n, p in enumerate(prompts)]
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", False)
    wanted = [run_together(tiny_llm("llama"), [request])[0][0] for request in requests]
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    moved: list[int] = []
    real = RequestTable._move

    def noted(self: RequestTable, moves: np.ndarray) -> None:
        moved.append(len(moves))
        real(self, moves)

    monkeypatch.setattr(RequestTable, "_move", noted)
    llm = tiny_llm("llama", num_pages=400)
    run_together(llm, requests)  # a step is captured when nothing is under way
    del moved[:]
    sequences = [llm.engine.add(*request)[0] for request in requests]
    llm.engine.step()
    calls.clear()
    steps = 0
    while len(llm.engine.scheduler.running) > 1:
        llm.engine.step()
        steps += 1
        assert llm.engine.runner.pipeline
        assert llm.engine.runner.pipeline.num_queued == 1
    assert calls["record_event"] == steps
    assert calls["to_numpy"] == 0
    while llm.engine.has_work:
        llm.engine.step()
    assert [sequence.completion for sequence in sequences] == wanted
    assert sum(moved) >= 5
    assert_idle(llm)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("before", [(), (PENALIZED,), (PENALIZED,) * 6], ids=["none", "of one row", "of eight rows"])
def test_rows_move_while_the_first_one_comes_that_is_penalized(before: tuple[SamplingParams, ...]) -> None:
    """Two of six sequences go on in a smaller bucket: they come from rows that a history of its size does not have."""
    llm, others = tiny_llm("llama"), [([1, 2, number], replace(SEEDED, max_tokens=30)) for number in range(6)]
    new = [5, 6, 7], replace(PENALIZED, max_tokens=30)
    wanted = [run_together(llm, [request])[0][0] for request in (*others[4:], new)]
    llm = tiny_llm("llama")
    run_together(llm, [([3, number], params) for number, params in enumerate(before)])  # they leave a history
    sequences = [llm.engine.add(*request)[0] for request in others]
    for _ in range(4):
        llm.engine.step()
    for sequence in sequences[:4]:
        llm.engine.finish(sequence, "abort")
    sequences += llm.engine.add(*new)
    while llm.engine.has_work:
        llm.engine.step()
    assert [sequence.completion for sequence in sequences[4:]] == wanted


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


@pytest.mark.usefixtures("ahead")
def test_steps_of_prompts_that_come_at_once_have_few_shapes() -> None:
    """Sequences come in two by two. Those beyond the step's, up to a power of two, have no tokens, or fill it up."""
    llm = tiny_llm("llama", max_sequences=32, num_pages=400, max_step_tokens=64)
    pipeline = llm.engine.runner.pipeline
    assert pipeline
    shapes: list[tuple[tuple[int, ...], ...]] = []

    def recorded(arrays: list[Any], step: Any) -> Any:
        starts = arrays[2].tolist()
        assert starts == sorted(starts)
        assert starts[-1] == len(arrays[0])
        shapes.append(tuple(array.shape for array in arrays))
        return step()

    pipeline._recorded = recorded
    prompts = random_prompts(32, 26)
    params = replace(GREEDY, max_tokens=30)
    got = run_together(llm, [([*prompt, *range(32 - len(prompt))], params) for prompt in prompts])
    whole = [shape for shape in shapes if shape[0] == (64,)]
    assert len(whole) > 20
    assert len(set(whole)) <= 8
    assert {shape[3] for shape in whole} <= {(2,), (4,), (8,), (16,), (32,), (33,)}  # lengths
    alone = run_together(tiny_llm("llama"), [([*prompts[9], *range(32 - len(prompts[9]))], params)])
    assert got[9] == alone[0]


def test_short_prompts_of_all_lengths_are_steps_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that nobody asked for fill them up, and write to the spare page alone."""
    prompts = [[7 + n] * n for n in (2, 3, 9, 15, 20, 31, 33, 50)]
    params = replace(GREEDY, max_tokens=2)
    wanted = [run_together(tiny_llm("gemma3"), [(prompt, params)]) for prompt in prompts]
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("gemma3")
    pipeline = llm.engine.runner.pipeline
    assert pipeline
    shapes: list[tuple[tuple[int, ...], ...]] = []

    def recorded(arrays: list[Any], step: Any) -> Any:
        shapes.append(tuple(array.shape for array in arrays[:4]))
        return step()

    pipeline._recorded = recorded
    for prompt, own in zip(prompts, wanted, strict=True):
        assert_same(run_together(llm, [(prompt, params)]), own)
    assert shapes == [((tokens,), (tokens,), (3,), (2,)) for tokens in (16, 16, 16, 16, 32, 32, 64, 64)]
