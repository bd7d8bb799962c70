"""How the real effects end a worker when Ray does not help. A real process, a fake Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostler.config import build
from hostler.rundir import RunDir

from orchestrator.effects import Memory, Placement
from orchestrator.effects_ray import RayEffects
from orchestrator.process_id import ProcessId
from workers.server import serve


class FakeRay:
    """The few calls of Ray that we make, all of which fail with one error."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked: list[str] = []
        self.util = self

    def list_named_actors(self) -> list[str]:
        raise self.error

    def get_actor(self, name: str) -> Any:
        self.asked.append(name)
        raise self.error

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        raise AssertionError("there is no actor to kill")


@pytest.fixture
def frozen() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        os.kill(process.pid, signal.SIGSTOP)
        yield process
        process.kill()


def effects_with(ray: FakeRay, directory: Path, monkeypatch: pytest.MonkeyPatch) -> RayEffects:
    async def connected() -> FakeRay:
        return ray

    effects = RayEffects(build({}), RunDir(directory))
    monkeypatch.setattr(effects, "_ray", connected)
    return effects


async def test_a_frozen_worker_of_an_earlier_orchestrator_is_ended_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: subprocess.Popen[bytes]
) -> None:
    """A past bug: Ray's look-up of a dying actor whose creator is gone fails an assertion, and the kill with it."""
    ray = FakeRay(AssertionError("Expected str or bytes, got <class 'NoneType'>"))
    effects = effects_with(ray, tmp_path, monkeypatch)
    identity = ProcessId.of(frozen.pid)
    assert identity is not None
    memory = {"generation": 1, "placements": [], "processes": {"w1": [identity.pid, identity.start_ticks]}}
    (tmp_path / "placements.json").write_text(json.dumps(memory))
    effects.recall()
    await effects.kill("w1")
    assert not identity.is_alive
    assert ray.asked == []


@pytest.mark.parametrize("error", [AssertionError("no class"), ValueError("no such actor"), RuntimeError("GCS")])
async def test_whatever_ray_says_about_an_unknown_worker_it_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ray = FakeRay(error)
    effects = effects_with(ray, tmp_path, monkeypatch)
    socket = RunDir(tmp_path).worker_socket("w2")
    socket.touch()
    await effects.kill("w2")
    assert ray.asked == ["hostler-w2"]
    assert not socket.exists()


async def test_a_worker_is_ended_while_ray_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: subprocess.Popen[bytes]
) -> None:
    effects = RayEffects(build({}), RunDir(tmp_path))
    identity = ProcessId.of(frozen.pid)
    assert identity is not None
    memory = {"generation": 1, "placements": [], "processes": {"w3": [identity.pid, identity.start_ticks]}}
    (tmp_path / "placements.json").write_text(json.dumps(memory))
    effects.recall()
    async with asyncio.timeout(10):
        await effects.kill("w3")
    assert not identity.is_alive


async def test_a_remembered_worker_is_found_even_when_ray_cannot_list_its_actors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the model would be loaded a second time beside the living worker."""
    effects = effects_with(FakeRay(TimeoutError()), tmp_path, monkeypatch)
    placed = Placement("w4", 9, "echo", (("cpu", 1000),), 0, "because", 5)
    effects.remember(Memory(9, (placed, replace(placed, worker_id="gone", generation=8))))
    socket = RunDir(tmp_path).worker_socket("w4")
    serving = asyncio.create_task(serve(str(socket), 9, "w4"))
    try:
        async with asyncio.timeout(10):
            while not socket.exists():
                await asyncio.sleep(0.01)
            (found,) = await effects.find_workers()
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert (found.worker_id, found.placement) == ("w4", placed)
    assert found.report is not None
    assert (found.report.generation, found.report.pid) == (9, os.getpid())
