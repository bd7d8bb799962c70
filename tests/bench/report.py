"""A run of the benchmark for its reader: tables on the console, and the same as JSON and Markdown in bench-results/.

Above: the run (`__main__`). Below: `results` and `goals` for what is shown, rich for showing it.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .floor import ClientFloor
from .goals import judge
from .results import METRICS, START, Round, ScenarioResult, StepPart, median_figure, ratio, show_s

# Metrics of the second table: how many times better hostler is.
_COMPARED = ("tokens_per_s", "ttft_p50", "memory")
_PROMPT_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class Contestant:
    """A measured server: its column, its full name, and the bytes of weights that its decode step must read."""

    short: str
    name: str
    step_bytes: int


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as text: one head for each column; the first two columns are words."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = ["| " + " | ".join(self.head) + " |", "|---|---|" + "---:|" * (len(self.head) - 2)]
        return "\n".join([f"**{self.title}**", "", *lines, *("| " + " | ".join(row) + " |" for row in self.rows), ""])

    def print(self, console: Console) -> None:
        """Print it; a first cell like the one above is left empty."""
        table = Table(title=self.title)
        for index, head in enumerate(self.head):
            table.add_column(head, justify="left" if index < 2 else "right")
        last = self.rows[0][0] if self.rows else ""
        for index, row in enumerate(self.rows):
            if row[0] != last:
                table.add_section()
            table.add_row(row[0] if index == 0 or row[0] != last else "", *row[1:])
            last = row[0]
        console.print(table)


def _load(streams: int) -> str:
    return f"{streams} stream" + ("s" if streams > 1 else "")


@dataclass(slots=True)
class Report:
    """Everything that one run found."""

    machine: dict[str, Any]
    model: str
    new_tokens: int
    bandwidth_bytes_per_s: float
    client: ClientFloor
    peers: list[Contestant]
    rounds: list[Round] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    switching: dict[str, Any] = field(default_factory=dict)

    @property
    def _streams(self) -> list[int]:
        return sorted({level.streams for item in self.rounds for level in item.levels})

    def figures(self) -> Grid:
        """Return each contestant's medians over the rounds: start, every metric of every load, scenarios."""
        rows = [self._row("", "start to first text", START, 0)]
        for streams in self._streams:
            rows += [self._row(_load(streams), metric.label, metric.key, streams) for metric in METRICS]
        for key, example in self._scenarios().items():
            cells = [self._scenario_cell(peer.short, key) for peer in self.peers]
            rows.append(["scenarios", f"{example.label} (goal ≤ {example.at_most:g}×)", *cells])
        title = f"hostler and its peers, {self.machine['cpu']}, {self.machine['cores']} cores"
        return Grid(title, ["load", "", *(peer.short for peer in self.peers)], rows)

    def _row(self, load: str, label: str, key: str, streams: int) -> list[str]:
        show = next((metric.show for metric in METRICS if metric.key == key), show_s)
        values = [median_figure(self.rounds, peer.short, key, streams) for peer in self.peers]
        return [load, label, *(show(value) if value is not None else "-" for value in values)]

    def _scenarios(self) -> dict[str, ScenarioResult]:
        return {scenario.key: scenario for item in self.rounds for scenario in item.scenarios}

    def _scenario_cell(self, short: str, key: str) -> str:
        found = [s.ratio for item in self.rounds if item.peer == short for s in item.scenarios if s.key == key]
        return f"{statistics.median(found):.2f}×" if found else "-"

    def advantages(self) -> Grid | None:
        """Return how many times better hostler is than each peer; None without both."""
        ours = [peer.short for peer in self.peers if peer.short.startswith("hostler")]
        theirs = [peer.short for peer in self.peers if peer.short not in ours]
        if not ours or not theirs:
            return None
        rows = []
        for short in ours:
            rows.append([short, "start", *(self._times(short, peer, START, 0) for peer in theirs)])
            for streams in self._streams:
                for metric in METRICS:
                    if metric.key in _COMPARED:
                        label = f"{metric.label}, {_load(streams)}"
                        cells = [
                            self._times(short, peer, metric.key, streams, metric.more_is_better) for peer in theirs
                        ]
                        rows.append([short, label, *cells])
        return Grid("how many times better (above 1: better), median of paired rounds", ["", "against", *theirs], rows)

    def _times(self, ours: str, theirs: str, key: str, streams: int, more_is_better: bool = False) -> str:
        found = ratio(self.rounds, ours, theirs, key, streams)
        if found is None:
            return "-"
        return f"{found if more_is_better else 1 / found:.2f}×"

    def floors(self) -> Grid:
        """Return, for each contestant, what memory bandwidth allows one stream, and how near it comes to that."""
        rows = []
        for peer in self.peers:
            floor_s = peer.step_bytes / self.bandwidth_bytes_per_s
            found_s = median_figure(self.rounds, peer.short, "inter_token_p50", 1)
            rows.append(
                [
                    peer.short,
                    peer.name,
                    f"{peer.step_bytes / 1e6:.0f} MB",
                    f"{floor_s * 1e3:.1f} ms",
                    f"{1 / floor_s:.0f}" if floor_s else "-",
                    show_s(found_s) if found_s else "-",
                    f"{floor_s / found_s:.0%}" if found_s else "-",
                ]
            )
        title = f"the floor of one stream: weights read once a token at {self.bandwidth_bytes_per_s / 1e9:.1f} GB/s"
        return Grid(
            title, ["", "", "weights a step", "floor", "tokens/s at most", "between tokens p50", "of the floor"], rows
        )

    def step_parts(self) -> dict[str, tuple[StepPart, ...]]:
        """Return where each contestant's decode step spends its time, from its last round that told."""
        return {item.peer: item.step_parts for item in self.rounds if item.step_parts}

    def goal_lines(self) -> list[str]:
        """Return one line for each goal and scenario, each with ✓, ✗ or · (not measured)."""
        lines = [outcome.line for outcome in judge(self.rounds)]
        for item in self.rounds:
            lines += [
                f"{'✓' if found.is_met else '✗'} {item.peer}, round {item.number + 1}: {found.label}: "
                f"{found.ratio:.2f}×, goal ≤ {found.at_most:g}× ({found.detail})"
                for found in item.scenarios
            ]
        return lines

    def remarks(self) -> list[str]:
        """Return what a reader must know beside the tables."""
        levels = [(item.peer, level) for item in self.rounds for level in item.levels]
        failed = sum(level.failed for _, level in levels)
        busiest = max((level.client_cpu_share for _, level in levels), default=0.0)
        prompts = {peer: level.num_prompt_tokens for peer, level in levels if level.num_prompt_tokens}
        uncounted = sorted({peer for peer, level in levels if not level.is_counted_by_server})
        typical = statistics.median(prompts.values()) if prompts else 0.0
        odd = {peer: count for peer, count in prompts.items() if abs(count - typical) > _PROMPT_TOLERANCE * typical}
        num_rounds = max((item.number for item in self.rounds), default=-1) + 1
        return [
            f"{self.model}, greedy, {typical:.0f} prompt tokens, {self.new_tokens} new; {num_rounds} round(s), "
            "each contestant started anew in each, in turn.",
            f"The client manages {self.client.events_per_s:,.0f} events/s "
            f"({self.client.cpu_us_per_event:.0f} µs of CPU each); under load it took "
            f"at most {busiest:.1%} of one core.",
            *([f"Prompt tokens differ: {', '.join(f'{p} {n:.0f}' for p, n in odd.items())}."] if odd else []),
            *([f"Tokens counted by events, for want of usage: {', '.join(uncounted)}."] if uncounted else []),
            *([f"{failed} streams failed and are not in the figures."] if failed else []),
            *self.notices,
        ]

    def _step_lines(self) -> list[str]:
        lines = []
        for peer, parts in self.step_parts().items():
            for rows in sorted({part.rows for part in parts}):
                shares = [part for part in parts if part.rows == rows]
                total_ms = sum(part.ms for part in shares)
                shown = ", ".join(f"{part.name} {part.ms:.2f} ms ({part.ms / total_ms:.0%})" for part in shares)
                lines.append(f"{peer}, a decode step of {rows} rows: {total_ms:.2f} ms: {shown}")
        return lines

    def _grids(self) -> list[Grid]:
        return [grid for grid in (self.figures(), self.advantages(), self.floors()) if grid is not None]

    def print(self, console: Console) -> None:
        """Print everything."""
        for grid in self._grids():
            grid.print(console)
        for line in self._step_lines():
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        for remark in self.remarks():
            console.print(f"  · {remark}", highlight=False, markup=False, soft_wrap=True)
        console.print("goals", highlight=False)
        for line in self.goal_lines():
            style = {"✓": "green", "✗": "red"}.get(line[0], "dim")
            console.print(f"  {line}", style=style, highlight=False, markup=False, soft_wrap=True)

    def markdown(self) -> str:
        """Return everything as Markdown."""
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        remarks = [f"- {remark}" for remark in [*self._step_lines(), *self.remarks(), facts]]
        goals = [f"- {line}" for line in self.goal_lines()]
        return "\n".join([*(grid.markdown() for grid in self._grids()), *remarks, "", "**goals**", "", *goals, ""])

    def save(self, directory: Path) -> list[Path]:
        """Write JSON and Markdown, named by the time of the run; return the paths."""
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / f"bench-{self.machine['time'].replace(':', '').replace(' ', '-')}"
        outcomes = [{**asdict(o.goal), "measured": o.measured, "is_met": o.is_met} for o in judge(self.rounds)]
        document = {**asdict(self), "goals": outcomes}
        files = {stem.with_suffix(".json"): json.dumps(document, indent=1), stem.with_suffix(".md"): self.markdown()}
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return list(files)
