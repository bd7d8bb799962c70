"""What lies between two configurations of one server, in words, and whether it can be had without a restart. Pure.

Above stands `cli.reloading`; below, `hostler.config`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hostler.config import HostlerConfig, ModelConfig

NEEDS_RESTART = frozenset({"host", "port", "models_dir", "ray_address", "devices", "sleep_memory"})
"""What processes take in only when they start, or what other processes find them by."""

PUBLIC_NEEDS_RESTART = frozenset({"enabled", "host", "port", "ngrok", "domain"})
"""The same, of the section `public`."""

PLACEMENT_ONLY = frozenset({"warm_workers", "min_residency", "max_wait", "apart", "step_budget_s"})
"""What no gateway reads."""

KEPT_LOADED = frozenset(
    {"aliases", "preload", "pinned", "keep_alive", "priority", "group", "max_replicas", "max_devices"}
)
"""Of a model, what a worker that has it need not be loaded anew for."""

_READ_BY_GATEWAYS = ("max_running", "max_queued", "max_replicas")
_SECRET = frozenset({"api_key", "mcp_servers"})


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload would do.

    Attributes:
        lines: each change in words, without secrets.
        refused: those that need a restart; with one of them nothing is done.
        gateways: whether gateways must be replaced.
    """

    lines: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    gateways: bool = False


def between(old: HostlerConfig, new: HostlerConfig) -> Changes:
    """Return what a reload from `old` to `new` would do."""
    lines: list[str] = []
    refused: list[str] = []
    gateways = False
    for key in HostlerConfig.model_fields:
        before, after = getattr(old, key), getattr(new, key)
        if before == after:
            continue
        if key == "models":
            model_lines, limits_differ = _models(old.models, new.models)
            lines += model_lines
            gateways = gateways or limits_differ
            continue
        line = f"{key}: changed" if key in _SECRET else f"{key}: {_shown(before)} → {_shown(after)}"
        if key in NEEDS_RESTART or (key == "public" and _opens_elsewhere(old, new)):
            refused.append(line)
        else:
            lines.append(line)
            gateways = gateways or key not in PLACEMENT_ONLY
    return Changes(tuple(lines), tuple(refused), gateways)


def _opens_elsewhere(old: HostlerConfig, new: HostlerConfig) -> bool:
    return any(getattr(old.public, key) != getattr(new.public, key) for key in PUBLIC_NEEDS_RESTART)


def _models(old: Iterable[ModelConfig], new: Iterable[ModelConfig]) -> tuple[list[str], bool]:
    before, after = {m.name: m for m in old}, {m.name: m for m in new}
    lines = [f"model {name}: added" for name in after if name not in before]
    lines += [f"model {name}: removed, once its running requests have ended" for name in before if name not in after]
    for name in before.keys() & after.keys():
        keys = [key for key in ModelConfig.model_fields if getattr(before[name], key) != getattr(after[name], key)]
        if keys:
            anew = "" if KEPT_LOADED.issuperset(keys) else "; it is loaded anew"
            lines.append(f"model {name}: {', '.join(keys)} changed{anew}")
    order = [name for name in before if name in after] != [name for name in after if name in before]
    if order:
        lines.append("models: in another order")

    def limits(models: dict[str, ModelConfig]) -> list[tuple[Any, ...]]:
        return sorted((name, *(getattr(m, key) for key in _READ_BY_GATEWAYS)) for name, m in models.items())

    return lines, limits(before) != limits(after)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
