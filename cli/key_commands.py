"""`hostler key …`: names, flags and help of its commands, nothing else; each imports its own file when it runs.

Above stands `cli.main`; below, `cli.keys`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.exits import friendly
from cli.flags import Json
from cli.flags import examples as _examples

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="API keys: who may use a server, for what, how much and until when.\n\n"
    "Keys lie in a file of yours, hashed. Running servers take a change within a second.",
)

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration that names the key file; default as `hostler serve` finds it."),
]


@app.command(
    epilog=_examples(
        "hostler key create laptop",
        "hostler key create ci --model 'Qwen3-*' --requests-per-minute 60 --expires 30d",
        "hostler key create ops --scope infer --scope admin",
        "export HOSTLER_API_KEY=$(hostler key create laptop --json | jq -r .key)",
    )
)
@friendly
def create(
    name: Annotated[str, typer.Argument(help="What you will know it by.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="infer (use models) or admin (/admin, /metrics); repeatable. Default infer."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Only this model, by name or alias, or a beginning and *; repeatable. Default all."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Default unlimited.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and reply; default unlimited.")] = None,
    max_streams: Annotated[int | None, typer.Option(min=1, help="Requests at a time; default unlimited.")] = None,
    expires: Annotated[str | None, typer.Option(help="After this long: 12h, 30d. Default never.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Make a key and show it, this once."""
    from cli import keys

    keys.create(
        name,
        scopes=scope,
        models=model,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_streams=max_streams,
        expires=expires,
        as_json=as_json,
        config=config,
    )


@app.command("list")
@friendly
def list_keys(as_json: Json = False, config: Config = None) -> None:
    """List the keys: what each may do, and until when."""
    from cli import keys

    keys.show(as_json, config)


@app.command(epilog=_examples("hostler key revoke laptop", "hostler key revoke 1f0c77ab"))
@friendly
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_ID", help="As `hostler key list` shows it.")],
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Take a key back. What it has running ends within a second."""
    from cli import keys

    keys.revoke(name, as_json, config)
