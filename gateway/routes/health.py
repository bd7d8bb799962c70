"""GET /health (this process is alive) and GET /ready (a model can answer). Above: `app`; below: `routing`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.json_response import json_response
from gateway.routing import find_model, ready_replicas
from gateway.services import services_of

router = APIRouter()


@router.get("/health", response_model=None)
async def get_health() -> Response:
    """Say that the process lives; needs no key and asks nobody."""
    return json_response({"status": "ok"})


@router.get("/ready", response_model=None)
async def get_ready(request: Request) -> Response:
    """Answer 200 when any model can answer now, or the one named by `?model=`; 503 otherwise."""
    routes = services_of(request).table.routes
    models = {route.name: bool(ready_replicas(route)) for route in routes.models} if routes else {}
    name = request.query_params.get("model")
    ready = any(models.values()) if name is None or routes is None else models[find_model(routes, name).route.name]
    return json_response(
        {"status": "ready" if ready else "not_ready", "models": models}, status_code=200 if ready else 503
    )
