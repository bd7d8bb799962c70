"""GET /audio/models, as Open WebUI asks for it. Above: `app`; below: `routing`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2

from gateway.json_response import json_response
from gateway.routes.models import model_object
from gateway.routing import Target
from gateway.services import services_of

router = APIRouter()

_AUDIO = (lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION, lifecycle_pb2.ENGINE_KIND_SPEECH)


@router.get("/audio/models", response_model=None)
async def list_audio_models(request: Request) -> Response:
    """List the models that hear or speak."""
    services = services_of(request)
    routes = await services.table.first(services.patience.first_table_s)
    return json_response(audio_models_object(route for route in routes.models if Target(route).is_allowed))


def audio_models_object(routes: Iterable[placement_pb2.ModelRoute]) -> dict[str, Any]:
    """Return the list under `models`, where Open WebUI looks, and under `data`, where lists of models have it."""
    models = [{**model_object(Target(route)), "name": route.name} for route in routes if route.engine in _AUDIO]
    return {"object": "list", "data": models, "models": models}
