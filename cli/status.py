"""What a server says about itself, as plain values and as tables: `hostler ps` and `hostler models`.

Above stands `cli.control`; below, the placement contract's messages. The pure functions here make the JSON that
scripts read; the tables are drawn from that same JSON, so both always agree.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2 as pb

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_STATE_STYLES = {"ready": "green", "failed": "red", "loading": "yellow", "fetching": "yellow", "draining": "magenta"}


def state_name(state: pb.ModelState.ValueType) -> str:
    """Return "ready", "loading", …"""
    return pb.ModelState.Name(state).removeprefix("MODEL_STATE_").lower()


def model_json(route: pb.ModelRoute) -> dict[str, Any]:
    """Return one model as `hostler models --json` shows it."""
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


def _replica_json(status: pb.ReplicaStatus, now_ms: int) -> dict[str, Any]:
    worker = status.worker
    busy = worker.num_running or worker.num_queued
    used_ms = max(status.last_used_unix_ms, status.loaded_unix_ms)
    return {
        "model": status.model,
        "id": status.replica.id,
        "generation": status.replica.generation,
        "state": state_name(status.replica.state),
        "device": status.device,
        "reserved_bytes": status.reserved_bytes,
        "resident_bytes": worker.resident_bytes,
        "kv_used_bytes": worker.kv_used_bytes,
        "kv_reserved_bytes": worker.kv_reserved_bytes,
        "num_running": worker.num_running,
        "num_queued": worker.num_queued,
        "max_running": worker.max_running or status.replica.max_running,
        "num_steps": worker.num_steps,
        "num_prompt_tokens_total": worker.num_prompt_tokens_total,
        "num_completion_tokens_total": worker.num_completion_tokens_total,
        "completion_tokens_per_s": None,
        "idle_s": 0.0 if busy or not used_ms else round(max(0, now_ms - used_ms) / 1000, 1),
        "pid": worker.pid or None,
        "pinned": status.pinned,
        "reason": status.reason,
        "failure": worker.failure or None,
        "loaded_unix_ms": status.loaded_unix_ms,
        "last_used_unix_ms": status.last_used_unix_ms,
    }


def status_json(status: pb.GetStatusResponse, port: int, pid: int | None) -> dict[str, Any]:
    """Return everything as `hostler ps --json` shows it."""
    now_ms = int(time.time() * 1000)
    return {
        "port": port,
        "pid": pid,
        "version": status.version,
        "started_unix_ms": status.started_unix_ms,
        "devices": [
            {
                "id": device.id,
                "kind": pb.DeviceKind.Name(device.kind).removeprefix("DEVICE_KIND_").lower(),
                "name": device.name,
                "budget_bytes": device.budget_bytes,
                "reserved_bytes": device.reserved_bytes,
                "foreign_bytes": device.foreign_bytes,
            }
            for device in status.devices
        ],
        "models": [model_json(route) for route in status.models],
        "replicas": [_replica_json(replica, now_ms) for replica in status.replicas],
    }


def with_rates(now: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float) -> dict[str, Any]:
    """Fill `completion_tokens_per_s` from an earlier sample of the same server. Changes and returns `now`."""
    earlier = {(r["id"], r["generation"]): r["num_completion_tokens_total"] for r in (before or {}).get("replicas", ())}
    for replica in now["replicas"]:
        start = earlier.get((replica["id"], replica["generation"]))
        if start is not None and elapsed_s > 0:
            rate = max(0, replica["num_completion_tokens_total"] - start) / elapsed_s
            replica["completion_tokens_per_s"] = round(rate, 1)
    return now


def size(num_bytes: float | None) -> str:
    """Return bytes for people: 1.5 GiB."""
    if not num_bytes:
        return "0"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit in ("B", "KiB") or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a time span for people: 4 s, 3 min, 2 h 5 min, 3 d."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
    return f"{seconds / 86400:.0f} d"


def _bar(part: int, foreign: int, whole: int, width: int = 24) -> Text:
    from rich.text import Text

    ours = round(width * min(1.0, part / whole)) if whole else 0
    theirs = min(width - ours, round(width * min(1.0, foreign / whole))) if whole else 0
    return Text.assemble(("█" * ours, "cyan"), ("█" * theirs, "bright_black"), ("░" * (width - ours - theirs), "dim"))


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in (*right, "STATE")
        )
    return table


def draw_status(values: dict[str, Any]) -> Group:
    """Return the screen of `hostler ps`."""
    from rich.console import Group
    from rich.text import Text

    uptime = duration(max(0.0, time.time() - values["started_unix_ms"] / 1000)) if values["started_unix_ms"] else "?"
    head = Text(f"hostler {values['version']}  port {values['port']}  pid {values['pid']}  up {uptime}", style="dim")
    devices = _table("DEVICE", "USED", "", "BUDGET", "OTHERS", "NAME", right=("USED", "BUDGET", "OTHERS"))
    for device in values["devices"]:
        bar = _bar(device["reserved_bytes"], device["foreign_bytes"], device["budget_bytes"])
        used, budget = size(device["reserved_bytes"]), size(device["budget_bytes"])
        devices.add_row(device["id"], used, bar, budget, size(device["foreign_bytes"]), device["name"])
    if not values["replicas"]:
        names = ", ".join(model["name"] for model in values["models"]) or "none"
        return Group(head, Text(), devices, Text(), Text(f"Nothing is loaded. Models: {names}"))
    columns = ("MODEL", "STATE", "DEVICE", "MEMORY", "RUN/MAX", "QUEUED", "STEPS", "TOK/S", "IDLE", "PID")
    table = _table(*columns, right=("MEMORY", "RUN/MAX", "QUEUED", "STEPS", "TOK/S", "IDLE", "PID"))
    for r in values["replicas"]:
        busy = r["num_running"] or r["num_queued"]
        table.add_row(
            Text(r["model"] + (" (pinned)" if r["pinned"] else "")),
            Text(r["state"], style=_STATE_STYLES.get(r["state"], "")),
            r["device"],
            size(r["reserved_bytes"] or r["resident_bytes"]),
            f"{r['num_running']}/{r['max_running']}",
            str(r["num_queued"]),
            str(r["num_steps"]),
            "-" if r["completion_tokens_per_s"] is None else f"{r['completion_tokens_per_s']:.0f}",
            "-" if busy else duration(r["idle_s"]),
            str(r["pid"] or "-"),
        )
    # Reasons are sentences: below the table, where they cannot squeeze its columns.
    reasons = [
        Text(f"{r['model']}: {r['failure'] or r['reason']}", style="red" if r["failure"] else "dim")
        for r in values["replicas"]
        if r["failure"] or r["reason"]
    ]
    return Group(head, Text(), devices, Text(), table, *([Text(), *reasons] if reasons else []))


def draw_models(served: list[dict[str, Any]] | None, stored: list[dict[str, Any]]) -> Group:
    """Return the screen of `hostler models`; `served` is None when no server runs."""
    from rich.console import Group, RenderableType
    from rich.text import Text

    parts: list[RenderableType] = []
    if served is not None:
        columns = ("SERVED", "STATE", "ALIASES", "ENGINE", "PARAMETERS", "WEIGHTS", "CONTEXT", "NOTE")
        table = _table(*columns, right=("PARAMETERS", "CONTEXT"))
        for m in served:
            parameters = f"{m['num_parameters'] / 1e6:,.0f} M" if m["num_parameters"] else "-"
            state = Text(m["state"], style=_STATE_STYLES.get(m["state"], ""))
            adapted = Text(f"adapters: {', '.join(m['adapters'])}" if m["adapters"] else "")
            note = Text(m["failure"], style="red") if m["failure"] else adapted
            context = str(m["max_context_tokens"] or "-")
            # The quantization is configured, so known before the first load; the dtype is the worker's choice.
            weights = m["quantize"] or m["dtype"] or "-"
            aliases = ", ".join(m["aliases"]) or "-"
            table.add_row(m["name"], state, aliases, m["engine"] or "-", parameters, weights, context, note)
        parts += [table, Text()]
    if stored:
        table = _table("ON DISK", "SIZE", "SOURCE", "REVISION", right=("SIZE",))
        for m in stored:
            revision = str(m.get("revision") or "-")[:12]
            table.add_row(m["name"], size(m.get("bytes")), str(m.get("source") or "-"), revision)
        parts.append(table)
    else:
        parts.append(Text("Nothing is on disk yet. `hostler pull NAME` fetches a model.", style="dim"))
    return Group(*parts)
