"""Calls of tools, read from a model's text in the formats that models are trained to write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forge.server.parsing.source import SPACE, Malformed, Reading, Source
from forge.server.parsing.values import GEMMA, JSON, PYTHON, Notation, quoted, string, value, whole

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the parameters of each tool that the model was shown, by the tool's name."""
_NAME = re.compile(r"[\w.:/-]*")
_IDENTIFIER = re.compile(r"\w*")
_JSON_KEYS = ("name", "arguments", "parameters", "type", "id")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool. arguments: A JSON object."""

    name: str
    arguments: str


Reader = Callable[[Source, Tools, str], Reading[list[Call]]]
"""Reads calls behind a mark, which it is given. Raises Malformed."""


def json_calls(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`{"name": "f", "arguments": {}}`, or a list of such objects. Some models write "tool_name" or "parameters"."""
    yield from source.run(SPACE)
    if (yield from source.ahead(1)) == "[":
        return (yield from _sequence(source, _json_call, "[", "]"))
    return [(yield from _json_call(source))]


def json_lines(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """As `json_calls`, or several such objects one behind the other."""
    calls = yield from json_calls(source, tools, mark)
    while True:
        yield from source.run(SPACE)
        if (yield from source.ahead(1)) != "{":
            return calls
        calls.append((yield from _json_call(source)))


def bare_json_calls(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """As `json_calls`, where no mark tells a call from another object: it has no other keys, and the tool exists."""
    return [(yield from _json_call(source, tools))]


def mistral_calls(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """A list as in `json_calls`, or `f[ARGS]{}` with an optional `[CALL_ID]x` before `[ARGS]`, which some leave out."""
    yield from source.run(SPACE)
    if (yield from source.ahead(1)) == "[":
        return (yield from _sequence(source, _json_call, "[", "]"))
    name = yield from source.run(_NAME)
    if (yield from source.skip("[CALL_ID]")):
        yield from source.run(_NAME)
    yield from source.skip("[ARGS]")
    return [new_call(name, (yield from _object(source, JSON)))]


def gemma_call(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`call:f{key:<escape>text<escape>,other:1}`, or with other quotes."""
    yield from source.run(SPACE)
    yield from source.expect("call:")
    name = yield from source.run(_NAME)
    return [new_call(name, (yield from _object(source, GEMMA)))]


def pythonic_calls(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`[f(a=1), g(b="x")]`, of tools that exist."""
    yield from source.run(SPACE)
    return (yield from _sequence(source, lambda source: _python_call(source, tools), "[", "]"))


def python_lines(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """Lines `f(a=1)` or `print(f(a=1))` before the end of a block, of tools that exist; or a list of calls."""
    end = "```" if mark.startswith("```") else f"</{mark[1:]}"
    yield from source.run(SPACE)
    if (yield from source.ahead(1)) == "[":
        calls = yield from pythonic_calls(source, tools, mark)
        yield from source.run(SPACE)
    else:
        calls = []
        while (yield from source.choice(end)) is None:
            is_printed = yield from source.skip("print(")
            calls.append((yield from _python_call(source, tools)))
            if is_printed:
                yield from source.expect(")")
            yield from source.run(SPACE)
    yield from source.expect(end)
    return calls


def named_call(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`{}`, the arguments of the tool that the mark names."""
    return [new_call(mark, (yield from _object(source, JSON)))]


def kimi_calls(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`functions.f:0<|tool_call_argument_begin|>{}`."""
    yield from source.run(SPACE)
    yield from source.skip("functions.")
    name = yield from source.until("<|tool_call_argument_begin|>")
    arguments = yield from _object(source, JSON)
    return [new_call(name.strip().rpartition(":")[0] or name.strip(), arguments)]


def keyed_calls(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`[{"f": {}}, {"g": {}}]`."""
    yield from source.run(SPACE)
    return (yield from _sequence(source, _keyed_call, "[", "]"))


def json_block(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """A list as in `json_calls`, in a block of code."""
    yield from source.run(SPACE)
    yield from source.expect("```json")
    calls = yield from json_calls(source, tools, mark)
    yield from source.run(SPACE)
    yield from source.expect("```")
    return calls


def name_and_json(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """A line with the name of a tool that exists, then `{}`."""
    name = yield from source.run(_NAME)
    if name not in tools:
        raise Malformed
    yield from source.expect("\n")
    return [new_call(name, (yield from _object(source, JSON)))]


def _sequence(source: Source, read: Callable[[Source], Reading[Call]], opener: str, closer: str) -> Reading[list[Call]]:
    """Calls between brackets, with commas between them. One at least."""
    calls = []
    yield from source.expect(opener)
    while True:
        yield from source.run(SPACE)
        calls.append((yield from read(source)))
        yield from source.run(SPACE)
        if (yield from source.skip(closer)):
            return calls
        yield from source.expect(",")


def _json_call(source: Source, tools: Tools | None = None) -> Reading[Call]:
    """An object with a name and arguments. tools: The names and keys that it may have are checked as they come."""
    members = dict[str, str]()
    yield from source.expect("{")
    while True:
        yield from source.run(SPACE)
        key = _text((yield from string(source, JSON)))
        if tools is not None and key not in _JSON_KEYS:
            raise Malformed
        yield from source.run(SPACE)
        yield from source.expect(":")
        members[key] = yield from value(source, JSON)
        if tools is not None and key == "name" and _text(members[key]) not in tools:
            raise Malformed
        yield from source.run(SPACE)
        if (yield from source.skip("}")):
            break
        yield from source.expect(",")
    name = _text(members.get("name", members.get("tool_name")))
    return new_call(name, members.get("arguments", members.get("parameters", "{}")))


def _keyed_call(source: Source) -> Reading[Call]:
    yield from source.expect("{")
    yield from source.run(SPACE)
    name = _text((yield from string(source, JSON)))
    yield from source.run(SPACE)
    yield from source.expect(":")
    arguments = yield from value(source, JSON)
    yield from source.run(SPACE)
    yield from source.expect("}")
    return new_call(name, arguments)


def _python_call(source: Source, tools: Tools) -> Reading[Call]:
    name = yield from source.run(_NAME)
    if name not in tools:
        raise Malformed
    yield from source.expect("(")
    arguments = list[str]()
    yield from source.run(SPACE)
    while not (yield from source.skip(")")):
        if arguments:
            yield from source.expect(",")
            yield from source.run(SPACE)
        key = yield from source.run(_IDENTIFIER)
        yield from source.run(SPACE)
        yield from source.expect("=")
        arguments.append(f"{quoted(key)}: {(yield from value(source, PYTHON))}")
        yield from source.run(SPACE)
    return Call(name, f"{{{', '.join(arguments)}}}")


def _object(source: Source, notation: Notation) -> Reading[str]:
    yield from source.run(SPACE)
    if (yield from source.ahead(1)) != "{":
        raise Malformed
    return (yield from value(source, notation))


def _text(found: str | None) -> str:
    """What a JSON string says."""
    if found is None or not found.startswith('"'):
        raise Malformed
    text: str = json.loads(found)
    return text


def new_call(name: str, arguments: str) -> Call:
    """A call, if its parts are of the right kinds. Some models write the arguments as a string that holds JSON."""
    if arguments.startswith('"'):
        arguments = whole(_text(arguments), JSON) or ""
    if arguments == "null":
        arguments = "{}"
    if not arguments.startswith("{") or not name or not name.isprintable():
        raise Malformed
    return Call(name, arguments)
