"""Devices: discovery without a driver, virtual devices, pinning."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hostler.config import DeviceConfig

from orchestrator import devices
from orchestrator.devices import Device


def test_without_a_driver_the_cpu_is_the_one_device() -> None:
    found = devices.discover()
    if found[0].kind == "cuda":
        return
    assert [d.id for d in found] == ["cpu"]
    assert found[0].budget_bytes >= devices.MIN_CPU_BUDGET_BYTES
    assert found[0].auto_budget


def test_configured_devices_replace_the_discovered_ones() -> None:
    small, large = DeviceConfig(id="small", budget=10**9), DeviceConfig(id="large", budget=2 * 10**9)
    found = devices.discover((small, large))
    assert [(d.id, d.kind, d.budget_bytes, d.auto_budget) for d in found] == [
        ("small", "cpu", 10**9, False),
        ("large", "cpu", 2 * 10**9, False),
    ]


def test_a_gpu_worker_sees_its_gpu_alone_and_as_the_first() -> None:
    gpu = Device("cuda:3", "cuda", "H100", 80 * 10**9, 76 * 10**9, uuid="GPU-abc")
    assert devices.worker_env([gpu], 4)["CUDA_VISIBLE_DEVICES"] == "GPU-abc"
    assert devices.worker_devices([gpu, gpu]) == ["cuda:0", "cuda:1"]
    unnamed = Device("cuda:3", "cuda", "", 0, 76 * 10**9)
    assert devices.worker_env([unnamed], 4)["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_cpu_worker_sees_no_gpu_and_knows_its_threads() -> None:
    env = devices.worker_env([Device("cpu", "cpu", "CPU", 0, 10**9)], 2)
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["OMP_NUM_THREADS"] == "2"


GB = 10**9


class FakeNvml:
    """Two cards of 80 GB; `broken` answer nothing, `unified` have no memory of their own."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801  (NVML's name)
        pass

    def __init__(self) -> None:
        self.broken: set[int] = set()
        self.unified: set[int] = set()
        self.used = [0, 0]
        self.running: list[list[tuple[int, int | None]]] = [[], []]

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.broken:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return self.nvmlDeviceGetHandleByIndex(int(uuid[-1]))

    def nvmlDeviceGetUUID(self, index: int) -> str:  # noqa: N802
        return f"GPU-abc-{index}"

    def nvmlDeviceGetName(self, index: int) -> str:  # noqa: N802
        return "H100"

    def nvmlDeviceGetMemoryInfo(self, index: int) -> Any:  # noqa: N802
        if index in self.unified:
            raise self.NVMLError_NotSupported
        return SimpleNamespace(total=80 * GB, used=self.used[index])

    def nvmlDeviceGetComputeRunningProcesses(self, index: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.running[index]]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()

    @contextlib.contextmanager
    def opened() -> Iterator[FakeNvml]:
        yield fake

    monkeypatch.setattr(devices, "_nvml", opened)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, [0, 1]), ("1", [1]), ("1,0", [0, 1]), ("GPU-abc-0", [0]), ("GPU-abc", [0, 1]), ("", []), ("-1", []),
        ("0,-1,1", [0]), ("7", []),
    ],
)  # fmt: skip
def test_gpus_that_the_user_hides_are_left_alone(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, chosen: str | None, seen: list[int]
) -> None:
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [d.id for d in devices.discover()] == ([f"cuda:{i}" for i in seen] or ["cpu"])


def test_a_gpu_that_answers_nothing_is_left_out_and_one_without_memory_of_its_own_has_the_hosts(nvml: FakeNvml) -> None:
    nvml.broken, nvml.unified = {0}, {1}
    (found,) = devices.discover()
    assert (found.id, found.total_bytes) == ("cuda:1", psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("running", "foreign_gb"),
    [
        ([(1, 30 * GB)], 10),  # ours, within the ledger
        ([(1, 36 * GB)], 5),  # with 1 GB beyond it, which nobody else can have
        ([(1, 0)], 5),  # the driver says nothing of it: containers, Windows
        ([(1, None)], 5),
        ([(99, 40 * GB)], 5),  # nor whose it is
    ],
)
def test_what_others_hold_is_what_our_processes_do_not(
    nvml: FakeNvml, running: list[tuple[int, int | None]], foreign_gb: int
) -> None:
    nvml.used[0], nvml.running[0] = 40 * GB, running
    (first, second) = devices.discover()
    seen = devices.foreign_bytes([first, second], {1}, {"cuda:0": 35 * GB})
    assert seen == {"cuda:0": foreign_gb * GB, "cuda:1": 0}


def test_processes_that_a_worker_started_are_ours_and_a_lost_gpu_hides_no_other(nvml: FakeNvml) -> None:
    found = devices.discover()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        nvml.used[1], nvml.running[1], nvml.broken = 40 * GB, [(child.pid, 30 * GB)], {0}
        seen = devices.foreign_bytes(found, {os.getpid()}, {"cuda:1": 35 * GB})
        child.kill()
    assert seen == {"cuda:1": 10 * GB}
