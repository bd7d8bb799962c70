"""GET /models, /models/{id} in the caller's dialect; POST /load_model. Above: `app`; below: `routing`, `placement`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from hostler.errors import HostlerError
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2

from gateway.body import read_json
from gateway.dialects.anthropic_messages import models as anthropic
from gateway.doors import request_id_of
from gateway.error_reply import speaks_anthropic
from gateway.fields import Fields
from gateway.json_response import json_response
from gateway.routes.pages import query_integer
from gateway.routing import Target, find_model, ready_replicas, targets_of
from gateway.services import Services, event_stream, services_of
from gateway.sse import data_frame

router = APIRouter()

# The words that `transformers chat` has labels for; it shows any other stage by its own name.
_STAGES = {
    "read": "weights",
    "warm-up": "weights",
    "import": "config",
    "compile": "config",
    "spawn": "config",
    "queue": "config",
}
_TASKS: dict[int, str] = {
    lifecycle_pb2.ENGINE_KIND_EMBEDDING: "feature-extraction",
    lifecycle_pb2.ENGINE_KIND_RERANK: "text-ranking",
    lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION: "automatic-speech-recognition",
    lifecycle_pb2.ENGINE_KIND_SPEECH: "text-to-speech",
}


@router.get("/models", response_model=None)
async def list_models(request: Request) -> Response:
    """List what can be served: each model, then its adapters."""
    services = services_of(request)
    routes = await services.table.first(services.patience.first_table_s)
    targets = [target for route in routes.models for target in targets_of(route) if target.is_allowed]
    if speaks_anthropic(request.scope):
        query = request.query_params
        limit = query_integer(request, "limit", 1, anthropic.MAX_LIMIT, anthropic.DEFAULT_LIMIT)
        return json_response(
            anthropic.page_of_models(
                targets, limit=limit, after_id=query.get("after_id"), before_id=query.get("before_id")
            )
        )
    return json_response({"object": "list", "data": [model_object(target) for target in targets]})


@router.get("/models/{model:path}", response_model=None)
async def get_model(request: Request, model: str) -> Response:
    """Describe one model; ids may hold slashes."""
    services = services_of(request)
    routes = await services.table.first(services.patience.first_table_s)
    target = find_model(routes, model)
    return json_response(anthropic.model_object(target) if speaks_anthropic(request.scope) else model_object(target))


def model_object(target: Target) -> dict[str, Any]:
    """Return OpenAI's `model` object, and fields that clients read of other servers.

    Of vLLM's: `parent` is an adapter's base model; `max_model_len` the context in tokens, known once the model was
    loaded. A model that does not write text tells what it does as `task`, in the Hub's words.
    """
    route = target.route
    described = {
        "id": target.name,
        "object": "model",
        "created": route.created_unix_s,
        "owned_by": route.owned_by or "hostler",
    }
    context = {"max_model_len": route.info.max_context_tokens} if route.info.max_context_tokens else {}
    task = {"task": _TASKS[route.engine]} if route.engine in _TASKS else {}
    return described | context | task | ({"parent": route.name} if target.adapter else {})


@router.post("/load_model", response_model=None)
async def load_model(request: Request) -> Response:
    """Bring a model up and report progress, as `transformers chat` asks before its first message."""
    services = services_of(request)
    fields = Fields(await read_json(request.headers, request.receive, services.config.max_body))
    name = fields.model()
    routes = await services.table.first(services.patience.first_table_s)
    target = find_model(routes, name)
    return event_stream(request, _load_frames(services, target, request_id_of(request.scope)))


async def _load_frames(services: Services, target: Target, request_id: str) -> AsyncGenerator[bytes, None]:
    if ready_replicas(target.route):
        yield data_frame({"status": "ready", "model": target.name, "cached": True})
        return
    steps = services.placement.ensure(
        target.route.name, request_id=request_id, timeout_s=services.patience.ensure_s, explicit=True
    )
    waited = False
    try:
        async with aclosing(steps):
            async for step in steps:
                if isinstance(step, placement_pb2.Replica):
                    yield data_frame({"status": "ready", "model": target.name, "cached": not waited})
                else:
                    waited = True
                    yield data_frame(loading_object(target.name, step))
    except HostlerError as error:
        # This client knows only its own words for failure, and shows the message.
        yield data_frame({"status": "error", "model": target.name, "message": error.message, "code": error.reason})


def loading_object(model: str, progress: placement_pb2.EnsureProgress) -> dict[str, Any]:
    """Return one `loading` event: bytes for a download, percent for everything else (that client counts "items")."""
    event: dict[str, Any] = {"status": "loading", "model": model, "stage": _STAGES.get(progress.stage, progress.stage)}
    if progress.total_bytes:
        if progress.stage == "download":
            event["progress"] = {"current": progress.done_bytes, "total": progress.total_bytes}
        else:
            event["progress"] = {"current": 100 * progress.done_bytes // progress.total_bytes, "total": 100}
    return event
