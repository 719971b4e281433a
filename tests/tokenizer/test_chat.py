"""Chat templates: renderings against transformers and the goldens, the sandbox, the limits, and the process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest

from forge.errors import ChatTemplateError, ParameterError
from forge.tokenizer import _chat_process
from forge.tokenizer.chat import MAX_SOURCE_CHARS, ChatTemplate

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "chat"
USER = {"role": "user", "content": "Hi"}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def render(source: str, messages: Any = (USER,), seconds: float = 60.0, **variables: Any) -> str:
    template = ChatTemplate(source, name="m.gguf", special_tokens={})
    template.seconds = seconds
    return template.render(messages, **variables)


def workers(pid: int | None = None) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # ended, perhaps a zombie still
            if any(part.endswith("_chat_worker.py") for part in child.cmdline()):
                found.append(child)
    return found


def gone(pid: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def run_script(code: str, *options: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    """Run Python code at the top level of `python -c`, warnings as errors, with forge on sys.path."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom forge.tokenizer.chat import ChatTemplate\n"
    head += "render = ChatTemplate('{{ messages[0].content }}', name='m', special_tokens={}).render\n"
    head += "def ask(text): return render([{'role': 'user', 'content': text}])\n"
    head += "from forge.tokenizer._chat_process import PROCESSES\ndef worker(): return PROCESSES._idle._child.pid\n"
    command = [sys.executable, "-X", "dev", "-W", "error", *options, "-c", head + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **kwargs)


# Renderings


def transformers_cases() -> list[Any]:
    document = json.loads((DATA / "transformers.json").read_text(encoding="utf-8"))
    return [pytest.param(document["special_tokens"], case, id=case["name"]) for case in document["cases"]]


@pytest.mark.parametrize(("special_tokens", "case"), transformers_cases())
def test_renders_as_transformers_does(special_tokens: dict[str, str], case: dict[str, Any]) -> None:
    template = ChatTemplate(case["template"], name="case", special_tokens=special_tokens)
    assert template.render(case["messages"], **case["options"]) == case["text"]


def golden_cases() -> list[Any]:
    document = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))
    return [
        pytest.param(file, document[model]["special_tokens"], case, id=f"{model}-{index}-{case['name']}")
        for model, file in (("smollm2", "smollm2.jinja"), ("gemma3", "gemma.jinja"))
        for index, case in enumerate(document[model]["cases"])
    ]


@pytest.mark.parametrize(("file", "special_tokens", "case"), golden_cases())
def test_templates_render_the_goldens(file: str, special_tokens: dict[str, str], case: dict[str, Any]) -> None:
    template = ChatTemplate.from_file(DATA / file, special_tokens=special_tokens)

    def prompt() -> str:
        return template.render(case["messages"], add_generation_prompt=case["add_generation_prompt"])

    if "error" in case:
        with pytest.raises(ChatTemplateError) as error:
            prompt()
        assert case["error"].removeprefix("TemplateError: ") in str(error.value)
        assert file in str(error.value)
    else:
        assert prompt() == case["text"]


def test_gemma_roles_must_alternate() -> None:
    template = ChatTemplate.from_file(DATA / "gemma.jinja", special_tokens={"bos_token": "<bos>"})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render([USER, USER])


def test_strftime_now_is_the_clock() -> None:
    before, year, after = datetime.now().year, int(render("{{ strftime_now('%Y') }}")), datetime.now().year
    assert before <= year <= after
    assert render("{{ strftime_now('%%é') }}") == "%é"


def test_late_imports_of_jinja_work_in_the_locked_process() -> None:
    assert render("{{ '\\N{DIGIT ONE}\\n' | urlize }}{{ 'é' | urlencode }}{{ ['a'] | random }}") == "1\n%C3%A9a"


# Arguments


class Role(str):
    __slots__ = ()


def test_mappings_tuples_and_string_subclasses_are_messages() -> None:
    messages = (MappingProxyType({"role": Role("user"), "content": "a"}), {"role": "tool", "tool_calls": []})
    assert render("{{ messages[0].role }}{{ messages | length }}", messages) == "user2"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: the list is empty"),
        ("Hi", "messages: must be a list"),
        (USER, "messages: must be a list"),
        (None, "messages: must be a list"),
        ([USER, "Hi"], r"messages\[1\]: must be a mapping"),
        ([USER, {"content": "x"}], r"messages\[1\]: role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]: role"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: content must be a string"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]: content\[0\]"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]: content\[0\].*text"),
        ([USER, {**USER, "image": b"x"}], r"messages\[1\]: cannot be written as JSON"),
        ([USER, {**USER, "content": "\ud800"}], r"messages\[1\]: holds half a surrogate pair"),
    ],
)
def test_wrong_messages_are_named(messages: Any, said: str) -> None:
    with pytest.raises(ParameterError, match=said) as error:
        render("x", messages)
    assert "\n" not in str(error.value)


def test_wrong_variables_are_named() -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ({1, 2}, loop, deep):
        with pytest.raises(ParameterError, match="tools: cannot be written as JSON"):
            render("x", tools=value)
    with pytest.raises(ParameterError, match="level: cannot be written as JSON"):
        render("x", level=object())


# Wrong templates

WRONG = {
    "syntax": ("a\n{% if %}", "line 2: "),
    "unclosed": ("{% for m in messages %}", "line 1: "),
    "no_filter": ("\n\n{{ 1 | nonsense }}", "line 3: No filter named 'nonsense'"),
    "undefined": ("\n{{ one.two }}", "line 2: 'one' is undefined"),
    "zero": ("{{ 1 / 0 }}", "line 1: ZeroDivisionError"),
    "type": ("{{ 'a' + none }}", "line 1: TypeError: can only concatenate str"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "import": ("{% import 'os' as os %}", "no loader"),
    "refusal": ("{{ raise_exception('No\nsystem\x1b[31m role') }}", "template: No system [31m role"),
    "refusal_without_reason": ("{{ raise_exception() }}", "no reason given"),
    "long_refusal": ("{{ raise_exception('x' * 100000) }}", "xxx..."),
    "surrogate": ("{{ '\\ud800' }}", "not valid Unicode"),
    "range": ("{% for a in range(99999999) %}{% endfor %}", "Range too big"),
    "macro_recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too deeply"),
    "blocks": ("{% if 1 %}" * 300 + "{% endif %}" * 300, ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_template_is_one_line(case: str) -> None:
    source, said = WRONG[case]
    with pytest.raises(ChatTemplateError) as error:
        render(source)
    message = str(error.value)
    assert message.startswith("m.gguf: chat template: ")
    assert said in message
    assert message.isprintable()
    assert len(message) < 500
    assert render("ok") == "ok"


def test_too_long_a_source_is_refused() -> None:
    assert ChatTemplate("x" * MAX_SOURCE_CHARS, name="m", special_tokens={}).render([USER]) == "x" * MAX_SOURCE_CHARS
    with pytest.raises(ChatTemplateError, match="m: the chat template has 1,048,577 characters"):
        ChatTemplate("x" * (MAX_SOURCE_CHARS + 1), name="m", special_tokens={})


def test_files_that_are_no_template(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_bytes(b"x" * (MAX_SOURCE_CHARS + 1))
    os.mkfifo(tmp_path / "fifo")
    said = {"absent": "No such file", "binary": "not UTF-8", "long": "characters", "fifo": "not a regular file"}
    for name, what in said.items():
        with pytest.raises(ChatTemplateError, match=what) as error:
            ChatTemplate.from_file(tmp_path / name, special_tokens={})
        assert str(error.value).startswith(str(tmp_path / name))
    with pytest.raises(ChatTemplateError, match="null"):
        ChatTemplate.from_file("a\0b", special_tokens={})


# The sandbox


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ messages|map(attribute='__class__.__mro__')|list }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
        "{{ lipsum.__globals__['os'].environ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os.environ }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ namespace.__globals__.sys.modules }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ ''.__class__.mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{% set ns = namespace(__html__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_the_template_sandbox_holds(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source)


def test_internals_print_as_nothing() -> None:
    assert render("[{{ ''.__class__ }}{{ '{0.__class__}'.format(1) }}{{ messages.append }}]") == "[]"
    assert render("[{{ (''|attr('__class__'))|attr('__mro__') }}]") == "[]"


def test_the_process_has_no_files_no_environment_and_little_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    _chat_process.PROCESSES.close()
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("TZ", "UTC")
    with (ROOT / "pyproject.toml").open("rb") as inherited:
        os.set_inheritable(inherited.fileno(), True)
        render("x")
    (worker,) = workers()
    proc = Path(f"/proc/{worker.pid}")
    if not proc.exists():
        pytest.skip("no /proc on this system")
    assert set(worker.environ()) <= {"LD_LIBRARY_PATH", "TZ", "LC_CTYPE"}
    assert worker.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
    assert worker.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert worker.rlimit(psutil.RLIMIT_AS)[0] == 512 << 20
    assert worker.cwd() == "/"
    assert not worker.open_files()
    maps = (proc / "maps").read_text()
    assert "numpy" not in maps
    assert "tokenizers" not in maps
    _chat_process.PROCESSES.close()


# Limits


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (ENDLESS, "takes longer than 0.3 s"),
        pytest.param("{{ 3 ** (10 ** 9) }}", "takes longer than 0.3 s", marks=pytest.mark.slow),
        pytest.param(
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "takes longer",
            marks=pytest.mark.slow,
        ),
        ("{{ 'x' * 10 ** 10 }}", "needs more than 537 MB of memory"),
        ("{% set x = [0] * 10 ** 9 %}", "needs more than 537 MB of memory"),
        ("{{ 'x' * 2 ** 23 }}", "writes more than 4,194,304 characters"),
        ("{% for a in range(9999) %}{{ 'xxxx' * 1000 }}{% endfor %}", "writes more than 4,194,304 characters"),
    ],
)
def test_limits_end_in_one_line_and_the_next_render_works(source: str, said: str) -> None:
    render("warm")
    (worker,) = workers()
    with pytest.raises(ChatTemplateError, match=said) as error:
        render(source, seconds=0.3 if "longer" in said else 60.0)
    assert str(error.value).isprintable()
    assert not worker.is_running()
    assert workers() == []
    assert render("ok") == "ok"


@pytest.mark.slow
def test_memory_that_grows_by_steps_is_limited() -> None:
    doubling = "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="MB of memory"):
        render(doubling)


def test_output_at_the_limit_passes() -> None:
    template = ChatTemplate("{{ 'é' * n }}", name="m", special_tokens={})
    template.max_chars = 1000
    assert template.render([USER], n=1000) == "é" * 1000
    with pytest.raises(ChatTemplateError, match="more than 1,000 characters"):
        template.render([USER], n=1001)


def test_a_long_conversation_passes() -> None:
    text = "🙂" * 1_000_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_a_stopped_process_does_not_hang_the_parent() -> None:
    render("warm")
    (worker,) = workers()
    worker.suspend()
    with pytest.raises(ChatTemplateError, match="takes longer than"):
        render("{{ messages[0].content }}", [{"role": "user", "content": "x" * 1_000_000}], seconds=0.2)
    assert gone(worker.pid)


def test_a_reply_of_forged_length_is_not_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"T" + (1 << 60).to_bytes(8, "big") + b"x")
        with pytest.raises(ConnectionError):
            _chat_process._read_reply(ours, 1000, time.monotonic() + 60)


# The process


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_one_process_serves_all_templates_and_threads(count: int) -> None:
    def work(index: int) -> bool:
        source = "{{ messages[0].content }} " + str(index % 12)
        return render(source, [{"role": "user", "content": f"t{index}"}]) == f"t{index} {index % 12}"

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(count)))
    assert len(workers()) == 1


def test_a_process_killed_from_outside_is_replaced() -> None:
    render("warm")
    for _ in range(3):
        (worker,) = workers()
        worker.kill()
        assert render("ok") == "ok"
        assert gone(worker.pid)
    assert len(workers()) == 1


@pytest.mark.slow
def test_a_process_that_dies_while_rendering_is_an_error() -> None:
    _chat_process.PROCESSES.close()

    def kill_worker() -> None:
        while not (found := [worker for worker in workers() if worker.cpu_times().user > 0.5]):
            time.sleep(0.01)
        found[0].kill()

    killer = threading.Thread(target=kill_worker)
    killer.start()
    with pytest.raises(ChatTemplateError, match=r"the process that renders it ended \(code -9\)"):
        render(ENDLESS, seconds=30)
    killer.join()
    assert render("ok") == "ok"


def test_a_process_killed_while_it_starts_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _chat_process.PROCESSES.close()
    for name, number in (("SIGKILL", 9), ("SIGSEGV", 11), ("signal 40", 40)):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\nkill -{number} $$\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        said = rf"was killed by {name} \(code -{number}\) while it started.*; try again$"
        with pytest.raises(ChatTemplateError, match=said) as error:
            render("x")
        assert "jinja2" not in str(error.value)
        assert workers() == []
    monkeypatch.undo()
    assert render("ok") == "ok"


@pytest.mark.slow
def test_a_good_render_does_not_wait_behind_endless_ones() -> None:
    render("warm")
    with ThreadPoolExecutor(3) as pool:
        endless = [pool.submit(render, ENDLESS, seconds=600.0) for _ in range(3)]
        while len(workers()) < 3:
            time.sleep(0.01)
        assert render("ok") == "ok"
        assert not any(future.done() for future in endless)
        while not all(future.done() for future in endless):
            for worker in workers():
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
            time.sleep(0.05)
        assert all("ended" in str(future.exception()) or "killed" in str(future.exception()) for future in endless)
    assert render("ok") == "ok"
    assert len(workers()) == 1


def test_there_are_never_more_processes_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chat_process, "MAX_PROCESSES", 2)
    monkeypatch.setattr(_chat_process, "PATIENCE_SECONDS", 0.0)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda index: (render(f"{{% for a in range(9999) %}}{{% endfor %}}{index}"), len(workers())), range(40)
        )
        assert [(text, count <= 2) for text, count in answers] == [(str(index), True) for index in range(40)]


def test_an_interrupted_render_leaves_no_answer_behind() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    render("warm")
    previous = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))

    def render_meanwhile() -> None:
        timer.start()
        render(ENDLESS)

    try:
        with pytest.raises(KeyboardInterrupt):
            render_meanwhile()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
    assert workers() == []
    assert render("ok") == "ok"


def test_ctrl_c_in_a_shell_does_not_reach_the_process() -> None:
    code = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ask("a"); first = worker()
try:
    os.killpg(0, signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print(ask("b"), worker() == first)
"""
    done = run_script(code, start_new_session=True)
    assert (done.stdout, done.stderr, done.returncode) == ("b True\n", "", 0)


def test_an_unguarded_script_ends_without_noise_or_leftovers() -> None:
    done = run_script("print(ask('a'), worker())")
    text, pid = done.stdout.split()
    assert (text, done.stderr, done.returncode) == ("a", "", 0)
    assert gone(int(pid))


def test_the_process_ends_with_a_killed_parent() -> None:
    done = run_script("import os; ask('a'); print(worker(), flush=True); os.kill(os.getpid(), 9)")
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))


@pytest.mark.slow
def test_a_busy_process_ends_after_its_parent_was_killed() -> None:
    code = f"""
import os, threading, time
ask('a'); print(worker(), flush=True)
threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()
template = ChatTemplate({ENDLESS!r}, name='m', special_tokens={{}})
template.seconds = 1
template.render([{{'role': 'user', 'content': ''}}])
"""
    done = run_script(code)
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))


def test_a_fork_has_a_process_of_its_own() -> None:
    code = """
import os
ask("a"); first = worker()
pid = os.fork()
if pid == 0:
    print(ask("child"), worker() != first, flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(ask("parent"), worker() == first)
"""
    done = run_script(code)
    assert (done.stdout, done.stderr) == ("child True\nparent True\n", "")


def test_nothing_is_imported_from_the_working_directory(tmp_path: Path) -> None:
    for name in ("jinja2", "markupsafe", "json", "resource", "datetime", "html"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    code = f"""
import os
os.chdir({str(tmp_path)!r})
sys.path[:0] = ["", {str(tmp_path)!r}]
os.environ["PYTHONPATH"] = {str(tmp_path)!r}
print(ask("a"))
"""
    done = run_script(code)
    assert (done.stdout, done.stderr) == ("a\n", "")
    assert not (tmp_path / "imported").exists()


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _chat_process.PROCESSES.close()
    for executable, said in (("/nonexistent/python", "cannot start"), ("/bin/false", r"does not start \(code 1\)")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ChatTemplateError, match=said):
            render("x")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ChatTemplateError, match="need the package"):
        render("x")
    monkeypatch.undo()
    assert render("ok") == "ok"
