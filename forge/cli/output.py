"""Output of commands: results to stdout, the rest to stderr. No escape sequence of a model reaches a terminal."""

from __future__ import annotations

import io
import json
import math
import os
import re
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from forge.display import Bars, amount
from forge.display import is_terminal as is_terminal
from forge.display import num_bytes as num_bytes
from forge.display import printable as printable
from forge.errors import ForgeError

quiet = False
"""Whether `note`, `status` and progress print nothing, as --quiet asks."""
_CLOSED = "standard output is closed: redirect it to a file or a pipe"
_PATIENCE_S = 2.0
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write(text: str) -> None:
    """Write text to stdout at once: raw to a file or pipe, without control characters to a terminal.

    Raises BrokenPipeError if nobody reads any more, ForgeError if it cannot be written.
    """
    if sys.stdout is None:
        raise ForgeError(_CLOSED)
    if sys.stdout.isatty():
        text = _CONTROLS.sub("\ufffd", text)
    _put(text)


def write_json(value: Any) -> None:
    """Write a JSON object to stdout, on one line. Numbers that are not finite become null."""
    write(json.dumps(_finite(value)) + "\n")


def write_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[str] = (),
    to_stderr: bool = False,
) -> None:
    """Write a table to stdout, or to stderr. Columns named in `right` are aligned right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    if to_stderr:
        _to_stderr(_rendered(table, sys.stderr))
    elif sys.stdout is None:
        raise ForgeError(_CLOSED)
    else:
        _put(_rendered(table, sys.stdout))


def _rendered(renderable: Any, stream: IO[str] | None) -> str:
    from rich.console import Console

    terminal = is_terminal(stream)
    console = Console(file=stream, force_terminal=terminal, width=None if terminal else 200)
    with console.capture() as capture:
        console.print(renderable)
    return "".join(line.rstrip(" ") + "\n" for line in capture.get().splitlines())


def flush() -> None:
    """Flush stdout."""
    if sys.stdout is not None:
        sys.stdout.flush()


def discard() -> None:
    """Drop the text that stdout still buffers: it has no reader, and Python would complain at its end."""
    if sys.__stdout__ is None or sys.stdout is not sys.__stdout__:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno())
    os.close(nowhere)


def error(text: str) -> None:
    """Write one line about a failure to stderr. A stderr that cannot be written is ignored."""
    _to_stderr(f"forge: {printable(' '.join(text.split()))}\n")


def note(text: str) -> None:
    """Write one line of information to stderr."""
    if not quiet:
        error(text)


def status(text: str) -> None:
    """Write a line about the result to stderr, such as its speed."""
    if not quiet:
        reply(text)


def reply(text: str) -> None:
    """Write lines to stderr that the user asked for, even with --quiet."""
    _to_stderr("".join(f"{printable(line)}\n" for line in text.split("\n")))


def ask(prompt: str) -> None:
    """Write a prompt in front of the text that a person types."""
    if is_terminal(sys.stdout):
        _put(prompt)
    else:
        _to_stderr(prompt)


def quoted(text: str) -> str:
    """Text within quotes, so that blanks, newlines and an empty text are visible."""
    mark = '"' if "'" in text else "'"
    return f"{mark}{printable(text)}{mark}"


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 token, 2 tokens."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class ProgressDisplay(Bars):
    """A progress callback: bars if stderr is a terminal, else a line at the start of a download."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: set[str] = set()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if quiet:
            return
        if is_terminal(sys.stderr):
            super().__call__(stage, done, total)
        elif stage not in self._noted:
            self._noted.add(stage)
            if not stage.startswith(("loading", "hashing")):
                note(f"{stage} ({amount(stage, total)})" if total else stage)


def read_text(path: str, most_bytes: int = 1 << 26) -> str:
    """The UTF-8 text of a file, or of stdin for "-". Raises ForgeError if it cannot be read or is too long."""
    name = "standard input" if path == "-" else printable(path)
    try:
        if path == "-":
            data = _stdin().read(most_bytes + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ForgeError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > most_bytes:
        raise ForgeError(f"{name}: is longer than {num_bytes(most_bytes)}: give a shorter text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ForgeError(f"{name}: is not UTF-8 text (byte {error.start}): convert it") from None


def stdin_lines(most_bytes: int = 1 << 22) -> Iterator[str]:
    """Lines of stdin, as they arrive, without line ends. Raises ForgeError for one that is too long or not UTF-8."""
    stdin = _stdin()
    number = 0
    while data := stdin.readline(most_bytes + 1):
        number += 1
        if len(data) > most_bytes:
            raise ForgeError(f"standard input, line {number}: is longer than {num_bytes(most_bytes)}")
        try:
            yield data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ForgeError(f"standard input, line {number}: is not UTF-8 text (byte {error.start})") from None


def await_stdin() -> None:
    """Write a note if stdin stays silent: the user may not know that it is read."""
    try:
        if not select.select([sys.stdin], [], [], _PATIENCE_S)[0]:
            note("waiting for the end of standard input (give < /dev/null if there is none)")
    except (OSError, ValueError, TypeError):  # there is none, or it is in memory
        pass


def _stdin() -> IO[bytes]:
    if sys.stdin is None:
        raise ForgeError("standard input is closed: give a text or a file")
    return getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())


def _put(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError:  # a terminal or locale that lacks some characters
        encoding = sys.stdout.encoding
        _put(text.encode(encoding, "replace").decode(encoding))
    except BrokenPipeError:
        raise
    except OSError as error:
        discard()
        raise ForgeError(f"standard output: {error.strerror or error}") from error


def _to_stderr(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # full, closed, never there
        pass


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
