"""The routes under /admin: the same abilities as the command line, behind one door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import orjson
import pytest
from fastapi.routing import APIRoute
from hostler.errors import ModelLoadFailed, ModelNeverFits
from hostler.placement.v1 import placement_pb2 as pb

from gateway.admin_door import admin_door
from gateway.routes import admin
from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import MODEL, QUICK, World, route, world

KEY = "correct-horse-battery"
MOVES = ("load", "unload", "sleep", "pin", "unpin")


def event(number: int, why: str = "room was needed") -> pb.WatchEventsResponse:
    return pb.WatchEventsResponse(
        number=number, unix_ms=1_700_000_000_000, kind=pb.EVENT_KIND_EVICTED, model=MODEL, device="cuda:0", why=why
    )


async def load_slowly(world: World) -> None:
    async def load(model: str) -> AsyncIterator[pb.EnsureProgress | pb.Replica]:
        yield pb.EnsureProgress(state=pb.MODEL_STATE_UNLOADED, stage="queue", num_ahead=2, eta_ms=9000)
        yield pb.EnsureProgress(state=pb.MODEL_STATE_LOADING, stage="read", done_bytes=1, total_bytes=4)
        yield world.worker.replica()

    world.placement.ensure = load
    await world.publish(route())


def test_every_admin_route_stands_behind_the_door() -> None:
    routes = [route for route in admin.router.routes if isinstance(route, APIRoute)]
    assert {route.path for route in routes} == {
        "/admin/status",
        "/admin/plan",
        "/admin/events",
        *(f"/admin/models/{move}" for move in MOVES),
    }
    for each in routes:
        assert [dependency.dependency for dependency in each.dependencies] == [admin_door], each.path


async def test_status_is_the_orchestrator_s_in_plain_values(called: World) -> None:
    called.placement.status = pb.GetStatusResponse(version="9", started_unix_ms=5)
    called.placement.status.devices.add(id="cuda:0", kind=pb.DEVICE_KIND_CUDA, budget_bytes=10, foreign_bytes=3)
    replica = called.placement.status.replicas.add(model=MODEL, pinned=True, completion_tokens_per_s=12.34)
    replica.parts.add(device="cuda:0", num_bytes=7)
    replica.replica.state = pb.MODEL_STATE_ASLEEP
    called.placement.status.nodes.add(sleep_budget_bytes=100, sleep_used_bytes=1, num_blank_workers=2)
    status = (await called.client.get("/admin/status")).json()
    assert (status["version"], status["started_unix_ms"]) == ("9", 5)
    assert (status["devices"][0]["kind"], status["devices"][0]["foreign_bytes"]) == ("cuda", 3)
    (shown,) = status["replicas"]
    assert (shown["state"], shown["parts"]) == ("asleep", [{"device": "cuda:0", "num_bytes": 7}])
    assert (shown["completion_tokens_per_s"], shown["pinned"]) == (12.3, True)
    assert status["nodes"] == [{"id": None, "sleep_budget_bytes": 100, "sleep_used_bytes": 1, "num_blank_workers": 2}]


async def test_a_plan_is_asked_for_by_any_name_of_the_model(called: World) -> None:
    called.placement.plan = pb.PlanModelResponse(
        feasible=False, lacking_bytes=5, advice=["quantize: int4"], reason="too large", sleep_models=["other"]
    )
    reply = await called.client.get("/v1/admin/plan", params={"model": "tiny"})
    plan = reply.json()
    assert (plan["model"], plan["feasible"], plan["lacking_bytes"]) == (MODEL, False, 5)
    assert (plan["advice"], plan["sleep_models"], plan["expected_ms"]) == (["quantize: int4"], ["other"], None)
    assert called.placement.asked == [("plan", MODEL)]


@pytest.mark.parametrize(
    ("query", "status"), [("", 400), ("?model=", 400), ("?model=none", 404), ("?model=" + "x" * 300, 400)]
)
async def test_a_plan_names_what_is_wrong_with_the_model(called: World, query: str, status: int) -> None:
    reply = await called.client.get("/admin/plan" + query)
    assert reply.status_code == status
    assert reply.json()["error"]["param"] == "model"


async def test_models_are_moved_and_pinned_by_name(called: World) -> None:
    async def post(move: str) -> dict[str, object]:
        reply = await called.client.post(f"/admin/models/{move}", json={"model": "tiny"})
        assert reply.status_code == 200
        answer: dict[str, object] = reply.json()
        return answer

    assert await post("unload") == {"model": MODEL, "num_unloaded": 2}
    assert await post("sleep") == {"model": MODEL, "num_asleep": 1}
    assert await post("pin") == {"model": MODEL, "pinned": True}
    assert called.placement.pinned == {MODEL: True}
    assert await post("unpin") == {"model": MODEL, "pinned": False}
    assert called.placement.pinned == {MODEL: False}


@pytest.mark.parametrize("move", MOVES)
async def test_a_move_names_the_field_at_fault(called: World, move: str) -> None:
    for body, status in (({}, 400), ({"model": 1}, 400), ({"model": ""}, 400), ({"model": "none"}, 404)):
        reply = await called.client.post(f"/admin/models/{move}", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, "model")
    assert called.placement.asked == []
    assert called.placement.ensured == []


async def test_a_load_answers_when_the_model_is_ready(called: World) -> None:
    await load_slowly(called)
    reply = (await called.client.post("/admin/models/load", json={"model": "tiny"})).json()
    assert reply.pop("took_ms") >= 0
    assert reply == {
        "status": "ready",
        "model": MODEL,
        "replica": called.worker.address,
        "generation": called.worker.generation,
        "cached": False,
    }
    assert called.placement.ensured == [(MODEL, True)]


async def test_a_load_streams_its_progress_when_asked(served: World) -> None:
    await load_slowly(served)
    reply = await served.client.post("/admin/models/load", json={"model": MODEL, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    waiting, reading, ready = map(orjson.loads, sse_data(reply.text))
    assert (waiting["stage"], waiting["num_ahead"], waiting["eta_ms"]) == ("queue", 2, 9000)
    assert (reading["status"], reading["state"], reading["done_bytes"], reading["total_bytes"]) == (
        "loading",
        "loading",
        1,
        4,
    )
    assert (ready["status"], ready["cached"]) == ("ready", False)


async def test_a_load_that_fails_is_an_error_before_and_after_the_first_byte(served: World) -> None:
    async def fail(model: str) -> AsyncIterator[pb.EnsureProgress]:
        yield pb.EnsureProgress(stage="read")
        raise ModelLoadFailed("The weights are damaged.")

    served.placement.ensure = fail
    await served.publish(route())
    whole = await served.client.post("/admin/models/load", json={"model": MODEL})
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "model_load_failed")
    streamed = await served.client.post("/admin/models/load", json={"model": MODEL, "stream": True})
    assert orjson.loads(sse_data(streamed.text)[-1])["error"]["code"] == "model_load_failed"


async def test_a_caller_that_leaves_gives_its_load_up(served: World) -> None:
    async def for_ever(model: str) -> AsyncIterator[pb.EnsureProgress]:
        yield pb.EnsureProgress(stage="read")
        await asyncio.Event().wait()

    served.placement.ensure = for_ever
    await served.publish(route())
    for stream in (False, True):
        body = {"model": MODEL, "stream": stream}
        asked = asyncio.create_task(served.client.post("/admin/models/load", json=body))
        await served.placement.until_waiting(1)
        asked.cancel()
        await served.placement.until_waiting(0)


async def test_what_the_orchestrator_refuses_keeps_its_name(called: World) -> None:
    called.placement.failure = ModelNeverFits("900 GiB are too many.")
    reply = await called.client.get("/admin/plan?model=tiny")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "model_never_fits")


async def test_without_the_orchestrator_every_admin_route_says_so_at_once(called: World) -> None:
    await called.placement.stop()
    body = {"model": MODEL}
    replies = [await called.client.get(f"/admin/{what}") for what in ("status", "events", "plan?model=tiny")]
    replies += [await called.client.post(f"/admin/models/{move}", json=body) for move in MOVES]
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "orchestrator_away")
        assert reply.headers["retry-after"]


async def test_past_events_are_listed_the_latest_last(called: World) -> None:
    called.placement.past = [event(number) for number in range(1, 6)]
    listed = (await called.client.get("/admin/events?max=2")).json()
    assert listed["object"] == "list"
    assert [item["number"] for item in listed["data"]] == [4, 5]
    assert listed["data"][0] == {
        "number": 4,
        "unix_ms": 1_700_000_000_000,
        "kind": "evicted",
        "model": MODEL,
        "device": "cuda:0",
        "replica": None,
        "num_bytes": None,
        "duration_ms": None,
        "why": "room was needed",
    }
    for query, param in (("max=0", "max"), ("max=x", "max"), ("max=99999", "max"), ("follow=perhaps", "follow")):
        reply = await called.client.get(f"/admin/events?{query}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_followed_events_come_as_they_happen_until_the_client_leaves(served: World) -> None:
    served.placement.past = [event(1)]
    async with served.client.stream("GET", "/admin/events?follow=true") as reply:
        lines = reply.aiter_lines()

        async def next_event() -> dict[str, object]:
            async for line in lines:
                if line.startswith("data: "):
                    value: dict[str, object] = orjson.loads(line[6:])
                    return value
            raise AssertionError("the stream ended")

        assert (await next_event())["number"] == 1
        await served.placement.until_followed(1)
        served.placement.news.put_nowait(event(2, "it was idle"))
        assert (await next_event())["why"] == "it was idle"
    await served.placement.until_followed(0)
    assert served.app.state.services.num_followers == 0


async def test_who_only_watches_does_not_hold_up_a_server_that_stops() -> None:
    async with world() as here:
        assert here.server is not None
        here.server._drain_s = 60
        async with here.client.stream("GET", "/admin/events?follow=1") as reply:
            await here.placement.until_followed(1)
            here.server.stop()
            async with asyncio.timeout(2):
                text = "".join([piece async for piece in reply.aiter_text()])
        assert orjson.loads(sse_data(text)[-1])["error"]["code"] == "unavailable"


async def test_a_follower_s_reply_opens_before_anything_happens() -> None:
    async with (
        world(patience=replace(QUICK, ping_s=60)) as here,
        asyncio.timeout(5),
        here.client.stream("GET", "/admin/events?follow=1") as reply,
    ):
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            assert line == ": following"
            break


async def test_followers_are_bounded(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_FOLLOWERS", 1)
    async with served.client.stream("GET", "/admin/events?follow=1"):
        await served.placement.until_followed(1)
        reply = await served.client.get("/admin/events?follow=1")
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "30")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_a_post_that_a_page_could_send_unasked_is_refused(called: World, kind: str | None) -> None:
    for move in MOVES:
        headers = {} if kind is None else {"content-type": kind}
        reply = await called.client.post(f"/admin/models/{move}", content=b'{"model":"tiny"}', headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert called.placement.asked == []


async def test_without_a_key_no_web_page_administers_whatever_cors_says() -> None:
    origin = "https://app.example"
    async with world(over_tcp=False, config={"cors": (origin,)}) as here:
        for headers in ({"origin": origin}, {"sec-fetch-site": "cross-site"}):
            replies = [await here.client.get("/admin/status", headers=headers)]
            replies += [
                await here.client.post(f"/admin/models/{move}", json={"model": MODEL}, headers=headers)
                for move in MOVES
            ]
            assert {reply.status_code for reply in replies} == {403}
        assert here.placement.asked == []
    async with world(over_tcp=False, config={"cors": (origin,), "api_key": KEY}) as here:
        reply = await here.client.get("/admin/status", headers={"origin": origin, "x-api-key": KEY})
        assert reply.status_code == 200
        assert (await here.client.get("/admin/status")).status_code == 401
