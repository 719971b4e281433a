"""/v1/chat/completions and /v1/completions give what `LLM` gives."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

import forge

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
SAMPLING = {"temperature": 0.8, "seed": 7, "top_p": 0.9, "presence_penalty": 0.5, "logit_bias": {"17": 2.0}}


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events up to [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def expected(llm: forge.LLM, prompt: Any, **overrides: Any) -> list[forge.Completion]:
    sampling = SAMPLING | {"logit_bias": {17: 2.0}} | overrides
    found = llm.generate(prompt, forge.SamplingParams(**sampling))
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_answer_is_the_one_of_llm_chat(client: httpx.Client, llm: forge.LLM, n: int) -> None:
    ids = llm.encode_chat(MESSAGES, parse_special=False)
    wanted = expected(llm, ids, n=n, max_tokens=9)
    body = {"messages": MESSAGES, "max_tokens": 9, "n": n, **SAMPLING}
    found = client.post("/v1/chat/completions", json=body).json()
    assert [c["message"]["content"] for c in found["choices"]] == [c.text for c in wanted]
    assert [c["finish_reason"] for c in found["choices"]] == [c.finish_reason for c in wanted]
    total = sum(len(c.ids) for c in wanted)
    cached = found["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= cached < len(ids)
    assert found["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": total,
        "total_tokens": len(ids) + total,
    }
    streamed = events(
        client.post("/v1/chat/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert streamed[-1]["usage"] | found["usage"] == streamed[-1]["usage"]
    for choice in range(n):
        mine = [e["choices"][0] for e in streamed[:-1] if e["choices"][0]["index"] == choice]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == wanted[choice].text
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [wanted[choice].finish_reason]


@pytest.mark.parametrize("prompt", ["Hello", [1, 2, 3], ["a", "b"], [[1], [2, 3]]], ids=repr)
def test_a_text_completion_is_the_one_of_llm_generate(client: httpx.Client, llm: forge.LLM, prompt: Any) -> None:
    wanted = expected(llm, prompt, n=2, max_tokens=6)
    body = {"prompt": prompt, "max_tokens": 6, "n": 2, **SAMPLING}
    found = client.post("/v1/completions", json=body).json()
    assert [c["text"] for c in found["choices"]] == [c.text for c in wanted]
    assert [c["index"] for c in found["choices"]] == list(range(len(wanted)))
    streamed = events(client.post("/v1/completions", json=body | {"stream": True}))
    for choice, one in enumerate(wanted):
        texts = [e["choices"][0]["text"] for e in streamed if e["choices"][0]["index"] == choice]
        assert "".join(texts) == one.text


def test_log_probabilities_are_those_of_llm(client: httpx.Client, llm: forge.LLM) -> None:
    ids = llm.encode_chat(MESSAGES, parse_special=False)
    [wanted] = expected(llm, ids, max_tokens=4, logprobs=2)
    body = {"messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, **SAMPLING}
    [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert wanted.logprobs
    for found, one in zip(choice["logprobs"]["content"], wanted.logprobs, strict=True):
        assert found["token"] == llm.tokenizer.token_text(one.id)
        assert found["logprob"] == one.logprob
        assert [top["logprob"] for top in found["top_logprobs"]] == [logprob for _, logprob in one.top]
