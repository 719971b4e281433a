"""Errors as clients of OpenAI's and Anthropic's APIs expect them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forge.errors import (
    ChatTemplateError,
    ContextLengthError,
    ForgeError,
    ParameterError,
    RequestTimeoutError,
    TokenizerError,
)

_TYPES = {
    # status: (OpenAI's type, Anthropic's type)
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    421: ("permission_error", "permission_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("overloaded_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}
_DESCRIPTIONS = {
    400: "A field is wrong.",
    401: "No valid API key was sent.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    421: "The Host header names another host.",
    429: "Too many requests wait.",
    500: "The server has failed.",
    503: "The model is loading, or the server is shutting down.",
    504: "The answer took too long.",
}
_SERVER_ERROR = ("server_error", "api_error")
_CLIENTS_FAULT = (ParameterError, ContextLengthError, TokenizerError)
_FIELDS = {
    # path: forge's names of parameters -> those of the API, where they differ
    "/v1/chat/completions": {"prompt": "messages", "template_variables": "chat_template_kwargs"},
    "/v1/messages": {"prompt": "messages", "stop": "stop_sequences"},
    "/v1/embeddings": {"prompt": "input"},
    "/v1/responses": {"prompt": "input", "template_variables": "chat_template_kwargs"},
    "/tokenize": {"template_variables": "chat_template_kwargs"},
}
_ANTHROPIC_PATHS = ("/v1/messages",)


@dataclass
class HTTPError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status.
        message: One line for people.
        param: The field of the body that is wrong, such as "messages.0.content".
        code: A word for programs, such as "context_length_exceeded".
        headers: Further headers of the answer.
        parameter: Of forge, that is wrong: the answer has the name that the API has for it. None = `param` says it.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] | None = None
    parameter: str | None = None

    def __str__(self) -> str:
        return self.message


def from_error(error: BaseException) -> HTTPError:
    """The answer to an error of forge. Wrong input is the client's fault; all else is the server's."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, ChatTemplateError):  # its hint is for who loads the model
        return HTTPError(400, str(error.args[0]), code="invalid_value", parameter="prompt")
    if isinstance(error, _CLIENTS_FAULT):
        is_long = isinstance(error, ContextLengthError)
        code = "context_length_exceeded" if is_long else "invalid_value"
        return HTTPError(400, str(error), code=code, parameter="prompt" if is_long else error.parameter)
    if isinstance(error, RequestTimeoutError):
        return HTTPError(504, str(error.args[0]), code="timeout")  # its hint is for who calls the library
    if isinstance(error, ForgeError):
        return HTTPError(500, str(error), code="engine_error")
    return HTTPError(500, "internal error", code="internal_error")


def body(error: HTTPError, path: str) -> dict[str, Any]:
    """The JSON of an error, in the form of the API that the path belongs to."""
    openai, anthropic = _TYPES.get(error.status, _SERVER_ERROR)
    param, message = error.param, error.message
    if error.parameter:
        param = _FIELDS.get(path, {}).get(error.parameter, error.parameter)
        if message.startswith(error.parameter):  # as messages about parameters do
            message = param + message.removeprefix(error.parameter)
    if path.startswith(_ANTHROPIC_PATHS):
        if param and not message.startswith(param):
            message = f"{param}: {message}"
        details = {"details": {"error_code": error.code}} if error.code else {}  # Anthropic's client looks for some
        return {"type": "error", "error": {"type": anthropic, "message": message, **details}}
    return {"error": {"message": message, "type": openai, "param": param, "code": error.code}}


def described() -> dict[int | str, dict[str, Any]]:
    """The errors of an endpoint, for the OpenAPI document. With "default", FastAPI adds none of its own."""
    content = {"application/json": {"schema": {"type": "object"}}}
    found: dict[int | str, dict[str, Any]] = {"default": {"description": "Any other error.", "content": content}}
    return found | {status: {"description": text, "content": content} for status, text in _DESCRIPTIONS.items()}
