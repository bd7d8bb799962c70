"""/v1/messages over HTTP: streams, counts, doors, failures, and Anthropic's own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
from hostler.errors import ContextLengthExceeded, Internal, Overloaded, WorkerLost
from hostler.inference.v1 import inference_pb2 as pb
from hostler.placement.v1 import placement_pb2

from tests.gateway.event_frames import frames_of
from tests.gateway.fakes import MODEL, World, counting, echo, fail_once, finish, route, text, world
from tests.gateway.messages_schema import check_error, check_message, check_model, check_stream
from tests.gateway.test_messages_requests import IMAGE, LINKED, LOOK
from tests.gateway.test_responses_events import arguments, end, reasoning, start

KEY = "correct-horse-battery"


def body(content: Any = "hello there", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": content}], **fields}


def progress(prompt: int, cached: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(progress=pb.Progress(num_prompt_tokens=prompt, num_prefilled_tokens=cached))


async def ask(here: World, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    return await here.client.post(path, json=body(**fields))


async def talk(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """Think, speak and call a tool; tell of the prompt first."""
    if request.wants_progress:
        yield progress(12, 5)
    yield reasoning("hm")
    yield text("Looking")
    yield text(".")
    yield start(0, "look", "call_a")
    yield arguments(0, '{"x":')
    yield arguments(0, "1}")
    yield end(0)
    last = finish(9, pb.FINISH_REASON_TOOL_CALLS, prompt=12)
    last.finish.usage.num_cached_tokens = 5
    yield last


async def test_a_message_is_answered_whole(called: World) -> None:
    reply = await ask(called, system="be kind")
    assert reply.status_code == 200
    message = check_message(reply.json())
    assert message["content"] == [{"type": "text", "text": "hello there"}]
    assert (message["model"], message["stop_reason"]) == (MODEL, "end_turn")
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (5, 2)
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    (sent,) = called.worker.requests
    assert (sent.chat.messages[0].role, sent.max_tokens, sent.wants_progress) == (pb.ROLE_SYSTEM, 64, False)


async def test_a_stream_makes_the_same_message_as_the_whole(served: World) -> None:
    served.worker.script = talk
    fields: dict[str, Any] = {"tools": [LOOK], "thinking": {"type": "adaptive"}}
    reply = await ask(served, "/v1/messages?beta=true", stream=True, **fields)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events, message = check_stream(reply.text)
    usage = events[0]["message"]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (7, 5)
    whole = check_message((await ask(served, **fields)).json())
    assert {**message, "id": whole["id"]} == whole
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]


async def test_a_message_begins_before_its_first_token(served: World) -> None:
    go_on = asyncio.Event()

    async def slowly(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield progress(3)
        await go_on.wait()
        yield text("x")
        yield finish(1, prompt=3)

    served.worker.script = slowly
    seen = ""
    async with served.client.stream("POST", "/v1/messages", json=body(stream=True)) as reply:
        async for piece in reply.aiter_text():
            seen += piece
            if "event: ping" in seen:
                go_on.set()
    kinds = [event["type"] for event in frames_of(seen)]
    assert kinds[:2] == ["message_start", "ping"]
    check_stream(seen)


async def test_silence_before_the_message_is_broken_by_comments(served: World) -> None:
    go_on = asyncio.Event()

    async def late(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await go_on.wait()
        yield progress(3)
        yield finish(1, prompt=3)

    served.worker.script = late
    seen = ""
    async with served.client.stream("POST", "/v1/messages", json=body(stream=True)) as reply:
        async for piece in reply.aiter_text():
            seen += piece
            go_on.set()
    assert seen.startswith(": ping\n\n")
    check_stream(seen)


async def test_a_worker_that_tells_nothing_of_the_prompt_is_asked(called: World) -> None:
    called.worker.answer = counting()
    events, _ = check_stream((await ask(called, content="one two three", stream=True)).text)
    assert events[0]["message"]["usage"]["input_tokens"] == 3


async def test_tokens_are_counted_without_an_answer(called: World) -> None:
    called.worker.answer = counting()
    asked = {**body("one two", system="three"), "max_tokens": None}
    reply = await called.client.post("/v1/messages/count_tokens", json=asked)
    assert (reply.status_code, reply.json()) == (200, {"input_tokens": 3})
    assert called.worker.requests == []
    refused = await called.client.post("/v1/messages/count_tokens", json={"model": MODEL})
    check_error(refused.json(), 400)


async def test_what_a_load_does_is_told_in_comments(served: World) -> None:
    async def load(model: str) -> AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]:
        yield placement_pb2.EnsureProgress(stage="read", done_bytes=1, total_bytes=2)
        await asyncio.sleep(0.1)
        yield served.worker.replica()

    served.placement.ensure = load
    served.worker.answer = counting()
    await served.publish(route())
    reply = await ask(served, stream=True)
    assert reply.text.startswith(": loading: reading weights 50%")
    check_stream(reply.text)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("full", retry_after_s=3), 429),
        (Internal("broken"), 500),
        (ContextLengthExceeded("too long").counted(9, 8), 400),
    ],
)
async def test_a_failure_before_the_first_event_has_its_status(called: World, error: Any, status: int) -> None:
    for stream in (False, True):
        called.worker.script = fail_once(error)
        reply = await ask(called, stream=stream)
        assert reply.status_code == status
        message = check_error(reply.json(), status)
        assert reply.json()["request_id"] == reply.headers["request-id"]
    if status == 429:
        assert int(reply.headers["retry-after"]) >= 1
    if status == 400:
        # The words by which Claude Code knows that it must shorten the conversation.
        assert message == "prompt is too long: 9 tokens > 8 maximum"


async def test_a_failure_in_the_middle_is_an_error_event_and_the_end(served: World) -> None:
    async def half(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield progress(3)
        yield text("half")
        raise WorkerLost("gone")

    served.worker.script = half
    reply = await ask(served, stream=True)
    *_, delta, last = frames_of(reply.text)
    assert delta["delta"]["text"] == "half"
    assert check_error(last, 503) == "gone"
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)

    def listen() -> None:
        with client.messages.stream(**body()) as stream:
            for _ in stream:
                pass

    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        await asyncio.to_thread(listen)


async def test_a_worker_lost_after_the_message_began_is_replaced_unseen(served: World) -> None:
    spare = await served.add_worker("b")

    async def be_lost(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield progress(3)
        raise WorkerLost("gone")

    async def answer(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield progress(3, 2)
        async for event in echo(request):
            yield event

    served.worker.script = be_lost
    spare.script = answer
    await served.publish(route(served.worker))

    async def bring_up(model: str) -> AsyncIterator[placement_pb2.Replica]:
        yield spare.replica()

    served.placement.ensure = bring_up
    _, message = check_stream((await ask(served, stream=True)).text)
    assert message["content"][0]["text"] == "hello there"


async def test_doors_answer_in_this_dialect_on_its_paths() -> None:
    async with world(over_tcp=False, config={"api_key": KEY, "max_body": 2000}) as here:
        post, path = here.client.post, "/v1/messages"
        key = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
        reply = await post(path, json=body(), headers={"x-api-key": "wrong"})
        check_error(reply.json(), 401)
        assert reply.headers["request-id"] == reply.json()["request_id"]
        check_error((await post(path, json=body(), headers={**key, "host": "evil.example"})).json(), 403)
        check_error((await post(path, json=body("x" * 3000), headers=key)).json(), 413)
        check_error((await post(path, content=b"x", headers={**key, "content-type": "text/plain"})).json(), 415)
        check_error((await post(path, content=b"{", headers={**key, "content-type": "application/json"})).json(), 400)
        check_error((await post(path, json=body(model="none"), headers=key)).json(), 404)
        check_error((await here.client.get(path, headers=key)).json(), 405)
        check_error((await post(f"{path}/batches", json={}, headers=key)).json(), 404)
        check_error((await here.client.get("/v1/files", headers=key)).json(), 404)
        reply = await post(path, json=body(), headers=key)
        assert reply.status_code == 200
        openai_error = await here.client.get("/v1/files", headers={"x-api-key": KEY})
        assert openai_error.json()["error"]["code"] == "not_found"
        assert "request-id" not in openai_error.headers
        assert (await here.client.head("/")).status_code == 200


async def test_an_unexpected_exception_is_told_in_this_dialect(called: World) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("/secret/path")

    called.app.state.services.dispatcher.generate = explode
    reply = await ask(called)
    assert "secret" not in check_error(reply.json(), 500)


async def test_what_a_model_cannot_do_is_refused_before_it_is_asked(called: World) -> None:
    refused = await ask(called, content=[IMAGE])
    assert "messages[0].content[0]" in check_error(refused.json(), 400)
    forced = await ask(called, tools=[LOOK], tool_choice={"type": "any"})
    assert "tool_choice" in check_error(forced.json(), 400)
    await called.publish(route(called.worker, supports_images=True))
    linked = await ask(called, content=[LINKED])
    assert "does not fetch" in check_error(linked.json(), 400)
    assert called.worker.requests == []
    seen = await ask(called, content=[IMAGE])
    assert seen.status_code == 200


async def test_a_client_that_leaves_frees_its_slot(served: World) -> None:
    async def hang(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield progress(3)
        await asyncio.Event().wait()

    served.worker.script = hang
    async with served.client.stream("POST", "/v1/messages", json=body(stream=True)) as reply:
        async for _ in reply.aiter_text():
            break
        await served.worker.until_running(1)
    await asyncio.wait_for(served.worker.until_running(0), 1)


async def test_models_are_listed_in_this_dialect_for_its_clients(called: World) -> None:
    await called.publish(
        route(called.worker), *(route(name=f"m{i}", aliases=()) for i in range(4)), route(name="b", adapters=("a",))
    )
    version = {"anthropic-version": "2023-06-01"}
    plain = (await called.client.get("/v1/models")).json()
    assert plain["object"] == "list"
    listed = (await called.client.get("/v1/models", headers=version)).json()
    assert [model["id"] for model in listed["data"]] == [model["id"] for model in plain["data"]]
    for model in listed["data"]:
        check_model(model)
    assert listed["data"][0]["max_input_tokens"] == 8192
    assert listed["data"][0]["created_at"] == "2023-11-14T22:13:20Z"
    one = (await called.client.get(f"/v1/models/{MODEL}", headers=version)).json()
    assert one == listed["data"][0]
    check_error((await called.client.get("/v1/models/none", headers=version)).json(), 404)

    async def page(**params: str) -> tuple[list[str], bool]:
        found = (await called.client.get("/v1/models", headers=version, params=params)).json()
        ids = [model["id"] for model in found["data"]]
        assert (found["first_id"], found["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
        return ids, found["has_more"]

    assert await page(limit="2") == ([MODEL, "m0"], True)
    assert await page(limit="2", after_id="m0") == (["m1", "m2"], True)
    assert await page(limit="9", after_id="m2") == (["m3", "b", "a"], False)
    assert await page(after_id="a") == ([], False)
    assert await page(limit="2", before_id="m2") == (["m0", "m1"], True)
    assert await page(limit="9", before_id="m0") == ([MODEL], False)
    for params in ({"limit": "0"}, {"limit": "x"}, {"after_id": "none"}, {"before_id": "none"}):
        refused = await called.client.get("/v1/models", headers=version, params=params)
        check_error(refused.json(), 400)


async def test_anthropics_client_asks_streams_counts_and_lists(served: World) -> None:
    served.worker.script = talk
    served.worker.answer = counting()
    client = anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0)
    tools: Any = [LOOK]
    whole = await client.messages.create(**body(), tools=tools)
    assert whole.stop_reason == "tool_use"
    assert whole._request_id == served.worker.request_ids[0]
    assert whole.content[0].type == "text"  # thoughts that nobody asked for do not come first
    async with client.messages.stream(**body(), tools=tools, thinking={"type": "adaptive"}) as stream:
        said = [piece async for piece in stream.text_stream]
        final = await stream.get_final_message()
    assert said == ["Looking", "."]
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens) == (7, 5)
    counted = await client.messages.count_tokens(model=MODEL, messages=body()["messages"])
    assert counted.input_tokens == 2
    assert [model.id async for model in client.models.list()] == [MODEL]
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(**body(model="none"))
    with pytest.raises(anthropic.BadRequestError):
        await client.messages.create(**body(), stop_sequences=[""])
    await client.close()
