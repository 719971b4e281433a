"""Which hooks the calls of this thread, or task, have: those of the `with` blocks that it is in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Generic, TypeVar

from forge.engine.hooked import SequenceHook
from forge.errors import ParameterError
from forge.hooks.selection import Prompt, Selection

Result = TypeVar("Result")
_entered: ContextVar[tuple[Scope[Any], ...]] = ContextVar("forge_hooks", default=())
"""In the order in which they were entered."""


class Scope(ABC, Generic[Result]):
    """A `with` block whose calls of one model have hooks."""

    def __init__(self, owner: object, result: Result, selection: Selection) -> None:
        """owner: Whose calls. result: What `as` names."""
        self._owner, self._result, self.selection = owner, result, selection
        self._most_requests = 0
        """Of a call in the block."""

    def __enter__(self) -> Result:
        _entered.set((*_entered.get(), self))
        return self._result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not by the token of `set`: the block may end in another context, as that of an asynchronous generator may.
        _entered.set(tuple(scope for scope in _entered.get() if scope is not self))
        most, self._most_requests = self._most_requests, 0
        wanted = self.selection.request
        if error is None and wanted is not None and 0 < most <= wanted:
            message = f"request is {wanted}, and no call in the block had more than {most}: it was used in none"
            raise ParameterError(message, parameter="request", hint="numbers begin at 0")

    def check(self, prompt: Prompt) -> None:
        """Raises ParameterError for a prompt that cannot have the hook."""
        self._most_requests = max(self._most_requests, prompt.requests)
        if self.selection.concerns(prompt):
            self.selection.check(prompt)
            self.check_selected(prompt)

    def check_selected(self, prompt: Prompt) -> None:
        """As `check`, of a prompt that is selected."""

    @abstractmethod
    def bind(self, prompt: Prompt) -> SequenceHook | None:
        """The hook of one sequence, which was checked; None where it has none."""


Hooks = tuple[SequenceHook, ...]


def entered(owner: object) -> list[Scope[Any]]:
    """The blocks that this thread, or task, is in, and that are about these calls."""
    return [scope for scope in _entered.get() if scope._owner is owner]


def bound(scopes: list[Scope[Any]], prompts: list[list[int]], more: int = 0, n: int = 1) -> list[list[Hooks]]:
    """The hooks of each choice of each prompt of a call. Raises ParameterError for what a prompt cannot have.

    more: Positions behind a prompt that are computed at most. n: Choices of a prompt.
    """
    if not scopes:
        return [[()] * n for _ in prompts]
    several = [Prompt(number, len(prompts), list(ids), len(ids) + more) for number, ids in enumerate(prompts)]
    check(scopes, several)
    return [[hooks_of(scopes, prompt) for _ in range(n)] for prompt in several]


def check(scopes: list[Scope[Any]], prompts: list[Prompt]) -> None:
    """Raises ParameterError for what a prompt cannot have."""
    for scope in scopes:
        for prompt in prompts:
            scope.check(prompt)


def hooks_of(scopes: list[Scope[Any]], prompt: Prompt) -> Hooks:
    """The hooks of one sequence, which was checked."""
    return tuple(hook for scope in scopes if (hook := scope.bind(prompt)))
