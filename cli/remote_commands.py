"""Commands about where servers are: remote and servers. Above: `cli.main`, whose application they join."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.exits import friendly
from cli.flags import Json, examples

_REMOTE_EXAMPLES = examples(
    "hostler remote gpu-box                a host of your ~/.ssh/config",
    "hostler remote ada@gpu-box --start    start a server there if none runs",
    "hostler remote gpu-box --port 9000 --remote-port 8001",
    "hostler remote ada@10.0.0.7 --ssh-option Port=2222",
    "hostler remote gpu-box --hostler '~/llm/.venv/bin/hostler'",
)


def remote(
    host: Annotated[str, typer.Argument(metavar="[USER@]HOST", help="As you would give it to ssh.")],
    port: Annotated[
        int | None,
        typer.Option("--port", "-p", min=1, max=65535, help="Port here; default the server's own, or the next free."),
    ] = None,
    remote_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The server's port there, if several run; or for --start.")
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="Start a server there if none runs; it goes on when you leave.")
    ] = False,
    program: Annotated[
        str | None, typer.Option("--hostler", metavar="PATH", help="The hostler there, if it is not found by itself.")
    ] = None,
    ssh_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="For `ssh -o`, e.g. Port=2222; repeatable.")
    ] = None,
    with_key: Annotated[
        bool, typer.Option("--with-key", help="Read and show the server's key, if it has one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Use a server on another machine as if it ran here: over your ssh, kept up until Ctrl-C.

    Looks what runs there, opens a port of 127.0.0.1 that leads to it, and connects again whenever the connection ends.
    The server need not listen on any network. Hosts, keys, jumps and passwords are as in your ~/.ssh/config.
    """
    from cli.remote.remote import Wish, remote
    from cli.remote.ssh import Route

    wish = Wish(local_port=port, remote_port=remote_port, start=start, program=program, with_key=with_key)
    remote(Route(host, tuple(ssh_option or ())), wish, as_json=as_json)


def servers(
    as_json: Json = False,
    with_key: Annotated[bool, typer.Option("--with-key", help="Show their keys, too.")] = False,
) -> None:
    """List the servers of this user that run on this machine."""
    from cli import server_list

    server_list.show(as_json, with_key=with_key)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog=_REMOTE_EXAMPLES)(friendly(remote))
    app.command(epilog=examples("hostler servers", "hostler servers --json | jq '.servers[].url'"))(friendly(servers))
