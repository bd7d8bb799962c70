"""One request of a client and what it expects. Above: `corpus`, `judge`, `send`; below: nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Expects = Literal[
    "chat stream",
    "chat",
    "responses stream",
    "responses",
    "messages stream",
    "messages",
    "token count",
    "models",
    "load progress",
    "anything",
]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request.

    Attributes:
        title: what the client is doing, in a few words.
        path: as the client writes it, with the query.
        expects: what its parser must be able to read.
        sends_key: how it presents the key: one, both or none of the two headers.
        is_optional: the client works without it, though with less.
    """

    title: str
    expects: Expects
    method: str = "POST"
    path: str = "/v1/chat/completions"
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    sends_key: Literal["bearer", "x-api-key", "both", "no"] = "bearer"
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, read to its end. Header names are lower case."""

    status: int
    headers: dict[str, str]
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one exchange went; no problems: the client can read the reply."""

    exchange: Exchange
    status: int
    problems: tuple[str, ...]
    took_s: float
