"""The whole use of a model that somebody trained: ids of transformers, PEFT and llama.cpp (scripts/whole_use.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forge
from forge.cli import run

DATA = Path(__file__).parents[1] / "data/whole_use"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text("utf-8"))
ADAPTERS = {"tuned": DATA / "adapter"}
MAX_TOKENS = 48
QUANTIZED = 0.5
"""How far logits of Q8_0 may be from those of float16, which lie between -5 and 12, as in the script."""


def chats(llm: forge.LLM, adapter: str | None = None) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the prompts, and greedy ids of the answers, which all end."""
    asked = [[{"role": "user", "content": question}] for question in EXPECTED["questions"]]
    found = [llm.chat(chat, max_tokens=MAX_TOKENS, temperature=0, adapter=adapter) for chat in asked]
    assert {one.finish_reason for one in found} == {"stop"}
    return [one.prompt_ids for one in found], [one.ids for one in found]


@pytest.fixture(scope="module", params=["F16", "Q8_0"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A type, and the file that the command line makes in it."""
    path = tmp_path_factory.mktemp("whole_use") / f"{request.param}.gguf"
    assert run(["convert", str(DATA / "model"), str(path), "--type", request.param]) == 0
    return request.param, path


def test_the_directory_and_its_adapter_answer_as_transformers_and_peft() -> None:
    with forge.load(DATA / "model", device="cpu", adapters=ADAPTERS, progress=False) as llm:
        assert chats(llm) == (EXPECTED["prompts"], EXPECTED["transformers"])
        assert chats(llm, "tuned") == (EXPECTED["prompts"], EXPECTED["peft"])
    assert not any(a == b for a, b in zip(EXPECTED["transformers"], EXPECTED["peft"], strict=True))


def test_the_converted_file_is_the_one_that_llama_cpp_ran(converted: tuple[str, Path]) -> None:
    """Its bytes: so llama.cpp's ids, which the script compared and recorded, are those of this file."""
    type, path = converted
    assert hashlib.sha256(path.read_bytes()).hexdigest() == EXPECTED["sha256"][type], "run scripts/whole_use.py again"


@pytest.mark.slow
def test_the_converted_file_answers_as_llama_cpp_and_peft(converted: tuple[str, Path]) -> None:
    type, path = converted
    with forge.load(path, device="cpu", adapters=ADAPTERS, progress=False) as llm:
        assert chats(llm) == (EXPECTED["prompts"], EXPECTED["llama.cpp"][type])
        assert chats(llm, "tuned") == (EXPECTED["prompts"], EXPECTED["peft"])
    if type == "F16":
        assert EXPECTED["llama.cpp"][type] == EXPECTED["transformers"]


@pytest.mark.slow
def test_quantized_at_load_is_the_converted_file(converted: tuple[str, Path]) -> None:
    """The same bits, and logits near those of float16, which are not the same."""
    type, path = converted
    ids = EXPECTED["prompts"][0] + EXPECTED["transformers"][0]
    quantize = None if type == "F16" else type
    found = []
    for model, how in ((DATA / "model", quantize), (path, None), (DATA / "model", None)):
        with forge.load(model, device="cpu", quantize=how, progress=False) as llm:
            found.append(llm.logits(ids))
    np.testing.assert_array_equal(found[0], found[1])
    off = np.abs(found[0] - found[2]).max()
    assert (off == 0) if quantize is None else (0 < off < QUANTIZED)
