"""`hostler mcp …`: names, flags and help of its commands, nothing else; each imports its own file when it runs.

Above stands `cli.main`; below, `cli.mcp_screen` and `cli.mcp_serve`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.exits import friendly
from cli.flags import Json, Port

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="MCP: tools of other programs for the models here, and the models here as tools for other programs.",
)

Url = Annotated[str | None, typer.Option(help="Talk to this server instead of the one that runs here.")]
Key = Annotated[str | None, typer.Option(help="Its key; default $HOSTLER_API_KEY.")]


@app.command("list")
@friendly
def list_servers(as_json: Json = False, url: Url = None, api_key: Key = None, port: Port = None) -> None:
    """List the MCP servers of the running server's configuration, and how they are."""
    from cli import mcp_screen

    mcp_screen.show_servers(url, api_key, port, as_json)


@app.command("test")
@friendly
def try_server(
    name: Annotated[str, typer.Argument(help="A server's name in the configuration.")],
    as_json: Json = False,
    url: Url = None,
    api_key: Key = None,
    port: Port = None,
) -> None:
    """Have the running server connect to an MCP server; show its tools and how long it took, or why it failed."""
    from cli import mcp_screen

    mcp_screen.try_out(name, url, api_key, port, as_json)


@app.command()
@friendly
def serve(
    http: Annotated[
        bool, typer.Option("--http", help="Listen on this machine instead of speaking over stdio.")
    ] = False,
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Where, with --http.")] = 8808,
    url: Url = None,
    api_key: Key = None,
    port: Port = None,
) -> None:
    """Be an MCP server: other programs' agents may ask the models here, list them, embed texts, transcribe speech.

    Over stdio for programs that start it themselves; with --http at http://127.0.0.1:8808/mcp, for which the server's
    key, if it has one, is demanded as a Bearer token.
    """
    from cli import mcp_serve

    mcp_serve.run(url, api_key, port, http_port if http else None)
