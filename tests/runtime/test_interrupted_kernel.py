"""Interrupts of a notebook's kernel: the button that stops a cell."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

pytestmark = pytest.mark.slow

TESTS = str(Path(__file__).parents[1])
MODEL = f"""
import sys
sys.path.insert(0, {TESTS!r})
from tiny_models import SEEDED, assert_idle, tiny_llm
from forge.tokenizer.chat import ChatTemplate

llm = tiny_llm("llama")
llm.chat_template = ChatTemplate("{{{{ messages[0].content }}}}", name="m", special_tokens={{}})
messages = [{{"role": "user", "content": "Hi"}}]
uses = {{
    "generate": lambda: [c.ids for c in llm.generate([[1, 2], [3]], SEEDED, n=2)],
    "stream": lambda: [token for chunk in llm.stream([1, 2], SEEDED) for token in chunk.ids],
    "chat": lambda: llm.chat(messages, SEEDED).ids,
    "logits": lambda: llm.logits([1, 2, 3] * 20).tolist(),
}}
tasks = {{"agenerate": lambda: llm.agenerate([1, 2], SEEDED)}}
expected = {{name: use() for name, use in uses.items()}}
"""
CHECK = """
for name, use in uses.items():
    assert use() == expected[name], name
assert (await tasks["agenerate"]()).ids == llm.generate([1, 2], SEEDED).ids
assert_idle(llm)
"""


@pytest.fixture
def kernel() -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager = KernelManager()
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def wait_for_text(client: BlockingKernelClient, request: str, text: str) -> None:
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == request and message["content"].get("text") == text:
            return


def reply(client: BlockingKernelClient, request: str) -> dict[str, Any]:
    while True:
        message = client.get_shell_msg(timeout=60)
        if message["parent_header"].get("msg_id") == request:
            content: dict[str, Any] = message["content"]
            return content


def test_30_interrupts_of_a_kernel_at_random_moments_leave_the_model_as_it_was(
    kernel: tuple[KernelManager, BlockingKernelClient],
) -> None:
    manager, client = kernel
    found = reply(client, client.execute(MODEL))
    assert found["status"] == "ok", found
    rng = random.Random(0)
    for number in range(30):
        name = ["generate", "stream", "chat", "logits", "agenerate"][number % 5]
        call = f"await tasks[{name!r}]()" if name == "agenerate" else f"uses[{name!r}]()"
        cell = client.execute(f"print('begins', end='', flush=True)\nwhile True: {call}")
        wait_for_text(client, cell, "begins")
        time.sleep(rng.uniform(0, 0.2))
        manager.interrupt_kernel()
        found = reply(client, cell)
        assert found.get("ename") in ("KeyboardInterrupt", "CancelledError"), (number, name, found)
        while (found := reply(client, client.execute(CHECK)))["status"] == "aborted":
            pass  # a kernel drops the requests that reach it right behind one that failed
        assert found["status"] == "ok", (number, name, found)
