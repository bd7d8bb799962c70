"""GET /metrics: Prometheus' text. Above: `app`; below: `metrics`, `state_metrics`, `placement`.

It stands behind `admin_door`, as everything does that tells of more than the caller's own requests.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request, Response
from hostler.errors import HostlerError
from hostler.placement.v1 import placement_pb2 as pb
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.admin_door import admin_door
from gateway.doors import request_id_of
from gateway.services import Services, services_of
from gateway.state_metrics import StateCollector

router = APIRouter(dependencies=[Depends(admin_door)])

STATUS_WITHIN_S = 2.0
"""A scrape is answered without the orchestrator's part when that takes longer."""


@router.get("/metrics", response_model=None)
async def get_metrics(request: Request) -> Response:
    """Return this server's metrics, of all its gateways, devices and models."""
    services = services_of(request)
    state = StateCollector(await _status(services, request_id_of(request.scope)))
    text = await asyncio.to_thread(services.meter.text, state)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def _status(services: Services, request_id: str) -> pb.GetStatusResponse | None:
    try:
        async with asyncio.timeout(STATUS_WITHIN_S):
            return await services.placement.status(request_id=request_id)
    except (HostlerError, TimeoutError):
        return None
