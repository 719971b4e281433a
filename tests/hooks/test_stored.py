"""Captures that go to files, request by request, and go on where they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, random_prompts, tiny_llm

from forge import LLM, ForgeError, FormatError, ParameterError, SamplingParams, Where

POINTS = ["blk.1.resid_post", "blk.0.attn.pattern"]
PROMPTS = random_prompts(5, 12)
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm("llama")


def test_requests_are_moved_to_files_and_a_later_run_goes_on_behind_them(llm: LLM, tmp_path: Path) -> None:
    with llm.capture(POINTS) as expected:
        llm.generate(PROMPTS, PARAMS)
    with llm.capture(POINTS, to=tmp_path / "run") as cache:
        assert len(cache) == 0
        llm.generate(PROMPTS[:2], PARAMS)
        assert cache.requests[1]._parts == {name: [] for name in cache.requests[1]}  # they are no longer in memory
        np.testing.assert_allclose(cache[1, POINTS[0]], expected[1, POINTS[0]], rtol=1e-4, atol=1e-5)
    with llm.capture(POINTS, to=tmp_path / "run") as cache:
        assert len(cache) == 2
        llm.generate(PROMPTS[len(cache) :], PARAMS)
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == [f"{n:06}.safetensors" for n in range(5)]
    with llm.capture(POINTS, to=tmp_path / "run") as cache:
        pass
    for number, ids in enumerate(PROMPTS):
        assert cache.requests[number].prompt_ids == ids
        for name in POINTS:
            assert cache.requests[number].positions(name).tolist() == list(range(len(ids) + 2))
            np.testing.assert_allclose(cache[number, name], expected[number, name], rtol=1e-4, atol=1e-5)
    whole = (tmp_path / "run" / "000003.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    entry = json.loads(whole[8 : 8 + size])[POINTS[0]]
    begin, end = (8 + size + offset for offset in entry["data_offsets"])
    stored = np.frombuffer(whole[begin:end], np.float32).reshape(entry["shape"])
    np.testing.assert_array_equal(stored, cache[3, POINTS[0]])


def test_a_pass_is_stored_too_and_a_reduction_of_it(llm: LLM, tmp_path: Path) -> None:
    with llm.capture(POINTS[0], to=tmp_path, reduce="norm", dtype="f16") as cache:
        llm.logits(PROMPTS[:2])
    with llm.capture(POINTS[0], reduce="norm") as expected:
        llm.logits(PROMPTS[:2])
    assert cache[1, POINTS[0]].dtype == np.float16
    np.testing.assert_allclose(cache[1, POINTS[0]], expected[1, POINTS[0]], rtol=1e-3)


def test_what_is_not_whole_is_not_stored(llm: LLM, tmp_path: Path) -> None:
    def fail(value: Any, where: Where) -> None:
        if where.step == 2:
            raise ZeroDivisionError

    with llm.capture(POINTS[0], to=tmp_path):
        llm.generate(PROMPTS[0], PARAMS)
        with llm.patch(POINTS[0], fail), pytest.raises(ZeroDivisionError):
            llm.generate(PROMPTS[1], PARAMS)
    with llm.capture(POINTS[0], to=tmp_path) as cache:
        assert len(cache) == 1
    assert_idle(llm)


def test_other_settings_damaged_files_and_directories_that_are_none_are_refused(llm: LLM, tmp_path: Path) -> None:
    with llm.capture(POINTS[0], to=tmp_path):
        llm.logits(PROMPTS[0])
    for how in ({"points": POINTS}, {"positions": -1}, {"dtype": "f16"}, {"reduce": "norm"}, {"request": 0}):
        with pytest.raises(ParameterError, match=r"000000.safetensors was captured with other settings"):
            llm.capture(**({"points": POINTS[0], "to": tmp_path} | how))  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="to must be None with device=True"):
        llm.capture(POINTS[0], to=tmp_path, device=True)
    (tmp_path / "000001.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(FormatError, match=r"000001\.safetensors"):
        llm.capture(POINTS[0], to=tmp_path)
    with pytest.raises(ParameterError, match="is no directory"):
        llm.capture(POINTS[0], to=tmp_path / "000000.safetensors")


def test_a_file_that_cannot_be_written_is_an_error_of_the_block(llm: LLM, tmp_path: Path) -> None:
    def capture_in(directory: Path) -> None:
        with llm.capture(POINTS[0], to=directory):
            (directory / "000000.safetensors").mkdir()  # nothing replaces a directory
            llm.logits(PROMPTS[0])

    with pytest.raises(ForgeError, match=r"000000\.safetensors: cannot be written: "):
        capture_in(tmp_path / "run")
    assert_idle(llm)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("project", np.ones((2, 64))), ("project", np.zeros((2, 64)))),
        (("top_k", np.eye(64), None, 2), ("top_k", -np.eye(64), None, 2)),
        (("top_k", np.eye(64), None, 2), ("top_k", np.eye(64), np.ones(64), 2)),
        (("top_k", np.eye(64), None, 2), ("top_k", np.eye(64), None, np.int64(3))),
    ],
)
def test_other_numbers_of_a_reduction_are_other_settings(llm: LLM, tmp_path: Path, one: Any, other: Any) -> None:
    for count in range(2):
        with llm.capture(POINTS[0], to=tmp_path, reduce=one) as cache:
            assert len(cache) == count
            llm.logits(PROMPTS[count])
    with pytest.raises(ParameterError, match="was captured with other settings"):
        llm.capture(POINTS[0], to=tmp_path, reduce=other)


@pytest.mark.parametrize(
    "function", [lambda rows, _: np.arange(len(rows)), lambda rows, _: rows[:, 0] > 0, lambda rows, _: rows.argmax(1)]
)
def test_integers_of_a_function_are_kept_as_int32(llm: LLM, tmp_path: Path, function: Any) -> None:
    with (
        llm.capture(POINTS[0], reduce=function) as expected,
        llm.capture(POINTS[0], to=tmp_path, reduce=function) as cache,
    ):
        llm.logits(PROMPTS[0])
    assert cache[POINTS[0]].dtype == expected[POINTS[0]].dtype == np.int32
    np.testing.assert_array_equal(cache[POINTS[0]], expected[POINTS[0]])


@pytest.mark.parametrize(
    "given", ["x", [None], [[1], [2, 3]], [1j], [1 << 40]], ids=["text", "objects", "ragged", "complex", "int64"]
)
def test_what_no_file_can_hold_ends_its_own_call(llm: LLM, tmp_path: Path, given: Any) -> None:
    with (
        llm.capture(POINTS[0], to=tmp_path, reduce=lambda rows, _: given),
        pytest.raises(ParameterError, match="reduce: the function gives no floats or integers"),
    ):
        llm.logits(PROMPTS[0])
    assert_idle(llm)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        (POINTS[0], {"shape": [64, 7]}),
        (POINTS[0] + ".positions", {"shape": [7, 1]}),
        (POINTS[0] + ".positions", {"dtype": "F32"}),
        ("prompt_ids", {"dtype": "F32"}),
    ],
)
def test_forged_files_are_refused_and_reach_no_patch(llm: LLM, tmp_path: Path, name: str, entry: Any) -> None:
    with llm.capture(POINTS[0], to=tmp_path):
        llm.logits([3, 17, 5, 9, 200, 41, 8])
    path = tmp_path / "000000.safetensors"
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:size])
    header[name] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[size:])

    def use() -> None:
        with llm.capture(POINTS[0], to=tmp_path) as cache:
            pass
        with llm.patch(POINTS[0], cache):
            llm.logits([3, 17, 5, 9, 200, 41, 8])

    with pytest.raises(FormatError, match=r"000000\.safetensors: "):
        use()
    assert_idle(llm)
