"""Devices, models and what happened to them, as Prometheus' metrics. Above: `routes.metrics`; below: the contract.

They are made from the orchestrator's answer at each scrape, so that there is one truth. What has replicas is summed:
an id that changes with every load would make a new series each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

from hostler.placement.v1 import placement_pb2 as pb
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

T = TypeVar("T")
Rows: TypeAlias = tuple[tuple[str, str, Callable[[T], float]], ...]
"""Of each metric its name, what it is, and how it is read."""

_DEVICES: Rows[pb.Device] = (
    ("budget", "Bytes that hostler may use.", lambda d: d.budget_bytes),
    ("reserved", "Bytes given to workers.", lambda d: d.reserved_bytes),
    ("foreign", "Bytes that other programs hold.", lambda d: d.foreign_bytes),
    ("total", "Bytes that it has.", lambda d: d.total_bytes),
)
_REPLICAS: Rows[pb.ReplicaStatus] = (
    ("replicas", "Worker processes that have it.", lambda r: 1),
    ("requests_running", "Requests in its batches.", lambda r: r.worker.num_running),
    ("requests_waiting", "Requests in its workers' queues.", lambda r: r.worker.num_queued),
    ("kv_cache_used_bytes", "Of its KV cache, held by requests.", lambda r: r.worker.kv_used_bytes),
    ("kv_cache_budget_bytes", "What that may grow to.", lambda r: r.worker.kv_reserved_bytes),
    ("host_bytes", "Held in host memory beyond its devices.", lambda r: r.worker.host_bytes),
    ("tokens_per_second", "Generated, over the last seconds.", lambda r: r.completion_tokens_per_s),
)
_NODES: Rows[pb.Node] = (
    ("blank_workers", "Worker processes that stand ready for a load.", lambda n: n.num_blank_workers),
    ("sleep_used_bytes", "Host memory of sleeping models.", lambda n: n.sleep_used_bytes),
    ("sleep_budget_bytes", "What that may grow to.", lambda n: n.sleep_budget_bytes),
)


class StateCollector(Collector):
    """The metrics of one moment.

    Args:
        status: what the orchestrator said; None when it did not answer.
    """

    def __init__(self, status: pb.GetStatusResponse | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield GaugeMetricFamily(
            "hostler_orchestrator_up", "Whether the orchestrator answers.", value=float(self._status is not None)
        )
        if self._status is not None:
            yield from _devices(self._status)
            yield from _models(self._status)
            yield from _nodes(self._status)
            yield from _events(self._status)


def _devices(status: pb.GetStatusResponse) -> Iterator[Metric]:
    for name, what, read in _DEVICES:
        family = GaugeMetricFamily(f"hostler_device_{name}_bytes", what, labels=("device", "node"))
        for device in status.devices:
            family.add_metric((device.id, device.node), read(device))
        yield family


def _models(status: pb.GetStatusResponse) -> Iterator[Metric]:
    state = GaugeMetricFamily("hostler_model_state", "1 for the state a model is in.", labels=("model", "state"))
    for route in status.models:
        word = pb.ModelState.Name(route.state).removeprefix("MODEL_STATE_").lower()
        state.add_metric((route.name, word), 1)
    yield state
    held = GaugeMetricFamily("hostler_model_device_bytes", "Bytes given to a model.", labels=("model", "device"))
    by_device: dict[tuple[str, str], int] = {}
    for replica in status.replicas:
        for part in replica.parts:
            key = (replica.model, part.device)
            by_device[key] = by_device.get(key, 0) + part.num_bytes
    for key, num_bytes in sorted(by_device.items()):
        held.add_metric(key, num_bytes)
    yield held
    for name, what, read in _REPLICAS:
        family = GaugeMetricFamily(f"hostler_model_{name}", what, labels=("model",))
        sums: dict[str, float] = {}
        for replica in status.replicas:
            sums[replica.model] = sums.get(replica.model, 0) + read(replica)
        for model, value in sorted(sums.items()):
            family.add_metric((model,), value)
        yield family


def _nodes(status: pb.GetStatusResponse) -> Iterator[Metric]:
    for name, what, read in _NODES:
        family = GaugeMetricFamily(f"hostler_node_{name}", what, labels=("node",))
        for node in status.nodes:
            family.add_metric((node.id,), read(node))
        yield family


def _events(status: pb.GetStatusResponse) -> Iterator[Metric]:
    counts = CounterMetricFamily(
        "hostler_events", "What happened to models since the orchestrator started.", labels=("kind", "model")
    )
    took = CounterMetricFamily("hostler_load_seconds", "Spent on loads and wakes that succeeded.", labels=("model",))
    for counted in status.event_counts:
        word = pb.EventKind.Name(counted.kind).removeprefix("EVENT_KIND_").lower()
        counts.add_metric((word, counted.model), counted.count)
        if counted.kind == pb.EVENT_KIND_READY:
            took.add_metric((counted.model,), counted.duration_ms / 1000)
    yield counts
    yield took
