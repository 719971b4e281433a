"""DRY and XTC: what llama.cpp's samplers leave of the same logits, and cases by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import random_prompts, tiny_llm

from forge import LLM, ParameterError, SamplingParams
from forge.contrib.samplers import DRY, XTC, draw

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "samplers" / "llama_cpp.json").read_text())


@pytest.fixture(scope="module")
def llm() -> LLM:
    found: LLM = tiny_llm("llama", deterministic=True)
    return found


@pytest.mark.parametrize("case", GOLDEN["dry"])
def test_dry_takes_what_llama_cpp_takes(llm: LLM, case: dict[str, Any]) -> None:
    names = "multiplier", "base", "allowed_length", "last_n", "breakers"
    dry = DRY(llm.tokenizer, **{name: case[name] for name in names})
    logits = np.zeros(llm.config.vocab_size, np.float32)
    dry(case["ids"], logits)
    expected = {int(token): penalty for token, penalty in case["penalties"].items()}
    assert np.flatnonzero(logits).tolist() == sorted(expected)
    np.testing.assert_allclose(-logits[sorted(expected)], [expected[t] for t in sorted(expected)], rtol=2e-5)


def test_dry_by_hand(llm: LLM) -> None:
    dry = DRY(llm.tokenizer, multiplier=2, base=3, allowed_length=2, breakers=())
    logits = np.ones(320, np.float32)
    dry([9, 5, 6, 7, 9, 6, 8, 5, 6], logits)  # behind 5 6 came 7; behind 6 alone, 8 and 7
    assert np.flatnonzero(logits != 1).tolist() == [7]
    assert logits[7] == 1 - 2
    dry([1, 5, 6, 7, 1, 5, 6], logits)  # a match of three
    assert logits[7] == 1 - 2 - 2 * 3
    assert [found.tolist() for found in dry.matches([4])] == [[], []]


def test_dry_ends_a_loop_of_the_model(llm: LLM) -> None:
    prompt = [11, 12, 13, 14] * 6

    def loop(ids: list[int], logits: Any) -> None:
        logits[ids[-4]] += 40  # a model that repeats itself

    def longest(ids: list[int]) -> int:
        """Of the matches that new tokens have gone on with."""
        dry = DRY(llm.tokenizer, allowed_length=1, breakers=())
        found = [
            dict(zip(*(a.tolist() for a in dry.matches(ids[:n])), strict=True)).get(ids[n], 0) for n in range(24, 36)
        ]
        return max(found)

    params = SamplingParams(max_tokens=12, ignore_eos=True)
    dry = DRY(llm.tokenizer, multiplier=5.0, allowed_length=3, breakers=())
    plain = llm.generate(prompt, params, logits_processors=[loop])
    found = llm.generate(prompt, params, logits_processors=[loop, dry])
    assert plain.ids == [11, 12, 13, 14] * 3
    assert longest([*prompt, *plain.ids]) == 31
    assert longest([*prompt, *found.ids]) <= 6  # 5 * 1.75 ** 4 > 40


@pytest.mark.parametrize("case", GOLDEN["xtc"])
def test_xtc_leaves_what_llama_cpp_leaves(case: dict[str, Any]) -> None:
    logits = np.array(case["logits"], np.float32)
    left = XTC(threshold=case["threshold"]).left(logits)
    assert np.flatnonzero(np.isfinite(left)).tolist() == case["kept"]
    np.testing.assert_array_equal(left[case["kept"]], logits[case["kept"]])


def test_xtc_draws_from_what_is_left_as_often_as_it_is_to() -> None:
    p = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = np.log(p).astype(np.float32)
    random = np.random.Generator(np.random.Philox(key=3))
    xtc = XTC(probability=0.25, threshold=0.15)
    counts = np.bincount([xtc([], logits, random) for _ in range(4000)], minlength=5) / 4000
    left = np.array([0, 0, 0.2, 0.06, 0.04]) / 0.3
    np.testing.assert_allclose(counts, 0.75 * p + 0.25 * left, atol=4 * np.sqrt(0.25 / 4000))
    assert draw(logits, 0.0) == 0
    assert draw(logits, 0.39) == 0
    assert draw(logits, 0.41) == 1
    assert draw(logits, np.nextafter(1, 0)) == 4


def test_xtc_in_a_batch_is_the_same_as_alone(llm: LLM) -> None:
    prompts = random_prompts(3, 12)
    params = SamplingParams(
        max_tokens=6, ignore_eos=True, temperature=1.0, min_p=0.02, seed=9, n=2, sampler=XTC(threshold=0.01)
    )
    together = [c.ids for c in llm.generate(prompts, params)]
    assert together == [c.ids for ids in prompts for c in llm.generate([ids], params)]
    assert together[0] != together[1]
    without = [c.ids for c in llm.generate(prompts, params, sampler=XTC(threshold=0.01, probability=0))]
    assert without != together


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"multiplier": -1}, "multiplier"),
        ({"base": 0.5}, "base"),
        ({"allowed_length": 0}, "allowed_length"),
        ({"last_n": 0}, "last_n"),
        ({"breakers": ["ab"]}, "breakers"),
    ],
)
def test_bad_settings_of_dry_are_named(llm: LLM, how: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name} ") as caught:
        DRY(llm.tokenizer, **how)
    assert caught.value.parameter == name


def test_bad_settings_of_xtc_are_named() -> None:
    with pytest.raises(ParameterError, match=r"^probability must"):
        XTC(probability=1.5)
    with pytest.raises(ParameterError, match=r"^threshold must"):
        XTC(threshold=0.0)
