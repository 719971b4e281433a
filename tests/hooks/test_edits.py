"""What `LLM.patch` and `LLM.steer` change, and whose."""

from __future__ import annotations

import asyncio
import threading
import traceback
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, tiny_llm

from forge import LLM, Cache, ParameterError, SamplingParams, Where
from forge.backend.numpy import NumpyBackend
from forge.hooks.scope import _entered

CLEAN = [3, 17, 5, 9, 200, 41, 8]
CORRUPTED = [3, 17, 60, 9, 200, 41, 8]
POINT = "blk.1.resid_post"
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm("llama")


@pytest.fixture(scope="module")
def clean(llm: LLM) -> Cache:
    with llm.capture("*") as cache:
        llm.logits(CLEAN)
    return cache


def test_the_clean_run_s_stream_in_a_corrupted_run_restores_its_logits(llm: LLM, clean: Cache) -> None:
    expected, corrupted = llm.logits(CLEAN), llm.logits(CORRUPTED)
    assert np.abs(corrupted[-1] - expected[-1]).max() > 0.01
    for layer in range(llm.config.num_layers):
        with llm.patch(f"blk.{layer}.resid_post", clean):
            found = llm.logits(CORRUPTED)
        # keys and values of earlier layers are those of the corrupted run, but none of them is read any more
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with llm.patch(f"blk.{llm.config.num_layers - 1}.resid_post", clean, positions=-1):
        found = llm.logits(CORRUPTED)
    np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:-1], corrupted[:-1], rtol=1e-4, atol=1e-5)


def test_a_sweep_of_patches_is_one_call(llm: LLM, clean: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation patching by layer and position: each in a request of its own, all in one forward."""
    sweep = [(layer, position) for layer in range(3) for position in range(len(CLEAN))]
    alone = []
    for layer, position in sweep:
        with llm.patch(f"blk.{layer}.resid_post", clean, positions=position):
            alone.append(llm.logits(CORRUPTED)[-1])
    steps: list[int] = []
    forward = llm.engine.runner.forward
    monkeypatch.setattr(
        llm.engine.runner, "forward", lambda step, **how: steps.append(len(step)) or forward(step, **how)
    )
    blocks = [
        llm.patch(
            f"blk.{layer}.resid_post",
            clean.requests[0][f"blk.{layer}.resid_post"][[position]],
            positions=[position],
            request=number,
        )
        for number, (layer, position) in enumerate(sweep)
    ]
    for block in blocks:
        block.__enter__()
    try:
        together = llm.logits([CORRUPTED] * len(sweep), positions=-1)
    finally:
        for block in blocks:
            block.__exit__(None, None, None)
    assert sum(steps) == len(sweep)
    assert len(steps) == 2  # of 16 sequences, as many as may run together
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_arrays_of_rows_and_of_one_row(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    rows, one = rng.normal(size=(2, 64)), rng.normal(size=64)
    cases: list[tuple[Any, Any, list[int], Any]] = [
        (rows, [4, 1], [4, 1], rows),
        (rows, slice(-2, None), [5, 6], rows),
        (one, [0, 2], [0, 2], one),
        (one, 3, [3], one),
    ]
    for value, positions, changed, expected in cases:
        with llm.patch("blk.0.resid_post", value, positions=positions), llm.capture("blk.0.resid_post") as cache:
            llm.generate(CLEAN, PARAMS)
        found = cache["blk.0.resid_post"]
        np.testing.assert_allclose(found[changed], np.broadcast_to(expected, (len(changed), 64)), rtol=1e-6)
        others = [row for row in range(len(CLEAN)) if row not in changed]
        with llm.capture("blk.0.resid_post") as plain:
            llm.logits(CLEAN)
        np.testing.assert_allclose(found[others], plain["blk.0.resid_post"][others], rtol=1e-4, atol=1e-5)


def test_heads_and_attention_weights(llm: LLM, clean: Cache) -> None:
    """A head that attends to the first token alone gives that token's values."""
    name, heads = "blk.1.attn.pattern", llm.config.num_heads
    first = np.zeros((1, len(CLEAN), len(CLEAN)))
    first[..., 0] = 1
    with llm.patch(name, first, heads=[2]), llm.capture("blk.1.attn.*") as cache:
        llm.logits(CLEAN)
    values = clean["blk.1.attn.v"]
    group = heads // values.shape[1]
    found = cache["blk.1.attn.heads"]
    np.testing.assert_allclose(found[:, 2], np.repeat(values[:1, 2 // group], len(CLEAN), axis=0), rtol=1e-5, atol=1e-6)
    others = [0, 1, 3]
    np.testing.assert_allclose(found[:, others], clean["blk.1.attn.heads"][:, others], rtol=1e-5, atol=1e-6)
    with llm.patch("blk.1.attn.heads", np.zeros((1, 32)), heads=0), llm.capture("blk.1.attn.heads") as cache:
        llm.logits(CLEAN)
    assert not cache["blk.1.attn.heads"][:, 0].any()
    np.testing.assert_array_equal(cache["blk.1.attn.heads"][:, 1:], clean["blk.1.attn.heads"][:, 1:])


def test_functions_change_what_they_get_return_another_or_leave_it(llm: LLM, clean: Cache) -> None:
    expected, seen = llm.logits(CLEAN), list[Where]()

    def look(value: Any, where: Where) -> None:
        seen.append(where)

    def double(value: Any, where: Where) -> Any:
        return 2 * value

    def double_in_place(value: Any, where: Where) -> None:
        value *= 2

    with llm.patch(POINT, look):
        ids = llm.generate(CLEAN, PARAMS).ids
        np.testing.assert_array_equal(llm.logits(CLEAN), expected)
    assert ids == llm.generate(CLEAN, PARAMS).ids
    assert [(where.name, where.layer, where.num_prompt, where.request) for where in seen] == [(POINT, 1, 7, 0)] * 9
    assert [where.step for where in seen] == [*range(8), 0]
    assert [where.positions.tolist() for where in seen[:3]] == [list(range(7)), [7], [8]]
    outcomes = []
    for edit in (double, double_in_place, 2 * clean[POINT]):
        with llm.patch(POINT, edit):
            outcomes.append(llm.logits(CLEAN))
    assert np.abs(outcomes[0] - expected).max() > 1e-3
    np.testing.assert_array_equal(outcomes[1], outcomes[0])
    np.testing.assert_allclose(outcomes[2], outcomes[0], rtol=1e-5, atol=1e-6)


def test_steering_adds_a_scaled_vector_where_it_is_told(llm: LLM, clean: Cache) -> None:
    vector = np.random.default_rng(1).normal(size=64)
    with llm.steer(POINT, vector, scale=3.0, positions=slice(-2, None), steps="prompt"), llm.capture(POINT) as cache:
        llm.generate(CLEAN, PARAMS)
    expected = clean[POINT].copy()
    expected[-2:] += 3 * vector
    np.testing.assert_allclose(cache[POINT][: len(CLEAN)], expected, rtol=1e-4, atol=1e-5)
    with llm.steer(POINT, vector, scale=0.0):
        np.testing.assert_allclose(llm.logits(CLEAN), llm.logits(CLEAN), rtol=0, atol=0)
    for call in (
        lambda: llm.score(CLEAN[:4], CLEAN[4:]).logprob,
        lambda: llm.embed(CLEAN)[0, :3].tolist(),
        lambda: llm.perplexity(CLEAN).nll,
        lambda: llm.attention(CLEAN, 2)[0, -1].tolist(),
        lambda: llm.generate(CLEAN, PARAMS, logprobs=0).logprobs[0].logprob,
    ):
        plain = call()
        with llm.steer("blk.0.resid_post", vector, scale=3.0):
            steered = call()
        assert np.abs(np.subtract(steered, plain)).max() > 1e-3
        np.testing.assert_allclose(call(), plain, rtol=1e-5, atol=1e-6)


def test_blocks_apply_in_the_order_in_which_they_were_entered(llm: LLM, clean: Cache) -> None:
    one = np.ones(64)
    with llm.steer(POINT, one), llm.patch(POINT, lambda value, _: 2 * value), llm.capture(POINT) as cache:
        llm.logits(CLEAN)
    np.testing.assert_allclose(cache[POINT], 2 * (clean[POINT] + 1), rtol=1e-5, atol=1e-5)
    with llm.capture(POINT) as cache, llm.patch(POINT, lambda value, _: 2 * value), llm.steer(POINT, one):
        llm.logits(CLEAN)
    np.testing.assert_allclose(cache[POINT], clean[POINT], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
def test_requests_beside_hooked_ones_keep_their_ids(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch: plain ones, steered ones, and one whose hook raises at its third token."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", ahead)
    llm = tiny_llm("llama")
    vector = np.random.default_rng(1).normal(size=64)
    plain = llm.generate(CLEAN, PARAMS).ids
    with llm.steer(POINT, vector, scale=3.0):
        steered = llm.generate(CLEAN, PARAMS).ids
    assert steered != plain

    def fail(value: Any, where: Where) -> None:
        if where.step == 3:
            raise ZeroDivisionError("mine")

    async def call(block: Any) -> Any:
        if block is None:
            return (await llm.agenerate(CLEAN, PARAMS)).ids
        with block:
            return (await llm.agenerate([CLEAN, CLEAN[:3]], PARAMS))[0].ids

    async def together() -> Any:
        blocks = [None, llm.steer(POINT, vector, scale=3.0), llm.patch(POINT, fail), None]
        return await asyncio.gather(*map(call, blocks), return_exceptions=True)

    first, second, third, fourth = asyncio.run(together())
    assert [first, second, fourth] == [plain, steered, plain]
    assert isinstance(third, ZeroDivisionError)
    lines = "".join(traceback.format_exception(third))
    assert 'raise ZeroDivisionError("mine")' in lines
    assert_idle(llm)


def test_an_error_keeps_the_user_s_frames_and_nothing_of_the_step(llm: LLM) -> None:
    def fail(value: Any, where: Where) -> None:
        held = value.sum()
        raise ZeroDivisionError(f"mine {held:.0f}")

    with llm.patch(POINT, fail), pytest.raises(ZeroDivisionError) as caught:
        llm.logits(CLEAN)
    cause = caught.value.__cause__
    assert cause
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    users = [frame for frame in frames if frame.f_code.co_name == "fail"]
    assert "held" in users[0].f_locals
    callers, frame = [], users[0]
    while frame := frame.f_back:  # type: ignore[assignment]
        callers.append(frame)
    held = [frame for frame in callers if "stream" in frame.f_locals or "batch" in frame.f_locals]
    assert held == []
    assert_idle(llm)


def test_threads_have_their_own_blocks(llm: LLM) -> None:
    found: list[Any] = []
    with llm.steer(POINT, np.full(64, 5.0)):
        thread = threading.Thread(target=lambda: found.append(llm.generate(CLEAN, PARAMS).ids))
        thread.start()
        thread.join()
        steered = llm.generate(CLEAN, PARAMS).ids
    assert found == [llm.generate(CLEAN, PARAMS).ids]
    assert steered != found[0]


@pytest.mark.parametrize(
    ("value", "how", "message"),
    [
        (np.zeros((3, 64)), {"positions": [1, 2]}, r"shape \(3, 64\), and blk.1.resid_post takes \(2, 64\) or \(64,\)"),
        (np.zeros(63), {}, r"shape \(63,\), and blk.1.resid_post takes \(N, 64\) or \(64,\)"),
        ("zero", {}, "value must be an array of numbers"),
        (1.0, {}, "value must be an array of numbers"),
        (np.full(64, 1j), {}, "value must be an array of numbers"),
        (["1"] * 64, {}, "value must be an array of numbers"),
        (np.full(64, 1e300), {}, "value holds numbers beyond float32"),
        (np.zeros(64), {"heads": [0]}, "blk.1.resid_post has no heads"),
        (np.zeros((1, 32)), {"points": "blk.1.attn.q", "heads": [4]}, "heads must be different numbers from 0 to 3"),
        (np.zeros((4, 32)), {"points": "blk.1.attn.q", "heads": [1]}, r"takes \(N, 1, 32\) or \(1, 32\)"),
        (np.zeros((4, 5)), {"points": "blk.1.attn.pattern"}, r"takes \(4, N, S\)"),
        (np.zeros(64), {"points": "blk.1.resid"}, "the nearest are blk.1.resid"),
    ],
)
def test_what_cannot_be_patched_is_refused_where_the_block_begins(llm: LLM, value: Any, how: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        llm.patch(**({"points": POINT, "value": value} | how))


def test_what_does_not_fit_a_prompt_is_refused_where_it_is_called(llm: LLM, clean: Cache) -> None:
    with llm.capture(POINT, positions=-1) as last, llm.capture(POINT, reduce="norm") as norms:
        llm.logits(CLEAN)
    with llm.capture(POINT) as two:
        llm.logits([CLEAN, CLEAN])
    cases = [
        (llm.patch(POINT, np.zeros((5, 64))), r"\(5, 64\), 5 rows, and 7 positions of the prompt of 7 tokens"),
        (llm.patch(POINT, last, positions=[0]), "the cache has no position 0 of blk.1.resid_post"),
        (llm.patch(POINT, norms), r"the cache has the shape \(7,\) at blk.1.resid_post"),
        (llm.patch("blk.0.resid_post", last), "nothing was captured of 'blk.0.resid_post'"),
        (llm.patch("blk.1.attn.pattern", clean), "give an array, not a cache"),
        (llm.patch(POINT, lambda value, _: value[:2]), r"gives the shape \(2, 64\) for values of \(7, 64\)"),
        (llm.patch(POINT, np.zeros(64), positions=[-9]), "positions holds -9"),
    ]
    for block, message in cases:
        with block, pytest.raises(ParameterError, match=message):
            llm.logits(CLEAN)
    for count in (1, 3):  # not those with the same numbers: that would patch with another prompt's values
        with llm.patch(POINT, two), pytest.raises(ParameterError, match=f"holds 2 requests, and the call has {count}"):
            llm.logits([CLEAN] * count)
    with llm.patch(POINT, two, request=2), pytest.raises(ParameterError, match="2 requests, and no number 2"):
        llm.logits([CLEAN] * 3)
    for vector, message in (([1.0, 2.0], r"vector has the shape \(2,\)"), ("x", "vector must be an array of numbers")):
        with pytest.raises(ParameterError, match=message):
            llm.steer(POINT, vector)
    with pytest.raises(ParameterError, match="scale must be a finite number"):
        llm.steer(POINT, np.zeros(64), scale=float("nan"))
    with pytest.raises(ParameterError, match="cannot be steered"):
        llm.steer("blk.0.attn.pattern", np.zeros(64))
    assert_idle(llm)


def test_one_request_of_a_cache_is_a_value_of_its_own(llm: LLM) -> None:
    """As where prompts were captured in a loop, and each is patched into another run."""
    with llm.capture(POINT, positions=-1) as cache:
        for ids in (CLEAN, CORRUPTED):
            llm.logits(ids)
    for number in range(2):
        with llm.patch(POINT, cache.requests[number], positions=-1), llm.capture("final_norm", positions=-1) as found:
            llm.logits([CLEAN, CORRUPTED])
        with llm.patch(POINT, cache[number, POINT], positions=-1), llm.capture("final_norm", positions=-1) as expected:
            llm.logits([CLEAN, CORRUPTED])
        np.testing.assert_array_equal(found.stack("final_norm"), expected.stack("final_norm"))


def test_a_request_that_no_call_of_the_block_had_is_said_at_its_end(llm: LLM) -> None:
    """Else its hook is not used, and nobody is told."""

    def use(block: AbstractContextManager[Any], *counts: int, error: type[Exception] | None = None) -> None:
        with block:
            for count in counts:
                llm.logits([CLEAN] * count)
            if error:
                raise error

    for block in (
        llm.patch(POINT, np.zeros(64), request=2),
        llm.steer(POINT, np.ones(64), request=2),
        llm.capture(POINT, request=2),
    ):
        with pytest.raises(ParameterError, match="request is 2, and no call in the block had more than 2"):
            use(block, 1, 2)
        use(block, 1, 3)
        use(block)
        with pytest.raises(ZeroDivisionError):
            use(block, 1, error=ZeroDivisionError)
    assert not _entered.get()
