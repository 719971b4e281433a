"""Calls in a fork of the tests' process."""

from __future__ import annotations

import os
import select
import signal
import traceback
import warnings
from collections.abc import Callable

from forge import ForgeError

SECONDS = 60.0


def in_a_child(call: Callable[[], object]) -> str:
    """What a call returns or raises in a fork of this process, as text; "hangs" if it takes too long."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: other threads may hold locks
        child = os.fork()
    if not child:
        try:
            try:
                text = repr(call())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
                if not isinstance(error, ForgeError):
                    text += "\n" + "".join(traceback.format_exception(error))
            os.write(writer, text.encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], SECONDS)
        return os.read(reader, 4000).decode() if ready else "hangs"
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
