"""Every client that hostler knows to set up. A new one is an entry in `apps`, `agents` or `libraries`."""

from __future__ import annotations

import difflib

from cli.clients.agents import AGENTS
from cli.clients.apps import APPS
from cli.clients.client import Client
from cli.clients.libraries import LIBRARIES
from cli.exits import UsageError

CLIENTS: tuple[Client, ...] = (*APPS, *AGENTS, *LIBRARIES)
_BY_NAME = {client.name: client for client in CLIENTS}


def names() -> list[str]:
    """Return the names of all clients, in the order in which they are listed."""
    return list(_BY_NAME)


def find(name: str) -> Client:
    """Return a client by its name, whatever the letters' case; blanks and underscores count as dashes.

    Raises:
        UsageError: no such client; says which name is near.
    """
    wanted = "-".join(name.lower().replace("_", " ").split())
    if wanted in _BY_NAME:
        return _BY_NAME[wanted]
    near = difflib.get_close_matches(wanted, _BY_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`hostler connect` lists those that are"
    raise UsageError(f"{name!r} is not a client that hostler knows; {hint}")
