"""GET /health (this process is alive) and GET /ready (requests can be served). Above: `app`; below: `routing`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from hostler.placement.v1 import placement_pb2

from gateway.json_response import json_response
from gateway.routing import Routes, find_model, ready_replicas
from gateway.services import services_of

router = APIRouter()


@router.get("/health", response_model=None)
async def get_health() -> Response:
    """Say that the process lives; needs no key and asks nobody."""
    return json_response({"status": "ok"})


@router.get("/ready", response_model=None)
async def get_ready(request: Request) -> Response:
    """Answer 200 when requests can be served: see `can_serve`; with `?model=`, when that model can answer at once."""
    services = services_of(request)
    routes = services.table.routes
    models = {route.name: bool(ready_replicas(route)) for route in routes.models} if routes else {}
    name = request.query_params.get("model")
    if name is not None and routes is not None:
        ready = models[find_model(routes, name).route.name]
    else:
        ready = services.has_served = can_serve(routes, has_served=services.has_served)
    return json_response(
        {"status": "ready" if ready else "not_ready", "models": models}, status_code=200 if ready else 503
    )


def can_serve(routes: Routes | None, *, has_served: bool) -> bool:
    """Return whether a load balancer should send requests here.

    At the start not before the models that are loaded first are up. Later a model that sleeps, or is being exchanged
    for another, is no reason to stay away: it comes up when it is asked for. That all have failed is one.
    """
    if routes is None:
        return False
    states = [route.state for route in routes.models]
    if placement_pb2.MODEL_STATE_READY in states:
        return True
    coming = any(state in _COMING for state in states)
    return any(state in _ON_DEMAND for state in states) and (has_served or not coming)


_COMING = (placement_pb2.MODEL_STATE_LOADING, placement_pb2.MODEL_STATE_FETCHING)
_ON_DEMAND = (
    placement_pb2.MODEL_STATE_UNLOADED,
    placement_pb2.MODEL_STATE_ASLEEP,
    placement_pb2.MODEL_STATE_DRAINING,
    *_COMING,
)
