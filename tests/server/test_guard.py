"""Each limit of a server, and each check that a request passes before its endpoint."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import psutil
import pytest
from raw import connect, exchange, read_response, read_to_end, request
from served import Served, is_idle, serve, stop, wait_for

from forge.server.guard import json_depth

KEY = "first-key"
LIMITS = (
    *("--header-seconds", "1", "--body-seconds", "1", "--idle-seconds", "1", "--send-seconds", "1"),
    *("--max-body-bytes", "100000", "--max-json-depth", "8", "--max-n", "3", "--max-stop", "2", "--max-prompts", "5"),
    *("--max-logit-bias", "2", "--max-queue", "0", "--api-key", KEY, "--api-key", "second-key"),
    *("--allowed-hosts", "Forge.Example", "--cors-origins", "https://page.example", "--max-sequences", "4"),
)
COMPLETION = "/v1/completions"
KEYS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def limited(model_path: str) -> Iterator[Served]:
    """A server with small limits, two keys, a name and a friendly page."""
    found = serve(model_path, *LIMITS)
    found.client.headers.update(KEYS)
    yield found
    stop(found)


def error_of(answer: tuple[int, Any]) -> tuple[int, str | None, str | None]:
    """Status, code and field of an error in OpenAI's form."""
    status, content = answer
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"].isprintable()
    return status, content["error"]["code"], content["error"]["param"]


def post(served: Served, body: Any, path: str = COMPLETION) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = served.client.post(path, content=content, headers={"content-type": "application/json"})
    return found.status_code, found.json()


PARTS = {
    "nothing": b"",
    "half a line": b"GET /health HT",
    "half a header": b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ",
    "a whole request": request("GET", "/health"),
    "no body": request("POST", COMPLETION, content_length="100", **KEYS),
    "half a body": request("POST", COMPLETION, content_length="100", **KEYS) + b'{"prompt"',
}


@pytest.fixture(scope="module")
def silent(limited: Served) -> Iterator[dict[str, socket.socket]]:
    """Connections that have sent such parts and send no more: the seconds until each is closed pass for all at once."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(connect(limited)) for name in PARTS}
        for name, sent in PARTS.items():
            found[name].sendall(sent)
        yield found


@pytest.mark.parametrize("sent", ["nothing", "half a line", "half a header"])
def test_a_connection_without_a_whole_header_is_closed(silent: dict[str, socket.socket], sent: str) -> None:
    assert read_to_end(silent[sent]) == b""


def test_a_header_that_trickles_in_is_not_waited_for(limited: Served) -> None:
    with connect(limited) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        state = select.poll()
        state.register(connection, select.POLLIN)
        for _ in range(600):
            if state.poll(100):
                break
            connection.sendall(b"x: y\r\n")
        with suppress(ConnectionResetError):  # what was sent since then is not read
            assert connection.recv(1) == b""


def test_a_connection_is_closed_when_it_is_idle(silent: dict[str, socket.socket]) -> None:
    assert read_response(silent["a whole request"])[0] == 200
    assert read_to_end(silent["a whole request"]) == b""


@pytest.mark.parametrize("sent", ["no body", "half a body"])
def test_a_body_that_does_not_come_gets_408(silent: dict[str, socket.socket], sent: str) -> None:
    status, content = read_response(silent[sent])
    assert error_of((status, json.loads(content))) == (408, "timeout", None)
    assert read_to_end(silent[sent]) == b""


def test_a_body_that_is_too_large_gets_413_by_its_length(limited: Served) -> None:
    wanted = (413, "request_too_large", None)
    assert error_of(exchange(limited, request("POST", COMPLETION, b"x" * 100_001, **KEYS))) == wanted
    waiting = request("POST", COMPLETION, content_length="100001", expect="100-continue", **KEYS)
    assert error_of(exchange(limited, waiting)) == wanted
    endless = request("POST", COMPLETION, content_length="9" * 40, **KEYS)
    assert error_of(exchange(limited, endless)) == (400, "invalid_http", None)


def test_a_body_that_is_too_large_gets_413_in_chunks(limited: Served) -> None:
    parts = (b"x" * 10_000 for _ in range(50))
    found = limited.client.post(COMPLETION, content=parts, headers={"content-type": "application/json"})
    assert error_of((found.status_code, found.json())) == (413, "request_too_large", None)


def test_a_body_nests_only_so_deep(limited: Served) -> None:
    def body(depth: int) -> bytes:
        return b'{"prompt": "a", "stop": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert error_of(post(limited, body(8))) == (400, "invalid_value", "stop.0")
    assert error_of(post(limited, body(9))) == (400, "too_deep", None)
    assert error_of(post(limited, b"[" * 90_000)) == (400, "too_deep", None)
    assert post(limited, {"prompt": '"[[[[[[[[[[[[[[[[' + "\\" * 9, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    ("text", "depth"),
    [("", 0), ("1", 0), ("[]", 1), ('{"a": [1, [2]]}', 3), ('["[[", "\\"[[", []]', 2), ('["[[[', 1), ("]]][", 0)],
)
def test_the_depth_of_json(text: str, depth: int) -> None:
    assert json_depth(text.encode(), 64) == depth


def test_the_depth_of_a_string_without_an_end_takes_one_pass() -> None:
    """Each mark would start a search to the end of the text: 1e12 steps, or hours."""
    assert json_depth(b'"' + rb"\"" * (1 << 20), 64) == 0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"n": 4}, "n"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
        ({"prompt": ["a"] * 6}, "prompt"),
    ],
)
def test_a_count_beyond_its_limit_names_the_field(limited: Served, fields: dict[str, Any], name: str) -> None:
    assert error_of(post(limited, {"prompt": "a", **fields})) == (400, "invalid_value", name)


def test_more_answers_than_run_and_wait_get_429(limited: Served) -> None:
    wait_for(lambda: is_idle(limited))
    long = {"prompt": "a", "n": 3, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with limited.client.stream("POST", COMPLETION, json=long):
        found = limited.client.post(COMPLETION, json={"prompt": "a", "n": 2, "max_tokens": 1})
    assert error_of((found.status_code, found.json())) == (429, "queue_full", None)
    assert int(found.headers["retry-after"]) >= 1
    wait_for(lambda: is_idle(limited))
    assert post(limited, {"prompt": ["a", "b"], "n": 2, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(("fields", "name"), [({"prompt": ["a", "b"], "n": 3}, "n"), ({"prompt": ["a"] * 5}, "prompt")])
def test_more_answers_than_ever_run_and_wait_are_not_asked_to_come_again(
    limited: Served, fields: dict[str, Any], name: str
) -> None:
    status, found = post(limited, fields | {"max_tokens": 1})
    assert error_of((status, found)) == (400, "too_many", name)
    assert found["error"]["message"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer first-key"}, 200),
        ({"authorization": "bearer  second-key "}, 200),
        ({"x_api_key": "second-key"}, 200),
        ({}, 401),
        ({"authorization": "Bearer first-ke"}, 401),
        ({"authorization": "Bearer first-keys"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic first-key"}, 401),
        ({"authorization": "Bearer \udcff\udcfe"}, 401),
        ({"x_api_key": ""}, 401),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json"])
def test_a_key_is_asked_for(limited: Served, path: str, headers: dict[str, str], status: int) -> None:
    with connect(limited) as connection:
        connection.sendall(request("GET", path, **headers))
        found, content = read_response(connection)
    assert found == status
    if status == 401:
        assert error_of((found, json.loads(content))) == (401, "invalid_api_key", None)


def test_the_health_of_a_server_is_no_secret(limited: Served) -> None:
    assert exchange(limited, request("GET", "/health")) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(name, 200) for name in ("localhost:8000", "127.0.0.1", "[::1]:80", "10.1.2.3", "FORGE.example:1")],
        *[(name, 421) for name in ("evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example", "a:b")],
    ],
)
def test_the_host_is_one_of_the_servers_names(limited: Served, host: str, status: int) -> None:
    found = exchange(limited, request("GET", "/health", host=host))
    assert found[0] == status
    if status == 421:
        assert error_of(found) == (421, "wrong_host", None)


def test_pages_of_named_sites_alone_may_call(limited: Served, served: Served) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for server, origin, allowed in (
        (limited, "https://page.example", True),
        (limited, "https://evil.example", False),
        (served, "https://page.example", False),
    ):
        for found in (
            server.client.options(COMPLETION, headers={"origin": origin, **ask}),
            server.client.get("/v1/models", headers={"origin": origin}),
        ):
            assert found.headers.get("access-control-allow-origin") == (origin if allowed else None)


def test_a_client_that_never_reads_loses_its_connection(limited: Served) -> None:
    body = {"prompt": "a", "n": 3, "max_tokens": 400, "ignore_eos": True, "logprobs": 20, "stream": True}
    process = psutil.Process(limited.process.pid)
    with connect(limited, receive_buffer=2048) as connection:
        connection.sendall(request("POST", COMPLETION, body, **KEYS))
        port = connection.getsockname()[1]

        def is_known() -> bool:
            return any(one.raddr and one.raddr.port == port for one in process.net_connections())

        wait_for(is_known)
        wait_for(lambda: not is_known())


def test_log_lines_hold_no_control_characters_and_no_prompts(limited: Served) -> None:
    exchange(limited, request("GET", "/%1b%5b31m%0d%0aforged", **KEYS))
    post(limited, {"prompt": "PROMPT-TEXT", "max_tokens": 2})
    post(limited, {"prompt": "PROMPT-TEXT", "logit_bias": {"PROMPT-TEXT": 1}})
    wait_for(lambda: r"GET /\x1b[31m\r\nforged: status 404" in limited.text())
    assert "\x1b" not in limited.text()
    assert "PROMPT" not in limited.text()
    assert KEY not in limited.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETION, {"prompt": "a", "n": 16, "max_tokens": 500, "ignore_eos": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 500, "ignore_eos": True}),
    ],
)
def test_an_answer_that_takes_too_long_is_a_timeout(hasty: Served, path: str, body: dict[str, Any]) -> None:
    assert_is_late(hasty.client.post(path, json=body))
    streamed = hasty.client.post(path, json=body | {"stream": True})
    assert '"type":"timeout_error"' in streamed.text
    wait_for(lambda: is_idle(hasty))


@pytest.mark.slow
def test_embeddings_that_take_too_long_are_a_timeout(hasty: Served) -> None:
    assert_is_late(hasty.client.post("/v1/embeddings", json={"input": ["a" * 50] * 2000}))
    wait_for(lambda: is_idle(hasty))


def assert_is_late(found: httpx.Response) -> None:
    error = found.json()["error"]
    assert (found.status_code, error["type"]) == (504, "timeout_error")
    assert error["message"] == "the request did not end within 0.01 s"


@pytest.fixture(scope="module")
def hasty(model_path: str) -> Iterator[Served]:
    found = serve(model_path, "--request-seconds", "0.01")
    yield found
    stop(found)
