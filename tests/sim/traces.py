"""What a trace is: devices, models, and who asks for which when. Pure data.

Above it: everything here. Below it: the orchestrator's footprints and specs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from orchestrator.models import Footprint, Located, ModelSpec

from .hardware import GB

CONTEXT_TOKENS = 8192
KV_SHARE = 0.1
"""One full context's keys and values, as a share of the weights."""
WORKSPACE_BYTES = 300_000_000
MAX_RUNNING = 8


@dataclass(frozen=True)
class Served:
    """One model of a trace; its file has `weight_gb`."""

    name: str
    weight_gb: float

    @cached_property
    def weight_bytes(self) -> int:
        return int(self.weight_gb * GB)

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec(self.name, self.name, max_running=MAX_RUNNING)

    @cached_property
    def located(self) -> Located:
        kv_bytes_per_token = int(self.weight_bytes * KV_SHARE / CONTEXT_TOKENS)
        return Located(self.name, Footprint(self.weight_bytes, kv_bytes_per_token, CONTEXT_TOKENS, WORKSPACE_BYTES))


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: it comes, and once its model is there it runs for so long."""

    at_s: float
    model: str
    runs_s: float


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they come.

    Attributes:
        device_gb: one entry for each device of the one machine.
        host_gb: host memory for sleeping models and the page cache together.
    """

    name: str
    says: str
    device_gb: tuple[float, ...]
    host_gb: float
    models: tuple[Served, ...]
    asked: tuple[Asked, ...]
    seed: int = 0

    @cached_property
    def by_name(self) -> dict[str, Served]:
        return {model.name: model for model in self.models}

    @cached_property
    def arrivals_s(self) -> dict[str, list[float]]:
        """When each model is asked for, in order."""
        found: dict[str, list[float]] = {model.name: [] for model in self.models}
        for asked in self.asked:
            found[asked.model].append(asked.at_s)
        return found
