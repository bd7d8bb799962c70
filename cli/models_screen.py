"""The screen of `hostler models`: what the server serves and what is on disk. Pure: JSON in, rich out.

Above stands `cli.control`; below, the JSON of `hostler.placement_json` and of the model store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hostler.words import size

from cli.ps_screen import STATE_STYLES

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in (*right, "STATE")
        )
    return table


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
            state = Text(m["state"], style=STATE_STYLES.get(m["state"], ""))
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
