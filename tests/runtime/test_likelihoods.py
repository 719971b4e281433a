"""Scores of continuations, and logits of chosen positions, beside transformers' logits and beside all logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, random_prompts, tiny_llm

from forge import LLM, ContextLengthError, ForgeError, NumericsError, OutOfMemoryError, ParameterError

ARCH = Path(__file__).parents[1] / "data" / "arch"
IDS = random_prompts(1, 1, seed=3)[0] + np.random.default_rng(3).integers(0, 250, 59).tolist()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm("gemma3")


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def expected(rows: Any, prompt: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """From log probabilities (T, V) of the prompt and the continuation."""
    own = rows[len(prompt) - 1 : len(prompt) + len(continuation) - 1]
    values = [float(row[token]) for row, token in zip(own, continuation, strict=True)]
    return values, own.argmax(axis=1).tolist() == continuation


def computed_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A list that gets the counts of tokens of each sequence of each step."""
    found: list[list[int]] = []
    batch = llm.engine.runner._batch

    def counted(step: Any, rows: Any = None) -> Any:
        found.append([entry.count for entry in step])
        return batch(step, rows)

    monkeypatch.setattr(llm.engine.runner, "_batch", counted)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_scores_are_those_of_transformers(name: str) -> None:
    golden = np.load(ARCH / name / "logits.npz")
    ids, rows = golden["ids_24"].tolist(), log_softmax(golden["logits_24"])
    llm = tiny_llm(name)
    for start in (1, 9, 23):
        values, is_greedy = expected(rows, ids[:start], ids[start:])
        found = llm.score(ids[:start], ids[start:])
        np.testing.assert_allclose(found.logprobs, values, rtol=0, atol=2e-4)
        assert found.logprob == pytest.approx(sum(values), abs=2e-3)
        assert (found.ids, found.prompt_ids, found.is_greedy) == (ids[start:], ids[:start], is_greedy)
    greedy = [int(golden["logits_24"][8].argmax())]
    assert llm.score(ids[:9], [greedy, [*greedy, 3]])[0].is_greedy


@pytest.mark.parametrize("pages", [200, 9], ids=["much room", "no room beside the prompt"])
@pytest.mark.parametrize("step_tokens", [512, 7])
def test_continuations_share_their_prompt(pages: Any, step_tokens: int, llm: LLM) -> None:
    own = tiny_llm("gemma3", num_pages=pages, max_step_tokens=step_tokens, context=60)
    prompt, others = IDS[:37], [[5], IDS[37:60], [8, 9], [5, 7, 7], [249]]
    others.append([int(llm.logits(prompt, -1).argmax())])
    found = own.score(prompt, others)
    for score, continuation in zip(found, others, strict=True):
        values, is_greedy = expected(log_softmax(llm.logits([*prompt, *continuation])), prompt, continuation)
        np.testing.assert_allclose(score.logprobs, values, rtol=0, atol=1e-5)
        assert (score.logprob, score.is_greedy) == (pytest.approx(sum(values), abs=1e-4), is_greedy)
    assert [score.is_greedy for score in found] == [*[False] * 5, True]
    assert_idle(own)


def test_a_prompt_is_computed_once_and_sequences_share_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    steps = computed_tokens(llm, monkeypatch)
    llm.score(IDS[:30], [[1], [2], [3, 4, 5], [6, 7]])
    assert steps == [[30], [2, 1]]
    steps.clear()
    llm.score([IDS[:10], IDS[:20], IDS[:10]], [[1], [2, 3], [[4], [5]]])
    assert steps == [[10, 21]]
    steps.clear()
    llm.embed([IDS[:10], IDS[:20]])
    llm.logits([IDS[:10], IDS[:20]], positions=-1)
    assert steps == [[10, 20], [10, 20]]


def test_a_batch_has_the_shape_of_its_continuations(llm: LLM) -> None:
    found = llm.score([IDS[:4], IDS[:5], IDS[:4]], [[1, 2], [[1], [3, 3]], [[7]]])
    assert [[one.ids for one in each] if isinstance(each, list) else each.ids for each in found] == [
        [1, 2],
        [[1], [3, 3]],
        [[7]],
    ]
    assert found[1][1].logprob == pytest.approx(llm.score(IDS[:5], [3, 3]).logprob, abs=1e-5)
    assert llm.score([], []) == []
    assert llm.score(IDS[:4], []) == []


def test_a_string_behind_a_string_has_the_tokens_of_both_together() -> None:
    llm = tiny_llm("llama")
    encode = llm.tokenizer.encode_prompt
    for prompt, continuation in (("Hello wor", "ld and more"), ("a b", " c"), ("x ", " y")):
        ids, found = llm.encode_pair(prompt, continuation)
        assert ids + found == encode(prompt + continuation)
        assert ids == encode(prompt)[: len(ids)]
        score = llm.score(prompt, continuation)
        assert (score.prompt_ids, score.ids) == (ids, found)
    assert len(encode("or")) == 1, "one token of both"
    assert llm.encode_pair("o", "r") == (encode("o"), encode("r"))
    both = llm.encode_pair(encode("a b"), " c")
    assert llm.tokenizer.decode([*both[0], *both[1]]) == "a b c"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [[3], []]), ParameterError, "a continuation is empty"),
        (([[1], [2]], [[3]]), ParameterError, "continuations has 1 entries for 2 prompts"),
        (([1, 2], [9999]), ParameterError, "token id 9999"),
        (([9999], [1]), ParameterError, "token id 9999"),
        (([1, 2], 5), ParameterError, "continuations must be a string or a list of token ids, not a int"),
        (([1] * 90, [2] * 8), ContextLengthError, "97 tokens do not fit the context of 96"),
    ],
)
def test_score_refuses(arguments: Any, error: type[ForgeError], message: str, llm: LLM) -> None:
    with pytest.raises(error, match=message):
        llm.score(*arguments)
    assert_idle(llm)


def test_a_continuation_may_reach_one_token_beyond_the_context(llm: LLM) -> None:
    """Its last token is predicted and not computed."""
    prompt, continuation = [*IDS, *IDS[:30]], [2] * 7
    values, _ = expected(log_softmax(llm.logits([*prompt, *continuation[:-1]])), prompt, continuation)
    np.testing.assert_allclose(llm.score(prompt, continuation).logprobs, values, rtol=0, atol=1e-5)


def test_scores_that_are_not_finite_are_an_error() -> None:
    llm = tiny_llm("llama")
    llm.engine.runner.model.output_norm.weight = np.full(llm.config.width, np.nan, np.float32)
    llm.engine.runner.model._logit_norm.weight = np.full(llm.config.width, np.nan, np.float32)
    with pytest.raises(NumericsError, match="not finite"):
        llm.score([1, 2], [3])
    assert_idle(llm)


@pytest.mark.parametrize("positions", [-1, 3, slice(5, 50), slice(None, None, -7), [1, 59, -1, 1], np.array([2]), []])
def test_logits_of_positions_are_rows_of_all(positions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("gemma3", max_step_tokens=16)
    rows: list[int] = []
    forward = llm.engine.runner.forward

    def counted(step: Any, **options: Any) -> Any:
        rows.append(len(options["rows"]))
        return forward(step, **options)

    whole = llm.logits(IDS)
    monkeypatch.setattr(llm.engine.runner, "forward", counted)
    expected = whole[np.array(positions, int) if isinstance(positions, list) else positions]
    found = llm.logits(IDS, positions)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert sum(rows) == len({int(place) for place in np.atleast_1d(np.arange(60)[positions])})
    assert_idle(llm)


def test_logits_of_a_batch_are_a_list(llm: LLM) -> None:
    found = llm.logits([IDS[:9], IDS[:3]], positions=slice(-2, None))
    for one, ids in zip(found, (IDS[:9], IDS[:3]), strict=True):
        np.testing.assert_allclose(one, llm.logits(ids)[-2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("a", "positions must be an integer, a slice, or a list of integers, not 'a'"),
        ([1.5], "positions must be an integer"),
        (True, "positions must be an integer"),
        ([[1], [2, 3]], "positions must be an integer"),
        (slice("a"), "positions must be an integer"),
        (3, "positions holds 3, and the prompt has 3 tokens"),
        ([0, -4], "positions holds -4"),
    ],
)
def test_logits_refuse(positions: Any, message: str, llm: LLM) -> None:
    with pytest.raises(ParameterError, match=message):
        llm.logits([1, 2, 3], positions)


def test_a_pass_that_fits_beside_no_other_says_what_holds_the_pages() -> None:
    llm = tiny_llm("llama", num_pages=12)
    rows = llm.engine.logits([1] * 90)
    next(rows)
    with pytest.raises(
        OutOfMemoryError, match=r"a pass over 10 positions needs pages .* that others hold: 1 pass that"
    ):
        llm.score([1] * 9, [1, 1])
    rows.close()
    assert llm.score([1] * 9, [1, 1]).logprob < 0
    assert_idle(llm)
