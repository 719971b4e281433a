"""LLM: text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, overload
from weakref import finalize

from forge import _files
from forge.config import SamplingParams
from forge.display import html_table, num_bytes
from forge.engine import Engine
from forge.errors import ForgeError, ParameterError
from forge.keywords import keywords
from forge.outputs import Chunk, Completion
from forge.runtime.encoder import Messages, Prompt
from forge.runtime.hooks_front import HooksFront
from forge.runtime.prompts import is_single, prompts_of, sampling_params
from forge.tokenizer import Tokenizer
from forge.tokenizer.chat import ChatTemplate


class LLM(HooksFront):
    """A loaded model. `forge.load` makes one.

    All methods may be called from several threads. One thread of the model's own computes: requests of several threads
    run together in one batch, and a stream's tokens are generated whether or not it is read meanwhile. Ctrl-C ends the
    call that it interrupts, and nothing else. `logits`, `score`, `prefill` and the like may be called beside
    requests: where these need pages of the KV cache that requests hold, the youngest requests wait, and have their
    tokens computed again. A step that fails ends its requests with its error, which their callers raise; others go on.
    Where memory runs out in a step, only the youngest of its requests ends so.

    In a fork of the process a model on the CPU can be used if no request was running in any model. Else each call
    raises a ForgeError: load it in the child, or use multiprocessing's spawn.

    Attributes:
        tokenizer: The model's `Tokenizer`.
        config: The model's `ModelConfig`.
        context: Most tokens of one sequence, prompt and completion.
        device: The device and what it is, in words.
        path: The model's file.
        adapters: Names of the adapters that `forge.load` was given.
        quantize: The type that the weights got while they were loaded, or None.
        notes: Remarks on what loading decided, such as the device or a context that was cut to fit, and on models that
            were loaded already.
        nbytes: Bytes of the device's memory that weights, KV cache and steps take, as `forge.plan_memory` says them.
            `close` gives them back.
        load_ms: Milliseconds that loading took.
        load_parts: Milliseconds of its parts, by name, in order; the first may lie before `load_ms` begins.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        path: Path,
        notes: tuple[str, ...],
        load_parts: Mapping[str, float],
        load_ms: float,
        adapters: tuple[str, ...] = (),
        quantize: str | None = None,
        nbytes: int = 0,
        fingerprints: Mapping[str | None, str] | None = None,
    ) -> None:
        super().__init__(engine, tokenizer, chat_template, str(path), adapters, fingerprints)
        self.path, self.notes, self.load_ms, self.load_parts = path, notes, load_ms, load_parts
        self.quantize, self.nbytes = quantize, nbytes
        self._loop.nbytes = nbytes
        self.config, self.device = engine.runner.config, engine.runner.device
        finalize(self, self._loop.abandon).atexit = False

    def __repr__(self) -> str:
        return f"<forge.LLM {self._title}: {self.config.arch}, context {self.context}, {self.device}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        config = self.config
        rows = [("architecture", f"{config.arch}, {config.num_layers} layers, width {config.width:,}")]
        rows += [("context", f"{self.context:,} tokens"), ("device", self.device)]
        rows += [("memory", "closed" if self._loop.is_closed else num_bytes(self.nbytes))]
        rows += [("adapters", ", ".join(self.adapters))] * bool(self.adapters)
        rows += [("note", note) for note in self.notes]
        return html_table(self._title, rows)

    @property
    def _title(self) -> str:
        return _files.model_name(self.path) + (f" as {self.quantize}" if self.quantize else "")

    def __reduce__(self) -> NoReturn:
        raise ForgeError(f"{self._name}: a loaded model cannot be copied, or sent to another process: load it there")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # whoever interrupts a long step does not want to wait for it; the next load does
        self._loop.close(waits=not isinstance(error, KeyboardInterrupt))

    def close(self) -> None:
        """End all requests (their finish_reason becomes "abort"), and give the model's memory back.

        Waits for the step under way. Later calls raise a ForgeError.
        """
        self._loop.close()

    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, n: Literal[1] = 1, **overrides: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, n: int, **overrides: Any
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, **overrides: Any
    ) -> list[Completion]: ...
    @keywords(SamplingParams)
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Complete a prompt, or a list of prompts together.

        Args:
            prompt: A string, or a list of token ids. In a string the names of special tokens are these tokens, and it
                gets the model's BOS unless it begins with it (`Tokenizer.encode_prompt`). Ids are taken as they are. A
                list of strings, or of lists of ids, is a batch.
            params: How to sample. None = `SamplingParams()`.
            adapter: The name of one of `LLM.adapters`, which the model then has for these prompts. None = the model as
                it is, to the bit.
            **overrides: Fields of `SamplingParams` that differ from `params`.

        Returns:
            One Completion for one prompt. For a batch, or n > 1, a list, which has the n choices of the first prompt
            first. Type checkers see a list where `n` is a keyword other than 1, so give it as one.

        Raises:
            ParameterError: A value cannot be used, or a keyword is unknown.
            ContextLengthError: A prompt is too long.
        """
        params = sampling_params(params, overrides)
        prompts, single = prompts_of(prompt)
        completions = self._complete([self.encode_prompt(p) for p in prompts], params, adapter)
        return completions[0] if single and params.n == 1 else completions

    @keywords(SamplingParams)
    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None, **overrides: Any
    ) -> Generator[Chunk, None, None]:
        """Complete one prompt, piece by piece. Closing the iterator aborts the request.

        Args:
            prompt: As in `generate`, but no batch.
            params: How to sample. None = `SamplingParams()`.
            adapter: As in `generate`.
            **overrides: Fields of `SamplingParams` that differ from `params`.

        Returns:
            An iterator of chunks. With n > 1 those of all choices are mixed, and `Chunk.index` tells them apart.

        Raises:
            ParameterError: A value cannot be used, or a keyword is unknown.
            ContextLengthError: The prompt is too long.
        """
        if not is_single(prompt):
            raise ParameterError("stream takes one prompt; generate takes a list of them", parameter="prompt")
        return self._stream(self.encode_prompt(prompt), sampling_params(params, overrides), adapter)

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: Literal[1] = 1,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        **overrides: Any,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: int,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        **overrides: Any,
    ) -> list[Completion]: ...
    @keywords(SamplingParams)
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Answer a conversation in the model's own chat format.

        Args:
            messages: As OpenAI's API has them, such as ``[{"role": "user", "content": "Hi"}]``. A content may be a list
                of text parts, or None beside `tool_calls`.
            params: How to sample. None = `SamplingParams()`.
            tools: Functions that the model may call, as OpenAI's API has them.
            template_variables: Further variables of the template, such as ``{"enable_thinking": False}``.
            continue_final_message: The last message is the assistant's, and the completion is what follows its content.
            parse_special: Whether names of control tokens in messages and tools are these tokens. False = they are
                text, so that a user's message cannot end its turn: for messages from strangers.
            adapter: As in `generate`.
            **overrides: Fields of `SamplingParams` that differ from `params`.

        Returns:
            A Completion; a list of them for n > 1. Type checkers see a list where `n` is a keyword other than 1.

        Raises:
            ChatTemplateError: The model has no template, or its template refuses the messages or ignores the tools.
            ParameterError: Messages have another form, a value cannot be used, or a keyword is unknown.
            ContextLengthError: The conversation is too long.
        """
        params = sampling_params(params, overrides)
        ids = self.encode_chat(
            messages,
            tools=tools,
            template_variables=template_variables,
            continue_final_message=continue_final_message,
            parse_special=parse_special,
        )
        completions = self._complete([ids], params, adapter)
        return completions[0] if params.n == 1 else completions

    @keywords(SamplingParams)
    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Generator[Chunk, None, None]:
        """Answer a conversation, piece by piece. Closing the iterator aborts the request.

        Args:
            messages: As in `chat`.
            params: How to sample. None = `SamplingParams()`.
            tools: As in `chat`.
            template_variables: As in `chat`.
            continue_final_message: As in `chat`.
            parse_special: As in `chat`.
            adapter: As in `generate`.
            **overrides: Fields of `SamplingParams` that differ from `params`.

        Returns:
            An iterator of chunks, as that of `stream`.

        Raises:
            ForgeError: As in `chat`.
        """
        params = sampling_params(params, overrides)
        ids = self.encode_chat(
            messages,
            tools=tools,
            template_variables=template_variables,
            continue_final_message=continue_final_message,
            parse_special=parse_special,
        )
        return self._stream(ids, params, adapter)
