"""A run for its reader: one table, what must be known beside it, what failed; and the same as JSON.

Above: the entry. Below: rich.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .found import Outcome

_MARKS = {None: "", True: "✓", False: "✗"}
_FILE_WIDTH = 150


def console() -> Console:
    """Return a console as wide as the terminal, or as the table wants to be in a file."""
    found = Console()
    return found if found.is_terminal else Console(width=_FILE_WIDTH)


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str, str, str, str]]:
    """Return step, what, value, share, goal and mark of each line; a step without lines says how it ended."""
    result: list[tuple[str, str, str, str, str, str]] = []
    for outcome in outcomes:
        if outcome.status != "passed":
            mark = "✗" if outcome.status == "failed" else "·"
            result.append((outcome.step, outcome.status.upper(), outcome.why, "", "", mark))
        for line in outcome.found.lines:
            result.append((outcome.step, line.what, line.value, line.share, line.goal, _MARKS[line.is_met]))
    return result


def show(outcomes: Sequence[Outcome], where: Console) -> None:
    """Print the table, the remarks, and how it went altogether."""
    table = Table(title="hostler on this device")
    for head in ("step", "", "measured", "share", "goal", ""):
        table.add_column(head, justify="right" if head in ("share", "goal") else "left", overflow="fold")
    last = ""
    for row in rows(outcomes):
        if row[0] != last and last:
            table.add_section()
        table.add_row("" if row[0] == last else row[0], *row[1:])
        last = row[0]
    where.print(table, markup=False)
    for outcome in outcomes:
        for notice in outcome.found.notices:
            where.print(f"  · {notice}", highlight=False, markup=False, soft_wrap=True)
    where.print(f"  {verdict(outcomes)}", highlight=False, markup=False, soft_wrap=True)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Return one sentence: what failed, which goals were missed."""
    failed = [outcome.step for outcome in outcomes if outcome.status == "failed"]
    skipped = [outcome.step for outcome in outcomes if outcome.status == "not run"]
    missed = sum(line.is_met is False for outcome in outcomes for line in outcome.found.lines)
    goals = sum(line.is_met is not None for outcome in outcomes for line in outcome.found.lines)
    parts = [f"Failed: {', '.join(failed)}." if failed else "Every step that ran passed."]
    if skipped:
        parts.append(f"Not run: {', '.join(skipped)}.")
    if goals:
        parts.append(f"{goals - missed} of {goals} goals reached.")
    return " ".join(parts)


def write(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write everything as JSON."""
    figures: dict[str, float] = {}
    for outcome in outcomes:
        figures |= outcome.found.figures
    document = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": sum(outcome.seconds for outcome in outcomes),
        "figures": figures,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
