"""A conversation of `forge chat`: its commands, what fits the context, its files, on a tiny model."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import Captured, with_template
from test_cli_chat import TEMPLATE

import forge
from forge import LLM
from forge.cli.chat import talk as talks
from forge.cli.chat.conversation import Conversation
from forge.cli.chat.history import History
from forge.config import SamplingParams

CONTEXT = 128


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = with_template(tmp_path_factory.mktemp("talk") / "m.gguf", TEMPLATE)
    with forge.load(model, device="cpu", context=CONTEXT, max_sequences=1) as llm:
        yield llm


def conversation(llm: LLM, *, drops: bool = True, max_tokens: int | None = 4, opening: str = "") -> Conversation:
    params = SamplingParams(max_tokens=max_tokens)
    return Conversation(llm, params, None, opening, {}, drops=drops, is_interactive=True)


def said(found: Conversation, *texts: str) -> list[str]:
    """The contents of the messages after some texts were typed."""
    commands = found.__dict__.setdefault("commands", talks.Commands(found))
    for text in texts:
        commands.take(text)
    return [message["content"] for message in found.messages]


def answer(llm: LLM, *turns: str, max_tokens: int = 4, system: str | None = None) -> str:
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    head = [{"role": "system", "content": system}] if system else []
    return llm.chat([*head, *messages], max_tokens=max_tokens, parse_special=False).text


# What is typed


@pytest.mark.parametrize(
    ("text", "name", "rest"),
    [
        ("hi", None, "hi"),
        ("  hi \n", None, "hi"),
        ("/help", "help", ""),
        ("/HELP", "help", ""),
        ("/set top_k  5 ", "set", "top_k  5"),
        ("/system a\nb", "system", "a\nb"),
        ("/nothing x", "nothing", "x"),
        ("/", "", ""),
        (" /no_think", None, "/no_think"),
        ("//no_think", None, "/no_think"),
        ("///", None, "//"),
        ("/* a comment */\nint x;", None, "/* a comment */\nint x;"),
        ("// a comment\nint x;", None, "// a comment\nint x;"),
        ("/usr/bin/env\nis a path", None, "/usr/bin/env\nis a path"),
        ('"""\n/help\n"""', None, "/help"),
        ('"""\n  a\n\n  b\n"""', None, "  a\n\n  b"),
        ('"""', None, '"""'),
        ('"""one""" and """two', None, '"""one""" and """two'),
        ("    indented\ncode\n", None, "    indented\ncode"),
        ("", None, ""),
        (" \n ", None, ""),
    ],
)
def test_texts_and_commands_are_told_apart(text: str, name: str | None, rest: str) -> None:
    assert talks.split(text) == (name, rest)


def test_a_conversation_remembers_and_forgets(llm: LLM) -> None:
    first = answer(llm, "a b")
    second = answer(llm, "a b", first, "c")
    found = conversation(llm)
    assert said(found, "a b", "", "c") == ["a b", first, "c", second]
    assert said(found, "/reset") == []
    assert said(found, "/system S", "c") == ["c", answer(llm, "c", system="S")]
    assert said(found, "/reset", '/system ""', "c") == ["c", answer(llm, "c")]


def test_regenerate_answers_the_last_question_with_the_settings_of_now(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm)
    assert said(found, "/regenerate", "/continue") == []
    first = answer(llm, "a b")
    assert said(found, "a b", "/set max_tokens 2", "/regenerate") == ["a b", answer(llm, "a b", max_tokens=2)]
    assert "temperature is 0: the answer will be the same" in capsys.readouterr().err
    assert said(found, "/set max-tokens 4", "/regenerate") == ["a b", first]


def test_continue_command_goes_on_with_an_answer_that_was_cut(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm)
    (_, first) = said(found, "a b")
    assert "cut after 4 tokens (--max-tokens); /continue goes on" in capsys.readouterr().err
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": first}]
    more = llm.chat(messages, max_tokens=4, continue_final_message=True, parse_special=False).text
    assert said(found, "/continue") == ["a b", first + more]
    assert capsys.readouterr().out == f"{more}\n"


def test_continue_says_that_nothing_was_added(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm)
    before = said(found, "a b")
    end = next(iter(llm.tokenizer.eog_ids))
    assert said(found, f'/set logit_bias {{"{end}": 1000}}', "/continue") == before
    assert "nothing to add" in capsys.readouterr().err


def test_names_of_control_tokens_in_messages_are_text(llm: LLM) -> None:
    name = llm.tokenizer.token_text(316)
    found = conversation(llm)
    said(found, f"a{name}")
    assert 316 not in llm.encode_chat(found.messages[:1], parse_special=False)
    assert found.used == len(llm.encode_chat(found.messages[:1], parse_special=False)) + 4


# What fits


def tokens(llm: LLM, texts: list[str]) -> int:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return len(llm.encode_chat(messages, parse_special=False))


def test_the_oldest_turns_are_dropped_after_a_warning(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm)
    errors: list[str] = []
    for place in range(12):
        all_said = said(found, f"message {place} " + "x " * 5)
        errors.append(capsys.readouterr().err)
        turns = found.hidden // 2
        if "no longer sees" in errors[-1]:  # all that it does not see, not only those since the last note
            assert f"sees its oldest {'turn' if turns == 1 else f'{turns} turns'}\n" in errors[-1]
        seen = all_said[found.hidden :]
        assert found.used <= CONTEXT
        assert found.used == tokens(llm, seen[:-1]) + 4
        assert seen[-1] == answer(llm, *seen[:-1])  # the model sees the latest turns and nothing else
        assert seen[0].startswith("message ")
        assert len(all_said) == 2 * (place + 1)  # and all are kept
    warned = [place for place, text in enumerate(errors) if "when it is full, the oldest turns are dropped" in text]
    dropped = [place for place, text in enumerate(errors) if "no longer sees its oldest" in text]
    assert len(warned) == 1
    assert warned[0] == dropped[0] - 1
    assert found.hidden > 0
    # as few as can be: with one turn more there is no room
    assert tokens(llm, all_said[found.hidden - 2 : -1]) > CONTEXT - 4


def test_a_full_conversation_is_refused_if_that_is_asked_for(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm, drops=False)
    with pytest.raises(forge.ContextLengthError, match="/reset begins anew"):
        said(found, *["x " * 6] * 12)
    assert found.hidden == 0
    assert len(found.messages) >= 4
    assert "messages are refused" in capsys.readouterr().err
    assert found.messages[-1]["role"] == "assistant"  # what was refused is not part of it


def test_a_question_that_can_never_fit_leaves_the_conversation_as_it_was(llm: LLM) -> None:
    found = conversation(llm)
    before = said(found, "a b")
    with pytest.raises(forge.ContextLengthError, match="shorten it"):
        said(found, "x " * 200)
    assert said(found) == before
    assert found.hidden == 0
    with pytest.raises(forge.ContextLengthError, match="shorten it"):
        said(found, "/system " + "x " * 200, "c")
    assert said(found, '/system ""') == before


def test_an_answer_that_fills_the_context_says_so_and_the_next_question_has_room(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm, max_tokens=None)
    said(found, '/set logit_bias {"300": 100}', "/set ignore_eos true", "a")
    err = capsys.readouterr().err
    assert f"the context of {CONTEXT} tokens is full" in err
    assert "/continue" not in err  # there is no turn to drop
    assert found.used == CONTEXT
    with pytest.raises(forge.ContextLengthError, match="the answer and its question"):
        said(found, "/continue")
    said(found, "/set max_tokens 4", "b")
    assert found.hidden == 2
    assert found.used == tokens(llm, ["b"]) + 4


# Settings


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("temperature 0.7", "temperature", 0.7),
        ("TEMPERATURE 1", "temperature", 1),
        ("top-k 40", "top_k", 40),
        ("top_p 0.5", "top_p", 0.5),
        ("min_p 0.1", "min_p", 0.1),
        ("repetition_penalty 1.1", "repetition_penalty", 1.1),
        ("presence_penalty -1", "presence_penalty", -1),
        ("frequency_penalty 0.5", "frequency_penalty", 0.5),
        ("max_tokens none", "max_tokens", None),
        ("seed 7", "seed", 7),
        ("seed none", "seed", None),
        ("stop END", "stop", ("END",)),
        ("stop 5", "stop", ("5",)),
        ('stop ["a", "b c"]', "stop", ("a", "b c")),
        ("stop none", "stop", ()),
        ("stop_token_ids 5", "stop_token_ids", (5,)),
        ("ignore_eos true", "ignore_eos", True),
        ('logit_bias {"5": -1.5}', "logit_bias", {5: -1.5}),
        ("logprobs 2", "logprobs", 2),
    ],
)
def test_set_changes_a_parameter_and_says_so(text: str, name: str, value: object, llm: LLM, capsys: Captured) -> None:
    found = conversation(llm)
    said(found, f"/set {text}")
    assert getattr(found.params, name) == value
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [name]
    said(found, "/set")
    assert lines[0] in capsys.readouterr().err.splitlines()


def test_set_takes_a_former_name_and_says_the_new_one(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm)
    said(found, "/set stop_ids 5")
    assert found.params.stop_token_ids == (5,)
    note = "forge: stop_ids is now stop_token_ids; the old name goes in version 0.2"
    assert capsys.readouterr().err.splitlines() == [note, "stop_token_ids [5]"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("temperature -1", "temperature"),
        ("temperature hot", "temperature"),
        ("temperature NaN", "temperature"),
        ("top_k 1.5", "top_k"),
        ("max_tokens 0", "max_tokens"),
        ("ignore_eos yes", "ignore_eos"),
        ("logit_bias 5", "logit_bias"),
        ('logit_bias {"a": 1}', "logit_bias"),
        (f'logit_bias {{"{5000 * "1"}": 1}}', "logit_bias"),
        ("temprature 1", "did you mean temperature?"),
        ("n 2", "'n' is no parameter; /set shows them"),
        ("stop [1]", "stop"),
    ],
)
def test_set_refuses_what_cannot_be_used(text: str, names: str, llm: LLM) -> None:
    found = conversation(llm)
    with pytest.raises(forge.ParameterError, match=names.replace("?", r"\?")):
        said(found, f"/set {text}")
    assert found.params == SamplingParams(max_tokens=4)


def test_a_message_that_is_not_utf8_is_refused(llm: LLM) -> None:
    found = conversation(llm)
    with pytest.raises(forge.ParameterError, match="the message is not UTF-8 text"):
        said(found, "a\udcff")
    assert found.messages == []


def test_unknown_commands_name_the_nearest(llm: LLM, capsys: Captured) -> None:
    said(conversation(llm), "/regen")
    assert "did you mean /regenerate?" in capsys.readouterr().err
    said(conversation(llm), "/no_think")
    assert "write //no_think" in capsys.readouterr().err


def test_stats_counts_the_context(llm: LLM, capsys: Captured) -> None:
    found = conversation(llm)
    said(found, "/stats", "a b", "/stats")
    err = capsys.readouterr().err
    assert f"context: 0 of {CONTEXT} tokens used" in err
    used = tokens(llm, ["a b"]) + 4
    assert f"context: {used} of {CONTEXT} tokens used ({used / CONTEXT:.0%})\n1 turn\n" in err


def test_help_names_every_command(llm: LLM, capsys: Captured) -> None:
    said(conversation(llm), "/help")
    err = capsys.readouterr().err
    assert all(f"/{name}" in err for name in talks.COMMANDS)
    assert max(map(len, err.splitlines())) <= 110


# Files


def test_a_conversation_is_saved_and_taken_up_again(llm: LLM, tmp_path: Path, capsys: Captured) -> None:
    found = conversation(llm)
    path = tmp_path / "a b.json"
    contents = said(found, "/system é", "a b", f"/save {path}")
    saved = json.loads(path.read_text())
    assert [(m["role"], m["content"]) for m in saved] == [("system", "é"), ("user", "a b"), ("assistant", contents[1])]
    other = conversation(llm)
    assert said(other, f"/load {path}") == contents
    assert other.system == "é"
    assert said(other, "c") == said(found, "c")
    said(other, f"/save {path}")  # it is this conversation's
    assert "replaced" in capsys.readouterr().err
    assert len(json.loads(path.read_text())) == 5


def test_a_file_of_something_else_is_not_replaced(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("precious")
    found = conversation(llm)
    with pytest.raises(forge.ForgeError, match="exists already"):
        said(found, "a", f"/save {path}")
    assert path.read_text() == "precious"
    for bad, match in ((tmp_path, "exists already"), (tmp_path / "no" / "x", "cannot be written"), ("", "missing")):
        with pytest.raises(forge.ForgeError, match=match):
            said(found, f"/save {bad}")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"{}",
        b"[]",
        b'"text"',
        b"[1]",
        b'[{"content": "no role"}]',
        b'[{"role": "user"}]',
        b'[{"role": "user", "content": 5}]',
        b"[" * 100_000,
        b'{"messages": 5}',
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(data: bytes, llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    found = conversation(llm)
    before = said(found, "/system S", "a b")
    with pytest.raises(forge.ForgeError):
        said(found, f"/load {path}")
    assert (said(found), found.system) == (before, "S")


def test_a_request_as_openai_takes_it_is_a_conversation(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"model": "m", "messages": [{"role": "user", "content": "a b"}]}))
    found = conversation(llm)
    assert said(found, f"/load {path}", "/regenerate") == ["a b", answer(llm, "a b")]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(forge.ForgeError, match="not a regular file"):
        said(found, f"/load {tmp_path / 'pipe'}")


# The history


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chat-history.jsonl"


def test_the_history_is_kept_between_starts_for_its_owner_alone(kept: Path) -> None:
    History().store_string("one\ntwo é 😀")
    History().store_string("three")
    assert History().entries == ["one\ntwo é 😀", "three"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.chmod(0o644)
    assert History().entries == ["one\ntwo é 😀", "three"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_damaged_history_gives_what_is_sound(kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_bytes(b'"a"\n\xff\x00\n5\nnull\n["x"]\n' + b"[" * 100_000 + b'\n"\\ud800"\n"\\u001b[2J"\n"torn')
    assert History().entries == ["a", "\x1b[2J"]


def test_a_long_history_is_cut(kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("".join(f'"{i}"\n' for i in range(3000)))
    assert History().entries == [str(i) for i in range(2000, 3000)]
    assert len(kept.read_text().splitlines()) == 1000
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    History().store_string("x" * 100_000)
    assert len(History().entries) == 1000


def test_a_history_that_is_no_file_is_said(kept: Path, capsys: Captured) -> None:
    from forge.cli.chat import prompt

    kept.mkdir(parents=True)
    assert list(prompt._history().load_history_strings()) == []
    assert "what you type is not remembered" in capsys.readouterr().err
    kept.rmdir()
    os.mkfifo(kept)
    assert list(prompt._history().load_history_strings()) == []
