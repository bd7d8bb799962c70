"""/v1/responses over real HTTP and gRPC: what clients see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import orjson
import pytest
from hostler.errors import ContextLengthExceeded, InvalidRequest, WorkerLost
from hostler.inference.v1 import inference_pb2 as pb
from pydantic import BaseModel

from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import MODEL, World, counting, echo, finish, route, text
from tests.gateway.responses_schema import check_response, check_stream

ECHO_TOOL = {"type": "function", "name": "echo", "parameters": {"type": "object"}}


async def ask(here: World, input: Any = "one two", **fields: Any) -> httpx.Response:
    return await here.client.post("/v1/responses", json={"model": MODEL, "input": input, **fields})


async def answered(here: World, input: Any = "one two", **fields: Any) -> dict[str, Any]:
    reply = await ask(here, input, **fields)
    assert reply.status_code == 200, reply.text
    return check_response(reply.json())


def prompt(here: World) -> list[str]:
    """Return the texts of the messages that the worker saw last."""
    return ["".join(part.text for part in m.parts) for m in here.worker.requests[-1].chat.messages]


def words(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


async def test_a_whole_reply_and_a_stream_say_the_same(served: World) -> None:
    whole = await answered(served, "one two three")
    assert words(whole) == "one two three"
    reply = await ask(served, "one two three", stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = check_stream(reply.text)
    assert words(events[-1]["response"]) == "one two three"
    assert [event["delta"] for event in events if event["type"] == "response.output_text.delta"] == [
        "one",
        " two",
        " three",
    ]
    assert "[DONE]" not in reply.text


async def test_the_sync_sdk_creates_streams_and_fetches(served: World) -> None:
    served.worker.answer = counting()

    def use() -> None:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
            whole = client.responses.create(model=MODEL, input="a b")
            assert whole.output_text == "a b"
            assert client.responses.retrieve(whole.id).output_text == "a b"
            with client.responses.stream(model=MODEL, input="c d") as stream:
                deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
                final = stream.get_final_response()
            assert "".join(deltas) == final.output_text == "c d"
            items = client.responses.input_items.list(whole.id)
            assert [item.type for item in items] == ["message"]
            counted = client.responses.input_tokens.count(model=MODEL, input="a b c")
            assert counted.input_tokens == 3
            client.responses.delete(whole.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(whole.id)

    await asyncio.to_thread(use)


async def test_the_async_sdk_streams_from_the_root_too(served: World) -> None:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="unused") as client:
        stream = await client.responses.create(model="TINY", input="a b", stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        conversation = await client.conversations.create(items=[{"role": "user", "content": "remember me"}])
        await client.responses.create(model=MODEL, input="now", conversation=conversation.id)
        assert prompt(served) == ["remember me", "now"]


async def test_the_sdk_parses_structured_output(served: World) -> None:
    class Capital(BaseModel):
        city: str

    async def json_reply(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        assert '"city"' in request.constraint.json_schema
        yield text('{"city":')
        yield text('"Paris"}')
        yield finish(2)

    served.worker.script = json_reply
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        reply = await client.responses.parse(model=MODEL, input="capital?", text_format=Capital)
        assert reply.output_parsed == Capital(city="Paris")
        async with client.responses.stream(model=MODEL, input="capital?", text_format=Capital) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == Capital(city="Paris")


async def test_too_long_a_conversation_is_refused_or_cut_as_the_request_says(served: World) -> None:
    served.worker.answer = counting(60)

    async def strict(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if sum(len(part.text.split()) for m in request.chat.messages for part in m.parts) > 60:
            raise ContextLengthExceeded("too long", param="messages")
        yield text("ok")
        yield finish(1)

    served.worker.script = strict
    small = route(served.worker)
    small.info.max_context_tokens = 60
    await served.publish(small)
    turns: list[dict[str, Any]] = [{"role": "developer", "content": "be brief"}]
    for number in range(8):
        turns += [
            {"role": "user", "content": f"question{number} " + "word " * 5},
            {"role": "assistant", "content": f"answer{number} " + "word " * 5},
        ]
    turns.append({"role": "user", "content": "last"})
    refused = await ask(served, turns)
    assert refused.status_code == 400
    assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("context_length_exceeded", "input")
    response = await answered(served, turns, truncation="auto", instructions="always")
    assert response["truncation"] == "auto"
    seen = prompt(served)
    assert seen[0] == "always\n\nbe brief"
    assert seen[1].startswith("question5")
    assert seen[-1] == "last"
    hopeless = await ask(served, "word " * 70, truncation="auto")
    assert hopeless.json()["error"]["code"] == "context_length_exceeded"


async def test_what_the_worker_refuses_is_a_400_that_names_this_dialects_field(served: World) -> None:
    async def refuse(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise InvalidRequest("no such schema", param="response_format")
        yield

    served.worker.script = refuse
    for stream in (False, True):
        reply = await ask(served, stream=stream)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "text.format"


async def test_a_failure_after_the_first_byte_is_response_failed(served: World) -> None:
    async def break_off(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        raise WorkerLost("the worker died")

    served.worker.script = break_off
    events = check_stream((await ask(served, stream=True)).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    error = events[-1]["response"]["error"]
    assert (error["code"], error["message"]) == ("server_error", "the worker died")
    whole = await ask(served)
    assert whole.status_code == 503
    assert whole.json()["error"]["code"] == "worker_lost"


async def test_a_failure_after_a_comment_alone_still_has_all_of_its_events(served: World) -> None:
    gate = asyncio.Event()

    async def late(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await gate.wait()
        raise WorkerLost("gone")
        yield

    served.worker.script = late
    body = {"model": MODEL, "input": "x", "stream": True}
    async with served.client.stream("POST", "/v1/responses", json=body) as reply:
        seen = ""
        async for piece in reply.aiter_text():
            seen += piece
            gate.set()
    assert seen.startswith(": ping")
    assert [event["type"] for event in check_stream(seen)][-1] == "response.failed"


async def test_a_client_that_leaves_frees_the_worker(served: World) -> None:
    async def endless(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        await asyncio.Event().wait()

    served.worker.script = endless
    body = {"model": MODEL, "input": "x", "stream": True}
    async with served.client.stream("POST", "/v1/responses", json=body) as reply:
        async for _ in reply.aiter_bytes():
            break
    await served.worker.until_running(0)


async def test_codex_is_answered_as_it_was_recorded(served: World) -> None:
    """The shape of Codex' requests: namespaces, custom tools, hosted tools, sealed reasoning, nothing stored."""

    async def call(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(reasoning=pb.ReasoningDelta(text="I should use the tool."))
        yield pb.GenerateResponse(tool_call_start=pb.ToolCallStart(index=0, id="call_1", name="mcp__demo__echo"))
        yield pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=0, json_fragment='{"message":"x"}'))
        yield pb.GenerateResponse(tool_call_end=pb.ToolCallEnd(index=0))
        yield finish(1, pb.FINISH_REASON_TOOL_CALLS)

    served.worker.script = call
    await served.publish(route(served.worker, supports_tools=True))
    echo_tool = {**ECHO_TOOL, "description": "Echo.", "strict": False}
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    body = {
        "model": MODEL,
        "instructions": "You are a coding agent. " * 100,
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "<permissions instructions>"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "<environment_context>"}],
            },
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "echo x"}]},
        ],
        "tools": [
            {
                "type": "function",
                "name": "exec_command",
                "description": "Run.",
                "strict": False,
                "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}},
            },
            {"type": "custom", "name": "apply_patch", "description": "Patch.", "format": grammar},
            {"type": "web_search", "external_web_access": False},
            {"type": "namespace", "name": "mcp__demo", "description": "Demo.", "tools": [echo_tool]},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0197-key",
        "text": {"verbosity": "low"},
        "client_metadata": {"x-codex-installation-id": "id"},
    }
    headers = {"accept": "text/event-stream", "originator": "codex_cli_rs", "session_id": "0197"}
    reply = await served.client.post("/v1/responses", json=body, headers=headers)
    response = check_stream(reply.text)[-1]["response"]
    reasoning, called = response["output"]
    assert (called["name"], called["namespace"], called["call_id"]) == ("echo", "mcp__demo", "call_1")
    assert response["prompt_cache_key"] == "0197-key"
    served.worker.script = echo
    # Codex sends back what it got, without ids and without the reasoning's summary.
    body["input"] += [  # type: ignore[operator]
        {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]},
        {key: value for key, value in called.items() if key not in ("id", "status")},
        {"type": "function_call_output", "call_id": "call_1", "output": "x y"},
    ]
    reply = await served.client.post("/v1/responses", json=body, headers=headers)
    assert words(check_stream(reply.text)[-1]["response"]) == "x y"
    turn = served.worker.requests[-1].chat.messages[3]
    assert turn.reasoning == "I should use the tool."
    assert turn.tool_calls[0].name == "mcp__demo__echo"


async def test_a_responses_body_on_chats_path_gets_chats_chunks(served: World) -> None:
    """Cursor's habit."""
    body = {"model": MODEL, "input": [{"role": "user", "content": "a b"}], "stream": True, "tools": [ECHO_TOOL]}
    reply = await served.client.post("/v1/chat/completions", json=body)
    data = sse_data(reply.text)
    assert data[-1] == "[DONE]"
    chunks = [orjson.loads(each) for each in data[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "a b"
    assert served.worker.requests[-1].chat.tools[0].name == "echo"


async def test_flat_tools_are_read_on_chats_path(served: World) -> None:
    assert (await served.chat("x", tools=[ECHO_TOOL])).status_code == 200
    assert served.worker.requests[-1].chat.tools[0].name == "echo"


async def test_unknown_models_and_bad_queries_are_told_as_everywhere(served: World) -> None:
    reply = await served.client.post("/v1/responses", json={"model": "nobody", "input": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    response = await answered(served)
    path = f"/v1/responses/{response['id']}"
    assert (await served.client.get(path, params={"stream": "maybe"})).json()["error"]["param"] == "stream"
    assert (await served.client.get(path, params={"stream": "true"})).json()["error"]["param"] == "stream"
    assert (await served.client.post(f"{path}/cancel")).status_code == 400
    assert (await served.client.get("/v1/responses/" + "x" * 5000)).status_code == 404
