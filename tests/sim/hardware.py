"""What it takes to bring a model up or down, in seconds; and the page cache that some of it comes from.

Above it: the world, the bound. Below it: nothing. The same for every strategy.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bandwidths in bytes a second, fixed parts in seconds: a workstation with one NVMe disk and PCIe 4."""

    disk_bytes_per_s: float = 2.5e9
    cached_bytes_per_s: float = 8e9
    wake_bytes_per_s: float = 20e9
    load_fixed_s: float = 1.5
    wake_fixed_s: float = 0.2
    sleep_fixed_s: float = 0.1
    evict_s: float = 0.5

    def load_s(self, num_bytes: int, *, cached: bool) -> float:
        """Return the seconds from a blank worker to ready."""
        return self.load_fixed_s + num_bytes / (self.cached_bytes_per_s if cached else self.disk_bytes_per_s)

    def wake_s(self, num_bytes: int) -> float:
        """Return the seconds from asleep in host memory to ready."""
        return self.wake_fixed_s + num_bytes / self.wake_bytes_per_s

    def hand_over_s(self, num_bytes: int) -> float:
        """Return the seconds from a blank worker to ready with what a sleeper on another device held."""
        return self.load_s(num_bytes, cached=True)

    def sleep_s(self, num_bytes: int) -> float:
        """Return the seconds until the device is free of one that goes to sleep."""
        return self.sleep_fixed_s + num_bytes / self.wake_bytes_per_s


class PageCache:
    """Files that were read last, as far as host memory reaches: least recently read go first, as a kernel does it."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, num_bytes: int) -> bool:
        """Read a file; return whether it was there already."""
        there = name in self._files
        self._files[name] = num_bytes
        self._files.move_to_end(name)
        while self._files and sum(self._files.values()) > self._num_bytes:
            self._files.popitem(last=False)
        return there
