"""A prompt that begins like an earlier one computes the rest alone, and gives what it gives alone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import CONTEXT, GREEDY, SEEDED, assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine.page_pool import PagePool
from forge.engine.prefix_cache import PrefixCache, can_share
from forge.engine.scheduler import Scheduled, Scheduler
from forge.engine.sequence import Sequence
from forge.state.paged_kv import PagedKV
from forge.state.window_kv import WindowKV

slow = pytest.mark.slow
PAGE = 4


@pytest.fixture(params=[False, True], ids=["", "as on a GPU"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are queued before the ids of earlier ones are known."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", request.param)
    return bool(request.param)


def llm_of(name: str, monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> LLM:
    """Pages that nobody has and nobody can find hold NaN at once, whatever kind they are of."""
    llm = tiny_llm(name, **{"page_size": PAGE, **sizes})
    caches = dict(zip(llm.engine.pools, llm.engine.runner.state.caches, strict=True))
    release, forget = PagePool.release, PagePool.forget

    def poison(pool: PagePool, pages: list[int]) -> None:
        unused = [page for page in pages if not pool.references(page) and not pool.is_findable(page)]
        for array in caches[pool].arrays if pool in caches else ():
            array[:, unused] = np.nan

    def releasing(pool: PagePool, pages: Iterable[int]) -> None:
        pages = list(pages)
        release(pool, pages)
        poison(pool, pages)

    def forgetting(pool: PagePool, page: int) -> None:
        forget(pool, page)
        poison(pool, [page])

    monkeypatch.setattr(PagePool, "release", releasing)
    monkeypatch.setattr(PagePool, "forget", forgetting)
    return llm


def cache_of(llm: LLM) -> PrefixCache:
    assert llm.engine.prefix_cache is not None
    return llm.engine.prefix_cache


def without_cache(name: str, **sizes: Any) -> LLM:
    return tiny_llm(name, page_size=PAGE, windows=False, prefix_caching=False, **sizes)


def count_computed(llm: LLM) -> list[int]:
    """A list that gets the number of tokens of each step with a prompt."""
    counts: list[int] = []
    forward = llm.engine.runner.forward

    def counting(step: list[Scheduled], **settings: Any) -> Any:
        counts.append(sum(entry.count for entry in step))
        return forward(step, **settings)

    llm.engine.runner.forward = counting  # type: ignore[method-assign]
    return counts


def ids(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    [sequence] = llm.engine.add(prompt, replace(params, n=1))
    while llm.engine.has_work:
        llm.engine.step()
    return sequence.completion


# What is found


def test_a_prompt_that_begins_like_an_earlier_one_computes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama", monkeypatch)
    shared, first, second = list(range(20)), [100, 101, 102, 103, 104], [110, 111]
    expected = [ids(without_cache("llama"), shared + rest) for rest in (first, second)]
    computed = count_computed(llm)
    assert ids(llm, shared + first) == expected[0]
    assert computed[0] == 25
    computed.clear()
    assert ids(llm, shared + second) == expected[1]
    assert computed[0] == 2
    cache = cache_of(llm)
    assert (cache.asked_tokens, cache.hit_tokens, cache.num_evictions) == (25 + 22, 20, 0)


@pytest.mark.parametrize("n", [1, 3])
def test_a_completion_says_how_much_of_its_prompt_was_there(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, params = llm_of("llama", monkeypatch, max_sequences=2), replace(SEEDED, n=n)
    for expected in (0, 20):
        found = llm.generate(list(range(22)), params)
        completions = found if isinstance(found, list) else [found]
        assert [one.timings.cached_tokens for one in completions] == [expected] * n
    stats = llm.engine.stats()
    assert (stats.prefix_asked_tokens, stats.prefix_hit_tokens, stats.prefix_evictions) == (44, 20, 0)
    chunks = list(llm.stream(list(range(26)), GREEDY))
    assert [chunk.timings.cached_tokens for chunk in chunks if chunk.timings] == [20]


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_the_last_id_is_always_computed(length: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits give the next one, also where all its pages are there."""
    llm = llm_of("llama", monkeypatch)
    prompt = list(range(30))
    ids(llm, prompt)
    assert ids(llm, prompt[:length]) == ids(without_cache("llama"), prompt[:length])
    assert cache_of(llm).hit_tokens == found


def test_an_answer_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama", monkeypatch)
    prompt = list(range(10))
    answer = ids(llm, prompt, replace(GREEDY, max_tokens=15))
    ids(llm, [*prompt, *answer, 5, 6])
    assert cache_of(llm).hit_tokens == 24  # the last id of the answer was not computed


def test_the_same_page_behind_other_ids_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama", monkeypatch)
    page = [7, 8, 9, 10]
    ids(llm, [1, 2, 3, 4, *page, 5])
    for prompt in ([*page, 5], [1, 2, 3, 5, *page, 5], [*page, *page, 5]):
        assert ids(llm, prompt) == ids(without_cache("llama"), prompt)
    assert cache_of(llm).hit_tokens == PAGE  # the last prompt's first page is that of the prompt before


class _Collision(bytes):
    """Ids whose hash is that of all others."""

    def __hash__(self) -> int:
        return 1

    __eq__ = bytes.__eq__


def test_ids_with_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = PrefixCache._keys
    monkeypatch.setattr(PrefixCache, "_keys", lambda *args: [_Collision(key) for key in keys(*args)])
    llm = llm_of("llama", monkeypatch)
    prompts = random_prompts(3, 40, seed=3)
    plain = without_cache("llama")
    for prompt in [*prompts, *prompts]:
        assert ids(llm, prompt) == ids(plain, prompt)
    assert cache_of(llm).hit_tokens == sum((len(prompt) - 1) // PAGE * PAGE for prompt in prompts)


def test_choices_start_from_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, params = llm_of("llama", monkeypatch), replace(SEEDED, n=3)
    prompt = list(range(27))
    first, second = (llm.generate(prompt, params) for _ in range(2))
    expected = without_cache("llama").generate(prompt, params)
    assert [c.ids for c in first] == [c.ids for c in second] == [c.ids for c in expected]  # type: ignore[union-attr]
    assert cache_of(llm).hit_tokens == 24
    assert_idle(llm)


def test_an_aborted_request_leaves_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama", monkeypatch)
    [sequence] = llm.engine.add(list(range(22)), GREEDY)
    llm.engine.step()
    llm.engine.finish(sequence, "abort")
    assert ids(llm, list(range(22))) == ids(without_cache("llama"), list(range(22)))
    assert cache_of(llm).hit_tokens == 20


def test_passes_over_all_positions_neither_find_nor_leave_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("gemma3", monkeypatch)
    text = list(range(40))
    expected = without_cache("gemma3").logits(text)
    computed = count_computed(llm)
    llm.logits(text)
    ids(llm, text)
    assert cache_of(llm).hit_tokens == 0
    computed.clear()
    np.testing.assert_allclose(llm.logits(text), expected, rtol=0, atol=1e-4)
    assert sum(computed) == len(text)
    assert cache_of(llm).asked_tokens == len(text)


# What is not found


def test_nothing_of_a_request_whose_logits_are_not_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while its long prompt is computed, and a neighbour has the same one."""
    llm = llm_of("llama", monkeypatch, max_step_tokens=8)
    bad = 200
    llm.engine.runner.model.token_embd[bad] = np.nan
    [failed] = llm.engine.add([*range(12), bad, *range(12)], GREEDY)
    while llm.engine.has_work:
        llm.engine.step()
        [late] = llm.engine.add([*range(12), 3], GREEDY) if failed.finish_reason is None else [None]
        assert late is None or not llm.engine.step() or late.finish_reason != "error"
    assert failed.finish_reason == "error"
    before = cache_of(llm).hit_tokens
    [again] = llm.engine.add([*range(12), bad, *range(12)], GREEDY)
    while llm.engine.has_work:
        llm.engine.step()
    assert again.finish_reason == "error"
    assert cache_of(llm).hit_tokens - before <= 12
    assert_idle(llm)


def test_pages_that_a_failed_request_was_given_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that went bad in memory does not fail every request to come."""
    llm = llm_of("llama", monkeypatch)
    prompt = list(range(21))
    expected = ids(llm, prompt)
    for array in llm.engine.runner.state.caches[0].arrays:
        array[:] = np.nan
    assert ids(llm, prompt) == []
    assert ids(llm, prompt) == expected


@pytest.mark.parametrize("method", ["forward", "sample"])
def test_nothing_of_a_failed_step_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama", monkeypatch)
    prompt = list(range(21))
    expected = ids(without_cache("llama"), prompt)
    for steps in (0, 6):
        llm.engine.add(prompt, GREEDY)
        for _ in range(steps):
            llm.engine.step()

        def fails(*_: Any, **__: Any) -> Any:
            raise MemoryError("once")

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, method, fails)
            with pytest.raises(MemoryError, match="once"):
                llm.engine.step()
        assert cache_of(llm)._of_page == [{}]
        assert_idle(llm)
    assert ids(llm, prompt) == expected


def test_nothing_is_found_once_replays_were_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama", monkeypatch)
    prompt = list(range(21))
    expected = ids(llm, prompt)
    [running] = llm.engine.add([*prompt, 1], GREEDY)
    llm.engine.step()
    llm.engine._start_over()
    assert cache_of(llm)._of_page == [{}]
    hits = cache_of(llm).hit_tokens
    assert ids(llm, prompt) == expected
    assert running.completion == ids(without_cache("llama"), [*prompt, 1])
    assert cache_of(llm).hit_tokens == hits


def test_an_engine_without_it_computes_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = without_cache("llama")
    computed = count_computed(llm)
    ids(llm, list(range(21)))
    ids(llm, list(range(21)))
    assert computed.count(21) == 2


# Windows


def pools_of(window: int, num_pages: int = 100) -> list[PagePool]:
    shape = (0,), PAGE, 1, 1, 4
    return [PagePool(PagedKV(*shape), num_pages), PagePool(WindowKV(*shape, window, 16), num_pages)]


def computed_by(scheduler: Scheduler, prompt: list[int]) -> Sequence:
    """A sequence whose prompt is computed and whose next id is known."""
    sequence = Sequence(0, list(prompt), len(prompt), SamplingParams(), 0, len(prompt) + 2)
    scheduler.add(sequence)
    while sequence.num_remaining:
        scheduler.commit(scheduler.schedule())
    assert scheduler.prefix_cache
    scheduler.prefix_cache.enter(sequence, len(sequence.ids))
    sequence.ids.append(9)
    return sequence


def test_a_hit_asks_of_a_window_for_the_pages_that_the_next_token_reads() -> None:
    """Its later pages may be gone while earlier ones are there, and the other way round."""
    pools = pools_of(window=9)  # a token at 40 reads from 32 on: pages 8 and 9
    cache = PrefixCache(pools, PAGE)
    scheduler = Scheduler(pools, 4, 16, prefix_cache=cache)
    scheduler.finish(computed_by(scheduler, list(range(60))), "stop")
    nodes = list(cache._walk(Sequence(0, list(range(60)), 60, SamplingParams(), 0, 60), 15))

    def found(length: int) -> int:
        return cache.find(Sequence(0, list(range(length)), length, SamplingParams(), 0, length)).length

    assert [found(length) for length in (60, 41, 40)] == [56, 40, 36]
    for index in (9, 10):  # a window's pages of positions 36 to 43
        page = nodes[index].pages[1]
        assert page is not None
        cache._reused(1, page)
        pools[1].forget(page)
    # A token at 52 reads from 44 on; those at 40, 44 and 48 read what is gone; one at 36 does not.
    assert [found(length) for length in (60, 53, 52, 48, 44, 40, 37, 36)] == [56, 52, 36, 36, 36, 36, 36, 32]


def test_pages_that_a_window_has_left_behind_are_found_while_nobody_needs_them() -> None:
    """Prompts of other users branch off behind a long instruction, far before the end of the first one."""
    pools = pools_of(window=9)
    cache = PrefixCache(pools, PAGE)
    scheduler = Scheduler(pools, 4, 16, prefix_cache=cache)
    computed_by(scheduler, [*range(40), *range(100, 150)])  # in steps of 16, and it still runs
    branch = computed_by(scheduler, [*range(40), *range(200, 220)])
    assert branch.num_cached == 40


@pytest.mark.parametrize("name", [pytest.param("gemma3", marks=slow), "phi3_window"])
def test_windows_give_the_same_behind_a_hit_at_any_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_prompts(1, 1, seed=5)[0] * 3 + random_prompts(1, 200, seed=6)[0][:70]
    plain = without_cache(name)
    llm = llm_of(name, monkeypatch, max_step_tokens=12, max_sequences=4)
    ids(llm, text)
    for cut in range(3, len(text), 7):
        prompt = [*text[:cut], 17, 18]
        assert ids(llm, prompt, SEEDED) == ids(plain, prompt, SEEDED)
        assert cache_of(llm).hit_tokens > 0 or cut < PAGE
    assert_idle(llm)


def test_a_recurrence_has_no_full_pages_to_share() -> None:
    class Recurrent(PagedKV):
        def num_entries(self, length: int) -> int:
            return 1

        def num_shared(self, length: int) -> int:
            return 0

    shape = (0,), PAGE, 1, 1, 4
    assert can_share([PagedKV(*shape)], PAGE)
    assert not can_share([PagedKV(*shape), Recurrent(*shape)], PAGE)


# Scarce pages


def test_free_pages_are_taken_first_and_then_the_least_recently_used() -> None:
    [pool] = pools_of(9, num_pages=12)[:1]
    cache = PrefixCache([pool], PAGE)
    scheduler = Scheduler([pool], 4, 64, prefix_cache=cache)
    texts = [[start] * 12 for start in range(3)]
    for text in (*texts, texts[0]):  # the first one is used again
        scheduler.finish(computed_by(scheduler, [*text, 9]), "stop")

    def found() -> list[int]:
        return [cache.find(Sequence(0, [*text, 9], 13, SamplingParams(), 0, 13)).length for text in texts]

    assert (found(), pool.num_free) == ([12, 12, 12], 12)
    held = pool.allocate(3)
    assert (found(), cache.num_evictions) == ([12, 12, 12], 0)
    held += pool.allocate(2)  # the ends go first: beginnings are of use without them
    assert (found(), cache.num_evictions) == ([12, 4, 12], 2)
    held += pool.allocate(3)
    assert found() == [12, 0, 4]
    pool.release(held)
    assert found() == [12, 0, 4]


def test_a_request_that_waits_for_pages_starts_when_its_own_are_found() -> None:
    [pool] = pools_of(9, num_pages=8)[:1]
    scheduler = Scheduler([pool], 4, 64, prefix_cache=PrefixCache([pool], PAGE))
    first = computed_by(scheduler, list(range(21)))  # 6 pages
    other, second = (Sequence(0, [*range(start, 20), 50], 21, SamplingParams(), 0, 32) for start in (1, 0))
    scheduler.add(other)
    assert [entry.sequence for entry in scheduler.schedule()] == [first]  # 5 pages, and there are 2
    scheduler.finish(other, "abort")
    scheduler.add(second)
    assert [entry.sequence for entry in scheduler.schedule()] == [first, second]
    assert (second.num_computed, pool.num_free) == (20, 1)


def test_a_preempted_sequence_finds_its_own_pages_and_counts_nothing() -> None:
    pools = pools_of(window=9)
    cache = PrefixCache(pools, PAGE)
    scheduler = Scheduler(pools, 4, 16, prefix_cache=cache)
    sequence = computed_by(scheduler, list(range(43)))
    scheduler.preempt()
    assert [(entry.start, entry.count) for entry in scheduler.schedule()] == [(40, 4)]
    assert (cache.asked_tokens, cache.hit_tokens, sequence.num_cached) == (43, 0, 0)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(
    "name", ["phi3_window", *(pytest.param(name, marks=slow) for name in ("llama", "gemma3", "gemma2"))]
)
@pytest.mark.parametrize("params", [pytest.param(GREEDY, id="greedy", marks=slow), pytest.param(SEEDED, id="seeded")])
def test_preempted_requests_find_their_pages_and_give_the_same(
    name: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(6, 30, seed=2)
    params = replace(params, max_tokens=40)
    expected = [ids(without_cache(name), prompt, params) for prompt in prompts]
    kinds = tiny_llm(name, page_size=PAGE, max_step_tokens=16).engine.runner.kinds
    scarce = llm_of(name, monkeypatch, max_step_tokens=16, num_pages=tuple(kind.num_pages(CONTEXT) for kind in kinds))
    preemptions = count_preemptions(scarce)
    found = scarce.generate(prompts, params)
    assert [completion.ids for completion in found] == expected  # type: ignore[union-attr]
    assert preemptions
    assert_idle(scarce)


# Conversations


def conversation(llm: LLM, turns: int, *, changes: bool) -> tuple[list[list[int]], list[int], list[int]]:
    """Answers, lengths of the prompts, and computed tokens of each turn's prompt."""
    rng = random.Random(4)
    text = [rng.randrange(250) for _ in range(40)]
    computed = count_computed(llm)
    answers, lengths, counts = [], [], []
    for turn in range(turns):
        text += [rng.randrange(250) for _ in range(rng.randint(3, 15))]
        prompt = [turn, *text] if changes else text
        computed.clear()
        answers.append(ids(llm, prompt, replace(GREEDY, max_tokens=rng.randint(1, 9))))
        lengths.append(len(prompt))
        counts.append(computed[0])
        text += answers[-1]
    return answers, lengths, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_conversation_of_30_turns_computes_what_is_new(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"context": 600, "num_pages": 400}
    expected, lengths, _ = conversation(without_cache(name, **sizes), 30, changes=False)
    llm = llm_of(name, monkeypatch, **sizes)
    answers, again, counts = conversation(llm, 30, changes=False)
    assert (answers, again) == (expected, lengths)
    for turn in range(1, 30):  # new ids, the answer's last one, and those of a page that was not full
        new = lengths[turn] - lengths[turn - 1] - len(answers[turn - 1])
        assert new < counts[turn] <= new + PAGE
    assert counts[0] == lengths[0]
    cache = cache_of(llm)
    assert (cache.asked_tokens, cache.asked_tokens - cache.hit_tokens) == (sum(lengths), sum(counts))


@pytest.mark.slow
def test_a_conversation_whose_first_line_changes_finds_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama", monkeypatch, context=600, num_pages=400)
    _, lengths, counts = conversation(llm, 30, changes=True)
    assert counts == lengths
    cache = cache_of(llm)
    assert (cache.asked_tokens, cache.hit_tokens) == (sum(lengths), 0)
    assert cache.num_evictions > 0
    assert (llm.engine.stats().prefix_asked_tokens, llm.engine.stats().prefix_hit_tokens) == (sum(lengths), 0)


def random_talk(rng: random.Random, llm: LLM, plain: LLM, rounds: int) -> None:
    """Requests that branch off from earlier ones, run together, fork, and are aborted; each id is that of the request
    alone."""
    talks: list[list[int]] = [[rng.randrange(250) for _ in range(rng.randint(1, 30))]]
    for _ in range(rounds):
        requests = []
        for _ in range(rng.randint(1, 4)):
            base = rng.choice(talks)
            prompt = base[: rng.randint(1, len(base))] + [rng.randrange(250) for _ in range(rng.randint(0, 12))]
            params = replace(rng.choice([GREEDY, SEEDED]), max_tokens=rng.randint(1, 20), n=rng.choice([1, 1, 3]))
            requests.append((prompt[: CONTEXT - 25], params))
        running = [llm.engine.add(prompt, params) for prompt, params in requests]
        aborted = rng.choice(rng.choice(running)) if rng.random() < 0.3 else None
        for _ in range(rng.randint(0, 12)):
            llm.engine.step()
        if aborted:
            llm.engine.finish(aborted, "abort")
        while llm.engine.has_work:
            llm.engine.step()
        for (prompt, params), sequences in zip(requests, running, strict=True):
            expected = plain.generate(prompt, params)
            expected = expected if isinstance(expected, list) else [expected]
            for sequence, completion in zip(sequences, expected, strict=True):
                count = len(sequence.completion)
                assert sequence.completion == completion.ids[:count]
                assert sequence is aborted or count == len(completion.ids)
                talks.append(sequence.ids)
        assert_idle(llm)


@pytest.mark.slow
@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("page_size", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_window", "gemma2"])
def test_random_conversations_give_what_each_request_gives_alone(
    name: str, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = tiny_llm(name, page_size=page_size, max_step_tokens=16).engine.runner.kinds
    counts = tuple(kind.num_pages(CONTEXT) * 3 // 2 for kind in kinds)
    llm = llm_of(name, monkeypatch, page_size=page_size, max_step_tokens=16, num_pages=counts)
    random_talk(random.Random(page_size), llm, without_cache(name), 25)
    cache = cache_of(llm)
    assert cache.hit_tokens >= 50
    assert cache.num_evictions >= 20
