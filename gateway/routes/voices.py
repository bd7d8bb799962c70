"""GET /audio/voices, as Open WebUI asks for it. Above: `app`; below: `routing`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2

from gateway.json_response import json_response
from gateway.routing import Target, find_speaking_model
from gateway.services import services_of

router = APIRouter()

DEFAULT_VOICE = "default"
"""Every model takes it as its first voice, so it can be told of one whose voices are not known yet."""


@router.get("/audio/voices", response_model=None)
async def list_voices(request: Request) -> Response:
    """List the voices of every model that speaks, or of the one that the query names."""
    services = services_of(request)
    routes = await services.table.first(services.patience.first_table_s)
    name = request.query_params.get("model")
    allowed = [route for route in routes.models if Target(route).is_allowed]
    shown = [find_speaking_model(routes, name).route] if name else allowed
    return json_response(voices_object(shown))


def voices_object(routes: Iterable[placement_pb2.ModelRoute]) -> dict[str, Any]:
    """Return the list: id and name are what a request's `voice` may be; `model` is whose it is.

    The voices of a model are known from its first load on.
    """
    voices = []
    for route in routes:
        if route.engine == lifecycle_pb2.ENGINE_KIND_SPEECH:
            for voice in route.info.voices or (DEFAULT_VOICE,):
                voices.append({"id": voice, "name": voice, "model": route.name})
    return {"object": "list", "voices": voices}
