"""The OpenAPI document tells every route, and only those, and is valid."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
from fastapi.routing import APIRoute

from gateway.openapi.document import document
from gateway.openapi.operations import OPERATIONS
from tests.gateway.fakes import World, world


async def test_every_route_is_described_and_everything_described_is_a_route(called: World) -> None:
    routes = {
        (method, route.path) for route in called.app.routes if isinstance(route, APIRoute) for method in route.methods
    }
    assert routes == {(operation.method, operation.path) for operation in OPERATIONS}


async def test_the_document_is_served_and_needs_the_key_if_there_is_one(called: World) -> None:
    assert (await called.client.get("/openapi.json")).json() == document()
    async with world(over_tcp=False, config={"api_key": "correct-horse-battery"}) as here:
        assert (await here.client.get("/openapi.json")).status_code == 401


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in references(item)]
    return [found for item in value for found in references(item)] if isinstance(value, list) else []


def test_every_reference_leads_to_a_schema_and_every_schema_is_used() -> None:
    schemas = document()["components"]["schemas"]
    named = {reference.rpartition("/")[2] for reference in references(document())}
    assert named == set(schemas)


@pytest.mark.parametrize("name", sorted(document()["components"]["schemas"]))
def test_a_schema_is_one(name: str) -> None:
    jsonschema_rs.meta.validate({**document()["components"]["schemas"][name]})
