"""Background responses: begun, polled, followed, cancelled and lost, by the process that runs them and by others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from hostler.errors import WorkerLost
from hostler.inference.v1 import inference_pb2 as pb

from gateway.responses.database import Database
from gateway.services import Services
from tests.gateway.fakes import MODEL, FakeWorker, World, finish, text, world
from tests.gateway.responses_schema import check_response, check_stream
from tests.gateway.test_process import gateway_process


class Held:
    """A worker's script that says one word, then waits for the test, then says another."""

    def __init__(self, worker: FakeWorker) -> None:
        self.go = asyncio.Event()
        worker.script = self._script

    async def _script(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        await self.go.wait()
        yield text(" ended")
        yield finish(2)


async def begin(client: httpx.AsyncClient, **fields: Any) -> str:
    reply = await client.post("/v1/responses", json={"model": MODEL, "input": "x", "background": True, **fields})
    assert reply.status_code == 200, reply.text
    response = check_response(reply.json())
    assert (response["status"], response["background"], response["output"]) == ("queued", True, [])
    return str(response["id"])


async def fetch(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    reply = await client.get(f"/v1/responses/{response_id}")
    assert reply.status_code == 200, reply.text
    return check_response(reply.json())


async def until(client: httpx.AsyncClient, response_id: str, *statuses: str) -> dict[str, Any]:
    """Poll as a client does until the response has one of these statuses."""
    async with asyncio.timeout(10):
        while (response := await fetch(client, response_id))["status"] not in statuses:
            await asyncio.sleep(0.02)
    return response


async def follow(client: httpx.AsyncClient, response_id: str, after: int | None = None) -> str:
    query: dict[str, Any] = {"stream": "true"} | ({} if after is None else {"starting_after": after})
    reply = await client.get(f"/v1/responses/{response_id}", params=query)
    assert reply.headers["content-type"].startswith("text/event-stream")
    return reply.text


async def first_piece(client: httpx.AsyncClient, response_id: str, piece: str) -> None:
    """Follow a response until its stream holds `piece`, then hang up."""
    async with client.stream("GET", f"/v1/responses/{response_id}", params={"stream": "true"}) as reply:
        seen = ""
        async for more in reply.aiter_text():
            seen += more
            if piece in seen:
                return
    raise AssertionError(f"the stream ended without {piece!r}: {seen}")


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[World, World]]:
    """Two gateways with one store: what the first runs, the second only reads."""
    config = {"responses_dir": tmp_path}
    async with world(config=config) as runs, world(config=config) as reads:
        yield runs, reads


async def test_it_is_queued_at_once_runs_without_its_client_and_is_fetched_when_done(served: World) -> None:
    held = Held(served.worker)
    response_id = await begin(served.client)
    await served.worker.until_running(1)
    running = await until(served.client, response_id, "in_progress")
    assert running["output"] == []
    assert running["completed_at"] is None
    held.go.set()
    done = await until(served.client, response_id, "completed")
    assert done["output"][0]["content"][0]["text"] == "begun ended"
    assert done["usage"]["total_tokens"] == 7


async def test_its_events_are_followed_from_any_number_while_it_runs_and_afterwards(served: World) -> None:
    held = Held(served.worker)
    response_id = await begin(served.client)
    following = asyncio.create_task(follow(served.client, response_id))
    await first_piece(served.client, response_id, "begun")
    held.go.set()
    events = check_stream(await following)
    assert [event["type"] for event in events[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert events[-1]["response"] == await fetch(served.client, response_id)
    for number in (0, 4, len(events) - 2):
        tail = check_stream(await follow(served.client, response_id, after=number), first_number=number + 1)
        assert tail == events[number + 1 :]
    assert await follow(served.client, response_id, after=len(events) - 1) == ""


async def test_a_stream_that_breaks_off_is_taken_up_again(served: World) -> None:
    held = Held(served.worker)
    body = {"model": MODEL, "input": "x", "background": True, "stream": True}
    seen = ""
    async with served.client.stream("POST", "/v1/responses", json=body) as reply:
        async for piece in reply.aiter_text():
            seen += piece
            if "begun" in seen:
                break
    events = [orjson.loads(line[6:]) for line in seen.splitlines() if line.startswith("data: ")]
    response_id, last = events[0]["response"]["id"], events[-1]["sequence_number"]
    held.go.set()
    rest = check_stream(await follow(served.client, response_id, after=last), first_number=last + 1)
    assert rest[-1]["response"]["output"][0]["content"][0]["text"] == "begun ended"


async def test_the_sdk_polls_and_resumes(served: World) -> None:
    held = Held(served.worker)
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        response = await client.responses.create(model=MODEL, input="x", background=True)
        assert response.status == "queued"
        held.go.set()
        stream = await client.responses.retrieve(response.id, stream=True, starting_after=1)
        kinds = [event.type async for event in stream]
        assert (kinds[0], kinds[-1]) == ("response.in_progress", "response.completed")
        assert (await client.responses.retrieve(response.id)).output_text == "begun ended"


async def test_cancelling_frees_the_worker_and_ends_the_followers(served: World) -> None:
    Held(served.worker)
    response_id = await begin(served.client)
    await first_piece(served.client, response_id, "begun")
    following = asyncio.create_task(follow(served.client, response_id))
    await served.worker.until_running(1)
    cancelled = await served.client.post(f"/v1/responses/{response_id}/cancel")
    assert check_response(cancelled.json())["status"] == "cancelled"
    await served.worker.until_running(0)
    events = check_stream(await asyncio.wait_for(following, 5))
    assert events[-1]["response"]["status"] == "cancelled"
    again = await served.client.post(f"/v1/responses/{response_id}/cancel")
    assert again.json() == cancelled.json()
    assert (await fetch(served.client, response_id))["status"] == "cancelled"


async def test_what_has_ended_stays_as_it_is_when_cancelled(served: World) -> None:
    Held(served.worker).go.set()
    response_id = await begin(served.client)
    done = await until(served.client, response_id, "completed")
    assert (await served.client.post(f"/v1/responses/{response_id}/cancel")).json() == done


async def test_deleting_stops_it(served: World) -> None:
    Held(served.worker)
    response_id = await begin(served.client)
    path = f"/v1/responses/{response_id}"
    seen = ""
    async with served.client.stream("GET", path, params={"stream": "true"}) as following:
        async for piece in following.aiter_text():
            if "begun" in piece:
                assert (await served.client.delete(path)).status_code == 200
            seen += piece
    assert '"type":"error","code":"not_found"' in seen
    await served.worker.until_running(0)
    assert (await served.client.get(path)).status_code == 404


async def test_a_failure_is_told_to_who_polls_and_to_who_follows(served: World) -> None:
    async def break_off(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        raise WorkerLost("the worker died")

    served.worker.script = break_off
    response_id = await begin(served.client)
    failed = await until(served.client, response_id, "failed")
    assert failed["error"]["message"] == "the worker died"
    assert check_stream(await follow(served.client, response_id))[-1]["type"] == "response.failed"
    again = await served.client.post(
        "/v1/responses", json={"model": MODEL, "input": "y", "previous_response_id": response_id}
    )
    assert again.json()["error"]["code"] == "previous_response_not_completed"


async def test_it_continues_responses_and_extends_conversations(served: World) -> None:
    made = (await served.client.post("/v1/conversations", json={})).json()
    Held(served.worker).go.set()
    first = await begin(served.client, conversation=made["id"])
    await until(served.client, first, "completed")
    listed = (await served.client.get(f"/v1/conversations/{made['id']}/items")).json()["data"]
    assert [item["content"][0]["text"] for item in listed] == ["begun ended", "x"]
    second = await begin(served.client)
    await until(served.client, second, "completed")
    await until(served.client, await begin(served.client, previous_response_id=second), "completed")
    assert len(served.worker.requests[-1].chat.messages) == 3


async def test_no_more_than_so_many_run_at_once(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(served.worker)
    services: Services = served.app.state.services
    monkeypatch.setattr(services.background, "_max_running", 1)
    first = await begin(served.client)
    refused = await served.client.post("/v1/responses", json={"model": MODEL, "input": "x", "background": True})
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    held.go.set()
    await until(served.client, first, "completed")
    await begin(served.client)


async def test_another_process_sees_it_follows_it_and_cancels_it(pair: tuple[World, World]) -> None:
    runs, reads = pair
    held = Held(runs.worker)
    response_id = await begin(runs.client)
    following = asyncio.create_task(follow(reads.client, response_id))
    await first_piece(reads.client, response_id, "begun")
    assert (await fetch(reads.client, response_id))["status"] == "in_progress"
    held.go.set()
    assert check_stream(await following)[-1]["response"]["status"] == "completed"
    held.go.clear()
    second = await begin(runs.client)
    await runs.worker.until_running(1)
    assert (await reads.client.post(f"/v1/responses/{second}/cancel")).json()["status"] == "cancelled"
    await runs.worker.until_running(0)
    assert (await fetch(runs.client, second))["status"] == "cancelled"


async def test_a_stop_of_the_server_is_told_as_a_failure(tmp_path: Path) -> None:
    config = {"responses_dir": tmp_path, "drain_s": 0.1}
    async with world(config=config) as stops:
        Held(stops.worker)
        response_id = await begin(stops.client)
        await stops.worker.until_running(1)
        stopped_worker = stops.worker
    async with world(config=config) as remains:
        failed = await fetch(remains.client, response_id)
    assert failed["status"] == "failed"
    assert "stopped" in failed["error"]["message"]
    assert stopped_worker.num_running == 0


async def test_what_a_killed_process_was_working_on_has_failed(tmp_path: Path) -> None:
    async with world(config={"responses_dir": tmp_path}) as remains:
        async with gateway_process(drain_s=1, responses_dir=tmp_path) as killed:
            Held(killed.worker)
            response_id = await begin(killed.client)
            await first_piece(killed.client, response_id, "begun")
            following = asyncio.create_task(follow(remains.client, response_id))
            assert (await fetch(remains.client, response_id))["status"] == "in_progress"
            killed.process.kill()
            await killed.process.wait()
        failed = await fetch(remains.client, response_id)
        assert failed["status"] == "failed"
        assert failed["error"]["message"].startswith("The process")
        assert check_stream(await asyncio.wait_for(following, 5))[-1]["type"] == "response.failed"
        own = remains.app.state.services.responses._runner.name
        assert [name for name in os.listdir(tmp_path) if "runner" in name] == [f"responses.db.runner-{own}"]


async def test_a_store_that_fails_at_the_end_does_not_leave_it_running(served: World) -> None:
    held = Held(served.worker)
    response_id = await begin(served.client)
    await first_piece(served.client, response_id, "begun")
    services: Services = served.app.state.services
    finished = asyncio.Event()
    whole = services.responses.run

    async def fail(work: Any, *args: Any) -> Any:
        if work is Database.finish:
            finished.set()
            return await whole(Database.finish, *args[:1], {**args[1], "output": [{"bad": "no id"}]}, *args[2:])
        return await whole(work, *args)

    services.responses.run = fail  # type: ignore[method-assign]
    held.go.set()
    await asyncio.wait_for(finished.wait(), 5)
    failed = await until(served.client, response_id, "failed")
    assert failed["error"]["code"] == "server_error"
