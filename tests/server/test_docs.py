"""docs/serving.md is true: its programs run, its table of limits is that of the command, its names exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from served import Served

from forge.cli.options import _SERVING
from forge.server.schemas import WITHOUT_EFFECT
from forge.server.settings import ServerSettings

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_table_of_limits_is_that_of_the_command() -> None:
    table = dict(re.findall(r"^\| `--([a-z-]+)` \| (\S+) \|", TEXT, re.MULTILINE))
    numbers = {
        name: default for name, (_, default) in _SERVING.items() if name.startswith("max_") or name.endswith("_seconds")
    }
    assert table == {name.replace("_", "-"): str(default).lower() for name, default in numbers.items()}
    settings = ServerSettings(model_name="any")
    assert numbers == {name: getattr(settings, name) for name in numbers}


def test_every_field_without_effect_is_named(served: Served) -> None:
    schemas = served.client.get("/openapi.json").json()["components"]["schemas"]
    fields = [field for one in schemas.values() for field in one.get("properties", {}).items()]
    without = {name for name, field in fields if WITHOUT_EFFECT[:-1] in field.get("description", "")}
    assert without >= {"user", "metadata", "id", "strict", "include_obfuscation", "signature"}
    [table] = re.findall(r"^\| field \| why \|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert without <= {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", table)}


def test_every_option_that_is_named_exists() -> None:
    known = subprocess.run([sys.executable, "-m", "forge", "serve", "--help"], capture_output=True, text=True).stdout
    assert all(option in known for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))


def test_every_metric_that_is_named_exists(served: Served) -> None:
    named = set(re.findall(r"`(forge_[a-z_]+)`", TEXT))
    found = served.client.get("/metrics").text
    names = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in re.findall(r"^(forge_\w+)", found, re.M)}
    assert named == names


@pytest.mark.slow
@pytest.mark.parametrize("program", blocks("python"), ids=lambda text: text.split()[1])
def test_the_programs_run(served: Served, program: str) -> None:
    package = program.split()[1]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-c", program.replace(ADDRESS, served.url)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_curl_shows_an_answer(served: Served) -> None:
    [command] = [block for block in blocks("sh") if block.startswith("curl")]
    done = subprocess.run(["bash", "-c", command.replace(ADDRESS, served.url)], capture_output=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_llm_asks_the_server(served: Served, tmp_path: Path, options: tuple[str, ...]) -> None:
    if importlib.util.find_spec("llm") is None:
        pytest.skip("llm is not installed")
    config = blocks("yaml")[0]
    assert yaml.safe_load(config)[0]["model_id"] == "forge"
    (tmp_path / "extra-openai-models.yaml").write_text(config.replace(ADDRESS, served.url))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "llm", "-m", "forge", "Say hi", "-o", "max_tokens", "8", "-o", "temperature", "0"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    body = {"messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 8, "temperature": 0}
    wanted = served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert done.stdout.strip() == wanted.strip()


def test_the_examples_of_configuration_can_be_read() -> None:
    assert all(map(yaml.safe_load, blocks("yaml")))
    assert all(map(json.loads, blocks("json")))
