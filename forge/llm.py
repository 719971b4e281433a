"""LLM: text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, overload
from weakref import finalize

import numpy as np
import numpy.typing as npt

from forge import _files
from forge.config import Pooling, SamplingParams
from forge.engine import Engine
from forge.errors import ForgeError, ParameterError
from forge.keywords import check_integer, keywords
from forge.outputs import Chunk, Completion, Perplexity
from forge.runtime import scoring
from forge.runtime.async_front import AsyncFront
from forge.runtime.encoder import Messages, Prompt
from forge.runtime.prompts import is_single, prompts_of, sampling_params
from forge.tokenizer import Tokenizer
from forge.tokenizer.chat import ChatTemplate


class LLM(AsyncFront):
    """A loaded model. `forge.load` makes one.

    All methods may be called from several threads. One thread of the model's own computes: requests of several threads
    run together in one batch, and a stream's tokens are generated whether or not it is read meanwhile. Ctrl-C ends the
    call that it interrupts, and nothing else. `logits`, `attention`, `embed` and `perplexity` may be called beside
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
        notes: Remarks on what loading decided, such as the device or a context that was cut to fit.
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
    ) -> None:
        super().__init__(engine, tokenizer, chat_template, str(path))
        self.path, self.notes, self.load_ms, self.load_parts = path, notes, load_ms, load_parts
        self.config, self.device = engine.runner.config, engine.runner.device
        finalize(self, self._loop.stop).atexit = False

    def __repr__(self) -> str:
        return f"<forge.LLM {_files.model_name(self.path)}: {self.config.arch}, context {self.context}, {self.device}>"

    def __reduce__(self) -> NoReturn:
        raise ForgeError(f"{self._name}: a loaded model cannot be copied, or sent to another process: load it there")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._loop.stop()  # whoever interrupts a long step does not want to wait for it
        else:
            self.close()

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
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **overrides: Any
    ) -> Completion | list[Completion]:
        """Complete a prompt, or a list of prompts together.

        Args:
            prompt: A string, or a list of token ids. In a string the names of special tokens are these tokens, and it
                gets the model's BOS unless it begins with it (`Tokenizer.encode_prompt`). Ids are taken as they are. A
                list of strings, or of lists of ids, is a batch.
            params: How to sample. None = `SamplingParams()`.
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
        completions = self._complete([self.encode_prompt(p) for p in prompts], params)
        return completions[0] if single and params.n == 1 else completions

    @keywords(SamplingParams)
    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any
    ) -> Generator[Chunk, None, None]:
        """Complete one prompt, piece by piece. Closing the iterator aborts the request.

        Args:
            prompt: As in `generate`, but no batch.
            params: How to sample. None = `SamplingParams()`.
            **overrides: Fields of `SamplingParams` that differ from `params`.

        Returns:
            An iterator of chunks. With n > 1 those of all choices are mixed, and `Chunk.index` tells them apart.

        Raises:
            ParameterError: A value cannot be used, or a keyword is unknown.
            ContextLengthError: The prompt is too long.
        """
        if not is_single(prompt):
            raise ParameterError("stream takes one prompt; generate takes a list of them", parameter="prompt")
        return self._stream(self.encode_prompt(prompt), sampling_params(params, overrides))

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
        completions = self._complete([ids], params)
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
        return self._stream(ids, params)

    @keywords()
    def logits(self, prompt: Prompt) -> npt.NDArray[np.float32]:
        """Logits of all positions of a prompt, from one pass.

        Args:
            prompt: As in `generate`, with one BOS; no batch.

        Returns:
            (T, V) float32 on the host. Row t scores the token that follows the prompt's first t + 1 tokens.

        Raises:
            ParameterError: The prompt is empty, or holds ids outside the vocabulary.
            ContextLengthError: The prompt is too long.
            OutOfMemoryError: The array is larger than the free memory; the message has the numbers.
        """
        return scoring.logits(self._loop, self.engine, self.encode_prompt(prompt))

    @keywords()
    def attention(self, prompt: Prompt, layer: int | None = None) -> npt.NDArray[np.float32]:
        """Attention weights of a prompt of T tokens, from one pass without logits.

        Args:
            prompt: As in `generate`, with one BOS; no batch.
            layer: From 0. None = all L layers.

        Returns:
            float32 on the host, (H, T, T) of one layer, (L, H, T, T) of all. Row t of a head says how much token t
            attends to each token; it adds up to 1.

        Raises:
            ParameterError: There is no such layer, the prompt is empty, or it holds ids outside the vocabulary.
            ContextLengthError: The prompt is too long.
            OutOfMemoryError: The array is larger than the free memory; the message has the numbers.
        """
        if layer is not None:
            check_integer("layer", layer, 0, self.config.num_layers - 1)
        layers = range(self.config.num_layers) if layer is None else range(int(layer), int(layer) + 1)
        weights = scoring.attention(self._loop, self.engine, self.encode_prompt(prompt), layers)
        return weights if layer is None else weights[0]

    @keywords()
    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: Pooling = "mean", normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """Embeddings of texts: the last layer's results, through the output's norm, pooled over the tokens of each.

        Args:
            prompts: As in `generate`: one prompt, or B of them.
            pooling: "mean" = of all tokens, "last" = the last token's.
            normalize: Whether each embedding gets the length 1.

        Returns:
            (B, E) float32 on the host; B is 1 for one prompt.

        Raises:
            ForgeError: As `logits`. NumericsError where an embedding is not finite.
        """
        ids = [self.encode_prompt(prompt) for prompt in prompts_of(prompts)[0]]
        return scoring.embed(self._loop, self.engine, ids, pooling, normalize=normalize, name=self._name)

    @keywords()
    def perplexity(self, text: Prompt, *, context: int | None = None) -> Perplexity:
        """How well the model predicts a text: exp of the mean negative log likelihood per token.

        The text is cut into chunks, each scored from its second token on. If the model starts texts with BOS, the first
        token of each chunk is replaced by it. A remainder shorter than a chunk is scored only if it is all there is;
        else `Perplexity.remainder` counts its tokens.

        Args:
            text: A string or a list of token ids. A string becomes tokens as in `generate`: one BOS, no EOS, names of
                special tokens are these tokens.
            context: Tokens of a chunk. None = 512, or what the model has if that is less.

        Raises:
            ParameterError: The text has fewer than two tokens or holds ids outside the vocabulary, or `context` is not
                from 2 to the model's.
            NumericsError: Logits are not finite.
        """
        if context is None:
            context = min(512, self.context)
        check_integer("context", context, 2, self.context)
        ids = self._tokens(text)
        chunks = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)] or [ids]
        if len(chunks[0]) < 2:
            raise ParameterError("the text has fewer than two tokens: there is nothing to predict", parameter="text")
        remainder = len(ids) - sum(map(len, chunks))
        if self.tokenizer.add_bos and self.tokenizer.bos_id is not None:
            chunks = [[self.tokenizer.bos_id, *chunk[1:]] for chunk in chunks]
        return scoring.perplexity(self._loop, self.engine, chunks, remainder, str(self.path))
