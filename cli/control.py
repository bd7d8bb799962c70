"""The commands that ask a running server or the model store: ps, models, pull, load, unload, plan, pin, rm.

Above stands `cli.main`, which imports this file only when one of them runs; below, `cli.placement`, `cli.store`
and `cli.status`. With `as_json` standard output carries JSON and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from hostler import errors

from cli import placement, report, servers, status, store
from cli.exits import CliError
from cli.placement import Progress, Ready

_SAMPLE_S = 0.4


def show_json(value: Any) -> None:
    """Print one JSON value: indented on a terminal, one line in a pipe."""
    indent = 2 if sys.stdout.isatty() else None
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


async def _sample(server: servers.Server) -> dict[str, Any]:
    async with placement.connect(server.run_dir) as client:
        return status.status_json(await client.status(), server.port, server.pid)


def ps(port: int | None, as_json: bool, watch: bool, interval_s: float) -> None:
    """Show devices and replicas, once or until Ctrl-C."""
    server = servers.find(port)
    if watch:
        asyncio.run(_watch(server, as_json, interval_s))
        return
    asyncio.run(_ps_once(server, as_json))


async def _ps_once(server: servers.Server, as_json: bool) -> None:
    values = await _sample(server)
    if not as_json and any(replica["num_running"] for replica in values["replicas"]):
        start = time.monotonic()  # tokens/s needs two samples
        await asyncio.sleep(_SAMPLE_S)
        values = status.with_rates(await _sample(server), values, time.monotonic() - start)
    if as_json:
        show_json(values)
        return
    from rich.console import Console

    Console().print(status.draw_status(values))


async def _watch(server: servers.Server, as_json: bool, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    before: dict[str, Any] | None = None
    sampled_at = time.monotonic()
    with Live(Text("…"), console=Console(stderr=as_json), auto_refresh=False, screen=not as_json) as live:
        while True:
            try:
                values = await _sample(server)
            except errors.OrchestratorAway as error:
                # It may be restarting under its supervisor; with that gone, too, there is nothing to watch.
                servers.find(server.port)
                live.update(Text(error.message, style="yellow"), refresh=not as_json)
            else:
                now = time.monotonic()
                status.with_rates(values, before, now - sampled_at)
                before, sampled_at = values, now
                if as_json:
                    sys.stdout.write(json.dumps(values) + "\n")
                    sys.stdout.flush()
                else:
                    live.update(status.draw_status(values), refresh=True)
            await asyncio.sleep(interval_s)


def models(port: int | None, as_json: bool, models_dir: Path | None) -> None:
    """Show what the server serves and what is on disk."""
    served: list[dict[str, Any]] | None = None
    try:
        server = servers.find(port)
    except CliError:
        if port is not None:
            raise
    else:
        served = asyncio.run(_sample(server))["models"]
        directory = servers.read_config(server.run_dir).get("models_dir")
        models_dir = models_dir or (Path(directory) if directory else None)
    try:
        stored = store.listing(models_dir)
    except CliError as error:
        if served is None:
            raise
        sys.stderr.write(f"hostler: {error}\n")
        stored = []
    if as_json:
        show_json({"served": served, "stored": stored})
        return
    from rich.console import Console

    Console().print(status.draw_models(served, stored))


def pull(name: str, revision: str | None, models_dir: Path | None, as_json: bool) -> None:
    """Fetch a model to disk."""
    reporter = None if as_json else report.make()
    try:
        for event in store.pull(name, revision, models_dir):
            if reporter is None:
                sys.stdout.write(json.dumps(event) + "\n")
                sys.stdout.flush()
            stage = str(event.get("stage", ""))
            if stage == "error":
                raise CliError(str(event.get("message") or event.get("reason") or "pull failed"))
            if reporter is None:
                continue
            if stage == "done":
                reporter.finish(name)
                reporter.say("done", f"{event.get('name', name)} is at {event.get('path')}", "good")
            else:
                done, total = int(event.get("done_bytes") or 0), int(event.get("total_bytes") or 0)
                reporter.progress(name, Progress(stage, done, total, str(event.get("detail") or "")))
    finally:
        if reporter is not None:
            reporter.close()


def load(port: int | None, model: str, as_json: bool) -> None:
    """Bring a model up and follow it."""
    server = servers.find(port)
    asyncio.run(_load(server, model, as_json))


async def _load(server: servers.Server, model: str, as_json: bool) -> None:
    started = time.monotonic()
    reporter = None if as_json else report.make()
    try:
        async with placement.connect(server.run_dir) as client:
            async for event in client.load(model):
                if isinstance(event, Ready):
                    took_s = round(time.monotonic() - started, 2)
                    if reporter is None:
                        fields = {"replica": event.replica_id, "generation": event.generation, "took_s": took_s}
                        sys.stdout.write(json.dumps({"stage": "ready", "model": model, **fields}) + "\n")
                    else:
                        reporter.finish(model)
                        reporter.say("ready", f"{model} is ready ({took_s:.1f} s)", "good")
                elif reporter is None:
                    fields = {"done_bytes": event.done_bytes, "total_bytes": event.total_bytes, "detail": event.detail}
                    sys.stdout.write(json.dumps({"stage": event.stage, "model": model, **fields}) + "\n")
                    sys.stdout.flush()
                else:
                    reporter.progress(model, event)
    finally:
        if reporter is not None:
            reporter.close()


def unload(port: int | None, model: str, as_json: bool) -> None:
    """Drain and remove a model's replicas."""

    async def call(server: servers.Server) -> int:
        async with placement.connect(server.run_dir) as client:
            return await client.unload(model)

    num_unloaded = asyncio.run(call(servers.find(port)))
    if as_json:
        show_json({"model": model, "num_unloaded": num_unloaded})
    else:
        _say(f"{model} was not loaded" if not num_unloaded else f"{model} is unloaded")


def plan(port: int | None, model: str, as_json: bool) -> None:
    """Say what a load would do now."""

    async def call(server: servers.Server) -> dict[str, Any]:
        async with placement.connect(server.run_dir) as client:
            answer = await client.plan(model)
        return {
            "model": model,
            "feasible": answer.feasible,
            "device": answer.device or None,
            "needed_bytes": answer.needed_bytes,
            "quantize": answer.quantize or None,
            "evict_models": list(answer.evict_models),
            "reason": answer.reason,
        }

    values = asyncio.run(call(servers.find(port)))
    if as_json:
        show_json(values)
        return
    verdict = f"would go to {values['device']}" if values["feasible"] else "does not fit now"
    needs = f": needs {status.size(values['needed_bytes'])}" if values["needed_bytes"] else ""
    weights = f" with {values['quantize']} weights" if values["quantize"] and needs else ""
    _say(f"{model} {verdict}{needs}{weights}")
    if values["evict_models"]:
        _say(f"  after unloading {', '.join(values['evict_models'])}")
    if values["reason"]:
        _say(f"  {values['reason']}")


def pin(port: int | None, model: str, pinned: bool, as_json: bool) -> None:
    """Keep a model from being evicted, or let it go again."""

    async def call(server: servers.Server) -> None:
        async with placement.connect(server.run_dir) as client:
            await client.pin(model, pinned)

    asyncio.run(call(servers.find(port)))
    if as_json:
        show_json({"model": model, "pinned": pinned})
    else:
        _say(f"{model} stays loaded until you unpin it" if pinned else f"{model} may be evicted again")


def remove(name: str, models_dir: Path | None, as_json: bool, yes: bool) -> None:
    """Delete a model from disk, after asking on a terminal."""
    if not yes and sys.stdin.isatty() and not as_json:
        import typer

        typer.confirm(f"Delete {name} from disk?", abort=True)
    store.remove(name, models_dir)
    if as_json:
        show_json({"name": name, "removed": True})
    else:
        _say(f"{name} is deleted")


def version(as_json: bool) -> None:
    """Show our version and those of the libraries that matter, without importing them."""
    import platform
    from importlib import metadata

    from hostler import __version__

    values: dict[str, Any] = {"hostler": __version__, "python": platform.python_version()}
    for package in ("grpcio", "torch", "transformers", "ray"):
        try:
            values[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            values[package] = None
    if as_json:
        show_json(values)
    else:
        known = ", ".join(f"{name} {number}" for name, number in values.items() if number and name != "hostler")
        _say(f"hostler {__version__} ({known})")
