"""/v1/responses through the official client, with a model that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served

import forge

TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "function", "name": "now"},
]
CALLS = [
    ("reasoning", "I should look."),
    ("message", "I look."),
    ("function_call", ("get_weather", '{"city": "Paris"}')),
    ("function_call", ("now", "{}")),
]


@pytest.fixture(scope="module")
def client(scripted: Served) -> Iterator[Any]:
    import openai  # here: importing it takes seconds, in each process that collects tests

    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def items(response: Any) -> list[tuple[str, Any]]:
    """Type and content of each item."""
    return [
        (item.type, (item.name, item.arguments) if item.type == "function_call" else item.content[0].text)
        for item in response.output
    ]


def test_reasoning_text_and_calls_are_items(client: Any) -> None:
    response = client.responses.create(model="any", input="calls", tools=TOOLS)
    assert items(response) == CALLS
    assert (response.status, response.output_text, response.error) == ("completed", "I look.", None)
    used = response.usage
    assert used.total_tokens == used.input_tokens + used.output_tokens
    assert 0 < used.output_tokens_details.reasoning_tokens < used.output_tokens
    assert len({item.id for item in response.output}) == 4


def test_a_stream_adds_up_to_the_whole_answer(client: Any) -> None:
    whole = client.responses.create(model="any", input="calls", tools=TOOLS)
    with client.responses.stream(model="any", input="calls", tools=TOOLS) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert items(response) == CALLS
    assert response.usage.total_tokens == whole.usage.total_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "I look."
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought == "I should look."


def test_events_have_the_published_names_and_order(client: Any) -> None:
    events = list(client.responses.create(model="any", input="answer", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for place, kind in enumerate(kinds) if kinds[place - 1 : place] != [kind]] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    assert events[-1].response.output_text == events[-4].text == "It is 20 °C."
    assert events[2].item.id == events[4].item_id == events[-1].response.output[0].id


def test_a_conversation_goes_on_with_the_results_of_calls(client: Any) -> None:
    first = client.responses.create(model="any", input="calls", tools=TOOLS)
    given: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "calls"}]}, *first.output]
    given += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "answer"}
        for item in first.output
        if item.type == "function_call"
    ]
    response = client.responses.create(model="any", input=given, tools=TOOLS, instructions="Be brief.")
    assert items(response) == [("message", "It is 20 °C.")]


def test_an_answer_that_is_cut_is_incomplete(client: Any) -> None:
    response = client.responses.create(model="any", input="answer", max_output_tokens=1)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output[0].status, response.output_text) == ("incomplete", "It is ")
    last = list(client.responses.create(model="any", input="answer", max_output_tokens=1, stream=True))[-1]
    assert last.type == "response.incomplete"


def test_a_stream_that_fails_ends_with_an_event_that_says_so(client: Any) -> None:
    import openai

    events = list(client.responses.create(model="any", input="broken", stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "So<nan>"
    assert events[-1].type == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.code) == ("failed", "server_error")
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.responses.create(model="any", input="broken")


def test_an_answer_is_the_one_of_llm_chat(served: Served, llm: forge.LLM) -> None:
    given = [
        {"role": "developer", "content": "Short."},
        {"role": "user", "content": "Hello"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi", "annotations": []}]},
        {"role": "user", "content": "Go on"},
    ]
    body = {"input": given, "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.8, "seed": 3}
    found = served.client.post("/v1/responses", json=body | {"store": False, "metadata": {"a": "b"}}).json()
    roles, texts = ["system", "user", "assistant", "user"], ["Be brief.\nShort.", "Hello", "Hi", "Go on"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    wanted = llm.chat(messages, temperature=0.8, seed=3, max_tokens=9, parse_special=False)
    assert "".join(part["text"] for item in found["output"] for part in item["content"]) == wanted.text
    assert found["usage"]["input_tokens"] == len(wanted.prompt_ids)
    assert found["metadata"] == {"a": "b"}


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "http://example.com"}]}


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "whole conversation"),
        ({"store": True}, "store", "keeps no answers"),
        ({"background": True}, "background", "client leaves"),
        ({"input": []}, "input", "empty"),
        ({"input": [IMAGE]}, "input.0.content.0.type", "input_text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "item_reference"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type", "text"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"top_k": -1}, "top_k", "greater"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(scripted: Served, fields: dict[str, Any], param: str, part: str) -> None:
    for stream in (False, True):
        response = scripted.client.post("/v1/responses", json={"input": "answer", "stream": stream} | fields)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), json.dumps(error)
        assert part in error["message"]
