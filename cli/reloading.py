"""Taking a changed configuration over while the server runs: all of it, or nothing.

Above stand `cli.serve` and its screen, and `hostler reload` in another process; below, `cli.changes` and
`cli.supervisor`. Successors of the gateways begin on the same listening socket with the new configuration; only when
all of them serve does `config.json` become the new one, which the orchestrator sees and takes over by itself, and the
old gateways finish what they have begun. So whatever goes wrong before leaves everything as it was.

`hostler reload` leaves a request in the run directory and sends SIGUSR1; the answer lies beside it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostler.config import HostlerConfig, stamp_of, write_resolved
from hostler.rundir import RunDir

from cli import changes
from cli.exits import explain

if TYPE_CHECKING:
    from types import FrameType

    from cli.report import Reporter
    from cli.supervisor import Child, Supervisor

RELOAD_SIGNAL = signal.SIGUSR1
_SUCCESSORS_S = 60.0
_TAKEN_S = 10.0
_LOOK_EVERY_S = 0.05
REQUEST, ANSWER = "reload-{}.request", "reload-{}.answer"


def _has_terminal() -> bool:
    """Tell whether a terminal controls this process, so that SIGHUP says that it is gone."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Signals:
    """The signals that ask for a reload; caught from now on, before anything can take long.

    Attributes:
        hangup_stops: SIGHUP says that the terminal is gone. Without a terminal it asks for a reload; ignored when we
            started (nohup) it stays ignored.
    """

    def __init__(self) -> None:
        is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self.hangup_stops = not is_ignored and _has_terminal()
        self.numbers = [RELOAD_SIGNAL] if is_ignored or self.hangup_stops else [RELOAD_SIGNAL, signal.SIGHUP]
        self.came = False
        for number in self.numbers:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.came = True


class Reloader:
    """Reloads one server's configuration, one reload at a time. Lives in the supervisor's loop and main thread.

    Args:
        resolve: reads flags, environment and file again.
        config: what the server runs with.
        run_dir: where `config.json` is.
        supervisor: of the server's processes.
        make_children: the processes that a configuration asks for.
        signals: what asks for a reload.

    Attributes:
        on_begin: called when a reload begins.
        on_end: called when it is over, with whether the new configuration is in force.
    """

    def __init__(
        self,
        resolve: Callable[[], HostlerConfig],
        config: HostlerConfig,
        run_dir: RunDir,
        supervisor: Supervisor,
        make_children: Callable[[HostlerConfig], list[Child]],
        signals: Signals,
    ) -> None:
        self.config = config
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[bool], None] = lambda ok: None
        self._resolve = resolve
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._make_children = make_children
        self._signals = signals

    async def run(self, report: Reporter) -> None:
        """Reload whenever a signal asks for it; never ends. Signals that come during a reload ask for one more."""
        import asyncio

        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in self._signals.numbers:
            loop.add_signal_handler(number, asked.set)
        if self._signals.came:
            asked.set()
        while True:
            await asked.wait()
            asked.clear()
            await self._answer(report)

    async def _answer(self, report: Reporter) -> None:
        requests = _take_requests(self._run_dir.path)
        reloads = [key for key, dry_run in requests.items() if not dry_run]
        dry_runs = [key for key, dry_run in requests.items() if dry_run]
        if dry_runs:
            _, answer = self._look()
            for key in dry_runs:
                _put(self._run_dir.path / ANSWER.format(key), answer | {"applied": False})
        if reloads or not dry_runs:
            self.on_begin()
            applied = False
            try:
                answer = await self._reload(report)
                applied = bool(answer["ok"])
            finally:
                self.on_end(applied)
            for key in reloads:
                _put(self._run_dir.path / ANSWER.format(key), answer)

    def _look(self) -> tuple[HostlerConfig | None, dict[str, Any]]:
        """Return the configuration that the files mean now, and the verdict on it; None: it cannot be taken over."""
        try:
            config = self._resolve()
        except Exception as error:
            return None, {"ok": False, "faults": explain(error)[1], "changes": [], "warnings": []}
        found = changes.between(self.config, config)
        answer = {"ok": not found.refused, "faults": [], "changes": list(found.lines), "warnings": []}
        if found.refused:
            answer["faults"] = [f"{line}: needs a restart, so nothing was changed" for line in found.refused]
            return None, answer
        return config, answer

    async def _reload(self, report: Reporter) -> dict[str, Any]:
        from cli import outlook  # what it needs takes long to import

        before = self.config.models
        config, answer = self._look()
        if config is not None and answer["changes"] and (fault := await self._take_over(config)) is not None:
            answer |= {"ok": False, "faults": [fault]}
        answer["applied"] = bool(answer["ok"] and answer["changes"])
        if not answer["ok"]:
            for line in answer["faults"]:
                report.say("reload_failed", f"not reloaded: {line}", "bad", fault=line)
        elif answer["changes"]:
            report.say("reloaded", "reloaded the configuration", "good", changes=answer["changes"])
            for line in answer["changes"]:
                report.say("reload_change", f"  {line}", "dim", change=line)
            changed = [model for model in self.config.models if model not in before]
            found = await outlook.hopeless(self._run_dir, changed)
            answer["warnings"] = [outlook.in_words(name, error) for name, error in found.items()]
            for line in answer["warnings"]:
                report.say("reload_warning", f"  ✗ {line}", "bad", warning=line)
        else:
            report.say("reload_unchanged", "reloaded: the configuration is as it was", "dim")
        return answer

    async def _take_over(self, config: HostlerConfig) -> str | None:
        """Make a configuration the one in force; return what went wrong, and then nothing has changed."""
        draft = self._run_dir.path / "config.next.json"
        write_resolved(config, draft)
        try:
            tags: list[str] = []
            if changes.between(self.config, config).gateways:
                successors = [child for child in self._make_children(config) if child.has_successors]
                tags = await self._supervisor.try_successors(successors, ("--config", str(draft)), _SUCCESSORS_S)
                if not tags:
                    log = self._run_dir.logs / f"{successors[0].name}.log"
                    return f"a gateway with the new configuration did not come up; nothing was changed. See {log}"
            draft.replace(self._run_dir.config)
        finally:
            draft.unlink(missing_ok=True)
        self.config = config
        await self._until_taken()
        if tags:
            self._supervisor.hand_over(tags)
        return None

    async def _until_taken(self) -> None:
        """Wait until the orchestrator goes by the new configuration. One that is away takes it when it is back."""
        import asyncio

        stamp = stamp_of(self._run_dir.config)
        for _ in range(round(_TAKEN_S / _LOOK_EVERY_S)):
            if _read(self._run_dir.config_taken) == stamp:
                return
            await asyncio.sleep(_LOOK_EVERY_S)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def _take_requests(directory: Path) -> dict[str, bool]:
    """Take the requests that lie in the run directory; return by key whether each is a dry run."""
    found: dict[str, bool] = {}
    prefix, suffix = REQUEST.split("{}")
    for path in sorted(directory.glob(REQUEST.format("*"))):
        with suppress(OSError, ValueError, KeyError):
            values = json.loads(path.read_text(encoding="utf-8"))
            found[path.name.removeprefix(prefix).removesuffix(suffix)] = bool(values["dry_run"])
        path.unlink(missing_ok=True)
    return found


def _put(path: Path, values: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(values), encoding="utf-8")
    draft.replace(path)
