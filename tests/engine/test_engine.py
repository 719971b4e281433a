"""What a request gives does not depend on what else runs, how its prompt is cut, or how often it loses its pages."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import CONTEXT, GREEDY, SEEDED, assert_idle, count_preemptions, random_prompts, settle, tiny_llm

from forge import LLM, Completion, ContextLengthError, OutOfMemoryError, ParameterError, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine.pipeline import StepPipeline

NAMES = ["llama", "gemma3", pytest.param("qwen3", marks=pytest.mark.slow)]
PAGE = 8
quick_with_llama = pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "qwen3"))], indirect=True
)
"""For tests of many generations: gemma3 has seven layers."""
greedy_is_slow = pytest.mark.parametrize(
    "params", [pytest.param(GREEDY, id="greedy", marks=pytest.mark.slow), pytest.param(SEEDED, id="seeded")]
)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def roomy(name: str) -> LLM:
    """An engine in which nothing is scarce and each prompt is computed whole, whatever ran before."""
    return tiny_llm(name, prefix_caching=False)


@pytest.fixture
def llama() -> Iterator[LLM]:
    llm = tiny_llm("llama")
    yield llm
    assert_idle(llm)


def ids(completions: Completion | list[Completion]) -> list[tuple[int, ...]]:
    return [tuple(c.ids) for c in (completions if isinstance(completions, list) else [completions])]


def alone(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[tuple[int, ...]]:
    return [found for prompt in prompts for found in ids(llm.generate(prompt, params))]


# Batches, chunks and scarce pages


@greedy_is_slow
@quick_with_llama
def test_a_batch_equals_each_prompt_alone(name: str, roomy: LLM, params: SamplingParams) -> None:
    prompts = random_prompts(9, 40)
    assert ids(roomy.generate(prompts, params)) == alone(roomy, prompts, params)
    assert_idle(roomy)


@greedy_is_slow
@quick_with_llama
def test_more_prompts_than_may_run_together(name: str, roomy: LLM, params: SamplingParams) -> None:
    prompts = random_prompts(7, 20, seed=1)
    narrow = tiny_llm(name, max_sequences=2)
    assert ids(narrow.generate(prompts, params)) == ids(roomy.generate(prompts, params))
    assert_idle(narrow)


@greedy_is_slow
@quick_with_llama
def test_preemption_changes_nothing(name: str, roomy: LLM, params: SamplingParams) -> None:
    prompts = random_prompts(6, 30, seed=2)
    scarce = tiny_llm(name, num_pages=CONTEXT // PAGE)
    preemptions = count_preemptions(scarce)
    params = replace(params, max_tokens=40)
    assert ids(scarce.generate(prompts, params)) == ids(roomy.generate(prompts, params))
    assert len(preemptions) >= 3
    assert_idle(scarce)


@pytest.mark.parametrize(
    "max_step_tokens", [pytest.param(2, marks=pytest.mark.slow), 8, pytest.param(33, marks=pytest.mark.slow)]
)
def test_a_prompt_in_chunks_equals_one_step(name: str, roomy: LLM, max_step_tokens: int) -> None:
    prompts = [*random_prompts(2, 30, seed=3), random_prompts(1, 1, seed=4)[0] * 64]
    chunked = tiny_llm(name, max_step_tokens=max_step_tokens, max_sequences=2)
    assert ids(chunked.generate(prompts, SEEDED)) == ids(roomy.generate(prompts, SEEDED))
    assert_idle(chunked)


@pytest.mark.parametrize(
    "page_size", [1, pytest.param(5, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_the_page_size_changes_nothing(name: str, roomy: LLM, page_size: int) -> None:
    prompts = random_prompts(4, 40, seed=5)
    other = tiny_llm(name, page_size=page_size, num_pages=4 * -(-CONTEXT // page_size))
    assert ids(other.generate(prompts, SEEDED)) == ids(roomy.generate(prompts, SEEDED))
    assert_idle(other)


# Several choices of one prompt


@pytest.mark.parametrize("length", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, PAGE)), 3 * PAGE + 5])
@quick_with_llama
def test_choices_differ_and_are_the_same_in_every_setting(name: str, roomy: LLM, length: int) -> None:
    prompt = random_prompts(1, 1, seed=length)[0] + list(range(1, length))
    params = replace(SEEDED, n=4)
    first = ids(roomy.generate(prompt, params))
    assert len(set(first)) == 4
    assert ids(roomy.generate(prompt, params)) == first
    assert ids(roomy.generate(prompt, SEEDED)) == first[:1]

    others = random_prompts(3, 20, seed=6)
    in_a_batch = ids(roomy.generate([others[0], prompt, *others[1:]], params))
    assert in_a_batch[4:8] == first

    unforked = tiny_llm(name, max_sequences=1)  # no choice finds room beside the first: each computes the prompt itself
    assert ids(unforked.generate(prompt, params)) == first
    assert_idle(unforked)

    scarce = tiny_llm(name, num_pages=CONTEXT // PAGE)
    preemptions = count_preemptions(scarce)
    assert ids(scarce.generate([others[0], prompt, *others[1:]], params)) == in_a_batch
    assert preemptions
    assert_idle(scarce)


def test_full_pages_of_the_prompt_are_shared(llama: LLM) -> None:
    prompt = list(range(2 * PAGE + 3))
    sequences = llama.engine.add(prompt, replace(SEEDED, n=3))
    llama.engine.step()
    assert len({tuple(s.pages[0][:2]) for s in sequences}) == 1
    assert len({s.pages[0][2] for s in sequences}) == 3
    [pool] = llama.engine.pools
    assert pool.num_pages - pool.num_free == 2 + 3
    for sequence in sequences:
        llama.engine.finish(sequence, "abort")


def test_different_seeds_differ_and_no_seed_is_fresh(llama: LLM) -> None:
    texts = {llama.generate([1, 2, 3], replace(SEEDED, seed=seed)).text for seed in (0, 1, 2**64 - 1, None, None)}
    assert len(texts) == 5


# Aborts and failures


@pytest.mark.parametrize(
    "choice", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("steps", [0, 1, 4, 9], ids=lambda n: f"after {n} steps")
def test_the_other_choices_of_an_aborted_one_go_on(choice: int, steps: int) -> None:
    prompt, params = list(range(20)), replace(SEEDED, n=4)
    expected = ids(tiny_llm("llama").generate(prompt, params))
    llm = tiny_llm("llama", max_step_tokens=6, max_sequences=4)  # the prompt takes 4 steps
    sequences = llm.engine.add(prompt, params)
    for _ in range(steps):
        llm.engine.step()
    llm.engine.finish(sequences[choice], "abort")
    llm.engine.finish(sequences[choice], "abort")  # harmless
    while llm.engine.has_work:
        llm.engine.step()
    assert [s.finish_reason for s in sequences] == ["abort" if i == choice else "length" for i in range(4)]
    for i, sequence in enumerate(sequences):
        found = tuple(sequence.completion)
        assert found == expected[i][: len(found)]
        assert i == choice or found == expected[i]
    assert_idle(llm)


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_aborting_all_frees_everything_at_once(steps: int) -> None:
    llm = tiny_llm("llama", max_step_tokens=6, max_sequences=4)
    sequences = [s for prompt in random_prompts(3, 20) for s in llm.engine.add(prompt, replace(SEEDED, n=3))]
    for _ in range(steps):
        llm.engine.step()
    for sequence in sequences:
        llm.engine.finish(sequence, "abort")
    assert_idle(llm)


@pytest.mark.parametrize("method", ["forward", "sample", "copy_page"])
def test_a_failed_step_ends_its_sequences_and_no_others(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Two requests run, one of three choices; a third one waits."""
    first, second, third = random_prompts(3, 20, seed=9)
    expected = ids(tiny_llm("llama").generate(third, SEEDED))
    llm = tiny_llm("llama", max_sequences=2)
    ends = [*llm.engine.add(first, SEEDED), *llm.engine.add([*second, 1], replace(SEEDED, n=3))]
    (waits,) = llm.engine.add(third, SEEDED)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("once")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, method, fails)
        if method == "copy_page":
            llm.engine.scheduler.max_sequences = 4  # there is room for choices beside the first one
            del llm.engine.scheduler.waiting[waits]
        with pytest.raises(RuntimeError, match="once"):
            llm.engine.step()
    assert [s.finish_reason for s in ends] == ["error"] * 4
    assert [s.pages for s in ends] == [[]] * 4
    assert waits.finish_reason is None
    if method == "copy_page":
        llm.engine.scheduler.add(waits)
    while llm.engine.has_work:
        llm.engine.step()
    assert [tuple(waits.completion)] == expected
    assert_idle(llm)


@pytest.mark.parametrize("method", ["forward", "sample"])
def test_a_running_sequence_that_is_not_in_a_failed_step_goes_on(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    prompts = random_prompts(3, 20, seed=9)
    llm = tiny_llm("llama")
    expected = ids(llm.generate(prompts, SEEDED))
    sequences = [llm.engine.add(prompt, SEEDED)[0] for prompt in prompts]
    for _ in range(3):
        llm.engine.step()

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("once")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, method, fails)
        schedule = llm.engine.scheduler.schedule
        patch.setattr(llm.engine.scheduler, "schedule", lambda **options: schedule(**options)[:1])
        with pytest.raises(RuntimeError, match="once"):
            llm.engine.step()
    assert [s.finish_reason for s in sequences] == ["error", None, None]
    while llm.engine.has_work:
        llm.engine.step()
    assert [tuple(s.completion) for s in sequences[1:]] == expected[1:]
    assert_idle(llm)


# Ends


def poison(llm: LLM, token: int) -> None:
    """Every position from this token on has NaN logits."""
    llm.engine.runner.model.token_embd[token] = np.nan


def test_tokens_that_the_file_suppresses_are_never_generated(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = llama.generate([1, 2, 3], GREEDY)
    monkeypatch.setattr(llama.tokenizer, "suppressed_ids", frozenset(usual.ids))
    for bias in ({}, {usual.ids[0]: 1e6}):
        found = llama.generate([1, 2, 3], replace(GREEDY, logit_bias=bias))
        assert len(found.ids) == len(usual.ids)
        assert set(found.ids).isdisjoint(usual.ids)


def test_an_end_token_stops_and_is_not_part_of_the_ids(llama: LLM) -> None:
    whole = llama.generate([1, 2, 3], replace(GREEDY, logprobs=0))
    position = next(i for i in range(3, 20) if whole.ids[i] not in whole.ids[:i])
    llama.engine.end_ids = frozenset([whole.ids[position]])
    try:
        stopped = llama.generate([1, 2, 3], max_tokens=20, logprobs=0)
        ignoring = llama.generate([1, 2, 3], GREEDY)
    finally:
        llama.engine.end_ids = llama.tokenizer.eog_ids
    assert (stopped.ids, stopped.finish_reason) == (whole.ids[:position], "stop")
    assert stopped.text == llama.tokenizer.decode(whole.ids[:position])
    assert len(stopped.logprobs) == position
    assert stopped.timings.completion_tokens == position
    assert (ignoring.ids, ignoring.finish_reason) == (whole.ids, "length")


def test_a_stop_id_stops_even_where_end_tokens_are_ignored(llama: LLM) -> None:
    whole = llama.generate([1, 2, 3], GREEDY).ids
    position = next(i for i in range(3, 20) if whole[i] not in whole[:i])
    stopped = llama.generate([1, 2, 3], replace(GREEDY, stop_token_ids=[whole[position], 0]))
    assert (stopped.ids, stopped.finish_reason) == (whole[:position], "stop")


def test_the_first_token_may_be_the_end(llama: LLM) -> None:
    first = llama.generate([1, 2, 3], replace(GREEDY, max_tokens=1)).ids[0]
    for n in (1, 3):
        [stopped, *_] = chunks = list(llama.stream([1, 2, 3], replace(GREEDY, n=n, stop_token_ids=[first])))
        assert len(chunks) == n
        assert (stopped.text, stopped.ids, stopped.finish_reason) == ("", [], "stop")


def test_max_tokens_and_context_are_lengths(llama: LLM) -> None:
    by_count = llama.generate([1, 2, 3], replace(GREEDY, max_tokens=7))
    assert (len(by_count.ids), by_count.finish_reason) == (7, "length")
    for length in (CONTEXT - 1, CONTEXT - 20):
        for max_tokens in (None, 1000):
            by_context = llama.generate([5] * length, replace(GREEDY, max_tokens=max_tokens))
            assert (len(by_context.ids), by_context.finish_reason) == (CONTEXT - length, "length")


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_request_whose_logits_are_nan_ends_with_an_error_alone(logprobs: int | None) -> None:
    """Its neighbours in the batch notice nothing, nor does who gets its pages."""
    prompts = random_prompts(3, 20, vocabulary=200)
    llm = tiny_llm("llama", num_pages=12)
    params = replace(SEEDED, logprobs=logprobs)
    expected = [llm.generate(prompt, params) for prompt in prompts]
    unused = next(token for token in range(200, 320) if all(token not in c.ids for c in expected))
    poison(llm, unused)
    found = llm.generate([prompts[0], [4, unused, 5], *prompts[1:]], params)
    failed = found.pop(1)
    assert (failed.ids, failed.text, failed.finish_reason) == ([], "", "error")
    assert failed.logprobs == (None if logprobs is None else ())
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.finish_reason) == (other.ids, "length")
        assert (one.logprobs is None) == (logprobs is None)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.id == b.id
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert [llm.generate(prompt, params).ids for prompt in prompts] == [c.ids for c in expected]
    assert_idle(llm)


def test_nothing_allowed_is_an_error(llama: LLM) -> None:
    forbidden = dict.fromkeys(range(llama.config.vocab_size), -np.inf)
    found = llama.generate([1, 2, 3], replace(GREEDY, logit_bias=forbidden, n=2, logprobs=1))
    assert [(c.ids, c.finish_reason, c.logprobs) for c in found] == [([], "error", ())] * 2


# Penalties and log probabilities


def by_hand(llm: LLM, prompt: list[int], change: Callable[[np.ndarray, list[int], list[int]], None], n: int) -> list:
    """Greedy ids after `change(logits, seen, generated)`, each from the logits of the whole text so far."""
    generated: list[int] = []
    for _ in range(n):
        logits = llm.logits(prompt + generated)[-1].astype(np.float64)
        change(logits, prompt + generated, generated)
        generated.append(int(logits.argmax()))
    return generated


def repetition(logits: np.ndarray, seen: list[int], generated: list[int]) -> None:
    for token in set(seen):
        logits[token] = logits[token] / 1.8 if logits[token] > 0 else logits[token] * 1.8


def presence(logits: np.ndarray, seen: list[int], generated: list[int]) -> None:
    for token in set(generated):
        logits[token] -= 2.5


def frequency(logits: np.ndarray, seen: list[int], generated: list[int]) -> None:
    for token in generated:
        logits[token] -= 0.7


def bias(logits: np.ndarray, seen: list[int], generated: list[int]) -> None:
    logits[9] += 6.5
    logits[14] = -np.inf


def together(logits: np.ndarray, seen: list[int], generated: list[int]) -> None:
    for change in (bias, repetition, presence, frequency):
        change(logits, seen, generated)


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        (repetition, {"repetition_penalty": 1.8}),
        pytest.param(presence, {"presence_penalty": 2.5}, marks=pytest.mark.slow),
        pytest.param(frequency, {"frequency_penalty": 0.7}, marks=pytest.mark.slow),
        (bias, {"logit_bias": {9: 6.5, 14: -np.inf}}),
        (
            together,
            {
                "repetition_penalty": 1.8,
                "presence_penalty": 2.5,
                "frequency_penalty": 0.7,
                "logit_bias": {9: 6.5, 14: -np.inf},
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_penalties_equal_their_definition(
    change: Callable[[np.ndarray, list[int], list[int]], None], overrides: dict[str, Any]
) -> None:
    """gemma3 repeats itself when nothing holds it back."""
    llm = tiny_llm("gemma3")
    prompt = [7, 3, 200, 3]
    expected = by_hand(llm, prompt, change, 16)
    plain = llm.generate(prompt, replace(GREEDY, max_tokens=16))
    changed = llm.generate(prompt, replace(GREEDY, max_tokens=16, logprobs=0, **overrides))
    assert list(changed.ids) == expected != list(plain.ids)
    # beside a request without penalties, both keep their own
    streams = [llm.stream(prompt, replace(GREEDY, max_tokens=16, **o)) for o in (overrides, {})]
    pairs = list(zip(*streams, strict=True))
    assert [token for chunk, _ in pairs for token in chunk.ids] == expected
    assert [token for _, chunk in pairs for token in chunk.ids] == list(plain.ids)
    # log probabilities are the model's own
    logits = llm.logits(prompt + expected).astype(np.float64)[len(prompt) - 1 : -1]
    own = [row[token] - np.logaddexp.reduce(row) for row, token in zip(logits, expected, strict=True)]
    np.testing.assert_allclose([entry.logprob for entry in changed.logprobs], own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("top", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)), 5])
def test_log_probabilities_equal_those_of_the_logits(roomy: LLM, params: SamplingParams, top: int) -> None:
    prompts = random_prompts(3, 20, seed=7)
    for completion in roomy.generate(prompts, replace(params, logprobs=top)):
        logits = roomy.logits([*completion.prompt_ids, *completion.ids]).astype(np.float64)
        logits = logits[len(completion.prompt_ids) - 1 : -1]
        expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)  # (completion, V)
        assert [entry.id for entry in completion.logprobs] == list(completion.ids)
        for entry, row in zip(completion.logprobs, expected, strict=True):
            assert entry.logprob == pytest.approx(row[entry.id], abs=1e-4)
            assert len(entry.top) == top
            assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
            np.testing.assert_allclose([v for _, v in entry.top], np.sort(row)[::-1][:top], rtol=0, atol=1e-4)
            np.testing.assert_allclose([row[t] for t, _ in entry.top], np.sort(row)[::-1][:top], rtol=0, atol=1e-4)


def test_each_request_gets_as_many_alternatives_as_it_asked_for(llama: LLM) -> None:
    streams = [llama.stream([1, 2], replace(GREEDY, logprobs=count)) for count in (None, 0, 3)]
    for chunks in list(zip(*streams, strict=True))[:-1]:
        assert chunks[0].logprobs is None
        assert [len(entry.top) for chunk in chunks[1:] for entry in chunk.logprobs] == [0, 3]


@pytest.mark.parametrize("top_k", [1, 10**12])
def test_top_k_of_any_size(llama: LLM, top_k: int) -> None:
    expected = llama.generate([1, 2, 3], GREEDY if top_k == 1 else SEEDED).ids
    assert llama.generate([1, 2, 3], replace(SEEDED, top_k=top_k)).ids == expected


# Logits beside running requests


def test_logits_leave_running_requests_as_they_are(roomy: LLM) -> None:
    expected = roomy.generate(list(range(20)), SEEDED).ids
    stream = roomy.stream(list(range(20)), SEEDED)
    found = []
    for number, chunk in enumerate(stream):
        found += chunk.ids
        if number % 4 == 0:
            roomy.logits([number] * 30)
    assert found == expected
    assert_idle(roomy)


@quick_with_llama
def test_logits_take_the_pages_of_the_youngest_requests_which_go_on_afterwards(roomy: LLM, name: str) -> None:
    """Called by whoever reads the streams: there is nobody to wait for."""
    prompts = random_prompts(3, 20, seed=4)
    expected = ids(roomy.generate(prompts, SEEDED))
    scarce = tiny_llm(name, num_pages=CONTEXT // PAGE, max_step_tokens=16)
    streams = [scarce.stream(prompt, SEEDED) for prompt in prompts]
    found: list[list[int]] = [[], [], []]
    for turn in range(60):
        chunk = next(streams[turn % 3], None)
        found[turn % 3] += chunk.ids if chunk else []
        if turn % 5 == 0:
            long = [turn] * (CONTEXT - turn)
            np.testing.assert_allclose(scarce.logits(long), roomy.logits(long), rtol=0, atol=1e-4)
    for rest, stream in zip(found, streams, strict=True):
        rest += [token for chunk in stream for token in chunk.ids]
    assert [tuple(tokens) for tokens in found] == expected
    assert_idle(scarce)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True], ids=["", "as on a GPU"])
@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_of_requests_and_passes_give_what_each_gives_alone(
    roomy: LLM, name: str, seed: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(8, 40, seed=seed)
    params = replace(SEEDED, n=2, max_tokens=25, repetition_penalty=1.2)
    expected = [ids(roomy.generate(prompt, params)) for prompt in prompts]
    texts = random_prompts(8, CONTEXT, seed=seed + 50)
    passes: list[tuple[Callable[[LLM, list[int]], Any], list[int]]] = [
        (kind, [1, *text])
        for kind in (
            lambda llm, t: llm.logits(t),
            lambda llm, t: llm.attention(t),
            lambda llm, t: llm.perplexity(t).nll,
        )
        for text in texts
    ]
    wanted = [kind(roomy, text) for kind, text in passes]
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", ahead)
    llm = tiny_llm(name, num_pages=CONTEXT // PAGE, max_step_tokens=16, max_sequences=5)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in random.Random(number).sample(range(8), 5):
                if number % 2:
                    kind, text = passes[(number * 8 + turn) % len(passes)]
                    np.testing.assert_allclose(
                        kind(llm, text), wanted[(number * 8 + turn) % len(passes)], rtol=0, atol=1e-3
                    )
                else:
                    assert ids(llm.generate(prompts[turn], params)) == expected[turn]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rng.randrange(100) * 2 + i,), daemon=True) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed, failed[0]
    assert_idle(llm)


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_loses_its_pages_to_a_pass_while_a_step_is_under_way(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id comes before it is computed again; or, where the step under way fails, is sampled again."""
    prompts = random_prompts(2, 20, seed=6)
    expected = ids(tiny_llm("llama").generate(prompts, SEEDED))
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama", num_pages=CONTEXT // PAGE)
    sequences = [llm.engine.add(prompt, SEEDED)[0] for prompt in prompts]
    for _ in range(6):
        llm.engine.step()
    assert [sequence.num_pending for sequence in sequences] == [1, 1]
    llm.logits([1] * 90)
    assert [sequence.pages for sequence in sequences] == [[], []]
    if fails:
        with monkeypatch.context() as patch:
            patch.setattr(StepPipeline, "collect", lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()
    found = [tuple(sequence.completion) for sequence in sequences]
    assert found == expected
    assert_idle(llm)


def test_a_pass_that_is_not_read_to_its_end_is_said_to_whoever_needs_its_pages() -> None:
    llm = tiny_llm("llama", num_pages=CONTEXT // PAGE, max_step_tokens=16)
    expected = llm.generate([1, 2, 3], GREEDY).ids
    settle(llm)
    rows = llm.engine.logits([1] * 90)
    next(rows)
    stream = llm.stream([1, 2, 3], GREEDY)
    for use in (lambda: next(llm.engine.logits([1] * 10)), lambda: next(stream), lambda: llm.generate([1], GREEDY)):
        with pytest.raises(OutOfMemoryError, match="read or close them first"):
            use()
    settle(llm)
    rows.close()
    assert llm.generate([1, 2, 3], GREEDY).ids == expected
    assert_idle(llm)


def test_logits_that_are_not_read_to_the_end_free_their_pages() -> None:
    llm = tiny_llm("llama", max_step_tokens=16)
    rows = llm.engine.logits([1] * 90)
    assert len(next(rows)) == 16
    assert llm.engine.pools[0].num_free < llm.engine.pools[0].num_pages
    rows.close()
    assert_idle(llm)


# What is refused


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([], {}, ParameterError, "empty"),
        ([-1], {}, ParameterError, "-1"),
        ([1, 320], {}, ParameterError, "320"),
        ([1] * CONTEXT, {}, ContextLengthError, str(CONTEXT)),
        ([1], {"logit_bias": {320: 1.0}}, ParameterError, "logit_bias"),
        ([1], {"stop_token_ids": [5, 320]}, ParameterError, "stop_token_ids"),
    ],
)
def test_a_request_that_cannot_run_is_refused_whole(
    llama: LLM, prompt: list[int], params: dict[str, Any], error: type[Exception], words: str
) -> None:
    for refuse in (
        lambda: llama.engine.add(prompt, SamplingParams(**params)),
        lambda: llama.generate([[1, 2], prompt], **params),
        lambda: llama.stream(prompt or [[]], **params),
    ):
        with pytest.raises(error if prompt else ParameterError) as caught:
            refuse()
        assert "\n" not in str(caught.value)
    if prompt:
        assert words in str(caught.value)
    assert_idle(llama)
