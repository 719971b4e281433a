"""The command line. `main` is the console script; `run` does the same without ending the process."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 128 + signal.SIGPIPE

_COMPLETION = "_FORGE_COMPLETE"
_INTERRUPT_S = 1.0
"""Seconds after Ctrl-C in which a failure counts as its consequence."""
_interrupted_at = -math.inf


def main() -> NoReturn:
    """Run the command that the process was started with, and end the process."""
    import warnings

    signal.signal(signal.SIGINT, _on_interrupt)
    sys.unraisablehook = _on_unraisable
    sys.excepthook = _on_printed
    warnings.showwarning = _show_warning
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # a second Ctrl-C, while the first is handled
        code = _interrupted()
    if code == INTERRUPTED:
        exec("")  # makes CPython forget that the interrupt passed an exec: else `python -m` ends by the signal
    sys.exit(code)


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 2 for wrong usage, 130 after Ctrl-C, 141 if the reader of the output is gone, and 1 for
    any other failure. A failure is one line on stderr. `--debug` and `--quiet` work anywhere before `--`: the first
    prints tracebacks, the second leaves out everything but failures.
    """
    from forge.cli import output

    args = list(args)
    end = args.index("--") if "--" in args else len(args)
    debug, quiet = ("--debug" in args[:end], "--quiet" in args[:end])
    args = [arg for arg in args[:end] if arg not in ("--debug", "--quiet")] + args[end:] or ["--help"]
    output.quiet = quiet
    try:
        return _invoke(args)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            sys.__excepthook__(type(error), error, error.__traceback__)
        return _failure(error, quiet=debug)


def _invoke(args: list[str]) -> int:
    import typer

    from forge.cli import app, output

    usage_error = typer.BadParameter.__mro__[1]  # UsageError, which has no public name that is the same in all versions
    command = typer.main.get_command(app.app)
    try:
        if _COMPLETION in os.environ:  # a shell asks for completions
            command(args, prog_name="forge", complete_var=_COMPLETION)
        with command.make_context("forge", args) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    except SystemExit as leave:  # raised by typer's completion
        return leave.code if isinstance(leave.code, int) else 1
    except usage_error as error:  # type: ignore[misc]  # it is an exception, but mypy sees an element of a tuple of types
        path = error.ctx.command_path if error.ctx else "forge"
        output.error(f"{error.format_message()} (see {path} --help)")
        return 2
    output.flush()
    return 0


def _failure(error: BaseException, *, quiet: bool) -> int:
    """Exit code of a failed command. The failure is printed as one line on stderr unless `quiet`."""
    from forge.cli import output
    from forge.errors import ForgeError, ParameterError

    if _is_interrupt(error):
        return _interrupted()
    if isinstance(error, BrokenPipeError):
        output.discard()
        return CLOSED_PIPE
    if isinstance(error, ForgeError):
        line = getattr(error, "__notes__", [str(error)])[-1]  # the last note is by cli.usage
    elif isinstance(error, OSError):
        output.discard()
        line = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    elif isinstance(error, MemoryError):
        line = f"out of memory ({error or 'no details'}): close other programs, or use a smaller model or --context"
    else:
        line = f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback)"
    if not quiet:
        output.error(line)
    return 2 if isinstance(error, ParameterError) else 1


def _on_interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt for Ctrl-C. A second one at once, while the first is handled, is ignored."""
    global _interrupted_at
    if frame is not None and frame.f_code in _PRINTING:  # Python would print what is raised there
        os._exit(INTERRUPTED)
    before, _interrupted_at = _interrupted_at, time.monotonic()
    if _interrupted_at - before > _INTERRUPT_S or not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        raise KeyboardInterrupt


def _interrupted() -> int:
    """Exit code after Ctrl-C. Further ones are ignored: while Python shuts down, they would end it by the signal."""
    if signal.getsignal(signal.SIGINT) is _on_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return INTERRUPTED


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error. Python and libraries wrap or replace it while modules are imported."""
    if time.monotonic() - _interrupted_at < _INTERRUPT_S:
        return True
    seen = set()  # causes may form a circle
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a remark of forge as one line. Warnings of libraries to programmers are left out."""
    from forge.cli import output

    if category is UserWarning:
        output.note(str(message))


def _on_unraisable(event: sys.UnraisableHookArgs) -> None:
    """Print an exception of a destructor or of a callback of imports, behind which Python goes on."""
    if not _is_of_interrupt(event.exc_value):
        sys.__unraisablehook__(event)


def _on_printed(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception for C code, behind which that may go on: NumPy does so while modules of it are imported."""
    if not _is_of_interrupt(error):
        sys.__excepthook__(kind, error, traceback)


def _is_of_interrupt(error: BaseException | None) -> bool:
    """Whether half-made objects complain of Ctrl-C. If it came right there, it would be lost: the process ends."""
    if isinstance(error, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    return time.monotonic() - _interrupted_at < _INTERRUPT_S


_PRINTING = [function.__code__ for function in (_on_unraisable, _on_printed, _is_of_interrupt)]
