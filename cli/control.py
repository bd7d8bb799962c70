"""The commands that move models or list them: models, pull, load, unload, sleep, pin, rm, version.

Above stands `cli.main`, which imports this file only when one of them runs; below, `cli.placement`, `cli.store`
and `cli.models_screen`. With `as_json` standard output carries JSON and nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from cli import models_screen, placement, report, servers, store
from cli.exits import CliError
from cli.hints import hinted
from cli.placement import Progress, Ready
from cli.seeing import sample, show_json, show_json_line


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def models(port: int | None, as_json: bool, models_dir: Path | None) -> None:
    """Show what the server serves and what is on disk."""
    served: list[dict[str, Any]] | None = None
    try:
        server = servers.find(port)
    except CliError:
        if port is not None:
            raise
    else:
        served = asyncio.run(sample(server))["models"]
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

    Console().print(models_screen.draw_models(served, stored))


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
    with hinted(server, model):
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
                        show_json_line({"stage": "ready", "model": model, **fields})
                    else:
                        reporter.finish(model)
                        reporter.say("ready", f"{model} is ready ({took_s:.1f} s)", "good")
                elif reporter is None:
                    show_json_line({"model": model, **dataclasses.asdict(event)})
                else:
                    reporter.progress(model, event)
    finally:
        if reporter is not None:
            reporter.close()


def unload(port: int | None, model: str, as_json: bool) -> None:
    """Drain and remove a model's replicas."""
    server = servers.find(port)

    async def call() -> int:
        async with placement.connect(server.run_dir) as client:
            return await client.unload(model)

    with hinted(server, model):
        num_unloaded = asyncio.run(call())
    if as_json:
        show_json({"model": model, "num_unloaded": num_unloaded})
    else:
        _say(f"{model} was not loaded" if not num_unloaded else f"{model} is unloaded")


def sleep(port: int | None, model: str, as_json: bool) -> None:
    """Take a model's replicas off their devices, quick to wake."""
    server = servers.find(port)

    async def call() -> int:
        async with placement.connect(server.run_dir) as client:
            return await client.sleep(model)

    with hinted(server, model):
        num_asleep = asyncio.run(call())
    if as_json:
        show_json({"model": model, "num_asleep": num_asleep})
    else:
        _say(f"{model} goes to sleep; a request wakes it" if num_asleep else f"{model} was not awake")


def pin(port: int | None, model: str, pinned: bool, as_json: bool) -> None:
    """Keep a model from being evicted, or let it go again."""

    server = servers.find(port)

    async def call() -> None:
        async with placement.connect(server.run_dir) as client:
            await client.pin(model, pinned)

    with hinted(server, model):
        asyncio.run(call())
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
