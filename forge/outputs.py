"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass

from forge.engine import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one completion went, in milliseconds, waiting included.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Generated tokens.
        prefill_ms: From the request to its first token.
        decode_ms: From the first token to the last.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_ms: float
    decode_ms: float

    @property
    def total_ms(self) -> float:
        """From the request to its last token."""
        return self.prefill_ms + self.decode_ms

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens by the time of the first new one."""
        return 1000 * self.prompt_tokens / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """The first token belongs to the prefill."""
        return 1000 * (self.completion_tokens - 1) / self.decode_ms if self.decode_ms else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion, as it is generated.

    Attributes:
        text: New text, perhaps empty: a character may need several tokens, and a possible stop string is held back.
        ids: New token ids.
        index: Which of the n choices.
        logprobs: One entry for each id, where `SamplingParams.logprobs` asked for them; else None.
        finish_reason: Set on the last chunk of a choice.
        timings: Set on the last chunk of a choice.
    """

    text: str
    ids: list[int]
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion.

    Attributes:
        text: The generated text.
        ids: Generated ids, the end token not included.
        prompt_ids: Token ids of the prompt, BOS included.
        finish_reason: "stop": end token, stop id or stop string; "length": max_tokens or the context; "abort";
            "error": the logits were not finite.
        timings: Token counts and times.
        logprobs: One entry for each id, where `SamplingParams.logprobs` asked for them; else None.
        index: Which of the n choices.
    """

    text: str
    """Without the bytes of a character that the end cut."""
    ids: list[int]
    prompt_ids: list[int]
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean negative log likelihood) over the scored tokens.

    Attributes:
        ppl: exp(nll).
        nll: Mean, in nats per token.
        tokens: Scored tokens.
    """

    ppl: float
    nll: float
    tokens: int
