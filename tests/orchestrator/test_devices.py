"""Devices: discovery without a driver, virtual devices, pinning."""

from __future__ import annotations

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
