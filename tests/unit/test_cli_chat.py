"""`forge chat` on tiny models."""

import io
import sys
from pathlib import Path

import pytest
from cli_runs import LLAMA, TEMPLATE, Captured, failure

import forge
from forge.cli import run


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def test_chat_answers_each_line_and_remembers(capsys: Captured, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    flags = ["-m", LLAMA, "--chat-template", template, "--temperature", "0", "--max-tokens", "6"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n\nc\n/reset\n/system é\nc\n/exit\nnever\n"))
    assert run(["chat", *flags]) == 0
    with forge.load(LLAMA, chat_template=template) as llm:

        def answer(*turns: str) -> str:
            roles = ("user", "assistant") if len(turns) % 2 else ("system", "user")
            messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
            return llm.chat(messages, max_tokens=6).text

        first = answer("a b")
        wanted = [first, answer("a b", first, "c"), answer("é", "c")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in wanted)


def test_chat_says_before_the_first_message_that_there_is_no_template(capsys: Captured) -> None:
    code, line = failure(capsys, "chat", "-m", LLAMA)
    assert code == 1
    assert "--chat-template" in line
