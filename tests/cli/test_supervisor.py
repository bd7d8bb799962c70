"""Supervision with small scripts for children: restart, back-off, the order of a stop, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cli import janitor
from cli.supervisor import Backoff, Child, Event, Supervisor

DUMMY = Path(__file__).with_name("dummy.py")
ROOT = Path(__file__).resolve().parents[2]
QUICK = Backoff(first_s=0.05, most_s=0.2, reset_s=30)


class Stage:
    """A supervisor, the journal of its children, and what it reported."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.journal = directory / "journal"
        self.events: list[Event] = []
        self.run_id = f"{directory}#{time.time_ns()}"
        self.supervisor: Supervisor | None = None

    def child(self, name: str, *manners: str, **options: Any) -> Child:
        return Child(name, (sys.executable, str(DUMMY), str(self.journal), name, *manners), **options)

    def start(self, *children: Child, backoff: Backoff = QUICK) -> Supervisor:
        self.supervisor = Supervisor(
            children, self.directory, self.run_id, on_event=self.events.append, backoff=backoff
        )
        self.supervisor.start()
        self.supervisor.watch()
        return self.supervisor

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def count(self, name: str, event: str) -> int:
        return sum(1 for line in self.lines() if line[:2] == [name, event])

    def processes(self) -> set[janitor.Process]:
        return janitor.find(janitor.of_run(self.run_id))


async def until(condition: Callable[[], Any], within_s: float = 8.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
    if stage.supervisor is not None:
        stage.supervisor.abandon()
    assert stage.processes() == set()


async def test_a_child_that_dies_is_started_again(stage: Stage) -> None:
    supervisor = stage.start(stage.child("a"), stage.child("b"))
    await until(lambda: stage.count("a", "up") and stage.count("b", "up"))
    other, victim = supervisor.pids()["b"], supervisor.pids()["a"]
    os.kill(victim, signal.SIGKILL)
    await until(lambda: stage.count("a", "up") == 2)
    assert supervisor.pids()["b"] == other
    assert supervisor.pids()["a"] != victim
    (ended,) = [event for event in stage.events if event.kind == "ended"]
    assert (ended.child, ended.pid, ended.exit_code, ended.restart_in_s) == ("a", victim, -9, 0.05)


async def test_a_child_that_keeps_dying_is_started_ever_more_seldom(stage: Stage) -> None:
    stage.start(stage.child("a", "crash"))
    await until(lambda: sum(event.kind == "ended" for event in stage.events) == 4)
    ended = [event for event in stage.events if event.kind == "ended"]
    assert [event.restart_in_s for event in ended] == [0.05, 0.1, 0.2, 0.2]
    assert {event.exit_code for event in ended} == {3}


def test_the_back_off_doubles_up_to_ten_seconds() -> None:
    backoff = Backoff()
    assert [round(backoff.delay_s(n), 1) for n in (1, 2, 3, 6, 7, 1000)] == [0.2, 0.4, 0.8, 6.4, 10.0, 10.0]


async def test_a_long_life_forgives_earlier_deaths(stage: Stage) -> None:
    supervisor = stage.start(stage.child("a"), backoff=Backoff(first_s=0.05, most_s=10, reset_s=0))
    for life in (1, 2, 3):
        await until(lambda life=life: stage.count("a", "up") == life)  # type: ignore[misc]
        os.kill(supervisor.pids()["a"], signal.SIGKILL)
    await until(lambda: stage.count("a", "up") == 4)
    assert [event.restart_in_s for event in stage.events if event.kind == "ended"] == [0.05] * 3


async def test_a_child_takes_along_those_that_depend_on_it(stage: Stage) -> None:
    stale = stage.directory / "ray.json"
    stale.touch()
    head = stage.child("head", "brood", takes_along=("driver",), removes=(stale,))
    supervisor = stage.start(head, stage.child("driver"), stage.child("other"))
    await until(lambda: stage.count("head-child", "up") and stage.count("driver", "up") and stage.count("other", "up"))
    other = supervisor.pids()["other"]
    os.kill(supervisor.pids()["head"], signal.SIGKILL)
    await until(lambda: stage.count("head", "up") == 2 and stage.count("driver", "up") == 2)
    assert not stale.exists()
    assert supervisor.pids()["other"] == other
    # The first head's stubborn child, in a session of its own, did not live to see the second head.
    await until(lambda: stage.count("head-child", "up") == 2)
    children = [line for line in stage.lines() if line[0] == "head-child"]
    assert not _runs(children[0][2])


async def test_a_stop_goes_by_rank_and_waits(stage: Stage) -> None:
    supervisor = stage.start(
        stage.child("ray", stop_rank=2), stage.child("orchestrator", stop_rank=1), stage.child("gateway")
    )
    await until(lambda: len(stage.lines()) == 3)
    await supervisor.stop()
    stopping = [line[:2] for line in stage.lines()[3:]]
    order = ("gateway", "orchestrator", "ray")
    assert stopping == [[name, event] for name in order for event in ("term", "down")]
    assert [(e.child, e.exit_code) for e in stage.events if e.kind == "stopped"] == [(name, 0) for name in order]
    assert supervisor.pids() == {}
    assert stage.processes() == set()


async def test_a_child_that_will_not_stop_is_killed_after_its_grace(stage: Stage) -> None:
    supervisor = stage.start(stage.child("a", "stubborn", stop_grace_s=0.2))
    await until(lambda: stage.count("a", "up"))
    await supervisor.stop()
    assert stage.count("a", "term") == 1
    assert "killed" in [event.kind for event in stage.events]


async def test_force_ends_a_stop_that_waits(stage: Stage) -> None:
    supervisor = stage.start(stage.child("a", "stubborn", "brood", stop_grace_s=600))
    await until(lambda: stage.count("a-child", "up"))
    stopping = asyncio.create_task(supervisor.stop())
    await until(lambda: stage.count("a", "term"))
    supervisor.force()
    async with asyncio.timeout(5):
        await stopping
    assert stage.processes() == set()


async def test_nothing_is_started_again_during_a_stop(stage: Stage) -> None:
    supervisor = stage.start(stage.child("a", "crash"), stage.child("b"))
    await until(lambda: stage.count("a", "up") and stage.count("b", "up"))
    await supervisor.stop()
    assert supervisor.pids() == {}
    lives = stage.count("a", "up")
    await asyncio.sleep(0.3)
    assert stage.count("a", "up") == lives


async def test_successors_take_over_when_all_serve_and_the_old_ones_finish(stage: Stage) -> None:
    old = [stage.child(name, "lingers", has_successors=True) for name in ("a", "b")]
    supervisor = stage.start(*old, stage.child("other"))
    await until(lambda: len(stage.lines()) == 3)
    before = supervisor.pids()
    tags = await supervisor.try_successors([stage.child("a", has_successors=True)], ("--config", "x"), 8)
    assert tags
    assert stage.count("a", "retire") == 0  # Not before they are told to.
    supervisor.hand_over(tags)
    await until(lambda: stage.count("a", "retire") == 1 and stage.count("b", "retire") == 1)
    assert stage.count("other", "retire") == 0
    os.kill(before["b"], signal.SIGTERM)
    await until(lambda: stage.count("b", "down") == 1)
    successor = (supervisor.pids().keys() - before.keys()).pop()
    # What ends is an old one, which nothing replaces; its end is no harm to its successor.
    os.kill(before["a"], signal.SIGKILL)
    await until(lambda: before["a"] not in supervisor.pids().values())
    await asyncio.sleep(0.3)
    assert (stage.count("a", "up"), stage.count("b", "up")) == (2, 1)
    # The successor is kept running, without what was for its first life alone.
    first = supervisor.pids()[successor]
    assert "--config" in _command(first)
    os.kill(first, signal.SIGKILL)
    await until(lambda: stage.count("a", "up") == 3)
    line = _command(supervisor.pids()[successor])
    assert "--config" not in line
    assert "--ready-fd" not in line


@pytest.mark.parametrize("manner", ["mute", "crash"])
async def test_successors_that_do_not_come_up_are_ended_and_the_old_ones_stay(stage: Stage, manner: str) -> None:
    supervisor = stage.start(stage.child("a", has_successors=True))
    await until(lambda: stage.count("a", "up"))
    before = supervisor.pids()
    tried = [stage.child("a", has_successors=True), stage.child("b", manner, has_successors=True)]
    assert await supervisor.try_successors(tried, (), 2.0 if manner == "mute" else 8.0) == []
    await until(lambda: supervisor.pids() == before)
    await asyncio.sleep(0.3)
    assert (stage.count("a", "up"), stage.count("b", "up")) == (2, 1)
    # The one that served may have been asked something: it was let finish. Nobody told the old one anything.
    retired = {line[2] for line in stage.lines() if line[1] == "retire"}
    assert str(before["a"]) not in retired
    assert len(retired) == 1


async def test_a_stop_ends_those_that_finish_too(stage: Stage) -> None:
    supervisor = stage.start(stage.child("a", "lingers", has_successors=True))
    await until(lambda: stage.count("a", "up"))
    supervisor.hand_over(await supervisor.try_successors([stage.child("a", has_successors=True)], (), 8))
    await until(lambda: stage.count("a", "retire"))
    await supervisor.stop()
    assert stage.count("a", "term") == 2
    assert supervisor.pids() == {}


async def test_logs_of_the_last_run_are_kept(stage: Stage) -> None:
    (stage.directory / "a.log").write_text("old")
    stage.start(stage.child("a"))
    assert (stage.directory / "a.log.1").read_text() == "old"


async def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    code = f"""if 1:
    import asyncio, sys
    from pathlib import Path
    from cli.supervisor import Child, Supervisor
    def child(name, *manners):
        return Child(name, (sys.executable, {str(DUMMY)!r}, {str(stage.journal)!r}, name, *manners))
    supervisor = Supervisor([child("a"), child("b", "stubborn", "brood")], Path({str(tmp_path)!r}),
                            {stage.run_id!r}, janitor_grace_s=0.2)
    supervisor.start()
    async def forever():
        supervisor.watch()
        await asyncio.Event().wait()
    asyncio.run(forever())"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)  # noqa: ASYNC220
    try:
        await until(lambda: stage.count("a", "up") and stage.count("b-child", "up"))
        assert len(stage.processes()) == 3
    finally:
        process.kill()
        process.wait()
    # The children go by the kernel's signal, the grandchild in a session of its own by the janitor.
    await until(lambda: not stage.processes(), within_s=5)
    pids = {line[2] for line in stage.lines()}
    await until(lambda: not any(_runs(pid) for pid in pids), within_s=2)


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _runs(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_new_supervisor_finds_what_an_earlier_one_left(tmp_path: Path) -> None:
    environment = {**os.environ, janitor.RUN_ID: f"{tmp_path}#1-1"}
    command = [sys.executable, str(DUMMY), str(tmp_path / "journal"), "left"]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 5
    while not (tmp_path / "journal").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert janitor.clear(janitor.of_earlier_runs(str(tmp_path / "other")), 0.0) == 0
    assert process.poll() is None
    assert janitor.clear(janitor.of_earlier_runs(str(tmp_path)), 0.0) == 0
    assert process.wait(5) == -9
