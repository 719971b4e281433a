"""What `LLM.capture` keeps: whichever way a prompt was computed, whoever ran beside it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM, Cache, ParameterError, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.runtime.hooks_front import HookPoints

POINT = "blk.1.resid_post"
IDS = [3, 17, 5, 9, 200, 41, 8]
FIVE = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm("llama")


def captured(llm: LLM, prompts: Any, points: Any = POINT, **how: Any) -> Cache:
    with llm.capture(points, **how) as cache:
        llm.generate(prompts, FIVE)
    assert_idle(llm)
    return cache


def test_what_is_kept_gives_the_logits(llm: LLM) -> None:
    """The stream's last value through the output's norm and product, in float64, is what the model says."""
    with llm.capture(["*.resid_post", "final_norm", "logits"]) as cache:
        logits = llm.logits(IDS)
    model = llm.engine.runner.model
    stream = cache[f"blk.{llm.config.num_layers - 1}.resid_post"].astype(np.float64)
    normed = stream / np.sqrt(np.mean(stream**2, axis=1, keepdims=True) + llm.config.norm_eps)
    normed *= model.output_norm.weight
    np.testing.assert_allclose(cache["final_norm"], normed, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cache["logits"], normed @ np.asarray(model.output.weight, float).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache["logits"], logits)


def test_hooked_requests_give_the_ids_and_log_probabilities_of_others(llm: LLM) -> None:
    prompts, params = random_prompts(3, 20), SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.5, seed=3)
    plain = llm.generate(prompts, params, logprobs=1)
    with llm.capture("*"):
        hooked = llm.generate(prompts, params, logprobs=1)
    assert [one.ids for one in hooked] == [one.ids for one in plain]
    for one, other in zip(hooked, plain, strict=True):
        ours, theirs = ([found.logprob for found in each.logprobs or ()] for each in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "ahead"),
    [
        ({"max_step_tokens": 4}, False),
        ({"num_pages": 12, "max_step_tokens": 24}, False),
        ({"num_pages": 12, "max_step_tokens": 24}, True),
    ],
)
def test_chunks_batches_and_preemption_change_nothing(
    llm: LLM, sizes: dict[str, int], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", ahead)
    prompts = random_prompts(5, 30, seed=1)
    narrow = tiny_llm("llama", **sizes)  # type: ignore[arg-type]
    preemptions = count_preemptions(narrow)
    points = [POINT, "blk.0.attn.pattern", "blk.2.ffn.act", "logits"]
    found = captured(narrow, prompts, points)
    assert bool(preemptions) == ("num_pages" in sizes)
    for number, ids in enumerate(prompts):
        alone = captured(llm, ids, points)
        for point in points:
            positions = found.requests[number].positions(point)
            np.testing.assert_array_equal(positions, np.arange(len(ids) + 4))
            np.testing.assert_array_equal(positions, alone.positions(point))
            np.testing.assert_allclose(found[number, point], alone[point], rtol=1e-4, atol=1e-5, err_msg=point)


@pytest.mark.parametrize(
    ("positions", "steps", "wanted"),
    [
        (-1, None, [6]),
        ([0, -2], None, [0, 5]),
        (slice(-3, -1), None, [4, 5]),
        (slice(-2, None), None, [5, 6, 7, 8, 9, 10]),
        (slice(None, None, 4), None, [0, 4, 8]),
        (None, "prompt", [0, 1, 2, 3, 4, 5, 6]),
        (None, "generated", [7, 8, 9, 10]),
        (slice(5, None), "prompt", [5, 6]),
        (8, "generated", [8]),
    ],
)
def test_positions_and_steps(llm: LLM, positions: Any, steps: Any, wanted: list[int]) -> None:
    every = captured(llm, IDS)
    found = captured(llm, IDS, positions=positions, steps=steps)
    assert found.positions(POINT).tolist() == wanted
    np.testing.assert_allclose(found[POINT], every[POINT][wanted], rtol=1e-5, atol=1e-6)


def test_one_request_of_a_call_and_all_choices(llm: LLM) -> None:
    prompts = [IDS, IDS[:3], IDS[2:]]
    one = captured(llm, prompts, request=2)
    assert [request.prompt_ids for request in one] == [IDS[2:]]
    np.testing.assert_allclose(one[POINT], captured(llm, IDS[2:])[POINT], rtol=1e-4, atol=1e-5)
    with llm.capture(POINT) as cache:
        several = llm.generate([IDS], max_tokens=3, ignore_eos=True, n=2, temperature=2.0, seed=1)
        llm.logits(IDS[:2])
    assert [len(request[POINT]) for request in cache] == [9, 9, 2]
    for request, completion in zip(cache, several, strict=False):
        whole = captured(llm, [*IDS, *completion.ids], steps="prompt")[POINT]
        np.testing.assert_allclose(request[POINT], whole[:9], rtol=1e-4, atol=1e-5)
    with pytest.raises(ParameterError, match=r"3 requests: say which, cache\[0, 'blk"):
        cache[POINT]
    with pytest.raises(ParameterError, match="shapes"):
        cache.stack(POINT)


def test_streams_and_tasks_have_the_blocks_in_which_they_were_called(llm: LLM) -> None:
    expected = captured(llm, IDS)[POINT]
    with llm.capture(POINT) as cache:
        chunks = llm.stream(IDS, FIVE)
    outside = llm.generate(IDS, FIVE)
    assert len(cache.requests) == 0  # nothing was computed yet
    assert [token for chunk in chunks for token in chunk.ids] == outside.ids
    np.testing.assert_allclose(cache[POINT], expected, rtol=1e-5, atol=1e-6)

    async def task(points: str | None) -> Any:
        if points is None:
            return (await llm.agenerate(IDS, FIVE)).ids
        with llm.capture(points) as own:
            await asyncio.sleep(0)
            await llm.agenerate(IDS, FIVE)
        return own

    async def together() -> list[Any]:
        return await asyncio.gather(task(POINT), task(None), task("embed"))

    first, ids, last = asyncio.run(together())
    assert ids == outside.ids
    assert [len(first), len(last)] == [1, 1]
    np.testing.assert_allclose(first[POINT], expected, rtol=1e-4, atol=1e-5)
    assert list(last.requests[0]) == ["embed"]


def test_other_calls_of_the_model_are_captured_too(llm: LLM) -> None:
    expected = captured(llm, IDS, steps="prompt")[POINT]
    with llm.capture(POINT) as cache:
        llm.logits([IDS, IDS], positions=-1)
        llm.embed(IDS)
        llm.score(IDS[:4], [IDS[4:], IDS[4:6]])
        llm.perplexity(IDS)
        llm.attention(IDS)
    lengths = [len(request[POINT]) for request in cache]
    assert lengths == [7, 7, 7, 6, 5, 6, 7]
    for length, request in zip(lengths, cache, strict=True):
        np.testing.assert_allclose(request[POINT], expected[:length], rtol=1e-4, atol=1e-5)


def test_logits_and_final_norm_are_captured_where_no_logits_were_asked_for(llm: LLM) -> None:
    expected = llm.logits(IDS)
    with llm.capture(["logits", "final_norm"]) as cache:
        llm.generate(IDS, max_tokens=1)
        llm.logits(IDS, positions=-1)
    for request in cache:
        np.testing.assert_allclose(request["logits"], expected, rtol=1e-5, atol=1e-5)
        assert len(request["final_norm"]) == len(IDS)
    some = captured(llm, IDS, "logits", positions=[2, -1])
    np.testing.assert_allclose(some["logits"], expected[[2, 6]], rtol=1e-5, atol=1e-5)


def test_dtypes_reductions_and_arrays_on_the_device(llm: LLM) -> None:
    rows = captured(llm, IDS)[POINT]
    half = captured(llm, IDS, dtype="f16")[POINT]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, rows.astype(np.float16))
    np.testing.assert_array_equal(captured(llm, IDS, device=True)[POINT], rows)
    rng = np.random.default_rng(0)
    vectors, encoder, bias = rng.normal(size=(3, 64)), rng.normal(size=(64, 20)), rng.normal(size=20)
    np.testing.assert_allclose(captured(llm, IDS, reduce="mean")[POINT], rows.mean(axis=0)[None], rtol=1e-5, atol=1e-6)
    norms = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    np.testing.assert_allclose(captured(llm, IDS, reduce="norm")[POINT], norms, rtol=1e-5)
    products = captured(llm, IDS, reduce=("project", vectors))[POINT]
    np.testing.assert_allclose(products, rows @ vectors.T, rtol=1e-4, atol=1e-5)
    best = captured(llm, IDS, reduce=("top_k", encoder, bias, 4))
    active = np.maximum(rows @ encoder + bias, 0)
    wanted = np.sort(active, axis=1)[:, ::-1][:, :4]
    np.testing.assert_allclose(best[POINT], wanted, rtol=1e-4, atol=1e-5)
    indices = best.requests[0][f"{POINT}.indices"]
    assert indices.dtype == np.int32
    np.testing.assert_allclose(np.take_along_axis(active, indices, axis=1), wanted, rtol=1e-4, atol=1e-5)
    own = captured(llm, IDS, reduce=lambda rows, where: rows[:, :2] * where.positions[:, None])[POINT]
    np.testing.assert_allclose(own, rows[:, :2] * np.arange(len(rows))[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"points": "blk.1.resid_pots"}, "no 'blk.1.resid_pots'; the nearest are blk.1.resid_post"),
        ({"points": "blk.*.attn.pattren"}, r"the nearest are blk\.0\.attn\.pattern"),
        ({"points": ["embed", "blk.9.resid_post"]}, "no 'blk.9.resid_post'"),
        ({"points": []}, "points must be a name, a glob"),
        ({"points": 3}, "points must be a name, a glob"),
        ({"positions": 1.5}, "positions must be an integer"),
        ({"positions": []}, "positions must be an integer"),
        ({"positions": [1, 1]}, "a list of different integers"),
        ({"positions": slice(0, 5, -1)}, "a slice with a step above 0"),
        ({"steps": "all"}, "steps must be 'prompt', 'generated' or None"),
        ({"request": -1}, "request must be at least 0"),
        ({"dtype": "bf16"}, "dtype must be 'f32' or 'f16'"),
        ({"device": 1}, "device must be True or False"),
        ({"device": True, "reduce": "norm"}, "it is computed on the host"),
        ({"reduce": "median"}, "reduce must be 'mean', 'norm'"),
        ({"reduce": ("project", np.zeros((2, 63)))}, r"shape \(2, 63\), and blk.1.resid_post takes \(M, 64\)"),
        ({"reduce": ("top_k", np.zeros((64, 5)), None, 6)}, r"k must be in \[1, 5\]"),
        ({"reduce": ("top_k", np.zeros((64, 5)), np.zeros(4), 2)}, r"the bias has the shape \(4,\)"),
        ({"points": "blk.0.attn.pattern", "reduce": "mean"}, "attention weights"),
        ({"poistions": 3}, "did you mean positions"),
    ],
)
def test_what_cannot_be_captured_is_refused_where_the_block_begins(llm: LLM, how: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        llm.capture(**({"points": POINT} | how))


def test_positions_that_a_prompt_does_not_have_are_refused_before_anything_runs(llm: LLM) -> None:
    for positions, steps, message in (
        (-8, None, "positions holds -8, which a prompt of 7 tokens with 4 more does not have"),
        (11, None, "positions holds 11"),
        (7, "prompt", "positions holds 7, which a prompt of 7 tokens does not have"),
    ):
        with llm.capture(POINT, positions=positions, steps=steps) as cache:  # type: ignore[arg-type]
            with pytest.raises(ParameterError, match=message):
                llm.generate(IDS, FIVE)
            assert not cache.requests
    with llm.capture(POINT, reduce=lambda rows, where: rows[:1]), pytest.raises(ParameterError, match="a row for each"):
        llm.generate(IDS, FIVE)
    with pytest.raises(ParameterError, match="nothing was captured of 'embed'; it holds blk"):
        captured(llm, IDS)["embed"]
    assert_idle(llm)


def test_a_list_of_points_is_shown_as_a_table(llm: LLM) -> None:
    points = llm.hook_points()
    lines = repr(points).splitlines()
    assert lines[0].split() == ["embed", "(T,", "64)", "float32"]
    assert lines[-1].split() == ["logits", "(R,", "320)", "float32"]
    assert [line.split()[0] for line in lines if line.startswith("blk.")] == [
        point.name.replace("0", "N", 1) for point in points if point.name.startswith("blk.0.")
    ]
    mixed = HookPoints([replace(points[1], name=f"blk.{layer}.resid_pre") for layer in (0, 1, 2, 4, 10, 11)])
    assert " ".join(repr(mixed).split()) == "blk.N.resid_pre (T, 64) float32 N = 0 to 2, 4, 10 to 11"
    other = replace(points[1], shape=("T", 8), name="blk.3.resid_pre")
    assert [line.split("N = ")[1] for line in repr(HookPoints([*mixed, other])).splitlines()] == [
        "0 to 2, 4, 10 to 11",
        "3",
    ]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": []}, "dtype must be 'f32' or 'f16'"),
        ({"steps": object()}, "steps must be 'prompt'"),
        ({"reduce": np.ones(3)}, "reduce must be 'mean', 'norm'"),
        ({"reduce": (np.ones(2), 1)}, "reduce must be 'mean', 'norm'"),
        ({"reduce": ("project", "x")}, "reduce must be an array of numbers"),
        ({"reduce": ("project", [[1], [1, 2]])}, "reduce must be an array of numbers"),
        ({"reduce": ("top_k", "x", None, 3)}, "reduce must be an array of numbers"),
        ({"reduce": ("top_k", np.eye(64), "x", 3)}, "reduce must be an array of numbers"),
        ({"to": 3}, "to must be a path"),
        ({"to": ""}, "to must be a path"),
        ({"to": b"x"}, "to must be a path"),
        ({"to": "a\0b"}, "to must be a path"),
        ({"to": "a\ud800"}, "to must be a path"),
    ],
)
def test_each_wrong_argument_is_one_line_where_the_block_begins(llm: LLM, how: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        llm.capture(POINT, **how)


def test_numbers_of_numpy_are_numbers(llm: LLM) -> None:
    with llm.capture(POINT, request=np.int64(1), positions=np.array([1, 2])) as cache:  # type: ignore[arg-type]
        llm.logits([IDS, IDS[::-1]])
    assert cache[np.int64(0), POINT].shape == (2, 64)
    assert cache.requests[0].prompt_ids == IDS[::-1]
    for key in (0, None, (POINT, 0), (0, 0), (0, POINT, 1)):
        with pytest.raises(ParameterError, match=r"key must be a point's name.*cache\.requests"):
            cache[key]  # type: ignore[index]


def test_a_cache_says_what_it_holds(llm: LLM) -> None:
    with llm.capture([POINT, "embed"], steps="generated") as cache:
        llm.generate([IDS, IDS], max_tokens=2, ignore_eos=True)
        llm.logits(IDS)  # nothing is generated
    assert POINT in cache
    assert "blk.0.resid_post" not in cache
    assert [POINT in request for request in cache] == [True, True, False]
    assert cache.requests[0].get("blk.0.resid_post") is None
    assert cache.requests[2].get(POINT, 0) == 0
    np.testing.assert_array_equal(cache.requests[1].get(POINT), cache[1, POINT])
