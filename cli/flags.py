"""Options that several commands share, and how their examples look. Above: `cli.main`, `cli.client_commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_model(incomplete: str) -> list[str]:
    """Complete the name of a model that a live server knows."""
    from cli.servers import complete_model as complete

    return complete(incomplete)


def examples(*lines: str) -> str:
    """Return an epilog; \b keeps its line breaks."""
    return "\b\n" + "\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


Port = Annotated[int | None, typer.Option("--port", "-p", min=1, max=65535, help="The server's port, if several run.")]
Json = Annotated[bool, typer.Option("--json", help="JSON for scripts.")]
Model = Annotated[str, typer.Argument(help="Name of a model that the server knows.", autocompletion=complete_model)]
ModelsDir = Annotated[Path | None, typer.Option(help="Where pulled models live.", file_okay=False)]
