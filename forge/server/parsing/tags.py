"""Calls of tools between tags, with the arguments as texts that the tool's schema types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from forge.server.parsing.calls import Call, Reader, Tools, new_call
from forge.server.parsing.source import SPACE, Reading, Source
from forge.server.parsing.values import PYTHON, quoted, whole

_NAME = re.compile(r"[\w.:/-]*")


def xml_call(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`<function=f><parameter=a>1</parameter></function>`, the texts between line feeds, typed by the tool's schema."""
    if mark != "<function=":
        yield from source.run(SPACE)
        yield from source.expect("<function=")
    name = yield from source.run(_NAME)
    yield from source.expect(">")
    arguments = dict[str, str]()
    while True:
        yield from source.run(SPACE)
        if (yield from source.skip("</function>")):
            break
        yield from source.expect("<parameter=")
        key = yield from source.until(">")
        text = (yield from source.until("</parameter>")).removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(text, tools.get(name, {}), key)
    return [_tagged(name, arguments)]


def invoke(call: str, parameter: str, outer: str = "") -> Reader:
    """Reads `<CALL name="f"><PARAMETER name="a">1</PARAMETER></CALL>`, perhaps behind an outer tag, as mark or text.

    A text may be a CDATA section. The mark is all or nothing of what stands before the name.
    """
    begin = f'<{call} name="'

    def read(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
        if mark != begin:
            yield from source.run(SPACE)
            if outer and mark != outer and (yield from source.skip(outer)):
                yield from source.run(SPACE)
            yield from source.expect(begin)
        name = yield from source.until('">')
        arguments = dict[str, str]()
        while True:
            yield from source.run(SPACE)
            if (yield from source.skip(f"</{call}>")):
                return [_tagged(name, arguments)]
            yield from source.expect(f'<{parameter} name="')
            key = yield from source.until('">')
            if (yield from source.skip("<![CDATA[")):
                text = yield from source.until("]]>")
                yield from source.expect(f"</{parameter}>")
            else:
                text = yield from source.until(f"</{parameter}>")
            arguments[key] = _typed(text, tools.get(name, {}), key)

    return read


def key_value_call(source: Source, tools: Tools, mark: str) -> Reading[list[Call]]:
    """`f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`, with white space between the tags."""
    yield from source.run(SPACE)
    name = yield from source.run(_NAME)
    arguments = dict[str, str]()
    while True:
        yield from source.run(SPACE)
        if (yield from source.skip("</tool_call>")):
            return [_tagged(name, arguments)]
        yield from source.expect("<arg_key>")
        key = yield from source.until("</arg_key>")
        yield from source.run(SPACE)
        yield from source.expect("<arg_value>")
        text = yield from source.until("</arg_value>")
        arguments[key] = _typed(text, tools.get(name, {}), key)


def _tagged(name: str, arguments: Mapping[str, str]) -> Call:
    return new_call(name, f"{{{', '.join(f'{quoted(key)}: {text}' for key, text in arguments.items())}}}")


def _typed(text: str, schema: Mapping[str, Any], key: str) -> str:
    """A text as the JSON value that the schema asks for; a string where it asks for none or gets another."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, Mapping) else None
    types = wanted.get("type", "string") if isinstance(wanted, Mapping) else "string"
    types = types if isinstance(types, list) else [types]
    if text in ("null", "None") and "null" in types:
        return "null"
    found = None if "string" in types else whole(text, PYTHON)
    return quoted(text) if found is None else found
