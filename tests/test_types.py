"""What type checkers see of `LLM`, and that it is so. mypy reads this file with the package (see pyproject.toml)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import pytest

import forge
from forge import Completion, SamplingParams

MODEL = Path(__file__).parent / "data" / "arch" / "llama" / "model.gguf"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forge.LLM]:
    template = tmp_path_factory.mktemp("types") / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with forge.load(MODEL, device="cpu", context=64, chat_template=template) as model:
        yield model


def test_one_prompt_is_typed_and_answered_as_a_completion(llm: forge.LLM) -> None:
    ids: list[int] = [5, 6]
    for completion in (
        assert_type(llm.generate("a", max_tokens=1), Completion),
        assert_type(llm.generate("a", SamplingParams(max_tokens=1)), Completion),
        assert_type(llm.generate("a", n=1, max_tokens=1), Completion),
        assert_type(llm.generate(ids, max_tokens=1), Completion),
        assert_type(llm.generate((5, 6), max_tokens=1), Completion),
        assert_type(llm.chat(HI, max_tokens=1), Completion),
        assert_type(llm.chat(HI, n=1, max_tokens=1), Completion),
    ):
        assert isinstance(completion, Completion)


def test_several_prompts_or_choices_are_typed_and_answered_as_a_list(llm: forge.LLM) -> None:
    texts, batch = ["a", "b"], [[5, 6], [7]]
    for completions in (
        assert_type(llm.generate(texts, max_tokens=1), list[Completion]),
        assert_type(llm.generate(("a", "b"), max_tokens=1), list[Completion]),
        assert_type(llm.generate(batch, max_tokens=1), list[Completion]),
        assert_type(llm.generate(["a", [5]], SamplingParams(max_tokens=1)), list[Completion]),
        assert_type(llm.generate("a", n=2, max_tokens=1), list[Completion]),
        assert_type(llm.chat(HI, n=2, max_tokens=1), list[Completion]),
    ):
        assert isinstance(completions, list)
        assert [type(completion) for completion in completions] == [Completion, Completion]
    assert len(assert_type(llm.generate(texts, n=2, max_tokens=1), list[Completion])) == 4


def test_awaited_answers_are_typed_as_the_others(llm: forge.LLM) -> None:
    async def answers() -> None:
        assert isinstance(assert_type(await llm.agenerate("a", max_tokens=1), Completion), Completion)
        assert isinstance(assert_type(await llm.achat(HI, max_tokens=1), Completion), Completion)
        both = assert_type(await llm.agenerate(["a", "b"], max_tokens=1), list[Completion])
        both += assert_type(await llm.agenerate("a", n=2, max_tokens=1), list[Completion])
        both += assert_type(await llm.achat(HI, n=2, max_tokens=1), list[Completion])
        assert [type(completion) for completion in both] == 6 * [Completion]

    asyncio.run(answers())


def test_states_and_scores_are_typed_by_what_they_were_asked_for(llm: forge.LLM) -> None:
    with llm.prefill("a") as state:
        assert isinstance(assert_type(state.generate("b", max_tokens=1), Completion), Completion)
        assert isinstance(assert_type(state.generate(max_tokens=1), Completion), Completion)
        assert len(assert_type(state.generate(["b", "c"], max_tokens=1), list[Completion])) == 2
        assert len(assert_type(state.generate("b", n=2, max_tokens=1), list[Completion])) == 2
    assert isinstance(assert_type(llm.score("a", "b"), forge.Score), forge.Score)
    assert len(assert_type(llm.score("a", ["b", "c"]), list[forge.Score])) == 2
    assert len(assert_type(llm.score([5, 6], [[7], [8, 9]]), list[forge.Score])) == 2
