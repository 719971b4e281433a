"""Conversations in requests, as chat templates expect them."""

from __future__ import annotations

from typing import Any

from forge.server.errors import HTTPError
from forge.server.state import Server

_ROLES = ("system", "developer", "user", "assistant", "tool")
_REFUSED = {"function_call": "it is the former form of tool_calls", "audio": "the model reads text alone"}


def checked_messages(messages: list[dict[str, Any]], server: Server) -> list[dict[str, Any]]:
    """Messages of OpenAI's chat API. Raises HTTPError with the field that is wrong.

    A developer's message is the system's where the template knows no developer.
    """
    return [_checked(f"messages.{place}", message, server) for place, message in enumerate(messages)]


def _checked(where: str, message: dict[str, Any], server: Server) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise HTTPError(400, f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role", "invalid_value")
    for name, why in _REFUSED.items():
        if message.get(name) is not None:
            raise _refusal(f"{where}.{name}", why)
    content = message.get("content")
    for place, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _refusal(f"{where}.content.{place}.type", f"parts of type 'text' alone are, not {kind!r:.40}")
    return message | {"role": known_role(role, server)}


def known_role(role: str, server: Server) -> str:
    """The role, but the system's for a developer of whom the model's template knows nothing."""
    template = server.encoder.chat_template
    return "system" if role == "developer" and template and "developer" not in template.sources else role


def _refusal(field: str, why: str) -> HTTPError:
    return HTTPError(400, f"{field} is not supported: {why}", field, "unsupported_value")
