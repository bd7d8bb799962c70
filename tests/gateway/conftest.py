"""Worlds: `served` speaks TCP through uvicorn, `called` calls the application directly."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest

from tests.gateway.fakes import World, world

# Each test has an event loop of its own. Without this reference gRPC stops its poller thread whenever the last object
# of a test is collected, and joining that thread from within the collector can hang.
grpc.aio.init_grpc_aio()


@pytest.fixture
async def served() -> AsyncIterator[World]:
    async with world() as here:
        yield here


@pytest.fixture
async def called() -> AsyncIterator[World]:
    async with world(over_tcp=False) as here:
        yield here
