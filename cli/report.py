"""How long-running commands say how far they are: bars on a terminal, plain lines in a pipe, JSON for machines.

Above stand `cli.serve`, `cli.control`; below, rich (imported only for a terminal) and standard output.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from hostler.words import duration, stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from cli.placement import Progress as ModelProgress

_STYLES = {"good": "green", "bad": "bold red", "warn": "yellow", "dim": "dim", "head": "bold"}
LINE_EVERY_S = 1.0


class Reporter(Protocol):
    """Where progress and news go. `cli.serve` and `cli.control` stand above, an output stream below."""

    def say(self, event: str, text: str, tone: str = "", **fields: Any) -> None:
        """Print one piece of news now. `event` and `fields` are for machines, `text` and `tone` for people."""

    def progress(self, model: str, progress: ModelProgress) -> None:
        """Show how far a model is."""

    def finish(self, model: str) -> None:
        """Take a model's progress away: it is ready, or failed."""

    def close(self) -> None:
        """Leave the terminal in order."""


class LineReporter:
    """Plain lines (or JSON objects): news at once, progress at most once a second for each model."""

    def __init__(
        self, as_json: bool, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._as_json = as_json
        self._stream = stream or sys.stdout
        self._clock = clock
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="replace")  # a terminal without ✓ gets a question mark, not an exception
        self._last: dict[str, tuple[float, str]] = {}

    def _print(self, text: str) -> None:
        # Who started us may have closed our output; that is no reason to stop serving.
        with suppress(BrokenPipeError):
            print(text, file=self._stream, flush=True)

    def say(self, event: str, text: str, tone: str = "", **fields: Any) -> None:
        """Print one line."""
        if not self._as_json:
            self._print(text)
        elif text:
            self._print(json.dumps({"time": round(time.time(), 3), "event": event, "message": text, **fields}))

    def progress(self, model: str, progress: ModelProgress) -> None:
        """Print a line, unless nothing changed or the last one is younger than a second."""
        amount = _amount(progress)
        text = f"{model}: {stage(progress.stage)}" + (
            f"{' ' if progress.total_bytes else ', '}{amount}" if amount else ""
        )
        at, before = self._last.get(model, (float("-inf"), ""))
        now = self._clock()
        if now - at < LINE_EVERY_S or text == before:
            return
        self._last[model] = (now, text)
        fields: dict[str, Any] = {"stage": progress.stage, "done_bytes": progress.done_bytes}
        fields["total_bytes"] = progress.total_bytes
        self.say("progress", text, model=model, **fields)

    def finish(self, model: str) -> None:
        """Forget a model."""
        self._last.pop(model, None)

    def close(self) -> None:
        """Nothing to put in order."""


def _amount(progress: ModelProgress) -> str:
    parts = []
    if progress.total_bytes:
        percent = 100 * min(1.0, progress.done_bytes / progress.total_bytes)
        parts.append(f"{percent:.0f} % of {progress.total_bytes / 1e6:,.0f} MB")
    elif progress.detail:
        parts.append(progress.detail)
    if progress.num_ahead:
        parts.append(f"{progress.num_ahead} ahead")
    if progress.eta_ms:
        parts.append(f"about {duration(progress.eta_ms / 1000)} left")
    return ", ".join(parts)


class TerminalReporter:
    """Bars and colours, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console: Console = Console(highlight=False)
        self._bars: Progress = Progress(
            SpinnerColumn(style="cyan"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[amount]}", style="dim", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def say(self, event: str, text: str, tone: str = "", **fields: Any) -> None:
        """Print one line above the bars; long ones are left to the terminal to wrap, so that they copy whole."""
        self._console.print(text, style=_STYLES.get(tone, ""), markup=False, soft_wrap=True)

    def progress(self, model: str, progress: ModelProgress) -> None:
        """Move a model's bar; it pulses while the total is unknown."""
        if not self._tasks:
            self._bars.start()
        description = f"{model}  {stage(progress.stage)}"
        if model not in self._tasks:
            self._tasks[model] = self._bars.add_task(description, total=None, amount="")
        task = self._tasks[model]
        self._bars.update(
            task,
            description=description,
            total=progress.total_bytes or None,
            completed=progress.done_bytes,
            amount=_amount(progress),
        )

    def finish(self, model: str) -> None:
        """Take a model's bar away; without bars, give the cursor back."""
        if (task := self._tasks.pop(model, None)) is not None:
            self._bars.remove_task(task)
            if not self._tasks:
                self._bars.stop()

    def close(self) -> None:
        """Stop drawing."""
        self._bars.stop()


def make(as_json: bool = False) -> Reporter:
    """Return the reporter that suits standard output."""
    if as_json or not sys.stdout.isatty():
        return LineReporter(as_json)
    return TerminalReporter()
