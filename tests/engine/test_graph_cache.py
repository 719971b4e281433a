"""Steps of buckets: few are recorded, idle rows touch nothing of others, ghosts run before others use their pages."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness
from host_memory import HostMemory, Replayed
from tiny_models import CONTEXT, GREEDY, SEEDED, assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM, SamplingParams, models
from forge.backend import sources
from forge.backend.numpy import NumpyBackend
from forge.engine import Engine, ModelRunner
from forge.engine.graph_cache import bucket
from forge.engine.pipeline import StepPipeline
from forge.engine.scheduler import Scheduled, Scheduler
from forge.engine.sequence import FinishReason, Sequence
from forge.errors import OutOfMemoryError
from forge.formats import gguf
from forge.state.model_state import ModelState, kinds_of

PAGE = 8
PENALIZED = replace(
    GREEDY, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={3: 4.0, 9: -math.inf}
)
MIXED = [
    GREEDY,
    replace(SEEDED, logprobs=2),
    PENALIZED,
    SEEDED,
    replace(PENALIZED, temperature=1.2, seed=4, logprobs=0),
]
Requests = list[tuple[list[int], SamplingParams]]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from here on run ahead, as on a GPU."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (64, {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 17: 32, 32: 32, 33: 64, 64: 64}),
        (6, {1: 1, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6}),
        (1, {1: 1}),
    ],
)
def test_buckets(most: int, wanted: dict[int, int]) -> None:
    assert {rows: bucket(rows, most) for rows in wanted} == wanted


# Ids are those of steps that wait


def alone(requests: Requests) -> list[tuple[list[int], FinishReason | None]]:
    """Each request for itself, in an engine that waits for every step."""
    llm = tiny_llm("llama", max_sequences=1)
    assert llm.engine.runner.pipeline is None
    found = []
    for request in requests:
        (sequence,) = llm.engine.add(*request)
        while llm.engine.has_work:
            llm.engine.step()
        found.append((sequence.completion, sequence.finish_reason))
    return found


def together(llm: LLM, requests: Requests) -> list[tuple[list[int], FinishReason | None]]:
    assert llm.engine.runner.pipeline
    sequences = [llm.engine.add(*request)[0] for request in requests]
    while llm.engine.has_work:
        llm.engine.step()
    assert_idle(llm)
    return [(sequence.completion, sequence.finish_reason) for sequence in sequences]


def random_requests(count: int, seed: int) -> Requests:
    """Some end by an id, which is one of many, some by their length, which may be 1."""
    rng = random.Random(seed)
    params = [
        replace(
            rng.choice(MIXED),
            max_tokens=rng.choice([1, 2, 3, 9, 20, 40]),
            seed=rng.randrange(2**64),
            stop_token_ids=rng.sample(range(250), rng.choice([0, 15])),
        )
        for _ in range(count)
    ]
    return list(zip(random_prompts(count, 30, seed=seed), params, strict=True))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize(("pages", "most"), [*(pytest.param(200, n, marks=pytest.mark.slow) for n in (16, 5)), (12, 6)])
def test_ids_are_those_of_each_request_alone(seed: int, pages: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = random_requests(12, seed)
    wanted = alone(requests)
    assert {reason for _, reason in wanted} == {"stop", "length"}
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama", num_pages=pages, max_sequences=most)
    preemptions = count_preemptions(llm)
    assert together(llm, requests) == wanted
    assert bool(preemptions) == (pages == 12)


def test_ids_are_those_of_each_request_alone_where_passes_take_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = random_requests(6, 2)
    wanted = alone(requests)
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama", num_pages=12, max_sequences=6)
    sequences = [llm.engine.add(*request)[0] for request in requests]
    steps = 0
    while llm.engine.has_work:
        llm.engine.step()
        steps += 1
        if steps % 5 == 0:
            for _ in llm.engine.logits(list(range(90))):
                pass
    assert [(sequence.completion, sequence.finish_reason) for sequence in sequences] == wanted
    assert_idle(llm)


@pytest.mark.parametrize("params", MIXED)
def test_text_and_log_probabilities_up_to_a_stop_string_or_a_close(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(5, 12, seed=3)
    llm = tiny_llm("llama")
    whole = llm.generate(prompts, params)
    stop = [completion.text[4:6] for completion in whole[::2]]
    wanted = [llm.generate(prompt, replace(params, stop=stop)) for prompt in prompts]
    assert any(len(c.ids) < len(w.ids) for c, w in zip(wanted, whole, strict=True))
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama")
    stream = llm.stream([1, 2, 3], params)
    next(stream)  # its row is in the loop until it is closed
    got = llm.generate(prompts[:2], replace(params, stop=stop))
    stream.close()
    got += llm.generate(prompts[2:], replace(params, stop=stop))
    assert_idle(llm)
    for one, other in zip(got, wanted, strict=True):
        assert (one.ids, one.text, one.finish_reason) == (other.ids, other.text, other.finish_reason)
        assert (one.logprobs is None) == (other.logprobs is None) == (params.logprobs is None)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-5)


@pytest.mark.parametrize("pages", [pytest.param(200, marks=pytest.mark.slow), 14])
def test_an_abort_changes_nothing_of_the_others(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        (prompt, replace(kind, max_tokens=30))
        for prompt, kind in zip(random_prompts(7, 20), MIXED + MIXED[:2], strict=True)
    ]
    wanted = alone(requests)
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama", num_pages=pages, max_sequences=5)
    sequences = [llm.engine.add(*request)[0] for request in requests]
    ends = {6: sequences[1], 7: sequences[0], 11: sequences[3]}
    steps = 0
    while llm.engine.has_work:
        llm.engine.step()
        steps += 1
        if steps in ends:
            llm.engine.finish(ends[steps], "abort")
    assert_idle(llm)
    for sequence, (ids, reason) in zip(sequences, wanted, strict=True):
        if sequence in ends.values():
            assert sequence.finish_reason == "abort"
            assert sequence.completion == ids[: len(sequence.completion)]
            assert len(sequence.completion) < len(ids)
        else:
            assert (sequence.completion, sequence.finish_reason) == (ids, reason)


# Recordings


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step that is recorded."""
    rows: list[int] = []
    real = NumpyBackend.capture

    def noted(self: NumpyBackend, step: Any, state: Any, perturb: Any) -> Any:
        rows.append(len(state[0]))
        return real(self, step, state, perturb)

    monkeypatch.setattr(NumpyBackend, "capture", noted)
    return rows


def ends_one_by_one(kinds: list[SamplingParams]) -> Requests:
    """64 requests of 3 to 66 ids, in no order. With some seeds a draw falls between the sums of probabilities that
    products of one row and of many give."""
    lengths = random.Random(1).sample(range(3, 67), 64)
    return [
        ([i, 250 - i], replace(kinds[i % len(kinds)], max_tokens=length, seed=100 + i))
        for i, length in enumerate(lengths)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [[GREEDY], [SEEDED], MIXED], ids=["greedy", "seeded", "mixed"])
def test_64_sequences_that_end_one_by_one_record_a_step_for_each_bucket(
    kinds: list[SamplingParams], recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = ends_one_by_one(kinds)
    wanted = alone(requests)
    assert not recorded
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama", num_pages=64 * CONTEXT // PAGE, max_sequences=64)
    assert together(llm, requests) == wanted
    assert recorded == [64, 32, 16, 8, 4, 2, 1]
    if len(kinds) == 1:  # of others, the same buckets may be of fewer kinds
        assert together(llm, requests) == wanted
        assert len(recorded) == 7


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [[GREEDY], MIXED], ids=["greedy", "mixed"])
def test_so_do_sequences_that_ids_end(
    kinds: list[SamplingParams], recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(ids, replace(params, max_tokens=70)) for ids, params in ends_one_by_one(kinds)]
    whole = alone(requests)
    requests = [
        (ids, replace(params, stop_token_ids=[found[min(i + 2, len(found) - 1)]]))
        for i, ((ids, params), (found, _)) in enumerate(zip(requests, whole, strict=True))
    ]
    wanted = alone(requests)
    assert len({len(found) for found, _ in wanted}) > 12
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama", num_pages=64 * CONTEXT // PAGE, max_sequences=64)
    assert together(llm, requests) == wanted
    assert sorted(set(recorded)) == sorted(recorded)
    assert set(recorded) <= {64, 32, 16, 8, 4, 2, 1}


@pytest.mark.usefixtures("ahead")
def test_a_step_without_memory_to_be_recorded_finds_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    assert llm.engine.runner.pipeline
    plans = llm.engine.runner.pipeline._graphs
    wanted = llm.generate([1, 2, 3], SEEDED).ids
    llm.generate([1, 2, 3], GREEDY)
    assert len(plans._replays) == 2
    real = NumpyBackend.capture

    def full(self: NumpyBackend, *args: Any) -> Any:
        if plans._replays:
            raise OutOfMemoryError("out of device memory")
        return real(self, *args)

    monkeypatch.setattr(NumpyBackend, "capture", full)
    with pytest.raises(OutOfMemoryError):
        llm.generate([[1, 2, 3], [4]], GREEDY)
    assert llm.generate([[1, 2, 3], [4]], SEEDED)[0].ids == wanted
    assert_idle(llm)


# What a step writes


class Watched:
    """Notes what each step of a pipeline may change, and compares it with what it did."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, (self.cache,) = llm.engine, llm.engine.runner.state.caches
        (self.spare_page,) = llm.engine.runner.num_pages
        assert llm.engine.runner.pipeline
        self.loop = llm.engine.runner.pipeline
        self.idle_rows = self.penalized = 0
        self.ids: dict[Sequence, list[int]] = {}
        """Those of a sequence with a row, with the ones under way."""
        self.ghosts = Counter[str]()
        """Of sequences, by how they ended: steps under way that they are in."""
        launch, finish = StepPipeline.launch, Scheduler.finish

        def watched(loop: StepPipeline, step: list[Scheduled], forks: Any) -> bool:
            self.launch(launch, step, forks)
            return True

        def finished(scheduler: Scheduler, sequence: Sequence, reason: FinishReason) -> None:
            number = sum(sequence in pending.sequences for pending in self.loop._queue)
            self.ghosts[f"{reason}: {number}"] += 1
            finish(scheduler, sequence, reason)

        monkeypatch.setattr(StepPipeline, "launch", watched)
        monkeypatch.setattr(Scheduler, "finish", finished)

    def pages(self) -> np.ndarray:
        """Bits of keys and values, by page and offset."""
        both = np.stack([self.cache.k, self.cache.v]).view(np.int32)
        return np.moveaxis(both, (2, 3), (0, 1)).reshape(*both.shape[2:4], -1).copy()

    def launch(self, real: Callable[..., bool], step: list[Scheduled], forks: Any) -> None:
        assert all(entry.sequence.finish_reason is None for entry in step)
        pages, sampling = self.pages(), [entry.sequence for entry in step if entry.samples]
        positions = [(e.sequence, position) for e in step for position in range(e.start, e.start + e.count)]
        places = {(s.pages[0][position // PAGE], position % PAGE) for s, position in positions}
        assert len(places) == len(positions)
        self.ids |= {s: list(s.ids) for s in sampling if s.row is None}
        assert real(self.loop, step, forks)
        rows = list(self.loop._queue[-1].sequences)
        idle = [row for row, s in enumerate(rows) if s is self.loop.table.idle]
        assert {s: row for row, s in enumerate(rows) if row not in idle} == {s: s.row for s in sampling}
        changed = {(int(page), int(at)) for page, at in np.argwhere((self.pages() != pages).any(axis=2))}
        assert {page for page, _ in changed - places} <= {self.spare_page}
        assert all(np.isfinite(part[:, page, at]).all() for part in (self.cache.k, self.cache.v) for page, at in places)

        table, after = self.loop.table, self.history()
        for row, sequence in enumerate(rows):
            if row in idle:
                self.idle_rows += 1
                assert (table.fields["length"][row], table.fields["last_id"][row]) == (0, 0)
                assert table.page_tables[0, row, 0] == self.spare_page
                continue
            ids = self.ids[sequence]
            ids.append(int(table.fields["last_id"][row]))
            assert table.fields["length"][row] == len(ids)
            assert table.page_tables[0, row, : len(sequence.pages[0])].tolist() == sequence.pages[0]
            if after is not None and sequence.params.repetition_penalty != 1:
                self.penalized += 1
                generated = Counter(ids[sequence.num_prompt :])
                wanted = np.zeros(after.shape[2], np.int32)
                for token in ids:
                    wanted[token] = 1 + generated[token]
                np.testing.assert_array_equal(after[0, row], wanted)
                wanted_bias = np.zeros(after.shape[2], np.float32)
                for token, bias in sequence.params.logit_bias.items():
                    wanted_bias[token] = bias
                np.testing.assert_array_equal(after[1, row].view(np.float32), wanted_bias)

    def history(self) -> np.ndarray | None:
        table = self.loop.table
        return table.sampler.history.copy() if table.sampler.penalized_rows else None


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(("pages", "most"), [(80, 16), (80, 6), (14, 6)])
def test_a_step_writes_the_positions_of_its_sequences_and_the_spare_page(
    pages: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm("llama", num_pages=pages, max_sequences=most)
    watched = Watched(llm, monkeypatch)
    together(llm, random_requests(14, seed=5))
    assert watched.idle_rows > 10
    assert watched.penalized > 20
    assert watched.ghosts["stop: 1"]  # or the bound says nothing
    assert set(watched.ghosts) <= {"stop: 0", "stop: 1", "length: 0"}


@pytest.mark.usefixtures("ahead")
def test_an_aborted_sequence_is_in_one_step_more(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    watched = Watched(llm, monkeypatch)
    sequences = [llm.engine.add(prompt, GREEDY)[0] for prompt in random_prompts(4, 9)]
    for _ in range(5):
        llm.engine.step()
    llm.engine.finish(sequences[2], "abort")
    known = len(sequences[2].ids)
    while llm.engine.has_work:
        llm.engine.step()
    assert len(sequences[2].ids) == known
    assert len(watched.ids.get(sequences[2], [])) in (0, known + 1)
    assert watched.ghosts == {"abort: 1": 1, "length: 0": 3}


# A device that is late


class Late(Replayed, HostMemory, Harness):
    """The harness as a device that does nothing before somebody waits for it, and then all in order up to there."""

    arch = "harness"

    def __init__(self, *, late: bool) -> None:
        super().__init__(32)
        self.late = late
        self.queue: deque[Callable[[], object]] = deque()

    def _later(self, work: Callable[[], object]) -> None:
        self.queue.append(work)
        if not self.late:
            self._work()

    def _work(self) -> None:
        while self.queue:
            self.queue.popleft()()

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        if self.log is not None:
            self.log.append((entry, grid, args))
        self._later(lambda: Harness._run(self, entry, grid, args))

    def matmul(self, *args: Any, accumulate: bool) -> None:
        self._later(lambda: Harness.matmul(self, *args, accumulate=accumulate))

    def upload(self, array: Any, values: Any, *, is_pinned: bool = False) -> None:
        kept = values if is_pinned else np.array(values)
        self._later(lambda: Harness.upload(self, array, kept))

    def to_numpy(self, array: Any) -> np.ndarray:
        self._work()
        return np.array(array)

    def record_event(self) -> Callable[[], None]:
        passed: list[bool] = []
        self._later(lambda: passed.append(True))

        def wait() -> None:
            while not passed:
                self.queue.popleft()()

        return wait


def engine_on(device: Late, pages: int = CONTEXT // PAGE, most: int = 6) -> Engine:
    path = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
    with gguf.read(path) as file:
        config = models.read_config(file, CONTEXT)
        decoder = models.build(file, config, device)
    kinds = kinds_of(config, context=CONTEXT, page_size=PAGE, step_tokens=128, itemsize=device.dtype.itemsize)
    state = ModelState(kinds, [pages] * len(kinds), PAGE, device)
    runner = ModelRunner(decoder, state, device, context=CONTEXT, max_sequences=most)
    return Engine(runner, end_ids=frozenset(), max_step_tokens=128)


def run(engine: Engine, requests: Requests, aborted: int = 0) -> list[list[Any]]:
    """Ids and log probabilities of each request. After so many steps the first one is aborted."""
    found: dict[Sequence, list[Any]] = {engine.add(*request)[0]: [] for request in requests}
    steps = 0
    while engine.has_work:
        for token in engine.step():
            found[token.sequence].append((token.id, token.logprobs))
        steps += 1
        if steps == aborted:
            engine.finish(next(iter(found)), "abort")
    assert all(pool.num_free == pool.num_pages for pool in engine.pools)
    return list(found.values())


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("seed", [8, 9])
def test_a_late_device_gives_what_a_prompt_one_does(seed: int) -> None:
    """To the bit: the same launches on the same rows, with preemptions and histories that are made anew."""
    requests = random_requests(12, seed)
    wanted = run(engine_on(Late(late=False)), requests)
    assert run(engine_on(Late(late=True)), requests) == wanted


@pytest.mark.slow
@needs_compiler
def test_a_pass_takes_pages_that_steps_under_way_still_write_to() -> None:
    """They write before it does: a late device gives what a prompt one does, to the bit, and the pass its logits."""
    requests = [(prompt, replace(params, max_tokens=16)) for prompt, params in random_requests(3, 7)]
    text = list(range(90))
    (expected,) = [np.array(rows) for rows in engine_on(Late(late=False), pages=60).logits(text)]

    def beside_passes(device: Late) -> tuple[int, list[list[int]]]:
        engine = engine_on(device)
        sequences = [engine.add(*request)[0] for request in requests]
        steps = taken = 0
        while engine.has_work:
            engine.step()
            steps += 1
            if steps % 5 == 0:
                taken += any(s.num_pending and s.pages for s in sequences)
                (rows,) = engine.logits(text)
                np.testing.assert_array_equal(device.to_numpy(rows), expected)
        assert all(pool.num_free == pool.num_pages for pool in engine.pools)
        return taken, [s.completion for s in sequences]

    taken, found = beside_passes(Late(late=True))
    assert taken >= 2
    assert (taken, found) == beside_passes(Late(late=False))


@pytest.mark.slow
@needs_compiler
def test_a_history_that_is_made_anew_is_not_that_of_steps_recorded_before() -> None:
    """Steps are recorded for one penalized sequence, then for three, whose history is larger; then it is one again."""
    requests = [(prompt, replace(PENALIZED, max_tokens=8)) for prompt in random_prompts(3, 9, seed=2)]
    engine = engine_on(Late(late=True), pages=60)
    first = run(engine, requests[:1])
    run(engine, requests)
    assert run(engine, requests[:1]) == first
    assert run(engine, requests[1:2]) == run(engine_on(Late(late=True)), requests[1:2])


@needs_compiler
def test_an_engine_that_nobody_has_any_more_holds_no_memory() -> None:
    """At once, not when Python next collects garbage: the next model may need it."""
    engine = engine_on(Late(late=False))
    run(engine, [([5, 6, 7], GREEDY)])
    held = [weakref.ref(part) for part in (engine.runner.model, engine.runner.state, engine.runner.pipeline)]
    gc.collect()
    gc.disable()
    try:
        del engine
        assert [part() for part in held] == [None] * 3
    finally:
        gc.enable()


@needs_compiler
@pytest.mark.parametrize("most", [3, *(pytest.param(most, marks=pytest.mark.slow) for most in (6, 12))])
def test_no_kernel_is_new_to_steps_after_the_first_ones(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last product has kernels of its own where it has many outputs, and a row for each sequence."""
    device = Late(late=False)
    engine = engine_on(device, pages=most * CONTEXT // PAGE, most=most)
    warmed_up: set[int] = set()
    real = StepPipeline.warm_up

    def warm_up(loop: StepPipeline, logits: Any, sequences: list[Sequence]) -> None:
        warmed_up.add(len(logits))
        real(loop, logits, sequences)

    monkeypatch.setattr(StepPipeline, "warm_up", warm_up)
    engine.runner.run_typical_steps(engine.scheduler.max_step_tokens)
    assert max(warmed_up) == most
    known = set(device.variants)
    params = SamplingParams(max_tokens=6, ignore_eos=True, repetition_penalty=1.5, logprobs=1, seed=0)
    run(engine, [(prompt, replace(params, max_tokens=3 + i)) for i, prompt in enumerate(random_prompts(most, 9))])
    assert device.variants == known


@pytest.mark.slow
@needs_compiler
def test_a_page_is_given_away_before_the_ghost_that_writes_to_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ghost computes position 16, the first of its third page. It is the first one of the fourth page of another
    sequence too, whose step is behind it. In an engine with more pages the ids are the same."""
    requests = [(list(range(40 * i, 40 * i + length)), GREEDY) for i, length in enumerate([13, 20, 20, 20])]
    requests = [(ids, replace(params, max_tokens=12, logprobs=2)) for ids, params in requests]
    given: list[int] = []
    real = StepPipeline.launch

    def launch(loop: StepPipeline, step: list[Scheduled], forks: Any) -> bool:
        written = ghost_pages(loop)
        is_right = real(loop, step, forks)
        given.extend(written & {page for e in step for page in e.sequence.pages[0][e.start // PAGE :]})
        return is_right

    def ghost_pages(loop: StepPipeline) -> set[int]:
        (ghost,) = {s for pending in loop._queue for s in pending.sequences if s.finish_reason == "abort"} or {None}
        return {third[0]} if ghost else set()

    third: list[int] = []
    finish = Scheduler.finish

    def finished(scheduler: Scheduler, sequence: Sequence, reason: FinishReason) -> None:
        if reason == "abort":
            assert (sequence.num_computed, len(sequence.pages[0])) == (17, 3)
            third[:] = sequence.pages[0][2:]
        finish(scheduler, sequence, reason)

    monkeypatch.setattr(StepPipeline, "launch", launch)
    monkeypatch.setattr(Scheduler, "finish", finished)
    wanted = run(engine_on(Late(late=False), pages=60), requests, aborted=4)
    assert not given
    got = run(engine_on(Late(late=True)), requests, aborted=4)
    assert given == third
    assert got == wanted
