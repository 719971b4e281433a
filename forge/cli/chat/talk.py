"""A conversation at a terminal: messages, and commands that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from forge import _files
from forge.cli import options, output
from forge.cli.chat import sampling, transcript
from forge.cli.chat.conversation import Conversation
from forge.cli.chat.prompt import reader
from forge.cli.generate import statistics
from forge.errors import ForgeError
from forge.keywords import RENAMED

_BLOCK = '"""'
_KEYS = f"""\
{_BLOCK} begins and ends a message of several lines; so do a \\ at the end of a line, Alt-Enter, and a paste.
//x or a blank before it sends a message that begins with a slash.
Ctrl-C stops an answer, or clears the line; twice, or Ctrl-D, leaves."""


def talk(conversation: Conversation) -> None:
    """Answer messages until the user leaves. Raises KeyboardInterrupt if the user leaves by Ctrl-C."""
    conversation.is_interactive = True
    llm = conversation.llm
    output.status(f"{_files.model_name(llm.path)} on {llm.device}, context {llm.context}; /help shows the commands")
    commands = Commands(conversation)
    read = reader()
    was_interrupted = False
    while not commands.left:
        try:
            text = read()
            if text is None:
                output.reply("")
                return
            commands.take(text)
            was_interrupted = False
        except KeyboardInterrupt as interrupt:
            is_empty = not interrupt.args  # the reader passes the text that it cleared
            if was_interrupted and is_empty:
                raise
            was_interrupted = True
            output.reply("(Ctrl-C again, or Ctrl-D, leaves)")
        except ForgeError as error:
            output.error(str(error))


def split(text: str) -> tuple[str | None, str]:
    """(name of a command, its argument), or (None, text) for a message.

    A text of several lines is a command only if it begins with a known one: it may be code with slashes in comments.
    """
    text = text.strip("\n").rstrip()
    if len(text) >= 2 * len(_BLOCK) and text.startswith(_BLOCK) and text.endswith(_BLOCK):
        return None, text[len(_BLOCK) : -len(_BLOCK)].strip("\n")
    is_line = "\n" not in text
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    name = word[1:].lower()
    if not text.startswith("/") or (not is_line and name not in COMMANDS):
        return None, text.strip() if is_line else text
    if word.startswith("//"):
        return None, text[1:]
    return name, text[len(word) :].strip()


class Commands:
    """The commands of a conversation, which `COMMANDS` describes."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.left = False
        self._file: str | None = None

    def take(self, text: str) -> None:
        """Answer a message or run a command. Raises ForgeError if it fails."""
        options.check_text(text, "the message")
        name, rest = split(text)
        if name is None:
            if rest:
                self.conversation.ask(rest)
        elif name in COMMANDS:
            COMMANDS[name][2](self, rest)
        else:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"; did you mean /{near[0]}?" if near else ";"
            output.reply(f"/{name} is no command{hint} /help shows them; to send it as a message, write //{name}")

    def help(self, _: str) -> None:
        width = max(len(f"/{name} {form}") for name, (form, _, _) in COMMANDS.items())
        lines = [f"{f'/{name} {form}':{width}}  {text}" for name, (form, text, _) in COMMANDS.items() if text]
        output.reply("\n".join([*lines, _KEYS]))

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text in ('""', "''") else text
        current = self.conversation.system
        output.reply(f"system message: {current}" if current else "no system message beside the template's own")

    def reset(self, _: str) -> None:
        self.conversation.reset()
        output.reply("the conversation is forgotten")

    def regenerate(self, _: str) -> None:
        params = self.conversation.params
        if params.temperature == 0 or params.seed is not None:
            why = "temperature is 0" if params.temperature == 0 else f"seed is {params.seed}"
            output.note(f"{why}: the answer will be the same; /set changes it")
        if not self.conversation.regenerate():
            output.reply("there is no question to answer yet")

    def go_on(self, _: str) -> None:
        before = self.conversation.messages
        if not self.conversation.go_on():
            output.reply("there is no answer to continue yet")
        elif self.conversation.messages == before:
            output.reply("the model has nothing to add")

    def set(self, text: str) -> None:
        conversation = self.conversation
        name, _, value = text.partition(" ")
        name = name.lower().replace("-", "_")
        if new := RENAMED.get(name):
            output.note(f"{name} is now {new}; the old name goes in version 0.2")
            name = new
        if value.strip():
            changed = {name: sampling.value(name, value.strip())}
            conversation.params = replace(conversation.params, **changed)
        output.reply("\n".join(sampling.shown(conversation.params, name)))

    def stats(self, _: str) -> None:
        conversation = self.conversation
        asked = [message["role"] == "user" for message in conversation.messages]
        lines = [statistics(conversation.timings)] if conversation.timings else []
        lines += [
            f"context: {conversation.used} of {output.count(conversation.llm.context, 'token')} used "
            f"({conversation.used / conversation.llm.context:.0%})",
            output.count(sum(asked), "turn")
            + (f", the oldest {sum(asked[: conversation.hidden])} dropped" if conversation.hidden else ""),
        ]
        output.reply("\n".join(lines))

    def save(self, path: str) -> None:
        system = [{"role": "system", "content": self.conversation.system}] if self.conversation.system else []
        messages = [*system, *self.conversation.messages]
        replaced = transcript.save(path, messages, known=self._file)
        self._file = path
        output.reply(f"{output.count(len(messages), 'message')} saved to {path}{', replaced' if replaced else ''}")

    def load(self, path: str) -> None:
        conversation = self.conversation
        messages = transcript.load(path)
        has_system = messages[0]["role"] == "system" and isinstance(messages[0].get("content"), str)
        before = conversation.system
        if messages[0]["role"] == "system":
            conversation.system = messages[0]["content"] if has_system else None
        try:
            conversation.reset(messages[has_system:])
        except ForgeError:
            conversation.system = before
            raise
        self._file = path
        asks = messages[-1]["role"] == "user"
        output.reply(
            f"{output.count(len(messages), 'message')} loaded from {path}"
            + ("; /regenerate answers the last" if asks else "")
        )

    def leave(self, _: str) -> None:
        self.left = True


COMMANDS: dict[str, tuple[str, str, Callable[[Commands, str], Any]]] = {
    "help": ("", "this", Commands.help),
    "system": ("[TEXT]", 'shows or sets the system message; "" removes it', Commands.system),
    "set": ("[NAME [VALUE]]", "shows or sets sampling: /set temperature 0.7", Commands.set),
    "regenerate": ("", "answers the last question anew", Commands.regenerate),
    "continue": ("", "goes on with the last answer", Commands.go_on),
    "reset": ("", "forgets the conversation", Commands.reset),
    "save": ("FILE", "writes the conversation as JSON (OpenAI's messages)", Commands.save),
    "load": ("FILE", "reads one", Commands.load),
    "stats": ("", "shows speed, and how full the context is", Commands.stats),
    "exit": ("", "leaves, as do /quit and /bye", Commands.leave),
    "quit": ("", "", Commands.leave),
    "bye": ("", "", Commands.leave),
}
"""Name to the form of its argument, its summary (empty for an alias), and the method."""
