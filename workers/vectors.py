"""The seam between a worker's gRPC edge and engines that turn texts into vectors or scores.

Above: `inference.py`, which turns the wire into these dataclasses. Below: `workers/embedding/`. Nothing here imports
torch or grpc. Such an engine fills `workers.engine.Engine` too: lifecycle and tokenizing are alike for all kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from workers.engine import TextPrompt, TokenPrompt

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts, or token ids taken as they are, to be turned into one vector each.

    Attributes:
        dimensions: keep so many leading numbers and normalise again; None for all.
    """

    inputs: Sequence[TextPrompt | TokenPrompt]
    dimensions: int | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors (inputs, dimensions) float32 in the inputs' order, and how many tokens they took."""

    vectors: Vectors
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RankingRequest:
    """A query, and documents to be scored against it."""

    query: str
    documents: Sequence[str]
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Ranked:
    """Scores 0 … 1 in the documents' order, higher is more relevant, and how many tokens they took."""

    scores: Sequence[float]
    num_tokens: int


@runtime_checkable
class Embedder(Protocol):
    """An engine that makes vectors."""

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        """Return one vector for each input. Cancelling the call drops what has not begun.

        Raises:
            HostlerError: refused or failed; other requests are unaffected.
        """


@runtime_checkable
class Ranker(Protocol):
    """An engine that says how relevant documents are."""

    async def rank(self, request: RankingRequest) -> Ranked:
        """Return one score for each document. Cancelling the call drops what has not begun.

        Raises:
            HostlerError: refused or failed; other requests are unaffected.
        """
