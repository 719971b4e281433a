"""Every error that forge raises on purpose. Its text is one line: what is wrong, where, and how to fix it."""

import contextlib
from traceback import clear_frames

__all__ = [
    "ChatTemplateError",
    "ContextLengthError",
    "DeviceError",
    "DownloadError",
    "ForgeError",
    "FormatError",
    "ModelNotFoundError",
    "NumericsError",
    "OutOfMemoryError",
    "ParameterError",
    "RequestTimeoutError",
    "TokenizerError",
    "UnsupportedError",
]


class ForgeError(Exception):
    """Base of all forge errors. ``str(error)`` is the message with the hint behind it, in one line.

    Attributes:
        parameter: Name of the argument that is wrong, or that the hint asks to change, as Python spells it
            ("top_p"). None = no argument is to blame. A message about a wrong argument begins with this name.
        hint: What to do, with arguments as Python writes them (``use device="cpu"``). None = the message says it all.
    """

    def __init__(self, message: str = "", *, parameter: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.hint = hint

    def __str__(self) -> str:
        return one_line(super().__str__(), self.hint)


class ParameterError(ForgeError, ValueError):
    """An argument has a value that cannot be used. `parameter` names it. The command line exits with 2."""


class ContextLengthError(ForgeError, ValueError):
    """A prompt does not fit the context."""


class ModelNotFoundError(ForgeError):
    """No model has this name or path. `parameter` is "model"."""

    def __init__(self, message: str = "", *, parameter: str | None = "model", hint: str | None = None) -> None:
        super().__init__(message, parameter=parameter, hint=hint)


class DownloadError(ForgeError):
    """A model could not be fetched or does not match its checksum."""


class FormatError(ForgeError):
    """A model file is truncated, forged, foreign or not readable."""


class UnsupportedError(ForgeError):
    """A well-formed file asks for something forge does not have (an architecture, a tensor type, a tokenizer)."""


class TokenizerError(ForgeError):
    """Text or ids cannot be converted."""


class ChatTemplateError(ForgeError):
    """A chat template is missing, fails, or exceeds its limits."""


class DeviceError(ForgeError):
    """The device asked for is not there or cannot be used."""


class OutOfMemoryError(ForgeError):
    """Weights or KV cache do not fit; the message holds the bytes needed and free."""


class NumericsError(ForgeError):
    """A model computes infinite or NaN logits: its weights are damaged or out of range."""


class RequestTimeoutError(ForgeError, TimeoutError):
    """A request did not end within its `timeout`. Nothing of it runs any more."""


def one_line(message: str, hint: str | None) -> str:
    """A message with its hint behind it, on one line whatever names the message quotes."""
    text = f"{message}: {hint}" if hint else message
    return text.replace("\r", "\\r").replace("\n", "\\n")


def drop_callers(error: BaseException) -> None:
    """Let go of what functions held that have called those of an error's traceback, and have returned.

    Whoever keeps the error would keep their arrays. What user code held in which it came up stays to be seen.
    """
    frame = error.__traceback__.tb_frame.f_back if error.__traceback__ else None
    while frame is not None:
        with contextlib.suppress(RuntimeError):  # it has not returned
            frame.clear()
        frame = frame.f_back


def drop_frames(error: BaseException, outer: BaseException | None = None) -> None:
    """Let go of what the functions held in which an error came up, and the errors behind it. Lines stay to be seen.

    Whoever keeps the error, as a notebook does, would keep arrays and models. outer: One that was there before.
    """
    seen = {id(outer)}
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            clear_frames(one.__traceback__)
            left += [one.__cause__, one.__context__]


def of_user(error: BaseException, file: str) -> BaseException:
    """An error of a user's function, whose traceback begins where a file of forge's calls others."""
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_frame.f_code.co_filename == file:
        trace = trace.tb_next
    return error.with_traceback(trace)
