"""Messages of OpenAI's API: checked, and in the forms that templates expect.

Templates differ in four things: whether a content is a string or a list of parts; whether a content of None stays
None, is left out or is an empty string; whether the arguments of a tool call are a mapping or JSON text; and whether
there may be reasoning and a content beside calls of tools.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from forge.errors import ParameterError

Message = dict[str, Any]
_NAME, _VALUE = "forgename", "forgevalue"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's reasoning. Templates get it under the first two, as in transformers."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write messages. `parts`: all contents as lists of parts, all as strings, or each as it is (None)."""

    parts: bool | None = None
    absent: str = "none"
    """Treatment of a content of None: "none", "missing" or "empty"."""
    text_arguments: bool = False
    """Whether arguments of tool calls are JSON text, not a mapping."""
    one_text: bool = False
    """Whether a content between reasoning and calls of tools is joined to the reasoning, as gpt-oss's template asks."""

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        if self.one_text and _has_two_texts(message):
            text = f"{message['thinking']}\n\n{message['content']}"
            message = message | {"content": "", "thinking": text, "reasoning_content": text}
        formed = message | {"content": self._content(message["content"])}
        if message["content"] is None and self.absent == "missing":
            del formed["content"]
        if "tool_calls" in message:
            formed["tool_calls"] = [_with_function(call, self._function) for call in message["tool_calls"]]
        return formed

    def _content(self, content: Any) -> Any:
        if content is None:
            return "" if self.absent == "empty" else None
        if self.parts is False and isinstance(content, list):
            return "\n".join(part["text"] for part in content)
        return [{"type": "text", "text": content}] if self.parts and isinstance(content, str) else content

    def _function(self, function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        if self.text_arguments:
            if isinstance(arguments, Mapping):
                return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        elif isinstance(arguments, str) and isinstance(parsed := _parsed(arguments), dict):
            return {**function, "arguments": parsed}
        return dict(function)


def forms(messages: Sequence[Message]) -> Iterator[Form]:
    """The forms that differ for these messages, the usual one first, strings as lists of parts last."""
    contents = [message["content"] for message in messages]
    parts = (None, False, True) if any(isinstance(content, list) for content in contents) else (None, True)
    absent = ("none", "missing", "empty") if None in contents else ("none",)
    arguments = (False, True) if any(message.get("tool_calls") for message in messages) else (False,)
    texts = (False, True) if any(map(_has_two_texts, messages)) else (False,)
    return (Form(*choice) for choice in product(parts, absent, arguments, texts))


def is_plain(messages: Sequence[Message]) -> bool:
    """Whether all contents are strings and there are no tool calls."""
    return all(isinstance(message["content"], str) and not message.get("tool_calls") for message in messages)


class Probe:
    """A conversation with unique words as texts, which shows how much of a form a template renders."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._words: list[str] = []
        self._has_calls = any(message.get("tool_calls") for message in messages)
        self.messages = [self._message(message) for message in messages]

    def score(self, text: str) -> tuple[int, int]:
        """Number of texts that a rendering shows unchanged; then minus the number of times that it says None."""
        shown = sum(_is_shown(word, text) for word in self._words)
        if self._has_calls:
            shown += _NAME in text and _VALUE in text and f"'{_NAME}': '{_VALUE}'" not in text
        return shown, -text.count("None")

    @property
    def best(self) -> tuple[int, int]:
        return len(self._words) + self._has_calls, 0

    def _message(self, message: Message) -> Message:
        content = message["content"]
        if isinstance(content, str):
            content = self._word() if content.strip() else content
        elif content is not None:
            content = [part | {"text": self._word()} for part in content]
        changed = {"content": content}
        if "tool_calls" in message:
            changed["tool_calls"] = [_with_function(call, _probe_function) for call in message["tool_calls"]]
        return message | changed

    def _word(self) -> str:
        self._words.append(f"forgetext{len(self._words):06d}")
        return self._words[-1]


def checked(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as plain JSON, each with a content, which may be None. Raises ParameterError with the index."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        example = '[{"role": "user", "content": "Hi"}]'
        raise _refusal(f"messages: must be a list such as {example}, not {type(messages).__name__}")
    if not messages:
        raise _refusal("messages: the list is empty", "give at least one message")
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def described(tools: Sequence[Any]) -> list[Any]:
    """Tools whose functions have a description, an empty one if they had none."""
    found = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping):
            tool = {**tool, "function": {"description": "", **function}}
        found.append(tool)
    return found


def check_json(where: str, value: Any) -> None:
    """Raises ParameterError for a value that JSON cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _refusal(f"{where}: holds half a surrogate pair, which is not Unicode text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(f"{where}: cannot be written as JSON: {' '.join(str(error).split()):.200}") from None


def _refusal(message: str, hint: str | None = None) -> ParameterError:
    """The error for a message that begins with a place within an argument, such as messages[0]."""
    return ParameterError(message, parameter=message.partition(":")[0].partition("[")[0], hint=hint)


def _checked_message(where: str, message: Mapping[str, Any]) -> Message:
    if not isinstance(message, Mapping):
        raise _refusal(f"{where}: must be a mapping with role and content, not {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise _refusal(f"{where}: role must be a string such as 'user'")
    calls = message.get("tool_calls")
    if "content" not in message and "tool_calls" not in message:
        raise _refusal(f"{where}: content is missing")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = [_checked_part(f"{where}: content[{index}]", part) for index, part in enumerate(content)] or ""
    elif not isinstance(content, str | None):
        raise _refusal(f"{where}: content must be a string, None or a list, not {type(content).__name__}")
    if isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Sequence | None):
        raise _refusal(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    # Clients send unused fields as null, and templates often test only whether a field exists.
    plain = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    plain["content"] = content
    if (reasoning := next((plain[name] for name in _REASONING if name in plain), None)) is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    if calls:
        plain["tool_calls"] = [_checked_call(f"{where}: tool_calls[{i}]", call) for i, call in enumerate(calls)]
    check_json(where, plain)
    return plain


def _checked_part(where: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise _refusal(f"{where} must be a mapping with a type such as 'text'")
    if part["type"] != "text":
        raise _refusal(f"{where} has the type {part['type']!r:.40}; forge's models read parts of type 'text' alone")
    if not isinstance(part.get("text"), str):
        raise _refusal(f"{where} has the type 'text' and needs a string text")
    return dict(part)


def _checked_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _refusal(f"{where} must be a mapping with a function that has a name and arguments")
    if not isinstance(function.get("arguments"), str | Mapping | None):
        raise _refusal(f"{where}: arguments must be JSON text or a mapping")
    return dict(call)


def _has_two_texts(message: Message) -> bool:
    texts = message["content"], message.get("thinking")
    return bool(message.get("tool_calls")) and all(isinstance(text, str) and text for text in texts)


def _with_function(call: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """The call with its function changed. Some clients put the function's fields into the call itself."""
    return {**call, "function": change(call["function"])} if "function" in call else change(call)


def _probe_function(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not isinstance(_parsed(arguments), dict):
        return dict(function)
    return {**function, "arguments": {_NAME: _VALUE}}


def _is_shown(word: str, text: str) -> bool:
    """Whether the text holds the word outside a printed part, as Python or JSON prints it."""
    return text.count(word) > len(re.findall(rf"""["']text["']: ?["']{word}""", text))


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return None
