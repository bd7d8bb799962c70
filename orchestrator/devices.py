"""Devices: what a machine has, what we may use of it, and how a worker is pinned to some of it.

Above it: `__main__`, the effects, and `node_agent.py` on other machines. Below it: NVML, psutil and `host_memory`.
Without an NVIDIA driver the CPU is the one device, with a byte budget, so that placement works the same everywhere.
Configured devices replace the discovered ones of their machine and may be virtual: several budgets on one CPU.

A device of another machine has that machine's name before its own, with a slash: `box2/cuda:0`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
from hostler.config import DeviceConfig

from orchestrator import host_memory

log = logging.getLogger(__name__)

CPU_SHARE = 0.8
CUDA_SHARE = 0.95
SLEEP_SHARE_BESIDE_GPUS = 0.95
SLEEP_SHARE_BESIDE_CPU = 0.1
MIN_CPU_BUDGET_BYTES = 2**30
HOST_RESERVE_BYTES = 2**30
HOST_RESERVE_SHARE = 0.02
"""Host memory that stays free beside sleeping models: so much, and so much of all that the machine has."""


@dataclass(frozen=True, slots=True)
class Device:
    """One place for models.

    Attributes:
        id: "cuda:0", "cpu" or a configured name; on another machine with its name before it.
        kind: "cpu" or "cuda".
        total_bytes: physical memory of a GPU; 0 where the budget alone counts.
        budget_bytes: the most that hostler reserves on it.
        auto_budget: the budget was taken from what was free at start.
        uuid: NVML's name of the GPU, empty when unknown.
        node: the machine it is in; empty for this one.
        num_cores: physical cores that a worker there may use; 0: as many as here.
    """

    id: str
    kind: str
    name: str
    total_bytes: int
    budget_bytes: int
    auto_budget: bool = False
    uuid: str = ""
    node: str = ""
    num_cores: int = 0

    @property
    def local_id(self) -> str:
        """Its name within its own machine."""
        return self.id.rpartition("/")[2]


@contextlib.contextmanager
def _nvml() -> Iterator[Any | None]:
    """Yield NVML, or None on a machine without it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # Missing module, missing library, driver mismatch: all mean that there is no GPU to use.
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _gpus() -> list[Device]:
    with _nvml() as nvml:
        if nvml is None:
            return []
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
                total = _total_bytes(nvml, handle)
            except nvml.NVMLError as error:
                log.warning("GPU left out", extra={"device": f"cuda:{index}", "reason": str(error)})
                continue
            if _is_visible(index, uuid, os.environ.get("CUDA_VISIBLE_DEVICES")):
                budget = int(total * CUDA_SHARE)
                found.append(Device(f"cuda:{index}", "cuda", name, total, budget, auto_budget=True, uuid=uuid))
        return found


def _total_bytes(nvml: Any, handle: Any) -> int:
    """Return a GPU's memory; one that shares the host's (GB10, Jetson) has none that NVML could tell of."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError_NotSupported:
        return int(psutil.virtual_memory().total)


def _is_visible(index: int, uuid: str, chosen: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES, as the server was started with it, leaves a GPU to us."""
    if chosen is None:
        return True
    for each in (part.strip() for part in chosen.split(",")):
        if each == str(index) or (each.startswith("GPU-") and uuid.startswith(each)):
            return True
        if not each.isdigit() and not each.startswith("GPU-"):
            return False  # as CUDA: what follows a name that means nothing is not seen
    return False


def _cpu(device_id: str = "cpu") -> Device:
    budget = max(MIN_CPU_BUDGET_BYTES, int(host_memory.available_bytes() * CPU_SHARE))
    return Device(device_id, "cpu", f"CPU, {num_physical_cores()} cores", 0, budget, auto_budget=True)


def _configured(config: DeviceConfig, gpus: dict[str, Device]) -> Device:
    real = gpus.get(config.id)
    if config.kind == "cuda" or real is not None:
        name, total = (real.name, real.total_bytes) if real else (config.id, 0)
        budget = config.budget or (real.budget_bytes if real else 0)
        return Device(config.id, "cuda", name, total, budget, not config.budget, real.uuid if real else "")
    if config.budget:
        return Device(config.id, "cpu", f"CPU, {num_physical_cores()} cores", 0, config.budget)
    return _cpu(config.id)


def discover(configured: Sequence[DeviceConfig] = ()) -> tuple[Device, ...]:
    """Return this machine's configured devices, else its GPUs, else its CPU."""
    gpus = _gpus()
    if configured:
        by_id = {gpu.id: gpu for gpu in gpus}
        return tuple(_configured(config, by_id) for config in configured)
    return tuple(gpus) or (_cpu(),)


def sleep_budget_bytes(configured: int | None, found: Sequence[Device]) -> int:
    """Return how much host memory sleeping models may hold on this machine.

    Asleep, a GPU's model keeps its weights in host memory; a CPU's keeps little more than its process, and the budget
    of the CPU device takes most of the memory already.
    """
    if configured is not None:
        return configured
    share = SLEEP_SHARE_BESIDE_GPUS if any(d.kind == "cuda" for d in found) else SLEEP_SHARE_BESIDE_CPU
    return int(host_memory.available_bytes() * share)


def host_spare_bytes() -> int:
    """Return how much of this machine's memory sleepers may still take; below zero, so much is to be given back."""
    reserve = HOST_RESERVE_BYTES + int(psutil.virtual_memory().total * HOST_RESERVE_SHARE)
    return host_memory.available_bytes() - reserve


def foreign_bytes(devices: Sequence[Device], our_pids: Collection[int], reserved: dict[str, int]) -> dict[str, int]:
    """Return, for each real GPU, the memory that programs other than our workers hold.

    Where the driver does not tell processes apart (containers), everything beyond our reservations counts.

    Args:
        devices: whose ids `reserved` has, and the bytes that the ledger counts as taken there.
        our_pids: our workers'; the processes that they started are ours, too.
    """
    by_uuid = {device.uuid: device for device in devices if device.uuid}
    result: dict[str, int] = {}
    with _nvml() as nvml:
        if nvml is None:
            return result
        ours = _with_children(our_pids)
        for uuid, device in by_uuid.items():
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
                used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
                running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except nvml.NVMLError:  # It is gone, or tells nothing: the others still do.
                continue
            held, ledger = [p.usedGpuMemory for p in running if p.pid in ours], reserved.get(device.id, 0)
            # What our processes hold beyond the ledger, CUDA's own for each of them, is as little to be had as others'.
            result[device.id] = max(0, used - (min(sum(held), ledger) if held and all(held) else ledger))
    return result


def _with_children(pids: Collection[int]) -> set[int]:
    """Return processes and all that they started: a split model has one for each device."""
    found = set(pids)
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return found


def num_physical_cores() -> int:
    """Return the physical cores that this process may run on: hyperthreads do not help matrix products."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def configured_on(node: str, configured: Iterable[DeviceConfig]) -> tuple[DeviceConfig, ...]:
    """Return the devices that are configured for one machine (empty: this one), as it names them itself."""
    parts = ((config, *config.id.rpartition("/")) for config in configured)
    return tuple(config.model_copy(update={"id": name}) for config, of, _, name in parts if of == node)


def seen_from_elsewhere(device: Device, node: str, num_cores: int) -> Device:
    """Return a device that another machine found, as it is called here."""
    return replace(device, id=f"{node}/{device.id}", node=node, num_cores=num_cores)


def worker_devices(placed: Sequence[Device]) -> list[str]:
    """Return devices as the worker's own process numbers them: pinning leaves a GPU worker exactly its own."""
    return [f"cuda:{index}" if device.kind == "cuda" else "cpu" for index, device in enumerate(placed)]


def worker_env(placed: Sequence[Device], num_threads: int) -> dict[str, str]:
    """Return the environment that pins a worker process, to be set before it initialises any device."""
    if placed[0].kind != "cuda":
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    visible = ",".join(device.uuid or device.local_id.rpartition(":")[2] or "0" for device in placed)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
