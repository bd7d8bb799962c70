"""The checks of `triton_checks/`, in a process that has Triton: the CPU builds of torch come without it.

The wheel is fetched once, checked by its hash, and what interprets and compiles kernels kept in ~/.cache/hostler/tools.
Where Triton is installed already, it is taken as it is.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.deploy.tools import CACHE
from tests.journeys.server import ROOT
from tests.kept import CannotFetch, fetched, kept

REQUIREMENT = "triton==3.9.0"
# For CPython 3.11 on Linux, x86-64.
SHA256 = "1622118a038b0c6e16fa4a0305da62c8b3c15904ee1cc4d4e65846a25969e41e"
_LEFT_OUT = ("triton/backends/nvidia/lib/cupti", "triton/backends/amd/lib/", "triton/_C/lib/")
_PROGRAMS = "triton/backends/nvidia/bin/"


def triton_site() -> str:
    """Return the folder that Triton is imported from; "" where it is installed. Skips where it is not to be had."""
    if importlib.util.find_spec("triton") is not None:
        return ""
    if sys.platform != "linux" or sys.version_info[:2] != (3, 11):
        pytest.skip(f"Triton is not installed, and {REQUIREMENT} is pinned for CPython 3.11 on Linux alone")
    try:
        return str(kept(CACHE / f"{REQUIREMENT}-cp311-compiler", _unpack))
    except CannotFetch as reason:
        pytest.skip(str(reason))


def _unpack(into: Path) -> None:
    (archive,) = fetched({REQUIREMENT: SHA256}, into.parent)
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(into, [one for one in wheel.namelist() if not one.startswith(_LEFT_OUT)])
    for program in (into / _PROGRAMS).iterdir():
        program.chmod(0o755)


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (triton_site(), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False)


@pytest.mark.timeout(900)
def test_what_runs_on_gpus_alone_holds_under_tritons_interpreter() -> None:
    done = run(["pytest", "-q", "-n", "0", "-rs", "tests/workers/triton_checks"], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_the_cards_that_people_have(tmp_path: Path) -> None:
    done = run(["tests.workers.triton_checks.compiling"], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("all compiled\n"), done.stdout
