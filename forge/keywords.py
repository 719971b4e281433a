"""Keywords of public functions: a misspelled one is a ParameterError with the nearest name, a former one works."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import SequenceMatcher
from functools import wraps
from typing import Any, TypeVar

from forge.errors import ParameterError

T = TypeVar("T", bound=Callable[..., Any])
RENAMED = {"stop_ids": "stop_token_ids", "activations": "dtype"}
"""Former names of keywords. They work with a warning until version 0.2."""
_LIKE = 0.6
"""A suggestion has at least this share of equal letters."""
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
