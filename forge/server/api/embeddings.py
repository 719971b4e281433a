"""/v1/embeddings"""

from __future__ import annotations

import asyncio
import base64
import sys
from array import array
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from forge.config import Pooling
from forge.server.api.common import Prompts, encoded_prompts, server_of
from forge.server.errors import HTTPError
from forge.server.exchange import answer
from forge.server.schemas import WITHOUT_EFFECT, Body, ModelName
from forge.server.state import Server, new_id

router = APIRouter()


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    refused: ClassVar[dict[str, str]] = {"dimensions": "an embedding has as many as the model is wide"}
    input: Prompts
    model: str = ModelName
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Pooling = Field(default="mean", description="Of which tokens' states: all, or the last one's.")
    user: str | None = Field(default=None, max_length=512, description=WITHOUT_EFFECT)


@router.post("/v1/embeddings")
async def embeddings(request: Request, wanted: EmbeddingBody) -> Response:
    """The embeddings of texts, of length 1."""
    return await answer(request, _embed(server_of(request), wanted))


async def _embed(server: Server, wanted: EmbeddingBody) -> dict[str, Any]:
    _, encode = encoded_prompts("input", wanted.input, server, server.settings.max_inputs)
    adapter = server.adapter_of(wanted.model)
    with server.admitted(new_id("embd-"), "embeddings", 1) as record:
        seconds = server.settings.request_seconds
        try:
            async with asyncio.timeout(seconds):
                prompts = await asyncio.to_thread(encode)
                tokens = record.prompt_tokens = sum(map(len, prompts))
                found = [await server.client.embed(ids, wanted.pooling, adapter) for ids in prompts]
        except TimeoutError:
            raise HTTPError(504, f"the request did not end within {seconds:g} s", code="timeout") from None
    is_text = wanted.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(row) if is_text else array("f", row).tolist()}
        for index, row in enumerate(found)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": adapter or server.settings.model_name, "usage": usage}


def _base64(row: bytes) -> str:
    """float32, little-endian."""
    values = array("f", row)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
