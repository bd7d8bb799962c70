"""An address in a request, and the seam to whoever fetches it. Above: dialects, `linked_images`; below: `fetch`.

The seam exists so that a gateway that fetches nothing, the usual one, loads no HTTP client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Link:
    """An image's address, and the field that holds it. Its part in the message has no data yet."""

    url: str
    name: str


class FetchRefused(Exception):
    """The address may not or cannot be fetched; says why in words that a stranger may read."""


class AcceptStart(Protocol):
    """Looks at the first bytes of a body, to stop early what is not wanted anyway."""

    def __call__(self, start: bytes) -> bool:
        """Return whether to go on."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one fetch may take.

    Attributes:
        max_bytes: of the body.
        num_start_bytes: `accept_start` is asked once with so many bytes, or with the whole body if it is shorter.
    """

    max_bytes: int
    num_start_bytes: int
    accept_start: AcceptStart


class Fetch(Protocol):
    """Fetches addresses that strangers give. Above: `linked_images`; below: the network."""

    async def get(self, url: str, budget: Budget) -> bytes:
        """Return the body.

        Raises:
            FetchRefused: with the reason.
        """
