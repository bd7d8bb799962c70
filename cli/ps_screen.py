"""The screen of `hostler ps`: each device's memory as a bar, each model's replica as a row. Pure: JSON in, rich out.

Above stands `cli.seeing`; below, the JSON of `hostler.placement_json`. With colours a model has one, its KV cache in a
lighter shade; without (in a pipe) it has a letter, small for its KV cache, so that nothing is told by colour alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hostler.words import duration, size

from cli import restarts

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.text import Text

STATE_STYLES = {
    "ready": "green",
    "asleep": "blue",
    "failed": "red",
    "loading": "yellow",
    "fetching": "yellow",
    "draining": "magenta",
}
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_BAR_CELLS = 100
# From here on reasons have a column; below they stand under the table, where they squeeze nothing.
_WIDE_COLUMNS = 120
_KV_COLUMNS = 96
# More devices of a node than this have a line each.
_FEW_DEVICES = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a device's memory. `kind`: "weights", "kv", "set aside", "others", "free" or "outside"."""

    kind: str
    num_bytes: int
    model: str = ""


def segments(device: Mapping[str, Any], replicas: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Return what a device's memory holds, in the order of the bar; together its whole memory, or its budget."""
    found = []
    known_bytes = 0
    for replica in replicas:
        for part in replica["parts"]:
            if part["device"] != device["id"] or not part["num_bytes"]:
                continue
            held = part["num_bytes"]
            known_bytes += held
            share = held / (sum(p["num_bytes"] for p in replica["parts"]) or 1)
            kv_bytes = min(held, round(replica["kv_reserved_bytes"] * share))
            found += [Segment("weights", held - kv_bytes, replica["model"]), Segment("kv", kv_bytes, replica["model"])]
    ours = max(device["reserved_bytes"], known_bytes)
    foreign = device["foreign_bytes"]
    free = max(0, device["budget_bytes"] - ours)
    outside = 0
    if device["total_bytes"]:
        free = min(free, max(0, device["total_bytes"] - ours - foreign))
        outside = max(0, device["total_bytes"] - ours - foreign - free)
    found += [Segment("set aside", ours - known_bytes), Segment("others", foreign)]
    found += [Segment("free", free), Segment("outside", outside)]
    return [segment for segment in found if segment.num_bytes > 0]


def cells(amounts: Sequence[int], width: int) -> list[int]:
    """Share `width` cells out in proportion, by largest remainder; whatever is not zero gets one if it can."""
    whole = sum(amounts)
    if not whole:
        return [0] * len(amounts)
    exact = [amount * width / whole for amount in amounts]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: width - sum(shares)]:
        shares[index] += 1
    for index, amount in enumerate(amounts):
        largest = max(range(len(shares)), key=shares.__getitem__)
        if amount and not shares[index] and shares[largest] > 1:
            shares[largest] -= 1
            shares[index] = 1
    return shares


class _Legend:
    """A mark for each model, the same on every device."""

    def __init__(self, models: Sequence[str], plain: bool) -> None:
        self._numbers = {model: number for number, model in enumerate(dict.fromkeys(models))}
        self._plain = plain

    def _mark(self, segment: Segment) -> tuple[str, str]:
        if segment.model:
            number = self._numbers[segment.model]
            if self._plain:
                letter = _LETTERS[number % len(_LETTERS)]
                return (letter if segment.kind == "weights" else letter.lower()), ""
            return ("█" if segment.kind == "weights" else "▓"), _COLOURS[number % len(_COLOURS)]
        plain = {"set aside": "+", "others": "#", "free": ".", "outside": " "}
        drawn = {"set aside": "▚", "others": "▒", "free": "░", "outside": " "}
        styles = {"set aside": "white", "others": "bright_black", "free": "dim"}
        return (plain if self._plain else drawn)[segment.kind], "" if self._plain else styles.get(segment.kind, "")

    def bar(self, parts: Sequence[Segment], width: int) -> Text:
        """Return the bar of one device."""
        from rich.text import Text

        bar = Text("[") if self._plain else Text()
        for segment, num_cells in zip(parts, cells([s.num_bytes for s in parts], width), strict=True):
            mark, style = self._mark(segment)
            bar.append(mark * num_cells, style)
        return bar.append("]") if self._plain else bar

    def words(self, parts: Sequence[Segment], width: int) -> Text:
        """Return what the bar's stretches are: models (and how much of each is KV cache), then the rest."""
        from rich.text import Text

        items = []
        models = dict.fromkeys(segment.model for segment in parts if segment.model)
        for model in models:
            of_model = [s for s in parts if s.model == model]
            kv_bytes = sum(s.num_bytes for s in of_model if s.kind == "kv")
            mark, style = self._mark(Segment("weights", 1, model))
            amount = size(sum(s.num_bytes for s in of_model)) + (f" ({size(kv_bytes)} KV)" if kv_bytes else "")
            items.append(Text.assemble((mark, style), f" {model} {amount}"))
        names = {"set aside": "coming", "others": "other programs", "free": "free"}
        for segment in parts:
            if segment.kind in names:
                mark, style = self._mark(segment)
                items.append(Text.assemble((mark, style), f" {names[segment.kind]} {size(segment.num_bytes)}"))
        words = Text()
        column = 0
        for item in items:
            if column and column + 2 + item.cell_len > width:
                words.append("\n")
                column = 0
            elif column:
                words.append("  ")
                column += 2
            words.append_text(item)
            column += item.cell_len
        return words


def draw_status(values: dict[str, Any], width: int, *, plain: bool) -> Group:
    """Return the whole screen for `width` columns; `plain` without colours and blocks."""
    from rich.console import Group
    from rich.text import Text

    uptime = duration(max(0.0, time.time() - values["started_unix_ms"] / 1000)) if values["started_unix_ms"] else "?"
    head = Text(f"hostler {values['version']}  port {values['port']}  pid {values['pid']}  up {uptime}", style="dim")
    parts: list[RenderableType] = [head]
    parts += [Text(restarts.in_words(entry), style="yellow") for entry in values.get("restarts", ())]
    legend = _Legend([replica["model"] for replica in values["replicas"]], plain)
    nodes = {node["id"]: node for node in values["nodes"]}
    several = len(nodes) > 1
    for node_id in dict.fromkeys([*nodes, *(device["node"] for device in values["devices"])]):
        if several:
            parts += [Text(), Text(f"node {node_id or '(this one)'}", style="bold underline")]
        here = [device for device in values["devices"] if device["node"] == node_id]
        replicas = [replica for replica in values["replicas"] if replica["node"] == node_id]
        if len(here) > _FEW_DEVICES:
            parts += [Text(), *_draw_devices(here, replicas, legend, width)]
        else:
            parts += [part for device in here for part in (Text(), *_draw_device(device, replicas, legend, width))]
        if node_id in nodes:
            parts += _draw_node(nodes[node_id])
    return Group(*parts, Text(), *_draw_models(values, width, several))


def _draw_device(
    device: Mapping[str, Any], replicas: Sequence[Mapping[str, Any]], legend: _Legend, width: int
) -> list[RenderableType]:
    from rich.text import Text

    used = f"{size(device['reserved_bytes'])} of {size(device['budget_bytes'])}"
    of_total = f", {size(device['total_bytes'])} in all" if device["total_bytes"] else ""
    title = Text.assemble(
        (device["id"], "bold"), f"  {device['name']}" if device["name"] else "", f"  {used}{of_total}"
    )
    held = segments(device, replicas)
    bar_cells = min(width, MAX_BAR_CELLS) - 2
    return [title, legend.bar(held, bar_cells), legend.words(held, width)]


def _draw_devices(
    devices: Sequence[Mapping[str, Any]], replicas: Sequence[Mapping[str, Any]], legend: _Legend, width: int
) -> list[RenderableType]:
    """Draw many devices: a line for each, and the words once for all."""
    from rich.table import Table

    held = {device["id"]: segments(device, replicas) for device in devices}
    used = {d["id"]: f"{size(d['reserved_bytes'])} of {size(d['budget_bytes'])}" for d in devices}
    bar_cells = min(width, MAX_BAR_CELLS) - max(map(len, held)) - max(map(len, used.values())) - 6
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, parts in held.items():
        table.add_row(name, legend.bar(parts, max(8, bar_cells)), used[name])
    whole: dict[tuple[str, str], int] = {}
    for segment in (segment for parts in held.values() for segment in parts):
        key = segment.kind, segment.model
        whole[key] = whole.get(key, 0) + segment.num_bytes
    return [table, legend.words([Segment(kind, num_bytes, model) for (kind, model), num_bytes in whole.items()], width)]


def _draw_node(node: Mapping[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    facts = []
    if node["sleep_budget_bytes"]:
        facts.append(f"asleep: {size(node['sleep_used_bytes'])} of {size(node['sleep_budget_bytes'])} host memory")
    if node["num_blank_workers"]:
        workers = "worker stands" if node["num_blank_workers"] == 1 else "workers stand"
        facts.append(f"{node['num_blank_workers']} blank {workers} ready")
    return [Text(), Text("  ·  ".join(facts), style="dim")] if facts else []


def _draw_models(values: dict[str, Any], width: int, several_nodes: bool) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    rows = [*values["replicas"]]
    shown = {row["model"] for row in rows}
    coming = [m for m in values["models"] if m["name"] not in shown and m["state"] in ("fetching", "loading")]
    failed = [m for m in values["models"] if m["name"] not in shown and m["state"] == "failed"]
    named = shown | {m["name"] for m in coming} | {m["name"] for m in failed}
    rest = [m["name"] for m in values["models"] if m["name"] not in named]
    parts: list[RenderableType] = []
    if rows or coming:
        wide, with_kv = width >= _WIDE_COLUMNS, width >= _KV_COLUMNS
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("MODEL", overflow="fold")
        for name in ("STATE", "ON"):
            table.add_column(name, no_wrap=True)
        for name in ("MEMORY", *(("KV CACHE",) if with_kv else ()), "RUNNING", "TOK/S", "IDLE"):
            table.add_column(name, justify="right", no_wrap=True)
        if wide:
            table.add_column("WHY", overflow="fold", style="dim")
        for row in rows:
            table.add_row(*_row(row, with_kv, several_nodes), *([_why(row)] if wide else []))
        for model in coming:
            table.add_row(model["name"], Text(model["state"], STATE_STYLES[model["state"]]))
        parts.append(table)
        if not wide and (reasons := [row for row in rows if _why(row).plain]):
            parts += [Text(), *(Text.assemble((f"{row['model']}: ", "dim"), _why(row)) for row in reasons)]
    if parts and (failed or rest):
        parts.append(Text())
    for model in failed:
        parts.append(Text.assemble((f"{model['name']} failed: ", "red"), model["failure"] or "no reason given"))
    if rest:
        parts.append(Text(f"{'Not loaded' if parts else 'Nothing is loaded. Models'}: {', '.join(rest)}", style="dim"))
    elif not parts:
        parts.append(Text("No models are configured. `hostler serve MODEL` serves one.", style="dim"))
    return parts


def _row(row: Mapping[str, Any], with_kv: bool, several_nodes: bool) -> list[str | Text]:
    from rich.text import Text

    devices = [part["device"] for part in row["parts"]]
    on = ", ".join(devices) if len(devices) < 3 else f"{devices[0]} +{len(devices) - 1}"
    on = on or "host"
    if several_nodes and row["node"]:
        on = f"{row['node']} {on}"
    held = row["reserved_bytes"] or row["host_bytes"] or row["resident_bytes"]
    busy = row["num_running"] or row["num_queued"]
    queued = f" +{row['num_queued']}" if row["num_queued"] else ""
    kv_cache = f"{size(row['kv_used_bytes'])} / {size(row['kv_reserved_bytes'])}" if row["kv_reserved_bytes"] else "-"
    running = f"{row['num_running']}/{row['max_running']}{queued}" if row["state"] != "asleep" else "-"
    return [
        Text(row["model"] + (" (pinned)" if row["pinned"] else "")),
        Text(row["state"], style=STATE_STYLES.get(row["state"], "")),
        on,
        size(held),
        *([kv_cache] if with_kv else []),
        running,
        f"{row['completion_tokens_per_s']:.0f}" if row["completion_tokens_per_s"] else "-",
        "-" if busy or row["state"] not in ("ready", "asleep") else duration(row["idle_s"]),
    ]


def _why(row: Mapping[str, Any]) -> Text:
    from rich.text import Text

    return Text(row["failure"], style="red") if row["failure"] else Text(row["reason"], style="dim")
