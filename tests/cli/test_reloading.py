"""What a reload would do, in words; that it does all of it or nothing; what the signals mean."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hostler.config import ConfigError, HostlerConfig, ModelConfig, build, read_resolved, stamp_of, write_resolved
from hostler.placement.v1.placement_pb2_grpc import add_PlacementServiceServicer_to_server
from hostler.rundir import RunDir

from cli import changes, reloading
from cli.report import LineReporter
from cli.supervisor import Child
from orchestrator import models
from tests.cli.fakes import FakePlacement


def config(*entries: dict[str, Any], **values: Any) -> HostlerConfig:
    return build({"models": list(entries), **values})


def test_changes_are_told_without_secrets() -> None:
    old = config({"name": "a"}, {"name": "b"}, {"name": "c"}, api_key="old-secret-key")
    new = config(
        {"name": "a", "keep_alive": 5}, {"name": "b", "max_running": 2}, {"name": "d"}, api_key="new-secret-key"
    )
    found = changes.between(old, new)
    assert set(found.lines) == {
        "api_key: changed",
        "model a: keep_alive changed",
        "model b: max_running changed; it is loaded anew",
        "model c: removed, once its running requests have ended",
        "model d: added",
    }
    assert (found.refused, found.gateways) == ((), True)
    assert changes.between(old, old) == changes.Changes()


@pytest.mark.parametrize(
    ("values", "gateways"),
    [({"min_residency": 1}, False), ({"max_wait": 1}, False), ({"max_body": 10**6}, True), ({"drain_s": 1}, True)],
)
def test_gateways_are_replaced_only_for_what_they_read(values: dict[str, Any], gateways: bool) -> None:
    assert changes.between(config({"name": "a"}), config({"name": "a"}, **values)).gateways is gateways


def test_no_gateway_reads_what_is_said_to_be_placements_alone() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in Path("gateway").rglob("*.py"))
    for key in changes.PLACEMENT_ONLY:
        assert f"config.{key}" not in text


OTHER_VALUES: dict[str, Any] = {
    "source": "org/other",
    "revision": "v2",
    "aliases": ["other"],
    "adapters": {"x": "/x"},
    "engine": "text",
    "device": "cpu",
    "dtype": "float32",
    "quantize": "int8",
    "beams": 5,
    "preload": True,
    "pinned": True,
    "keep_alive": 3,
    "priority": "batch",
    "group": "g",
    "trust_remote_code": True,
}


@pytest.mark.parametrize("key", sorted(set(ModelConfig.model_fields) - {"name"}))
def test_what_is_loaded_anew_is_what_the_orchestrator_loads_anew(key: str) -> None:
    value = OTHER_VALUES.get(key, 33)
    old, new = ModelConfig(name="a"), ModelConfig.model_validate({"name": "a", key: value})
    anew = models.recipe(models.from_config(old)) != models.recipe(models.from_config(new))
    assert anew is (key not in changes.KEPT_LOADED)


class FakeSupervisor:
    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.comes_up = True
        self.tried: list[tuple[str, ...]] = []
        self.handed_over: list[list[str]] = []

    async def try_successors(self, children: list[Child], arguments: tuple[str, ...], within_s: float) -> list[str]:
        self.tried.append(tuple(child.name for child in children))
        assert read_resolved(Path(arguments[1])).max_body == 10**6
        assert read_resolved(self.run_dir.config).max_body == 8 * 10**6  # Not in force before they serve.
        return [f"{child.name}~1" for child in children] if self.comes_up else []

    def hand_over(self, tags: list[str]) -> None:
        self.handed_over.append(tags)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Rig:
    """A reloader over a fake supervisor, and an orchestrator that takes over what it finds."""

    def __init__(self, directory: Path, resolve: Callable[[], HostlerConfig]) -> None:
        self.run_dir = RunDir(directory)
        self.supervisor = FakeSupervisor(self.run_dir)
        self.old = config({"name": "a"}, gateways=2)
        write_resolved(self.old, self.run_dir.config)
        self.signals = reloading.Signals()

        def children(of: HostlerConfig) -> list[Child]:
            return [Child("orchestrator", ()), *(Child(f"gateway-{n}", (), has_successors=True) for n in range(2))]

        supervisor: Any = self.supervisor
        self.reloader = reloading.Reloader(resolve, self.old, self.run_dir, supervisor, children, self.signals)
        self.told: list[str] = []
        self.reloader.on_begin = lambda: self.told.append("begin")
        self.reloader.on_end = lambda ok: self.told.append(f"end {ok}")

    async def ask(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        for number, request in enumerate(requests):
            (self.run_dir.path / reloading.REQUEST.format(number)).write_text(json.dumps(request))

        async def orchestrate() -> None:
            while True:
                self.run_dir.config_taken.write_text(stamp_of(self.run_dir.config))
                await asyncio.sleep(0.01)

        num_told = len(self.told)
        tasks = [asyncio.create_task(orchestrate()), asyncio.create_task(self.reloader.run(LineReporter(False)))]
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)
        answers = [self.run_dir.path / reloading.ANSWER.format(number) for number in range(len(requests))]
        async with asyncio.timeout(8):
            while not (all(path.exists() for path in answers) if requests else len(self.told) == num_told + 2):
                await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = [json.loads(path.read_text()) for path in answers]
        for path in answers:
            path.unlink()
        return found


@pytest.mark.usefixtures("handlers")
async def test_a_reload_is_in_force_once_successors_serve(tmp_path: Path) -> None:
    new = config({"name": "a"}, gateways=2, max_body=10**6)
    rig = Rig(tmp_path, lambda: new)
    (dry,) = await rig.ask({"dry_run": True})
    assert dry == {
        "ok": True,
        "faults": [],
        "changes": ["max_body: 8000000 → 1000000"],
        "warnings": [],
        "applied": False,
    }
    assert (rig.told, rig.supervisor.tried) == ([], [])
    (answer,) = await rig.ask({"dry_run": False})
    assert answer == dry | {"applied": True}
    assert rig.told == ["begin", "end True"]
    assert rig.supervisor.tried == [("gateway-0", "gateway-1")]
    assert rig.supervisor.handed_over == [["gateway-0~1", "gateway-1~1"]]
    assert read_resolved(rig.run_dir.config) == new == rig.reloader.config
    assert rig.run_dir.config.stat().st_mode & 0o777 == 0o600
    (again,) = await rig.ask({"dry_run": False})
    assert again == {"ok": True, "faults": [], "changes": [], "warnings": [], "applied": False}
    assert len(rig.supervisor.tried) == 1


@pytest.mark.usefixtures("handlers")
async def test_models_that_a_reload_brings_are_looked_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rig = Rig(tmp_path, lambda: config({"name": "a"}, {"name": "tiny"}, {"name": "huge"}, gateways=2, max_body=10**6))
    placement = FakePlacement()
    server = grpc.server(ThreadPoolExecutor(2))
    add_PlacementServiceServicer_to_server(placement, server)
    server.add_insecure_port(f"unix:{rig.run_dir.orchestrator_socket}")
    server.start()
    try:
        (answer,) = await rig.ask({"dry_run": False})
    finally:
        server.stop(None)
    assert answer["applied"]
    assert answer["warnings"] == ["huge will not load: huge needs 900 GiB; the largest device has 8 GiB."]
    assert placement.calls == [("PlanModel", "tiny"), ("PlanModel", "huge")], "what was there before is not looked at"
    assert "✗ huge will not load" in "".join(capsys.readouterr())


@pytest.mark.usefixtures("handlers")
async def test_successors_that_do_not_serve_leave_everything_as_it_was(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda: config({"name": "a"}, gateways=2, max_body=10**6))
    rig.supervisor.comes_up = False
    (answer,) = await rig.ask({"dry_run": False})
    assert (answer["ok"], answer["applied"]) == (False, False)
    assert "did not come up" in answer["faults"][0]
    assert rig.told == ["begin", "end False"]
    assert read_resolved(rig.run_dir.config) == rig.old == rig.reloader.config
    assert rig.supervisor.handed_over == []
    assert not (tmp_path / "config.next.json").exists()


@pytest.mark.usefixtures("handlers")
async def test_a_fault_or_what_needs_a_restart_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> HostlerConfig:
        raise ConfigError("max_bodi: unknown key; did you mean 'max_body'?")

    rig = Rig(tmp_path, broken)
    await rig.ask()  # A plain signal, without a request.
    assert "not reloaded: max_bodi: unknown key; did you mean 'max_body'?" in capsys.readouterr().out
    assert rig.told == ["begin", "end False"]
    rig = Rig(tmp_path, lambda: config({"name": "b"}, gateways=2, max_body=10**6, port=9000))
    (answer,) = await rig.ask({"dry_run": False})
    assert answer["faults"] == ["port: 8000 → 9000: needs a restart, so nothing was changed"]
    assert read_resolved(rig.run_dir.config) == rig.old


@pytest.mark.usefixtures("handlers")
def test_a_hang_up_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for has_terminal in (True, False):
        monkeypatch.setattr(reloading, "_has_terminal", lambda has_terminal=has_terminal: has_terminal)
        asked = reloading.Signals()
        assert (asked.hangup_stops, asked.numbers) == (False, [signal.SIGUSR1])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("has_terminal", [True, False])
def test_a_hang_up_stops_where_there_is_a_terminal_and_reloads_elsewhere(
    monkeypatch: pytest.MonkeyPatch, has_terminal: bool
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(reloading, "_has_terminal", lambda: has_terminal)
    asked = reloading.Signals()
    assert asked.hangup_stops is has_terminal
    assert (signal.SIGHUP in asked.numbers) is not has_terminal


def test_reload_without_a_server_says_what_to_do(hostler: Callable[..., Any]) -> None:
    result = hostler("reload")
    assert result.exit_code == 1
    assert "no hostler is running" in result.output
