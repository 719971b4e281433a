"""`forge chat` on tiny models, where nobody watches: questions, pipes, lines, JSON."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import LLAMA, Captured, failure, json_of, with_template
from scripted import write_scripted

import forge
from forge.cli import run
from forge.cli.chat.conversation import Conversation

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + ' ' }}{% endfor %}"
    "{% if thinks is defined %}{{ thinks }}{% endif %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_template(tmp_path_factory.mktemp("chat") / "m.gguf", TEMPLATE)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def prompt_of(model: str, text: str) -> list[int]:
    return forge.load_tokenizer(model).encode(text)


def prompts(capsys: Captured, monkeypatch: pytest.MonkeyPatch, stdin: str, *args: str) -> list[list[int]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert run(["chat", *args, "--max-tokens", "1", "--json"]) == 0
    return [json.loads(line)["prompt_ids"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["hi"], "", "hi"),
        (["hi"], "below\n", "hi\nbelow"),
        (["-"], "a\n\nb\n", "a\n\nb"),
        ([], "a\n\nb\n", "a\n\nb"),
        ([], "/exit\n/reset\n", "/exit\n/reset"),
        (["/exit"], "", "/exit"),
        ([], "  indented\n", "  indented"),
        ([""], "only this", "only this"),
    ],
)
def test_a_question_and_all_of_stdin_are_one_message(
    args: list[str], stdin: str, message: str, model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prompts(capsys, monkeypatch, stdin, *args, "-m", model) == [prompt_of(model, f"u:{message} a:")]


def test_each_line_is_answered_by_itself(model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prompts(capsys, monkeypatch, "a b\r\n\n /x\n/exit\nlast", "-m", model, "--lines", "--system", "S")
    assert found == [prompt_of(model, f"s:S u:{line} a:") for line in ("a b", " /x", "/exit", "last")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\nc\n"))
    assert run(["chat", "-m", model, "--lines", "--temperature", "0", "--max-tokens", "5"]) == 0
    with forge.load(model) as llm:
        wanted = [llm.chat([{"role": "user", "content": text}], max_tokens=5).text + "\n" for text in ("a b", "c")]
    assert capsys.readouterr().out == "".join(wanted)


def test_a_line_is_answered_before_the_next_is_there(model: str) -> None:
    from cli_runs import start

    with start("chat", "-m", model, "--lines", "--max-tokens", "1", "--json") as process:
        assert process.stdin
        assert process.stdout
        for text in ("a", "b"):
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["prompt_ids"] == prompt_of(model, f"u:{text} a:")
        process.stdin.close()
        assert process.wait(60) == 0


def test_an_answer_is_the_library_s_and_says_when_it_is_cut(model: str, capsys: Captured) -> None:
    with forge.load(model) as llm:
        wanted = llm.chat([{"role": "user", "content": "a b"}], max_tokens=6)
    assert run(["chat", "a b", "-m", model, "--max-tokens", "6"]) == 0
    shown = capsys.readouterr()
    assert shown.out == wanted.text + "\n"
    assert "cut after 6 tokens (--max-tokens)" in shown.err
    assert "/continue" not in shown.err
    assert "generated 6 tokens" in shown.err
    assert run(["chat", "a b", "-m", model, "--context", "16"]) == 0
    assert "cut: the context of 16 tokens is full (--context)" in capsys.readouterr().err  # and by nothing else


def test_json_is_one_object_with_logprobs(model: str, capsys: Captured) -> None:
    found = json_of(
        capsys, "chat", "hi", "-m", model, "--max-tokens", "3", "--temperature", "0.7", "--seed", "1", "--logprobs", "1"
    )
    with forge.load(model) as llm:
        wanted = llm.chat([{"role": "user", "content": "hi"}], max_tokens=3, temperature=0.7, top_p=0.95, seed=1)
    assert (found["ids"], found["text"], found["finish_reason"]) == (wanted.ids, wanted.text, "length")
    assert [entry["id"] for entry in found["logprobs"]] == wanted.ids
    assert found["timings"]["completion_tokens"] == 3


def test_assistant_option_begins_the_answer(model: str, capsys: Captured) -> None:
    flags = ("chat", "hi", "-m", model, "--max-tokens", "3", "--temperature", "0", "--assistant", "So")
    found = json_of(capsys, *flags)
    assert found["prompt_ids"] == prompt_of(model, "u:hi a:So")
    assert run(flags) == 0
    assert capsys.readouterr().out == f"So{found['text']}\n"


def test_variables_of_the_template(model: str, capsys: Captured) -> None:
    def told(*flags: str) -> tuple[Any, str]:
        assert run(["chat", "hi", "-m", model, "--max-tokens", "1", "--json", *flags]) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out)["prompt_ids"], shown.err

    ids, err = told("--chat-template-kwargs", '{"thinks": "T"}')
    assert ids == prompt_of(model, "u:hi Ta:")
    assert "no variable" not in err
    ids, err = told("--no-think")
    assert ids == prompt_of(model, "u:hi a:")
    assert "no variable 'enable_thinking': --no-think changes nothing" in err
    assert told("--chat-template-kwargs", '{"self": 1, "literals": 2}')[0] == prompt_of(model, "u:hi a:")
    assert "no variable 'x': --chat-template-kwargs" in told("--chat-template-kwargs", '{"x": 1}')[1]


def test_no_think_reaches_the_template(tmp_path: Path, capsys: Captured) -> None:
    model = with_template(
        tmp_path / "m.gguf", "{{ 'N' if enable_thinking is false else 'Y' }}{{ messages[0].content }}"
    )
    few = ("chat", "hi", "-m", model, "--max-tokens", "1")
    assert json_of(capsys, *few)["prompt_ids"] == prompt_of(model, "Yhi")
    assert json_of(capsys, *few, "--no-think")["prompt_ids"] == prompt_of(model, "Nhi")
    assert "no variable" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "names"),
    [
        (["hi", "--lines"], 2, "--lines"),
        (["hi", "--chat-template-kwargs", "[1]"], 2, "--chat-template-kwargs must be a JSON object"),
        (["hi", "--chat-template-kwargs", "{"], 2, "--chat-template-kwargs must be a JSON object"),
        (["hi", "--chat-template-kwargs", "[" * 100_000], 2, "--chat-template-kwargs must be a JSON object"),
        (["hi", "--chat-template-kwargs", '{"messages": []}'], 2, "must not set messages"),
        ([], 1, "nothing to answer"),
        ([" "], 1, "nothing to answer"),
        (["hi " * 600, "--context", "64"], 1, "--context"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    args: list[str], code: int, names: str, model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    found, line = failure(capsys, "chat", "-m", model, *args)
    assert (found, names in line) == (code, True)


@pytest.mark.parametrize("flags", [[], ["--lines"]])
def test_stdin_that_is_no_text_is_one_line(
    flags: list[str], model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    code, line = failure(capsys, "chat", "-m", model, *flags)
    assert code == 1
    assert "standard input" in line
    assert "not UTF-8" in line


def test_chat_says_before_the_first_message_that_there_is_no_template(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    code, line = failure(capsys, "chat", "-m", LLAMA)
    assert code == 1
    assert "--chat-template" in line


def test_one_sequence_s_pages_are_taken_and_threads_as_many_as_asked_for(
    model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def load(*args: Any, **options: Any) -> Any:
        seen.append((options["max_sequences"], options["threads"]))
        return real(*args, **options)

    real = forge.load
    monkeypatch.setattr(forge, "load", load)
    for command in ("chat", "generate"):
        assert run([command, "hi", "-m", model, "--max-tokens", "1", "--threads", "1"]) == 0
    assert run(["logits", "hi", "-m", model]) == 0
    assert seen == [(1, 1), (1, 1), (1, None)]


def test_messages_of_gpt_oss_are_read_and_kept_as_reasoning_and_content(tmp_path: Path, capsys: Captured) -> None:
    thought = "<|channel|>analysis<|message|>"
    script = [f"{thought}I th", "ink.", "<|end|><|start|>assistant<|channel|>final<|message|>", "Yes", "."]
    template = "{% for m in messages %}<|start|>{{ m.content }}{% endfor %}{# " + thought + " #}<|start|>assistant"
    path = write_scripted(tmp_path / "m.gguf", template, {"<|start|>assistant": script}, [])
    with forge.load(path, context=256) as llm:
        conversation = Conversation(llm, forge.SamplingParams(), None, "", {}, drops=True)
        conversation.ask("?")
        conversation.params = forge.SamplingParams(max_tokens=1)
        conversation.ask("?")
    said = [message for message in conversation.messages if message["role"] == "assistant"]
    assert [(message["content"], message["reasoning_content"]) for message in said] == [
        ("Yes.", "I think."),
        ("", "I th"),
    ]
    assert capsys.readouterr().out == "<think>\nI think.\n</think>\n\nYes.\n<think>\nI th\n</think>\n"
