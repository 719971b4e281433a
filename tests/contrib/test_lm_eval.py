"""forge within lm-evaluation-harness: the numbers of the harness' own `hf` model on the same float32 weights.

These tests need `lm_eval`, whose 759 MB are not among the packages of the extra `dev`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forge

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")

from hf_models import DATA
from lm_eval_tasks import GOLDENS, MAX_LENGTH, MODELS, NAMES, evaluate, model_directory, task_directory

from forge.contrib.lm_eval import ForgeLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the harness and of what it imports
]
EXPECTED: dict[str, Any] = json.loads(GOLDENS.read_text())
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chat": {"apply_chat_template": True, "fewshot_as_multiturn": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("lm_eval")
    task_directory(path / "tasks")
    before = {name: os.environ.get(name) for name in ("HF_HOME", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")}
    os.environ |= {"HF_HOME": str(path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    yield path
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module", params=MODELS)
def named(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, ForgeLM]]:
    model = ForgeLM(model_directory(request.param, folder), device="cpu", max_length=MAX_LENGTH, progress=False)
    yield request.param, model
    model.llm.close()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for task in NAMES:
        answers, goldens = found[task]["resps"], expected[task]["resps"]
        assert len(answers) == len(goldens)
        for answer, golden in zip(answers, goldens, strict=True):
            if task == "tiny_answer":
                assert answer == golden
            elif task == "tiny_rolling":
                assert answer[0] == pytest.approx(golden[0], rel=1e-6, abs=1e-4)
            else:
                assert answer[0][0] == pytest.approx(golden[0][0], rel=1e-6, abs=1e-4)
                assert answer[0][1] == golden[0][1]
        assert found[task]["metrics"] == pytest.approx(expected[task]["metrics"], rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_every_answer_is_that_of_the_hf_model(way: str, named: tuple[str, ForgeLM], folder: Path) -> None:
    name, model = named
    assert_same(evaluate(model, folder / "tasks", **WAYS[way]), EXPECTED[name][way])


def test_the_goldens_have_greedy_continuations_stops_and_cut_contexts() -> None:
    """What the test above would not see, if they had not."""
    plain = [EXPECTED[name]["plain"] for name in MODELS]
    assert any(resp[0][1] for one in plain for resp in one["tiny_last"]["resps"])
    texts = [resp[0] for one in EXPECTED.values() for way in WAYS for resp in one[way]["tiny_answer"]["resps"]]
    assert any(len(text) < 5 for text in texts)
    assert any(len(text) >= 24 for text in texts)


def test_requests_run_in_few_calls_of_the_engine(
    named: tuple[str, ForgeLM], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one by one: the four answers are one batch, and choices of a question are scored together."""
    _, model = named
    sizes: dict[str, list[int]] = {"generate": [], "score": []}
    for name, seen in sizes.items():
        call = getattr(model.llm, name)
        monkeypatch.setattr(
            model.llm,
            name,
            lambda first, *a, call=call, seen=seen, **k: (seen.append(len(first)), call(first, *a, **k))[1],
        )
    evaluate(model, folder / "tasks")
    assert sizes["generate"] == [4]
    assert sorted(sizes["score"])[-1] >= 14
    assert len(sizes["score"]) == 2  # the harness asks once for each kind of request


def test_the_command_line_knows_the_model_by_its_name(folder: Path) -> None:
    path = model_directory("qwen3", folder / "cli")
    command = [sys.executable, "-m", "forge.contrib.lm_eval", "run", "--model", "forge", "--tasks", "tiny_answer"]
    command += ["--model_args", f"pretrained={path},max_length={MAX_LENGTH},progress=False", "--device", "cpu"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (written,) = (folder / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    golden = EXPECTED["qwen3"]["plain"]["tiny_answer"]["metrics"]
    assert results["results"]["tiny_answer"]["exact_match,none"] == golden["exact_match,none"]
    assert results["config"]["model"] == "forge"


def test_the_entry_point_is_the_class() -> None:
    """The harness finds models of other packages in this group, behind version 0.4.13."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["entry-points"]["lm_eval.models"] == {
        "forge": "forge.contrib.lm_eval:ForgeLM"
    }


def test_an_adapter_changes_all_answers(folder: Path) -> None:
    adapter = DATA / "lora/llama_attention"
    path = DATA / "arch/llama/model.gguf"
    model = ForgeLM(str(path), adapter=str(adapter), device="cpu", max_length=MAX_LENGTH, progress=False)
    with model.llm:
        pair = ("a text", " and more"), model.tok_encode("a text"), model.tok_encode(" and more", False)
        ((found, _),) = model._loglikelihood_tokens([pair], disable_tqdm=True)
        with_adapter = model.llm.score([pair[1]], [pair[2]], adapter="adapter")[0].logprob
        without = model.llm.score([pair[1]], [pair[2]])[0].logprob
    assert found == with_adapter
    assert abs(found - without) > 1e-3


def test_what_is_wrong_is_one_line(named: tuple[str, ForgeLM]) -> None:
    _, model = named
    with pytest.raises(forge.ParameterError, match=r"^max_gen_toks is 96, and 96 tokens are all that fit"):
        model._sampling({"max_gen_toks": 96, "until": []})
    with pytest.raises(forge.ParameterError, match="num_beams is no parameter of generate"):
        model.llm.generate([[1]], **model._sampling({"num_beams": 4, "max_gen_toks": 8}))
    with pytest.raises(forge.ParameterError, match=r"^adapter: the model is loaded already: give it to forge\.load"):
        ForgeLM(model.llm, adapter="x")
    with pytest.raises(forge.ParameterError, match="chat_template 'x' is not there, but: default"):
        model.chat_template("x")
    with pytest.raises(forge.ParameterError, match="a continuation has 97 tokens, and 96 fit"):
        model._loglikelihood_tokens([(None, [1], [2] * 97)], disable_tqdm=True)
