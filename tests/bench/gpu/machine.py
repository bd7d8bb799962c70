"""The machine itself: names and versions, and what its memory, its bus and its matrix units really do.

Above: the steps. Below: torch. Bandwidths are of plain copies, in the same process run as what is judged by them.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from .floor import rate
from .found import Found, Setting, say

if TYPE_CHECKING:
    import torch

_REPEATS = 7


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was told."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: str, times: int = 4) -> float:
    """Return the seconds that `work` takes: the median of several measurements of `times` in a row, after two."""
    samples = []
    for repeat in range(_REPEATS + 1):
        synchronize(device)
        began_s = time.perf_counter()
        for _ in range(times):
            work()
        synchronize(device)
        if repeat:
            samples.append((time.perf_counter() - began_s) / times)
    return statistics.median(samples)


def measure(setting: Setting) -> Found:
    """Tell card, driver and versions, and measure copies on the device, to it and from it, and matrix products."""
    import torch

    found = Found()
    found.add("card", _card(setting))
    driver = f"driver {_driver()}, " if setting.is_cuda else ""
    found.add("software", f"{driver}torch {torch.__version__}, transformers {version('transformers')}")
    for name, measured in (("memory", _memory), ("bus", _bus), ("matrix products", _products)):
        say(f"  {name}")
        measured(setting, torch.device(setting.device), found)
    return found


def _card(setting: Setting) -> str:
    import torch

    if not setting.is_cuda:
        return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    facts = torch.cuda.get_device_properties(setting.device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors"


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        said = pynvml.nvmlSystemGetDriverVersion()
        return said.decode() if isinstance(said, bytes) else str(said)
    except Exception:  # no module, no library: what it is called is a detail
        return "unknown"


def _floats(num_bytes: int, device: torch.device | str, *, pinned: bool = False) -> torch.Tensor:
    import torch

    return torch.zeros(num_bytes // 4, dtype=torch.float32, device=device, pin_memory=pinned)


def _memory(setting: Setting, device: torch.device, found: Found) -> None:
    """The floor's bandwidth is the better of copying (bytes read and written) and reading alone, so the stricter."""
    size = 4 * 2**30 if setting.is_cuda else 2**25
    source, target = _floats(size, device), _floats(size, device)
    copy_s = seconds(lambda: target.copy_(source), setting.device)
    read_s = seconds(source.sum, setting.device)
    found.figures |= {"copy_bytes_per_s": 2 * size / copy_s, "read_bytes_per_s": size / read_s}
    found.figures["memory_bytes_per_s"] = max(2 * size / copy_s, size / read_s)
    found.add("copy on the device, read + written", rate(2 * size, copy_s))
    found.add("sum on the device, read", rate(size, read_s))


def _bus(setting: Setting, device: torch.device, found: Found) -> None:
    size = 2 * 2**30 if setting.is_cuda else 2**25
    host, there = _floats(size, "cpu", pinned=setting.is_cuda), _floats(size, device)
    to_device_s = seconds(lambda: there.copy_(host, non_blocking=True), setting.device, times=2)
    to_host_s = seconds(lambda: host.copy_(there, non_blocking=True), setting.device, times=2)
    found.figures |= {"to_device_bytes_per_s": size / to_device_s, "to_host_bytes_per_s": size / to_host_s}
    found.add("pinned host to device", rate(size, to_device_s))
    found.add("device to pinned host", rate(size, to_host_s))


def _products(setting: Setting, device: torch.device, found: Found) -> None:
    import torch

    side, dtype = (8192, torch.bfloat16) if setting.is_cuda else (256, torch.float32)
    a, b = (torch.randn((side, side), dtype=dtype, device=device) for _ in range(2))
    per_s = 2 * side**3 / seconds(lambda: a @ b, setting.device)
    found.figures["flop_per_s"] = per_s
    found.add(f"{side}×{side} matrix products, {str(dtype).removeprefix('torch.')}", f"{per_s / 1e12:,.2f} TFLOP/s")


def with_bandwidths(setting: Setting) -> dict[str, float]:
    """Return the figures of `measure`, from its step, or measured now where that was not among those chosen."""
    if "memory_bytes_per_s" in setting.figures and "to_device_bytes_per_s" in setting.figures:
        return dict(setting.figures)
    import torch

    found = Found()
    _memory(setting, torch.device(setting.device), found)
    _bus(setting, torch.device(setting.device), found)
    if setting.is_cuda:
        torch.cuda.empty_cache()
    return {**setting.figures, **found.figures}
