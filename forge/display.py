"""Display for people: sizes, text that is safe on a terminal, and progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from html import escape
from typing import IO, TYPE_CHECKING, Any, Self

from forge.config import Progress
from forge.errors import ParameterError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_NOTEBOOK_S = 0.1
"""A notebook's line is replaced no more often."""


def watched(progress: Progress | bool | None) -> AbstractContextManager[Progress | None]:
    """The callback for progress. None = bars on a terminal and in a Jupyter notebook; False = no callback.

    Raises ParameterError for anything else.
    """
    if callable(progress):
        return nullcontext(progress)
    if progress is not None and not isinstance(progress, bool):
        raise ParameterError(
            f"progress must be True, False or a function, not a {type(progress).__name__}", parameter="progress"
        )
    if progress is False:
        return nullcontext(None)
    if is_terminal(sys.stderr):
        return Bars()
    if is_notebook():
        return NotebookLine()
    return nullcontext(None)


class Bars:
    """Bars on stderr, one for each stage. They vanish at the end."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if self._bars is None:
            from rich import progress
            from rich.console import Console

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[amount]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.start()
        task = self._tasks.get(stage)
        if task is None:
            task = self._tasks[stage] = self._bars.add_task(printable(stage), total=total, amount="")
        self._bars.update(task, completed=done, total=total, amount=amount(stage, done))


class NotebookLine:
    """One line in the output of a notebook's cell, which reports replace, and which is empty at the end.

    It needs no widgets, so it is the same in Jupyter, VS Code and Colab. Reports that come within a moment of the one
    before are dropped: each is a message to the browser.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._stage, self._shown_at = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage == self._stage and now < self._shown_at + _NOTEBOOK_S:
            return
        self._stage, self._shown_at = stage, now
        share = f" {done / total:.0%}" if total else f" {amount(stage, done)}" if done else ""
        shown = {"text/plain": printable(stage) + share}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)


class Stopwatch:
    """The parts of something that takes time, one behind the other."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        """Milliseconds by name."""
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """A part ends here. It began where the one before ended."""
        now = time.perf_counter()
        self.parts[part], self._since = self.parts.get(part, 0.0) + 1000 * (now - self._since), now


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a person watches a stream."""
    return stream is not None and not stream.closed and stream.isatty()


def is_notebook() -> bool:
    """Whether Python runs as a Jupyter kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def amount(stage: str, count: int) -> str:
    """An amount of a stage. Kernels and measurements are counted; other stages are bytes."""
    return str(count) if stage.startswith(("compiling", "measuring")) else num_bytes(count)


def num_bytes(count: int) -> str:
    """A readable size: 98.4 MB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.4g} {unit}"
    return "1 byte" if count == 1 else f"{count} bytes"


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title and what there is to say, as HTML for a notebook. All text is escaped.

    It has no colours of its own, so that it can be read on light and dark pages, and no `<style>`, which Jupyter,
    VS Code and GitHub treat in different ways.
    """
    cell = '<td style="text-align: left; vertical-align: top; white-space: pre-wrap">'
    lines = "".join(f"<tr>{cell}{escape(name)}</td>{cell}{escape(text)}</td></tr>" for name, text in rows)
    return f"<div><b>{escape(title)}</b><table>{lines}</table></div>"


def html_cells(
    title: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[tuple[str, float, str]]]], caption: str = ""
) -> str:
    """A table whose cells have (text, share, note): shaded by shares from 0 to 1, and with notes that a pointer shows.

    Colours are transparent, for light and dark pages. All text is escaped. rows: A label and as many cells as columns.
    """
    head = "".join(f"<th>{escape(visible(name))}</th>" for name in columns)
    lines = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(_shaded('td', *cell) for cell in cells)}</tr>" for label, cells in rows
    )
    table = f'<table style="white-space: pre"><tr><th></th>{head}</tr>{lines}</table>'
    return f'<div style="overflow-x: auto"><b>{escape(title)}</b>{table}{_small(caption)}</div>'


def html_shaded(pieces: Iterable[tuple[str, float, str]], caption: str) -> str:
    """A text of pieces (text, share, note), shaded as the cells of `html_cells`, and a smaller line below."""
    text = "".join(_shaded("span", *piece) for piece in pieces)
    return f'<div><div style="white-space: pre-wrap">{text}</div>{_small(caption)}</div>'


def _shaded(tag: str, text: str, share: float, note: str) -> str:
    alpha = 0.7 * min(max(share, 0.0), 1.0) if share == share else 0.0  # NaN has no colour
    line = "<br>" * text.count("\n") if tag == "span" else ""
    shown = escape(visible(text)) + line
    return f'<{tag} style="background: rgba(230, 80, 40, {alpha:.3f})" title="{escape(note)}">{shown}</{tag}>'


def _small(caption: str) -> str:
    return f'<div style="opacity: 0.6; font-size: smaller">{escape(caption)}</div>'


def visible(text: str) -> str:
    """A token's text in which line ends, tabs and control characters can be seen."""
    return printable(text.replace("\n", "\u23ce").replace("\t", "\u21e5"))


def html_text(text: str, caption: str) -> str:
    """A text with its spaces and lines, and a smaller line below, as `html_table` makes it."""
    return f'<div><div style="white-space: pre-wrap">{escape(text)}</div>{_small(caption)}</div>'


def printable(text: str) -> str:
    """Text in which whatever a terminal would act upon is written as an escape, such as \\n."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
