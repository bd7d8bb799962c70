"""`hostler service …`: flags and help. Above: `cli.main`, whose application it joins; below: `cli.service`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.exits import friendly
from cli.flags import Json, examples

app = typer.Typer(no_args_is_help=True, help="Let systemd run the server: from boot on, restarted when it fails.")

System = Annotated[bool, typer.Option("--system/--user", help="For the machine (needs root), or for you alone.")]
Name = Annotated[str, typer.Option(help="Name of the unit, if several servers are to run.")]


@app.command(
    epilog=examples(
        "hostler service install --linger",
        "hostler service install --memory-max 48G -- --port 9000 Qwen/Qwen3-0.6B",
        "sudo hostler service install --system --account ada -- --config /etc/hostler/hostler.yaml",
        "hostler service install --print               the unit, without installing it",
    )
)
@friendly
def install(
    serve_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="For `hostler serve`.", show_default=False)
    ] = None,
    system: System = False,
    name: Name = "hostler",
    account: Annotated[str | None, typer.Option(help="With --system: who it runs as; default who called sudo.")] = None,
    memory_high: Annotated[str | None, typer.Option(help="Slow down and reclaim beyond this, e.g. 40G or 70%.")] = None,
    memory_max: Annotated[str | None, typer.Option(help="Never more than this, e.g. 48G or 80%.")] = None,
    linger: Annotated[bool, typer.Option("--linger", help="Let your units run without you logged in.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the unit, install nothing.")] = False,
) -> None:
    """Write the unit, start it, and have it started at boot. Again: with the new arguments."""
    from cli.service import control, unit

    wish = control.wish_for(name, serve_args or [], system, account, memory_high, memory_max)
    if show:
        typer.echo(unit.text_of(wish), nl=False)
        return
    control.install(wish, linger=linger)


@app.command()
@friendly
def uninstall(system: System = False, name: Name = "hostler") -> None:
    """Stop the server and remove its unit. Models and configuration stay."""
    from cli.service import control

    control.uninstall(name, system)


@app.command()
@friendly
def status(system: System = False, name: Name = "hostler", as_json: Json = False) -> None:
    """Show what systemd knows of it. Exit code 1 if it is not active."""
    from cli.service import control

    control.status(name, system, as_json)


@app.command()
@friendly
def start(system: System = False, name: Name = "hostler") -> None:
    """Start it and wait until it accepts requests."""
    from cli.service import control

    control.act("start", name, system)


@app.command()
@friendly
def stop(system: System = False, name: Name = "hostler") -> None:
    """Let running requests finish, then stop."""
    from cli.service import control

    control.act("stop", name, system)


@app.command()
@friendly
def restart(system: System = False, name: Name = "hostler") -> None:
    """Stop it as `stop` does, then start it."""
    from cli.service import control

    control.act("restart", name, system)
