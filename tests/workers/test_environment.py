"""What a worker that was started ahead may still be told, and what its imports must leave alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from workers.environment import enter_environment


def test_a_load_sets_variables_and_threads_of_libraries_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    try:
        enter_environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_imports_ahead_of_time_leave_the_devices_open_and_the_process_its_priority() -> None:
    script = """
import os, torch
asked = []
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
before = os.getpriority(os.PRIO_PROCESS, 0)
import workers.preload
assert not asked, f"the driver was asked for devices by torch.cuda.{asked[0]}"
assert os.getpriority(os.PRIO_PROCESS, 0) == before
import sys
assert "workers.text.opening" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
