"""Clients that leave at random points, many at once."""

from __future__ import annotations

import random
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from raw import connect, request
from served import Served, is_idle, number, serve, stop, wait_for

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: the connection ends with a reset, as where a client is killed with bytes that it has not read."""


@pytest.mark.slow
def test_of_three_hundred_answers_that_are_dropped_at_random_points_nothing_is_left(model_path: str) -> None:
    """200 streams and 100 others: within the request, in the queue, within the prompt, and in the middle."""
    own = serve(model_path, "--context", "1024", "--max-sequences", "8")
    try:
        before = own.client.post("/v1/completions", json={"prompt": "a", "temperature": 0}).json()["choices"]
        with ThreadPoolExecutor(24) as clients:
            points = list(clients.map(lambda place: drop(own, place), range(300)))
        wait_for(lambda: is_idle(own))
        assert number(own, "forge_num_requests_running") == 0
        assert number(own, "forge_kv_cache_pages_used") == 0
        assert {"within the request", "after a time", "within the answer"} == set(points)
        whole = 300 - points.count("within the request")
        wait_for(lambda: own.text().count("the client left") == whole)
        assert own.client.post("/v1/completions", json={"prompt": "a", "temperature": 0}).json()["choices"] == before
        assert "Traceback" not in own.text()
    finally:
        stop(own)


def drop(served: Served, place: int) -> str:
    """Send a request, leave at a random point, and say where that was."""
    rng = random.Random(place)
    path, wanted = rng.choice(
        [
            ("/v1/completions", {"prompt": rng.choices(range(5, 250), k=rng.randint(1, 100)), "max_tokens": 900}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 40}], "max_tokens": 900}),
        ]
    )
    sent = request("POST", path, wanted | {"ignore_eos": True, "stream": place % 3 > 0})
    with connect(served) as connection:
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if rng.random() < 0.1:
            connection.sendall(sent[: rng.randrange(len(sent))])
            return "within the request"
        connection.sendall(sent)
        if place % 3 and rng.random() < 0.5:
            left = rng.randint(1, 4000)
            while left > 0:
                left -= len(connection.recv(left))
            return "within the answer"
        time.sleep(rng.uniform(0, 0.2))
        return "after a time"
