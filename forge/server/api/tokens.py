"""/tokenize and /detokenize, as vLLM has them"""

from __future__ import annotations

import asyncio
from typing import Any, Self

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from forge.server.api.common import server_of
from forge.server.api.generation import encoded
from forge.server.api.messages import checked_messages
from forge.server.api.tools import Tool, shown_tools
from forge.server.errors import HTTPError
from forge.server.exchange import answer
from forge.server.schemas import Body, Items, ModelName, TokenId
from forge.server.state import Server

router = APIRouter()


class TokenizeBody(Body):
    """The body of /tokenize: a prompt or messages."""

    model: str = ModelName
    prompt: str | None = None
    messages: Items[dict[str, Any]] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = Field(default=None, description="Of a prompt: whether it gets the model's BOS.")
    return_token_strs: bool | None = None
    tools: Items[Tool] | None = Field(default=None, max_length=128)
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise HTTPError(400, "give either prompt or messages", "prompt", "invalid_value")
        of_other = ("tools", "chat_template_kwargs") if self.messages is None else ("add_special_tokens",)
        if wrong := next((name for name in of_other if getattr(self, name) is not None), None):
            raise HTTPError(400, f"{wrong} does not go with what is given", wrong, "invalid_value")
        return self


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: str = ModelName
    tokens: Items[TokenId]


@router.post("/tokenize")
async def tokenize(request: Request, wanted: TokenizeBody) -> Response:
    """The token ids of a prompt or a conversation, and how many tokens the context holds."""
    server = server_of(request)
    server.check_ready()

    async def work() -> dict[str, Any]:
        ids = await asyncio.to_thread(_ids, server, wanted)
        found = {"count": len(ids), "max_model_len": server.client.info["context"], "tokens": ids}
        if wanted.return_token_strs:
            found["token_strs"] = [server.encoder.tokenizer.token_text(id) for id in ids]
        return found

    return await answer(request, work())


@router.post("/detokenize")
async def detokenize(request: Request, wanted: DetokenizeBody) -> Response:
    """The text of token ids."""
    server = server_of(request)

    async def work() -> dict[str, Any]:
        return {"prompt": await asyncio.to_thread(server.encoder.tokenizer.decode, wanted.tokens)}

    return await answer(request, work())


def _ids(server: Server, wanted: TokenizeBody) -> list[int]:
    if wanted.prompt is None:
        messages = checked_messages(wanted.messages or [], server)
        tools = shown_tools(wanted.tools, None)
        continues = wanted.continue_final_message
        return encoded(server, messages, tools, wanted.chat_template_kwargs, continues=continues)
    if wanted.add_special_tokens is False:
        return server.encoder.tokenizer.encode(wanted.prompt, add_special=False, parse_special=True)
    return server.encoder.encode_prompt(wanted.prompt)
