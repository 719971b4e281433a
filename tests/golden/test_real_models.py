"""The two real models against numbers of independent implementations (transformers in float32, llama.cpp)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forge
from forge import LLM
from forge.runtime.encoder import choose_template

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
GEMMA_TEMPLATE = Path(__file__).parents[1] / "data" / "chat" / "gemma.jinja"
pytestmark = pytest.mark.slow


class Model:
    """A loaded model and its golden data."""

    def __init__(self, llm: LLM, name: str) -> None:
        self.llm = llm
        self.golden: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.getfixturevalue(request.param), request.param)


def test_token_ids_are_those_of_llama_cpp(model: Model) -> None:
    tokenizer = model.llm.tokenizer
    for case in model.golden["tokens"]:
        text = case["text"]
        assert tokenizer.encode(text, parse_special=True) == case["ids_parse_special_true"], text
        assert tokenizer.encode(text) == case["ids_parse_special_false"], text
        assert tokenizer.encode(text, add_special=False, parse_special=True) == case["ids_no_add_special"], text
        assert tokenizer.decode(case["ids_parse_special_true"]) == case["detok"], text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == tuple(
        model.golden[key] for key in ("bos", "eos", "add_bos")
    )
    user_defined = {212}  # gemma's `</s>` is HTML, which llama.cpp takes for an end
    assert tokenizer.eog_ids == set(model.golden["eog"]) - user_defined


def test_greedy_ids_are_equal_alone_and_in_one_batch(model: Model) -> None:
    cases = model.golden["greedy"]
    for case in cases:
        completion = model.llm.generate(case["prompt_ids"], max_tokens=64, temperature=0, ignore_eos=True)
        assert list(completion.ids) == case["ids"], case["name"]
    together = model.llm.generate([case["prompt_ids"] for case in cases], max_tokens=64, ignore_eos=True)
    for case, completion in zip(cases, together, strict=True):
        assert list(completion.ids) == case["ids"], case["name"]


def test_logits_are_within_1e_3(model: Model) -> None:
    for case in model.golden["logits"]:
        last = model.llm.logits(case["prompt_ids"])[-1]
        ids, expected = zip(*case["top20"], *case["random200"], strict=True)
        np.testing.assert_allclose(last[list(ids)], expected, rtol=0, atol=1e-3)
        assert np.argsort(-last, kind="stable")[:20].tolist() == [token for token, _ in case["top20"]]


def test_perplexity_is_within_a_hundredth_of_a_percent(model: Model) -> None:
    golden = model.golden["ppl"]
    found = model.llm.perplexity((GOLDEN / golden["passage_file"]).read_text(), context=golden["ctx"])
    assert found.ppl == pytest.approx(golden["ppl_all"], rel=1e-4)
    assert found.tokens == len(golden["chunk_mean_nll"]) * (golden["ctx"] - 1)


def test_chats_are_rendered_and_encoded_as_expected(model: Model) -> None:
    golden, llm = model.golden["chat"], model.llm
    if golden["template_source"] != "gguf":
        assert llm.chat_template is None
        with pytest.raises(forge.ChatTemplateError, match="no chat template"):
            llm.chat([{"role": "user", "content": "Hi"}])
        llm = LLM(
            llm.engine,
            llm.tokenizer,
            choose_template(GEMMA_TEMPLATE, llm.tokenizer, str(llm.path)),
            path=llm.path,
            notes=(),
            load_parts={},
            load_ms=0.0,
        )
    for case in golden["cases"]:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        if "error" in case:
            with pytest.raises(forge.ChatTemplateError, match=case["error"].split(": ", 1)[1]):
                llm.render_chat(case["messages"], **options)
            continue
        assert llm.render_chat(case["messages"], **options) == case["text"]
        if case["add_generation_prompt"]:
            assert llm.encode_chat(case["messages"]) == case["ids"]
