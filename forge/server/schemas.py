"""What the bodies of several requests have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from forge.config import MAX_LOGPROBS, SamplingParams
from forge.server.errors import HTTPError
from forge.server.settings import ServerSettings

TokenId = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """A body of JSON. Types are exact, and unknown fields are refused: what is ignored would pretend."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class SamplingBody(Body):
    """The fields that all ways to generate text share. None = the default of `SamplingParams`."""

    model: str = Field(default="", max_length=512, description="Any name: the server has one model.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: str | None = Field(default=None, max_length=512, description="Accepted, without effect.")

    def sampling(self, settings: ServerSettings, **others: Any) -> SamplingParams:
        """The parameters of the request. Raises HTTPError or ParameterError for what the server does not allow."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        bias = self.logit_bias or {}
        for name, count, most in (
            ("n", self.n or 1, settings.max_n),
            ("stop", len(stop), settings.max_stop),
            ("logit_bias", len(bias), settings.max_logit_bias),
        ):
            if count > most:
                raise HTTPError(400, f"{name} may be {most} at most, not {count}", name, "invalid_value")
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        return SamplingParams(**{"temperature": 1.0, **given, "stop": stop, "logit_bias": _bias(bias), **others})


_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "n", "stop_token_ids", "ignore_eos"),
)


def _bias(bias: dict[str, float]) -> dict[int, float]:
    if wrong := next((key for key in bias if not key.isascii() or not key.isdigit() or len(key) > 9), None):
        raise HTTPError(400, f"logit_bias must map token ids to numbers, not {wrong[:40]!r}", "logit_bias")
    return {int(key): value for key, value in bias.items()}


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None


Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
