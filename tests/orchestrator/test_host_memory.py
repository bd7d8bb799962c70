"""Limits of control groups, as the two generations of them tell them in files."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from orchestrator import devices, host_memory

GIB = 2**30


def group(path: Path, **values: str | int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (path / name.replace("__", ".")).write_text(f"{value}\n")


def seen(tmp_path: Path, membership: str) -> int:
    (tmp_path / "membership").write_text(membership)
    return host_memory.available_bytes(tmp_path, tmp_path / "membership")


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 64 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def test_without_limits_it_is_what_the_machine_has_free(tmp_path: Path) -> None:
    group(tmp_path / "user.slice", memory__max="max", memory__high="max", memory__current=9 * GIB)
    assert seen(tmp_path, "0::/user.slice\n") == 64 * GIB
    assert seen(tmp_path, "0::/nowhere\n") == 64 * GIB
    assert host_memory.available_bytes(tmp_path, tmp_path / "none") == 64 * GIB


def test_the_narrowest_group_counts_and_pages_of_files_come_back(tmp_path: Path) -> None:
    outer, inner = tmp_path / "system.slice", tmp_path / "system.slice" / "hostler.service"
    group(outer, memory__max=20 * GIB, memory__current=15 * GIB, memory__stat=f"anon 1\ninactive_file {GIB}")
    group(inner, memory__max=16 * GIB, memory__high=12 * GIB, memory__current=2 * GIB)
    assert seen(tmp_path, "0::/system.slice/hostler.service\n") == 6 * GIB
    group(outer, memory__current=5 * GIB)
    assert seen(tmp_path, "0::/system.slice/hostler.service\n") == 10 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path, memory__max=GIB, memory__current=2 * GIB)
    assert seen(tmp_path, "0::/\n") == 0


def test_the_first_generation_of_groups_is_understood(tmp_path: Path) -> None:
    group(
        tmp_path / "memory" / "docker" / "abc",
        memory__limit_in_bytes=8 * GIB,
        memory__usage_in_bytes=5 * GIB,
        memory__stat=f"inactive_file {GIB}\ntotal_inactive_file {2 * GIB}",
    )
    group(tmp_path / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=30 * GIB)
    assert seen(tmp_path, "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n") == 5 * GIB


def test_a_path_that_leads_out_of_the_tree_ends_there(tmp_path: Path) -> None:
    assert seen(tmp_path, "0::/../../elsewhere\n") == 64 * GIB


def test_the_budgets_of_cpu_and_sleep_go_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10 * GIB)
    (cpu,) = devices.discover()
    assert cpu.budget_bytes == 8 * GIB
    assert devices.sleep_budget_bytes(None, [cpu]) == GIB
