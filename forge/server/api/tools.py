"""Tools in a request, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from forge.server.errors import HTTPError
from forge.server.schemas import NOT_CONSTRAINED, Body, Strict

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class Function(Body):
    """A function that a model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments, an object.")
    strict: Strict = None


class Tool(Body):
    """A tool: a function."""

    type: Literal["function"]
    function: Function

    def as_json(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        given = self.function.model_fields_set - {"strict"}
        values = {name: getattr(self.function, name) for name in ("name", "description", "parameters") if name in given}
        return {
            "type": "function",
            "function": {name: value for name, value in values.items() if value is not None},
        }


def shown_tools(tools: list[Tool] | None, choice: Any) -> list[dict[str, Any]]:
    """The tools that the model is shown. Raises HTTPError for a choice that would constrain what it writes."""
    if choice not in (None, "auto", "none"):
        wanted = choice.get("type") if isinstance(choice, dict) else choice
        message = f'tool_choice {wanted!r:.40} is not supported, only "auto" and "none": '
        raise HTTPError(400, message + NOT_CONSTRAINED, "tool_choice", "unsupported_value")
    shown = [] if choice == "none" else [tool.as_json() for tool in tools or ()]
    names = [tool["function"]["name"] for tool in shown]
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise HTTPError(400, f"tools holds two functions with the name {twice!r}", "tools", "invalid_value")
    return shown
