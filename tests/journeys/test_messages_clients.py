"""/v1/messages as real clients use it, against the real server: Anthropic's SDK, and Claude Code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic, NotFoundError

from tests.gateway.messages_schema import check_message, check_stream
from tests.journeys import claude_code
from tests.journeys.server import Server

pytestmark = [pytest.mark.journey, pytest.mark.timeout(600)]
real_model = pytest.mark.real_model

CODER = "coder"
GREEDY = {"temperature": 0}
QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the current weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def agents_body(words: str, model: str) -> dict[str, Any]:
    """Return a request of the size and with all the fields that Claude Code was seen to send: some 90 KB, 25 tools."""
    filler = "Use it when the task at hand asks for it, and say in your answer what you did. "
    tools = [
        {
            "name": f"Tool{number}",
            "description": f"Does task {number}. " + filler * 28,
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {
                    name: {"type": "string", "description": filler, "enum": ["low", "medium", "high"]}
                    for name in ("target", "effort", "mode")
                },
                "required": ["target"],
                "additionalProperties": False,
            },
        }
        for number in range(25)
    ]
    cached = {"cache_control": {"type": "ephemeral"}}
    return {
        "model": model,
        "max_tokens": 32000,
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.0; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are an agent for the command line.", **cached},
            {"type": "text", "text": filler * 100, **cached},
        ],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "<reminder>be brief</reminder>"}, {"type": "text", "text": words}],
            },
            {"role": "system", "content": [{"type": "text", "text": "# Environment\n" + filler * 60, **cached}]},
        ],
        "tools": tools,
        "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s"})},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }


def test_an_agents_whole_request_is_answered(scripted_server: Server) -> None:
    body = agents_body('go [[call Tool7 {"target": "the moon", "mode": "low"}]]', "scripted")
    assert 85_000 < len(json.dumps(body)) < 110_000
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
        "x-api-key": "none",
    }
    url = f"{scripted_server.url}/v1/messages?beta=true"
    events, message = check_stream(httpx.post(url, json=body, headers=headers, timeout=60).text)
    (call,) = message["content"]
    assert (call["name"], call["input"]) == ("Tool7", {"target": "the moon", "mode": "low"})
    assert message["stop_reason"] == "tool_use"
    assert events[0]["message"]["usage"]["input_tokens"] > 0
    body["messages"] += [
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "made of cheese"}]},
    ]
    with Anthropic(base_url=scripted_server.url, api_key="none") as client:
        known = ("model", "max_tokens", "messages", "system", "tools", "thinking", "metadata", "output_config")
        extra = {"context_management": body["context_management"]}
        with client.messages.stream(**{name: body[name] for name in known}, extra_body=extra) as stream:
            final = stream.get_final_message()
        assert final.content[0].type == "text"
        assert final.content[0].text == "made of cheese"
        counted = client.messages.count_tokens(model="scripted", messages=body["messages"], tools=body["tools"])
    assert counted.input_tokens == final.usage.input_tokens


def test_claude_code_with_all_its_tools_runs_one_of_them(scripted_server: Server, tmp_path: Path) -> None:
    note = tmp_path / "work" / "note.txt"
    note.parent.mkdir()
    note.write_text("the word is marzipan\n", encoding="utf-8")
    order = f'[[call Read {{"file_path": "{note}"}}]]'
    result = claude_code.run(scripted_server.url, "scripted", tmp_path, f"Do this: {order}")
    assert not result["is_error"], result
    assert "marzipan" in result["result"]
    assert result["num_turns"] == 2


@real_model
def test_claude_code_asks_a_real_model(coder_server: Server, tmp_path: Path) -> None:
    system = "You are a helpful assistant. Answer in one short sentence."
    asked = ("What is the capital of France?", "--tools", "", "--system-prompt", system)
    result = claude_code.run(coder_server.url, CODER, tmp_path, *asked)
    assert not result["is_error"], result
    assert "Paris" in result["result"]
    assert result["usage"]["output_tokens"] > 0
    assert result["usage"]["input_tokens"] + result["usage"]["cache_read_input_tokens"] > 100


@real_model
def test_the_sync_sdk_asks_streams_counts_and_lists(coder_server: Server) -> None:
    with Anthropic(base_url=coder_server.url, api_key="none", timeout=300) as client:
        asked: Any = {"model": CODER, "max_tokens": 40, "messages": QUESTION, "extra_body": GREEDY}
        whole = client.messages.create(**asked, system="You are brief.")
        assert whole.content[0].type == "text"
        assert "Paris" in whole.content[0].text
        assert whole.stop_reason == "end_turn"
        counted = client.messages.count_tokens(model=CODER, messages=QUESTION, system="You are brief.")
        with client.messages.stream(**asked, system="You are brief.") as stream:
            said = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert said == whole.content[0].text
        for usage in (whole.usage, final.usage):
            assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens
            assert usage.output_tokens == whole.usage.output_tokens
        assert final.usage.cache_read_input_tokens > 0  # the same prompt as before
        begun = client.messages.create(
            model=CODER,
            max_tokens=40,
            messages=[*QUESTION, {"role": "assistant", "content": "The capital of France is"}],
            stop_sequences=["."],
            extra_body=GREEDY,
        )
        assert begun.content[0].type == "text"
        assert "Paris" in begun.content[0].text
        assert not begun.content[0].text.startswith("The capital")
        assert (begun.stop_reason, begun.stop_sequence) == ("stop_sequence", ".")
        assert CODER in [model.id for model in client.models.list()]
        assert client.models.retrieve(CODER).max_input_tokens == 32768
        with pytest.raises(NotFoundError, match="not_found_error"):
            client.messages.create(**{**asked, "model": "claude-none"})


@real_model
async def test_the_async_sdk_calls_a_tool_sends_its_result_and_gets_an_answer(coder_server: Server) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris right now?"}]
    async with AsyncAnthropic(base_url=coder_server.url, api_key="none", timeout=300) as client:
        asked: Any = {"model": CODER, "max_tokens": 80, "tools": [WEATHER], "extra_body": GREEDY}
        single: Any = {"type": "auto", "disable_parallel_tool_use": True}
        async with client.messages.stream(**asked, messages=messages, tool_choice=single) as stream:
            kinds = [event.type async for event in stream]
            turn = await stream.get_final_message()
        assert kinds.count("input_json") > 1
        assert turn.stop_reason == "tool_use"
        (call,) = [block for block in turn.content if block.type == "tool_use"]
        assert call.name == "get_weather"
        assert "paris" in str(call.input["city"]).lower()
        answer = '{"temperature_celsius": 31, "sky": "thunderstorm"}'
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": answer}]}
        messages += [{"role": "assistant", "content": turn.content}, {"role": "user", "content": [result]}]
        # So small a model likes to call again; here it may not.
        reply = await client.messages.create(**asked, messages=messages, tool_choice={"type": "none"})
    (said,) = reply.content
    assert said.type == "text"
    assert "31" in said.text or "thunder" in said.text.lower(), said.text


@real_model
def test_structured_output_follows_its_schema(coder_server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Spain"]}},
        "required": ["capital", "country"],
        "additionalProperties": False,
    }
    body = {
        "model": CODER,
        "max_tokens": 60,
        "messages": QUESTION,
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
        **GREEDY,
    }
    reply = httpx.post(f"{coder_server.url}/v1/messages", json=body, timeout=300)
    (block,) = check_message(reply.json())["content"]
    assert json.loads(block["text"])["country"] == "France"
