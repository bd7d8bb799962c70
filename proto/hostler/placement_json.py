"""The placement contract's messages as plain values: what `hostler ps --json` and `GET /admin/status` both answer.

Pure; used by the rooms that show them. Names and units are the contract's; what is not known or does not apply is
None, enums are their names in small letters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2 as pb


def state_name(state: pb.ModelState.ValueType) -> str:
    """Return "ready", "asleep", …"""
    return pb.ModelState.Name(state).removeprefix("MODEL_STATE_").lower()


def event_kind(kind: pb.EventKind.ValueType) -> str:
    """Return "evicted", "device_lost", …; one of a newer orchestrator by its number."""
    try:
        return pb.EventKind.Name(kind).removeprefix("EVENT_KIND_").lower()
    except ValueError:
        return str(int(kind))


def model_json(route: pb.ModelRoute) -> dict[str, Any]:
    """Return one model."""
    engine = lifecycle_pb2.EngineKind.Name(route.engine).removeprefix("ENGINE_KIND_").lower()
    return {
        "name": route.name,
        "aliases": list(route.aliases),
        "adapters": list(route.adapters),
        "state": state_name(route.state),
        "engine": None if engine == "unspecified" else engine,
        "num_replicas": len(route.replicas),
        "architecture": route.info.architecture or None,
        "dtype": route.info.dtype or None,
        "quantize": route.quantize or None,
        "num_parameters": route.info.num_parameters or None,
        "weight_bytes": route.info.weight_bytes or None,
        "max_context_tokens": route.info.max_context_tokens or None,
        "failure": route.failure or None,
    }


def _parts_json(parts: Iterable[pb.DeviceBytes]) -> list[dict[str, Any]]:
    return [{"device": part.device, "num_bytes": part.num_bytes} for part in parts]


def replica_json(status: pb.ReplicaStatus, now_unix_ms: int) -> dict[str, Any]:
    """Return one replica; `parts` is what it holds on each device, nothing while it sleeps."""
    worker = status.worker
    busy = worker.num_running or worker.num_queued
    used_ms = max(status.last_used_unix_ms, status.loaded_unix_ms)
    return {
        "model": status.model,
        "id": status.replica.id,
        "generation": status.replica.generation,
        "state": state_name(status.replica.state),
        "node": status.node or None,
        "parts": _parts_json(status.parts),
        "reserved_bytes": status.reserved_bytes,
        "device_bytes": worker.device_bytes,
        "peak_device_bytes": worker.peak_device_bytes,
        "resident_bytes": worker.resident_bytes,
        "host_bytes": worker.host_bytes,
        "kv_used_bytes": worker.kv_used_bytes,
        "kv_allocated_bytes": worker.kv_allocated_bytes,
        "kv_reserved_bytes": worker.kv_reserved_bytes,
        "num_running": worker.num_running,
        "num_queued": worker.num_queued,
        "max_running": worker.max_running or status.replica.max_running,
        "num_steps": worker.num_steps,
        "num_prompt_tokens_total": worker.num_prompt_tokens_total,
        "num_completion_tokens_total": worker.num_completion_tokens_total,
        "completion_tokens_per_s": round(status.completion_tokens_per_s, 1),
        "idle_s": 0.0 if busy or not used_ms else round(max(0, now_unix_ms - used_ms) / 1000, 1),
        "keep_alive_ms": worker.keep_alive_ms if worker.HasField("keep_alive_ms") else None,
        "pid": worker.pid or None,
        "pinned": status.pinned,
        "reason": status.reason,
        "failure": worker.failure or None,
        "loaded_unix_ms": status.loaded_unix_ms,
        "last_used_unix_ms": status.last_used_unix_ms,
    }


def status_json(status: pb.GetStatusResponse, now_unix_ms: int) -> dict[str, Any]:
    """Return devices, models, replicas and nodes."""
    return {
        "version": status.version,
        "started_unix_ms": status.started_unix_ms,
        "devices": [
            {
                "id": device.id,
                "kind": pb.DeviceKind.Name(device.kind).removeprefix("DEVICE_KIND_").lower(),
                "name": device.name,
                "node": device.node or None,
                "budget_bytes": device.budget_bytes,
                "reserved_bytes": device.reserved_bytes,
                "foreign_bytes": device.foreign_bytes,
                "total_bytes": device.total_bytes or None,
            }
            for device in status.devices
        ],
        "models": [model_json(route) for route in status.models],
        "replicas": [replica_json(replica, now_unix_ms) for replica in status.replicas],
        "nodes": [
            {
                "id": node.id or None,
                "sleep_budget_bytes": node.sleep_budget_bytes,
                "sleep_used_bytes": node.sleep_used_bytes,
                "num_blank_workers": node.num_blank_workers,
            }
            for node in status.nodes
        ],
    }


def plan_json(model: str, plan: pb.PlanModelResponse) -> dict[str, Any]:
    """Return what a load would do."""
    return {
        "model": model,
        "feasible": plan.feasible,
        "parts": _parts_json(plan.parts),
        "wakes": plan.wakes,
        "needed_bytes": plan.needed_bytes,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "quantize": plan.quantize or None,
        "shrink_models": list(plan.shrink_models),
        "sleep_models": list(plan.sleep_models),
        "evict_models": list(plan.evict_models),
        "expected_ms": plan.expected_ms or None,
        "reason": plan.reason,
        "lacking_bytes": plan.lacking_bytes or None,
        "advice": list(plan.advice),
    }


def progress_json(progress: pb.EnsureProgress) -> dict[str, Any]:
    """Return how far a load is."""
    return {
        "state": state_name(progress.state),
        "stage": progress.stage,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes or None,
        "detail": progress.detail or None,
        "num_ahead": progress.num_ahead,
        "eta_ms": progress.eta_ms or None,
    }


def event_json(event: pb.WatchEventsResponse) -> dict[str, Any]:
    """Return one event."""
    return {
        "number": event.number,
        "unix_ms": event.unix_ms,
        "kind": event_kind(event.kind),
        "model": event.model or None,
        "device": event.device or None,
        "replica": event.replica or None,
        "num_bytes": event.num_bytes or None,
        "duration_ms": event.duration_ms or None,
        "why": event.why,
    }
