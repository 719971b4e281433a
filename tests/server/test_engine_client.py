"""The server's side of the engine's process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from forge import ParameterError, SamplingParams
from forge.server import engine_client
from forge.server.engine_client import EngineClient


def test_an_engine_that_cannot_be_killed_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for a driver that hangs: it outlives SIGKILL, and its end of the socket stays open."""
    monkeypatch.setattr(engine_client, "_END_SECONDS", 0.01)

    async def run() -> subprocess.Popen[bytes]:
        client = EngineClient(Path("none"), {})
        await client.start()
        process = client._process
        assert process
        os.kill(process.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(process, "kill", lambda: None)
            client.kill()  # in the event loop: it may not wait
            await client.close(0.01)
        assert process.poll() is None
        assert client.state == "stopping"
        assert str(client.error) == "the server is shutting down"
        return process

    process = asyncio.run(asyncio.wait_for(run(), 30))
    process.kill()
    assert process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("how", [{"logits_processors": [lambda ids, logits: None]}, {"sampler": lambda i, z, r: 0}])
def test_functions_of_python_do_not_reach_the_engines_process(how: dict[str, Any]) -> None:
    client, (name,) = EngineClient(Path("none"), {}), how
    with pytest.raises(
        ParameterError, match=f"^{name}: Python functions stay in this process, and the engine"
    ) as caught:
        asyncio.run(client.complete([[1]], SamplingParams(**how), None))
    assert caught.value.parameter == name
