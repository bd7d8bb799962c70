"""What a run of the benchmark found: one table, and the same as JSON and Markdown in bench-results/.

Above: the run (`__main__`). Below: rich. Every ratio is taken within a round and its median shown: figures drift
with the machine, ratios of neighbours less so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .floor import ClientFloor
from .load import Level


@dataclass(frozen=True, slots=True)
class Round:
    """One start of one peer: how long until it answered, and each level of load."""

    peer: str
    first_reply_s: float
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row: how to read it from a level, how to print it, and whether more is better."""

    label: str
    read: Callable[[Level], float]
    show: Callable[[float], str]
    more_is_better: bool = False


def _ms(value_s: float) -> str:
    return f"{value_s * 1e3:,.0f} ms" if value_s < 10 else f"{value_s:,.1f} s"


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


METRICS = (
    Metric("tokens/s, all streams", lambda level: level.tokens_per_s, lambda v: f"{v:,.1f}", more_is_better=True),
    Metric("first token p50", lambda level: level.ttft_p50_s, _ms),
    Metric("first token p95", lambda level: level.ttft_p95_s, _ms),
    Metric("between tokens p50", lambda level: level.inter_token_p50_s, _ms),
    Metric("longest gap", lambda level: level.max_gap_s, _ms),
    Metric("memory, all processes", lambda level: float(level.memory_bytes), _gib),
)


@dataclass(slots=True)
class Report:
    """Everything that one run found."""

    machine: dict[str, Any]
    model: str
    weight_bytes: int
    new_tokens: int
    bandwidth_bytes_per_s: float
    client: ClientFloor
    peers: list[tuple[str, str]]
    rounds: list[Round] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def floor_s(self) -> float:
        """Seconds that reading every weight once takes: no single stream can have a shorter step."""
        return self.weight_bytes / self.bandwidth_bytes_per_s

    def of(self, peer: str) -> list[Round]:
        """Return the rounds of one peer, in order."""
        return [item for item in self.rounds if item.peer == peer]

    def ratio(self, read: Callable[[Round], float], peer: str, *, more_is_better: bool) -> float | None:
        """Return how many times better hostler is than `peer`: the median over paired rounds."""
        pairs = list(zip(self.of("hostler"), self.of(peer), strict=False))
        values = [(read(a), read(b)) for a, b in pairs]
        ratios = [(a / b if more_is_better else b / a) for a, b in values if a > 0 and b > 0]
        return statistics.median(ratios) if ratios else None

    def rows(self) -> list[list[str]]:
        """Return the cells of the table: metric, each peer's median, then hostler's advantage over each peer."""
        rows = [self._row("", "start to first text", lambda item: item.first_reply_s, _ms)]
        streams = sorted({level.streams for item in self.rounds for level in item.levels})
        for count in streams:
            for metric in METRICS:

                def read(item: Round, count: int = count, metric: Metric = metric) -> float:
                    return next((metric.read(level) for level in item.levels if level.streams == count), 0.0)

                label = f"{count} stream" + ("s" if count > 1 else "")
                rows.append(self._row(label, metric.label, read, metric.show, more_is_better=metric.more_is_better))
        return rows

    def _row(
        self,
        load: str,
        label: str,
        read: Callable[[Round], float],
        show: Callable[[float], str],
        *,
        more_is_better: bool = False,
    ) -> list[str]:
        cells = [load, label]
        for short, _ in self.peers:
            values = [value for item in self.of(short) if (value := read(item)) > 0]
            cells.append(show(statistics.median(values)) if values else "-")
        for short, _ in self.peers[1:]:
            ratio = self.ratio(read, short, more_is_better=more_is_better)
            cells.append(f"{ratio:.2f}×" if ratio else "-")
        return cells

    def header(self) -> list[str]:
        """Return the heads of the columns."""
        return ["load", "", *(short for short, _ in self.peers), *(f"vs {short}" for short, _ in self.peers[1:])]

    def remarks(self) -> list[str]:
        """Return what a reader must know beside the table."""
        failed = sum(level.failed for item in self.rounds for level in item.levels)
        busiest = max((level.client_cpu_share for item in self.rounds for level in item.levels), default=0.0)
        prompts = [level.num_prompt_tokens for item in self.rounds for level in item.levels if level.num_prompt_tokens]
        return [
            f"{self.model}, bf16, greedy, {statistics.mean(prompts) if prompts else 0:.0f} prompt tokens, "
            f"{self.new_tokens} new; {max(len(self.of(short)) for short, _ in self.peers)} round(s), "
            "each peer started anew in each, in turn.",
            "'vs' is how many times better hostler is (above 1: better), the median of paired rounds.",
            f"Floor of one stream: {self.weight_bytes / 1e6:.0f} MB of weights at "
            f"{self.bandwidth_bytes_per_s / 1e9:.1f} GB/s is {self.floor_s * 1e3:.1f} ms a token, "
            f"{1 / self.floor_s:.0f} tokens/s.",
            f"The client manages {self.client.events_per_s:,.0f} events/s "
            f"({self.client.cpu_us_per_event:.0f} µs of CPU each); under load it took "
            f"at most {busiest:.1%} of one core.",
            *([f"{failed} streams failed and are not in the figures."] if failed else []),
            *self.notices,
        ]

    def print(self, console: Console) -> None:
        """Print the table and the remarks."""
        table = Table(title=f"hostler and its peers, {self.machine['cpu']}, {self.machine['cores']} cores")
        for index, head in enumerate(self.header()):
            table.add_column(head, justify="left" if index < 2 else "right")
        last = ""
        for row in self.rows():
            if row[0] != last:
                table.add_section()
            last, shown = row[0], [row[0] if row[0] != last else "", *row[1:]]
            table.add_row(*shown)
        console.print(table)
        for remark in self.remarks():
            console.print(f"  · {remark}", highlight=False, markup=False)

    def markdown(self) -> str:
        """Return the table and the remarks as Markdown."""
        head = self.header()
        lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return "\n".join([*lines, "", *(f"- {remark}" for remark in self.remarks()), f"- {facts}", ""])

    def save(self, directory: Path) -> list[Path]:
        """Write JSON and Markdown, named by the time of the run; return the paths."""
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / f"bench-{self.machine['time'].replace(':', '').replace(' ', '-')}"
        document = {**asdict(self), "floor_s": self.floor_s}
        files = {stem.with_suffix(".json"): json.dumps(document, indent=1), stem.with_suffix(".md"): self.markdown()}
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return list(files)
