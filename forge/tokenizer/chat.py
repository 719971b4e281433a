"""Chat templates: a model's own Jinja, an untrusted string, rendered in a process of its own that can be killed."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

from forge.errors import ChatTemplateError, ParameterError
from forge.tokenizer._chat_process import PROCESSES
from forge.tokenizer.masks import THOUGHT_TAG, Literals, mask, unused_characters
from forge.tokenizer.messages import Form, Message, Probe, check_json, checked, described, forms, is_plain

MAX_SOURCE_CHARS = 1 << 20  # the longest templates known have some 30,000
MAX_MESSAGE_CHARS = 300
_TOOL_NAMES = ("xml_tools",)
"""Other names under which templates read the tools (SmolLM3), unless a variable has the name."""
_MAX_ROLES = 64  # sets of roles that are kept, because requests may invent roles


class ChatTemplate:
    """A Jinja template that turns messages into a prompt, with the names and settings of transformers.

    The template is compiled at its first use. Source: https://huggingface.co/docs/transformers/chat_templating_writing

    Args:
        source: The template.
        name: The template's file, for messages.
        special_tokens: Variables of the template such as `bos_token`.
        tool_use: The template to use instead where tools are given.
        hint: What to do where the template refuses the messages. None = the template's own words say enough.

    Raises:
        ChatTemplateError: The source is longer than MAX_SOURCE_CHARS.
    """

    seconds = 5.0
    """Most wall-clock time of one rendering."""
    memory_bytes = 512 << 20
    """Most address space of the process that renders."""
    max_chars = 4 << 20
    """Most characters of the text."""

    def __init__(
        self,
        source: str,
        *,
        name: str,
        special_tokens: Mapping[str, str],
        tool_use: str | None = None,
        hint: str | None = None,
    ) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ChatTemplateError(
                f"{name}: the chat template has {len(source):,} characters, of {MAX_SOURCE_CHARS:,} allowed"
            )
        self.source = source
        self.name = name
        self.special_tokens = dict(special_tokens)
        self._hint = hint
        self._tool_use = None
        if tool_use is not None:
            self._tool_use = ChatTemplate(tool_use, name=name, special_tokens=special_tokens)
        self._reads_strings = set[frozenset[str]]()
        """Sets of roles for which the template shows contents that are strings."""

    @property
    def sources(self) -> str:
        """The source, followed by the source of the template for tools."""
        return self.source if self._tool_use is None else self.source + self._tool_use.source

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, special_tokens: Mapping[str, str]) -> "ChatTemplate":
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
        return cls(source, name=os.fspath(path), special_tokens=special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> str:
        """The prompt of `messages`, with the options of `render_masked`."""
        return self.render_masked(messages, None, **options)[0]

    def render_masked(
        self,
        messages: Sequence[Mapping[str, Any]],
        literals: Literals | None,
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, dict[int, int]]:
        """The prompt of `messages`, mappings with `role` and `content` (a string, None, or a list of text parts).

        `add_generation_prompt` opens the answer (None: unless the final message is continued);
        `continue_final_message` ends the prompt where the content of the last message, the assistant's, ends. Messages
        are written as the template expects them: parts are joined by line feeds unless it reads parts, the arguments of
        tool calls may be JSON text or a mapping, and a content of None is an empty string where it must be. `tools`,
        `documents` and further `variables` (such as enable_thinking) reach the template as they are: JSON.
        One character of each of the `literals` in messages, tools and documents is replaced, not in the template's own
        text. Returns the text and the table for `str.translate` that undoes the mask.
        Raises ParameterError for arguments a template cannot be given, ChatTemplateError if the template is wrong,
        refuses the messages, ignores the tools, changes the message to be continued, or exceeds its self.
        """
        opens = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        if tools and self._tool_use is not None:
            options = {"add_generation_prompt": opens, "continue_final_message": continue_final_message}
            return self._tool_use.render_masked(messages, literals, tools=tools, **options, **variables)
        if continue_final_message and opens:
            raise ParameterError(
                "continue_final_message: leaves no place for add_generation_prompt",
                parameter="continue_final_message",
                hint="set one of them",
            )
        plain = checked(messages)
        if continue_final_message and (plain[-1]["role"] != "assistant" or plain[-1]["content"] is None):
            why = "must be the assistant's" if plain[-1]["role"] != "assistant" else "has no content to continue"
            what = f"continue_final_message: the last message {why}"
            raise ParameterError(what, parameter="continue_final_message")
        context = {
            **self.special_tokens,
            "documents": None,
            **variables,
            "tools": _checked_tools(tools),
            "add_generation_prompt": opens,
        }
        for name, value in context.items():
            check_json(name, value)
        formed = self._form(plain, context).apply(plain)
        tools = context["tools"] and described(context["tools"])
        if tools != context["tools"] and self._ask(formed, context)[0] == b"E":
            context["tools"] = tools  # gpt-oss's template reads each tool's description
            formed = self._form(plain, context).apply(plain)
        plain = formed
        text = self._conversation(plain, context, continue_final_message)
        if context["tools"]:
            self._check_tools(plain, context)
        if literals is None:
            return text, {}
        return mask(
            plain,
            {name: context[name] for name in ("tools", "documents")},
            literals,
            text,
            lambda messages, others: self._conversation(messages, context | others, continue_final_message),
            unused_characters(plain, context, self.source),
        )

    def _form(self, messages: list[Message], context: Mapping[str, Any]) -> Form:
        """The form of which the template shows most."""
        roles = frozenset(message["role"] for message in messages) if is_plain(messages) else None
        if roles in self._reads_strings:
            return Form()
        probe = Probe(messages)
        found: list[tuple[tuple[int, int], Form]] = []
        refused: Form | None = None
        for form in forms(messages):
            status, text = self._ask(form.apply(probe.messages), context)
            if status == b"T":
                found.append((probe.score(text), form))
                if found[-1][0] == probe.best:
                    break
            elif status == b"R" and refused is None:
                refused = form  # a refusal by the template tells more than an error with another form
        best = max(found, key=lambda scored: scored[0])[1] if found else refused or Form()  # the first of equals
        if roles is not None and found and best == Form() and len(self._reads_strings) < _MAX_ROLES:
            self._reads_strings.add(roles)
        return best

    def _conversation(self, messages: list[Message], context: Mapping[str, Any], continues: bool) -> str:
        text = self._text(messages, context)
        if not continues:
            return text
        # A mark at the end of the message shows which text of the template follows it.
        mark = next(unused_characters(messages, context, self.source))
        *before, content = _texts(messages[-1])
        marked = self._text([*messages[:-1], _with_texts(messages[-1], [*before, content + mark])], context)
        head, found, tail = marked.rpartition(mark)
        head, end = head.replace(mark, ""), len(text) - len(tail)
        pieces = [piece.strip() for piece in THOUGHT_TAG.split(content)]
        if (
            not found
            or not text.endswith(tail)
            or not head.startswith(text[:end])
            or head[end:].strip()
            or not all(piece in head for piece in pieces)
            or not head.rstrip().endswith(pieces[-1])
        ):
            raise self._error(b"E", "it changes the final message, so this cannot be continued")
        return text[:end]

    def _check_tools(self, messages: list[Message], context: Mapping[str, Any]) -> None:
        status, with_tools = self._ask(messages, context)
        if (status, with_tools) == self._ask(messages, {**context, "tools": None}):
            raise self._error(b"E", "it ignores tools, so the model would not see them")

    def _text(self, messages: list[Message], context: Mapping[str, Any]) -> str:
        status, text = self._ask(messages, context)
        if status != b"T":
            raise self._error(status, text)
        return text

    def _ask(self, messages: list[Message], context: Mapping[str, Any]) -> tuple[bytes, str]:
        """Status and text of a rendering: T = the prompt, R or E = a reason. Raises ChatTemplateError for others."""
        renamed = {name: context["tools"] for name in _TOOL_NAMES if name in self.source}
        job = {
            "source": self.source,
            "context": {**renamed, **context, "messages": messages},
            "seconds": math.ceil(self.seconds),
            "memory_bytes": self.memory_bytes,
            "max_chars": self.max_chars,
        }
        status, text = PROCESSES.ask(json.dumps(job).encode(), self.seconds, 4 * self.max_chars)
        if status in b"TRE":
            return status, text
        reasons = {
            b"M": f"it needs more than {self.memory_bytes / 1e6:.0f} MB of memory",
            b"O": f"it writes more than {self.max_chars:,} characters",
            b"D": f"it takes longer than {self.seconds:g} s",
        }
        raise self._error(status, reasons.get(status, text))

    def _error(self, status: bytes, reason: str) -> ChatTemplateError:
        return ChatTemplateError(
            f"{_one_line(self.name)}: chat template: {_one_line(reason)}",
            parameter="chat_template",
            hint=self._hint if status == b"R" else "another template can be given with chat_template=FILE",
        )


def _checked_tools(tools: Any) -> Any:
    """Tools as a list. An empty list becomes None, for which templates test."""
    check_json("tools", tools)
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ParameterError(f"tools: must be a list of tools, not {type(tools).__name__}", parameter="tools")
    return list(tools) or None


def _texts(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _with_texts(message: Message, texts: Sequence[str]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message | {"content": texts[0]}
    return message | {"content": [part | {"text": text} for part, text in zip(content, texts, strict=True)]}


def _one_line(text: object) -> str:
    """One printable line of bounded length: the text may be a hostile template's."""
    line = "".join(char if char.isprintable() else " " for char in str(text)[: 4 * MAX_MESSAGE_CHARS])
    line = " ".join(line.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 3] + "..."
