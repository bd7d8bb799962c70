"""What a worker and the processes that it starts agree on.

Above: `text/parallel`, `text/proving.py`. Below: the system.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from workers.engine import LoadSpec

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit if its process has already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def fields_of(spec: LoadSpec) -> dict[str, Any]:
    """Return what `spec_of` makes a `LoadSpec` of again, as JSON can hold it; adapters do not travel."""
    return {**asdict(spec), "adapters": ()}


def spec_of(fields: dict[str, Any]) -> LoadSpec:
    """Return the `LoadSpec` of `fields_of`."""
    return LoadSpec(**{**fields, "devices": tuple(fields["devices"]), "adapters": ()})
