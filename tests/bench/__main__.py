"""`make bench`: starts hostler and each peer in turn on this machine, loads them alike, prints one report.

    python -m tests.bench [--quick] [--rounds N] [--streams 1,4,16] [--new-tokens N] [--peers hostler,vllm | --only X]

Rounds alternate (hostler, peer, peer, hostler …) and each starts its server anew, so that drift of the machine
falls on all alike. Nothing runs beside the one server that is measured.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop
from hostler.slices import ask_for_short_slices
from rich.console import Console

from . import switching
from .floor import client_floor, read_bandwidth_bytes_per_s
from .hostler_serve import Hostler
from .lineup import choose, lineup, physical_threads
from .load import NEW_TOKENS, first_reply, measure
from .peers import Peer, Skip, pull
from .report import Contestant, Report
from .results import Round, ScenarioResult
from .scenarios import run_scenarios

MODEL = "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).resolve().parents[2] / "bench-results"
_WARM_UP_TOKENS = 32
_PATIENCE_S = 90.0  # a load that took longer is the last one that this peer gets in a round
_FILE_WIDTH = 200  # columns, where the output is no terminal
_STREAMS_PER_LEVEL = 1000  # prompt numbers reserved for one level, so that no prompt comes twice in a run


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


def levels_for(peer: Peer, streams: Sequence[int]) -> list[int]:
    """Return the loads that make sense for this peer."""
    return [count for count in streams if peer.max_streams is None or count <= peer.max_streams]


class Run:
    """One run: measures round after round and keeps what was found in its report."""

    def __init__(self, report: Report, streams: Sequence[int], with_scenarios: bool, console: Console) -> None:
        self._report = report
        self._streams = streams
        self._with_scenarios = with_scenarios
        self._console = console
        self._failed: set[str] = set()

    def measure_round(self, peer: Peer, number: int) -> None:
        """Measure one round of one peer; one that failed to start is not tried again."""
        if peer.short in self._failed:
            return
        try:
            self._report.rounds.append(uvloop.run(self._round(peer, number)))
        except (RuntimeError, ValueError) as error:
            self._failed.add(peer.short)
            self._console.print(str(error), style="red", markup=False)
            self._report.notices.append(f"{peer.name}, round {number + 1}: {str(error).splitlines()[0]}")

    async def _round(self, peer: Peer, number: int) -> Round:
        """Start the peer, warm it up, measure every level, stop it."""
        self._console.print(f"round {number + 1}, {peer.name}", highlight=False)
        streams = levels_for(peer, self._streams)
        started_s = time.perf_counter()
        running = peer.start()
        try:
            first_s = await first_reply(peer, running, started_s)
            self._console.print(f"    first text after {first_s:.2f} s", highlight=False)
            new_tokens = self._report.new_tokens
            await measure(peer, running, min(streams), _STREAMS_PER_LEVEL * (900 + number), _WARM_UP_TOKENS)
            levels = []
            for index, count in enumerate(streams):
                first_prompt = _STREAMS_PER_LEVEL * (1 + index + number * len(self._streams))
                began_s = time.perf_counter()
                level = await measure(peer, running, count, first_prompt, new_tokens)
                spent_s = time.perf_counter() - began_s
                levels.append(level)
                self._console.print(
                    f"    {count:>3} streams: {level.tokens_per_s:7.1f} tokens/s, first token p50 "
                    f"{level.ttft_p50_s * 1e3:6.0f} ms, longest gap {level.max_gap_s * 1e3:5.0f} ms"
                    + (f", {level.failed} FAILED" if level.failed else ""),
                    highlight=False,
                    soft_wrap=True,
                )
                if spent_s > _PATIENCE_S and (rest := streams[index + 1 :]):
                    self._report.notices.append(
                        f"{peer.name}, round {number + 1}: {count} streams took {spent_s:.0f} s, so that "
                        f"{', '.join(map(str, rest))} were left out"
                    )
                    break
            scenarios: list[ScenarioResult] = []
            if self._with_scenarios and peer.short.startswith("hostler"):
                scenarios, problems = await run_scenarios(peer, running, _STREAMS_PER_LEVEL * (950 + number))
                self._report.notices += problems
                for found in scenarios:
                    self._console.print(f"    {found.label}: {found.ratio:.2f}× ({found.detail})", highlight=False)
        finally:
            running.stop()
        parts = peer.step_parts() if isinstance(peer, Hostler) and self._with_scenarios else ()
        return Round(peer.short, number, first_s, tuple(levels), tuple(scenarios), parts)


def prepared(peers: Sequence[Peer], streams: Sequence[int], notices: list[str], console: Console) -> list[Peer]:
    """Return the peers that can run here at one of these loads; the others leave a notice."""
    ready = []
    for peer in peers:
        try:
            if not levels_for(peer, streams):
                raise Skip(f"it serves at most {peer.max_streams} at a time, and that load was not asked for")
            peer.prepare(console.print)
            ready.append(peer)
        except Skip as reason:
            notices.append(f"{peer.name} was skipped: {reason}")
            console.print(notices[-1], style="yellow", markup=False)
    return ready


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's choices; `streams` as numbers."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measure hostler against its peers here.")
    parser.add_argument("--quick", action="store_true", help="16 streams only, one round, no scenarios")
    parser.add_argument("--rounds", type=int, help="rounds of each contestant (default 2)")
    parser.add_argument("--streams", default="1,4,16", help="numbers of streams at once (default 1,4,16)")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help=f"of each reply (default {NEW_TOKENS})")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--peers", help="short names, hostler's variants among them (default all)")
    who.add_argument("--only", help="one short name")
    parser.add_argument("--model", default=MODEL, help=f"catalog name (default {MODEL})")
    parser.add_argument("--no-scenarios", action="store_true", help="leave out hostler's own scenarios")
    chosen = parser.parse_args(arguments)
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 2)
    chosen.streams = [16] if chosen.quick else sorted({int(part) for part in chosen.streams.split(",")})
    return chosen


def main() -> int:
    """Run the benchmark; return the exit status."""
    chosen = parse()
    ask_for_short_slices(inherited=False)  # so that the client sees what is sent when it is sent, whoever sends it
    console = Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
    facts = machine()
    if facts["load before"] > 0.7:
        console.print(f"[yellow]This machine is busy (load {facts['load before']}): figures will be low.[/yellow]")
    notices: list[str] = []
    try:
        model = pull(chosen.model, console.print)
        wanted = choose(lineup(model, physical_threads()), chosen.only or chosen.peers)
    except (Skip, ValueError) as reason:
        console.print(str(reason), style="red", markup=False)
        return 1
    peers = prepared(wanted, chosen.streams, notices, console)
    console.print("measuring the machine and the client themselves")
    report = Report(
        machine=facts,
        model=model.name,
        new_tokens=chosen.new_tokens,
        bandwidth_bytes_per_s=read_bandwidth_bytes_per_s(physical_threads()),
        client=uvloop.run(client_floor()),
        peers=[Contestant(peer.short, peer.name, peer.step_bytes) for peer in peers],
        notices=notices,
    )
    run = Run(report, chosen.streams, not (chosen.quick or chosen.no_scenarios), console)
    try:
        for number in range(chosen.rounds):
            for peer in peers:
                run.measure_round(peer, number)
    except KeyboardInterrupt:  # the server that ran has been stopped; what was measured before it is worth showing
        notices.append("The run was interrupted: what follows it in the lineup was not measured.")
    if not report.rounds:
        return 1
    report.print(console)
    if not (chosen.quick or chosen.no_scenarios or chosen.only or chosen.peers):
        report.switching = switching.run(console.print)
        switching.show(report.switching, console)
    for path in report.save(RESULTS):
        console.print(f"  saved {path.relative_to(RESULTS.parent)}", highlight=False)
    was_wanted = any(peer.short == "hostler" for peer in wanted)
    return 0 if any(item.peer == "hostler" for item in report.rounds) or not was_wanted else 1


if __name__ == "__main__":
    sys.exit(main())
