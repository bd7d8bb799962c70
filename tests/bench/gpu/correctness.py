"""Correctness on the device: the tests that need one, each kernel's checks run there instead of by an interpreter, and
the engine's own tests with their engines opened there.

Above: the steps. Below: pytest, in processes of its own; `--device` is read in `tests/conftest.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .found import Failed, Found, NotRun, Setting, say
from .needs import missing
from .running import ROOT, environment

ENGINE_TESTS = ("test_text_engine.py", "test_sleeping.py", "test_adapters.py", "test_raw_prompts.py")
"""Of tests/workers: greedy replies against `generate`, batches, prefixes, chunks, preemption, sleep, adapters."""
KERNEL_TESTS = "tests/workers/triton_checks"
_SMALL_TESTS = ("-k", "preempted or second_turn")
_NOTHING_SELECTED = 5
_SHOWN = 12
_PROCESSES = 4


@dataclass(frozen=True, slots=True)
class Tally:
    """What a run of pytest came to; `failed` are names."""

    passed: int
    skipped: int
    failed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"


def read_tally(report: str) -> Tally:
    """Return what a JUnit report says."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = tuple(str(c.get("name")) for c in cases if c.find("failure") is not None or c.find("error") is not None)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Tally(len(cases) - len(failed) - skipped, skipped, failed)


def run_pytest(arguments: Sequence[str], **variables: str) -> Tally:
    """Run pytest, with these environment variables, too, and return its tally.

    Raises:
        Failed: it told nothing: a file could not be read, or an argument not understood.
    """
    with tempfile.TemporaryDirectory(prefix="hostler-gpu-") as directory:
        report = Path(directory) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *_side_by_side(), *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**environment(), **variables}, stdout=sys.stderr, check=False)
        if done.returncode == _NOTHING_SELECTED:
            return Tally(0, 0, ())
        if not report.is_file():
            raise Failed(f"pytest ended with status {done.returncode} and no report")
        tally = read_tally(report.read_text(encoding="utf-8"))
        if done.returncode and not tally.failed:
            raise Failed(f"pytest ended with status {done.returncode}")
        return tally


def _side_by_side() -> list[str]:
    """Return pytest's options for several processes at once, where there are cores and the plugin for it."""
    has_room = len(os.sched_getaffinity(0)) >= 2 * _PROCESSES
    return ["-n", str(_PROCESSES)] if has_room and not missing({"xdist": "pytest-xdist"}) else []


def gpu_test_files() -> list[str]:
    """Return the files that hold tests marked `gpu`."""
    mark = "pytest.mark." + "gpu"
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if mark in file.read_text(encoding="utf-8")]


def check_marked(setting: Setting) -> Found:
    """Run the tests marked `gpu`."""
    if not setting.is_cuda:
        raise NotRun("these tests need a CUDA device")
    return _checked("marked", "tests marked gpu", ["-m", "gpu", *gpu_test_files()])


def check_kernels(setting: Setting) -> Found:
    """Run each kernel's checks on the device: whatever fails there, the engine would quietly serve without."""
    if not setting.is_cuda:
        raise NotRun("on a CPU Triton's interpreter runs them: tests/workers/test_triton.py")
    return _checked("kernels", f"the kernels on {setting.device}", [KERNEL_TESTS], HOSTLER_KERNELS_ON=setting.device)


def check_engine(setting: Setting) -> Found:
    """Run the text engine's own tests, engines on the device."""
    files = [f"tests/workers/{name}" for name in (ENGINE_TESTS[:1] if setting.small else ENGINE_TESTS)]
    chosen = _SMALL_TESTS if setting.small else ()
    arguments = ["--device", setting.device, "-m", "not real_model and not gpu", *chosen, *files]
    return _checked("engine", f"the engine's tests on {setting.device}", arguments)


def _checked(name: str, what: str, arguments: list[str], **variables: str) -> Found:
    tally = run_pytest(arguments, **variables)
    say(f"  {what}: {tally}")
    if tally.failed:
        more = f" and {len(tally.failed) - _SHOWN} more" if len(tally.failed) > _SHOWN else ""
        raise Failed(f"{tally}: {', '.join(tally.failed[:_SHOWN])}{more}")
    if not tally.passed:
        raise Failed(f"no test ran ({tally})")
    found = Found(figures={f"tests_passed_{name}": tally.passed})
    found.add(what, str(tally))
    return found
