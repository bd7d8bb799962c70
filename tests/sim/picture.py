"""The results as one SVG: for each trace a line, for each strategy a mark on it, at its reload seconds over LRU's.

Above it: `__main__.py`. Below it: `figures.py`. Drawn by hand, without a library: boxes, lines and words.
"""

from __future__ import annotations

from collections.abc import Sequence

from .figures import BELOW_LRU, Result

LEFT, RIGHT, TOP, ROW, WIDTH = 120, 40, 96, 34, 960
MOST = 2.0
"""What lies beyond is drawn at the edge, with its number."""
MARKS = {  # Shape, colour, radius.
    "at least": ("tick", "#555555", 9.0),
    "clairvoyant": ("ring", "#1b7837", 6.0),
    "hostler": ("dot", "#c2410c", 7.5),
    "LRU, sleeping": ("diamond", "#5b6abf", 6.0),
    "LFU": ("square", "#8a5a00", 5.0),
    "Ollama": ("cross", "#444444", 5.0),
}
SAYS = {"at least": "at least, in order of arrival"}


def picture(results: Sequence[Result]) -> str:
    """Return the drawing."""
    height = TOP + ROW * len(results) + 58
    body = [
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(20, 28, "Seconds of loads and wakes, as a share of LRU’s", size=17, weight="bold"),
        *_legend(),
        *_axis(height),
    ]
    for index, result in enumerate(results):
        y = TOP + ROW * index + ROW / 2
        body.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#e3e3e3"/>')
        body.append(_text(LEFT - 14, y + 5, result.trace, anchor="end", size=14))
        lru_s = result.by_strategy["LRU"].reload_s
        shares = {"at least": result.bound_s / lru_s}
        shares |= {name: f.reload_s / lru_s for name, f in result.by_strategy.items() if name in MARKS}
        for name in sorted(shares, key=lambda name: name == "hostler"):
            body.append(_mark(name, _x(shares[name]), y))
            if shares[name] > MOST:
                body.append(_text(_x(MOST) - 10, y - 5, f"{shares[name]:.1f} →", anchor="end", size=11))
    style = "font-family: system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" style="{style}">'
    title = "<title>Reload seconds of each strategy on each trace, over LRU’s</title>"
    return "\n".join([head, title, *body, "</svg>", ""])


def _x(share: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * min(share, MOST) / MOST, 1)


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, weight: str = "normal") -> str:
    kind = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="#1f1f1f"'
    return f'<text x="{x}" y="{y}" {kind}>{words}</text>'


def _axis(height: int) -> list[str]:
    bottom = height - 50
    drawn = []
    for tenths in range(0, int(MOST * 10) + 1, 2):
        x = _x(tenths / 10)
        strong = tenths == 10
        colour, width = ("#1f1f1f", 1.5) if strong else ("#eeeeee", 1.0)
        drawn.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="{colour}" stroke-width="{width}"/>')
        label = "LRU" if strong else f"{tenths / 10:g}"
        drawn.append(_text(x, bottom + 20, label, anchor="middle", size=12, weight="bold" if strong else "normal"))
    x = _x(BELOW_LRU)
    drawn.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="#c2410c" stroke-dasharray="4 4"/>')
    drawn.append(_text(x, bottom + 20, f"{BELOW_LRU:g}", anchor="middle", size=12))
    drawn.append(_text(WIDTH - RIGHT, bottom + 40, "less is better", anchor="end", size=12))
    return drawn


def _legend() -> list[str]:
    drawn, x = [], 26.0
    for name in MARKS:
        words = SAYS.get(name, name)
        drawn += [_mark(name, x, 58), _text(x + 14, 63, words)]
        x += 44 + 7.2 * len(words)
    return drawn


def _mark(name: str, x: float, y: float) -> str:
    shape, colour, r = MARKS[name]
    if shape == "tick":
        return f'<line x1="{x}" y1="{y - r}" x2="{x}" y2="{y + r}" stroke="{colour}" stroke-width="3"/>'
    if shape == "ring":
        return f'<circle cx="{x}" cy="{y}" r="{r}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    if shape == "dot":
        return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{colour}" stroke="#ffffff" stroke-width="1.5"/>'
    if shape == "diamond":
        return f'<path d="M{x} {y - r} L{x + r} {y} L{x} {y + r} L{x - r} {y} Z" fill="{colour}"/>'
    if shape == "square":
        return f'<rect x="{x - r}" y="{y - r}" width="{2 * r}" height="{2 * r}" fill="{colour}"/>'
    lines = f"M{x - r} {y - r} L{x + r} {y + r} M{x - r} {y + r} L{x + r} {y - r}"
    return f'<path d="{lines}" stroke="{colour}" stroke-width="2.5" fill="none"/>'
