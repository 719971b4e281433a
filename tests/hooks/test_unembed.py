"""Rows of the residual stream through the output's norm and product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import assert_idle, tiny_llm

from forge import LLM, OutOfMemoryError, ParameterError
from forge.engine import passes
from forge.runtime import unembedding

IDS = [3, 17, 5, 9, 200, 41, 8]
ARCH = Path(__file__).parents[1] / "data" / "arch"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm("llama")


# scaled streams and logits, soft caps, norms with a mean and a bias, norms behind sublayers, an output of its own
@pytest.mark.parametrize("name", ["llama", "granite", "falcon", "gemma2", "cohere2", "gpt2", "olmo2", "phi2"])
def test_the_last_layers_rows_give_the_logits(name: str) -> None:
    llm = tiny_llm(name)
    with llm.capture("*.resid_post") as cache:
        logits = llm.logits(IDS)
    found = llm.unembed(cache[f"blk.{llm.config.num_layers - 1}.resid_post"])
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    earlier = llm.unembed(cache["blk.0.resid_post"])
    assert np.abs(earlier - logits).max() > 1e-2
    assert_idle(llm)


def test_any_shape_in_parts_is_what_rows_give(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, from the weights."""
    rows = np.random.default_rng(0).normal(size=(2, 3, llm.config.width))
    model = llm.engine.runner.model
    normed = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + llm.config.norm_eps) * model.output_norm.weight
    wanted = normed @ np.asarray(model.output.weight, float).T
    monkeypatch.setattr(unembedding, "LOGIT_BYTES", 4 * 4 * llm.config.vocab_size)  # 4 rows, then 2
    calls = []
    unembed = llm.engine.runner.unembed
    monkeypatch.setattr(llm.engine.runner, "unembed", lambda part: calls.append(len(part)) or unembed(part))
    found = llm.unembed(rows)
    assert (found.shape, found.dtype) == (wanted.shape, np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert calls == [4, 2]
    np.testing.assert_allclose(llm.unembed(rows[0, 1].tolist()), wanted[0, 1], rtol=1e-4, atol=1e-4)
    assert llm.unembed(np.zeros((0, llm.config.width))).shape == (0, llm.config.vocab_size)


@pytest.mark.parametrize("residuals", [np.zeros((2, 5)), 3.0, "text", [["a"]], None])
def test_what_is_no_residual_is_an_error_of_one_line(llm: LLM, residuals: object) -> None:
    with pytest.raises(ParameterError, match=rf"^residuals [^\n]*\(\.\.\., {llm.config.width}\)[^\n]*$") as raised:
        llm.unembed(residuals)
    assert raised.value.parameter == "residuals"


def test_more_rows_than_memory_are_refused_before_anything_is_computed(llm: LLM) -> None:
    rows = np.broadcast_to(np.float32(0), (10**9, llm.config.width))
    with pytest.raises(OutOfMemoryError, match=r"^the logits of 1000000000 rows need [\d.]+ GB, .*: give fewer rows$"):
        llm.unembed(rows)
    assert passes.LOGIT_BYTES == unembedding.LOGIT_BYTES
