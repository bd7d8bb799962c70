"""`make sim`: the real placement policy beside LRU, LFU, Ollama and a clairvoyant, over traces in virtual time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from .catalog import CATALOG
from .deciding import SIZES, decide
from .figures import measure
from .picture import picture
from .report import as_json, as_markdown, show, write_into

ROOM = Path(__file__).resolve().parents[2] / "orchestrator"
HELD_OUT = (11, 12)
"""Not the seeds that the policy was made with: those were 1, 2 and 3."""


def main() -> int:
    """Run and tell."""
    names = [which.__name__ for which in CATALOG]
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__)
    parser.add_argument("--seeds", default=",".join(map(str, HELD_OUT)), help="comma-separated")
    parser.add_argument("--traces", default=",".join(names), help=f"comma-separated, of {', '.join(names)}")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--write", action="store_true", help="write table and picture into orchestrator/")
    chosen = parser.parse_args()
    seeds, wanted = [int(seed) for seed in chosen.seeds.split(",")], chosen.traces.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no such trace: {', '.join(unknown)}; there are {', '.join(names)}")
    if chosen.write and set(wanted) != set(names):
        parser.error("--write wants all traces")
    console = Console()
    results = []
    with console.status("…") as status:
        for which in CATALOG:
            if which.__name__ in wanted:
                status.update(f"{which.__name__} …")
                results.append(measure(which, seeds))
        status.update("decisions …")
        decided = [decide(*size) for size in SIZES]
    show(console, results, decided)
    if chosen.json:
        chosen.json.write_text(as_json(results, decided, seeds))
    if chosen.write:
        (ROOM / "simulator.svg").write_text(picture(results))
        write_into(ROOM / "README.md", as_markdown(results, decided, seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
