"""Which of a file's chat templates is used."""

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import write_gguf

import forge
from forge.formats import gguf
from forge.runtime.encoder import choose_template
from forge.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
Render = Callable[..., str]
HERMES = {"": "chat {{ bos_token }}", ".tool_use": "use {{ tools[0].function.name }}", ".rag": "rag {{ documents }}"}


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """What a file with these templates renders, given one by name or not."""

    def run(templates: dict[str, str], given: str | Path | None = None, **options: object) -> str:
        keys = {f"tokenizer.chat_template{name}": source for name, source in templates.items()}
        keys |= {"tokenizer.chat_templates": [name[1:] for name in templates if name] or ["none"]}
        keys |= {"general.architecture": "llama", "tokenizer.ggml.model": "llama"}
        keys |= {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"], "tokenizer.ggml.scores": [0.0] * 3}
        path = write_gguf(tmp_path / "model.gguf", keys)
        with gguf.read(path) as file:
            tokenizer = Tokenizer.from_metadata(file.metadata, source=str(path))
        llm = forge.LLM.__new__(forge.LLM)
        llm._name, llm.tokenizer, llm.chat_template = str(path), tokenizer, choose_template(given, tokenizer, str(path))
        return llm.render_chat(USER, **options)

    return run


def test_tools_choose_the_template_for_them(render: Render) -> None:
    assert render(HERMES) == render(HERMES, tools=[]) == "chat <s>"
    assert render(HERMES, tools=TOOLS) == "use weather"


def test_a_name_chooses_a_template_whatever_is_given(render: Render) -> None:
    assert render({"": "chat", ".x": "x {{ tools[0].function.name }}"}, "x", tools=TOOLS) == "x weather"
    assert render(HERMES, "rag") == "rag None"
    assert render(HERMES, "default") == "chat <s>"
    with pytest.raises(forge.ChatTemplateError, match="ignores tools"):
        render(HERMES, "default", tools=TOOLS)


def test_a_name_goes_before_a_file_of_that_name(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rag").write_text("file")
    Path("other").write_text("other {{ tools is defined }}")
    assert render(HERMES, "rag") == "rag None"
    assert render(HERMES, "./rag") == render(HERMES, Path("rag")) == "file"
    assert render(HERMES, "other") == "other True"


@pytest.mark.parametrize("given", ["tool-use", "no/such/file", "x\ny"])
def test_what_is_neither_a_name_nor_a_file_lists_the_names(render: Render, given: str) -> None:
    with pytest.raises(forge.ChatTemplateError, match=r"^[^\n]*has: default, rag, tool_use$"):
        render(HERMES, given)


def test_several_templates_without_a_default_ask_for_a_choice(render: Render) -> None:
    named = {name: source for name, source in HERMES.items() if name}
    with pytest.raises(forge.ChatTemplateError, match=r"choose one of rag, tool_use with chat_template=NAME$"):
        render(named)
    assert render(named, tools=TOOLS) == "use weather"
    assert render(named, "rag") == "rag None"
    assert render({".rag": "only"}) == "only"
    with pytest.raises(forge.ChatTemplateError, match="has no chat template"):
        render({})


def test_a_blank_template_is_none(render: Render) -> None:
    with pytest.raises(forge.ChatTemplateError, match="has no chat template"):
        render({"": " \n"})
    assert render({"": "", ".rag": "only"}) == render({"": "", ".default": "only"}) == "only"


def test_an_empty_name_is_no_template(render: Render) -> None:
    with pytest.raises(forge.ChatTemplateError, match="chat_template: '' is neither a file nor a template"):
        render({"": "chat"}, "")
