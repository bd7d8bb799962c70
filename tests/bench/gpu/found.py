"""What steps are given, what they find, and how both pass between processes: plain data, written as JSON.

Above: the steps, the table. Below: nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_BEGAN_S = time.monotonic()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table.

    Attributes:
        share: of the floor, of a bandwidth, or how many times the peer.
        goal: what `share` was to reach, in words; `is_met` None where there is none.
    """

    what: str
    value: str
    share: str = ""
    goal: str = ""
    is_met: bool | None = None


@dataclass(slots=True)
class Found:
    """What one step found. `figures` are numbers by name, for the JSON file and for later steps."""

    lines: list[Line] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add(self, what: str, value: str, share: float | None = None, goal: float | None = None, as_: str = "%") -> None:
        """Add a line; with a share and a goal it says whether the goal was reached. `as_` "×" shows multiples."""

        def shown(number: float) -> str:
            return f"{number:.2f}×" if as_ == "×" else f"{number:.0%}"

        self.lines.append(
            Line(
                what,
                value,
                "" if share is None else shown(share),
                "" if goal is None else f"≥ {shown(goal)}",
                None if share is None or goal is None else share >= goal,
            )
        )


class Failed(Exception):
    """A step ran and what it checked is not so; the message says what."""


class NotRun(Exception):
    """A step cannot run here; the message says why. The rest of the run does not suffer from it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What every step of a run is given.

    Attributes:
        device: as torch calls it.
        small: sizes for a test of the benchmark itself.
        layers: of the measured model; 0 for all.
        folder: where models are built.
        figures: what earlier steps found.
    """

    device: str
    small: bool
    layers: int
    folder: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.startswith("cuda")

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON holds."""
        return {**asdict(self), "figures": dict(self.figures)}


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the run.

    Attributes:
        needs: modules and packages beyond the engine's own.
        within_s: it is ended when it takes longer.
    """

    name: str
    run: Callable[[Setting], Found]
    within_s: float
    needs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended: "passed", "failed" or "not run"; why, in the latter two."""

    step: str
    status: str
    why: str = ""
    seconds: float = 0.0
    found: Found = field(default_factory=Found)


def found_from(document: Mapping[str, Any]) -> Found:
    """Return what `asdict` made of a `Found`."""
    return Found(
        [Line(**line) for line in document["lines"]], dict(document["figures"]), list(document.get("notices", ()))
    )


def say(text: str) -> None:
    """Print a line of progress, with the seconds since this process began."""
    print(f"  {time.monotonic() - _BEGAN_S:5.0f} s  {text}", flush=True)
