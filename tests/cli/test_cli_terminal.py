"""`forge chat` behind a pseudo-terminal: what keys do, and what is on the screen."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import start, with_template
from terminal import Terminal
from test_cli_chat import TEMPLATE, prompt_of

pytestmark = pytest.mark.slow

ANSWERED = rb"generated \d+ tokens?"
Open = Callable[..., Terminal]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_template(tmp_path_factory.mktemp("chat") / "m.gguf", TEMPLATE)


@pytest.fixture
def chat(model: str, tmp_path: Path) -> Iterator[Open]:
    """Starts a chat with short answers, whose history is in a directory of its own."""
    terminals = []

    def start(*args: str, size: tuple[int, int] = (24, 80), **environment: str) -> Terminal:
        environment = {"TERM": "xterm-256color", "FORGE_CACHE": str(tmp_path / "cache"), **environment}
        flags = ("-m", model, "--temperature", "0", "--max-tokens", "6", "--device", "cpu")
        terminals.append(Terminal("chat", *flags, *args, size=size, **environment))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def answered(terminal: Terminal, keys: bytes) -> bytes:
    """Type keys at the prompt and wait for the answer; what was on the screen."""
    terminal.prompted()
    terminal.type(keys)
    return terminal.wait_for(ANSWERED)


def told(terminal: Terminal, keys: bytes, pattern: bytes) -> bytes:
    terminal.prompted()
    terminal.type(keys)
    return terminal.wait_for(pattern)


def users_of(terminal: Terminal, tmp_path: Path) -> list[str]:
    """What the conversation holds as the person's messages."""
    told(terminal, f"/save {tmp_path / 'c.json'}\r".encode(), rb"saved")
    messages = json.loads((tmp_path / "c.json").read_text())
    return [message["content"] for message in messages if message["role"] == "user"]


def test_messages_of_several_lines(chat: Open, tmp_path: Path) -> None:
    terminal = chat()
    answered(terminal, b"\x1b[200~/* one */\nint x; \\\n\n  // three\x1b[201~\r")  # a paste
    answered(terminal, b'"""\rfoo\r  bar\r"""\r')
    answered(terminal, b"one \\\rtwo\r")
    answered(terminal, b"alt\x1b\renter\r")
    answered(terminal, "héllo 😀 日本 e\u0301\r".encode())
    answered(terminal, b" /no_think\r")
    answered(terminal, b"//usr/bin\r")
    assert users_of(terminal, tmp_path) == [
        "/* one */\nint x; \\\n\n  // three",
        "foo\n  bar",
        "one \ntwo",
        "alt\nenter",
        "héllo 😀 日本 e\u0301",
        "/no_think",
        "/usr/bin",
    ]
    told(terminal, b"/exit\r", rb"/exit")
    assert terminal.exit_code() == 0


def test_ctrl_c_clears_the_line_and_leaves_at_the_second_time(chat: Open, tmp_path: Path) -> None:
    terminal = chat()
    told(terminal, b"not this\x03", rb"Ctrl-C again")
    answered(terminal, b"this\r")
    told(terminal, b"\x03", rb"Ctrl-C again")
    answered(terminal, b"that\r")
    assert users_of(terminal, tmp_path) == ["this", "that"]
    told(terminal, b"\x03", rb"Ctrl-C again")
    told(terminal, b"some\x03", rb"Ctrl-C again")  # a line was cleared: that is not the second time
    told(terminal, b"\x03", rb"")
    assert terminal.exit_code() == 130


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_many_ctrl_c_leave_with_the_same_exit_code(term: str, chat: Open) -> None:
    terminal = chat(TERM=term)
    terminal.wait_for(rb"> ")
    assert terminal.exit_code(b"\x03\x03\x03") == 130
    assert b"Traceback" not in terminal.seen


def test_ctrl_c_that_another_thread_receives_ends_the_wait_for_a_line() -> None:
    """The kernel may give a signal to any thread, and a read in the main thread is then not interrupted."""
    program = """if True:
        import signal, sys, threading, time
        from forge.cli.chat import prompt
        def interrupt():
            while sys._current_frames()[threading.main_thread().ident].f_code is not prompt._wait_for_input.__code__:
                time.sleep(0.01)
            time.sleep(0.2)  # it waits in the kernel
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        try:
            threading.Thread(target=interrupt).start()
            print("read", prompt._line("> "))
        except KeyboardInterrupt:
            print("interrupted")
    """
    terminal = Terminal(program=(sys.executable, "-c", program), TERM="dumb")
    try:
        terminal.wait_for(b"interrupted")
    finally:
        terminal.close()


PRINTED = {
    "_on_unraisable": "type('Broken', (), {'__del__': lambda _: fail()})()",
    "_on_printed": "ctypes.pythonapi.PyRun_SimpleString(b'fail()')",  # by PyErr_Print, as NumPy's modules do
}


@pytest.mark.parametrize("where", ["fail", "hook", "_is_of_interrupt", "nowhere"])
@pytest.mark.parametrize("hook", PRINTED)
def test_ctrl_c_while_an_exception_is_printed_ends_forge_without_a_traceback(hook: str, where: str) -> None:
    """Python and C code print exceptions that nobody can catch, and go on as if nothing had happened."""
    program = f"""if True:
        import ctypes, signal, sys
        from forge import cli
        def fail():
            raise ValueError
        def trace(frame, event, _):
            if frame.f_code.co_name == "{hook if where == "hook" else where}":
                signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)
        def run(_):
            sys.settrace(trace)
            {PRINTED[hook]}
            return 3
        cli.run = run
        cli.main()
    """
    terminal = Terminal(program=(sys.executable, "-c", program))
    try:
        assert terminal.exit_code() == (3 if where == "nowhere" else 130)
        assert (b"Traceback" in terminal.seen) == (where == "nowhere")
    finally:
        terminal.close()


def test_ctrl_c_stops_an_answer_and_keeps_it(chat: Open, tmp_path: Path) -> None:
    terminal = chat("--context", "400")
    told(terminal, b"/set max_tokens none\r", rb"max_tokens none\r\n")
    told(terminal, b"/set ignore_eos true\r", rb"ignore_eos true\r\n")
    told(terminal, b'/set logit_bias {"300": 100}\r', rb"logit_bias")
    terminal.prompted()
    terminal.type(b"talk\r")
    terminal.wait_for(rb"(il){3}")
    terminal.type(b"\x03")
    terminal.prompted()
    terminal.type(f"/save {tmp_path / 'c.json'}\r".encode())
    terminal.wait_for(rb"saved")
    messages = json.loads((tmp_path / "c.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert re.fullmatch(r"(il){3,}", messages[1]["content"])
    told(terminal, b"/exit\r", rb"")
    assert terminal.exit_code() == 0


def test_earlier_messages_come_back_at_the_next_start(chat: Open, tmp_path: Path) -> None:
    terminal = chat()
    answered(terminal, b"first\r")
    answered(terminal, b'"""\rsecond\rpart\r"""\r')
    terminal.prompted()
    assert terminal.exit_code(b"\x04") == 0
    terminal = chat()
    answered(terminal, b"\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\r")  # up through the lines of the second
    answered(terminal, b"\x12econ\r\r")  # Ctrl-R
    assert users_of(terminal, tmp_path) == ["first", "second\npart"]


def test_a_narrow_terminal_that_changes_its_width(chat: Open, tmp_path: Path) -> None:
    terminal = chat(size=(8, 12))
    text = "a long line that does not fit 日本語 at all"
    answered(terminal, f"{text}\r".encode())
    terminal.prompted()
    terminal.type(b"half ")
    terminal.resize(5, 40)
    terminal.type(b"of it\r")
    terminal.wait_for(ANSWERED)
    assert users_of(terminal, tmp_path) == [text, "half of it"]


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_can_only_print(term: str, chat: Open, tmp_path: Path) -> None:
    terminal = chat(TERM=term)
    seen = b""
    for keys in (b"hello\r", b'"""\rfoo\r  bar\r"""\r', b"one \\\rtwo\r", "é 😀\r".encode()):
        seen += terminal.wait_for(rb"> ")
        terminal.type(keys)
        seen += terminal.wait_for(ANSWERED)
    assert b"\x1b" not in seen[seen.index(b"hello") :]
    terminal.wait_for(rb"> ")
    terminal.type(b"no\x03")
    terminal.wait_for(rb"Ctrl-C again")
    terminal.type(f"/save {tmp_path / 'c.json'}\r".encode())
    terminal.wait_for(rb"saved")
    messages = json.loads((tmp_path / "c.json").read_text())
    users = [message["content"] for message in messages if message["role"] == "user"]
    assert users == ["hello", "foo\n  bar", "one \ntwo", "é 😀"]
    assert not (tmp_path / "cache" / "chat-history.jsonl").exists()
    assert terminal.exit_code(b"\x04") == 0


def test_without_colour_no_colour_is_sent(chat: Open) -> None:
    terminal = chat(NO_COLOR="1")
    seen = answered(terminal, b"hello\r") + told(terminal, b"no\x03", rb"Ctrl-C again")
    assert not re.search(rb"\x1b\[[\d;]*[34]\d[;m]", seen[seen.index(b"hello") :])
    terminal.prompted()
    assert terminal.exit_code(b"\x04") == 0


def test_answers_go_to_a_file_and_the_prompt_to_the_terminal(model: str, tmp_path: Path) -> None:
    script = f"exec {sys.executable} -m forge chat -m {model} --max-tokens 3 --device cpu > {tmp_path / 'out'}"
    terminal = Terminal(script, program=("/bin/sh", "-c"), TERM="xterm", FORGE_CACHE=str(tmp_path / "cache"))
    try:
        answered(terminal, b"hello\r")
        terminal.prompted()
        assert terminal.exit_code(b"\x04") == 0
    finally:
        terminal.close()
    out = (tmp_path / "out").read_bytes()
    assert b">" not in out[:2]
    assert b"\x1b[" not in out
    assert out.endswith(b"\n")


def test_a_question_says_that_it_waits_for_the_end_of_stdin(model: str) -> None:
    with start("chat", "hi", "-m", model, "--max-tokens", "1", "--json") as process:
        assert process.stdin
        assert process.stderr
        assert process.stdout
        while b"waiting for the end of standard input" not in (line := process.stderr.readline()):
            assert line
        process.stdin.write(b"below")
        process.stdin.close()
        ids = json.loads(process.stdout.read())["prompt_ids"]
    assert ids == prompt_of(model, "u:hi\nbelow a:")


def test_a_reader_of_the_answers_that_leaves_ends_it(model: str, tmp_path: Path) -> None:
    chat = f"{sys.executable} -m forge chat -m {model} --max-tokens 3 --device cpu"
    script = f'{chat} | true; echo "ended ${{PIPESTATUS[0]}}"'
    terminal = Terminal(script, program=("/bin/bash", "-c"), TERM="xterm", FORGE_CACHE=str(tmp_path / "cache"))
    try:
        terminal.prompted()
        terminal.type(b"hello\r")
        terminal.wait_for(rb"ended 141")
    finally:
        terminal.close()
