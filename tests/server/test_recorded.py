"""What tools send is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recorded import MESSAGES, TOOLS
from served import Served

from forge.server.api.anthropic_schemas import MessagesBody
from forge.server.api.chat_completions import ChatBody
from forge.server.api.responses_schemas import ResponsesBody
from forge.tokenizer.chat import ChatTemplate

GEMMA = Path(__file__).parents[1] / "data" / "chat" / "gemma.jinja"

HEADERS = {"anthropic-beta": "claude-code-20250219,context-management-2025-06-27", "anthropic-version": "2023-06-01"}
SAID = {"answer": "It is 20 °C.", "calls": "I look."}


def texts(found: Any) -> list[str]:
    """The texts of an answer or of an event, wherever they lie in it, but not those of reasoning."""
    if isinstance(found, list):
        return [text for one in found for text in texts(one)]
    if not isinstance(found, dict) or "reasoning" in str(found.get("type")):
        return []
    mine = [found[name] for name in ("content", "text") if isinstance(found.get(name), str)]
    return mine + [text for one in found.values() for text in texts(one)]


@pytest.mark.parametrize("name", TOOLS)
def test_a_tools_request_is_answered(scripted: Served, name: str) -> None:
    path, body = TOOLS[name]
    response = scripted.client.post(path, json={"model": "any"} | body, headers=HEADERS)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        found = [response.json()]
    else:
        data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        found = [json.loads(line) for line in data if line != "[DONE]"]
    asked = json.dumps(body.get("messages") or body["input"])
    said = SAID["answer" if '"answer"' in asked else "calls"]
    assert said in "".join(texts(found)), response.text


def test_a_system_message_amid_others_is_the_users_and_a_note_for_billing_is_left_out() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "Bash", "arguments": '{"city": "Paris"}'}}
    reminder = "<system-reminder>The date.</system-reminder>"
    assert MessagesBody.model_validate(MESSAGES["Claude Code 2.1"]).conversation() == [
        {"role": "system", "content": [{"type": "text", "text": "Act."}]},
        {"role": "user", "content": parts(reminder, "calls\nAgents.")},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "reasoning_content": "I should look.",
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "answer"},
    ]


def conversation(messages: list[tuple[str, Any]], **fields: Any) -> list[tuple[str, Any]]:
    """Role and content of each message that a template gets; parts of text as a list of texts."""
    given = [{"role": role, "content": content} for role, content in messages]
    body = MessagesBody.model_validate({"max_tokens": 1, "messages": given} | fields)
    found = [(one["role"], one["content"]) for one in body.conversation()]
    return [(role, [p["text"] for p in content] if isinstance(content, list) else content) for role, content in found]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "r"}


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([("user", "a"), ("system", "b"), ("user", "c")], [("user", ["a\nb\nc"])]),
        (
            [("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d"), ("user", parts("e", "f"))],
            [("user", "a"), ("assistant", "b"), ("user", ["c\nd\ne", "f"])],
        ),
        ([("system", "a"), ("user", []), ("system", []), ("user", "")], [("user", ["a"])]),
        ([("user", "")], [("user", "")]),
        (
            [("user", [*parts("a"), RESULT, *parts("b")]), ("system", parts("c")), ("user", [RESULT])],
            [("user", ["a"]), ("tool", "r"), ("user", ["b\nc"]), ("tool", "r")],
        ),
        ([("user", parts("a", "b")), ("user", parts("c", "d"))], [("user", ["a", "b\nc", "d"])]),
        ([("assistant", "a"), ("assistant", "b")], [("assistant", "a"), ("assistant", "b")]),
    ],
)
def test_messages_of_the_user_in_a_row_are_one(messages: list[tuple[str, Any]], wanted: list[tuple[str, Any]]) -> None:
    assert conversation(messages) == wanted


def test_a_template_whose_roles_must_alternate_takes_a_system_message_amid_others() -> None:
    template = ChatTemplate.from_file(GEMMA, special_tokens={"bos_token": ""})
    given = [("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in given]
    body = MessagesBody.model_validate({"max_tokens": 1, "messages": messages})
    turns = [("user", "a"), ("model", "b"), ("user", "c\nd")]
    wanted = "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in turns)
    assert template.render(body.conversation(), add_generation_prompt=False) == wanted


NOTE = "x-anthropic-billing-header: cc_version=2.1.197.123;"


@pytest.mark.parametrize(
    ("system", "wanted"),
    [
        (NOTE, []),
        (f"{NOTE}\nAct.\n{NOTE}", [("system", f"Act.\n{NOTE}")]),
        (f"Act.\n{NOTE}", [("system", f"Act.\n{NOTE}")]),
        (parts(NOTE), []),
        (parts(NOTE, "Act."), [("system", ["Act."])]),
        (parts(f"{NOTE}\n\nAct.", "Now."), [("system", ["\nAct.", "Now."])]),
    ],
)
def test_of_a_note_for_billing_the_line_alone_is_left_out(system: Any, wanted: list[tuple[str, Any]]) -> None:
    assert conversation([("user", "a")], system=system) == [*wanted, ("user", "a")]


@pytest.mark.parametrize(
    ("content", "is_error", "wanted"),
    [
        ("r", True, "Error: r"),
        ("r", False, "r"),
        (None, True, "Error: "),
        ([], True, ["Error: "]),
        (parts("r", "s"), True, ["Error: r", "s"]),
        (parts("r", "s"), None, ["r", "s"]),
    ],
)
def test_a_model_sees_that_a_result_is_an_error(content: Any, is_error: bool | None, wanted: Any) -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": content, "is_error": is_error}
    assert conversation([("user", [result])]) == [("tool", wanted)]


@pytest.mark.parametrize(
    ("effort", "wanted"),
    [
        (None, {}),
        ("high", {"reasoning_effort": "high"}),
        ("none", {"reasoning_effort": "none", "enable_thinking": False}),
    ],
)
def test_an_effort_is_a_variable_of_the_template(effort: str | None, wanted: dict[str, Any]) -> None:
    given = {"messages": [{"role": "user", "content": "a"}]}
    chat = ChatBody.model_validate(given | {"reasoning_effort": effort})
    assert chat.template_variables() == wanted
    responses = ResponsesBody.model_validate({"input": "a", "reasoning": {"effort": effort}})
    assert responses.template_variables() == wanted
    messages = MessagesBody.model_validate(given | {"max_tokens": 1, "output_config": {"effort": effort}})
    assert messages.template_variables() == wanted


def test_variables_that_a_request_names_win_over_its_effort() -> None:
    kwargs = {"reasoning_effort": "deep", "other": 1}
    messages = [{"role": "user", "content": "a"}]
    body = ChatBody.model_validate({"messages": messages, "reasoning_effort": "none", "chat_template_kwargs": kwargs})
    assert body.template_variables() == {"enable_thinking": False, **kwargs}
    thinking = MessagesBody.model_validate(
        {"messages": messages, "max_tokens": 1, "output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}
    )
    assert thinking.template_variables() == {"reasoning_effort": "low", "enable_thinking": True}


@pytest.mark.slow
def test_anthropics_tool_runner_goes_on_without_a_thread(scripted: Served) -> None:
    import anthropic  # here: importing it takes seconds, in each process that collects tests

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather."""
        return f"answer{city[:0]}"

    @anthropic.beta_tool
    def now() -> str:
        """Time."""
        return "answer"

    messages: list[Any] = [{"role": "user", "content": "calls"}]
    with anthropic.Anthropic(base_url=scripted.url, api_key="none", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(
            model="any", max_tokens=50, tools=[get_weather, now], messages=messages
        )
        [block] = runner.until_done().content
    assert block.type == "text"
    assert block.text == SAID["answer"]


def test_changes_of_the_conversation_that_are_not_made_are_told(scripted: Served) -> None:
    body = MESSAGES["Claude Code 2.1"] | {"stream": False}
    found = scripted.client.post("/v1/messages", json=body).json()
    assert found["context_management"] == {"applied_edits": []}
    del body["context_management"]
    assert "context_management" not in scripted.client.post("/v1/messages", json=body).json()


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_head_is_answered_as_a_get_without_its_body(scripted: Served, path: str) -> None:
    found, wanted = scripted.client.head(path), scripted.client.get(path)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-length"] == wanted.headers["content-length"]
