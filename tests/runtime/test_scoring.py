"""Perplexity, whose likelihoods are computed some rows at a time, and room for logits on the host."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import assert_idle, tiny_llm

from forge import OutOfMemoryError
from forge.backend import NUMPY
from forge.runtime import scoring


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_perplexity_is_that_of_all_logits_however_many_rows_are_scored_at_a_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm("llama", max_step_tokens=20)
    ids = np.random.default_rng(0).integers(0, 250, 75).tolist()
    monkeypatch.setattr(scoring, "_SCORED", rows * llm.config.vocab_size)
    found = llm.perplexity(ids, context=75)
    logits = llm.logits([llm.tokenizer.bos_id, *ids[1:]] if llm.tokenizer.add_bos else ids).astype(np.float64)
    highest = logits.max(axis=1, keepdims=True)
    log_softmax = logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
    assert found.nll == pytest.approx(-np.mean([log_softmax[t, token] for t, token in enumerate(ids[1:])]), rel=1e-6)
    assert found.tokens == 74
    assert_idle(llm)


def test_logits_that_do_not_fit_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    size = 4 * 50 * llm.config.vocab_size
    monkeypatch.setattr(llm.engine, "logits", None)
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: size - 1)
    with pytest.raises(OutOfMemoryError, match=r"logits of 50 tokens need 0\.00 GB, 0\.00 GB are free"):
        llm.logits([3] * 50)
