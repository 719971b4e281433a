"""Prompts and conversations to token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge.errors import ChatTemplateError, ContextLengthError, ParameterError
from forge.keywords import keywords
from forge.runtime.prompts import token_ids
from forge.tokenizer import Tokenizer
from forge.tokenizer.chat import ChatTemplate

_LONG_TEXT = 1 << 20
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class PromptEncoder:
    """A model's tokenizer and chat template. Base of `LLM`; the server's process has it without the model."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None, context: int, name: str) -> None:
        """context: most tokens of a sequence. name: the model's, for messages."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.context = context
        self._name = name

    @keywords()
    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        **template_variables: Any,
    ) -> str:
        """The text that the model sees of a conversation. `generate` takes it as a prompt.

        Args:
            messages: As in `chat`.
            add_generation_prompt: Whether the text opens the answer. None = yes, but not with `continue_final_message`.
            continue_final_message: The text ends where the content of the last message ends, which is the assistant's.
            tools: As in `chat`.
            **template_variables: Further variables of the template.

        Raises:
            ChatTemplateError: The model has no template, or its template refuses the messages or ignores the tools.
            ParameterError: Messages have another form.
        """
        return self._template().render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **template_variables,
        )

    @keywords()
    def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
    ) -> list[int]:
        """The token ids that `chat` computes for a conversation: so many tokens of the context it takes.

        Args:
            messages: As in `chat`.
            tools: As in `chat`.
            template_variables: As in `chat`.
            continue_final_message: As in `chat`.
            parse_special: As in `chat`.

        Raises:
            ChatTemplateError: The model has no template, or its template refuses the messages or ignores the tools.
            ParameterError: Messages have another form.
        """
        template = self._template()
        for name in ("messages", "tools", "continue_final_message"):
            if name in (template_variables or {}):
                raise ParameterError(
                    f"template_variables: {name} is none of them",
                    parameter="template_variables",
                    hint="give it as an argument of its own",
                )
        options = {**(template_variables or {}), "tools": tools, "continue_final_message": continue_final_message}
        masked = None if parse_special else self.tokenizer.markers(template.sources)
        return self.tokenizer.encode_prompt(*template.render_masked(messages, masked, **options))

    @keywords()
    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The token ids that `generate` computes for a prompt: so many tokens of the context it takes.

        Args:
            prompt: As in `generate`, but no batch.

        Raises:
            ParameterError: The prompt is neither a string nor a list of ids.
            ContextLengthError: The prompt is far too long.
        """
        is_long = isinstance(prompt, str) and len(prompt) > _LONG_TEXT
        if is_long and len(prompt) > self.context * self.tokenizer.longest_token:
            raise ContextLengthError(  # encoding it would take memory and time for nothing
                f"a prompt of {len(prompt)} characters cannot fit the context of {self.context} tokens: shorten it"
            )
        return self._tokens(prompt)

    @keywords()
    def encode_pair(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """The token ids that `score` computes for a prompt and one of its continuations.

        Two strings become the tokens of both together, cut where the tokens of the prompt alone differ from them first.
        Where that leaves nothing of the prompt, each becomes its own tokens.

        Args:
            prompt: As in `generate`, but no batch.
            continuation: A string or a list of token ids.

        Raises:
            ParameterError: The continuation is empty, or one of them is neither a string nor a list of ids.
            ContextLengthError: A text is far too long.
        """
        ids, cut, both = self.encode_prompt(prompt), 0, list[int]()
        if isinstance(continuation, str) and isinstance(prompt, str):
            both = self.encode_prompt(prompt + continuation)
            differ = (place for place, pair in enumerate(zip(ids, both, strict=False)) if pair[0] != pair[1])
            cut = next(differ, min(len(ids), len(both)))
        ids, found = (both[:cut], both[cut:]) if cut else (ids, self.encode_continuation(continuation))
        if not found:
            raise ParameterError("a continuation is empty: there is nothing to score", parameter="continuations")
        return ids, found

    @keywords()
    def encode_continuation(self, text: Prompt) -> list[int]:
        """The token ids of a text that goes on behind tokens: without BOS, and without a space that the model's
        tokenizer would put before a text. Names of special tokens are these tokens.

        Args:
            text: A string or a list of token ids.

        Raises:
            ParameterError: It is neither.
        """
        return self.tokenizer.encode_continuation(text) if isinstance(text, str) else token_ids(text)

    def _tokens(self, text: Prompt) -> list[int]:
        return self.tokenizer.encode_prompt(text) if isinstance(text, str) else token_ids(text)

    def _template(self) -> ChatTemplate:
        if self.chat_template is not None:
            return self.chat_template
        raise ChatTemplateError(
            f"{self._name}: this model has no chat template, perhaps it is a base model",
            parameter="chat_template",
            hint="pass one with chat_template=FILE",
        )


def choose_template(given: str | os.PathLike[str] | None, tokenizer: Tokenizer, model: str) -> ChatTemplate | None:
    """The template that was given by name or as a file, else the model's own, if it has one.

    model: Its name, for messages.
    """
    special = {
        f"{name}_token": tokenizer.token_text(token)
        for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
        if token is not None
    }
    templates = tokenizer.chat_templates
    if isinstance(given, str) and given in templates:
        return ChatTemplate(templates[given], name=model, special_tokens=special)
    if given is not None:
        if not given or (templates and not Path(given).exists()):
            raise ChatTemplateError(
                f"chat_template: {os.fspath(given)!r:.200} is neither a file nor a template of {model}, which has: "
                f"{', '.join(sorted(templates)) or 'none'}"
            )
        return ChatTemplate.from_file(Path(given), special_tokens=special)
    default = next(iter(templates.values())) if len(templates) == 1 else tokenizer.chat_template
    hint = None
    if default is None:
        if not templates:
            return None
        reason = "there are several and none is the default"
        hint = f"choose one of {', '.join(sorted(templates))} with chat_template=NAME"
        default = f"{{{{ raise_exception({json.dumps(reason)}) }}}}"  # tools may still choose tool_use
    return ChatTemplate(default, name=model, special_tokens=special, tool_use=templates.get("tool_use"), hint=hint)
