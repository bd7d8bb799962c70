"""Processor time a token, by process and thread: what the way from the model to the client costs beside the model.

`python -m tests.bench.processor` starts hostler with one model, sends it streams at once, and prints a table. What the
model's own threads take is in it, too: they are those of the worker that take the most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from .hostler_serve import Hostler
from .load import NEW_TOKENS, first_reply, measure
from .peers import Running, pull

_LEAST_SHARE = 0.01

Key = tuple[str, int, int]
"""A process's name, its id, and a thread's."""


def spent(processes: Iterable[psutil.Process]) -> dict[Key, float]:
    """Return the seconds of processor time that each thread has taken so far."""
    seconds: dict[Key, float] = {}
    for process in processes:
        try:
            name = named(process)
            for thread in process.threads():
                seconds[name, process.pid, thread.id] = thread.user_time + thread.system_time
        except psutil.NoSuchProcess:
            continue
    return seconds


def named(process: psutil.Process) -> str:
    """Return what a process is: the module that it runs, else its program."""
    words = process.cmdline()
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return words[0][:40] if words and words[0].startswith("ray::") else Path(process.name()).name


async def run(streams: int, rounds: int, model: str) -> None:
    """Measure and print."""
    peer = Hostler(pull(model, print))
    began_s = time.perf_counter()
    running: Running = peer.start()
    try:
        await first_reply(peer, running, began_s)
        await measure(peer, running, streams, 10_000, 16)
        before = spent(running.processes())
        num_tokens, speeds = 0, []
        for number in range(rounds):
            level = await measure(peer, running, streams, 100 * number)
            num_tokens += level.num_tokens
            speeds.append(f"{level.tokens_per_s:.0f}")
        after = spent(running.processes())
    finally:
        running.stop()
    taken = {key: seconds - before.get(key, 0.0) for key, seconds in after.items()}
    whole = sum(taken.values())
    table = Table(title=f"{streams} streams, {num_tokens:,} tokens, {' '.join(speeds)} tokens/s")
    for column in ("process", "thread", "µs a token", "share"):
        table.add_column(column, justify="left" if column in ("process", "thread") else "right")
    for (name, pid, thread), seconds in sorted(taken.items(), key=lambda item: -item[1]):
        if seconds >= _LEAST_SHARE * whole:
            which = "main" if thread == pid else str(thread - pid)
            table.add_row(name, which, f"{seconds / num_tokens * 1e6:.0f}", f"{seconds / whole:.1%}")
    Console().print(table)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.processor", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    chosen = parser.parse_args()
    print(f"{NEW_TOKENS} new tokens each")
    uvloop.run(run(chosen.streams, chosen.rounds, chosen.model))


if __name__ == "__main__":
    main()
