"""Completions, embeddings, models and tokens through the official client, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from served import Served

import forge

if TYPE_CHECKING:
    import openai

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def official(served: Served) -> Iterator[openai.OpenAI]:
    import openai  # here: importing it takes seconds, in each process that collects tests

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_completion_has_sixteen_tokens_by_default_and_echoes(official: openai.OpenAI, llm: forge.LLM) -> None:
    wanted = llm.generate("Hello", temperature=0.0, max_tokens=16)
    for given in ({}, {"max_tokens": None}):
        found = official.completions.create(model="any", prompt="Hello", temperature=0, echo=True, extra_body=given)
        assert found.choices[0].text == "Hello" + wanted.text
        assert found.usage
        assert found.usage.completion_tokens == len(wanted.ids)
    ids = [3, 1, 4]
    [choice] = official.completions.create(model="any", prompt=ids, max_tokens=1, echo=True, temperature=0).choices
    assert choice.text == llm.tokenizer.decode(ids) + llm.generate(ids, temperature=0.0, max_tokens=1).text


def test_a_streamed_completion_adds_up(official: openai.OpenAI, llm: forge.LLM) -> None:
    wanted = llm.generate(["a", "b"], temperature=0.0, max_tokens=5, logprobs=1)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "prompt": ["a", "b"], "model": "any"}
    texts = ["", ""]
    for chunk in official.completions.create(**options, stream=True, echo=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["a" + wanted[0].text, "b" + wanted[1].text]
    usage = {"include_usage": True}
    *chunks, last = official.completions.create(**options, stream=True, logprobs=1, stream_options=usage)
    assert last.choices == []
    assert last.usage.completion_tokens == sum(len(one.ids) for one in wanted)
    for index, one in enumerate(wanted):
        choices = [c.choices[0] for c in chunks if c.choices[0].index == index]
        found = [choice.logprobs for choice in choices if choice.logprobs]
        tokens = [token for part in found for token in part.tokens]
        assert tokens == [llm.tokenizer.token_text(id) for id in one.ids]
        assert [x for part in found for x in part.token_logprobs] == [entry.logprob for entry in one.logprobs or ()]
        offsets = [offset for part in found for offset in part.text_offset]
        assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]


def test_a_stop_string_ends_a_chat_answer(official: openai.OpenAI, llm: forge.LLM) -> None:
    sampling = {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.5}
    full = llm.chat(MESSAGES, max_tokens=20, parse_special=False, **sampling).text
    stop = full[3:5]
    create: Any = official.chat.completions.create
    found = create(model="any", messages=MESSAGES, max_completion_tokens=20, stop=stop, **sampling)
    assert found.choices[0].message.content == full[: full.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_a_chat_answer_goes_on_until_the_context_is_full(client: httpx.Client, llm: forge.LLM) -> None:
    prompt = llm.encode_chat(MESSAGES, parse_special=False)
    body = {"messages": MESSAGES, "ignore_eos": True, "temperature": 0}
    found = client.post("/v1/chat/completions", json=body).json()
    assert found["usage"]["completion_tokens"] == llm.context - len(prompt)
    assert found["choices"][0]["finish_reason"] == "length"


def test_usage_tells_how_much_of_a_prompt_the_prefix_cache_had(client: httpx.Client, llm: forge.LLM) -> None:
    prompt = [7, *range(3, 250)]
    first, second = (
        client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()["usage"] for _ in range(2)
    )
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert len(prompt) / 2 < second["prompt_tokens_details"]["cached_tokens"] < len(prompt)
    body = {"input": "x" * 250, "max_output_tokens": 1}
    used = [client.post("/v1/responses", json=body).json()["usage"] for _ in range(2)]
    assert used[0]["input_tokens"] == used[1]["input_tokens"]
    assert used[1]["input_tokens_details"]["cached_tokens"] > used[0]["input_tokens"] / 2


def test_a_developer_is_the_system_for_a_template_that_knows_none(client: httpx.Client) -> None:
    def tokens(role: str) -> list[int]:
        messages = [{"role": role, "content": [{"type": "text", "text": "Be brief."}]}, *MESSAGES]
        return list(client.post("/tokenize", json={"messages": messages}).json()["tokens"])

    assert tokens("developer") == tokens("system") != tokens("user")


def test_a_stream_that_fails_ends_with_an_error(scripted: Served) -> None:
    import openai

    messages: list[Any] = [{"role": "user", "content": "broken"}]
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(model="any", messages=messages, stream=True)
        text = ""
        while text != "So<nan>":
            text += next(chunks).choices[0].delta.content or ""
        with pytest.raises(openai.APIError, match="not finite"):
            list(chunks)
        with pytest.raises(openai.InternalServerError, match="not finite"):
            client.chat.completions.create(model="any", messages=messages)


def test_models_are_listed_and_found_by_name(official: openai.OpenAI) -> None:
    import openai

    [model] = official.models.list().data
    assert official.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        official.models.retrieve("other")


@pytest.mark.parametrize("given", ["Hello", ["Hello", "you"], [1, 2, 3], [[1, 2], [3]]], ids=repr)
def test_embeddings_are_those_of_llm_embed(official: openai.OpenAI, llm: forge.LLM, given: Any) -> None:
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    for pooling in ("mean", "last"):
        wanted = np.concatenate([llm.embed([one], pooling=pooling) for one in prompts])  # each alone, as it is served
        found = official.embeddings.create(model="any", input=given, extra_body={"pooling": pooling})  # as base64
        np.testing.assert_array_equal([one.embedding for one in found.data], wanted)
        np.testing.assert_allclose(np.linalg.norm(wanted, axis=1), 1, rtol=1e-6)
    assert found.usage.prompt_tokens == sum(len(llm.encode_prompt(prompt)) for prompt in prompts)


def test_embeddings_come_as_numbers_or_as_base64(client: httpx.Client, llm: forge.LLM) -> None:
    [wanted] = llm.embed("Hello")
    floats, text = (
        client.post("/v1/embeddings", json={"input": "Hello", **form}).json()["data"][0]["embedding"]
        for form in ({}, {"encoding_format": "base64"})
    )
    np.testing.assert_array_equal(np.array(floats, np.float32), wanted)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), wanted)


def test_tokens_of_a_prompt_and_back(client: httpx.Client, llm: forge.LLM) -> None:
    found = client.post("/tokenize", json={"prompt": "Hello you", "return_token_strs": True}).json()
    assert found["tokens"] == llm.encode_prompt("Hello you")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), llm.context)
    assert found["token_strs"] == [llm.tokenizer.token_text(id) for id in found["tokens"]]
    bare = client.post("/tokenize", json={"prompt": "Hello you", "add_special_tokens": False}).json()["tokens"]
    assert bare == llm.tokenizer.encode("Hello you", add_special=False)
    assert client.post("/detokenize", json={"tokens": bare}).json()["prompt"] == llm.tokenizer.decode(bare)


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.com"}}]}]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"messages": IMAGE}, "messages.0.content.0.type"),
        ("chat/completions", {"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages"),
        ("chat/completions", {"messages": ["x"]}, "messages.0"),
        ("chat/completions", {"audio": {"voice": "x"}}, "audio"),
        ("chat/completions", {"modalities": ["audio"]}, "modalities.0"),
        ("chat/completions", {"stop": ["a", 5]}, "stop.1"),
        ("chat/completions", {"stop": ["a"] * 17}, "stop"),
        ("chat/completions", {"n": 17}, "n"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"logit_bias": {"a": 1}}, "logit_bias"),
        ("chat/completions", {"logit_bias": {"99999": 1}}, "logit_bias"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"echo": True, "logprobs": 0}, "echo"),
        ("completions", {"prompt": ["a"] * 65}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [99999]}, "prompt"),
        ("completions", {"prompt": {"file": "x"}}, "prompt"),
        ("embeddings", {"dimensions": 8}, "dimensions"),
        ("embeddings", {"input": ["a", ""] * 40}, "input"),
        ("embeddings", {"input": [[1], [99999]]}, "input"),
        ("embeddings", {"input": [1] * 5000}, "input"),
        ("completions", {"prompt": [1] * 5000}, "prompt"),
        ("responses", {"input": "long " * 5000}, "input"),
        ("chat/completions", {"messages": [{"role": "user", "content": "long " * 5000}]}, "messages"),
        ("embeddings", {"pooling": "max"}, "pooling"),
        ("embeddings", {"encoding_format": "int8"}, "encoding_format"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_supported_is_refused_with_the_field(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    least: dict[str, Any] = {"chat/completions": {"messages": MESSAGES}, "completions": {"prompt": "a"}}
    least |= {"embeddings": {"input": "a"}, "responses": {}}
    streams = ({}, {"stream": True}) if path != "embeddings" and "stream_options" not in fields else ({},)
    for stream in streams:
        response = client.post(f"/v1/{path}", json=least[path] | fields | stream)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": "a", "messages": MESSAGES}, {"prompt": "a", "tools": []}, {"messages": [], "x": 1}],
    ids=str,
)
def test_tokenize_takes_a_prompt_or_messages(client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.post("/tokenize", json=body).status_code == 400


def test_detokenize_refuses_ids_outside_the_vocabulary(client: httpx.Client) -> None:
    response = client.post("/detokenize", json={"tokens": [99999]})
    assert (response.status_code, "99999" in response.text) == (400, True)


def test_fields_without_effect_may_be_null_or_what_they_are_anyway(client: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 1, "suffix": None, "best_of": 1, "stream_options": None, "user": "me"}
    assert client.post("/v1/completions", json=body).status_code == 200
