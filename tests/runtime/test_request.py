"""A request's times, by a clock that counts how often it is read."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest
from tiny_models import GREEDY, tiny_llm

from forge.runtime import request


@pytest.mark.parametrize("tokens", [1, 5])
def test_prefill_lasts_until_the_first_token_and_decoding_from_there_to_the_last(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = map(float, count(7))
    monkeypatch.setattr(request, "time", SimpleNamespace(perf_counter=clock.__next__))
    timings = tiny_llm("llama").generate([1, 2, 3], GREEDY, max_tokens=tokens).timings
    assert (timings.prompt_tokens, timings.completion_tokens) == (3, tokens)
    assert (timings.prefill_ms, timings.decode_ms) == (1000.0, 1000.0 * (tokens - 1))
