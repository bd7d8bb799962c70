"""Keeps the processes of one server running: starts them at once, restarts them, stops them in order.

Above stands `cli.serve` (the screen and the signals), below the operating system. It knows commands, not what
they do, so tests give it small scripts. Everything runs in the main thread: `start` before any event loop
exists (the children get going while we still import), the rest on the loop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cli import janitor

if TYPE_CHECKING:
    import asyncio

_LAUNCH = str(Path(__file__).with_name("launch.py"))
_JANITOR = str(Path(__file__).with_name("janitor.py"))
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep running.

    Args:
        name: names its log file and stands in its environment.
        command: what to run.
        env: added to the environment.
        pass_fds: descriptors that it inherits under the same numbers.
        stop_rank: a stop ends the lowest rank first and waits for it.
        stop_grace_s: from SIGTERM to SIGKILL.
        death_signal: what the kernel sends it when the supervisor dies.
        removes: files that are wrong once it has ended.
        takes_along: children that are useless once it has ended; they are killed, and restarted.
        has_successors: another may take its place while it finishes what it has begun: it writes a byte to the
            descriptor of `--ready-fd` once it serves, and on SIGUSR1 begins nothing more and ends when it is done.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()
    stop_rank: int = 0
    stop_grace_s: float = 10.0
    death_signal: signal.Signals = signal.SIGKILL
    removes: tuple[Path, ...] = ()
    takes_along: tuple[str, ...] = ()
    has_successors: bool = False


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before a restart: doubling from `first_s` to `most_s`; a life of `reset_s` starts over."""

    first_s: float = 0.2
    most_s: float = 10.0
    reset_s: float = 30.0

    def delay_s(self, num_short_lives: int) -> float:
        """Return the wait after that many short lives in a row (1 or more)."""
        return min(self.most_s, self.first_s * 2.0 ** min(num_short_lives - 1, 30))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a child. `exit_code` is negative for a signal, as in `subprocess`."""

    kind: Literal["started", "ended", "stopped", "killed"]
    child: str
    pid: int
    exit_code: int | None = None
    num_short_lives: int = 0
    restart_in_s: float | None = None


class _Running:
    """A child's present life. Owned by the supervisor, touched only in the main thread.

    Attributes:
        tag: stands in its environment; of two with one name the successor has another.
        role: "trial" until it has told that it serves and takes over; "leaving" once another has. Neither is restarted.
        ready: of one on trial, whether it serves.
    """

    def __init__(self, child: Child, tag: str = "", role: Literal["kept", "trial", "leaving"] = "kept") -> None:
        self.child = child
        self.tag = tag or child.name
        self.role = role
        self.ready: asyncio.Future[bool] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.num_short_lives = 0
        self.restart: asyncio.TimerHandle | None = None


class Supervisor:
    """Supervises `children`; call `start`, then `watch` inside the loop, then `stop`.

    Args:
        children: in the order in which they are started.
        logs: directory for one log file each; last run's become `NAME.log.1`.
        run_id: marks every process of this run (see `cli.janitor`).
        on_event: called in the main thread for everything that happens.
        env: the environment to start from; default ours.
        janitor_grace_s: how long what is left may take to end by itself after we were SIGKILLed.
    """

    def __init__(
        self,
        children: Iterable[Child],
        logs: Path,
        run_id: str,
        *,
        on_event: Callable[[Event], None] = lambda event: None,
        backoff: Backoff | None = None,
        env: Mapping[str, str] | None = None,
        janitor_grace_s: float = 5.0,
    ) -> None:
        self.on_event = on_event
        self._running = {child.name: _Running(child) for child in children}
        self._logs = logs
        self._run_id = run_id
        self._backoff = backoff or Backoff()
        self._env = dict(os.environ if env is None else env)
        self._janitor_grace_s = janitor_grace_s
        self._janitor: subprocess.Popen[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._changed: asyncio.Event | None = None
        self._num_successors = 0

    def pids(self) -> dict[str, int]:
        """Return the pid of every child that runs now, by name; of two with one name the later has another."""
        return {name: r.process.pid for name, r in self._running.items() if r.process is not None}

    def start(self) -> None:
        """Start everything at once. Main thread only; needs no event loop."""
        for name in self._running:
            log = self._logs / f"{name}.log"
            with suppress(FileNotFoundError):
                log.replace(log.with_suffix(".log.1"))
        for running in self._running.values():
            self._spawn(running)
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", _JANITOR, self._run_id, str(self._janitor_grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _spawn(self, running: _Running, arguments: tuple[str, ...] = (), pass_fds: tuple[int, ...] = ()) -> None:
        child = running.child
        running.restart = None
        running.started_at = time.monotonic()
        signal_number = str(int(child.death_signal))
        with (self._logs / f"{child.name}.log").open("ab") as log:
            running.process = subprocess.Popen(
                [sys.executable, "-I", "-S", _LAUNCH, str(os.getpid()), signal_number, *child.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._env, **child.env, janitor.RUN_ID: self._run_id, janitor.CHILD: running.tag},
                pass_fds=(*child.pass_fds, *pass_fds),
                start_new_session=True,
            )
        self.on_event(Event("started", child.name, running.process.pid))

    def watch(self) -> None:
        """Restart children from now on. Call once, inside the running loop, in the main thread."""
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        _adopt_orphans()
        self._loop.add_signal_handler(signal.SIGCHLD, self._collect)
        self._collect()

    def _collect(self) -> None:
        """Notice the children that ended. Runs on SIGCHLD, and whenever we want to be sure."""
        for running in list(self._running.values()):
            process = running.process
            if process is None or (exit_code := process.poll()) is None:
                continue
            running.process = None
            self._ended(running, process.pid, exit_code)
        self._reap_orphans()
        if self._changed is not None:
            self._changed.set()

    def _reap_orphans(self) -> None:
        """Collect the children of our dead children (Ray's daemons), which in a container nobody else may do."""
        ours = {*self.pids().values(), self._janitor.pid if self._janitor is not None else 0}
        with suppress(ChildProcessError):
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if found.si_pid in ours:
                    return  # it ended just now; its own SIGCHLD brings us back
                os.waitpid(found.si_pid, 0)

    def _ended(self, running: _Running, pid: int, exit_code: int) -> None:
        child = running.child
        self._kill_rest(running.tag, pid)
        for path in child.removes:
            path.unlink(missing_ok=True)
        if running.role != "kept":
            del self._running[running.tag]
            if running.ready is not None and not running.ready.done():
                running.ready.set_result(False)
            self.on_event(Event("stopped", child.name, pid, exit_code))
            return
        if self._stopping or self._loop is None:
            self.on_event(Event("stopped", child.name, pid, exit_code))
            return
        long_lived = time.monotonic() - running.started_at >= self._backoff.reset_s
        running.num_short_lives = 1 if long_lived else running.num_short_lives + 1
        delay_s = self._backoff.delay_s(running.num_short_lives)
        running.restart = self._loop.call_later(delay_s, self._spawn, running)
        self.on_event(Event("ended", child.name, pid, exit_code, running.num_short_lives, delay_s))
        for name in child.takes_along:
            if (other := self._running[name].process) is not None:
                _kill_group(other.pid)

    def _kill_rest(self, tag: str, pid: int) -> None:
        """End what a dead child has left behind: a half-dead service must not meet its own replacement."""
        _kill_group(pid)
        janitor.kill(janitor.find(janitor.of_child(self._run_id, tag)))

    # ------------------------------------------------------------ successors

    async def try_successors(self, children: Sequence[Child], arguments: tuple[str, ...], within_s: float) -> list[str]:
        """Start children beside those of the same names; return their tags once all serve, or nothing.

        Args:
            children: each with `has_successors`.
            arguments: added to their commands in this life alone.
            within_s: how long they have; if one ends or is late all are killed.
        """
        import asyncio

        tried: list[_Running] = []
        try:
            for child in children:
                self._num_successors += 1
                running = _Running(child, f"{child.name}~{self._num_successors}", "trial")
                self._running[running.tag] = running
                tried.append(running)
                self._spawn_on_trial(running, arguments)
            await asyncio.wait([running.ready for running in tried if running.ready is not None], timeout=within_s)
        except BaseException:
            self._discard(tried)
            raise
        if all(_serves(running) for running in tried) and not self._stopping:
            return [running.tag for running in tried]
        self._discard(tried)
        return []

    def _spawn_on_trial(self, running: _Running, arguments: tuple[str, ...]) -> None:
        if (loop := self._loop) is None:
            raise RuntimeError("successors without watch()")
        ready = running.ready = loop.create_future()
        read_end, write_end = os.pipe()

        def on_readable() -> None:
            loop.remove_reader(read_end)
            told = os.read(read_end, 1) == b"1"
            os.close(read_end)
            if not ready.done():
                ready.set_result(told)

        try:
            self._spawn(running, (*arguments, "--ready-fd", str(write_end)), (write_end,))
        finally:
            os.close(write_end)
            loop.add_reader(read_end, on_readable)

    def _discard(self, tried: Iterable[_Running]) -> None:
        for running in tried:
            if running.process is None:
                self._running.pop(running.tag, None)
            elif _serves(running):
                self._retire(running)  # It serves, so it may have been asked something already.
            else:
                _kill_group(running.process.pid)

    def _retire(self, running: _Running) -> None:
        running.role = "leaving"
        if running.restart is not None:
            running.restart.cancel()
        if running.process is None:
            del self._running[running.tag]
        else:
            running.process.send_signal(signal.SIGUSR1)

    def hand_over(self, tags: Iterable[str]) -> None:
        """Keep these successors running from now on; all others that have successors finish what they have begun."""
        taking = set(tags)
        for running in list(self._running.values()):
            if running.tag in taking:
                running.role = "kept"
            elif running.child.has_successors and running.role == "kept":
                self._retire(running)

    async def stop(self) -> None:
        """Stop all children in the order of their ranks, SIGTERM first. `force` makes it return soon."""
        self._stopping = True
        for running in self._running.values():
            if running.restart is not None:
                running.restart.cancel()
        for rank in sorted({running.child.stop_rank for running in self._running.values()}):
            members = [r for r in self._running.values() if r.child.stop_rank == rank]
            for running in members:
                if running.process is not None:
                    running.process.terminate()
            await self._wait_for(members)
        self._finish()

    async def _wait_for(self, members: list[_Running]) -> None:
        import asyncio

        if self._changed is None:
            raise RuntimeError("stop() without watch()")
        start = time.monotonic()
        while left := [r for r in members if r.process is not None]:
            elapsed_s = time.monotonic() - start
            for running in left:
                if running.process is not None and elapsed_s >= running.child.stop_grace_s:
                    _kill_group(running.process.pid)
                    self.on_event(Event("killed", running.child.name, running.process.pid))
            next_s = min(r.child.stop_grace_s - elapsed_s for r in left)
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, min(next_s, 1.0))):
                    await self._changed.wait()
            self._collect()

    def force(self) -> None:
        """SIGKILL everything now, for a second Ctrl-C; a `stop` that waits returns soon."""
        self._stopping = True
        for running in self._running.values():
            if running.restart is not None:
                running.restart.cancel()
            if running.process is not None:
                _kill_group(running.process.pid)

    def abandon(self) -> None:
        """SIGKILL everything and wait, when there is no loop (any more): the start failed half-way."""
        self.force()
        for running in self._running.values():
            if running.process is not None:
                running.process.wait()
        self._finish()

    def _finish(self) -> None:
        janitor.clear(janitor.of_run(self._run_id), grace_s=0.0, deadline_s=5.0)
        if self._janitor is not None:
            self._janitor.kill()
            self._janitor.communicate()


def _serves(running: _Running) -> bool:
    return running.ready is not None and running.ready.done() and running.ready.result()


def _adopt_orphans() -> None:
    """Become the parent of our descendants whose parent dies (Linux; elsewhere it does nothing)."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
