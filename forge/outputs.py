"""Results of requests: chunks, completions, their times, scores and perplexity."""

from __future__ import annotations

from dataclasses import dataclass

from forge.display import html_text
from forge.engine import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one completion went, in milliseconds, waiting included.

    Attributes:
        prompt_tokens: Number of tokens of the prompt.
        completion_tokens: Number of generated tokens.
        prefill_ms: From the request to its first token.
        decode_ms: From the first token to the last.
        queue_ms: From the request to the step that begins with it. A part of `prefill_ms`.
        cached_tokens: Tokens of the prompt that were there from earlier requests, and were not computed.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_ms: float
    decode_ms: float
    queue_ms: float = 0.0
    cached_tokens: int = 0

    @property
    def total_ms(self) -> float:
        """Milliseconds from the request to its last token."""
        return self.prefill_ms + self.decode_ms

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second of `prefill_ms`."""
        return 1000 * self.prompt_tokens / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second of `decode_ms`. The first one is not counted: it belongs to the prefill."""
        return 1000 * (self.completion_tokens - 1) / self.decode_ms if self.decode_ms else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion, as it is generated.

    Attributes:
        text: New text. It may be empty: a character may need several tokens, and a possible stop string is held back.
        ids: New token ids.
        index: Which of the n choices it belongs to.
        logprobs: One entry for each id, if `SamplingParams.logprobs` is set. Else None.
        finish_reason: Why the choice ended, on its last chunk. Else None.
        timings: Where the time of the choice went, on its last chunk. Else None.
        stop_string: The stop string that ended the choice, on its last chunk. Else None.
    """

    text: str
    ids: list[int]
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion.

    Attributes:
        text: The generated text, without the bytes of a character that the end cut.
        ids: Generated ids, the end token not included.
        prompt_ids: Token ids of the prompt, BOS included.
        finish_reason: "stop" = an end token, a stop token or a stop string; "length" = `max_tokens` or the context;
            "abort" = closed or dropped; "error" = the logits were not finite.
        timings: Token counts and times.
        logprobs: One entry for each id, if `SamplingParams.logprobs` is set. Else None.
        index: Which of the n choices it is.
        stop_string: The stop string that ended it. Else None.
    """

    text: str
    ids: list[int]
    prompt_ids: list[int]
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None
    index: int = 0
    stop_string: str | None = None

    def _repr_html_(self) -> str:
        """What a notebook shows: the text, and a line on its end and its times."""
        times = self.timings
        parts = [f"{times.prompt_tokens} prompt tokens", f"{times.completion_tokens} generated"]
        parts += [f"ended by {self.finish_reason}", f"{times.total_ms / 1000:.2f} s"]
        parts += [f"{times.decode_tokens_per_s:.1f} tokens/s"] * (times.decode_tokens_per_s > 0)
        return html_text(self.text, " · ".join(parts))


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a continuation is behind its prompt.

    Attributes:
        logprob: Its natural log probability: the sum of `logprobs`.
        is_greedy: Whether each of its tokens is the most probable one at its place.
        ids: Its token ids.
        logprobs: The natural log probability of each of its tokens.
        prompt_ids: The token ids before it.
    """

    logprob: float
    is_greedy: bool
    ids: list[int]
    logprobs: list[float]
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean negative log likelihood) over the scored tokens.

    Attributes:
        ppl: exp(nll).
        nll: Mean, in nats per token.
        tokens: Scored tokens.
        remainder: Tokens at the end of the text that were not looked at, because they are fewer than a chunk.
    """

    ppl: float
    nll: float
    tokens: int
    remainder: int = 0
