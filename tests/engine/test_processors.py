"""Logits processors and samplers: what they are given, in which order, and what ends where one fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM, ParameterError, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine.pipeline import StepPipeline
from forge.ops.sampling import sample

PROMPT = [3, 14, 15, 92, 65]
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.3, seed=7, logprobs=3)


@pytest.fixture(params=[False, True], ids=["waits", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether engines run ahead, as on a GPU."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", request.param)
    return bool(request.param)


@pytest.fixture
def llm() -> LLM:
    found: LLM = tiny_llm("llama")
    return found


def greatest(ids: list[int], logits: Any, random: np.random.Generator) -> int:
    return int(logits.argmax())


def as_they_are(ids: list[int], logits: Any) -> None:
    return None


def test_a_processor_is_given_the_ids_and_the_models_logits_of_each_id(ahead: bool, llm: LLM) -> None:
    seen: list[tuple[list[int], Any]] = []

    def see(ids: list[int], logits: Any) -> None:
        seen.append((ids, logits.copy()))

    found = llm.generate(PROMPT, DRAWN, logits_processors=[see], logit_bias={5: -np.inf})
    assert [ids for ids, _ in seen] == [[*PROMPT, *found.ids[:count]] for count in range(6)]
    expected = llm.logits([*PROMPT, *found.ids])[len(PROMPT) - 1 : -1]
    assert all(row.dtype == np.float32 for _, row in seen)
    np.testing.assert_allclose([row for _, row in seen], expected, rtol=0, atol=1e-4)  # without the bias, undivided
    assert found.ids == llm.generate(PROMPT, DRAWN, logit_bias={5: -np.inf}).ids


def test_processors_come_one_after_the_other_in_place_or_not(ahead: bool, llm: LLM) -> None:
    def double(ids: list[int], logits: Any) -> Any:
        return logits * np.float32(2)

    def add_one_to_ten(ids: list[int], logits: Any) -> None:
        logits[10] += 1e4

    seen: list[float] = []

    def see(ids: list[int], logits: Any) -> None:
        seen.append(float(logits[10]))

    one = llm.generate(PROMPT, GREEDY, logits_processors=[double, add_one_to_ten, see], max_tokens=1)
    other = llm.generate(PROMPT, GREEDY, logits_processors=[add_one_to_ten, double, see], max_tokens=1)
    assert one.ids == other.ids == [10]
    own = float(llm.logits(PROMPT)[-1, 10])
    assert seen == pytest.approx([2 * own + 1e4, 2 * (own + 1e4)], abs=1e-2)


def reference_row(row: Any, params: SamplingParams, ids: list[int], num_prompt: int) -> Any:
    """float64 (V,): bias, repetition, presence, frequency, temperature, as they are documented; no limits."""
    z = row.astype(np.float64)
    for token, bias in params.logit_bias.items():
        z[token] += bias
    for token in set(ids):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in set(ids[num_prompt:]):
        z[token] -= params.presence_penalty + params.frequency_penalty * ids[num_prompt:].count(token)
    return z / (params.temperature or 1.0)


def kept_ids(z: Any, params: SamplingParams) -> list[int]:
    """top-k, top-p, min-p in float64."""
    order = np.argsort(-z, kind="stable")[: params.top_k or len(z)]
    p = np.exp(z[order] - z[order[0]])
    if params.top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(p) / p.sum(), params.top_p)) + 1]
    return sorted(order[np.exp(z[order] - z[order[0]]) >= params.min_p].tolist())


@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 40, "top_p": 0.8, "min_p": 0.1}]
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_sampler_is_given_what_all_steps_before_the_draw_leave(
    llm: LLM, limits: dict[str, Any], temperature: float
) -> None:
    rows: list[Any] = []
    given: list[tuple[list[int], Any]] = []

    def process(ids: list[int], logits: Any) -> None:
        logits *= 3
        rows.append(logits.copy())

    def choose(ids: list[int], logits: Any, random: np.random.Generator) -> int:
        given.append((ids, logits.copy()))
        return 20 + len(ids) % 2

    params = SamplingParams(
        max_tokens=4, ignore_eos=True, temperature=temperature, **limits, repetition_penalty=1.5, presence_penalty=0.3
    )
    more: Any = {"frequency_penalty": 0.2, "logit_bias": {7: 2.5, 20: 1.0}, "logits_processors": [process]}
    found = llm.generate(PROMPT, params, sampler=choose, **more)
    assert found.ids == [21, 20, 21, 20]
    params = SamplingParams(temperature=temperature, **limits, repetition_penalty=1.5, presence_penalty=0.3, **more)
    for row, (ids, logits) in zip(rows, given, strict=True):
        expected = reference_row(row, params, ids, len(PROMPT))
        kept = kept_ids(expected, params)
        assert np.flatnonzero(np.isfinite(logits)).tolist() == kept
        np.testing.assert_allclose(logits[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_forges_own_draw_written_as_a_sampler_gives_its_ids(ahead: bool) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.4, top_k=30, min_p=0.02, seed=11)
    llm, prompts = tiny_llm("llama", deterministic=True), random_prompts(3, 20)

    def draw(ids: list[int], logits: Any, random: np.random.Generator) -> int:
        zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
        place = np.array([11], np.uint64), np.zeros(1, np.uint32), np.array([len(ids)], np.uint32)
        return int(sample(logits[None], one, zero.astype(np.int32), one, zero, *place)[0])

    drawn = [c.ids for c in llm.generate(prompts, params, sampler=draw)]
    assert drawn == [c.ids for c in llm.generate(prompts, params)]


def test_a_samplers_random_numbers_are_those_of_seed_choice_and_position(ahead: bool) -> None:
    llm = tiny_llm("llama")
    seen: list[tuple[int, float]] = []

    def choose(ids: list[int], logits: Any, random: np.random.Generator) -> int:
        number = random.random()
        seen.append((len(ids), number))
        return int(number * len(logits))

    params = SamplingParams(max_tokens=5, ignore_eos=True, seed=2**64 - 3, n=2, sampler=choose)
    choices = llm.generate(PROMPT, params)
    expected = {
        (choice, length): np.random.Generator(
            np.random.Philox(key=np.array([2**64 - 3, (choice << 32) + length], np.uint64))
        ).random()
        for choice in range(2)
        for length in range(5, 10)
    }
    assert sorted(seen) == sorted((length, number) for (_, length), number in expected.items())
    for choice, found in enumerate(choices):
        assert found.ids == [int(expected[choice, length] * llm.config.vocab_size) for length in range(5, 10)]
    others = llm.generate([[1, 2], PROMPT, [9]], params)
    assert [c.ids for c in others[2:4]] == [c.ids for c in choices]
    assert llm.generate(PROMPT, params, seed=5)[0].ids != choices[0].ids


def test_log_probabilities_are_the_models_and_of_the_samplers_id(llm: LLM) -> None:
    def forbid(ids: list[int], logits: Any) -> None:
        logits[:100] = -np.inf

    found = llm.generate(
        PROMPT, GREEDY, logits_processors=[forbid], sampler=lambda ids, logits, random: 120, logprobs=2
    )
    rows = llm.logits([*PROMPT, *found.ids])[len(PROMPT) - 1 : -1].astype(np.float64)
    expected = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    assert found.logprobs
    assert [one.id for one in found.logprobs] == [120] * 6
    np.testing.assert_allclose([one.logprob for one in found.logprobs], expected[:, 120], atol=1e-4)
    np.testing.assert_allclose([one.top[0][1] for one in found.logprobs], expected.max(1), atol=1e-4)


def test_requests_without_processors_keep_their_steps_and_their_bits(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, queued = random_prompts(4, 20), list[list[bool]]()
    llm = tiny_llm("llama", deterministic=True)
    engine, launch = llm.engine, StepPipeline.launch

    def launching(self: StepPipeline, step: Any, forks: Any) -> bool:
        queued.append([entry.sequence.is_separate for entry in step])
        return launch(self, step, forks)

    monkeypatch.setattr(StepPipeline, "launch", launching)

    def run(others: list[SamplingParams]) -> list[Any]:
        plain = [engine.add(ids, DRAWN)[0] for ids in prompts]
        for params in others:
            engine.add([4, 5, 6], params)
        values: dict[Any, list[Any]] = {sequence: [] for sequence in plain}
        while engine.has_work:
            for one in engine.step():
                if one.sequence in values:
                    values[one.sequence].append((one.id, one.logprobs))
        assert_idle(llm)
        return list(values.values())

    def flat(ids: list[int], logits: Any) -> Any:
        return np.zeros_like(logits)

    alone = run([])
    assert run([SamplingParams(max_tokens=9, logits_processors=[flat]), SamplingParams(n=2, sampler=greatest)]) == alone
    assert ahead == bool(queued)
    assert not any(map(any, queued))


def test_choices_share_the_prompt_and_each_is_processed(ahead: bool, llm: LLM) -> None:
    lengths: list[int] = []

    def count(ids: list[int], logits: Any) -> None:
        lengths.append(len(ids))

    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.5, seed=3, n=3)
    tokens = llm.engine.stats().prompt_tokens
    found = llm.generate([PROMPT], params, logits_processors=[count])
    assert llm.engine.stats().prompt_tokens - tokens == len(PROMPT)
    assert sorted(lengths) == [5] * 3 + [6] * 3 + [7] * 3 + [8] * 3
    assert [c.ids for c in found] == [c.ids for c in llm.generate([PROMPT], params)]
    assert_idle(llm)


def test_preemption_calls_processors_once_for_each_id(ahead: bool) -> None:
    prompts = random_prompts(6, 40, seed=2)
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=1)
    plain = [c.ids for c in tiny_llm("llama", deterministic=True).generate(prompts, params)]
    scarce = tiny_llm("llama", num_pages=12, max_step_tokens=16, deterministic=True)
    preemptions, seen = count_preemptions(scarce), list[tuple[int, ...]]()

    def see(ids: list[int], logits: Any) -> None:
        seen.append(tuple(ids))

    found = scarce.generate(prompts, params, logits_processors=[see])
    assert [c.ids for c in found] == plain
    assert preemptions
    assert sorted(seen) == sorted(
        (*ids, *done[:k]) for ids, done in zip(prompts, plain, strict=True) for k in range(20)
    )


class Counting:
    """Begun for each choice: its function counts its own calls."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.counts: list[int] = []

    def begin(self, prompt_ids: list[int]) -> Callable[[list[int], Any], None]:
        number = len(self.begun)
        self.begun.append(prompt_ids)
        self.counts.append(0)

        def count(ids: list[int], logits: Any) -> None:
            self.counts[number] += 1
            assert ids[: len(prompt_ids)] == prompt_ids

        return count


def test_what_has_a_begin_is_begun_for_each_choice(ahead: bool, llm: LLM) -> None:
    counting = Counting()
    found = llm.generate([PROMPT, [8, 9]], GREEDY, n=2, temperature=1, seed=1, logits_processors=[counting])
    assert sorted(counting.begun) == sorted([PROMPT, PROMPT, [8, 9], [8, 9]])
    assert counting.counts == [len(c.ids) for c in found]
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPT, logits_processors=[type("Bad", (), {"begin": lambda self, ids: 1 / 0})()])


def test_an_error_ends_its_own_request_and_shows_the_users_line(ahead: bool, llm: LLM) -> None:
    def fail_later(ids: list[int], logits: Any) -> None:
        if len(ids) == len(PROMPT) + 2:
            raise KeyError("mine")  # the user's line

    plain, hooked = llm.stream([1, 2, 3], GREEDY), llm.stream(PROMPT, GREEDY, logits_processors=[as_they_are])
    first = [next(plain), next(hooked)]
    stream = llm.stream(PROMPT, GREEDY, logits_processors=[as_they_are, fail_later])
    ids: list[int] = []
    with pytest.raises(KeyError, match="mine") as caught:
        ids.extend(chunk.ids[0] for chunk in stream)
    assert ids == llm.generate(PROMPT, GREEDY).ids[:2]
    assert caught.value.__cause__
    lines = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert [line.line for line in lines] == ['raise KeyError("mine")  # the user\'s line']
    assert [*first[0].ids, *[i for c in plain for i in c.ids]] == llm.generate([1, 2, 3], GREEDY).ids
    assert [*first[1].ids, *[i for c in hooked for i in c.ids]] == llm.generate(PROMPT, GREEDY).ids
    assert_idle(llm)


def test_an_error_of_one_choice_ends_all_of_its_request(ahead: bool, llm: LLM) -> None:
    def fail(ids: list[int], logits: Any, random: Any) -> int:
        raise SystemExit("mine")

    with pytest.raises(SystemExit, match="mine"):
        llm.generate(PROMPT, GREEDY, n=3, sampler=fail)
    assert_idle(llm)
    assert llm.generate(PROMPT, GREEDY).finish_reason == "length"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"logits_processors": [as_they_are, lambda ids, logits: logits[:-1]]},
            r"logits_processors\[1\] \(.*<lambda>\) gave numpy float32 \(319,\), and the logits are numpy float32 "
            r"\(320,\): return what is like them, or None after a change in place",
        ),
        ({"logits_processors": [lambda ids, logits: logits * np.float64(1) + 0.5 * np.ones(320)]}, "numpy float64"),
        ({"logits_processors": [lambda ids, logits: logits[None]]}, r"gave numpy float32 \(1, 320\)"),
        ({"logits_processors": [lambda ids, logits: 3]}, "gave 3, and"),
        ({"logits_processors": [lambda ids, logits: logits.tolist()]}, "gave "),
        (
            {"logits_processors": [lambda ids, logits: logits * np.nan]},
            "logits_processors left no token to draw: the greatest logit behind .*<lambda> is infinite or NaN",
        ),
        ({"logits_processors": [lambda ids, logits: logits - np.float32(np.inf)]}, "left no token to draw"),
        (
            {"sampler": lambda ids, logits, random: 320},
            r"sampler \(.*<lambda>\) gave 320: it must give an id, an integer from 0 to 319",
        ),
        ({"sampler": lambda ids, logits, random: -1}, "gave -1: it must give an id"),
        ({"sampler": lambda ids, logits, random: True}, "gave True"),
        ({"sampler": lambda ids, logits, random: None}, "gave None"),
        ({"sampler": lambda ids, logits, random: 3.0}, "gave 3.0"),
        ({"sampler": lambda ids, logits, random: logits}, r"gave numpy float32 \(320,\)"),
    ],
)
def test_what_is_no_logits_and_no_id_is_one_line(llm: LLM, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        llm.generate(PROMPT, GREEDY, **how)
    assert caught.value.parameter == next(iter(how))
    assert "\n" not in str(caught.value)
    assert llm.generate(PROMPT, GREEDY).finish_reason == "length"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"logits_processors": as_they_are}, "logits_processors must be a list, not <function as_they_are"),
        ({"logits_processors": ["x"]}, r"logits_processors must be a function of \(ids, logits\), not 'x'"),
        ({"logits_processors": [lambda ids: None]}, r"logits_processors must be a function of \(ids, logits\), not <"),
        ({"sampler": as_they_are}, r"sampler must be a function of \(ids, logits, random\), not <"),
        ({"sampler": 3}, r"sampler must be a function of \(ids, logits, random\), not 3"),
    ],
)
def test_functions_are_checked_when_they_are_given(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^{message}") as caught:
        SamplingParams(**how)
    assert caught.value.parameter == next(iter(how))


def test_params_with_functions_can_be_compared_and_hashed() -> None:
    params = SamplingParams(logits_processors=[as_they_are], sampler=greatest)
    assert params.logits_processors == (as_they_are,)
    assert hash(params) == hash(SamplingParams(logits_processors=[as_they_are], sampler=greatest))
    assert params != SamplingParams(sampler=greatest)
