"""`hostler doctor --client NAME`: sends what that client sends and says what it would stumble over.

Above stands `cli.main`; below, `cli.replay` (the requests as data, the judges) and `cli.connect` (which server).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator

import httpx
import typer

from cli import chat, connect
from cli.certificates import trusted
from cli.exits import UsageError
from cli.replay import corpus, send
from cli.replay.exchange import Verdict
from cli.seeing import show_json

_TIMEOUT = httpx.Timeout(10.0, read=600.0)


def check(name: str, wish: connect.Wish, *, as_json: bool) -> None:
    """Replay a client and show each step; exit code 1 if it could not work.

    Raises:
        UsageError: nothing is known of such a client.
        CliError: no server answers.
    """
    client = name.lower()
    if client not in corpus.names():
        near = difflib.get_close_matches(client, corpus.names(), n=1, cutoff=0.5)
        known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(corpus.names())}"
        raise UsageError(f"what {name!r} sends is not known; {known}")
    target = connect.find_target(wish)
    server = chat.connect(wish.url, wish.api_key, wish.port)
    server.close()
    with httpx.Client(base_url=target.root, timeout=_TIMEOUT, trust_env=False, verify=trusted()) as http:
        verdicts = send.replay(http, corpus.replay_of(client, target.model), server.api_key)
        shown = list(_show_each(verdicts)) if not as_json else list(verdicts)
    broken = [v for v in shown if v.problems and not v.exchange.is_optional]
    if as_json:
        show_json(
            {"client": client, "model": target.model, "works": not broken, "steps": [as_json_of(v) for v in shown]}
        )
    elif broken:
        typer.echo(f"\n{client} would not work with {target.model}: {len(broken)} of {len(shown)} requests went wrong.")
    else:
        typer.echo(f"\n{client} works with {target.model} at {target.base}.")
    if broken:
        raise typer.Exit(1)


def _show_each(verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    for verdict in verdicts:
        mark = "✓" if not verdict.problems else "·" if verdict.exchange.is_optional else "✗"
        num_bytes = len(json.dumps(verdict.exchange.body or {}))
        size = f", {num_bytes / 1000:.0f} KB" if num_bytes >= 1000 else ""
        where = f"{verdict.exchange.method} {verdict.exchange.path.partition('?')[0]}{size}"
        typer.echo(f"  {mark} {verdict.exchange.title} ({where}; {verdict.took_s:.1f} s)")
        for problem in verdict.problems:
            typer.echo(f"      {problem}")
        yield verdict


def as_json_of(verdict: Verdict) -> dict[str, object]:
    """Return one step as JSON shows it."""
    exchange = verdict.exchange
    return {
        "title": exchange.title,
        "method": exchange.method,
        "path": exchange.path,
        "status": verdict.status,
        "optional": exchange.is_optional,
        "problems": list(verdict.problems),
        "took_s": round(verdict.took_s, 3),
    }
