"""Engines over the tiny test models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workers.engine import LoadSpec

if TYPE_CHECKING:
    from workers.text.engine import TextEngine


@pytest.fixture
def open_engine() -> Callable[..., object]:
    """Open a text engine over a directory: `async with open_engine(path, **LoadSpec fields) as engine`."""

    @asynccontextmanager
    async def opened(path: Path, **options: object) -> AsyncIterator[TextEngine]:
        from workers.text.engine import TextEngine
        from workers.text.loader import load
        from workers.text.threads import Threads

        fields = {"dtype": "float32", "num_threads": 1, **options}
        spec = LoadSpec(model="tiny", path=str(path), **fields)  # type: ignore[arg-type]
        engine = TextEngine(load(spec, lambda *_: None), spec, Threads(1, 1))
        try:
            yield engine
        finally:
            await engine.close()

    return opened
