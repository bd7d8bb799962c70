"""`make bench`: starts hostler and each peer in turn on this machine, loads them alike, prints one table.

    python -m tests.bench [--quick] [--rounds N] [--streams 1,4,16] [--new-tokens N] [--only hostler] [--model NAME]

Rounds alternate (hostler, peer, hostler, peer …) and each starts its server anew, so that drift of the machine
falls on all alike. Nothing runs beside the one server that is measured.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from .floor import client_floor, read_bandwidth_bytes_per_s
from .load import NEW_TOKENS, first_reply, measure
from .peers import Hostler, Peer, Skip, StoredModel, pull
from .report import Report, Round
from .transformers_serve import TransformersServe

MODEL = "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).resolve().parents[2] / "bench-results"
GOAL_TOKENS_RATIO = 2.0
GOAL_TTFT_RATIO = 4.0
_WARM_UP_TOKENS = 8
_STREAMS_PER_LEVEL = 1000  # prompt numbers reserved for one level, so that no prompt comes twice in a run


def physical_threads() -> int:
    """Return how many threads the machine gives to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_peers(model: StoredModel) -> list[Peer]:
    """Return every peer, hostler first; a new one is added here."""
    return [Hostler(model), TransformersServe(model.path, physical_threads())]


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        cpu = names[0] if names else cpu
    return {
        "time": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        "cpu": cpu,
        "cores": physical_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


async def run_round(peer: Peer, streams: list[int], number: int, new_tokens: int, console: Console) -> Round:
    """Start the peer, warm it up, measure every level, stop it."""
    console.print(f"round {number + 1}, {peer.name}", highlight=False)
    started_s = time.perf_counter()
    running = peer.start()
    try:
        first_s = await first_reply(peer, running, started_s)
        console.print(f"    first text after {first_s:.2f} s", highlight=False)
        await measure(
            peer, running, min(streams), _STREAMS_PER_LEVEL * (900 + number), new_tokens
        )  # warm-up, not counted
        levels = []
        for index, count in enumerate(streams):
            first_prompt = _STREAMS_PER_LEVEL * (1 + index + number * len(streams))
            level = await measure(peer, running, count, first_prompt, new_tokens)
            levels.append(level)
            console.print(
                f"    {count:>3} streams: {level.tokens_per_s:7.1f} tokens/s, first token p50 "
                f"{level.ttft_p50_s * 1e3:6.0f} ms, longest gap {level.max_gap_s * 1e3:5.0f} ms"
                + (f", {level.failed} FAILED" if level.failed else ""),
                highlight=False,
                soft_wrap=True,
            )
        return Round(peer.short, first_s, tuple(levels))
    finally:
        running.stop()


def prepared(peers: list[Peer], only: str | None, report_notice: list[str], console: Console) -> list[Peer]:
    """Return the peers that can run here; the others leave a notice."""
    ready = []
    for peer in peers:
        if only and peer.short != only:
            continue
        try:
            peer.prepare(console.print)
            ready.append(peer)
        except Skip as reason:
            report_notice.append(f"{peer.name} was skipped: {reason}")
            console.print(f"[yellow]{report_notice[-1]}[/yellow]")
    return ready


def show_goals(report: Report, console: Console) -> None:
    """Say whether the promises about 16 streams hold in this run."""
    for short, _ in report.peers[1:]:

        def at_16(item: Round, field: str) -> float:
            return next((getattr(level, field) for level in item.levels if level.streams == 16), 0.0)

        tokens = report.ratio(lambda item: at_16(item, "tokens_per_s"), short, more_is_better=True)
        ttft = report.ratio(lambda item: at_16(item, "ttft_p50_s"), short, more_is_better=False)
        for label, value, goal in (("tokens/s", tokens, GOAL_TOKENS_RATIO), ("first token", ttft, GOAL_TTFT_RATIO)):
            if value is not None:
                mark = "[green]✓[/green]" if value >= goal else "[red]✗[/red]"
                console.print(f"  {mark} 16 streams, {label}: {value:.2f}× of {short}, goal {goal:g}×")


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measure hostler against its peers here.")
    parser.add_argument("--quick", action="store_true", help="16 streams only")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each peer (default 2)")
    parser.add_argument("--streams", default="1,4,16", help="numbers of streams at once")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help=f"of each reply (default {NEW_TOKENS})")
    parser.add_argument("--only", help="one peer's short name: hostler, transformers")
    parser.add_argument("--model", default=MODEL, help=f"catalog name (default {MODEL})")
    arguments = parser.parse_args()
    streams = [16] if arguments.quick else [int(part) for part in arguments.streams.split(",")]
    console = Console()
    facts = machine()
    if facts["load before"] > 0.7:
        console.print(f"[yellow]This machine is busy (load {facts['load before']}): figures will be low.[/yellow]")
    try:
        model = pull(arguments.model, console.print)
    except Skip as reason:
        console.print(f"[red]{reason}[/red]")
        return 1
    notices: list[str] = []
    peers = prepared(build_peers(model), arguments.only, notices, console)
    console.print("measuring the machine and the client themselves")
    report = Report(
        machine=facts,
        model=model.name,
        weight_bytes=model.weight_bytes,
        new_tokens=arguments.new_tokens,
        bandwidth_bytes_per_s=read_bandwidth_bytes_per_s(physical_threads()),
        client=uvloop.run(client_floor()),
        peers=[(peer.short, peer.name) for peer in peers],
        notices=notices,
    )
    for number in range(arguments.rounds):
        for peer in peers:
            try:
                report.rounds.append(uvloop.run(run_round(peer, streams, number, arguments.new_tokens, console)))
            except (RuntimeError, ValueError) as error:
                console.print(str(error), style="red", markup=False)
                notices.append(f"{peer.name}, round {number + 1}: {str(error).splitlines()[0]}")
    if not report.rounds:
        return 1
    report.print(console)
    show_goals(report, console)
    for path in report.save(RESULTS):
        console.print(f"  saved {path.relative_to(RESULTS.parent)}", highlight=False)
    return 0 if any(item.peer == "hostler" for item in report.rounds) or arguments.only else 1


if __name__ == "__main__":
    sys.exit(main())
