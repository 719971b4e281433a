"""Files of the Hub: a real child process against a loopback Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_servers import BODY, ROOT, Server

slow = pytest.mark.slow
OTHER = b"GGUF" + BODY[:3:-1]
HUB_CHILD = """
import json, sys, time
from forge import hub
from forge.errors import ForgeError
time.sleep = lambda seconds: None  # huggingface_hub waits up to 23 s between its retries
for spec in sys.argv[1:]:
    calls = []
    try:
        result = str(hub.resolve(spec, progress=lambda *a: calls.append(a), download=not spec.endswith("local.gguf")))
    except ForgeError as error:
        result = f"{type(error).__name__}: {error}"
    print(json.dumps([result, calls]))
"""


def ask_hub(endpoint: str, home: Path, *specs: str, **env: str) -> tuple[list[tuple[str, list[Any]]], str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "_proxy" not in key.lower()
    }
    settings = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB_CHILD, *specs],
        env=kept | settings | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.slow
def test_a_file_of_the_hub_is_fetched_with_its_name(server: Server, tmp_path: Path) -> None:
    base = "/good/repo/resolve"
    server.pages[f"{base}/main/model.gguf"] = BODY
    server.pages[f"{base}/main/deep/er/model.gguf"] = OTHER
    server.pages[f"{base}/v1.0/model.gguf"] = BODY[:-1]
    shards = [f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    server.pages |= {f"{base}/main/{name}": b"GGUF" + name.encode() for name in shards}
    names = ["model.gguf", "deep/er/model.gguf", shards[1]]
    results, stderr = ask_hub(server.url, tmp_path, *(f"hf:good/repo/{name}" for name in names))
    assert stderr == ""
    assert [Path(path).read_bytes() for path, _ in results] == [BODY, OTHER, b"GGUF" + shards[0].encode()]
    folder = Path(results[2][0]).parent
    assert sorted(path.name for path in folder.glob("m-*")) == shards
    assert results[0][1][0] == ["asking the Hub for model.gguf", 0, None]
    if calls := results[0][1][1:]:  # huggingface_hub from 1.0 on tells its progress
        done = [n for _, n, _ in calls]
        assert {(stage, total) for stage, _, total in calls} == {("downloading model.gguf", len(BODY))}
        assert done == sorted(done)
        assert done[-1] == len(BODY)
    ((pinned, _),) = ask_hub(server.url, tmp_path / "other", "hf:good/repo@v1.0/model.gguf")[0]
    assert Path(pinned).read_bytes() == BODY[:-1]
    ((again, _),) = ask_hub("http://127.0.0.1:9", tmp_path, "hf:good/repo/model.gguf", HF_HUB_OFFLINE="1")[0]
    assert again == results[0][0]


@slow
def test_a_hub_download_that_breaks(server: Server, tmp_path: Path) -> None:
    page = "/good/repo/resolve/main/model.gguf"
    server.pages[page] = BODY
    server.faults[page] = "flaky"
    results, stderr = ask_hub(server.url, tmp_path, *["hf:good/repo/model.gguf"] * 2)
    (first, _), (second, _) = (
        results  # huggingface_hub from 2.0 on mends it itself, an older one leaves it to a second call
    )
    assert first == second or re.fullmatch(r"DownloadError: hf:good/repo/model.gguf: .*check the network.*", first)
    assert Path(second).read_bytes() == BODY
    assert server.requests[f"GET {page}"] == 2
    assert stderr == ""


@slow
def test_a_refusal_of_the_hub_is_explained(server: Server, tmp_path: Path) -> None:
    pages = {"gated": "403", "broken": "500"}
    for name, fault in pages.items():
        server.pages[f"/good/repo/resolve/main/{name}.gguf"] = BODY
        server.faults[f"/good/repo/resolve/main/{name}.gguf"] = fault
    expected = {
        "hf:good/repo/missing.gguf": "the repository has no file 'missing.gguf': check the name",
        "hf:no/repo/model.gguf": "there is no such repository, or it is private: check the name or set HF_TOKEN",
        "hf:good/repo/gated.gguf": "the repository is gated: accept its terms on the Hub and set HF_TOKEN",
        "hf:good/repo/broken.gguf": f"cannot get it from {server.url} \\(.*500.*\\): check the network and HF_ENDPOINT",
        "hf:good/repo/local.gguf": "it is not in the Hugging Face cache: run `forge pull` first",
        "hf:-/--/model.gguf": "Repo id must",
    }
    results, stderr = ask_hub(server.url, tmp_path, *expected)
    for (spec, reason), (got, _) in zip(expected.items(), results, strict=True):
        assert re.fullmatch(f"DownloadError: {spec}: {reason}.*", got)
    assert stderr == ""


@slow
@pytest.mark.parametrize(
    ("endpoint", "env", "reason"),
    [
        ("http://127.0.0.1:9", {}, r"cannot get it from http://127\.0\.0\.1:9 \(.*refused.*\): check the network"),
        ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it or pass a path"),
        ("", {"HF_HOME": "/proc/forge"}, "cannot be used .*set HF_HOME to a writable directory"),
    ],
    ids=["nobody there", "offline", "unwritable"],
)
def test_a_hub_that_cannot_be_reached_is_a_download_error(
    server: Server, tmp_path: Path, endpoint: str, env: dict[str, str], reason: str
) -> None:
    server.pages["/good/repo/resolve/main/model.gguf"] = BODY
    ((result, _),), stderr = ask_hub(endpoint or server.url, tmp_path, "hf:good/repo/model.gguf", **env)
    assert re.fullmatch(f"DownloadError: hf:good/repo/model.gguf: .*{reason}.*", result)
    assert stderr == ""
