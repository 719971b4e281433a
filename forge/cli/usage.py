"""Errors in the words of the command line: flags instead of parameters, forge's names instead of other programs'."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from forge.errors import ForgeError, ParameterError, one_line

_COMMANDS = {
    "chat": "run",
    "list": "ls",
    "inspect": "show info",
    "pull": "download get",
    "rm": "delete remove",
    "convert": "quantize export",
    "generate": "complete completion",
    "bench": "benchmark",
    "perplexity": "ppl",
    "doctor": "check",
    "verify": "test",
}
_ELSEWHERE = {there: here for here, names in _COMMANDS.items() for there in names.split()}
"""Commands of other programs for models, and forge's for the same."""
_OPTIONS = {
    "--max-tokens": "-n --n-predict --max-new-tokens",
    "--context": "-c --ctx-size --max-model-len",
    "--memory-fraction": "--gpu-memory-utilization",
    "--cpu-experts": "-ncmoe --n-cpu-moe --cpu-moe",
    "--threads": "-t",
    "--seed": "-s",
    "--system": "-sys --system-prompt",
    "--repetition-penalty": "--repeat-penalty",
    "--debug": "--verbose -v",
}
_OPTIONS_ELSEWHERE = {there: here for here, names in _OPTIONS.items() for there in names.split()}
"""Options of other programs, and forge's for the same."""
_MODELS, _TEXTS = ("FILE", "NAME"), ("PROMPT", "TEXT", "QUESTION")
_ARGUMENTS = {"-m": _MODELS, "--model": _MODELS, "-p": _TEXTS, "--prompt": _TEXTS}
"""Options of other programs and commands, and the arguments of forge for the same."""


class Command(TyperCommand):
    """A command whose errors name its flags, and which knows the option names of other programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does. The error for an unknown option also names forge's option or argument."""
        words = list(args)  # parsing takes them out
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            option = getattr(error, "option_name", None)
            if option and (typed := _as_typed(option, words)) != option:
                error.message = error.message.replace(option, typed, 1)  # type: ignore[attr-defined]
                error.possibilities, option = None, typed  # type: ignore[attr-defined]
            if hint := self._hint(option):
                error.message, error.possibilities = f"{error.message}: {hint}", None  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run as typer does. A ForgeError gets its line for the command line as a note (PEP 678)."""
        try:
            return super().invoke(ctx)
        except ForgeError as error:
            error.add_note(_line(error, ctx))
            raise

    def _hint(self, option: str | None) -> str | None:
        there = _OPTIONS_ELSEWHERE.get(option or "", "")
        if there in ("--debug", *(flag for param in self.params for flag in param.opts)):
            return f"use {there}"
        for param in self.params:
            if param.param_type_name == "argument" and param.metavar in _ARGUMENTS.get(option or "", ()):
                return f"it is an argument: forge {self.name} {param.metavar}"
        return None


def _as_typed(option: str, args: list[str]) -> str:
    """An unknown option as it was typed: click calls llama.cpp's -ncmoe -n."""
    typed = next((arg.partition("=")[0] for arg in args if arg.startswith(option)), option)
    return typed if len(option) == 2 and typed[2:].isalpha() else option


class Group(TyperGroup):
    """A group of commands, which knows the command names of other programs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve as typer does. The error for an unknown command also names forge's command."""
        there = _ELSEWHERE.get(args[0])
        if there is not None and there in self.commands and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}: use {ctx.command_path} {there}")
        return super().resolve_command(ctx, args)


def _line(error: ForgeError, ctx: Any) -> str:
    """The line for an error: flags instead of parameters, and the environment variables that set a wrong value."""
    message, hint = str(error.args[0]) if error.args else "", error.hint or ""
    variables = []
    for param in ctx.command.params:
        is_argument = param.param_type_name == "argument"
        name, flag = str(param.name), param.metavar if is_argument else max(param.opts, key=len)
        source = ctx.get_parameter_source(name)
        source = source.name if source else ""
        if getattr(param, "is_flag", False):
            hint = re.sub(rf"\b{name}=True\b", flag, hint)
        hint = re.sub(rf"""\b{name}=(["']?)([^\s"',;]+)\1""", rf"{flag} \2", hint)
        if name == error.parameter:
            hint = re.sub(rf"(?<!-)\b{name}\b(?!=)", flag, hint)
            if isinstance(error, ParameterError) and source == "COMMANDLINE":
                message = re.sub(rf"^{name}\b", flag, message)
        value = ctx.params.get(name)
        if source == "ENVIRONMENT" and (name == "model" or name == error.parameter) and str(value) in message:
            variables.append(param.envvar)
    return one_line(message, hint) + "".join(f" (from {variable})" for variable in variables)
