"""How much memory this worker holds, and giving back what it no longer needs. Above: `host.py`. Below: /proc, torch.

On a GPU a worker holds what its allocator has reserved. On a CPU it holds the process's own memory: anonymous pages,
which nobody else has and which the machine gets back when the process ends. Not counted are pages of mapped files:
libraries are shared by all workers, and weights that are only mapped lie in the page cache, which gives way by itself.
So it is neither resident memory, which counts libraries once for each worker, nor a proportional share, which would
change with the number of workers beside this one. The kernel keeps this number; nothing is walked, so a heartbeat may
ask for it. A model split over several CPU devices has a process for each; theirs counts with this one's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes held now.

    Attributes:
        resident: of the process, shared libraries and mapped files included.
        device: on its devices.
        peak_device: the most that a look has seen since `MemoryMeter.begin`; looks come with every heartbeat.
        host: of the process's own, beyond its devices.
    """

    resident: int
    device: int
    peak_device: int
    host: int


class MemoryMeter:
    """Measures one worker."""

    def __init__(self) -> None:
        self._devices: Sequence[str] = ("cpu",)
        self._asleep = False
        self._peak = 0

    def begin(self, devices: Sequence[str]) -> None:
        """Say where the model is brought to; the peak counts anew."""
        self._devices, self._asleep, self._peak = devices, False, 0
        if (cuda := _cuda()) is not None:
            for device in self._gpus:
                cuda.reset_peak_memory_stats(device)

    def fell_asleep(self) -> None:
        """Say that the devices are left: what the process still has, it has in host memory."""
        self._asleep = True

    @property
    def _gpus(self) -> list[str]:
        return [device for device in self._devices if device.startswith("cuda")]

    def look(self) -> MemoryUse:
        """Return what is held now; microseconds."""
        resident, own = _process_bytes()
        if not self._gpus:
            device = 0 if self._asleep else own
            self._peak = max(self._peak, device)
            return MemoryUse(resident, device, self._peak, own - device)
        device = peak = 0
        if (cuda := _cuda()) is not None:
            device = sum(cuda.memory_reserved(gpu) for gpu in self._gpus)
            peak = sum(cuda.max_memory_reserved(gpu) for gpu in self._gpus)
        self._peak = max(self._peak, device, peak)
        return MemoryUse(resident, device, self._peak, own)


_others: set[int] = set()
_shelved_bytes = 0


def shelve(num_bytes: int) -> None:
    """Count shared memory that this process has provided as its own; a negative number: it is given back."""
    global _shelved_bytes
    _shelved_bytes += num_bytes


def count_in(pid: int) -> None:
    """Count another process's memory with this one's, for as long as it lives. May be called from any thread."""
    _others.add(pid)


def leave_out(pid: int) -> None:
    """Count it no more."""
    _others.discard(pid)


def _process_bytes() -> tuple[int, int]:
    """Return resident bytes, and those of them that nobody else has, of this process and those counted in."""
    resident = own = 0
    for name in ("self", *tuple(_others)):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/statm", encoding="ascii") as file:
            pages, shared = map(int, file.read().split()[1:3])
            resident, own = resident + pages, own + pages - shared
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, own * page + _shelved_bytes


def _cuda() -> Any:
    """Return `torch.cuda` if this process has initialised it; asking must not."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def give_back() -> None:
    """Return freed memory to the system and the driver. Blocking: tenths of a second."""
    gc.collect()
    if (cuda := _cuda()) is not None:
        cuda.empty_cache()
    trim()


def trim() -> None:
    """Return to the system what the C library's allocator keeps for later. Blocking: milliseconds."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's; other C libraries give back by themselves
        ctypes.CDLL(None).malloc_trim(0)
