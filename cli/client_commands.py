"""Commands about clients: connect and doctor. Above: `cli.main`, whose application they join; below: their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.exits import friendly
from cli.flags import Json, Port, complete_model, examples

_CONNECT_EXAMPLES = examples(
    "hostler connect                       which clients there are",
    "hostler connect codex                 what to put where",
    "hostler connect codex --write         put it there: a diff, a backup, nothing of yours replaced",
    "hostler connect cursor --url https://box.example.org --api-key $KEY",
)


def connect(
    client: Annotated[str | None, typer.Argument(help="Name of a client; none lists them.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the server's first that chats.", autocompletion=complete_model)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Change the client's files instead of showing how.")] = False,
    with_key: Annotated[bool, typer.Option("--with-key", help="Show or write the server's key itself.")] = False,
    url: Annotated[str | None, typer.Option(help="A server elsewhere instead of the one that runs here.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key; default $HOSTLER_API_KEY.")] = None,
    as_json: Json = False,
    port: Port = None,
) -> None:
    """Show or write the configuration with which a client (Jan, Cursor, Codex, an SDK …) talks to your server."""
    from cli import connect as connecting

    if client is None:
        connecting.listing(as_json)
        return
    wish = connecting.Wish(model=model, url=url, api_key=api_key, port=port, with_key=with_key)
    connecting.connect(client, wish, write=write, as_json=as_json)


_DOCTOR_EXAMPLES = examples(
    "hostler doctor                    is this machine fit to serve",
    "hostler doctor --client codex     would Codex work with the server that runs",
    "hostler doctor --json | jq '.findings[] | select(.state == \"bad\")'",
)


def doctor(
    client: Annotated[
        str | None, typer.Option(help="Send what this client sends, and say what it would stumble over.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For --client; default the first that chats.", autocompletion=complete_model)
    ] = None,
    url: Annotated[str | None, typer.Option(help="For --client: a server elsewhere.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key; default $HOSTLER_API_KEY.")] = None,
    file: Annotated[Path | None, typer.Option("--config", "-c", help="File to check instead of the usual one.")] = None,
    as_json: Json = False,
    port: Port = None,
) -> None:
    """Check this machine and its servers, or whether a client would work. Exit code 1 if something must be mended."""
    if client is None:
        from cli.doctor import report

        report.run(file, as_json=as_json)
        return
    from cli.connect import Wish
    from cli.doctor import client as checking

    checking.check(client, Wish(model=model, url=url, api_key=api_key, port=port), as_json=as_json)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog=_CONNECT_EXAMPLES)(friendly(connect))
    app.command(epilog=_DOCTOR_EXAMPLES)(friendly(doctor))
