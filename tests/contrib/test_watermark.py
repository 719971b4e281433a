"""The watermark: green lists, their bias, and the test that finds them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from tiny_models import tiny_llm

from forge import LLM, ParameterError, SamplingParams
from forge.contrib.watermark import Watermark
from forge.ops.philox import random_bits

DRAWN = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def llm() -> LLM:
    found: LLM = tiny_llm("llama")
    return found


def test_green_lists_are_those_of_the_key_and_the_token_before() -> None:
    mark = Watermark(100, key=2**63 + 1, gamma=0.3, delta=1.5)
    numbers = [
        (int(random_bits(np.array([2**63 + 1], np.uint64), np.array([17], np.uint32), np.array([t], np.uint32))[0]), t)
        for t in range(100)
    ]
    expected = sorted(token for _, token in sorted(numbers)[:30])
    assert mark.green(17).tolist() == expected
    logits = np.zeros(100, np.float32)
    mark([3, 17], logits)
    assert logits.tolist() == [1.5 if token in expected else 0.0 for token in range(100)]
    assert mark.green(18).tolist() != expected
    assert Watermark(100, key=2, gamma=0.3).green(17).tolist() != expected


def test_the_score_is_that_of_the_paper() -> None:
    mark = Watermark(50, key=1, gamma=0.25)
    ids = [4, 9, 30, 9, 9, 12, 4, 49, 0, 7]
    green = sum(token in mark.green(before).tolist() for before, token in pairwise(ids[2:]))
    found = mark.detect(ids, start=3)
    assert (found.num_scored, found.num_green) == (7, green)
    z = (green - 0.25 * 7) / math.sqrt(7 * 0.25 * 0.75)
    assert found.z == pytest.approx(z)
    assert found.p_value == pytest.approx(0.5 - 0.5 * math.erf(z / math.sqrt(2)))


def test_generated_text_is_found_with_the_key_alone(llm: LLM) -> None:
    mark = Watermark(llm.config.vocab_size, key=42, gamma=0.25, delta=4.0)
    marked, plain = llm.generate([[7, 8], [9]], DRAWN, logits_processors=[mark]), llm.generate([[7, 8]], DRAWN)
    for one in marked:
        found = mark.detect([*one.prompt_ids, *one.ids], start=len(one.prompt_ids))
        assert found.num_scored == 40
        assert found.z > 6
        assert abs(Watermark(llm.config.vocab_size, key=43).detect(one.ids).z) < 4
    for one in plain:
        assert abs(mark.detect(one.ids).z) < 4


def test_a_wrong_size_and_bad_settings_are_named(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="vocab_size is 100, and the model has 320 tokens"):
        llm.generate([7], DRAWN, logits_processors=[Watermark(100, key=1)])
    for how, name in (({"key": -1}, "key"), ({"gamma": 1.0}, "gamma"), ({"gamma": 1e-6}, "gamma")):
        with pytest.raises(ParameterError, match=f"^{name} must"):
            Watermark(100, **{"key": 1, **how})  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="ids must be in"):
        Watermark(100, key=1).detect([1, 100])
    with pytest.raises(ParameterError, match="ids must hold at least two tokens"):
        Watermark(100, key=1).detect([1])
