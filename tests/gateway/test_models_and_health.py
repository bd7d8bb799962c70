"""The model list, `load_model` as `transformers chat` speaks it, and the two health questions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest
from hostler.errors import ModelLoadFailed, ModelNotFound
from hostler.placement.v1 import placement_pb2

from gateway.routes.models import loading_object
from gateway.routing import Routes, RouteTable, find_model, key_of
from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import MODEL, World, route, world


def test_a_model_is_found_by_name_alias_revision_and_any_case() -> None:
    routes = Routes([route(), route(name="Tiny@v2", aliases=("second",))])
    for name in (MODEL, "tiny", "ORG/Tiny-Chat", f"{MODEL}@main", "TINY@main", "tiny@abc"):
        assert find_model(routes, name).name == MODEL
    assert find_model(routes, "Tiny@v2").name == "Tiny@v2"
    assert find_model(routes, "second").name == "Tiny@v2"
    for name in ("", "@main", "org", "chat", "tiny-chat"):
        with pytest.raises(ModelNotFound):
            find_model(routes, name)


async def test_waiting_for_a_replica_to_go_ends_with_the_table_or_the_deadline() -> None:
    replica = placement_pb2.Replica(address="unix:/x", generation=4)
    model = placement_pb2.ModelRoute(name="m", replicas=[replica])
    table = RouteTable()
    table.replace(Routes([model]))
    assert not await table.gone(key_of(replica), 0.01)
    waiting = asyncio.create_task(table.gone(key_of(replica), 5))
    await asyncio.sleep(0)
    table.replace(Routes([]))
    assert await waiting


async def test_models_are_listed_and_described(called: World) -> None:
    expected = {"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "org"} | {"max_model_len": 8192}
    assert (await called.client.get("/v1/models")).json() == {"object": "list", "data": [expected]}
    for path in (f"/v1/models/{MODEL}", f"/models/{MODEL.replace('/', '%2F')}", "/v1/models/tiny"):
        assert (await called.client.get(path)).json() == expected
    reply = await called.client.get("/v1/models/other")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_is_alive_and_ready_is_per_model(called: World) -> None:
    await called.publish(route(called.worker), route(name="cold", aliases=()))
    assert (await called.client.get("/health")).json() == {"status": "ok"}
    reply = await called.client.get("/ready")
    assert (reply.status_code, reply.json()["models"]) == (200, {MODEL: True, "cold": False})
    assert (await called.client.get("/ready?model=tiny")).status_code == 200
    assert (await called.client.get("/v1/ready?model=cold")).status_code == 503
    assert (await called.client.get("/ready?model=none")).status_code == 404


async def test_a_server_is_not_ready_before_the_models_that_are_loaded_first_are_up(called: World) -> None:
    await called.publish(route(state=placement_pb2.MODEL_STATE_LOADING), route(name="cold", aliases=()))
    reply = await called.client.get("/ready")
    assert (reply.status_code, reply.json()["models"]) == (503, {MODEL: False, "cold": False})


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (placement_pb2.MODEL_STATE_UNLOADED, 200),
        (placement_pb2.MODEL_STATE_ASLEEP, 200),
        (placement_pb2.MODEL_STATE_LOADING, 200),
        (placement_pb2.MODEL_STATE_FAILED, 503),
    ],
)
async def test_a_server_whose_models_come_up_on_demand_stays_ready(called: World, state: int, status: int) -> None:
    await called.publish(route(called.worker))
    assert (await called.client.get("/ready")).status_code == 200
    await called.publish(route(state=state))
    assert (await called.client.get("/ready")).status_code == status


async def test_a_loaded_model_is_ready_and_cached(called: World) -> None:
    reply = await called.client.post("/load_model", json={"model": f"{MODEL}@main"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert [orjson.loads(data) for data in sse_data(reply.text)] == [
        {"status": "ready", "model": MODEL, "cached": True}
    ]
    assert called.placement.ensured == []


async def test_loading_reports_progress_and_ends_ready() -> None:
    async with world() as here:

        async def load(model: str) -> AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]:
            yield placement_pb2.EnsureProgress(stage="download", done_bytes=5, total_bytes=10)
            yield placement_pb2.EnsureProgress(stage="read", done_bytes=1, total_bytes=4)
            yield here.worker.replica()

        here.placement.ensure = load
        await here.publish(route())
        reply = await here.client.post("/v1/load_model", json={"model": "tiny"})
        assert [orjson.loads(data) for data in sse_data(reply.text)] == [
            {"status": "loading", "model": MODEL, "stage": "download", "progress": {"current": 5, "total": 10}},
            {"status": "loading", "model": MODEL, "stage": "weights", "progress": {"current": 25, "total": 100}},
            {"status": "ready", "model": MODEL, "cached": False},
        ]
        assert here.placement.ensured == [(MODEL, True)]


async def test_a_failed_load_is_told_in_that_clients_words(called: World) -> None:
    async def fail(model: str) -> AsyncIterator[placement_pb2.EnsureProgress]:
        raise ModelLoadFailed("The weights are damaged.")
        yield

    called.placement.ensure = fail
    await called.publish(route())
    reply = await called.client.post("/load_model", json={"model": "tiny"})
    event = orjson.loads(sse_data(reply.text)[0])
    assert (event["status"], event["message"]) == ("error", "The weights are damaged.")
    for body, status in (({"model": "none"}, 404), ({}, 400), ({"model": 1}, 400)):
        assert (await called.client.post("/load_model", json=body)).status_code == status


def test_a_stage_without_bytes_has_no_progress() -> None:
    step = placement_pb2.EnsureProgress(stage="evict")
    assert loading_object("m", step) == {"status": "loading", "model": "m", "stage": "evict"}


def test_an_adapter_is_found_by_its_name_in_any_case_and_means_its_model() -> None:
    routes = Routes([route(adapters=("Support-Bot",)), route(name="other", aliases=())])
    for name in ("Support-Bot", "support-bot", "Support-Bot@main"):
        target = find_model(routes, name)
        assert (target.name, target.adapter, target.route.name) == ("Support-Bot", "Support-Bot", MODEL)
    assert find_model(routes, MODEL).adapter == ""


async def test_adapters_are_listed_as_models_with_their_parent(called: World) -> None:
    await called.publish(route(called.worker, adapters=("bot", "poet")), route(name="other", aliases=()))
    listed = (await called.client.get("/v1/models")).json()["data"]
    assert [(model["id"], model.get("parent")) for model in listed] == [
        (MODEL, None), ("bot", MODEL), ("poet", MODEL), ("other", None),
    ]  # fmt: skip
    assert (await called.client.get("/v1/models/poet")).json() == listed[2]
    assert listed[2] == listed[0] | {"id": "poet", "parent": MODEL}
    assert (await called.client.get("/v1/ready?model=bot")).status_code == 200


async def test_a_request_for_an_adapter_goes_to_its_model_s_worker_with_its_name(called: World) -> None:
    await called.publish(route(called.worker, adapters=("bot",)))
    replies = [await called.chat(model="bot", n=2), await called.chat(model="Bot"), await called.chat()]
    assert [reply.json()["model"] for reply in replies] == ["bot", "bot", MODEL]
    assert [request.adapter for request in called.worker.requests] == ["bot", "bot", "bot", ""]
    unknown = await called.chat(model="cot")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_asking_for_an_adapter_brings_its_model_up(called: World) -> None:
    async def load(model: str) -> AsyncIterator[placement_pb2.Replica]:
        yield called.worker.replica()

    called.placement.ensure = load
    await called.publish(route(adapters=("bot",)))
    reply = await called.client.post("/load_model", json={"model": "bot"})
    assert [orjson.loads(data) for data in sse_data(reply.text)] == [
        {"status": "ready", "model": "bot", "cached": True}
    ]
    assert (await called.chat(model="bot")).json()["model"] == "bot"
    assert called.placement.ensured == [(MODEL, True), (MODEL, False)]
    assert [request.adapter for request in called.worker.requests] == ["bot"]
