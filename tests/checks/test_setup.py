"""Set-up picks a good interpreter and never takes CUDA packages to a machine without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .tree import ROOT

HAS_GPU = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A tree that has what set-up reads, and nothing installed."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/setup.sh", tmp_path / "deploy/setup.sh")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def setup(clone: Path, mode: str = "run", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "deploy/setup.sh", mode],
        cwd=clone,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.skipif(HAS_GPU or sys.platform != "linux", reason="about Linux machines without an NVIDIA GPU")
def test_without_a_source_of_the_cpu_build_setup_refuses_and_installs_nothing(clone: Path) -> None:
    empty = clone / "empty"
    empty.mkdir()
    result = setup(
        clone,
        PYTHON=sys.executable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(empty),
        HOSTLER_TORCH_CPU_INDEX=empty.as_uri(),
    )
    assert result.returncode == 1
    assert "no NVIDIA GPU" in result.stderr
    assert "gigabytes of CUDA packages" in result.stderr
    installed = {path.name for path in (clone / ".venv").glob("lib/python*/site-packages/*")}
    assert not {name for name in installed if name.startswith(("torch", "nvidia", "hostler"))}
    assert not (clone / ".venv/stamp-run").exists()


def test_an_interpreter_that_is_too_old_is_named_in_the_refusal(clone: Path) -> None:
    old = clone / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = setup(clone, PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old} is not Python 3.11" in result.stderr


def test_an_unknown_mode_is_refused_with_the_usage(clone: Path) -> None:
    result = setup(clone, mode="everything")
    assert result.returncode == 2
    assert "usage" in result.stderr
