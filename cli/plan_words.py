"""`hostler plan` for people: what would happen, line by line. Pure. Above: `cli.seeing`; below: the plan's JSON."""

from __future__ import annotations

from typing import Any

from hostler.words import duration, size


def verdict(plan: dict[str, Any]) -> str:
    """Return the first line."""
    model = plan["model"]
    if not plan["feasible"]:
        return f"{model} cannot be brought up now"
    gives_way = plan["sleep_models"] or plan["evict_models"] or plan["shrink_models"]
    where = ", ".join(part["device"] for part in plan["parts"])
    verb = "would be woken" if plan["wakes"] else "would go"
    to = f" {'on' if plan['wakes'] else 'to'} {where}" if where else ""
    return f"{model} {verb}{to}" + (", after others have given way" if gives_way else "")


def lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) for everything else that there is to say."""
    found = []
    if plan["needed_bytes"]:
        extras = []
        if plan["quantize"]:
            extras.append(f"with {plan['quantize']} weights")
        if plan["kv_cache_bytes"]:
            extras.append(f"{size(plan['kv_cache_bytes'])} of it KV cache")
        found.append(("needs", size(plan["needed_bytes"]) + (f" ({', '.join(extras)})" if extras else "")))
    if len(plan["parts"]) > 1:
        found.append(("split over", ", ".join(f"{p['device']} {size(p['num_bytes'])}" for p in plan["parts"])))
    for label, key in (("shrinks", "shrink_models"), ("puts to sleep", "sleep_models"), ("unloads", "evict_models")):
        if plan[key]:
            what = "the KV cache of " if key == "shrink_models" else ""
            found.append((label, what + ", ".join(plan[key])))
    if plan["expected_ms"]:
        found.append(("ready in", f"about {duration(plan['expected_ms'] / 1000)}"))
    if plan["lacking_bytes"]:
        found.append(("lacks", size(plan["lacking_bytes"])))
    if plan["reason"]:
        found.append(("why", plan["reason"]))
    found += [("would help", advice) for advice in plan["advice"]]
    return found
