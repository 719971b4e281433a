"""Adapters over HTTP: models of /v1/models that a request's "model" chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_files import random_pairs, write_adapter
from served import serve, stop

import forge


@pytest.mark.slow
def test_a_request_chooses_an_adapter_as_its_model(model_path: str, tmp_path: Path) -> None:
    files = {
        name: write_adapter(tmp_path / f"{name}.gguf", "llama", random_pairs(Path(model_path), seed=seed, size=1.0))
        for seed, name in enumerate(("poet", "clerk"))
    }
    options = [part for name, path in files.items() for part in ("--adapter", f"{name}={path}")]
    served = serve(model_path, *options, "--model-name", "base")
    with forge.load(model_path, device="cpu", adapters=files) as llm:
        wanted = {name: llm.generate("a b", max_tokens=12, adapter=name).text for name in (None, "poet", "clerk")}
        answers = {
            name: llm.chat([{"role": "user", "content": "a b"}], max_tokens=12, adapter=name).text
            for name in (None, "poet", "clerk")
        }
        embedded = llm.embed("a b", adapter="poet")[0].tolist()
    assert len(set(wanted.values())) == len(set(answers.values())) == 3

    def post(path: str, **body: Any) -> Any:
        answer: httpx.Response = served.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    try:
        listed = served.client.get("/v1/models").json()["data"]
        assert [(model["id"], model.get("parent")) for model in listed] == [
            ("base", None),
            ("poet", "base"),
            ("clerk", "base"),
        ]
        assert served.client.get("/v1/models/clerk").json()["id"] == "clerk"
        assert served.client.get("/v1/models/nobody").status_code == 404
        for name, text in wanted.items():
            found = post("/v1/completions", model=name or "gpt-4", prompt="a b", max_tokens=12, temperature=0)
            assert found["choices"][0]["text"] == text
            assert found["model"] == (name or "base")
        for name, text in answers.items():
            messages, model = [{"role": "user", "content": "a b"}], name or "base"
            found = post("/v1/chat/completions", model=model, messages=messages, max_tokens=12, temperature=0)
            assert (found["choices"][0]["message"]["content"], found["model"]) == (text, model)
            found = post("/v1/messages", model=model, messages=messages, max_tokens=12, temperature=0)
            assert (found["content"][0]["text"], found["model"]) == (text, model)
            found = post("/v1/responses", model=model, input="a b", max_output_tokens=12, temperature=0)
            assert (found["output"][0]["content"][0]["text"], found["model"]) == (text, model)
        found = post("/v1/embeddings", model="poet", input="a b")
        assert found["data"][0]["embedding"] == pytest.approx(embedded, abs=1e-6)
        assert found["model"] == "poet"
    finally:
        stop(served)
