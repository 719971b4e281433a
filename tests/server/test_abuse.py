"""What hostile and careless clients send: an error names the field, says nothing of the server, and costs little."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError
from raw import connect, exchange, request
from served import Served, wait_for

from forge.server.api.anthropic_schemas import CountBody, MessagesBody
from forge.server.api.chat_completions import ChatBody
from forge.server.api.completions import CompletionBody
from forge.server.api.embeddings import EmbeddingBody
from forge.server.api.responses_schemas import ResponsesBody
from forge.server.api.tokens import DetokenizeBody, TokenizeBody
from forge.server.errors import HTTPError
from forge.server.schemas import Body

USER = [{"role": "user", "content": "a"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "/v1/messages": {"messages": USER, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": USER},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
BODIES = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def message_of(served: Served, path: str, content: bytes) -> tuple[int, str]:
    """The status of an answer, and the message of its error, which begins with the field."""
    found = served.client.post(path, content=content, headers={"content-type": "application/json"})
    if found.status_code == 200:
        return 200, ""
    error = found.json()["error"]
    field = error.get("param")
    is_named = not field or error["message"].startswith(field)
    return found.status_code, error["message"] if is_named else f"{field}: {error['message']}"


BLOCK = [{"role": "user", "content": [{"type": "text", "text": "a", "extra": 1}]}]


@pytest.mark.parametrize(
    ("path", "fields", "start"),
    [
        ("/v1/completions", {"logit_bias": {"": 1}}, "logit_bias must map token ids to numbers, not ''"),
        ("/v1/completions", {"logit_bias": {"1": 1, "01": 2}}, "logit_bias must map token ids to numbers, not '01'"),
        ("/v1/chat/completions", {"response_format": {}}, "response_format None is not supported"),
        ("/v1/chat/completions", {"response_format": {"type": "text", "a": 1}}, "response_format 'text' is not"),
        ("/v1/chat/completions", {"store": 0}, "store: Input should be a valid boolean"),
        ("/v1/chat/completions", {"store": True}, "store is not supported"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: tools is none"),
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 2},
            "max_tokens is the former name of max_completion_tokens",
        ),
        ("/v1/responses", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: messages is none"),
        ("/v1/responses", {"stream_options": {"include_usage": True}}, "stream_options.include_usage: the server does"),
        ("/v1/messages", {"stop_sequences": [""]}, "stop_sequences must be non-empty"),
        ("/v1/messages", {"messages": BLOCK}, "messages.0.content.0.extra: the server does not know this field"),
        ("/v1/messages", {"messages": [{"role": "a", "content": "a"}]}, "messages.0.role: Input"),
        ("/v1/messages", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input"),
        ("/v1/messages", {"stop": "a"}, "stop: the server does not know this field"),
        ("/v1/chat/completions", {"prompt": "a"}, "prompt: the server does not know this field"),
        ("/v1/responses", {"prompt": {"id": "a"}}, "prompt is not supported"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input: 2048 at most, not 2049"),
    ],
)
def test_an_error_begins_with_the_field_as_the_api_has_it(
    served: Served, path: str, fields: dict[str, Any], start: str
) -> None:
    status, message = message_of(served, path, json.dumps(GOOD[path] | fields).encode())
    assert (status, message[: len(start)]) == (400, start)


def test_both_names_of_a_limit_may_say_the_same(served: Served) -> None:
    path = "/v1/chat/completions"
    assert message_of(served, path, json.dumps(GOOD[path] | {"max_completion_tokens": 1}).encode()) == (200, "")


@pytest.mark.parametrize("path", GOOD)
def test_json_is_utf_8(served: Served, path: str) -> None:
    """A byte of a UTF-16 character may equal a quote. A count of brackets would take what follows for a string."""
    text = json.dumps(GOOD[path] | {"model": "\u2261"}, ensure_ascii=False)
    assert message_of(served, path, text.encode()) == (200, "")
    for sent in (text.encode(), json.dumps(GOOD[path] | {"model": "\ud800"}).encode(), b'{"model": NaN}'):
        wanted = (400, "the body may not begin with a byte order mark")
        assert message_of(served, path, b"\xef\xbb\xbf" + sent) == wanted
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1"):
        sent = text.encode(encoding, errors="xmlcharrefreplace").replace(b"&#8801;", b"\xff")
        assert message_of(served, path, sent) == (400, "the body is not JSON in UTF-8")


def test_a_number_of_very_many_digits_is_told(served: Served) -> None:
    sent = b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}"
    assert message_of(served, "/v1/completions", sent) == (
        400,
        "the body cannot be read: a number has thousands of digits",
    )


def num_errors(kind: type[Body], fields: dict[str, Any]) -> int:
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        return error.error_count()
    except HTTPError:
        return 1
    return 0


@pytest.mark.parametrize("path", BODIES)
def test_a_million_wrong_values_are_few_errors(path: str) -> None:
    """An error takes a kilobyte, and all of them took the memory and the event loop for minutes."""
    kind, many = BODIES[path], 1000
    wrong = [
        *([one] * many for one in (None, "a", 1, -1, {}, [], {"type": "text"}, {"type": "message"}, [None] * many))
    ]
    wrong += [[{"role": "user", "content": [one] * many}] for one in (None, {}, {"type": "text"})]
    objects = [dict.fromkeys(map(str, range(many)), one) for one in (None, 1, "a", {})]
    for name in kind.model_fields:
        for value in (*wrong, *objects):
            assert num_errors(kind, GOOD[path] | {name: value}) <= 110, (name, value)
    assert num_errors(kind, GOOD[path] | dict.fromkeys(map(str, range(many)))) == 1


def test_head_is_get_without_a_body(served: Served) -> None:
    for path in ("/", "/health", "/v1/models", "/openapi.json", "/nothing"):
        found, head = served.client.get(path), served.client.head(path)
        assert (head.status_code, head.content) == (found.status_code, b"")
        assert head.headers["content-length"] == str(len(found.content))
    assert served.client.head("/v1/completions").status_code == 405


def test_a_method_without_an_end_is_not_in_the_log(served: Served) -> None:
    status, _ = exchange(served, request("M" * 5000, "/no-such-method"))
    assert status == 404
    wait_for(lambda: "/no-such-method: status 404" in served.text())
    assert max(map(len, served.text().splitlines())) < 500


def test_an_error_of_the_template_does_not_tell_where_the_model_lies(served: Served, model_path: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for path, given in (("/v1/chat/completions", tools), ("/v1/messages", [{"name": "f", "input_schema": {}}])):
        found = served.client.post(path, json=GOOD[path] | {"tools": given})
        assert found.status_code == 400
        assert "tiny: chat template: it ignores tools" in found.text
        assert model_path not in found.text


def test_embeddings_take_more_inputs_than_completions_take_prompts(served: Served) -> None:
    data = served.client.post("/v1/embeddings", json={"input": ["a", "b"] * 40}).json()["data"]
    assert [one["index"] for one in data] == list(range(80))
    assert all(one["embedding"] == data[one["index"] % 2]["embedding"] for one in data)


VALUES = (
    *(
        '""',
        '"x"',
        r'"\ud800"',
        "NaN",
        "1e400",
        "-1",
        "0",
        "1.5",
        str(2**64),
        "1" * 400,
        "true",
        "[]",
        "[null]",
        "[[]]",
    ),
    *('["a", 1]', "[-1]", "{}", '{"": null}', '{"a": 1}', '{"type": "x"}', "[" * 60 + "]" * 60, f'"{"y" * 100_000}"'),
)


@pytest.mark.slow
@pytest.mark.parametrize("path", GOOD)
def test_any_value_of_any_field_is_taken_or_refused_by_name(served: Served, path: str) -> None:
    properties = served.client.get("/openapi.json").json()["components"]["schemas"][BODIES[path].__name__]["properties"]
    for name in (*properties, "no_such_field"):
        rest = json.dumps({key: value for key, value in GOOD[path].items() if key != name})[1:-1]
        for value in VALUES:
            sent = "{" + rest + (", " if rest else "") + f'"{name}": {value}' + "}"
            status, message = message_of(served, path, sent.encode())
            assert status in (200, 400), sent[:200]
            assert status == 200 or name in message or "the prompt" in message, (sent[:200], message)


@pytest.mark.parametrize("head", [b"", b"expect: 100-continue\r\n"])
def test_what_follows_a_refused_body_is_no_request(served: Served, head: bytes) -> None:
    inner = request("GET", "/metrics")
    with connect(served) as connection:
        connection.sendall(
            request("POST", "/v1/completions", inner, host="evil.example").replace(b"\r\n", b"\r\n" + head, 1)
        )
        connection.settimeout(0.3)
        found = b""
        try:
            while part := connection.recv(1 << 16):
                found += part
        except TimeoutError:
            pass
    assert b" 421 " in found
    assert b"forge_num" not in found
