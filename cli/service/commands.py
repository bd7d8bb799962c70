"""`hostler service …`: names, flags and help of its commands, nothing else; each imports its own file when it runs.

Above stands `cli.main`; below, `cli.service.actions` and `cli.service.status`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.exits import friendly
from cli.flags import Json, examples

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="hostler as a systemd service: it starts with the machine, and again when it fails.",
)

System = Annotated[bool, typer.Option("--system/--user", help="The machine's service, or your own (the default).")]
Name = Annotated[str, typer.Option(help="The unit's name, if there are several.")]


@app.command(
    epilog=examples(
        "hostler service install --linger                            your own, from boot on",
        "hostler service install -- Qwen/Qwen3-0.6B --port 9000      what `hostler serve` is told",
        "hostler service install --memory-max 24G --dry-run          only show the unit",
        "sudo hostler service install --system --run-as models       the machine's, more closely fenced in",
    )
)
@friendly
def install(
    serve: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="What `hostler serve` is told.", show_default=False)
    ] = None,
    system: System = False,
    name: Name = "hostler",
    run_as: Annotated[str | None, typer.Option(help="With --system: its user; default who called sudo.")] = None,
    memory_max: Annotated[str | None, typer.Option(help="Never more memory than this, e.g. 24G or 80%.")] = None,
    memory_high: Annotated[str | None, typer.Option(help="From here on it is slowed down and reclaimed.")] = None,
    writable: Annotated[
        list[Path] | None, typer.Option(help="With --system: a further path it may write to; repeatable.")
    ] = None,
    with_key: Annotated[
        bool, typer.Option("--with-key", help="Put $HOSTLER_API_KEY into the service's environment file (0600).")
    ] = False,
    linger: Annotated[bool, typer.Option("--linger", help="Start at boot and outlive your login (loginctl).")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Start it now.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Print the unit and do nothing.")] = False,
) -> None:
    """Write a unit that runs `hostler serve` from this directory, enable it and start it. Again: replace it."""
    from cli.service import actions

    wish = actions.Wish(
        scope="system" if system else "user",
        name=name,
        serve=tuple(serve or ()),
        run_as=run_as,
        writable=tuple(writable or ()),
        memory_high=memory_high,
        memory_max=memory_max,
        with_key=with_key,
    )
    actions.install(wish, linger=linger, start=start, dry_run=dry_run)


@app.command()
@friendly
def uninstall(system: System = False, name: Name = "hostler") -> None:
    """Stop the service and remove its unit. Models and configuration stay."""
    from cli.service import actions

    actions.uninstall("system" if system else "user", name)


@app.command()
@friendly
def status(system: System = False, name: Name = "hostler", as_json: Json = False) -> None:
    """Show whether it runs, since when, with how much memory. Exit code 1 if it does not run."""
    from cli.service import status as showing

    showing.show("system" if system else "user", name, as_json)


@app.command()
@friendly
def start(system: System = False, name: Name = "hostler") -> None:
    """Start it and wait until it answers requests."""
    _order(system, name, "start")


@app.command()
@friendly
def stop(system: System = False, name: Name = "hostler") -> None:
    """Let running requests finish, then stop it."""
    _order(system, name, "stop")


@app.command()
@friendly
def restart(system: System = False, name: Name = "hostler") -> None:
    """Stop it and start it again."""
    _order(system, name, "restart")


def _order(system: bool, name: str, word: str) -> None:
    from cli.service import actions

    actions.order("system" if system else "user", name, word)
