"""What real clients send, as `hostler doctor --client` has it, against the gateway, and read by OpenAI's own parser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from hostler.errors import ContextLengthExceeded
from hostler.inference.v1 import inference_pb2 as pb

from cli.clients import catalog
from cli.replay import corpus
from cli.replay.exchange import Exchange, Reply, Verdict
from cli.replay.judge import problems_of
from cli.replay.send import headers_of, replay, send
from tests.gateway.fakes import MODEL, World, counting, finish, route, text, world
from tests.gateway.responses_schema import check_response, check_stream

KEY = "correct-horse-battery"


async def talk(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """Think, say something and, if there are tools, call two of them: everything that a reply can hold."""
    yield pb.GenerateResponse(reasoning=pb.ReasoningDelta(text="hm"))
    yield text("Hello")
    yield text(" there.")
    for index, tool in enumerate(request.chat.tools[:2]):
        yield pb.GenerateResponse(tool_call_start=pb.ToolCallStart(index=index, id=f"call_{index}", name=tool.name))
        for fragment in ('{"path": ', '"README.md"}'):
            yield pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=index, json_fragment=fragment))
        yield pb.GenerateResponse(tool_call_end=pb.ToolCallEnd(index=index))
    called = bool(request.chat.tools)
    yield finish(9, pb.FINISH_REASON_TOOL_CALLS if called else pb.FINISH_REASON_STOP)


async def replayed(here: World, client: str, key: str | None = None) -> list[Verdict]:
    here.worker.script = talk
    here.worker.answer = counting()
    await here.publish(route(here.worker, supports_tools=True))

    def run() -> list[Verdict]:
        with httpx.Client(base_url=here.url, timeout=20) as http:
            return list(replay(http, corpus.replay_of(client, MODEL), key))

    return await asyncio.to_thread(run)


def complaints(verdicts: list[Verdict]) -> list[tuple[str, tuple[str, ...]]]:
    return [(verdict.exchange.title, verdict.problems) for verdict in verdicts if verdict.problems]


def test_every_client_that_can_be_connected_can_be_replayed() -> None:
    assert set(catalog.names()) == set(corpus.names())


@pytest.mark.parametrize("client", corpus.names())
async def test_a_client_gets_what_it_can_read(served: World, client: str) -> None:
    assert complaints(await replayed(served, client)) == []


async def test_with_a_key_only_the_client_that_sends_none_is_turned_away() -> None:
    async with world(config={"api_key": KEY}) as here:
        assert complaints(await replayed(here, "jan", KEY)) == []
        told = await replayed(here, "transformers", KEY)
        wrong = await replayed(here, "curl", "another-key-entirely")
    assert [v.problems[0] for v in told] == ["the key is missing or wrong (401): this client sends no key here"] * 2
    assert wrong[0].problems == ("the key is missing or wrong (401): send the server's key",)


async def test_a_prompt_that_the_model_cannot_hold_is_told_as_such(served: World) -> None:
    async def refuse(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise ContextLengthExceeded("This prompt has 12000 tokens; the model takes 8192.", param="messages")
        yield

    served.worker.script = refuse

    def run() -> list[Verdict]:
        with httpx.Client(base_url=served.url, timeout=20) as http:
            return list(replay(http, corpus.replay_of("codex", MODEL), None))

    verdicts = await asyncio.to_thread(run)
    assert "is too long for this model: This prompt has 12000 tokens" in " ".join(verdicts[0].problems)


def _parse_with_openai(exchange: Exchange, reply: Reply) -> Any:
    """Return what OpenAI's SDK makes of a reply."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(reply.status, headers=reply.headers, content=reply.text.encode())

    http = httpx.Client(transport=httpx.MockTransport(answer))
    client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)
    ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    if exchange.expects == "chat":
        return client.chat.completions.create(**ask).choices[0].message
    if exchange.expects == "chat stream":
        with client.chat.completions.stream(**ask) as stream:
            return stream.get_final_completion().choices[0].message
    if exchange.expects == "responses":
        return client.responses.create(model=MODEL, input="x")
    with client.responses.stream(model=MODEL, input="x") as stream:
        return stream.get_final_response()


@pytest.mark.parametrize("client", ["codex", "cursor", "cline", "tiny-agents", "openai-python", "aider", "zed"])
async def test_openai_s_own_parser_reads_every_reply(served: World, client: str) -> None:
    served.worker.script = talk
    await served.publish(route(served.worker, supports_tools=True))

    def run() -> list[tuple[Exchange, Reply]]:
        with httpx.Client(base_url=served.url, timeout=20) as http:
            asked = [e for e in corpus.replay_of(client, MODEL) if e.expects.startswith(("chat", "responses"))]
            return [(exchange, send(http, exchange, None)) for exchange in asked]

    for exchange, reply in await asyncio.to_thread(run):
        parsed = _parse_with_openai(exchange, reply)
        if exchange.expects.startswith("chat"):
            assert parsed.content == "Hello there.", exchange.title
            names = [tool_call.function.name for tool_call in parsed.tool_calls or []]
        else:
            assert parsed.output_text == "Hello there.", exchange.title
            names = [item.name for item in parsed.output if item.type == "function_call"]
        assert len(names) == min(2, len((exchange.body or {}).get("tools", ()))), exchange.title
        if exchange.expects == "responses stream":
            check_stream(reply.text)
        elif exchange.expects == "responses":
            check_response(json.loads(reply.text))


def test_what_a_client_sends_is_as_long_as_what_was_seen_on_the_wire() -> None:
    sizes = {
        client: max(len(json.dumps(e.body)) for e in corpus.replay_of(client, MODEL))
        for client in ("codex", "claude-code", "cline", "continue")
    }
    assert 38_000 < sizes["codex"] < 44_000
    assert 80_000 < sizes["claude-code"] < 95_000
    assert 20_000 < sizes["cline"] < 30_000
    assert 4_000 < sizes["continue"] < 9_000


CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def chat_stream(*choices: dict[str, Any], last: str = "data: [DONE]\n\n", before: str = "") -> str:
    chunks = [{**CHUNK, "choices": [{"index": 0, "finish_reason": None, **choice}]} for choice in choices]
    return before + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + last


ROLE: dict[str, Any] = {"delta": {"role": "assistant", "content": "hi"}}
STOP: dict[str, Any] = {"delta": {}, "finish_reason": "stop"}
CALL = {"index": 0, "id": "call_0", "type": "function", "function": {"name": "f", "arguments": ""}}
USAGE = f"data: {json.dumps({**CHUNK, 'choices': [], 'usage': {}})}\n\ndata: [DONE]\n\n"


def calling(*calls: dict[str, Any], reason: str = "tool_calls") -> str:
    return chat_stream(ROLE, *({"delta": {"tool_calls": [call]}} for call in calls), {**STOP, "finish_reason": reason})


PLANTED = {
    "no role": (chat_stream({"delta": {"content": "hi"}}, STOP), "has no role"),
    "an event line": (chat_stream(ROLE, STOP, before="event: ping\ndata: {}\n\n"), "`event:` line"),
    "no end": (chat_stream(ROLE, STOP, last=""), "[DONE]"),
    "two finish reasons": (chat_stream(ROLE, STOP, STOP), "comes 2 times"),
    "no finish reason": (chat_stream(ROLE), "comes 0 times"),
    "usage unasked": (chat_stream(ROLE, STOP, last=USAGE), "nobody asked for"),
    "a null id": (calling(CALL, {"index": 0, "id": None, "function": {"arguments": "{}"}}), "repeats id"),
    "no index": (calling({k: v for k, v in CALL.items() if k != "index"}), "no index"),
    "broken arguments": (calling(CALL, {"index": 0, "function": {"arguments": '{"a'}}), "are not JSON"),
    "a wrong reason": (calling(CALL, {"index": 0, "function": {"arguments": "{}"}}, reason="stop"), "finish_reason is"),
    "an error": (chat_stream(ROLE, last='data: {"error": {"message": "gone"}}\n\n'), "it broke off: gone"),
    "not JSON": (chat_stream(ROLE, STOP, before="data: {oops\n\n"), "not JSON"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_judge_sees_a_planted_fault(fault: str) -> None:
    stream, expected = PLANTED[fault]
    headers = {"content-type": "text/event-stream; charset=utf-8", "x-request-id": "r"}
    asked = Exchange("asks", "chat stream", body={})
    assert problems_of(asked, Reply(200, headers, chat_stream(ROLE, STOP))) == []
    problems = problems_of(asked, Reply(200, headers, stream))
    assert [problem for problem in problems if expected in problem], problems


RESPONSE = {
    **dict.fromkeys(("id", "object", "created_at", "model", "parallel_tool_calls", "tool_choice", "tools")),
    "status": "completed",
    "output": [{"type": "message"}],
    "usage": {"input_tokens_details": {}, "output_tokens_details": {}},
}
EVENTS: list[dict[str, Any]] = [
    {"type": "response.created"},
    {"type": "response.in_progress"},
    {"type": "response.output_item.added", "output_index": 0},
    {"type": "response.output_text.delta", "output_index": 0, "delta": "hi", "logprobs": []},
    {"type": "response.output_item.done", "output_index": 0, "item": {"type": "message"}},
    {"type": "response.completed", "response": RESPONSE},
]
MESSAGE_EVENTS: list[dict[str, Any]] = [
    {"type": "message_start", "message": {}},
    {"type": "content_block_start", "index": 0},
    {"type": "content_block_delta", "index": 0},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
    {"type": "message_stop"},
]


def judged(expects: Any, events: list[dict[str, Any]], *, named: bool = True) -> list[str]:
    numbered = [{**event, "sequence_number": number} for number, event in enumerate(events)]
    stream = "".join(
        (f"event: {event['type']}\n" if named else "") + f"data: {json.dumps(event)}\n\n" for event in numbered
    )
    return problems_of(
        Exchange("asks", expects), Reply(200, {"content-type": "text/event-stream", "x-request-id": "r"}, stream)
    )


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        (0, "begins with"),
        (2, "before its output_item.added"),
        (3, "comes without deltas"),
        (4, "Codex loses"),
        (5, "does not end with"),
    ],
)
def test_the_judge_misses_no_event_of_a_response(left_out: int, expected: str) -> None:
    assert judged("responses stream", EVENTS) == []
    problems = judged("responses stream", EVENTS[:left_out] + EVENTS[left_out + 1 :])
    assert [problem for problem in problems if expected in problem], problems
    assert "does not repeat its type" in " ".join(judged("responses stream", EVENTS, named=False))


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [(0, "message_start"), (1, "belongs to no open block"), (3, "never stopped"), (4, "does not end with")],
)
def test_the_judge_misses_no_event_of_a_message(left_out: int, expected: str) -> None:
    assert judged("messages stream", MESSAGE_EVENTS) == []
    problems = judged("messages stream", MESSAGE_EVENTS[:left_out] + MESSAGE_EVENTS[left_out + 1 :])
    assert [problem for problem in problems if expected in problem], problems
    assert "asks again without streaming" in " ".join(judged("messages stream", MESSAGE_EVENTS, named=False))


def test_keys_go_into_the_headers_that_the_client_uses() -> None:
    assert headers_of(Exchange("", "anything", sends_key="both"), "k") == {
        "Authorization": "Bearer k",
        "x-api-key": "k",
    }
    assert headers_of(Exchange("", "anything", sends_key="no"), "k") == {}
    assert headers_of(Exchange("", "anything"), None) == {"Authorization": "Bearer unused"}
