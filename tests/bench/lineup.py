"""Who is measured: every contestant, hostler's variants first, and the choice among them.

Above: the run (`__main__`). Below: one module for each kind of server.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from .hostler_serve import Hostler
from .llama_server import LlamaServer
from .peers import Peer, StoredModel
from .transformers_serve import TransformersServe
from .vllm_serve import VllmServe


def physical_threads() -> int:
    """Return how many threads the machine gives to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lineup(model: StoredModel, threads: int) -> list[Peer]:
    """Return every contestant; a new one is added here."""
    return [
        Hostler(model),
        Hostler(model, "int8"),
        VllmServe(model),
        LlamaServer(model, threads, "bf16"),
        LlamaServer(model, threads, "q8_0"),
        TransformersServe(model, threads, continuous=False),
        TransformersServe(model, threads, continuous=True),
    ]


def choose(peers: Sequence[Peer], names: str | None) -> list[Peer]:
    """Return the peers that a comma-separated list names, in the lineup's order; all of them without a list.

    Raises:
        ValueError: a name that nobody has.
    """
    if names is None:
        return list(peers)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [peer.short for peer in peers]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no peer is called {', '.join(unknown)}; there are {', '.join(known)}")
    if not wanted:
        raise ValueError(f"name at least one of {', '.join(known)}")
    return [peer for peer in peers if peer.short in wanted]
