"""`forge serve`: a model over HTTP."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from typing import Annotated, Any

import typer

from forge.cli import options, output
from forge.errors import ForgeError, ParameterError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@options.takes_groups()
def command(
    model: options.Model = options.DEFAULT_MODEL,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 = any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", metavar="KEY", envvar="FORGE_API_KEY", help="Key that clients must send; several."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen beyond this machine without a key.")] = False,
    model_name: Annotated[
        str | None, typer.Option("--model-name", metavar="NAME", help="Name for clients. [default: the file's]")
    ] = None,
    chat_template: options.ChatTemplate = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=PATH",
            help="A LoRA adapter, which requests choose as the model NAME; several.",
        ),
    ] = None,
    max_sequences: Annotated[
        int | None,
        typer.Option(
            "--max-sequences",
            metavar="N",
            help="Most answers computed together. [default: 64; on a GPU up to 256]",
        ),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same request gives the same tokens in any batch; slower.")
    ] = False,
    *,
    loading: dict[str, Any],
    serving: dict[str, Any],
    reasoning: Annotated[
        bool, typer.Option("--reasoning/--no-reasoning", help="Whether reasoning goes to reasoning_content.")
    ] = True,
) -> None:
    """Serve a model over HTTP, to clients of OpenAI's and Anthropic's APIs. Ctrl-C or SIGTERM ends it."""
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]:
        raise ForgeError(f"forge serve needs packages that are not installed: pip install {' '.join(missing)}")
    from forge.config import EngineConfig
    from forge.loading import load_encoder
    from forge.server import log
    from forge.server.engine_client import EngineClient
    from forge.server.heap import use_one_arena
    from forge.server.http import HTTPServer, bind
    from forge.server.settings import ServerSettings
    from forge.server.state import Server

    if not _is_loopback(host) and not api_key and not no_auth:
        raise ParameterError(
            f"host {host} lets other machines in", parameter="host", hint="use api_key=KEY, or --no-auth"
        )
    names = (*_LOOPBACK, host, socket.gethostname(), *serving.pop("allowed_hosts"))
    adapters = options.adapters_of(adapter or [])
    settings = ServerSettings(
        model_name=model_name or model.rstrip("/").rpartition("/")[2].removesuffix(".gguf"),
        adapters=tuple(adapters),
        api_keys=tuple(api_key or ()),
        allowed_hosts=tuple(name.lower() for name in names),
        cors_origins=tuple(serving.pop("cors_origins")),
        reasoning=reasoning,
        **serving,
    )
    listener = bind(host, port, settings.send_seconds)
    path = options.resolve(model)
    encoder = load_encoder(path, settings.model_name, chat_template)
    loading |= {"chat_template": chat_template, "max_sequences": max_sequences, "adapters": adapters}
    client = EngineClient(path, {**loading, "engine": EngineConfig(deterministic=deterministic)})
    try:
        use_one_arena()
        with log.to_stderr(quiet=output.quiet):
            HTTPServer(Server(client, encoder, settings)).run(sockets=[listener])
    finally:
        client.kill()
    if client.state == "failed":
        assert client.error
        raise client.error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
