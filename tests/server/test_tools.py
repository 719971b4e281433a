"""Tools and reasoning over HTTP, with a model that says what it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from parsed import parsed
from scripted import SCRIPTS, TEMPLATE, write_scripted
from served import Served, serve, stop

from forge.loading import load_encoder
from forge.server.engine_client import EngineClient
from forge.server.errors import HTTPError
from forge.server.parts import Part, Plain
from forge.server.settings import ServerSettings
from forge.server.state import Server

MESSAGES = [{"role": "user", "content": "Weather?"}]
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]


def body(say: str, **fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "tools": TOOLS, "chat_template_kwargs": {"say": f"<say:{say}>"}} | fields


def ask(served: Served, say: str, **fields: Any) -> dict[str, Any]:
    response = served.client.post("/v1/chat/completions", json=body(say, **fields))
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice


def deltas(served: Served, say: str, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """The deltas of a streamed answer, and why it ended."""
    response = served.client.post("/v1/chat/completions", json=body(say, stream=True, **fields))
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", response.text
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


def test_calls_reasoning_and_content_are_told_apart(scripted: Served) -> None:
    choice = ask(scripted, "calls")
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "I look."
    assert message["reasoning_content"] == "I should look."
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(id.startswith("call_") for id in ids)
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]


def test_a_stream_has_the_same_parts_in_the_order_in_which_they_come(scripted: Served) -> None:
    found, reason = deltas(scripted, "calls")
    assert reason == "tool_calls"
    assert found[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in found) == "I should look."
    assert "".join(delta.get("content", "") for delta in found) == "I look."
    order = [next(iter(delta)) for delta in found[1:-1]]
    assert order == sorted(order, key=["reasoning_content", "content", "tool_calls"].index)
    calls = [call for delta in found for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"]["name"] for call in calls] == ["get_weather", "now"]
    assert [call["function"]["arguments"] for call in calls] == ['{"city": "Paris"}', "{}"]
    assert len({call["id"] for call in calls}) == 2
    assert found[-1] == {}


def test_reasoning_that_the_prompt_opens(scripted: Served) -> None:
    opened = {"chat_template_kwargs": {"say": "<think>"}}
    message = ask(scripted, "", **opened)["message"]
    assert (message["reasoning_content"], message["content"]) == ("I should look.", "I look.")
    message = ask(scripted, "", max_tokens=2, **opened)["message"]
    assert (message["reasoning_content"], message["content"]) == ("I should", None)


def test_content_is_null_where_there_is_none(scripted: Served) -> None:
    assert ask(scripted, "one")["message"]["content"] is None
    assert ask(scripted, "one", max_tokens=1)["message"]["content"] == "\r"


def test_malformed_call_arrives_as_text(scripted: Served) -> None:
    choice = ask(scripted, "malformed")
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == 'Well: <tool_call>{"name": now}</tool_call>'
    assert "tool_calls" not in choice["message"]


def test_a_call_that_the_length_cuts_is_text(scripted: Served) -> None:
    choice = ask(scripted, "calls", max_tokens=10)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == 'I look.\n\n<tool_call>\n{"name": "get_weather", "argu'


@pytest.mark.parametrize("fields", [{"tools": None}, {"tools": []}, {"tool_choice": "none"}])
def test_without_tools_calls_are_content(scripted: Served, fields: dict[str, Any]) -> None:
    choice = ask(scripted, "one", **fields)
    assert choice["message"]["content"] == "\r" + SCRIPTS["<say:one>"][1]
    assert choice["finish_reason"] == "stop"


def test_calls_behind_the_first_are_left_out_on_request(scripted: Served) -> None:
    assert len(ask(scripted, "calls", parallel_tool_calls=False)["message"]["tool_calls"]) == 1
    found, _ = deltas(scripted, "calls", parallel_tool_calls=False)
    assert sum("tool_calls" in delta for delta in found) == 1


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"tool_choice": "required"}, "tool_choice", "required"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice", "function"),
        ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"tool_choice": [5]}, "tool_choice", "[5]"),
        ({"tool_choice": {}}, "tool_choice", "auto"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function', not 'web_search'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools.0.function.strict", "bool"),
        ({"tools": [{"type": "function", "function": {"name": "f", "url": "x"}}]}, "tools.0.function.url", "know"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "now"),
        ({"functions": []}, "functions", "tools"),
    ],
)
def test_what_is_not_supported_is_refused(scripted: Served, fields: dict[str, Any], param: str, part: str) -> None:
    for stream in (False, True):
        response = scripted.client.post("/v1/chat/completions", json=body("one", stream=stream, **fields))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert part in error["message"]


def test_a_template_without_tools_refuses_them(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": TOOLS})
    assert response.status_code == 400
    message = "tiny: chat template: it ignores tools, so the model would not see them"
    assert (response.json()["error"]["message"], response.json()["error"]["param"]) == (message, "messages")


def server_of(path: Path, template: str, **settings: Any) -> Server:
    """A server whose engine is not started."""
    encoder = load_encoder(write_scripted(path / "model.gguf", template, SCRIPTS, ["<think>", "</think>"]), "scripted")
    return Server(EngineClient(path, {}), encoder, ServerSettings(model_name="scripted", **settings))


def test_tools_of_a_template_whose_calls_have_no_known_form_are_refused(tmp_path: Path) -> None:
    server = server_of(tmp_path, "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert isinstance(server.parser([], [1]), Plain)
    with pytest.raises(HTTPError, match="does not know in which form") as raised:
        server.parser(TOOLS, [1])
    assert (raised.value.status, raised.value.param) == (400, "tools")


def test_messages_of_gpt_oss_are_told_apart(tmp_path: Path) -> None:
    thought, call = "<|channel|>analysis<|message|>", "<|channel|>commentary to=functions.now<|message|>{}"
    template = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}{# " + thought + " #}<|start|>assistant"
    server = server_of(tmp_path, template)
    prompt = server.encoder.encode_chat(MESSAGES, tools=TOOLS, parse_special=False)
    found = parsed(server.parser(TOOLS, prompt), [f"{thought}I look.<|end|><|start|>assistant{call}"])
    assert found == [Part("reasoning", "I look."), Part("tool_call", "{}", 0, "now")]


@pytest.mark.slow
def test_channels_of_gpt_oss_are_reasoning_content_and_calls_over_http(tmp_path: Path) -> None:
    thought, said = "<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>"
    call = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    following = [f"<|end|><|start|>assistant{header}" for header in (said, call)]
    script = [
        thought,
        "I ",
        "think.",
        following[0],
        "I will ",
        "look.",
        following[1],
        '{"city": ',
        '"Paris"}',
        "<|call|>",
    ]
    template = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}{# " + thought + " #}<|start|>assistant"
    controls = [thought, *following, "<|call|>", "<|start|>"]
    served = serve(write_scripted(tmp_path / "model.gguf", template, {"assistant": script}, controls))
    try:
        for stream in (False, True):
            found, reason = deltas(served, "") if stream else ([ask(served, "")["message"]], "tool_calls")
            assert reason == "tool_calls"
            assert "".join(delta.get("reasoning_content", "") for delta in found) == "I think."
            assert "".join(delta.get("content", "") for delta in found) == "I will look."
            [made] = [call["function"] for delta in found for call in delta.get("tool_calls", ())]
            assert made == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    finally:
        stop(served)


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_reasoning_stays_in_the_content_where_the_setting_says_so(tmp_path: Path, tools: list[dict[str, Any]]) -> None:
    text = "<think>\nI think.\n</think>\n\nYes."
    parts = [Part("reasoning", "I think."), Part("content", "Yes.")]
    for reasoning, expected in ((True, parts), (False, [Part("content", text)])):
        server = server_of(tmp_path, TEMPLATE, reasoning=reasoning)
        prompt = server.encoder.encode_chat(MESSAGES, tools=tools, parse_special=False)
        assert parsed(server.parser(tools, prompt), [text]) == expected


@pytest.mark.slow
def test_a_conversation_goes_on_with_the_results_of_calls(scripted: Served) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = list(MESSAGES)

    def answer(say: str) -> Any:
        extra = {"chat_template_kwargs": {"say": f"<say:{say}>"}}
        return client.chat.completions.create(model="any", messages=messages, tools=TOOLS, extra_body=extra)  # type: ignore[call-overload]

    with client:
        first = answer("calls").choices[0].message
        assert [json.loads(call.function.arguments) for call in first.tool_calls] == [{"city": "Paris"}, {}]
        messages.append(first)
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "20"} for call in first.tool_calls]
        assert answer("answer").choices[0].message.content == "It is 20 °C."
