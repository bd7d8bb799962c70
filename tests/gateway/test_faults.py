"""Loss of workers, of the orchestrator and of clients: every request ends in exactly one way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import orjson
from hostler.errors import Internal, ModelLoadFailed, StaleGeneration, WorkerLost
from hostler.inference.v1 import inference_pb2 as pb
from hostler.placement.v1 import placement_pb2

from gateway.services import Patience
from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import MODEL, QUICK, FakeWorker, World, echo, fail_once, finish, route, text, world


def body(content: str = "x", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


async def hang(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    await asyncio.Event().wait()
    yield finish()


async def speak_then_hang(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield text("begun")
    await asyncio.Event().wait()


async def be_lost(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    raise WorkerLost("gone")
    yield


async def test_a_client_that_leaves_mid_stream_frees_its_slot(served: World) -> None:
    served.worker.script = speak_then_hang
    async with served.client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as reply:
        async for _ in reply.aiter_text():
            break
        await served.worker.until_running(1)
    await asyncio.wait_for(served.worker.until_running(0), 1)


async def test_a_client_that_leaves_a_whole_reply_frees_its_slot(served: World) -> None:
    served.worker.script = hang
    asked = asyncio.create_task(served.client.post("/v1/chat/completions", json=body()))
    await served.worker.until_running(1)
    asked.cancel()
    await asyncio.wait_for(served.worker.until_running(0), 1)


async def test_a_client_that_leaves_before_the_first_token_frees_all_its_choices(served: World) -> None:
    served.worker.script = hang
    asked = asyncio.create_task(served.client.post("/v1/chat/completions", json=body(stream=True, n=3)))
    await served.worker.until_running(3)
    asked.cancel()
    await asyncio.wait_for(served.worker.until_running(0), 1)


async def test_a_client_that_leaves_while_the_model_loads_gives_the_wait_up(served: World) -> None:
    async def load_for_ever(model: str) -> AsyncIterator[placement_pb2.EnsureProgress]:
        yield placement_pb2.EnsureProgress(stage="read")
        await asyncio.Event().wait()

    served.placement.ensure = load_for_ever
    await served.publish(route())
    for stream in (False, True):
        asked = asyncio.create_task(served.client.post("/v1/chat/completions", json=body(stream=stream)))
        await served.placement.until_waiting(1)
        asked.cancel()
        await asyncio.wait_for(served.placement.until_waiting(0), 1)


async def test_an_error_after_the_first_byte_is_an_event_and_the_end(served: World) -> None:
    async def break_down(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("half")
        raise Internal("The engine failed.")

    served.worker.script = break_down
    reply = await served.chat("x", stream=True)
    assert reply.status_code == 200
    events = sse_data(reply.text)
    assert "[DONE]" not in events
    assert orjson.loads(events[-1]) == {
        "error": {"message": "The engine failed.", "type": "server_error", "param": None, "code": "internal_error"}
    }
    assert not any('"finish_reason":"' in event for event in events)


async def test_a_worker_that_dies_mid_stream_is_never_asked_again(served: World) -> None:
    served.worker.script = speak_then_hang
    async with served.client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as reply:
        seen = ""
        async for piece in reply.aiter_text():
            if '"begun"' in piece:
                await served.worker.stop()
            seen += piece
    assert orjson.loads(sse_data(seen)[-1])["error"]["code"] == "worker_lost"
    assert served.placement.ensured == []


async def test_a_worker_lost_before_the_first_token_costs_nothing_but_time(served: World) -> None:
    spare = await served.add_worker("b")
    served.worker.script = be_lost

    async def replace(model: str) -> AsyncIterator[placement_pb2.Replica]:
        yield spare.replica()

    served.placement.ensure = replace
    reply = await served.chat("still here")
    assert reply.json()["choices"][0]["message"]["content"] == "still here"
    assert served.placement.ensured == [(MODEL, False)]


async def test_a_second_ready_replica_is_tried_before_anything_is_loaded(served: World) -> None:
    spare = await served.add_worker("b")
    await served.publish(route(served.worker, spare))
    served.worker.script = spare.script = fail_once(WorkerLost("gone"))
    assert (await served.chat("hi")).status_code == 200
    assert (len(served.worker.requests), len(spare.requests)) == (1, 1)
    assert served.placement.ensured == []


async def test_a_stale_generation_is_retried_too(served: World) -> None:
    spare = await served.add_worker("b")
    await served.publish(route(served.worker, spare))
    served.worker.script = spare.script = fail_once(StaleGeneration("older"))
    assert (await served.chat("hi")).status_code == 200
    assert (len(served.worker.requests), len(spare.requests)) == (1, 1)


async def test_three_lost_workers_are_enough(served: World) -> None:
    served.worker.script = be_lost

    async def same_again(model: str) -> AsyncIterator[placement_pb2.Replica]:
        yield served.worker.replica()

    served.placement.ensure = same_again
    await served.publish(route())
    reply = await served.chat("x")
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "worker_lost"
    assert reply.headers["retry-after"] == "1"
    assert len(served.worker.requests) == 3


async def test_a_dead_address_waits_for_the_table_and_then_for_the_replacement(served: World) -> None:
    dead = FakeWorker(served.directory, "dead", generation=3)
    await served.publish(route(dead))

    async def load(model: str) -> AsyncIterator[placement_pb2.Replica]:
        yield served.worker.replica()

    served.placement.ensure = load
    assert (await served.chat("back again")).json()["choices"][0]["message"]["content"] == "back again"


async def test_waiting_for_a_model_shows_as_comments_only(served: World) -> None:
    async def load(model: str) -> AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]:
        for done in range(8):
            yield placement_pb2.EnsureProgress(stage="read", done_bytes=done, total_bytes=8)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.4)
        yield served.worker.replica()

    served.placement.ensure = load
    await served.publish(route())
    reply = await served.chat("at last", stream=True)
    comments = [line for line in reply.text.splitlines() if line.startswith(":")]
    assert ": loading: reading weights 87% of 8 B" in comments
    assert ": ping" in comments
    assert not [line for line in reply.text.splitlines() if line and not line.startswith((":", "data: "))]
    words = [orjson.loads(data)["choices"][0]["delta"].get("content", "") for data in sse_data(reply.text)[:-1]]
    assert "".join(words) == "at last"


async def test_a_load_that_fails_after_comments_is_an_error_event(served: World) -> None:
    async def fail(model: str) -> AsyncIterator[placement_pb2.EnsureProgress]:
        yield placement_pb2.EnsureProgress(stage="read")
        await asyncio.sleep(0.1)
        raise ModelLoadFailed("The weights are damaged.")

    served.placement.ensure = fail
    await served.publish(route())
    streamed = await served.chat("x", stream=True)
    assert orjson.loads(sse_data(streamed.text)[-1])["error"]["code"] == "model_load_failed"
    whole = await served.chat("x")
    assert whole.status_code == 503
    assert whole.headers["retry-after"] == "30"


async def test_without_the_orchestrator_loaded_models_answer_and_others_say_503(served: World) -> None:
    await served.publish(route(served.worker), route(name="other", aliases=()))
    await served.placement.stop()
    assert (await served.chat("still here")).status_code == 200
    for stream in (False, True):
        reply = await served.chat("x", model="other", stream=stream)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "orchestrator_away"
        assert int(reply.headers["retry-after"]) >= 1


async def test_before_the_first_table_requests_wait_a_little_and_then_say_so() -> None:
    async with world(over_tcp=False) as here:
        here.app.state.services.table._routes = None
        reply = await here.chat("x")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "orchestrator_away")
        waiting = asyncio.create_task(here.chat("now"))
        await asyncio.sleep(0)
        await here.publish(route(here.worker))
        assert (await waiting).status_code == 200


async def test_the_table_comes_back_with_the_orchestrator(served: World) -> None:
    services = served.app.state.services
    await served.placement.stop()
    again = type(served.placement)(served.directory)
    await again.start()
    served.placement = again
    await served.publish(route(served.worker, name="new"))
    assert [model.name for model in services.table.routes.models] == ["new"]


async def test_a_reader_who_reads_nothing_is_dropped() -> None:
    async def flood(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        while True:
            yield text("x" * 50_000)
            await asyncio.sleep(0.001)

    patience = Patience(ping_s=5, stalled_reader_s=0.3, first_table_s=QUICK.first_table_s)
    async with world(patience=patience) as here:
        here.worker.script = flood
        payload = orjson.dumps(body(stream=True))
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(payload)
        )
        port = httpx.URL(here.url).port
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, head + payload)
            await here.worker.until_running(1)
            await here.worker.until_running(0)


async def test_channels_close_when_their_replica_leaves_the_table(served: World) -> None:
    await served.chat("hi")
    channels = served.app.state.services.channels
    assert len(channels._connections) == 1
    await served.publish(route())
    assert channels._connections == {}


async def test_a_replica_that_leaves_the_table_finishes_what_it_has(served: World) -> None:
    gate = asyncio.Event()

    async def wait(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await gate.wait()
        async for event in echo(request):
            yield event

    served.worker.script = wait
    asked = asyncio.create_task(served.chat("drained"))
    await served.worker.until_running(1)
    await served.publish(route())
    gate.set()
    assert (await asked).json()["choices"][0]["message"]["content"] == "drained"
    assert served.app.state.services.channels._connections == {}


async def test_a_stopping_server_ends_streams_with_an_error_event(served: World) -> None:
    served.worker.script = speak_then_hang
    async with served.client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as reply:
        seen = ""
        async for piece in reply.aiter_text():
            if '"begun"' in piece:
                assert served.server is not None
                served.server.stop()
            seen += piece
    last = orjson.loads(sse_data(seen)[-1])
    assert last["error"]["code"] == "unavailable"
    await served.worker.until_running(0)
