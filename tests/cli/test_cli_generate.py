"""`forge generate` on tiny models."""

import io
import re
import sys
from pathlib import Path

import pytest
from adapter_files import random_pairs, write_adapter
from cli_runs import LLAMA, Captured, failure, json_of, with_template

import forge
from forge.cli import run


def test_generate_streams_the_text_to_stdout_and_statistics_to_stderr(capsys: Captured) -> None:
    wanted = forge.load(LLAMA).generate("a b", max_tokens=12, ignore_eos=True)
    assert run(["generate", "a b", "-m", LLAMA, "--max-tokens", "12", "--ignore-eos"]) == 0
    captured = capsys.readouterr()
    assert captured.out == wanted.text
    assert re.search(r"prompt 3 tokens, [\d.]+ tokens/s \| generated 12 tokens, [\d.]+ tokens/s", captured.err)


def test_generate_json_passes_every_option(capsys: Captured) -> None:
    settings = {
        "max_tokens": 20,
        "temperature": 1.5,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "seed": 7,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    found = json_of(capsys, "generate", "a b", "-m", LLAMA, "--ignore-eos", "--context", "64", *flags)
    with forge.load(LLAMA) as llm:
        wanted = llm.generate("a b", ignore_eos=True, **settings)
        assert wanted.ids != llm.generate("a b", ignore_eos=True, max_tokens=20).ids
        assert found["prompt_ids"] == llm.tokenizer.encode("a b")
    assert (found["ids"], found["text"], found["finish_reason"]) == (wanted.ids, wanted.text, "length")
    assert found["timings"]["completion_tokens"] == 20
    assert found["timings"]["decode_ms"] > 0


def test_generate_stops_at_each_stop_text(capsys: Captured) -> None:
    text = json_of(capsys, "generate", "a b", "-m", LLAMA, "--max-tokens", "12", "--ignore-eos")["text"]
    stop = text[5]
    found = json_of(
        capsys, "generate", "a b", "-m", LLAMA, "--max-tokens", "12", "--ignore-eos", "--stop", "§", "--stop", stop
    )
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


def test_generate_reads_the_prompt_from_stdin(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b\n")))
    found = json_of(capsys, "generate", "-", "-m", LLAMA, "--max-tokens", "3")
    assert found["prompt_ids"] == forge.load_tokenizer(LLAMA).encode("a b\n")


def test_generate_says_that_an_answer_was_cut_and_by_what(capsys: Captured) -> None:
    assert run(["generate", "a b", "-m", LLAMA, "--max-tokens", "1", "--ignore-eos"]) == 0
    err = capsys.readouterr().err
    assert "forge: the answer was cut after 1 token (--max-tokens)\n" in err
    assert re.search(r"prompt 3 tokens, [\d.]+ tokens/s \| generated 1 token \|", err)
    assert run(["generate", "a b", "-m", LLAMA, "--context", "16", "--ignore-eos"]) == 0
    assert "cut: the context of 16 tokens is full (--context)" in capsys.readouterr().err
    assert run(["generate", "a b", "-m", LLAMA, "--stop", "a"]) == 0
    assert "cut" not in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("presence", "100.5"), ("presence", "nan"), ("frequency", "-101")])
def test_generate_refuses_penalties_out_of_range(flag: str, value: str, capsys: Captured) -> None:
    code, line = failure(capsys, "generate", "a", "-m", LLAMA, f"--{flag}-penalty", value)
    assert code == 2
    assert f"--{flag}-penalty" in line


def test_generate_shows_logprobs(capsys: Captured) -> None:
    flags = ("generate", "a b", "-m", LLAMA, "--max-tokens", "4", "--ignore-eos", "--logprobs", "2")
    found = json_of(capsys, *flags)
    with forge.load(LLAMA) as llm:
        wanted = llm.generate("a b", max_tokens=4, ignore_eos=True, logprobs=2)
        names = [llm.tokenizer.token_text(id) for id in wanted.ids]
    assert [entry["id"] for entry in found["logprobs"]] == wanted.ids
    assert [entry["token"] for entry in found["logprobs"]] == names
    assert [entry["logprob"] for entry in found["logprobs"]] == [entry.logprob for entry in wanted.logprobs]
    tops = [[(top["id"], top["logprob"]) for top in entry["top_logprobs"]] for entry in found["logprobs"]]
    assert tops == [list(entry.top) for entry in wanted.logprobs]
    assert "logprobs" not in json_of(capsys, *flags[:-2])
    assert run(flags) == 0
    shown = capsys.readouterr()
    assert shown.out == wanted.text
    assert f"{wanted.logprobs[0].logprob:.3f}" in shown.err
    assert run([*flags, "--quiet"]) == 0
    assert f"{wanted.logprobs[0].logprob:.3f}" in capsys.readouterr().err  # it was asked for
    assert failure(capsys, *flags[:-1], "101")[0] == 2


def test_generate_through_the_chat_template(tmp_path: Path, capsys: Captured) -> None:
    model = with_template(tmp_path / "m.gguf")
    encode = forge.load_tokenizer(model).encode
    few = ("-m", model, "--max-tokens", "2")
    assert json_of(capsys, "generate", "hi", *few, "--chat")["prompt_ids"] == encode("u:hi ")
    assert json_of(capsys, "generate", "hi", *few, "--system", "be")["prompt_ids"] == encode("s:be u:hi ")
    assert json_of(capsys, "generate", "hi", *few)["prompt_ids"] == encode("hi")
    code, line = failure(capsys, "generate", "hi", "-m", LLAMA, "--chat")
    assert code == 1
    assert "no chat template" in line


def test_generate_takes_an_adapter(tmp_path: Path, capsys: Captured) -> None:
    path = write_adapter(tmp_path / "poet.gguf", "llama", random_pairs(Path(LLAMA), seed=0, size=1.0))
    with forge.load(LLAMA, adapters={"poet": path}) as llm:
        wanted = llm.generate("a b", max_tokens=8, ignore_eos=True, adapter="poet").ids
        assert wanted != llm.generate("a b", max_tokens=8, ignore_eos=True).ids
    common = ("generate", "a b", "-m", LLAMA, "--max-tokens", "8", "--ignore-eos", "--adapter")
    for given in (str(path), f"x={path}"):
        assert json_of(capsys, *common, given)["ids"] == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("=a.gguf", "--adapter: '=a.gguf' is no NAME=PATH"),
        ("a=", "--adapter: 'a=' is no NAME=PATH"),
        ("a=nothing.gguf", "nothing.gguf: "),
    ],
)
def test_an_adapter_that_is_not_there_is_one_line(given: str, message: str, capsys: Captured) -> None:
    code, line = failure(capsys, "generate", "a b", "-m", LLAMA, "--adapter", given)
    assert code == 1 + (message.startswith("--adapter"))
    assert line.startswith(f"forge: {message}")


def test_generate_quantizes_the_model_and_says_so(capsys: Captured) -> None:
    found = json_of(capsys, "generate", "a b", "-m", LLAMA, "--max-tokens", "8", "--ignore-eos", "--quantize", "q4_0")
    with forge.load(LLAMA, quantize="Q4_0") as llm:
        assert found["ids"] == llm.generate("a b", max_tokens=8, ignore_eos=True).ids
    assert found["quantize"] == "Q4_0"
    assert "quantize" not in json_of(capsys, "generate", "a b", "-m", LLAMA, "--max-tokens", "1")
