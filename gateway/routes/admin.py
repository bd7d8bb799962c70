"""Everything under /admin: see where models are and why, and move them. Above: `app`; below: `placement`, `sse`.

The same abilities as the command line's `ps`, `plan`, `load`, `unload`, `sleep`, `pin`, `unpin` and `events`, and the
same JSON (`hostler.placement_json`). Every route stands behind `admin_door`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from hostler.errors import InvalidRequest, ModelLoadFailed, Overloaded
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement_json import event_json, plan_json, progress_json, status_json

from gateway.admin_door import admin_door
from gateway.body import read_json
from gateway.doors import request_id_of
from gateway.fields import MAX_MODEL_CHARS, Fields, show
from gateway.json_response import json_response
from gateway.routing import Target, find_model, ready_replicas
from gateway.services import Services, event_stream, services_of
from gateway.sse import comment_frame, data_frame

router = APIRouter(prefix="/admin", dependencies=[Depends(admin_door)])

MAX_BODY_BYTES = 64 * 1024
MAX_EVENTS = 10_000
USUAL_EVENTS = 100
# Each holds a call to the orchestrator.
MAX_FOLLOWERS = 64


@router.get("/status", response_model=None)
async def get_status(request: Request) -> Response:
    """Return devices, models, replicas and nodes as they are now."""
    services = services_of(request)
    asking = services.placement.status(request_id=request_id_of(request.scope))
    status = await services.lifetime.until_gone(request.receive, asking)
    return json_response(status_json(status, int(time.time() * 1000)))


@router.get("/plan", response_model=None)
async def get_plan(request: Request) -> Response:
    """Say what bringing `?model=` up would do now, and why, without doing it."""
    services = services_of(request)
    model = await _model_of(services, request.query_params.get("model"))
    asking = services.placement.plan(model, request_id=request_id_of(request.scope))
    plan = await services.lifetime.until_gone(request.receive, asking)
    return json_response(plan_json(model, plan))


@router.post("/models/load", response_model=None)
async def load_model(request: Request) -> Response:
    """Bring a model up. With `"stream": true` events tell the progress; without, the reply comes when it is ready."""
    services = services_of(request)
    fields = await _read(request)
    stream = bool(fields.boolean("stream"))
    target = await _target_of(services, fields.string("model", MAX_MODEL_CHARS))
    steps = _load(services, target, request_id_of(request.scope))
    if stream:
        return event_stream(request, _frames(steps))
    return json_response(await services.lifetime.until_gone(request.receive, _last(steps)))


@router.post("/models/unload", response_model=None)
async def unload_model(request: Request) -> Response:
    """Let a model's requests finish, then remove it from memory."""
    services = services_of(request)
    model = await _model_in(request)
    asking = services.placement.unload(model, request_id=request_id_of(request.scope))
    num_unloaded = await services.lifetime.until_gone(request.receive, asking)
    return json_response({"model": model, "num_unloaded": num_unloaded})


@router.post("/models/sleep", response_model=None)
async def sleep_model(request: Request) -> Response:
    """Let a model's requests finish, then take it off its device, quick to wake; answers when that has begun."""
    services = services_of(request)
    model = await _model_in(request)
    asking = services.placement.sleep(model, request_id=request_id_of(request.scope))
    num_asleep = await services.lifetime.until_gone(request.receive, asking)
    return json_response({"model": model, "num_asleep": num_asleep})


@router.post("/models/pin", response_model=None)
async def pin_model(request: Request) -> Response:
    """Keep a model from being evicted."""
    return await _pin(request, pinned=True)


@router.post("/models/unpin", response_model=None)
async def unpin_model(request: Request) -> Response:
    """Let a pinned model be evicted again."""
    return await _pin(request, pinned=False)


@router.get("/events", response_model=None)
async def get_events(request: Request) -> Response:
    """List the latest `?max=` events, oldest first; with `?follow=true` go on with each new one, as an event stream."""
    services = services_of(request)
    max_past = _max_past(request.query_params.get("max"))
    follow = _flag("follow", request.query_params.get("follow"))
    request_id = request_id_of(request.scope)
    if follow:
        return event_stream(request, _followed(services, max_past, request_id), is_spectator=True)

    async def collect() -> list[dict[str, Any]]:
        async with aclosing(services.placement.events(max_past, request_id=request_id, past_only=True)) as events:
            return [event_json(event) async for event in events]

    events = await services.lifetime.until_gone(request.receive, collect())
    return json_response({"object": "list", "data": events})


async def _read(request: Request) -> Fields:
    max_bytes = min(MAX_BODY_BYTES, services_of(request).config.max_body)
    return Fields(await read_json(request.headers, request.receive, max_bytes))


async def _target_of(services: Services, name: str | None) -> Target:
    if not name:
        raise InvalidRequest("You must provide a model parameter.", param="model")
    if len(name) > MAX_MODEL_CHARS:
        raise InvalidRequest(f"Invalid 'model': longer than {MAX_MODEL_CHARS} characters.", param="model")
    return find_model(await services.table.first(services.patience.first_table_s), name)


async def _model_of(services: Services, name: str | None) -> str:
    return (await _target_of(services, name)).route.name


async def _model_in(request: Request) -> str:
    fields = await _read(request)
    return await _model_of(services_of(request), fields.string("model", MAX_MODEL_CHARS))


async def _pin(request: Request, *, pinned: bool) -> Response:
    services = services_of(request)
    model = await _model_in(request)
    asking = services.placement.pin(model, pinned=pinned, request_id=request_id_of(request.scope))
    await services.lifetime.until_gone(request.receive, asking)
    return json_response({"model": model, "pinned": pinned})


async def _load(services: Services, target: Target, request_id: str) -> AsyncGenerator[dict[str, Any], None]:
    """Yield progress, and last what is ready."""
    model = target.route.name
    began = time.monotonic()
    cached = bool(ready_replicas(target.route))
    steps = services.placement.ensure(model, request_id=request_id, timeout_s=services.patience.ensure_s, explicit=True)
    async with aclosing(steps):
        async for step in steps:
            if isinstance(step, pb.Replica):
                took_ms = round((time.monotonic() - began) * 1000)
                ready = {"status": "ready", "model": model, "replica": step.id, "generation": step.generation}
                yield ready | {"cached": cached, "took_ms": took_ms}
            else:
                yield {"status": "loading", "model": model, **progress_json(step)}


async def _last(steps: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    last: dict[str, Any] | None = None
    async with aclosing(steps):
        async for step in steps:
            last = step
    if last is None or last["status"] != "ready":
        raise ModelLoadFailed("The model could not be brought up.")
    return last


async def _frames(steps: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(steps):
        async for step in steps:
            yield data_frame(step)


async def _followed(services: Services, max_past: int, request_id: str) -> AsyncGenerator[bytes, None]:
    if services.num_followers >= MAX_FOLLOWERS:
        raise Overloaded(f"{MAX_FOLLOWERS} callers already follow events here. Try again later.", retry_after_s=30.0)
    services.num_followers += 1
    try:
        # Opens the reply soon, though nothing may happen for hours.
        yield comment_frame("following")
        async with aclosing(services.placement.events(max_past, request_id=request_id)) as events:
            async for event in events:
                yield data_frame(event_json(event))
    finally:
        services.num_followers -= 1


def _max_past(text: str | None) -> int:
    if text is None:
        return USUAL_EVENTS
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MAX_EVENTS):
        raise InvalidRequest(f"Invalid 'max': expected 1 to {MAX_EVENTS}, but got {show(text)} instead.", param="max")
    return int(text)


def _flag(name: str, text: str | None) -> bool:
    if text is None or text.lower() in ("false", "0"):
        return False
    if text.lower() in ("true", "1", ""):
        return True
    raise InvalidRequest(f"Invalid '{name}': expected true or false, but got {show(text)} instead.", param=name)
