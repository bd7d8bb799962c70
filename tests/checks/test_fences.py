"""The import fences hold, and each of them really catches what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .tree import copy_packages

PLANTED = [
    ("gateway", "import workers"),
    ("workers", "import orchestrator"),
    ("orchestrator", "import gateway"),
    ("cli", "import orchestrator"),
    ("proto/hostler", "import cli"),
    ("gateway", "import torch"),
    ("gateway", "import ray"),
    ("cli", "import transformers"),
    ("orchestrator", "import ray.util"),
    ("workers", "import ray"),
    ("workers", "from fastapi import FastAPI"),
    ("proto/hostler", "import torch"),
]


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'proto'}"}
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tree")
    copy_packages(target)
    return target


def test_the_repository_keeps_every_fence(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("package", "line"), PLANTED)
def test_a_planted_violation_is_caught(tree: Path, package: str, line: str) -> None:
    planted = tree / package / "planted_violation.py"
    planted.write_text(f'"""Planted."""\n\n{line}\n')
    try:
        result = lint_imports(tree)
    finally:
        planted.unlink()
    assert result.returncode == 1, result.stdout + result.stderr
    assert "planted_violation" in result.stdout
