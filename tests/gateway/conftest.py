"""Worlds: `served` speaks TCP through uvicorn, `called` calls the application directly."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.fakes import World, world


@pytest.fixture
async def served() -> AsyncIterator[World]:
    async with world() as here:
        yield here


@pytest.fixture
async def called() -> AsyncIterator[World]:
    async with world(over_tcp=False) as here:
        yield here
