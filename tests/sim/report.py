"""What came out, as a table for terminals, as JSON, and as Markdown for the orchestrator's README.

Above it: `__main__.py`. Below it: `figures.py`, `deciding.py`; rich.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .deciding import Decided
from .figures import Result

BEGIN, END = "<!-- make sim: begin -->", "<!-- make sim: end -->"
SHOWN = ("clairvoyant", "hostler", "LRU, sleeping", "LRU", "LFU", "Ollama")


def verdict(holds: bool) -> str:
    return "✓" if holds else "✗"


def show(console: Console, results: Sequence[Result], decided: Sequence[Decided]) -> None:
    """Print everything."""
    for result in results:
        table = Table(title=f"{result.trace}: {result.says}; {result.memory}", title_justify="left")
        for column in ("", "reload s", "loads", "wakes", "evicted", "p50 s", "p99 s", "failed"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("at least, in order", f"{result.bound_s:.0f}")
        for name in SHOWN:
            if (f := result.by_strategy.get(name)) is not None:
                counts = (f"{f.num_loads:.0f}", f"{f.num_wakes:.0f}", f"{f.num_evicted:.0f}")
                waits = (f"{f.wait_p50_s:.2f}", f"{f.wait_p99_s:.2f}")
                style = "bold" if name == "hostler" else None
                table.add_row(name, f"{f.reload_s:.0f}", *counts, *waits, str(f.num_failed), style=style)
        console.print(table)
        console.print(
            f"  {verdict(result.reloads_little)} reloads: {result.to('clairvoyant'):.2f} × the clairvoyant's, "
            f"{result.to('LRU'):.2f} × LRU's    {verdict(result.waits_no_longer)} p99 no worse than LRU's\n"
        )
    num_met = sum(result.reloads_little and result.waits_no_longer for result in results)
    console.print(f"{num_met} of {len(results)} traces: little reloading, and waits no longer than under LRU")
    for one in decided:
        console.print(
            f"{verdict(one.median_ms <= one.limit_ms)} a decision for {one.num_models} models on {one.num_devices} "
            f"devices: {one.median_ms:.2f} ms (median; at most {one.limit_ms:g} ms)"
        )


def as_json(results: Sequence[Result], decided: Sequence[Decided], seeds: Sequence[int]) -> str:
    """Return everything as JSON."""
    values = {
        "seeds": list(seeds),
        "traces": [result.as_json() for result in results],
        "decisions": [asdict(one) for one in decided],
    }
    return json.dumps(values, indent=1)


def as_markdown(results: Sequence[Result], decided: Sequence[Decided], seeds: Sequence[int]) -> str:
    """Return the table for the README: reload seconds, what the goal looks at, and what a decision takes."""
    lines = [
        f"In seconds of loads and wakes, means over seeds {', '.join(map(str, seeds))}:",
        "",
        "| trace | at least | clairvoyant | **hostler** | LRU, sleeping | LRU | LFU | Ollama | × clairvoyant | × LRU "
        "| p99 wait s: hostler, LRU | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for r in results:
        seconds = [f"{r.by_strategy[name].reload_s:,.0f}" for name in SHOWN]
        seconds[1] = f"**{seconds[1]}**"
        waits = f"{r.by_strategy['hostler'].wait_p99_s:.1f}, {r.by_strategy['LRU'].wait_p99_s:.1f}"
        goal = f"{verdict(r.reloads_little)} {verdict(r.waits_no_longer)}"
        ratios = f"{r.to('clairvoyant'):.2f} | {r.to('LRU'):.2f}"
        lines.append(f"| {r.trace} | {r.bound_s:,.0f} | {' | '.join(seconds)} | {ratios} | {waits} | {goal} |")
    lines.append("")
    lines += [f"- *{r.trace}*: {r.says}; {r.memory}; {r.num_asked:,} requests." for r in results]
    if decided:
        taken = ", ".join(f"{d.median_ms:.2g} ms for {d.num_models:,} on {d.num_devices:,} devices" for d in decided)
        lines += ["", f"A decision for which somebody has to give way takes {taken} (median, processor time)."]
    return "\n".join(lines)


def write_into(readme: Path, text: str) -> None:
    """Put text between the marks of a file.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no place for it: {BEGIN} … {END}")
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
