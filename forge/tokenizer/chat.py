"""Chat templates: a model's own Jinja, an untrusted string, rendered in a process of its own that can be killed."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from forge.errors import ChatTemplateError, ParameterError
from forge.tokenizer._chat_process import PROCESS

MAX_SOURCE_CHARS = 1 << 20  # the longest templates known have some 30,000
MAX_MESSAGE_CHARS = 300


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use: seconds of wall-clock time, bytes of address space, characters of output."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    max_chars: int = 4 << 20


class ChatTemplate:
    """A Jinja template that turns messages into a prompt, with the names and settings of transformers.

    `source` is the template, `name` its file (for messages), `special_tokens` its variables such as `bos_token`.
    Raises ChatTemplateError if the source is longer than MAX_SOURCE_CHARS. The template is compiled at its first use.
    Source: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(
        self, source: str, *, name: str, special_tokens: Mapping[str, str], limits: RenderLimits | None = None
    ) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ChatTemplateError(
                f"{name}: the chat template has {len(source):,} characters, of {MAX_SOURCE_CHARS:,} allowed"
            )
        self.source = source
        self.name = name
        self.special_tokens = dict(special_tokens)
        self.limits = limits or RenderLimits()

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, special_tokens: Mapping[str, str], limits: RenderLimits | None = None
    ) -> "ChatTemplate":
        """Read the template from a UTF-8 text file. Raises ChatTemplateError if that cannot be done."""
        try:
            if not S_ISREG(os.stat(path).st_mode):
                raise ChatTemplateError(f"{path}: not a regular file; a chat template is a text file")
            with Path(path).open(encoding="utf-8") as file:
                source = file.read(MAX_SOURCE_CHARS + 1)
        except UnicodeDecodeError:
            raise ChatTemplateError(f"{path}: not UTF-8 text; a chat template is a text file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ChatTemplateError(f"{path}: cannot be read as a chat template: {reason}") from None
        return cls(source, name=os.fspath(path), special_tokens=special_tokens, limits=limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of `messages`: mappings with `role` and `content` (a string, None, or a list of typed parts).

        `tools`, `documents` and further `variables` (such as enable_thinking) reach the template as they are: JSON.
        Raises ParameterError for arguments a template cannot be given, ChatTemplateError if the template is wrong,
        refuses the messages, or exceeds its limits.
        """
        context = {
            **self.special_tokens,
            "documents": None,
            **variables,
            "messages": _checked_messages(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        for name, value in context.items():
            if name != "messages":
                _check_json(name, value)
        limits = self.limits
        job = {
            "source": self.source,
            "context": context,
            "seconds": math.ceil(limits.seconds),
            "memory_bytes": limits.memory_bytes,
            "max_chars": limits.max_chars,
        }
        status, text = PROCESS.ask(json.dumps(job).encode(), limits.seconds, 4 * limits.max_chars)
        if status == b"T":
            return text
        reasons = {
            b"M": f"it needs more than {limits.memory_bytes / 1e6:.0f} MB of memory",
            b"O": f"it writes more than {limits.max_chars:,} characters",
            b"D": f"it takes longer than {limits.seconds:g} s",
        }
        mend = "" if status == b"R" else "; another template can be given with --chat-template FILE"
        raise ChatTemplateError(f"{_one_line(self.name)}: chat template: {_one_line(reasons.get(status, text))}{mend}")


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ParameterError(f"messages: must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ParameterError("messages: the list is empty; give at least one message")
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _checked_message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ParameterError(f"{where}: must be a mapping with role and content, not {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise ParameterError(f"{where}: role must be a string such as 'user'")
    if "content" not in message and "tool_calls" not in message:
        raise ParameterError(f"{where}: content is missing")
    content = message.get("content")
    if isinstance(content, list | tuple):
        for index, part in enumerate(content):
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise ParameterError(f"{where}: content[{index}] must be a mapping with a type such as 'text'")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ParameterError(f"{where}: content[{index}] has the type 'text' and needs a string text")
    elif not isinstance(content, str | None):
        raise ParameterError(f"{where}: content must be a string, None or a list, not {type(content).__name__}")
    plain = dict(message)
    _check_json(where, plain)
    return plain


def _check_json(where: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ParameterError(f"{where}: holds half a surrogate pair, which is not Unicode text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"{where}: cannot be written as JSON: {_one_line(error)}") from None


def _one_line(text: object) -> str:
    """One printable line of bounded length: the text may be a hostile template's."""
    line = "".join(char if char.isprintable() else " " for char in str(text)[: 4 * MAX_MESSAGE_CHARS])
    line = " ".join(line.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 3] + "..."
