"""Tools and structured output through the whole server, as the openai SDK and its users see them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI

from tests.journeys.server import Server

pytestmark = [pytest.mark.journey, pytest.mark.real_model, pytest.mark.timeout(600)]

MODEL = "coder"
QUESTION: dict[str, Any] = {"role": "user", "content": "What is the weather in Paris right now?"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def coder(coder_server: Server) -> Server:
    return coder_server


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)


def test_a_question_becomes_a_streamed_call_and_its_result_becomes_the_answer(coder: Server) -> None:
    api = client(coder)
    with api.chat.completions.stream(
        model=MODEL,
        messages=[QUESTION],
        tools=[WEATHER],
        temperature=0,
        max_tokens=80,  # type: ignore[list-item]
    ) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert "paris" in json.loads(call.function.arguments)["city"].lower()
    turn = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": call.id, "type": "function", "function": call.function.model_dump(include={"name", "arguments"})}
        ],
    }
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature_celsius": 31, "sky": "thunderstorm"}'}
    reply = api.chat.completions.create(
        model=MODEL,
        messages=[QUESTION, turn, result],  # type: ignore[list-item]
        tools=[WEATHER],  # type: ignore[list-item]
        temperature=0,
        max_tokens=80,
    )
    answer = reply.choices[0].message.content or ""
    assert "31" in answer or "thunder" in answer.lower(), answer


def test_a_named_tool_is_called_and_ids_and_indexes_follow_the_rules(coder: Server) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello!"}],
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_tokens": 80,
        "stream": True,
    }
    with httpx.stream("POST", f"{coder.url}/v1/chat/completions", json=body, timeout=300) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [chunk["choices"][0] for chunk in map(json.loads, lines[:-1])]
    parts = [part for choice in choices for part in choice["delta"].get("tool_calls", [])]
    assert parts[0]["function"]["name"] == "get_weather"
    assert all(part["index"] == 0 for part in parts)
    assert all("id" not in part and "type" not in part for part in parts[1:])
    json.loads("".join(part["function"]["arguments"] for part in parts))
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


def test_a_schema_is_kept_and_a_bad_one_is_a_400_that_names_the_field(coder: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Spain"]}},
        "required": ["capital", "country"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "capital", "strict": True, "schema": schema}}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    reply = client(coder).chat.completions.create(
        model=MODEL,
        messages=messages,
        response_format=form,
        max_tokens=60,
        temperature=0,  # type: ignore[arg-type]
    )
    Draft202012Validator(schema).validate(json.loads(reply.choices[0].message.content or ""))
    schema["properties"] = {"x": {"$ref": "https://example.com/x"}}
    body = {"model": MODEL, "messages": messages, "response_format": form}
    refused = httpx.post(f"{coder.url}/v1/chat/completions", json=body, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format"
