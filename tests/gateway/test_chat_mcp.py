"""/v1/chat/completions with tools of MCP servers: a plain chat client sees one reply."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from hostler.errors import UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import MODEL, World, finish, route, text
from tests.gateway.test_responses_mcp import VILLAIN, call, results, serving, tell, turns

OWN: Any = {"type": "function", "function": {"name": "own", "parameters": {"type": "object"}}}


@pytest.fixture
async def chatty() -> AsyncIterator[World]:
    async with serving() as here:
        yield here


async def test_a_plain_client_sees_the_answer_alone_streamed_and_whole(chatty: World) -> None:
    say = [text("Let me see."), *call("sums", {"text": "40+2"})]
    chatty.worker.script = turns(say, tell, say, tell)
    reply = (await chatty.chat(mcp_servers=["villain"])).json()
    assert reply["choices"][0]["message"]["content"] == "Let me see.\n\n42"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"].get("tool_calls") is None
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (10, 14)
    async with openai.AsyncOpenAI(base_url=f"{chatty.url}/v1", api_key="unused") as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "go"}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"mcp_servers": ["villain"]},
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Let me see.\n\n42"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 14
    messages = chatty.worker.requests[-1].chat.messages
    assert [m.role for m in messages] == [pb.ROLE_USER, pb.ROLE_ASSISTANT, pb.ROLE_TOOL]
    assert messages[2].tool_call_id == messages[1].tool_calls[0].id


async def test_the_clients_own_calls_go_to_it_and_the_servers_do_not(chatty: World) -> None:
    chatty.worker.script = turns([*call("sums", {"text": "1+1"}), *call("own", {"a": 1}, 1)])
    reply = await chatty.chat(mcp_servers=["villain"], tools=[OWN], stream=True)
    chunks = [openai.types.chat.ChatCompletionChunk.model_validate_json(d) for d in sse_data(reply.text)[:-1]]
    calls = [part for c in chunks for part in c.choices[0].delta.tool_calls or []]
    assert {part.index for part in calls} == {0}
    assert [part.function.name for part in calls if part.function and part.function.name] == ["own"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert len(chatty.worker.requests) == 1


async def test_two_choices_go_their_own_ways(chatty: World) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        done = results(request)
        for event in [text(f"= {done[0]}")] if done else call("sums", {"text": f"{request.sampling.seed}+1"}):
            yield event
        yield finish(1)

    chatty.worker.script = script
    reply = (await chatty.chat(mcp_servers=["villain"], n=2, seed=5)).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["= 6", "= 7"]


async def test_a_server_in_need_of_help_costs_nobody_the_answer(chatty: World) -> None:
    chatty.worker.script = turns([text("alone")])
    assert (await chatty.chat(mcp_servers=["gone"])).json()["choices"][0]["message"]["content"] == "alone"
    chatty.worker.script = turns(call("die", {}), tell)
    reply = (await chatty.chat(mcp_servers=["villain"])).json()
    assert reply["choices"][0]["message"]["content"] == "Error: The MCP server ended with exit code 3."
    unknown = await chatty.chat(mcp_servers=["nobody"])
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "mcp_servers")


async def test_configured_for_chat_a_server_serves_all_who_do_not_decline() -> None:
    servers = {"villain": {**VILLAIN, "chat": True}}
    async with serving(mcp_servers=servers) as here:
        here.worker.script = turns(call("sums", {"text": "2+3"}), tell)
        assert (await here.chat()).json()["choices"][0]["message"]["content"] == "5"
        await here.chat(mcp_servers=[])
        assert len(here.worker.requests[-1].chat.tools) == 0

        async def no_tools(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
            if request.chat.tools:
                raise UnsupportedParameter("This model does not call tools.", param="tools")
            yield text("plain")
            yield finish(1)

        here.worker.script = no_tools
        assert (await here.chat()).json()["choices"][0]["message"]["content"] == "plain"
        assert (await here.chat(mcp_servers=["villain"])).status_code == 400
        await here.publish(route(here.worker, supports_images=True))
        here.worker.script = turns([text("still")])
        assert (await here.chat()).json()["choices"][0]["message"]["content"] == "still"
        assert len(here.worker.requests[-1].chat.tools) == 0


async def test_a_model_that_never_stops_calling_is_stopped(chatty: World) -> None:
    def greedy(request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        if request.chat.tool_choice.mode == pb.TOOL_CHOICE_MODE_NONE:
            return [text("enough")]
        return call("echo", {"text": "a"})

    chatty.worker.script = turns(greedy)
    reply = (await chatty.chat(mcp_servers=["villain"])).json()
    assert reply["choices"][0]["message"]["content"] == "enough"
    assert len(chatty.worker.requests) == 32
    short = (await chatty.chat(mcp_servers=["villain"], max_tokens=20)).json()
    assert short["choices"][0]["finish_reason"] == "length"
