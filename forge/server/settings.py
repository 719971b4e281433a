"""What a server is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, fields

from forge.errors import ParameterError

_KEY_LENGTH = 4096
_MAX_SECONDS = 1_000_000
"""The kernel takes the milliseconds of `send_seconds` as 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Attributes:
    model_name: The model's name for clients. Requests may ask for another one: it is not compared.
    adapters: Names of the model's adapters. A request chooses one by the name of its model.
    api_keys: Keys of which a client must send one; none = no key is asked for.
    allowed_hosts: Names that the Host header may have, beside IP addresses.
    cors_origins: Origins whose pages may call the server; "*" = any.
    max_queue: Most choices that wait behind those that run. Further requests get status 429.
    max_body_bytes: Largest body of a request.
    max_json_depth: Deepest nesting of a body.
    max_n, max_stop, max_logit_bias, max_prompts: Largest n, and most entries of stop, logit_bias and prompt.
    max_inputs: Most inputs of a request for embeddings, which are computed one after the other.
    header_seconds: A connection that has not sent its next header by then is closed.
    idle_seconds: An open connection without a request is closed after it.
    body_seconds: A request whose body is not there by then gets status 408.
    send_seconds: A client that takes nothing of its answer for so long has left.
    request_seconds: A request whose answers are not whole by then gets status 504. None = it may take any time.
    shutdown_seconds: How long answers may go on when the server is to stop.
    reasoning: Whether reasoning is told apart from the answer, as `reasoning_content`.
    log_prompts: Whether log lines hold prompts and answers.
    """

    model_name: str
    adapters: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 8 << 20
    max_json_depth: int = 64
    max_n: int = 16
    max_stop: int = 16
    max_logit_bias: int = 1024
    max_prompts: int = 64
    max_inputs: int = 2048
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 5.0
    send_seconds: float = 60.0
    request_seconds: float | None = None
    shutdown_seconds: float = 30.0
    reasoning: bool = True
    log_prompts: bool = False

    def __post_init__(self) -> None:
        """Raises ParameterError for a limit that no request could keep, and for keys that no header can hold."""
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 0 if name == "max_queue" else 1
            if name.endswith("_seconds"):
                is_right, bound = 0 < value <= _MAX_SECONDS, f"a number above 0, {_MAX_SECONDS} at most"
            else:
                is_right, bound = value >= least, f"at least {least}"
            if not is_right:
                raise ParameterError(f"{name} must be {bound}, not {value}", parameter=name)
        if self.model_name in self.adapters:
            message = f"an adapter has the model's name {self.model_name!r:.60}"
            raise ParameterError(message, parameter="adapter", hint="give one of them another name")
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable() and 0 < len(key) <= _KEY_LENGTH) or " " in key:
                message = "api_key must be a word of letters, digits and signs, without spaces"
                raise ParameterError(message, parameter="api_key")
