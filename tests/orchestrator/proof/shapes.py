"""Small clusters that between them have every kind of model: small enough that everything gets in everything's way.

Above it: the world and the walk. Below it: the configuration. One unit of memory is a MiB.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from hostler.config import HostlerConfig, build

from orchestrator.devices import Device
from orchestrator.models import Footprint, ModelSpec

MB = 2**20
CONTEXT_TOKENS = 1024
STEP_BUDGET_S = 8.0
DRAIN_S = 4.0
MIN_RESIDENCY_S = 3.0
MAX_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One model of a shape.

    Attributes:
        weight_mb: of its weights; 0 for an engine without files.
        kv_mb: of one full context.
        excess: what it really holds beside its KV cache, over the estimate.
        stored: its files are here from the start.
        options: of its entry in the configuration; None for one that is only found in the store.
    """

    name: str
    weight_mb: int
    kv_mb: int = 20
    excess: float = 1.0
    stored: bool = True
    options: tuple[tuple[str, Any], ...] | None = ()

    @property
    def footprint(self) -> Footprint:
        return Footprint(self.weight_mb * MB, self.kv_mb * MB // CONTEXT_TOKENS, CONTEXT_TOKENS, 2 * MB)

    @property
    def own_bytes(self) -> int:
        """What it really holds beside its KV cache."""
        footprint = self.footprint
        return int((footprint.weight_bytes + footprint.workspace_bytes) * self.excess) if self.weight_mb else 0


@dataclass(frozen=True)
class Shape:
    """Devices by their budgets and sizes in MiB, host memory for sleepers, models."""

    name: str
    devices: tuple[tuple[int, int], ...]
    sleep_mb: int
    kinds: tuple[Kind, ...]
    warm_workers: int = 1
    apart: tuple[str, ...] = ()

    def found_devices(self) -> tuple[Device, ...]:
        return tuple(
            Device(f"cuda:{i}", "cuda", f"GPU {i}", total * MB, budget * MB, uuid=f"GPU-{i}")
            for i, (budget, total) in enumerate(self.devices)
        )

    @functools.cached_property
    def config(self) -> HostlerConfig:
        entries = []
        for kind in self.kinds:
            if kind.options is None:
                continue
            engine = {} if kind.weight_mb else {"engine": "scripted"}
            entries.append({"name": kind.name, "max_running": 4, **engine, **dict(kind.options)})
        return build(
            {
                "models": entries,
                "warm_workers": self.warm_workers,
                "min_residency": MIN_RESIDENCY_S,
                "max_wait": MAX_WAIT_S,
                "step_budget_s": STEP_BUDGET_S,
                "drain_s": DRAIN_S,
                "apart": list(self.apart),
            }
        )

    def found_in_store(self) -> tuple[ModelSpec, ...]:
        return tuple(ModelSpec(k.name, k.name, configured=False) for k in self.kinds if k.options is None)


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


SHAPES = (
    Shape(
        "one tight device",
        ((1000, 1050),),
        1100,
        (
            Kind("big", 700),
            Kind("half", 480, options=_options(keep_alive=20)),
            Kind("third", 300, kv_mb=40),
            Kind("small", 90, excess=1.15),
            Kind("absent", 200, stored=False),
        ),
    ),
    Shape(
        "two devices",
        ((1000, 1100), (600, 640)),
        700,
        (
            Kind("big", 800),
            Kind("mid", 450, excess=1.1),
            Kind("many", 150, options=_options(max_replicas=2, max_running=2)),
            Kind("night", 350, options=_options(priority="batch")),
            Kind("fixed", 300, options=_options(device="cuda:1", pinned=True)),
            Kind("found", 250, options=None),
        ),
    ),
    Shape(
        "no sleep, no warm workers",
        ((800, 800), (800, 1000)),
        0,
        (
            Kind("one", 500, options=_options(preload=True)),
            Kind("two", 500),
            Kind("three", 400, kv_mb=60),
            Kind("night", 300, options=_options(priority="batch", keep_alive=15)),
            Kind("many", 200, options=_options(max_replicas=3, max_running=1)),
        ),
        warm_workers=0,
    ),
    Shape(
        "apart and split",
        ((600, 640), (600, 640)),
        900,
        (
            Kind("wide", 800),
            Kind("left", 250, options=_options(group="rivals")),
            Kind("right", 250, options=_options(group="rivals")),
            Kind("code", 0),
            Kind("held", 150, options=_options(kv_cache=50 * MB)),
        ),
        warm_workers=2,
        apart=("rivals",),
    ),
)
