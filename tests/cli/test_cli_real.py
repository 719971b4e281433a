"""The command line on the real smollm2, whose numbers are those of transformers in float32 (goldens/smollm2.json)."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal

from forge import hub

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
PROMPT_IDS = [504, 3575, 282, 4649, 314]
GREEDY_IDS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33]
GREEDY_TEXT = " Paris.\n\nThe answer is: 2018-01-22 12:1"
TOP = [(7042, 17.37127), (260, 14.88859), (4528, 13.24498), (2250, 13.00947), (1315, 12.95152)]
FORGE = [sys.executable, "-m", "forge"]


@pytest.fixture(scope="module", autouse=True)
def model() -> str:
    """The default model, in the cache."""
    return str(hub.resolve("smollm2"))


def forge(*args: str) -> tuple[str, str]:
    done = subprocess.run([*FORGE, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def json_of(*args: str) -> Any:
    return json.loads(forge(*args, "--json")[0])


def test_generate_streams_the_golden_text() -> None:
    out, err = forge("generate", PROMPT, "--max-tokens", str(len(GREEDY_IDS)))
    assert out == GREEDY_TEXT
    assert re.search(r"prompt 5 tokens, [\d.]+ tokens/s \| generated 24 tokens, [\d.]+ tokens/s \| loaded in", err)


def test_generate_json_has_the_golden_ids() -> None:
    found = json_of("generate", PROMPT, "--max-tokens", str(len(GREEDY_IDS)))
    assert found["prompt_ids"] == PROMPT_IDS
    assert found["ids"] == GREEDY_IDS
    assert (found["text"], found["finish_reason"]) == (GREEDY_TEXT, "length")


def test_tokenize_and_logits_are_golden() -> None:
    assert json_of("tokenize", PROMPT)["ids"] == PROMPT_IDS
    found = json_of("logits", PROMPT, "--top", "5")
    assert [id for id, _ in found["top"]] == [id for id, _ in TOP]
    assert [value for _, value in found["top"]] == pytest.approx([value for _, value in TOP], abs=1e-3)
    assert found["pieces"][0] == " Paris"


def test_inspect_counts_smollm2(model: str) -> None:
    found = json_of("inspect", "smollm2")
    assert (found["path"], found["architecture"], found["parameters"]) == (model, "llama", 134_515_008)
    types = [tensor["type"] for tensor in found["tensors"]]
    assert {name: types.count(name) for name in types} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}


def test_pull_prints_where_the_model_is(model: str) -> None:
    assert forge("pull", "smollm2") == (model + "\n", "")


def test_ctrl_c_ends_generation_load_and_start_cleanly() -> None:
    for delay in (0.0, 0.05, 0.2, 0.4):  # importing, reading the vocabulary, loading weights
        with subprocess.Popen([*FORGE, "generate", PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while "_multiarray_umath" not in Path(f"/proc/{process.pid}/maps").read_text():
                assert process.poll() is None
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130, (delay, err)
        assert b"Traceback" not in err
        assert b"Exception" not in err
    command = [*FORGE, "generate", PROMPT, "--ignore-eos", "--max-tokens", "5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        start = process.stdout.read(6)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (start + rest).startswith(b" Paris")
    assert [line for line in err.splitlines() if b"forge: device" not in line] == []


@pytest.fixture
def chat() -> Iterator[Terminal]:
    terminal = Terminal("chat", "--temperature", "0")
    yield terminal
    terminal.close()


def test_ctrl_c_aborts_an_answer_and_then_leaves(chat: Terminal) -> None:
    chat.wait_for(rb"> ")
    chat.type(b"Count from one to one hundred in words.\n")
    chat.wait_for(rb"\r\n[^>\r\n]{4}")  # an answer has begun
    chat.type(b"\x03")
    chat.prompted()
    assert chat.exit_code(b"\x03") == 130


def test_chat_answers_and_ctrl_d_leaves(chat: Terminal) -> None:
    chat.wait_for(rb"> ")
    chat.type(b"What is the capital of France?\n")
    chat.wait_for(rb"Paris")
    chat.wait_for(rb"generated \d+ tokens")
    chat.wait_for(rb"> ")
    assert chat.exit_code(b"\x04") == 0


def test_chat_answers_a_question_and_what_is_piped_below_it() -> None:
    def answer(*args: str, stdin: str = "") -> str:
        command = [*FORGE, "chat", *args, "--max-tokens", "12"]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    asked = answer("What is the capital of France?")
    assert "Paris" in asked
    assert answer(stdin="What is the capital of France?\n") == asked
    both = answer("Which city does this text name?", stdin="Oslo lies on a fjord.")
    assert both == answer(stdin="Which city does this text name?\nOslo lies on a fjord.")
    assert "Oslo" in both
    lines = answer("--lines", stdin="What is the capital of France?\nWhat is the capital of France?\n")
    assert lines == 2 * asked


def test_generate_answers_through_the_template() -> None:
    out, _ = forge("generate", "What is the capital of France?", "--chat")
    assert "Paris" in out


def test_bench_reports_ratios_that_fit_its_speeds() -> None:
    found = json_of("bench", "--prompt-tokens", "64", "--gen-tokens", "8", "--batch", "1,4", "--repetitions", "1")
    assert [row["batch"] for row in found["decode"]] == [1, 4]
    for row in found["decode"]:
        assert row["ratio_to_bound"] == pytest.approx(row["tokens_per_s"] / found["bound_tokens_per_s"])
    assert found["peak_rss_bytes"] > 134_515_008 * 4
