"""What a pull tells while it runs. Above it: the command line. Below it: nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["download", "convert", "verify"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage is; `total_bytes` is 0 while it is not known."""

    stage: Stage
    done_bytes: int
    total_bytes: int
    detail: str = ""


Report = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """Report to nobody."""
