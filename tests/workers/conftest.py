"""Engines over the tiny test models, with either runner."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workers.engine import LoadSpec

if TYPE_CHECKING:
    from workers.text.engine import TextEngine


@pytest.fixture(params=["eager", "native"])
def runner_name(request: pytest.FixtureRequest) -> str:
    """Which runner the engines of a test use; every engine test runs with both."""
    return str(request.param)


@pytest.fixture
def engine_device(request: pytest.FixtureRequest) -> str:
    """Where the engines of a test are opened: `pytest --device`, the CPU unless told otherwise."""
    return str(request.config.getoption("--device"))


@pytest.fixture
def open_engine(runner_name: str, engine_device: str) -> Callable[..., object]:
    """Open a text engine over a directory: `async with open_engine(path, **LoadSpec fields) as engine`.

    On another device than the CPU it has the runner that serves there, whatever that is.
    """

    @asynccontextmanager
    async def opened(path: Path, **options: object) -> AsyncIterator[TextEngine]:
        from workers.text.describe import NotSupported
        from workers.text.directory import read_directory
        from workers.text.eager import open_eager
        from workers.text.engine import TextEngine
        from workers.text.loader import load
        from workers.text.native.build import build
        from workers.text.opening import open_native, open_runner

        fields: dict[str, object] = {
            "model": "tiny",
            "path": str(path),
            "devices": (engine_device,),
            "dtype": "float32",
            "num_threads": 1,
            **options,
        }
        spec = LoadSpec(**fields)  # type: ignore[arg-type]
        directory = read_directory(spec)
        try:
            if engine_device != "cpu":
                loaded, runner, _ = open_runner(directory, spec, lambda *_: None)
            else:
                loaded = load(spec, lambda *_: None, directory)
                is_native = runner_name == "native"
                runner = open_native(directory, loaded, spec, build()) if is_native else open_eager(loaded, spec)
                if not is_native:
                    runner.runs_ahead = True  # as it does on a GPU: the next step is begun before tokens are told
        except NotSupported as reason:
            # `test_native.py` says which families the kernels must take.
            pytest.skip(f"no kernels for it: {reason}")
        engine = TextEngine(loaded, spec, runner)
        try:
            yield engine
        finally:
            await engine.close()

    return opened
