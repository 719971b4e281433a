"""Embeddings; perplexity, whose likelihoods are computed some rows at a time, and room for logits on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, tiny_llm

import forge
from forge import NumericsError, OutOfMemoryError, ParameterError
from forge.backend import NUMPY
from forge.config import EngineConfig
from forge.formats import gguf
from forge.runtime import likelihoods

ARCH = Path(__file__).parents[1] / "data" / "arch"


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_perplexity_is_that_of_all_logits_however_many_rows_are_scored_at_a_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm("llama", max_step_tokens=20)
    ids = np.random.default_rng(0).integers(0, 250, 75).tolist()
    monkeypatch.setattr(likelihoods, "_SCORED", rows * llm.config.vocab_size)
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


@pytest.mark.parametrize(
    ("name", "head"), [("llama", "output.weight"), ("gemma3", "token_embd.weight"), ("stablelm", "output.weight")]
)
def test_an_embedding_pools_the_states_that_give_the_logits_of_transformers(name: str, head: str) -> None:
    golden = np.load(ARCH / name / "logits.npz")
    with gguf.read(ARCH / name / "model.gguf") as model:
        weight = np.asarray(model.load(head), np.float64)  # (V, E)
    ids = golden["ids_24"].tolist()
    expected = golden["logits_24"].astype(np.float64) @ np.linalg.pinv(weight).T  # (T, E)
    with forge.load(
        ARCH / name / "model.gguf", device="cpu", progress=False, engine=EngineConfig(max_step_tokens=20)
    ) as llm:
        for pooling, states in (("mean", expected.mean(axis=0)), ("last", expected[-1])):
            found = llm.embed([ids, ids[:1]], pooling=pooling, normalize=False)  # type: ignore[arg-type]
            np.testing.assert_allclose(found, [states, expected[0]], rtol=0, atol=2e-4)
            normal = states / np.linalg.norm(states)
            np.testing.assert_allclose(llm.embed(ids, pooling=pooling), [normal], rtol=0, atol=5e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "the prompt is empty"),
        ({"prompts": [9999]}, "token id 9999"),
        ({"prompts": "a", "pooling": "max"}, "pooling must be 'mean' or 'last', not 'max'"),
    ],
    ids=["empty", "outside", "pooling"],
)
def test_embed_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        tiny_llm("llama").embed(**arguments)


def test_an_embedding_that_is_not_finite_is_an_error() -> None:
    llm = tiny_llm("llama")
    llm.engine.runner.model.output_norm.weight = np.full(llm.config.width, np.nan, np.float32)
    with pytest.raises(NumericsError, match="not finite"):
        llm.embed("Hello")
    assert_idle(llm)
