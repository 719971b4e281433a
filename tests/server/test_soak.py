"""A minute of scripts/soak.py; ten are run by hand. And what it says of a server that fails."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from served import wait_for

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_minute_of_clients_that_leave_and_err_fails_nothing_and_leaves_memory_as_it_is(model_path: str) -> None:
    command = [sys.executable, str(SCRIPT), model_path, "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all is well\n")


def test_clients_of_a_server_that_is_gone_end_and_say_so(soak: ModuleType) -> None:
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))  # it does not listen
        port = gone.getsockname()[1]
        found, growth = asyncio.run(soak.run(port, psutil.Process(), 5.0, 3))
        assert not asyncio.run(soak.is_idle(port))
    assert len(found.problems) == 3
    assert all("ConnectionRefusedError" in problem for problem in found.problems)
    assert growth is None


def test_the_memory_of_a_server_is_told_while_children_of_it_end(soak: ModuleType) -> None:
    with subprocess.Popen(["true"]) as child:
        process = psutil.Process(child.pid)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert len(soak.memory(psutil.Process())) == 1


def test_a_server_that_does_not_end_is_killed(soak: ModuleType) -> None:
    deaf = ["bash", "-c", "trap '' TERM; echo; read"]
    with subprocess.Popen(deaf, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        server.stdout.readline()
        assert soak.end(server, 0.05) == -signal.SIGKILL


@pytest.mark.slow
def test_why_a_server_does_not_start_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "none.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    first, second = done.stderr.splitlines()
    assert first == "the server has ended with 1:"
    assert "none.gguf" in second


@pytest.mark.slow
def test_a_server_that_dies_leaves_a_report(model_path: str) -> None:
    command = [sys.executable, str(SCRIPT), model_path, "--seconds", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        process = psutil.Process(script.pid)
        wait_for(lambda: any(one.status == "ESTABLISHED" for one in process.net_connections()))
        [server] = process.children()
        server.kill()
        said, faults = script.communicate(timeout=200)
    assert script.returncode == 1
    assert faults == ""
    assert "answers are wrong" in said
    assert said.endswith("the server ended with -9\n")
