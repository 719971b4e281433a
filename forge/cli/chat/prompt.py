"""Read messages of one or several lines from a terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import has_focus, is_searching
from prompt_toolkit.history import History as PromptHistory
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output

from forge import _files
from forge.cli import output
from forge.cli.chat.history import History
from forge.errors import ForgeError

_PROMPT, _MORE = "> ", ". "
_LONGEST = 1 << 22


def reader() -> Callable[[], str | None]:
    """A function that returns the next text, or None at the end of the input.

    It raises KeyboardInterrupt for Ctrl-C, with the text that it cleared as an argument if there was any.
    """
    screen = next((stream for stream in (sys.stdout, sys.stderr) if output.is_terminal(stream)), None)
    if screen is None or os.environ.get("TERM", "dumb") in ("", "dumb"):
        return _read_plainly
    terminal = Vt100_Output.from_pty(screen, term=os.environ["TERM"])
    terminal.enable_cpr = False  # some terminals never report the position of their cursor
    session: PromptSession[str] = PromptSession(
        message=_PROMPT,
        multiline=True,
        prompt_continuation=lambda width, line, wraps: _MORE if not wraps else " " * width,
        key_bindings=_keys(),
        history=_history(),
        reserve_space_for_menu=0,
        input=create_input(sys.stdin),
        output=terminal,
    )

    def read() -> str | None:
        output.ask(f"{_PROMPT}\r")  # in one piece, because scripts wait for it; prompt_toolkit draws its own over it
        try:
            return session.prompt()
        except EOFError:
            return None

    return read


def is_open(text: str) -> bool:
    '''Whether a block that begins with """ goes on.'''
    return text.lstrip().startswith('"""') and text.count('"""') % 2 == 1


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER") & ~is_searching

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        at_end = not buffer.document.text_after_cursor
        if is_open(buffer.text):
            buffer.insert_text("\n")
        elif at_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text
        event.app.exit(exception=KeyboardInterrupt(text) if text else KeyboardInterrupt())

    return keys


def _history() -> PromptHistory:
    try:
        return History()
    except (OSError, ValueError, ForgeError) as error:
        output.note(f"what you type is not remembered: the history in the cache directory: {_files.reason(error)}")
        return InMemoryHistory()


def _read_plainly() -> str | None:
    """Read from a terminal without cursor control. The terminal edits lines itself, and there is no history."""
    text = ""
    while True:
        line = _line(_MORE if text else _PROMPT)
        if line is None:
            return text or None
        text += line
        if len(text) > _LONGEST:
            raise ForgeError(f"a message is longer than {_LONGEST} characters: give it as a file, forge chat < FILE")
        if is_open(text):
            text += "\n"
        elif text.endswith("\\"):
            text = text[:-1] + "\n"
        else:
            return text


def _line(prompt: str) -> str | None:
    """A line without its line end. None at the end of the input."""
    output.ask(prompt)
    try:
        _wait_for_input()
        line = sys.stdin.readline(_LONGEST)
    except KeyboardInterrupt:
        output.ask("\n")
        raise
    except UnicodeDecodeError as error:
        raise ForgeError(f"standard input: is not UTF-8 text ({error.reason})") from None
    return line.removesuffix("\n") if line else None


def _wait_for_input() -> None:
    """Returns when a line can be read. Raises KeyboardInterrupt for Ctrl-C.

    A blocking read would miss a signal that comes just before it, or that the kernel gives to another thread. Python
    writes to the wakeup descriptor in both cases.
    """
    wakeup, end = os.pipe()
    os.set_blocking(end, False)
    before = signal.set_wakeup_fd(end)
    try:
        # pthread_sigmask runs the handlers now, also of a signal that came before there was a descriptor. Else Python
        # may go on waiting: a thread that gives the interpreter lock up just then resets the flag by which this one
        # would notice (CPython 3.11, COMPUTE_EVAL_BREAKER).
        signal.pthread_sigmask(signal.SIG_BLOCK, ())
        while sys.stdin not in select.select([sys.stdin, wakeup], [], [])[0]:
            os.read(wakeup, 1)
            signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.set_wakeup_fd(before)
        os.close(wakeup)
        os.close(end)
