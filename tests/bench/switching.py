"""Two models where one has room: how long a request waits for the other one. `python -m tests.bench.switching`.

Above: `make bench`, which runs it last. Below: `client`, the peers' environments. The files are in the page cache, both
models have the same weights (two directories), and each request asks for four tokens of the model that is not loaded.

Each contestant switches in its own way: hostler by waking a sleeper, or by loading into a worker that stands ready;
llama.cpp's router by ending one server process and starting another; transformers serve loads into its one process
and keeps what it has, so that only its first request for a model is a switch: it is started anew for each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from tests.journeys.server import ROOT, Server, Servers, free_port

from .client import StreamResult, stream_chat
from .environments import clean_environment
from .lineup import physical_threads
from .llama_server import LlamaServer
from .peers import Running, Skip, StoredModel, TreeServer, pull
from .transformers_serve import TransformersServe

MODEL = "SmolLM2-135M-Instruct"
NAMES = ("left", "right")
RESULTS = ROOT / "bench-results"
WITHIN_S = 120.0
GOALS_S = {"hostler, awake from sleep": 0.2, "hostler, load by a worker that stands ready": 0.5}
GAP_GROWTH_AT_MOST_S = 0.05
_SETTLE_S = 1.5
_POOL_SETTLE_S = 8.0


@dataclass(frozen=True, slots=True)
class Switch:
    """What was seen of one contestant: seconds from the request to its first text, one for each switch."""

    name: str
    first_text_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The middle one."""
        return statistics.median(self.first_text_s)


def body(model: str, max_tokens: int = 4, text: str = "Say hello.") -> dict[str, Any]:
    """Return a streaming greedy chat request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }


def twins(model: StoredModel, directory: Path) -> list[Path]:
    """Return two directories with the model's files, hard links where the file system allows: the same pages."""
    made = []
    for name in NAMES:
        twin = directory / name
        twin.mkdir()
        for file in model.path.iterdir():
            source = file.resolve()
            try:
                os.link(source, twin / file.name)
            except OSError:
                (twin / file.name).symlink_to(source)
        made.append(twin)
    return made


async def ask(url: str, model: str) -> StreamResult:
    """Ask for four tokens.

    Raises:
        RuntimeError: there was no reply.
    """
    result = await stream_chat(url, body(model), WITHIN_S)
    if result.error:
        raise RuntimeError(f"{model}: {result.error}")
    return result


async def alternate(url: str, models: Sequence[str], rounds: int, settle_s: float) -> list[float]:
    """Ask for one model after the other; return the waits for first text, without those of the first two."""
    waits = []
    for number in range(rounds + 2):
        waits.append((await ask(url, models[number % 2])).ttft_s)
        await asyncio.sleep(settle_s)
    return waits[2:]


def hostler_config(directories: Sequence[Path], *, budget_mib: int, sleep: str) -> str:
    """Return the text of a hostler.yaml: two models, one virtual device that holds one of them."""
    models = [
        f"  - {{name: {path.name}, source: {path}, dtype: bfloat16, kv_cache: 64MiB, max_running: 4}}"
        for path in directories
    ]
    device = f"devices: [{{id: cpu0, budget: {budget_mib}MiB}}]"
    return "\n".join(["models:", *models, device, f"sleep_memory: {sleep}", "min_residency: 0s", "gateways: 1", ""])


@contextmanager
def hostler(config: str) -> Iterator[Server]:
    """Run a hostler of this checkout."""
    servers = Servers()
    try:
        yield servers(config=config)
    finally:
        servers.stop_all()


def one_fits(server: Server) -> int:
    """Return a budget in MiB that holds one of the two models, as the server plans it once it has been loaded."""
    uvloop.run(ask(server.url, NAMES[0]))
    time.sleep(_SETTLE_S)
    plan = json.loads(server.hostler("plan", NAMES[0], "--json").stdout)
    return round(1.5 * int(plan["needed_bytes"]) / 2**20)


def measure_hostler(directories: Sequence[Path], rounds: int) -> list[Switch]:
    """Measure both of hostler's ways."""
    with hostler(hostler_config(directories, budget_mib=8192, sleep="0")) as server:
        budget_mib = one_fits(server)
    found = []
    for (name, _), sleep, settle_s in zip(GOALS_S.items(), ("8GiB", "0"), (_SETTLE_S, _POOL_SETTLE_S), strict=True):
        with hostler(hostler_config(directories, budget_mib=budget_mib, sleep=sleep)) as server:
            waits = uvloop.run(alternate(server.url, NAMES, rounds, settle_s))
            found.append(Switch(name, tuple(waits)))
    return found


def measure_gap(directories: Sequence[Path]) -> tuple[float, float]:
    """Return the longest gap of a running stream in seconds: alone, and while the other model is loaded beside it."""

    async def run(url: str) -> tuple[float, float]:
        await ask(url, NAMES[0])
        await asyncio.sleep(_POOL_SETTLE_S)
        text = "Tell a very long story about a lighthouse."
        alone = await stream_chat(url, body(NAMES[0], 250, text) | {"ignore_eos": True}, WITHIN_S)
        beside = asyncio.create_task(stream_chat(url, body(NAMES[0], 500, text) | {"ignore_eos": True}, WITHIN_S))
        await asyncio.sleep(1.0)
        await ask(url, NAMES[1])
        stream = await beside
        if alone.error or stream.error:
            raise RuntimeError(alone.error or stream.error)
        return alone.max_gap_s, stream.max_gap_s

    with hostler(hostler_config(directories, budget_mib=8192, sleep="0")) as server:
        return uvloop.run(run(server.url))


def measure_llama(model: StoredModel, directory: Path, rounds: int, say: Callable[[str], None]) -> Switch:
    """Measure llama.cpp's router, which may hold one model at a time.

    Raises:
        Skip: it cannot be had here.
    """
    peer = LlamaServer(model, physical_threads(), "bf16")
    peer.prepare(say)
    for name in NAMES:
        (directory / f"{name}.gguf").symlink_to(peer.weights_file)
    port = free_port()
    command = [
        *(peer.program, "--models-dir", str(directory), "--models-max", "1"),
        *("--threads", str(physical_threads()), "-np", "4", "-c", "4096", "--host", "127.0.0.1", "--port", str(port)),
    ]
    running = TreeServer.spawn(command, clean_environment(), port, Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp")))
    try:
        uvloop.run(until_answers(running))
        return Switch("llama.cpp router", tuple(uvloop.run(alternate(running.url, NAMES, rounds, _SETTLE_S))))
    finally:
        running.stop()


async def until_answers(running: Running, model: str = NAMES[0]) -> None:
    """Ask until there is a reply.

    Raises:
        RuntimeError: the server ended, or gave no reply in time.
    """
    until_s = time.monotonic() + WITHIN_S
    while time.monotonic() < until_s and not running.has_ended:
        result = await stream_chat(running.url, body(model), WITHIN_S)
        if not result.error:
            return
        await asyncio.sleep(0.2)
    raise RuntimeError(f"no reply:\n{running.output()}")


def measure_transformers(
    model: StoredModel, directories: Sequence[Path], rounds: int, say: Callable[[str], None]
) -> Switch:
    """Measure the first request for a second model, in a fresh server each time.

    Raises:
        Skip: it cannot be had here.
    """
    peer = TransformersServe(model, physical_threads(), continuous=False)
    peer.prepare(say)
    waits = []
    for _ in range(rounds):
        running = peer.start(pinned=False)
        try:
            uvloop.run(until_answers(running, str(model.path)))
            waits.append(uvloop.run(ask(running.url, str(directories[0]))).ttft_s)
        finally:
            running.stop()
    return Switch("transformers serve, first request for a second model", tuple(waits))


def run(say: Callable[[str], None], *, rounds: int = 6, with_peers: bool = True) -> dict[str, Any]:
    """Measure everything that can be had; return the figures."""
    model = pull(MODEL, say)
    notices: list[str] = []
    with tempfile.TemporaryDirectory(prefix="hb-", dir="/tmp") as scratch:
        directories = twins(model, Path(scratch))
        for directory in directories:
            for file in directory.iterdir():
                file.read_bytes()  # Into the page cache.
        say("switching: hostler")
        found = measure_hostler(directories, rounds)
        say("switching: a load beside a running stream")
        alone_s, beside_s = measure_gap(directories)
        if with_peers:
            ggufs = Path(scratch) / "gguf"
            ggufs.mkdir()
            measures: list[tuple[str, Callable[[], Switch]]] = [
                ("llama.cpp", lambda: measure_llama(model, ggufs, rounds, say)),
                ("transformers serve", lambda: measure_transformers(model, directories, max(1, rounds // 2), say)),
            ]
            for name, measure in measures:
                say(f"switching: {name}")
                try:
                    found.append(measure())
                except (Skip, RuntimeError) as reason:
                    notices.append(f"{name} was skipped: {str(reason).splitlines()[0]}")
    return {
        "switches": [asdict(item) | {"median_s": item.median_s} for item in found],
        "longest_gap_alone_s": alone_s,
        "longest_gap_beside_a_load_s": beside_s,
        "notices": notices,
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the figures as a table."""
    table = Table("switching between two models, one fits", "median", "all", "goal")
    for item in figures["switches"]:
        goal_s = GOALS_S.get(item["name"])
        met = "" if goal_s is None else f"≤ {goal_s:g} s {'met' if item['median_s'] <= goal_s else 'MISSED'}"
        every = " ".join(f"{value:.2f}" for value in item["first_text_s"])
        table.add_row(item["name"], f"{item['median_s']:.3f} s", every, met)
    console.print(table)
    growth_s = figures["longest_gap_beside_a_load_s"] - figures["longest_gap_alone_s"]
    met = "met" if growth_s <= GAP_GROWTH_AT_MOST_S else "MISSED"
    console.print(
        f"longest gap of a stream: {figures['longest_gap_alone_s'] * 1e3:.0f} ms alone, "
        f"{figures['longest_gap_beside_a_load_s'] * 1e3:.0f} ms beside a load "
        f"(goal: at most {GAP_GROWTH_AT_MOST_S * 1e3:.0f} ms more, {met})"
    )
    for notice in figures["notices"]:
        console.print(notice, style="yellow", markup=False)


def main() -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.switching", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="switches of each contestant (default 6)")
    parser.add_argument("--no-peers", action="store_true", help="hostler alone")
    chosen = parser.parse_args()
    console = Console()
    figures = run(console.print, rounds=chosen.rounds, with_peers=not chosen.no_peers)
    show(figures, console)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"switching-{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    path.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    console.print(f"  saved {path.relative_to(ROOT)}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
