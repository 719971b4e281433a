"""The methods of `LLM` that compute a prompt and sample nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from forge.config import Pooling
from forge.errors import ParameterError
from forge.keywords import check_integer, keywords
from forge.outputs import Perplexity, Score
from forge.runtime import likelihoods, scoring
from forge.runtime.async_front import AsyncFront
from forge.runtime.encoder import Prompt
from forge.runtime.prompts import items_of, prompts_of
from forge.runtime.scoring import Logits, Positions


class ScoringFront(AsyncFront):
    """Base of `LLM`: logits, scores, attention weights, embeddings and perplexity of texts."""

    @overload
    def logits(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, prompt: Prompt, positions: Positions = None, *, adapter: str | None = None
    ) -> Logits: ...
    @overload
    def logits(
        self, prompt: Sequence[Prompt], positions: Positions = None, *, adapter: str | None = None
    ) -> list[Logits]: ...
    @keywords()
    def logits(
        self, prompt: Prompt | Sequence[Prompt], positions: Positions = None, *, adapter: str | None = None
    ) -> Logits | list[Logits]:
        """Logits of a prompt, or of a list of prompts together.

        Args:
            prompt: As in `generate`, with one BOS.
            positions: Which of the T tokens' logits are wanted: an integer, a slice or a list of integers, which may
                count from the end. No others are computed. None = all.
            adapter: As in `generate`.

        Returns:
            (T, V) float32 on the host, or what ``[positions]`` takes of that: (V,) of one position, (R, V) of several.
            Row t scores the token that follows the prompt's first t + 1 tokens. A list of such arrays for a list of
            prompts.

        Raises:
            ParameterError: A prompt is empty, holds ids outside the vocabulary, or has no such positions.
            ContextLengthError: A prompt is too long.
            OutOfMemoryError: The array is larger than the free memory; the message has the numbers.
        """
        slot = self._slot_of(adapter)
        prompts, single = prompts_of(prompt)
        ids = [self.encode_prompt(one) for one in prompts]
        found = scoring.logits(self._loop, self.engine, ids, positions, slot)
        return found[0] if single else found

    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompt: Prompt, continuations: Prompt, *, adapter: str | None = None
    ) -> Score: ...
    @overload
    def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str | None = None) -> list[Score]: ...
    @overload
    def score(
        self, prompt: Sequence[Prompt], continuations: Sequence[Any], *, adapter: str | None = None
    ) -> list[Any]: ...
    @keywords()
    def score(self, prompt: Any, continuations: Any, *, adapter: str | None = None) -> Any:
        """How probable continuations of a prompt are, or continuations of each of several prompts.

        A prompt that has several continuations is computed once. Many sequences are computed together.

        Args:
            prompt: As in `generate`, with one BOS. A list of prompts is a batch.
            continuations: A string or a list of token ids, or a list of these. For a list of prompts, such an entry for
                each of them. A string behind a string becomes what the tokens of both together have behind the
                tokens that the prompt alone has too: where a token reaches over the end of the prompt, it counts.
            adapter: As in `generate`.

        Returns:
            A `Score` for one continuation, a list for a list of them; for a list of prompts, a list of that. Log
            probabilities are those of the model's own distribution, in float32, added in float64.

        Raises:
            ParameterError: A continuation or a prompt is empty, or holds ids outside the vocabulary; or there are
                not as many entries of continuations as prompts.
            ContextLengthError: A prompt with its continuation is too long.
            NumericsError: Logits are not finite.
        """
        slot = self._slot_of(adapter)
        prompts, single = prompts_of(prompt)
        entries = [continuations] if single else items_of(continuations, "continuations")
        if len(entries) != len(prompts):
            message = f"continuations has {len(entries)} entries for {len(prompts)} prompts"
            raise ParameterError(message, parameter="continuations", hint="give one for each prompt, or a list for it")
        several = [prompts_of(entry, "continuations") for entry in entries]
        pairs = [self.encode_pair(one, each) for one, (own, _) in zip(prompts, several, strict=True) for each in own]
        counts = [len(own) for own, _ in several]
        scores = iter(likelihoods.score(self._loop, self.engine, pairs, counts, self._name, slot))
        found = [next(scores) if alone else [next(scores) for _ in own] for own, alone in several]
        return found[0] if single else found

    @keywords()
    def attention(
        self, prompt: Prompt, layer: int | None = None, *, adapter: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Attention weights of a prompt of T tokens, from one pass without logits.

        Args:
            prompt: As in `generate`, with one BOS; no batch.
            layer: From 0. None = all L layers.
            adapter: As in `generate`.

        Returns:
            float32 on the host, (H, T, T) of one layer, (L, H, T, T) of all. Row t of a head says how much token t
            attends to each token; it adds up to 1.

        Raises:
            ParameterError: There is no such layer, the prompt is empty, or it holds ids outside the vocabulary.
            ContextLengthError: The prompt is too long.
            OutOfMemoryError: The array is larger than the free memory; the message has the numbers.
        """
        config = self.engine.runner.config
        if layer is not None:
            check_integer("layer", layer, 0, config.num_layers - 1)
        layers = range(config.num_layers) if layer is None else range(int(layer), int(layer) + 1)
        slot = self._slot_of(adapter)
        weights = scoring.attention(self._loop, self.engine, self.encode_prompt(prompt), layers, slot)
        return weights if layer is None else weights[0]

    @keywords()
    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling = "mean",
        normalize: bool = True,
        *,
        adapter: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of texts: the last layer's results, through the output's norm, pooled over the tokens of each.

        Args:
            prompts: As in `generate`: one prompt, or B of them.
            pooling: "mean" = of all tokens, "last" = the last token's.
            normalize: Whether each embedding gets the length 1.
            adapter: As in `generate`.

        Returns:
            (B, E) float32 on the host; B is 1 for one prompt.

        Raises:
            ForgeError: As `logits`. NumericsError where an embedding is not finite.
        """
        slot, ids = self._slot_of(adapter), [self.encode_prompt(prompt) for prompt in prompts_of(prompts)[0]]
        return scoring.embed(self._loop, self.engine, ids, pooling, slot, normalize=normalize, name=self._name)

    @keywords()
    def perplexity(self, text: Prompt, *, context: int | None = None, adapter: str | None = None) -> Perplexity:
        """How well the model predicts a text: exp of the mean negative log likelihood per token.

        The text is cut into chunks, each scored from its second token on. If the model starts texts with BOS, the first
        token of each chunk is replaced by it. A remainder shorter than a chunk is scored only if it is all there is;
        else `Perplexity.remainder` counts its tokens.

        Args:
            text: A string or a list of token ids. A string becomes tokens as in `generate`: one BOS, no EOS, names of
                special tokens are these tokens.
            context: Tokens of a chunk. None = 512, or what the model has if that is less.
            adapter: As in `generate`.

        Raises:
            ParameterError: The text has fewer than two tokens or holds ids outside the vocabulary, or `context` is not
                from 2 to the model's.
            NumericsError: Logits are not finite.
        """
        if context is None:
            context = min(512, self.context)
        check_integer("context", context, 2, self.context)
        slot = self._slot_of(adapter)
        ids = self._tokens(text)
        chunks = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)] or [ids]
        if len(chunks[0]) < 2:
            raise ParameterError("the text has fewer than two tokens: there is nothing to predict", parameter="text")
        remainder = len(ids) - sum(map(len, chunks))
        if self.tokenizer.add_bos and self.tokenizer.bos_id is not None:
            chunks = [[self.tokenizer.bos_id, *chunk[1:]] for chunk in chunks]
        return likelihoods.perplexity(self._loop, self.engine, chunks, remainder, self._name, slot)
