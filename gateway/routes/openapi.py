"""GET /openapi.json: what this API is. Above: `app`; below: `gateway.openapi`."""

from __future__ import annotations

from fastapi import APIRouter, Response

from gateway.json_response import json_response
from gateway.openapi.document import document

router = APIRouter()


@router.get("/openapi.json", response_model=None)
async def get_document() -> Response:
    """Return the OpenAPI document."""
    return json_response(document())
