"""Display for people: sizes, text that is safe on a terminal, and progress bars."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import IO, TYPE_CHECKING, Any, Self

from forge.config import Progress
from forge.errors import ParameterError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


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
        return nullcontext(NotebookLine())
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
    """One line in the output of a notebook's cell, which each report replaces. It needs no widgets."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
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


def printable(text: str) -> str:
    """Text in which whatever a terminal would act upon is written as an escape, such as \\n."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
