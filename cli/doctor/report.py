"""Runs every check and shows the findings. Above: `cli.main`; below: the checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import typer
from hostler.config import DEFAULT_PORT

from cli import servers
from cli.doctor import hub_token, machine, servers_here
from cli.doctor.finding import MARKS, Finding
from cli.seeing import show_json


def findings(config_file: Path | None) -> Iterator[Finding]:
    """Yield what each check finds, the quick ones first."""
    config, about_it = servers_here.configuration(config_file)
    live = servers.live()
    yield machine.python()
    yield machine.packages()
    gpus, cuda = machine.num_gpus(), machine.torch_cuda()
    yield machine.gpu(gpus, cuda)
    if (driver := machine.driver(gpus, cuda)) is not None:
        yield driver
    yield machine.compiler()
    yield from about_it
    directory = models_dir(config.models_dir if config else None)
    yield machine.models_directory(directory)
    yield machine.disk(directory)
    port = config.port if config else DEFAULT_PORT
    yield machine.port(port, is_ours=port in {server.port for server in live})
    yield machine.ray(config.ray_address if config else None)
    yield from servers_here.run_directories()
    for server in live:
        yield servers_here.health(server)
        yield from servers_here.sockets(server)
    yield from machine.hub_and_clock()
    yield from hub_token.check()


def models_dir(configured: Path | None) -> Path:
    """Return where models lie."""
    if configured is None and (text := os.environ.get("HOSTLER_MODELS_DIR")):
        configured = Path(text)
    return (configured or Path.home() / ".cache" / "hostler" / "models").expanduser().absolute()


def run(config_file: Path | None, *, as_json: bool) -> None:
    """Show every finding as it comes; exit code 1 if something must be mended."""
    found = []
    for finding in findings(config_file):
        found.append(finding)
        if not as_json:
            typer.echo(f"  {MARKS[finding.state]} {finding.name}: {finding.detail}")
            if finding.advice:
                typer.echo(f"      {finding.advice}")
    num_bad = sum(finding.state == "bad" for finding in found)
    if as_json:
        show_json({"healthy": not num_bad, "findings": [asdict(finding) for finding in found]})
    else:
        typer.echo(f"\n{num_bad} to mend." if num_bad else "\nAll is well.")
    if num_bad:
        raise typer.Exit(1)
