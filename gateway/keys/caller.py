"""Whose request it is. Above: `doors` (sets it), `routing`, `dispatch`, `lifetime` (ask); below: nothing.

The caller stands in the request's scope and, for the files that see no scope, in the context of its task. Tasks that a
request starts inherit that context, so no way to a model can forget whose it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from hostler.keys import Key

ALL_SCOPES = frozenset(("infer", "admin"))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may do.

    Attributes:
        name: the key's name; empty for who needs none.
        key_id: of a key of the key file; empty for `api_key` and for who needs none.
        cache_scope: whose cached prompts it shares, and whose stored responses it sees.
        scopes: infer, admin.
        models: names and aliases, or beginnings that end in `*`; None: all.
        key: with its limits, where it is of the key file.
    """

    name: str
    key_id: str
    cache_scope: str
    scopes: frozenset[str] = ALL_SCOPES
    models: tuple[str, ...] | None = None
    key: Key | None = None

    def may_use(self, names: Iterable[str]) -> bool:
        """Return whether a model that goes by these names may be used."""
        if self.models is None:
            return True
        return any(_fits(allowed, name) for name in names for allowed in self.models)


def _fits(allowed: str, name: str) -> bool:
    return name.startswith(allowed[:-1]) if allowed.endswith("*") else name == allowed


_CURRENT: ContextVar[Caller | None] = ContextVar("caller", default=None)


def set_caller(caller: Caller) -> None:
    """Say whose request the running task serves, and every task that it starts from here on."""
    _CURRENT.set(caller)


def current_caller() -> Caller | None:
    """Return whose request the running task serves; None for the gateway's own work."""
    return _CURRENT.get()
