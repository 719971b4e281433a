"""What an error says in Python and on the command line."""

import copy
import io
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cli_runs import LLAMA, Captured, failure

import forge
from forge.engine import Engine


class Failure(NamedTuple):
    """One mistake, made in Python and on the command line."""

    call: Callable[[], Any]
    parameter: str
    message: str
    args: list[str]
    line: str


def load(**settings: Any) -> forge.LLM:
    return forge.load(LLAMA, **{"device": "cpu", **settings})


def generate(*args: str) -> list[str]:
    return ["generate", "a", "-m", LLAMA, "--device", "cpu", *args]


def sampling(parameter: str, value: Any, must: str) -> Failure:
    flag = f"--{parameter.replace('_', '-')}"
    return Failure(
        *(lambda: forge.SamplingParams(**{parameter: value}), parameter, f"{parameter} must be {must}, not {value}"),
        *(generate(flag, str(value)), f"{flag} must be {must}, not {value}"),
    )


FAILURES = [
    Failure(
        *(lambda: forge.load("smolm2"), "model", "no model named 'smolm2'"),
        ["inspect", "smolm2"],
        "no model named 'smolm2': did you mean 'smollm2'? known names are smollm2, gemma3-270m; a file's path and "
        "hf:owner/repo:Q4_K_M work too",
    ),
    sampling("top_p", 3.0, "in (0, 1]"),
    sampling("temperature", -1.0, "in [0, 100]"),
    sampling("max_tokens", 0, "at least 1"),
    sampling("repetition_penalty", 0.0, "in [0.01, 100]"),
    sampling("logprobs", 101, "in [0, 100]"),
    Failure(
        *(lambda: forge.SamplingParams(stop=["a"] * 65), "stop", "stop may hold 64 entries, and there are more"),
        *(generate(*["--stop", "a"] * 65), "--stop may hold 64 entries, and there are more: give fewer"),
    ),
    Failure(
        *(lambda: load(device="tpu"), "device", "device must be auto, cpu, hip, cuda, hip:N or cuda:N, not 'tpu'"),
        *(["verify", "--device", "tpu"], "--device must be auto, cpu, hip, cuda, hip:N or cuda:N, not 'tpu'"),
    ),
    Failure(
        *(lambda: load(memory_fraction=2.0), "memory_fraction", "memory_fraction must be in (0, 1], not 2.0"),
        *(generate("--memory-fraction", "2"), "--memory-fraction must be in (0, 1], not 2.0"),
    ),
    Failure(
        *(lambda: load(cpu_experts=-1), "cpu_experts", "cpu_experts must be at least 0, not -1"),
        *(generate("--cpu-experts", "-1"), "--cpu-experts must be at least 0, not -1"),
    ),
    Failure(
        *(lambda: load(threads=0), "threads", "threads must be in [1, 1024], not 0"),
        *(generate("--threads", "0"), "--threads must be in [1, 1024], not 0"),
    ),
    Failure(
        *(lambda: load(context=32).generate([1] * 40), "context"),
        "the prompt has 40 tokens and the context holds 32, one of which must be free",
        ["generate", " a" * 20, "-m", LLAMA, "--device", "cpu", "--context", "32"],
        "the prompt has 40 tokens and the context holds 32, one of which must be free: shorten the prompt or load with "
        "a larger --context",
    ),
    Failure(
        *(lambda: load().chat([{"role": "user", "content": "a"}]), "chat_template"),
        f"{LLAMA}: this model has no chat template, perhaps it is a base model",
        ["chat", "a", "-m", LLAMA, "--device", "cpu"],
        f"{LLAMA}: this model has no chat template, perhaps it is a base model: pass one with --chat-template FILE",
    ),
]


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: f"{case.parameter} {case.args[0]}")
def test_a_failure_names_the_keyword_in_python_and_the_flag_on_the_command_line(
    case: Failure, capsys: Captured
) -> None:
    with pytest.raises(forge.ForgeError) as caught:
        case.call()
    assert (caught.value.parameter, caught.value.args[0]) == (case.parameter, case.message)
    assert "--" not in str(caught.value)
    code, line = failure(capsys, *case.args)
    assert (code, line) == (2 if isinstance(caught.value, forge.ParameterError) else 1, f"forge: {case.line}")


def test_the_device_hint_is_an_argument_in_python_and_a_flag_on_the_command_line(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(forge.DeviceError) as caught:
        load(device="hip")
    assert caught.value.parameter == "device"
    assert caught.value.hint == 'install cupy-rocm-7-0, or use device="cpu"'
    assert failure(capsys, "generate", "a", "-m", LLAMA, "--device", "hip") == (
        1,
        "forge: device hip needs CuPy: install cupy-rocm-7-0, or use --device cpu",
    )


def test_a_context_that_does_not_fit_is_answered_with_one_that_does(capsys: Captured) -> None:
    with pytest.raises(forge.OutOfMemoryError) as caught:
        load(context=10**9)
    assert caught.value.parameter == "context"
    hint = re.fullmatch(r"(?:close it, or )?use context=(\d+)", caught.value.hint or "")  # other tests' models
    assert hint
    assert 0 < int(hint[1]) < 10**9
    code, line = failure(capsys, *generate("--context", "1000000000"))
    assert code == 1
    assert re.search(r": (close it, or )?use --context \d+$", line)


def test_a_command_that_lacks_the_parameter_keeps_its_python_name(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise forge.ContextLengthError("too long", parameter="max_step_tokens", hint="use max_step_tokens=5")

    monkeypatch.setattr(Engine, "check", refuse)
    assert failure(capsys, *generate()) == (1, "forge: too long: use max_step_tokens=5")


def test_an_error_of_a_line_of_stdin_keeps_its_parameter_and_hint(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" a" * 100)))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    args = ["chat", "--lines", "-m", LLAMA, "--device", "cpu", "--context", "32", "--chat-template", str(template)]
    code, line = failure(capsys, *args)
    assert (code, line.startswith("forge: standard input, line 1: the message takes ")) == (1, True)
    assert line.endswith(": shorten it, or use a larger --context")


@pytest.mark.parametrize("error", [forge.ForgeError, forge.ParameterError, forge.OutOfMemoryError])
def test_an_error_survives_pickling_and_copying_with_parameter_and_hint(error: type[forge.ForgeError]) -> None:
    given = error("what\nis wrong", parameter="context", hint="use context=5")
    for same in (pickle.loads(pickle.dumps(given)), copy.copy(given), copy.deepcopy(given)):
        assert type(same) is error
        assert (str(same), same.parameter, same.hint) == ("what\\nis wrong: use context=5", "context", "use context=5")
    assert (error("x").parameter, error("x").hint, str(error())) == (None, None, "")
