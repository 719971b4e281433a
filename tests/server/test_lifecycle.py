"""The life of a server: its model loads, clients leave, signals and faults end it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cli_runs import ARCH
from raw import connect, read_to_end, request
from served import Served, engine_of, is_idle, number, serve, start, stop, wait_for

LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 4}
"""It takes a second or more, and is not over before a test has done what it does."""


@pytest.fixture
def own(model_path: str) -> Iterator[Served]:
    """A server that a test may end."""
    found = serve(model_path, "--shutdown-seconds", "4")
    yield found
    stop(found)


def assert_ends_well(served: Served, engine: psutil.Process) -> None:
    """With exit code 0, with its engine, and without a traceback."""
    assert served.process.wait(30) == 0
    wait_for(lambda: not engine.is_running())
    assert "Traceback" not in served.text()


def assert_last_event(served: Served, body: dict[str, Any], before: Callable[[], object] = lambda: None) -> None:
    """A stream that is cut by SIGTERM says so at its end. before: what is done before the signal."""
    with served.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as found:
        lines = (line for line in found.iter_lines() if line)
        next(lines)
        before()
        served.process.send_signal(signal.SIGTERM)
        *_, event, last = lines
    assert last == "data: [DONE]"
    assert '"code":"shutting_down"' in event


def test_metrics_count_what_was_served(served: Served) -> None:
    def numbers() -> dict[str, float]:
        names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
        return {name: number(served, f"forge_{name}") for name in names}

    before = numbers()
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "n": 2, "ignore_eos": True}
    assert served.client.post("/v1/completions", json=body).status_code == 200
    found = numbers()
    assert {name: found[name] - before[name] for name in found} == {
        "prompt_tokens_total": 3,
        "generation_tokens_total": 10,
        "time_to_first_token_seconds_count": 2,
    }
    assert number(served, "forge_kv_cache_pages") > 0
    assert number(served, "forge_num_preemptions_total") == 0
    ids = [count % 250 for count in range(100)]
    hits = number(served, "forge_prefix_cache_hits_total")
    for _ in range(2):
        assert served.client.post("/v1/completions", json={"prompt": ids, "max_tokens": 1}).status_code == 200
    assert 0 < number(served, "forge_prefix_cache_hits_total") - hits < len(ids)
    waited = number(served, "forge_request_queue_time_seconds_sum")
    assert 0 <= waited <= number(served, "forge_time_to_first_token_seconds_sum")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before it is answered", "while it is answered", "behind a second request"])
def test_the_pages_of_a_client_that_leaves_are_free(served: Served, stream: bool, when: str) -> None:
    wait_for(lambda: is_idle(served))
    before = served.text().count("the client left")
    generated = number(served, "forge_generation_tokens_total")
    with connect(served) as connection:
        connection.sendall(request("POST", "/v1/completions", LONG | {"stream": stream}))
        if when == "behind a second request":
            connection.sendall(request("GET", "/health"))
        if when != "before it is answered":
            wait_for(lambda: number(served, "forge_num_requests_running") > 0)
    wait_for(lambda: is_idle(served))
    wait_for(lambda: served.text().count("the client left") > before)
    assert number(served, "forge_generation_tokens_total") - generated < 4 * 500


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with connect(served) as connection:
        sent = [request("POST", "/v1/completions", {"prompt": [count], "max_tokens": count}) for count in (3, 1, 2)]
        connection.sendall(b"".join(sent) + request("GET", "/health", connection="close"))
        found = read_to_end(connection)
    assert re.findall(rb'"prompt_tokens":1,"completion_tokens":(\d)', found) == [b"3", b"1", b"2"]
    assert found.endswith(b'{"status":"ok"}')


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_open_answers_end(own: Served, sent: signal.Signals) -> None:
    with own.client.stream("POST", "/v1/completions", json=LONG | {"n": 1, "max_tokens": 100, "stream": True}) as found:
        own.process.send_signal(sent)
        lines = [line for line in found.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in lines[-2]
    assert own.process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        own.client.get("/health")


@pytest.mark.slow
def test_answers_that_take_too_long_get_a_last_event(model_path: str) -> None:
    own = serve(model_path, "--shutdown-seconds", "0.2")
    engine = engine_of(own)
    try:
        assert_last_event(own, LONG | {"n": 16})
        assert_ends_well(own, engine)
    finally:
        stop(own)


@pytest.mark.slow
def test_an_engine_that_hangs_does_not_hold_up_the_end(model_path: str) -> None:
    own = serve(model_path, "--shutdown-seconds", "2")
    engine = engine_of(own)
    try:
        assert_last_event(own, LONG, engine.suspend)
        assert own.process.wait(60) == 0
        assert not engine.is_running()
        assert "Traceback" not in own.text()
    finally:
        stop(own)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(model_path: str) -> None:
    own = serve(model_path, "--shutdown-seconds", "600")
    engine = engine_of(own)
    try:
        with connect(own) as connection:
            connection.sendall(request("POST", "/v1/completions", content_length="100"))  # of which nothing comes
            own.process.send_signal(signal.SIGINT)
            wait_for(lambda: not accepts(own))
            own.process.send_signal(signal.SIGINT)
            assert_ends_well(own, engine)
    finally:
        stop(own)


def accepts(served: Served) -> bool:
    try:
        connect(served).close()
    except ConnectionError:
        return False
    return True


@pytest.mark.slow
def test_the_engine_ends_with_a_server_that_is_killed(own: Served) -> None:
    engine = engine_of(own)
    with connect(own) as connection:
        connection.sendall(request("POST", "/v1/completions", LONG))
        own.process.kill()
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 10)


@pytest.mark.slow
def test_a_server_whose_engine_is_killed_says_so_and_ends(own: Served) -> None:
    with own.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as found:
        lines = (line for line in found.iter_lines() if line)
        next(lines)
        engine_of(own).kill()
        *_, before, last = lines
    assert last == "data: [DONE]"
    assert "the engine's process has ended by SIGKILL" in before
    assert own.process.wait(60) == 1
    assert own.text().splitlines()[-1] == "forge: the engine's process has ended by SIGKILL: perhaps memory ran out"
    assert "Traceback" not in own.text()


@pytest.mark.slow
def test_while_the_model_loads_a_server_says_so(slow_model: str) -> None:
    own = start(slow_model)
    try:
        wait_for(lambda: port_of(own))
        client = httpx.Client(base_url=f"http://127.0.0.1:{port_of(own)}", timeout=60)
        with client:
            health = client.get("/health")
            assert (health.status_code, health.json()) == (503, {"status": "loading"})
            for path in ("/v1/models", "/metrics"):
                found = client.get(path)
                assert (found.status_code, found.json()["error"]["code"]) == (503, "loading")
                assert int(found.headers["retry-after"]) >= 1
        engine = engine_of(own)
        own.process.send_signal(signal.SIGINT)
        assert_ends_well(own, engine)
    finally:
        stop(own)


@pytest.fixture
def slow_model(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model whose engine takes as long to load as a test wants: its process waits, stopped, from its first import."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'forge.server.engine_process' in sys.orig_argv: os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return model_path


def port_of(served: Served) -> int | None:
    """The port at which a server listens, before it says so."""
    found = [one.laddr.port for one in psutil.Process(served.process.pid).net_connections() if one.status == "LISTEN"]
    return found[0] if found else None


@pytest.mark.slow
def test_a_server_answers_again_when_it_was_killed_and_started_anew(own: Served, model_path: str) -> None:
    _, _, port = own.url.rpartition(":")
    with own.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}):
        own.process.kill()
    own.process.wait()
    again = serve(model_path, "--port", port)
    try:
        assert again.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    finally:
        stop(again)


def fails(*options: str, model: str | Path = ARCH / "llama" / "model.gguf", **environment: str) -> tuple[int, str]:
    """Exit code and the one line of a server that does not start."""
    command = [sys.executable, "-m", "forge", "serve", "-m", str(model), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return done.returncode, line


@pytest.mark.slow
def test_a_port_in_use_is_one_line(served: Served, tmp_path: Path) -> None:
    _, _, port = served.url.rpartition(":")
    missing = tmp_path / "missing.gguf"  # the port is tried first
    assert fails("--port", port, model=missing) == (1, f"forge: 127.0.0.1:{port}: Address already in use")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.gguf", tmp_path / "broken.gguf"
    broken.write_bytes((ARCH / "llama" / "model.gguf").read_bytes()[:-1000])
    whole = ARCH / "llama" / "model.gguf"
    for model, options in ((missing, ()), (broken, ()), (whole, ("--memory-fraction", "1e-9"))):
        command = [sys.executable, "-m", "forge", "generate", "a", "-m", str(model), "--device", "cpu", *options]
        generate = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert fails("--port", "0", *options, model=model) == (generate.returncode, generate.stderr.strip())


@pytest.mark.slow
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "forge.example"])
def test_other_machines_are_let_in_with_a_key_or_by_word_alone(host: str) -> None:
    code, line = fails("--host", host)
    assert code == 2
    assert line.startswith(f"forge: --host {host} lets other machines in")
    assert "--no-auth" in line


@pytest.mark.slow
def test_a_key_comes_from_the_environment(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_API_KEY", "secret-of-test")
    own = serve(model_path, "--host", "0.0.0.0")
    try:
        url = own.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"x-api-key": "secret-of-test"}).status_code == 200
        assert "secret-of-test" not in own.text()
        assert "Bearer KEY" in own.text()
        others = [name for name in (socket.gethostname(),) if name]
        assert all(httpx.get(f"{url}/health", headers={"host": name}).status_code == 200 for name in others)
    finally:
        stop(own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--api-key", ""), "--api-key"),
        (("--api-key", "two words"), "--api-key"),
        (("--header-seconds", "0"), "--header-seconds must be a number above 0, 1000000 at most, not 0.0"),
        (("--send-seconds", "nan"), "--send-seconds"),
        (("--max-n", "0"), "--max-n must be at least 1, not 0"),
        (("--max-queue", "-1"), "--max-queue must be at least 0, not -1"),
        (("--port", "70000"), "--port"),
    ],
)
def test_a_limit_that_no_request_could_keep_is_wrong_usage(options: tuple[str, ...], says: str) -> None:
    code, line = fails(*options)
    assert code == 2
    assert says in line


@pytest.mark.slow
def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('fastapi', 'uvicorn') else find(name, *rest)\n"
    )
    code, line = fails(PYTHONPATH=str(tmp_path))
    assert (code, line) == (1, "forge: forge serve needs packages that are not installed: pip install fastapi uvicorn")
