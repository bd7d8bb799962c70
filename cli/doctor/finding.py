"""One line of the doctor's report. Above: the checks and `machine`; below: nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "bad", "note"]
MARKS: dict[State, str] = {"ok": "✓", "bad": "✗", "note": "·"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        state: fine; something to mend; or something to know, which stops nothing.
        detail: what there is.
        advice: what to do about it.
    """

    name: str
    state: State
    detail: str
    advice: str = ""


def ok(name: str, detail: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(name, "ok", detail)


def bad(name: str, detail: str, advice: str) -> Finding:
    """Return a finding that something must be mended."""
    return Finding(name, "bad", detail, advice)


def note(name: str, detail: str, advice: str = "") -> Finding:
    """Return a finding that is worth knowing."""
    return Finding(name, "note", detail, advice)
