"""How much host memory there is to have: what the machine has free, within the limits of our control groups.

Above: `devices.py`. Below: psutil, /proc and the cgroup file systems (kernel documentation: admin-guide/cgroup-v2.rst,
"Memory", and cgroup-v1/memory.rst). A container's limit or a systemd unit's MemoryMax and MemoryHigh are such limits;
what is over them is killed or slowed, however much the machine has free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")
# Clean pages of files that nobody has touched lately: the group gives them back when it needs room.
_RECLAIMABLE = ("inactive_file", "total_inactive_file")


def available_bytes(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return how many bytes our processes can still take here."""
    free = int(psutil.virtual_memory().available)
    for group in _groups_of_ours(groups, membership):
        limits = [limit for name in _LIMITS if (limit := _number(group / name)) is not None]
        used = next((used for name in _USED if (used := _number(group / name)) is not None), None)
        if limits and used is not None:
            free = min(free, max(0, min(limits) - used + _reclaimable(group)))
    return free


def _groups_of_ours(groups: Path, membership: Path) -> Iterator[Path]:
    """Yield our memory group and all that it lies in. In a container its own group is the root that it sees."""
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root = groups
        elif "memory" in controllers.split(","):
            root = groups / "memory"
        else:
            continue
        group = root / path.lstrip("/")
        while True:
            yield group
            if group == root or root not in group.parents:
                break
            group = group.parent


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _reclaimable(group: Path) -> int:
    try:
        words = (line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        stat = {name: int(value) for name, value in words}
    except (OSError, ValueError):
        return 0
    # The first generation's plain name counts the group alone, its "total_" what lies in it, too.
    return max(stat.get(name, 0) for name in _RECLAIMABLE)
