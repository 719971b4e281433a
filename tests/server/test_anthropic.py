"""/v1/messages through the official client, with a model that says what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import Served

import forge

TOOLS = [
    {
        "name": "get_weather",
        "description": "Weather.",
        "input_schema": {"type": "object", "properties": {}},
        "cache_control": {"type": "ephemeral"},
    },
    {"type": "custom", "name": "now", "input_schema": {"type": "object"}},
]
CALLS = [
    ("thinking", "I should look."),
    ("text", "I look."),
    ("tool_use", ("get_weather", {"city": "Paris"})),
    ("tool_use", ("now", {})),
]


@pytest.fixture(scope="module")
def client(scripted: Served) -> Iterator[Any]:
    import anthropic  # here: importing it takes seconds, in each process that collects tests

    with anthropic.Anthropic(base_url=scripted.url, api_key="none", max_retries=0) as found:
        yield found


def asked(say: str, **fields: Any) -> dict[str, Any]:
    return {"model": "any", "max_tokens": 99, "messages": [{"role": "user", "content": say}], "tools": TOOLS} | fields


def blocks(message: Any) -> list[tuple[str, Any]]:
    """Type and content of each block."""
    found = {"thinking": lambda b: b.thinking, "text": lambda b: b.text, "tool_use": lambda b: (b.name, b.input)}
    return [(block.type, found[block.type](block)) for block in message.content]


def read(usage: Any) -> tuple[int, int]:
    """Tokens of the prompt, those of the prefix cache included, and of the answer."""
    return usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens


def test_a_message_as_json_has_blocks_and_goes_on_with_the_results_of_calls(scripted: Served) -> None:
    """As the tests below, without the client, which takes seconds to import."""
    message = scripted.client.post("/v1/messages", json=asked("calls")).json()
    own = [
        {"type": "thinking", "thinking": "I should look."},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "name": "now", "input": {}},
    ]
    assert [{key: block[key] for key in wanted} for block, wanted in zip(message["content"], own, strict=True)] == own
    assert (message["type"], message["role"], message["stop_reason"]) == ("message", "assistant", "tool_use")
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "answer"}
        for block in message["content"]
        if block["type"] == "tool_use"
    ]
    messages = [
        {"role": "user", "content": "calls"},
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": results},
    ]
    message = scripted.client.post("/v1/messages", json=asked("", messages=messages)).json()
    assert [(block["type"], block["text"]) for block in message["content"]] == [("text", "It is 20 °C.")]
    assert message["stop_reason"] == "end_turn"


@pytest.mark.slow
def test_thoughts_text_and_calls_are_blocks(client: Any) -> None:
    message = client.messages.create(**asked("calls"))
    assert blocks(message) == CALLS
    assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "tool_use")
    assert message.stop_sequence is None


@pytest.mark.slow
def test_a_stream_adds_up_to_the_whole_message(client: Any) -> None:
    whole = client.messages.create(**asked("calls"))
    with client.messages.stream(**asked("calls")) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert blocks(message) == CALLS
    assert (message.stop_reason, read(message.usage)) == (whole.stop_reason, read(whole.usage))
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(CALLS)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_events_have_the_published_names_and_order(scripted: Served) -> None:
    body = asked("calls", stream=True, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    lines = scripted.client.post("/v1/messages", json=body).text.splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    unique = [kind for place, kind in enumerate(kinds) if kinds[place - 1 : place] != [kind]]
    assert unique == ["message_start", *3 * block, "message_delta", "message_stop"]


@pytest.mark.slow
def test_a_conversation_goes_on_with_the_results_of_calls(client: Any) -> None:
    first = client.messages.create(**asked("calls"))
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "answer"}]}
        for block in first.content
        if block.type == "tool_use"
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "calls"}]},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    message = client.messages.create(**asked("", messages=messages, system=[{"type": "text", "text": "Be brief."}]))
    assert blocks(message) == [("text", "It is 20 °C.")]
    assert message.stop_reason == "end_turn"


@pytest.mark.slow
def test_the_end_of_an_answer_is_named(client: Any) -> None:
    stopped = client.messages.create(**asked("answer", stop_sequences=["nothing", "20"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "20")
    assert blocks(stopped) == [("text", "It is ")]
    cut = client.messages.create(**asked("answer", max_tokens=1))
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 1)
    with client.messages.stream(**asked("answer", stop_sequences=["20"])) as stream:
        message = stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "20")


@pytest.mark.slow
def test_a_stream_that_fails_ends_with_an_error_event(client: Any) -> None:
    import anthropic

    with client.messages.stream(**asked("broken")) as stream, pytest.raises(anthropic.APIStatusError) as raised:
        stream.until_done()
    assert "not finite" in str(raised.value)
    assert stream.current_message_snapshot.content[0].text == "So<nan>"
    assert stream.current_message_snapshot.stop_reason is None
    with pytest.raises(anthropic.InternalServerError, match="not finite"):
        client.messages.create(**asked("broken"))


@pytest.mark.slow
def test_tokens_are_counted_as_the_answer_counts_them(client: Any) -> None:
    fields = asked("answer")
    used = client.messages.create(**fields).usage
    del fields["max_tokens"]
    assert client.messages.count_tokens(**fields).input_tokens == read(used)[0]


def test_an_answer_is_the_one_of_llm_chat(served: Served, llm: forge.LLM) -> None:
    """Sampling, the system's text, and a last message of the assistant that goes on."""
    messages = [{"role": "user", "content": "Hello"}]
    for last in ([], [{"role": "assistant", "content": "So"}]):
        found = served.client.post(
            "/v1/messages",
            json={"model": "any", "max_tokens": 9, "system": "Be brief.", "messages": messages + last}
            | {"temperature": 0.8, "top_k": 20, "seed": 3, "metadata": {"user_id": "x"}},
        ).json()
        conversation = [{"role": "system", "content": "Be brief."}, *messages, *last]
        wanted = llm.chat(
            conversation,
            **{"temperature": 0.8, "top_k": 20, "seed": 3, "max_tokens": 9},
            continue_final_message=bool(last),
            parse_special=False,
        )
        assert "".join(block["text"] for block in found["content"]) == wanted.text
        used = found["usage"]
        assert used["input_tokens"] + used["cache_read_input_tokens"] == len(wanted.prompt_ids)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://example.com"}}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"max_tokens": None}, ["max_tokens"]),
        ({"max_tokens": 0}, ["max_tokens"]),
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, ["messages.0.content.0", "image"]),
        ({"messages": [{"role": "tool", "content": "x"}]}, ["messages.0.role"]),
        (
            {"messages": [{"role": "system", "content": [{"type": "thinking", "thinking": "x"}]}]},
            ["0: a system message"],
        ),
        ({"thread": {"type": "create"}}, ["thread: the server keeps no conversations"]),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, ["user's"]),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, ["tools.0.type", "not 'web_se"]),
        ({"tool_choice": {"type": "any"}}, ["tool_choice", "any"]),
        ({"output_config": {"format": {}}}, ["output_config.format"]),
        ({"stop_sequences": ["a"] * 17}, ["stop_sequences", "16"]),
        ({"thoughts": True}, ["thoughts: the server does not know"]),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_in_the_form_of_the_api(
    scripted: Served, fields: dict[str, Any], parts: list[str]
) -> None:
    response = scripted.client.post("/v1/messages", json=asked("answer") | fields)
    assert response.status_code == 400
    found = response.json()
    assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
    for part in parts:
        assert part in found["error"]["message"]


@pytest.mark.slow
def test_errors_before_a_stream_begins_have_a_status(client: Any, served: Served) -> None:
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        client.messages.create(**asked("answer", tool_choice={"type": "any"}))
    long = {"model": "any", "max_tokens": 5, "messages": [{"role": "user", "content": "long " * 5000}]}
    response: httpx.Response = served.client.post("/v1/messages", json=long | {"stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
