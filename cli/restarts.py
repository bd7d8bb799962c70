"""Which processes of a server keep ending: written down by the supervisor's screen, shown by `hostler ps`.

Above stand `cli.startup` and `cli.seeing`; below, one file of the run directory.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from hostler.rundir import RunDir
from hostler.words import duration

if TYPE_CHECKING:
    from cli.supervisor import Event

RECENT_S = 60.0
"""What ended longer ago than that has lived well since: the longest wait before a restart is 10 s."""
_FILE = "restarts.json"


def clear(run_dir: RunDir) -> None:
    """Forget what an earlier run has written."""
    (run_dir.path / _FILE).unlink(missing_ok=True)


def note(run_dir: RunDir, event: Event) -> None:
    """Write down that a process ended and will be started again."""
    found = _read(run_dir)
    found[event.child] = {
        "process": event.child,
        "num_in_a_row": event.num_short_lives,
        "exit_code": event.exit_code,
        "ended_unix_ms": int(time.time() * 1000),
        "restart_in_s": event.restart_in_s,
        "log": str(run_dir.logs / f"{event.child}.log"),
    }
    path = run_dir.path / _FILE
    draft = path.with_name(f".{_FILE}")
    draft.write_text(json.dumps(found), encoding="utf-8")
    draft.replace(path)


def recent(run_dir: RunDir, now_s: float | None = None) -> list[dict[str, Any]]:
    """Return what ended within the last minute, one entry for each process."""
    now_ms = 1000 * (time.time() if now_s is None else now_s)
    return [entry for entry in _read(run_dir).values() if now_ms - entry["ended_unix_ms"] < 1000 * RECENT_S]


def in_words(entry: dict[str, Any], now_s: float | None = None) -> str:
    """Return one line about a process that ended."""
    now_s = time.time() if now_s is None else now_s
    code, times = entry["exit_code"], entry["num_in_a_row"]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    ago = duration(max(0.0, now_s - entry["ended_unix_ms"] / 1000))
    if times < 2:
        return f"{entry['process']} ended {ago} ago ({how}) and was started again"
    return f"{entry['process']} keeps ending: {times} times in a row, last {ago} ago ({how}); see {entry['log']}"


def _read(run_dir: RunDir) -> dict[str, dict[str, Any]]:
    try:
        values: dict[str, dict[str, Any]] = json.loads((run_dir.path / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
