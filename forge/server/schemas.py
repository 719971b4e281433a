"""What the bodies of several requests have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, WrapValidator, model_validator

from forge.config import MAX_LOGPROBS, SamplingParams
from forge.server.errors import HTTPError
from forge.server.settings import ServerSettings

T = TypeVar("T")


class _FirstError(FailFast):
    __hash__ = object.__hash__  # unions compare their members' marks


def _in_pieces(values: Any, validated: Callable[[Any], Any]) -> Any:
    """A dict, of which a piece with errors ends the validation."""
    if not isinstance(values, dict):
        return validated(values)
    rest, found = iter(values.items()), validated({})
    while piece := dict(islice(rest, 100)):
        found |= validated(piece)
    return found


Items = Annotated[list[T], _FirstError()]
"""A list with the error of its first wrong item alone: a body has room for millions, of a kilobyte each."""
Entries = Annotated[dict[str, T], WrapValidator(_in_pieces)]
"""A JSON object with few errors, likewise."""
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenCount = Annotated[int, Field(ge=1)]
WITHOUT_EFFECT = "Accepted, without effect."
NOT_CONSTRAINED = "the server does not constrain what a model writes"
Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    Field(description="The variable reasoning_effort of the chat template; with none, enable_thinking is false, too."),
]
_TOKEN_ID = re.compile(r"0|[1-9]\d{0,8}", re.ASCII)
"""One way to write each, so that no key stands for another."""
Strict = Annotated[bool | None, Field(description="Accepted, without effect: the arguments are not constrained.")]
ModelName: Any = Field(default="", max_length=512, description="An adapter's name; any other is the model.")


class Body(BaseModel):
    """A body of JSON. Types are exact, and unknown fields are refused: what is ignored would pretend."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[dict[str, str]] = {}
    """Fields of the API that the server does not support, and why. null asks for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_refused(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, why in cls.refused.items():
            if values.get(name) is not None:
                raise HTTPError(400, f"{name} is not supported: {why}", name, "unsupported_value")
        unknown = (name for name in values if name not in cls.model_fields and name not in cls.refused)
        told = {*cls.model_fields, *islice(unknown, 1)}  # one error: a body has room for very many such fields
        return {name: value for name, value in values.items() if name in told}


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description=WITHOUT_EFFECT)


class SamplingBody(Body):
    """The fields that all ways to generate text share. None = the default of `SamplingParams`."""

    model: str = ModelName
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop_token_ids: Items[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None

    def sampling(self, **others: Any) -> SamplingParams:
        """The parameters of the request. Raises ParameterError for those that do not go together."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        return SamplingParams(**{"temperature": 1.0, **given, **others})


class OpenAIBody(SamplingBody):
    """The fields that OpenAI's chat and text completions share."""

    logit_bias: Entries[float] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Items[str] | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512, description=WITHOUT_EFFECT)

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise HTTPError(400, "stream_options needs stream to be true", "stream_options", "invalid_value")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether the stream's last chunk is to have the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def openai_sampling(self, settings: ServerSettings, **others: Any) -> SamplingParams:
        """As `sampling`. Raises HTTPError for what the server does not allow."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        bias = self.logit_bias or {}
        at_most("stop", len(stop), settings.max_stop)
        at_most("n", self.n or 1, settings.max_n)
        at_most("logit_bias", len(bias), settings.max_logit_bias)
        return self.sampling(stop=stop, n=self.n or 1, logit_bias=_bias(bias), **others)


_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "stop_token_ids", "ignore_eos"),
)


def effort_variables(effort: str | None) -> dict[str, Any]:
    """How much a model is to think, as variables of chat templates. A template that does not read them ignores it."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort} | ({"enable_thinking": False} if effort == "none" else {})


def at_most(name: str, count: int, most: int) -> None:
    """Raises HTTPError where a field is, or has entries, beyond what the server's settings allow."""
    if count > most:
        raise HTTPError(400, f"{name}: {most} at most, not {count}", name, "invalid_value")


def _bias(bias: dict[str, float]) -> dict[int, float]:
    for key in bias:
        if not _TOKEN_ID.fullmatch(key):
            message = f"logit_bias must map token ids to numbers, not {key[:40]!r}"
            raise HTTPError(400, message, "logit_bias", "invalid_value")
    return {int(key): value for key, value in bias.items()}


Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
