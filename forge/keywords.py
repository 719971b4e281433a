"""Keywords of public functions: a misspelled one is a ParameterError with the nearest name, a former one works.

Checks of their values: a ParameterError names the keyword and what it may be.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import SequenceMatcher
from functools import wraps
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from forge.errors import ParameterError

T = TypeVar("T", bound=Callable[..., Any])
RENAMED = {"stop_ids": "stop_token_ids", "activations": "dtype"}
"""Former names of keywords. They work with a warning until version 0.2."""
_LIKE = 0.6
"""A suggestion has at least this share of equal letters."""
_MAX_FUNCTIONS = 64
_MISSPELLED = 0.85
"""In functions that pass unknown names on, a misspelling has at least this share of equal letters."""


def keywords(*settings: Any) -> Callable[[T], T]:
    """Let a function or a class refuse keywords that it does not know. Its signature does not change.

    settings: Dataclasses whose fields it takes through its ``**``. Without them a ``**`` is for names that it passes
    on: then it refuses only a name that is nearly one of its own.
    """

    def decorate(target: T) -> T:
        function: Any = target.__init__ if inspect.isclass(target) else target
        parameters = inspect.signature(function).parameters.values()
        passes_on = not settings and any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        known.pop("self", None)
        known |= dict.fromkeys(field.name for each in settings for field in fields(each))

        @wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            for name in [name for name in given if RENAMED.get(name) in known]:
                _rename(name, given)
            for name in given:
                if name not in known and not (passes_on and max(_likeness(name, known).values()) < _MISSPELLED):
                    message = f"{name:.60} is no parameter of {target.__name__}"
                    raise ParameterError(message, parameter=name, hint=_advice(name, known))
            return function(*args, **given)

        if not inspect.isclass(target):
            return checked  # type: ignore[return-value]
        setattr(target, "__init__", checked)  # noqa: B010 (mypy: a method is not assigned to)
        return target

    return decorate


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn at the line of the caller's caller. Python shows a DeprecationWarning only for the program's own code."""
    warnings.warn(f"{old} is now {new}; the old name goes in version 0.2", DeprecationWarning, stacklevel=stacklevel)


def _rename(old: str, given: dict[str, Any]) -> None:
    """Put a keyword under its new name. An empty value there, which `dataclasses.replace` adds, is replaced."""
    new = RENAMED[old]
    warn_renamed(old, new, stacklevel=4)
    value = given.pop(old)
    if given.get(new):
        raise ParameterError(f"{old} is {new} now, and both are given", parameter=old, hint=f"give {new} alone")
    given[new] = value


def _likeness(name: str, known: Iterable[str]) -> dict[str, float]:
    return {one: SequenceMatcher(None, name.lower(), one).ratio() for one in known}


def _advice(name: str, known: Iterable[str]) -> str:
    """The nearest names as a question. A former name counts for the new one."""
    names = list(known)
    likeness = _likeness(name, [*names, *(old for old, new in RENAMED.items() if new in names)])
    best = max(likeness.values(), default=0.0)
    if best < _LIKE:
        return f"it takes {', '.join(names)}" if names else "it takes none"
    return f"did you mean {' or '.join(RENAMED.get(one, one) for one, ratio in likeness.items() if ratio == best)}?"


def check_integer(name: str, value: object, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """Raises ParameterError, naming the parameter, unless a value is a whole number from `low` to `high`."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise refusal(name, "an integer", value)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise refusal(name, f"at least {low}" if high is None else f"in [{low}, {high}]", number)


def check_bool(name: str, value: object) -> None:
    """Raises ParameterError unless a value is True or False."""
    if not isinstance(value, bool):
        raise refusal(name, "True or False", value)


def refusal(name: str, allowed: str, value: object) -> ParameterError:
    """The error for a parameter whose value is not allowed."""
    return ParameterError(f"{name} must be {allowed}, not {shown(value)}", parameter=name.partition(" ")[0])


def real(name: str, value: object) -> float:
    """A value as a number; raises ParameterError unless it is finite."""
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float64
        pass
    raise refusal(name, "a finite number", value)


def check_real(name: str, value: object, low: float, high: float, *, is_open: bool = False) -> None:
    """Raises ParameterError unless a number is from `low`, or above it if `is_open`, to `high`."""
    number = real(name, value)
    if not low <= number <= high or (is_open and number == low):
        raise refusal(name, f"in {'(' if is_open else '['}{low:g}, {high:g}]", value)


def items(name: str, value: Iterable[Any], most: int) -> tuple[Any, ...]:
    """The entries of a list; raises ParameterError where there are more than `most`."""
    try:
        found = tuple(islice(value, most + 1))
    except TypeError:
        raise refusal(name, "a list", value) from None
    if len(found) > most:
        raise ParameterError(f"{name} may hold {most} entries, and there are more", parameter=name, hint="give fewer")
    return found


def shown(value: object) -> str:
    """A value for a message: one line, not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def functions(name: str, value: Iterable[Any], *arguments: str) -> tuple[Any, ...]:
    """Functions of a list; raises ParameterError unless each can be called with these arguments, or has a method
    `begin` that can be called with one."""
    found = items(name, value, _MAX_FUNCTIONS)
    for one in found:
        function, given = getattr(one, "begin", None), arguments[:1]
        if function is None:
            function, given = one, arguments
        try:
            if not callable(function):
                raise TypeError
            inspect.signature(function).bind(*given)
        except TypeError:
            raise refusal(name, f"a function of ({', '.join(arguments)})", one) from None
        except ValueError:  # some functions written in C do not say what they take
            pass
    return found


def texts(name: str, value: str | Iterable[str], most: int, most_characters: int) -> tuple[str, ...]:
    """One string or several; raises ParameterError where there are too many, or one is empty or too long."""
    found = (value,) if isinstance(value, str) else items(name, value, most)
    if not all(isinstance(s, str) and s for s in found):
        raise refusal(name, "non-empty strings", value)
    if (longest := max(map(len, found), default=0)) > most_characters:
        message = f"{name} may hold strings of {most_characters} characters, and one of these has {longest}"
        raise ParameterError(message, parameter=name)
    return found


def biases(name: str, value: object) -> dict[int, float]:
    """A mapping of token ids to what is added to their logits; raises ParameterError where it is another."""
    if not isinstance(value, Mapping):
        raise refusal(name, "a mapping of token ids to numbers", value)
    for token, bias in value.items():
        check_integer(f"{name} token", token, 0)
        if bias != -math.inf and abs(real(name, bias)) > 1e6:
            raise refusal(name, "in [-1e6, 1e6] or -inf", bias)
    return dict(value)


def path_of(name: str, value: Any) -> Path:
    """A path that a caller gave. Raises ParameterError for something else, and for a name that no file can have."""
    try:
        text = os.fspath(value)
        if isinstance(text, str) and text and b"\0" not in os.fsencode(text):
            return Path(text)
    except (TypeError, UnicodeEncodeError):
        pass
    raise refusal(name, "a path", value)
