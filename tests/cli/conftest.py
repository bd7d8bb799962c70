"""Every test of the command line has its own run directory, home and working directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app

from .fakes import FakeServer


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    for name in [name for name in os.environ if name.startswith("HOSTLER_")]:
        monkeypatch.delenv(name)
    base = tempfile.mkdtemp(prefix="hc-", dir="/tmp")  # short: Unix socket paths end at 107 bytes
    monkeypatch.setenv("HOSTLER_RUN_DIR", base)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def hostler() -> Callable[..., Result]:
    """Run a `hostler` command in this process."""

    def run(*args: str, stdin: str = "", env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(app, list(args), input=stdin, env=env)

    return run


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer(8123)
    yield fake
    fake.close()
