"""Requests as tools send them, recorded from the tool itself (with its version) or written after its source.

Cursor's source is not public: its request is a guess.

Texts and tools are shortened, fields are not: what a server does not know, it refuses.
"""

from __future__ import annotations

from typing import Any

_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_EPHEMERAL = {"type": "ephemeral"}


def _tools(*names: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": _SCHEMA} | fields} for name in names]


def _response_tools(*names: str, strict: bool) -> list[dict[str, Any]]:
    return [{"type": "function", "name": name, "strict": strict, "parameters": _SCHEMA} for name in names]


def _message(role: str, *texts: str, kind: str = "input_text") -> dict[str, Any]:
    content = [{"type": kind, "text": text} for text in texts]
    return {"type": "message", "id": f"msg_{role}", "role": role, "content": content}


def _system() -> dict[str, Any]:
    return {"role": "system", "content": "Act."}


def _user(text: str = "answer") -> dict[str, Any]:
    return {"role": "user", "content": text}


_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
_ASKED = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "answer"}

CHAT: dict[str, dict[str, Any]] = {
    "aider": {"messages": [_system(), _user()], "temperature": 0, "stream": True},
    "Cline": {
        "messages": [
            _system(),
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            _ASKED,
            _RESULT,
        ],
        "temperature": 0,
        "tools": _tools("get_weather", "now", strict=False, description="It looks."),
        **_USAGE,
    },
    "Cline, with a model that it takes for a reasoning one": {
        "messages": [{"role": "developer", "content": "Act."}, _user()],
        "reasoning_effort": "medium",
        **_USAGE,
    },
    "Continue": {
        "messages": [_system(), _user()],
        "max_tokens": 4096,
        "tools": _tools("get_weather"),
        "parallel_tool_calls": False,
        **_USAGE,
    },
    "Cursor": {
        "messages": [_system(), _user() | {"name": "someone"}],
        "tools": _tools("get_weather"),
        "tool_choice": "auto",
        "user": "google-oauth2|1",
        "temperature": 1,
        **_USAGE,
    },
    "LangChain 1, streaming with tools": {
        "messages": [_user("calls")],
        "max_completion_tokens": 16,
        "tools": _tools("get_weather", "now"),
        "stream": True,
    },
    "LiteLLM 1.110, hosted_vllm": {"messages": [_user()], "reasoning_effort": "low"},
    "LlamaIndex": {"messages": [_user()], "stream": False, "temperature": 0.1},
    "OpenAI 3.57, all that has its default": {
        "messages": [_user()],
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "modalities": ["text"],
        "service_tier": "auto",
        "store": False,
        "metadata": {},
        "max_tokens": 16,
        "max_completion_tokens": 16,
        "prediction": {"type": "content", "content": "It is"},
        "seed": None,
        "stop": None,
        "tools": [],
        "user": "someone",
    },
    "OpenAI Agents 0.24": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            _user("calls"),
            _ASKED | {"content": "I look."},
            _RESULT,
        ],
        "tools": _tools("get_weather", "now", strict=True),
    },
    "Open WebUI": {
        "messages": [_user()],
        "temperature": 0.7,
        "max_tokens": 99,
        "reasoning_effort": "high",
        "stop": ["never"],
        **_USAGE,
    },
    "Roo Code": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Act.", "cache_control": _EPHEMERAL}]},
            {"role": "user", "content": [{"type": "text", "text": "calls", "cache_control": _EPHEMERAL}]},
        ],
        "temperature": 0,
        "tools": _tools("get_weather", strict=True),
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        **_USAGE,
    },
    "Zed": {
        "messages": [
            _system(),
            _user("calls"),
            {"role": "assistant", "content": "I look."},
            _user(),
        ],
        "max_completion_tokens": 99,
        "temperature": 1.0,
        "parallel_tool_calls": False,
        "prompt_cache_key": "thread-1",
        "reasoning_effort": "none",
        "tools": _tools("get_weather"),
        **_USAGE,
    },
}
RESPONSES: dict[str, dict[str, Any]] = {
    "Codex, without its web search and agents": {
        "input": [
            _message("developer", "Act."),
            _message("developer", "Skills.", "Permissions."),
            _message("user", "Where."),
            _message("user", "calls"),
        ],
        "tools": _response_tools("exec_command", "write_stdin", strict=False),
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a22abf",
        "client_metadata": {"session_id": "01a22abf", "turn_id": "01a22abf"},
    },
    "OpenAI Agents 0.24": {
        "include": [],
        "instructions": "Be brief.",
        "input": [
            _user("calls"),
            {
                **{"id": "rs_1", "type": "reasoning", "summary": [], "status": "completed"},
                "content": [{"type": "reasoning_text", "text": "I should look."}],
            },
            {
                **{"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"},
                "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
            },
            {
                **{"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1"},
                **{"name": "get_weather", "arguments": '{"city": "Paris"}'},
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "answer"},
        ],
        "reasoning": {"effort": "low"},
        "tools": _response_tools("get_weather", "now", strict=True),
    },
    "LangChain 1": {"input": [_user() | {"type": "message"}], "max_output_tokens": 16, "stream": False},
}
_BILLING = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.123; cc_entrypoint=sdk-cli;"}
MESSAGES: dict[str, dict[str, Any]] = {
    "Claude Code 2.1": {
        "max_tokens": 32000,
        "system": [_BILLING, {"type": "text", "text": "Act.", "cache_control": _EPHEMERAL}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>The date.</system-reminder>"},
                    {"type": "text", "text": "calls", "cache_control": _EPHEMERAL},
                ],
            },
            {"role": "system", "content": "Agents."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I should look.", "signature": ""},
                    {"type": "text", "text": "I look."},
                    {
                        **{"type": "tool_use", "id": "call_1", "name": "Bash", "input": {"city": "Paris"}},
                        **{"caller": {"type": "direct"}},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        **{"type": "tool_result", "tool_use_id": "call_1", "content": "answer", "is_error": False},
                        "cache_control": _EPHEMERAL,
                    }
                ],
            },
        ],
        "tools": [
            {"name": "Bash", "description": "Runs.", "input_schema": _SCHEMA, "eager_input_streaming": True},
            {"name": "Read", "description": "Reads.", "input_schema": _SCHEMA, "cache_control": _EPHEMERAL},
        ],
        "metadata": {"user_id": '{"device_id":"4f40","account_uuid":"","session_id":"1116"}'},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    },
    "LiteLLM 1.110": {
        "max_tokens": 128000,
        "system": [{"type": "text", "text": "Act."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "answer"}]}],
        "tools": [{"name": "get_weather", "input_schema": _SCHEMA, "type": "custom"}],
    },
}
TOOLS = {
    **{f"{name}: chat": ("/v1/chat/completions", body) for name, body in CHAT.items()},
    **{f"{name}: responses": ("/v1/responses", body) for name, body in RESPONSES.items()},
    **{f"{name}: messages": ("/v1/messages?beta=true", body) for name, body in MESSAGES.items()},
}
